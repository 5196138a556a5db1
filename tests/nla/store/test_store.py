"""A store gives back what was written, touches only what is asked for, and refuses what is not whole."""

import json
import math
import os
import pickle
import time
from dataclasses import replace

import pytest
import torch

from nla.config import tokenizer_hash
from nla.errors import BaselineError, NonFiniteError, ShapeError, StorageError, StoreError, TokenizerMismatchError
from nla.metrics import Baseline
from nla.storage import files
from nla.store import shards
from nla.store.reader import Manifest, Store, open_splits
from nla.store.shards import Document, Shard, is_held_out, write_shard
from nla.store.writer import StoreWriter
from nla.text.tokens import Span
from tests.helpers.disk import limited_file_size

D = 6
json_dumps = json.dumps
ABOUT = {
    "target": "a/target",
    "revision": None,
    "tokenizer_hash": "t",
    "point": "resid_post.1",
    "dtype": "float32",
    "d_model": D,
    "settings": {"seed": 0},
}


def document(number: int, text: str, n: int = 2, kind: str = "all") -> Document:
    """A document whose tokens are its characters, the last ``n`` of which are stored."""
    spans = [Span(ord(text[i]), text[i], i, i + 1, i) for i in range(len(text) - n, len(text))]
    return Document(number, text, spans, [kind] * n)


def vectors(n: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 1).to(dtype)


def make(folder, dtype=torch.float32, eval_text="eval 0", kinds=("all", "all")):
    """A store of three chunks; the training vectors (12, d)."""
    writer = StoreWriter(folder, ABOUT | {"dtype": str(dtype).removeprefix("torch.")})
    train = []
    for chunk in range(3):
        documents = [document(2 * chunk + i, f"träin {chunk} {i} ✓", kind=kinds[i]) for i in range(2)]
        train.append(vectors(4, chunk, dtype))
        splits = {"train": (documents, train[-1])}
        if chunk == 1:
            splits["eval"] = ([document(9, eval_text, 3)], vectors(3, 77, dtype))
        writer.write(chunk, splits, {"seen": 2 + len(splits)})
    manifest = writer.finish(3)
    return torch.cat(train), manifest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_identical_however_they_are_asked_for(tmp_path, dtype):
    written, _ = make(tmp_path, dtype)
    store = Store.open(tmp_path)
    expected = written.float()
    assert store.vectors.shape == (12, D) and len(store) == len(store.vectors) == 12
    assert store.vectors.dtype == torch.float32 and Shard(tmp_path / store.entries[0].file).vectors.dtype == dtype
    picks = [slice(None), slice(3, 11, 2), torch.tensor([11, 0, 5, 5, -1]), [7, 2], torch.arange(12) % 5 == 0, []]
    for pick in picks:
        index = torch.tensor(pick, dtype=torch.int64) if isinstance(pick, list) else pick
        assert store.vectors[pick].equal(expected[index])
    assert store.vectors[-2].equal(expected[-2])
    for outside in (12, -13, torch.tensor([3, 12])):
        with pytest.raises(IndexError, match="split of 12"):
            store.vectors[outside]
    with pytest.raises(ShapeError, match="mask"):
        store.vectors[torch.ones(5, dtype=torch.bool)]


def test_rows_keep_their_tokens_texts_and_documents(tmp_path):
    make(tmp_path, kinds=("user", "tool"))
    store = Store.open(tmp_path)
    texts = [f"träin {chunk} {i} ✓" for chunk in range(3) for i in range(2)]
    assert store.prefixes() == [text[:end] for text in texts for end in (len(text) - 1, len(text))]
    assert store.prefixes([5, 0]) == [texts[2], texts[0][:-1]]
    assert store.strata([0, 2, 3, 4]) == ["user", "tool", "tool", "user"]
    assert store.documents().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    rows = store.activations([5, 4, 0])
    assert rows.vectors.equal(store.vectors[[5, 4, 0]]) and rows.point == "resid_post.1"
    assert [rows.texts[i] for i in rows.document] == [texts[2], texts[2], texts[0]] and len(rows.texts) == 2
    assert [span.text for span in rows.spans] == ["✓", " ", " "]
    assert all(
        rows.texts[i][span.start : span.end] == span.text for i, span in zip(rows.document, rows.spans, strict=True)
    )


