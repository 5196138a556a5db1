"""What a transcript is: messages with roles, the tools they may call, the model named, and where it all came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from nla.errors import TranscriptError, visible

ROLES = ("system", "user", "assistant", "tool")
ALIASES = {"developer": "system", "human": "user", "ai": "assistant", "model": "assistant", "bot": "assistant"}
ALIASES |= {"gpt": "assistant", "chatgpt": "assistant", "function": "tool", "observation": "tool", "ipython": "tool"}
"""Other names of the roles, as programs and data sets write them."""

ENCRYPTED = "encrypted reasoning"
"""What ``Message.unseen`` calls reasoning that its author's provider has locked: nobody here can read it."""


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
    """Thinking that was written apart from the answer, or before it in think tags."""

    id: str | None = None
    """Its id in the transcript's own format, if it has one."""

    call_id: str | None = None
    """For a tool's answer: the call that it answers."""

    call_ids: tuple[str, ...] = ()
    """The ids of ``calls`` in the transcript; empty where it has none."""

    name: str | None = None
    """For a tool's answer: the name of the tool."""

    unseen: tuple[str, ...] = ()
    """Parts of the message that are not text, such as "image": no target reads them."""

    summary: str = ""
    """The provider's summary of encrypted reasoning: not the model's words, never given to a target, never searched."""

    tags: tuple[str, str] = ("", "")
    """Where reasoning stood inside the content: what was written before it, and between it and the answer."""

    untagged: str = ""
    """The content as it stood, where calls, or a tool's answer, were written into it in tags."""

    continues: bool = False
    """It goes on with the message before it: in the transcript both are one, in which thinking or text came again."""

    @property
    def visible(self) -> str:
        """All that can be read in the message: reasoning, content and tool calls, with a line break between them."""
        calls = [json.dumps(dict(call), ensure_ascii=False) for call in self.calls]
        return "\n".join([*([self.reasoning] if self.reasoning else []), self.content, *calls])

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates take it: reasoning stands where the transcript has it."""
        opening, middle = self.tags
        inside = opening + self.reasoning + middle if opening or middle else ""
        entry: dict[str, Any] = {"role": self.role, "content": inside + self.content}
        if self.calls:
            ids = self.call_ids or [f"call{n:05d}" for n in range(len(self.calls))]
            entry["tool_calls"] = [
                {"type": "function", "id": name, "function": dict(call)}
                for name, call in zip(ids, self.calls, strict=True)
            ]
        if self.reasoning and not inside:
            entry["reasoning_content"] = self.reasoning
        if self.call_id:
            entry["tool_call_id"] = self.call_id
        if self.name:
            entry["name"] = self.name
        return entry

    def joined(self, rest: Message) -> Message:
        """The message with one that continues it: its reasoning, its content and its calls after this one's."""
        first, rest = self._untagged(), rest._untagged()
        return replace(
            first,
            content="\n".join(filter(None, (first.content, rest.content))),
            calls=(*first.calls, *rest.calls),
            reasoning="\n".join(filter(None, (first.reasoning, rest.reasoning))),
            call_ids=(*first.call_ids, *rest.call_ids)
            if len(first.call_ids) == len(first.calls) and len(rest.call_ids) == len(rest.calls)
            else (),
            unseen=(*first.unseen, *rest.unseen),
            summary="\n".join(filter(None, (first.summary, rest.summary))),
        )

    def _untagged(self) -> Message:
        """With what stands in tags inside the content as content."""
        message = self.with_tags()
        inside = message.tags[0] + message.reasoning + message.tags[1] if any(message.tags) else ""
        return replace(message, content=inside + message.content, reasoning="", tags=("", "")) if inside else message

    def with_tags(self) -> Message:
        """The message with its calls in tags inside the content, if the transcript writes them so."""
        return replace(self, content=self.untagged, calls=(), call_ids=(), untagged="") if self.untagged else self


@dataclass(frozen=True)
class Transcript:
    """A conversation to audit."""

    id: str
    """Its own name, or its file's; unique in an audit."""

    messages: tuple[Message, ...]

    model: str | None = None
    """The model that wrote it, as its file says."""

    source: str = ""
    """The file that it comes from, with line or sample."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else the file says of it; kept for the reader, never interpreted."""

    tools: tuple[Mapping[str, Any], ...] = ()
    """Tools that the model could call: OpenAI's functions, each with ``type`` and ``function``."""

    prefill: bool = False
    """The last message is the beginning of an answer: the target reads it without an end."""

    attributes: Mapping[str, Any] = field(default_factory=dict)
    """What is known of it, such as its topic, where its file says so: of a corpus, for who describes it."""

    split: str | None = None
    """Of a corpus, the split that it belongs to, where its file says so."""

    unused: tuple[str, ...] = ()
    """Fields of the file beside the messages that nothing here uses."""

    remarks: tuple[str, ...] = ()
    """What a reader must know of the transcript, such as that its log ended with an error."""

    def __post_init__(self) -> None:
        where = self.source or self.id
        if not self.messages:
            raise bad(where, "no messages", "at least one message", "leave it out")
        for number, message in enumerate(self.messages):
            if message.role not in ROLES:
                got = f"the role {message.role!r} in message {number}"
                raise bad(where, got, f"one of {', '.join(ROLES)}", "rename the role")
            check_characters(message.visible, f"{where}, message {number}")
        if self.prefill and (self.messages[-1].role != "assistant" or not self.messages[-1].content):
            got = f"a last message of the role {self.messages[-1].role!r} that is to be continued"
            raise bad(where, got, "the beginning of an assistant's answer", "leave out what marks it as a prefix")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what was said, by whom: what an audit depends on."""
        content: list[Any] = [
            [message.role, message.visible, len(message.reasoning) + 1 if message.reasoning else 0]
            for message in self.messages
        ]
        if self.tools or self.prefill:
            content.append([[dict(tool) for tool in self.tools], self.prefill])
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def known_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the row of a corpus says of its conversation: ``attributes`` and ``split`` of a :class:`Transcript`."""
    attributes = row.get("attributes")
    return {"attributes": dict(attributes) if isinstance(attributes, Mapping) else {}, "split": row.get("split")}


def role_of(name: str) -> str:
    """A role under our name; another name is kept as it is.

    >>> role_of("Human")
    'user'
    """
    return ALIASES.get(name.lower(), name.lower())


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
