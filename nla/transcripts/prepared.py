"""Transcript files and a target's tokenizer in; tokens, positions and windows to read out, all checks made.

Whatever can be refused is refused here, before the costly part: the thousandth transcript does not stop an audit of
hours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from nla.errors import ArgumentError, MissingExtraError, NLAError, TemplateError, TranscriptError, visible
from nla.models.long_text import Window, plan_windows, too_long
from nla.transcripts.files import (
    MAX_MB,
    distinct,
    load_transcripts,
    read_file,
    refuse_other_models,
    transcript_files,
)
from nla.transcripts.forms import read_value
from nla.transcripts.messages import Transcript
from nla.transcripts.positions import BUDGET, Position, select
from nla.transcripts.rendering import Chat, message_starts, render, system_folded, trimmed


class Prepared(NamedTuple):
    """A rendered transcript, and what to read in it."""

    chat: Chat
    positions: list[Position]
    windows: list[Window]
    """The passes that it is read in: one, or overlapping ones."""

    @property
    def transcript(self) -> Transcript:
        """What was rendered."""
        return self.chat.transcript

    @property
    def heard(self) -> list[str]:
        """What the target reads of each message."""
        return [self.chat.heard(number) for number in range(len(self.transcript.messages))]

    @property
    def columns(self) -> list[int]:
        """The tokens to read."""
        return [position.index for position in self.positions]

    @property
    def n_opening(self) -> int:
        """Tokens that every window begins with: BOS, where the transcript does."""
        return int(self.chat.has_bos)


def _with_extras(
    path: Path, max_mb: float, skip_bad: bool
) -> Iterator[Transcript | TranscriptError | MissingExtraError]:
    """The transcripts of a file; where it needs what is not installed, that error, if others are to be read."""
    try:
        yield from read_file(path, max_mb)
    except MissingExtraError as error:
        if not skip_bad:
            raise
        yield MissingExtraError(f"{path}: {error.got}", error.expected, error.fix)


class Loaded(NamedTuple):
    """What came of files."""

    prepared: list[Prepared]
    refused: list[str]
    """Why each transcript was left out that cannot be read."""
    files: list[Path]
    """All of them, those of folders one by one."""


@dataclass(frozen=True, kw_only=True)
class Preparer:
    """Makes transcripts ready for one target."""

    tokenizer: PreTrainedTokenizerBase
    """The target's."""

    context: int
    """Tokens that the target can read in one pass."""

    target: str
    """The target's folder or hub id: transcripts that name another model are refused."""

    model_of: str | None = None
    """A model whose transcripts are accepted too, or "any"."""

    positions: str = "structure"
    """See :func:`nla.transcripts.positions.select`, as for ``budget`` and ``seed``."""

    budget: int | None = BUDGET

    seed: int = 0

    window: int | None = None
    """Tokens of a window; None: one pass. Tokens further back than the window are then not seen by the target."""

    trim: bool = False
    """Take white space off the ends of messages, for templates that do."""

    allow_dropped: bool = False
    """Read on where the template leaves fields out; see :func:`nla.transcripts.rendering.render`."""

    fold_system: bool = False
    """Where the template takes no system text, put it at the start of the first user message."""

    def prepare(self, transcript: Transcript) -> Prepared:
        """Render a transcript and choose what to read.

        Raises:
            TranscriptError: it names another model.
            ConfigError, TemplateError, VocabularyError: see :func:`nla.transcripts.rendering.render`.
            PositionError: no such position.
            ContextLengthError, ArgumentError: too long for the context, or a window that is out of range.
        """
        refuse_other_models(transcript, self.target, self.model_of)
        chat = self.render(transcript)
        windows = self._windows(chat)
        return Prepared(chat, select(chat, self.positions, self.budget, self.seed), windows)

    def render(self, transcript: Transcript) -> Chat:
        """The transcript as the target's tokens, its ends trimmed and its system text folded as is asked for.

        Raises:
            ConfigError, TemplateError, VocabularyError: see :func:`nla.transcripts.rendering.render`.
        """
        transcript = trimmed(transcript) if self.trim else transcript
        if not self.fold_system or system_folded(transcript) is transcript:
            return render(self.tokenizer, transcript, self.allow_dropped)
        try:
            chat = render(self.tokenizer, transcript, self.allow_dropped)
        except TemplateError:
            chat = None
        if chat is not None and not any((one.message, one.what) == (0, "content") for one in chat.unread):
            return chat
        folded = system_folded(transcript)
        remarks = (*folded.remarks, "system text put at the start of the first user message (--fold-system)")
        return render(self.tokenizer, replace(folded, remarks=remarks), self.allow_dropped)

    def prepare_files(self, paths: Sequence[str | Path], max_mb: float = MAX_MB, skip_bad: bool = False) -> Loaded:
        """Prepare the transcripts of files and folders.

        Args:
            max_mb: see :func:`nla.transcripts.files.load_transcripts`.
            skip_bad: leave out what cannot be read, and list why, instead of stopping at the first.

        Raises:
            NLAError: see :meth:`prepare`.
            TranscriptError: a file cannot be read, or none of them.
        """
        loaded = Loaded([], [], transcript_files(paths))
        ids: set[str] = set()
        for path in loaded.files:
            for transcript in _with_extras(path, max_mb, skip_bad):
                try:
                    if isinstance(transcript, TranscriptError | MissingExtraError):
                        raise transcript
                    prepared = self.prepare(distinct(transcript, path, ids))
                except NLAError as error:
                    if not skip_bad:
                        raise
                    loaded.refused.append(str(error))
                else:
                    ids.add(prepared.transcript.id)
                    loaded.prepared.append(prepared)
        return loaded

    def _windows(self, chat: Chat) -> list[Window]:
        if self.window is not None and not 2 <= self.window <= self.context:
            expected = f"2 to {self.context}, the model's context"
            raise ArgumentError(f"window={self.window}", expected, "choose a window in that range")
        if self.window is None and len(chat) > self.context:
            raise too_long(len(chat), self.context, chat.transcript.source or chat.transcript.id)
        if self.window is None or len(chat) <= self.window:
            return [Window(0, 0, len(chat))]
        return plan_windows(len(chat), self.window - int(chat.has_bos), message_starts(chat))


