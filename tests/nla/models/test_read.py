"""read(): activations are hidden_states[K + 1] of each text alone, whatever the batch; the store keeps them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nla.errors import ArgumentError, NonFiniteError, PointError, PositionError, ShapeError, WeightsError
from nla.models import hooks
from nla.models.hooks import inference
from nla.models.points import truncated_view
from nla.models.read import ACTIVATIONS_FILE, Activations, padded, read, vectors_at
from tests.helpers.tiny import D_MODEL, N_BLOCKS, TEXTS, make_model, make_pair


def oracle(model, tokenizer, text: str, layer: int) -> torch.Tensor:
    """Activations of one text alone, from transformers' own recording."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states[layer + 1][0]


@pytest.mark.parametrize("budget", [1, 20, 8192])
def test_read_gives_hidden_states_k_plus_1_of_each_text_alone(model, tokenizer, budget: int) -> None:
    acts = read(model, tokenizer, TEXTS, "resid_post.1", max_tokens_per_batch=budget)
    expected = [oracle(model, tokenizer, text, 1) for text in TEXTS]
    assert torch.allclose(acts.vectors, torch.cat(expected), atol=1e-5)
    assert acts.document.tolist() == [number for number, rows in enumerate(expected) for _ in rows]
    assert "".join(span.text for span in acts.spans) == "".join(TEXTS)
    assert acts.point == "resid_post.1"
    assert acts.strata == ["all"] * len(acts)


def test_the_last_block_is_read_before_the_final_norm(model, tokenizer) -> None:
    point = f"resid_post.{N_BLOCKS - 1}"
    acts, after_norm = read(model, tokenizer, TEXTS[0], point), oracle(model, tokenizer, TEXTS[0], N_BLOCKS - 1)
    assert not torch.allclose(acts.vectors, after_norm, atol=1e-2)
    assert torch.allclose(model.model.norm(acts.vectors), after_norm, atol=1e-5)


def test_neither_upper_blocks_nor_logits_are_computed(model, tokenizer) -> None:
    for module in (*model.model.layers[2:], model.model.norm, model.lm_head):
        module.register_forward_hook(lambda *args: pytest.fail("a module above the point ran"))
    assert len(read(model, tokenizer, TEXTS, "resid_post.1")) > 0


def test_positions_are_read_in_the_order_asked(tokenizer) -> None:
    model = make_model()
    whole = read(model, tokenizer, TEXTS, "resid_post.1")
    some = read(model, tokenizer, TEXTS, "resid_post.1", positions=[3, 0])
    assert [span.index for span in some.spans] == [3, 0] * len(TEXTS)
    for number in range(len(TEXTS)):
        rows = whole[whole.document == number]
        assert torch.allclose(some.vectors[2 * number], rows.vectors[3], atol=1e-5)
        assert torch.allclose(some.vectors[2 * number + 1], rows.vectors[0], atol=1e-5)
    newlines = read(model, tokenizer, TEXTS, "resid_post.1", positions="/\n/")
    assert newlines.document.tolist() == [0, 1, 2, 3, 3]


def test_strata_are_named_over_whole_texts_and_follow_positions(tokenizer) -> None:
    acts = read(
        make_model(),
        tokenizer,
        TEXTS,
        "resid_post.1",
        positions=[-1, 0],
        strata=lambda number, spans: [f"{number}:{span.text}" for span in spans],
    )
    assert acts.strata == [f"{number}:{span.text}" for number, span in zip(acts.document, acts.spans, strict=True)]
    with pytest.raises(PositionError, match="strata"):
        read(make_model(), tokenizer, TEXTS, "resid_post.1", strata=lambda number, spans: ["one"])


def test_an_intervention_reaches_its_document_in_any_batch(tokenizer) -> None:
    model, new = make_model(), torch.randn(len(TEXTS), D_MODEL, generator=torch.Generator().manual_seed(0))
    where = torch.tensor([0, 3, 1, 5])

    def patched(budget: int) -> Activations:
        def intervene(docs, padding):
            return hooks.replace(model, "resid_post.0", where[docs] + padding, new[docs])

        return read(model, tokenizer, TEXTS, "resid_post.2", intervene=intervene, max_tokens_per_batch=budget)

    plain, alone, together = read(model, tokenizer, TEXTS, "resid_post.2"), patched(1), patched(8192)
    assert torch.allclose(alone.vectors, together.vectors, atol=1e-5)
    after = torch.tensor(
        [span.index >= where[doc] for doc, span in zip(alone.document.tolist(), alone.spans, strict=True)]
    )
    changed = (alone.vectors - plain.vectors).abs().amax(dim=1) > 1e-3
    assert torch.equal(changed, after)


def test_reading_leaves_mode_gradients_and_weights_as_they_were(tokenizer) -> None:
    model = make_model().train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    acts = read(model, tokenizer, TEXTS, "resid_post.1")
    assert not acts.vectors.requires_grad
    assert torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_inference_restores_the_mode_after_an_error() -> None:
    module = nn.Sequential(nn.Dropout()).train()
    with pytest.raises(RuntimeError), inference(module):
        assert not module[0].training
        raise RuntimeError
    assert module.training
    assert module[0].training


def test_a_target_that_gives_nan_is_refused(tokenizer) -> None:
    model = make_model()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="row 0"):
        read(model, tokenizer, TEXTS, "resid_post.1")


def test_an_unknown_point_is_refused(tokenizer) -> None:
    with pytest.raises(PointError):
        read(make_model(), tokenizer, TEXTS, "resid_post.99")


