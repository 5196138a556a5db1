"""A transcript with a mark in the place of each of its fields in, and where a rendered text has the fields out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import Any, NamedTuple

from nla.errors import TemplateError
from nla.transcripts.messages import Message, Transcript

CONTROL, REASONING, CONTENT, CALLS, TOOLS = "control", "reasoning", "content", "calls", "tools"
"""Parts of a message: what the template adds, thinking, what was written, tool calls, and the tools on offer."""

NAMES = {REASONING: "reasoning", CONTENT: "content", CALLS: "tool calls", TOOLS: "list of tools"}
"""What readers know parts by."""
_PARAMETERS = "parameters of tools"
_COMPUTED = frozenset({"type", "required", "format", "$ref", "$schema", "$id"})
"""Keywords of JSON Schema whose values templates branch on or translate: they are not marked."""
_GIVEN = frozenset({"default", "enum", "const", "examples"})
"""Keywords whose values are arguments: there true and false are marked, which elsewhere (nullable) are branched on."""
_OPEN, _CLOSE, _ESCAPED = "\ue000", "\ue001", "\\ue000"
_FIRST_PREFIX = 731_902_548
"""A number is marked by a number, so that a template still writes one: nine digits that are nowhere else, and nine."""
_SHOWN = 40


class Field(NamedTuple):
    """Something that was written in a transcript."""

    message: int | None
    section: str
    value: str | float
    what: str
    """Its name for readers."""

    def spellings(self) -> list[str]:
        """How a template may write it: as it is; values and words of calls and tools as JSON or Python does; reasoning
        also trimmed."""
        value = self.value
        if not isinstance(value, str):
            return [json.dumps(value), str(value)]
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


class Edit(NamedTuple):
    """Where a rendered text is not the template's own with the fields in it."""

    at: int
    """The first character that is another one."""
    expected: str
    """What would have to stand there, from that character on."""
    section: str
    """Of the field there."""


def _edit(text: str, at: int, expected: str, section: str) -> Edit:
    """From the first character on that is another one than expected."""
    written = text[at : at + len(expected)]
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(written, expected, strict=False)))
    return Edit(at + same, expected[same : same + _SHOWN], section)


class Placed(NamedTuple):
    """What a template made of a transcript's fields."""

    spans: list[Span]
    """In the order of the text; the last of a list of tools goes on to the list's end."""
    dropped: list[tuple[int | None, str]]
    """Message and name of what is not in the text, in order, each once."""
    edited: Edit | None
    moved: bool
    """Messages are numbered as in :func:`texts_after_tools`: so the template writes them."""


class Moved(NamedTuple):
    """A transcript with messages in another order."""

    transcript: Transcript
    places: Mapping[tuple[int, str], int]
    """The number now of the message that a section of an old one belongs to."""


def texts_after_tools(transcript: Transcript) -> Moved:
    """The transcript with text beside calls as a message after the tools' answers, as Gemma 4's template has it."""
    messages: list[Message] = []
    places: dict[tuple[int, str], int] = {}
    waiting: tuple[int, Message] | None = None

    def add(number: int, message: Message, *sections: str) -> None:
        places.update({(number, section): len(messages) for section in sections})
        messages.append(message)

    for number, message in enumerate(transcript.messages):
        if waiting is not None and message.role != "tool":
            add(*waiting, CONTENT)
            waiting = None
        is_apart = not any(message.tags)
        if message.calls and message.content and is_apart:
            waiting = number, replace(message, calls=(), call_ids=(), untagged="", reasoning="")
            message = replace(message, content="", untagged="", unseen=(), summary="")
        add(number, message, REASONING, CALLS, *([] if waiting and waiting[0] == number else [CONTENT]))
    if waiting is not None:
        add(*waiting, CONTENT)
    return Moved(replace(transcript, messages=tuple(messages)), places)


