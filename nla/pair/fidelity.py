"""Activations, reconstructions, baselines and documents in; FVE by stratum out, with intervals by document. Pure.

Everything that measures a pair calls this: :meth:`nla.NLA.score`, joint training while it runs, `nla eval fidelity`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nla.baselines import GLOBAL, UNKNOWN_STRATUM
from nla.errors import BaselineError, ShapeError
from nla.metrics import Baseline, fve_from_errors, fve_interval, mse
from nla.stats import Interval, bootstrap

ORTHOGONAL = 2.0
"""Error of a reconstruction at right angles: what an activation without a readable explanation counts as."""


def reconstruction_errors(
    activations: Float[Tensor, "n d"],
    predicted: Float[Tensor, "k d"],
    readable: Sequence[bool] | None = None,
) -> Float[Tensor, " n"]:
    """Error of each activation; see :func:`nla.metrics.mse`.

    Args:
        predicted: one reconstruction for each readable explanation, in order.
        readable: which activations have an explanation that can be decoded; None: all. The others count as
            reconstructed at right angles.

    Raises:
        ShapeError: another number of reconstructions.
    """
    if readable is None:
        return mse(activations.float().cpu(), predicted.float().cpu())
    rows = torch.tensor(readable, dtype=torch.bool).nonzero().flatten()
    if len(readable) != len(activations) or len(rows) != len(predicted):
        got = f"{len(predicted)} reconstructions, {len(rows)} of {len(readable)} explanations readable"
        raise ShapeError(got, f"{len(activations)} explanations, a reconstruction a readable one", "decode these")
    errors = torch.full((len(activations),), ORTHOGONAL)
    if len(rows):
        errors[rows] = mse(activations[rows].float().cpu(), predicted.cpu())
    return errors


def fve_by_stratum(
    errors: Float[Tensor, " n"], strata: str | Sequence[str], baselines: Mapping[str, Baseline]
) -> dict[str, float]:
    """FVE over all ("global"), and within each stratum that has a baseline, over the stratum's own.

    Raises:
        BaselineError: no errors, or no baseline for "global".
    """
    values = {GLOBAL: fve_from_errors(errors, baseline_of(baselines, GLOBAL))}
    for name, rows in rows_by_stratum(strata).items():
        if name in baselines and name != GLOBAL:
            values[name] = fve_from_errors(errors[rows], baselines[name])
    return values


def fve_gain_by_stratum(
    errors: Float[Tensor, " n"],
    reference: Float[Tensor, " n"],
    strata: str | Sequence[str],
    baselines: Mapping[str, Baseline],
) -> dict[str, float]:
    """FVE of ``errors`` minus FVE of ``reference`` on the same activations: a ratio would pass through zero."""
    ours, theirs = fve_by_stratum(errors, strata, baselines), fve_by_stratum(reference, strata, baselines)
    return {name: ours[name] - theirs[name] for name in ours}


class FidelityByStratum:
    """Figures of errors (n,) in each stratum and over all ("global"), each with its interval by document."""

    def __init__(
        self,
        strata: str | Sequence[str],
        documents: Int[Tensor, " n"],
        baselines: Mapping[str, Baseline],
        n_boot: int = 1000,
        seed: int = 0,
    ) -> None:
        """
        Args:
            strata: kind of position of each activation; "all" where unknown: counts among the global figures only.
            documents: text of each activation: activations of one text are resampled together.
            baselines: by stratum, and "global".

        Raises:
            BaselineError: no baseline for "global" or for a known stratum.
        """
        strata = [strata] if isinstance(strata, str) else strata
        self.documents, self.n_boot, self.seed = documents, n_boot, seed
        self.rows = {name: rows for name, rows in rows_by_stratum(strata).items() if name != UNKNOWN_STRATUM}
        self.rows[GLOBAL] = torch.ones(len(strata), dtype=torch.bool)
        self.baselines = {name: baseline_of(baselines, name) for name in (GLOBAL, *self.rows)}

    @property
    def strata(self) -> list[str]:
        """The known strata, in order of appearance; without "global"."""
        return [name for name in self.rows if name != GLOBAL]

    def n(self, stratum: str) -> int:
        """Number of activations."""
        return int(self.rows[stratum].sum())

    def statistic(
        self, stratum: str, errors: Sequence[Float[Tensor, " n"]], function: Callable[[Tensor], Tensor]
    ) -> Interval:
        """A function of the mean errors (..., m) of m readers."""
        rows = self.rows[stratum]
        values = torch.stack([of_reader[rows] for of_reader in errors], dim=1)
        return bootstrap(values, self.documents[rows], function, self.n_boot, seed=self.seed)

    def fve(self, stratum: str, errors: Float[Tensor, " n"]) -> Interval:
        """FVE over the stratum's variance."""
        rows = self.rows[stratum]
        return fve_interval(errors[rows], self.baselines[stratum], self.documents[rows], self.n_boot, seed=self.seed)

    def fve_gain(self, stratum: str, errors: Float[Tensor, " n"], reference: Float[Tensor, " n"]) -> Interval:
        """FVE of ``errors`` minus that of ``reference``, activation by activation."""
        variance = self.baselines[stratum].variance
        return self.statistic(stratum, [errors, reference], lambda mean: (mean[..., 1] - mean[..., 0]) / variance)

    def error_removed(self, stratum: str, errors: Float[Tensor, " n"], reference: Float[Tensor, " n"]) -> Interval:
        """Share of the reference's remaining error that is gone."""
        return self.statistic(stratum, [errors, reference], lambda mean: 1 - mean[..., 0] / mean[..., 1])


def rows_by_stratum(strata: str | Sequence[str]) -> dict[str, Bool[Tensor, " n"]]:
    """The rows of each stratum as a mask, in order of appearance."""
    strata = [strata] if isinstance(strata, str) else strata
    return {name: torch.tensor([stratum == name for stratum in strata]) for name in dict.fromkeys(strata)}


def other_document_rows(documents: Int[Tensor, " n"], seed: int) -> Int[Tensor, " n"] | None:
    """For each row a random row of another document; None where there is one document only."""
    order = documents.argsort(stable=True)
    _, owner, sizes = documents[order].unique(return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return None
    ends = sizes.cumsum(0)
    generator = torch.Generator().manual_seed(seed)
    # Count on from the end of one's own document, around the end, and never so far as to come back to it.
    steps = (torch.rand(len(order), generator=generator, dtype=torch.float64) * (len(order) - sizes[owner])).long()
    chosen = torch.empty_like(order)
    chosen[order] = order[(ends[owner] + steps) % len(order)]
    return chosen


def baseline_of(baselines: Mapping[str, Baseline], name: str) -> Baseline:
    """The baseline of a stratum, or of "global".

    Raises:
        BaselineError: there is none.
    """
    if name not in baselines:
        raise BaselineError(
            f"no baseline for {name!r}",
            f"one of {', '.join(sorted(baselines)) or 'none: the pair has no baselines'}",
            "read with strata that the pair was trained on; or fit baselines to activations like those of training, "
            "and not to the scored ones: nla.fit_baselines(acts)",
        )
    return baselines[name]
