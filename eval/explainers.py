"""Readers: whatever turns activations into explanations, behind one protocol, so that all are judged alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from jaxtyping import Float
from torch import Tensor

from nla.eval.couplet_items import RhymeItem
from nla.organisms.couplets import world
from nla.pair import encoder

if TYPE_CHECKING:
    from nla.autoencoder import NLA


class Reader(Protocol):
    """One explanation for each item's vector (n, d).

    A reader of activations looks at the vectors alone, a reader of text at the items' prompts alone.
    """

    def __call__(self, items: Sequence[RhymeItem], vectors: Float[Tensor, "n d"]) -> list[str]: ...


def encoder_reader(nla: NLA, greedy: bool = False, seed: int = 0) -> Reader:
    """The encoder of a pair: it sees the vectors and nothing of the items."""
    return lambda items, vectors: explain(nla, vectors, greedy, seed=seed)


def explain(
    nla: NLA, vectors: Float[Tensor, "n d"], greedy: bool = False, temperature: float = 1.0, seed: int = 0
) -> list[str]:
    """One explanation for each vector (n, d); of an answer that was cut off, what there is of it."""
    answers = nla.encoder.generate(vectors, samples=1, temperature=temperature, seed=seed, greedy=greedy)
    return [encoder.parse(text, nla.config) or encoder.strip_tags(text, nla.config) for text in answers.texts]


def hit_rate(nla: NLA) -> float | None:
    """How often a pair's warm-start texts had the latent right, as its training noted; None if it did not."""
    rate = nla.metrics.get("hit_rate")
    return float(rate) if isinstance(rate, int | float) else None


def truthful(items: Sequence[RhymeItem], vectors: Float[Tensor, "n d"]) -> list[str]:
    """The rule-based reader that knows the rule: the suite must score it near 1."""
    return [world.truthful(item.couplet, item.span) for item in items]


def lying(items: Sequence[RhymeItem], vectors: Float[Tensor, "n d"]) -> list[str]:
    """The rule-based reader whose every claim is false: the suite must score it near 0."""
    return [world.lying(item.couplet, item.span) for item in items]
