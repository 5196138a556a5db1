"""Lenses, SelfIE and oracles against the model's own outputs."""

from __future__ import annotations

import json

import pytest
import torch

from nla.errors import ArgumentError, ConfigError, ShapeError, WeightsError
from nla.eval.auroc import macro_auroc
from nla.eval.readers import lenses, patchscopes
from nla.eval.readers.patchscopes import Prompt
from nla.eval.target import Target
from nla.metrics import rescale
from nla.models.lora import save_adapter
from nla.models.points import Point
from nla.models.read import read, vectors_at
from tests.helpers import tiny
from tests.helpers.tiny import D_MODEL, MARKER, MODELS, N_BLOCKS, TEXTS, make_model, make_pair, make_tokenizer

LAST = Point("resid_post", N_BLOCKS - 1)


def target_of(model, point: str | Point = "resid_post.1") -> Target:
    return Target(model, make_tokenizer(), Point.parse(point))


def check_lens(model) -> None:
    """The lens at the last block against the model's own forward pass; logits are large enough for caps to show."""
    model.get_output_embeddings().weight.data.mul_(20)
    target = target_of(model, LAST)
    acts = read(model, target.tokenizer, TEXTS[:1], LAST)
    with torch.no_grad():
        own = model(input_ids=torch.tensor([[span.token_id for span in acts.spans]])).logits[0]
    assert own.abs().max() > 20
    assert torch.allclose(lenses.logits(target, acts.vectors), own, atol=1e-3)


@pytest.mark.parametrize("architecture", MODELS)
def test_the_lens_at_the_last_block_gives_the_models_own_logits(architecture: str) -> None:
    model = make_model(architecture)
    modules, config = [id(module) for module in model.modules()], model.config.to_dict()
    check_lens(model)
    assert [id(module) for module in model.modules()] == modules and model.config.to_dict() == config


@pytest.mark.parametrize(("name", "scale"), [("Granite", {"logits_scaling": 0.25}), ("Cohere", {"logit_scale": 3.0})])
def test_an_architecture_that_scales_its_logits_needs_nothing_but_its_layout(name, scale, monkeypatch) -> None:
    monkeypatch.setitem(tiny.MODELS, name.lower(), (name, "model.norm", scale))
    check_lens(make_model(name.lower()))


def test_vectors_of_another_width_have_no_logits() -> None:
    with pytest.raises(ShapeError):
        lenses.logits(target_of(make_model()), torch.randn(2, 5))


def test_the_lenses_read_a_pairs_bare_target_and_not_its_adapters() -> None:
    pair = make_pair(scale=0.5)
    bare, vectors = make_model(), torch.randn(3, D_MODEL)
    expected = lenses.logits(target_of(bare), vectors)
    assert torch.allclose(lenses.logits(Target.of(pair), vectors), expected, atol=1e-5)


def test_a_tuned_lens_starts_as_the_identity_and_stays_there_at_the_last_block() -> None:
    vectors, model = torch.randn(4, D_MODEL), make_model()
    assert torch.equal(lenses.identity_lens(D_MODEL)(vectors), vectors)
    start = lenses.fit_lens(target_of(model, LAST), TEXTS, n_steps=0)
    assert start.loss == pytest.approx(0.0, abs=1e-5) and torch.equal(start(vectors), vectors)
    fitted = lenses.fit_lens(target_of(model, LAST), TEXTS, n_steps=3)
    assert fitted.loss == pytest.approx(0.0, abs=1e-3)
    with pytest.raises(ArgumentError):
        lenses.fit_lens(target_of(model), [], n_steps=1)


def test_fitting_the_lens_brings_it_closer_and_leaves_the_target_alone() -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lens = lenses.fit_lens(target_of(model), TEXTS, n_steps=60)
    assert lens.loss < 0.8 * lens.plain_loss
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    vectors = read(model, make_tokenizer(), TEXTS, "resid_post.1").vectors
    assert not torch.equal(lens(vectors), vectors)


def test_the_lens_is_fitted_on_a_sample_of_the_tokens_that_fits_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def spy(*arguments, **options):
        streams = vectors_at(*arguments, **options)
        sizes.append(len(streams))
        return streams

    monkeypatch.setattr(lenses, "vectors_at", spy)
    monkeypatch.setattr(lenses, "MAX_ACTIVATIONS", 6)
    lenses.fit_lens(target_of(make_model()), TEXTS, n_steps=1)
    assert len(sizes) == 1 and 6 <= sizes[0] <= 8  # of each of four texts two tokens, both ends in one pass
    monkeypatch.setattr(lenses, "MAX_ACTIVATIONS", 3)
    lenses.fit_lens(target_of(make_model()), TEXTS, n_steps=1)
    assert sizes[1:] == [3]


