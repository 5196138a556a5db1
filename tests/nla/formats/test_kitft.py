"""Pairs of whole models in the reference's format: read, refused, placed, referred to, and written."""

from __future__ import annotations

import datetime
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import parity_pairs as pairs  # type: ignore[import-not-found]

from nla import NLA
from nla.config import NLAConfig, WeightsConfig
from nla.errors import (
    ArchitectureError,
    ArgumentError,
    BaselineError,
    ConfigError,
    ContextLengthError,
    MarkerError,
    SeparateModelsError,
    SidecarError,
    TokenizerMismatchError,
    WeightsError,
)
from nla.formats import kitft, kitft_export
from nla.pair import separate

TEXT = "the cat sat on the mat."


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("full")
    pairs.full_pair(root, "llama")
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a target, an AV and an AR that a test may break; and no hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return shutil.copytree(original, tmp_path / "models")


def load(root: Path, **options) -> NLA:
    return kitft.load(root / "av", root / "ar", root / "target", **options)


def edit(root: Path, role: str, change) -> None:
    path = root / role / "nla_meta.yaml"
    meta = yaml.safe_load(path.read_text())
    change(meta)
    path.write_text(yaml.safe_dump(meta, allow_unicode=True))


# Reading


@pytest.mark.parametrize("spelling, schema", [("av", 2), ("actor", 2), ("actor", 1)])
def test_both_spellings_and_both_schemas_say_the_same(root: Path, spelling: str, schema: int) -> None:
    expected = load(root).config
    for role in ("av", "ar"):
        pairs.write_sidecar(root / role, pairs.make_sidecar(pairs.make_tokenizer(), role, spelling, schema))
    assert load(root).config == expected
    assert expected.point == "resid_post.1"
    assert (expected.injection.mode, expected.injection.norm) == ("replace", pairs.NORM)
    assert (expected.decoder.head_bias, expected.dtype) == (False, "float32")
    assert expected.encoder_prompt == pairs.ENCODER_TEMPLATE.format(injection_char=pairs.MARKER)


def test_models_are_loaded_at_first_use_and_no_more_of_them_than_needed(root: Path) -> None:
    nla = load(root)
    assert nla.roles.loaded == []  # type: ignore[attr-defined]
    nla.reconstruct([TEXT])
    assert nla.roles.loaded == ["decoder"]  # type: ignore[attr-defined]
    acts = nla.read(TEXT)
    assert nla.roles.loaded == ["target", "decoder"]  # type: ignore[attr-defined]
    nla.explain(acts, samples=1, max_new_tokens=2)
    assert nla.roles.loaded == ["target", "encoder", "decoder"]  # type: ignore[attr-defined]
    alone = kitft.load(root / "av", root / "ar", "someone/gated")  # what is never used is never fetched
    assert torch.equal(alone.reconstruct([TEXT]), nla.reconstruct([TEXT]))


def spied(monkeypatch: pytest.MonkeyPatch, keyword: str) -> dict[str, object]:
    """What each model is asked to be loaded with, by its folder; it is then loaded plainly to the CPU."""
    asked: dict[str, object] = {}
    for name in ("load_target", "load_truncated"):
        original = getattr(separate, name)

        def spy(source, *args, original=original, **keywords):
            asked[Path(source).name] = keywords[keyword]
            return original(source, *args, **{**keywords, "device": "cpu", "quantization": None})

        monkeypatch.setattr(separate, name, spy)
    return asked


