"""Readers compared on Couplets: a pair and a contrast in, a report against what is known by construction out.

Both targets of Couplets hold the plan at the line break, where a probe finds it; only the planner uses it there, and
only on the planner was the pair trained. So the patch and the NLA must tell the two apart, the probe cannot, and
nothing may be learned of coin flips.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nla.errors import ShapeError
from nla.eval.couplet_items import rhyme_items
from nla.eval.readers.compare import ComparisonSettings, Sources, compare_readers
from nla.eval.readers.couplets_tasks import PLAN, couplet_tasks, couplet_writers
from nla.eval.readers.measures import TaskResult
from nla.eval.readers.tables import (
    LEGEND,
    NAMING_MIN,
    PROBE_MIN,
    SUMMARY,
    ReadersReport,
    random_check,
    summary,
    tables,
)
from nla.eval.readers.tasks import RANDOM
from nla.eval.report import Check, Figures, Rate, checks_table, paragraphs, table
from nla.eval.target import Patch, Target, last_token, last_word, open_target, read_last, write
from nla.eval.worlds import COUPLETS, require_world
from nla.models.points import d_model
from nla.pair.separate import Devices
from nla.progress import Progress

if TYPE_CHECKING:
    from nla.autoencoder import NLA

USED_MIN, UNUSED_MAX = 0.95, 0.05
N_PATCHED = 100
CONTRAST = "couplets/plain"


@dataclass(frozen=True)
class TargetResult(Figures):
    """One target: does it use the plan at the point, and what does each reader find there?"""

    target: str
    used: Rate
    """Share of lines that end on a minimal donor's word when its activation at the line break is put in."""

    tasks: list[TaskResult]

    def task(self, name: str) -> TaskResult:
        """One task's result."""
        return next(result for result in self.tasks if result.task == name)


@dataclass(frozen=True)
class CoupletsReport(ReadersReport):
    """Everything `nla eval readers` measures on Couplets."""

    point: str
    n_items: int
    n_train: int
    n_samples: int
    targets: list[TargetResult]

    @property
    def panels(self) -> dict[str, TaskResult]:
        """What the picture shows."""
        return {f"{one.target}: {task.task}": task for one in self.targets for task in one.tasks if task.task != RANDOM}

    def body(self) -> str:
        """The readable report."""
        about = f"Point `{self.point}`; {self.n_train} documents to fit on, {self.n_items} to judge; "
        about += f"{self.n_samples} sample(s) an activation. {LEGEND}"
        by_target = [part for one in self.targets for part in (f"## {one.target}", tables(one.tasks))]
        return paragraphs(self.section(), about, *by_target)

    def section(self) -> str:
        """The section of the model card: what is known by construction, and whether it came out."""
        rows = [(one.target, one.used, *summary(one.task(PLAN))) for one in self.targets]
        plans = table(("target", "patch moves line 2", *SUMMARY), rows)
        return paragraphs("## Readers compared: the plan at the line break", plans, checks_table(self.checks))


def compare_on_couplets(
    nla: NLA,
    contrast: Target | str | Path | None,
    sizes: tuple[int, int],
    settings: ComparisonSettings,
    progress: Progress,
) -> CoupletsReport:
    """Couplets' tasks on the pair's target and on the contrast; ``sizes`` are documents to fit and to judge on.

    Raises:
        ArgumentError: too few documents for every class to be fitted on, or a contrast of another world.
        ShapeError: a contrast of another width.
    """
    sources = Sources.of_pair(nla, settings)
    targets = {_name(nla.config.target): sources.target}
    if contrast is not None:
        name = "contrast" if isinstance(contrast, Target) else _name(str(contrast))
        name = name if name not in targets else f"contrast: {name}"
        targets[name] = _open_contrast(contrast, nla, sources.target, settings.device)
    n_train, n_items = sizes
    drawn = couplet_tasks(n_train, n_items, max(10, n_items // 2), settings.seed)
    sources = replace(sources, writers=couplet_writers(drawn))
    results = []
    for name, target in targets.items():
        here = sources if target is sources.target else replace(sources, target=target, oracle=None)
        tasks = compare_readers(
            drawn.tasks, here, settings, lambda stage, part, n=name: progress(f"{n}: {stage}", part)
        )
        results.append(TargetResult(name, plan_used(target, settings.seed), tasks))
        progress(f"{name}: patch", 1.0)
    point = str(sources.target.point)
    return CoupletsReport(_checks(results), point, n_items, n_train, settings.n_samples, results)


def _open_contrast(contrast: Target | str | Path, nla: NLA, target: Target, device: Devices) -> Target:
    other = open_target(contrast, target.point, device)
    require_world(other.tokenizer, [COUPLETS], contrast, "nla eval readers --contrast")
    if d_model(other.model) != nla.config.d_model:
        raise ShapeError(f"a contrast {d_model(other.model)} wide", str(nla.config.d_model), "give one of this width")
    return other


def plan_used(target: Target, seed: int) -> Rate:
    """Share of lines 2 that end on a minimal donor's word when its activation at the line break is put in."""
    items = rhyme_items(N_PATCHED, seed)
    prompts = [item.prompt for item in items]
    donors = read_last(target, [item.donor_prompt for item in items])
    lines = write(target, prompts, [Patch(str(target.point), last_token(target, prompts), donors)])
    return Rate.of(last_word(line) == item.donor_target for line, item in zip(lines, items, strict=True))


def _name(target: str) -> str:
    return Path(target).name or target


def _checks(results: list[TargetResult]) -> list[Check]:
    """What is known by construction. The pair's target comes first."""
    checks = []
    for number, result in enumerate(results):
        probe, named = summary(result.task(PLAN))[:2]
        name = f"{result.target}: a donor's plan patched in moves line 2"
        used = number == 0
        checks.append(
            Check.at_least(name, result.used, USED_MIN) if used else Check.at_most(name, result.used, UNUSED_MAX)
        )
        checks.append(Check.at_least(f"{result.target}: a probe reads the plan", probe, PROBE_MIN))
        if number == 0:
            name = f"{result.target}: the NLA names the plan, without labels"
            checks.append(Check.at_least(name, named, NAMING_MIN))
        else:
            ours = summary(results[0].task(PLAN)).named
            name = f"{result.target}: the NLA names the plan less than on {results[0].target}"
            checks.append(Check(name, named, f"interval < {ours}", named.high < ours.low))
        checks += [random_check(task, result.target) for task in result.tasks if task.task == RANDOM]
    return checks
