"""A transcript with a mark in the place of each of its fields in, and where a rendered text has the fields out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from nla.errors import TemplateError
from nla.transcripts.messages import Transcript

CONTROL, REASONING, CONTENT, CALLS, TOOLS = "control", "reasoning", "content", "calls", "tools"
"""Parts of a message: what the template adds, thinking, what was written, tool calls, and the tools on offer."""

_NAMES = {REASONING: "reasoning", CONTENT: "content", CALLS: "tool calls", TOOLS: "list of tools"}
_OPEN, _CLOSE = "\ue000", "\ue001"
_MARK = re.compile(r"(?:\ue000|\\ue000)(\d+)(?:\ue001|\\ue001)")
_SHOWN = 40


class Field(NamedTuple):
    """Something that was written in a transcript."""

    message: int | None
    section: str
    value: str

    def spellings(self) -> list[str]:
        """How a template may write it: as it is; words of calls also inside JSON or Python; reasoning also trimmed."""
        value = self.value
        if self.section == CONTENT:
            return [value]
        if self.section == REASONING:
            return [value, value.strip("\n"), value.strip()]
        return [value, json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1], repr(value)[1:-1]]


class Span(NamedTuple):
    """Where a field stands in the rendered text."""

    start: int
    end: int
    message: int | None
    section: str


class Placed(NamedTuple):
    """What a template made of a transcript's fields."""

    spans: list[Span]
    """In the order of the text."""
    dropped: list[tuple[int | None, str]]
    """Message and name of what is not in the text, in order, each once."""
    edited: tuple[int, str] | None
    """Where the text is not the template's own with the fields in it, and what would have to stand there."""


@dataclass(frozen=True)
class Marked:
    """A transcript whose fields are marks."""

    transcript: Transcript
    fields: list[Field]
    """Mark ``n`` stands for field ``n``."""

    @classmethod
    def of(cls, transcript: Transcript) -> Marked:
        """Replace everything that was written; what is empty stays so, because templates look at that.

        Raises:
            TemplateError: a field holds the private character that marks begin with.
        """
        fields: list[Field] = []

        def mark(message: int | None, section: str) -> Callable[[str], str]:
            def marked(value: str) -> str:
                if not value:
                    return value
                if _OPEN in value:
                    where = "its tools" if message is None else f"message {message}"
                    got = f"{transcript.source or transcript.id}: {where} with the private character U+E000"
                    raise TemplateError(got, "text without it", "remove it")
                fields.append(Field(message, section, value))
                return f"{_OPEN}{len(fields) - 1}{_CLOSE}"

            return marked

        tools = tuple(_marked_tool(tool, mark(None, TOOLS)) for tool in transcript.tools)
        messages = tuple(
            replace(
                message,
                reasoning=mark(number, REASONING)(message.reasoning),
                content=mark(number, CONTENT)(message.content),
                calls=tuple(_marked_call(call, mark(number, CALLS)) for call in message.calls),
            )
            for number, message in enumerate(transcript.messages)
        )
        return cls(replace(transcript, messages=messages, tools=tools), fields)

    def place(self, marked_text: str, text: str) -> Placed:
        """Find the fields in a rendered text, by where their marks stand in the other.

        Raises:
            TemplateError: the template repeats or reorders messages.
        """
        pieces = _MARK.split(marked_text)
        literals, numbers = pieces[::2], [int(piece) for piece in pieces[1::2]]
        numbers = [number for number in numbers if number < len(self.fields)]
        self._check_order(numbers)
        seen = set(numbers)
        dropped = [(one.message, _NAMES[one.section]) for number, one in enumerate(self.fields) if number not in seen]
        spans, at = [], len(literals[0])
        edited = None if text.startswith(literals[0]) else (0, literals[0][:_SHOWN])
        for number, after in zip(numbers, literals[1:], strict=True):
            if edited is not None:
                break
            one = self.fields[number]
            fitting = (
                spelling
                for spelling in one.spellings()
                if text.startswith(spelling, at) and text.startswith(after, at + len(spelling))
            )
            spelling = next(fitting, None)
            if spelling is None:
                edited = (at, (one.value + after)[:_SHOWN])
                break
            spans.append(Span(at, at + len(spelling), one.message, one.section))
            at += len(spelling) + len(after)
        if edited is None and at != len(text):
            edited = (at, "")
        return Placed(spans, list(dict.fromkeys(dropped)), edited)

    def _check_order(self, numbers: list[int]) -> None:
        """Contents and reasoning stand once each, message after message."""
        order = [number for number in numbers if self.fields[number].section in (CONTENT, REASONING)]
        where = self.transcript.source or self.transcript.id
        for what, wrong in (("repeats", _repeated(order)), ("reorders", _early(order, self.fields))):
            if wrong is not None:
                message = self.fields[wrong].message
                assert message is not None  # tools are neither
                raise TemplateError(
                    f"{where}: the chat template {what} message {message} ({self.transcript.messages[message].role})",
                    "a template that writes every message once, in order",
                    "merge or remove the message (such as a system message that the template does not know)",
                )


def _repeated(order: list[int]) -> int | None:
    seen: set[int] = set()
    for number in order:
        if number in seen:
            return number
        seen.add(number)
    return None


def _early(order: list[int], fields: list[Field]) -> int | None:
    """A field whose message comes after a later one's; within a message parts stand as the template wants."""
    highest = -1
    for number in order:
        message = fields[number].message
        assert message is not None
        if message < highest:
            return number
        highest = message
    return None


def _marked_call(call: Mapping[str, Any], mark: Callable[[str], str]) -> Mapping[str, Any]:
    return {"name": mark(call["name"]), "arguments": _marked_leaves(call["arguments"], mark)}


def _marked_leaves(value: Any, mark: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, Mapping):
        return {key: _marked_leaves(inner, mark) for key, inner in value.items()}
    return [_marked_leaves(inner, mark) for inner in value] if isinstance(value, list) else value


def _marked_tool(tool: Mapping[str, Any], mark: Callable[[str], str]) -> Mapping[str, Any]:
    function = tool["function"]
    texts = {key: mark(function[key]) for key in ("name", "description") if isinstance(function.get(key), str)}
    return {**tool, "function": {**function, **texts}}
