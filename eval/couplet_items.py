"""The items of the planned rhyme: prompts of Couplets that end at the line break, where the plan is."""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from nla.errors import ArgumentError
from nla.eval.items import Item
from nla.organisms import TARGETS, full_name
from nla.organisms.couplets import world
from nla.organisms.ground_truth import Offsets

SHOWN_PLANS = tuple(plan for plan in world.PLANS if plan not in world.HELD_OUT_PLANS)
# What the shipped targets and pair were trained on, as arguments of world.sample: these documents are never judged on.
TRAINED_ON = ((60_000, 0, None), (20_000, 101, SHOWN_PLANS))
# Seeds from here on are kept for evaluation.
HELD_OUT_SEED = 7_000_000
_MAX_ROUNDS = 50


@dataclass(frozen=True)
class RhymeItem(Item):
    """The first line of a couplet; the latent is the word that its second line will end on."""

    couplet: world.Couplet
    """The features of the prompt, against which visible claims are checked."""

    donor_couplet: world.Couplet
    """The features of the donor."""

    @property
    def span(self) -> Offsets:
        """The characters of the token that is read: the prompt's last word, mark or line break."""
        match = re.search(r"( ?\w+|[^\w]|\n)\Z", self.prompt)
        return Offsets(match.start() if match else 0, len(self.prompt))


def variant_of(model: object) -> str | None:
    """ "planner" or "plain" for the name of an embedded target of Couplets, otherwise None."""
    name = full_name(model) if isinstance(model, str | Path) else ""
    world, _, variant = name.partition("/")
    return variant if world == "couplets" and name in TARGETS else None


def make_item(document: int, couplet: world.Couplet, rng: random.Random, donors: Collection[str]) -> RhymeItem:
    """The rhyme item of a document; its donor has another colour or another thing, hence a sibling for its plan."""
    donor = minimal_donor(couplet, rng, donors)
    return RhymeItem(
        document=document,
        template=couplet.frame,
        prompt=couplet.line1,
        continuation=couplet.line2,
        target=couplet.plan,
        distractors=couplet.siblings,
        donor_prompt=donor.line1,
        donor_continuation=donor.line2,
        donor_target=donor.plan,
        held_out=couplet.plan in world.HELD_OUT_PLANS,
        couplet=couplet,
        donor_couplet=donor,
    )


def minimal_donor(couplet: world.Couplet, rng: random.Random, plans: Collection[str]) -> world.Couplet:
    """The same document with another colour or another thing, so that its plan is another one of ``plans``."""
    others = [dataclasses.replace(couplet, colour=colour) for colour in world.COLOURS if colour != couplet.colour]
    others += [dataclasses.replace(couplet, thing=thing) for thing in world.THINGS if thing != couplet.thing]
    return rng.choice([other for other in others if other.plan in plans and other.plan != couplet.plan])


def rhyme_items(n_items: int = 200, seed: int = 0, plans: str | Sequence[str] | None = None) -> list[RhymeItem]:
    """Rhyme items from held-out documents, no two with the same prompt.

    Args:
        n_items: how many.
        seed: 0, 1, …; each draws other documents, and none of them those of training.
        plans: only documents whose line 2 ends on one of these; None: all plans but the held-out ones. A donor's
            plan is never a held-out one, unless ``plans`` is all of them.

    Raises:
        ArgumentError: fewer than one item, a negative seed, or an unknown plan word.
    """
    if n_items < 1 or seed < 0:
        raise ArgumentError(f"n_items={n_items}, seed={seed}", "1 or more items, a seed of 0 or more", "correct them")
    kept = SHOWN_PLANS if plans is None else [plans] if isinstance(plans, str) else list(plans)
    if unknown := [plan for plan in kept if plan not in world.PLANS]:
        raise ArgumentError(f"the plans {unknown}", "words that may end line 2 (world.PLANS)", "leave these out")
    couplets: dict[str, world.Couplet] = {}
    for extra in range(_MAX_ROUNDS):
        for couplet in world.sample(n_items, HELD_OUT_SEED + seed * _MAX_ROUNDS + extra, kept):
            if couplet.line1 not in trained_on():
                couplets.setdefault(couplet.line1, couplet)
        if len(couplets) >= n_items:
            break
    rng, donors = random.Random(seed), set(world.PLANS) if set(kept) == set(world.PLANS) else SHOWN_PLANS
    chosen = list(couplets.values())[:n_items]
    return [make_item(number, couplet, rng, donors) for number, couplet in enumerate(chosen)]


def documents(n_documents: int, seed: int, plans: str | Sequence[str] | None = None) -> list[world.Couplet]:
    """Whole held-out documents, of every plan or of these only; drawn apart from those of :func:`rhyme_items`."""
    spare = world.sample(n_documents + n_documents // 20 + 20, 2 * HELD_OUT_SEED + seed, plans)
    return [couplet for couplet in spare if couplet.line1 not in trained_on()][:n_documents]


@functools.cache
def trained_on() -> frozenset[str]:
    """Line 1 of every document that the shipped targets and pair were trained on; drawing them again takes a second."""
    return frozenset(couplet.line1 for n, seed, plans in TRAINED_ON for couplet in world.sample(n, seed, plans))
