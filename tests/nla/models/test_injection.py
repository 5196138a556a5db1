"""Injection: one marker, found once; its embedding becomes the activation, at the norm asked for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nla.errors import MarkerError, NonFiniteError, PointError, ShapeError
from nla.metrics import rescale
from nla.models.hooks import inject, locate_marker
from nla.models.points import blocks
from nla.text.tokens import render_prompt
from tests.helpers.tiny import D_MODEL, make_config, make_model, make_pair, make_tokenizer

TOKENIZER = make_tokenizer()
CONFIG = make_config(TOKENIZER, make_model())
INJECTION = CONFIG.injection
PROMPT = render_prompt(TOKENIZER, CONFIG.encoder_prompt)
WHERE = PROMPT.index(INJECTION.marker_id)


def test_the_marker_is_found_in_every_row() -> None:
    padded = [[*PROMPT, 0, 0], [0, 0, *PROMPT], [0, *PROMPT, 0]]
    assert locate_marker(torch.tensor(padded), INJECTION).tolist() == [WHERE, WHERE + 2, WHERE + 1]
    assert locate_marker([PROMPT], INJECTION).tolist() == [WHERE]


def test_a_marker_written_after_the_prompt_does_not_count() -> None:
    echoed = torch.tensor([[*PROMPT, INJECTION.left_id, INJECTION.marker_id, INJECTION.right_id]])
    assert locate_marker(echoed, INJECTION, prompt_length=len(PROMPT)).tolist() == [WHERE]
    with pytest.raises(MarkerError, match="2 times"):
        locate_marker(echoed, INJECTION)


def test_a_missing_marker_is_refused_and_the_row_named() -> None:
    without = [token if token != INJECTION.marker_id else 11 for token in PROMPT]
    with pytest.raises(MarkerError, match="0 times in prompt 1"):
        locate_marker([PROMPT, without], INJECTION)


@pytest.mark.parametrize("side", ["left_id", "right_id"])
def test_a_marker_between_other_neighbours_is_refused(side: str) -> None:
    other = dataclasses.replace(INJECTION, **{side: 40})
    with pytest.raises(MarkerError, match="neighbours in training"):
        locate_marker([PROMPT], other)


@pytest.mark.parametrize("ids", [[[8, 5]], [[5, 8]]])
def test_a_marker_at_an_edge_has_no_neighbour(ids) -> None:
    ids = torch.tensor(ids).where(torch.tensor(ids) != 5, INJECTION.marker_id)
    with pytest.raises(MarkerError, match="-1"):
        locate_marker(ids, INJECTION)


def test_ids_must_be_a_batch() -> None:
    with pytest.raises(ShapeError):
        locate_marker(torch.tensor(PROMPT), INJECTION)


def test_rescale_normalises_to_the_norm_whatever_the_length() -> None:
    vectors = torch.randn(6, D_MODEL) * torch.tensor([1e-3, 0.1, 1, 10, 100, 1e4])[:, None]
    out = rescale(vectors, 4.0)
    assert torch.allclose(out.norm(dim=1), torch.full((6,), 4.0), atol=1e-5)
    assert torch.allclose(torch.cosine_similarity(out, vectors), torch.ones(6), atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite_is_refused_and_its_row_named(value: float) -> None:
    vectors = torch.ones(3, D_MODEL)
    vectors[2, 5] = value
    with pytest.raises(NonFiniteError, match="row 2"):
        rescale(vectors, 1.0)


def test_a_vector_of_zeros_or_a_single_vector_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="zeros in row 0"):
        rescale(torch.zeros(1, D_MODEL), 1.0)
    with pytest.raises(ShapeError):
        rescale(torch.ones(D_MODEL), 1.0)


def oracle(model, ids: torch.Tensor, vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits from embeddings overwritten by hand."""
    embeddings = model.get_input_embeddings()(ids).clone()
    for row, position in enumerate(positions.tolist()):
        embeddings[row, position] = vectors[row]
    return model(inputs_embeds=embeddings).logits


def test_injection_equals_overwriting_the_embeddings_by_hand(model) -> None:
    ids = torch.tensor([[*PROMPT, 11, 12], [0, *PROMPT, 13], [0, 0, *PROMPT]])
    vectors, positions = torch.randn(3, D_MODEL), locate_marker(ids, INJECTION)
    expected, plain = oracle(model, ids, vectors, positions), model(ids).logits
    with inject(model, vectors, positions):
        assert torch.equal(model(ids).logits, expected)
    assert not torch.allclose(expected, plain, atol=1e-2)
    assert torch.equal(model(ids).logits, plain), "the hook must be gone"