@dataclass(frozen=True)
class Marked:
    """A transcript whose fields are marks."""

    transcript: Transcript
    fields: list[Field]
    """Mark ``n`` stands for field ``n``."""
    shortened: Transcript | None
    """The same with a last tool that takes no parameters: what both renderings end with is not of the list. None
    without tools."""
    pattern: re.Pattern[str]
    """Finds marks in a text that was rendered with them."""

    @classmethod
    def of(cls, transcript: Transcript) -> Marked:
        """Replace everything that was written; what is empty stays so, because templates look at that.

        Raises:
            TemplateError: something in a message or a tool holds the private character that marks begin with, or is
                nested too deep.
        """
        try:
            return cls._of(transcript)
        except RecursionError as error:
            got = f"{transcript.source or transcript.id}: arguments or parameters nested too deep"
            raise TemplateError(got, "what Python can walk through", "leave the call or the tool out") from error

    @classmethod
    def _of(cls, transcript: Transcript) -> Marked:
        given = _given(transcript)
        _refuse_private(transcript, given, _OPEN)
        prefix = next(n for n in count(_FIRST_PREFIX) if not any(str(n) in text for _, text in given))
        fields: list[Field] = []

        def mark(message: int | None, section: str, what: str = "") -> Callable[[Any], Any]:
            def marked(value: Any) -> Any:
                is_number = isinstance(value, int | float)
                if not is_number and not (isinstance(value, str) and value):
                    return value
                fields.append(Field(message, section, value, what or NAMES[section]))
                number = len(fields) - 1
                return int(f"{prefix}{number:09d}") if is_number else f"{_OPEN}{number}{_CLOSE}"

            return marked

        listed, parameters = mark(None, TOOLS), mark(None, TOOLS, _PARAMETERS)
        tools = tuple(_marked_tool(tool, listed, parameters) for tool in transcript.tools)
        messages = tuple(
            replace(
                message,
                reasoning=mark(number, REASONING)(message.reasoning),
                content=mark(number, CONTENT)(message.content),
                calls=tuple(_marked_call(call, mark(number, CALLS)) for call in message.calls),
            )
            for number, message in enumerate(transcript.messages)
        )
        marked = replace(transcript, messages=messages, tools=tools)
        _refuse_private(transcript, _given(marked), _ESCAPED)  # in what has no mark: a key, a name
        shortened = replace(marked, tools=(*tools[:-1], _without_parameters(tools[-1]))) if tools else None
        pattern = rf"(?:\ue000|\\ue000)([0-9]{{1,9}})(?:\ue001|\\ue001)|{prefix}([0-9]{{9}})"
        return cls(marked, fields, shortened, re.compile(pattern))

    def place(self, marked_text: str, text: str, shortened_text: str | None = None) -> Placed:
        """Find the fields in a rendered text, by where their marks stand in the other.

        Args:
            shortened_text: ``shortened``, rendered; None: lists of tools end with their last mark.

        Raises:
            TemplateError: the template repeats or reorders messages, or writes marks of its own.
        """
        literals, numbers = self._split(marked_text)
        message_of = self._messages_in_order(numbers)
        seen = set(numbers)
        dropped = dict.fromkeys((message_of[n], one.what) for n, one in enumerate(self.fields) if n not in seen)
        if (None, NAMES[TOOLS]) in dropped:
            dropped.pop((None, _PARAMETERS), None)
        rests = self._rests(literals, numbers, shortened_text)
        spans, at = [], len(literals[0])
        edited = None if text.startswith(literals[0]) else _edit(text, 0, literals[0], CONTENT)
        for place, number in enumerate(numbers):
            if edited is not None:
                break
            one, after = self.fields[number], literals[place + 1]
            fitting = (
                spelling
                for spelling in one.spellings()
                if text.startswith(spelling, at) and text.startswith(after, at + len(spelling))
            )
            spelling = next(fitting, None)
            if spelling is None:
                edited = _edit(text, at, one.spellings()[0] + after, one.section)
                break
            end = at + len(spelling)
            message = message_of[number]
            if one.section != CALLS or not spans or (spans[-1].message or 0) <= (message or 0):
                spans.append(Span(at, end + rests.get(place, 0), message, one.section))
            # Otherwise a template repeats a call's name where it writes its answer (Gemma 4's): that is its own text.
            at = end + len(after)
        if edited is None and at != len(text):
            edited = Edit(at, "", CONTENT)
        moved = any(one.message != message for one, message in zip(self.fields, message_of, strict=True))
        return Placed(spans, list(dropped), edited, moved)

    def _split(self, marked_text: str) -> tuple[list[str], list[int]]:
        """What stands between the marks, and their numbers."""
        literals, numbers, at = [], [], 0
        for match in self.pattern.finditer(marked_text):
            literals.append(marked_text[at : match.start()])
            numbers.append(int(match[1] or match[2]))
            at = match.end()
        if any(number >= len(self.fields) for number in numbers):
            where = self.transcript.source or self.transcript.id
            got = f"{where}: a chat template that writes the private character U+E000"
            raise TemplateError(got, "text without it", "use the tokenizer as its makers published it")
        return [*literals, marked_text[at:]], numbers

    def _rests(self, literals: list[str], numbers: list[int], shortened_text: str | None) -> dict[int, int]:
        """Of each mark that ends a list of tools: characters of the list after it."""
        if shortened_text is None:
            return {}
        ends, others = self._list_ends(numbers), self._split(shortened_text)
        other_ends = self._list_ends(others[1])
        if len(ends) != len(other_ends):
            return {}
        rests = {}
        for end, other in zip(ends, other_ends, strict=True):
            after, other_after = literals[end + 1], others[0][other + 1]
            backwards = zip(reversed(after), reversed(other_after), strict=False)
            rests[end] = len(after) - sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], backwards))
        return rests

    def _list_ends(self, numbers: list[int]) -> list[int]:
        of_tools = [*(self.fields[number].section == TOOLS for number in numbers), False]
        return [place for place in range(len(numbers)) if of_tools[place] and not of_tools[place + 1]]

    def _messages_in_order(self, numbers: list[int]) -> list[int | None]:
        """The message of each field: contents and reasoning stand once each, message after message."""
        message_of = [one.message for one in self.fields]
        order = [number for number in numbers if self.fields[number].section in (CONTENT, REASONING)]
        what, wrong = "repeats", _repeated(order)
        if wrong is None:
            what, wrong = "reorders", _early(order, message_of)
        if wrong is not None and what == "reorders":
            places = texts_after_tools(self.transcript).places
            moved = [None if one.message is None else places[one.message, one.section] for one in self.fields]
            placed = [number for number in dict.fromkeys(numbers) if self.fields[number].message is not None]
            if _early(placed, moved) is None:
                return moved
        if wrong is not None:
            message = self.fields[wrong].message
            assert message is not None  # tools are neither
            where = self.transcript.source or self.transcript.id
            raise TemplateError(
                f"{where}: the chat template {what} message {message} ({self.transcript.messages[message].role})",
                "a template that writes every message once, in order",
                "merge or remove the message (such as a system message that the template does not know)",
            )
        return message_of


