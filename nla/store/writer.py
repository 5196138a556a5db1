"""Writing a store chunk by chunk: what is finished stays finished, and equal work gives equal bytes.

A chunk of documents is written as one shard a split, then a record; a process that is killed leaves its unfinished
chunk without a record, and the same command writes that chunk again. When every chunk has its record, whichever
process comes last writes baselines and manifest.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla.baselines import BASELINES_FILE, GLOBAL, save_baselines
from nla.errors import BaselineError, StorageError, StoreError
from nla.metrics import Baseline
from nla.storage.files import read_json, try_folder, write_json
from nla.storage.hashes import sha256
from nla.storage.schema import shown
from nla.store.manifest import MANIFEST_FILE, SETTINGS_FILE, STORE_VERSION, Manifest, Record
from nla.store.reader import CHUNKS_FOLDER, SPLITS
from nla.store.shards import Document, Shard, ShardEntry, check_rows, write_shard

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
ABOUT = ("target", "revision", "tokenizer_hash", "point", "dtype", "d_model", "settings")
"""What every store says of where it comes from; ``about`` may hold more."""
_MOST_NORMS = 1 << 24


class StoreWriter:
    """A store that is being made.

    Args:
        folder: of this store alone.
        about: what the store's content follows from (target, point, settings …): JSON values; ``target``,
            ``revision``, ``tokenizer_hash``, ``point``, ``dtype``, ``d_model`` and ``settings`` stand in the manifest.

    Raises:
        StoreError: the folder holds a store of other settings.
        StorageError: it cannot be written.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = Path(folder), dict(about)
        try_folder(self.folder)
        self._refuse_other()

    def _refuse_other(self) -> None:
        if (self.folder / SETTINGS_FILE).exists():
            _refuse_other(self.folder, read_json(self.folder / SETTINGS_FILE), self.about)

    def is_done(self, chunk: int) -> bool:
        """Whether a chunk is recorded, and its shards have their size."""
        path = self._record(chunk)
        if not path.exists():
            return False
        return all(_size(self.folder / entry.file) == entry.bytes for entry in Record.load(path).shards.values())

    def write(
        self,
        chunk: int,
        splits: Mapping[str, tuple[Sequence[Document], Tensor]],
        counts: Mapping[str, int],
    ) -> None:
        """Write a chunk's documents and vectors (n, d) of each split, then its record.

        With the first one the folder becomes a store of these settings: work that fails before leaves none.

        Args:
            counts: of the chunk's documents, by any names; the manifest holds their sums.

        Raises:
            NonFiniteError, ShapeError, StorageError: see :func:`nla.store.shards.write_shard`.
            StoreError: another process has begun a store of other settings here.
        """
        for documents, vectors in splits.values():
            check_rows(documents, vectors)
        with self._alone():
            self._refuse_other()
            if not (self.folder / SETTINGS_FILE).exists():
                write_json(self.folder / SETTINGS_FILE, self.about)
        entries = {}
        for split, (documents, vectors) in splits.items():
            if documents:
                entries[split] = write_shard(self.folder, f"{split}/{chunk:06d}.safetensors", documents, vectors)
        write_json(self._record(chunk), Record(chunk=chunk, counts=dict(counts), shards=entries).to_json())

    def finish(self, n_chunks: int) -> Manifest | None:
        """The manifest, once all chunks have their record; None while other processes are at work.

        Raises:
            StoreError: a split has no documents.
            BaselineError: the training vectors have no variance.
        """
        if not all(self.is_done(chunk) for chunk in range(n_chunks)):
            return None
        with self._alone():
            for folder in (".", CHUNKS_FOLDER, *SPLITS):  # nothing is being written now: what is half-written is left
                for left in (self.folder / folder).glob(".*tmp*"):  # ours, and safetensors' own
                    left.unlink(missing_ok=True)
            return self._finish(n_chunks)

    def _finish(self, n_chunks: int) -> Manifest:
        records = [Record.load(self._record(chunk)) for chunk in range(n_chunks)]
        counts: dict[str, int] = {}
        for record in records:
            for name, count in record.counts.items():
                counts[name] = counts.get(name, 0) + count
        shards = {split: [r.shards[split] for r in records if split in r.shards] for split in SPLITS}
        _refuse_empty(self.folder, shards, counts)
        baselines = self._baselines(shards["train"])
        manifest = Manifest(
            **{name: self.about[name] for name in ABOUT},
            counts=counts | {"duplicates": self._n_duplicates(shards)},
            n={split: sum(entry.rows for entry in entries) for split, entries in shards.items()},
            n_documents={split: sum(entry.documents for entry in entries) for split, entries in shards.items()},
            norms=self._norms(shards["train"]),
            variance={name: baseline.variance for name, baseline in baselines.items()},
            mean_norm={name: float(baseline.mean.norm()) for name, baseline in baselines.items()},
            baselines_sha256=sha256(self.folder / BASELINES_FILE),
            shards=shards,
            version=STORE_VERSION,
        )
        write_json(self.folder / MANIFEST_FILE, manifest.to_json())
        return manifest

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one process at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _record(self, chunk: int) -> Path:
        return self.folder / CHUNKS_FOLDER / f"{chunk:06d}.json"

    def _open(self, entries: Sequence[ShardEntry]) -> Iterator[Shard]:
        return (Shard(self.folder / entry.file, self.about["d_model"]) for entry in entries)

    def _baselines(self, entries: Sequence[ShardEntry]) -> dict[str, Baseline]:
        """Mean and variance of the unit vectors u, from the shards' sums: E‖u − μ‖² = E‖u‖² − ‖μ‖²."""
        sums: dict[str, Tensor] = {}
        squares, n = Counter[str](), Counter[str]()
        for shard in self._open(entries):
            rows = torch.bincount(shard.tensor("stratum"), minlength=len(shard.strata)).tolist()
            parts = zip(shard.strata, rows, shard.tensor("unit_sum"), shard.tensor("unit_square").tolist(), strict=True)
            for name, count, total, square in parts:
                for key in {name, GLOBAL}:
                    n[key] += count
                    squares[key] += square
                    sums[key] = sums[key] + total if key in sums else total.clone()
        kept = [name for name in sorted(sums) if n[name] > 1 and (name == GLOBAL or len(sums) > 2)]
        baselines = {}
        for name in kept:
            mean = sums[name] / n[name]
            variance = max(squares[name] / n[name] - float(mean.square().sum()), 0.0)
            baselines[name] = Baseline(mean.float(), variance, n[name])
        if GLOBAL not in baselines:
            raise BaselineError(f"{n[GLOBAL]} training vectors", "at least 2", "read more documents or positions")
        baselines[GLOBAL].check()
        save_baselines(self.folder / BASELINES_FILE, baselines)
        return baselines

    def _norms(self, entries: Sequence[ShardEntry]) -> dict[str, float]:
        """Mean and quantiles of the norms of the training vectors (quantiles of an even sample where they are many)."""
        n = sum(entry.rows for entry in entries)
        step = -(-n // _MOST_NORMS)
        total, kept = 0.0, []
        for shard in self._open(entries):
            norm = shard.tensor("norm")
            total += float(norm.double().sum())
            kept.append(norm[::step].clone())
        ordered = torch.cat(kept).sort().values
        places = {q: ordered[round(q * (len(ordered) - 1))] for q in QUANTILES}
        return {"mean": total / n} | {f"q{q:g}": float(value) for q, value in places.items()}

    def _n_duplicates(self, shards: Mapping[str, Sequence[ShardEntry]]) -> int:
        """Documents of the corpus whose text stands in the store already."""
        # Copied, so that each file is mapped only while it is read: a process may map 65,530 at once.
        columns = [
            (shard.tensor("hash").clone(), shard.tensor("number").clone())
            for entries in shards.values()
            for shard in self._open(entries)
        ]
        hashes, numbers = (torch.cat(column) for column in zip(*columns, strict=True))
        hashes = hashes.view(torch.int64)
        return len(torch.unique(numbers)) - len(torch.unique(hashes, dim=0))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1
    except OSError as error:
        raise StorageError(f"{path}, which cannot be read ({error})", "a readable file", "check the disk") from error


def _refuse_other(folder: Path, begun: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to add to a store that was begun with other settings."""
    flat_begun, flat_wanted = _flat(begun), _flat(wanted)
    other = [k for k in sorted({*flat_begun, *flat_wanted}) if flat_begun.get(k) != flat_wanted.get(k)]
    if other:
        both = [f"{k}: {shown(flat_begun.get(k))} there, {shown(flat_wanted.get(k))} now" for k in other[:4]]
        raise StoreError(
            f"{folder}, which holds a store of other settings ({'; '.join(both)})",
            "the settings that it was begun with, or an empty folder",
            "choose another folder, or delete this one to read again",
        )


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in content.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def _refuse_empty(folder: Path, shards: Mapping[str, Sequence[ShardEntry]], counts: Mapping[str, int]) -> None:
    empty = [split for split in SPLITS if not shards[split]]
    if empty:
        raise StoreError(
            f"no documents in the split {' and '.join(empty)} of {folder} ({_shown(counts)})",
            "documents with positions to read in train and eval",
            "give more documents (of a .txt file each line is one with kind = lines), lower first_position, or raise "
            "eval_fraction",
        )


def _shown(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "the corpus is empty"
