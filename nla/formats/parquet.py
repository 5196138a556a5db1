"""The reference's data sets: a parquet of activations with ``<file>.nla_meta.yaml`` beside it, from and to a store.

A row is ``n_raw_tokens`` (tokens up to and including the one read), ``detokenized_text_truncated`` (the text up to it),
``activation_vector`` (raw, a list of fixed size), ``activation_layer`` (K, the point ``resid_post.K``) and ``doc_id``.
The text after the last token read is not there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nla.baselines import UNKNOWN_STRATUM
from nla.config import tokenizer_hash
from nla.errors import (
    ArgumentError,
    CorpusError,
    ShapeError,
    SidecarError,
    StorageError,
    TokenizerMismatchError,
)
from nla.formats.kitft_sidecar import FIX, get, maybe, read_meta
from nla.models.points import Point
from nla.storage.files import open_regular, replacing, write_atomic
from nla.storage.hub import place_of
from nla.storage.schema import shown
from nla.store.reader import SPLITS, Manifest, Store
from nla.store.shards import Document, is_held_out
from nla.store.writer import StoreWriter
from nla.text.tokens import Span

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

SIDECAR_SUFFIX = ".nla_meta.yaml"
TEXT, VECTOR, LENGTH, LAYER, DOCUMENT = (
    "detokenized_text_truncated",
    "activation_vector",
    "n_raw_tokens",
    "activation_layer",
    "doc_id",
)
COLUMNS = (LENGTH, TEXT, VECTOR, LAYER, DOCUMENT)
OPENING = 48
"""Characters by which imported documents are compared, after those that all begin with: what is drawn of two copies
differs, how they begin does not."""
ROWS_PER_CHUNK = 4096
_EXTRACTION = {"base_model": str, "d_model": int, "layer_index": int, "norm": str}


class _Row(NamedTuple):
    document: str
    text: str
    length: int
    vector: Tensor


def sidecar_path(path: str | Path) -> Path:
    """Where the sidecar of a parquet file lies."""
    return Path(f"{path}{SIDECAR_SUFFIX}")


def read_sidecar(path: str | Path) -> dict[str, Any]:
    """The sidecar of a parquet file, checked for what an import needs; further keys are kept.

    Raises:
        SidecarError: it is missing, not YAML, of another kind or schema, lacks a key, or its vectors are not raw.
    """
    sidecar = sidecar_path(path)
    meta = read_meta(sidecar, "nla_dataset")
    for kind, *keys in ((int, "row_count"), *((kind, "extraction", key) for key, kind in _EXTRACTION.items())):
        value = get(meta, sidecar, kind, *keys)
        if kind is int and not 0 <= value < 2**31:
            raise SidecarError(f"{sidecar} with {'.'.join(keys)} = {shown(value)}", "a number that can be", FIX)
    for keys in (("tokenizer_hash",), ("revision",), ("extraction", "corpus")):
        maybe(meta, sidecar, str, *keys)
    if meta["extraction"]["norm"] != "none":
        got = f"{sidecar} with extraction.norm = {shown(meta['extraction']['norm'])}"
        raise SidecarError(got, "raw vectors: norm 'none'", "extract them again: their norms are lost")
    return meta


def import_parquet(
    path: str | Path,
    out_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eval_fraction: float = 0.05,
    split_key: str = "nla",
) -> Manifest:
    """A store from a data set of the reference. It has no splits of its own; documents that begin alike stay together.

    Alike are documents whose first 48 characters are the same, counted from where the first two documents of the file
    part: what all begin with tells none apart. A document that ends before that stands for itself. If a few ways to
    begin are left, such as two system prompts, the splits are as coarse as they are, or one is empty, which is refused.

    Args:
        tokenizer: the base model's: tokens are not in the file, so each text is tokenised again. The manifest counts
            as ``retokenised`` the rows whose text gives another number of tokens than the file says.

    Raises:
        SidecarError: see :func:`read_sidecar`; or it belongs to another file.
        CorpusError: the file cannot be read or lacks a column.
        ShapeError: a vector has another width than the sidecar says.
        NonFiniteError: a vector holds NaN or infinity, or is missing.
        TokenizerMismatchError: it is not the base model's tokenizer.
        StoreError, StorageError: see :class:`nla.store.writer.StoreWriter`.
    """
    if not 0 < eval_fraction < 1:
        raise ArgumentError(f"eval_fraction={eval_fraction}", "between 0 and 1", "choose the share to hold out")
    path, sidecar = Path(path), read_sidecar(path)
    _check_tokenizer(sidecar, tokenizer, path)
    extraction = sidecar["extraction"]
    openings = _openings(path, sidecar)
    groups = _groups(path, sidecar)
    first = next(groups, None)
    writer = StoreWriter(
        out_dir,
        {
            "target": str(extraction["base_model"]),
            "revision": sidecar.get("revision"),
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "point": str(Point("resid_post", extraction["layer_index"])),
            "dtype": "float32",
            "d_model": extraction["d_model"],
            "settings": {"eval_fraction": eval_fraction, "split_key": split_key, "sidecar": sidecar},
            "corpus_files": [[path.name, path.stat().st_size]],
        },
    )
    numbers: dict[str, int] = {}
    chunk = 0
    while first is not None:
        documents, vectors, n_other = _documents(first, numbers, openings, tokenizer)
        if chunk == 0 and n_other > len(vectors) / 2:
            raise TokenizerMismatchError(
                f"a tokenizer that gives {n_other} of the first {len(vectors)} texts of {path} other numbers of tokens",
                f"the tokenizer of {extraction['base_model']}, which the file was made with",
                "load that model's tokenizer",
            )
        counts = {"read": len({document.number for document in documents}), "retokenised": n_other}
        writer.write(chunk, _split(documents, vectors, eval_fraction, split_key), counts)
        first, chunk = next(groups, None), chunk + 1
    manifest = writer.finish(chunk)
    if manifest is None:
        raise StorageError(f"chunks missing from {out_dir}", f"{chunk}, all just written", "check the disk")
    return manifest


def _check_tokenizer(sidecar: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    known = sidecar.get("tokenizer_hash")
    if known is not None and known != tokenizer_hash(tokenizer):
        raise TokenizerMismatchError(
            f"a tokenizer with {tokenizer_hash(tokenizer)}",
            f"{known}, which {path} was made with",
            f"load the tokenizer of {sidecar['extraction']['base_model']}",
        )


def _split(
    documents: Sequence[Document], vectors: Tensor, share: float, key: str
) -> dict[str, tuple[list[Document], Tensor]]:
    held_out = [is_held_out(document.key or document.text, share, key) for document in documents]
    owner = torch.repeat_interleave(torch.tensor([len(document.spans) for document in documents]))
    out = {}
    for split in SPLITS:
        inside = [held == (split == "eval") for held in held_out]
        chosen = [document for document, is_inside in zip(documents, inside, strict=True) if is_inside]
        out[split] = chosen, vectors[torch.tensor(inside)[owner]]
    return out


def _groups(path: Path, sidecar: Mapping[str, Any]) -> Iterator[list[_Row]]:
    """Rows of the file in chunks; a document whose rows follow each other is not torn apart."""
    waiting: list[_Row] = []
    for batch in _batches(path, sidecar, COLUMNS):
        waiting += _rows(batch, sidecar["extraction"], path)
        last = _last_start(waiting)
        if last:
            yield waiting[:last]
            waiting = waiting[last:]
    if waiting:
        yield waiting


def _batches(path: Path, sidecar: Mapping[str, Any], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of the file, a chunk of rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_regular(path) as file, pq.ParquetFile(file) as table:
            _check_table(table, sidecar, path)
            for batch in table.iter_batches(batch_size=ROWS_PER_CHUNK, columns=list(columns)):
                batch.validate(full=True)
                if any(column.null_count for column in batch.columns):
                    raise CorpusError(
                        f"{path} with rows that lack a value", "all columns in each", "extract them again"
                    )
                yield batch
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path}, which cannot be read ({error})", "a whole parquet file", "restore it") from error


def _openings(path: Path, sidecar: Mapping[str, Any]) -> dict[str, str]:
    """What each document is compared by: its longest row up to ``OPENING`` characters after where documents part.

    The file is gone through before any row is stored: rows of a document may stand far apart, and each must land in
    the same split.
    """

    def rows() -> Iterator[tuple[str, str]]:
        for batch in _batches(path, sidecar, (DOCUMENT, TEXT)):
            yield from zip(*(batch.column(name).to_pylist() for name in (DOCUMENT, TEXT)), strict=True)

    shared, parted = "", False
    for _, text in rows():
        text = text.rstrip("\ufffd")  # of a row that ends within a character
        n = len(os.path.commonprefix([shared, text]))  # noqa: RUF071 (texts, not paths)
        if n < min(len(shared), len(text)):
            shared, parted = shared[:n], True
        elif len(text) > len(shared) and not parted:  # no row has said yet that documents part before its end
            shared = text
    length, longest = len(shared) + OPENING, dict[str, str]()
    for document, text in rows():
        if len(text[:length]) >= len(longest.get(document, "")):
            longest[document] = text[:length]
    return longest


def _last_start(rows: Sequence[_Row]) -> int:
    """Where the rows of the last document begin."""
    borders = (n for n in range(len(rows) - 1, 0, -1) if rows[n].document != rows[n - 1].document)
    return next(borders, 0)


def _check_table(table: pq.ParquetFile, sidecar: Mapping[str, Any], path: Path) -> None:
    """Refuse a file whose columns are not those of a data set, or whose rows are not those of its sidecar."""
    from pyarrow import types

    def is_vector(kind: pa.DataType) -> bool:
        lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        return lists and types.is_floating(kind.value_type)

    def is_text(kind: pa.DataType) -> bool:
        return types.is_string(kind) or types.is_large_string(kind)

    checks = {LENGTH: types.is_integer, TEXT: is_text, VECTOR: is_vector, LAYER: types.is_integer, DOCUMENT: is_text}
    schema = table.schema_arrow
    wrong = [n for n, fits in checks.items() if schema.names.count(n) != 1 or not fits(schema.field(n).type)]
    if wrong:
        raise CorpusError(
            f"{path} with the columns {shown({field.name: str(field.type) for field in schema})}",
            f"also {', '.join(wrong)}, each once and of the reference's type",
            "give a file that the reference's extraction wrote (base.parquet, or a split of it)",
        )
    if table.metadata.num_rows != sidecar["row_count"]:
        raise SidecarError(
            f"{path} of {table.metadata.num_rows} rows",
            f"{sidecar['row_count']}, as its sidecar says",
            "take the sidecar that was made with this very file",
        )


def _rows(batch: pa.RecordBatch, extraction: Mapping[str, Any], path: Path) -> list[_Row]:
    width, column = extraction["d_model"], batch.column(VECTOR)
    flat = torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).copy()).float()
    if len(flat) != len(column) * width or set(column.value_lengths().unique().to_pylist()) - {width}:
        got = f"vectors of width {sorted(set(column.value_lengths().to_pylist()))} in {path}"
        raise ShapeError(got, f"{width}, as its sidecar says", "take the sidecar that was made with this very file")
    layers = set(batch.column(LAYER).unique().to_pylist())
    if layers != {extraction["layer_index"]}:
        got = f"rows of layer {', '.join(map(str, sorted(layers, key=str)))} in {path}"
        raise SidecarError(got, f"layer {extraction['layer_index']}, as its sidecar says", "split the file by layer")
    columns = [batch.column(name).to_pylist() for name in (DOCUMENT, TEXT, LENGTH)]
    wrong = [length for length in columns[2] if not 0 < length < 2**31]
    if wrong:
        raise CorpusError(f"{path} with {LENGTH} = {wrong[0]}", "a number of tokens", "extract them again")
    return [_Row(*row) for row in zip(*columns, flat.reshape(-1, width), strict=True)]


def _documents(
    rows: Sequence[_Row], numbers: dict[str, int], openings: Mapping[str, str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Document], Tensor, int]:
    """Documents with all their rows, vectors (n, d) in that order, and how many rows tokenise to another length."""
    spans, n_other = [], 0
    encoded = tokenizer([row.text for row in rows], padding=False, truncation=False, verbose=False)
    for row, ids, encoding in zip(rows, encoded["input_ids"], encoded.encodings or [], strict=True):
        n_other += len(ids) != row.length
        at = next((n for n in range(len(ids) - 1, -1, -1) if not encoding.special_tokens_mask[n]), None)
        start, _ = (0, 0) if at is None else encoding.token_to_chars(at) or (0, 0)
        # A row's text ends where its token ends, so what can be seen at it is that text, however it is tokenised.
        spans.append(Span(0 if at is None else ids[at], row.text[start:], start, len(row.text), row.length - 1))
    members: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        members.setdefault(row.document, []).append(index)
    documents, order = [], []
    for name, indexes in members.items():
        number = numbers.setdefault(name, len(numbers))
        text = max((rows[index].text for index in indexes), key=len)
        # A text that ends within a character is no prefix of a longer one; it stands for itself.
        fits = [index for index in indexes if text.startswith(rows[index].text)]
        for shared in (fits, *([index] for index in indexes if index not in set(fits))):
            own_text = text if shared is fits else rows[shared[0]].text
            kinds = [UNKNOWN_STRATUM] * len(shared)
            documents.append(Document(number, own_text, [spans[index] for index in shared], kinds, openings[name]))
            order += shared
    return documents, torch.stack([rows[index].vector for index in order]), n_other


def export_parquet(store: Store, path: str | Path) -> None:
    """Write a split of a store as a data set of the reference, with its sidecar; vectors become float32.

    Raises:
        StorageError: it could not be written whole.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, manifest = Path(path), store.manifest
    width, layer = store.d_model, Point.parse(manifest.point).layer
    kinds = (pa.int64(), pa.string(), pa.list_(pa.float32(), width), pa.int64(), pa.string())
    schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)))
    source, split = _source(manifest), manifest.settings.get("split", store.split)
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as out:
        for start in range(0, len(store), ROWS_PER_CHUNK):
            rows = torch.arange(start, min(start + ROWS_PER_CHUNK, len(store)))
            flat = pa.array(store.vectors[rows].reshape(-1).numpy())
            lengths = store.token_indexes(rows) + 1
            columns = [
                pa.array(lengths.numpy()),
                pa.array(store.prefixes(rows), pa.string()),
                pa.FixedSizeListArray.from_arrays(flat, width),
                pa.array([layer] * len(rows), pa.int64()),
                pa.array([f"{source}:{split}:{number}" for number in store.documents(rows).tolist()]),
            ]
            out.write_table(pa.Table.from_arrays(columns, schema=schema))
    write_atomic(sidecar_path(path), _sidecar(store, source))


