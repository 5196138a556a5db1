"""A model while it runs: inject at the marker, replace activations, add directions, record the stream."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache

from nla.config import InjectionConfig
from nla.errors import ArchitectureError, ArgumentError, MarkerError, PositionError, ShapeError
from nla.metrics import check_finite, unit
from nla.models.points import TESTED, Point, backbone, block, d_model, device_of, embeddings, entering_view

_SCALES: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()

Intervene = Callable[[Int[Tensor, " b"], Int[Tensor, " b"]], contextlib.AbstractContextManager]
"""From the numbers of a batch's rows and the padding on the left of each, a context in which the model runs on them."""


def locate_marker(
    ids: Int[Tensor, "b t"] | Sequence[Sequence[int]], injection: InjectionConfig, prompt_length: int | None = None
) -> Int[Tensor, " b"]:
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
    is_marker = prompt == injection.marker_id
    counts = is_marker.sum(dim=1)
    if (counts != 1).any():
        row = int((counts != 1).nonzero()[0])
        raise MarkerError(
            f"the marker {injection.marker!r} {int(counts[row])} times in prompt {row}",
            "exactly once",
            "build the prompt from the pair's encoder_prompt, which holds it once, and add no other text with it",
        )
    columns = is_marker.int().argmax(dim=1)
    rows, width = torch.arange(len(columns), device=columns.device), prompt.shape[1]
    left = torch.where(columns > 0, prompt[rows, (columns - 1).clamp(min=0)], -1)
    right = torch.where(columns < width - 1, prompt[rows, (columns + 1).clamp(max=width - 1)], -1)
    wrong = (left != injection.left_id) | (right != injection.right_id)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise MarkerError(
            f"ids {int(left[row])} and {int(right[row])} beside the marker of prompt {row}",
            f"{injection.left_id} and {injection.right_id}, its neighbours in training",
            "build the prompt from the pair's encoder_prompt and its own tokenizer",
        )
    return columns


@contextlib.contextmanager
def inject(
    model: nn.Module, vectors: Float[Tensor, "b d"], positions: Int[Tensor, " b"], layer: int | None = None
) -> Iterator[None]:
    """While active, ``vectors[i]`` enters batch row i at ``positions[i]``, in every forward pass.

    One hook serves generation, log-probabilities and fine-tuning alike. Single-token passes are left alone: that is
    cached decoding, whose prompt has been seen.

    Args:
        model: a causal LM, with or without adapters.
        vectors: at the injection norm already (:func:`nla.metrics.rescale`); gradients flow into them if asked for.
        positions: columns, from :func:`locate_marker`.
        layer: None: the vector takes the place of the input embedding: it enters the first block as it is, whatever the
            model scales its embeddings by (:func:`embedding_scale`). A block's index: to the block's output h the
            vector is added at h's length, h + |h| v/|v|. It stands in ``config.injection.layer``.

    Raises:
        ArchitectureError: no vector enters the first block as it is.
        ShapeError: at entry if lengths differ; in a forward pass if the batch has another size or width.
        PointError: the model has no such block.
    """
    if vectors.ndim != 2 or len(vectors) != len(positions):
        raise ShapeError(
            f"vectors {tuple(vectors.shape)} and positions {tuple(positions.shape)}",
            "(b, d) and (b,)",
            "give one vector and one position for each batch row",
        )

    if layer is None:
        vectors = vectors / embedding_scale(model)

    def enter(stream: Tensor, _past: int) -> Tensor | None:
        if stream.shape[1] == 1:
            return None
        if stream.shape[0] != len(vectors) or stream.shape[2] != vectors.shape[1]:
            raise ShapeError(
                f"a batch of {tuple(stream.shape)} with {tuple(vectors.shape)} vectors to inject",
                "one vector for each batch row, of the model's width",
                "rows are chunked or repeated somewhere: repeat or slice the vectors with them",
            )
        rows, columns = torch.arange(len(vectors)), positions.to(stream.device)
        entering = vectors.to(stream.device)
        if layer is not None:
            there = stream[rows, columns].float()
            entering = there + there.norm(dim=1, keepdim=True) * nn.functional.normalize(entering.float(), dim=1)
        out = stream.clone()
        out[rows, columns] = entering.to(stream.dtype)
        return out

    module = embeddings(model) if layer is None else block(model, Point("resid_post", layer))
    with _changed(module, enter):
        yield


