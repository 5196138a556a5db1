"""What a transcript is: messages with roles, the model that it names, and where it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nla.errors import TranscriptError, visible

ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES = {"human": "user", "ai": "assistant", "model": "assistant", "bot": "assistant", "function": "tool"}
PLACEHOLDERS = ("image", "audio", "video", "document", "data", "file")

_SHOWN = 60


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    """One of ``ROLES``."""

    content: str
    """What was written; empty for an assistant that only calls tools."""

    calls: tuple[Mapping[str, Any], ...] = ()
    """Tool calls: each a name and its arguments."""

    reasoning: str = ""
    """Thinking that was written apart from the answer, if the transcript holds it."""

    id: str | None = None
    """As the transcript's own format names it."""

    call_id: str | None = None
    """For a tool's answer: the call that it answers."""

    @property
    def visible(self) -> str:
        """All that can be read in the message: reasoning, content and tool calls, with a line break between them.

        The content starts at ``content_start``.
        """
        calls = [json.dumps(dict(call), ensure_ascii=False) for call in self.calls]
        return "\n".join([*([self.reasoning] if self.reasoning else []), self.content, *calls])

    @property
    def content_start(self) -> int:
        """Where the content starts in ``visible``, in characters."""
        return len(self.reasoning) + 1 if self.reasoning else 0

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        entry: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.calls:
            entry["tool_calls"] = [
                {"type": "function", "id": f"call{n}", "function": dict(call)} for n, call in enumerate(self.calls)
            ]
        if self.reasoning:
            entry["reasoning_content"] = self.reasoning
        if self.call_id:
            entry["tool_call_id"] = self.call_id
        return entry


@dataclass(frozen=True)
class Transcript:
    """A conversation to audit."""

    id: str
    """Its own name, or its file's; unique in an audit."""

    messages: tuple[Message, ...]

    model: str | None = None
    """The model that it says it is of."""

    source: str = ""
    """File it came from, with line or sample."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else the file says of it; kept for the reader, never interpreted."""

    def __post_init__(self) -> None:
        if not self.messages:
            raise bad(self.source or self.id, "no messages", "at least one message", "leave it out")
        for number, message in enumerate(self.messages):
            if message.role not in ROLES:
                raise bad(
                    self.source or self.id,
                    f"the role {message.role!r} in message {number}",
                    f"one of {', '.join(ROLES)}",
                    "rename the role",
                )
            check_characters(message.visible, f"{self.source or self.id}, message {number}")

    @property
    def digest(self) -> str:
        """SHA-256 of what was said, by whom: what an audit depends on."""
        content = [[message.role, message.visible, message.content_start] for message in self.messages]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def bad(source: str, got: str, expected: str, fix: str) -> TranscriptError:
    """An error that names the transcript; what comes from the file is made safe to show."""
    return TranscriptError(visible(f"{source}: {got}"), expected, fix)


def check_characters(text: str, source: str) -> None:
    """Refuse what is no text: lone surrogates and NUL.

    Other control characters (a terminal's colours in a tool's output) are text; they are spelled out where shown.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = f"the lone surrogate {text[error.start]!r} at character {error.start}"
        raise bad(source, got, "whole characters", "read the file as UTF-8 and replace broken characters") from error
    if "\0" in text:
        got = f"a NUL at character {text.index(chr(0))}"
        raise bad(source, got, "text", "remove it: it is no character of any text")


def parse_messages(entries: Any, source: str) -> tuple[Message, ...]:
    """Messages from OpenAI-style entries: role, content as a string or a list of parts, tool calls.

    Raises:
        TranscriptError: not a list of such entries.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str | bytes) or not entries:
        got = "no messages" if entries in ([], None, "") else f"messages that are a {type(entries).__name__}"
        raise bad(source, got, "a list of messages with role and content", "check the file")
    return tuple(parse_message(entry, f"{source}, message {number}") for number, entry in enumerate(entries))


