"""AUROC over two or more classes, with intervals by whole groups and paired tests on the same resamples. Pure.

A reader gives every item a score for every class. A class's AUROC is the chance that an item of it outranks an item
of another class in that class's column (ties count half); over several classes it is their mean, so chance is 0.5
however many there are and however unequal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from nla.errors import ArgumentError, NonFiniteError, ShapeError
from nla.stats import Interval, wilson

N_BOOT = 500
_CHUNK_ELEMENTS = 1 << 22


class Ranked(NamedTuple):
    """An AUROC with its 95 % interval by group, and the resampled values that paired tests compare."""

    auroc: Interval
    draws: Float[Tensor, " n_boot"]


def auroc(
    scores: Shaped[Tensor, " n"], positive: Bool[Tensor, " n"], weights: Float[Tensor, "b n"] | None = None
) -> Float[Tensor, " b"]:
    """AUROC of scores for the items that are ``positive``: in [0, 1].

    Without weights (b = 1) this is the usual one; a weight counts how often a resample drew the item. NaN where a
    resample holds one class only.

    Raises:
        ShapeError: the shapes differ.
        NonFiniteError: NaN in the scores (infinities rank as they should).
    """
    if scores.ndim != 1 or scores.shape != positive.shape:
        raise ShapeError(
            f"scores {tuple(scores.shape)}, labels {tuple(positive.shape)}", "two times (n,)", "align them"
        )
    if torch.isnan(scores).any():
        raise NonFiniteError("NaN in the scores", "numbers", "give an item without a score the lowest one")
    weights = torch.ones(1, len(scores)) if weights is None else weights
    order = scores.argsort()
    ranked, hit = scores[order], positive[order]
    drawn = weights[:, order].double()
    wins, losses = drawn * hit, drawn * ~hit
    below = torch.nn.functional.pad(losses.cumsum(1), (1, 0))
    first = torch.searchsorted(ranked, ranked, right=False)
    last = torch.searchsorted(ranked, ranked, right=True)
    outranked = (below[:, first] + below[:, last]) / 2
    pairs = wins.sum(1) * losses.sum(1)
    return torch.where(pairs > 0, (wins * outranked).sum(1) / pairs, math.nan)


def macro_auroc(
    scores: Shaped[Tensor, "n k"], labels: Int[Tensor, " n"], weights: Float[Tensor, "b n"] | None = None
) -> Float[Tensor, " b"]:
    """Mean over classes of the AUROC of each column of ``scores`` against the rest.

    A class without items, or without others, does not count; NaN if none does.
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ShapeError(f"scores {tuple(scores.shape)}, labels {tuple(labels.shape)}", "(n, k) and (n,)", "align them")
    columns = range(scores.shape[1]) if scores.shape[1] != 2 else (1,)
    by_class = torch.stack([auroc(scores[:, column], labels == column, weights) for column in columns])
    return by_class.nanmean(0)


def resample_groups(
    groups: Int[Tensor, " n"] | Sequence[int], n_boot: int = N_BOOT, seed: int = 0
) -> Float[Tensor, "n_boot n"]:
    """How often each item is drawn when whole groups are drawn with replacement.

    Raises:
        ArgumentError: no items, or ``n_boot`` below 1.
    """
    labels = torch.as_tensor(groups)
    if n_boot < 1 or len(labels) == 0:
        raise ArgumentError(f"n_boot={n_boot}, {len(labels)} items", "1 or more of each", "check the selection")
    index = torch.unique(labels, return_inverse=True)[1]
    n_groups = int(index.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_groups, (n_boot, n_groups), generator=generator)
    return torch.zeros(n_boot, n_groups).scatter_add_(1, drawn, torch.ones(n_boot, n_groups))[:, index]


