"""Entries of decoded JSON in, messages out: what OpenAI, Anthropic, Bedrock, Mistral, Ollama and Inspect write for one.

Content is a string or a list of parts. What is no text (images, encrypted reasoning) is kept out of it and named in
``Message.unseen``; a part that nobody here knows is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nla.transcripts.messages import ENCRYPTED, ROLES, Message, bad, role_of

MEDIA = ("image", "audio", "video", "document", "file", "data")
"""What parts may be besides text, under these names alone, with "input_" before or "_url" after."""

_TEXT = ("text", "input_text", "output_text")
_SHOWN = 60
_THOUGHT = re.compile(r"(\s*<think>\n*|)(.*?)(\n*</think>\s*)(.*)", re.DOTALL)
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_ANSWER = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)


def parse_messages(entries: Any, source: str) -> tuple[Message, ...]:
    """Messages from a list of entries; one that answers several tools becomes several.

    Raises:
        TranscriptError: not a list of such entries.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str | bytes) or not entries:
        got = "no messages" if entries in ([], None, "") else f"messages that are a {type(entries).__name__}"
        raise bad(source, got, "a list of messages with role and content", "check the file")
    return tuple(
        message for number, entry in enumerate(entries) for message in parse_entry(entry, f"{source}, message {number}")
    )


@dataclass
class _Parts:
    """What a message's content holds, by kind."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    summaries: list[str] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)
    answers: list[Message] = field(default_factory=list)
    """Tools' answers inside a user's message, as Anthropic and Bedrock write them."""
    unseen: list[str] = field(default_factory=list)


def parse_entry(entry: Any, source: str) -> list[Message]:
    """The messages of one entry: itself, after the tools' answers that it holds.

    Raises:
        TranscriptError: no role, an unknown role, no content, or a part or call of no known kind.
    """
    if not isinstance(entry, Mapping):
        raise bad(source, f"a {type(entry).__name__}", "an object with role and content", "check the file")
    role = _role(entry, source)
    if "content" not in entry and "parts" in entry:
        got = "parts in the place of content"
        raise bad(source, got, "content: a string or a list of parts", "convert the messages to OpenAI's form")
    parts = _Parts()
    _read_content(entry.get("content"), parts, source)
    _read_beside(entry, parts, source)
    calls, call_ids = parse_calls(parts.calls, source)
    content, untagged, tags = "\n".join(parts.texts), "", ("", "")
    reasoning = "\n".join(parts.reasoning)
    if role == "assistant" and not reasoning:
        tags, reasoning, content = _split_thought(content)
    if role == "assistant" and not calls:
        calls, untagged, content = _split_calls(content, source)
    elif role == "tool" and (match := _ANSWER.fullmatch(content)) and "<tool_response>" not in match[1]:
        untagged, content = content, match[1]
    if not (content or calls or reasoning or parts.unseen or parts.answers):
        got = "no content" if entry.get("content") is None else "empty content"
        raise bad(source, got, "content, or tool calls", "leave the message out, or restore what it said")
    if not (content or calls or reasoning or parts.unseen):
        return parts.answers
    message = Message(
        role,
        content,
        calls,
        reasoning,
        id=_word(entry, "id"),
        call_id=_word(entry, "tool_call_id"),
        call_ids=call_ids,
        name=(_word(entry, "name") or _word(entry, "tool_name") or _word(entry, "function"))
        if role == "tool"
        else None,
        unseen=tuple(parts.unseen),
        summary="\n".join(parts.summaries),
        tags=tags,
        untagged=untagged,
    )
    return [*parts.answers, message]


def _role(entry: Mapping[str, Any], source: str) -> str:
    role = entry.get("role")
    if not isinstance(role, str):
        got = "no role" if role is None else f"a role that is a {type(role).__name__}"
        raise bad(source, got, f"one of {', '.join(ROLES)}", "give the message its role")
    role = role_of(role)
    if role not in ROLES:
        raise bad(source, f"the role {role[:_SHOWN]!r}", f"one of {', '.join(ROLES)}", "rename the role")
    return role


def _word(entry: Mapping[str, Any], key: str) -> str | None:
    return entry[key] if isinstance(entry.get(key), str) else None


def _read_content(content: Any, parts: _Parts, source: str) -> None:
    if isinstance(content, str):
        parts.texts.append(content)
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        for part in content:
            _read_part(part, parts, source)
    elif content is not None:
        got = f"content that is a {type(content).__name__}"
        raise bad(source, got, "a string or a list of parts", "check the file")


def _read_beside(entry: Mapping[str, Any], parts: _Parts, source: str) -> None:
    """What stands beside the content: calls, refusals, reasoning under its several names, Ollama's images."""
    if entry.get("tool_calls"):
        parts.calls.append(entry["tool_calls"])
    if entry.get("function_call"):
        parts.calls.append([entry["function_call"]])
    if isinstance(entry.get("refusal"), str) and not entry.get("content"):
        parts.texts.append(entry["refusal"])
    beside = [entry.get(key) for key in ("reasoning_content", "reasoning", "thinking")]
    beside = [text for text in beside if isinstance(text, str) and text]
    if beside:
        parts.reasoning[:] = beside[:1]
    for detail in _mappings(entry.get("reasoning_details")):
        if detail.get("type") == "reasoning.encrypted":
            parts.unseen.append(ENCRYPTED)
        elif detail.get("type") == "reasoning.summary" and isinstance(detail.get("summary"), str):
            parts.summaries.append(detail["summary"])
        elif detail.get("type") == "reasoning.text" and not beside and isinstance(detail.get("text"), str):
            parts.reasoning.append(detail["text"])
    images = entry.get("images")
    parts.unseen += ["image"] * (len(images) if isinstance(images, list) else 0)


