"""Sites of a trace: one point and one kind of token each, ranked, patched, tested against controls, and connected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nla.errors import ArgumentError
from nla.eval.circuits import patching
from nla.eval.circuits.gate import CONTROL_PERCENTILE, MIN_EFFECT
from nla.eval.circuits.minimal_pairs import MinimalPair, role_columns
from nla.eval.circuits.patching import Batch, Scale, Sweep
from nla.eval.report import Figures, Rate
from nla.eval.target import Patch, Progress, Target, silent
from nla.stats import Interval, bootstrap, holm

CAUSAL, WEAK, NONE, UNMEASURED = "causal", "weak", "no effect", "not measured"
MIN_WEAK = 0.01
ALPHA = 0.05
FEW_DOCUMENTS = 8
N_CONTROLS, N_CONTROLS_FEW = 4, 19
_N_DRAWS = 20_000
_DRAWS_AT_ONCE = 2_000
_MAX_CONNECTED = 32


@dataclass(frozen=True)
class Site(Figures):
    """One point and one kind of token, measured over all pairs that have it."""

    point: str
    role: str
    attribution: float
    """Mean first-order estimate of the change in log m."""

    rank: int
    """Among all sites by the size of the attribution, from 1."""

    effect: Rate | None
    """Mean E of the donor's activation; None: not measured, being outside the shortlist."""

    share: float
    """Share of pairs whose own E is 0.3 or more: a small mean may be a large effect in few of them."""

    control: float
    """Mean E of random directions of equal norm."""

    control_bar: float
    """95th percentile of these, over pairs and directions."""

    p_value: float | None
    """That the donor's direction does no more than random ones, after Holm over all sites that were ranked; None: not
    measured, or too few."""

    verdict: str
    """"causal", "weak", "no effect" or "not measured"."""


@dataclass(frozen=True)
class Measured:
    """The tensors of a trace: n pairs, p points, r roles."""

    pairs: list[MinimalPair]
    """Those whose prompts the target tells apart."""
    batch: Batch
    points: list[str]
    roles: list[str]
    columns: Tensor
    """(n, r) token of each role; −1: none."""
    bounds: Scale
    vectors: tuple[Tensor, Tensor]
    """Activations of base and donor, (n, p, r, d)."""
    attribution: Tensor
    """(n, p, r)."""
    live: Tensor
    """(p, r): whether some pair's token is not before its first difference. What is not live has no effect."""
    sweep: Sweep


class Arrival(NamedTuple):
    """How much of the donor's difference at a site is there when it is put in earlier: 0 none, 1 all of it."""

    point: str
    role: str
    values: Tensor
    """(n,) for each pair; NaN where it lacks one of the two."""


@dataclass(frozen=True)
class Source:
    """Something put in, and what it brings about: a causal site, or one token of the donor prompt."""

    point: str | None
    """None: a token, exchanged in the prompt itself."""
    role: str
    columns: Tensor
    """(n,) which token of each pair; −1: none."""
    effect: Tensor
    """(n,) E."""
    arrivals: list[Arrival]


