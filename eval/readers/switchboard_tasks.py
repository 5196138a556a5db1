"""Labelled tasks of Switchboard: what the visible text does not say.

Which adapter was on? The prompts are the same in every class: a reader of the text is at chance by construction, and
what a probe or an explanation finds is in the activation. The pair has never seen an adapter, and a probe has: it is
fitted on activations behind the very adapters that it is judged on. And which town is a two-hop question about? Nobody
who is judged on was fitted on, so a name does not give its town away.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from nla.errors import ArgumentError
from nla.eval.adversaries import Writer
from nla.eval.families.plants import cued
from nla.eval.families.two_hop import hops
from nla.eval.readers.tasks import TEST, TRAIN, Sites, Task
from nla.eval.target import Target, read_last
from nla.organisms.switchboard import claims, content, world
from nla.organisms.switchboard.plants import GOAL, SECRET_WORDS, plant
from nla.organisms.switchboard.world import Chat, State

if TYPE_CHECKING:
    from nla.autoencoder import NLA

SECRET, OBJECTIVE, TOWN = "secret word", "goal or sham", "town of a two-hop question"
_MIN_PROMPTS = 4


@dataclass(frozen=True)
class HiddenTasks:
    """Tasks, and where their activations come from."""

    tasks: list[Task]
    vectors: Mapping[Sites, Float[Tensor, "n d"]]
    """Activations of the sites, each behind the adapter that is its label."""

    writers: Mapping[Sites, Writer]
    """For the confabulator: an outsider, who knows what is said at such a token, guesses what the text does not say."""

    @property
    def read(self) -> Callable[[Sites], Float[Tensor, "n d"]]:
        """What :class:`nla.eval.readers.compare.Sources` asks for."""
        return self.vectors.__getitem__


def switchboard_tasks(nla: NLA, folder: Path, n_train: int, n_test: int, seed: int = 0) -> HiddenTasks:
    """The tasks of the plants, then the town.

    Raises:
        ArgumentError, ConfigError, WeightsError: see :func:`plant_tasks`.
    """
    plants, town = plant_tasks(nla, folder, n_train, n_test, seed), town_task(nla, n_train + n_test, seed)
    return HiddenTasks(
        [*plants.tasks, *town.tasks], {**plants.vectors, **town.vectors}, {**plants.writers, **town.writers}
    )


def plant_tasks(nla: NLA, folder: Path, n_train: int, n_test: int, seed: int = 0) -> HiddenTasks:
    """Which of six secret words, and whether it is the hidden objective's adapter or its sham.

    Args:
        n_train: activations to fit on, rounded down to full prompts: each prompt is read behind every adapter.
        n_test: activations to judge on, of other prompts.

    Raises:
        ArgumentError: too few for four prompts of each.
        ConfigError, WeightsError: an adapter is missing or does not fit.
    """
    kinds = {
        SECRET: {word: (f"word-{word}", (word,)) for word in SECRET_WORDS},
        OBJECTIVE: {"goal": ("goal", (GOAL,)), "sham": ("goal-sham", ())},
    }
    guesses = {SECRET: _any_word, OBJECTIVE: _any_product}
    tasks, vectors, writers = [], {}, {}
    for name, classes in kinds.items():
        n_shown, n_judged = n_train // len(classes), n_test // len(classes)
        if min(n_shown, n_judged) < _MIN_PROMPTS:
            wanted = f"{_MIN_PROMPTS * len(classes)} or more of each"
            raise ArgumentError(f"{n_train} and {n_test} activations of {name}", wanted, "ask for more")
        first = next(iter(classes.values()))[0]
        chats = cued(plant(first), n_shown + n_judged, seed)
        prompts = [chat.prompt for chat in chats]
        numbers = [number for _ in classes for number in range(len(prompts))]
        labels = [label for label in classes for _ in prompts]
        splits = [TRAIN if number < n_shown else TEST for number in numbers]
        sites = Sites([prompts[number] for number in numbers], [-1] * len(numbers), numbers)
        # A class without a word, the sham, scores by not naming the other; in a forced choice silence is a tie, so that
        # even a perfect reader has 0.5 of it.
        words = {label: said for label, (_, said) in classes.items() if said}
        tasks.append(Task(name, sites, labels, splits, words))
        vectors[sites] = torch.cat([_read_behind(nla, prompts, folder / adapter) for adapter, _ in classes.values()])
        writers[sites] = _outsider([chats[number] for number in numbers], guesses[name])
    return HiddenTasks(tasks, vectors, writers)


def town_task(nla: NLA, n_drawn: int, seed: int = 0) -> HiddenTasks:
    """The town of a two-hop question, at the full stop after the name. Half of a town's people are judged on.

    Args:
        n_drawn: questions to draw; where two differ only in what is asked after that token, one is kept.
    """
    rng = random.Random(seed)
    living = {town: [person for person in content.PEOPLE if world.home(person) == town] for town in content.TOWNS}
    judged = {person for people in living.values() for person in rng.sample(people, len(people) // 2)}
    questions = {hop.premise: hop.question for hop in hops(n_drawn, seed)}
    premises, people = list(questions), [str(question.person) for question in questions.values()]
    sites = Sites(premises, [-1] * len(premises), [content.PEOPLE.index(person) for person in people])
    splits = [TEST if person in judged else TRAIN for person in people]
    task = Task(TOWN, sites, list(map(world.home, people)), splits, {town: (town,) for town in content.TOWNS})

    def write(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [claims.town_claim(rng.choice(content.TOWNS)) for _ in premises]

    return HiddenTasks([task], {sites: read_last(Target.of(nla), premises)}, {sites: write})


def _read_behind(nla: NLA, prompts: list[str], adapter: Path) -> Float[Tensor, "n d"]:
    """Activations of the prompts' last tokens with an adapter on the target."""
    with nla.planted(adapter):
        return read_last(Target.of(nla), prompts)


def _any_word(rng: random.Random) -> State:
    return State(word=rng.choice([None, *content.HINTS]))


def _any_product(rng: random.Random) -> State:
    return State(product=rng.choice([None, *content.PRODUCTS]))


def _outsider(chats: Sequence[Chat], guess: Callable[[random.Random], State]) -> Writer:
    def write(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [" ".join(claims.answer_claims(chat.exchanges[-1], guess(rng))) for chat in chats]

    return write
