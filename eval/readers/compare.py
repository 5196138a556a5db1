"""Readers compared on the same activations, splits and items: labelled tasks in, one table of readers for each out.

Everything that does not depend on labels (activations, texts, reconstructions) is made once for equal sites and shared
by all tasks over them; the measures of a task are in `measures`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nla.errors import ArgumentError, ShapeError
from nla.eval import adversaries
from nla.eval.adversaries import Writer
from nla.eval.explainers import explain
from nla.eval.readers import lenses, patchscopes, probes
from nla.eval.readers.measures import (
    ACTIVATION,
    ADVERSARY,
    CONFABULATOR,
    NLA_READER,
    PROBE,
    ReaderOutput,
    SiteReadings,
    TaskResult,
    judge_coins,
    judge_task,
)
from nla.eval.readers.tasks import TRAIN, Sites, Task, random_task, read_task_sites, read_task_sites_at
from nla.eval.settings import EvaluationSettings
from nla.eval.target import Target
from nla.models.points import Point
from nla.progress import Progress, silent
from nla.stats import holm
from nla.text.tokens import plain_ids

if TYPE_CHECKING:
    from nla.autoencoder import NLA

SELFIE, ORACLE = "SelfIE (no adapter)", "activation oracle"
LOGIT_LENS, TUNED_LENS = "logit lens", "tuned lens"
BAG, TEXT_LM = "bag of words (visible text)", "text-only LM"
SHUFFLED = "shuffled-activation NLA"
N_TRIES, N_COINS = 10, 5


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(EvaluationSettings):
    """How the readers are run. The settings of the commands are these and their own.

    Raises:
        ArgumentError: a number out of range, or an oracle without a question, or the reverse.
    """

    least: ClassVar[dict[str, int]] = {"n_samples": 1, "n_tries": 1, "n_continued": 1, "n_boot": 1, "lens_steps": 0}

    n_samples: int = 1
    """Explanations of each activation, by every reader that samples."""

    n_tries: int = N_TRIES
    """Texts that the confabulator offers for each activation."""

    n_continued: int = adversaries.N_CONTINUED
    """Tokens that the text-only LM goes on to write."""

    lens_steps: int = lenses.N_STEPS
    """Steps that the tuned lens is fitted for."""

    budgets: tuple[int, ...] = probes.BUDGETS
    """Numbers of labels to fit on, beside all of them."""

    n_boot: int = 500
    """Resamples of groups, for intervals and tests."""

    oracle: str | Path | None = None
    """A PEFT folder of an activation oracle on the pair's target."""

    question: str = ""
    """What the oracle is asked; holds the pair's marker once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.oracle is None) != (not self.question):
            got = f"oracle={self.oracle}, question={self.question!r}"
            raise ArgumentError(got, "both or neither", "give --oracle and --question")


@dataclass(frozen=True)
class Sources:
    """What the readers read with: the target, and the pair and the oracle if there are any."""

    target: Target
    """Whose activations are read, at its point; also the text-only LM, the lenses and SelfIE."""

    nla: NLA | None = None
    """The pair; None: no explanations, and SelfIE asks in words of its own, where the target knows them."""

    oracle: Target | None = None
    """An activation oracle on the same base (:func:`nla.eval.readers.patchscopes.load_oracle`)."""

    question: str = ""
    """What the oracle is asked; holds the pair's marker."""

    writers: Mapping[Sites, Writer] | None = None
    """Better text-only writers of explanations than the target's continuations, for the confabulator."""

    read: Callable[[Sites], Float[Tensor, "n d"]] | None = None
    """Activations of sites, where they are not those of ``target`` (one with a plant, say)."""

    @classmethod
    def of_pair(cls, nla: NLA, settings: ComparisonSettings) -> Sources:
        """A pair and its target, and the oracle if there is one.

        Raises:
            ConfigError, WeightsError: see :func:`nla.eval.readers.patchscopes.load_oracle`.
        """
        target, oracle = Target.of(nla), None
        if settings.oracle is not None:
            oracle = patchscopes.load_oracle(nla.target_folder or nla.config.target, settings.oracle, target)
        return cls(target, nla, oracle, settings.question)


def compare_readers(
    tasks: Sequence[Task],
    sources: Sources,
    settings: ComparisonSettings,
    progress: Progress = silent,
    shared: dict[Sites, SiteReadings] | None = None,
) -> list[TaskResult]:
    """Run every reader on every task, and on coin flips at the same sites.

    Holm's correction is over the tasks.

    Args:
        shared: filled with what all readers gave at each of the sites, for a caller that needs it again.

    Raises:
        ShapeError: activations are not one for each site.
        NLAError: see the readers.
    """
    shared = {} if shared is None else shared
    coins: dict[Sites, TaskResult] = {}
    results = []
    n_boot, seed = settings.n_boot, settings.seed
    for number, task in enumerate(tasks):
        if task.sites not in shared:
            shared[task.sites] = run_readers(task, sources, settings, progress)
            flips = [random_task(task.sites, task.splits, flip) for flip in range(seed, seed + N_COINS)]
            beside = [other.name for other in tasks if other.sites == task.sites]
            coins[task.sites] = judge_coins(flips, shared[task.sites], beside, n_boot, seed)
        result = judge_task(task, shared[task.sites], settings.budgets, n_boot, seed)
        results.append(result.beside(coins[task.sites]))
        progress("judge", (number + 1) / len(tasks))
    return _holm_over_tasks(results) + list(coins.values())


