"""Prepared transcripts in, their readings out: explanations and trust at each position. The costly part of an audit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from nla.audit.settings import AuditSettings
from nla.errors import ParseError
from nla.metrics import check_finite
from nla.models.long_text import CHUNK, read_windows
from nla.models.points import truncated_view
from nla.models.read import vectors_at
from nla.pair.explanations import LEVELS, Explanation, Trust
from nla.progress import Progress, silent
from nla.transcripts.prepared import Prepared
from nla.transcripts.rendering import CONTENT, Chat

if TYPE_CHECKING:
    from nla.autoencoder import NLA

TOKENS = 8192
"""Tokens of short transcripts that are read in one pass."""


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


def read_batch(
    nla: NLA,
    batch: Sequence[Prepared],
    keys: Sequence[str],
    settings: AuditSettings,
    progress: Progress = silent,
) -> list[Reading]:
    """Read and explain transcripts together. The target is what ``nla`` has at the moment (see :mod:`nla.pair.roles`).

    Explanations depend on each transcript and the settings only, not on what else is in the batch.

    Args:
        keys: of the readings, one for each transcript.

    Raises:
        NonFiniteError: the target gives NaN or infinity.
    """
    with nla.role("target"):
        vectors = _vectors(nla, batch, progress)
    seeds = [_seed(settings.seed, prepared, column) for prepared in batch for column in prepared.columns]
    explanations = iter(nla.explain(vectors, samples=settings.samples, seed=seeds))
    readings = []
    for prepared, key in zip(batch, keys, strict=True):
        entries = tuple(_entry(prepared.chat, *position, next(explanations)) for position in prepared.positions)
        chat = prepared.chat
        readings.append(Reading(chat.transcript.id, key, len(chat), chat.n_forged, entries))
    return readings


def _vectors(nla: NLA, batch: Sequence[Prepared], progress: Progress) -> Float[Tensor, "n d"]:
    """The target's activations at all positions of a batch: short transcripts share passes, a long one has its own."""
    short = [number for number, one in enumerate(batch) if len(one.windows) == 1 and len(one.chat) <= CHUNK]
    parts: dict[int, Tensor] = {}
    if short:
        view = truncated_view(nla.model, nla.point)
        rows, columns = [batch[n].chat.ids.tolist() for n in short], [batch[n].columns for n in short]
        vectors = vectors_at(view, rows, columns, TOKENS).float()
        check_finite(vectors)
        parts |= zip(short, vectors.split([len(chosen) for chosen in columns]), strict=True)
    for number, one in enumerate(batch):
        if number not in parts:
            parts[number] = read_windows(
                nla.model,
                one.chat.ids,
                nla.point,
                one.columns,
                one.windows,
                one.n_opening,
                progress=lambda part, number=number: progress("read", (number + part) / len(batch)),
            )
    return torch.cat([parts[number] for number in range(len(batch))])


def _seed(seed: int, prepared: Prepared, column: int) -> int:
    """Of one position's samples: keyed by what was said and where it is."""
    content = f"{seed}:{prepared.transcript.digest}:{column}"
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:4])


def _entry(chat: Chat, index: int, kind: str, explanation: Explanation) -> Entry:
    region = chat.region_at(index)
    return Entry(
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
