"""`nla trace`: where a target uses the latent in which minimal pairs differ, by residual patching over point × token.

Attribution (one forward and one backward pass a pair) ranks all sites; real patches measure the first of them, each
beside random directions of equal norm. A site is *causal* if the donor's activation there does what random ones do not
(randomisation test by document, Holm over all sites) and by at least 0.3 of the donor's own behaviour; *weak* if by
0.01 or more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nla.config import CONFIG_FILE, tokenizer_hash
from nla.errors import ArgumentError
from nla.eval.circuits import site_graphs, sites
from nla.eval.circuits.gate import MIN_EFFECT
from nla.eval.circuits.minimal_pairs import MinimalPair, of_items, read_pairs
from nla.eval.circuits.sites import CAUSAL, MIN_WEAK, WEAK, Site
from nla.eval.families import two_hop
from nla.eval.items import rhyme_items, variant_of
from nla.eval.report import Check, Report, at_most, checks_table, heat, new_figure, save, table
from nla.eval.target import Progress, Target, open_pair, silent
from nla.models.points import Point
from nla.organisms import full_name
from nla.organisms.switchboard import tokenizer as switchboard
from nla.stats import Interval


class Planted(NamedTuple):
    """Where an embedded target was made to use its latent."""

    point: str | None
    """The one point; None: at none."""
    role: str | None = None
    """The token's role; None: the prompt's last token."""
    upstream: str | None = None
    """The role that the planted token reads the latent from, in the blocks below."""


PLANTED = {
    "couplets/planner": Planted("resid_post.3"),
    "couplets/plain": Planted(None),
    "switchboard/target": Planted("resid_post.3", "full stop", "name"),
}
_SHOWN = 12


@dataclass(frozen=True)
class TraceReport(Report):
    """What a trace found."""

    target: str
    n_pairs: int
    n_dropped: int
    """Pairs between whose prompts the target makes too little difference to measure."""
    n_measured: int
    """Sites at which patches were made."""
    n_controls: int
    tested: bool
    """Whether documents and controls were enough for a test; if not, a causal site beats all controls of all pairs."""
    probability: tuple[float, float]
    """Mean m, the probability of the donor's continuation: after the prompt, and after the donor prompt."""
    points: list[str]
    roles: list[str]
    sites: list[Site]
    """Point by point, role by role."""
    agreement: Interval | None
    """Rank correlation of attribution and measured change of log m, over the measured sites."""

    def site(self, point: str, role: str) -> Site:
        """The site of a point and a role."""
        return self.sites[self.points.index(point) * len(self.roles) + self.roles.index(role)]

    def of_verdict(self, verdict: str) -> list[Site]:
        """The sites of a verdict, those of the largest effect first."""
        chosen = [site for site in self.sites if site.verdict == verdict]
        return sorted(chosen, key=lambda site: 0.0 if site.effect is None else -site.effect.value)

    def to_markdown(self) -> str:
        """The readable report."""
        dropped = f" ({self.n_dropped} more left out: the target hardly tells their prompts apart)" * (
            self.n_dropped > 0
        )
        many = f"{self.n_pairs} minimal pairs" if self.n_pairs > 1 else "1 minimal pair"
        low, high = self.probability
        how = "Randomisation test against them by document, Holm over all sites." if self.tested else _UNTESTED
        found = [*self.of_verdict(CAUSAL), *self.of_verdict(WEAK)]
        grid = [(point, *(_shown(self.site(point, role)) for role in self.roles)) for point in reversed(self.points)]
        agreement = "–" if self.agreement is None else str(self.agreement)
        return "\n\n".join(
            [
                f"## Trace of {self.target}: {self.headline()}",
                f"{many}{dropped}; the donor's continuation has probability {low:.3f} after the prompt and {high:.3f} "
                f"after the donor prompt. {self.n_controls} random directions of equal norm at each site of each pair. "
                f"{how}",
                checks_table(self.checks),
                _sites_table(found[:_SHOWN]),
                f"Attribution and measured change of log-probability rank the {self.n_measured} patched sites alike: "
                f"Spearman {agreement}.",
                "Effect of the donor's residual (0 none, 1 the donor's own behaviour; – not measured):",
                table(("point", *self.roles), grid),
            ]
        )

    def headline(self) -> str:
        """The causal sites in one line."""
        causal = [f"{one.point} at {one.role}" for one in self.of_verdict(CAUSAL)]
        more = f" and {len(causal) - 3} more" if len(causal) > 3 else ""
        return "causal at " + ", ".join(causal[:3]) + more if causal else "no causal site"


