"""Transcripts of Petri up to version 2: an event log from which the target's own view is replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nla.transcripts.calls import read_tools
from nla.transcripts.entries import parse_entry, unused_keys
from nla.transcripts.messages import Transcript, bad

TARGET_VIEW = "target"
_EVENT = "transcript_event"
_TOOL = "tool_creation_event"
_NOTES = ("info",)
"""Roles of what Petri's own machinery notes between the messages; the target never saw it."""


def is_petri(content: Mapping[str, Any]) -> bool:
    """Whether decoded JSON has the form of a Petri transcript."""
    return isinstance(content.get("events"), Sequence) and isinstance(content.get("metadata"), Mapping)


def parse(content: Mapping[str, Any], name: str, source: str) -> Transcript:
    """The conversation as the target saw it in the end, after every rollback.

    Raises:
        TranscriptError: an event that cannot be replayed, or a target that was never spoken to.
    """
    metadata = content["metadata"]
    entries = _replay(content["events"], source)
    if not entries and isinstance(content.get("target_messages"), Sequence):
        entries = list(content["target_messages"])
    if not entries:
        got = "no messages in the target's view"
        raise bad(source, got, "events of the view 'target'", "check that the audit reached its target")
    messages = [
        message
        for number, entry in enumerate(entries)
        if not (isinstance(entry, Mapping) and entry.get("role") in _NOTES)
        for message in parse_entry(entry, f"{source}, message {number}")
    ]
    tools, unknown = read_tools(_tools(content["events"]), source)
    run_id, model = metadata.get("transcript_id"), metadata.get("target_model")
    return Transcript(
        id=run_id if isinstance(run_id, str) and run_id.strip() else name,
        messages=tuple(messages),
        model=model if isinstance(model, str) and model else None,
        source=source,
        metadata={key: metadata[key] for key in ("auditor_model", "tags", "seed_instruction") if key in metadata},
        tools=tools,
        unused=(*sorted(f"{key} of messages" for key in unused_keys(entries)), *unknown),
    )


def _tools(events: Sequence[Any]) -> list[Any]:
    """The tools that were made for the target, each as it was made last."""
    made = [event.get("tool") for event in events if isinstance(event, Mapping) and event.get("type") == _TOOL]
    return list({str(tool.get("name")) if isinstance(tool, Mapping) else "": tool for tool in made}.values())


def _replay(events: Any, source: str) -> list[Any]:
    messages: list[Any] = []
    for number, event in enumerate(events):
        if not isinstance(event, Mapping) or event.get("type") != _EVENT:
            continue
        views = event.get("view")
        if TARGET_VIEW not in ([views] if isinstance(views, str) else views if isinstance(views, Sequence) else []):
            continue
        edit = event.get("edit")
        if not isinstance(edit, Mapping):
            raise bad(source, f"event {number} without an edit", "an edit", "check the file")
        messages = _apply(messages, edit, f"{source}, event {number}")
    return messages


def _apply(messages: list[Any], edit: Mapping[str, Any], source: str) -> list[Any]:
    """The messages after an edit: the same list, changed in place where it can be."""
    kind = edit.get("operation")
    if kind == "add":
        messages.append(edit.get("message"))
        return messages
    if kind == "reset" and isinstance(edit.get("new_messages"), Sequence):
        return list(edit["new_messages"])
    if kind == "rollback":
        if edit.get("to_id") is not None:
            while messages and not (isinstance(messages[-1], Mapping) and messages[-1].get("id") == edit["to_id"]):
                messages.pop()
            if not messages:
                raise bad(source, "a rollback to an unknown message", "the id of a message", "check the file")
            return messages
        count = edit.get("count")
        if not isinstance(count, int) or not 0 <= count <= len(messages):
            got = f"a rollback of {count!r} from {len(messages)} messages"
            raise bad(source, got, "as many as there are, or fewer", "check the file")
        del messages[len(messages) - count :]
        return messages
    if kind == "json_patch" and isinstance(edit.get("patch"), Sequence):
        for change in edit["patch"]:
            _patch(messages, change, source)
        return messages
    raise bad(source, f"the edit {str(kind)[:40]!r}", "add, reset, rollback or json_patch", "check the file")


def _patch(messages: list[Any], change: Any, source: str) -> None:
    """One change of whole messages or of a message's content; what reaches deeper is refused, not guessed."""
    path = change.get("path") if isinstance(change, Mapping) else None
    parts = path.strip("/").split("/") if isinstance(path, str) else []
    parts = parts[1:] if parts[:1] == ["messages"] else parts
    operation = change.get("op") if isinstance(change, Mapping) else None
    last = parts[0] if parts else ""
    index = len(messages) if last == "-" else int(last) if last.isdecimal() and len(last) < 9 else -1
    inside = 0 <= index < len(messages)
    if operation == "add" and len(parts) == 1 and 0 <= index <= len(messages):
        messages.insert(index, change.get("value"))
    elif operation == "remove" and len(parts) == 1 and inside:
        del messages[index]
    elif operation == "replace" and len(parts) == 1 and inside:
        messages[index] = change.get("value")
    elif operation == "replace" and len(parts) == 2 and inside and isinstance(messages[index], Mapping):
        messages[index] = {**messages[index], parts[1]: change.get("value")}
    else:
        got = f"a patch ({str(operation)[:20]!r} at {str(path)[:40]!r})"
        raise bad(source, got, "one that adds, removes or replaces messages", "export the transcript's target view")