def test_each_role_goes_to_its_own_device(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = spied(monkeypatch, "device")
    nla = load(root, device={"encoder": "cuda:1", "target": "cuda:0"})
    for role in ("target", "encoder", "decoder"):
        nla.base_of(role)  # type: ignore[arg-type]
    assert asked == {"target": "cuda:0", "av": "cuda:1", "ar": None}
    assert nla.head.weight.device.type == "cpu"
    with pytest.raises(ArgumentError, match="critic"):
        load(root, device={"critic": "cpu"})


def test_quantisation_is_that_of_all_three_models_and_stands_in_the_config(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spied(monkeypatch, "quantization")  # bitsandbytes need not be installed
    nla = load(root, quantization="4bit")
    nla.save_pretrained(root / "pair")
    again = NLA.from_pretrained(root / "pair")
    assert nla.config.quantization == again.config.quantization == "4bit"
    for role in ("target", "encoder", "decoder"):
        again.base_of(role)  # type: ignore[arg-type]
    assert asked == {"target": "4bit", "av": "4bit", "ar": "4bit"}
    with pytest.raises(ConfigError, match="quantization"):
        load(root, quantization="2bit")


def test_the_target_reads_and_stands_for_the_pair_outside_of_roles(root: Path) -> None:
    nla = load(root)
    ids = torch.tensor([nla.tokenizer(TEXT)["input_ids"]])
    bare = pairs.make_model("llama", 0)
    with torch.no_grad():
        expected = bare(ids, output_hidden_states=True).hidden_states[pairs.LAYER + 1][0]
        assert torch.allclose(nla.read(TEXT).vectors, expected[1:], atol=1e-5)
        assert torch.allclose(nla.model(ids).logits, bare(ids).logits, atol=1e-5)
        with nla.role("target"):
            assert torch.allclose(nla.base(ids).logits, bare(ids).logits, atol=1e-5)
        with nla.role("encoder"):
            assert torch.allclose(nla.model(ids).logits, pairs.make_model("llama", 1)(ids).logits, atol=1e-5)
    assert not any(p.requires_grad for role in ("target", "encoder", "decoder") for p in nla.base_of(role).parameters())


def test_what_needs_adapters_is_refused(root: Path) -> None:
    nla = load(root)
    with pytest.raises(SeparateModelsError, match="joint training"):
        nla.require_adapters("joint training")
    with pytest.raises(SeparateModelsError, match="export"):
        kitft_export.export_pair(nla, root / "out")


def test_scoring_needs_baselines_and_says_how_to_get_them(root: Path) -> None:
    nla = load(root)
    acts, train = nla.read(TEXT), nla.read("a red dog ran under the blue tree.\n")
    predicted = nla.reconstruct(nla.explain(acts, samples=1, max_new_tokens=2))
    with pytest.raises(BaselineError, match=r"no baselines.*nla\.fit_baselines"):
        nla.score(acts, predicted)
    nla.fit_baselines(train)
    unit = torch.nn.functional.normalize(train.vectors, dim=1)
    assert torch.allclose(nla.baselines["global"].mean, unit.mean(dim=0), atol=1e-6)
    assert nla.score(acts, predicted).n == len(acts)
    assert nla.config.activation_norm == pytest.approx(float(train.vectors.norm(dim=1).mean()))
    assert torch.allclose(nla.reconstruct([TEXT]).norm(dim=1), torch.tensor(nla.config.activation_norm))


def test_braces_in_templates_are_those_of_a_format_string(root: Path) -> None:
    def brace(meta: dict) -> None:
        meta["prompt_templates"]["ar"] = "<text>{explanation}</text> {{}}<summary>"

    edit(root, "ar", brace)
    assert load(root).config.decoder_template == "<text>{explanation}</text> {}<summary>"


# Refusals


@pytest.mark.parametrize(
    "role, keys",
    [
        ("av", ("kind",)),
        ("av", ("role",)),
        ("av", ("d_model",)),
        ("av", ("extraction", "injection_scale")),
        ("av", ("tokens", "injection_char")),
        ("av", ("tokens", "injection_left_neighbor_id")),
        ("av", ("prompt_templates", "av")),
        ("ar", ("prompt_templates", "ar")),
        ("ar", ("d_model",)),
    ],
)
def test_a_missing_key_is_named_with_its_file(root: Path, role: str, keys: tuple[str, ...]) -> None:
    def drop(meta: dict) -> None:
        for key in keys[:-1]:
            meta = meta[key]
        del meta[keys[-1]]

    edit(root, role, drop)
    with pytest.raises(SidecarError, match=rf"{role}/nla_meta\.yaml.*{keys[-1]}"):
        load(root)


def test_a_sidecar_that_is_missing_or_no_yaml_is_refused(root: Path) -> None:
    for content in ("- a\n- list", "kind: [", ""):
        (root / "ar" / "nla_meta.yaml").write_text(content)
        with pytest.raises(SidecarError, match=r"nla_meta\.yaml"):
            load(root)
    (root / "ar" / "nla_meta.yaml").unlink()
    with pytest.raises(SidecarError, match=r"no readable.*nla_meta\.yaml"):
        load(root)


@pytest.mark.parametrize(
    "role, change, named",
    [
        ("av", {"schema_version": 3}, "schema_version: 3"),
        ("av", {"d_model": 64}, "d_model: 64, beside weights of width 32"),
        ("ar", {"d_model": 64}, "d_model: 64, beside weights of width 32"),
        ("ar", {"extraction_layer_index": 2}, "layer of the AR"),
        ("av", {"extraction_layer_index": 0}, "layer of the AV"),
        ("ar", {"extraction": {"mse_scale": None}}, "mse_scale"),
        ("av", {"extraction": {"injection_scale": "large"}}, "scale of 'large'"),
        ("av", {"prompt_templates": {"av": "{injection_char} {other}"}}, "cannot be filled"),
    ],
)
def test_a_sidecar_of_other_weights_is_refused(root: Path, role: str, change: dict, named: str) -> None:
    edit(root, role, lambda meta: meta.update(change))
    with pytest.raises(SidecarError, match=named):
        load(root)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"extraction": "x"}, "extraction: 'x'"),
        ({"prompt_templates": "x"}, "prompt_templates: 'x'"),
        ({"prompt_templates": {"av": 5}}, r"prompt_templates\.av: 5"),
        ({"prompt_templates": {"av": "a {injection_char.foo}"}}, "cannot be filled"),
        ({"prompt_templates": {"av": "a {injection_char:>9}"}}, "cannot be filled"),
        ({"role": ["av"]}, r"role: \['av'\]"),
        ({"tokens": [1]}, r"tokens: \[1\]"),
        ({"critic": 3}, "critic: 3"),
        ({"extraction_layer_index": "1"}, "extraction_layer_index: '1'"),
        ({"base_checkpoint": 7}, "base_checkpoint: 7"),
        ({"extraction": {"injection_scale": float("nan")}}, "scale of nan"),
        ({"extraction": {"injection_scale": -1}}, "scale of -1"),
    ],
)
def test_a_value_of_another_type_is_a_sidecar_error(root: Path, change: dict, named: str) -> None:
    edit(root, "av", lambda meta: meta.update(change))
    with pytest.raises(SidecarError, match=named):
        load(root)


