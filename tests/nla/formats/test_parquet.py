"""The reference's data sets come in and go out whole, and its own code reads what goes out."""

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from nla.config import tokenizer_hash
from nla.errors import CorpusError, NonFiniteError, ShapeError, SidecarError, StorageError, TokenizerMismatchError
from nla.formats import parquet
from nla.formats.parquet import COLUMNS, VECTOR, export_parquet, import_parquet, sidecar_path
from nla.store.reader import Store, open_splits
from tests.helpers.disk import limited_file_size

D, LAYER = 8, 5
REFERENCE = Path("/tmp/ref/kitft+natural_language_autoencoders")
WORDS = ["the", "a", "cat", "dog", "red", "blue", "sat", "ran", "on", "under", "mat", "tree"]


def rows(tokenizer, n_documents=30, seed=0):
    """Rows as the reference's extraction makes them: prefixes of documents, in no order of length."""
    draw = random.Random(seed)
    out = []
    for number in range(n_documents):
        ids = tokenizer(" ".join(draw.choices(WORDS, k=30)))["input_ids"]
        for length in draw.sample(range(14, 31), 3):
            vector = [draw.gauss(1, 1) for _ in range(D)]
            out.append((length, tokenizer.decode(ids[:length]), vector, LAYER, f"corpus:train:{number}"))
    return out


def write(path, content, sidecar=(), fixed=True, **extraction):
    vectors = pa.list_(pa.float32(), D) if fixed else pa.list_(pa.float32())
    kinds = [pa.int64(), pa.string(), vectors, pa.int64(), pa.string()]
    columns = [pa.array(column, kind) for column, kind in zip(zip(*content, strict=True), kinds, strict=True)]
    pq.write_table(pa.Table.from_arrays(columns, names=list(COLUMNS)), path)
    found = {
        "kind": "nla_dataset",
        "schema_version": 1,
        "dataset_id": "base",
        "stage": "base",
        "row_count": len(content),
        "extraction": {
            "base_model": "a/model",
            "d_model": D,
            "layer_index": LAYER,
            "norm": "none",
            "corpus": "corpus",
            "corpus_slice": {"start": 0, "length": 30},
            "positions_per_doc": 3,
        }
        | extraction,
        "a_key_of_tomorrow": 1,
    } | dict(sidecar)
    sidecar_path(path).write_text(yaml.safe_dump(found))
    return path


def as_set(store):
    """Every row of a store as text, length and vector."""
    lengths = (store.token_indexes() + 1).tolist()
    return {(n, p, tuple(v.tolist())) for n, p, v in zip(lengths, store.prefixes(), store.vectors[:], strict=True)}


def float32(vector):
    return tuple(torch.tensor(vector, dtype=torch.float32).tolist())


@pytest.mark.parametrize("fixed", [True, False])
def test_every_row_comes_in_with_its_text_and_vector(tmp_path, tokenizer, monkeypatch, fixed):
    monkeypatch.setattr(parquet, "ROWS_PER_CHUNK", 16)
    content = rows(tokenizer)
    path = write(tmp_path / "base.parquet", content, fixed=fixed)
    manifest = import_parquet(path, tmp_path / "store", tokenizer, eval_fraction=0.3)
    stores = open_splits(tmp_path / "store")
    found = as_set(stores["train"]) | as_set(stores["eval"])
    assert found == {(length, text, float32(vector)) for length, text, vector, _, _ in content}
    assert (
        manifest.point == f"resid_post.{LAYER}" and manifest.target == "a/model" and len(manifest.shards["train"]) > 3
    )
    assert manifest.counts == {"read": 30, "retokenised": 0, "duplicates": 0}
    for store in stores.values():
        store.check_tokenizer(tokenizer)
        for span, prefix in zip(store.activations().spans, store.prefixes(), strict=True):
            assert tokenizer(prefix)["input_ids"][-1] == span.token_id and prefix.endswith(span.text)
        assert len(store.activations().texts) == len(set(store.documents().tolist()))  # a text is stored once


