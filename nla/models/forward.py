"""What every forward pass needs: padding, the device, evaluation mode; and the pass itself, rows of ids to vectors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nla.models.hooks import record
from nla.models.points import Point, d_model
from nla.text.tokens import length_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Intervene = Callable[[Int[Tensor, " b"]], contextlib.AbstractContextManager]
"""From the numbers of a batch's rows, a context in which the model's forward pass runs."""


def pad_left(rows: Sequence[Sequence[int]], value: int) -> tuple[Int[Tensor, "b t"], Int[Tensor, " b"]]:
    """Rows of token ids as one tensor, filled up on the left, and the padding of each."""
    longest = max(map(len, rows))
    padding = torch.tensor([longest - len(row) for row in rows])
    return torch.tensor([[*[value] * (longest - len(row)), *row] for row in rows]), padding


def pad_right(rows: Sequence[Sequence[int]], value: int = 0) -> Int[Tensor, "b t"]:
    """Rows of token ids as one tensor, filled up on the right."""
    longest = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go."""
    whole: Any = model
    return whole.get_input_embeddings().weight.device


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


def vectors_at(
    view: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    columns: Sequence[Sequence[int]],
    max_tokens_per_batch: int,
    intervene: Intervene | None = None,
    points: Sequence[str | Point] = (),
    progress: bool = False,
) -> Float[Tensor, "n *p d"]:
    """What a truncated view gives at the chosen columns of rows of token ids, row after row, on the CPU in its type.

    Batches by length, the longest first: a budget that is too large fails at once. Padding is on the right and without
    a mask: causality keeps real tokens exact, and the fast attention kernel stays.

    Args:
        view: from :func:`nla.models.points.truncated_view` or :func:`nla.models.load.load_truncated`.
        columns: of each row, in the order in which its vectors are wanted; a row without any is not run.
        intervene: a context for each batch, such as patches of its rows.
        points: on the way to the view's own: then the result has the streams at these instead, (n, p, d), in one pass.
        progress: show a bar.
    """
    ends = torch.tensor([len(chosen) for chosen in columns], dtype=torch.int64).cumsum(0).tolist()
    numbers = [number for number, chosen in enumerate(columns) if chosen]
    batches = length_batches([len(rows[number]) for number in numbers], max_tokens_per_batch)
    device = device_of(view)
    vectors: Tensor | None = None
    waiting: tuple[Tensor, Tensor] | None = None
    with inference(view):
        for part in _bar(batches[::-1], progress):
            batch = [numbers[index] for index in part]
            row = torch.tensor([index for index, number in enumerate(batch) for _ in columns[number]], device=device)
            column = torch.tensor([column for number in batch for column in columns[number]], device=device)
            out = torch.tensor([i for n in batch for i in range(ends[n] - len(columns[n]), ends[n])])
            ids = pad_right([rows[number] for number in batch]).to(device)
            # Interventions first: hooks run in the order of their making, and what is recorded is what flows on.
            with intervene(torch.tensor(batch)) if intervene else contextlib.nullcontext(), record(view, points) as at:
                last = view(input_ids=ids, use_cache=False).last_hidden_state
            chosen = last[row, column]
            if points:
                chosen = torch.stack([at[str(point)][row, column] for point in points], dim=1)
            if vectors is None:
                vectors = torch.empty(ends[-1], *chosen.shape[1:], dtype=chosen.dtype)
            # One batch behind: the copy waits for the device only once the next batch is queued there.
            if waiting is not None:
                vectors[waiting[0]] = waiting[1].cpu()
            waiting = out, chosen
    if vectors is None or waiting is None:
        return torch.empty(0, *([len(points)] if points else []), d_model(view))
    vectors[waiting[0]] = waiting[1].cpu()
    return vectors


def _bar(batches: list[list[int]], shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(batches, desc="read", unit="batch", disable=not shown)
