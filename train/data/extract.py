"""A corpus → a store of the target's activations at a point, in splits that share no document.

While the target runs one chunk, the next is tokenised and the last is written, each by a thread of its own. Memory
follows from the size of a chunk, not of the corpus.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nla.config import tokenizer_hash
from nla.errors import ArgumentError, ContextLengthError
from nla.models.forward import vectors_at
from nla.models.load import load_truncated
from nla.models.points import context_length
from nla.storage.files import read_json
from nla.store.manifest import SETTINGS_FILE, Manifest
from nla.store.writer import StoreWriter
from nla.text.tokens import load_tokenizer
from nla.train.data.corpus import Corpus, CorpusSettings, describe_files, open_corpus
from nla.train.data.documents import Prepared, Reader

log = logging.getLogger(__name__)


def extract_corpus(
    settings: CorpusSettings,
    target: str | Path,
    point: str,
    out_dir: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = "float32",
    device: str | torch.device | None = None,
    quantization: str | None = None,
    adapter: str | Path | None = None,
    max_tokens_per_batch: int = 16_384,
    seed: int = 0,
    process: int = 0,
    processes: int = 1,
    progress: bool = False,
) -> Manifest | None:
    """Read a corpus into the store ``out_dir``; after a kill, the same call continues to the same bytes.

    A ``datasets`` name is read at one commit, also by a call that continues when its main branch has moved on.

    Several processes share the work when each is called with its own ``process`` of ``processes``, on one ``out_dir``:
    the store is, row for row and bit for bit, the one that a single process of as many threads makes.

    Args:
        target: folder or hub id; blocks above the point are never loaded.
        revision, dtype, device, quantization, adapter: see :func:`nla.target.load_truncated`. The manifest holds the
            type that they were read in, also where ``dtype`` is None: the checkpoint's own.
        max_tokens_per_batch: tokens with padding in one forward pass. It may change between a kill and the call that
            continues; activations then differ at rounding error.
        seed: decides the positions, with each document's text.
        progress: show a bar.

    Returns:
        The manifest; None if other processes have not finished their share: the last one writes it.

    Raises:
        CorpusError, StoreError, NonFiniteError, StorageError, PointError: see the functions used.
        ContextLengthError: documents may be longer than the target's context.
        TargetError, AccessError: see :func:`nla.target.load_truncated`.
        ArgumentError: no such process.
    """
    if not 0 <= process < processes:
        raise ArgumentError(f"process {process} of {processes}", "0 ≤ process < processes", "count them from 0")
    corpus = open_corpus(settings, _begun_at(out_dir, settings))
    loading = {"revision": revision, "dtype": dtype, "quantization": quantization, "adapter": adapter}
    folder = Path(target).expanduser()
    source = str(folder) if folder.is_dir() else str(target)
    view = load_truncated(source, point, device=device, **loading)
    tokenizer = load_tokenizer(source, getattr(view.config, "_commit_hash", None) or revision)
    _check_context(view, settings)
    about = _about(settings, corpus, view, tokenizer, source, point, loading, seed)
    writer = StoreWriter(out_dir, about)
    reader = Reader(tokenizer, settings, seed)
    share = Share(process, processes)
    n_chunks = _run(corpus, settings, view, reader, writer, share, max_tokens_per_batch, progress)
    manifest = writer.finish(n_chunks)
    if manifest is not None:
        shown = ", ".join(f"{count} {name}" for name, count in manifest.counts.items())
        log.info("%s is whole: %s; vectors %s.", out_dir, shown, manifest.n)
    return manifest


def _begun_at(out_dir: str | Path, settings: CorpusSettings) -> str | None:
    """The commit of a ``datasets`` name that a store was begun with: it continues there, wherever main is by now."""
    path = Path(out_dir) / SETTINGS_FILE
    about: Any = read_json(path).get("corpus_files") if path.is_file() else None
    return about.get("commit") if isinstance(about, dict) and about.get("dataset") == settings.source else None


class Share(NamedTuple):
    """Which chunks are this process's."""

    process: int
    processes: int


def _run(
    corpus: Corpus,
    settings: CorpusSettings,
    view: Any,
    reader: Reader,
    writer: StoreWriter,
    share: Share,
    max_tokens: int,
    progress: bool,
) -> int:
    """Read the chunks that are this process's and not done; the number of chunks in the corpus."""
    started, n_seen, n_tokens, n_chunks = time.monotonic(), 0, 0, 0

    def wanted(chunk: int) -> bool:
        return chunk % share.processes == share.process and not writer.is_done(chunk)

    def prepared() -> Iterator[Prepared | None]:
        for chunk, entries in corpus.chunks(settings, wanted):
            yield None if entries is None else reader.prepare(chunk, entries)

    with ThreadPoolExecutor(2) as pool, _bar(settings, progress) as bar:
        writing: Future[None] | None = None
        for work in _ahead(pool, prepared()):
            n_chunks += 1
            if work is None:
                continue
            columns = [[span.index for span in document.spans] for document in work.documents]
            vectors = vectors_at(view, work.ids, columns, max_tokens)
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
    settings: CorpusSettings,
    corpus: Corpus,
    view: Any,
    tokenizer: Any,
    target: str,
    point: str,
    loading: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """All that the store's content follows from."""
    folder = Path(target)
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"] if folder.is_dir() else []
    adapter = None if loading["adapter"] is None else Path(loading["adapter"])
    return {
        "target": target,
        "revision": getattr(view.config, "_commit_hash", None) or loading["revision"],
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "point": str(point),
        "dtype": str(view.dtype).removeprefix("torch."),
        "d_model": view.config.hidden_size,
        "settings": {
            **asdict(settings),
            "seed": seed,
            "quantization": loading["quantization"],
            "adapter": None if adapter is None else str(adapter),
        },
        "corpus_files": corpus.about,
        "target_files": describe_files(files),
        "adapter_files": describe_files(sorted(adapter.glob("adapter*"))) if adapter is not None else [],
    }


def _check_context(view: Any, settings: CorpusSettings) -> None:
    limit = context_length(view)
    if settings.max_tokens > limit:
        raise ContextLengthError(
            f"documents of up to {settings.max_tokens} tokens",
            f"at most {limit}, the target's context",
            f"set corpus.max_tokens = {limit}",
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
    owner = torch.repeat_interleave(
        torch.tensor([len(document.spans) for document in work.documents], dtype=torch.int64)
    )
    splits = {}
    for split in ("train", "eval"):
        inside = torch.tensor([each == split for each in work.splits], dtype=torch.bool)
        documents = [document for document, each in zip(work.documents, work.splits, strict=True) if each == split]
        splits[split] = documents, vectors[inside[owner]]
    writer.write(work.chunk, splits, work.counts)


def _bar(settings: CorpusSettings, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=settings.n_documents, desc="read", unit=" documents", disable=not shown)
