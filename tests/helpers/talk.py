"""Transcripts, readings and files that the tests of the audit share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nla.audit.findings import Evidence
from nla.audit.reading import Entry, Reading
from nla.pair.explanations import Trust
from nla.transcripts.messages import Message, Transcript

SAYINGS = ("the cat sat on the mat.\n", "a red dog ran under the blue tree and sat there.\n", "it is here.\n")
SAYINGS += ("so the dog is under a tree.\n", "a blue mat is there.\n")
TRUST = Trust("medium", 0.6, 0.5, 0.2)


def transcript(n_messages: int = 4, name: str = "talk", first: int = 0, **fields: Any) -> Transcript:
    """A conversation in the words of the tests' tokenizer, user first."""
    roles = ("user", "assistant")
    messages = tuple(Message(roles[n % 2], SAYINGS[(first + n) % len(SAYINGS)]) for n in range(n_messages))
    return Transcript(name, messages, **fields)


def said(*turns: tuple[str, str], name: str = "talk") -> Transcript:
    """A conversation of (role, content)."""
    return Transcript(name, tuple(Message(role, content) for role, content in turns))


def entry(message: int = 0, offset: int = 0, texts: Sequence[str] = (), kind: str = "user end", **fields: Any) -> Entry:
    """A position as it was read, with these explanations."""
    plain = {"index": 10 * message + offset, "token": "x", "role": "user", "section": "content", "start": -1}
    complete = tuple(True for _ in texts)
    place = {"kind": kind, "message": message, "offset": offset}
    return Entry(**{**plain, **place, "texts": tuple(texts), "complete": complete, "trust": TRUST, **fields})


def evidence(conversation: Transcript, *entries: Entry) -> Evidence:
    """One transcript with what was read of it."""
    readings = [Reading(conversation.id, "key", 100, 0, tuple(entries))]
    return Evidence([conversation], readings, heard([conversation]))


def heard(transcripts: Sequence[Transcript]) -> list[list[str]]:
    """What a target reads of transcripts of which no template drops anything."""
    return [[message.visible for message in each.messages] for each in transcripts]


def write_jsonl(path: Path, transcripts: Sequence[Transcript]) -> Path:
    """Transcripts as a JSONL file."""
    lines = []
    for each in transcripts:
        messages = [{"role": message.role, "content": message.content} for message in each.messages]
        lines.append(json.dumps({"id": each.id, "model": each.model, "messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
