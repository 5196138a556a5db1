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
class Explanation:
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
        """Mean cosine minus the best baseline's on this activation."""
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
class Explanations(Sequence[Explanation]):
    """One explanation per activation, in their order."""

    items: list[Explanation] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        """An explanation by int; Explanations by slice."""
        return Explanations(self.items[index]) if isinstance(index, slice) else self.items[index]

    @property
    def texts(self) -> list[list[str]]:
        """Explanations by activation and sample."""
        return [one.texts for one in self.items]

    @property
    def agreement(self) -> list[float | None]:
        """Agreement by activation."""
        return [one.agreement for one in self.items]

    @property
    def cosine(self) -> list[list[float]]:
        """Cosine by activation and sample."""
        return [one.cosine for one in self.items]

    @property
    def strata(self) -> list[str | None]:
        """Kind of position by activation."""
        return [one.stratum for one in self.items]

    @property
    def trust(self) -> list[Trust]:
        """Trust by activation."""
        return [one.trust for one in self.items]

    def to_json(self) -> list[dict[str, Any]]:
        """A JSON-ready list."""
        return [one.to_json() for one in self.items]

    def __str__(self) -> str:
        return "\n".join(f"{visible(one.token)}  {one.trust.level}  {visible(one.texts[0])}" for one in self.items)
