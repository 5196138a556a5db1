"""Shares of audited and control positions in; p-values out, within kinds of position. Pure."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, combinations

import torch
from torch import Tensor

from nla.errors import ShapeError

N_PERMUTATIONS = 10_000


def rank_p_values(
    shares: Sequence[float], kinds: Sequence[str], controls: Mapping[str, Sequence[tuple[int, float]]]
) -> list[float]:
    """For each position, how likely a share as high is among control positions of its kind.

    Positions of one transcript are alike, so control transcripts count once each, however many positions they bring:
    (1 + the sum over transcripts of the part of their positions that is at least as high) / (1 + transcripts). Valid
    if the audited transcript is exchangeable with them. With few it cannot be small: 0.05 takes 19.

    Args:
        controls: of each kind, the transcript's number and the share of every control position.

    >>> rank_p_values([1.0, 0.0], ["user end"] * 2, {"user end": [(0, 0.0), (0, 1.0), (1, 0.0), (2, 0.5)]})
    [0.375, 1.0]

    Source: Lee, Barber & Willett 2023 (hierarchical conformal prediction).
    """
    ordered = {kind: _weighted(values) for kind, values in controls.items()}
    p_values = []
    for share, kind in zip(shares, kinds, strict=True):
        values, above, n_units = ordered.get(kind, ([], [0.0], 0))
        p_values.append((1 + above[bisect.bisect_left(values, share - 1e-12)]) / (1 + n_units))
    return p_values


def _weighted(values: Sequence[tuple[int, float]]) -> tuple[list[float], list[float], int]:
    """Shares in order, the weight from each of them on (every unit weighs 1), and the number of units."""
    sizes = Counter(unit for unit, _ in values)
    ordered = sorted(values, key=lambda value: value[1])
    above = [*accumulate((1 / sizes[unit] for unit, _ in reversed(ordered)), initial=0.0)][::-1]
    above[0] = float(len(sizes))  # all of them: without the rounding of the sum
    return [share for _, share in ordered], above, len(sizes)


def controls_needed(n_positions: int, n_found: int, alpha: float) -> int:
    """Controls without which none of the found positions can be significant, even if no control is as high.

    >>> controls_needed(n_positions=32, n_found=8, alpha=0.05)
    79
    """
    return math.ceil(n_positions / (n_found * alpha)) - 1


def stratified_permutation(
    audited: Sequence[tuple[int, str, float]], controls: Sequence[tuple[int, str, float]], seed: int = 0
) -> float:
    """p-value of "audited transcripts show it no more than controls do": transcripts exchange their labels.

    The statistic is the difference of mean shares within each kind of position, weighted by how many audited
    positions are of the kind. Positions of one transcript move together: they are not independent.

    Args:
        audited, controls: transcript's number, kind and share of each position.

    Returns:
        In (0, 1], one-sided: exact when there are few ways to label, else estimated from 10,000, counting the
        observed one.
    """
    rows = [(0, *row) for row in audited] + [(1, *row) for row in controls]
    if not {kind for _, kind, _ in audited} & {kind for _, kind, _ in controls}:
        return 1.0  # nothing to compare
    units = {key: row for row, key in enumerate(dict.fromkeys((side, number) for side, number, _, _ in rows))}
    kinds = {kind: column for column, kind in enumerate(dict.fromkeys(kind for _, _, kind, _ in rows))}
    sums, counts = torch.zeros(2, len(units), len(kinds)).double()
    for side, number, kind, share in rows:
        sums[units[side, number], kinds[kind]] += share
        counts[units[side, number], kinds[kind]] += 1
    n_audited = sum(side == 0 for side, _ in units)
    ways = math.comb(len(units), n_audited)
    if ways <= N_PERMUTATIONS:
        labels = torch.zeros(ways, len(units)).double()
        for row, chosen in enumerate(combinations(range(len(units)), n_audited)):
            labels[row, list(chosen)] = 1
        observed = 0  # the first combination is the true labelling: audited transcripts come first
        values = _differences(labels, sums, counts)
        return float((values >= values[observed] - 1e-9).double().mean())
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(N_PERMUTATIONS, len(units), generator=generator).argsort(dim=1)
    labels = torch.zeros(N_PERMUTATIONS, len(units)).double().scatter_(1, order[:, :n_audited], 1.0)
    truth = torch.zeros(1, len(units)).double()
    truth[0, :n_audited] = 1
    higher = _differences(labels, sums, counts) >= _differences(truth, sums, counts) - 1e-9
    return (1 + int(higher.sum())) / (1 + N_PERMUTATIONS)


def _differences(labels: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """The statistic (p,) of labellings (p, transcripts); kinds that only one side has are left out."""
    if labels.shape[1] != len(sums):
        raise ShapeError(f"labels {tuple(labels.shape)}", f"(n, {len(sums)})", "label every transcript")
    ours, our_n = labels @ sums, labels @ counts
    theirs, their_n = (1 - labels) @ sums, (1 - labels) @ counts
    both = (our_n > 0) & (their_n > 0)
    gap = torch.where(both, ours / our_n.clamp(min=1) - theirs / their_n.clamp(min=1), 0.0)
    weight = torch.where(both, our_n, 0.0)
    return (gap * weight).sum(1) / weight.sum(1).clamp(min=1)