def test_a_type_that_is_not_known_is_refused_and_nobody_is_asked_to_run_its_code(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "n")
    path = root / "av" / "config.json"
    code = {"AutoConfig": "someone/repository--configuration.Config"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "mystery", "auto_map": code}))
    with pytest.raises(ArchitectureError, match="mystery"):
        load(root)
    assert asked == []


def test_a_tilde_is_a_folder_and_no_hub_id(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root))
    nla = kitft.load("~/av", "~/ar", "~/target", device="cpu")
    assert torch.equal(nla.read(TEXT).vectors, load(root).read(TEXT).vectors)
    assert nla.config.encoder_weights == WeightsConfig(source=str(root / "av"))


def test_an_av_and_an_ar_of_different_pairs_are_refused(root: Path) -> None:
    with pytest.raises(SidecarError, match="give the AV first"):
        kitft.load(root / "ar", root / "av", root / "target")
    edit(root, "ar", lambda meta: meta.update(base_checkpoint="someone/else"))
    with pytest.raises(SidecarError, match=r"base_checkpoint.*someone/base.*someone/else"):
        kitft.load(root / "av", root / "ar")
    load(root)  # a target that is named stands for both
    edit(root, "ar", lambda meta: meta["tokens"].update(injection_token_id=7))
    with pytest.raises(SidecarError, match="tokens"):
        load(root)


def test_another_tokenizer_is_refused(root: Path) -> None:
    other = pairs.make_tokenizer()
    other.add_tokens(["zebra"])
    other.save_pretrained(root / "ar")
    with pytest.raises(TokenizerMismatchError, match="vocabularies"):
        load(root)
    pairs.make_tokenizer(bos=False).save_pretrained(root / "ar")
    with pytest.raises(TokenizerMismatchError, match="split a text"):
        load(root)
    shutil.copytree(root / "av", root / "ar", ignore=shutil.ignore_patterns("*.safetensors", "*.yaml", "config.json"),
                    dirs_exist_ok=True)  # fmt: skip
    pairs.make_tokenizer(bos=False).save_pretrained(root / "target")
    with pytest.raises(TokenizerMismatchError, match="target"):
        load(root).read(TEXT)


@pytest.mark.parametrize("template, count", [("<bos><bos>", 2), ("", 0)])
def test_bos_stands_exactly_once_in_the_chat_prompt(root: Path, template: str, count: int) -> None:
    for role in ("av", "ar"):
        tokenizer = pairs.make_tokenizer()
        tokenizer.chat_template = template + pairs.CHAT_TEMPLATE
        tokenizer.save_pretrained(root / role)
    with pytest.raises(TokenizerMismatchError, match=f"{count} BOS tokens in the chat prompt"):
        load(root)


def test_bos_stands_exactly_once_in_the_decoders_text(root: Path) -> None:
    for role in ("av", "ar"):
        path = root / role / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": None}))
    with pytest.raises(TokenizerMismatchError, match="0 BOS tokens in the decoder's text"):
        load(root)


