"""Couplets and explanations in; how often their claims hold, by kind of claim and kind of position, out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nla.eval.report import Rate
from nla.models.read import Activations
from nla.organisms.couplets import world
from nla.stats import derangement
from nla.text.claims import claims
from nla.text.tokens import Span

PLAN, VISIBLE, LAST = "the plan", "visible facts", "of these: the last word or mark"
Row = tuple[world.Couplet, Span]


@dataclass(frozen=True)
class Truth:
    """One kind of claim in one stratum."""

    stratum: str
    claim: str
    n: int
    """Claims of this kind."""
    true: Rate
    warm_start: Rate | None
    """Of the warm start's own claims."""
    shuffled: Rate | None
    """The same claims held against another token of the stratum: what chance makes true."""


def owners(acts: Activations, couplets: Sequence[world.Couplet]) -> list[Row]:
    """Each activation's document and token."""
    return [(couplets[number], span) for number, span in zip(acts.document.tolist(), acts.spans, strict=True)]


def measure_truth(
    acts: Activations,
    couplets: Sequence[world.Couplet],
    texts: Sequence[str],
    warm_texts: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Truth]:
    """Every kind of claim in every stratum; ``texts`` and ``warm_texts`` are one explanation an activation."""
    rows, documents, truths = owners(acts, couplets), acts.document.tolist(), []
    for stratum in dict.fromkeys(acts.strata):
        here = [row for row, kind in enumerate(acts.strata) if kind == stratum]
        claimed = _claims(texts, rows, here, here)
        readers = [claimed, {} if warm_texts is None else _claims(warm_texts, rows, here, here), {}]
        if len(here) > 1:
            readers[2] = _claims(texts, rows, here, [here[other] for other in derangement(len(here), seed).tolist()])
        for kind, of_kind in claimed.items():
            true, warm, shuffled = (_rate(by_kind.get(kind, []), documents, seed) for by_kind in readers)
            if true is not None:
                truths.append(Truth(stratum, kind, len(of_kind), true, warm, shuffled))
    return truths


def _rate(held: Sequence[tuple[int, bool]], documents: Sequence[int], seed: int) -> Rate | None:
    if not held:
        return None
    outcomes = torch.tensor([true for _, true in held]).double()
    return Rate.clustered(outcomes, [documents[row] for row, _ in held], seed)


def _claims(
    texts: Sequence[str], rows: Sequence[Row], speakers: Sequence[int], judged: Sequence[int]
) -> dict[str, list[tuple[int, bool]]]:
    """Claims by kind, each with the row that it is held against and whether it is true there.

    Args:
        speakers: rows whose texts make the claims.
        judged: for each of them the row that they are held against.
    """
    kinds: dict[str, list[tuple[int, bool]]] = {PLAN: [], VISIBLE: [], LAST: []}
    for speaker, row in zip(speakers, judged, strict=True):
        (couplet, span), text = rows[row], texts[speaker]
        if any(world.is_plan_claim(claim) for claim in claims(text)):
            kind = world.stratum(couplet, span)
            kinds[PLAN].append((row, world.named(text, couplet.plan, couplet.siblings, kind)))
        kinds[VISIBLE] += [(row, true) for true in world.visible_claims(couplet, span, text)]
        last = [claim for claim in claims(text) if claim.startswith("The last")]
        kinds[LAST] += [(row, bool(world.claim_is_true(couplet, span, claim))) for claim in last]
    return kinds
