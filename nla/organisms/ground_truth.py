"""What training needs of a world with known truth: its documents, what can be said of a token, and what is true."""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from nla.errors import ArgumentError

WORLDS = ("couplets", "switchboard")


class HasOffsets(Protocol):
    """A token's place in its text: characters ``start`` to ``end``."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


class Offsets(NamedTuple):
    """Characters ``start`` to ``end`` of a text: a token's place, without its ids."""

    start: int
    end: int


class Document(Protocol):
    """What a world's documents have in common: a couplet, a chat."""

    @property
    def text(self) -> str: ...


class GroundTruth(Protocol):
    """A module of this form, one a world (``nla.organisms.<world>.ground_truth``)."""

    STRATA: tuple[str, ...]
    """Kinds of position."""
    MAIN: tuple[str, ...]
    """Those that are read in every document, since their latents are planted there."""
    MARKER: str
    ENCODER_PROMPT: str
    DECODER_TEMPLATE: str

    def splits(self, n_documents: int, n_eval_documents: int, seed: int) -> dict[str, list[Document]]:
        """``train``, ``eval`` and ``held_out`` documents (of latents never trained on); no text is in two of them."""
        ...

    def strata(self, document: Document, spans: Sequence[HasOffsets]) -> list[str]:
        """The kind of position of every token."""
        ...

    def truthful(self, document: Document, span: HasOffsets) -> str:
        """What a reader that knows everything says at a token."""
        ...

    def describe(self, document: Document, span: HasOffsets, rng: random.Random, notice: float) -> str:
        """What an outsider writes who sees the visible text, and the latent with probability ``notice``."""
        ...

    def hit_rate(self, notice: float) -> float:
        """How often the outsider's guess of a latent is right."""
        ...

    def named(self, document: Document, span: HasOffsets, text: str) -> bool | None:
        """Whether a text names the latent at a token; None where there is none that the visible text does not say."""
        ...

    def visible_claims(self, document: Document, span: HasOffsets, text: str) -> list[bool]:
        """Whether each claim that the visible text decides is true."""
        ...


def load(world: str) -> GroundTruth:
    """What training needs of an embedded world.

    Raises:
        ArgumentError: there is no such world.
    """
    if world not in WORLDS:
        raise ArgumentError(f"world {world!r}", f"one of {', '.join(WORLDS)}", "correct the recipe's `world`")
    return importlib.import_module(f"nla.organisms.{world}.ground_truth")  # type: ignore[return-value]
