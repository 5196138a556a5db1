"""Tables in, rows out: Parquet, CSV and JSON lines, one row after another, in bounded memory.

Who reads says what is raised (a damaged corpus is a CorpusError); every message names the file, and the line or row.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nla.errors import NLAError, visible

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

Errors = type[NLAError]

MAX_BYTES = 1 << 30
"""Of a line, a cell or a row, unless less is asked for."""
_AT_ONCE, _MOST_ROWS = 1 << 25, 1024
"""Bytes and rows of a Parquet file that are held at once."""
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""What a file in UTF-16 begins with; others are UTF-8, with or without a byte-order mark."""
_RAISE = "write smaller rows, or raise the limit where there is one (--max-mb)"


@contextmanager
def readable(name: str, error: Errors) -> Iterator[None]:
    """What the system says against reading a file inside the ``with`` is one of ``error``."""
    try:
        yield
    except OSError as failure:
        got = visible(f"{name}, which cannot be read ({str(failure)[:200]})")
        raise error(got, "a file that can be read", "check it and its rights, or restore it") from failure


@contextmanager
def open_parquet(source: Path | IO[bytes], name: str, error: Errors) -> Iterator[ParquetFile]:
    """A Parquet file; what is found to be wrong with it inside the ``with`` is one of ``error``."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(source) as file:
            yield file
    except NLAError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as failure:  # also odd texts and dates
        got = visible(f"{name}: no whole Parquet file: it cannot be read ({str(failure)[:120]})")
        raise error(got, "a Parquet file, texts in UTF-8", "restore the file, or write it again") from failure


def batches(
    file: ParquetFile, name: str, error: Errors, columns: list[str] | None = None, limit: int = MAX_BYTES
) -> Iterator[RecordBatch]:
    """The rows of an open Parquet file, some megabytes at once; ``limit`` bounds the mean bytes of a group's rows."""
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        size = about.total_byte_size // max(about.num_rows, 1)
        if size > limit:
            raise error(visible(f"{name}: rows of {size} bytes"), f"at most {limit}", _RAISE)
        n_rows = max(1, min(_MOST_ROWS, _AT_ONCE // max(size, 1)))
        yield from file.iter_batches(n_rows, row_groups=[group], columns=columns)


def _is_utf16(file: IO[bytes]) -> bool:
    start = file.read(2)
    file.seek(0)
    return start in _UTF16


def numbered_lines(file: IO[bytes], name: str, error: Errors, limit: int = MAX_BYTES) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1; UTF-16 is given as UTF-8."""
    lines: Any = codecs.EncodedFile(file, "utf-8", "utf-16") if _is_utf16(file) else file
    number = 0
    while line := lines.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise error(visible(f"{name}:{number}: a line above {limit / 2**20:g} MB"), "what fits the limit", _RAISE)
        if line.strip():
            yield number, line


def csv_rows(file: IO[bytes], name: str, error: Errors, delimiter: str, limit: int = MAX_BYTES) -> Iterator[list[str]]:
    """The header of a CSV file, and its rows that are not blank; each has as many cells."""
    text = io.TextIOWrapper(file, "utf-16" if _is_utf16(file) else "utf-8-sig", newline="")
    csv.field_size_limit(limit)
    header: list[str] | None = None
    try:
        for number, cells in enumerate(filter(None, csv.reader(text, delimiter=delimiter, strict=True))):
            header = header or cells
            if len(cells) != len(header):
                got = visible(f"{name}: row {number} with {len(cells)} cells: more or fewer fields than the header")
                fix = 'put quotes ("…") around texts that hold the delimiter, quotes or line breaks'
                raise error(got, f"{len(header)}, as in the header", fix)
            yield cells
    except (csv.Error, UnicodeError) as failure:
        got = visible(f"{name}: no CSV ({str(failure)[:120]})")
        fix = "check quotes and separators, that the file is not cut off, and convert it to UTF-8"
        raise error(got, "rows with a header, text in UTF-8", fix) from failure


def decode(data: bytes, name: str, error: Errors) -> str:
    """The text of a file or a line."""
    try:
        return data.decode("utf-16" if data[:2] in _UTF16 else "utf-8-sig")
    except UnicodeDecodeError as failure:
        got = visible(f"{name}: bytes that are not UTF-8 ({failure.reason})")
        raise error(got, "UTF-8 text", "convert the file, or leave it out") from failure


def decode_json(data: bytes, name: str, error: Errors) -> Any:
    """The value of a JSON file or line."""
    text = decode(data, name, error)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as failure:
        got = visible(f"{name}: JSON that is cut or broken, or that Python cannot hold ({str(failure)[:120]})")
        raise error(got, "whole JSON", "restore the file, or finish writing it") from failure
