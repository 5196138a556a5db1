"""`nla eval transfer`: does a pair still read a target that was fine-tuned after the pair was trained?

The same texts are read by the target and by the target with a LoRA adapter, and both are explained by the pair, which
never saw the adapter. A fall of FVE says that the fine-tune left the activations that the pair knows. FVE over the
variance of training can stay high where all activations moved together, so FVE over the fine-tune's own mean stands
beside it: at or below 0 the explanations tell the fine-tune's activations apart no better than their mean does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nla.baselines import GLOBAL, UNKNOWN_STRATUM
from nla.errors import ArgumentError, BaselineError
from nla.eval.explainers import explain
from nla.eval.pair.texts import load_documents, sample_tokens, world_documents
from nla.eval.report import Check, Report, bars, checks_table, new_figure, paragraphs, table
from nla.eval.settings import EvaluationSettings
from nla.eval.target import doubts, open_pair
from nla.metrics import Baseline, cosine, mse
from nla.models.read import Activations
from nla.organisms import adapter_folder
from nla.pair.fidelity import rows_by_stratum
from nla.progress import Progress, silent
from nla.stats import Interval, bootstrap
from nla.text.tokens import Positions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nla.autoencoder import NLA

TRUST, CARE, NOT = "trust the text", "read with care", "do not trust the text"
FALL_TRUST, FALL_CARE = 0.05, 0.2
"""Largest fall of FVE, over the variance of training, for either verdict."""
KEPT_TRUST, KEPT_CARE = 0.9, 0.5
"""Smallest share of FVE over the activations' own mean that is left, for either verdict."""
_EXAMPLES = 6
_MIN_ROWS = 20


@dataclass(frozen=True)
class Part:
    """One kind of position, or all: the target beside the fine-tune, on the same tokens."""

    stratum: str
    n: int
    base: Interval
    """FVE on the target, over the variance of training."""
    tuned: Interval
    """FVE on the fine-tune, over the same variance."""
    fall: Interval
    """The first minus the second, token by token."""
    base_own: Interval
    """FVE on the target over these activations' own mean."""
    tuned_own: Interval
    """FVE on the fine-tune over the fine-tune's own mean."""
    kept: Interval | None
    """The second as a share of the first; None where the first may be 0."""
    base_cosine: Interval
    tuned_cosine: Interval
    moved: Interval
    """Cosine of the fine-tune's activation with the target's at the same token."""
    new_text: Interval
    """How much higher FVE on the fine-tune is with its own explanations than with those of the target's activations:
    above 0 the text tells what the fine-tune changed."""

    @property
    def verdict(self) -> str:
        """What the figures allow, by the ends of their intervals that speak against trust."""
        if self.kept is not None:
            if self.fall.high <= FALL_TRUST and self.kept.low >= KEPT_TRUST:
                return TRUST
            if self.fall.high <= FALL_CARE and self.kept.low >= KEPT_CARE:
                return CARE
        return NOT