def _source(manifest: Manifest) -> str:
    imported = manifest.settings.get("sidecar")
    extraction = imported.get("extraction") if isinstance(imported, dict) else None
    corpus = extraction.get("corpus", "imported") if isinstance(extraction, dict) else manifest.settings.get("source")
    return str(corpus)


def _sidecar(store: Store, source: str) -> str:
    import yaml

    manifest = store.manifest
    n_documents = max(store.manifest.n_documents[store.split], 1)
    return yaml.safe_dump(
        {
            "kind": "nla_dataset",
            "schema_version": 1,
            "dataset_id": f"base_{Path(manifest.target).name}_{manifest.point}_{store.identity[:8]}",
            "stage": "base",
            "row_count": len(store),
            "extraction": {
                "base_model": place_of(manifest.target),
                "d_model": manifest.d_model,
                "layer_index": Point.parse(manifest.point).layer,
                "norm": "none",
                "corpus": source,
                "corpus_slice": {"start": 0, "length": manifest.counts.get("seen", n_documents)},
                "positions_per_doc": manifest.settings.get("n_positions", -(-len(store) // n_documents)),
            },
            "keep_debug_metadata": True,
            "created_by": "nla.formats.parquet",
            "tokenizer_hash": manifest.tokenizer_hash,
            "revision": manifest.revision,
        },
        sort_keys=False,
        allow_unicode=True,
    )
