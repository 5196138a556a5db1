"""Tables in, transcripts out: a row for each conversation, or in CSV also one for each message."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nla.errors import TranscriptError, visible
from nla.transcripts.forms import holds_messages, is_message, read_value
from nla.transcripts.messages import Transcript, bad

_ROWS = 64
"""Rows of a Parquet file that are held at once."""
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
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path if data is None else io.BytesIO(data)) as file:
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                if about.total_byte_size > limit * max(about.num_rows, 1):
                    got = f"rows of {about.total_byte_size // max(about.num_rows, 1)} bytes"
                    raise bad(str(path), got, f"at most {limit}", "raise the limit (--max-mb)")
            for batch in file.iter_batches(_ROWS):
                for row in batch.to_pylist():
                    yield from _row(_unfilled(row, False), path, number)
                    number += 1
    except TranscriptError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8, odd dates
        shown = visible(str(error))[:120]
        raise bad(str(path), f"no whole Parquet file ({shown})", "a Parquet file", "restore the file") from error
    if number == 0:
        raise bad(str(path), "a table without rows", "a conversation a row", "check the file")


def read_csv(text: str, path: Path, delimiter: str) -> Iterator[Transcript | TranscriptError]:
    """The rows of a CSV file with a header: conversations, or messages (role and content) of one conversation.

    Raises:
        TranscriptError: no rows, or rows of other lengths than the header.
    """
    csv.field_size_limit(max(len(text), 1))
    rows: list[Mapping[str, Any]] = []
    try:
        for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
            if None in row or None in row.values():
                got = f"row {len(rows) + 1} with more or fewer fields than the header"
                raise bad(str(path), got, "a field for each column", "check quotes and separators")
            rows.append(row)
    except csv.Error as error:
        raise bad(str(path), f"no CSV ({error})", "rows with a header", "check quotes and separators") from error
    if not rows:
        raise bad(str(path), "a table without rows", "a conversation a row", "check the file")
    if all(map(is_message, rows)) and {"role", "content"} <= set(rows[0]):
        yield from read_value([dict(row) for row in rows], path.stem, str(path))
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
