"""One transcript read and explained: its positions, each with explanations and trust. The costly part of an audit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nla.errors import ArgumentError, ParseError
from nla.models.adapter import adapter_hash
from nla.pair.confidence import LEVELS, Trust
from nla.transcripts.messages import Transcript
from nla.transcripts.positions import BUDGET, Position, select
from nla.transcripts.rendering import Chat, render
from nla.transcripts.stream import CHUNK, check_length, read_chat

if TYPE_CHECKING:
    from nla.autoencoder import NLA

FORMAT = 1
Progress = Callable[[str, float], None]


def silent(stage: str, fraction: float) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Settings:
    """How transcripts are read; with the transcript and the models, what a reading depends on."""

    positions: str = "structure"
    budget: int | None = BUDGET
    samples: int = 4
    seed: int = 0
    window: int | None = None
    chunk: int = CHUNK
    """Tokens a pass; changes memory and time, not results."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ArgumentError(f"samples={self.samples}", "1 or more", "raise --samples")

    def key(self, nla: NLA, transcript: Transcript, adapter: str | Path | None) -> str:
        """A hash of all that a reading depends on."""
        config = nla.config
        parts = {key: value for key, value in asdict(self).items() if key != "chunk"}
        pair = [config.tokenizer_hash, config.point, config.target_weights, dict(config.files)]
        content = [FORMAT, transcript.digest, parts, pair, adapter_hash(adapter)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Entry(NamedTuple):
    """One position of a transcript, and what was read there."""

    index: int
    """Token in the rendered transcript."""
    kind: str
    token: str
    message: int
    role: str
    section: str
    start: int
    """First character of the token in the message's content; -1 for a token of the template."""
    offset: int
    """Characters of the message (``Message.visible``) that had been written by then."""
    texts: tuple[str, ...]
    """Explanations, one a sample."""
    complete: tuple[bool, ...]
    trust: Trust


@dataclass(frozen=True)
class Reading:
    """All that was read of one transcript."""

    transcript: str
    """Its id."""
    key: str
    """Of all that it depends on."""
    n_tokens: int
    n_forged: int
    """Control tokens written in contents; the target takes them for turns."""
    entries: tuple[Entry, ...]

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        entries = [{**entry._asdict(), "trust": entry.trust._asdict()} for entry in self.entries]
        return {
            **{name: getattr(self, name) for name in ("transcript", "key", "n_tokens", "n_forged")},
            "entries": entries,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Reading:
        """A reading as it was saved.

        Raises:
            ParseError: something else.
        """
        try:
            return cls(
                *(_is(content[name], kind) for name, kind in _HEAD.items()),
                entries=tuple(_entry(entry) for entry in content["entries"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ParseError(
                f"a reading with {error!r}", "what an audit saved", "delete it; it is read again"
            ) from error


_HEAD = {"transcript": str, "key": str, "n_tokens": int, "n_forged": int}


def _is(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _entry(content: Mapping[str, Any]) -> Entry:
    trust = content["trust"]
    if trust["level"] not in LEVELS:
        raise ValueError(f"trust {trust['level']!r}")
    numbers = ("index", "message", "start", "offset")
    return Entry(
        **{name: _is(content[name], int if name in numbers else str) for name in Entry._fields[:8]},
        texts=tuple(_is(text, str) for text in content["texts"]),
        complete=tuple(bool(flag) for flag in content["complete"]),
        trust=Trust(trust["level"], float(trust["cosine"]), trust["agreement"], float(trust["margin"])),
    )


def prepare(nla: NLA, transcript: Transcript, settings: Settings) -> tuple[Chat, list[Position]]:
    """A transcript rendered, and the positions to read: all that can be refused before the costly part.

    Raises:
        ConfigError, TemplateError, VocabularyError: see :func:`nla.audit.chat.render`.
        PositionError, ContextLengthError, ArgumentError: see the functions used.
    """
    chat = render(nla.tokenizer, transcript)
    check_length(nla.model, chat, settings.window)
    return chat, select(chat, settings.positions, settings.budget, settings.seed)


def read_transcript(
    nla: NLA, transcript: Transcript, settings: Settings, key: str = "", progress: Progress = silent
) -> Reading:
    """Render, read and explain one transcript. The target is what ``nla`` has at the moment (see ``plant.planted``).

    Explanations depend on the transcript and the settings only, not on what else is audited.

    Raises:
        NLAError: see :func:`prepare`.
        NonFiniteError: the target gives NaN or infinity.
    """
    chat, chosen = prepare(nla, transcript, settings)
    with nla.role("target"):
        acts = read_chat(
            nla.model, chat, nla.point, chosen, settings.window, settings.chunk, lambda part: progress("read", part)
        )
    seed = int.from_bytes(hashlib.sha256(f"{settings.seed}:{transcript.digest}".encode()).digest()[:4])
    notes = nla.explain(acts, samples=settings.samples, seed=seed)
    entries = []
    for position, note in zip(chosen, notes, strict=True):
        place = chat.place(position.index)
        inside = int(chat.starts[position.index]) - place.start if place.section == "content" else -1
        entries.append(
            Entry(
                index=position.index,
                kind=position.kind,
                token=chat.span(position.index).text,
                message=place.message,
                role=transcript.messages[place.message].role,
                section=place.section,
                start=inside,
                offset=chat.offset(position.index),
                texts=tuple(note.texts),
                complete=tuple(note.complete),
                trust=note.trust,
            )
        )
    return Reading(transcript.id, key, len(chat), chat.n_forged, tuple(entries))