def parse_message(entry: Any, source: str) -> Message:
    """One message of :func:`parse_messages`."""
    if not isinstance(entry, Mapping):
        raise bad(source, f"a {type(entry).__name__}", "an object with role and content", "check the file")
    role = entry.get("role")
    if not isinstance(role, str):
        got = "no role" if role is None else f"a role that is a {type(role).__name__}"
        raise bad(source, got, f"one of {', '.join(ROLES)}", "give the message its role")
    role = ALIASES.get(role.lower(), role.lower())
    if role not in ROLES:
        raise bad(source, f"the role {role[:_SHOWN]!r}", f"one of {', '.join(ROLES)}", "rename the role")
    calls = _calls(entry.get("tool_calls") or ([entry["function_call"]] if entry.get("function_call") else []), source)
    content, reasoning = _content(entry.get("content"), source)
    apart = entry.get("reasoning_content")
    reasoning = apart if isinstance(apart, str) and apart else reasoning
    if not content and not calls and not reasoning:
        got = "no content" if entry.get("content") is None else "empty content"
        raise bad(source, got, "content, or tool calls", "leave the message out, or restore what it said")
    name, call = entry.get("id"), entry.get("tool_call_id")
    return Message(
        role,
        content,
        calls,
        reasoning,
        name if isinstance(name, str) else None,
        call if isinstance(call, str) else None,
    )


def _content(content: Any, source: str) -> tuple[str, str]:
    """The text and the reasoning of a message's content; what is no text leaves a placeholder such as "[image]"."""
    if content is None or isinstance(content, str):
        return content or "", ""
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        got = f"content that is a {type(content).__name__}"
        raise bad(source, got, "a string or a list of parts", "check the file")
    texts, reasoning = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(kind, str) and kind.removeprefix("input_").removeprefix("output_") == "text":
            texts.append(_text(part, "text", source))
        elif kind in ("reasoning", "thinking"):
            reasoning.append(_text(part, kind, source))
        elif kind == "refusal":
            texts.append(_text(part, "refusal", source))
        elif isinstance(kind, str) and kind.removeprefix("input_").removesuffix("_url") in PLACEHOLDERS:
            texts.append(f"[{kind.removeprefix('input_').removesuffix('_url')}]")
        elif kind in ("tool_use", "tool_result"):
            texts.append(json.dumps(dict(part), ensure_ascii=False, default=str))
        else:
            got = f"a part of type {str(kind)[:_SHOWN]!r}" if isinstance(part, Mapping) else f"a {type(part).__name__}"
            raise bad(source, got, "parts of type text, reasoning or a medium", "convert the part to text")
    return "\n".join(texts), "\n".join(reasoning)


def _text(part: Mapping[str, Any], key: str, source: str) -> str:
    value = part.get(key)
    if not isinstance(value, str):
        got = f"a part of type {key!r} whose {key} is a {type(value).__name__}"
        raise bad(source, got, "a string there", "check the file")
    return value


def _calls(entries: Any, source: str) -> tuple[Mapping[str, Any], ...]:
    """Tool calls as name and arguments; OpenAI nests them in ``function``, Inspect writes the name there."""
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise bad(source, f"tool calls that are a {type(entries).__name__}", "a list of calls", "check the file")
    calls = []
    for entry in entries:
        inner = entry.get("function", entry) if isinstance(entry, Mapping) else None
        inner = {"name": inner, "arguments": entry.get("arguments")} if isinstance(inner, str) else inner
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(name, str):
            raise bad(source, "a tool call without a name", "a function with name and arguments", "check the file")
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments else {}
            except (ValueError, RecursionError):  # a model's own malformed arguments are kept as it wrote them
                arguments = {"arguments": arguments}
        calls.append({"name": name, "arguments": arguments if isinstance(arguments, Mapping) else {"value": arguments}})
    return tuple(calls)
