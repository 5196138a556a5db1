"""One prepared transcript in, its reading out: explanations and trust at each position. The costly part of an audit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from nla.audit.settings import AuditSettings
from nla.errors import ParseError
from nla.models.long_text import read_windows
from nla.pair.explanations import LEVELS, Trust
from nla.progress import Progress, silent
from nla.transcripts.prepared import Prepared
from nla.transcripts.rendering import CONTENT

if TYPE_CHECKING:
    from nla.autoencoder import NLA


@dataclass(frozen=True)
class Entry:
    """One position of a transcript, and what was read there."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride] (the tuple's method is not used)
    """Token in the rendered transcript."""
    kind: str
    token: str
    message: int
    role: str
    section: str
    start: int
    """First character of the token in the message's content; -1 for a token of the template."""
    offset: int
    """Characters of what the target reads of the message (``Chat.heard``) that had been written by then."""
    texts: tuple[str, ...]
    """Explanations, one for each sample."""
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
        return TypeAdapter(Reading).dump_python(self, mode="json")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Reading:
        """A reading as it was saved.

        Raises:
            ParseError: something else.
        """
        try:
            reading = TypeAdapter(Reading).validate_python(content)
        except ValidationError as error:
            where = ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
            raise ParseError(f"a reading with another {where}", "what an audit saved", "delete it") from error
        levels = {entry.trust.level for entry in reading.entries} - set(LEVELS)
        if levels:
            raise ParseError(f"a reading of the trust {min(levels)!r}", "what an audit saved", "delete it")
        return reading


def read_transcript(
    nla: NLA, prepared: Prepared, settings: AuditSettings, key: str = "", progress: Progress = silent
) -> Reading:
    """Read and explain one transcript. The target is what ``nla`` has at the moment (see :mod:`nla.pair.roles`).

    Explanations depend on the transcript and the settings only, not on what else is audited.

    Raises:
        NonFiniteError: the target gives NaN or infinity.
    """
    chat, positions, windows = prepared
    with nla.role("target"):
        vectors = read_windows(
            nla.model,
            chat.ids,
            nla.point,
            prepared.columns,
            windows,
            prepared.n_opening,
            progress=lambda part: progress("read", part),
        )
    seed = int.from_bytes(hashlib.sha256(f"{settings.seed}:{chat.transcript.digest}".encode()).digest()[:4])
    explanations = nla.explain(vectors, samples=settings.samples, seed=seed)
    entries = []
    for (index, kind), explanation in zip(positions, explanations, strict=True):
        region = chat.region_at(index)
        entries.append(
            Entry(
                index=index,
                kind=kind,
                token=chat.span(index).text,
                message=region.message,
                role=chat.transcript.messages[region.message].role,
                section=region.section,
                start=int(chat.starts[index]) - region.start if region.section == CONTENT else -1,
                offset=chat.offset(index),
                texts=tuple(explanation.texts),
                complete=tuple(explanation.complete),
                trust=explanation.trust,
            )
        )
    return Reading(chat.transcript.id, key, len(chat), chat.n_forged, tuple(entries))