def ranked_auroc(
    scores: Shaped[Tensor, "n k"],
    labels: Int[Tensor, " n"],
    groups: Int[Tensor, " n"] | Sequence[int],
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> Ranked:
    """AUROC of scores with its percentile interval over resampled groups.

    Equal ``groups``, ``n_boot`` and ``seed`` give equal resamples, so two readers' draws are paired. Where every
    resample gives exactly 1 or 0 the interval is Wilson's, of one trial a group (of the smaller of two classes). There
    is no interval (NaN) where one group is all that there is of one of two classes: every resample would hold it.

    Raises:
        ArgumentError: no item, or all of one class.
    """
    value = float(macro_auroc(scores, labels))
    if math.isnan(value):
        raise ArgumentError(f"{len(labels)} items of one class", "items of two classes or more", "add items")
    members = torch.as_tensor(groups)
    weights, chunk = resample_groups(members, n_boot, seed), max(1, _CHUNK_ELEMENTS // len(labels))
    draws = torch.cat([macro_auroc(scores, labels, part) for part in weights.split(chunk)])
    known = draws[~torch.isnan(draws)]
    if len(members.unique()) < 2 or not len(known):
        return Ranked(Interval(value, math.nan, math.nan), draws)
    n_trials = _n_trials(labels, members, scores.shape[1])
    if value in (0.0, 1.0) and bool((known == value).all()):
        return Ranked(Interval(*wilson(round(value * n_trials), n_trials)), draws)
    if n_trials < 2:
        return Ranked(Interval(value, math.nan, math.nan), draws)
    low, high = torch.quantile(known, torch.tensor([0.025, 0.975]).double()).tolist()
    return Ranked(Interval(value, low, high), draws)


def paired_p(a: Ranked, b: Ranked) -> float:
    """Two-sided p-value that two readers of the same items have the same AUROC, from their paired resamples.

    Twice the share of resamples in which the difference has the other sign or is none, the observed one counted too:
    1 where they never differ or have no interval, 2 / (n_boot + 1) where they always differ.
    """
    if math.isnan(a.auroc.low) or math.isnan(b.auroc.low):
        return 1.0
    difference = a.draws - b.draws
    difference = difference[~torch.isnan(difference)]
    if not len(difference):
        return 1.0
    smaller = min(int((difference <= 0).sum()), int((difference >= 0).sum()))
    return min(1.0, 2 * (1 + smaller) / (1 + len(difference)))


def auroc_difference(a: Ranked, b: Ranked) -> Interval:
    """AUROC of one reader minus that of another on the same items, with its interval from their paired resamples."""
    draws = (a.draws - b.draws)[~torch.isnan(a.draws - b.draws)]
    value = a.auroc.value - b.auroc.value
    if not len(draws) or math.isnan(a.auroc.low) or math.isnan(b.auroc.low):
        return Interval(value, math.nan, math.nan)
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975]).double()).tolist()
    if low == high != 0:  # no resample changes it: what the two intervals leave open
        below = math.hypot(a.auroc.value - a.auroc.low, b.auroc.high - b.auroc.value)
        above = math.hypot(a.auroc.high - a.auroc.value, b.auroc.value - b.auroc.low)
        low, high = value - below, value + above
    return Interval(value, low, high)


def mean_auroc(ranked: Sequence[Ranked]) -> Interval:
    """Mean AUROC of several labellings of the same items, with its interval from their paired resamples."""
    values = sum(one.auroc.value for one in ranked) / len(ranked)
    draws = torch.stack([one.draws for one in ranked]).nanmean(0)
    draws = draws[~torch.isnan(draws)]
    if not len(draws) or any(math.isnan(one.auroc.low) for one in ranked):
        return Interval(values, math.nan, math.nan)
    return Interval(values, *torch.quantile(draws, torch.tensor([0.025, 0.975]).double()).tolist())


def _n_trials(labels: Int[Tensor, " n"], groups: Int[Tensor, " n"], n_classes: int) -> int:
    if n_classes > 2:
        return len(groups.unique())
    return min(len(groups[labels == label].unique()) for label in labels.unique())