_UNTESTED = "Too few documents and controls for a test: a causal site beats every control of every pair."


def run(
    model: Target | str | Path = "couplets",
    pairs: str | Path | Sequence[MinimalPair] | None = None,
    prompt: str | None = None,
    donor_prompt: str | None = None,
    continuation: str | None = None,
    donor_continuation: str | None = None,
    n_pairs: int = 40,
    all_tokens: bool = False,
    n_sites: int = 64,
    n_controls: int | None = None,
    seed: int = 0,
    device: str | None = None,
    out_dir: str | Path | None = None,
    progress: Progress = silent,
) -> TraceReport:
    """Trace where a target uses the latent in which minimal pairs differ.

    Args:
        model: "couplets" (its planner), "couplets/plain", "switchboard", a model folder or hub id, a pair's folder (its
            target), or a loaded target.
        pairs: a file of JSON lines (see :func:`nla.eval.pairs.read_pairs`), or pairs; None: those of
            Couplets or Switchboard.
        prompt, donor_prompt, continuation, donor_continuation: one pair instead, all four of them.
        n_pairs: how many pairs of Couplets or Switchboard.
        all_tokens: look at every token, whatever roles the pairs name.
        n_sites: patch so many sites at most, those of the largest attribution.
        n_controls: random directions at each site of each pair; None: 4, or 19 below 8 documents.
        device: where to load the target; None: the first GPU if there is one, else the CPU.
        out_dir: where the graphs go, one ``NAME-000.json`` a pair, and ``report/trace.json``, ``.md``, ``.png``.

    Raises:
        ArgumentError: no usable pair, or an option out of range.
        ParseError, ShapeError, PositionError: see :func:`nla.eval.pairs.read_pairs` and :func:`nla.eval.sites.measure`.
        ConfigError: no such model.
    """
    if n_pairs < 1 or n_sites < 1 or (n_controls is not None and n_controls < 1):
        got = f"n_pairs={n_pairs}, n_sites={n_sites}, n_controls={n_controls}"
        raise ArgumentError(got, "1 or more of each", "correct them")
    name, target = open_named(model, device)
    given = [text for text in (prompt, donor_prompt, continuation, donor_continuation) if text is not None]
    if given and (len(given) < 4 or pairs is not None):
        expected = "prompt, donor prompt, continuation and donor continuation together, or a file of pairs"
        raise ArgumentError(f"{len(given)} of the four texts of a pair", expected, "give all four, and no file")
    embedded = not given and pairs is None
    if given:
        first, second, third, fourth = given
        pairs = [MinimalPair(first, second, third, fourth)]
    elif isinstance(pairs, str | Path):
        pairs = read_pairs(pairs)
    elif pairs is None:
        pairs = embedded_pairs(name, target, n_pairs, seed)
    if all_tokens:
        pairs = [dataclasses.replace(pair, roles={}) for pair in pairs]
    # Where every token is looked at, the token of a named role is not known.
    bounds = embedded and name in PLANTED and not (all_tokens and PLANTED[name].role)
    if out_dir is not None:  # before the work: a folder of other graphs is no place for these
        site_graphs.graph_paths(out_dir, name, len(pairs))
    found = sites.measure(target, pairs, n_sites, n_controls, seed, progress)
    report = summarise(name, found, len(pairs) - len(found.pairs), seed, bounds=bounds)
    if out_dir is not None:
        save(Path(out_dir) / "report", "trace", report, report.to_markdown(), _figure(report))
        sources = sites.connect(target, found, report.sites)
        site_graphs.save_graphs(out_dir, name, target, found, report.sites, sources)
    return report


