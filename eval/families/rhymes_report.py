"""What `nla eval rhymes` measured, as figures, as text and as one picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nla.eval.circuits.gate import Gate
from nla.eval.families.controls import best
from nla.eval.families.counterfactual import COUNTERFACTUAL_MIN, Counterfactual, PatchedReading
from nla.eval.families.editing import STEER_MIN, EditAndSteer
from nla.eval.families.gates import GateReport
from nla.eval.families.mention import NAMING_MIN
from nla.eval.families.naming import Naming
from nla.eval.report import Report, bars, cell, checks_table, heat, new_figure, one_line, paragraphs, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_N_SHOWN = 3


@dataclass(frozen=True)
class RhymesReport(Report):
    """Everything `nla eval rhymes` measures; the parts that need a pair are None for a bare target."""

    name = "rhymes"
    target: str
    verdict: str
    n_items: int
    gates: GateReport
    gate: Gate
    naming: Naming | None
    counterfactual: Counterfactual | None
    steering: EditAndSteer | None

    def body(self) -> str:
        """The whole report, verdict first."""
        none = "No explanations were judged: there is no pair here, or no item passed the gate."
        return paragraphs(
            self.section(),
            none if self.naming is None else _naming(self.naming),
            "" if self.counterfactual is None else _counterfactual(self.counterfactual),
            "" if self.steering is None else _steering(self.steering),
            self.gates.body(),
        )

    def section(self) -> str:
        """The verdict, what it rests on, and every figure that is held against a bound."""
        counts = ", ".join(f"{count} {verdict}" for verdict, count in self.gate.counts().items())
        gate = self.gate.to_json()
        mean, largest = gate["mean"], gate["largest"]
        return paragraphs(
            f"## Planned rhymes: {self.verdict}",
            f"{self.n_items} held-out items at `{self.gate.point}`: {counts}. Mean effect of the minimal donor: "
            f"{mean['effect']:.3f} at the point, {mean['effect_all_points']:.3f} at all points; 95th percentile of "
            f"{self.gate.n_controls} random and unrelated patches: {mean['control']:.3f} and "
            f"{mean['control_all_points']:.3f}, at most {largest['control']:.3f} and "
            f"{largest['control_all_points']:.3f}.",
            checks_table(self.checks),
        )

    def figure(self) -> Figure:
        """Patch map; naming beside its controls; counterfactual; edit and steer."""
        has_pair = self.naming is not None
        picture = new_figure(11, 7) if has_pair else new_figure(6, 3)
        axes = picture.subplots(2, 2).flatten() if has_pair else [picture.add_subplot()]
        grid = self.gates.patch_map
        heat(axes[0], grid.points, grid.tokens, grid.values, f"{self.verdict}: effect of the donor's residual")
        if self.naming is not None:
            naming = self.naming
            scores = {
                one.reader: one.named for one in (naming.sampled, naming.greedy, *naming.others, *naming.held_out)
            }
            bars(axes[1], scores, "names the planned word", list(scores)[2:], NAMING_MIN)
        if self.counterfactual is not None:
            swapped = self.counterfactual
            shown: dict[str, Any] = {_where(reading): reading.donor.named for reading in swapped.readings}
            shown |= {"the model writes it": swapped.behaviour, "text-only LM": swapped.text_only}
            others = [name for name in shown if name.startswith(("control", "not readable", "text-only"))]
            bars(axes[2], shown, "counterfactual: the donor's word named", others, COUNTERFACTUAL_MIN)
        if self.steering is not None:
            arms = [self.steering.edit, *self.steering.controls, *self.steering.reported]
            ends = {arm.name: arm.success for arm in arms}
            bars(axes[3], ends, "steering: line 2 ends on the new word", list(ends)[1:], STEER_MIN)
        return picture


def _naming(naming: Naming) -> str:
    p_values = {one.other: one.p_value for one in naming.comparisons}
    rows: list[tuple[Any, ...]] = []
    scores = [naming.sampled, naming.greedy, *naming.others, *naming.held_out]
    for one in scores:
        rows.append((one.reader, one.named, one.distractor, one.visible, one.facts_kept, p_values.get(one.reader)))
    rival = best(naming.adversaries)
    return paragraphs(
        "## Mention: is the planned word named?",
        f"On the {naming.sampled.n_items} causal items. Margin over the best adversary ({rival.reader}): "
        f"{naming.margin:+.3f}. An adversary that knows the rule reads the plan off the text; the counterfactual "
        "tells it from a reader of activations.",
        table(("reader", "names the plan", "a distractor", "visible claims true", "facts kept", "p (Holm)"), rows),
        "First sampled explanations: "
        + " · ".join(f"“{one_line(text)}”" for text in naming.sampled.examples[:_N_SHOWN]),
    )


def _counterfactual(counterfactual: Counterfactual) -> str:
    header = (
        "read at",
        "names the donor's",
        "names the base's",
        "facts kept",
        "unpatched: names the base's",
        "cosine to what was put in",
    )
    rows = [
        (
            _where(one),
            one.donor.named,
            one.base_named,
            one.donor.facts_kept,
            one.unpatched,
            one.likeness,
        )
        for one in counterfactual.readings
    ]
    control = next(one for one in counterfactual.readings if one.control)
    return paragraphs(
        "## Counterfactual: the text stays, the plan changes",
        f"{counterfactual.n_items} items. The patched model writes the donor's word: "
        f"{cell(counterfactual.behaviour)}. Named, facts kept and written: {cell(counterfactual.all_three)}. The "
        f"text-only LM names it: {cell(counterfactual.text_only)}. Where all of the donor's activation stands (the "
        f"control) it is named by {cell(control.donor.named)}: the nearer the two, the less but the plan this "
        "activation holds.",
        table(header, rows),
    )


def _where(one: PatchedReading) -> str:
    if one.control:
        return f"control: {one.where}"
    return one.where if one.readable else f"not readable, so no result: {one.where}"


def _steering(steering: EditAndSteer) -> str:
    arms = [steering.edit, *steering.controls, *steering.reported]
    header = ("direction", "items moved", "ends on the new word", "ends on another", "whole line right", "p (Holm)")
    rows = [(arm.name, arm.n_moved, arm.success, arm.changed, arm.whole_line, arm.p_value) for arm in arms]
    return paragraphs(
        "## Edit and steer",
        f"{steering.n_items} items; every direction is added at {steering.strength} of the activation's length, "
        "chosen on separate items. So far from where it was, a line may well end on some other word.",
        table(header, rows),
    )
