"""A user's own labelled texts: CSV, TSV, JSON, JSON lines or Parquet, to rows that can be trusted.

A file may be larger than memory: rows are streamed, and a random sample of fixed size is kept.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nla.errors import ArgumentError, EmptyTextError, ParseError
from nla.storage.rows import MAX_BYTES, batches, csv_rows, decode_json, numbered_lines, open_parquet, readable

MIN_PER_CLASS = 8
MAX_ROWS = 2000
_SHOWN = 8


class LabelledRow(NamedTuple):
    """One labelled text."""

    number: int
    """In the file: line of a CSV's record by count, from 1, without the header."""

    text: str
    label: str
    group: str | None


@dataclass(frozen=True)
class LabelledRows:
    """The rows that were kept."""

    rows: list[LabelledRow]
    n_read: int
    """Rows in the file."""

    n_duplicates: int
    """Rows left out because text, label and group were there already."""

    n_conflicts: int
    """Texts that are there with more than one label."""

    def __len__(self) -> int:
        return len(self.rows)


def read_labelled_file(
    path: str | Path, text: str, label: str, group: str | None = None, max_rows: int = MAX_ROWS, seed: int = 0
) -> LabelledRows:
    """Labelled texts of a file; of more than ``max_rows`` a random sample.

    Args:
        text, label: names of the columns.
        group: column of the document or cluster that a row belongs to; None: equal texts alone are a group.

    Raises:
        ArgumentError: no such file or column, an unknown kind of file, a missing label, one class only, or fewer than
            eight rows of a class.
        EmptyTextError: a text is empty or missing.
        ParseError: the file is not of its kind.
    """
    path = Path(path)
    if max_rows < 2 * MIN_PER_CLASS:
        raise ArgumentError(f"max_rows={max_rows}", f"{2 * MIN_PER_CLASS} or more", "allow two classes their rows")
    if not path.is_file():
        raise ArgumentError(f"no file {path}", "a CSV, TSV, JSON, JSON lines or Parquet file", "check the path")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ArgumentError(f"the file {path.name}", f"one that ends on {', '.join(READERS)}", "rename or convert it")
    columns = [name for name in (text, label, group) if name is not None]
    rng, kept, n_read = random.Random(seed), [], 0
    for number, cells in enumerate(reader(path, columns), start=1):
        row = _row(number, cells, text, label, group)
        n_read = number
        if len(kept) < max_rows:
            kept.append(row)
        elif (replaced := rng.randrange(number)) < max_rows:
            kept[replaced] = row
    kept.sort()
    unique = list({(row.text, row.label, row.group): row for row in reversed(kept)}.values())[::-1]
    _check_classes(unique, path, n_read, max_rows)
    conflicts = Counter(text for text, _label in {(row.text, row.label) for row in unique})
    return LabelledRows(unique, n_read, len(kept) - len(unique), sum(count > 1 for count in conflicts.values()))


def _row(number: int, cells: dict[str, Any], text: str, label: str, group: str | None) -> LabelledRow:
    words = cells[text]
    if words is None or (isinstance(words, str) and not words.strip()):
        raise EmptyTextError(f"row {number} with an empty {text!r}", "a text in every row", "leave empty rows out")
    if not isinstance(words, str):
        raise ParseError(f"row {number} with a {type(words).__name__} as {text!r}", "a text", "name the text's column")
    name, cluster = _name(cells[label]), None if group is None else _name(cells[group])
    for column, value in ((text, words), (label, name), (group, cluster)):
        if value is not None and any("\ud800" <= one <= "\udfff" for one in value):
            raise ParseError(
                f"row {number} with half a character in {column!r}", "whole characters", "write it as UTF-8"
            )
    if name is None:
        raise ArgumentError(
            f"row {number} without a label ({cells[label]!r})", f"a value in every {label!r}", "drop it"
        )
    return LabelledRow(number, words, name, cluster)


def _name(value: Any) -> str | None:
    """A label as text: 1 and 1.0 are the same one; None, NaN and blanks are none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else str(value)
    if value is None or isinstance(value, dict | list):
        return None
    name = str(value).strip()
    return None if name.lower() in ("", "nan") else name


def _check_classes(rows: list[LabelledRow], path: Path, n_read: int, max_rows: int) -> None:
    counts = Counter(row.label for row in rows)
    if len(counts) < 2:
        shown = f"the class {next(iter(counts))!r} alone" if counts else "no rows"
        raise ArgumentError(f"{path.name} with {shown}", "rows of two classes or more", "add rows of another class")
    rare = sorted((count, name) for name, count in counts.items() if count < MIN_PER_CLASS)
    if rare:
        shown = ", ".join(f"{name[:40]!r} {count}" for count, name in rare[:_SHOWN]) + (
            " …" if len(rare) > _SHOWN else ""
        )
        more = f" among the {max_rows} sampled of {n_read} rows" if n_read > max_rows else ""
        raise ArgumentError(
            f"{len(rare)} of {len(counts)} classes with fewer than {MIN_PER_CLASS} different rows{more}: {shown}",
            f"{MIN_PER_CLASS} or more of each",
            "merge or drop rare classes; a numeric label must be cut into classes first; or allow more rows",
        )


def _check_columns(columns: list[str], header: list[str], where: str) -> None:
    missing = [name for name in columns if name not in header]
    twice = [name for name in columns if header.count(name) > 1]
    if missing or twice:
        what = f"without a column {missing[0]!r}" if missing else f"with two columns {twice[0]!r}"
        raise ArgumentError(f"{where} {what}", f"columns among {header[:20]}", "name a column of the file")


# ------------------------------------------------------------------------------------------------------ kinds of file


def _csv(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    with readable(path.name, ParseError), path.open("rb") as file:
        rows = csv_rows(file, path.name, ParseError, "\t" if path.suffix.lower() == ".tsv" else ",")
        header = next(rows, None)
        if header is None:
            raise ArgumentError(f"{path.name}, which is empty", "a header and rows", "check the path")
        _check_columns(columns, header, path.name)
        position_of = {name: header.index(name) for name in columns}
        yield from ({name: cells[position] for name, position in position_of.items()} for cells in rows)


def _json_lines(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    with readable(path.name, ParseError), path.open("rb") as file:
        for number, (line_number, line) in enumerate(numbered_lines(file, path.name, ParseError), start=1):
            yield _object(decode_json(line, f"{path.name}:{line_number}", ParseError), number, path, columns)


def _json(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    with readable(path.name, ParseError), path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ArgumentError(f"{path.name} of more than 1 GiB", "JSON lines, which are streamed", "convert it to .jsonl")
    content = decode_json(data, path.name, ParseError)
    if not isinstance(content, list):
        raise ParseError(f"{path.name} holding a {type(content).__name__}", "a list of objects", "wrap the rows in [ ]")
    yield from (_object(one, number, path, columns) for number, one in enumerate(content, start=1))


def _object(row: Any, number: int, path: Path, columns: list[str]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ParseError(f"{path.name} with a row that is a {type(row).__name__}", "objects", "give {…} a row")
    _check_columns(columns, list(row), f"row {number} of {path.name}")
    return row


def _parquet(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    with open_parquet(path, path.name, ParseError) as file:
        _check_columns(columns, file.schema_arrow.names, path.name)
        yield from (row for batch in batches(file, path.name, ParseError, columns) for row in batch.to_pylist())


READERS: dict[str, Callable[[Path, list[str]], Iterator[dict[str, Any]]]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}
"""By a file's ending: its rows, one after another, each with the columns asked for."""
