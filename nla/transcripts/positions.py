"""Which tokens of a transcript are read, and what kind of position each is."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import NamedTuple

from nla.errors import PositionError
from nla.transcripts.messages import ROLES
from nla.transcripts.rendering import CONTENT, Chat

BUDGET = 64
"""Positions a transcript, unless more are asked for."""

BEFORE_ANSWER, ANSWER_START, ANSWER_END = "before answer", "answer start", "answer end"
STRUCTURE = (BEFORE_ANSWER, ANSWER_START, ANSWER_END, *(f"{role} end" for role in ROLES if role != "assistant"))
"""Kinds of the positions by structure."""
CHOICES = ("structure", "all", "random")


class Position(NamedTuple):
    """A token to read, and its kind: what it is compared with in controls."""

    index: int
    kind: str


def select(chat: Chat, positions: str = "structure", budget: int | None = BUDGET, seed: int = 0) -> list[Position]:
    """Tokens to read, in order.

    Args:
        positions: "structure": where a turn is about to be decided (the token before the assistant's first), its
            decision point (that first token), and where each turn ends; "all"; "random"; or a pattern, searched in
            each token's text, such as "/\\n/".
        budget: at most this many; None: no limit. Structure is thinned out evenly, kind by kind, over the whole
            transcript; "all" and patterns evenly; "random" draws as many, the same for the same transcript and seed.

    Raises:
        PositionError: an unknown name, a pattern that matches nothing, or a budget below 1.
    """
    if budget is not None and budget < 1:
        raise PositionError(f"a budget of {budget} positions", "1 or more", "raise --budget")
    if positions == "structure":
        found = structure(chat)
        if not found:
            expected = "a message with text"
            raise PositionError(f"{chat.transcript.id}, where no message has text", expected, "choose positions 'all'")
        return _thin_by_kind(found, budget)
    everything = list(range(int(chat.has_bos), len(chat)))
    if positions == "all":
        return _named(chat, _thin(everything, budget))
    if positions == "random":
        # Keyed by what was said, so that other transcripts of the audit change nothing.
        draw = random.Random(f"{seed}:{chat.transcript.digest}")
        return _named(chat, sorted(draw.sample(everything, min(budget or len(everything), len(everything)))))
    return _named(chat, _thin(_pattern(chat, everything, positions), budget))


def structure(chat: Chat) -> list[Position]:
    """The positions where turns are decided and end, in order; a token that is several is the first of them.

    Kinds: "before answer", "answer start", and "system end", "user end", "tool end", "answer end": the last token of
    what was written.
    """
    found: dict[int, str] = {}
    written = [-1] * len(chat.transcript.messages)
    first = list(written)
    for index, region in enumerate(chat.region.tolist()):
        place = chat.regions[region]
        if place.section == CONTENT:
            written[place.message] = index
            first[place.message] = index if first[place.message] < 0 else first[place.message]
    for number, message in enumerate(chat.transcript.messages):
        if first[number] < 0:  # tool calls only: no token is the content's
            continue
        if message.role == "assistant":
            if first[number] > 0:
                found.setdefault(first[number] - 1, BEFORE_ANSWER)
            found.setdefault(first[number], ANSWER_START)
            found.setdefault(written[number], ANSWER_END)
        else:
            found.setdefault(written[number], f"{'system' if message.role == 'developer' else message.role} end")
    return [Position(index, found[index]) for index in sorted(found)]


def _named(chat: Chat, indexes: list[int]) -> list[Position]:
    out = []
    for index in indexes:
        place = chat.place(index)
        out.append(Position(index, f"{chat.transcript.messages[place.message].role} {place.section}"))
    return out


def _pattern(chat: Chat, indexes: list[int], pattern: str) -> list[int]:
    if len(pattern) < 3 or not (pattern.startswith("/") and pattern.endswith("/")):
        raise PositionError(
            f"positions {pattern!r}",
            f"{', '.join(CHOICES)}, or a pattern between slashes such as '/\\n/'",
            f'write "/{re.escape(pattern)}/" to match tokens with this text',
        )
    try:
        matches: Callable = re.compile(pattern[1:-1]).search
    except re.error as error:
        raise PositionError(f"the pattern {pattern!r} ({error})", "a regular expression", "escape its marks") from error
    starts, ends = chat.starts.tolist(), chat.ends.tolist()
    found = [index for index in indexes if matches(chat.text[starts[index] : ends[index]])]
    if not found:
        raise PositionError(
            f"the pattern {pattern!r}, which matches no token of {chat.transcript.id}",
            "a pattern that matches a token's text",
            "correct the pattern; it is searched within single tokens, not across them",
        )
    return found


def _thin(indexes: list[int], budget: int | None) -> list[int]:
    """At most ``budget`` of the indexes, evenly spread, with the first and the last."""
    if budget is None or len(indexes) <= budget:
        return indexes
    if budget == 1:
        return indexes[-1:]
    return [indexes[round(step * (len(indexes) - 1) / (budget - 1))] for step in range(budget)]


def _thin_by_kind(positions: list[Position], budget: int | None) -> list[Position]:
    """At most ``budget`` positions; kinds share it equally, and what a rare kind leaves goes to the others."""
    if budget is None or len(positions) <= budget:
        return positions
    kinds: dict[str, list[int]] = {}
    for position in positions:
        kinds.setdefault(position.kind, []).append(position.index)
    left, kept = budget, []
    for place, (kind, indexes) in enumerate(sorted(kinds.items(), key=lambda item: len(item[1]))):
        share = left // (len(kinds) - place)
        chosen = _thin(indexes, share) if share else []
        kept += [Position(index, kind) for index in chosen]
        left -= len(chosen)
    return sorted(kept)
