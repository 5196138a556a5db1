"""NLA: roles on one base, explaining, reconstructing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nla import NLA
from nla.cli import console
from nla.config import tokenizer_hash
from nla.errors import (
    ArgumentError,
    ContextLengthError,
    EmptyTextError,
    MarkerError,
    NonFiniteError,
    PointError,
    ShapeError,
    StoreError,
    TokenizerMismatchError,
    VocabularyError,
)
from nla.metrics import Baseline, rescale
from nla.models.hooks import inject
from nla.pair import encoder
from nla.pair.card import card
from nla.pair.explanations import Explanations, Trust, agreement
from nla.pair.roles import Role
from nla.store.reader import Store
from nla.store.shards import Document
from nla.store.writer import StoreWriter
from nla.text import claims
from nla.text.tokens import Span, render_prompt
from tests.helpers.tiny import CONTEXT, D_MODEL, MARKER, TEXTS, make_config, make_model, make_pair, make_tokenizer

IDS = torch.tensor([[11, 33, 37, 40, 12, 20, 21]])
EXPLANATIONS = ["the cat is here.", "a red dog ran."]


def state_of(pair: NLA) -> tuple:
    """Everything that a role may change, and must put back."""
    flags = {name: parameter.requires_grad for name, parameter in pair.model.named_parameters()}
    with torch.no_grad():
        return pair.model.active_adapter, flags, pair.model(IDS).logits.tolist()


# Roles


def test_the_target_is_the_bare_base_and_each_role_has_its_own_adapter() -> None:
    bare = make_model()(IDS).logits
    pair = make_pair(scale=0.3)
    found = {}
    for name in ("target", "encoder", "decoder"):
        with torch.no_grad(), pair.role(name):
            found[name] = pair.model(IDS).logits
    assert torch.equal(found["target"], bare)
    assert not torch.allclose(found["encoder"], bare, atol=1e-2)
    assert not torch.allclose(found["decoder"], found["encoder"], atol=1e-2)


def test_a_fresh_pair_changes_nothing_yet() -> None:
    bare, tokenizer, model = make_model()(IDS).logits, make_tokenizer(), make_model()
    pair = NLA.create(model, tokenizer, make_config(tokenizer, model), rank=2)
    for name in ("target", "encoder", "decoder"):
        with pair.role(name):
            assert torch.equal(pair.model(IDS).logits, bare)
    assert torch.equal(pair.head.weight, torch.eye(D_MODEL))


def test_in_a_role_exactly_its_adapter_is_trainable(pair: NLA) -> None:
    for name, adapter in (("encoder", ".default."), ("decoder", ".decoder."), ("target", None)):
        with pair.role(name):
            trainable = {key for key, parameter in pair.model.named_parameters() if parameter.requires_grad}
        assert trainable == {key for key, _ in pair.model.named_parameters() if adapter and adapter in key}


@pytest.mark.parametrize("name", ["target", "encoder", "decoder"])
def test_a_role_is_what_pefts_own_switch_makes_of_the_model(name: Role) -> None:
    ours, plain = make_pair(scale=0.3), make_pair(scale=0.3)
    model: Any = plain.model
    if name == "target":
        model.base_model.disable_adapter_layers()
    else:
        model.set_adapter({"encoder": "default"}.get(name, name))
    with ours.role(name):
        assert state_of(ours) == state_of(plain)
        assert ours.model.active_adapters == model.active_adapters


@pytest.mark.parametrize("outer", ["target", "encoder", "decoder"])
@pytest.mark.parametrize("inner", ["target", "encoder", "decoder"])
def test_roles_nest_and_are_restored_even_after_an_error(pair: NLA, outer, inner) -> None:
    outside = state_of(pair)
    with pair.role(outer):
        inside = state_of(pair)
        with pytest.raises(RuntimeError), pair.role(inner):
            raise RuntimeError
        assert state_of(pair) == inside
    assert state_of(pair) == outside


def test_flags_set_by_hand_survive_a_role(pair: NLA) -> None:
    for parameter in pair.model.parameters():
        parameter.requires_grad_(False)
    chosen = next(parameter for name, parameter in pair.model.named_parameters() if ".decoder." in name)
    chosen.requires_grad_(True)
    before = state_of(pair)
    with pair.role("encoder"):
        pass
    assert state_of(pair) == before


def test_an_unknown_role_is_refused(pair: NLA) -> None:
    with pytest.raises(ArgumentError, match="decoder"), pair.role("critic"):  # type: ignore[arg-type]
        pass


def encoder_loss(pair: NLA) -> torch.Tensor:
    vectors = rescale(torch.linspace(-1, 1, D_MODEL)[None], pair.config.injection.norm)
    ids = torch.cat([pair.prompt_ids, IDS], dim=1)
    with inject(pair.model, vectors, torch.tensor([pair.marker_position])):
        return pair.model(ids, labels=ids).loss


def decoder_loss(pair: NLA) -> torch.Tensor:
    return pair.decode_ids(*pair.encode_explanations(EXPLANATIONS)).square().mean()


def gradients(pair: NLA) -> dict[str, torch.Tensor]:
    named = [*pair.model.named_parameters(), *pair.head.named_parameters("head")]
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_switching_roles_loses_no_gradient_against_isolated_runs(checkpointing: bool) -> None:
    def fresh() -> NLA:
        pair = make_pair(scale=0.3)
        if checkpointing:
            base = pair.model.get_base_model()
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            pair.model.train()
        return pair

    isolated: dict[str, torch.Tensor] = {}
    for role, loss in (("encoder", encoder_loss), ("decoder", decoder_loss)):
        pair = fresh()
        with pair.role(role):
            loss(pair).backward()
        isolated |= gradients(pair)

    shared = fresh()
    with shared.role("encoder"):
        first = encoder_loss(shared)
        with shared.role("decoder"):  # as in joint training: the decoder's whole step between forward and backward
            decoder_loss(shared).backward()
        shared.reconstruct(EXPLANATIONS)
        shared.read(TEXTS[:1])
        shared.encoder.generate(torch.randn(2, D_MODEL), samples=1)
        first.backward()
    found = gradients(shared)
    assert found.keys() == isolated.keys()
    assert len(found) > 10
    assert all(torch.allclose(found[name], isolated[name], atol=1e-7) for name in found)


def test_training_both_roles_leaves_the_base_bit_identical(pair: NLA) -> None:
    base = {name: p.clone() for name, p in pair.model.named_parameters() if "lora_" not in name}
    parameters = [*pair.model.parameters(), *pair.head.parameters()]
    for role, loss in (("encoder", encoder_loss), ("decoder", decoder_loss)) * 2:
        with pair.role(role):
            optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=0.1, weight_decay=0.1)
            loss(pair).backward()
            optimizer.step()
            optimizer.zero_grad()
    now = dict(pair.model.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in base.items())


def test_parameters_are_counted_by_role(pair: NLA) -> None:
    target = sum(p.numel() for p in make_model().parameters())
    per_block = 2 * 4 * (32 + 32) + 2 * 4 * (32 + 16) + 3 * 4 * (32 + 48)
    expected = {"target": target, "encoder": 4 * per_block, "decoder": 2 * per_block + D_MODEL * (D_MODEL + 1)}
    assert pair.n_parameters == expected


# Making a pair


def test_a_wrong_tokenizer_is_refused_at_once() -> None:
    tokenizer, model = make_tokenizer(), make_model()
    config = make_config(tokenizer, model)
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(TokenizerMismatchError, match="vocabulary"):
        NLA.create(model, tokenizer, config)


@pytest.mark.parametrize("field", ["left_id", "right_id", "marker_id"])
def test_a_marker_that_is_missing_or_has_other_neighbours_is_refused(field: str) -> None:
    tokenizer, model = make_tokenizer(), make_model()
    config = make_config(tokenizer, model)
    config = replace(config, injection=replace(config.injection, **{field: 12}))
    with pytest.raises(MarkerError, match="build the prompt from the pair's encoder_prompt"):
        NLA.create(model, tokenizer, config)


def test_a_chat_template_that_repeats_the_marker_is_refused() -> None:
    tokenizer, model = make_tokenizer(), make_model()
    tokenizer.chat_template += MARKER
    with pytest.raises(MarkerError, match="2 times"):
        NLA.create(model, tokenizer, make_config(tokenizer, model))


def test_a_point_outside_the_target_or_an_empty_rank_is_refused() -> None:
    tokenizer, model = make_tokenizer(), make_model()
    with pytest.raises(PointError):
        NLA.create(model, tokenizer, make_config(tokenizer, model, point="resid_post.9"))
    with pytest.raises(ArgumentError, match="rank"):
        NLA.create(model, tokenizer, make_config(tokenizer, model), rank=0)


# Explaining and reconstructing


def test_read_is_of_the_target_not_of_an_adapter() -> None:
    pair = make_pair(scale=0.5)
    ids = torch.tensor([pair.tokenizer(TEXTS[0])["input_ids"]])
    expected = make_model()(ids, output_hidden_states=True).hidden_states[2][0]
    with pair.role("encoder"):
        assert torch.allclose(pair.read(TEXTS[0]).vectors, expected, atol=1e-5)


def test_notes_carry_their_token_and_numbers_that_follow_from_the_texts(pair: NLA) -> None:
    acts = pair.read(TEXTS[:2], strata=lambda number, spans: ["a"] * len(spans))
    seeds = list(range(len(acts)))
    notes = pair.explain(acts, samples=3, seed=seeds)
    raw = pair.encoder.generate(acts.vectors, samples=3, seed=seeds).texts
    assert len(notes) == len(acts)
    each = pair.reconstruct(notes, per_sample=True)
    assert each.shape == (len(acts), 3, D_MODEL)
    empty = pair.reconstruct([""], strict=False)[0]
    mean = pair.baselines["global"].mean
    for row, note in enumerate(notes):
        assert note.texts == [encoder.strip_tags(text, pair.config) for text in raw[3 * row : 3 * row + 3]]
        assert note.complete == [encoder.parse(text, pair.config) is not None for text in raw[3 * row : 3 * row + 3]]
        cosines = torch.cosine_similarity(acts.vectors[row][None], each[row])
        assert torch.allclose(torch.tensor(note.cosine), cosines, atol=1e-5)
        assert note.agreement == agreement([claims.claims(text) for text in note.texts])
        rocks = [torch.cosine_similarity(acts.vectors[row], rock, dim=0) for rock in (empty, mean)]
        best = max(map(float, rocks))
        assert math.isclose(note.margin, float(cosines.mean()) - best, abs_tol=1e-4)
        assert note.trust == Trust.of(note.trust.cosine, note.agreement, note.margin)
        assert (note.token, note.stratum) == (acts.spans[row].text, "a")
        assert note.document == int(acts.document[row])


def test_the_margin_of_an_activation_does_not_depend_on_its_batch(pair: NLA) -> None:
    acts = pair.read(TEXTS)
    alone = pair.explain(acts[5], greedy=True)[0]
    for rows in ([5, 5], [5, 0, 1, 2], list(range(5, len(acts)))):
        together = pair.explain(acts[rows], greedy=True)[0]
        assert together.margin == pytest.approx(alone.margin, abs=1e-5)
        assert together.trust.level == alone.trust.level


def test_a_pair_without_baselines_takes_the_margin_over_the_empty_text(pair: NLA) -> None:
    acts = pair.read(TEXTS[0])
    pair.baselines = {}
    empty = pair.reconstruct([""], strict=False).expand(len(acts), -1)
    for note, rock in zip(pair.explain(acts), torch.cosine_similarity(acts.vectors, empty), strict=True):
        assert note.margin == pytest.approx(note.trust.cosine - float(rock), abs=1e-5)


def test_explaining_tensors_single_rows_and_nothing(pair: NLA) -> None:
    vectors = torch.randn(3, D_MODEL)
    notes = pair.explain(vectors, samples=2)
    assert [note.span for note in notes] == [None] * 3
    assert len(pair.explain(vectors[:1], samples=1)) == 1
    assert len(pair.explain(vectors[:0])) == 0
    assert pair.reconstruct(Explanations()).shape == (0, D_MODEL)


def test_greedy_gives_one_sample_and_does_not_depend_on_the_seed(pair: NLA) -> None:
    vectors = torch.randn(3, D_MODEL)
    notes = pair.explain(vectors, greedy=True, seed=1)
    assert [len(texts) for texts in notes.texts] == [1, 1, 1]
    assert notes.agreement == [None] * 3
    assert pair.explain(vectors, greedy=True, seed=2).texts == notes.texts


def test_several_samples_reconstruct_to_the_mean_of_their_directions(pair: NLA) -> None:
    groups = [["the cat.", "a dog.", "it is red."], ["a mat."]]
    found = pair.reconstruct(groups)
    for group, vector in zip(groups, found, strict=True):
        each = pair.reconstruct(group)
        mean = (each / each.norm(dim=1, keepdim=True)).mean(dim=0)
        assert torch.allclose(vector, mean / mean.norm() * pair.config.activation_norm, atol=1e-5)
    with pytest.raises(ShapeError, match="samples"):
        pair.reconstruct(groups, per_sample=True)


def test_explaining_and_reconstructing_leave_everything_as_it_was(pair: NLA) -> None:
    before, weights = state_of(pair), {n: p.clone() for n, p in pair.model.named_parameters()}
    torch.manual_seed(0)
    rng = torch.random.get_rng_state()
    pair.reconstruct(pair.explain(pair.read(TEXTS[0])))
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert state_of(pair) == before
    assert all(torch.equal(p, weights[n]) for n, p in pair.model.named_parameters())


def test_bad_input_to_explain_and_reconstruct_is_refused(pair: NLA) -> None:
    vectors = torch.randn(2, D_MODEL)
    with pytest.raises(ArgumentError, match="samples=0"):
        pair.explain(vectors, samples=0)
    with pytest.raises(ShapeError, match=str(D_MODEL)):
        pair.explain(torch.randn(2, 7))
    with pytest.raises(NonFiniteError, match="row 1"):
        pair.explain(torch.stack([vectors[0], vectors[1] * torch.nan]))
    with pytest.raises(EmptyTextError):
        pair.reconstruct(["the cat.", ""])
    with pytest.raises(VocabularyError, match="zebra"):
        pair.reconstruct([["the zebra."]])
    with pytest.raises(ArgumentError, match="sample"):
        pair.reconstruct([["the cat."], []])
    for bad in ([None], [["the cat.", 3]], ["the \ud800."]):
        with pytest.raises(ArgumentError, match="text"):
            pair.reconstruct(bad)  # type: ignore[arg-type]


def test_a_sampled_text_beyond_the_context_is_as_bad_as_none_and_no_error(pair: NLA) -> None:
    long = "the cat " * CONTEXT
    found = pair.reconstruct(["the cat.", long], strict=False)
    assert torch.allclose(found, pair.reconstruct(["the cat.", ""], strict=False), atol=1e-6)
    with pytest.raises(ContextLengthError, match=str(CONTEXT)):
        pair.reconstruct(["the cat.", long])


# Denominators from a store


def store_of(folder: Path, rows: torch.Tensor, **about: Any) -> Store:
    """A store of these training activations of "a/target", one a document."""
    own = {"target": "a/target", "revision": None, "tokenizer_hash": tokenizer_hash(make_tokenizer()), "settings": {}}
    own |= {"point": "resid_post.1", "dtype": "float32", "d_model": rows.shape[1]}
    writer = StoreWriter(folder, own | about)
    documents = [Document(n, f"text {n}", [Span(1, "text", 0, 4, 0)], ["all"]) for n in range(len(rows))]
    held_out = [Document(len(rows), "another", [Span(1, "another", 0, 7, 0)], ["all"])]
    writer.write(0, {"train": (documents, rows), "eval": (held_out, rows[:1])}, {})
    writer.finish(1)
    return Store.open(folder)


def test_a_store_gives_the_figures_of_all_its_training_rows(tmp_path: Path) -> None:
    rows = 2 * torch.randn(200, D_MODEL, generator=torch.Generator().manual_seed(1)) + 1
    pair, store = make_pair(), store_of(tmp_path, rows)
    for given in (store, Store.open(tmp_path, "eval")):
        pair.baselines = {}
        pair.fit_baselines(given)
        expected = Baseline.fit(rows)
        assert torch.allclose(pair.baselines["global"].mean, expected.mean, atol=1e-6)
        assert pair.baselines["global"].variance == pytest.approx(expected.variance, rel=1e-5)
        assert pair.baselines["global"].n == 200
        assert pair.config.activation_norm == pytest.approx(float(rows.norm(dim=1).mean()), rel=1e-6)


@pytest.mark.parametrize(
    "about, named",
    [
        ({"target": "someone/another"}, r"target someone/another, not a/target"),
        ({"revision": "b" * 40}, "revision bbb"),
        ({"point": "resid_post.2"}, r"point resid_post\.2, not resid_post\.1"),
        ({"settings": {"quantization": "4bit"}}, "quantization 4bit, not None"),
        ({"settings": {"adapter": "my/plant"}}, "adapter on the target my/plant"),
    ],
)
def test_a_store_of_another_target_gives_no_denominator(tmp_path: Path, about: dict[str, Any], named: str) -> None:
    pair = make_pair(target_revision="a" * 40)
    before = dict(pair.baselines)
    with pytest.raises(StoreError, match=named):
        pair.fit_baselines(store_of(tmp_path, torch.randn(4, D_MODEL), **about))
    assert pair.baselines == before


def test_a_store_of_another_width_or_tokenizer_gives_no_denominator(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="width 8"):
        make_pair().fit_baselines(store_of(tmp_path / "a", torch.randn(4, 8)))
    with pytest.raises(TokenizerMismatchError):
        make_pair().fit_baselines(store_of(tmp_path / "b", torch.randn(4, D_MODEL), tokenizer_hash="another"))


def test_folders_are_one_target_however_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model().save_pretrained(tmp_path / "target")
    pair = make_pair(target=str(tmp_path / "target"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for number, target in enumerate(("target", "./target", "~/target")):
        pair.fit_baselines(store_of(tmp_path / str(number), torch.randn(4, D_MODEL), target=target))
    with pytest.raises(StoreError, match="someone/target"):
        pair.fit_baselines(store_of(tmp_path / "hub", torch.randn(4, D_MODEL), target="someone/target"))


def test_a_config_that_is_set_reaches_prompt_injection_point_and_view() -> None:
    pair, fresh = make_pair(), make_pair(point="resid_post.2")
    acts = fresh.read(TEXTS[:1])
    assert not torch.allclose(pair.read(TEXTS[:1]).vectors, acts.vectors, atol=1e-3)
    pair.config = fresh.config
    assert str(pair.point) == "resid_post.2" and torch.equal(pair.read(TEXTS[:1]).vectors, acts.vectors)
    assert len(pair.roles.view.layers) == 3
    changed = replace(pair.config, encoder_prompt=f"so, {pair.config.encoder_prompt}")
    pair.config = changed
    assert torch.equal(pair.prompt_ids, torch.tensor([render_prompt(pair.tokenizer, changed.encoder_prompt)]))
    with pytest.raises(MarkerError):
        pair.config = replace(changed, injection=replace(changed.injection, left_id=changed.injection.left_id + 1))
    with pytest.raises(PointError):
        pair.config = replace(changed, point="resid_post.9")
    assert pair.config == changed


def test_one_text_is_a_list_of_one(pair: NLA) -> None:
    one, listed = pair.reconstruct("the cat sat."), pair.reconstruct(["the cat sat."])
    assert one.shape == (1, D_MODEL) and torch.equal(one, listed)
    assert torch.equal(pair.encode_explanations("the cat").input_ids, pair.encode_explanations(["the cat"]).input_ids)
    assert torch.equal(pair.decoder.decode("the cat"), pair.decoder.decode(["the cat"]))


@pytest.mark.parametrize("form", [np.asarray, np.ndarray.tolist, lambda rows: rows.astype(np.float64)])
def test_arrays_and_lists_are_vectors_too(pair: NLA, form: Any) -> None:
    vectors = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(0))
    given = form(vectors.numpy())
    expected = pair.explain(vectors, samples=2)
    assert pair.explain(given, samples=2).texts == expected.texts
    predicted = pair.reconstruct(expected)
    assert pair.score(given, form(predicted.numpy()), n_boot=10) == pair.score(vectors, predicted, n_boot=10)
    with pytest.raises(ShapeError, match="rows of one length"):
        pair.explain([[1.0] * D_MODEL, [1.0]])


def test_an_explanation_does_not_depend_on_what_else_is_explained(pair: NLA) -> None:
    acts = pair.read(TEXTS)
    whole, turned = pair.explain(acts, samples=2), pair.explain(acts[list(range(len(acts)))[::-1]], samples=2)
    assert [one.texts for one in turned][::-1] == whole.texts
    assert len({tuple(texts) for texts in whole.texts}) > len(acts) // 2
    for row in (0, 5, len(acts) - 1):
        alone = pair.explain(acts[row], samples=2)
        assert alone.texts == whole.texts[row : row + 1] and alone.trust[0].level == whole.trust[row].level
        vectors = pair.explain(acts.vectors[row : row + 1], samples=2).texts
        assert pair.explain(acts.vectors[: row + 1], samples=2).texts[-1:] == vectors
    assert pair.explain(pair.read(TEXTS[2]), samples=2).texts == [
        texts for texts, document in zip(whole.texts, acts.document.tolist(), strict=True) if document == 2
    ]
    assert pair.explain(acts, samples=2, seed=1).texts != whole.texts


INTERVAL = {"value": 0.1, "low": 0.0, "high": 0.2}


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({}, None),
        ({"score": {"n": 9, "cosine": INTERVAL, "fve": INTERVAL, "baselines": {"mean": {"value": 0.0}}}}, None),
        ({"score": {"n": 9, "cosine": INTERVAL, "fve": INTERVAL, "baselines": {"shuffled": INTERVAL}}}, "'shuffled'"),
        ({"score": {"n": 9, "cosine": INTERVAL, "fve": {"value": -0.5}, "rocks": {}}}, "FVE is -0.50"),
        ({"joint": {"fve/global": 0.3}}, None),
        ({"joint": {"fve/global": -0.3}}, "'mean' is 0.00"),
        ({"joint": {"fve/global": "?"}, "score": 3}, None),
    ],
)
def test_a_pair_that_is_not_above_its_baselines_says_so(metrics: dict, said: str | None, capsys) -> None:
    pair = make_pair()
    pair.metrics = metrics
    assert len(pair.doubts) == (said is not None)
    if said is not None:
        assert "reads nothing" in pair.doubts[0] and said in pair.doubts[0]
        assert console.about(pair, "it")["doubts"] == pair.doubts and pair.doubts[0] in card(metrics, pair.config)
