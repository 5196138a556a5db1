"""`nla eval readers`: probes, lenses, readers of the text and the NLA on the same activations of an organism's targets.

What must come out is known by construction: of Switchboard see readers_switchboard.py. Both targets of Couplets hold
the plan at the line break, where a probe finds it; only the planner uses it there, and only on the planner was the pair
trained. So the patch and the NLA must tell the two apart, the probe cannot, and nothing may be learned of coin flips.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nla.config import tokenizer_hash
from nla.errors import ArgumentError, ConfigError, ShapeError
from nla.eval.families.plants import adapters_of
from nla.eval.items import rhyme_items
from nla.eval.readers import switchboard as readers_switchboard
from nla.eval.readers.compare import Options, Sources, compare
from nla.eval.readers.measures import TaskResult
from nla.eval.readers.patchscopes import load_oracle
from nla.eval.readers.switchboard import NAMING_MIN, PROBE_MIN, SwitchboardReport
from nla.eval.readers.tables import LEGEND, SUMMARY, TITLE, figure, random_check, summary, tables
from nla.eval.readers.tasks import PLAN, RANDOM, couplet_tasks, couplet_writers
from nla.eval.report import Check, Figures, Rate, Report, at_least, at_most, checks_table, save, table
from nla.eval.target import (
    Patch,
    Progress,
    Target,
    last_token,
    last_word,
    open_pair,
    open_target,
    read_last,
    silent,
    write,
)
from nla.models.points import d_model
from nla.organisms.switchboard import tokenizer as switchboard

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
class ReadersReport(Report):
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

    def to_markdown(self) -> str:
        """The readable report."""
        about = f"Point `{self.point}`; {self.n_train} documents to fit on, {self.n_items} to judge; "
        parts = [self.to_card(), about + f"{self.n_samples} sample(s) an activation. {LEGEND}"]
        for result in self.targets:
            parts += [f"## {result.target}", tables(result.tasks)]
        return "\n\n".join(parts)

    def to_card(self) -> str:
        """The section of the model card: what is known by construction, and whether it came out."""
        rows = [(one.target, one.used, *summary(one.task(PLAN))) for one in self.targets]
        found = table(("target", "patch moves line 2", *SUMMARY), rows)
        return "\n\n".join(["## Readers compared: the plan at the line break", found, checks_table(self.checks)])


def run(
    model: NLA | str | Path = "couplets",
    contrast: Target | str | Path | None = CONTRAST,
    n_items: int = 300,
    n_train: int = 1000,
    n_samples: int = 1,
    oracle: str | Path | None = None,
    question: str = "",
    plants: str | Path | None = None,
    seed: int = 0,
    out_dir: str | Path | None = None,
    progress: Progress = silent,
) -> ReadersReport | SwitchboardReport:
    """Every reader on Couplets' tasks, on the pair's target and on one that does not use its plan; or on Switchboard's.

    Args:
        model: a pair on Couplets, whose target is the planner, or on Switchboard.
        contrast: of Couplets, a target of the same tokenizer and width, read by the same pair; None: the pair's target
            alone.
        n_items: held-out documents to judge on, half as many in each transfer split; of Switchboard, activations.
        n_train: as many to fit on.
        n_samples: explanations of each activation.
        oracle: a PEFT folder of an activation oracle on the pair's target, asked ``question``.
        plants: of Switchboard, the folder of the adapters, one sub-folder a plant; see
            :func:`nla.eval.plants.adapters_of`.
        out_dir: where ``readers.json``, ``.md`` and ``.png`` go; None: nowhere.

    Raises:
        ArgumentError: too few documents, an oracle without a question, or options of the other organism.
        ConfigError, ShapeError, WeightsError: no such model, a contrast of another tokenizer or width, or an adapter
            that is missing or does not fit.
    """
    if (oracle is None) != (not question):
        raise ArgumentError(
            f"oracle={oracle}, question={question!r}", "both or neither", "give --oracle and --question"
        )
    if n_items < 20 or n_samples < 1:
        raise ArgumentError(f"n_items={n_items}, n_samples={n_samples}", "20 or more; 1 or more", "correct them")
    nla = open_pair(model)
    folder = _plants_of(nla, plants, contrast)
    own = Target.of(nla)
    asked = None if oracle is None else load_oracle(nla.target_folder or nla.config.target, oracle, own)
    sources, options = Sources(own, nla, asked, question), Options(n_samples=n_samples, seed=seed)
    if folder is None:
        report = _couplets(nla, sources, contrast, (n_train, n_items), options, progress)
    else:
        report = readers_switchboard.measure(nla, sources, folder, (n_train, n_items), options, progress)
    if out_dir is not None:
        save(out_dir, "readers", report, report.to_markdown(), figure(report.panels, TITLE))
    return report


def _plants_of(nla: NLA, plants: str | Path | None, contrast: Target | str | Path | None) -> Path | None:
    """The adapters, if the pair is on Switchboard; None: it is not."""
    if nla.config.tokenizer_hash == tokenizer_hash(switchboard.build()):
        if contrast not in (None, CONTRAST):
            raise ArgumentError(f"the contrast {contrast} with plants", "shams as contrasts", "leave --contrast out")
        return adapters_of(nla, plants)
    if plants is not None:
        wanted = "a pair on Switchboard's target"
        raise ArgumentError(f"plants of a pair on {nla.config.target}", wanted, "leave --plants out, or name that pair")
    return None


def _couplets(
    nla: NLA,
    own: Sources,
    contrast: Target | str | Path | None,
    sizes: tuple[int, int],
    options: Options,
    progress: Progress,
) -> ReadersReport:
    """Couplets' tasks on the pair's target and on the contrast; ``sizes`` are documents to fit and to judge on."""
    targets = {_name(nla.config.target): own.target}
    if contrast is not None:
        name = "contrast" if isinstance(contrast, Target) else _name(str(contrast))
        targets[name if name not in targets else f"contrast: {name}"] = _contrast(contrast, nla, own.target)
    n_train, n_items = sizes
    found = couplet_tasks(n_train, n_items, max(10, n_items // 2), options.seed)
    own = replace(own, writers=couplet_writers(found))
    results = []
    for name, target in targets.items():
        sources = own if target is own.target else replace(own, target=target, oracle=None)
        tasks = compare(found.tasks, sources, options, lambda stage, part, n=name: progress(f"{n}: {stage}", part))
        results.append(TargetResult(name, patched(target, options.seed), tasks))
        progress(f"{name}: patch", 1.0)
    return ReadersReport(_checks(results), str(own.target.point), n_items, n_train, options.n_samples, results)


def _contrast(contrast: Target | str | Path, nla: NLA, own: Target) -> Target:
    other = open_target(contrast, own.point)
    if d_model(other.model) != nla.config.d_model:
        raise ShapeError(f"a contrast {d_model(other.model)} wide", str(nla.config.d_model), "give one of this width")
    if tokenizer_hash(other.tokenizer) != nla.config.tokenizer_hash:
        raise ConfigError("a contrast with another tokenizer", "that of the pair", "give a target that shares it")
    return other


def patched(target: Target, seed: int) -> Rate:
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
        checks.append(_patch_check(result, used=number == 0))
        name = f"{result.target}: a probe reads the plan"
        checks.append(Check(name, probe, f"≥ {PROBE_MIN}", at_least(probe, PROBE_MIN)))
        if number == 0:
            name = f"{result.target}: the NLA names the plan, without labels"
            checks.append(Check(name, named, f"≥ {NAMING_MIN}", at_least(named, NAMING_MIN)))
        else:
            ours = summary(results[0].task(PLAN)).named
            name = f"{result.target}: the NLA names the plan less than on {results[0].target}"
            checks.append(Check(name, named, f"interval < {ours}", named.high < ours.low))
        checks += [random_check(task, result.target) for task in result.tasks if task.task == RANDOM]
    return checks


def _patch_check(result: TargetResult, used: bool) -> Check:
    name = f"{result.target}: a donor's plan patched in moves line 2"
    if used:
        return Check(name, result.used, f"≥ {USED_MIN}", at_least(result.used, USED_MIN))
    return Check(name, result.used, f"≤ {UNUSED_MAX}", at_most(result.used, UNUSED_MAX))
