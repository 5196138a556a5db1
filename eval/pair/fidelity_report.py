"""What `nla eval fidelity` measured, as figures, as tables and as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nla.baselines import GLOBAL
from nla.eval.pair.truth import LAST, Truth
from nla.eval.report import Report, bars, checks_table, new_figure, paragraphs, table
from nla.pair.score import Score
from nla.stats import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLANTED = "newline"
"""The stratum in which Couplets' plan is."""
ENCODER, TRUTHFUL, DESCRIBER, WARM = "encoder's texts", "truthful texts", "warm-start texts", "warm start"


@dataclass(frozen=True)
class Public:
    """Who understands whose texts, in one stratum: FVEs of each decoder on each kind of text.

    None: there is no warm start; or nobody knows what is true of the texts, or how often the describer is right.
    """

    stratum: str
    n: int
    encoder: Interval
    """The pair's decoder on its encoder's texts: FVE itself."""
    truthful: Interval | None
    """The pair's decoder on a truthful reader's texts."""
    honest: Interval | None
    """The pair's decoder on warm-start texts, as the describer writes them."""
    truthful_minus_encoder: Interval | None
    """Above 0: the decoder would do better with the truth; far below 0: it has learned a code that is not the truth."""
    joint_minus_warm_decoder: Interval | None
    """How much better the pair's decoder reads the encoder's texts than the warm start's decoder does."""
    beyond_truthful: Interval | None
    """That difference minus the same on truthful texts: at or below 0 the decoder has learned to read better; above 0
    it has learned something that only the encoder's texts say."""


@dataclass(frozen=True)
class Gain:
    """One stratum against the warm start, on the same activations."""

    stratum: str
    warm: Interval
    """The warm start's FVE."""
    change: Interval
    """FVE minus the warm start's."""
    error_removed: Interval
    """Share of the warm start's remaining error that is gone."""


@dataclass(frozen=True)
class FidelityReport(Report):
    """Everything `nla eval fidelity` measures. Intervals resample documents."""

    name = "fidelity"
    point: str
    source: str
    """What was read, in words."""
    denominators: str
    """Whose mean and variance FVE is over, in words."""
    n_documents: int
    n_activations: int
    score: Score
    public: list[Public]
    """Empty where there is neither a warm start nor a truthful reader to compare with."""
    gains: list[Gain]
    """Empty without a warm start."""
    truths: list[Truth]
    """Empty where nobody knows what is true of the texts."""
    examples: list[dict[str, str]]
    remarks: Sequence[str] = ()
    """What of the chats the target did not read, a sentence each."""

    def body(self) -> str:
        """The readable report."""
        header = (
            "stratum",
            "encoder's",
            "truthful",
            "warm-start texts",
            "truthful − encoder's",
            "joint − warm decoder",
            "beyond truthful texts",
        )
        rows = [
            (
                part.stratum,
                part.encoder,
                part.truthful,
                part.honest,
                part.truthful_minus_encoder,
                part.joint_minus_warm_decoder,
                part.beyond_truthful,
            )
            for part in self.public
        ]
        public = (
            "Is the code public? FVE by whose texts the decoder reads. The last column is what the decoder gained "
            "on the encoder's texts beyond what it gained on truthful ones: above 0 is a private code."
        )
        baselines = "; ".join(f"{name.replace('_', ' ')} {fve}" for name, fve in self.score.baselines.items())
        return paragraphs(
            self.section(),
            *([public, table(header, rows)] if rows else []),
            f"Baselines over all positions, as FVE: {baselines}. (The mean itself is at 0; a wrong vector of unit "
            "length near −1.)",
            checks_table(self.checks),
        )

    def section(self) -> str:
        """The section of the model card: FVE by stratum."""
        header = ("stratum", "n", "FVE", "baseline: shuffled within", "warm start", "change", "error removed")
        rows = [
            (name, part.n, part.fve, part.shuffled, *_gain_cells(name, self.gains))
            for name, part in self.score.by_stratum.items()
        ]
        overall = ("all positions", self.score.n, self.score.fve, self.score.baselines.get("shuffled"))
        rows.append((*overall, *_gain_cells(GLOBAL, self.gains)))
        about = (
            f"Point `{self.point}`; {self.n_activations} activations of {self.n_documents} documents: {self.source}. "
            "One sample at temperature 1 each; 95 % intervals by document. FVE is over the variance of "
            f"{self.denominators}; that of a stratum over the stratum's own. Cosine {self.score.cosine}, MSE "
            f"{self.score.mse}."
        )
        claims = ("stratum", "claim", "n", "true", "warm start", "of another token")
        shares = [(one.stratum, one.claim, one.n, one.true, one.warm_start, one.shuffled) for one in self.truths]
        said = "What the explanations claim, and how often it is true of the text (or, of the plan, of line 2):"
        return paragraphs(
            "## Fidelity", about, *self.remarks, table(header, rows), *([said, table(claims, shares)] if shares else [])
        )

    def figure(self) -> Figure:
        """FVE by stratum beside the warm start; whose texts are understood, and which claims are true, if known."""
        panels = self._fidelity_bars(), self._public_bars(), self._truth_bars()
        shown = [panel for panel in panels if panel is not None]
        picture = new_figure(4 * len(shown), 3.2)
        for axes, (title, values, grey) in zip(picture.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            bars(axes, values, title, grey)
        return picture

    def _fidelity_bars(self) -> tuple[str, dict[str, Any], list[str]]:
        values: dict[str, Any] = {}
        warm = {gain.stratum: gain.warm for gain in self.gains}
        scores = {name: part.fve for name, part in self.score.by_stratum.items()} or {GLOBAL: self.score.fve}
        for name, fve in scores.items():
            values[name] = fve
            values |= {f"{name}, warm start": warm[name]} if name in warm else {}
        if not self.score.by_stratum:
            values |= {f"baseline: {name}": fve for name, fve in self.score.baselines.items()}
        return f"FVE at {self.point}", values, [name for name in values if "warm start" in name or "baseline" in name]

    def _public_bars(self) -> tuple[str, dict[str, Any], list[str]] | None:
        planted = next((part for part in self.public if part.stratum == PLANTED), None)
        planted = planted or next(iter(self.public[-1:]), None)
        if planted is None or planted.truthful is None:
            return None
        values: dict[str, Any] = {ENCODER: planted.encoder, TRUTHFUL: planted.truthful}
        values |= {} if planted.honest is None else {DESCRIBER: planted.honest}
        return f"{planted.stratum}: FVE of the pair's decoder on", values, [TRUTHFUL, DESCRIBER]

    def _truth_bars(self) -> tuple[str, dict[str, Any], list[str]] | None:
        values: dict[str, Any] = {}
        for one in self.truths:
            if one.claim != LAST:
                values[f"{one.stratum}: {one.claim}"] = one.true
                values |= {} if one.shuffled is None else {f"{one.stratum}: {one.claim}, of another": one.shuffled}
        grey = [name for name in values if name.endswith("of another")]
        return ("claims that are true", values, grey) if values else None


def _gain_cells(stratum: str, gains: Sequence[Gain]) -> tuple[Any, Any, Any]:
    gain = next((gain for gain in gains if gain.stratum == stratum), None)
    return (None, None, None) if gain is None else (gain.warm, gain.change, gain.error_removed)
