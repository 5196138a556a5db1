"""Transcripts from files and standard input: JSON and JSON lines, tables, plain chat text, Inspect's logs.

A file is data: nothing in it is run, and what cannot be read as a transcript is a typed error that names the place.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from nla.errors import ArgumentError, TranscriptError
from nla.storage.rows import decode, decode_json, numbered_lines
from nla.transcripts import tables
from nla.transcripts.forms import is_message, read_value
from nla.transcripts.inspect_logs import read_log
from nla.transcripts.messages import ROLES, Message, Transcript, bad, role_of

MAX_MB = 64
"""Largest JSON or text file, and largest line of a JSONL file, that is read unless more is allowed."""

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".txt", ".chat", ".eval")
"""Of the files that are taken from a folder."""

STDIN = Path("-")
"""Standard input, in the place of a file."""

_SPEAKERS = (*ROLES, "developer", "human", "ai", "model", "bot", "function")
_TURN = re.compile(rf"^({'|'.join(_SPEAKERS)})\s*:[ \t]?(.*)$", re.IGNORECASE)


def load_transcripts(paths: str | Path | Iterable[str | Path], max_mb: float = MAX_MB) -> Iterator[Transcript]:
    """Transcripts of files and folders, one after another; JSONL is read line by line.

    Args:
        paths: one or several; of a folder, every file with a known ending, in the order of their names; "-" is
            standard input.
        max_mb: refuse JSON and text files, and lines of JSONL, above this size.

    Raises:
        ArgumentError: a limit that is none.
        TranscriptError: nothing there; not a transcript; too large; or two transcripts of one id.
        MissingExtraError: an Inspect log without inspect-ai installed.
    """
    seen: set[str] = set()
    for path in transcript_files(paths):
        for loaded in read_file(path, max_mb):
            if isinstance(loaded, TranscriptError):
                raise loaded
            transcript = distinct(loaded, path, seen)
            seen.add(transcript.id)
            yield transcript


def distinct(transcript: Transcript, path: Path, seen: Collection[str]) -> Transcript:
    """The transcript under an id that is not taken: many runs number theirs from 1, so the file's name is put before.

    Raises:
        TranscriptError: that is taken too.
    """
    if transcript.id in seen:
        transcript = replace(transcript, id=f"{path.stem}:{transcript.id}")
    if transcript.id in seen:
        got = f"the id {transcript.id!r} a second time"
        raise bad(transcript.source, got, "an id for each transcript", "rename one of them")
    return transcript


def transcript_files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Files that paths mean: themselves, and of folders every file with a known ending.

    Raises:
        TranscriptError: a path does not exist, or a folder holds none.
    """
    chosen: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        files = [path] if path == STDIN or path.is_file() else []
        if path.is_dir():
            files = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES and entry.is_file())
        if not files:
            got = f"no file with one of the endings {', '.join(SUFFIXES)}" if path.is_dir() else "no such file"
            raise bad(str(path), got, "transcripts", "check the path")
        chosen += files
    return chosen


def read_file(path: Path, max_mb: float = MAX_MB) -> Iterator[Transcript | TranscriptError]:
    """The transcripts of one file or, for "-", of standard input; in the place of one that cannot be read, its error.

    The ending says what it holds where it is a known one; otherwise the content does.

    Raises:
        MissingExtraError: an Inspect log without inspect-ai installed.
    """
    try:
        yield from _of_file(path, max_mb)
    except TranscriptError as error:
        yield error
    except RecursionError:
        yield bad(str(path), "JSON nested too deep", "messages", "check the file")
    except OSError as error:
        yield bad(str(path), f"not readable ({type(error).__name__})", "a readable file", "check it")