def _read_part(part: Any, parts: _Parts, source: str) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, str):
        parts.texts.append(part)
    elif not isinstance(part, Mapping):
        raise bad(source, f"a {type(part).__name__}", "parts with a type", "convert the part to text")
    elif kind in _TEXT or (kind is None and set(part) == {"text"}):
        parts.texts.append(_text(part, "text", source))
    elif kind == "refusal":
        parts.texts.append(_text(part, "refusal", source))
    elif kind in ("reasoning", "thinking", "redacted_thinking"):
        _read_thought(part, parts, source)
    elif kind == "tool_use" and "tool_type" in part:  # Inspect's name for what ran at the provider
        got = f"a tool that the provider ran itself ({str(part.get('name'))[:_SHOWN]})"
        raise bad(source, got, "text and calls that a target could read", "leave such conversations out")
    elif kind == "tool_use":
        parts.calls.append([{"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input", {})}])
    elif kind == "tool_result":
        parts.answers.append(_answer(part, source))
    elif medium(kind) is not None:
        parts.unseen.append(str(medium(kind)))
    else:
        got = f"a part of type {str(kind)[:_SHOWN]!r}"
        raise bad(source, got, f"parts of type text, reasoning, tool_use, tool_result, {', '.join(MEDIA)}",
                  "convert the part to text, or leave it out")  # fmt: skip


def medium(kind: Any) -> str | None:
    """What a part shows that is no text; None for other parts.

    >>> medium("input_image"), medium("image_url"), medium("text")
    ('image', 'image', None)
    """
    name = kind.removeprefix("input_").removesuffix("_url") if isinstance(kind, str) else ""
    return name if name in MEDIA else None


def _read_thought(part: Mapping[str, Any], parts: _Parts, source: str) -> None:
    """Reasoning in parts: Inspect's and Anthropic's, where it may be encrypted, and Mistral's, in parts of its own."""
    if part["type"] == "redacted_thinking" or part.get("redacted") is True:
        parts.unseen.append(ENCRYPTED)
        if isinstance(part.get("summary"), str) and part["summary"]:
            parts.summaries.append(part["summary"])
        return
    value = part.get(part["type"])
    if value == "" and part.get("signature"):  # Anthropic leaves the text out and signs what it was
        parts.unseen.append(ENCRYPTED)
    elif isinstance(value, list):
        parts.reasoning += [_text(inner, "text", source) for inner in _mappings(value)]
    else:
        parts.reasoning.append(_text(part, part["type"], source))


def _answer(part: Mapping[str, Any], source: str) -> Message:
    inner = _Parts()
    _read_content(part.get("content"), inner, source)
    call = part.get("tool_use_id")
    return Message("tool", "\n".join(inner.texts), call_id=call if isinstance(call, str) else None,
                   unseen=tuple(inner.unseen))  # fmt: skip


def _text(part: Mapping[str, Any], key: str, source: str) -> str:
    value = part.get(key)
    if not isinstance(value, str):
        got = f"a part of type {str(part.get('type'))[:_SHOWN]!r} whose {key} is a {type(value).__name__}"
        raise bad(source, got, "a string there", "check the file")
    return value


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _split_thought(content: str) -> tuple[tuple[str, str], str, str]:
    """What stands before, the reasoning with what follows it, and the answer, of content with think tags."""
    match = _THOUGHT.fullmatch(content) if content.count("</think>") == 1 else None
    if match is None or "<think>" in match[2]:
        return ("", ""), "", content
    return (match[1], match[3]), match[2], match[4]


def _split_calls(content: str, source: str) -> tuple[tuple[Mapping[str, Any], ...], str, str]:
    """Calls in Hermes' tags, the content with them, and the content without."""
    written = _CALL.findall(content)
    if not written:
        return (), "", content
    try:
        calls, _ = parse_calls([[json.loads(text) for text in written]], source)
    except (ValueError, RecursionError):  # what looks like a call and is none is text
        return (), "", content
    return calls, content, _CALL.sub("", content).strip()


def parse_calls(lists: Sequence[Any], source: str) -> tuple[tuple[Mapping[str, Any], ...], tuple[str, ...]]:
    """Tool calls as name and arguments, with their ids; OpenAI nests them in ``function``, Inspect names it there.

    Raises:
        TranscriptError: not lists of calls, or a call without a name.
    """
    calls, ids = [], []
    for entries in lists:
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise bad(source, f"tool calls that are a {type(entries).__name__}", "a list of calls", "check the file")
        for entry in entries:
            inner = entry.get("function", entry) if isinstance(entry, Mapping) else None
            inner = {"name": inner, "arguments": entry.get("arguments")} if isinstance(inner, str) else inner
            name = inner.get("name") if isinstance(inner, Mapping) else None
            if not isinstance(inner, Mapping) or not isinstance(name, str):
                raise bad(source, "a tool call without a name", "a function with name and arguments", "check the file")
            calls.append({"name": name, "arguments": _arguments(inner.get("arguments"))})
            ids.append(entry.get("id") if isinstance(entry.get("id"), str) else None)
    return tuple(calls), tuple(ids) if ids and all(ids) else ()


def _arguments(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value else {}
        except (ValueError, RecursionError):  # a model's own malformed arguments are kept as it wrote them
            value = {"arguments": value}
    return {} if value is None else value if isinstance(value, Mapping) else {"value": value}
