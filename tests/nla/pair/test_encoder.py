"""Encoder: samples come from the model with the activation injected and the marker forbidden; answers are parsed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nla.errors import ArgumentError, ContextLengthError, NonFiniteError, ShapeError
from nla.metrics import rescale
from nla.pair.encoder import mask_marker, parse, strip_tags
from nla.pair.explanations import Explanation, Explanations, Trust
from nla.text.claims import claims
from nla.text.tokens import Span
from tests.helpers.tiny import CONTEXT, D_MODEL, make_config, make_model, make_pair, make_tokenizer

VECTORS = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(1))
CONFIG = make_config(make_tokenizer(), make_model())


def oracle_logits(pair, vector: torch.Tensor, answer: list[int]) -> torch.Tensor:
    """Logits (t, vocabulary) after the prompt and an answer, embeddings overwritten by hand, whole passes, no cache."""
    ids = torch.cat([pair.prompt_ids[0], torch.tensor(answer, dtype=torch.long)])[None]
    embeddings = pair.model.get_input_embeddings()(ids).clone()
    embeddings[0, pair.marker_position] = rescale(vector[None], pair.config.injection.norm)[0]
    with torch.no_grad(), pair.role("encoder"):
        return pair.model(inputs_embeds=embeddings).logits[0, len(pair.prompt_ids[0]) - 1 :]


def likeliest(pair, vector: torch.Tensor, n_tokens: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < n_tokens and answer[-1:] != [pair.tokenizer.eos_token_id]:
        logits = oracle_logits(pair, vector, answer)[-1]
        logits[pair.config.injection.marker_id] = -torch.inf
        answer.append(int(logits.argmax()))
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_greedy_text_equals_decoding_by_hand_one_by_one(architecture: str) -> None:
    pair = make_pair(architecture)
    found = pair.encoder.generate(VECTORS, samples=1, greedy=True)
    for row, vector in enumerate(VECTORS):
        assert found.ids[row][found.mask[row].bool()].tolist() == likeliest(pair, vector, pair.config.max_new_tokens)


@pytest.mark.slow
def test_the_answer_depends_on_the_activations_direction_alone(pair) -> None:
    found = pair.encoder.generate(VECTORS, samples=1, greedy=True).texts
    assert pair.encoder.generate(VECTORS * 1000, samples=1, greedy=True).texts == found
    assert len(set(found)) > 1


def test_batch_size_does_not_change_greedy_answers(pair) -> None:
    whole = pair.encoder.generate(VECTORS, samples=2, greedy=True)
    parts = pair.encoder.generate(VECTORS, samples=2, greedy=True, batch_size=3)
    assert parts.texts == whole.texts
    assert parts.texts[0::2] == parts.texts[1::2], "rows are ordered activation by activation"
    assert torch.equal(parts.mask.sum(1), whole.mask.sum(1))


def test_the_marker_is_never_sampled_even_where_it_is_the_likeliest(pair) -> None:
    marker = pair.config.injection.marker_id
    head = pair.model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[marker] = 50.0
    handle = head.register_forward_hook(lambda module, args, output: output + bias)
    try:
        assert oracle_logits(pair, VECTORS[0], [])[-1].softmax(-1)[marker] > 0.99
        for greedy in (False, True):
            assert not (pair.encoder.generate(VECTORS, samples=4, greedy=greedy).ids == marker).any()
    finally:
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, [0]])
def test_samples_follow_the_masked_distribution_of_the_model(pair, seed) -> None:
    """The first token's frequencies over 4,000 samples against the softmax computed by hand."""
    logits = mask_marker(oracle_logits(pair, VECTORS[0], [])[-1] / 0.7, pair.config.injection.marker_id)
    expected = logits.softmax(-1)
    found = pair.encoder.generate(
        VECTORS[:1], samples=4000, temperature=0.7, max_new_tokens=1, seed=seed, batch_size=1000
    )
    observed = torch.bincount(found.ids[:, 0], minlength=len(expected)) / 4000
    assert (observed - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_masking_the_marker_renormalises_the_others_and_lets_gradients_through() -> None:
    logits = torch.randn(2, 3, 7, requires_grad=True)
    masked = mask_marker(logits, 4).softmax(-1)
    assert (masked[..., 4] == 0).all()
    rest = torch.cat([logits[..., :4], logits[..., 5:]], dim=-1).softmax(-1)
    assert torch.allclose(torch.cat([masked[..., :4], masked[..., 5:]], dim=-1), rest)
    masked[..., 0].sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.slow
def test_a_seed_fixes_the_samples_and_the_global_state_is_left_alone(pair) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, again = pair.encoder.generate(VECTORS, seed=7), pair.encoder.generate(VECTORS, seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.ids, again.ids)
    assert first.texts != pair.encoder.generate(VECTORS, seed=8).texts
    assert len(set(first.texts)) > len(VECTORS), "samples of one activation differ"


def test_with_a_seed_for_each_activation_its_samples_do_not_depend_on_the_others(pair) -> None:
    seeds = [3, 2**40, 5, 6, 7]
    whole = pair.encoder.generate(VECTORS, samples=3, seed=seeds).texts
    parts = pair.encoder.generate(VECTORS.flip(0), samples=3, seed=seeds[::-1], batch_size=4).texts
    by_activation = [parts[row : row + 3] for row in range(0, 15, 3)][::-1]
    assert [text for texts in by_activation for text in texts] == whole
    assert pair.encoder.generate(VECTORS[2:3], samples=3, seed=seeds[2:3]).texts == whole[6:9]
    twins = pair.encoder.generate(VECTORS[:1].repeat(3, 1), samples=2, seed=[3, 4, 3]).texts
    assert twins[:2] == twins[4:] != twins[2:4] and twins[0] != twins[1], "the seed decides, and samples differ"
    with pytest.raises(ArgumentError, match="2 seeds for 5 activations"):
        pair.encoder.generate(VECTORS, seed=[1, 2])


def test_without_a_seed_the_global_state_decides_and_moves_on(pair) -> None:
    torch.manual_seed(7)
    first, second = pair.encoder.generate(VECTORS, seed=None), pair.encoder.generate(VECTORS, seed=None)
    assert torch.equal(first.ids, pair.encoder.generate(VECTORS, seed=7).ids)
    assert first.texts != second.texts


def test_nothing_after_the_end_token_is_kept(pair) -> None:
    found = pair.encoder.generate(VECTORS, samples=40, max_new_tokens=30)
    end, ended = pair.tokenizer.eos_token_id, 0
    assert pair.encoder.end_ids == [end]
    for ids, mask, text in zip(found.ids.tolist(), found.mask.tolist(), found.texts, strict=True):
        real = ids[: sum(mask)]
        assert mask == [1] * len(real) + [0] * (len(mask) - len(real))
        assert set(ids[len(real) :]) <= {pair.pad_id}
        ended += real[-1] == end
        assert end not in real[:-1]
        body = real[:-1] if real[-1] == end else real
        assert text == pair.tokenizer.decode(body)
        assert real[-1] == end or len(real) == 30
    assert ended > 0


def test_a_targets_own_sampling_settings_are_overridden(pair) -> None:
    plain = pair.encoder.generate(VECTORS, seed=5).texts
    settings = pair.model.get_base_model().generation_config
    settings.top_k, settings.top_p, settings.repetition_penalty, settings.temperature = 1, 0.01, 5.0, 0.01
    settings.min_p, settings.suppress_tokens, settings.min_new_tokens = 0.5, [20, 21, 22], 6
    settings.cache_implementation, settings.bad_words_ids = "static", [[33]]
    assert pair.encoder.generate(VECTORS, seed=5).texts == plain
    assert pair.model.get_base_model().generation_config is settings, "and left as they were"


def test_the_pairs_own_end_tokens_end_an_answer(pair) -> None:
    pair.config = replace(pair.config, end_ids=[2, 30, 31])
    assert pair.encoder.end_ids == [2, 30, 31]
    found = pair.encoder.generate(VECTORS, samples=40)
    last = {ids[sum(mask) - 1] for ids, mask in zip(found.ids.tolist(), found.mask.tolist(), strict=True)}
    assert {30, 31} & last


def test_generation_works_in_training_mode_with_gradient_checkpointing(pair) -> None:
    plain = pair.encoder.generate(VECTORS, samples=1, greedy=True).texts
    base = pair.model.get_base_model()
    base.gradient_checkpointing_enable()
    pair.model.train()
    assert pair.encoder.generate(VECTORS, samples=1, greedy=True).texts == plain
    assert base.training


@pytest.mark.parametrize(
    "arguments",
    [{"samples": 0}, {"temperature": 0.0}, {"temperature": -1.0}, {"max_new_tokens": 0}, {"batch_size": 0}],
)
def test_arguments_out_of_range_are_refused_by_name(pair, arguments) -> None:
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        pair.encoder.generate(VECTORS, **arguments)


def test_vectors_of_the_wrong_width_or_not_finite_are_refused(pair) -> None:
    with pytest.raises(ShapeError, match=str(D_MODEL)):
        pair.encoder.generate(torch.randn(2, D_MODEL + 1))
    with pytest.raises(NonFiniteError):
        pair.encoder.generate(VECTORS * torch.nan)


@pytest.mark.parametrize(
    ("answer", "explanation"),
    [
        ("<explanation>It is spring.</explanation>", "It is spring."),
        (" <explanation> It is\nspring. </explanation>\n", "It is\nspring."),
        ("<explanation>It is spring.", None),
        ("It is spring.</explanation>", None),
        ("It is spring.", None),
        ("", None),
        ("<explanation> </explanation>", None),
        ("<explanation>a</explanation> and more", None),
        ("so <explanation>a</explanation>", None),
        ("<explanation>a<explanation>b</explanation>", None),
        ("<explanation>a</explanation>b</explanation>", None),
    ],
)
def test_an_answer_is_one_explanation_between_its_tags_or_none(answer: str, explanation: str | None) -> None:
    assert parse(answer, CONFIG) == explanation


def test_what_there_is_of_a_broken_answer_is_kept_without_tags() -> None:
    assert strip_tags("<explanation>It is", CONFIG) == "It is"


def test_claims_are_sentences() -> None:
    assert claims("It is spring. Is it? Yes!\nA last one") == ["It is spring.", "Is it?", "Yes!", "A last one"]
    assert claims("  ") == []


def test_notes_give_columns_and_slices() -> None:
    trust = Trust.of(0.9, 1.0, 0.5)
    notes = Explanations([Explanation([str(i)], [True], [i / 10], trust, stratum="a") for i in range(3)])
    assert notes.texts == [["0"], ["1"], ["2"]]
    assert notes.cosine == [[0.0], [0.1], [0.2]]
    assert notes[1].texts == ["1"]
    assert isinstance(notes[1:], Explanations)
    assert notes[1:].texts == [["1"], ["2"]]
    assert notes.strata == ["a"] * 3
    assert notes.to_json()[2]["cosine"] == [0.2]
    assert (notes[0].agreement, notes[0].margin) == (1.0, 0.5)


def test_control_characters_of_a_model_are_spelled_out_where_notes_are_printed() -> None:
    hostile = "\x1b[2J\x9b31mcat"
    shown = str(
        Explanations([Explanation([hostile], [True], [0.9], Trust.of(0.9, None, 0.5), span=Span(5, hostile, 0, 3, 0))])
    )
    assert "\x1b" not in shown and "\x9b" not in shown
    assert shown.count(r"\x1b[2J\x9b31mcat") == 2


def test_an_answer_that_cannot_fit_the_context_is_refused_before_it_is_sampled(pair) -> None:
    room = CONTEXT - pair.prompt_ids.shape[1]
    assert pair.encoder.generate(VECTORS[:1], samples=1, max_new_tokens=room).ids.shape[0] == 1
    with pytest.raises(ContextLengthError, match=rf"{CONTEXT} tokens.*max_new_tokens={room}"):
        pair.encoder.generate(VECTORS, max_new_tokens=room + 1)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor])
def test_seeds_of_numpy_and_torch_are_those_of_python(pair, kind: Any) -> None:
    one, several = pair.explain(VECTORS, samples=1, seed=3), [3, 4, 5, 6, 7]
    assert pair.explain(VECTORS, samples=1, seed=kind(3)).texts == one.texts
    written = [pair.encoder.generate(VECTORS, 1, seed=seed).texts for seed in (3, several)]
    assert written[0] != written[1]
    assert pair.encoder.generate(VECTORS, 1, seed=kind(3)).texts == written[0]
    seeds = kind(several) if kind in (np.array, torch.tensor) else [kind(seed) for seed in several]
    assert pair.encoder.generate(VECTORS, 1, seed=seeds).texts == written[1]
    assert pair.encoder.generate(VECTORS, 1, seed=tuple(several)).texts == written[1]


@pytest.mark.parametrize("seed", [1.5, "12", 2**64, -(2**63) - 1, [1, 2, 3, 4, None], np.ones(5), torch.ones(5), {}])
def test_what_is_no_seed_is_a_typed_error(pair, seed: Any) -> None:
    for call in (pair.explain, pair.encoder.generate):
        with pytest.raises(ArgumentError, match="seed"):
            call(VECTORS, 1, seed=seed)
