"""Rows of tables: the same from every kind of file, bounded, and typed errors with the place, as their readers ask."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla.errors import CorpusError, ParseError, TranscriptError
from nla.eval.readers.labelled_file import READERS
from nla.storage.rows import batches, csv_rows, decode_json, numbered_lines, open_parquet
from nla.train.data.corpus import CorpusSettings, open_corpus
from nla.transcripts.files import read_file


def rows_of(path: Path, limit: int = 1 << 30) -> list[dict]:
    with open_parquet(path, path.name, ParseError) as file:
        return [row for batch in batches(file, path.name, ParseError, limit=limit) for row in batch.to_pylist()]


def test_lines_have_the_numbers_that_an_editor_shows(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "a.jsonl").write_bytes('{"a": "ü"}\n\n \r\n{"a": "漢"}'.encode(encoding))
        with (tmp_path / "a.jsonl").open("rb") as file:
            lines = [(n, decode_json(line, "a", ParseError)) for n, line in numbered_lines(file, "a", ParseError)]
        assert lines == [(1, {"a": "ü"}), (4, {"a": "漢"})]


SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "🙂"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_line_ends_with_a_line_feed_alone(encoding: str) -> None:
    texts = [f"a{mark}b" for mark in SEPARATORS]
    data = "\n".join(texts).encode(encoding)
    lines = list(numbered_lines(io.BytesIO(data), "a", ParseError))
    assert [n for n, _ in lines] == list(range(1, len(texts) + 1))
    assert [line.decode("utf-8-sig").removesuffix("\n") for _, line in lines] == texts


def test_a_file_in_utf16_is_read_line_by_line() -> None:
    file = io.BytesIO("\n".join(["word " * 100] * 2000).encode("utf-16"))
    lines = numbered_lines(file, "a", ParseError)
    assert next(lines) == (1, b"word " * 100 + b"\n")
    assert file.tell() < 100_000
    with pytest.raises(ParseError, match="a:1: a line above"):
        next(numbered_lines(io.BytesIO(("é" * 60).encode("utf-16")), "a", ParseError, limit=100))
    with pytest.raises(ParseError, match="a: bytes after line 1 that are not UTF-16"):
        list(numbered_lines(io.BytesIO("a\nb".encode("utf-16") + b"\x00\xd8"), "a", ParseError))


def test_no_line_cell_or_row_is_larger_than_the_limit(tmp_path: Path) -> None:
    with pytest.raises(ParseError, match=r"a:2: a line above"):
        list(numbered_lines(io.BytesIO(b"x\n" + b"y" * 101 + b"\nz"), "a", ParseError, limit=100))
    assert len(list(numbered_lines(io.BytesIO(b"x\n" + b"y" * 99 + b"\nz"), "a", ParseError, limit=100))) == 3
    with pytest.raises(ParseError, match="field larger than"):
        list(csv_rows(io.BytesIO(b"a,b\n" + b"x" * 101 + b",y\n"), "a", ParseError, ",", limit=100))
    draw = "".join(map(chr, range(33, 1033)))
    pq.write_table(pa.table({"a": [draw] * 3}), tmp_path / "a.parquet", use_dictionary=False)
    assert len(rows_of(tmp_path / "a.parquet")) == 3
    with pytest.raises(ParseError, match="at most 1000"):
        rows_of(tmp_path / "a.parquet", limit=1000)


def repeated(text: str, n_rows: int, form: str) -> pa.Table:
    """Rows that all hold one text, which a Parquet file stores once."""
    if form == "text":
        return pa.table({"a": [text] * n_rows})
    if form == "message":
        return pa.table({"a": [[{"role": "user", "content": text}]] * n_rows})
    if form == "map":
        kind = pa.map_(pa.string(), pa.string())
        return pa.table({"a": pa.array([[("k", text)]] * n_rows, kind)})
    return pa.table({"a": pa.array([[text, None]] * n_rows, pa.list_(pa.string(), 2))})


@pytest.mark.parametrize("form", ["text", "message", "map", "pair"])
def test_a_text_that_is_stored_once_is_not_spelled_out_for_all_rows_at_once(form: str, tmp_path: Path) -> None:
    path, text = tmp_path / "a.parquet", "x" * 3_000_000
    table = repeated(text, 50, form).slice(1)
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 26, store_schema=False)
    assert path.stat().st_size < 10_000
    before, largest, n_rows, first = pa.total_allocated_bytes(), 0, 0, None
    with open_parquet(path, "a", ParseError) as file:
        for batch in batches(file, "a", ParseError):
            largest, n_rows = max(largest, len(batch)), n_rows + len(batch)
            first = first or batch.slice(0, 1).to_pylist()[0]
            assert pa.total_allocated_bytes() - before < 30 << 20
    assert (largest, n_rows) == (11, 49) and first == table.slice(0, 1).to_pylist()[0]
    with pytest.raises(ParseError, match=r"a: row 0 of 300000\d bytes"), open_parquet(path, "a", ParseError) as file:
        list(batches(file, "a", ParseError, limit=1 << 20))


def test_no_batch_that_is_spelled_out_is_large(tmp_path: Path) -> None:
    """Over sizes that differ from row to row: each batch, as Python's values, has some megabytes, or is one row."""
    texts = [None, "", "é" * 9_000_000, "a", "b" * 12_000_000, "é" * 9_000_000, "", *["c"] * 50, "d" * 40_000_000, "e"]
    pq.write_table(pa.table({"a": texts, "n": range(len(texts))}), tmp_path / "a.parquet", compression="zstd")
    with open_parquet(tmp_path / "a.parquet", "a", ParseError) as file:
        found = [batch.to_pylist() for batch in batches(file, "a", ParseError)]
    assert [row["a"] for rows in found for row in rows] == texts
    sizes = [sum(len((row["a"] or "").encode()) for row in rows) for rows in found]
    assert all(size <= 1 << 25 or len(rows) == 1 for size, rows in zip(sizes, found, strict=True)) and len(found) < 9