def test_a_marker_of_another_id_or_with_other_neighbours_is_refused(root: Path) -> None:
    for role in ("av", "ar"):
        edit(root, role, lambda meta: meta["tokens"].update(injection_right_neighbor_id=9))
    with pytest.raises(MarkerError, match="neighbours in training"):
        load(root)
    for role in ("av", "ar"):
        edit(root, role, lambda meta: meta["tokens"].update(injection_token_id=9))
    with pytest.raises(TokenizerMismatchError, match="marker"):
        load(root)


def test_a_missing_misshapen_or_broken_head_is_refused(root: Path) -> None:
    path = root / "ar" / "value_head.safetensors"
    save_file({"weight": torch.eye(4)}, path)
    with pytest.raises(WeightsError, match=r"\(4, 4\)"):
        load(root).reconstruct([TEXT])
    path.unlink()
    with pytest.raises(WeightsError, match="value_head"):
        load(root).reconstruct([TEXT])


# A native folder that refers to them


def test_an_import_refers_to_the_weights_and_comes_back_the_same(root: Path) -> None:
    nla = load(root)
    nla.save_pretrained(root / "pair")
    again = NLA.from_pretrained(root / "pair", device={"decoder": "cpu"})
    assert again.roles.loaded == []  # type: ignore[attr-defined]
    assert torch.equal(again.reconstruct([TEXT]), nla.reconstruct([TEXT]))
    acts = again.read(TEXT)
    assert again.explain(acts, samples=2, max_new_tokens=4).texts == nla.explain(acts, 2, max_new_tokens=4).texts
    size = sum(path.stat().st_size for path in (root / "pair").rglob("*"))
    assert size < 30_000 < (root / "av" / "model.safetensors").stat().st_size
    config = NLAConfig.load(root / "pair")
    assert config.encoder_weights is not None
    assert (config.target, config.encoder_weights.source) == ("../target", "../av")
    again.fit_baselines(acts)
    again.save_pretrained(root / "pair2")
    assert NLA.from_pretrained(root / "pair2").baselines.keys() == {"global"}


@pytest.mark.parametrize("role", ["target", "av", "ar"])
def test_weights_that_changed_since_the_import_are_refused_at_first_use(root: Path, role: str) -> None:
    load(root).save_pretrained(root / "pair")
    path = root / role / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, path, metadata={"format": "pt"})
    nla = NLA.from_pretrained(root / "pair")
    name = {"target": "target", "av": "encoder", "ar": "decoder"}[role]
    with pytest.raises(WeightsError, match=f"the {name} in .*{role}"):
        nla.base_of(name)  # type: ignore[arg-type]


def test_a_folder_outside_of_a_downloaded_pair_is_refused(root: Path) -> None:
    from nla.pair.separate import source_of

    load(root).save_pretrained(root / "pair")
    weights = NLAConfig.load(root / "pair").encoder_weights
    assert weights is not None
    with pytest.raises(ConfigError, match="from the hub"):
        source_of(weights, root / "pair", from_hub=True)


@pytest.mark.parametrize("role, said", [("av", "no weights at"), ("target", "no target at")])
def test_a_folder_that_is_gone_is_not_looked_for_beside_the_working_directory(
    root: Path, monkeypatch: pytest.MonkeyPatch, role: str, said: str
) -> None:
    load(root).save_pretrained(root / "pair")
    (root.parent / "elsewhere" / "here").mkdir(parents=True)
    shutil.move(root / role, root.parent / "elsewhere" / role)
    monkeypatch.chdir(root.parent / "elsewhere" / "here")  # where ../av is a whole encoder
    with pytest.raises(ConfigError, match=f"{said} {root / role}"):
        NLA.from_pretrained(root / "pair")


def test_places_by_role_are_refused_for_a_shared_base() -> None:
    with pytest.raises(ArgumentError, match="one base"):
        NLA.from_pretrained("couplets", device={"decoder": "cpu"})


def test_the_longest_answer_is_the_reference_clients(root: Path) -> None:
    nla = load(root)
    assert nla.config.max_new_tokens == 200
    with pytest.raises(ContextLengthError, match="max_new_tokens=200"):
        nla.explain(pairs.probe_vectors())


def test_a_sidecar_may_hold_keys_that_we_do_not_read_of_any_kind(root: Path) -> None:
    edit(root, "av", lambda meta: meta.update({7: "seven", None: [1], "made": datetime.date(2026, 1, 2)}))
    assert load(root).config.d_model > 0
