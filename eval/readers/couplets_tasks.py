"""Labelled tasks of Couplets: held-out documents in, tasks at the line break and at the preposition out.

The rhyme family transfers to plan words that the pair never saw, everything to two templates that no reader is fitted
on here (the target and the pair saw them in training).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nla.errors import ArgumentError
from nla.eval.adversaries import Writer
from nla.eval.couplet_items import HELD_OUT_SEED, SHOWN_PLANS, trained_on
from nla.eval.readers.tasks import TEST, TRAIN, Sites, Task
from nla.organisms.couplets import world
from nla.organisms.ground_truth import Offsets

TEMPLATES, WORDS = "held-out templates", "held-out words"
PLAN, FAMILY, COLOUR, SEASON = COUPLET_TASKS = ("plan", "rhyme family", "colour group", "season")
_HELD_OUT_FRAMES = (6, 7)
_ROUNDS = 40

Label = Callable[[world.Couplet], str]


@dataclass(frozen=True)
class CoupletTasks:
    """Tasks over held-out documents of Couplets, and the documents of the sites, in their order."""

    tasks: list[Task]
    documents: list[world.Couplet]


def couplet_tasks(
    n_train: int = 1000, n_test: int = 300, n_transfer: int = 150, seed: int = 0, names: Sequence[str] = COUPLET_TASKS
) -> CoupletTasks:
    """At the line break: the plan, its rhyme family, the colour's half; at the preposition: the season.

    Args:
        names: which of the tasks.

    Raises:
        ArgumentError: too few documents for every class (58 plan words) to be fitted on.
    """
    drawn = _draw(n_train, n_test, n_transfer, seed)
    documents, splits = [couplet for couplet, _ in drawn], tuple(split for _, split in drawn)
    last, groups = (-1,) * len(documents), tuple(range(len(documents)))
    newline = Sites(tuple(couplet.line1 for couplet in documents), last, groups)
    preposition = Sites(tuple(map(_to_preposition, documents)), last, groups)

    families = {"/".join(plans): plans for plans, _ in world.FAMILIES}
    halves = {" or ".join(colours): colours for colours in (world.COLOURS[:2], world.COLOURS[2:])}
    kinds: dict[str, tuple[Sites, Label, Mapping[str, tuple[str, ...]]]] = {
        PLAN: (newline, lambda one: one.plan, {plan: (plan,) for plan in SHOWN_PLANS}),
        FAMILY: (newline, lambda one: list(families)[one.family], families),
        COLOUR: (newline, lambda one: next(name for name, half in halves.items() if one.colour in half), halves),
        SEASON: (preposition, lambda one: one.season, {season: (season,) for season in world.SEASONS}),
    }
    tasks = []
    for name in names:
        sites, label, words = kinds[name]
        labels = tuple(label(one) if split != WORDS or name == FAMILY else None for one, split in drawn)
        tasks.append(Task(name, sites, labels, splits, words))
    return CoupletTasks(tasks, documents)


def couplet_writers(drawn: CoupletTasks) -> dict[Sites, Writer]:
    """For the confabulator: an outsider, who knows the rhymes and guesses, writes explanations of the visible text."""

    def writer(sites: Sites) -> Writer:
        spans = [Offsets(text.rindex(last), len(text)) for text in sites.texts for last in (_last_token(text),)]

        def write(seed: int) -> list[str]:
            rng = random.Random(seed)
            pairs = zip(drawn.documents, spans, strict=True)
            return [world.describe(document, span, rng, 0.0) for document, span in pairs]

        return write

    return {task.sites: writer(task.sites) for task in drawn.tasks}


def _last_token(text: str) -> str:
    """The line break, or the last word with the space before it."""
    return "\n" if text.endswith("\n") else " " + text.rsplit(" ", 1)[1]


def _to_preposition(couplet: world.Couplet) -> str:
    """Line 1 up to its preposition: after season, person and thing, before the noun that fixes the rhyme."""
    return couplet.line1[: -len(f" the {couplet.ender},\n")]


def _draw(n_train: int, n_test: int, n_transfer: int, seed: int) -> list[tuple[world.Couplet, str]]:
    """Held-out documents, no two with the same start up to the preposition, each with its split."""
    if min(n_train, n_test, n_transfer) < 1 or seed < 0:
        raise ArgumentError(f"{n_train}, {n_test}, {n_transfer} documents", "1 or more of each", "correct the numbers")
    wanted = {TRAIN: n_train, TEST: n_test, TEMPLATES: n_transfer, WORDS: n_transfer}
    drawn: dict[str, list[world.Couplet]] = {split: [] for split in wanted}
    seen: set[str] = set()
    total = sum(wanted.values())
    for extra in range(_ROUNDS):
        for couplet in world.sample(2 * total, 3 * HELD_OUT_SEED + seed * _ROUNDS + extra):
            start = _to_preposition(couplet)
            if start in seen or couplet.line1 in trained_on():
                continue
            if couplet.plan in world.HELD_OUT_PLANS:
                split = WORDS if couplet.frame not in _HELD_OUT_FRAMES else None
            elif couplet.frame in _HELD_OUT_FRAMES:
                split = TEMPLATES
            else:
                split = TRAIN if len(drawn[TRAIN]) < n_train else TEST
            if split is not None and len(drawn[split]) < wanted[split]:
                seen.add(start)
                drawn[split].append(couplet)
        if all(len(drawn[split]) == n for split, n in wanted.items()):
            break
    return [(couplet, split) for split, couplets in drawn.items() for couplet in couplets]
