"""Corpora: documents of a ``datasets`` name or of local files, under numbers that stay the same."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

from pydantic import Field

from nla.errors import CorpusError, TranscriptError, visible
from nla.storage.rows import batches, decode, decode_json, numbered_lines, open_parquet, readable
from nla.storage.schema import shown
from nla.train.schema import NOTHING, Count, Decides, Number, one_of, refuse, section
from nla.transcripts.entries import parse_messages
from nla.transcripts.files import read_file
from nla.transcripts.messages import Transcript, known_of

SELF = "self"
"""The source that is no name and no path: what the target itself writes."""
KINDS = ("text", "lines", "chat")
TABLES = (".parquet", ".jsonl", ".ndjson")
CHATS = (".json", ".chat", ".eval")
SUFFIXES = (*TABLES, ".txt", *CHATS)
"""Of the files that are taken from a folder."""

_EDGE = 1 << 20
log = logging.getLogger(__name__)


@section("corpus", decides="extract")
class CorpusSettings:
    """Which documents are read, at which of their tokens, and how they are split.

    Raises:
        ArgumentError: a value is out of range.
    """

    source: str
    """"self": what the target itself writes, asked with ``prompts``; a ``datasets`` name; or a file, folder or glob of
    .parquet, .jsonl or .txt files, or of transcripts as `nla audit` takes them. Files are read in the order of their
    names."""
    kind: Annotated[str, one_of(*KINDS)] | None = None
    """"text" (of a .txt file, the whole is one document), "lines" (of a .txt file, each line is one) or "chat" (a list
    of messages, rendered by the target's template, white space at the ends of messages taken off). None: as the column
    says, and text for .txt files."""
    config: str | None = None
    """Configuration of a ``datasets`` name."""
    split: str = "train"
    """Its split."""
    revision: str | None = None
    """Its branch, tag or commit; None: main."""
    streaming: bool = False
    """Read a ``datasets`` name as it is downloaded, and no more of it than is needed."""
    text_column: str | None = None
    """Column of the text, or of a chat's messages; None: "text", or "messages"."""
    n_documents: Count | None = None
    """The first so many of the source, None: all; of "self", how many the target writes. ``mix`` comes on top."""
    prompts: Annotated[str | None, NOTHING] = None  # what is in the file decides
    """Of "self": the YAML file of what the target is asked, or the name of a shipped one; None: "english"."""
    mix: Annotated[list[str] | None, Decides("extract", but_for_default=True)] = None
    """Files, folders and globs of which all documents follow those of the source."""
    max_tokens: Count = 1024
    """Longer documents are cut here; the manifest counts them."""
    positions: str = "random"
    """"random": ``n_positions`` of each document, drawn by a generator keyed to its text; "last"; "every:k";
    "turns": where a chat's turns are decided and end; or "kinds": as many, spread evenly over kinds of words and marks,
    of a chat also over the template's tokens, the prompt's and the answer's start. Else never a special token."""
    n_positions: Count = 10
    """For "random" and "kinds"."""
    first_position: Annotated[int, Field(ge=0)] = 50
    """Tokens before this one are not chosen, for "random", "every:k" and texts' "kinds": they have little to tell."""
    eval_fraction: Annotated[Number, Field(gt=0, lt=1)] = 0.05
    """Share of the documents that are held out."""
    n_eval: int | None = None
    """About so many documents of the source held out instead, and the same share of ``mix``; ``n_documents`` must say
    of how many."""
    split_key: str = "nla"
    """Another key holds other documents out. What is held out follows from this and a document's text alone."""
    documents_per_chunk: Count = 512
    """Documents in one file, in memory at a time, and done again after a kill."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"random|last|turns|kinds|every:[1-9][0-9]*", self.positions):
            refuse(
                "corpus.positions", self.positions, '"random", "last", "turns", "kinds" or "every:k" such as "every:8"'
            )
        if self.source == SELF:
            if self.n_documents is None:
                refuse("corpus.n_documents", None, 'how many documents the target writes, where source is "self"')
            for name in ("kind", "text_column"):
                if getattr(self, name) is not None:
                    refuse(f"corpus.{name}", getattr(self, name), 'none where source is "self"')
        elif self.prompts is not None:
            refuse("corpus.prompts", self.prompts, 'none where source is not "self"')
        if self.n_eval is not None and not (self.n_documents and 0 < self.n_eval < self.n_documents):
            refuse("corpus.n_eval", self.n_eval, f"between 1 and n_documents = {self.n_documents}, which must be set")

    @property
    def eval_share(self) -> float:
        """Share of the documents that are held out."""
        return self.n_eval / self.n_documents if self.n_eval and self.n_documents else self.eval_fraction


Content = str | Transcript


class Entry(NamedTuple):
    """A document that has not been parsed: going past it costs nothing."""

    number: int
    """Which document of the corpus it is, from 0."""

    parse: Callable[[], Content]
    """Its text or chat. CorpusError: the corpus is no corpus. TranscriptError: this one document is no chat."""


class Corpus(NamedTuple):
    """An open corpus."""

    about: Any
    """What its files are, for telling another corpus apart: JSON."""

    entries: Callable[[], Iterator[Callable[[], Content]]]
    """Its documents, from the first, each as something that parses it."""

    def chunks(
        self, settings: CorpusSettings, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, list[Entry] | None]]:
        """Chunks of documents by number; those that are not wanted as None."""
        size, entries = settings.documents_per_chunk, self.entries()
        chunk = 0
        while True:
            if wanted(chunk):
                taken = [Entry(chunk * size + n, parse) for n, parse in enumerate(islice(entries, size))]
                n, out = len(taken), taken
            else:
                n, out = sum(1 for _ in islice(entries, size)), None
            if n == 0:
                return
            yield chunk, out
            chunk += 1


def open_corpus(settings: CorpusSettings, commit: str | None = None) -> Corpus:
    """The corpus that settings name.

    Args:
        commit: of a ``datasets`` name, what to read; None: what its revision is now.

    Raises:
        CorpusError: there is none, it cannot be read, or it has not the column.
    """
    if settings.source == SELF:
        got = f"the corpus {SELF!r}, which a target has to write first"
        raise CorpusError(got, "a corpus that is there", "write a recipe with `corpus: {source: self}` for nla train")
    files, mixed = local_files(settings), mixed_files(settings)
    source = _hub(settings, commit or hub_commit(settings)) if files is None else _of_files(files, settings)
    if not mixed:
        return Corpus(source.about, lambda: islice(source.entries(), settings.n_documents))
    rest = _of_files(mixed, settings)
    return Corpus(
        {"source": source.about, "mix": rest.about},
        lambda: itertools.chain(islice(source.entries(), settings.n_documents), rest.entries()),
    )


def written_by_target(settings: CorpusSettings, folder: Path) -> CorpusSettings:
    """The corpus that ``source: self`` is once the target has written it to a folder: all of it is read."""
    share = {"n_eval": None, "eval_fraction": settings.eval_share}
    source = str(Path(glob.escape(str(folder))) / "[0-9]*.jsonl")
    return dataclasses.replace(settings, source=source, prompts=None, n_documents=None, **share)


def _of_files(files: list[Path], settings: CorpusSettings) -> Corpus:
    def entries() -> Iterator[Callable[[], Content]]:
        for file in files:
            yield from _of_file(file, settings)

    next(_of_file(files[0], settings), None)  # a wrong column is refused before a target is loaded
    return Corpus(describe_files(files), entries)


def local_files(settings: CorpusSettings) -> list[Path] | None:
    """The files of a local corpus, in the order in which they are read; None for a ``datasets`` name and for "self".

    Raises:
        CorpusError: there are none.
    """
    source, path = settings.source, Path(settings.source).expanduser()
    if source == SELF:
        return None
    is_local = os.path.exists(path) or glob.has_magic(source) or path.suffix.lower() in SUFFIXES or source[:1] in "./~"
    return _files(path) if is_local else None


def mixed_files(settings: CorpusSettings) -> list[Path]:
    """The files of ``mix``, in the order in which they are read.

    Raises:
        CorpusError: a path has none.
    """
    return [file for path in settings.mix or () for file in _files(Path(path).expanduser())]


def describe_files(files: list[Path]) -> list[list[Any]]:
    """Name, size, and a hash of the first and the last MiB of each file: enough to tell that a file was replaced."""
    out = []
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as handle:
            edges = handle.read(_EDGE)
            handle.seek(max(size - _EDGE, 0))
            edges += handle.read(_EDGE)
        out.append([file.name, size, hashlib.sha256(edges).hexdigest()])
    return out


def _files(path: Path) -> list[Path]:
    if os.path.isfile(path):
        return [path]
    candidates = path.iterdir() if os.path.isdir(path) else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(file for file in candidates if file.is_file() and file.suffix.lower() in SUFFIXES)
    if not files:
        what = "no such file or folder" if not os.path.isdir(path) else "a folder without such files"
        raise CorpusError(
            f"the corpus {shown(str(path))}: {what}",
            f"a `datasets` name, or files that end in {', '.join(SUFFIXES)}",
            "correct the source; ** in a glob reaches into folders",
        )
    return files


def _of_file(file: Path, settings: CorpusSettings) -> Iterator[Callable[[], Content]]:
    suffix = file.suffix.lower()
    with readable(str(file), CorpusError):
        if suffix == ".parquet":
            yield from _parquet(file, settings)
        elif suffix in TABLES and not _is_chat_file(file, settings):
            yield from _json_lines(file, settings)
        elif suffix in (*TABLES, *CHATS) or settings.kind == "chat":
            for chat in read_file(file, max_mb=1024):
                yield _raiser(chat) if isinstance(chat, TranscriptError) else lambda chat=chat: chat
        elif settings.kind == "lines":
            with file.open("rb") as lines:
                for line in lines:
                    yield lambda line=line: decode(line, str(file), CorpusError).rstrip("\r\n")
        else:
            yield lambda: decode(file.read_bytes(), str(file), CorpusError)


def _raiser(error: Exception) -> Callable[[], NoReturn]:
    def parse() -> NoReturn:
        raise error

    return parse


def column_of(settings: CorpusSettings, columns: list[str], example: Mapping[str, Any], where: str) -> tuple[str, bool]:
    """The column to read, and whether it holds chats.

    Raises:
        CorpusError: it is not there; the message lists those that are.
    """
    usual = {"text": ["text"], "lines": ["text"], "chat": ["messages"], None: ["text", "messages"]}[settings.kind]
    wanted = [settings.text_column] if settings.text_column else usual
    column = next((name for name in wanted if name in columns), None)
    if column is None:
        raise CorpusError(
            f"{where} with the columns {', '.join(map(repr, columns))}",
            f"the column {' or '.join(map(repr, wanted))}",
            f"name the column: text_column = {columns[0] if columns else '…'}",
        )
    is_list = isinstance(example.get(column), list)
    return column, settings.kind == "chat" or (settings.kind is None and (is_list or column == "messages"))


def _content(value: Any, is_chat: bool, where: str, beside: Mapping[str, Any] = {}) -> Content:
    """A cell of a table as text or chat; ``beside``, what the row says of the chat."""
    if is_chat:
        return Transcript(where, parse_messages(value, where), source=where, **known_of(beside))
    if value is not None and not isinstance(value, str):
        raise CorpusError(
            f"{where}: a text that is a {type(value).__name__}",
            "a column of strings",
            "name another text_column, or set kind = chat for a column of messages",
        )
    return value or ""


def _beside(columns: list[str]) -> list[str]:
    """The columns that say something of a chat."""
    return [name for name in ("attributes", "split") if name in columns]


def _parquet(file: Path, settings: CorpusSettings) -> Iterator[Callable[[], Content]]:
    name = str(file)
    with open_parquet(file, name, CorpusError) as table:
        columns: list[str] = table.schema_arrow.names
        example = next((batch.slice(0, 1).to_pylist()[0] for batch in batches(table, name, CorpusError)), {})
        column, is_chat = column_of(settings, columns, example, name)
        wanted = [column, *(_beside(columns) if is_chat else ())]
        rows = (row for batch in batches(table, name, CorpusError, wanted) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield lambda row=row, where=f"{file}, row {number}": _content(row[column], is_chat, where, row)


def _is_chat_file(file: Path, settings: CorpusSettings) -> bool:
    """Whether a JSONL file holds transcripts, by its first line."""
    if settings.kind is not None:
        return settings.kind == "chat"
    with file.open("rb") as lines:
        content = next((_json(line, file, n) for n, line in numbered_lines(lines, str(file), CorpusError)), {})
    if isinstance(content, list):
        return True
    column, is_chat = column_of(settings, list(content), content, str(file))
    return is_chat or column == "messages"


def _json(line: bytes, file: Path, number: int) -> Any:
    content = decode_json(line, f"{file}, line {number}", CorpusError)
    if not isinstance(content, dict | list):
        raise CorpusError(f"{file}, line {number}: a {type(content).__name__}", "an object a line", "check the file")
    return content


def _json_lines(file: Path, settings: CorpusSettings) -> Iterator[Callable[[], Content]]:
    def parse(line: bytes, number: int) -> Content:
        content, where = _json(line, file, number), f"{file}, line {number}"
        content = content if isinstance(content, dict) else {}
        column, _ = column_of(settings, list(content), content, where)
        return _content(content[column], False, where)

    with file.open("rb") as lines:
        for number, line in numbered_lines(lines, str(file), CorpusError):
            yield lambda line=line, number=number: parse(line, number)


def hub_commit(settings: CorpusSettings) -> str | None:
    """The commit that a ``datasets`` name is at; None, with a warning, where the hub does not say."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(settings.source, revision=settings.revision, timeout=30).sha
    except Exception as error:  # whatever keeps the hub from answering; what is in a cache can be read all the same
        log.warning(
            "The hub does not say at which commit the dataset %s is (%s): a call that continues later cannot tell "
            "whether it has changed.",
            settings.source,
            type(error).__name__,
        )
        return None


def _hub(settings: CorpusSettings, commit: str | None) -> Corpus:
    import datasets

    where, revision = f"the dataset {settings.source}", commit or settings.revision
    try:
        data: Any = datasets.load_dataset(
            settings.source, settings.config, split=settings.split, revision=revision, streaming=settings.streaming
        )
        example: Mapping[str, Any] = next(iter(data), {})
    except Exception as error:  # the hub, its cache and each format raise errors of their own
        raise CorpusError(
            f"{where}, configuration {settings.config}, split {settings.split}, which cannot be loaded "
            f"({type(error).__name__}: {visible(str(error))[:300]})",
            "the name, configuration and split of a dataset that can be reached, or the path of local files",
            "correct the name; log in (`hf auth login`) for a gated one; check the network",
        ) from error
    column, is_chat = column_of(settings, list(data.column_names or example), example, where)
    data = data.select_columns([column, *(_beside(data.column_names or list(example)) if is_chat else ())])

    def entries() -> Iterator[Callable[[], Content]]:
        rows = enumerate(_unbroken(data, where)) if settings.streaming else ((n, n) for n in range(len(data)))
        for number, row in rows:

            def parse(row: Any = row, number: int = number) -> Content:
                values = data[row] if isinstance(row, int) else row
                return _content(values[column], is_chat, f"{where}, row {number}", values)

            yield parse

    rows = None if settings.streaming else len(data)
    return Corpus({"dataset": settings.source, "commit": commit, "rows": rows}, entries)


def _unbroken(rows: Any, where: str) -> Iterator[Any]:
    """The rows of a stream, whose breaking off is an error of its own: it must not pass for the end."""
    stream, number = iter(rows), 0
    while True:
        try:
            row = next(stream)
        except StopIteration:
            return
        except Exception as error:  # of the network, of a compression, of a format
            raise CorpusError(
                f"{where}, which breaks off after {number} rows ({type(error).__name__}: {visible(str(error))[:200]})",
                "a stream to its end, or to n_documents",
                "run the same command again, which continues; without `streaming` the corpus is downloaded first",
            ) from error
        yield row
        number += 1