def test_what_is_known_of_a_document_is_known_of_each_of_its_rows(tmp_path):
    known = [{"topic": "bees", "tone": None}, {}, {"topic": "tea", "wordings": [1, 2]}]
    documents = [document(n, f"text {n}")._replace(attributes=one) for n, one in enumerate(known)]
    writer = StoreWriter(tmp_path / "a", ABOUT)
    splits = {"train": (documents[:2], vectors(4, 0)), "eval": (documents[2:], vectors(2, 1))}
    writer.write(0, splits, {})
    writer.finish(1)
    train, held_out = open_splits(tmp_path / "a").values()
    assert train.attributes([3, 0, 1]) == [{}, known[0], known[0]] and held_out.attributes() == [known[2]] * 2
    make(tmp_path / "b")
    plain = Store.open(tmp_path / "b")
    assert plain.attributes([2, 3]) == [{}, {}]
    written = Shard(tmp_path / "b" / plain.entries[0].file).tensor("words").numpy().tobytes()
    assert json.loads(written) == {"strata": ["all"]}, "a store as versions before this one wrote it"


@pytest.mark.parametrize("wrong", ["\ud800", 10**400, [0] * 50])
def test_attributes_that_could_not_be_read_again_are_not_written(tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(files, "MAX_JSON_VALUES", 100)
    documents = [document(n, f"text {n}")._replace(attributes={"a": wrong}) for n in range(3)]
    with pytest.raises(StoreError, match=r"attributes of 3 documents .* documents_per_chunk"):
        write_shard(tmp_path, "0.safetensors", documents, torch.ones(sum(len(d.spans) for d in documents), 4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [{"strata": ["all"], "attributes": wrong} for wrong in ([{}], 3, [{}, 1])] + [[]])
def test_a_shard_that_says_something_else_than_of_its_documents_is_refused(tmp_path, monkeypatch, words):
    monkeypatch.setattr(shards.json, "dumps", lambda *_, **__: json_dumps(words))
    write_shard(tmp_path, "train/000000.safetensors", [document(0, "a text"), document(1, "a word")], vectors(4, 0))
    with pytest.raises(StoreError, match="damaged"):
        _ = Shard(tmp_path / "train" / "000000.safetensors").attributes


@pytest.mark.parametrize("kinds, names", [(("all", "all"), {"global"}), (("user", "tool"), {"global", "user", "tool"})])
def test_baselines_and_norms_are_those_of_the_training_vectors(tmp_path, kinds, names):
    written, manifest = make(tmp_path, kinds=kinds)
    store = Store.open(tmp_path, "eval")  # they are the training split's, whichever is open
    masks = {"global": torch.ones(12).bool(), kinds[0]: torch.arange(12) % 4 < 2, kinds[1]: torch.arange(12) % 4 >= 2}
    assert set(store.baselines) == names
    for name in names:
        expected = Baseline.fit(written[masks[name]])
        found = store.baselines[name]
        torch.testing.assert_close(found.mean, expected.mean)
        assert found.n == expected.n and math.isclose(found.variance, expected.variance, rel_tol=1e-6)
        assert math.isclose(manifest.variance[name], expected.variance, rel_tol=1e-6)
    norms = written.norm(dim=1)
    assert math.isclose(manifest.norms["mean"], float(norms.mean()), rel_tol=1e-6)
    assert manifest.norms["q1"] == float(norms.max()) and manifest.norms["q0"] == float(norms.min())


def test_the_manifest_counts_and_comes_back(tmp_path):
    _, manifest = make(tmp_path)
    assert manifest == Manifest.load(tmp_path) and manifest.counts == {"seen": 3 + 4 + 3, "duplicates": 0}
    assert manifest.n == {"train": 12, "eval": 3} and manifest.n_documents == {"train": 6, "eval": 1}


def test_a_dataset_of_the_store_is_lazy_and_shuffles(tmp_path, monkeypatch):
    written, _ = make(tmp_path)
    store = Store.open(tmp_path)
    touched = []
    find = Store._shard
    monkeypatch.setattr(Store, "_shard", lambda self, number: touched.append(number) or find(self, number))
    data = store.dataset()
    assert len(data) == 12 and not touched
    assert data[9]["vector"].equal(written[9]) and data[9]["prefix"] == store.prefixes([9])[0]
    assert set(touched) == {2}
    shuffled = data.shuffle(seed=3)
    rows = shuffled[:5]["row"]
    assert rows != [0, 1, 2, 3, 4] and torch.as_tensor(shuffled[:5]["vector"]).equal(written[rows])


def test_a_pickled_store_opens_its_own_files(tmp_path):
    written, _ = make(tmp_path)
    store = Store.open(tmp_path)
    store.vectors[3]
    data = pickle.dumps(store)
    assert pickle.loads(data).vectors[3].equal(written[3]) and len(data) < 10_000


def test_a_store_of_many_shards_keeps_no_file_open(tmp_path):
    make(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    store = Store.open(tmp_path)
    assert len(store.vectors[:]) == 12
    assert len(os.listdir("/proc/self/fd")) == before


def test_rows_of_many_shards_are_found_in_the_time_of_one_sort(tmp_path, monkeypatch):
    _, manifest = make(tmp_path)
    entries = [manifest.shards["train"][0]._replace(rows=10)] * 20_000
    sizes = {"n": {"train": 200_000}, "n_documents": {"train": 20_000 * entries[0].documents}}
    store = Store(tmp_path, "train", replace(manifest, shards={"train": entries}, **sizes))
    monkeypatch.setattr(Store, "_shard", lambda self, number: number)
    rows = torch.randperm(200_000, generator=torch.Generator().manual_seed(0))
    started = time.process_time()
    found = list(store.by_shard(rows))
    assert time.process_time() - started < 5  # shards × rows would be a minute
    assert [shard for shard, _, _ in found] == list(range(20_000))
    for shard, places, inside in (found[0], found[-1]):
        assert rows[places].equal(inside + 10 * shard) and places.equal(places.sort().values)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(shards=[]),
        lambda content: content.update(shards={"train": {}}),
        lambda content: content["shards"].update(train=["a"]),
        lambda content: content["shards"]["train"][0].update(x=1),
        lambda content: content["shards"]["train"][0].update(rows="4"),
        lambda content: content["shards"]["train"][0].update(file=None),
        lambda content: content["shards"]["train"][0].pop("sha256"),
        lambda content: content.update(d_model="6"),
        lambda content: content.update(settings=None),
        lambda content: content["norms"].update(mean="long"),
        lambda content: content.update(revision=3),
    ],
)
def test_a_malformed_manifest_is_refused(tmp_path, change):
    make(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    Store.open(tmp_path)
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=r"manifest\.json, which is malformed"):
        Store.open(tmp_path)


def test_splits_that_share_a_text_are_refused(tmp_path):
    make(tmp_path / "apart")
    assert set(open_splits(tmp_path / "apart")) == {"train", "eval"}
    assert set(open_splits(tmp_path / "apart", "train")) == {"train"}
    make(tmp_path / "shared", eval_text="träin 2 1 ✓")
    assert len(Store.open(tmp_path / "shared", "eval")) == 3
    with pytest.raises(StoreError, match="1 documents that stand in train as well as in eval"):
        open_splits(tmp_path / "shared")


def test_duplicates_within_a_split_are_counted(tmp_path):
    writer = StoreWriter(tmp_path, ABOUT)
    same = [document(n, "the same") for n in range(3)]
    writer.write(0, {"train": (same, vectors(6, 0)), "eval": ([document(3, "other")], vectors(2, 1))}, {})
    manifest = writer.finish(1)
    assert manifest is not None and manifest.counts["duplicates"] == 2


def test_the_split_is_a_keyed_share_of_the_texts():
    texts = [f"text {n}" for n in range(4000)]
    held = [is_held_out(text, 0.2, "a") for text in texts]
    assert abs(sum(held) / 4000 - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 4000)
    assert held == [is_held_out(text, 0.2, "a") for text in texts]
    other = [is_held_out(text, 0.2, "b") for text in texts]
    assert 0.02 < sum(a and b for a, b in zip(held, other, strict=True)) / 4000 < 0.06  # independent: 0.04
    assert not any(is_held_out(text, 0.0, "a") for text in texts) and all(is_held_out(t, 1.0, "a") for t in texts)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_half_written_shard_is_refused_on_opening(tmp_path, size):
    make(tmp_path)
    path = tmp_path / "train" / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(StoreError, match=r"000001.safetensors of \d+ bytes"):
        Store.open(tmp_path)
    with pytest.raises(StoreError, match="half-written"):
        Shard(path)
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        Store.open(tmp_path)
    assert len(Store.open(tmp_path, "eval")) == 3


def test_a_changed_byte_is_found_by_verify(tmp_path):
    make(tmp_path)
    store = Store.open(tmp_path)
    store.verify()
    path = tmp_path / "train" / "000002.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"000002.safetensors, whose content"):
        store.verify()


def test_an_unfinished_store_says_how_to_go_on(tmp_path):
    with pytest.raises(StoreError, match="no store in"):
        Store.open(tmp_path / "nowhere")
    writer = StoreWriter(tmp_path / "begun", ABOUT)
    writer.write(0, {"train": ([document(0, "abc")], vectors(2, 0))}, {})
    assert writer.finish(2) is None
    with pytest.raises(StoreError, match=r"not finished.*run the command"):
        Store.open(tmp_path / "begun")
    make(tmp_path / "s")
    with pytest.raises(StoreError, match=r"'test'.*one of train, eval"):
        Store.open(tmp_path / "s", "test")


def test_a_folder_with_a_store_of_other_settings_is_refused(tmp_path):
    make(tmp_path)
    StoreWriter(tmp_path, ABOUT)
    with pytest.raises(StoreError, match=r"settings.seed: 0 there, 1 now"):
        StoreWriter(tmp_path, ABOUT | {"settings": {"seed": 1}})


def test_a_split_without_documents_and_vectors_without_variance_are_refused(tmp_path):
    writer = StoreWriter(tmp_path / "a", ABOUT)
    writer.write(0, {"train": ([document(0, "abc")], vectors(2, 0))}, {"seen": 1})
    with pytest.raises(StoreError, match=r"no documents in the split eval.*seen 1"):
        writer.finish(1)
    writer = StoreWriter(tmp_path / "b", ABOUT)
    splits = {"train": ([document(0, "abc")], torch.ones(2, D)), "eval": ([document(1, "xyz")], vectors(2, 0))}
    writer.write(0, splits, {})
    with pytest.raises(BaselineError, match="more than one direction"):
        writer.finish(1)


def test_a_vector_that_is_not_finite_names_its_document(tmp_path):
    bad = vectors(4, 0)
    bad[2, 1] = math.inf
    writer = StoreWriter(tmp_path / "new", ABOUT)
    with pytest.raises(NonFiniteError, match=r"1 of 4 vectors, the first of document 8 \('second"):
        writer.write(0, {"train": ([document(7, "first"), document(8, "second")], bad)}, {})
    with pytest.raises(ShapeError, match="one a span"):
        writer.write(0, {"train": ([document(7, "first")], vectors(3, 0))}, {})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_work_that_fails_leaves_no_store_and_other_settings_may_follow(tmp_path):
    writer = StoreWriter(tmp_path / "s", ABOUT)  # and then the target, the corpus or the first chunk fails
    assert not (tmp_path / "s").exists()
    other = StoreWriter(tmp_path / "s", ABOUT | {"point": "resid_post.2"})
    other.write(0, {"train": ([document(0, "abc")], vectors(2, 0))}, {})
    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    with pytest.raises(StoreError, match=r"other settings \(point: 'resid_post.2' there, 'resid_post.1' now"):
        writer.write(0, {"train": ([document(0, "xyz")], vectors(2, 1))}, {})
    assert {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()} == before


def test_a_full_disk_is_an_error_and_leaves_the_chunk_to_be_done(tmp_path):
    writer = StoreWriter(tmp_path, ABOUT)
    splits = {"train": ([document(n, f"text {n}") for n in range(200)], vectors(400, 0))}
    with limited_file_size(), pytest.raises(StorageError, match="free space"):
        writer.write(0, splits, {})
    assert not writer.is_done(0) and not list((tmp_path / "train").iterdir())
    writer.write(0, splits, {})
    assert writer.is_done(0)


def test_equal_content_gives_equal_bytes_and_identity(tmp_path):
    for name in ("a", "b"):
        make(tmp_path / name)
    make(tmp_path / "c", eval_text="another")
    stores = [Store.open(tmp_path / name) for name in "abc"]
    assert stores[0].identity == stores[1].identity != stores[2].identity != Store.open(tmp_path / "c", "eval").identity
    for path in (tmp_path / "a").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_another_tokenizer_is_refused(tmp_path, tokenizer):
    writer = StoreWriter(tmp_path, ABOUT | {"tokenizer_hash": tokenizer_hash(tokenizer)})
    splits = {"train": ([document(0, "abc")], vectors(2, 0)), "eval": ([document(1, "xyz")], vectors(2, 1))}
    writer.write(0, splits, {})
    writer.finish(1)
    Store.open(tmp_path).check_tokenizer(tokenizer)
    with pytest.raises(TokenizerMismatchError, match="a/target"):
        make(tmp_path / "other")
        Store.open(tmp_path / "other").check_tokenizer(tokenizer)


@pytest.mark.slow
def test_rows_beyond_four_gib_are_read(tmp_path):
    """A sparse file of 5 GiB: offsets that were kept in 32 bits would give another row."""
    path, width = tmp_path / "x.safetensors", 1000
    write_shard(tmp_path, path.name, [document(0, "abc")], torch.ones(2, width))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, n, small, end = json.loads(data[8 : 8 + length]), 5 * 2**30 // (4 * width), b"", 0
    rows = {"span": 40, "document": 8, "stratum": 8, "norm": 4, "vectors": 4 * width}
    for name in [name for name in header if name not in rows and name != "__metadata__"] + list(rows):
        start, stop = header[name]["data_offsets"]
        size = n * rows[name] if name in rows else stop - start
        if name in rows:
            header[name]["shape"][0] = n
        else:
            small += data[8 + length + start : 8 + length + stop]
        header[name]["data_offsets"], end = [end, end + size], end + size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + small)
        file.truncate(8 + len(text) + end)
        file.seek(-4 * width, os.SEEK_END)
        file.write(torch.arange(float(width)).numpy().tobytes())
    shard = Shard(path)
    assert shard.rows(torch.tensor([n - 1])).equal(torch.arange(float(width))[None]) and shard.text(0) == "abc"