def _repeated(order: list[int]) -> int | None:
    seen: set[int] = set()
    for number in order:
        if number in seen:
            return number
        seen.add(number)
    return None


def _early(order: list[int], message_of: Sequence[int | None]) -> int | None:
    """A field whose message comes after a later one's; within a message parts stand as the template wants."""
    highest = -1
    for number in order:
        message = message_of[number]
        assert message is not None
        if message < highest:
            return number
        highest = message
    return None


def _given(transcript: Transcript) -> list[tuple[str, str]]:
    """Each message, and the tools, as JSON of what templates are given, with names for readers."""
    parts = [(f"message {number}", message.for_template()) for number, message in enumerate(transcript.messages)]
    parts += [("its tools", dict(tool)) for tool in transcript.tools]
    return [(where, json.dumps(part, ensure_ascii=False, default=str)) for where, part in parts]


def _refuse_private(transcript: Transcript, given: list[tuple[str, str]], character: str) -> None:
    for where, text in given:
        if character in text:
            got = f"{transcript.source or transcript.id}: {where} with the private character U+E000"
            raise TemplateError(got, "text without it", "remove it")


def _marked_call(call: Mapping[str, Any], mark: Callable[[Any], Any]) -> Mapping[str, Any]:
    name, given = mark(call["name"]), call["arguments"]
    arguments = _marked_leaves(given, mark)
    if given and arguments == given and isinstance(given, Mapping):
        # Empty texts, null: only the names show whether they are read. The last one stays so where a template sorts.
        last = max(given, key=lambda name: str(name).lower())
        arguments = {mark(name) if name == last else name: value for name, value in given.items()}
    return {"name": name, "arguments": arguments}


def _marked_leaves(value: Any, mark: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _marked_leaves(inner, mark) for key, inner in value.items()}
    return [_marked_leaves(inner, mark) for inner in value] if isinstance(value, list) else mark(value)


def _marked_schema(value: Any, mark: Callable[[Any], Any]) -> Any:
    if isinstance(value, list):
        return [_marked_schema(inner, mark) for inner in value]
    if not isinstance(value, Mapping):
        return value if isinstance(value, bool) else mark(value)
    marked = {}
    for key, inner in value.items():  # a mapping is a parameter of that name, or more schema
        is_keyword = not isinstance(inner, Mapping)
        way = _marked_leaves if is_keyword and key in _GIVEN else _marked_schema
        marked[key] = inner if is_keyword and key in _COMPUTED else way(inner, mark)
    return marked


def _marked_tool(
    tool: Mapping[str, Any], mark: Callable[[Any], Any], mark_parameter: Callable[[Any], Any]
) -> Mapping[str, Any]:
    function = tool["function"]
    texts = {key: mark(function[key]) for key in ("name", "description") if key in function}
    if "parameters" in function:
        texts["parameters"] = _marked_schema(function["parameters"], mark_parameter)
    return {**tool, "function": {**function, **texts}}


def _without_parameters(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**tool, "function": {**tool["function"], "parameters": {"type": "object", "properties": {}}}}
