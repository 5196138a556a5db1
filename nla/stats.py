"""How sure we are: measured values in; intervals, tests, corrections for many tests and shuffles out. Pure.

The textbook formulas are SciPy's. What it lacks is ours: resampling of whole documents, and exact sign flips of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nla.errors import ArgumentError, NonFiniteError, ShapeError

_CHUNK_ELEMENTS = 1 << 21


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """q-values in the order of the p-values: reject those ≤ α and the expected share of false ones is ≤ α.

    >>> [round(q, 3) for q in benjamini_hochberg([0.01, 0.04, 0.03, 1.0])]
    [0.04, 0.053, 0.053, 1.0]

    Raises:
        ArgumentError: a p-value outside [0, 1].

    Source: Benjamini & Hochberg 1995; valid under positive dependence, Benjamini & Yekutieli 2001.
    """
    _check_p_values(p_values)
    from scipy.stats import false_discovery_control

    return false_discovery_control(p_values, method="bh").tolist() if p_values else []


class Interval(NamedTuple):
    """An estimate between the ends of its confidence interval; they are NaN where a single document gives none."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """A JSON-ready dict; what is not finite is None."""
        return {name: part if math.isfinite(part) else None for name, part in self._asdict().items()}

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.3f} (one document: no interval)"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion: good at few trials and near 0 and 1. Trials must be independent.

    Raises:
        ArgumentError: n < 1, or successes outside 0…n.

    Source: Wilson 1927.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ArgumentError(f"{successes} successes of {n}", "0 ≤ successes ≤ n, n ≥ 1", "count the trials again")
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence {confidence}", "a number in (0, 1)", "use 0.95, for example")
    from scipy.stats import binomtest

    ends = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(successes / n, float(ends.low), float(ends.high))


def spearman(a: Float[Tensor, "*batch n"], b: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Rank correlation over the last dimension, float64; equal values share their mean rank. NaN where all are equal.

    Source: Spearman 1904; equal to ``scipy.stats.spearmanr`` row by row.
    """
    from scipy.stats import rankdata

    ranks = [torch.from_numpy(rankdata(values.numpy(), axis=-1)) for values in (a, b)]
    left, right = (rank - rank.mean(-1, keepdim=True) for rank in ranks)
    return (left * right).sum(-1) / (left.square().sum(-1) * right.square().sum(-1)).sqrt()


def bootstrap(
    values: Float[Tensor, " n"] | Float[Tensor, "n m"],
    clusters: Int[Tensor, " n"] | Sequence[int] | None = None,
    statistic: Callable[[Tensor], Tensor] | None = None,
    n_boot: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of the mean of ``values`` (or a function of means), resampling whole clusters.

    Vectors of one document are not independent, so documents are drawn, and each brings all its values. A single
    cluster says nothing of how clusters differ: its interval has NaN for ends.

    Args:
        values: one or m quantities of each item, such as the errors of two readers.
        clusters: document of each value, n integers; None: every value is its own cluster.
        statistic: from the means, (..., m) or (...) for one-dimensional values, to (...); None: the mean itself.
        n_boot: number of resamples.

    Raises:
        ArgumentError: no values, n_boot < 1, or a confidence outside (0, 1).
        ShapeError: ``clusters`` has another length.
        NonFiniteError: NaN or infinity in the values.

    Source: Efron & Tibshirani 1993; the cluster bootstrap as in Cameron, Gelbach & Miller 2008.
    """
    if n_boot < 1 or len(values) == 0 or not 0 < confidence < 1:
        got = f"n_boot={n_boot}, {len(values)} values, confidence={confidence}"
        raise ArgumentError(got, "at least 1 resample, 1 value, a confidence in (0, 1)", "check the selection")
    values = values.detach().cpu().double()
    if not torch.isfinite(values).all():
        raise NonFiniteError("NaN or infinity in the values", "finite values", "leave out the items without a score")
    flat = values.unsqueeze(1) if values.ndim == 1 else values
    index = _cluster_index(clusters, len(values))
    n_clusters = int(index.max()) + 1
    apply = statistic or (lambda mean: mean)
    value = float(apply(values.mean(0, keepdim=values.ndim == 2)).squeeze())
    if n_clusters == 1:
        return Interval(value, math.nan, math.nan)
    counts = torch.bincount(index, minlength=n_clusters).double()
    totals = torch.cat([torch.zeros(n_clusters, flat.shape[1]).double().index_add_(0, index, flat), counts[:, None]], 1)
    means = _resampled_sums(totals, n_boot, seed)
    means = means[:, :-1] / means[:, -1:]
    means = means.squeeze(1) if values.ndim == 1 else means
    draws = apply(means)
    if draws.shape != (n_boot,):
        raise ShapeError(f"a statistic of shape {tuple(draws.shape)}", f"({n_boot},)", "reduce the last dimension only")
    tail = (1 - confidence) / 2
    low, high = torch.quantile(draws, torch.tensor([tail, 1 - tail]).double()).tolist()
    return Interval(value, low, high)


def paired_permutation(
    a: Float[Tensor, " n"],
    b: Float[Tensor, " n"],
    clusters: Int[Tensor, " n"] | Sequence[int] | None = None,
    alternative: str = "two-sided",
    n_permutations: int = 10_000,
    seed: int = 0,
) -> float:
    """p-value of "the mean of a equals the mean of b" for paired scores, flipping signs of whole clusters.

    Args:
        alternative: "two-sided", or "greater": a is greater than b.

    Returns:
        In (0, 1]: exact over all sign flips when there are at most ``n_permutations``, else estimated from that many,
        counting the observed one.

    Raises:
        ShapeError: the shapes differ or are not (n,).
        ArgumentError: no pairs, n_permutations < 1, or an unknown alternative.
        NonFiniteError: NaN or infinity in the scores.

    Source: Fisher 1935; Phipson & Smyth 2010 for the added one.
    """
    if a.shape != b.shape or a.ndim != 1:
        raise ShapeError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}", "two times (n,)", "score the same items")
    if len(a) == 0 or n_permutations < 1 or alternative not in ("two-sided", "greater"):
        got = f"{len(a)} pairs, n_permutations={n_permutations}, alternative={alternative!r}"
        raise ArgumentError(got, 'pairs, permutations, and "two-sided" or "greater"', "check the call")
    difference = (a.double() - b.double()).cpu()
    if not torch.isfinite(difference).all():
        raise NonFiniteError("NaN or infinity in the scores", "finite values", "leave out the items without a score")
    index = _cluster_index(clusters, len(a))
    totals = torch.zeros(int(index.max()) + 1).double().index_add_(0, index, difference)
    observed = totals.sum()
    exact = len(totals) < 63 and 2 ** len(totals) <= n_permutations
    if exact:
        codes = torch.arange(2 ** len(totals))[:, None]
        sums = _flipped(totals, (codes >> torch.arange(len(totals))) & 1)
    else:
        generator = torch.Generator().manual_seed(seed)
        chunk = max(1, _CHUNK_ELEMENTS // len(totals))
        sums = torch.cat(
            [
                _flipped(totals, torch.randint(2, (len(part), len(totals)), generator=generator, dtype=torch.int8))
                for part in torch.arange(n_permutations).split(chunk)
            ]
        )
    slack = 1e-12 * float(totals.abs().sum())
    if alternative == "two-sided":
        extreme = int((sums.abs() >= observed.abs() - slack).sum())
    else:
        extreme = int((sums >= observed - slack).sum())
    return extreme / len(sums) if exact else (1 + extreme) / (1 + len(sums))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for several tests, in their order: reject those ≤ α and the family-wise error is ≤ α.

    Raises:
        ArgumentError: a p-value outside [0, 1].

    Source: Holm 1979.
    """
    _check_p_values(p_values)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, row in enumerate(sorted(range(len(p_values)), key=lambda row: p_values[row])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[row]))
        adjusted[row] = largest
    return adjusted


