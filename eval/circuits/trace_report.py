"""From the measurements of a trace to its report: checks against what is planted, tables, and the patch map."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nla.eval.circuits.gate import MIN_EFFECT
from nla.eval.circuits.organism_pairs import PlantedSite
from nla.eval.circuits.sites import CAUSAL, MIN_WEAK, WEAK, SiteMeasurements, TracedSite, agreement
from nla.eval.report import Check, Rate, Report, checks_table, heat, new_figure, paragraphs, table
from nla.stats import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nla.eval.pair.against_graphs import GraphReport

_SHOWN = 12
_TESTED = "Randomisation test against them by document, Holm over all sites."
_UNTESTED = "Too few documents and controls for a test: a causal site beats every control of every pair."


@dataclass(frozen=True)
class TraceReport(Report):
    """What a trace measured."""

    name = "trace"
    target: str
    n_pairs: int
    n_dropped: int
    """Pairs between whose prompts the target makes too little difference to measure."""
    n_measured: int
    """Sites at which patches were made."""
    n_controls: int
    n_unrelated: int
    """How many of the controls are activations of unrelated pairs; the others are random directions of equal norm."""
    tested: bool
    """Whether documents and controls were enough for a test; if not, a causal site beats all controls of all pairs."""
    probability: tuple[float, float]
    """Mean m, the probability of the donor's continuation: after the prompt, and after the donor prompt."""
    behaviour: Rate
    """Share of prompts and donor prompts after which the target, greedy, writes the continuation exactly."""
    points: list[str]
    roles: list[str]
    everywhere: list[Rate]
    """For each role, E of the donor's activations at all points of this token at once."""
    sites: list[TracedSite]
    """Point by point, role by role."""
    agreement: Interval | None
    """Rank correlation of attribution and measured change of log m, over the measured sites."""
    explanations: GraphReport | None = None
    """What a pair's explanations name of it."""

    def explained(self, found: GraphReport) -> TraceReport:
        """This report with what a pair's explanations name of what was traced."""
        checks = [*self.checks, *found.checks]
        return dataclasses.replace(self, checks=checks, doubts=found.doubts, explanations=found)

    def site(self, point: str, role: str) -> TracedSite:
        """The site of a point and a role."""
        return self.sites[self.points.index(point) * len(self.roles) + self.roles.index(role)]

    def of_verdict(self, verdict: str) -> list[TracedSite]:
        """The sites of a verdict, those of the largest effect first."""
        return sorted((site for site in self.sites if site.verdict == verdict), key=lambda site: -site.strength)

    def effects(self) -> list[list[float | None]]:
        """The mean effect at each point (row) and role (column); None where it was not measured."""
        rows = [[self.site(point, role).effect for role in self.roles] for point in self.points]
        return [[None if effect is None else effect.value for effect in row] for row in rows]

    def body(self) -> str:
        """The readable report."""
        dropped = f" ({self.n_dropped} more left out: the target hardly tells their prompts apart)"
        many = f"{self.n_pairs} minimal pairs" if self.n_pairs > 1 else "1 minimal pair"
        low, high = self.probability
        grid = [(point, *row) for point, row in zip(self.points, self.effects(), strict=True)]
        agreement = "–" if self.agreement is None else str(self.agreement)
        return paragraphs(
            f"## Trace of {self.target}: {self.headline()}",
            f"{many}{dropped if self.n_dropped else ''}; the donor's continuation has probability {low:.3f} after "
            f"the prompt and {high:.3f} after the donor prompt. Greedy, the target writes the continuation in "
            f"{self.behaviour}. Controls at each site of each pair: {self.n_controls - self.n_unrelated} random "
            f"directions of equal norm, {self.n_unrelated} activations of unrelated pairs. "
            f"{_TESTED if self.tested else _UNTESTED}",
            checks_table(self.checks),
            _sites_table([*self.of_verdict(CAUSAL), *self.of_verdict(WEAK)][:_SHOWN]),
            f"Attribution and measured change of log-probability rank the {self.n_measured} patched sites alike: "
            f"Spearman {agreement}.",
            "Effect of the donor's residual (0 none, 1 the donor's own behaviour; – not measured):",
            table(("point", *self.roles), [("all points", *(one.value for one in self.everywhere)), *grid[::-1]]),
            *([] if self.explanations is None else [self.explanations.body()]),
        )

    def headline(self) -> str:
        """The causal sites in one line: each role with its points, from one to another where all between are causal."""
        spans = []
        for role in self.roles:
            causal = [self.site(point, role).verdict == CAUSAL for point in self.points]
            starts = [i for i, here in enumerate(causal) if here and not (i and causal[i - 1])]
            for start in starts:
                end = next((i for i in range(start, len(causal)) if not causal[i]), len(causal)) - 1
                last = f" to {self.points[end].rpartition('.')[2]}" if end > start else ""
                spans.append(f"{self.points[start]}{last} at {role}")
        return "causal at " + ", ".join(spans) if spans else "no causal site"

    def save(self, folder: str | Path) -> list[Path]:
        """See :meth:`nla.eval.report.Report.save`; into the folder's ``report``, beside the graphs."""
        return super().save(Path(folder) / "report")

    def figure(self) -> Figure:
        """The patch map of the sites, measured or not."""
        picture = new_figure(max(6.0, 0.55 * len(self.roles) + 2), max(3.0, 0.3 * len(self.points) + 1.5))
        values = [[math.nan if value is None else value for value in row] for row in self.effects()]
        axes = picture.add_subplot()
        heat(axes, self.points, self.roles, values, f"Effect of the donor's residual: {self.target}")
        for text in axes.texts:
            if text.get_text() == "nan":
                text.set_text("")
        return picture