def embedding_scale(model: nn.Module) -> float:
    """What a model multiplies the output of its embedding module by before its first block: Granite by 12, most by 1.

    Measured once for each backbone, with four digits, so that rounding in the model's type does not count.

    Raises:
        ArchitectureError: it does something else, such as Bloom, which normalises it.
    """
    stack = backbone(model)
    if stack.config.model_type in TESTED:
        return 1.0
    if stack not in _SCALES:
        _SCALES[stack] = _measured_scale(model)
    return _SCALES[stack]


def _measured_scale(model: nn.Module) -> float:
    module, view = embeddings(model), entering_view(model)
    vector = torch.randn(d_model(model), generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(3, 2, dtype=torch.int64, device=device_of(model))

    def enter(stream: Tensor, _past: int) -> Tensor:
        lengths = stream.new_tensor([1.0, -1.0, 3.0])
        return torch.cat([stream[:, :1], (lengths[:, None] * vector.to(stream))[:, None]], dim=1)

    with inference(model), _changed(module, enter):
        entered = view(input_ids=ids, use_cache=False).last_hidden_state[:, 1].float().cpu()
    # Whatever is added to all, such as a position's embedding, falls out of differences.
    turned, grown = (entered[0] - entered[1]) / 2, (entered[2] - entered[0]) / 2
    scale = float(turned @ vector / (vector @ vector))
    for moved in (turned, grown):
        if not bool((moved - scale * vector).norm() <= 0.03 * abs(scale) * vector.norm()):
            raise ArchitectureError(
                f"a model of type {backbone(model).config.model_type!r}, which changes more of an embedding than its "
                "length before the first block",
                "embeddings that enter the first block as they are, or multiplied by a number",
                f"use another target, of type {', '.join(sorted(TESTED))} for example",
            )
    return float(f"{scale:.4g}")


def replace(
    model: nn.Module,
    point: str | Point,
    positions: Int[Tensor, " b"] | Sequence[int],
    vectors: Float[Tensor, "b d"],
    rows: Int[Tensor, " b"] | None = None,
) -> contextlib.AbstractContextManager[None]:
    """While active, the activation at ``point`` and column ``positions[i]`` of batch row i is ``vectors[i]``.

    Gradients flow into the vectors if they ask for it.

    Args:
        positions: columns of the batch, padding included.
        vectors: raw activations: they replace direction and length.
        rows: the batch rows that are changed; None: all of them, in order.

    Raises:
        PointError: the model has no such point.
        ShapeError, PositionError: at entry or in the forward pass, if rows, width or columns do not fit the batch.
        NonFiniteError: NaN or infinity.
    """
    return _edit(model, point, positions, vectors, lambda hidden, new: new, rows)


def add(
    model: nn.Module,
    point: str | Point,
    positions: Int[Tensor, " b"] | Sequence[int],
    directions: Float[Tensor, "b d"],
    strength: float,
    onwards: bool = False,
) -> contextlib.AbstractContextManager[None]:
    """While active, activation h at column ``positions[i]`` of row i becomes h + strength · ‖h‖ · δ/‖δ‖.

    Args:
        directions: only the direction of δ counts, so edits and controls have equal norm.
        strength: in lengths of the activation; 1 adds a vector as long as the activation itself.
        onwards: so do all activations after it, those of tokens that are written later among them.

    Raises:
        ArgumentError: a direction of length zero, or a strength that is not finite.
        NLAError: whatever :func:`replace` raises.
    """
    if not math.isfinite(strength):
        raise ArgumentError(f"strength={strength}", "a finite number", "use 1, for example")
    directions = unit(directions.double()).float()
    if (directions == 0).all(dim=1).any():
        raise ArgumentError("a direction of length zero", "directions that point somewhere", "leave its row out")

    def shifted(hidden: Tensor, direction: Tensor) -> Tensor:
        return hidden + strength * hidden.norm(dim=-1, keepdim=True) * direction

    return _edit(model, point, positions, directions, shifted, onwards=onwards)


@contextlib.contextmanager
def record(model: nn.Module, points: Sequence[str | Point]) -> Iterator[dict[str, Float[Tensor, "b t d"]]]:
    """While active, the stream at each point in the last forward pass, by the point's name, as it flows on.

    Hooks run in the order of their making: enter :func:`replace` first to record what it puts in. Gradients are kept.

    Raises:
        PointError: the model has no such point.
    """
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[Tensor, int], None]:
        return lambda stream, _past: seen.update({name: stream})

    with contextlib.ExitStack() as stack:
        for point in points:
            stack.enter_context(_changed(block(model, point), keeper(str(point))))
        yield seen


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients, and the model in evaluation mode; each module's own mode is restored on exit."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def detached_embeddings(model: nn.Module) -> Iterator[None]:
    """While active, input embeddings are the leaf from which gradients are tracked: nothing below them needs one."""
    with _changed(embeddings(model), lambda stream, _past: stream.detach().requires_grad_(True)):
        yield


