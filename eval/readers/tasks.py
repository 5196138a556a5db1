"""Labelled tasks: places in texts, a label at each, and who may be fitted on what.

A caller makes :class:`Sites` (where to read) and any number of :class:`Task` over them (what to tell apart): the
activations and explanations of equal sites are made once and shared. Couplets' own tasks are made here.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nla.errors import ArgumentError
from nla.eval.items import HELD_OUT_SEED, SHOWN_PLANS, trained_on
from nla.eval.target import Target
from nla.models.read import read
from nla.organisms.couplets import world
from nla.organisms.lesson import Offsets
from nla.text.tokens import Span, encode_batch

TRAIN, TEST = "train", "test"
TEMPLATES, WORDS = "held-out templates", "held-out words"
MIN_PER_CLASS = 2
RANDOM = "random labels"
PLAN, FAMILY, COLOUR, SEASON = COUPLET_TASKS = ("plan", "rhyme family", "colour group", "season")
_HELD_OUT_FRAMES = (6, 7)
_ROUNDS = 40
_SHOWN = 5


@dataclass(frozen=True)
class Sites:
    """Where activations are read: one token of one text a site."""

    texts: Sequence[str]
    tokens: Sequence[int]
    """Token index in the text of each site, from 0, or negative from the end."""

    groups: Sequence[int]
    """Document or cluster of each site: never parted between splits, and resampled as a whole."""

    def __post_init__(self) -> None:
        for name in ("texts", "tokens", "groups"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # hashable, whatever sequence was given
        if not len(self.texts) == len(self.tokens) == len(self.groups):
            raise ArgumentError(
                f"{len(self.texts)} texts, {len(self.tokens)} tokens, {len(self.groups)} groups",
                "as many of each",
                "give one of each a site",
            )
        if not self.texts:
            raise ArgumentError("no sites", "1 or more", "check the selection of texts and positions")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def unique_texts(self) -> list[str]:
        """Each text once, in order."""
        return list(dict.fromkeys(self.texts))

    def spans(self, tokenizer: object) -> list[Span]:
        """The token of each site."""
        unique = self.unique_texts
        found = {text: entry.spans for text, entry in zip(unique, encode_batch(tokenizer, unique, None), strict=True)}
        return [found[text][token] for text, token in zip(self.texts, self.tokens, strict=True)]

    def visible(self, tokenizer: object) -> list[str]:
        """What a reader of the text may see at each site: everything up to and including its token."""
        return [text[: span.end] for text, span in zip(self.texts, self.spans(tokenizer), strict=True)]


def read_sites(target: Target, sites: Sites) -> Tensor:
    """Activations (n, d) float32 of the sites at the target's point; each text runs once.

    Raises:
        PositionError, ContextLengthError, VocabularyError: see :func:`nla.activations.read`.
    """
    unique = sites.unique_texts
    number = {text: place for place, text in enumerate(unique)}
    wanted: list[list[int]] = [[] for _ in unique]
    row_of: list[tuple[int, int]] = []
    for text, token in zip(sites.texts, sites.tokens, strict=True):
        place = number[text]
        row_of.append((place, len(wanted[place])))
        wanted[place].append(token)
    with target.role():
        found = read(target.model, target.tokenizer, unique, target.point, lambda document, _spans: wanted[document])
    starts = torch.tensor([0, *[len(tokens) for tokens in wanted]]).cumsum(0).tolist()
    return found.vectors[torch.tensor([starts[place] + offset for place, offset in row_of])]


@dataclass(frozen=True)
class Task:
    """What is to be told apart at some sites."""

    name: str
    sites: Sites
    labels: Sequence[str | None]
    """Class of each site; None: the site has no part in this task."""

    splits: Sequence[str]
    """"train", "test", or the name of a transfer split: judged by what was fitted on "train"."""

    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For a judgement without labels: words that name a class. Empty: no such judgement."""

    def __post_init__(self) -> None:
        for name in ("labels", "splits"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.labels) == len(self.splits) == len(self.sites):
            raise ArgumentError(
                f"{len(self.labels)} labels and {len(self.splits)} splits for {len(self.sites)} sites",
                "one of each a site",
                "align them",
            )
        self._check_classes()
        owner: dict[int, str] = {}
        for row, group in enumerate(self.sites.groups):
            if self.labels[row] is not None and owner.setdefault(group, self.splits[row]) != self.splits[row]:
                raise ArgumentError(
                    f"task {self.name!r}: group {group} in {owner[group]} and {self.splits[row]}",
                    "a group in one split only",
                    "split by group, never by row",
                )

    def _check_classes(self) -> None:
        train = Counter(self.labels[row] for row in self.rows(TRAIN))
        if len(train) < 2 or min(train.values()) < MIN_PER_CLASS:
            rare = ", ".join(f"{label!r} {count}" for label, count in train.most_common()[: -_SHOWN - 1 : -1])
            raise ArgumentError(
                f"task {self.name!r}: {len(train)} classes to fit on, of which the rarest are {rare or 'none'}",
                f"two classes or more, each with {MIN_PER_CLASS} items or more",
                "add items to fit on, or leave rare classes out",
            )
        if len({self.labels[row] for row in self.rows(TEST)}) < 2:
            raise ArgumentError(f"task {self.name!r}: one class or none in its test split", "two", "add items")

    @functools.cached_property
    def classes(self) -> list[str]:
        """The classes of the train split, in order."""
        own = zip(self.labels, self.splits, strict=True)
        return sorted({label for label, split in own if label is not None and split == TRAIN})

    def rows(self, split: str) -> list[int]:
        """Sites of a split whose label was fitted on."""
        own = enumerate(zip(self.labels, self.splits, strict=True))
        known = set(self.classes)
        return [row for row, (label, found) in own if found == split and label in known]

    @property
    def transfers(self) -> list[str]:
        """Names of the transfer splits."""
        return [split for split in dict.fromkeys(self.splits) if split not in (TRAIN, TEST) and self.rows(split)]

    def codes(self, rows: Sequence[int]) -> Tensor:
        """Class numbers (n,) int64 of sites."""
        number = {name: place for place, name in enumerate(self.classes)}
        return torch.tensor([number[self.labels[row]] for row in rows])  # type: ignore[index]

    def group_codes(self, rows: Sequence[int]) -> Tensor:
        """Groups (n,) int64 of sites."""
        return torch.tensor([self.sites.groups[row] for row in rows])


