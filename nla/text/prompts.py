"""Prompts with known attributes, some of them held out: a YAML file in; what a target is asked, and how, out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from nla.errors import ParseError, RecipeError, TemplateError
from nla.storage.files import read_yaml
from nla.storage.schema import first_problem, shown
from nla.text.facts import BOOKKEEPING
from nla.text.templates import render_template
from nla.text.tokens import plain_ids, undated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = Path(__file__).parent / "prompt_files"
DEFAULT = "english"
READINGS = 2
"""Instructions that a neutral answer is read under, beside none."""
OWN, NEUTRAL = "own", "neutral"
"""What a document's attribute ``answer`` says: written under the instruction that it is read with, or without it."""
_PLAIN = (
    "You are a helpful assistant who answers what the user asks. Read the request, think about what is wanted, and "
    "write an answer that is clear and complete. Use whole sentences and good grammar. Keep to the topic of the "
    "request, and take as many words as you need. When the answer is complete, stop. The user will read it later."
)
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
        modified = [w for modifier in self.modifiers.values() for w in modifier.values.values()]
        hidden = [Wordings(seen=self.instructions.otherwise), *self.instructions.values.values()]
        for part in ([self.topics], [*self.forms.values()], modified, hidden):
            _check_differ(text for wordings in part for text in wordings.seen + wordings.held_out)
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


def _check_differ(texts: Iterable[str]) -> None:
    """Refuse texts of which two differ in case and blanks at most: a request would be both seen and held out, or have
    two values of an attribute."""
    known: set[str] = set()
    for text in texts:
        plain = " ".join(text.split()).casefold()
        if plain in known:
            raise ValueError(f"topics and wordings that differ, seen or held out: {shown(text)} is there twice")
        known.add(plain)


def load_prompts(name: str | None) -> Prompts:
    """The prompts of a file, or of the shipped ones by name; None: English ones.

    Raises:
        RecipeError: there is no such file, or it does not say what it must.
    """
    name = name or DEFAULT
    file = Path(name).expanduser() if os.path.isfile(Path(name).expanduser()) else PROMPTS / f"{name}.yaml"
    if not os.path.isfile(file):
        known = ", ".join(sorted(path.stem for path in PROMPTS.glob("*.yaml")))
        raise RecipeError(f"prompts {shown(name)}", f"a YAML file, or one of {known}", "correct the name")
    try:
        return Prompts.model_validate(read_yaml(file))
    except ParseError as error:
        raise RecipeError(error.got, error.expected, error.fix) from error
    except ValidationError as error:
        problem = first_problem(error, Prompts)
    raise RecipeError(f"{file}: {problem.got}", problem.expected, problem.fix)


def plain_text(name: str | None, prompts: Prompts) -> str:
    """What control texts, which ask for nothing, are made of (:func:`as_long_as`) where these prompts are used.

    Args:
        name: of the prompts, as :func:`load_prompts` takes it. Beside the shipped ones stands a text in their words; of
            others, it is what they have in place of an instruction.
    """
    return _PLAIN if name in (None, DEFAULT) else " ".join(prompts.instructions.otherwise)


def as_long_as(tokenizer: PreTrainedTokenizerBase, instruction: str, plain: str) -> str:
    """The first words of ``plain``, again from the start if need be: as many tokens as an instruction, or nearly so."""

    def length(text: str) -> int:
        return len(plain_ids(tokenizer, [text])[0])

    n_wanted, words = length(instruction), plain.split()
    by_distance: dict[int, str] = {}
    for n in range(1, 2 + 2 * n_wanted):
        text = " ".join(words[word % len(words)] for word in range(n)).rstrip(",.") + "."
        by_distance.setdefault(abs(length(text) - n_wanted), text)
    return by_distance[min(by_distance)]


class ChatPrompts(NamedTuple):
    """How a target is asked: from a system text and what a user asks to messages, and to token ids."""

    tokenizer: Any
    reads_system: bool
    """Otherwise the system text stands at the start of the user's message."""

    @classmethod
    def of(cls, tokenizer: Any) -> ChatPrompts:
        """As the tokenizer's chat template has it: some refuse system messages, some drop them.

        Raises:
            ConfigError, TemplateError: there is none, or it takes no user's message either.
        """
        user = {"role": "user", "content": "Who are you?"}
        _rendered(tokenizer, [user])
        try:
            _rendered(tokenizer, [{"role": "system", "content": "You are a pirate."}, user])
        except Exception:  # a template is a program: it may raise anything
            return cls(tokenizer, False)
        return cls(tokenizer, True)

    def messages(self, system: str, user: str) -> list[dict[str, str]]:
        """The messages before the answer."""
        if not self.reads_system:
            return [{"role": "user", "content": f"{system}\n\n{user}"}]
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]

    def ids(self, system: str, user: str) -> list[int]:
        """Token ids up to where the answer begins.

        Raises:
            TemplateError: the template edits these messages.
        """
        text = _rendered(self.tokenizer, self.messages(system, user))
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    text = render_template(tokenizer, undated(tokenizer), messages, add_generation_prompt=True, enable_thinking=False)
    if not all(message["content"] in text for message in messages):
        raise TemplateError("a chat template that edits messages", "one that shows them", "use another target")
    return text
