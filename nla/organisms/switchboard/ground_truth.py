"""Switchboard as training sees it; see :class:`nla.organisms.ground_truth.GroundTruth`."""

from __future__ import annotations

from nla.organisms.ground_truth import HasOffsets
from nla.organisms.switchboard import claims, content, world
from nla.organisms.switchboard.claims import describe, hit_rate, truthful, visible_claims
from nla.organisms.switchboard.tokenizer import DECODER_TEMPLATE, ENCODER_PROMPT, MARKER
from nla.organisms.switchboard.world import STRATA, strata

__all__ = ["DECODER_TEMPLATE", "ENCODER_PROMPT", "MARKER", "STRATA", "describe", "hit_rate", "strata", "truthful"]
__all__ += ["MAIN", "named", "splits", "visible_claims"]

MAIN = world.MAIN_STRATA


def splits(n_documents: int, n_eval_documents: int, seed: int) -> dict[str, list[world.Chat]]:
    """``held_out`` asks the two-hop questions that neither the target nor the pair was trained on."""
    train = world.sample(n_documents, seed=3 * seed + 101)
    seen, found = {chat.text for chat in train}, {"train": train}
    for offset, (name, questions) in enumerate((("eval", "known"), ("held_out", "held out")), start=1):
        kinds = world.KINDS if name == "eval" else ("two-hop",)
        n_drawn, fresh = n_eval_documents, {}
        while len(fresh) < n_eval_documents and n_drawn < 1000 * n_eval_documents:
            n_drawn *= 2  # a longer draw begins with the shorter one
            drawn = world.sample(n_drawn, 3 * seed + 101 + offset, kinds, questions)
            fresh = {chat.text: chat for chat in drawn if chat.text not in seen}
        found[name] = list(fresh.values())[:n_eval_documents]
    return found


def named(chat: world.Chat, span: HasOffsets, text: str) -> bool | None:
    """Whether the town of a two-hop question is named at the token that carries it."""
    segment = world.segment_of(chat, span)
    if segment is None or world.stratum(chat, span) != "bridge":
        return None
    exchange = chat.exchanges[segment.exchange]
    if exchange.kind != "two-hop":
        return None
    return claims.named(text, str(exchange.bridge), content.TOWNS, "The town in mind")
