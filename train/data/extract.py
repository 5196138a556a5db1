"""A corpus → a store of the target's activations at a point, in splits that share no document.

While the target runs one chunk, the next is tokenised and the last is written, each by a thread of its own. Memory
follows from the size of a chunk, not of the corpus.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla.config import DTYPES, QUANTIZATIONS, tokenizer_hash
from nla.errors import ArgumentError, ContextLengthError
from nla.models.load import AUTO, load_truncated
from nla.models.points import context_length
from nla.models.read import vectors_at
from nla.organisms import PACKAGED, local_folder, target_folder
from nla.storage.files import read_json, try_folder
from nla.store.manifest import SETTINGS_FILE, Manifest
from nla.store.writer import StoreWriter
from nla.text.tokens import load_tokenizer
from nla.train.data.corpus import Corpus, CorpusSettings, describe_files, open_corpus
from nla.train.data.documents import Prepared, Reader
from nla.train.schema import Count, Seed, one_of, section

log = logging.getLogger(__name__)


@section("extraction")
class ExtractionSettings:
    """What is read, of which target, at which point.

    Raises:
        ArgumentError: a value is out of range, or there is no such process.
    """

    corpus: CorpusSettings
    target: str
    """A folder or hub id; blocks above the point are never loaded."""
    point: str
    revision: str | None = None
    """Commit, tag or branch of a target on the hub."""
    dtype: Annotated[str, one_of(*DTYPES, AUTO)] | None = "float32"
    """Type of the target's weights; see :class:`nla.models.load.LoadSettings`; None: the checkpoint's own. The manifest
    holds the type that they were read in."""
    device: str | None = None
    """Where to read; None: the first GPU if there is one, else the CPU."""
    quantization: Annotated[str, one_of(*QUANTIZATIONS)] | None = None
    """8bit or 4bit, by bitsandbytes; None: the weights as they are."""
    adapter: str | None = None
    """Folder of an adapter on the target."""
    max_tokens_per_batch: Count = 16_384
    """Tokens with padding in one forward pass. It may change between a kill and the call that continues; activations
    then differ at rounding error."""
    seed: Seed = 0
    """Decides the positions, with each document's text."""
    process: Annotated[int, Field(ge=0)] = 0
    """Which of the processes that share the work this is, from 0."""
    processes: Count = 1

    def __post_init__(self) -> None:
        if self.process >= self.processes:
            got = f"process {self.process} of {self.processes}"
            raise ArgumentError(got, "0 ≤ process < processes", "count them from 0")

    @property
    def source(self) -> str:
        """The target's folder, or else its name or hub id."""
        return str(local_folder(self.target) or self.target)


def extract_corpus(settings: ExtractionSettings, out_dir: str | Path, progress: bool = False) -> Manifest | None:
    """Read a corpus into the store ``out_dir``; after a kill, the same call continues to the same bytes.

    A ``datasets`` name is read at one commit, also by a call that continues when its main branch has moved on, and with
    "auto" the target runs in one type, also where a call continues on another machine.

    Several processes share the work when each is called with its own ``process`` of ``processes``, on one ``out_dir``:
    the store is, row for row and bit for bit, the one that a single process of as many threads makes.

    Args:
        progress: show a bar.

    Returns:
        The manifest; None if other processes have not finished their share: the last one writes it.

    Raises:
        CorpusError, StoreError, NonFiniteError, StorageError, PointError: see the functions used.
        ContextLengthError: documents may be longer than the target's context.
        TargetError, AccessError: see :func:`nla.models.load.load_truncated`.
    """
    s = settings
    try_folder(Path(out_dir))
    begun = _begun(out_dir)
    corpus = open_corpus(s.corpus, _begun_at(begun, s.corpus))
    asked = AUTO if s.dtype is None and s.source in PACKAGED else s.dtype
    view = load_truncated(
        s.source,
        s.point,
        revision=s.revision,
        dtype=begun["dtype"] if asked == AUTO and begun.get("dtype") in DTYPES else asked,
        device=s.device,
        quantization=s.quantization,
        adapter=s.adapter,
    )
    tokenizer = load_tokenizer(target_folder(s.source), getattr(view.config, "_commit_hash", None) or s.revision)
    _check_context(view, s.corpus)
    writer = StoreWriter(out_dir, _about(s, corpus, view, tokenizer))
    n_chunks = _run(s, corpus, view, Reader(tokenizer, s.corpus, s.seed), writer, progress)
    manifest = writer.finish(n_chunks)
    if manifest is not None:
        shown = ", ".join(f"{count} {name}" for name, count in manifest.counts.items())
        log.info("%s is whole: %s; vectors %s.", out_dir, shown, manifest.n)
    return manifest


