"""Which tokens of a transcript are read, and what kind of position each is."""

from __future__ import annotations

import random
import re
from typing import NamedTuple

import numpy as np
import torch

from nla.errors import PositionError
from nla.text.kinds import CONTENT_WORD, FUNCTION_WORD, token_kinds
from nla.text.patterns import Pattern, compile_pattern
from nla.transcripts.messages import ROLES
from nla.transcripts.rendering import CALLS, CONTENT, CONTROL, REASONING, Chat, Region

BUDGET = 64
"""Positions of a transcript, unless more are asked for."""

BEFORE_ANSWER, ANSWER_START, ANSWER_END = "before answer", "answer start", "answer end"
STRUCTURE = (BEFORE_ANSWER, ANSWER_START, ANSWER_END, *(f"{role} end" for role in ROLES if role != "assistant"))
"""Kinds of the positions by structure."""
CHOICES = ("structure", "all", "random")
TEMPLATE = "template token"
PROMPT_KINDS = ("prompt content word", "prompt function word", "prompt punctuation")
"""Kinds of tokens of what others than the assistant wrote."""


_WRITTEN = (CONTENT, CALLS, REASONING)
"""Sections of a message that its positions are looked for in: the first of them that it has."""


class Position(NamedTuple):
    """A token to read, and its kind: what it is compared with in controls."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride] (the tuple's method is not used)
    kind: str


def select(chat: Chat, positions: str = "structure", budget: int | None = BUDGET, seed: int = 0) -> list[Position]:
    """Tokens to read, in order.

    Args:
        positions: "structure": where a turn is about to be decided (the token before the assistant's first), its
            decision point (that first token), and where each turn ends, a turn of tool calls alone too; "all";
            "random"; or a pattern, searched in each token's text, such as "/\\n/".
        budget: at most this many; None: no limit. Structure is thinned out evenly, kind by kind, over the whole
            transcript; "all" and patterns evenly; "random" draws as many, the same for the same transcript and seed.

    Raises:
        PositionError: an unknown name, a pattern that matches nothing, or a budget below 1.
    """
    if budget is not None and budget < 1:
        raise PositionError(f"a budget of {budget} positions", "1 or more", "raise --budget")
    if positions == "structure":
        turns = structure(chat)
        if not turns:
            expected = "a message with text"
            raise PositionError(f"{chat.transcript.id}, where no message has text", expected, "choose positions 'all'")
        return _thin_by_kind(turns, budget)
    everything = list(range(int(chat.has_bos), len(chat)))
    if positions == "all":
        return _named(chat, _thin(everything, budget))
    if positions == "random":
        # Keyed by what was said, so that other transcripts of the audit change nothing.
        draw = random.Random(f"{seed}:{chat.transcript.digest}")
        return _named(chat, sorted(draw.sample(everything, min(budget or len(everything), len(everything)))))
    return _named(chat, _thin(_matching(chat, everything, positions), budget))


def structure(chat: Chat) -> list[Position]:
    """The positions where turns are decided and end, in order; a token that is several is the first of them.

    Kinds: "before answer", "answer start", and "system end", "user end", "tool end", "answer end": the last token of
    what was written. That is a message's content; where it has none, its tool calls, from the name of the first to the
    end of the last; where it has neither, its reasoning.
    """
    bounds = torch.searchsorted(chat.region, torch.arange(len(chat.regions) + 1, dtype=chat.region.dtype)).tolist()
    """First token of each region, and the end of the last."""
    runs: dict[int, dict[str, tuple[int, int]]] = {}
    """First and last token of each section of each message."""
    for region, begin, end in zip(chat.regions, bounds, bounds[1:], strict=False):
        if begin < end:
            sections = runs.setdefault(region.message, {})
            sections[region.section] = (sections.get(region.section, (begin,))[0], end - 1)
    kinds: dict[int, str] = {}
    for number, message in enumerate(chat.transcript.messages):
        written = next((runs[number][one] for one in _WRITTEN if one in runs.get(number, {})), None)
        if written is None:  # no token is of what was written in it
            continue
        first, last = written
        if message.role == "assistant":
            if first > 0:
                kinds.setdefault(first - 1, BEFORE_ANSWER)
            kinds.setdefault(first, ANSWER_START)
            kinds.setdefault(last, ANSWER_END)
        else:
            kinds.setdefault(last, f"{message.role} end")
    return [Position(index, kinds[index]) for index in sorted(kinds)]


def kinds(chat: Chat) -> np.ndarray:
    """The kind of each token of a chat, (n,) names.

    What the assistant wrote has the kinds of :func:`nla.text.kinds.token_kinds`, but for its first token, "answer
    start"; what others wrote has ``PROMPT_KINDS``, where line breaks and ends of sentences are punctuation. The
    template's own text is a "template token", the last of it that comes before an answer is "before answer".
    """
    roles = [message.role for message in chat.transcript.messages]
    is_control = np.array([region.section == CONTROL for region in chat.regions])
    is_prompt = np.array([roles[region.message] != "assistant" for region in chat.regions]) & ~is_control
    # A message ends where it ends: what the template writes after it is no part of its last word.
    parts = ("\n" * (r.end - r.start) if r.section == CONTROL else chat.text[r.start : r.end] for r in chat.regions)
    names = token_kinds("".join(parts), chat.starts.numpy(), chat.ends.numpy()).astype(object)
    of_prompt = [names == CONTENT_WORD, names == FUNCTION_WORD, names != ""]
    region = chat.region.numpy()
    names = np.where(is_prompt[region], np.select(of_prompt, PROMPT_KINDS, ""), names)
    names[is_control[region]] = TEMPLATE
    for index, kind in structure(chat):
        if kind in (BEFORE_ANSWER, ANSWER_START):
            names[index] = kind
    return names


def spread(kinds: np.ndarray, n_tokens: int, draw: random.Random) -> dict[int, str]:
    """Up to ``n_tokens`` tokens in order, each with its kind; kinds share them equally, as far as they have tokens.

    Args:
        kinds: (n,) names, empty for tokens that are not to be chosen.
        draw: chooses tokens of a kind, and which kinds have one more, or none where there are more kinds than tokens.
    """
    names = [name for name in np.unique(kinds).tolist() if name]
    waiting = []
    for name in draw.sample(names, len(names)):
        indexes = np.flatnonzero(kinds == name).tolist()
        waiting.append([(index, name) for index in draw.sample(indexes, min(n_tokens, len(indexes)))])
    chosen: list[tuple[int, str]] = []
    while len(chosen) < n_tokens and any(waiting):
        chosen += [group.pop() for group in waiting if group][: n_tokens - len(chosen)]
    return dict(sorted(chosen))


def writer_of(chat: Chat, region: Region) -> str:
    """Who wrote what stands in a region, or which part of the template it is: such as "user" or "user control"."""
    role = chat.transcript.messages[region.message].role
    return role if region.section == CONTENT else f"{role} {region.section}"


def _named(chat: Chat, indexes: list[int]) -> list[Position]:
    """Positions whose kind is the role and the part of the message, such as "assistant content"."""
    regions = [chat.region_at(index) for index in indexes]
    return [
        Position(index, f"{chat.transcript.messages[region.message].role} {region.section}")
        for index, region in zip(indexes, regions, strict=True)
    ]


def check_choice(positions: str) -> Pattern | None:
    """The pattern in a choice of positions; None for one of ``CHOICES``.

    Raises:
        PositionError: neither one of them nor a pattern between slashes.
    """
    if positions in CHOICES:
        return None
    if len(positions) < 3 or not (positions.startswith("/") and positions.endswith("/")):
        raise PositionError(
            f"positions {positions!r}",
            f"{', '.join(CHOICES)}, or a pattern between slashes such as '/\\n/'",
            f'write "/{re.escape(positions)}/" to match tokens with this text',
        )
    return compile_pattern(positions[1:-1], "the pattern", error=PositionError)


def _matching(chat: Chat, indexes: list[int], pattern: str) -> list[int]:
    """The tokens whose text a pattern matches."""
    compiled = check_choice(pattern)
    assert compiled is not None
    starts, ends = chat.starts.tolist(), chat.ends.tolist()
    matching = [index for index in indexes if compiled.search(chat.text[starts[index] : ends[index]])]
    if not matching:
        raise PositionError(
            f"the pattern {pattern!r}, which matches no token of {chat.transcript.id}",
            "a pattern that matches a token's text",
            "correct the pattern; it is searched within single tokens, not across them",
        )
    return matching


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
    for n_done, (kind, indexes) in enumerate(sorted(kinds.items(), key=lambda item: len(item[1]))):
        share = left // (len(kinds) - n_done)
        chosen = _thin(indexes, share) if share else []
        kept += [Position(index, kind) for index in chosen]
        left -= len(chosen)
    return sorted(kept)