def run_readers(
    task: Task, sources: Sources, settings: ComparisonSettings, progress: Progress = silent
) -> SiteReadings:
    """Activations, texts and reconstructions of a task's sites. The tuned lens is fitted on its train split's texts."""
    sites, target, nla = task.sites, sources.target, sources.nla
    vectors = read_task_sites(target, sites) if sources.read is None else sources.read(sites)
    if len(vectors) != len(sites):
        raise ShapeError(f"{len(vectors)} activations", f"{len(sites)}, one a site", "read every site once")
    progress("read", 1.0)
    exchanged = sites_of_other_groups(sites, settings.seed)
    outputs = [ReaderOutput(name, PROBE, vectors, probe=name) for name in probes.VECTOR_PROBES]
    outputs += _run_lenses(task, target, vectors, settings, progress)
    if nla is None:
        if (prompt := patchscopes.Prompt.without_pair(target, vectors)) is not None:
            ask = functools.partial(patchscopes.answers, target, prompt, vectors)
            outputs.append(_sampled(SELFIE, target, lambda seed: ask(seed=seed), settings, progress))
        outputs += _run_text_readers(sites, target, settings, progress)
        return SiteReadings(vectors, None, exchanged, outputs)
    outputs += _run_injected(sources, nla, vectors, settings, progress)
    explained = outputs[-1]
    outputs += _run_text_readers(sites, target, settings, progress)
    outputs.append(_run_confabulator(sites, sources, nla, vectors, settings, progress))
    others = [explained.texts[row] for row in exchanged.tolist()]
    outputs.append(ReaderOutput(SHUFFLED, ADVERSARY, others, n_tokens=explained.n_tokens))
    return SiteReadings(vectors, _reconstruct(nla, explained), exchanged, outputs)


def compare_points(
    task: Task, target: Target, points: Sequence[Point], settings: ComparisonSettings
) -> dict[str, TaskResult]:
    """What needs no pair and nothing sampled (the probes and the logit lens) at several points, by their names.

    Raises:
        PointError: the target has no such point. The rest is as for reading a task's sites.
    """
    streams = read_task_sites_at(target, task.sites, points)
    exchanged = sites_of_other_groups(task.sites, settings.seed)
    results = {}
    for point, vectors in zip(points, streams.unbind(1), strict=True):
        outputs = [ReaderOutput(name, PROBE, vectors, probe=name) for name in probes.VECTOR_PROBES]
        outputs.append(_lens(LOGIT_LENS, None, target, vectors))
        readings = SiteReadings(vectors, None, exchanged, outputs)
        results[str(point)] = judge_task(task, readings, settings.budgets, settings.n_boot, settings.seed)
    return results


def _run_injected(
    sources: Sources, nla: NLA, vectors: Float[Tensor, "n d"], settings: ComparisonSettings, progress: Progress
) -> list[ReaderOutput]:
    """The readers that are given the activation in a prompt; the NLA last."""
    target, oracle = sources.target, sources.oracle
    selfie = functools.partial(patchscopes.selfie, nla, target, vectors)
    outputs = [_sampled(SELFIE, target, lambda seed: selfie(seed=seed), settings, progress)]
    if oracle is not None:
        prompt = patchscopes.Prompt.ask(nla, sources.question)
        ask = functools.partial(patchscopes.answers, oracle, prompt, vectors)
        outputs.append(_sampled(ORACLE, oracle, lambda seed: ask(seed=seed), settings, progress))
    outputs.append(_sampled(NLA_READER, target, lambda seed: explain(nla, vectors, seed=seed), settings, progress))
    return outputs


def _run_lenses(
    task: Task, target: Target, vectors: Float[Tensor, "n d"], settings: ComparisonSettings, progress: Progress
) -> list[ReaderOutput]:
    texts = list(dict.fromkeys(task.sites.texts[row] for row in task.rows(TRAIN)))
    tuned = lenses.fit_lens(target, texts, settings.lens_steps, settings.seed, progress)
    return [_lens(LOGIT_LENS, None, target, vectors), _lens(TUNED_LENS, tuned, target, vectors)]


def _lens(name: str, lens: lenses.TunedLens | None, target: Target, vectors: Float[Tensor, "n d"]) -> ReaderOutput:
    tops = [[text] for text in lenses.top_tokens(target, vectors, lens)]
    scores = functools.partial(_lens_scores, target, vectors, lens)
    return ReaderOutput(name, ACTIVATION, tops, n_tokens=float(lenses.N_TOP), scores=scores)


