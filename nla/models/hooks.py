"""Hooks on a model while it runs: inject at the marker, replace activations, add directions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nla.config import InjectionConfig
from nla.errors import ArgumentError, MarkerError, NonFiniteError, PositionError, ShapeError
from nla.metrics import check_finite, unit
from nla.models.points import Point, block, d_model


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


def patch(
    model: nn.Module, point: str | Point, positions: Tensor | Sequence[int], vectors: Tensor
) -> contextlib.AbstractContextManager[None]:
    """While active, the activation at ``point`` and column ``positions[i]`` of batch row i is ``vectors[i]``.

    Args:
        positions: (b,) columns of the batch, padding included.
        vectors: (b, d), raw activations: they replace direction and length.

    Raises:
        PointError: the model has no such point.
        ShapeError, PositionError: at entry or in the forward pass, if rows, width or columns do not fit the batch.
        NonFiniteError: NaN or infinity.
    """
    return _edit(model, point, positions, vectors, lambda hidden, new: new)


def add(
    model: nn.Module,
    point: str | Point,
    positions: Tensor | Sequence[int],
    directions: Tensor,
    strength: float,
) -> contextlib.AbstractContextManager[None]:
    """While active, activation h at column ``positions[i]`` of row i becomes h + strength · ‖h‖ · δ/‖δ‖.

    Args:
        directions: (b, d); only the direction of δ counts, so edits and controls have equal norm.
        strength: in lengths of the activation; 1 adds a vector as long as the activation itself.

    Raises:
        ArgumentError: a direction of length zero, or a strength that is not finite.
        The rest is as for :func:`patch`.
    """
    if not math.isfinite(strength):
        raise ArgumentError(f"strength={strength}", "a finite number", "use 1, for example")
    directions = unit(directions.double()).float()
    if (directions == 0).all(dim=1).any():
        raise ArgumentError("a direction of length zero", "directions that point somewhere", "leave its row out")

    def shifted(hidden: Tensor, direction: Tensor) -> Tensor:
        return hidden + strength * hidden.norm(dim=-1, keepdim=True) * direction

    return _edit(model, point, positions, directions, shifted)


@contextlib.contextmanager
def _edit(
    model: nn.Module,
    point: str | Point,
    positions: Tensor | Sequence[int],
    vectors: Tensor,
    change: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[None]:
    """Apply ``change(h, vector)`` at one column of each row, in passes that start a sequence (not cached decoding)."""
    where, layer = torch.as_tensor(positions), Point.parse(point).layer
    if vectors.ndim != 2 or where.shape != (len(vectors),) or vectors.shape[1] != d_model(model):
        raise ShapeError(
            f"vectors {tuple(vectors.shape)} and positions {tuple(where.shape)}",
            f"(b, {d_model(model)}) and (b,)",
            "give one vector of the target's width and one position for each batch row",
        )
    check_finite(vectors)

    def edit(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length(layer) > hidden.shape[1]:
            return output
        if len(hidden) != len(vectors):
            raise ShapeError(
                f"a batch of {len(hidden)} rows under an intervention on {len(vectors)}",
                "one vector and one position for each row",
                "repeat or slice them with the rows, such as intervene=lambda docs: patch(…, columns[docs], new[docs])",
            )
        if int(where.max()) >= hidden.shape[1] or int(where.min()) < 0:
            raise PositionError(
                f"column {int(where.max())} or {int(where.min())} in a batch of {hidden.shape[1]} tokens",
                "columns within the batch",
                "count columns from 0, and add the padding where it is on the left",
            )
        rows, columns = torch.arange(len(hidden), device=hidden.device), where.to(hidden.device)
        changed = change(hidden[rows, columns], vectors.to(hidden.device, hidden.dtype))
        check_finite(changed)
        hidden = hidden.index_put((rows, columns), changed)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = block(model, point).register_forward_hook(edit, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