def test_lens_scores_are_the_likeliest_words_and_a_class_without_any_is_what_they_leave() -> None:
    model = make_model()
    target, tokenizer = target_of(model), make_tokenizer()
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in (" cat", " dog", "dog")}
    assert lenses.first_tokens(target, "dog") == {ids[" dog"], ids["dog"]}
    with torch.no_grad():  # the final norm and these rows of the unembedding read axes 0 and 1
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids[" cat"], 0] = model.lm_head.weight[ids["dog"], 1] = 3.0
    vectors = torch.eye(D_MODEL)[:2]
    words = {"a": ("cat",), "b": ("dog", "zebra")}
    scores = lenses.class_scores(target, vectors, words, ["a", "b"])
    assert scores is not None and scores.argmax(1).tolist() == [0, 1]
    assert scores.exp().sum(1).tolist() == pytest.approx([1.0, 1.0])
    unknown = lenses.class_scores(target, vectors, {"a": ("cat",), "b": ("zebra",)}, ["a", "b"])
    assert unknown is not None and unknown.exp().sum(1).tolist() == pytest.approx([1.0, 1.0])
    for names, expected in ((["a", "b"], 1.0), (["b", "a"], 1.0)):  # whichever class it is
        found = lenses.class_scores(target, vectors, {"a": ("cat",), "b": ("zebra",)}, names)
        assert (
            found is not None
            and float(macro_auroc(found, torch.tensor([names.index("a"), names.index("b")]))) == expected
        )
    assert lenses.class_scores(target, vectors, {}, ["a", "b"]) is None
    assert lenses.top_tokens(target, vectors, n_top=1) == ["cat", "dog"]


def test_a_word_may_begin_with_the_end_token_of_a_gpt2_like_tokenizer() -> None:
    target = target_of(make_model())
    end = target.tokenizer.eos_token
    assert target.tokenizer.unk_token_id not in lenses.first_tokens(target, "zebra")
    target.tokenizer.unk_token = target.tokenizer.bos_token = end
    assert target.tokenizer.eos_token_id in lenses.first_tokens(target, f"{end}cat")


def test_selfie_is_the_bare_model_with_the_activation_as_an_embedding() -> None:
    pair = make_pair(scale=0.5)
    vectors = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(1))
    found = patchscopes.answers(Target.of(pair), Prompt.of(pair), vectors, temperature=None)
    bare, tokenizer = make_model(), make_tokenizer()
    for vector, text in zip(rescale(vectors, pair.config.injection.norm), found, strict=True):
        row = bare.get_input_embeddings()(pair.prompt_ids).detach()
        row[0, pair.marker_position] = vector
        written: list[int] = []
        for _ in range(pair.config.max_new_tokens):
            with torch.no_grad():
                logits = bare(inputs_embeds=row).logits[0, -1]
            logits[pair.config.injection.marker_id] = -torch.inf
            token = int(logits.argmax())
            if token == tokenizer.eos_token_id:
                break
            written.append(token)
            row = torch.cat([row, bare.get_input_embeddings()(torch.tensor([[token]])).detach()], dim=1)
        assert text == tokenizer.decode(written, skip_special_tokens=False).strip()
    spoken = pair.encoder.generate(vectors, samples=1, greedy=True).texts
    assert [text.strip() for text in spoken] != found  # the encoder's adapter is not in it


def test_sampling_is_seeded_and_leaves_the_global_state_alone() -> None:
    pair, state = make_pair(), torch.get_rng_state()
    vectors = torch.randn(4, D_MODEL, generator=torch.Generator().manual_seed(1))
    first, again, other = (patchscopes.selfie(pair, Target.of(pair), vectors, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(state, torch.get_rng_state())


def test_a_question_holds_the_marker_once() -> None:
    pair = make_pair()
    prompt = Prompt.ask(pair, f"it is {MARKER} here")
    assert int(prompt.ids[prompt.position]) == pair.config.injection.marker_id
    for question in ("it is here", f"{MARKER} {MARKER}"):
        with pytest.raises(ArgumentError, match="exactly once"):
            Prompt.ask(pair, question)


@pytest.fixture
def oracle_folder(tmp_path):
    """The encoder's adapter of a tiny pair, saved as an oracle's, beside the base that it is for."""
    pair = make_pair(scale=0.5)
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "oracle", pair.model, "default")
    return pair, tmp_path


def test_an_oracle_with_the_encoders_adapter_and_prompt_answers_as_the_encoder(oracle_folder) -> None:
    pair, folder = oracle_folder
    oracle = patchscopes.load_oracle(folder / "base", folder / "oracle", Target.of(pair))
    vectors = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(2))
    found = patchscopes.answers(oracle, Prompt.of(pair), vectors, temperature=None)
    assert found == [text.strip() for text in pair.encoder.generate(vectors, samples=1, greedy=True).texts]


def test_what_is_no_plain_adapter_of_the_base_is_no_oracle(oracle_folder) -> None:
    pair, folder = oracle_folder
    target = Target.of(pair)
    with pytest.raises(ConfigError):
        patchscopes.load_oracle(folder / "base", folder / "nowhere", target)
    weights = folder / "oracle" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-40])
    with pytest.raises(WeightsError):
        patchscopes.load_oracle(folder / "base", folder / "oracle", target)
    weights.write_bytes(whole)
    config = folder / "oracle" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": ["lm_head"]}))
    with pytest.raises(ConfigError, match="plain LoRA"):
        patchscopes.load_oracle(folder / "base", folder / "oracle", target)