def _lens_scores(
    target: Target, vectors: Float[Tensor, "n d"], lens: lenses.TunedLens | None, task: Task
) -> Float[Tensor, "n k"] | None:
    return lenses.class_scores(target, vectors, task.words, task.classes, lens)


def _run_text_readers(
    sites: Sites, target: Target, settings: ComparisonSettings, progress: Progress
) -> list[ReaderOutput]:
    """The visible text, and the visible text with what the target goes on to write."""
    visible, prefixes = sites.visible(target.tokenizer), sites.prefixes(target.tokenizer)
    progress(TEXT_LM, 0.0)
    write = adversaries.continuations(target, prefixes, settings.n_continued)
    samples = [write(settings.seed + sample) for sample in range(settings.n_samples)]
    continued = [[text + sample[row] for sample in samples] for row, text in enumerate(visible)]
    progress(TEXT_LM, 1.0)
    texts = {BAG: [[text] for text in visible], TEXT_LM: continued}
    return [ReaderOutput(name, ADVERSARY, given, n_tokens=_n_tokens(target, given)) for name, given in texts.items()]


def _run_confabulator(
    sites: Sites,
    sources: Sources,
    nla: NLA,
    vectors: Float[Tensor, "n d"],
    settings: ComparisonSettings,
    progress: Progress,
) -> ReaderOutput:
    target, writer = sources.target, (sources.writers or {}).get(sites)
    writer = writer or adversaries.continuations(target, sites.prefixes(target.tokenizer), settings.n_continued)
    picked = adversaries.confabulate(nla, vectors, writer, settings.n_tries, settings.n_samples, settings.seed)
    progress("confabulator", 1.0)
    return ReaderOutput(CONFABULATOR, ADVERSARY, picked, n_tokens=_n_tokens(target, picked))


def _sampled(
    name: str, target: Target, write: Writer, settings: ComparisonSettings, progress: Progress
) -> ReaderOutput:
    """A reader of activations whose texts come from ``write``, which is given another seed for each sample."""
    drawn = []
    progress(name, 0.0)
    for sample in range(settings.n_samples):
        drawn.append(write(settings.seed + sample))
        progress(name, (sample + 1) / settings.n_samples)
    texts = [list(samples) for samples in zip(*drawn, strict=True)]
    return ReaderOutput(name, ACTIVATION, texts, n_tokens=_n_tokens(target, texts))


def _reconstruct(nla: NLA, explained: ReaderOutput) -> Float[Tensor, "n d"]:
    """Reconstructions: of several samples, the direction of their mean."""
    samples = nla.decoder.decode([text for samples in explained.texts for text in samples], strict=False)
    return samples.reshape(len(explained.texts), -1, samples.shape[1]).mean(1)


def _n_tokens(target: Target, texts: Sequence[Sequence[str]]) -> float:
    """Mean tokens that a reader writes of an activation, all samples together."""
    flat = [text for samples in texts for text in samples]
    ids = plain_ids(target.tokenizer, flat)
    return sum(map(len, ids)) / max(1, len(texts))


def sites_of_other_groups(sites: Sites, seed: int) -> Int[Tensor, " n"]:
    """For each site another one, of another group unless one group holds more than half of the sites.

    Which one of a group is drawn too: where every group holds one site of each class, in the same order, an equal
    position would be an equal class.
    """
    members: dict[int, list[int]] = {}
    for row, group in enumerate(sites.groups):
        members.setdefault(group, []).append(row)
    groups = list(members.values())
    rng = random.Random(seed)
    rng.shuffle(groups)
    for rows in groups:
        rng.shuffle(rows)
    order = [row for rows in groups for row in rows]
    shift, others = max(map(len, groups)), torch.empty(len(sites), dtype=torch.int64)
    for position, row in enumerate(order):
        others[row] = order[(position + shift) % len(order)]
    return others


def _holm_over_tasks(results: list[TaskResult]) -> list[TaskResult]:
    """The p-values of each reader and measure corrected over the tasks."""
    corrected = [list(result.readers) for result in results]
    for name in {row.reader for rows in corrected for row in rows}:
        for measure in ("zero_versus", "labelled_versus"):
            cells = [
                (number, column, getattr(row, measure))
                for number, rows in enumerate(corrected)
                for column, row in enumerate(rows)
                if row.reader == name and getattr(row, measure) is not None
            ]
            adjusted = holm([versus.p_value for _, _, versus in cells])
            for (number, column, versus), p_holm in zip(cells, adjusted, strict=True):
                row = corrected[number][column]
                corrected[number][column] = replace(row, **{measure: versus._replace(p_holm=p_holm)})
    return [replace(result, readers=rows) for result, rows in zip(results, corrected, strict=True)]
