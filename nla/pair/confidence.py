"""How far to trust an explanation: cosine, agreement across samples and the margin over the baselines, together."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from nla.errors import ArgumentError

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

        ====== ======= ========== =======
        level  cosine  agreement  margin
        ====== ======= ========== =======
        high   ≥ 0.80  ≥ 0.60     ≥ 0.15
        medium ≥ 0.50  ≥ 0.30     ≥ 0.05
        low    anything else
        ====== ======= ========== =======

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


def agreement(samples: Sequence[Sequence[str]]) -> float | None:
    """Mean overlap of claims between pairs of samples of one activation: 1 all alike, 0 nothing shared.

    The overlap of two samples is the Jaccard index of their sets of normalised claims; a sample without claims (an
    unparsable one) shares nothing with any, not even with another of its kind.

    Args:
        samples: the claims of each sample.

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
    sets = [{normalise(claim) for claim in claims} - {""} for claims in samples]
    overlaps = [len(a & b) / len(a | b) if a | b else 0.0 for a, b in combinations(sets, 2)]
    return math.fsum(overlaps) / len(overlaps)


def normalise(claim: str) -> str:
    """A claim as it is compared: lower case, single spaces, no punctuation at its ends.

    >>> normalise("  The next  line ends with Cat. ")
    'the next line ends with cat'
    """
    return re.sub(r"^\W+|\W+$", "", " ".join(claim.lower().split()))


def _reaches(numbers: tuple[float | None, ...], thresholds: tuple[float, ...]) -> bool:
    """Whether every number that is known reaches its threshold."""
    return all(number is None or number >= least for number, least in zip(numbers, thresholds, strict=True))
