"""A file of prompts and a seed in, requests with known attributes out: what a target is asked for its own corpus."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from nla.errors import ParseError, RecipeError
from nla.storage.files import read_yaml
from nla.storage.schema import first_problem, shown
from nla.store.shards import is_held_out
from nla.text.facts import BOOKKEEPING

PROMPTS = Path(__file__).parent / "prompts"
DEFAULT = "english"
READINGS = 2
"""Instructions that a neutral answer is read under, beside none."""
OWN, NEUTRAL = "own", "neutral"
_ORDINARY = 0.5
"""Share of the requests for evaluation that have no held-out value; of the others each part has one in half of them."""
_TAKEN = ("topic", "form", "instruction", *BOOKKEEPING)
Share = Annotated[float, Field(ge=0, le=1)]
Texts = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(lambda value: tuple(value) if type(value) is list else value),
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Wordings(_Part):
    """Ways to say one value of an attribute."""

    seen: Texts = ()
    """For training; without any, the value is held out."""
    held_out: Texts = ()

    @model_validator(mode="after")
    def _check(self) -> Wordings:
        if not self.seen and not self.held_out:
            raise ValueError("a wording, under seen or held_out")
        return self


class Modifier(_Part):
    """An attribute that some requests state in a sentence of its own."""

    share: Share
    """Of the requests."""
    values: Annotated[dict[str, Wordings], Field(min_length=1)]
    otherwise: str | None = None
    """The value of the other requests."""


class Instructions(_Part):
    """Hidden instructions: what stands in the system message."""

    share: Share
    """Of the documents."""
    neutral: Share
    """Of these: the answer was written without the instruction, and is read with it."""
    otherwise: Annotated[Texts, Field(min_length=1)]
    """System messages of documents without one."""
    values: dict[str, Wordings]

    @model_validator(mode="after")
    def _check(self) -> Instructions:
        n_seen = sum(bool(wordings.seen) for wordings in self.values.values())
        if self.share and n_seen < READINGS:
            raise ValueError(f"{READINGS} instructions or more that are not held out, not {n_seen}")
        if self.share * (1 + self.neutral / READINGS) > 1:
            raise ValueError(
                f"share · (1 + neutral / {READINGS}) ≤ 1: neutral answers are read without instruction, too"
            )
        return self


class Prompts(_Part):
    """What a target is asked, with every attribute's values and their wordings."""

    topics: Wordings
    forms: dict[str, Wordings]
    """What is asked for, with ``{topic}`` in each wording."""
    modifiers: dict[str, Modifier] = {}
    """At most one of them in a request."""
    instructions: Instructions

    @cached_property
    def topics_by_name(self) -> dict[str, Wordings]:
        """Each topic as a value with one wording, its name."""
        seen = {topic: Wordings(seen=(topic,)) for topic in self.topics.seen}
        return seen | {topic: Wordings(held_out=(topic,)) for topic in self.topics.held_out}

    @model_validator(mode="after")
    def _check(self) -> Prompts:
        if not self.topics.seen or not any(wordings.seen for wordings in self.forms.values()):
            raise ValueError("topics and forms that are not held out")
        for wordings in self.forms.values():
            for text in wordings.seen + wordings.held_out:
                if text.count("{topic}") != 1:
                    raise ValueError(f"forms with {{topic}} once in each wording, which {shown(text)} has not")
        if sum(modifier.share for modifier in self.modifiers.values()) > 1:
            raise ValueError("modifiers whose shares add up to 1 at most")
        for name, modifier in self.modifiers.items():
            if name in _TAKEN or not any(wordings.seen for wordings in modifier.values.values()):
                raise ValueError(f"a modifier of another name, with a value that is not held out, than {shown(name)}")
        return self


def load_prompts(name: str | None) -> Prompts:
    """The prompts of a file, or of the shipped ones by name; None: English ones.

    Raises:
        RecipeError: there is no such file, or it does not say what it must.
    """
    name = name or DEFAULT
    file = Path(name).expanduser() if os.path.isfile(Path(name).expanduser()) else PROMPTS / f"{name}.yaml"
    if not os.path.isfile(file):
        known = ", ".join(sorted(path.stem for path in PROMPTS.glob("*.yaml")))
        raise RecipeError(f"corpus.prompts = {shown(name)}", f"a YAML file, or one of {known}", "correct the name")
    try:
        return Prompts.model_validate(read_yaml(file))
    except ParseError as error:
        raise RecipeError(error.got, error.expected, error.fix) from error
    except ValidationError as error:
        problem = first_problem(error, Prompts)
    raise RecipeError(f"{file}: {problem.got}", problem.expected, problem.fix)


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