def _begun(out_dir: str | Path) -> dict[str, Any]:
    """What a store was begun with; empty where there is none."""
    path = Path(out_dir) / SETTINGS_FILE
    return read_json(path) if path.is_file() else {}


def _begun_at(begun: Mapping[str, Any], settings: CorpusSettings) -> str | None:
    """The commit of a ``datasets`` name that a store was begun with: it continues there, wherever main is by now."""
    about: Any = begun.get("corpus_files")
    return about.get("commit") if isinstance(about, dict) and about.get("dataset") == settings.source else None


def _run(
    settings: ExtractionSettings,
    corpus: Corpus,
    view: PreTrainedModel,
    reader: Reader,
    writer: StoreWriter,
    progress: bool,
) -> int:
    """Read the chunks that are this process's and not done; the number of chunks in the corpus."""
    started, n_seen, n_tokens, n_chunks = time.monotonic(), 0, 0, 0

    def wanted(chunk: int) -> bool:
        return chunk % settings.processes == settings.process and not writer.is_done(chunk)

    def prepared() -> Iterator[Prepared | None]:
        for chunk, entries in corpus.chunks(settings.corpus, wanted):
            yield None if entries is None else reader.prepare(chunk, entries)

    with ThreadPoolExecutor(2) as pool, _bar(settings.corpus, progress) as bar:
        writing: Future[None] | None = None
        for work in _ahead(pool, prepared()):
            n_chunks += 1
            if work is None:
                continue
            columns = [[span.index for span in document.spans] for document in work.documents]
            vectors = vectors_at(view, work.ids, columns, settings.max_tokens_per_batch)
            if writing is not None:
                writing.result()
            writing = pool.submit(_write, writer, work, vectors)
            n_seen, n_tokens = n_seen + work.counts["seen"], n_tokens + work.n_tokens
            bar.update(work.counts["seen"])
            bar.set_postfix_str(f"{n_tokens / (time.monotonic() - started):.0f} tokens/s")
        if writing is not None:
            writing.result()
    seconds = max(time.monotonic() - started, 1e-9)
    figures = n_seen, n_tokens, seconds, n_seen / seconds, n_tokens / seconds
    log.info("%d documents and %d tokens in %.0f s: %.1f documents/s, %.0f tokens/s.", *figures)
    return n_chunks


def _about(
    settings: ExtractionSettings, corpus: Corpus, view: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """All that the store's content follows from."""
    folder = local_folder(settings.target)
    files = [] if folder is None else [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    adapter_files = [] if settings.adapter is None else sorted(Path(settings.adapter).glob("adapter*"))
    return {
        "target": settings.source,
        "revision": getattr(view.config, "_commit_hash", None) or settings.revision,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "point": settings.point,
        "dtype": str(view.dtype).removeprefix("torch."),
        "d_model": view.config.hidden_size,
        "settings": {
            **asdict(settings.corpus),
            "seed": settings.seed,
            "quantization": settings.quantization,
            "adapter": None if settings.adapter is None else str(Path(settings.adapter)),
        },
        "corpus_files": corpus.about,
        "target_files": describe_files(files),
        "adapter_files": describe_files(adapter_files),
    }


def _check_context(view: PreTrainedModel, settings: CorpusSettings) -> None:
    limit = context_length(view)
    if settings.max_tokens > limit:
        raise ContextLengthError(
            f"documents of up to {settings.max_tokens} tokens",
            f"at most {limit}, the target's context",
            f"set max_tokens of the corpus to {limit}",
        )


def _ahead(pool: ThreadPoolExecutor, items: Iterator[Any]) -> Iterator[Any]:
    """The items, each made by a thread while the one before it is in use."""
    end = object()
    coming = pool.submit(next, items, end)
    while (item := coming.result()) is not end:
        coming = pool.submit(next, items, end)
        yield item


def _write(writer: StoreWriter, work: Prepared, vectors: Tensor) -> None:
    """Write a chunk, each document's rows to its split."""
    sizes = torch.tensor([len(document.spans) for document in work.documents], dtype=torch.int64)
    splits = {}
    for split in ("train", "eval"):
        inside = torch.tensor([name == split for name in work.splits], dtype=torch.bool)
        documents = [document for document, name in zip(work.documents, work.splits, strict=True) if name == split]
        splits[split] = documents, vectors[inside.repeat_interleave(sizes)]
    writer.write(work.chunk, splits, work.counts)


def _bar(settings: CorpusSettings, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=None if settings.mix else settings.n_documents, desc="read", unit=" documents", disable=not shown)
