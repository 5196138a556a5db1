"""Interchange training of an organism's target: a forward pass that is recorded, one that is intervened on, a loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from nla.models.hooks import record, replace
from nla.models.points import Point, blocks


def next_token_loss(logits: Float[Tensor, "b t v"], ids: Int[Tensor, "b t"], weights: Tensor) -> Float[Tensor, ""]:
    """Mean cross-entropy of ``ids[:, 1:]`` weighted by ``weights[:, 1:]``, which are (b, t)."""
    weights = weights[:, 1:].flatten().float()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights).sum() / weights.sum()


def recorded(
    model: PreTrainedModel, ids: Int[Tensor, "b t"], columns: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "b t v"], dict[int, Float[Tensor, "n d"]]]:
    """Logits of ids, and each block's output at ``columns`` of the first n rows."""
    rows = torch.arange(len(columns), device=ids.device)
    points = [Point("resid_post", layer) for layer in range(len(blocks(model)))]
    with record(model, points) as streams:
        logits = model(input_ids=ids).logits
    return logits, {point.layer: streams[str(point)][rows, columns] for point in points}


def exchanged(
    model: PreTrainedModel,
    ids: Int[Tensor, "b t"],
    columns: Int[Tensor, " b"],
    layers: Int[Tensor, " b"],
    vectors: Callable[[int, Int[Tensor, " n"]], Float[Tensor, "n d"]],
) -> Float[Tensor, "b t v"]:
    """Logits of ids with each row's vector at its column exchanged after its block.

    Args:
        vectors: from a block and the numbers of the rows that are exchanged there, what is put in.
    """
    with contextlib.ExitStack() as stack:
        for layer in range(len(blocks(model))):
            rows = (layers == layer).nonzero()[:, 0]
            if len(rows):
                stack.enter_context(
                    replace(model, Point("resid_post", layer), columns[rows], vectors(layer, rows), rows)
                )
        return model(input_ids=ids).logits
