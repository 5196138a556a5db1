"""Activations of a long transcript in one pass: chunk after chunk through a cache, keeping the chosen tokens only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nla.errors import ArgumentError, ContextLengthError
from nla.metrics import check_finite
from nla.models.forward import device_of, inference
from nla.models.points import Point, context_length, truncated_view
from nla.models.read import Activations
from nla.transcripts.positions import Position
from nla.transcripts.rendering import Chat, message_starts

CHUNK = 1024
"""Most tokens of a forward pass."""

MASK_ELEMENTS = 1 << 23
"""Tokens of a pass times tokens before them, at most: attention masks have one element for each such pair."""

Progress = Callable[[float], None]


class Window(NamedTuple):
    """Tokens ``start`` to ``end`` are run; of them, those from ``fresh`` on are read."""

    start: int
    fresh: int
    end: int


def read_ids(
    model: nn.Module,
    ids: Tensor,
    point: str | Point,
    columns: Sequence[int],
    chunk: int = CHUNK,
    progress: Progress = lambda fraction: None,
) -> Tensor:
    """Vectors (n, d) float32 on the CPU at ``columns`` of one row of token ids (t,), as the model stands.

    Only the blocks up to the point run, and no logits are made. Memory grows with the cache alone: keys and values
    of each block up to the point, or of a sliding-window block its window. :func:`nla.models.forward.vectors_at` runs
    whole rows in a batch; here one row is too long for that and goes through a cache, part after part.

    Raises:
        ArgumentError: a chunk below 1.
        ContextLengthError: more ids than the model's context.
        PointError, NonFiniteError: as in :func:`nla.activations.read`.
    """
    from transformers import DynamicCache

    if chunk < 1:
        raise ArgumentError(f"chunk={chunk}", "1 or more", "give a pass at least one token")
    limit = context_length(model)
    if len(ids) > limit:
        raise too_long(len(ids), limit, "the text")
    view = truncated_view(model, point)
    vectors = torch.empty(len(columns), view.config.hidden_size)
    wanted = torch.tensor(columns, dtype=torch.int64)
    last = int(wanted.max()) + 1 if len(wanted) else 0
    cache = DynamicCache(config=view.config)
    with inference(model):
        end = 0
        while end < last:
            start = end
            end = min(last, start + chunk, start + max(1, MASK_ELEMENTS // (start + chunk)))
            part = ids[start:end].reshape(1, -1).to(device_of(model))
            hidden = view(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state[0]
            rows = ((wanted >= start) & (wanted < end)).nonzero().flatten()
            vectors[rows] = hidden[(wanted[rows] - start).to(hidden.device)].float().cpu()
            progress(end / last)
    check_finite(vectors)
    return vectors


def too_long(n_tokens: int, limit: int, what: str) -> ContextLengthError:
    """The error of a text beyond the context."""
    return ContextLengthError(
        f"{what} with {n_tokens} tokens",
        f"at most {limit}, the model's context",
        f"read it in overlapping windows: --window {limit}",
    )


def plan_windows(n_tokens: int, window: int, starts: Sequence[int]) -> list[Window]:
    """Overlapping windows over tokens 0…n−1, so that every token but the first ones has half a window before it.

    A window begins where a message does, at the latest message that leaves the overlap; within a message that is
    longer than that, at the overlap itself.

    >>> plan_windows(10, 4, [0, 3, 7])
    [Window(start=0, fresh=0, end=4), Window(start=2, fresh=4, end=6), Window(start=3, fresh=6, end=7), \
Window(start=5, fresh=7, end=9), Window(start=7, fresh=9, end=10)]
    """
    windows = [Window(0, 0, min(window, n_tokens))]
    while windows[-1].end < n_tokens:
        before = windows[-1]
        latest = before.end - window // 2
        start = max((start for start in starts if before.start < start <= latest), default=latest)
        windows.append(Window(start, before.end, min(start + window, n_tokens)))
    return windows


def check_length(model: nn.Module, chat: Chat, window: int | None) -> None:
    """Refuse what :func:`read_chat` cannot read.

    Raises:
        ContextLengthError, ArgumentError: see there.
    """
    limit = context_length(model)
    if window is not None and not 2 <= window <= limit:
        raise ArgumentError(f"window={window}", f"2 to {limit}, the model's context", "choose a window in that range")
    if window is None and len(chat) > limit:
        raise too_long(len(chat), limit, chat.transcript.source or chat.transcript.id)


def read_chat(
    model: nn.Module,
    chat: Chat,
    point: str | Point,
    positions: Sequence[Position],
    window: int | None = None,
    chunk: int = CHUNK,
    progress: Progress = lambda fraction: None,
) -> Activations:
    """Activations of a rendered transcript at the chosen positions; their kinds are the strata.

    Args:
        window: read in overlapping windows of this many tokens; None: in one pass. Tokens further back than the
            window are then not seen by the target. Where the transcript begins with BOS, every window does.

    Raises:
        ContextLengthError: longer than the model's context, and no window.
        ArgumentError: a window below 2 or beyond the context.
    """
    check_length(model, chat, window)
    columns = [position.index for position in positions]
    if window is None or len(chat) <= window:
        vectors = read_ids(model, chat.ids, point, columns, chunk, progress)
    else:
        vectors = _read_windows(model, chat, point, columns, window, chunk, progress)
    return Activations(
        vectors=vectors,
        spans=[chat.span(column) for column in columns],
        document=torch.zeros(len(columns), dtype=torch.int64),
        texts=[chat.text],
        point=str(point),
        strata=[position.kind for position in positions],
    )


def _read_windows(
    model: Any,
    chat: Chat,
    point: str | Point,
    columns: list[int],
    window: int,
    chunk: int,
    progress: Progress,
) -> Tensor:
    opening = chat.ids[: int(chat.has_bos)]
    room = window - len(opening)
    wanted, parts = torch.tensor(columns), []
    order: list[Tensor] = []
    for span in plan_windows(len(chat), room, message_starts(chat)):
        rows = ((wanted >= span.fresh) & (wanted < span.end)).nonzero().flatten()
        if len(rows):
            lead = opening if span.start else opening[:0]
            ids = torch.cat([lead, chat.ids[span.start : span.end]])
            inside = (wanted[rows] - span.start + len(lead)).tolist()
            parts.append(read_ids(model, ids, point, inside, chunk))
            order.append(rows)
        progress(span.end / len(chat))
    vectors = torch.cat(parts)
    return vectors[torch.cat(order).argsort()]
