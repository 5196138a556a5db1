"""Couplets as training sees it; see :class:`nla.organisms.ground_truth.GroundTruth`."""

from __future__ import annotations

from nla.organisms.couplets import world
from nla.organisms.couplets.tokenizer import DECODER_TEMPLATE, ENCODER_PROMPT, MARKER
from nla.organisms.couplets.world import describe, hit_rate, strata, truthful, visible_claims
from nla.organisms.ground_truth import HasOffsets

__all__ = ["DECODER_TEMPLATE", "ENCODER_PROMPT", "MARKER", "describe", "hit_rate", "strata", "truthful"]
__all__ += ["MAIN", "STRATA", "named", "splits", "visible_claims"]

STRATA = ("line 1", "newline", "line 2", "line 3")
MAIN = ("newline",)


def splits(n_documents: int, n_eval_documents: int, seed: int) -> dict[str, list[world.Couplet]]:
    """Training ends on known plans alone; ``held_out`` ends on the others."""
    known = [word for word in world.PLANS if word not in world.HELD_OUT_PLANS]
    train = world.sample(n_documents, seed=3 * seed + 101, plans=known)
    seen = {couplet.text for couplet in train}
    found = {"train": train}
    for offset, (name, plans) in enumerate((("eval", known), ("held_out", world.HELD_OUT_PLANS)), start=1):
        n_drawn, fresh = n_eval_documents, []
        while len(fresh) < n_eval_documents:
            n_drawn *= 2  # a longer draw begins with the shorter one
            drawn = world.sample(n_drawn, seed=3 * seed + 101 + offset, plans=plans)
            fresh = [couplet for couplet in drawn if couplet.text not in seen]
        found[name] = fresh[:n_eval_documents]
    return found


def named(couplet: world.Couplet, span: HasOffsets, text: str) -> bool | None:
    """Whether the plan is named at the newline."""
    if world.stratum(couplet, span) != "newline":
        return None
    return world.named(text, couplet.plan, couplet.siblings)