def measure(
    target: Target,
    pairs: Sequence[MinimalPair],
    n_sites: int,
    n_controls: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Measured:
    """Read, rank and patch; pairs between whose prompts the target makes too little difference are left out.

    Args:
        n_sites: patch so many sites at most, those of the largest mean attribution.
        n_controls: random directions at each site of each pair; None: 4, or 19 below 8 documents.

    Raises:
        ArgumentError: no pair is usable.
        ShapeError, PositionError: see :func:`nla.eval.patching.encode` and :func:`nla.eval.pairs.role_columns`.
    """
    bounds = patching.scale(target, encode(target, pairs))
    kept = [pair for pair, able in zip(pairs, bounds.usable.tolist(), strict=True) if able]
    if not kept:
        raise ArgumentError(
            f"{len(pairs)} pairs, none of which the target tells apart (the donor's continuation has probability "
            f"{float(bounds.low.max()):.3f} after the prompt, {float(bounds.high.max()):.3f} after the donor prompt)",
            f"a difference of at least {patching.MIN_RANGE} between the two",
            "give continuations that the target really writes, white space included",
        )
    bounds = Scale(bounds.low[bounds.usable], bounds.high[bounds.usable])
    batch, points = encode(target, kept), target.points
    roles, columns = role_columns(target, kept, batch)
    base, donor = (patching.read_sites(target, ids, points, columns) for ids in (batch.base, batch.donor))
    score = patching.attribution(target, batch, points, columns, donor - base)
    progress("attribution", 1.0)
    live = (columns >= patching.first_difference(batch)[:, None]).any(0).expand(len(points), len(roles))
    order = (score.sum(0).abs() * live).flatten().argsort(descending=True)[:n_sites]
    chosen = torch.zeros(live.numel(), dtype=torch.bool).index_fill(0, order, True).reshape(live.shape) & live
    few = len({pair.document for pair in kept}) < FEW_DOCUMENTS
    n_controls = (N_CONTROLS_FEW if few else N_CONTROLS) if n_controls is None else n_controls
    sweep = patching.sweep(target, batch, points, columns, (base, donor), chosen, n_controls, seed, bounds, progress)
    return Measured(kept, batch, points, roles, columns, bounds, (base, donor), score, live, sweep)


def encode(target: Target, pairs: Sequence[MinimalPair]) -> Batch:
    """Pairs for the patching engine."""
    return patching.encode(
        target,
        [pair.prompt for pair in pairs],
        [pair.donor_prompt for pair in pairs],
        [pair.donor_continuation for pair in pairs],
    )


def judge(found: Measured, seed: int = 0) -> list[Site]:
    """Every site's figures and verdict, point by point and role by role.

    With too few documents and controls for a test a site counts only if, in every pair, it beats every control.
    """
    n_sites = len(found.points) * len(found.roles)
    places = [divmod(number, len(found.roles)) for number in range(n_sites)]
    measured = [place for place in places if not _effects(found, *place)[0].isnan().all()]
    tested, documents, n_draws = testable(found), _documents(found), _n_draws(found)
    raw = {
        place: above_controls(*_effects(found, *place), documents, n_draws, seed) if tested else 1.0
        for place in measured
    }
    # The shortlist is drawn from the same pairs, so that a site left out of it is a test too.
    left_out = [1.0] * (int(found.live.sum()) - len(raw))
    adjusted = dict(zip(raw, holm([*raw.values(), *left_out]), strict=False)) if tested else {}
    strength = (found.attribution.nanmean(0).abs()).flatten()
    ranks = torch.empty(n_sites, dtype=torch.long)
    ranks[strength.argsort(descending=True)] = torch.arange(1, n_sites + 1)
    return [
        _site(found, place, rank, adjusted.get(place), place in raw, tested, seed)
        for place, rank in zip(places, ranks.tolist(), strict=True)
    ]


def testable(found: Measured) -> bool:
    """Whether documents and controls are enough for p ≤ 0.05 after Holm over all sites that were ranked.

    The smallest p that a randomisation can give decides.
    """
    n_controls, n_documents = found.sweep.controls.shape[-1], len(_documents(found).unique())
    smallest = max((n_controls + 1.0) ** -n_documents, 1 / (_n_draws(found) + 1))
    return smallest * max(1, int(found.live.sum())) <= ALPHA


def _n_draws(found: Measured) -> int:
    """Draws enough that the smallest p is well below α after Holm, however many sites there are."""
    needed = max(_N_DRAWS, int(2 * int(found.live.sum()) / ALPHA))
    return -(-needed // _DRAWS_AT_ONCE) * _DRAWS_AT_ONCE


def _documents(found: Measured) -> Tensor:
    return torch.tensor([pair.document for pair in found.pairs])


def _effects(found: Measured, point: int, role: int) -> tuple[Tensor, Tensor]:
    return found.sweep.effect[:, point, role], found.sweep.controls[:, point, role]


def _site(
    found: Measured, place: tuple[int, int], rank: int, p_value: float | None, measured: bool, tested: bool, seed: int
) -> Site:
    effect, controls = _effects(found, *place)
    there = ~effect.isnan()
    name = (found.points[place[0]], found.roles[place[1]], float(found.attribution[:, place[0], place[1]].mean()), rank)
    if not measured:
        # Before the first difference the donor's activation is the prompt's own: no effect, by causality.
        live = bool(found.live[place])
        effect_there = None if live else Rate(0.0, 0.0, 0.0, len(found.pairs))
        return Site(*name, effect_there, 0.0, 0.0, 0.0, None, UNMEASURED if live else NONE)
    mean = Rate.clustered(effect[there], _documents(found)[there], seed)
    above = p_value <= ALPHA if p_value is not None else bool((effect[there, None] > controls[there]).all())
    low = mean.low if tested and mean.low == mean.low else mean.value
    verdict = CAUSAL if above and mean.value >= MIN_EFFECT else WEAK if above and low >= MIN_WEAK else NONE
    draws = controls[there].flatten()
    share = float((effect[there] >= MIN_EFFECT).double().mean())
    return Site(*name, mean, share, float(draws.mean()), float(draws.quantile(CONTROL_PERCENTILE)), p_value, verdict)


def above_controls(
    effect: Tensor, controls: Tensor, documents: Tensor | None = None, n_draws: int = _N_DRAWS, seed: int = 0
) -> float:
    """p-value of "the donor's direction is like a random one" from effects (n,) and controls (n, c), one-sided.

    Under it, which of its c + 1 effects is a document's own is arbitrary: the sum over documents is held against sums
    with one drawn from each, for all pairs of a document alike. Pairs without a value (NaN) are left out. In (0, 1],
    the observed one counted too.

    Args:
        documents: (n,) of each pair; None: each its own.
        n_draws: a multiple of 2,000.
    """
    there = ~effect.isnan()
    each = torch.cat([effect[there, None], controls[there]], 1)
    labels = torch.arange(len(effect)) if documents is None else documents
    index = labels[there].unique(return_inverse=True)[1]
    pool = torch.zeros(int(index.max()) + 1, each.shape[1], dtype=each.dtype).index_add_(0, index, each)
    observed, rows = pool[:, 0].sum(), torch.arange(len(pool))
    slack = 1e-12 * float(pool.abs().sum())
    generator, extreme = torch.Generator().manual_seed(seed), 0
    for _ in range(n_draws // _DRAWS_AT_ONCE):
        picked = torch.randint(pool.shape[1], (_DRAWS_AT_ONCE, len(pool)), generator=generator)
        extreme += int((pool[rows, picked].sum(1) >= observed - slack).sum())
    return (1 + extreme) / (1 + n_draws)


def agreement(found: Measured, seed: int = 0) -> Interval | None:
    """Rank correlation (Spearman) of mean attribution and mean measured change of log m; None below three sites."""
    # A site's change is its log m less that of the prompt, which is the same for all sites: ranks do without it.
    change = found.sweep.log_probability
    whole = ~change.isnan().any(0).flatten()
    if int(whole.sum()) < 3:
        return None
    values = torch.cat([found.attribution.flatten(1)[:, whole], change.flatten(1)[:, whole]], 1)
    documents = [pair.document for pair in found.pairs]
    return bootstrap(values, documents, lambda mean: _spearman(*mean.chunk(2, -1)), seed=seed)


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    ranks = [value.argsort(-1).argsort(-1).double() for value in (a, b)]
    left, right = (rank - rank.mean(-1, keepdim=True) for rank in ranks)
    return (left * right).sum(-1) / (left.square().sum(-1) * right.square().sum(-1)).sqrt()


def connect(target: Target, found: Measured, sites: Sequence[Site]) -> list[Source]:
    """What causal sites, and the tokens in which the prompts differ, bring about: E, and what arrives at later sites.

    One forward pass for each source, over all pairs. At most the 32 strongest sites are connected.
    """
    causal = sorted((site for site in sites if site.verdict == CAUSAL), key=lambda site: -site.effect.value)  # type: ignore[union-attr]
    chosen = [(found.points.index(one.point), found.roles.index(one.role)) for one in causal[:_MAX_CONNECTED]]
    sources = []
    for column in _differing(found.batch):
        heads = [
            [*ids[:place], other[place], *ids[place + 1 :]] if place >= 0 else ids
            for ids, other, place in zip(found.batch.base, found.batch.donor, column.tolist(), strict=True)
        ]
        m = patching.log_probabilities(target, heads, found.batch.wanted).exp()
        effect = torch.where(column >= 0, found.bounds.effect(m), torch.nan)
        after = patching.read_sites(target, heads, found.points, found.columns)
        arrived = [_arrival(found, place, after, column) for place in chosen]
        sources.append(Source(None, "token", column, effect, arrived))
    for point, role in chosen:
        column = found.columns[:, role]
        patch = Patch(found.points[point], column.clamp(min=0), found.vectors[1][:, point, role])
        after = patching.read_sites(target, found.batch.base, found.points, found.columns, [patch])
        later = [place for place in chosen if place[0] > point]
        arrived = [_arrival(found, place, after, column) for place in later]
        effect = found.sweep.effect[:, point, role]
        sources.append(Source(found.points[point], found.roles[role], column, effect, arrived))
    return sources


def _arrival(found: Measured, place: tuple[int, int], after: Tensor, column: Tensor) -> Arrival:
    """The share of the donor's difference at a site that is in ``after`` (n, p, r, d): a projection."""
    point, role = place
    base, donor = (side[:, point, role].double() for side in found.vectors)
    difference = donor - base
    share = ((after[:, point, role].double() - base) * difference).sum(1) / difference.square().sum(1).clamp(min=1e-12)
    there = (column >= 0) & (found.columns[:, role] >= column)
    return Arrival(found.points[point], found.roles[role], torch.where(there, share, torch.nan))


def _differing(batch: Batch) -> list[Tensor]:
    """The first, second, … token (n,) in which each pair's prompts differ; −1 where a pair has no more."""
    places = [
        [i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b]
        for pair in zip(batch.base, batch.donor, strict=True)
    ]
    most = max(map(len, places), default=0)
    return [torch.tensor([row[k] if k < len(row) else -1 for row in places]) for k in range(most)]
