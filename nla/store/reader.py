"""A store: activations of a corpus on disk, sharded and memory-mapped, with the documents that they come from.

::

    manifest.json           what was read from where, counts, norms, and every shard's size and SHA-256; written last
    baselines.safetensors   mean and variance of the unit-normalised training vectors
    train/000000.safetensors …   one file a chunk of documents (nla/store/shards.py)
    eval/000000.safetensors …
    chunks/000000.json …    what is finished; store.json: what the store is being made of (nla/store/writer.py)
"""

from __future__ import annotations

import hashlib
import json
import typing
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nla.baselines import BASELINES_FILE, load_baselines
from nla.config import tokenizer_hash
from nla.errors import ArgumentError, ShapeError, StoreError, TokenizerMismatchError, visible
from nla.metrics import Baseline
from nla.models.read import Activations
from nla.storage.hashes import sha256
from nla.storage.schema import shown
from nla.store.manifest import MANIFEST_FILE as MANIFEST_FILE
from nla.store.manifest import Manifest as Manifest
from nla.store.shards import HASH_BYTES, Shard
from nla.text.tokens import Span

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "eval")
CHUNKS_FOLDER = "chunks"
_MOST_OPEN = 512
"""Shards that stay mapped; opening one again is cheap."""


class Rows:
    """The vectors of a split, (n, d), indexed like a tensor; a row is read from disk when it is asked for.

    Raises:
        IndexError: a row outside the split.
        StoreError, NonFiniteError: a shard is damaged, or holds NaN or infinity.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def __len__(self) -> int:
        return len(self._store)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return len(self), self._store.d_model

    @property
    def dtype(self) -> torch.dtype:
        """What indexing gives; on disk the vectors have the target's own, ``store.manifest.dtype``."""
        return torch.float32

    @property
    def identity(self) -> str:
        """A hash that stands for their content."""
        return self._store.identity

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> Tensor:
        """Rows as float32 on the CPU: (k, d); of a single int, (d,)."""
        rows = self._store.rows(index)
        out = torch.empty(len(rows), self._store.d_model)
        for shard, places, inside in self._store.by_shard(rows):
            out[places] = shard.rows(inside)
        return out[0] if isinstance(index, int) else out


