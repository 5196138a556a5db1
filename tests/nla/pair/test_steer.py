"""Interventions: exactly one token's activation changes, at the strength asked for, alone or in a padded batch."""

from __future__ import annotations

import pytest
import torch

from nla.errors import ArgumentError, ContextLengthError, NonFiniteError, PointError, PositionError, ShapeError
from nla.models.hooks import add, replace
from nla.pair.steer import edit_direction, generate_patched
from tests.helpers.tiny import CONTEXT, D_MODEL, TEXTS, make_model, make_pair, make_tokenizer

TOKENIZER = make_tokenizer()
GENERATOR = torch.Generator().manual_seed(5)
NEW = 6 * torch.randn(len(TEXTS), D_MODEL, generator=GENERATOR)
IDS = torch.tensor([[11, 33, 37, 40, 12, 20, 21], [12, 20, 21, 33, 37, 40, 11]])
POINT = "resid_post.1"


def states(model, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, ...]:
    """Outputs of every block, by hooks of the test's own, set last so that they see what interventions did."""
    found: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda m, a, out: found.append(out)) for layer in model.model.layers]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return tuple(found)


def test_a_patch_replaces_one_activation_a_row_and_nothing_before_it(model) -> None:
    plain, where = states(model), torch.tensor([2, 4])
    with replace(model, POINT, where, NEW[:2]):
        patched = states(model)
    assert torch.equal(patched[0], plain[0])
    for row, column in enumerate(where.tolist()):
        assert torch.equal(patched[1][row, column], NEW[row])
        rest = torch.arange(7) != column
        assert torch.equal(patched[1][row, rest], plain[1][row, rest])
        assert torch.allclose(patched[3][row, :column], plain[3][row, :column], atol=1e-6)
        assert (patched[3][row, column:] - plain[3][row, column:]).abs().amax(dim=-1).min() > 1e-4
    assert torch.equal(states(model)[3], plain[3]), "the hook must be gone"


def test_patching_an_activation_with_itself_changes_nothing(model) -> None:
    plain = states(model)
    with replace(model, POINT, [3, 3], plain[1][:, 3]):
        assert torch.equal(states(model)[3], plain[3])


def test_a_whole_donor_prefix_state_carries_its_continuation(model) -> None:
    """Patching the last token at the last block makes the next token the donor's."""
    last = "resid_post.3"
    donor = states(model, IDS[1:])[3][:, -1]
    with torch.no_grad(), replace(model, last, [6], donor):
        patched = model(IDS[:1]).logits[0, -1]
    assert torch.allclose(patched, model(IDS[1:]).logits[0, -1], atol=1e-5)


@pytest.mark.parametrize("length", [1e-30, 1.0, 1e30])
def test_adding_moves_by_a_share_of_the_activations_length_along_the_direction(model, length: float) -> None:
    plain, where, strength = states(model)[1], torch.tensor([2, 4]), 0.75
    with add(model, POINT, where, NEW[:2] * length, strength):
        moved = states(model)[1] - plain
    for row, column in enumerate(where.tolist()):
        step = moved[row, column]
        assert float(step.norm() / plain[row, column].norm()) == pytest.approx(strength, rel=1e-4)
        assert float(torch.cosine_similarity(step, NEW[row], dim=0)) == pytest.approx(1, abs=1e-5)


def by_hand(model, ids: list[int], column: int, vector: torch.Tensor | None, n_tokens: int) -> str:
    """Greedy continuation of one prompt: whole passes without cache, the block's output replaced by the test."""

    def replace(module, args, output):
        output = output.clone()
        output[0, column] = vector
        return output

    handle = model.model.layers[1].register_forward_hook(replace) if vector is not None else None
    tokens, ids = [], list(ids)
    with torch.no_grad():
        while len(tokens) < n_tokens:
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == TOKENIZER.eos_token_id:
                break
            tokens.append(token)
            ids.append(token)
    if handle:
        handle.remove()
    return TOKENIZER.decode(tokens)


@pytest.mark.parametrize("budget", [1, 8192])
@pytest.mark.parametrize("patched", [True, False])
def test_left_padded_generation_equals_unbatched_whole_passes(model, budget: int, patched: bool) -> None:
    where, vectors = [2, 5, 0, 3], NEW if patched else None
    found = generate_patched(model, TOKENIZER, TEXTS, POINT, where, vectors, 10, max_tokens_per_batch=budget)
    for row, text in enumerate(TEXTS):
        ids = TOKENIZER(text)["input_ids"]
        assert found[row] == by_hand(model, ids, where[row], NEW[row] if patched else None, 10)


def test_the_patch_is_what_changes_the_continuation(model) -> None:
    plain = generate_patched(model, TOKENIZER, TEXTS, POINT, "last", None, 10)
    assert generate_patched(model, TOKENIZER, TEXTS, POINT, "last", NEW, 10) != plain


def test_a_prompt_of_one_token_is_patched_too(model) -> None:
    found = generate_patched(model, TOKENIZER, ["the"], POINT, [0], NEW[:1], 6)
    assert found == [by_hand(model, TOKENIZER("the")["input_ids"], 0, NEW[0], 6)]


