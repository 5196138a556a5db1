"""Training vectors that need not be in memory: a tensor, or anything that gives rows of one, such as a store's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nla.errors import ShapeError
from nla.metrics import rescale

CHUNK = 16_384
"""Rows held at a time by what passes over all of them."""
MOST_ROWS = 1 << 24
"""``torch.multinomial`` refuses more."""


class Vectors(Protocol):
    """Activations (n, d), indexed like a tensor; what indexing gives is in memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Int[Tensor, " m"], /) -> Float[Tensor, "m d"]: ...


class Joined:
    """The rows of ``first`` (n, d), then those of ``second`` (m, d), copying neither."""

    def __init__(self, first: Vectors, second: Vectors) -> None:
        if first.shape[1] != second.shape[1]:
            raise ShapeError(f"vectors of width {second.shape[1]}", f"width {first.shape[1]}", "read both alike")
        self.first, self.second = first, second
        self.shape = (len(first) + len(second), first.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Int[Tensor, " m"], /) -> Float[Tensor, "m d"]:
        out = torch.empty(len(index), self.shape[1])
        late = index >= len(self.first)
        out[~late] = self.first[index[~late]].float().cpu()
        out[late] = self.second[index[late] - len(self.first)].float().cpu()
        return out


class Chosen:
    """Some ``rows`` (m,) of ``vectors`` (n, d), in their order, without a copy."""

    def __init__(self, vectors: Vectors, rows: Int[Tensor, " m"]) -> None:
        self.vectors, self.rows = vectors, rows
        self.shape = (len(rows), vectors.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Int[Tensor, " m"], /) -> Float[Tensor, "m d"]:
        return self.vectors[self.rows[index]]


def chunks(vectors: Vectors) -> Iterator[Float[Tensor, "chunk d"]]:
    """All rows in order, float32, at most ``CHUNK`` at a time."""
    for start in range(0, len(vectors), CHUNK):
        yield vectors[torch.arange(start, min(start + CHUNK, len(vectors)))].float()


def identity(vectors: Vectors) -> Iterator[Tensor | str]:
    """What tells these vectors from others: of a store its hash, which stands for its content, otherwise themselves."""
    if isinstance(vectors, Chosen):
        yield vectors.rows
        yield from identity(vectors.vectors)
    elif isinstance(vectors, Joined):
        yield from identity(vectors.first)
        yield from identity(vectors.second)
    elif isinstance(stored := getattr(vectors, "identity", None), str):
        yield stored
    else:
        yield from chunks(vectors)


def check_directions(vectors: Vectors) -> None:
    """Refuse vectors of which one has no direction; those of a store were checked when they were written.

    Raises:
        NonFiniteError: a vector holds NaN, infinity, or only zeros.
    """
    inner = vectors
    while isinstance(inner, Chosen):
        inner = inner.vectors
    if getattr(inner, "identity", None) is None:
        for chunk in chunks(vectors):
            rescale(chunk, 1.0)


def draw_by_weight(
    weights: Float[Tensor, " n"], wanted: int, replacement: bool, generator: torch.Generator
) -> Int[Tensor, " wanted"]:
    """``wanted`` rows, each drawn with a probability that is proportional to its weight.

    ``torch.multinomial`` draws them, up to the number of rows that it takes. Above, each draw is looked up in the sums
    of the weights; without replacement, the rows with the earliest of exponential waiting times are drawn.
    """
    if len(weights) <= MOST_ROWS:
        return torch.multinomial(weights, wanted, replacement, generator=generator)
    if replacement:
        sums = weights.double().cumsum(0)
        drawn = torch.rand(wanted, dtype=torch.float64, generator=generator) * sums[-1]
        return torch.searchsorted(sums, drawn, right=True).clamp(max=len(weights) - 1)
    waits = torch.empty(len(weights), dtype=torch.float64).exponential_(generator=generator) / weights
    return waits.topk(wanted, largest=False).indices
