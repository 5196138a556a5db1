"""Entries of decoded JSON in, messages out: what OpenAI, Anthropic, Bedrock, Mistral, Ollama and Inspect write for one.

Content is a string or a list of parts. What is no text (images, encrypted reasoning) is kept out of it and named in
``Message.unseen``; a part that nobody here knows is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nla.transcripts.calls import parse_calls, split_calls
from nla.transcripts.messages import ENCRYPTED, ROLES, Message, bad, role_of

MEDIA = ("image", "audio", "video", "document", "file", "data")
"""What parts may be besides text, under these names alone, with "input_" before or "_url" after."""

_TEXT = ("text", "input_text", "output_text")
_THOUGHTS = ("reasoning", "thinking", "redacted_thinking")
_SHOWN = 60
_THOUGHT = re.compile(r"(\s*<think>\n*|)(.*?)(\n*</think>\s*)(.*)", re.DOTALL)
_READ = {"role", "content", "tool_calls", "function_call", "refusal", "reasoning_content", "reasoning", "thinking"}
_READ |= {"reasoning_details", "images", "tool_call_id", "id", "tool_name", "function", "prefix", "partial"}
_READ |= {"type", "status", "index", "parts"}
"""Keys of entries that are read, or say nothing that their place does not say."""
_READ_ANSWER = {"type", "tool_use_id", "toolUseId", "content", "cache_control"}
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


def unused_keys(entries: Sequence[Any]) -> set[str]:
    """Keys of entries, and of tools' answers inside them, that nothing here reads and that have a value."""
    keys: set[str] = set()
    for entry in _mappings(list(entries)):
        read = _READ | ({"name", "error"} if role_of(str(entry.get("role"))) == "tool" else set())
        keys |= {key for key, value in entry.items() if key not in read and _says(value)}
        for part in map(_typed, _mappings(entry.get("content"))):
            if part.get("type") == "tool_result":
                keys |= {key for key, value in part.items() if key not in _READ_ANSWER and _says(value)}
    return set(map(str, keys))


def _says(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {})


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
    _refuse_elsewhere(entry, source)
    content: Any = entry.get("content")
    if role == "assistant" and len(pieces := _in_order(content)) > 1:
        entries = [{"role": role, "content": piece} for piece in pieces]
        calls = {key: entry[key] for key in ("tool_calls", "function_call") if key in entry}
        entries[0] = {**{key: value for key, value in entry.items() if key not in calls}, **entries[0]}
        entries[-1] |= calls
        read = [message for one in entries for message in parse_entry(one, source)]
        before = [None, *(message.role for message in read)]
        return [replace(one, continues=one.role == role == last) for one, last in zip(read, before, strict=False)]
    parts, error = _Parts(), entry.get("error")
    if role == "tool" and isinstance(error, Mapping) and error.get("message"):  # Inspect gives models this alone
        parts.texts.append(_text(error, "message", source))
    else:
        _read_content(content, parts, source)
    _read_beside(entry, parts, source)
    calls, call_ids = parse_calls(parts.calls, source)
    content, untagged, tags = "\n".join(parts.texts), "", ("", "")
    reasoning = "\n".join(parts.reasoning)
    if role == "assistant" and not reasoning:
        tags, reasoning, content = _split_thought(content)
    if role == "assistant" and not calls:
        calls, untagged, content = split_calls(content, source)
    elif role == "tool" and (match := _ANSWER.fullmatch(content)) and "<tool_response>" not in match[1]:
        untagged, content = content, match[1]
    silent = role == "tool" and "content" in entry and not parts.answers  # a command that printed nothing
    if not (content or calls or reasoning or parts.unseen or parts.answers or silent):
        got = "no content" if entry.get("content") is None else "empty content"
        raise bad(source, got, "content, or tool calls", "leave the message out, or restore what it said")
    if not (content or calls or reasoning or parts.unseen or silent):
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


def _refuse_elsewhere(entry: Mapping[str, Any], source: str) -> None:
    """Refuse Vercel's AI SDK, which writes calls, or all that was said, under names of its own beside the content."""
    kinds = {str(part.get("type")) for part in _mappings(entry.get("parts"))}
    if "content" not in entry and "parts" in entry:
        got = "parts in the place of content"
    elif entry.get("toolInvocations") or kinds - {"text", "step-start"}:
        got = "calls or parts beside the content (toolInvocations, parts)"
    else:
        return
    raise bad(source, got, "content: a string or a list of parts", "convert the messages to OpenAI's form")


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
    _read_reasoning(entry, parts)
    images = entry.get("images")
    parts.unseen += ["image"] * (len(images) if isinstance(images, list) else 0)


