"""One row of token ids, however long, in; the target's vectors at chosen tokens out, in bounded memory.

A row goes chunk after chunk through a cache; beyond the context, or to bound the cache too, in overlapping windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nla.errors import ArgumentError, ContextLengthError
from nla.metrics import check_finite, check_ids
from nla.models.hooks import inference
from nla.models.points import Point, backbone, context_length, device_of, n_embeddings, truncated_view, unwrapped
from nla.models.selfcheck import reads_in_parts

CHUNK = 1024
"""Most tokens of a forward pass."""

MASK_ELEMENTS = 1 << 23
"""Tokens of a pass times tokens before them, at most: attention masks have one element for each such pair."""

Progress = Callable[[float], None]


def _nobody(fraction: float) -> None:
    """Progress that nobody watches."""


class Window(NamedTuple):
    """Tokens ``start`` to ``end`` are run; of them, those from ``fresh`` on are read."""

    start: int
    fresh: int
    end: int


def read_ids(
    model: nn.Module,
    ids: Int[Tensor, " t"],
    point: str | Point,
    columns: Sequence[int],
    chunk: int = CHUNK,
    progress: Progress = _nobody,
) -> Float[Tensor, "n d"]:
    """Vectors on the CPU, in float32, at ``columns`` of one row of token ids, as the model stands.

    Only the blocks up to the point run, and no logits are made. Memory grows with the cache alone: keys and values
    of each block up to the point, or of a sliding-window block its window. :func:`nla.models.read.vectors_at` runs
    whole rows in a batch; here one row is too long for that and goes through a cache, part after part. A model that
    gives other values in parts reads it in one pass, which ``MASK_ELEMENTS`` bound.

    Raises:
        ArgumentError: a chunk below 1.
        ContextLengthError: more ids than the model's context, or than one pass holds if it must be one.
        PointError, NonFiniteError, VocabularyError: as in :func:`nla.models.read.read`.
    """
    from transformers import DynamicCache

    if chunk < 1:
        raise ArgumentError(f"chunk={chunk}", "1 or more", "give a pass at least one token")
    limit = context_length(model)
    if len(ids) > limit:
        raise too_long(len(ids), limit, "the text")
    in_parts, most = reads_in_parts(unwrapped(model)), math.isqrt(MASK_ELEMENTS)
    if not in_parts and len(ids) > most:
        kind = backbone(model).config.model_type
        raise ContextLengthError(
            f"a text with {len(ids)} tokens",
            f"at most {most} at a time: a model of type {kind!r} gives other values in parts",
            "read it in overlapping windows: --window 2048",
        )
    check_ids(ids, n_embeddings(unwrapped(model)))
    chunk = chunk if in_parts else most
    view = truncated_view(model, point)
    vectors = torch.empty(len(columns), view.config.hidden_size)
    wanted = torch.tensor(columns, dtype=torch.int64)
    last = int(wanted.max()) + 1 if len(wanted) else 0
    cache = DynamicCache(config=view.config) if in_parts else None
    with inference(model):
        end = 0
        while end < last:
            start = end
            end = min(last, start + chunk, start + max(1, MASK_ELEMENTS // (start + chunk)))
            part = ids[start:end].reshape(1, -1).to(device_of(model))
            hidden = view(input_ids=part, past_key_values=cache, use_cache=in_parts).last_hidden_state[0]
            rows = ((wanted >= start) & (wanted < end)).nonzero().flatten()
            vectors[rows] = hidden[(wanted[rows] - start).to(hidden.device)].float().cpu()
            progress(end / last)
    check_finite(vectors)
    return vectors


def read_windows(
    model: nn.Module,
    ids: Int[Tensor, " t"],
    point: str | Point,
    columns: Sequence[int],
    windows: Sequence[Window],
    n_opening: int = 0,
    progress: Progress = _nobody,
) -> Float[Tensor, "n d"]:
    """:func:`read_ids`, window after window. Tokens further back than a window are not seen by the target.

    Args:
        windows: from :func:`plan_windows`; a single one is the whole row in one pass.
        n_opening: tokens at the start of the row, such as BOS, that every window begins with.
    """
    if len(windows) == 1:
        return read_ids(model, ids, point, columns, progress=progress)
    wanted = torch.tensor(columns)
    parts: list[Tensor] = []
    order: list[Tensor] = []
    for window in windows:
        rows = ((wanted >= window.fresh) & (wanted < window.end)).nonzero().flatten()
        if len(rows):
            opening = ids[: n_opening if window.start else 0]
            inside = wanted[rows] - window.start + len(opening)
            parts.append(read_ids(model, torch.cat([opening, ids[window.start : window.end]]), point, inside.tolist()))
            order.append(rows)
        progress(window.end / len(ids))
    return torch.cat(parts)[torch.cat(order).argsort()]


def plan_windows(n_tokens: int, length: int, starts: Sequence[int]) -> list[Window]:
    """Overlapping windows over tokens 0…n−1, so that every token but the first ones has half a window before it.

    A window begins at one of ``starts``, where a message begins: at the latest that leaves the overlap; within a
    message that is longer than that, at the overlap itself.

    >>> plan_windows(10, 4, [0, 3, 7])
    [Window(start=0, fresh=0, end=4), Window(start=2, fresh=4, end=6), Window(start=3, fresh=6, end=7), \
Window(start=5, fresh=7, end=9), Window(start=7, fresh=9, end=10)]
    """
    windows = [Window(0, 0, min(length, n_tokens))]
    while windows[-1].end < n_tokens:
        before = windows[-1]
        latest = before.end - length // 2
        start = max((start for start in starts if before.start < start <= latest), default=latest)
        windows.append(Window(start, before.end, min(start + length, n_tokens)))
    return windows


def too_long(n_tokens: int, limit: int, what: str) -> ContextLengthError:
    """The error of a text beyond the context."""
    return ContextLengthError(
        f"{what} with {n_tokens} tokens",
        f"at most {limit}, the model's context",
        f"read it in overlapping windows: --window {limit}",
    )
