"""The contract of a pair: valid or refused, whole or refused, and true of the tokenizer and target at hand."""

import dataclasses
import hashlib
import json
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nla.config import DecoderConfig, InjectionConfig, NLAConfig, WeightsConfig, tokenizer_hash
from nla.errors import ConfigError, StorageError, TokenizerMismatchError

SPECIAL = ["<|unk|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|marker|>"]
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(words=("Explain", ":", ".", "cat", "rat"), template=TEMPLATE, split_punctuation=True):
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    whitespace = pre_tokenizers.Whitespace() if split_punctuation else pre_tokenizers.WhitespaceSplit()
    backend.pre_tokenizer = whitespace
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<|unk|>",
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|marker|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def make_config(tokenizer, injection=None, **changes):
    ids = tokenizer.convert_tokens_to_ids
    fields = {
        "target": "planner",
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "d_model": 16,
        "dtype": "float32",
        "point": "resid_post.3",
        "injection": injection
        or InjectionConfig(
            marker="<|marker|>", marker_id=ids("<|marker|>"), left_id=ids(":"), right_id=ids("."), norm=2.5
        ),
        "encoder_prompt": "Explain:<|marker|>.",
        "max_new_tokens": 40,
        "activation_norm": 11.25,
    }
    return NLAConfig(**{**fields, **changes})


def make_model(**changes):
    fields = {"hidden_size": 16, "num_hidden_layers": 6, "vocab_size": 11, "_commit_hash": None}
    return SimpleNamespace(config=SimpleNamespace(**{**fields, **changes}))


def test_a_saved_config_loads_equal(tokenizer, tmp_path):
    config = make_config(tokenizer, target_revision="a" * 40)
    config.save(tmp_path)
    assert NLAConfig.load(tmp_path) == config


def test_a_config_cannot_be_changed_in_place(tokenizer):
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_config(tokenizer).d_model = 3  # type: ignore[misc]


def edit_norm(content):
    content["injection"]["norm"] = 3.0


def edit_template(content):
    content["decoder_template"] = "{explanation}"


def drop_checksum(content):
    del content["checksum"]


def add_field(content):
    content["surprise"] = 1


@pytest.mark.parametrize("edit", [edit_norm, edit_template, drop_checksum, add_field])
def test_an_edited_config_is_refused_and_the_next_step_named(tokenizer, tmp_path, edit):
    make_config(tokenizer).save(tmp_path)
    file = tmp_path / "nla_config.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"(?s)checksum.*Next: restore the file"):
        NLAConfig.load(tmp_path)


def test_reformatting_the_file_is_no_edit(tokenizer, tmp_path):
    config = make_config(tokenizer)
    config.save(tmp_path)
    file = tmp_path / "nla_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True))
    assert NLAConfig.load(tmp_path) == config


@pytest.mark.parametrize("content", [None, "", "{", "[1, 2]", b"\xff\xfe"])
def test_a_missing_or_malformed_config_is_refused(tmp_path, content):
    if content is not None:
        file = tmp_path / "nla_config.json"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match="Next: "):
        NLAConfig.load(tmp_path)


@pytest.mark.parametrize(
    "field, value",
    [
        ("d_model", 0),
        ("d_model", 16.0),
        ("d_model", True),
        ("max_new_tokens", -1),
        ("end_ids", []),
        ("end_ids", [2, -1]),
        ("end_ids", [2, True]),
        ("end_ids", 2),
        ("activation_norm", float("nan")),
        ("activation_norm", 0.0),
        ("dtype", "int8"),
        ("point", "block 3"),
        ("target", ""),
        ("target", None),
        ("encoder_prompt", "Explain:."),
        ("encoder_prompt", "<|marker|> and <|marker|>"),
        ("decoder_template", "<text></text>"),
        ("decoder_template", "{explanation}{explanation}"),
        ("explanation_close", "<explanation>"),
        ("format_version", 2),
        ("injection", {"mode": "replace"}),
        ("files", ["encoder/adapter_config.json"]),
        ("target_weights", 3),
    ],
)
def test_an_invalid_value_is_refused_by_name(tokenizer, field, value):
    with pytest.raises(ConfigError, match=field):
        make_config(tokenizer, **{field: value})


@pytest.mark.parametrize(
    "field, value",
    [
        ("mode", "add"),
        ("mode", "concat"),
        ("marker", ""),
        ("marker_id", -1),
        ("left_id", 5),
        ("norm", float("inf")),
        ("norm", None),
        ("layer", 1),
    ],
)
def test_an_invalid_injection_is_refused(field, value):
    fields = {"marker": "<|marker|>", "marker_id": 5, "left_id": 7, "right_id": 8, "norm": 1.0}
    with pytest.raises(ConfigError, match="injection"):
        InjectionConfig(**{**fields, field: value})


ADDED = {"marker": "<|marker|>", "marker_id": 5, "left_id": 7, "right_id": 8, "mode": "add", "norm": None, "layer": 1}


def test_an_activation_that_is_added_has_a_block_and_no_norm():
    assert InjectionConfig(**ADDED).layer == 1
    for change in ({"norm": 2.0}, {"layer": None}, {"layer": -1}):
        with pytest.raises(ConfigError, match="injection"):
            InjectionConfig(**{**ADDED, **change})


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization": "2bit"},
        {"encoder_weights": WeightsConfig(source="some/av")},
        {"decoder_weights": WeightsConfig(source="some/ar")},
    ],
)
def test_half_a_pair_of_whole_models_and_unknown_quantisation_are_refused(tokenizer, changes):
    with pytest.raises(ConfigError, match=r"quantization|decoder_weights"):
        make_config(tokenizer, **changes)


