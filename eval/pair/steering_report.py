"""What `nla eval steering` measured, as figures, as tables and as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nla.eval.arms import SteeringArm
from nla.eval.report import (
    Check,
    Figures,
    Rate,
    Report,
    bars,
    checks_table,
    new_figure,
    one_line,
    paragraphs,
    table,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANDOM, UNRELATED, ANOTHER = "random", "unrelated edit", "another item's edit"
BARE, UNSTEERED = "difference of the bare claims (reported)", "unsteered"


@dataclass(frozen=True)
class JudgeFigures(Figures):
    """Who says which value of an attribute a continuation has: a reader of texts that knows training answers alone."""

    kind: str
    n_answers: int
    """That it is fitted on."""
    n_values: int
    accuracy: Rate | None
    """On held-out answers; None: there are none."""
    commonest: float | None
    """What the commonest value of the training answers would have there."""

    @property
    def reads(self) -> bool:
        """Whether it surely beats the commonest value; where it does not, nothing is steered."""
        return self.accuracy is not None and self.commonest is not None and self.accuracy.low > self.commonest


@dataclass(frozen=True)
class KindSteering(Figures):
    """The edit of one kind of claim beside its controls, at one strength that was chosen on other items."""

    derived = ("above_controls",)
    kind: str
    n_items: int
    n_separate: int
    n_values: int
    """That are steered to."""
    strength: float
    """α in h + α‖h‖Δ/‖Δ‖."""
    tried: dict[str, float]
    """Success on the separate items, by strength."""
    edit: SteeringArm
    controls: list[SteeringArm]
    unsteered: SteeringArm
    """What is written without steering."""
    reported: list[SteeringArm]
    examples: list[dict[str, str]]

    @property
    def above_controls(self) -> bool:
        """The edit succeeds more often than every control and than without steering, with disjoint intervals, and each
        control moves nearly all items."""
        others = all(self.edit.success.above(arm.success) for arm in (self.unsteered, *self.controls))
        return others and all(arm.moves for arm in self.controls)


@dataclass(frozen=True)
class SteeringReport(Report):
    """Everything `nla eval steering` measures. Each item is of another answer, so Wilson intervals hold."""

    name = "steering"
    point: str
    source: str
    max_new_tokens: int
    kinds: list[KindSteering]
    judges: list[JudgeFigures]

    def body(self) -> str:
        """The readable report."""
        examples = [
            (one.kind, example["new"], *(one_line(example[name]) for name in ("explanation", "unsteered", "steered")))
            for one in self.kinds
            for example in one.examples
        ]
        tried = [(one.kind, one.n_separate, *one.tried.values()) for one in self.kinds]
        strengths = list(self.kinds[0].tried) if self.kinds else []
        return paragraphs(
            self.section(),
            "Success of the edit on separate items, by strength:",
            table(("claim", "items", *strengths), tried),
            "Examples:",
            table(("claim", "new value", "explanation", "unsteered", "steered"), examples),
            checks_table(self.checks),
        )

    def section(self) -> str:
        """The section of the model card: success of edit and controls, and what the judges are worth."""
        rows = [
            (one.kind, arm.name, one.strength, arm.n_moved, arm.success, arm.changed, arm.nats, arm.p_value)
            for one in self.kinds
            for arm in (one.edit, *one.controls, one.unsteered, *one.reported)
        ]
        header = ("claim", "direction", "strength", "moved", "has the new value", "changed", "nats", "p (Holm)")
        judges = [
            (one.kind, one.n_answers, one.n_values, one.accuracy, one.commonest, one.reads) for one in self.judges
        ]
        return paragraphs(
            "## Steering by edited explanations",
            f"Point `{self.point}`; {self.source}. One claim of a sampled explanation gets another value that training "
            "has, and the difference of the two reconstructions is added, at the activation and at all after it, at a "
            "strength (in lengths of the activation) that was chosen on separate items. What comes next is steered at "
            "any token and judged by the token; attributes before an answer, and the first "
            f"{self.max_new_tokens} tokens are judged by a reader of texts. All directions of a kind have equal norm; "
            "95 % Wilson intervals, one item of an answer. *Nats*: how much a token of what is written surprises the "
            "target without steering.",
            table(header, rows),
            "Judges: TF-IDF and logistic regression, fitted on the beginnings of training answers, and how many "
            "held-out ones they name rightly. An attribute whose judge does not surely beat the commonest value is not "
            "steered.",
            table(("attribute", "answers", "values", "right", "commonest value", "beats it"), judges),
        )

    def figure(self) -> Figure:
        """Success of the edit and its controls, a panel for each kind of claim."""
        n_columns = min(3, max(1, len(self.kinds)))
        n_rows = -(-max(1, len(self.kinds)) // n_columns)
        picture = new_figure(4.5 * n_columns, 2.4 * n_rows)
        panels = picture.subplots(n_rows, n_columns, squeeze=False).flat
        for axes, one in zip(panels, self.kinds, strict=False):
            arms = {arm.name: arm.success for arm in (one.edit, *one.controls, one.unsteered)}
            bars(axes, arms, f"{one.kind}: the new value is written (α = {one.strength:g})", list(arms)[1:])
        for axes in list(panels)[len(self.kinds) :]:
            axes.set_axis_off()
        return picture


def steering_checks(kinds: Sequence[KindSteering]) -> list[Check]:
    """The condition: some kind of claim whose edit is above every control; and each kind beside its best control."""
    checks = []
    if kinds:
        above = [one.above_controls for one in kinds]
        name = "kinds of claims whose edit steers more often than every control"
        checks.append(Check(name, Rate.of(above), "one or more, disjoint", any(above)))
    for one in kinds:
        best = max((arm.success for arm in (one.unsteered, *one.controls)), key=lambda rate: rate.high)
        checks.append(Check(f"{one.kind}: has the new value", one.edit.success, f"controls at most {best}"))
    return checks