@dataclass(frozen=True)
class TransferReport(Report):
    """Everything `nla eval transfer` measures. Intervals resample documents."""

    name = "transfer"
    derived = ("passed", "verdict")

    adapter: str
    point: str
    n_documents: int
    parts: list[Part]
    """Each kind of position that has enough rows, and all together last."""
    examples: list[dict[str, Any]]
    """The tokens whose activations moved furthest, with both explanations."""
    remarks: Sequence[str] = ()
    """What of the chats the target did not read, a sentence each."""

    @property
    def verdict(self) -> str:
        """What all positions together allow."""
        return self.parts[-1].verdict

    def body(self) -> str:
        """The readable report."""
        header = ("token", "cosine", "explanation on the target", "on the fine-tune")
        rows = [(one["token"], one["cosine"], one["base"], one["tuned"]) for one in self.examples]
        return paragraphs(self.section(), "Where activations moved furthest:", table(header, rows))

    def section(self) -> str:
        """The section of the model card."""
        header = ("positions", "n", "FVE", "on the fine-tune", "fall", "over own mean", "on the fine-tune", "kept")
        more = ("positions", "cosine", "on the fine-tune", "activations: tuned · base", "own text − base's", "verdict")
        about = (
            f"Verdict on `{self.adapter}`: **{self.verdict}**. {self.parts[-1].n} activations of {self.n_documents} "
            f"documents at `{self.point}`; 95 % intervals by document. “{TRUST}”: FVE falls by at most {FALL_TRUST} "
            f"and keeps {KEPT_TRUST:.0%} of itself over the own mean; “{CARE}”: {FALL_CARE} and {KEPT_CARE:.0%}; each "
            "by the end of its interval that speaks against it."
        )
        fves = [
            (p.stratum, p.n, p.base, p.tuned, p.fall, p.base_own, p.tuned_own, p.kept) for p in self.parts
        ]  # fmt: skip
        rest = [(p.stratum, p.base_cosine, p.tuned_cosine, p.moved, p.new_text, p.verdict) for p in self.parts]
        return paragraphs(
            "## Transfer to a fine-tune",
            about,
            *self.remarks,
            table(header, fves),
            table(more, rest),
            checks_table(self.checks),
        )

    def figure(self) -> Figure:
        """FVE by kind of position on the target and on the fine-tune; how far the activations moved."""
        picture = new_figure(10, 1.2 + 0.5 * len(self.parts))
        left, right = picture.subplots(1, 2)
        shown: dict[str, Interval] = {}
        for part in self.parts:
            shown |= {part.stratum: part.tuned, f"{part.stratum}, target": part.base}
        bars(left, shown, f"FVE on {self.adapter}", [name for name in shown if name.endswith(", target")])
        bars(right, {part.stratum: part.moved for part in self.parts}, "activations: cosine with the target's")
        return picture


