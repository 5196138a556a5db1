"""One shard of a store: the rows of one chunk of documents and one split, in a safetensors file that is memory-mapped.

::

    vectors    (n, d)  the target's dtype, raw        number    (k,)     int64: each document's place in the corpus
    span       (n, 5)  int64: id, start, end,         hash      (k, 16)  uint8: BLAKE2b of what was read of it
                       index, added                   text      (bytes,) uint8: UTF-8 of all of them, once each
    document   (n,)    int64: into number, hash, …    text_end  (k,)     int64: where each ends, in bytes
    stratum    (n,)    int64: into the names          words     (bytes,) uint8: JSON with the strata's names, and
                                                                what is known of each document
    norm       (n,)    float32: L2 norms              unit_sum  (s, d)   float64: sums of unit vectors, by stratum
                                                      unit_square (s,)   float64: sums of their squared norms
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nla.errors import NLAError, NonFiniteError, ShapeError, StoreError
from nla.metrics import unit
from nla.storage.files import parse_json
from nla.storage.hashes import sha256
from nla.storage.schema import shown
from nla.storage.tensors import Entry, read_header, save_tensors
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
_FORM = {
    "vectors": (("F32", "F16", "BF16", "F64"), "n d"),
    "span": (("I64",), "n 5"),
    "document": (("I64",), "n"),
    "stratum": (("I64",), "n"),
    "norm": (("F32",), "n"),
    "number": (("I64",), "k"),
    "hash": (("U8",), f"k {HASH_BYTES}"),
    "text": (("U8",), "bytes"),
    "text_end": (("I64",), "k"),
    "words": (("U8",), "letters"),
    "unit_sum": (("F64",), "s d"),
    "unit_square": (("F64",), "s"),
}
"""Types and axes of a shard's tensors; an axis of one name has one size."""


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

    attributes: Mapping[str, Any] = {}
    """What its corpus says of it, such as its topic: JSON values."""


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
        vectors: (n, d), of any float type, for all spans of all documents in order; see :func:`check_rows`.

    Raises:
        StorageError: it could not be written whole.
        StoreError: its documents' attributes are more than can be read again.
    """
    owner = _owner(documents)
    kinds = [kind for document in documents for kind in document.strata]
    names = sorted(set(kinds))
    stratum = torch.tensor([names.index(kind) for kind in kinds], dtype=torch.int64)
    texts = [document.text.encode() for document in documents]
    words: dict[str, Any] = {"strata": names}
    if any(document.attributes for document in documents):
        words["attributes"] = [dict(document.attributes) for document in documents]
    content = json.dumps(words, ensure_ascii=False, default=str)
    try:
        parse_json(content)
        encoded = content.encode()
    except ValueError as error:
        got = f"attributes of {len(documents)} documents in one shard: {error}"
        raise StoreError(got, "what can be read again", "lower documents_per_chunk, or leave attributes out") from error
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
        "words": _bytes(encoded),
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


def _owner(documents: Sequence[Document]) -> Tensor:
    """For each span of the documents, in order, which of them it is of: (n,) int64."""
    counts = torch.tensor([len(document.spans) for document in documents], dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(documents)), counts)


def check_rows(documents: Sequence[Document], vectors: Tensor) -> None:
    """Refuse what is no content of a shard.

    Raises:
        NonFiniteError: a vector holds NaN or infinity; the message names its document.
        ShapeError: not one vector (d,) for each span.
    """
    owner = _owner(documents)
    if vectors.ndim != 2 or len(vectors) != len(owner):
        raise ShapeError(f"vectors {tuple(vectors.shape)}", f"({len(owner)}, d), one a span", "read the chunk again")
    fine = torch.isfinite(vectors).all(dim=1)
    if not fine.all():
        first = documents[int(owner[~fine][0])]
        raise NonFiniteError(
            f"NaN or infinity in {int((~fine).sum())} of {len(fine)} vectors, the first of document {first.number} "
            f"({first.text[:60]!r}…)",
            "finite activations",
            "read with --dtype bfloat16 or float32 (float16 overflows on many targets), or leave the document out",
        )


class Shard:
    """An open shard: tensors are views into the mapped file, and only what is touched is read.

    Its header is checked when it is opened, and numbers that point elsewhere when their tensor is first asked for.

    Args:
        d_model: width that its vectors must have; None: any.

    Raises:
        StoreError: the file is missing, half-written, or no shard.
    """

    def __init__(self, path: Path, d_model: int | None = None) -> None:
        self.path = path
        self._checked: dict[str, Tensor] = {}
        try:
            self._tensors = read_header(path).tensors
            self._sizes = _sizes(self._tensors, d_model)
            # Maps without keeping the file open: thousands of shards stay below the limit on open files.
            self._data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        except (NLAError, OSError, ValueError, RuntimeError) as error:
            raise self._refused(error.got if isinstance(error, NLAError) else str(error)) from error

    @property
    def n(self) -> int:
        """Number of vectors."""
        return self._sizes["n"]

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return self._sizes["k"]

    def tensor(self, name: str) -> Tensor:
        """One tensor of the file, without a copy.

        Raises:
            StoreError: it points to documents, strata or characters that the shard does not hold.
        """
        if name not in self._checked:
            entry = self._tensors[name]
            data = self._data[entry.start : entry.end]
            kind = DTYPES[entry.dtype]
            tensor = (data if entry.start % kind.itemsize == 0 else data.clone()).view(kind).reshape(entry.shape)
            if not self._is_inside(name, tensor):
                raise self._refused(f"its {name} points outside of it")
            self._checked[name] = tensor
        return self._checked[name]

    def _is_inside(self, name: str, tensor: Tensor) -> bool:
        """Whether what points elsewhere in the shard stays inside of it."""
        if name in ("document", "stratum"):
            n = self.n_documents if name == "document" else self._sizes["s"]
            return bool(((tensor >= 0) & (tensor < n)).all())
        if name == "text_end":
            ordered = bool((tensor.diff() >= 0).all())
            return ordered and (not len(tensor) or (bool(tensor[0] >= 0) and int(tensor[-1]) == self._sizes["bytes"]))
        if name == "span":
            return bool((tensor >= 0).all()) and bool((tensor[:, 1] <= tensor[:, 2]).all())
        return True

    @property
    def vectors(self) -> Tensor:
        """(n, d), as the target gave them."""
        return self.tensor("vectors")

    def rows(self, inside: Tensor) -> Float[Tensor, "k d"]:
        """Some vectors, in float32.

        Raises:
            NonFiniteError: one of them is NaN or infinite.
        """
        vectors = self.vectors[inside].float()
        if not vectors.isfinite().all():
            fix = "restore the file from where the store came, or run the command that made it again"
            raise NonFiniteError(f"NaN or infinity in the vectors of {self.path}", "finite vectors", fix)
        return vectors

    @cached_property
    def _words(self) -> dict[str, Any]:
        try:
            words = parse_json(self.tensor("words").numpy().tobytes().decode())
        except ValueError as error:
            raise self._refused(str(error)) from error
        if not isinstance(words, dict):
            raise self._refused("words that are no mapping")
        return words

    @cached_property
    def attributes(self) -> list[dict[str, Any]]:
        """What the corpus says of each document; empty where it says nothing."""
        known = self._words.get("attributes", [{}] * self.n_documents)
        if not isinstance(known, list) or len(known) != self.n_documents:
            raise self._refused("attributes of other documents")
        if not all(isinstance(one, dict) for one in known):
            raise self._refused("attributes that are no mappings")
        return known

    @cached_property
    def strata(self) -> list[str]:
        """Names of the strata that ``stratum`` counts."""
        try:
            names = self._words["strata"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("names of strata that are no texts")
            if len(names) != self._sizes["s"]:
                raise ValueError(f"{len(names)} names for {self._sizes['s']} strata")
        except (ValueError, KeyError, TypeError) as error:
            raise self._refused(str(error)) from error
        return names

    @cached_property
    def text_ends(self) -> list[int]:
        """Where each document's text ends, in bytes."""
        return self.tensor("text_end").tolist()

    def text(self, document: int) -> str:
        """The text of one of the shard's documents."""
        start = self.text_ends[document - 1] if document else 0
        try:
            return self.tensor("text")[start : self.text_ends[document]].numpy().tobytes().decode()
        except UnicodeDecodeError as error:
            raise self._refused(str(error)) from error

    def _refused(self, what: str) -> StoreError:
        return StoreError(
            f"the shard {self.path}, which is missing, half-written or damaged ({what})",
            "a whole shard of a store",
            "delete it and run the command that made the store again: it reads this chunk again",
        )


def _sizes(tensors: Mapping[str, Entry], d_model: int | None) -> dict[str, int]:
    """How many vectors (n), documents (k), strata (s), bytes and dimensions (d) a shard has, if its header is one's.

    Raises:
        ValueError: it is none's.
    """
    if set(tensors) != set(_FORM):
        raise ValueError(f"the tensors {shown(sorted(tensors))}")
    sizes: dict[str, int] = {} if d_model is None else {"d": d_model}
    for name, (dtypes, axes) in _FORM.items():
        entry, names = tensors[name], axes.split()
        known = zip(names, entry.shape, strict=False)
        shape = tuple(int(axis) if axis.isdigit() else sizes.setdefault(axis, size) for axis, size in known)
        if entry.dtype not in dtypes or len(names) != len(entry.shape) or shape != entry.shape:
            raise ValueError(f"{name} of {entry.dtype} {entry.shape}, where {' or '.join(dtypes)} ({axes}) belongs")
    return sizes