def derangement(n: int, seed: int, strata: str | Sequence[str] | None = None) -> Int[Tensor, " n"]:
    """A random permutation of 0…n−1 that moves every index; with ``strata``, within each stratum.

    The baseline "shuffled": score each activation against another one's reconstruction.

    Raises:
        ArgumentError: n, or a stratum, has a single item: it cannot be moved.
        ShapeError: ``strata`` has another length.
    """
    generator = torch.Generator().manual_seed(seed)
    result = torch.empty(n, dtype=torch.long)
    for stratum, rows in _rows_by_stratum(["all"] * n if strata is None else strata, n).items():
        if len(rows) < 2:
            raise ArgumentError(
                got=f"a single item in stratum {stratum!r}",
                expected="at least 2 to exchange",
                fix="score more positions, or leave this stratum out",
            )
        order = torch.arange(len(rows))
        while (order == torch.arange(len(rows))).any():  # e tries on average
            order = torch.randperm(len(rows), generator=generator)
        result[rows] = rows[order]
    return result


def _rows_by_stratum(strata: str | Sequence[str], n: int) -> dict[str, Tensor]:
    """Row numbers of each stratum, in order of first appearance."""
    strata = [strata] if isinstance(strata, str) else strata
    if len(strata) != n:
        raise ShapeError(f"{len(strata)} strata for {n} vectors", "one name a vector", "pass acts.strata")
    rows: dict[str, list[int]] = {}
    for row, stratum in enumerate(strata):
        rows.setdefault(stratum, []).append(row)
    return {stratum: torch.tensor(members) for stratum, members in rows.items()}


def _cluster_index(clusters: Tensor | Sequence[int] | None, n: int) -> Tensor:
    """Clusters renumbered 0, 1, …: (n,)."""
    if clusters is None:
        return torch.arange(n)
    labels = torch.as_tensor(clusters).cpu()
    if labels.shape != (n,):
        raise ShapeError(f"clusters of shape {tuple(labels.shape)}", f"({n},)", "pass one document number a value")
    return torch.unique(labels, return_inverse=True)[1]


def _resampled_sums(totals: Tensor, n_boot: int, seed: int) -> Tensor:
    """Sums (n_boot, m) of rows of ``totals`` (n_clusters, m) drawn with replacement, as many as there are."""
    n_clusters = len(totals)
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, _CHUNK_ELEMENTS // n_clusters)
    sums = []
    for start in range(0, n_boot, chunk):
        size = min(chunk, n_boot - start)
        drawn = torch.randint(n_clusters, (size, n_clusters), generator=generator)
        weights = torch.zeros(size, n_clusters).scatter_add_(1, drawn, torch.ones(size, n_clusters))
        sums.append(weights.double() @ totals)
    return torch.cat(sums)


def _flipped(totals: Tensor, bits: Tensor) -> Tensor:
    """Sums (n,) of ``totals`` (m,) with the sign + where a bit (n, m) is 1 and − where it is 0."""
    return 2 * (bits.double() @ totals) - totals.sum()


def _check_p_values(p_values: Sequence[float]) -> None:
    if not all(0 <= p <= 1 for p in p_values):
        raise ArgumentError(f"p-values {list(p_values)[:5]}", "values in [0, 1]", "check the tests that made them")
