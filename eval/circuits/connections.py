"""From measured sites to their connections: how much of the donor's difference arrives downstream of what is put in.

What is put in is the donor's activation at a causal site, or one token of the donor prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nla.eval.circuits import patching
from nla.eval.circuits.patching import Batch
from nla.eval.circuits.sites import CAUSAL, SiteMeasurements, TracedSite
from nla.eval.target import Patch, Target

MAX_CONNECTED = 32


class Arrival(NamedTuple):
    """How much of the donor's difference at a site is there when it is put in earlier: 0 none, 1 all of it."""

    point: str
    role: str
    shares: Float[Tensor, " n"]
    """For each pair; NaN where it lacks one of the two sites."""


@dataclass(frozen=True)
class Source:
    """Something put in, and what it brings about: a causal site, or one token of the donor prompt."""

    point: str | None
    """None: a token, exchanged in the prompt itself."""
    role: str
    columns: Int[Tensor, " n"]
    """Which token of each pair; −1: none."""
    effect: Float[Tensor, " n"]
    """E."""
    arrivals: list[Arrival]


def connect(target: Target, measured: SiteMeasurements, sites: Sequence[TracedSite]) -> list[Source]:
    """What causal sites, and the tokens in which the prompts differ, bring about: E, and what arrives at later sites.

    One forward pass for each source, over all pairs. At most the 32 strongest sites are connected.
    """
    causal = sorted((site for site in sites if site.verdict == CAUSAL), key=lambda site: -site.strength)
    chosen = [(measured.points.index(one.point), measured.roles.index(one.role)) for one in causal[:MAX_CONNECTED]]
    sources = []
    for columns in _differing_tokens(measured.batch):
        heads = [
            [*ids[:column], donor[column], *ids[column + 1 :]] if column >= 0 else ids
            for ids, donor, column in zip(measured.batch.base, measured.batch.donor, columns.tolist(), strict=True)
        ]
        m = patching.log_probabilities(target, heads, measured.batch.wanted).exp()
        effect = torch.where(columns >= 0, measured.bounds.effect(m), torch.nan)
        after = patching.read_sites(target, heads, measured.points, measured.columns)
        sources.append(
            Source(None, "token", columns, effect, [_arrival(measured, site, after, columns) for site in chosen])
        )
    for point, role in chosen:
        columns = measured.columns[:, role]
        patch = Patch(measured.points[point], columns.clamp(min=0), measured.vectors[1][:, point, role])
        after = patching.read_sites(target, measured.batch.base, measured.points, measured.columns, [patch])
        arrivals = [_arrival(measured, site, after, columns) for site in chosen if site[0] > point]
        effect = measured.sweep.effect[:, point, role]
        sources.append(Source(measured.points[point], measured.roles[role], columns, effect, arrivals))
    return sources


def _arrival(
    measured: SiteMeasurements, site: tuple[int, int], after: Float[Tensor, "n p r d"], columns: Int[Tensor, " n"]
) -> Arrival:
    """The share of the donor's difference at a site that is in the activations ``after``: a projection."""
    point, role = site
    base, donor = (side[:, point, role].double() for side in measured.vectors)
    difference = donor - base
    share = ((after[:, point, role].double() - base) * difference).sum(1) / difference.square().sum(1).clamp(min=1e-12)
    follows = (columns >= 0) & (measured.columns[:, role] >= columns)
    return Arrival(measured.points[point], measured.roles[role], torch.where(follows, share, torch.nan))


def _differing_tokens(batch: Batch) -> list[Int[Tensor, " n"]]:
    """The first, second, … token in which each pair's prompts differ; −1 where a pair has no more."""
    differing = [
        [column for column, (base, donor) in enumerate(zip(*pair, strict=True)) if base != donor]
        for pair in zip(batch.base, batch.donor, strict=True)
    ]
    most = max(map(len, differing), default=0)
    return [torch.tensor([row[k] if k < len(row) else -1 for row in differing]) for k in range(most)]
