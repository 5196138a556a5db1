"""Explanations: per activation the sampled texts, how well each reconstructs it, and how far to trust them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nla.errors import visible
from nla.pair.confidence import Trust
from nla.text.claims import claims
from nla.text.tokens import Span


@dataclass
class Note:
    """The explanation of one activation: samples of it, and how far they can be trusted."""

    texts: list[str]
    """One explanation per sample."""

    complete: list[bool]
    """Per sample: it was one whole explanation. What there is of another is kept in ``texts``, and counts."""

    cosine: list[float]
    """Per sample: cosine of the activation with the reconstruction from this text alone."""

    trust: Trust
    """Level from cosine, agreement and margin together; never from cosine alone."""

    span: Span | None = None
    """The token that was read, if known."""

    document: int | None = None
    """The text that it stands in, if known."""

    stratum: str | None = None
    """Kind of position, if known."""

    @property
    def token(self) -> str:
        """Text of the token that was read; empty if unknown."""
        return "" if self.span is None else self.span.text

    @property
    def agreement(self) -> float | None:
        """Mean overlap of claims between samples, in [0, 1]; None for one sample."""
        return self.trust.agreement

    @property
    def margin(self) -> float:
        """Mean cosine minus the best rock's on this activation."""
        return self.trust.margin

    @property
    def claims(self) -> list[list[str]]:
        """The claims of each sample."""
        return [claims(text) for text in self.texts]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            "token": self.token,
            "index": None if self.span is None else self.span.index,
            "document": self.document,
            "stratum": self.stratum,
            "texts": self.texts,
            "complete": self.complete,
            "cosine": self.cosine,
            "agreement": self.agreement,
            "margin": self.margin,
            "trust": self.trust.level,
        }


@dataclass
class Notes(Sequence[Note]):
    """One note per activation, in their order."""

    notes: list[Note] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.notes)

    def __getitem__(self, index: Any) -> Any:
        """A note by int; Notes by slice."""
        return Notes(self.notes[index]) if isinstance(index, slice) else self.notes[index]

    @property
    def texts(self) -> list[list[str]]:
        """Explanations by activation and sample."""
        return [note.texts for note in self.notes]

    @property
    def agreement(self) -> list[float | None]:
        """Agreement by activation."""
        return [note.agreement for note in self.notes]

    @property
    def cosine(self) -> list[list[float]]:
        """Cosine by activation and sample."""
        return [note.cosine for note in self.notes]

    @property
    def strata(self) -> list[str | None]:
        """Kind of position by activation."""
        return [note.stratum for note in self.notes]

    @property
    def trust(self) -> list[Trust]:
        """Trust by activation."""
        return [note.trust for note in self.notes]

    def to_json(self) -> list[dict[str, Any]]:
        """A JSON-ready list."""
        return [note.to_json() for note in self.notes]

    def __str__(self) -> str:
        return "\n".join(f"{visible(note.token)}  {note.trust.level}  {visible(note.texts[0])}" for note in self.notes)