def _edit(
    model: nn.Module,
    point: str | Point,
    positions: Tensor | Sequence[int],
    vectors: Tensor,
    change: Callable[[Tensor, Tensor], Tensor],
    rows: Tensor | None = None,
    onwards: bool = False,
) -> contextlib.AbstractContextManager[None]:
    """Apply ``change(h, vector)`` at one column of each row, in passes that start a sequence (not cached decoding); or
    ``onwards``, from there on and in every later pass."""
    columns, width = torch.as_tensor(positions), d_model(model)
    if vectors.ndim != 2 or columns.shape != (len(vectors),) or vectors.shape[1] != width:
        raise ShapeError(
            f"vectors {tuple(vectors.shape)} and positions {tuple(columns.shape)}",
            f"(b, {width}) and (b,)",
            "give one vector of the target's width and one position for each batch row",
        )
    if rows is not None and rows.shape != columns.shape:
        raise ShapeError(f"rows {tuple(rows.shape)} for {len(columns)} positions", "one row each", "give as many")
    check_finite(vectors.detach())

    def edit(hidden: Tensor, past: int) -> Tensor | None:
        if past and not onwards:
            return None
        if rows is None and len(hidden) != len(vectors):
            raise ShapeError(
                f"a batch of {len(hidden)} rows under an intervention on {len(vectors)}",
                "one vector and one position for each row",
                "repeat or slice them with the rows, such as "
                "intervene=lambda rows, padding: replace(…, columns[rows] + padding, new[rows])",
            )
        if not past and len(columns) and (int(columns.max()) >= hidden.shape[1] or int(columns.min()) < 0):
            raise PositionError(
                f"column {int(columns.max())} or {int(columns.min())} in a batch of {hidden.shape[1]} tokens",
                "columns within the batch",
                "count columns from 0, and add the padding where it is on the left",
            )
        if onwards:
            changed = change(hidden, vectors.to(hidden.device, hidden.dtype)[:, None])
            check_finite(changed.detach())
            after = torch.arange(hidden.shape[1]) >= columns[:, None]
            return changed if past else torch.where(after.to(hidden.device)[..., None], changed, hidden)
        there = torch.arange(len(hidden)) if rows is None else rows
        index = (there.to(hidden.device), columns.to(hidden.device))
        changed = change(hidden[index], vectors.to(hidden.device, hidden.dtype))
        check_finite(changed.detach())
        return hidden.index_put(index, changed)

    return _changed(block(model, point), edit, Point.parse(point).layer)


@contextlib.contextmanager
def _changed(module: nn.Module, change: Callable[[Tensor, int], Tensor | None], layer: int = 0) -> Iterator[None]:
    """While active, ``change`` sees a module's output (b, t, d) and how many tokens of the sequence came before it in
    the cache, or 1 where some did and it does not count; what it returns, if anything, takes the output's place. The
    only place that registers hooks."""

    last: weakref.ref[Cache] | None = None  # a cache is large: it must not live on for this

    def before(cache: Cache | None, n_tokens: int) -> int:
        nonlocal last
        if cache is None:
            return 0
        again, last = last is not None and last() is cache, weakref.ref(cache)
        with contextlib.suppress(ValueError):  # no layer of attention, and only these count tokens
            return max(again, cache.get_seq_length(layer) - n_tokens)
        return int(again)

    def hook(_module: nn.Module, _args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        # Architectures pass the cache to their blocks under several names, or by its place.
        cache = next((value for value in (*_args, *kwargs.values()) if isinstance(value, Cache)), None)
        new = change(stream, before(cache, stream.shape[1]))
        if new is None:
            return output
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