@dataclass(frozen=True)
class TransferSettings(EvaluationSettings):
    """The fine-tune, and the texts that it is judged on."""

    least: ClassVar[dict[str, int]] = {"n_documents": 2, "n_activations": 2}

    target_adapter: str | Path | None = None
    """The fine-tune: a plain LoRA adapter; see :func:`nla.organisms.adapter_folder`."""
    texts: str | Path | None = None
    """A file of texts; see :func:`nla.eval.pair.texts.load_documents`. None: held-out documents of the embedded world
    whose language the target speaks."""
    chats: bool = False
    """``texts`` holds transcripts instead, as `nla audit` takes them."""
    n_documents: int = 120
    """Texts to read, the first of a file."""
    n_activations: int = 2000
    """A sample of so many of the chosen positions; all if there are fewer."""
    positions: Positions = "all"
    """Which tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_adapter is None:
            raise ArgumentError(
                "no fine-tune", "an adapter on the target", "give --target-adapter, such as switchboard/goal"
            )


def judge_transfer(model: NLA | str | Path, settings: TransferSettings, progress: Progress = silent) -> TransferReport:
    """Score a pair on its target and on a fine-tune of the target, on the same tokens.

    Raises:
        ArgumentError: fewer than two documents with a chosen position, or no texts for a target that is not embedded.
        ConfigError, WeightsError, NonFiniteError: the adapter does not fit; see :func:`nla.pair.roles.planted`.
        BaselineError: the pair has no baseline for all positions.
    """
    folder, seed = adapter_folder(settings.target_adapter), settings.seed
    nla = open_pair(model, settings.device)
    _baseline(nla, GLOBAL).check()
    if settings.texts is None:
        documents = world_documents(nla, settings.n_documents, seed)
    else:
        documents = load_documents(nla, settings.texts, settings.chats, settings.n_documents)
    sample = sample_tokens(nla, documents, settings.positions, settings.n_activations, seed)
    _check_several(len(sample.texts))
    acts = sample.read(nla)
    progress("transfer", 0.1)
    with nla.planted(folder):
        tuned = sample.read(nla)
    progress("transfer", 0.2)
    explanations = [explain(nla, read.vectors, seed=seed) for read in (acts, tuned)]
    progress("transfer", 0.9)
    report = compare_transfer(nla, acts, tuned, explanations, str(settings.target_adapter), seed)
    report = replace(report, doubts=doubts(nla), remarks=documents.remarks)
    progress("transfer", 1.0)
    return report


def compare_transfer(
    nla: NLA, acts: Activations, tuned: Activations, explanations: Sequence[Sequence[str]], adapter: str, seed: int
) -> TransferReport:
    """The report on activations of the target and of the fine-tune at the same tokens, and the explanations of each.

    Raises:
        ArgumentError: all of one document, whose intervals would be unknown.
        BaselineError: no baseline for all positions, or no variance.
    """
    _baseline(nla, GLOBAL)
    n_documents = len(acts.document.unique())
    _check_several(n_documents)
    predicted = [nla.reconstruct(texts, strict=False) for texts in explanations]
    # Of a few rows, or of rows in one document, no interval can be given.
    masks = {
        name: rows
        for name, rows in rows_by_stratum(acts.strata).items()
        if name in nla.baselines
        and name != UNKNOWN_STRATUM
        and rows.sum() >= _MIN_ROWS
        and len(acts.document[rows].unique()) > 1
    }
    masks[GLOBAL] = torch.ones(len(acts), dtype=torch.bool)
    parts = []
    for name, rows in masks.items():
        vectors, decoded = (acts.vectors[rows], tuned.vectors[rows]), [both[rows] for both in predicted]
        parts.append(_part(name, _baseline(nla, name), *vectors, decoded, acts.document[rows], seed))
    moved = cosine(acts.vectors, tuned.vectors)
    furthest = moved.argsort()[:_EXAMPLES].tolist()
    base, of_tuned = explanations
    examples = [
        {"token": acts.spans[row].text, "cosine": float(moved[row]), "base": base[row], "tuned": of_tuned[row]}
        for row in furthest
    ]
    return TransferReport(_checks(parts[-1]), adapter, str(nla.point), n_documents, parts, examples)


def _baseline(nla: NLA, stratum: str) -> Baseline:
    if stratum not in nla.baselines:
        raise BaselineError(
            "a pair with no baselines for all positions",
            "the mean and variance of its training activations",
            "nla.fit_baselines(acts) on training activations, or import the pair again: "
            "`nla import kitft ... --store STORE`",
        )
    return nla.baselines[stratum]


def _check_several(n_documents: int) -> None:
    if n_documents < 2:
        raise ArgumentError(
            f"activations of {'one document' if n_documents else 'no document'}",
            "of two or more",
            "give more texts (a .txt file has one on each line), or sample more activations of them",
        )


def _part(
    stratum: str,
    baseline: Baseline,
    base: Float[Tensor, "n d"],
    tuned: Float[Tensor, "n d"],
    predicted: Sequence[Tensor],
    documents: Int[Tensor, " n"],
    seed: int,
) -> Part:
    baseline.check()
    own = [Baseline.fit(vectors).variance for vectors in (base, tuned)]
    errors = [mse(base, predicted[0]), mse(tuned, predicted[1]), mse(tuned, predicted[0])]
    values, variance = torch.stack(errors, dim=1), baseline.variance

    def interval(statistic: Any) -> Interval:
        return bootstrap(values, documents, statistic, seed=seed)

    def mean(scores: Tensor) -> Interval:
        return bootstrap(scores, documents, seed=seed)

    base_own = interval(lambda m: 1 - m[..., 0] / own[0])
    kept = interval(lambda m: (1 - m[..., 1] / own[1]) / (1 - m[..., 0] / own[0])) if base_own.low > 0 else None
    return Part(
        stratum=stratum,
        n=len(base),
        base=interval(lambda m: 1 - m[..., 0] / variance),
        tuned=interval(lambda m: 1 - m[..., 1] / variance),
        fall=interval(lambda m: (m[..., 1] - m[..., 0]) / variance),
        base_own=base_own,
        tuned_own=interval(lambda m: 1 - m[..., 1] / own[1]),
        kept=kept,
        base_cosine=mean(cosine(base, predicted[0])),
        tuned_cosine=mean(cosine(tuned, predicted[1])),
        moved=mean(cosine(base, tuned)),
        new_text=interval(lambda m: (m[..., 2] - m[..., 1]) / variance),
    )


def _checks(part: Part) -> list[Check]:
    """What trust needs, over all positions; the rest is reported."""
    keeps = part.kept is not None and part.kept.low >= KEPT_TRUST
    return [
        Check("FVE on the target, over the own mean (low end)", part.base_own, "> 0", part.base_own.low > 0),
        Check("fall of FVE (high end)", part.fall, f"≤ {FALL_TRUST}", part.fall.high <= FALL_TRUST),
        Check("share kept over the own mean (low end)", part.kept, f"≥ {KEPT_TRUST}", keeps),
        Check("cosine of the activations themselves", part.moved),
        Check("FVE of own explanations minus the target's", part.new_text),
    ]
