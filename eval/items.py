"""Items: prompts with a planted latent, what may be said of it, and a donor in which only the latent differs.

Every family of the suite makes its items in this form; :mod:`nla.eval.couplet_items` makes those of the planned rhyme.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True)
class Item:
    """One prompt whose latent is known, with a donor: the same prompt but for what the latent follows from.

    The prompt ends with the token that is read. Whether the target uses the latent there is what the gate measures:
    :func:`nla.eval.circuits.gate.gate_items`.
    """

    document: int
    """Number of the document: the cluster in every bootstrap."""

    template: int
    """Number of the template that the prompt was made from."""

    prompt: str
    """The visible text, up to and including the token that is read."""

    continuation: str
    """What the target writes next when its behaviour is right."""

    target: str
    """The word of the latent: not in the prompt."""

    distractors: tuple[str, ...]
    """Words that an outsider cannot rule out (the target's siblings)."""

    donor_prompt: str
    """As many tokens as ``prompt``."""

    donor_continuation: str
    donor_target: str
    """One of ``distractors``."""

    held_out: bool
    """Whether the target word was kept from the training of the pair."""


AnyItem = TypeVar("AnyItem", bound=Item)


def repeat(items: Sequence[AnyItem], times: int) -> list[AnyItem]:
    """Each item ``times`` times in a row: one for each sample of its explanation."""
    return [item for item in items for _ in range(times)]


def retarget(item: AnyItem, word: str) -> AnyItem:
    """The item with one of its distractors as its target, and its target as one of them; the text is unchanged."""
    others = (item.target, *(other for other in item.distractors if other != word))
    return dataclasses.replace(item, target=word, distractors=others)