class Store:
    """One split of a store. Only what is asked for is read; nothing is copied whole.

    Use :meth:`open`, or :func:`open_splits` for several splits that must not share a document.
    """

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        self.folder, self.split, self.manifest = folder, split, manifest
        self.d_model = manifest.d_model
        self.entries = manifest.shards[split]
        self._starts = [0, *accumulate(entry.rows for entry in self.entries)]
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self.vectors = Rows(self)

    @classmethod
    def open(cls, folder: str | Path, split: str = "train") -> Store:
        """Open a split of a finished store.

        Raises:
            StoreError: no finished store, no such split, or a shard that is missing or half-written.
        """
        folder, manifest = Path(folder), Manifest.load(folder)
        if split not in manifest.shards:
            known = ", ".join(map(visible, manifest.shards))
            raise StoreError(f"the split {shown(split)} of {folder}", f"one of {known}", "correct the split")
        for entry in manifest.shards[split]:
            path = folder / entry.file
            size = path.stat().st_size if path.is_file() else None
            if size != entry.bytes:
                raise StoreError(
                    f"the shard {path} " + ("missing" if size is None else f"of {size} bytes"),
                    f"{entry.bytes} bytes, as the manifest says",
                    "run the command that made the store again: it reads this chunk again",
                )
        return cls(folder, split, manifest)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the files itself.
        return {**self.__dict__, "_shards": OrderedDict()}

    def rows(self, index: int | slice | Tensor | Sequence[int] | None) -> Tensor:
        """What an index means, as row numbers (k,) int64; None: all rows.

        Raises:
            IndexError: outside the split.
            ShapeError: a mask of another length.
        """
        n = len(self)
        if index is None or isinstance(index, slice):
            return torch.arange(n) if index is None else torch.arange(n)[index].contiguous()
        rows = torch.as_tensor(index)
        if rows.dtype == torch.bool:
            if rows.shape != (n,):
                raise ShapeError(f"a mask of shape {tuple(rows.shape)}", f"({n},)", "make a mask of the split's rows")
            return rows.nonzero().flatten()
        rows = rows.reshape(-1).long().cpu()
        if len(rows) and not (-n <= int(rows.min()) and int(rows.max()) < n):
            raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of a split of {n}")
        return torch.where(rows < 0, rows + n, rows)

    def by_shard(self, rows: Tensor) -> typing.Iterator[tuple[Shard, Tensor, Tensor]]:
        """For each shard that holds some of ``rows``: the shard, where they stand in ``rows``, and in the shard."""
        owner = torch.bucketize(rows, torch.tensor(self._starts), right=True) - 1
        for number, places in _grouped(owner):
            yield self._shard(number), places, rows[places] - self._starts[number]

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            entry = self.entries[number]
            shard = Shard(self.folder / entry.file, self.d_model)
            if (shard.n, shard.n_documents) != (entry.rows, entry.documents):
                raise StoreError(
                    f"{shard.path} of {shard.n} vectors and {shard.n_documents} documents",
                    f"{entry.rows} and {entry.documents}, as the manifest says",
                    "run the command that made the store again: it reads this chunk again",
                )
            self._shards[number] = shard
            if len(self._shards) > _MOST_OPEN:
                self._shards.popitem(last=False)
        self._shards.move_to_end(number)
        return self._shards[number]

    def activations(self, rows: int | slice | Tensor | Sequence[int] | None = None) -> Activations:
        """Rows in memory, with their tokens and the texts that they belong to; ``document`` indexes these texts."""
        chosen = self.rows(rows)
        spans: list[Any] = [None] * len(chosen)
        owner, texts = torch.empty(len(chosen), dtype=torch.int64), []
        for shard, places, inside in self.by_shard(chosen):
            documents = shard.tensor("document")[inside]
            fields = shard.tensor("span")[inside].tolist()
            for document, members in _grouped(documents):
                text = shard.text(document)
                for at in members.tolist():
                    token, start, end, index, added = fields[at]
                    row = int(places[at])
                    spans[row] = Span(token, text[start:end], start, end, index, bool(added))
                    owner[row] = len(texts)
                texts.append(text)
        return Activations(self.vectors[chosen], spans, owner, texts, self.manifest.point, self.strata(chosen))

    def prefixes(self, rows: int | slice | Tensor | Sequence[int] | None = None) -> list[str]:
        """For each row, the text that can be seen at its token: the document up to and including it."""
        chosen = self.rows(rows)
        out = [""] * len(chosen)
        for shard, places, inside in self.by_shard(chosen):
            documents, ends = shard.tensor("document")[inside].tolist(), shard.tensor("span")[inside, 2].tolist()
            texts = {document: shard.text(document) for document in set(documents)}
            for row, document, end in zip(places.tolist(), documents, ends, strict=True):
                out[row] = texts[document][:end]
        return out

    def strata(self, rows: int | slice | Tensor | Sequence[int] | None = None) -> list[str]:
        """For each row, its kind of position."""
        chosen = self.rows(rows)
        out = [""] * len(chosen)
        for shard, places, inside in self.by_shard(chosen):
            for row, code in zip(places.tolist(), shard.tensor("stratum")[inside].tolist(), strict=True):
                out[row] = shard.strata[code]
        return out

    def documents(self, rows: int | slice | Tensor | Sequence[int] | None = None) -> Tensor:
        """For each row, its document's place in the corpus, (k,) int64: the clusters of intervals."""
        chosen = self.rows(rows)
        out = torch.empty(len(chosen), dtype=torch.int64)
        for shard, places, inside in self.by_shard(chosen):
            out[places] = shard.tensor("number")[shard.tensor("document")[inside]]
        return out

    def attributes(self, rows: int | slice | Tensor | Sequence[int] | None = None) -> list[dict[str, Any]]:
        """For each row, what the corpus says of its document, such as its topic; empty where it says nothing."""
        chosen = self.rows(rows)
        out: list[dict[str, Any]] = [{} for _ in chosen]
        for shard, places, inside in self.by_shard(chosen):
            for row, document in zip(places.tolist(), shard.tensor("document")[inside].tolist(), strict=True):
                out[row] = shard.attributes[document]
        return out

    def token_indexes(self, rows: int | slice | Tensor | Sequence[int] | None = None) -> Tensor:
        """For each row, its token's place in the document, special tokens counted, (k,) int64."""
        chosen = self.rows(rows)
        out = torch.empty(len(chosen), dtype=torch.int64)
        for shard, places, inside in self.by_shard(chosen):
            out[places] = shard.tensor("span")[inside, 3]
        return out

    def text_hashes(self) -> Tensor:
        """The hash of every document of the split, (k, 16) uint8."""
        hashes = [self._shard(number).tensor("hash").clone() for number in range(len(self.entries))]
        return torch.cat(hashes) if hashes else torch.empty(0, HASH_BYTES, dtype=torch.uint8)

    @cached_property
    def baselines(self) -> dict[str, Baseline]:
        """Mean and variance of the unit-normalised training vectors: "global", and each stratum where several are.

        Raises:
            WeightsError: the file is damaged.
        """
        return load_baselines(self.folder / BASELINES_FILE, self.d_model)

    @cached_property
    def identity(self) -> str:
        """A hash that stands for the split's content, through the hashes of its shards; no vector is read."""
        content = json.dumps([self.split, self.manifest.to_json()], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def verify(self) -> None:
        """Read every byte of the split and compare it with the manifest: about a second for each GB.

        Raises:
            StoreError: a shard is not the one that was written.
        """
        files = {entry.file: entry.sha256 for entry in self.entries} | {BASELINES_FILE: self.manifest.baselines_sha256}
        for file, expected in files.items():
            if sha256(self.folder / file) != expected:
                raise StoreError(
                    f"{self.folder / file}, whose content is not the one that was written",
                    f"SHA-256 {expected[:16]}…",
                    "restore the file from where the store came; or delete it and run the command that made it again",
                )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse another tokenizer than the one that the corpus was read with.

        Raises:
            TokenizerMismatchError: it differs.
        """
        digest = tokenizer_hash(tokenizer)
        if digest != self.manifest.tokenizer_hash:
            raise TokenizerMismatchError(
                f"a tokenizer with {digest}",
                f"{self.manifest.tokenizer_hash}, the tokenizer of {self.manifest.target} that made {self.folder}",
                "use the store with the target that it was read from, or read the corpus again",
            )

    def dataset(self) -> Dataset:
        """The split as a ``datasets.Dataset`` of row, vector (d,), prefix, stratum and document.

        Each is read when it is asked for. Shuffle, select and data loaders work as on any other dataset.
        """
        from datasets import Dataset

        def gather(batch: Mapping[str, Any]) -> dict[str, Any]:
            rows = [int(row) for row in batch["row"]]
            return {
                "row": rows,
                "vector": self.vectors[rows],
                "prefix": self.prefixes(rows),
                "stratum": self.strata(rows),
                "document": self.documents(rows).tolist(),
            }

        return Dataset.from_dict({"row": torch.arange(len(self)).numpy()}).with_transform(gather)


def _grouped(values: Tensor) -> typing.Iterator[tuple[int, Tensor]]:
    """Each value of (n,) int64 in order, and the places where it stands; the time is that of one sort."""
    ordered, places = values.sort(stable=True)
    numbers, counts = torch.unique_consecutive(ordered, return_counts=True)
    yield from zip(numbers.tolist(), places.split(counts.tolist()), strict=True)


def open_splits(folder: str | Path, splits: str | Sequence[str] = SPLITS) -> dict[str, Store]:
    """Open several splits of a store, which must not share a document.

    Raises:
        StoreError: see :meth:`Store.open`; or two splits hold the same text.
        ArgumentError: a split is named twice.
    """
    splits = [splits] if isinstance(splits, str) else splits
    if len(set(splits)) != len(splits):
        raise ArgumentError(f"the splits {', '.join(splits)}", "each split once", "name it once")
    stores = {split: Store.open(folder, split) for split in splits}
    seen: list[tuple[str, Tensor]] = []
    for split, store in stores.items():
        hashes = torch.unique(store.text_hashes().view(torch.int64), dim=0)
        for other, before in seen:
            n_shared = len(hashes) + len(before) - len(torch.unique(torch.cat([hashes, before]), dim=0))
            if n_shared:
                raise StoreError(
                    f"{n_shared} documents that stand in {other} as well as in {split} of {folder}",
                    "splits that share no text",
                    "read the corpus again: the split follows from the text; where a column `split` says it, give "
                    "equal texts one split",
                )
        seen.append((split, hashes))
    return stores
