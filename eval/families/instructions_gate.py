"""Is a hidden instruction at work in a target, at the tokens of an answer that gives nothing away? The causal gate.

Of each instruction, at each kind of token: how far does it move the target's next-token distribution from that without
an instruction, beside a system text as long that asks for nothing; and does its activation, put at the pair's point
into the run without it, move the distribution towards the instructed one, beside a random move as long and the
activation under another instruction?
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nla.eval.circuits.gate import CAUSAL, ELSEWHERE, MIN_EFFECT
from nla.eval.circuits.patching import random_difference
from nla.eval.families.instruction_items import KINDS, NONE, Items, control_of
from nla.eval.report import Figures
from nla.eval.target import Patch, Target, patched
from nla.models.hooks import record
from nla.models.points import device_of
from nla.models.read import padded
from nla.progress import Progress, silent
from nla.stats import Interval, bootstrap

ABSENT = "changes nothing here"
MIN_DIVERGENCE = 0.02
"""Least divergence, nats, of an instruction that is there: below it, an effect would be a ratio of noise."""
N_TOGETHER = 16
"""Requests that are run together: their distributions under every instruction are in memory at once."""
_DONORS = ("instructed", "random", "unrelated")


@dataclass(frozen=True)
class KindGate(Figures):
    """One instruction at one kind of token. Intervals by request."""

    instruction: str
    kind: str
    divergence: Interval
    """KL divergence of the instructed next-token distribution from the one without instruction, nats."""
    control: Interval
    """The same of a system text as long that asks for nothing."""
    beyond: Interval
    """Their difference, by request."""
    effect: Interval
    """Share of the divergence that the instructed activation, patched at the point, takes away: 0 none, 1 all of it."""
    random: Interval
    """The same of a move as long in a random direction."""
    unrelated: Interval
    """The same of the activation under another instruction."""
    verdict: str


class Run(NamedTuple):
    """What a target makes of n requests at c tokens of interest, float32, on the CPU."""

    scores: Float[Tensor, "n c v"]
    """Log-probabilities of the next token."""
    vectors: Float[Tensor, "n c d"]
    """Activations at the point."""

    def some(self, rows: slice) -> Run:
        """Of some of the requests."""
        return Run(self.scores[rows], self.vectors[rows])


class Sums(NamedTuple):
    """Of each request, the mean over a kind's tokens, (n,) nats: divergences from the run without instruction."""

    divergence: Tensor
    control: Tensor
    left: dict[str, Tensor]
    """The divergence that remains under each donor's patch."""