def test_every_kind_of_part_survives_the_file(tokenizer, tmp_path):
    config = make_config(
        tokenizer,
        injection=InjectionConfig(**{**ADDED, "marker_id": tokenizer.convert_tokens_to_ids("<|marker|>")}),
        quantization="4bit",
        decoder=DecoderConfig(final_norm=False, head_bias=False, special_tokens=False),
        encoder_weights=WeightsConfig(source="some/av", revision="abc"),
        decoder_weights=WeightsConfig(source="../ar", sha256="0" * 64),
    )
    config.save(tmp_path)
    assert NLAConfig.load(tmp_path) == config
    assert config.separate


def test_a_file_from_before_a_field_existed_loads_with_what_was_always_done(tokenizer, tmp_path):
    """The checksum is over what the file holds, so such a file is whole."""
    config = make_config(tokenizer)
    content = config.to_json()
    for name in ("checksum", "quantization", "decoder", "encoder_weights", "decoder_weights", "end_ids"):
        del content[name]
    del content["injection"]["layer"]
    whole = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    content["checksum"] = f"sha256:{hashlib.sha256(whole.encode()).hexdigest()}"
    (tmp_path / "nla_config.json").write_text(json.dumps(content))
    assert NLAConfig.load(tmp_path) == config
    assert not config.separate


def test_the_embedded_organisms_pairs_files_are_such(tmp_path):
    from nla.organisms import PAIRS, TARGETS

    for folder in (PAIRS[name] for name in PAIRS if name in TARGETS):
        assert "decoder_weights" not in json.loads((folder / "nla_config.json").read_text())
        assert NLAConfig.load(folder).decoder == DecoderConfig()


def test_a_field_that_was_always_there_may_not_be_lacking(tokenizer):
    content = make_config(tokenizer).to_json()
    for name in ("checksum", "files"):
        del content[name]
    whole = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    content["checksum"] = f"sha256:{hashlib.sha256(whole.encode()).hexdigest()}"
    with pytest.raises(ConfigError, match=r"without files"):
        NLAConfig.from_json(content)


def test_the_pair_s_own_tokenizer_and_target_pass_the_check(tokenizer):
    make_config(tokenizer).check(tokenizer, make_model())


def test_the_hash_survives_saving_and_a_padded_call(tokenizer, tmp_path):
    before = tokenizer_hash(tokenizer)
    tokenizer(["cat", "cat rat"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == before


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"words": ("Explain", ":", ".", "rat", "cat")}, "vocabulary"),
        ({"words": ("Explain", ":", ".", "cat", "rat", "hat")}, "vocabulary"),
        ({"template": TEMPLATE + " "}, "chat-template"),
        ({"split_punctuation": False}, "pipeline"),
    ],
)
def test_another_tokenizer_is_refused_and_what_differs_is_named(tokenizer, changes, part):
    with pytest.raises(TokenizerMismatchError, match=f"differs in its {part};"):
        make_config(tokenizer).check(make_tokenizer(**changes), make_model())


def test_other_special_tokens_are_refused(tokenizer):
    config = make_config(tokenizer)
    other = make_tokenizer()
    other.eos_token = "<|assistant|>"
    with pytest.raises(TokenizerMismatchError, match="special-tokens"):
        config.check(other, make_model())


def test_an_added_token_that_swallows_spaces_is_another_token():
    plain, greedy = make_tokenizer(), make_tokenizer()
    plain.add_tokens([AddedToken("mat")])
    greedy.add_tokens([AddedToken("mat", lstrip=True)])
    with pytest.raises(TokenizerMismatchError, match="special-tokens"):
        make_config(plain).check(greedy, make_model(vocab_size=12))


def test_an_added_token_is_refused(tokenizer):
    config = make_config(tokenizer)
    tokenizer.add_tokens(["mat"])
    with pytest.raises(TokenizerMismatchError, match="vocabulary"):
        config.check(tokenizer, make_model())


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"hidden_size": 8}, "width 8.*d_model 16"),
        ({"num_hidden_layers": 3}, "3 blocks.*at least 4"),
        ({"vocab_size": 5}, "5 tokens"),
        ({"_commit_hash": "b" * 40}, "revision b"),
    ],
)
def test_another_target_is_refused_and_what_differs_is_named(tokenizer, changes, named):
    config = make_config(tokenizer, target_revision="a" * 40)
    with pytest.raises(ConfigError, match=named):
        config.check(tokenizer, make_model(**changes))


def test_a_target_cut_just_after_the_point_passes(tokenizer):
    make_config(tokenizer).check(tokenizer, make_model(num_hidden_layers=4))


def test_a_relative_target_is_found_beside_the_config_and_another_is_a_hub_id(tokenizer, tmp_path):
    (tmp_path / "planner").mkdir()
    (tmp_path / "pair").mkdir()
    assert make_config(tokenizer, target="../planner").resolve_target(tmp_path / "pair") == str(tmp_path / "planner")
    assert make_config(tokenizer, target="some/model").resolve_target(tmp_path / "pair") == "some/model"


def test_a_folder_that_cannot_be_written_is_a_storage_error(tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Next: "):
        make_config(tokenizer).save(tmp_path / "file")