def test_positions_by_pattern_index_and_ids_agree() -> None:
    model, texts = make_model(), TEXTS[:3]
    ids = [TOKENIZER(text)["input_ids"] for text in texts]
    expected = generate_patched(model, TOKENIZER, texts, POINT, [len(row) - 1 for row in ids], NEW[:3], 8)
    for given, positions in ((texts, "/\n/"), (texts, "last"), (ids, "last"), (ids, [-1, -1, -1])):
        assert generate_patched(model, TOKENIZER, given, POINT, positions, NEW[:3], 8) == expected


def test_a_pairs_target_is_steered_not_its_encoder() -> None:
    pair = make_pair(scale=0.5)
    expected = generate_patched(make_model(), TOKENIZER, TEXTS, POINT, "last", NEW, 8)
    with pair.role("target"):
        assert generate_patched(pair.base, pair.tokenizer, TEXTS, POINT, "last", NEW, 8) == expected
    with pytest.raises(ArgumentError, match="default"):
        generate_patched(pair.base, pair.tokenizer, TEXTS, POINT, "last", NEW, 8)
    with pair.role("decoder"), pytest.raises(ArgumentError, match="decoder"):
        generate_patched(pair.base, pair.tokenizer, TEXTS, POINT, "last", NEW, 8)


def test_strength_adds_instead_of_replacing() -> None:
    model = make_model()
    plain = generate_patched(model, TOKENIZER, TEXTS, POINT, "last", None, 8)
    assert generate_patched(model, TOKENIZER, TEXTS, POINT, "last", NEW, 8, strength=0.0) == plain
    assert generate_patched(model, TOKENIZER, TEXTS, POINT, "last", NEW, 8, strength=4.0) != plain


def test_an_edit_points_from_the_old_reconstruction_to_the_new(pair) -> None:
    before, after = "the next is cat.".replace("next", "red"), "the red is dog."
    found = edit_direction(pair.decoder, before, after)
    old, new = (pair.reconstruct([text])[0] / pair.config.activation_norm for text in (before, after))
    assert torch.allclose(found, new - old, atol=1e-5)
    both = edit_direction(pair.decoder, [before, after], [after, before])
    assert torch.allclose(both[0], -both[1], atol=1e-5)
    assert torch.allclose(both[0], found, atol=1e-5)


def test_an_edit_that_changes_nothing_is_refused(pair) -> None:
    with pytest.raises(ArgumentError, match="unchanged"):
        edit_direction(pair.decoder, "the cat.", "the cat.")
    with pytest.raises(ArgumentError):
        edit_direction(pair.decoder, ["the cat."], ["a cat.", "a dog."])


def test_bad_interventions_are_refused() -> None:
    model = make_model()
    with pytest.raises(PointError), replace(model, "resid_post.9", [0, 0], NEW[:2]):
        pass
    with pytest.raises(ShapeError), replace(model, POINT, [0], NEW[:2]):
        pass
    with pytest.raises(ShapeError), replace(model, POINT, [0, 0], NEW[:2, :5]):
        pass
    with pytest.raises(NonFiniteError), replace(model, POINT, [0, 0], NEW[:2] * torch.nan):
        pass
    with pytest.raises(ArgumentError, match="zero"), add(model, POINT, [0, 0], NEW[:2] * 0, 1.0):
        pass
    for strength in (float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match="strength"), add(model, POINT, [0, 0], NEW[:2], strength):
            pass
    with pytest.raises(NonFiniteError), add(model, POINT, [0, 0], NEW[:2] * torch.inf, 1.0):
        pass
    with pytest.raises(NonFiniteError), add(model, POINT, [0, 0], NEW[:2], 3e38):
        model(IDS)
    with pytest.raises(ShapeError), replace(model, POINT, [0, 0, 0], NEW[:3]):
        model(IDS)
    with pytest.raises(PositionError), replace(model, POINT, [0, 7], NEW[:2]):
        model(IDS)


@pytest.mark.parametrize(
    ("positions", "vectors", "error"),
    [
        ("/zebra/", NEW, PositionError),
        ("/ the/", NEW, PositionError),
        ([0], NEW, PositionError),
        ([0, 0, 99, 0], NEW, PositionError),
        ("last", NEW[:2], ShapeError),
    ],
)
def test_bad_positions_and_vectors_are_refused(positions, vectors, error) -> None:
    with pytest.raises(error):
        generate_patched(make_model(), TOKENIZER, TEXTS, POINT, positions, vectors, 4)


def test_a_continuation_beyond_the_context_is_refused() -> None:
    too_long = rf"the context of {CONTEXT} less the 60 to write.*max_new_tokens"
    for prompts in (TEXTS, [[11] * (CONTEXT - 59)], [[]]):
        with pytest.raises(ContextLengthError, match=too_long):
            generate_patched(make_model(), TOKENIZER, prompts, POINT, "last", None, 60)
    with pytest.raises(ArgumentError, match="max_new_tokens"):
        generate_patched(make_model(), TOKENIZER, TEXTS, POINT, "last", None, 0)