def gate_instructions(target: Target, items: Items, seed: int = 0, progress: Progress = silent) -> list[KindGate]:
    """The gate of each instruction at each kind of token, in this order."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[tuple[str, str], list[Sums]] = {(name, kind): [] for name in items.names for kind in KINDS}
    for start in range(0, len(items.users), N_TOGETHER):
        requests = range(start, min(start + N_TOGETHER, len(items.users)))
        for (name, kind), sums in _gate_chunk(target, items, requests, generator):
            parts[name, kind].append(sums)
            n_done = sum(map(len, parts.values())) * N_TOGETHER
            progress("gate", min(1.0, n_done / (len(parts) * len(items.users))))
    return [gate_of(name, kind, sums, seed) for (name, kind), sums in parts.items()]


def _gate_chunk(
    target: Target, items: Items, requests: range, generator: torch.Generator
) -> Iterator[tuple[tuple[str, str], Sums]]:
    """Of some requests, the sums of each instruction and kind, as they are measured."""
    none = run(target, items, NONE, requests)
    instructed = {name: run(target, items, name, requests) for name in items.names}
    for number, name in enumerate(items.names):
        other = instructed[items.names[(number + 1) % len(items.names)]]
        control = run(target, items, control_of(name), requests)
        for kind, sums in sums_by_kind(target, items, requests, none, instructed[name], control, other, generator):
            yield (name, kind), sums


def sums_by_kind(
    target: Target,
    items: Items,
    requests: range,
    none: Run,
    wanted: Run,
    control: Run,
    unrelated: Run,
    generator: torch.Generator,
) -> Iterator[tuple[str, Sums]]:
    """What moves the distributions of ``none``, of some requests, towards ``wanted``, by kind of token."""
    moved, of_control = divergence(wanted.scores, none.scores), divergence(control.scores, none.scores)
    place, point = items.prompt_lengths(NONE, requests), str(target.point)
    donors = (wanted.vectors, random_difference(none.vectors, wanted.vectors, generator), unrelated.vectors)
    for kind, chosen in items.columns_by_kind.items():
        left = {}
        for label, new in zip(_DONORS, donors, strict=True):
            patches = [Patch(point, place - 1 + column, new[:, column]) for column in chosen]
            after = run(target, items, NONE, requests, patches).scores
            left[label] = divergence(wanted.scores[:, chosen], after[:, chosen]).mean(1)
        yield kind, Sums(moved[:, chosen].mean(1), of_control[:, chosen].mean(1), left)


def run(target: Target, items: Items, reading: str, requests: Sequence[int], patches: Sequence[Patch] = ()) -> Run:
    """What is predicted and held at each token of interest under a reading."""
    rows = [items.ids(reading, request) for request in requests]
    first = items.prompt_lengths(reading, requests) - 1
    columns = first[:, None] + torch.arange(items.n_columns)
    n_kept = max(map(len, rows)) - int(first.min())
    at, index = str(target.point), torch.arange(len(rows))
    with target.active(), patched(target, patches, index), record(target.model, [at]) as seen:
        ids = padded(rows).to(device_of(target.model))
        logits = target.model(input_ids=ids, use_cache=False, logits_to_keep=n_kept).logits
    offset = ids.shape[1] - logits.shape[1]
    scores = logits.cpu()[index[:, None], columns - offset].float().log_softmax(-1)
    return Run(scores, seen[at].cpu()[index[:, None], columns].float())


def divergence(wanted: Float[Tensor, "n c v"], other: Float[Tensor, "n c v"]) -> Float[Tensor, "n c"]:
    """KL divergence of ``wanted`` from ``other``, both log-probabilities, in nats, float64.

    >>> half, sure = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.75, 0.25]]]).log()
    >>> round(float(divergence(sure, half)), 4)
    0.1308
    """
    return (wanted.exp() * (wanted - other)).sum(-1).double()


def gate_of(name: str, kind: str, parts: Sequence[Sums], seed: int = 0) -> KindGate:
    """The figures and the verdict, from the sums of all requests in parts."""
    divergences, controls = (torch.cat([getattr(part, field) for part in parts]) for field in Sums._fields[:2])
    left = {label: torch.cat([part.left[label] for part in parts]) for label in _DONORS}

    def share(taken: Tensor) -> Interval:
        """Of the whole divergence, over all requests."""
        return bootstrap(
            torch.stack([taken, divergences], 1), None, lambda mean: mean[..., 0] / mean[..., 1], seed=seed
        )

    effects = {label: share(divergences - rest) for label, rest in left.items()}
    beyond = bootstrap(divergences - controls, seed=seed)
    above = [share(left[label] - left["instructed"]) for label in _DONORS[1:]]
    divergence, control = bootstrap(divergences, seed=seed), bootstrap(controls, seed=seed)
    verdict = verdict_of(divergence, beyond, effects["instructed"], above)
    instructed, random, unrelated = effects.values()
    return KindGate(name, kind, divergence, control, beyond, instructed, random, unrelated, verdict)


def verdict_of(divergence: Interval, beyond: Interval, effect: Interval, above: Sequence[Interval]) -> str:
    """In words: is the instruction there, and is it carried by the activation that is read?

    Args:
        divergence: of the instructed distribution, nats.
        beyond: the same beyond the control's.
        effect: share of it that the patch takes away.
        above: how much more than each control's patch.
    """
    if not (divergence.value >= MIN_DIVERGENCE and beyond.low > 0):
        return ABSENT
    return CAUSAL if effect.value >= MIN_EFFECT and all(one.low > 0 for one in above) else ELSEWHERE


def causal(gates: Sequence[KindGate]) -> dict[str, list[str]]:
    """The kinds of token at which each instruction is causal, by instruction; none: an empty list."""
    by_name: dict[str, list[str]] = {gate.instruction: [] for gate in gates}
    for gate in gates:
        if gate.verdict == CAUSAL:
            by_name[gate.instruction].append(gate.kind)
    return by_name