def test_the_hook_is_removed_when_the_block_fails() -> None:
    model = make_model()
    ids = torch.tensor([PROMPT])
    plain = model(ids).logits
    with pytest.raises(RuntimeError), inject(model, torch.randn(1, D_MODEL), torch.tensor([WHERE])):
        raise RuntimeError
    assert torch.equal(model(ids).logits, plain)


def test_cached_decoding_equals_whole_passes(model) -> None:
    ids, vectors, where = torch.tensor([PROMPT] * 2), torch.randn(2, D_MODEL), torch.tensor([WHERE] * 2)
    with inject(model, vectors, where):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    for _ in range(6):
        ids = torch.cat([ids, oracle(model, ids, vectors, where)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, ids)


def test_gradients_flow_through_injection_with_gradient_checkpointing() -> None:
    ids, vectors, where = torch.tensor([PROMPT] * 2), torch.randn(2, D_MODEL), torch.tensor([WHERE] * 2)

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        pair = make_pair()
        base = pair.model.get_base_model()
        base.train()
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with pair.role("encoder"), inject(base, vectors, where):
            base(ids, use_cache=False).logits.square().mean().backward()
        return [p.grad for p in pair.model.parameters() if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert plain
    assert len(plain) == len(checkpointed)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("shape", [(3, D_MODEL), (2, D_MODEL + 1)])
def test_a_batch_of_another_size_or_width_is_refused_in_the_pass(shape: tuple[int, int]) -> None:
    model = make_model()
    with pytest.raises(ShapeError), inject(model, torch.randn(shape), torch.zeros(shape[0], dtype=torch.long)):
        model(torch.tensor([PROMPT] * 2))


def test_vectors_without_as_many_positions_are_refused() -> None:
    with pytest.raises(ShapeError), inject(make_model(), torch.randn(2, D_MODEL), torch.tensor([1])):
        pass


# Addition at a block's output


def added_by_hand(model, ids: torch.Tensor, vectors: torch.Tensor, positions: torch.Tensor, layer: int) -> torch.Tensor:
    """Logits of a model whose later blocks are run on a stream that was changed by hand."""
    with torch.no_grad():
        seen: list[torch.Tensor] = []
        hook = blocks(model)[layer + 1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(ids)
        hook.remove()
        stream = seen[0].clone()
        for row, (vector, position) in enumerate(zip(vectors, positions.tolist(), strict=True)):
            there = stream[row, position].clone()
            stream[row, position] = there + there.norm() * vector / vector.norm()
        hook = blocks(model)[layer + 1].register_forward_pre_hook(lambda _, args: (stream, *args[1:]))
        logits = model(ids).logits
        hook.remove()
    return logits


@pytest.mark.parametrize("layer", [0, 2])
def test_adding_is_at_the_blocks_output_and_at_its_own_length(model, layer: int) -> None:
    ids = torch.tensor([[*PROMPT, 11, 12], [0, *PROMPT, 13], [0, 0, *PROMPT]])
    vectors, positions = torch.randn(3, D_MODEL), locate_marker(ids, INJECTION)
    expected = added_by_hand(model, ids, vectors, positions, layer)
    with torch.no_grad(), inject(model, rescale(vectors, None), positions, layer):
        found = model(ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    with torch.no_grad(), inject(model, 17 * vectors, positions, layer):
        assert torch.allclose(model(ids).logits, expected, atol=1e-4), "its own length does not count"
    assert not torch.allclose(model(ids).logits, expected, atol=1e-2)


def test_adding_leaves_single_tokens_and_the_model_alone_and_lets_gradients_through() -> None:
    model, ids = make_model(), torch.tensor([PROMPT])
    vector, where = torch.randn(1, D_MODEL, requires_grad=True), torch.tensor([WHERE])
    with inject(model, vector, where, layer=1):
        model(ids).logits.square().mean().backward()
        single = model(ids[:, :1]).logits
    assert vector.grad is not None
    assert vector.grad.norm() > 0
    assert torch.equal(single, model(ids[:, :1]).logits)
    with pytest.raises(PointError, match=r"resid_post\.9"), inject(model, vector, where, layer=9):
        pass
    with pytest.raises(ShapeError, match="one vector for each batch row"), inject(model, vector, where, layer=1):
        model(ids.repeat(2, 1))


def test_generating_with_an_added_activation_equals_generating_without_a_cache() -> None:
    model, ids, vector = make_model(), torch.tensor([PROMPT]), torch.randn(1, D_MODEL)
    with inject(model, vector, torch.tensor([WHERE]), layer=1):
        found = [
            model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache, eos_token_id=None)
            for cache in (True, False)
        ]
    assert torch.equal(*found)
