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

import numpy as np

from nla.errors import NLAError, visible

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pyarrow import Array, RecordBatch
    from pyarrow.parquet import FileMetaData, ParquetFile

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
        with ParquetFile(source) as plain, ParquetFile(source, read_dictionary=_repeated(plain.metadata)) as file:
            yield file
    except NLAError:
        raise
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
        MemoryError,
    ) as failure:  # also odd texts, dates
        got = visible(f"{name}: no whole Parquet file: it cannot be read ({str(failure)[:120]})")
        raise error(got, "a Parquet file, texts in UTF-8", "restore the file, or write it again") from failure


def _repeated(metadata: FileMetaData) -> list[str]:
    """Columns of texts that are stored once and referred to: spelled out, they may be a million times as long."""
    names = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = ((name, group.column(number)) for group in groups for number, name in enumerate(names))
    texts = (name for name, one in chunks if one.physical_type == "BYTE_ARRAY" and one.has_dictionary_page)
    return list(dict.fromkeys(texts))


def batches(
    file: ParquetFile, name: str, error: Errors, columns: list[str] | None = None, limit: int = MAX_BYTES
) -> Iterator[RecordBatch]:
    """The rows of an open Parquet file, some megabytes at once, also where its texts are stored once and referred to.

    Args:
        limit: bytes of a row: in the mean of its group as stored, and of each as read.
    """
    number = 0
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        size = about.total_byte_size // max(about.num_rows, 1)
        if size > limit:
            raise error(visible(f"{name}: rows of {size} bytes"), f"at most {limit}", _RAISE)
        n_rows = max(1, min(_MOST_ROWS, _AT_ONCE // max(size, 1)))
        for batch in file.iter_batches(n_rows, row_groups=[group], columns=columns):
            batch.validate(full=True)  # references are not checked when they are read
            sizes, start, held = sum(map(_sizes, batch.columns), np.zeros(len(batch), np.int64)).tolist(), 0, 0
            for row, size in enumerate(sizes):
                if size > limit:
                    raise error(visible(f"{name}: row {number + row} of {size} bytes"), f"at most {limit}", _RAISE)
                if row > start and held + size > _AT_ONCE:
                    yield batch.slice(start, row - start)
                    start, held = row, 0
                held += size
            yield batch.slice(start)
            number += len(batch)


def _sizes(column: Array) -> NDArray[np.int64]:
    """Bytes of each value of a column when it is spelled out."""
    import pyarrow.compute as pc
    from pyarrow import types

    kind = column.type
    none = np.zeros(len(column), np.int64)
    if types.is_dictionary(kind):
        return np.append(_sizes(column.dictionary), 0)[pc.fill_null(column.indices, -1).to_numpy()]
    if types.is_struct(kind):
        return sum((_sizes(column.field(number)) for number in range(kind.num_fields)), none)
    if types.is_fixed_size_list(kind):
        entries = _sizes(column.values).reshape(-1, max(kind.list_size, 1)).sum(1)
        return entries[column.offset : column.offset + len(column)] if kind.list_size else none
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        entries = _sizes(column.keys) + _sizes(column.items) if types.is_map(kind) else _sizes(column.values)
        ends = np.concatenate([[0], np.cumsum(entries)])[column.offsets.to_numpy()]
        return ends[1:] - ends[:-1]
    if types.is_string(kind) or types.is_binary(kind) or types.is_large_string(kind) or types.is_large_binary(kind):
        return pc.fill_null(pc.call_function("binary_length", [column]), 0).to_numpy().astype(np.int64)
    return none + 8


def _is_utf16(file: IO[bytes]) -> bool:
    start = file.read(2)
    file.seek(0)
    return start in _UTF16


def numbered_lines(file: IO[bytes], name: str, error: Errors, limit: int = MAX_BYTES) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1; UTF-16 is given as UTF-8."""
    text = io.TextIOWrapper(file, "utf-16", newline="\n") if _is_utf16(file) else None
    number = 0
    try:
        while line := file.readline(limit + 1) if text is None else text.readline(limit + 1).encode():
            number += 1
            if len(line) > limit:
                got = visible(f"{name}:{number}: a line above {limit / 2**20:g} MB")
                raise error(got, "what fits the limit", _RAISE)
            if line.strip():
                yield number, line
    except UnicodeDecodeError as failure:
        got = visible(f"{name}: bytes after line {number} that are not UTF-16, as its mark says ({failure.reason})")
        raise error(got, "text in UTF-8, or in UTF-16", "convert the file, or leave it out") from failure


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
