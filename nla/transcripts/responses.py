"""Items of OpenAI's Responses API in, entries of its chat API out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nla.transcripts.messages import bad

_OURS = ("message", "reasoning", "function_call", "function_call_output")


def is_items(content: Sequence[Any]) -> bool:
    """Whether a list holds the Responses API's items: some have a type in the place of a role."""
    return any(
        isinstance(item, Mapping) and "role" not in item and "from" not in item and _is_item(item.get("type"))
        for item in content
    )


def _is_item(kind: Any) -> bool:
    return isinstance(kind, str) and (kind in _OURS or kind.endswith(("_call", "_call_output", "item_reference")))


def read_items(items: Sequence[Any], source: str) -> list[Any]:
    """Messages, with the calls and the reasoning that belong to them.

    Raises:
        TranscriptError: an item of another type, such as a search that the provider did itself.
    """
    entries: list[Any] = []
    thought: dict[str, Any] = {}
    for number, item in enumerate(items):
        where = f"{source}, item {number}"
        kind = item.get("type", "message") if isinstance(item, Mapping) else None
        if kind == "reasoning":
            thought = _joined(thought, _thought(item))
        elif kind == "function_call":
            call = {
                "id": item.get("call_id"),
                "function": {key: item[key] for key in ("name", "arguments") if key in item},
            }
            if not (entries and entries[-1].get("role") == "assistant" and not thought):
                entries.append({"role": "assistant", "content": None, "tool_calls": [], **thought})
                thought = {}
            entries[-1] = {**entries[-1], "tool_calls": [*entries[-1].get("tool_calls", []), call]}
        elif kind == "function_call_output":
            output = {"content": item["output"]} if "output" in item else {}
            entries += [*_alone(thought), {"role": "tool", **output, "tool_call_id": item.get("call_id")}]
            thought = {}
        elif kind == "message":
            ours = item.get("role") == "assistant"
            entries += [{**item, **thought}] if ours else [*_alone(thought), item]
            thought = {}
        else:
            got = f"an item of type {str(kind)[:60]!r}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
            fix = "leave such conversations out: what the provider did is no text that a target could read"
            raise bad(where, got, f"items of type {', '.join(_OURS)}", fix)
    return [*entries, *_alone(thought)]


def _alone(thought: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reasoning that nothing of the assistant's follows, as an entry."""
    return [{"role": "assistant", "content": None, **thought}] if thought else []


def _thought(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item of reasoning as an entry has it: its words, or that they are encrypted, and the summary."""
    texts = {key: _texts(item.get(key)) for key in ("content", "summary")}
    if texts["content"]:
        return {"reasoning_content": texts["content"]}
    summary = {"type": "reasoning.summary", "summary": texts["summary"]}
    return {"reasoning_details": [{"type": "reasoning.encrypted"}, *([summary] if texts["summary"] else [])]}


def _texts(parts: Any) -> str:
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []
    return "\n".join(text for text in texts if isinstance(text, str))


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two items of reasoning before one message."""
    texts = [one["reasoning_content"] for one in (first, second) if "reasoning_content" in one]
    details = [*first.get("reasoning_details", ()), *second.get("reasoning_details", ())]
    both = {"reasoning_content": "\n".join(texts)} if texts else {}
    return {**both, "reasoning_details": details} if details else both
