"""Readers compared on the same activations, splits and items: one row a reader, one table a task.

Everything that does not depend on labels (activations, texts, reconstructions) is gathered once for equal sites and
shared by all tasks over them; the measures of a task are in nla/eval/measures.py.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nla.errors import ShapeError
from nla.eval.explainers import explain
from nla.eval.readers import lenses, patchscopes, probes, text_only
from nla.eval.readers.measures import (
    ACTIVATION,
    ADVERSARY,
    CONFABULATOR,
    NLA_READER,
    PROBE,
    Gathered,
    Reading,
    TaskResult,
    judge,
    judge_coins,
)
from nla.eval.readers.tasks import TRAIN, Sites, Task, random_task, read_sites
from nla.eval.target import Progress, Target, silent
from nla.pair.decoder import decode
from nla.stats import holm
from nla.text.tokens import continuation_ids

if TYPE_CHECKING:
    from nla.autoencoder import NLA

SELFIE, ORACLE = "SelfIE (no adapter)", "activation oracle"
LOGIT_LENS, TUNED_LENS = "logit lens", "tuned lens"
BAG, TEXT_LM = "bag of words (visible text)", "text-only LM"
SHUFFLED = "shuffled-activation NLA"
N_TRIES, N_COINS = 10, 5


@dataclass(frozen=True)
class Options:
    """How the readers are run."""

    n_samples: int = 1
    """Explanations of each activation, by every reader that samples."""

    n_tries: int = N_TRIES
    """Texts that the confabulator offers for each activation."""

    n_continued: int = text_only.N_CONTINUED
    """Tokens that the text-only LM goes on to write."""

    lens_steps: int = lenses.N_STEPS
    budgets: tuple[int, ...] = probes.BUDGETS
    n_boot: int = 500
    seed: int = 0


@dataclass(frozen=True)
class Sources:
    """Who reads."""

    target: Target
    """Whose activations are read, at its point; also the text-only LM, the lenses and SelfIE."""

    nla: NLA | None = None
    """The pair; None: no explanations."""

    oracle: Target | None = None
    """An activation oracle on the same base (:func:`nla.eval.patchscopes.load_oracle`)."""

    question: str = ""
    """What the oracle is asked; holds the pair's marker."""

    writers: Mapping[Sites, text_only.Writer] | None = None
    """Better text-only writers of explanations than the target's continuations, for the confabulator."""

    read: Callable[[Sites], Tensor] | None = None
    """Activations (n, d) of sites, where they are not those of ``target`` (one with a plant, say)."""


def compare(
    tasks: Sequence[Task],
    sources: Sources,
    options: Options,
    progress: Progress = silent,
    shared: dict[Sites, Gathered] | None = None,
) -> list[TaskResult]:
    """Every reader on every task, and after them what it makes of coin flips at the same sites.

    Holm's correction is over the tasks.

    Args:
        shared: takes what is gathered at each of the sites, for a caller who has more to ask of it.

    Raises:
        ShapeError: activations are not one a site.
        NLAError: see the readers.
    """
    shared = {} if shared is None else shared
    coins: dict[Sites, TaskResult] = {}
    results = []
    for number, task in enumerate(tasks):
        if task.sites not in shared:
            found = shared[task.sites] = gather(task, sources, options, progress)
            seeds = range(options.seed, options.seed + N_COINS)
            flips = [random_task(task.sites, task.splits, seed) for seed in seeds]
            beside = [other.name for other in tasks if other.sites == task.sites]
            coins[task.sites] = judge_coins(flips, found, beside, options.n_boot, options.seed)
        result = judge(task, shared[task.sites], options.budgets, options.n_boot, options.seed)
        results.append(result.beside(coins[task.sites]))
        progress("judge", (number + 1) / len(tasks))
    return _holm(results) + list(coins.values())


def gather(task: Task, sources: Sources, options: Options, progress: Progress = silent) -> Gathered:
    """Activations, texts and reconstructions of a task's sites. The tuned lens is fitted on its train split's texts."""
    sites, target, nla, seed = task.sites, sources.target, sources.nla, options.seed
    vectors = read_sites(target, sites) if sources.read is None else sources.read(sites)
    if len(vectors) != len(sites):
        raise ShapeError(f"{len(vectors)} activations", f"{len(sites)}, one a site", "read every site once")
    progress("read", 1.0)
    moved = moved_away(sites, seed)
    readings = [Reading(name, PROBE, vectors, probe=name) for name in probes.VECTOR_PROBES]
    readings += _lenses(task, target, vectors, options, progress)
    predicted = None
    if nla is not None:
        asked = _injected(sources, nla, vectors, options, progress)
        predicted = _reconstruct(nla, asked[-1])
        readings += asked
    rivals = _adversaries(sites, sources, vectors, readings, moved, options, progress)
    return Gathered(vectors, predicted, moved, [*readings, *rivals])


def _injected(sources: Sources, nla: NLA, vectors: Tensor, options: Options, progress: Progress) -> list[Reading]:
    """The readers that are given the activation in a prompt; the NLA last."""
    target, oracle = sources.target, sources.oracle
    selfie = functools.partial(patchscopes.selfie, nla, target, vectors)
    found = [_sampled(SELFIE, target, lambda s: selfie(seed=s), options, progress)]
    if oracle is not None:
        prompt = patchscopes.Prompt.ask(nla, sources.question)
        ask = functools.partial(patchscopes.answers, oracle, prompt, vectors)
        found.append(_sampled(ORACLE, oracle, lambda s: ask(seed=s), options, progress))
    found.append(_sampled(NLA_READER, target, lambda s: explain(nla, vectors, seed=s), options, progress))
    return found


