"""Injection: an activation takes the place of the marker's input embedding, or is added to a block's output there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nla.config import InjectionConfig
from nla.errors import MarkerError, NonFiniteError, ShapeError
from nla.points import Point, block


def locate_marker(
    ids: Tensor | Sequence[Sequence[int]], injection: InjectionConfig, prompt_length: int | None = None
) -> Tensor:
    """Column of the marker in each row, (b,) int64.

    The marker must stand exactly once in the first ``prompt_length`` columns (all, if None), between the neighbours
    it was trained with. Columns after the prompt do not count: a policy may write the marker itself.

    Args:
        ids: token ids, (b, t).

    Raises:
        MarkerError: it is missing, repeated, or has other neighbours; the message names the first such row.
    """
    tokens = torch.as_tensor(ids)
    if tokens.ndim != 2:
        raise ShapeError(f"ids of shape {tuple(tokens.shape)}", "(batch, tokens)", "pass a batch, such as ids[None]")
    prompt = tokens[:, :prompt_length]
    found = prompt == injection.marker_id
    counts = found.sum(dim=1)
    if (counts != 1).any():
        row = int((counts != 1).nonzero()[0])
        raise MarkerError(
            f"the marker {injection.marker!r} {int(counts[row])} times in prompt {row}",
            "exactly once",
            "build the prompt from the pair's encoder_prompt, which holds it once, and add no other text with it",
        )
    where = found.int().argmax(dim=1)
    rows, width = torch.arange(len(where), device=where.device), prompt.shape[1]
    left = torch.where(where > 0, prompt[rows, (where - 1).clamp(min=0)], -1)
    right = torch.where(where < width - 1, prompt[rows, (where + 1).clamp(max=width - 1)], -1)
    wrong = (left != injection.left_id) | (right != injection.right_id)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise MarkerError(
            f"ids {int(left[row])} and {int(right[row])} beside the marker of prompt {row}",
            f"{injection.left_id} and {injection.right_id}, its neighbours in training",
            "build the prompt from the pair's encoder_prompt and its own tokenizer",
        )
    return where


def rescale(vectors: Tensor, norm: float | None) -> Tensor:
    """Vectors (n, d) scaled TO the L2 norm ``norm`` (not multiplied by it), float32; None: to 1, for "add".

    Raises:
        ShapeError: not two-dimensional.
        NonFiniteError: NaN, infinity, or a vector of length zero, which has no direction.
    """
    if vectors.ndim != 2:
        raise ShapeError(f"vectors of shape {tuple(vectors.shape)}", "(n, d)", "pass a batch, such as vector[None]")
    check_finite(vectors)
    lengths = vectors.float().norm(dim=-1, keepdim=True)
    if (lengths == 0).any():
        row = int((lengths[:, 0] == 0).nonzero()[0])
        raise NonFiniteError(f"a vector of zeros in row {row}", "a direction", "drop this row; it has nothing to read")
    return vectors.float() / lengths * (1.0 if norm is None else norm)


def check_finite(vectors: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFiniteError: the message names the first such row.
    """
    finite = torch.isfinite(vectors).flatten(1).all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise NonFiniteError(
            f"NaN or infinity in row {row} of {len(vectors)} vectors",
            "finite vectors",
            "find where it arose: a half-precision overflow in the target, or a division by zero",
        )


@contextlib.contextmanager
def inject(model: Any, vectors: Tensor, positions: Tensor, layer: int | None = None) -> Iterator[None]:
    """While active, ``vectors[i]`` enters batch row i at ``positions[i]``, in every forward pass.

    One hook serves generation, log-probabilities and fine-tuning alike. Single-token passes are left alone: that is
    cached decoding, whose prompt has been seen.

    Args:
        model: a causal LM, with or without adapters.
        vectors: (b, d), already at the injection norm (:func:`rescale`); gradients flow into them if they ask for it.
        positions: (b,) columns, from :func:`locate_marker`.
        layer: None: the vector takes the place of the input embedding (the embedding module's output, so a model that
            scales its embeddings does not scale the vector). A block's index: to the block's output h the vector is
            added at h's length, h + |h| v/|v|. It stands in ``config.injection.layer``.

    Raises:
        ShapeError: at entry if lengths differ; in a forward pass if the batch has another size or width.
        PointError: the model has no such block.
    """
    if vectors.ndim != 2 or len(vectors) != len(positions):
        raise ShapeError(
            f"vectors {tuple(vectors.shape)} and positions {tuple(positions.shape)}",
            "(b, d) and (b,)",
            "give one vector and one position for each batch row",
        )

    def enter(module: nn.Module, args: tuple, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        if stream.shape[1] == 1:
            return output
        if stream.shape[0] != len(vectors) or stream.shape[2] != vectors.shape[1]:
            raise ShapeError(
                f"a batch of {tuple(stream.shape)} with {tuple(vectors.shape)} vectors to inject",
                "one vector for each batch row, of the model's width",
                "rows are chunked or repeated somewhere: repeat or slice the vectors with them",
            )
        out, rows, columns = stream.clone(), torch.arange(len(vectors)), positions.to(stream.device)
        entering = vectors.to(stream.device)
        if layer is not None:
            there = stream[rows, columns].float()
            entering = there + there.norm(dim=1, keepdim=True) * nn.functional.normalize(entering.float(), dim=1)
        out[rows, columns] = entering.to(stream.dtype)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    place = model.get_input_embeddings() if layer is None else block(model, Point("resid_post", layer))
    handle = place.register_forward_hook(enter)
    try:
        yield
    finally:
        handle.remove()
