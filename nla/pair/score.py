"""Activations and reconstructions in, their score out: FVE, cosine and MSE, beside baselines that must fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nla.baselines import GLOBAL, UNKNOWN_STRATUM, fit_baselines
from nla.config import NLAConfig
from nla.errors import BaselineError, ShapeError, StoreError
from nla.metrics import Baseline, cosine, mse, unit
from nla.models.read import Activations
from nla.pair.fidelity import FidelityByStratum, other_document_rows
from nla.stats import Interval, bootstrap, derangement
from nla.storage.hub import place_of
from nla.store.reader import Store


@dataclass(frozen=True)
class StratumScore:
    """One kind of position, judged against its own baseline."""

    n: int
    """Number of activations."""

    fve: Interval
    """Fraction of variance explained within the stratum."""

    shuffled: Interval | None
    """The baseline: reconstructions exchanged within the stratum; None for a single activation."""


@dataclass(frozen=True)
class Score:
    """Fidelity of reconstructions. Intervals are 95 % bootstrap intervals that resample documents.

    ``baselines`` are FVEs of what has no access to the activation: "empty" (the decoder without an explanation), "mean"
    (the mean training activation itself: 0 over the training activations by definition), "shuffled" (another
    activation's reconstruction), "other_document" (one of another document) and "shuffled_within" (one of the same
    stratum, each over its stratum's variance; only where strata are known). What has nothing to exchange is absent. A
    wrong unit vector is worse than the mean: unrelated directions score about −1. A baseline near the score means that
    the score says nothing about the explanations.
    """

    n: int
    """Number of activations."""

    cosine: Interval
    """Mean cosine of activation and reconstruction."""

    mse: Interval
    """Mean of 2(1 − cosine)."""

    fve: Interval
    """Fraction of variance explained, over the baseline of all training activations."""

    by_stratum: dict[str, StratumScore]
    """Each kind of position against its own baseline; empty where strata are unknown."""

    baselines: dict[str, Interval]
    """FVE of the baselines."""

    def to_json(self) -> dict[str, object]:
        """A JSON-ready dict; an interval is {"value", "low", "high"}, its ends None where they are unknown."""
        return {
            "n": self.n,
            "cosine": self.cosine.to_json(),
            "mse": self.mse.to_json(),
            "fve": self.fve.to_json(),
            "by_stratum": {
                name: {
                    "n": part.n,
                    "fve": part.fve.to_json(),
                    "shuffled": None if part.shuffled is None else part.shuffled.to_json(),
                }
                for name, part in self.by_stratum.items()
            },
            "baselines": {name: interval.to_json() for name, interval in self.baselines.items()},
        }

    def __str__(self) -> str:
        rows = [("cosine", self.cosine), ("mse", self.mse), ("fve", self.fve)]
        for name, part in self.by_stratum.items():
            rows.append((f"fve in {name!r} (n={part.n})", part.fve))
            rows += [] if part.shuffled is None else [(f"baseline: shuffled in {name!r}", part.shuffled)]
        rows += [(f"baseline: {name}", interval) for name, interval in self.baselines.items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {interval}" for name, interval in rows)


def score(
    target: Float[Tensor, "n d"],
    predicted: Float[Tensor, "n d"],
    strata: str | Sequence[str],
    documents: Int[Tensor, " n"],
    baselines: Mapping[str, Baseline],
    empty: Float[Tensor, " d"],
    n_boot: int = 1000,
    seed: int = 0,
) -> Score:
    """Score reconstructions (n, d) of activations (n, d) against the training baselines.

    Args:
        strata: kind of position of each row; "all" where unknown: it counts among the global figures only.
        documents: (n,) text of each row: rows of one text are resampled together.
        baselines: by stratum, and "global".
        empty: (d,) what the decoder makes of no explanation.
        n_boot: number of bootstrap resamples.

    Raises:
        ShapeError, NonFiniteError: the shapes differ or a value is not finite.
        BaselineError: no rows, or no baseline for "global" or for a stratum.
    """
    if len(target) == 0:
        raise BaselineError("no activations", "at least 1 to score", "check the selection of positions")
    strata = [strata] if isinstance(strata, str) else strata
    error = mse(target, predicted)
    judged = FidelityByStratum(strata, documents, baselines, n_boot, seed)
    within = _shuffled_within(target, predicted, strata, seed)
    by_stratum = {
        name: StratumScore(
            judged.n(name), judged.fve(name, error), judged.fve(name, within) if judged.n(name) > 1 else None
        )
        for name in judged.strata
    }
    mean = judged.baselines[GLOBAL].mean
    unexplained = {
        "empty": mse(target, empty.expand_as(target)),
        "mean": (unit(target) - mean).square().sum(1),
    }
    if len(target) > 1:
        unexplained["shuffled"] = mse(target, predicted[derangement(len(target), seed)])
    if (others := other_document_rows(documents, seed)) is not None:
        unexplained["other_document"] = mse(target, predicted[others])
    references = {name: judged.fve(GLOBAL, errors) for name, errors in unexplained.items()}
    exchanged = ~torch.isnan(within)
    if exchanged.any():
        variance = torch.tensor([judged.baselines.get(name, judged.baselines[GLOBAL]).variance for name in strata])
        pairs = torch.stack([within, variance], dim=1)[exchanged]
        references["shuffled_within"] = bootstrap(
            pairs, documents[exchanged], lambda mean: 1 - mean[..., 0] / mean[..., 1], n_boot, seed=seed
        )
    return Score(
        n=len(target),
        cosine=bootstrap(cosine(target, predicted), documents, None, n_boot, seed=seed),
        mse=bootstrap(error, documents, None, n_boot, seed=seed),
        fve=judged.fve(GLOBAL, error),
        by_stratum=by_stratum,
        baselines=references,
    )


def _shuffled_within(target: Tensor, predicted: Tensor, strata: Sequence[str], seed: int) -> Tensor:
    """Errors (n,) of reconstructions exchanged within strata; NaN in a stratum of one row, or an unknown one."""
    sizes = {name: list(strata).count(name) for name in dict.fromkeys(strata) if name != UNKNOWN_STRATUM}
    rows = torch.tensor([row for row, name in enumerate(strata) if sizes.get(name, 0) > 1], dtype=torch.int64)
    out = torch.full((len(target),), torch.nan)
    if len(rows) > 0:
        order = rows[derangement(len(rows), seed, [str(strata[row]) for row in rows.tolist()])]
        out[rows] = mse(target[rows], predicted[order])
    return out


class Denominators(NamedTuple):
    """What FVE is measured against, and how long reconstructions are."""

    baselines: dict[str, Baseline]
    """By stratum, and "global"."""

    norm: float
    """Mean L2 norm of the raw activations."""


def denominators(acts: Activations | Store, config: NLAConfig) -> Denominators:
    """What :meth:`nla.NLA.fit_baselines` takes from activations, or from all training rows of a store.

    Of a store, whichever split is open, no vector is read.
    """
    if isinstance(acts, Store):
        return Denominators(dict(acts.baselines), acts.manifest.norms["mean"])
    vectors = config.check_vectors(acts.vectors)
    return Denominators(fit_baselines(vectors, acts.strata), float(vectors.norm(dim=1).mean()))


def check_store(
    store: Store, config: NLAConfig, tokenizer: PreTrainedTokenizerBase, target_folder: Path | None = None
) -> None:
    """Refuse a store whose activations are not of the pair's own target at the pair's point.

    Targets are compared by their folder or hub id, by revision where both are known, by quantisation, and by the
    adapter that was on the target, since a pair's own target has none.

    Raises:
        StoreError: another target, revision, quantisation or point, or a target with an adapter.
        ShapeError: vectors of another width.
        TokenizerMismatchError: another tokenizer.
    """
    manifest = store.manifest
    revisions = (manifest.revision, config.target_revision)
    pairs: dict[str, tuple[Any, Any]] = {
        "target": (place_of(manifest.target), place_of(target_folder or config.target)),
        "revision": revisions if None not in revisions else (None, None),
        "point": (manifest.point, config.point),
        "quantization": (manifest.settings.get("quantization"), config.quantization),
        "adapter on the target": (manifest.settings.get("adapter"), None),
    }
    other = [f"{name} {got}, not {wanted}" for name, (got, wanted) in pairs.items() if got != wanted]
    if other:
        raise StoreError(
            f"activations in {store.folder} of another target or point ({'; '.join(other)})",
            f"those of {config.target} at {config.point}",
            "read a corpus with this pair's target: nla extract TARGET CORPUS --point POINT",
        )
    if manifest.d_model != config.d_model:
        got = f"vectors of width {manifest.d_model} in {store.folder}"
        raise ShapeError(got, f"{config.d_model}, the width of {config.target}", "read them with this pair's target")
    store.check_tokenizer(tokenizer)
