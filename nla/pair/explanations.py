"""Explanations: per activation the sampled texts, how well each reconstructs it, and how far to trust them: cosine,
agreement across samples and the margin over the baselines, together."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple, overload

from jaxtyping import Float
from torch import Tensor

from nla.errors import ArgumentError, visible
from nla.models.read import Activations
from nla.text.claims import claims
from nla.text.tokens import Span

LEVELS = ("low", "medium", "high")

# (cosine, agreement, margin) that each level needs at least; see Trust.of for why the margin decides.
_MEDIUM = (0.5, 0.3, 0.05)
_HIGH = (0.8, 0.6, 0.15)


class Trust(NamedTuple):
    """A level, "low", "medium" or "high", and the three numbers it comes from."""

    level: str
    cosine: float
    agreement: float | None
    margin: float

    @classmethod
    def of(cls, cosine: float, agreement: float | None, margin: float) -> Trust:
        """The level that all three numbers reach: a chain as strong as its weakest link.

        | level  | cosine | agreement | margin |
        |--------|--------|-----------|--------|
        | high   | ≥ 0.80 | ≥ 0.60    | ≥ 0.15 |
        | medium | ≥ 0.50 | ≥ 0.30    | ≥ 0.05 |
        | low    | anything else |    |        |

        A high cosine alone is no evidence: where activations share a direction, a constant text reaches it too, and
        then the margin is near 0. A sample that no other sample repeats may be a confabulation, so without an agreement
        (one sample) the level is at most "medium". A number that is NaN reaches no level.

        Args:
            cosine: mean over samples of the cosine between activation and reconstruction, in [-1, 1].
            agreement: what :func:`agreement` gives, in [0, 1], or None.
            margin: mean cosine minus that of the best baseline (empty, mean) on the same activation.

        The thresholds are conventions, not calibrated probabilities.
        """
        if _reaches((cosine, agreement, margin), _HIGH) and agreement is not None:
            level = "high"
        elif _reaches((cosine, agreement, margin), _MEDIUM):
            level = "medium"
        else:
            level = "low"
        return cls(level, cosine, agreement, margin)

    def __str__(self) -> str:
        agreement = "–" if self.agreement is None else f"{self.agreement:.2f}"
        return f"{self.level} (cosine {self.cosine:.2f}, agreement {agreement}, margin {self.margin:+.2f})"


def agreement(samples: Sequence[str | Sequence[str]]) -> float | None:
    """Mean overlap of claims between pairs of samples of one activation: 1 all alike, 0 nothing shared.

    The overlap of two samples is the Jaccard index of their sets of normalised claims; a sample without claims (an
    unparsable one) shares nothing with any, not even with another of its kind.

    Args:
        samples: the claims of each sample; a bare string is one claim.

    Returns:
        In [0, 1]; None for a single sample, which cannot agree or disagree.

    Raises:
        ArgumentError: no samples.

    >>> agreement([["It is spring.", "Anna is here."], ["it is spring", "Bob is here."]])
    0.3333333333333333
    """
    if not samples:
        raise ArgumentError("no samples", "at least 1", "explain the activation with samples=2 or more")
    if len(samples) == 1:
        return None
    lists = [[claims] if isinstance(claims, str) else claims for claims in samples]
    sets = [{normalise(claim) for claim in claims} - {""} for claims in lists]
    overlaps = [len(a & b) / len(a | b) if a | b else 0.0 for a, b in combinations(sets, 2)]
    return math.fsum(overlaps) / len(overlaps)


def judge(
    texts: Sequence[str],
    complete: Sequence[bool],
    cosines: Float[Tensor, "n s"],
    baselines: Float[Tensor, " n"],
    acts: Activations | None,
) -> Explanations:
    """The explanations of n activations from s samples of each, activation by activation.

    Args:
        complete: per sample, it is one whole explanation.
        cosines: of each activation with the reconstruction from each of its samples.
        baselines: the highest cosine that a text reaches which knows nothing of the activation.
        acts: the tokens that were read, if known.
    """
    judged, samples = [], cosines.shape[1]
    for row, (of_row, baseline) in enumerate(zip(cosines.tolist(), baselines.tolist(), strict=True)):
        written = list(texts[row * samples : (row + 1) * samples])
        mean = sum(of_row) / samples
        trust = Trust.of(mean, agreement([claims(text) for text in written]), mean - baseline)
        one = Explanation(written, list(complete[row * samples : (row + 1) * samples]), of_row, trust)
        if acts is not None:
            one.span, one.document, one.stratum = acts.spans[row], int(acts.document[row]), acts.strata[row]
        judged.append(one)
    return Explanations(judged)


def normalise(claim: str) -> str:
    """A claim as it is compared: lower case, single spaces, no punctuation at its ends.

    >>> normalise("  The next  line ends with Cat. ")
    'the next line ends with cat'
    """
    return re.sub(r"^\W+|\W+$", "", " ".join(claim.lower().split()))


def _reaches(numbers: tuple[float | None, ...], thresholds: tuple[float, ...]) -> bool:
    """Whether every number that is known reaches its threshold."""
    return all(number is None or number >= least for number, least in zip(numbers, thresholds, strict=True))


_OF_SPAN = ("token_id", "index", "start", "end", "fragment", "fragments")
"""What a row says of its token beside its text: its characters, from ``start`` to ``end``, and which part of how many
it is, where several tokens share one."""


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

    def to_json(self) -> dict[str, object]:
        """A JSON-ready dict."""
        return {
            "token": self.token,
            **dict.fromkeys(_OF_SPAN),
            **({} if self.span is None else {name: getattr(self.span, name) for name in _OF_SPAN}),
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

    @overload
    def __getitem__(self, index: int) -> Explanation: ...

    @overload
    def __getitem__(self, index: slice) -> Explanations: ...

    def __getitem__(self, index: int | slice) -> Explanation | Explanations:
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

    def to_json(self) -> list[dict[str, object]]:
        """A JSON-ready list."""
        return [one.to_json() for one in self.items]

    def __str__(self) -> str:
        return "\n".join(f"{visible(one.token)}  {one.trust.level}  {visible(one.texts[0])}" for one in self.items)