def summarise(
    name: str,
    measured: SiteMeasurements,
    judged: list[TracedSite],
    n_dropped: int = 0,
    seed: int = 0,
    planted: PlantedSite | None = None,
) -> TraceReport:
    """The report of what was measured.

    Args:
        planted: hold it against where the latent is used by construction; None: nothing is known of it.
    """
    ends = torch.tensor([len(ids) - 1 for ids in measured.batch.base])
    columns = zip(measured.roles, measured.columns.T, strict=True)
    return TraceReport(
        checks=_checks(judged, planted, [role for role, column in columns if torch.equal(column, ends)]),
        target=name,
        n_pairs=len(measured.pairs),
        n_dropped=n_dropped,
        n_measured=measured.n_measured,
        n_controls=measured.n_controls,
        n_unrelated=measured.n_unrelated,
        tested=measured.testable,
        probability=(float(measured.bounds.low.mean()), float(measured.bounds.high.mean())),
        behaviour=measured.behaviour,
        points=measured.points,
        roles=measured.roles,
        everywhere=[_rate_everywhere(measured, role, seed) for role in range(len(measured.roles))],
        sites=judged,
        agreement=agreement(measured, seed),
    )


def _rate_everywhere(measured: SiteMeasurements, role: int, seed: int) -> Rate:
    effect = measured.everywhere[:, role]
    known = ~effect.isnan()
    return Rate.clustered(effect[known], measured.documents[known], seed)


def _checks(judged: Sequence[TracedSite], planted: PlantedSite | None, last_roles: Sequence[str]) -> list[Check]:
    """The planted site is causal, and no other but those that it reads; where none is known the largest is reported."""
    where = planted or PlantedSite(None)
    roles = last_roles if where.role is None else (where.role,)
    checks, others = [], []
    for site in judged:
        if site.point == where.point and site.role in roles:
            name, bound = f"{site.point} at {site.role}: causal", f"≥ {MIN_EFFECT}, above controls"
            checks.append(Check(name, site.effect, bound, site.verdict == CAUSAL))
        elif site.effect is not None and not where.reads(site.point, site.role):
            others.append((site, site.effect))
    if others:
        site, effect = max(others, key=lambda other: other[1].value)
        name = f"largest effect {'anywhere' if where.point is None else 'elsewhere'} ({site.point} at {site.role})"
        if planted is None:
            checks.append(Check(name, effect))
        else:
            checks.append(Check(name, effect, f"< {MIN_EFFECT}", effect.value <= MIN_EFFECT))
    return checks


def _sites_table(sites: Sequence[TracedSite]) -> str:
    if not sites:
        return f"No site has an effect of {MIN_WEAK} or more above its controls."
    header = (
        "site",
        "token",
        "verdict",
        "effect",
        f"pairs ≥ {MIN_EFFECT}",
        "controls, 95 %",
        "p (Holm)",
        "attribution",
    )
    rows = [
        (one.point, one.role, one.verdict, one.effect, one.share, one.control_bar, one.p_value, f"rank {one.rank}")
        for one in sites
    ]
    return table(header, rows)
