"""Prompts and a seed in, requests with known attributes out: what a target is asked for its own corpus."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

from nla.store.shards import is_held_out
from nla.text.prompts import NEUTRAL, OWN, READINGS, Prompts, Wordings

_ORDINARY = 0.5
"""Share of the requests for evaluation that have no held-out value; of the others each part has one in half of them."""


class Reading(NamedTuple):
    """One way in which the target reads a request and its answer: a document."""

    system: str
    attributes: dict[str, Any]


class Request(NamedTuple):
    """What the target is asked once."""

    number: int
    system: str
    """The system message that the answer is written under."""
    user: str
    split: str
    """train or eval: no request, and so no answer, is in both."""
    readings: list[Reading]


def draw_requests(prompts: Prompts, n_documents: int, seed: int, eval_share: float, split_key: str) -> list[Request]:
    """Requests for so many documents; the first of more are the same.

    Attributes: ``topic``, ``form`` and the modifiers; ``instruction``, the name of the hidden one or None; ``answer``,
    "own" if it was written under the instruction, "neutral" if without it; ``request``, the same for documents that
    share their answer; and ``held_out``, the attributes whose value or wording no training document has.

    Args:
        eval_share: of the requests, by a hash of what the user asks and ``split_key``; half of these have held-out
            values.
    """
    requests: list[Request] = []
    n = 0
    while n < n_documents:
        request = _draw(prompts, len(requests), seed, eval_share, split_key)
        requests.append(request._replace(readings=request.readings[: n_documents - n]))
        n += len(requests[-1].readings)
    return requests


def _draw(prompts: Prompts, number: int, seed: int, eval_share: float, split_key: str) -> Request:
    draw, instructions = random.Random(f"{seed}/{number}"), prompts.instructions
    share, neutral = instructions.share, instructions.share * instructions.neutral
    weights = (1 - share - neutral / READINGS, share - neutral, neutral / READINGS)
    (kind,) = draw.choices((None, OWN, NEUTRAL), weights)
    modifier = None if kind == OWN else _drawn_modifier(prompts, draw)
    key = f"{seed}/{number}"
    user, attributes = _user(prompts, modifier, random.Random(f"{key}/user"), False)
    is_eval = is_held_out(user, eval_share, split_key)
    holds_out = is_eval and draw.random() >= _ORDINARY
    if holds_out:
        other = _user(prompts, modifier, random.Random(f"{key}/held out"), True)
        if other[1]["held_out"]:  # no request of a training document
            user, attributes = other
    otherwise = draw.choice(instructions.otherwise)
    known = {**attributes, "instruction": None, "answer": None, "request": number}
    readings = [] if kind == OWN else [Reading(otherwise, known)]
    while kind is not None and len(readings) < (1 if kind == OWN else 1 + READINGS):
        name, wording, is_new = _drawn(instructions.values, draw, holds_out and draw.random() < 0.5)
        if all(reading.attributes["instruction"] != name for reading in readings):
            held_out = [*attributes["held_out"], *(["instruction"] if is_new else [])]
            readings.append(Reading(wording, known | {"instruction": name, "answer": kind, "held_out": held_out}))
    system = otherwise if kind != OWN else readings[0].system
    return Request(number, system, user, "eval" if is_eval else "train", readings)


def _user(prompts: Prompts, modifier: str | None, draw: random.Random, holds_out: bool) -> tuple[str, dict[str, Any]]:
    """What the user asks, and its attributes; if it ``holds_out``, each part has something held out by even chance."""
    new = []

    def part(name: str, values: Mapping[str, Wordings]) -> tuple[str, str]:
        value, wording, is_new = _drawn(values, draw, holds_out and draw.random() < 0.5)
        new.extend([name] if is_new else [])
        return value, wording

    topic, _ = part("topic", prompts.topics_by_name)
    form, wording = part("form", prompts.forms)
    attributes: dict[str, Any] = {"topic": topic, "form": form}
    user = wording.replace("{topic}", topic)
    for name, one in prompts.modifiers.items():
        attributes[name] = one.otherwise
        if name == modifier:
            attributes[name], wording = part(name, one.values)
            user += f" {wording}"
    return user, attributes | {"held_out": new}


def _drawn_modifier(prompts: Prompts, draw: random.Random) -> str | None:
    at, ends = draw.random(), accumulate(modifier.share for modifier in prompts.modifiers.values())
    return next((name for name, end in zip(prompts.modifiers, ends, strict=True) if at < end), None)


def _drawn(values: Mapping[str, Wordings], draw: random.Random, new: bool) -> tuple[str, str, bool]:
    """A value, a wording of it, and whether either is held out: ``new``, if there is one that is.

    Values that are wholly held out and new wordings of others are drawn equally often.
    """
    wholly = [name for name, wordings in values.items() if not wordings.seen]
    partly = [name for name, wordings in values.items() if wordings.seen and wordings.held_out]
    if new and (wholly or partly):
        name = draw.choice(draw.choice([names for names in (wholly, partly) if names]))
        return name, draw.choice(values[name].held_out), True
    name = draw.choice([name for name, wordings in values.items() if wordings.seen])
    return name, draw.choice(values[name].seen), False