def random_task(sites: Sites, splits: Sequence[str], seed: int = 0) -> Task:
    """Coin flips, one a group, as many heads as tails in each split: what is learned of them cannot reach other splits.

    Source: Hewitt & Liang 2019, "Designing and Interpreting Probes with Control Tasks".
    """
    rng = random.Random(seed)
    members: dict[str, list[int]] = {}
    for group, split in dict.fromkeys(zip(sites.groups, splits, strict=True)):
        members.setdefault(split, []).append(group)
    coin: dict[int, str] = {}
    for groups in members.values():
        rng.shuffle(groups)
        coin |= {group: ("heads", "tails")[place % 2] for place, group in enumerate(groups)}
    return Task(RANDOM, sites, tuple(coin[group] for group in sites.groups), tuple(splits))


# ---------------------------------------------------------------------------------------------------------- Couplets

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

    The family transfers to plan words that the pair never saw, everything to two templates that no reader is fitted on
    here (the target and the pair saw them in training).

    Args:
        names: which of the tasks.

    Raises:
        ArgumentError: too few documents for every class (58 plan words) to be fitted on.
    """
    drawn = _draw(n_train, n_test, n_transfer, seed)
    documents, splits = [one for one, _ in drawn], tuple(split for _, split in drawn)
    groups = tuple(range(len(documents)))
    newline = Sites(tuple(one.line1 for one in documents), (-1,) * len(documents), groups)
    before = Sites(tuple(_to_preposition(one) for one in documents), (-1,) * len(documents), groups)

    families = {"/".join(plans): plans for plans, _ in world.FAMILIES}
    halves = {" or ".join(colours): colours for colours in (world.COLOURS[:2], world.COLOURS[2:])}
    kinds: dict[str, tuple[Sites, Label, Mapping[str, tuple[str, ...]]]] = {
        PLAN: (newline, lambda one: one.plan, {plan: (plan,) for plan in SHOWN_PLANS}),
        FAMILY: (newline, lambda one: list(families)[one.family], families),
        COLOUR: (newline, lambda one: next(name for name, pool in halves.items() if one.colour in pool), halves),
        SEASON: (before, lambda one: one.season, {season: (season,) for season in world.SEASONS}),
    }
    tasks = []
    for name in names:
        sites, label, words = kinds[name]
        labels = tuple(label(one) if split != WORDS or name == FAMILY else None for one, split in drawn)
        tasks.append(Task(name, sites, labels, splits, words))
    return CoupletTasks(tasks, documents)


def couplet_writers(found: CoupletTasks) -> dict[Sites, Callable[[int], list[str]]]:
    """For the confabulator: an outsider, who knows the rhymes and guesses, writes explanations of the visible text."""

    def writer(sites: Sites) -> Callable[[int], list[str]]:
        spans = [Offsets(text.rindex(last), len(text)) for text in sites.texts for last in (_last(text),)]

        def write(seed: int) -> list[str]:
            rng = random.Random(seed)
            pairs = zip(found.documents, spans, strict=True)
            return [world.describe(document, span, rng, 0.0) for document, span in pairs]

        return write

    return {task.sites: writer(task.sites) for task in found.tasks}


def _last(text: str) -> str:
    """The last token: the line break, or the last word with the space before it."""
    return "\n" if text.endswith("\n") else " " + text.rsplit(" ", 1)[1]


def _to_preposition(couplet: world.Couplet) -> str:
    """Line 1 up to its preposition: after season, person and thing, before the noun that fixes the rhyme."""
    return couplet.line1[: -len(f" the {couplet.ender},\n")]


def _draw(n_train: int, n_test: int, n_transfer: int, seed: int) -> list[tuple[world.Couplet, str]]:
    """Held-out documents, no two with the same start up to the preposition, each with its split."""
    if min(n_train, n_test, n_transfer) < 1 or seed < 0:
        raise ArgumentError(f"{n_train}, {n_test}, {n_transfer} documents", "1 or more of each", "correct the numbers")
    wanted = {TRAIN: n_train, TEST: n_test, TEMPLATES: n_transfer, WORDS: n_transfer}
    found: dict[str, list[world.Couplet]] = {split: [] for split in wanted}
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
                split = TRAIN if len(found[TRAIN]) < n_train else TEST
            if split is not None and len(found[split]) < wanted[split]:
                seen.add(start)
                found[split].append(couplet)
        if all(len(found[split]) == n for split, n in wanted.items()):
            break
    return [(couplet, split) for split, couplets in found.items() for couplet in couplets]