def _of_file(path: Path, max_mb: float) -> Iterator[Transcript | TranscriptError]:
    suffix = path.suffix.lower()
    if suffix == ".eval":
        yield from read_log(path)
    elif suffix in (".jsonl", ".ndjson"):
        with path.open("rb") as file:
            yield from _json_lines(file, path, max_mb)
    elif suffix == ".parquet":
        yield from tables.read_parquet(path, _bytes(max_mb))
    else:
        data = _read(path, max_mb)
        if data[:4] == b"PAR1":
            yield from tables.read_parquet(path, _bytes(max_mb), data)
        elif suffix in (".csv", ".tsv"):
            yield from tables.read_csv(data, path, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".json" or data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
            yield from _json(path, data, max_mb)
        else:
            yield parse_chat(decode(data, str(path), TranscriptError), path.stem, str(path))


def _json(path: Path, data: bytes, max_mb: float) -> Iterator[Transcript | TranscriptError]:
    """One JSON value, or lines of them, whatever the file is called."""
    try:
        content = decode_json(data, str(path), TranscriptError)
    except TranscriptError as error:
        cause = error.__cause__
        if not (isinstance(cause, json.JSONDecodeError) and cause.msg == "Extra data"):
            raise
        yield from _json_lines(io.BytesIO(data), path, max_mb)
        return
    if isinstance(content, Mapping) and "eval" in content and ("samples" in content or "plan" in content):
        yield from read_log(path)
    else:
        yield from read_value(content, path.stem, str(path))


def parse_chat(text: str, name: str, source: str) -> Transcript:
    """A transcript from lines that start with a role and a colon; further lines belong to the last role.

    >>> [message.role for message in parse_chat("User: Hello.\\nAssistant: Hi.\\nWell?", "greeting", "").messages]
    ['user', 'assistant']

    Raises:
        TranscriptError: no text, text before the first role, or a role that says nothing.
    """
    turns: list[tuple[str, list[str]]] = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        line = line.removesuffix("\r")
        match = _TURN.match(line)
        if match is not None:
            turns.append((role_of(match[1]), [match[2]]))
        elif turns:
            turns[-1][1].append(line)
        elif line.strip():
            expected = "a conversation: a role and a colon at the start of a line, such as 'User: Hello'"
            raise bad(source, f"text before any role, in line {number}: {line[:60]!r}", expected, "name who speaks")
    if not turns:
        raise bad(source, "no messages", "lines such as 'User: Hello' and 'Assistant: Hi'", "check the file")
    messages = []
    for number, (role, lines) in enumerate(turns):
        content = "\n".join(lines).strip("\n")
        if not content.strip():
            raise bad(source, f"message {number} ({role}) without content", "what was said", "leave the message out")
        messages.append(Message(role, content))
    return Transcript(name, tuple(messages), source=source)


def _json_lines(file: IO[bytes], path: Path, max_mb: float) -> Iterator[Transcript | TranscriptError]:
    """One transcript a line, or one message a line; a line that cannot be read leaves the others as they are."""
    loose: list[Any] = []
    number = 0
    for number, line in numbered_lines(file, str(path), TranscriptError, _bytes(max_mb)):
        source = f"{path}:{number}"
        try:
            content = decode_json(line, source, TranscriptError)
            if is_message(content):
                loose.append(content)
            elif loose:
                raise bad(source, "a transcript after single messages", "one kind in a file", "split the file")
            else:
                yield from read_value(content, f"{path.stem}:{number}", source)
        except TranscriptError as error:
            if loose:  # a conversation with a hole is another conversation
                raise
            yield error
        except RecursionError:
            yield bad(source, "JSON nested too deep", "messages", "check the file")
    if loose:
        yield from read_value(loose, path.stem, str(path))
    elif number == 0:
        raise bad(str(path), "an empty file", "a transcript", "check the file")


def _read(path: Path, max_mb: float) -> bytes:
    """A whole file of bounded size."""
    if path == STDIN:
        data = sys.stdin.buffer.read(_bytes(max_mb) + 1)
    else:
        with path.open("rb") as file:
            data = file.read(_bytes(max_mb) + 1)
    if len(data) > _bytes(max_mb):
        fix = "raise it (--max-mb), or write JSONL with a transcript a line"
        raise bad(str(path), f"a file above {max_mb:g} MB", "what fits the limit", fix)
    if not data.strip():
        raise bad(str(path), "an empty file", "a transcript", "check the file")
    return data


def _bytes(max_mb: float) -> int:
    if not 0 < max_mb <= 1_000_000:
        raise ArgumentError(f"max_mb={max_mb}", "above 0, at most 1000000", "give the limit in MB")
    return round(max_mb * 2**20)


def refuse_other_models(transcript: Transcript, target: str, model_of: str | None) -> None:
    """Refuse a transcript that names another model than the target, unless that one is asked for.

    Args:
        target: the pair's target, a hub id or folder.
        model_of: a model's name as the transcripts give it, or "any".

    Raises:
        TranscriptError: it names another model.
    """
    if transcript.model is None or model_of == "any" or _same(transcript.model, target):
        return
    if model_of is not None and _same(transcript.model, model_of):
        return
    raise bad(
        transcript.source or transcript.id,
        f"a transcript of {transcript.model!r}",
        f"one of {target}, the model whose activations are read",
        f"use --model-of {transcript.model} if it is to be read as if the target had written it, or --model-of any",
    )


def _same(named: str, wanted: str) -> bool:
    """Whether two names mean one model: providers and folders before the name, and case, do not matter."""

    def last(name: str) -> str:
        return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()

    return last(named) == last(wanted)