def _read_reasoning(entry: Mapping[str, Any], parts: _Parts) -> None:
    """Reasoning beside the content; where OpenRouter's details say that it is locked, what is written is a summary."""
    beside = [entry.get(key) for key in ("reasoning_content", "reasoning", "thinking")]
    beside = [text for text in beside if isinstance(text, str) and text][:1]
    details = _mappings(entry.get("reasoning_details"))
    texts, summaries = _texts_of(details, "text"), _texts_of(details, "summary")
    n_encrypted = sum(detail.get("type") == "reasoning.encrypted" for detail in details)
    if not (n_encrypted or (summaries and not texts)):
        parts.reasoning[:] = beside or texts or parts.reasoning
        parts.summaries += summaries
        return
    parts.unseen += [ENCRYPTED] * max(n_encrypted, 1)
    if any(detail.get("signature") for detail in details):  # Anthropic's words, next to some that it locked
        parts.reasoning[:] = texts
        parts.summaries += summaries
    else:
        parts.summaries += summaries or texts or beside


def _texts_of(details: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    texts = [detail.get(kind) for detail in details if detail.get("type") == f"reasoning.{kind}"]
    return [text for text in texts if isinstance(text, str) and text]


def _in_order(content: Any) -> list[list[Any]]:
    """A list of parts cut where the model thinks after it wrote or called, or writes after it called.

    Templates write the reasoning of a message first, then its text, then its calls: each piece is in that order.
    """
    pieces: list[list[Any]] = [[]]
    reached = 0
    for part in content if isinstance(content, list) else ():
        typed = _typed(part) if isinstance(part, Mapping) else {"type": "text", "text": part}
        kind = str(typed.get("type"))
        words = None if typed.get("redacted") is True else typed.get("text" if kind in _TEXT else kind)
        said = words if isinstance(words, list) else isinstance(words, str) and words.strip()
        stage = 3 if kind == "tool_use" else 0 if not said else 1 if kind in _THOUGHTS else 2 if kind in _TEXT else 0
        if stage and stage < reached:
            pieces.append([])
        reached = stage or reached
        pieces[-1].append(part)
    return pieces


def _typed(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part with its type: Bedrock writes the type as the only key, with what belongs to it inside."""
    keys = [key for key, value in part.items() if value is not None]
    if part.get("type") is not None or len(keys) != 1:
        return part
    inner = part[keys[0]] if isinstance(part[keys[0]], Mapping) else {}
    if keys == ["toolUse"]:
        return {"type": "tool_use", **inner, "id": inner.get("toolUseId")}
    if keys == ["toolResult"]:
        return {"type": "tool_result", **inner, "tool_use_id": inner.get("toolUseId")}
    if keys == ["reasoningContent"] and inner:
        words = inner.get("reasoningText")
        if not isinstance(words, Mapping):
            return {"type": "redacted_thinking"}
        return {"type": "thinking", "thinking": words.get("text"), "signature": words.get("signature")}
    return {**part, "type": keys[0]} if keys[0] in ("text", "json", "cachePoint", *MEDIA) else part


def _read_part(part: Any, parts: _Parts, source: str) -> None:
    part = _typed(part) if isinstance(part, Mapping) else part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, str):
        parts.texts.append(part)
    elif not isinstance(part, Mapping):
        raise bad(source, f"a {type(part).__name__}", "parts with a type", "convert the part to text")
    elif kind in _TEXT:
        parts.texts.append(_text(part, "text", source))
    elif kind == "refusal":
        parts.texts.append(_text(part, "refusal", source))
    elif kind in _THOUGHTS:
        _read_thought(part, parts, source)
    elif kind == "tool_use" and "tool_type" in part:  # Inspect's name for what ran at the provider
        got = f"a tool that the provider ran itself ({str(part.get('name'))[:_SHOWN]})"
        raise bad(source, got, "text and calls that a target could read", "leave such conversations out")
    elif kind == "tool_use":
        parts.calls.append([part])
    elif kind == "tool_result":
        parts.answers.append(_answer(part, source))
    elif kind == "json" and "json" in part:  # Bedrock's, in the answer of a tool
        parts.texts.append(json.dumps(part["json"], ensure_ascii=False))
    elif kind == "cachePoint":
        pass
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