def embedded_pairs(name: str, target: Target, n_pairs: int, seed: int) -> list[MinimalPair]:
    """The minimal pairs of an organism: rhyme plans of Couplets, two-hop questions of Switchboard.

    Raises:
        ArgumentError: the target is neither.
    """
    if variant_of(name) is not None:
        return of_items(target, rhyme_items(n_pairs, seed))
    if tokenizer_hash(target.tokenizer) == tokenizer_hash(switchboard.build()):
        return two_hop.pairs_of(two_hop.hops(n_pairs, seed))
    raise ArgumentError(f"no pairs for {name}", "minimal pairs of your own", "give a file of pairs, or one pair")


def open_named(model: Target | str | Path, device: str | torch.device | None = None) -> tuple[str, Target]:
    """The name of a target, and the target.

    Raises:
        ConfigError: no such model.
    """
    if isinstance(model, Target):
        return model.model.name_or_path or type(model.model).__name__, model
    if (Path(model) / CONFIG_FILE).is_file():
        nla = open_pair(model, device)
        return nla.config.target, Target.of(nla)
    return full_name(model), Target.load(model, "resid_post.0", device=device)


def summarise(name: str, found: sites.Measured, n_dropped: int = 0, seed: int = 0, bounds: bool = False) -> TraceReport:
    """The report of what was measured.

    Args:
        bounds: hold it against what is planted in the embedded target of this name; the pairs are its own.
    """
    judged = sites.judge(found, seed)
    ends = torch.tensor([len(ids) - 1 for ids in found.batch.base])
    last = [role for role, column in zip(found.roles, found.columns.T, strict=True) if torch.equal(column, ends)]
    return TraceReport(
        checks=_checks(judged, PLANTED[name] if bounds else None, last),
        target=name,
        n_pairs=len(found.pairs),
        n_dropped=n_dropped,
        n_measured=int((~found.sweep.effect.isnan().all(0)).sum()),
        n_controls=found.sweep.controls.shape[-1],
        tested=sites.testable(found),
        probability=(float(found.bounds.low.mean()), float(found.bounds.high.mean())),
        points=found.points,
        roles=found.roles,
        sites=judged,
        agreement=sites.agreement(found, seed),
    )


def _checks(judged: Sequence[Site], planted: Planted | None, last: Sequence[str]) -> list[Check]:
    """The planted site is causal, and no other but those that it reads; where none is known the largest is reported."""
    where = planted or Planted(None)
    roles = last if where.role is None else (where.role,)
    known = [site.point == where.point and site.role in roles for site in judged]
    others = [
        site
        for site, expected in zip(judged, known, strict=True)
        if not expected and site.effect is not None and not _feeds(site, where)
    ]
    checks = [
        Check(
            f"{site.point} at {site.role}: causal",
            site.effect,
            f"≥ {MIN_EFFECT}, above controls",
            site.verdict == CAUSAL,
        )
        for site, expected in zip(judged, known, strict=True)
        if expected
    ]
    most = max(others, key=lambda site: site.effect.value, default=None)  # type: ignore[union-attr]
    if most is not None:
        name = f"largest effect {'anywhere' if where.point is None else 'elsewhere'} ({most.point} at {most.role})"
        passed = None if planted is None else at_most(most.effect, MIN_EFFECT)  # type: ignore[arg-type]
        checks.append(Check(name, most.effect, "reported" if planted is None else f"< {MIN_EFFECT}", passed))
    return checks


def _feeds(site: Site, planted: Planted) -> bool:
    """Whether a site is one that the planted one reads."""
    if planted.point is None or site.role != planted.upstream:
        return False
    return Point.parse(site.point).layer < Point.parse(planted.point).layer


def _sites_table(found: Sequence[Site]) -> str:
    if not found:
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
        for one in found
    ]
    return table(header, rows)


def _shown(site: Site) -> float | None:
    return None if site.effect is None else site.effect.value


def _figure(report: TraceReport) -> Any:
    """The patch map of the sites, measured or not."""
    figure = new_figure(max(6.0, 0.55 * len(report.roles) + 2), max(3.0, 0.3 * len(report.points) + 1.5))
    values = [
        [math.nan if (value := _shown(report.site(point, role))) is None else value for role in report.roles]
        for point in report.points
    ]
    axes = figure.add_subplot()
    heat(axes, report.points, report.roles, values, f"Effect of the donor's residual: {report.target}")
    for text in axes.texts:
        if text.get_text() == "nan":
            text.set_text("")
    return figure
