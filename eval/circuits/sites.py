"""Sites of a trace: one point and one kind of token each, ranked by attribution, patched, and tested against controls.

In go minimal pairs of a target; out come the measurements of every site, and its verdict.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nla.errors import ArgumentError
from nla.eval.circuits import patching
from nla.eval.circuits.gate import CONTROL_PERCENTILE, MIN_EFFECT
from nla.eval.circuits.minimal_pairs import MinimalPair, encode_pairs, role_columns
from nla.eval.circuits.patching import Batch, Scale, Sweep
from nla.eval.report import Figures, Rate
from nla.eval.target import Target
from nla.progress import Progress, silent
from nla.stats import Interval, bootstrap, holm, spearman
from nla.text.tokens import plain_ids

CAUSAL, WEAK, NONE, UNMEASURED = "causal", "weak", "no effect", "not measured"
MIN_WEAK = 0.01
ALPHA = 0.05
FEW_DOCUMENTS = 8
N_CONTROLS, N_CONTROLS_FEW = 4, 19
_N_DRAWS = 20_000
_DRAWS_AT_ONCE = 2_000


@dataclass(frozen=True)
class TracedSite(Figures):
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
    """Mean E of the controls: random directions of equal norm, and activations of unrelated pairs."""

    control_bar: float
    """95th percentile of these, over pairs and controls."""

    p_value: float | None
    """That the donor's activation does no more than the controls, after Holm over all sites that were ranked; None: not
    measured, or too few."""

    verdict: str
    """"causal", "weak", "no effect" or "not measured"."""

    @property
    def strength(self) -> float:
        """The mean effect; 0 where it was not measured."""
        return 0.0 if self.effect is None else self.effect.value


@dataclass(frozen=True)
class SiteMeasurements:
    """The tensors of a trace: n pairs, p points, r roles."""

    pairs: list[MinimalPair]
    """Those whose prompts the target tells apart."""
    batch: Batch
    points: list[str]
    roles: list[str]
    columns: Int[Tensor, "n r"]
    """Token of each role; −1: none."""
    bounds: Scale
    vectors: tuple[Float[Tensor, "n p r d"], Float[Tensor, "n p r d"]]
    """Activations of base and donor."""
    attribution: Float[Tensor, "n p r"]
    live: Bool[Tensor, "p r"]
    """Whether some pair's token is not before its first difference. What is not live has no effect."""
    sweep: Sweep
    everywhere: Float[Tensor, "n r"]
    """E of the donor's activations at every point of one token at once."""
    n_unrelated: int
    """How many of the controls are activations of unrelated pairs."""
    behaviour: Rate
    """Share of all prompts and donor prompts given after which the target, greedy, writes the continuation."""

    @property
    def documents(self) -> Int[Tensor, " n"]:
        """The document of each pair."""
        return torch.tensor([pair.document for pair in self.pairs])

    @property
    def n_live(self) -> int:
        """Sites that can have an effect: so many tests there are, whatever the shortlist."""
        return int(self.live.sum())

    @property
    def n_measured(self) -> int:
        """Sites at which patches were made."""
        return int((~self.sweep.effect.isnan().all(0)).sum())

    @property
    def n_controls(self) -> int:
        """Controls at each site of each pair."""
        return self.sweep.controls.shape[-1]

    @property
    def n_draws(self) -> int:
        """Draws of a randomisation: enough that the smallest p is well below α after Holm over all live sites."""
        needed = max(_N_DRAWS, int(2 * self.n_live / ALPHA))
        return -(-needed // _DRAWS_AT_ONCE) * _DRAWS_AT_ONCE

    @property
    def testable(self) -> bool:
        """Whether documents and controls are enough for p ≤ 0.05 after Holm over all sites that were ranked.

        The smallest p that a randomisation can give decides.
        """
        smallest = max((self.n_controls + 1.0) ** -len(self.documents.unique()), 1 / (self.n_draws + 1))
        return smallest * max(1, self.n_live) <= ALPHA

    def effects(self, point: int, role: int) -> tuple[Float[Tensor, " n"], Float[Tensor, "n c"]]:
        """E of the donor's activation and of the controls at one site; NaN where it was not measured."""
        return self.sweep.effect[:, point, role], self.sweep.controls[:, point, role]


def measure_sites(
    target: Target,
    pairs: Sequence[MinimalPair],
    n_sites: int,
    n_controls: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> SiteMeasurements:
    """Read, rank and patch; pairs between whose prompts the target makes too little difference are left out.

    Args:
        n_sites: patch so many sites at most, those of the largest mean attribution.
        n_controls: at each site of each pair; None: 4, or 19 below 8 documents. Half of them are activations of
            unrelated pairs, as far as every pair has some; the others are random directions.

    Raises:
        ArgumentError: no pair is usable.
        ShapeError, PositionError: see :func:`nla.eval.circuits.patching.encode` and
            :func:`nla.eval.circuits.minimal_pairs.role_columns`.
    """
    given = encode_pairs(target, pairs)
    bounds = patching.scale(target, given)
    kept = [pair for pair, usable in zip(pairs, bounds.usable.tolist(), strict=True) if usable]
    if not kept:
        raise ArgumentError(
            f"{len(pairs)} pairs, none of which the target tells apart (the donor's continuation has probability "
            f"{float(bounds.low.max()):.3f} after the prompt, {float(bounds.high.max()):.3f} after the donor prompt)",
            f"a difference of at least {patching.MIN_RANGE} between the two",
            "give continuations that the target really writes, white space included",
        )
    own = plain_ids(target.tokenizer, [pair.continuation for pair in pairs])
    sides = ((given.base, own), (given.donor, given.wanted))
    right = torch.stack([patching.writes(target, *side) for side in sides], 1).double().mean(1)
    behaviour = Rate.clustered(right, [pair.document for pair in pairs], seed)
    bounds = Scale(bounds.low[bounds.usable], bounds.high[bounds.usable])
    batch, points = encode_pairs(target, kept), target.points
    roles, columns = role_columns(target, kept, batch)
    base, donor = (patching.read_sites(target, ids, points, columns) for ids in (batch.base, batch.donor))
    score = patching.attribution(target, batch, points, columns, donor - base)
    progress("attribution", 1.0)
    live = (columns >= patching.first_difference(batch)[:, None]).any(0).expand(len(points), len(roles))
    order = (score.sum(0).abs() * live).flatten().argsort(descending=True)[:n_sites]
    shortlist = torch.zeros(live.numel(), dtype=torch.bool).index_fill(0, order, True).reshape(live.shape) & live
    few = len({pair.document for pair in kept}) < FEW_DOCUMENTS
    n_controls = (N_CONTROLS_FEW if few else N_CONTROLS) if n_controls is None else n_controls
    others = unrelated_pairs(kept, columns, n_controls // 2, seed)
    n_random = n_controls - others.shape[1]
    sweep = patching.sweep(
        target, batch, points, columns, (base, donor), shortlist, n_random, seed, bounds, progress, others
    )
    return SiteMeasurements(
        pairs=kept,
        batch=batch,
        points=points,
        roles=roles,
        columns=columns,
        bounds=bounds,
        vectors=(base, donor),
        attribution=score,
        live=live,
        sweep=sweep,
        everywhere=patching.everywhere(target, batch, points, columns, donor, bounds),
        n_unrelated=others.shape[1],
        behaviour=behaviour,
    )


def unrelated_pairs(
    pairs: Sequence[MinimalPair], columns: Int[Tensor, "n r"], most: int, seed: int = 0
) -> Int[Tensor, "n c"]:
    """For each pair the numbers of others, drawn at random, that share no word of the latent and have all its roles.

    As many for each: ``most``, or as many as the pair with the fewest has.
    """
    words = [(pair.target, pair.donor_target) for pair in pairs]
    has = columns >= 0
    allowed = [
        [j for j in range(len(pairs)) if words[j][0] not in words[i] and bool((has[j] | ~has[i]).all())]
        for i in range(len(pairs))
    ]
    rng = random.Random(seed)
    n_others = min(most, *map(len, allowed)) if allowed else 0
    drawn = [rng.sample(numbers, n_others) for numbers in allowed]
    return torch.tensor(drawn, dtype=torch.int64).reshape(len(pairs), n_others)


def judge_sites(measured: SiteMeasurements, seed: int = 0) -> list[TracedSite]:
    """Every site's figures and verdict, point by point and role by role.

    With too few documents and controls for a test a site counts only if, in every pair, it beats every control.
    """
    n_roles = len(measured.roles)
    sites = [divmod(number, n_roles) for number in range(len(measured.points) * n_roles)]
    patched = [site for site in sites if not measured.effects(*site)[0].isnan().all()]
    adjusted: dict[tuple[int, int], float] = {}
    if measured.testable:
        documents, n_draws = measured.documents, measured.n_draws
        raw = [above_controls(*measured.effects(*site), documents, n_draws, seed) for site in patched]
        # The shortlist is drawn from the same pairs, so that a site left out of it is a test too.
        left_out = [1.0] * (measured.n_live - len(raw))
        adjusted = dict(zip(patched, holm([*raw, *left_out]), strict=False))
    strength = measured.attribution.nanmean(0).abs().flatten()
    ranks = torch.empty(len(sites), dtype=torch.long)
    ranks[strength.argsort(descending=True)] = torch.arange(1, len(sites) + 1)
    return [
        _judge_patched(measured, site, rank, adjusted.get(site), seed)
        if site in patched
        else _judge_unpatched(measured, site, rank)
        for site, rank in zip(sites, ranks.tolist(), strict=True)
    ]


def _judge_unpatched(measured: SiteMeasurements, site: tuple[int, int], rank: int) -> TracedSite:
    """Before the first difference the donor's activation is the prompt's own: no effect, by causality."""
    live = bool(measured.live[site])
    effect, verdict = (None, UNMEASURED) if live else (Rate(0.0, 0.0, 0.0, len(measured.pairs)), NONE)
    return TracedSite(*_described(measured, site), rank, effect, 0.0, 0.0, 0.0, None, verdict)


def _judge_patched(
    measured: SiteMeasurements, site: tuple[int, int], rank: int, p_value: float | None, seed: int
) -> TracedSite:
    effect, controls = measured.effects(*site)
    known = ~effect.isnan()
    effect, controls = effect[known], controls[known]
    mean = Rate.clustered(effect, measured.documents[known], seed)
    above = p_value <= ALPHA if p_value is not None else bool((effect[:, None] > controls).all())
    low = mean.low if measured.testable and mean.low == mean.low else mean.value
    verdict = CAUSAL if above and mean.value >= MIN_EFFECT else WEAK if above and low >= MIN_WEAK else NONE
    draws = controls.flatten()
    share = float((effect >= MIN_EFFECT).double().mean())
    bar = float(draws.quantile(CONTROL_PERCENTILE))
    return TracedSite(*_described(measured, site), rank, mean, share, float(draws.mean()), bar, p_value, verdict)


def _described(measured: SiteMeasurements, site: tuple[int, int]) -> tuple[str, str, float]:
    point, role = site
    return measured.points[point], measured.roles[role], float(measured.attribution[:, point, role].mean())


def above_controls(
    effect: Float[Tensor, " n"],
    controls: Float[Tensor, "n c"],
    documents: Int[Tensor, " n"] | None = None,
    n_draws: int = _N_DRAWS,
    seed: int = 0,
) -> float:
    """p-value of "the donor's activation is like a control" from effects and controls, one-sided.

    Under it, which of its c + 1 effects is a document's own is arbitrary: the sum over documents is held against sums
    with one drawn from each, for all pairs of a document alike. Pairs without a value (NaN) are left out. In (0, 1],
    the observed one counted too.

    Args:
        documents: of each pair; None: each its own.
        n_draws: a multiple of 2,000.
    """
    known = ~effect.isnan()
    effects = torch.cat([effect[known, None], controls[known]], 1)
    labels = torch.arange(len(effect)) if documents is None else documents
    index = labels[known].unique(return_inverse=True)[1]
    pool = torch.zeros(int(index.max()) + 1, effects.shape[1], dtype=effects.dtype).index_add_(0, index, effects)
    observed, rows = pool[:, 0].sum(), torch.arange(len(pool))
    slack = 1e-12 * float(pool.abs().sum())
    generator, extreme = torch.Generator().manual_seed(seed), 0
    for _ in range(n_draws // _DRAWS_AT_ONCE):
        picked = torch.randint(pool.shape[1], (_DRAWS_AT_ONCE, len(pool)), generator=generator)
        extreme += int((pool[rows, picked].sum(1) >= observed - slack).sum())
    return (1 + extreme) / (1 + n_draws)


def agreement(measured: SiteMeasurements, seed: int = 0) -> Interval | None:
    """Rank correlation (Spearman) of mean attribution and mean measured change of log m.

    None below three sites, or where all are alike in one of the two.
    """
    # A site's change is its log m less that of the prompt, which is the same for all sites: ranks do without it.
    change = measured.sweep.log_probability
    whole = ~change.isnan().any(0).flatten()
    if int(whole.sum()) < 3:
        return None
    values = torch.cat([measured.attribution.flatten(1)[:, whole], change.flatten(1)[:, whole]], 1)
    interval = bootstrap(values, measured.documents, lambda means: spearman(*means.chunk(2, -1)), seed=seed)
    return None if math.isnan(interval.value) else interval