def chats_of(
    tokenizer: PreTrainedTokenizerBase,
    given: str | Path | Transcript | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    trim: bool = False,
    allow_dropped: bool = False,
    fold_system: bool = False,
) -> list[Chat]:
    """Chats as a target reads them: from a file, a list of messages, an object of any known form, or a transcript.

    Args:
        tokenizer: the target's.
        given: a path or "-"; or what a file would hold, decoded.
        trim: see :class:`Preparer`.
        allow_dropped: see :class:`Preparer`.
        fold_system: see :class:`Preparer`.

    Raises:
        TranscriptError: it cannot be read.
        ConfigError, TemplateError, VocabularyError: see :func:`nla.transcripts.rendering.render`.
    """
    if isinstance(given, Transcript):
        transcripts = [given]
    elif isinstance(given, str | Path):
        transcripts = list(load_transcripts(given))
    else:
        transcripts = read_value(given, "chat", "the messages")
    preparer = Preparer(
        tokenizer=tokenizer, context=0, target="", trim=trim, allow_dropped=allow_dropped, fold_system=fold_system
    )
    return [preparer.render(transcript) for transcript in transcripts]


_NAMED, _KEYS, _LINES, _LONGEST = 4, 12, 50, 200
"""Transcripts, and fields, that a remark names, and remarks: the others are counted. And characters of a name."""


def remarks(chats: Iterable[Chat]) -> list[str]:
    """What a reader must know of what the target read and did not read, a sentence each; safe to show."""
    by_text: dict[str, list[str]] = {}
    unused: dict[str, None] = {}
    using: list[str] = []
    for chat in chats:
        name = chat.transcript.id
        for text in chat.transcript.remarks:
            by_text.setdefault(text[0].upper() + text[1:], []).append(name)
        for one in chat.unread:
            reason = "Dropped by the chat template, so the target did not read it" if one.dropped else _NO_TEXT
            by_text.setdefault(f"{reason}: {one.what}", []).append(
                name if one.message is None else f"message {one.message} of {name}"
            )
        if chat.transcript.unused:
            unused |= dict.fromkeys(chat.transcript.unused)
            using.append(name)
    said = [f"{_cut(text)}: {_some(names)}." for text, names in islice(by_text.items(), _LINES)]
    if len(by_text) > _LINES:
        said.append(f"{len(by_text) - _LINES} more remarks of this kind.")
    if unused:
        said.append(f"Fields of the file that are not used: {_some(list(unused), _KEYS)}: {_some(using)}.")
    return [visible(remark) for remark in said]


_NO_TEXT = "No text, so the target did not see it"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"


def _some(names: Sequence[str], most: int = _NAMED) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(_cut, names[:most])) + more
