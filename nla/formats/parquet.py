"""The reference's data sets: a parquet of activations with ``<file>.nla_meta.yaml`` beside it, from and to a store.

A row is ``n_raw_tokens`` (tokens up to and including the one read), ``detokenized_text_truncated`` (the text up to it),
``activation_vector`` (raw, a list of fixed size), ``activation_layer`` (K, the point ``resid_post.K``) and ``doc_id``.
The text after the last token read is not there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nla.baselines import UNKNOWN_STRATUM
from nla.config import tokenizer_hash
from nla.errors import (
    ArgumentError,
    CorpusError,
    NonFiniteError,
    ShapeError,
    SidecarError,
    StorageError,
    TokenizerMismatchError,
)
from nla.models.points import Point
from nla.storage.files import replacing, write_atomic
from nla.store.reader import SPLITS, Manifest, Store
from nla.store.shards import Document, is_held_out
from nla.store.writer import StoreWriter
from nla.text.tokens import Span

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
_SCHEMAS = (1, 2)
_EXTRACTION = ("base_model", "d_model", "layer_index", "norm")


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
    import yaml

    sidecar, fix = sidecar_path(path), "take the sidecar that was made with this very file"
    try:
        content = yaml.safe_load(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SidecarError(f"no readable {sidecar} ({error})", "the parquet's sidecar", fix) from error
    content = content if isinstance(content, dict) else {}
    if content.get("kind") != "nla_dataset" or content.get("schema_version") not in _SCHEMAS:
        got = f"{sidecar} of kind {content.get('kind')!r} and schema {content.get('schema_version')!r}"
        raise SidecarError(got, f"kind 'nla_dataset' and schema {' or '.join(map(str, _SCHEMAS))}", fix)
    extraction = content.get("extraction")
    extraction = extraction if isinstance(extraction, dict) else {}
    lacking = [f"extraction.{key}" for key in _EXTRACTION if key not in extraction]
    lacking += [] if "row_count" in content else ["row_count"]
    if lacking:
        raise SidecarError(f"{sidecar} without {', '.join(lacking)}", "all keys of a data set's sidecar", fix)
    for key in ("d_model", "layer_index"):
        if not isinstance(extraction[key], int):
            raise SidecarError(f"{sidecar} with extraction.{key} = {extraction[key]!r}", "a whole number", fix)
    if extraction["norm"] != "none":
        got = f"{sidecar} with extraction.norm = {extraction['norm']!r}"
        raise SidecarError(got, "raw vectors: norm 'none'", "extract them again: their norms are lost")
    return content


def import_parquet(
    path: str | Path,
    out_dir: str | Path,
    tokenizer: Any,
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


def _check_tokenizer(sidecar: Mapping[str, Any], tokenizer: Any, path: Path) -> None:
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


def _batches(path: Path, sidecar: Mapping[str, Any], columns: Sequence[str]) -> Iterator[Any]:
    """Some columns of the file, a chunk of rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            _check_table(table, sidecar, path)
            yield from table.iter_batches(batch_size=ROWS_PER_CHUNK, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path}, which cannot be read ({error})", "a whole parquet file", "restore it") from error


def _openings(path: Path, sidecar: Mapping[str, Any]) -> dict[str, str]:
    """What each document is compared by: its longest row up to ``OPENING`` characters after where documents part.

    The file is gone through before any row is stored: rows of a document may stand far apart, and each must land in
    the same split.
    """

    def rows() -> Iterator[tuple[str, str]]:
        for batch in _batches(path, sidecar, (DOCUMENT, TEXT)):
            columns = [batch.column(name) for name in (DOCUMENT, TEXT)]
            if any(column.null_count for column in columns):
                raise CorpusError(f"rows of {path} without a text or document", "both in each", "extract them again")
            yield from zip(*(column.to_pylist() for column in columns), strict=True)

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


def _check_table(table: Any, sidecar: Mapping[str, Any], path: Path) -> None:
    lacking = [name for name in COLUMNS if name not in table.schema_arrow.names]
    if lacking:
        raise CorpusError(
            f"{path} with the columns {', '.join(table.schema_arrow.names)}",
            f"also {', '.join(lacking)}",
            "give a file that the reference's extraction wrote (base.parquet, or a split of it)",
        )
    if table.metadata.num_rows != sidecar["row_count"]:
        raise SidecarError(
            f"{path} of {table.metadata.num_rows} rows",
            f"{sidecar['row_count']}, as its sidecar says",
            "take the sidecar that was made with this very file",
        )


def _rows(batch: Any, extraction: Mapping[str, Any], path: Path) -> list[_Row]:
    width, column = extraction["d_model"], batch.column(VECTOR)
    if column.null_count:
        raise NonFiniteError(f"{column.null_count} rows of {path} without a vector", "one a row", "extract them again")
    flat = torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).copy()).float()
    if len(flat) != len(column) * width or set(column.value_lengths().unique().to_pylist()) - {width}:
        got = f"vectors of width {sorted(set(column.value_lengths().to_pylist()))} in {path}"
        raise ShapeError(got, f"{width}, as its sidecar says", "take the sidecar that was made with this very file")
    layers = set(batch.column(LAYER).unique().to_pylist())
    if layers != {extraction["layer_index"]}:
        got = f"rows of layer {', '.join(map(str, sorted(layers, key=str)))} in {path}"
        raise SidecarError(got, f"layer {extraction['layer_index']}, as its sidecar says", "split the file by layer")
    columns = [batch.column(name).to_pylist() for name in (DOCUMENT, TEXT, LENGTH)]
    return [_Row(*row) for row in zip(*columns, flat.reshape(-1, width), strict=True)]


def _documents(
    rows: Sequence[_Row], numbers: dict[str, int], openings: Mapping[str, str], tokenizer: Any
) -> tuple[list[Document], Tensor, int]:
    """Documents with all their rows, vectors (n, d) in that order, and how many rows tokenise to another length."""
    spans, n_other = [], 0
    encoded = tokenizer([row.text for row in rows], padding=False, truncation=False, verbose=False)
    for row, ids, encoding in zip(rows, encoded["input_ids"], encoded.encodings, strict=True):
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
    return imported["extraction"].get("corpus", "imported") if imported else str(manifest.settings.get("source"))


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
                "base_model": manifest.target,
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
