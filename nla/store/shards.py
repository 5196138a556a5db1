"""One shard of a store: the rows of one chunk of documents and one split, in a safetensors file that is memory-mapped.

::

    vectors    (n, d)  the target's dtype, raw        number    (k,)     int64: each document's place in the corpus
    span       (n, 5)  int64: id, start, end,         hash      (k, 16)  uint8: BLAKE2b of what was read of it
                       index, added                   text      (bytes,) uint8: UTF-8 of all of them, once each
    document   (n,)    int64: into number, hash, …    text_end  (k,)     int64: where each ends, in bytes
    stratum    (n,)    int64: into the names          words     (bytes,) uint8: JSON with the strata's names
    norm       (n,)    float32: L2 norms              unit_sum  (s, d)   float64: sums of unit vectors, by stratum
                                                      unit_square (s,)   float64: sums of their squared norms
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nla.errors import NonFiniteError, ShapeError, StoreError
from nla.metrics import unit
from nla.storage.hashes import sha256
from nla.storage.tensors import save_tensors
from nla.text.tokens import Span

HASH_BYTES = 16
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
_NAMES = {"vectors", "span", "document", "stratum", "norm", "number", "hash", "text", "text_end", "words"}
_NAMES |= {"unit_sum", "unit_square"}


def text_hash(text: str) -> bytes:
    """What a document is known by in a store: 16 bytes of its text alone."""
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()


def is_held_out(text: str, share: float, key: str) -> bool:
    """Whether a document belongs to the held-out split: decided by its text and the key, so copies fall together.

    Args:
        share: of the documents that are held out, in [0, 1].
    """
    drawn = hashlib.blake2b(text.encode(), digest_size=8, key=hashlib.sha256(key.encode()).digest()).digest()
    return int.from_bytes(drawn, "big") < round(share * 2**64)


class Document(NamedTuple):
    """What is stored of one document."""

    number: int
    """Its place in the corpus, from 0."""

    text: str
    """What the target read of it."""

    spans: Sequence[Span]
    """The tokens whose activations are stored, in order."""

    strata: Sequence[str]
    """Kind of position of each of them."""

    key: str | None = None
    """The text that documents are compared by; None: ``text``."""


class ShardEntry(NamedTuple):
    """A shard as records and manifests list it."""

    file: str
    """Relative to the store's folder."""

    rows: int
    documents: int
    bytes: int
    sha256: str


def write_shard(folder: Path, file: str, documents: Sequence[Document], vectors: Tensor) -> ShardEntry:
    """Write one shard, atomically; equal content gives equal bytes.

    Args:
        vectors: (n, d), of any float type, for all spans of all documents in order.

    Raises:
        NonFiniteError: a vector holds NaN or infinity; the message names its document.
        ShapeError: not one vector for each span.
        StorageError: it could not be written whole.
    """
    counts = [len(document.spans) for document in documents]
    if vectors.ndim != 2 or len(vectors) != sum(counts):
        raise ShapeError(f"vectors {tuple(vectors.shape)}", f"({sum(counts)}, d), one a span", "read the chunk again")
    owner = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(counts))
    _check_finite(vectors, owner, documents)
    kinds = [kind for document in documents for kind in document.strata]
    names = sorted(set(kinds))
    stratum = torch.tensor([names.index(kind) for kind in kinds], dtype=torch.int64)
    texts = [document.text.encode() for document in documents]
    spans = [(span.token_id, span.start, span.end, span.index, span.added) for each in documents for span in each.spans]
    tensors = {
        "vectors": vectors,
        "span": torch.tensor(spans, dtype=torch.int64).reshape(-1, 5),
        "document": owner,
        "stratum": stratum,
        "norm": vectors.float().norm(dim=1),
        "number": torch.tensor([document.number for document in documents], dtype=torch.int64),
        "hash": _bytes(b"".join(text_hash(d.key or d.text) for d in documents)).reshape(-1, HASH_BYTES),
        "text": _bytes(b"".join(texts)),
        "text_end": torch.tensor([len(text) for text in texts], dtype=torch.int64).cumsum(0),
        "words": _bytes(json.dumps({"strata": names}, ensure_ascii=False).encode()),
        **_unit_sums(vectors, stratum, len(names)),
    }
    path = folder / file
    save_tensors(path, tensors)
    return ShardEntry(file, len(vectors), len(documents), path.stat().st_size, sha256(path))


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _unit_sums(vectors: Tensor, stratum: Tensor, n_strata: int) -> dict[str, Tensor]:
    """Sums (s, d) and squares (s,) of the unit vectors of each stratum, taken in pieces: memory stays small."""
    sums = torch.zeros(n_strata, vectors.shape[1], dtype=torch.float64)
    squares = torch.zeros(n_strata, dtype=torch.float64)
    for rows, codes in zip(vectors.split(8192), stratum.split(8192), strict=True):
        units = unit(rows).double()
        sums.index_add_(0, codes, units)
        squares.index_add_(0, codes, units.square().sum(1))
    return {"unit_sum": sums, "unit_square": squares}


def _check_finite(vectors: Tensor, owner: Tensor, documents: Sequence[Document]) -> None:
    fine = torch.isfinite(vectors).all(dim=1)
    if not fine.all():
        first = documents[int(owner[~fine][0])]
        raise NonFiniteError(
            f"NaN or infinity in {int((~fine).sum())} of {len(fine)} vectors, the first of document {first.number} "
            f"({first.text[:60]!r}…)",
            "finite activations",
            "read with --dtype bfloat16 or float32 (float16 overflows on many targets), or leave the document out",
        )


@dataclass
class Shard:
    """An open shard: tensors are views into the mapped file, and only what is touched is read.

    Raises:
        StoreError: the file is missing, half-written, or no shard.
    """

    path: Path

    def __post_init__(self) -> None:
        self._places, self._data = _map(self.path)

    def tensor(self, name: str) -> Tensor:
        """One tensor of the file, without a copy."""
        entry = self._places[name]
        start, end = entry["data_offsets"]
        return self._data[start:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])

    @property
    def vectors(self) -> Tensor:
        """(n, d), as the target gave them."""
        return self.tensor("vectors")

    @cached_property
    def strata(self) -> list[str]:
        """Names of the strata that ``stratum`` counts."""
        return json.loads(bytes(self.tensor("words").tolist()))["strata"]

    @cached_property
    def text_ends(self) -> list[int]:
        """Where each document's text ends, in bytes."""
        return self.tensor("text_end").tolist()

    def text(self, document: int) -> str:
        """The text of one of the shard's documents."""
        start = self.text_ends[document - 1] if document else 0
        return self.tensor("text")[start : self.text_ends[document]].numpy().tobytes().decode()


def _map(path: Path) -> tuple[dict[str, Any], Tensor]:
    """The header of a safetensors file, and its data as one tensor of bytes over the mapped file.

    ``torch.from_file`` maps without keeping the file open: a store of many thousand shards stays below the limit on
    open files.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 2 <= length <= size - 8 else {}
        places = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = [entry["data_offsets"][1] for entry in places.values()]
        if not set(places) >= _NAMES or max(ends) + length + 8 != size:
            raise ValueError("cut, or of another form")
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return places, data[length + 8 :]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise StoreError(
            f"the shard {path}, which is missing, half-written or damaged ({error})",
            "a whole shard of a store",
            "delete it and run the command that made the store again: it reads this chunk again",
        ) from error