def test_what_there_is_no_memory_for_is_an_error_of_the_reader(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ParseError, match="cannot be read"), open_parquet(tmp_path / "a.parquet", "a", ParseError):
        raise MemoryError


def test_rows_come_in_order_from_many_groups_and_batches(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": list(range(5000))}), tmp_path / "a.parquet", row_group_size=1700)
    assert [row["n"] for row in rows_of(tmp_path / "a.parquet")] == list(range(5000))


def not_utf8(path: Path) -> None:
    column = pa.array([b"\xff\xfe", b"ok"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column, "messages": column}), path)


def odd_date(path: Path) -> None:
    table = pa.table({"text": pa.array([2**30], pa.int32()).view(pa.date32())})
    pq.write_table(table, path)


def cut(path: Path) -> None:
    pq.write_table(pa.table({"text": ["x" * 1000] * 9}), path)
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("damage", [not_utf8, odd_date, cut])
def test_a_damaged_parquet_file_is_its_readers_own_error(damage, tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    damage(path)
    (found,) = [one for one in read_file(path) if isinstance(one, TranscriptError)]
    assert "bad.parquet: no whole Parquet file" in found.got
    with pytest.raises(ParseError, match=r"bad.parquet: no whole Parquet file"):
        list(READERS[".parquet"](path, ["text"]))
    with pytest.raises(CorpusError, match=r"bad.parquet: no whole Parquet file"):
        [parse() for parse in open_corpus(CorpusSettings(str(path), kind="text")).entries()]


@pytest.mark.parametrize("line", [b'{"text": ', b"[" * 100_000, b"9" * 10_000, b'{"text": "\xff"}'])
def test_a_damaged_line_is_its_readers_own_error_and_names_the_line(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"text": "x", "messages": [{"role": "user", "content": "x"}]}).encode()
    path.write_bytes(good + b"\n\n" + line + b"\n" + good)
    assert [isinstance(one, TranscriptError) and "bad.jsonl:3" in one.got for one in read_file(path)] == [
        False,
        True,
        False,
    ]
    with pytest.raises(ParseError, match=r"bad.jsonl:3"):
        list(READERS[".jsonl"](path, ["text"]))
    parsers = list(open_corpus(CorpusSettings(str(path), kind="text")).entries())
    with pytest.raises(CorpusError, match=r"bad.jsonl, line 3"):
        parsers[1]()
    assert parsers[2]() == "x"


@pytest.mark.parametrize("text", ['a,b\n"x,y\n', "a,b\nx\n", "a,b\nx,y,z\n", 'a,b\n"x"y,z\n'])
def test_damaged_csv_names_the_file(text: str) -> None:
    with pytest.raises(ParseError, match=r"t.csv: (no CSV|row 1 with)"):
        list(csv_rows(io.BytesIO(text.encode()), "t.csv", ParseError, ","))


def test_a_transcript_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion,prompt\na,b,c\n", encoding="utf-8")
    (found,) = read_file(tmp_path / "a.csv")
    assert isinstance(found, TranscriptError) and "two columns 'prompt'" in found.got


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_what_the_system_will_not_read_is_the_readers_own_error(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ParseError, match=f"a{kind}"):
        list(READERS[kind](tmp_path / f"a{kind}", ["text"]))
    path = tmp_path / f"b{kind}"
    path.mkdir()
    with pytest.raises(ParseError, match=f"b{kind}"):
        list(READERS[kind](path, ["text"]))