def test_vectors_come_row_after_row_in_the_order_of_the_columns_and_rows_without_any_are_not_run() -> None:
    model, ids = make_model(), [[11, 12, 13, 14, 15], [12], [13, 14], [14, 11, 12]]
    columns, ran = [[4, 0], [0], [], [1, 1, 2]], []
    with torch.no_grad():
        alone = [model(torch.tensor([row]), output_hidden_states=True).hidden_states[2][0] for row in ids]
    expected = torch.cat([stream[chosen] for stream, chosen in zip(alone, columns, strict=True)])
    view = truncated_view(model, "resid_post.1")
    view.register_forward_pre_hook(lambda module, args, kwargs: ran.append(kwargs["input_ids"].shape), with_kwargs=True)
    for budget in (1, 6, 100):
        ran.clear()
        assert torch.allclose(vectors_at(view, ids, columns, budget), expected, atol=1e-5)
        assert (
            sum(n_rows for n_rows, _ in ran) == 3 and [width for _, width in ran] == sorted((w for _, w in ran))[::-1]
        )
    assert vectors_at(view, ids, [[]] * 4, 100).shape == (0, D_MODEL)
    points = ["resid_post.1", "resid_post.0"]
    both = vectors_at(view, ids, columns, 6, points=points)
    below = vectors_at(truncated_view(model, "resid_post.0"), ids, columns, 6)
    assert torch.equal(both, torch.stack([vectors_at(view, ids, columns, 6), below], dim=1))
    assert vectors_at(view.to(torch.bfloat16), ids, columns, 100).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def acts() -> Activations:
    pair = make_pair()
    return pair.read(TEXTS, strata=lambda number, spans: ["end" if span.text == "\n" else "line" for span in spans])


def test_indexing_keeps_rows_together(acts: Activations) -> None:
    mask = torch.tensor([stratum == "end" for stratum in acts.strata])
    for index in (mask, mask.nonzero()[:, 0], mask.nonzero()[:, 0].tolist()):
        part = acts[index]
        assert torch.equal(part.vectors, acts.vectors[mask])
        assert [span.text for span in part.spans] == ["\n"] * 5
        assert part.document.tolist() == [0, 1, 2, 3, 3]
    assert torch.equal(acts[-1].vectors, acts.vectors[-1:])
    assert len(acts[2:5]) == 3
    assert [row.spans[0] for row in acts] == acts.spans
    for index in (len(acts), -len(acts) - 1, [len(acts)], torch.ones(3, dtype=torch.bool)):
        with pytest.raises(IndexError):
            acts[index]


@pytest.mark.parametrize("index", [3, torch.tensor(3), np.int64(3), np.array([3]), [3], slice(3, 4)])
def test_one_row_is_chosen_by_any_kind_of_index(acts: Activations, index) -> None:
    row = acts[index]
    assert torch.equal(row.vectors, acts.vectors[3:4])
    assert (row.spans, row.strata) == (acts.spans[3:4], acts.strata[3:4])
    assert torch.equal(row.document, acts.document[3:4])


@pytest.mark.parametrize("index", [[], torch.tensor([]), np.array([], dtype=int), slice(0)])
def test_no_rows_are_chosen_by_an_empty_index(acts: Activations, index) -> None:
    assert acts[index].vectors.shape == (0, D_MODEL)
    assert len(acts[index]) == 0


def test_replace_refuses_another_number_of_rows(acts: Activations) -> None:
    assert torch.equal(acts.replace(vectors=acts.vectors * 2).vectors, acts.vectors * 2)
    with pytest.raises(ShapeError):
        acts.replace(vectors=acts.vectors[1:])


def test_the_store_gives_back_what_was_saved(acts: Activations, tmp_path) -> None:
    part = acts[[5, 3, 3, 20]]
    part.save(tmp_path)
    back = Activations.load(tmp_path)
    assert torch.equal(back.vectors, part.vectors)
    assert torch.equal(back.document, part.document)
    assert (back.spans, back.texts, back.point, back.strata) == (part.spans, part.texts, part.point, part.strata)


def test_the_store_remembers_which_tokens_the_tokenizer_added(acts: Activations, tmp_path) -> None:
    spans = [span._replace(added=index == 0) for index, span in enumerate(acts.spans)]
    acts.replace(spans=spans).save(tmp_path)
    assert [span.added for span in Activations.load(tmp_path).spans] == [True] + [False] * (len(acts) - 1)


@pytest.mark.parametrize("texts", [None, 7, [None], ["the cat.", b"the cat."], "the \ud800", ["the cat.", "a \udfff."]])
def test_what_is_no_text_is_refused_and_named(tokenizer, texts) -> None:
    with pytest.raises(ArgumentError, match=r"text [01] (of type (NoneType|int|bytes)|with .* at character [24])"):
        read(make_model(), tokenizer, texts, "resid_post.1")


def test_a_truncated_or_missing_store_is_refused(acts: Activations, tmp_path) -> None:
    with pytest.raises(WeightsError, match=r"activations\.safetensors"):
        Activations.load(tmp_path)
    acts.save(tmp_path)
    path = tmp_path / ACTIVATIONS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="truncated"):
        Activations.load(tmp_path)


def test_a_store_is_not_replaced_by_one_that_is_not_finite(acts: Activations, tmp_path) -> None:
    acts.save(tmp_path)
    with pytest.raises(NonFiniteError):
        acts.replace(vectors=acts.vectors * torch.nan).save(tmp_path)
    assert torch.equal(Activations.load(tmp_path).vectors, acts.vectors)


def test_padding_is_on_the_right() -> None:
    assert padded([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]
