"""What `nla eval claims` measured, as figures, as tables and as one picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nla.eval.report import Rate, Report, bars, checks_table, new_figure, one_line, paragraphs, table
from nla.pair.score import Score
from nla.stats import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL_ROWS, SEEN, HELD_OUT = "all", "seen values", "held-out values"


class Shares(NamedTuple):
    """How often claims of one kind are true, and what others' would be; None: there is no such reader of the kind."""

    claims: Rate | None
    commonest: Rate | None
    """The commonest value of the training rows of that kind of token."""
    shuffled: Rate | None
    """The same claims held against an activation of another document."""
    shuffled_within: Rate | None
    """Against one of the same kind of token."""
    text: Rate | None
    """A reader of the visible text: TF-IDF and logistic regression, or n-grams of the training texts."""
    probe: Rate | None
    """A linear probe of the same vectors."""
    beside: Rate | None
    """The claims of the pair that it is compared with."""


@dataclass(frozen=True)
class ClaimFigures:
    """One kind of claim in some of the rows."""

    claim: str
    rows: str
    """All, one kind of token, or those whose value training had or had not."""
    n: int
    """Explanations of rows at which it is known what is true."""
    said: Rate
    """How often such a claim is made there."""
    when_said: Shares
    """Of these claims, how many are true. Commonest value, text and probe are judged on the same rows."""
    over_all: Shares
    """Of the explanations of rows that have something to say, how many say it and are right."""


@dataclass(frozen=True)
class TextFidelity:
    """How well the pair's decoder reconstructs from some texts; ``by_stratum`` holds "global" too."""

    texts: str
    by_stratum: dict[str, Interval]


@dataclass(frozen=True)
class Ablation:
    """FVE without one kind of claim, and from it alone, beside that of all claims in the same wording."""

    claim: str
    said: int
    """Explanations that make it."""
    dropped: Interval
    """Change of FVE."""
    alone: Interval | None
    """FVE; None: it cannot be said alone."""


@dataclass(frozen=True)
class ClaimsReport(Report):
    """Everything `nla eval claims` measures. Intervals resample what shares an answer."""

    name = "claims"
    point: str
    source: str
    denominators: str
    n_activations: int
    n_samples: int
    n_documents: int
    n_fit: int
    """Training rows that the readers are fitted on."""
    unread: Rate | None
    """Share of the claims that are in no known wording."""
    false_alarms: Rate | None
    """How often a hidden instruction is claimed where there is none."""
    figures: list[ClaimFigures]
    score: Score
    """Of the sampled explanations."""
    texts: list[TextFidelity]
    retention: Interval | None
    """FVE of the same facts in other words and order as a share of the explanations' own; None: there is none."""
    ablations: list[Ablation]
    examples: list[dict[str, Any]]

    def body(self) -> str:
        """The readable report."""
        by_rows = [
            self._line(one, one.rows, one.claim)
            for one in self.figures
            if one.rows != ALL_ROWS and one.when_said.claims is not None
        ]
        ablated = [(one.claim, one.said, one.dropped, one.alone) for one in self.ablations]
        shown = [(one["token"], one_line(one["explanation"]), one_line(one["true"])) for one in self.examples]
        return paragraphs(
            self.section(),
            "The same by kind of token, and by whether training had the value, where there are claims:",
            table(("rows", "claim", *_HEADER), by_rows),
            "FVE without one kind of claim, and from it alone, when the facts are put in other words:",
            table(("claim", "said", "change without it", "FVE from it alone"), ablated),
            "Examples:",
            table(("token", "explanation", "true"), shown),
            checks_table(self.checks),
        )

    def section(self) -> str:
        """The section of the model card: truth by kind of claim, and FVE."""
        about = (
            f"Point `{self.point}`; {self.n_activations} activations of {self.n_documents} documents, spread over "
            f"kinds of token: {self.source}. {self.n_samples} sampled at temperature 1 each; 95 % intervals over "
            "documents, those with one answer together. Beside: the commonest value of the kind of token, the claims "
            "of another document, a reader of the visible text and a linear probe, fitted on "
            f"{self.n_fit} training rows."
        )
        alarms = "" if self.false_alarms is None else f" Instructions claimed where there is none: {self.false_alarms}."
        unread = "No claims." if self.unread is None else f"Claims in no known wording: {self.unread}.{alarms}"
        whole = [self._line(one, one.claim) for one in self.figures if one.rows == ALL_ROWS]
        accuracy = [
            (one.claim, *(one.over_all._asdict()[name] for name in _ACCURACY))
            for one in self.figures
            if one.rows == ALL_ROWS
        ]
        strata = list(self.texts[0].by_stratum)
        fidelity = [(one.texts, *(one.by_stratum[name] for name in strata)) for one in self.texts]
        baselines = "; ".join(f"{name.replace('_', ' ')} {fve}" for name, fve in self.score.baselines.items())
        kept = "" if self.retention is None else f" Other words keep {self.retention} of the explanations' FVE."
        return paragraphs(
            "## Claims",
            about,
            unread,
            "Of the claims that are made, how many are true:",
            table(("claim", *_HEADER), whole),
            "Of all explanations where there is something to say, how many say it and are right:",
            table(("claim", *_ACCURACY), accuracy),
            f"FVE of the pair's decoder, over the variance of {self.denominators}, by whose texts it reads.{kept} "
            f"Baselines: {baselines}.",
            table(("texts", *strata), fidelity),
        )

    @staticmethod
    def _line(one: ClaimFigures, *names: str) -> tuple[Any, ...]:
        return (*names, one.n, one.said, *one.when_said)

    def figure(self) -> Figure:
        """True claims by kind beside probe and text; FVE by whose texts."""
        truth: dict[str, Any] = {}
        for one in self.figures:
            if one.rows == ALL_ROWS and one.when_said.claims is not None:
                truth[one.claim] = one.when_said.claims
                others = {"probe": one.when_said.probe, "visible text": one.when_said.text}
                truth |= {f"{one.claim}: {name}": rate for name, rate in others.items() if rate is not None}
        fidelity: dict[str, Any] = {one.texts: one.by_stratum["global"] for one in self.texts}
        fidelity |= {f"baseline: {name.replace('_', ' ')}": fve for name, fve in self.score.baselines.items()}
        picture = new_figure(9, max(3.2, 0.2 * len(truth)))
        left, right = picture.subplots(1, 2)
        bars(left, truth, "claims that are true, on the same rows", [name for name in truth if ": " in name])
        bars(right, fidelity, f"FVE at {self.point}", list(fidelity)[1:])
        return picture


_HEADER = ("n", "said", "true", "commonest", "shuffled", "within kind", "text", "probe", "beside")
_ACCURACY = tuple(Shares._fields)
