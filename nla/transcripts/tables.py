"""Tables in, transcripts out: a row for each conversation, or in CSV also one for each message."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nla.errors import TranscriptError
from nla.storage.rows import batches, csv_rows, open_parquet
from nla.transcripts.forms import holds_messages, is_message, read_value
from nla.transcripts.messages import Transcript, bad

_WRITTEN = ("prompt", "completion", "input", "output", "response", "system", "instructions", "system_prompt")
"""Columns of what was said: JSON in them is somebody's text, unless it is messages."""
_FREE = ("arguments", "args", "parameters", "input", "tools", "functions", "toolConfig")
"""Keys of values whose keys are free."""


def read_parquet(path: Path, limit: int, data: bytes | None = None) -> Iterator[Transcript | TranscriptError]:
    """The rows of a Parquet file; in the place of one that is no conversation, its error.

    Args:
        limit: bytes that a row may take on the average of its group, unpacked.
        data: the file's content, where it is held already.

    Raises:
        TranscriptError: no whole Parquet file, or one whose rows are above the limit.
    """
    number, source = 0, path if data is None else io.BytesIO(data)
    with open_parquet(source, str(path), TranscriptError) as file:
        for batch in batches(file, str(path), TranscriptError, limit=limit):
            for row in batch.to_pylist():
                yield from _row(_unfilled(row, False), path, number)
                number += 1
    if number == 0:
        raise bad(str(path), "a table without rows", "a conversation a row", "check the file")


def read_csv(data: bytes, path: Path, delimiter: str) -> Iterator[Transcript | TranscriptError]:
    """The rows of a CSV file with a header: conversations, or messages (role and content) of one conversation.

    Raises:
        TranscriptError: no rows, two columns of one name, or rows of other lengths than the header.
    """
    lines = csv_rows(io.BytesIO(data), str(path), TranscriptError, delimiter)
    header = next(lines, [])
    rows = [dict(zip(header, cells, strict=True)) for cells in lines]
    if not rows:
        raise bad(str(path), "a table without rows", "a conversation a row", "check the file")
    if len(rows[0]) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise bad(str(path), f"two columns {twice[:60]!r}", "columns of different names", "rename or remove one")
    if all(map(is_message, rows)) and {"role", "content"} <= set(rows[0]):
        yield from read_value(rows, path.stem, str(path))
        return
    for number, row in enumerate(rows):
        yield from _row(row, path, number)


def _row(row: Mapping[str, Any], path: Path, number: int) -> Iterator[Transcript | TranscriptError]:
    source = f"{path}, row {number}"
    try:
        content = {key: _decoded(key, value) for key, value in row.items() if value is not None}
        yield from read_value(content, f"{path.stem}:{number}", source)
    except TranscriptError as error:
        yield error
    except RecursionError:
        yield bad(source, "JSON nested too deep", "messages", "check the file")


def _decoded(column: str, value: Any) -> Any:
    """What a cell holds: JSON lists and objects are written as text in tables, and models write JSON as well."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        content = json.loads(value)
    except ValueError:
        return value
    return content if column not in _WRITTEN or holds_messages(content) else value


def _unfilled(value: Any, free: bool) -> Any:
    """Parquet's rows without the nulls for keys that one struct of a column lacks and another has.

    Args:
        free: whether the keys mean something by being there, as in arguments and tools.
    """
    if isinstance(value, Mapping):
        kept = value.items() if not free else [(key, inner) for key, inner in value.items() if inner is not None]
        return {key: _unfilled(inner, free or key in _FREE) for key, inner in kept}
    return [_unfilled(inner, free) for inner in value] if isinstance(value, list) else value
