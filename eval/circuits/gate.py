"""Is a latent used? The gate of three rungs that every item passes or not, and a map of where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nla.eval.circuits import patching
from nla.eval.circuits.minimal_pairs import encode_pairs, token_roles
from nla.eval.circuits.patching import random_difference, unrelated
from nla.eval.couplet_items import RhymeItem
from nla.eval.items import Item
from nla.eval.target import Patch, Target, write
from nla.progress import Progress, silent

CAUSAL, ELSEWHERE, UNUSED, WRONG = "causal", "used, not at this point", "present, maybe unused", "behaviour wrong"
MIN_EFFECT = 0.3
CONTROL_PERCENTILE = 0.95
_CONTROLS = ("control", "control_all_points")


@dataclass(frozen=True)
class ItemGate:
    """One item's gate: three rungs and the verdict.

    Effect E = (m_patched − m_base) / (m_donor − m_base), m the probability that the target writes the donor's
    continuation; 0 is no effect, 1 is the donor's own behaviour.
    """

    document: int
    behaviour: bool
    """Rung 1: greedy continuation is exactly right."""
    effect_all_points: float
    """Rung 2: E of the donor's token patched at every point."""
    effect: float
    """Rung 3: E of the donor's token patched at the NLA's own point."""
    control: float
    """95th percentile of E over the norm-matched random and unrelated-donor patches at the point."""
    control_all_points: float
    """The same of such patches at every point."""
    verdict: str


@dataclass(frozen=True)
class Gate:
    """The gate of all items."""

    point: str
    n_controls: int
    items: list[ItemGate]

    @property
    def causal(self) -> list[int]:
        """Rows of the causal items."""
        return [row for row, item in enumerate(self.items) if item.verdict == CAUSAL]

    def counts(self) -> dict[str, int]:
        """How many items have each verdict."""
        verdicts = [item.verdict for item in self.items]
        return {verdict: verdicts.count(verdict) for verdict in (CAUSAL, ELSEWHERE, UNUSED, WRONG)}

    def to_json(self) -> dict[str, Any]:
        """Counts, mean effects, the largest of the controls' bars, and every item."""
        mean = {
            name: sum(getattr(item, name) for item in self.items) / len(self.items)
            for name in ("behaviour", "effect_all_points", "effect", *_CONTROLS)
        }
        return {
            "point": self.point,
            "n_controls": self.n_controls,
            "counts": self.counts(),
            "mean": mean,
            "largest": {name: max(getattr(item, name) for item in self.items) for name in _CONTROLS},
            "items": [asdict(item) for item in self.items],
        }


def verdict_of(
    behaviour: bool, effect_all_points: float, effect: float, control: float, control_all_points: float
) -> str:
    """The verdict of one item: a rung needs E ≥ 0.3, and more than its own controls have."""
    if not behaviour:
        return WRONG
    if effect >= MIN_EFFECT and effect > control:
        return CAUSAL
    return ELSEWHERE if effect_all_points >= MIN_EFFECT and effect_all_points > control_all_points else UNUSED


@dataclass(frozen=True)
class GatedPairs:
    """Minimal pairs of any family whose latent is known: one entry for each pair."""

    batch: patching.Batch
    columns: Int[Tensor, " n"]
    """The token that carries the latent."""
    behaviour: Sequence[bool]
    """Whether the target's own continuation is right."""
    words: Sequence[str]
    """The latent."""
    related: Sequence[Sequence[str]]
    """Words that an unrelated pair must not have."""
    documents: Sequence[int]
    """Number of the pair."""


def gate_items(
    target: Target, items: Sequence[Item], n_controls: int = 20, seed: int = 0, progress: Progress = silent
) -> Gate:
    """The three rungs for every rhyme item, at its prompt's last token."""
    batch = encode_pairs(target, items)
    lines = write(target, [item.prompt for item in items])
    pairs = GatedPairs(
        batch=batch,
        columns=torch.tensor([len(ids) - 1 for ids in batch.base]),
        behaviour=[text == item.continuation for text, item in zip(lines, items, strict=True)],
        words=[item.target for item in items],
        related=[(item.target, *item.distractors) for item in items],
        documents=[item.document for item in items],
    )
    return gate_pairs(target, pairs, n_controls, seed, progress)


def gate_pairs(
    target: Target, pairs: GatedPairs, n_controls: int = 20, seed: int = 0, progress: Progress = silent
) -> Gate:
    """The three rungs for minimal pairs of any family.

    Each patch has ``n_controls`` to compare with, at the same points: half random, half of an unrelated pair.
    """
    batch, columns = pairs.batch, pairs.columns
    point = str(target.point)
    base, donor = (
        patching.read_sites(target, ids, target.points, columns[:, None])[:, :, 0] for ids in (batch.base, batch.donor)
    )
    bounds, everywhere = patching.scale(target, batch), list(range(len(target.points)))

    def effect_of(vectors: Float[Tensor, "n p d"], layers: Sequence[int]) -> Float[Tensor, " n"]:
        """E of vectors at some of the points."""
        patches = [Patch(target.points[layer], columns, vectors[:, i]) for i, layer in enumerate(layers)]
        return bounds.effect(patching.log_probabilities(target, batch.base, batch.wanted, patches).exp())

    def control_of(layers: Sequence[int], done: int) -> Float[Tensor, " n"]:
        """What 95 % of the controls at these points stay below."""
        generator, effects = torch.Generator().manual_seed(seed), []
        for number in range(n_controls):
            if number % 2:
                vectors = base[unrelated(pairs.words, pairs.related, generator)][:, layers]
            else:
                vectors = random_difference(base[:, layers], donor[:, layers], generator)
            effects.append(effect_of(vectors, layers))
            progress("gate", (done + number + 1) / (2 * n_controls))
        return torch.stack(effects).quantile(CONTROL_PERCENTILE, dim=0)

    here = [target.points.index(point)]
    rungs = (
        effect_of(donor, everywhere),
        effect_of(donor[:, here], here),
        control_of(here, 0),
        control_of(everywhere, n_controls),
    )
    items, usable = [], bounds.usable.tolist()
    for row, (effect_all, effect, bar, bar_all) in enumerate(torch.stack(rungs, dim=1).tolist()):
        behaviour = pairs.behaviour[row]
        verdict = verdict_of(behaviour and usable[row], effect_all, effect, bar, bar_all)
        items.append(ItemGate(pairs.documents[row], behaviour, effect_all, effect, bar, bar_all, verdict))
    return Gate(point, n_controls, items)


@dataclass(frozen=True)
class PatchMap:
    """Mean effect E of the donor patched at one point and one kind of token: values[point][token]."""

    points: list[str]
    tokens: list[str]
    values: list[list[float]]

    def to_json(self) -> dict[str, Any]:
        """Axes and values."""
        return asdict(self)


def patch_map(target: Target, items: Sequence[RhymeItem], progress: Progress = silent) -> PatchMap:
    """Where the latent is used: E of the minimal donor patched at every point × token of line 1.

    Raises:
        ShapeError: a donor prompt is longer or shorter than its item's, so that tokens do not correspond.
    """
    batch = encode_pairs(target, items)
    roles = [token_roles(target, item) for item in items]
    tokens = list(roles[0])
    columns = torch.tensor([[column_of[token] for token in tokens] for column_of in roles])
    base, donor = (patching.read_sites(target, ids, target.points, columns) for ids in (batch.base, batch.donor))
    sweep = patching.sweep(
        target, batch, target.points, columns, (base, donor), progress=lambda _, done: progress("patch map", done)
    )
    return PatchMap(target.points, tokens, sweep.effect.mean(0).tolist())