def _lenses(task: Task, target: Target, vectors: Tensor, options: Options, progress: Progress) -> list[Reading]:
    texts = list(dict.fromkeys(task.sites.texts[row] for row in task.rows(TRAIN)))
    tuned = lenses.fit_lens(target, texts, options.lens_steps, options.seed, progress)
    readings = []
    for name, lens in ((LOGIT_LENS, None), (TUNED_LENS, tuned)):
        tops = [[text] for text in lenses.top_tokens(target, vectors, lens)]
        scores = functools.partial(_lens_scores, target, vectors, lens)
        readings.append(Reading(name, ACTIVATION, tops, n_tokens=float(lenses.N_TOP), scores=scores))
    return readings


def _lens_scores(target: Target, vectors: Tensor, lens: lenses.TunedLens | None, task: Task) -> Tensor | None:
    return lenses.class_scores(target, vectors, task.words, task.classes, lens)


def _adversaries(
    sites: Sites,
    sources: Sources,
    vectors: Tensor,
    readings: Sequence[Reading],
    moved: Tensor,
    options: Options,
    progress: Progress,
) -> list[Reading]:
    target, nla, seed = sources.target, sources.nla, options.seed
    seen = [[text] for text in sites.visible(target.tokenizer)]
    found = [Reading(BAG, ADVERSARY, seen, n_tokens=_n_tokens(target, seen))]
    progress(TEXT_LM, 0.0)
    written = text_only.text_lm(target, sites, options.n_samples, seed, options.n_continued)
    found.append(Reading(TEXT_LM, ADVERSARY, written, n_tokens=_n_tokens(target, written)))
    progress(TEXT_LM, 1.0)
    if nla is None:
        return found
    writer = (sources.writers or {}).get(sites) or text_only.continuations(target, sites, options.n_continued)
    picked = text_only.confabulate(nla, vectors, writer, options.n_tries, options.n_samples, seed)
    found.append(Reading(CONFABULATOR, ADVERSARY, picked, n_tokens=_n_tokens(target, picked)))
    progress("confabulator", 1.0)
    own = next(reading for reading in readings if reading.name == NLA_READER)
    others = [own.texts[row] for row in moved.tolist()]
    return [*found, Reading(SHUFFLED, ADVERSARY, others, n_tokens=own.n_tokens)]


def _sampled(
    name: str, target: Target, write: Callable[[int], list[str]], options: Options, progress: Progress
) -> Reading:
    """A reader of activations whose texts come from ``write``, which is given another seed for each sample."""
    drawn = []
    progress(name, 0.0)
    for sample in range(options.n_samples):
        drawn.append(write(options.seed + sample))
        progress(name, (sample + 1) / options.n_samples)
    texts = [list(samples) for samples in zip(*drawn, strict=True)]
    return Reading(name, ACTIVATION, texts, n_tokens=_n_tokens(target, texts))


def _reconstruct(nla: NLA, own: Reading) -> Tensor:
    """Reconstructions (n, d): of several samples, the direction of their mean."""
    each = decode(nla, [text for samples in own.texts for text in samples], strict=False)
    return each.reshape(len(own.texts), -1, each.shape[1]).mean(1)


def _n_tokens(target: Target, texts: Sequence[Sequence[str]]) -> float:
    """Mean tokens that a reader writes of an activation, all samples together."""
    flat = [text for samples in texts for text in samples]
    ids = continuation_ids(target.tokenizer, flat)
    return sum(map(len, ids)) / max(1, len(texts))


def moved_away(sites: Sites, seed: int) -> Tensor:
    """For each site another one (n,), of another group unless one group holds more than half of the sites.

    Which one of a group is drawn too: where every group holds one site of each class, in the same order, an equal
    place would be an equal class.
    """
    members: dict[int, list[int]] = {}
    for row, group in enumerate(sites.groups):
        members.setdefault(group, []).append(row)
    groups = list(members.values())
    rng = random.Random(seed)
    rng.shuffle(groups)
    for own in groups:
        rng.shuffle(own)
    order = [row for group in groups for row in group]
    shift, moved = max(map(len, groups)), torch.empty(len(sites), dtype=torch.int64)
    for place, row in enumerate(order):
        moved[row] = order[(place + shift) % len(order)]
    return moved


def _holm(results: list[TaskResult]) -> list[TaskResult]:
    """The p-values of each reader and measure corrected over the tasks."""
    corrected = [list(result.readers) for result in results]
    for name in {row.reader for rows in corrected for row in rows}:
        for measure in ("zero_versus", "labelled_versus"):
            places = [
                (number, place)
                for number, rows in enumerate(corrected)
                for place, row in enumerate(rows)
                if row.reader == name and getattr(row, measure) is not None
            ]
            raw = [getattr(corrected[number][place], measure) for number, place in places]
            for (number, place), versus, p_value in zip(places, raw, holm([one.p_value for one in raw]), strict=True):
                row = corrected[number][place]
                corrected[number][place] = replace(row, **{measure: versus._replace(p_holm=p_value)})
    return [replace(result, readers=rows) for result, rows in zip(results, corrected, strict=True)]