def test_documents_that_begin_alike_share_a_split(tmp_path, tokenizer):
    content = rows(tokenizer, n_documents=40)
    twins = [(*row[:4], f"copy-{row[4]}") for row in content if row[0] < 22]
    path = write(tmp_path / "base.parquet", content + twins)
    manifest = import_parquet(path, tmp_path / "store", tokenizer, eval_fraction=0.4)
    stores = open_splits(tmp_path / "store")
    openings = [{prefix[:40] for prefix in store.prefixes()} for store in stores.values()]
    assert openings[0].isdisjoint(openings[1]) and min(map(len, openings)) > 8
    assert manifest.counts["duplicates"] == len({row[4] for row in twins})


@pytest.mark.parametrize("length", [0, 21, 60])
def test_what_all_documents_begin_with_does_not_decide_their_split(tmp_path, tokenizer, length):
    """A system prompt of any length, some rows that end within it, and rows in no order."""
    content = rows(tokenizer, n_documents=60)
    prompt = " ".join(["the cat sat"] * (length // 3))
    content = [(length + n, f"{prompt} {text}".strip(), *rest) for n, text, *rest in content]
    if length:
        content += [(6, "the cat sat the cat \ufffd", [1.0] * D, LAYER, "corpus:train:3")]
    random.Random(1).shuffle(content)
    path = write(tmp_path / "base.parquet", content)
    manifest = import_parquet(path, tmp_path / "store", tokenizer, eval_fraction=0.3)
    stores = open_splits(tmp_path / "store")
    assert manifest.n_documents["eval"] > 8 and manifest.n_documents["train"] > 25
    documents = [set(store.documents().tolist()) for store in stores.values()]
    assert documents[0].isdisjoint(documents[1])


def test_rows_of_a_document_that_stand_far_apart_share_its_split(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS_PER_CHUNK", 4)
    content = rows(tokenizer, n_documents=40)
    # These end before documents are told apart.
    short = [(2, " ".join(row[1].split()[:2]), *row[2:]) for row in content[::3]]
    random.Random(2).shuffle(content)
    import_parquet(write(tmp_path / "b.parquet", content + short), tmp_path / "s", tokenizer, eval_fraction=0.4)
    documents = [set(store.documents().tolist()) for store in open_splits(tmp_path / "s").values()]
    assert documents[0].isdisjoint(documents[1]) and min(map(len, documents)) > 8


def test_out_and_in_again_gives_the_same_rows_and_sidecar(tmp_path, tokenizer):
    path = write(tmp_path / "base.parquet", rows(tokenizer))
    import_parquet(path, tmp_path / "store", tokenizer, eval_fraction=0.5)
    store = Store.open(tmp_path / "store", "eval")
    export_parquet(store, tmp_path / "out" / "eval.parquet")
    table = pq.read_table(tmp_path / "out" / "eval.parquet")
    assert table.schema.field(VECTOR).type == pa.list_(pa.float32(), D) and table.num_rows == len(store)
    assert torch.tensor(table.column(VECTOR).to_pylist()).equal(store.vectors[:])
    assert table.column("doc_id")[0].as_py().startswith("corpus:eval:")
    manifest = import_parquet(tmp_path / "out" / "eval.parquet", tmp_path / "again", tokenizer, eval_fraction=0.3)
    again = open_splits(tmp_path / "again")
    assert as_set(again["train"]) | as_set(again["eval"]) == as_set(store)
    assert manifest.point == store.manifest.point and manifest.target == store.manifest.target


def test_a_text_that_ends_within_a_character_is_kept(tmp_path, tokenizer):
    content = [(3, "a cat \ufffd", [1.0] * D, LAYER, "d:0"), (4, "a cat é sat", [2.0] * 4 + [1.0] * 4, LAYER, "d:0")]
    for n in range(1, 9):
        content.append((n + 2, f"the dog{' ran' * n}", [float(n + i * i) for i in range(D)], LAYER, f"d:{n}"))
    import_parquet(write(tmp_path / "b.parquet", content), tmp_path / "s", tokenizer, eval_fraction=0.5)
    stores = open_splits(tmp_path / "s")
    assert {p for store in stores.values() for p in store.prefixes()} == {row[1] for row in content}


def test_a_file_that_does_not_fit_its_sidecar_is_refused(tmp_path, tokenizer):
    content = rows(tokenizer, n_documents=4)

    def attempt(error, match, changed=content, **keywords):
        with pytest.raises(error, match=match):
            path = write(tmp_path / "x.parquet", changed, **keywords)
            import_parquet(path, tmp_path / "store", tokenizer)
        assert not (tmp_path / "store" / "manifest.json").exists()

    attempt(ShapeError, r"width \[8\].*expected 9", d_model=9)
    ragged = [(*content[0][:2], [1.0] * 7, *content[0][3:]), (*content[1][:2], [1.0] * 9, *content[1][3:])]
    attempt(ShapeError, r"width \[7, 9\]", ragged, fixed=False)
    attempt(SidecarError, "rows of layer 5", layer_index=6)
    attempt(SidecarError, r"12 rows.*expected 13", sidecar={"row_count": 13})
    attempt(SidecarError, "norm = 'unit'", norm="unit")
    attempt(SidecarError, "kind: 'nla_model'", sidecar={"kind": "nla_model"})
    attempt(SidecarError, "schema_version: 9", sidecar={"schema_version": 9})
    attempt(SidecarError, r"without extraction.base_model", sidecar={"extraction": {}})
    attempt(SidecarError, "d_model: 'wide'", d_model="wide")
    missing = [*content[:2], (*content[2][:2], None, *content[2][3:]), *content[3:]]
    attempt(CorpusError, "rows that lack a value", missing)
    bad = [*content[:4], (*content[4][:2], [math.nan] * D, *content[4][3:]), *content[5:]]
    attempt(NonFiniteError, r"the first of document 1 \('", bad)


def test_files_that_are_missing_or_broken_are_refused(tmp_path, tokenizer):
    path = write(tmp_path / "x.parquet", rows(tokenizer, n_documents=4))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorpusError, match="cannot be read"):
        import_parquet(path, tmp_path / "store", tokenizer)
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(CorpusError, match=r"columns \{'text': 'string'\}; expected also n_raw_tokens, detoken"):
        import_parquet(path, tmp_path / "store", tokenizer)
    sidecar_path(path).unlink()
    with pytest.raises(SidecarError, match="no readable"):
        import_parquet(path, tmp_path / "store", tokenizer)


def test_another_tokenizer_is_refused(tmp_path, tokenizer):
    content = [(length + 1, *rest) for length, *rest in rows(tokenizer)]
    with pytest.raises(TokenizerMismatchError, match="other numbers of tokens"):
        import_parquet(write(tmp_path / "x.parquet", content), tmp_path / "a", tokenizer)
    path = write(tmp_path / "y.parquet", rows(tokenizer), sidecar={"tokenizer_hash": "another"})
    with pytest.raises(TokenizerMismatchError, match="expected another"):
        import_parquet(path, tmp_path / "b", tokenizer)
    path = write(tmp_path / "z.parquet", rows(tokenizer), sidecar={"tokenizer_hash": tokenizer_hash(tokenizer)})
    import_parquet(path, tmp_path / "c", tokenizer, eval_fraction=0.3)


def test_a_full_disk_leaves_no_file(tmp_path, tokenizer):
    path = write(tmp_path / "base.parquet", rows(tokenizer))
    import_parquet(path, tmp_path / "store", tokenizer, eval_fraction=0.3)
    store = Store.open(tmp_path / "store")
    with limited_file_size(), pytest.raises(StorageError, match="free space"):
        export_parquet(store, tmp_path / "out" / "x.parquet")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference's code is not here")
def test_the_references_own_code_splits_what_we_export_and_we_read_it_again(tmp_path, tokenizer):
    path = write(tmp_path / "base.parquet", rows(tokenizer))
    import_parquet(path, tmp_path / "store", tokenizer, eval_fraction=0.1)
    store = Store.open(tmp_path / "store")
    export_parquet(store, tmp_path / "out.parquet")
    command = [sys.executable, "-m", "nla.datagen.stage1_split", "--base", str(tmp_path / "out.parquet")]
    environment = {**os.environ, "PYTHONPATH": str(REFERENCE)}
    subprocess.run([*command, "--output-dir", str(tmp_path)], env=environment, cwd=REFERENCE, check=True)
    found = set()
    for name in ("av_sft", "ar_sft", "rl"):
        import_parquet(tmp_path / f"{name}_raw.parquet", tmp_path / name, tokenizer, eval_fraction=0.5)
        for part in open_splits(tmp_path / name).values():
            found |= as_set(part)
    assert found == as_set(store)
