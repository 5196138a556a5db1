"""The processes of one run under ``accelerate launch``: who is who, and what they decide together.

Without a launcher there is one process, and everything here answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, distributed

from nla.errors import ArgumentError

PATIENCE = timedelta(days=30)
"""How long processes wait for each other: one may ask an endpoint for hours while the others have nothing to do."""


def join(on_cpu: bool) -> None:
    """Meet the other processes of a launcher, if there is one; NCCL between GPUs, gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=on_cpu, timeout=PATIENCE)


def count() -> int:
    """How many processes work on this run."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Whether this process writes what the run writes once: logs, checkpoints, pairs."""
    return rank() == 0


def own_device() -> torch.device | None:
    """Where this process's models go; None, the usual place, for a single process."""
    if count() == 1:
        return None
    from accelerate import PartialState

    return PartialState().device


def share(rows: int, name: str, per_backward: int | None = None) -> tuple[int, int]:
    """What each process does of a step of ``rows``: rows in one backward pass, and how many passes.

    Raises:
        ArgumentError: ``rows``, called ``name``, do not divide evenly.
    """
    mine, rest = divmod(rows, count())
    size = mine if per_backward is None else per_backward
    if rest or not 0 < size <= mine or mine % size:
        passes = f" in passes of {per_backward}" if per_backward is not None else ""
        raise ArgumentError(
            f"{name}={rows} over {count()} process(es){passes}",
            "rows that divide evenly",
            f"change {name}, rows_per_backward or the number of processes",
        )
    return size, mine // size


def wait() -> None:
    """Go on when every process is here."""
    if count() > 1:
        distributed.barrier()


def agreed(value: Any) -> Any:
    """The main process's value, in every process; it travels as a pickle between processes of one run."""
    if count() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def share_of(items: Any) -> Any:
    """What this process takes of a sequence or tensor: every n-th, from its own number."""
    return items[rank() :: count()]


def gathered(mine: Sequence[Any]) -> list[Any]:
    """In every process, what all took with :func:`share_of`, in the order of the whole."""
    if count() == 1:
        return list(mine)
    parts: list[Any] = [None] * count()
    distributed.all_gather_object(parts, list(mine))
    missing = object()
    return [item for group in zip_longest(*parts, fillvalue=missing) for item in group if item is not missing]


def total(value: float) -> float:
    """The sum of every process's value."""
    if count() == 1:
        return value
    box = torch.tensor(value, dtype=torch.float64, device=_meeting_place())
    distributed.all_reduce(box)
    return float(box)


def every(flag: bool) -> bool:
    """Whether the flag is true in every process."""
    return total(float(not flag)) == 0


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Give every process the sum of all gradients; a missing one counts as zeros. One message for all of them."""
    if count() == 1:
        return
    members = list(parameters)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).float() for p in members])
    distributed.all_reduce(flat)
    for parameter, part in zip(members, flat.split([p.numel() for p in members]), strict=True):
        parameter.grad = part.reshape(parameter.shape).to(parameter.dtype)


def _meeting_place() -> torch.device:
    """Where a tensor must lie for the processes to exchange it."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
