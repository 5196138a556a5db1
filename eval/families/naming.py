"""Causal rhyme items and a pair in; who names the planned word out: encoder, warm start, adversaries, baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nla.autoencoder import NLA
from nla.eval.couplet_items import RhymeItem, rhyme_items
from nla.eval.explainers import encoder_reader
from nla.eval.families import controls
from nla.eval.families.mention import MentionScore, score
from nla.eval.report import Figures
from nla.eval.target import Target, read_last
from nla.organisms.couplets import world
from nla.progress import Progress, silent
from nla.stats import holm, paired_permutation

SAMPLED, GREEDY, WARM, CONTINUED = "encoder (sampled)", "encoder (greedy)", "warm start", "warm start, continued"


@dataclass(frozen=True)
class NamingSettings:
    """How much is sampled and fitted."""

    n_samples: int = 4
    """Explanations of each activation at temperature 1."""
    hit_rate: float | None = None
    """Share of true plans in the warm-start texts; None: unknown."""
    n_fit: int = 4000
    """Other documents, on which the bag of words is fitted."""
    n_held_out: int = 50
    """Items with plans that the pair never saw."""
    seed: int = 0
    """Of samples, documents and intervals."""


@dataclass(frozen=True)
class Comparison:
    """The encoder's sampled naming against another reader's, on the same items."""

    other: str
    difference: float
    p_value: float
    """That the encoder names no more: one-sided paired permutation over items, Holm over all comparisons."""


@dataclass(frozen=True)
class Naming(Figures):
    """Who names the planned word, on the causal items."""

    derived = ("margin", "best_adversary")
    sampled: MentionScore
    greedy: MentionScore
    warm_start: MentionScore | None
    continued: MentionScore | None
    describer: MentionScore | None
    """Warm-start texts as the describer writes them: the hit rate q, on these items."""
    adversaries: list[MentionScore]
    baselines: list[MentionScore]
    held_out: list[MentionScore]
    """On items whose plan word the pair never saw: the encoder, and an outsider who knows the rhymes."""
    comparisons: list[Comparison]

    @property
    def margin(self) -> float:
        """Sampled naming minus the best adversary's: the headline."""
        return self.sampled.named.value - controls.best(self.adversaries).named.value

    @property
    def others(self) -> list[MentionScore]:
        """Every score on the causal items but the encoder's own."""
        optional = [score for score in (self.warm_start, self.continued, self.describer) if score is not None]
        return [*optional, *self.adversaries, *self.baselines]

    @property
    def best_adversary(self) -> str:
        """Which one that was."""
        return controls.best(self.adversaries).reader


def measure_naming(
    nla: NLA,
    target: Target,
    items: Sequence[RhymeItem],
    pairs: Mapping[str, NLA | None],
    settings: NamingSettings,
    progress: Progress = silent,
) -> Naming:
    """Score every reader on the same items.

    Args:
        pairs: the warm start and its continuation, by these names.
    """
    n_samples, seed = settings.n_samples, settings.seed
    vectors = read_last(target, [item.prompt for item in items])
    sampled = score(SAMPLED, encoder_reader(nla, seed=seed), items, vectors, n_samples, seed)
    greedy = score(GREEDY, encoder_reader(nla, greedy=True), items, vectors, 1, seed)
    progress("naming", 0.3)
    others = {
        name: None if pair is None else score(name, encoder_reader(pair, seed=seed), items, vectors, n_samples, seed)
        for name, pair in pairs.items()
    }
    describer = None
    if settings.hit_rate is not None:
        name = f"describer of the warm start (q = {settings.hit_rate:.2f})"
        reader = controls.describer(world.notice_of(settings.hit_rate), seed)
        describer = score(name, reader, items, vectors, n_samples, seed)
    adversaries = controls.adversaries(target, nla, items, vectors, n_samples, settings.n_fit, seed)
    progress("naming", 0.7)
    baselines = controls.baselines(nla, items, vectors, n_samples, seed)
    unseen = rhyme_items(settings.n_held_out, seed, world.HELD_OUT_PLANS)
    unseen_vectors = read_last(target, [item.prompt for item in unseen])
    held_out = [
        score(name, reader, unseen, unseen_vectors, n_samples, seed)
        for name, reader in (
            ("held-out plans: encoder (sampled)", encoder_reader(nla, seed=seed)),
            (f"held-out plans: {controls.OUTSIDER}", controls.describer(0.0, seed)),
        )
    ]
    progress("naming", 1.0)
    rivals = [rival for rival in (*others.values(), describer, *adversaries, *baselines) if rival is not None]
    return Naming(
        sampled=sampled,
        greedy=greedy,
        warm_start=others.get(WARM),
        continued=others.get(CONTINUED),
        describer=describer,
        adversaries=adversaries,
        baselines=baselines,
        held_out=held_out,
        comparisons=compare(sampled, rivals, seed),
    )


def compare(sampled: MentionScore, others: Sequence[MentionScore], seed: int) -> list[Comparison]:
    """The encoder's sampled naming against that of every other reader on the same items."""
    ours = torch.tensor(sampled.per_item)
    raw = [paired_permutation(ours, torch.tensor(other.per_item), None, "greater", seed=seed) for other in others]
    return [
        Comparison(other.reader, sampled.named.value - other.named.value, p_value)
        for other, p_value in zip(others, holm(raw), strict=True)
    ]
