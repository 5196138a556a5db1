"""Directions and what a target wrote under each in; whether an edit steers better than its controls out.

What the evaluations share that steer by edited explanations: on Couplets, and of any pair by the claims of its texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nla.eval.report import Rate
from nla.progress import Progress, silent
from nla.stats import holm, paired_permutation

if TYPE_CHECKING:
    from nla.autoencoder import NLA

EDIT = "edit"
MOVED_MIN = 0.9
"""The share of the items that a control must move, or it shows nothing."""
_STILL = 1e-6


@dataclass(frozen=True)
class SteeringArm:
    """What one kind of direction does to what is written, all at the same norm."""

    name: str
    n_moved: int
    """Items that the direction moves at all; a control that moves none shows nothing."""
    success: Rate
    """What is written has the new value."""
    changed: Rate
    """It is not what is written without steering: on Couplets, line 2 ends on another word."""
    p_value: float | None
    """That the edit does no better (one-sided paired permutation, Holm over the arms); None for the edit itself."""
    whole_line: Rate | None = None
    """On Couplets: line 2 is, word for word, the one that belongs to the new word."""
    nats: float | None = None
    """Of a real model: nats a token by which the target, unsteered, is surprised at what is written, a mean."""

    @property
    def moves(self) -> bool:
        """Whether the direction moves enough items to show anything."""
        return self.n_moved >= MOVED_MIN * self.success.n


class Outcome(NamedTuple):
    """What one kind of direction did to each item; see :class:`SteeringArm`."""

    moved: Bool[Tensor, " n"]
    success: Bool[Tensor, " n"]
    changed: Bool[Tensor, " n"]
    whole_line: Bool[Tensor, " n"] | None = None
    nats: Float[Tensor, " n"] | None = None


def steering_arms(outcomes: Mapping[str, Outcome], seed: int = 0) -> dict[str, SteeringArm]:
    """Every arm with its rates, Wilson intervals, and its test against the edit, which is one of them."""
    names = [name for name in outcomes if name != EDIT]
    ours = outcomes[EDIT].success.double()
    raw = [paired_permutation(ours, outcomes[name].success.double(), None, "greater", seed=seed) for name in names]
    p_values = dict(zip(names, holm(raw), strict=True))
    return {
        name: SteeringArm(
            name=name,
            n_moved=int(one.moved.sum()),
            success=Rate.of(one.success.tolist()),
            changed=Rate.of(one.changed.tolist()),
            p_value=p_values.get(name),
            whole_line=None if one.whole_line is None else Rate.of(one.whole_line.tolist()),
            nats=None if one.nats is None else float(one.nats.mean()),
        )
        for name, one in outcomes.items()
    }


def strongest(
    strengths: Sequence[float], success: Callable[[float], float], progress: Progress = silent
) -> tuple[float, dict[str, float]]:
    """The strength of the highest success, of equal ones the least, and the success of each by its name."""
    tried = {}
    for number, strength in enumerate(strengths):
        tried[strength] = success(strength)
        progress("strength", (number + 1) / len(strengths))
    best = max(tried, key=lambda strength: (tried[strength], -strength))
    return best, {str(strength): share for strength, share in tried.items()}


def difference(nla: NLA, texts: Sequence[str], changed: Sequence[str | None]) -> Float[Tensor, "n d"]:
    """Decoded changed texts minus decoded texts; zero where there is no changed text."""
    new = [before if after is None else after for before, after in zip(texts, changed, strict=True)]
    return nla.reconstruct(new, strict=False) - nla.reconstruct(texts, strict=False)


def borrowed(
    wanted: Sequence[str], others: Sequence[str], edits: Float[Tensor, "m d"], generator: torch.Generator
) -> Float[Tensor, "n d"]:
    """For each item the edit of one of ``others`` that wants another value; zero where all want the same."""
    allowed = torch.tensor([[value != other for other in others] for value in wanted]).float()
    able = allowed.any(1)
    chosen = torch.zeros(len(wanted), edits.shape[1])
    if able.any():
        chosen[able] = edits[torch.multinomial(allowed[able], 1, generator=generator)[:, 0]]
    return chosen


def moved(directions: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
    """The items that a direction moves at all."""
    return directions.norm(dim=1) > _STILL
