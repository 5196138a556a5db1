"""Extraction gives the target's own activations, and the same bytes however often it is killed or how it is shared."""

import json
import math
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

from nla.errors import ArgumentError, ContextLengthError, NLAError, PointError, StorageError, StoreError
from nla.models import load
from nla.store.reader import Store, open_splits
from nla.train.data import corpus as corpora
from nla.train.data import extract as extraction
from nla.train.data.corpus import CorpusSettings
from nla.train.data.extract import ExtractionSettings, extract_corpus
from tests.helpers.disk import limited_file_size
from tests.helpers.tiny import make_model, make_tokenizer

WORDS = ["the", "a", "cat", "dog", "red", "blue", "sat", "ran", "on", "under", "mat", "tree"]
POINT = "resid_post.1"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def extract(settings, target, point, folder, **changes):
    """A corpus into the store ``folder``."""
    return extract_corpus(ExtractionSettings(settings, str(target), point, **changes), folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """60 documents, a fifth of them copies."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 40))) for _ in range(48)]
    texts += draw.sample(texts, 12)
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def settings(corpus):
    return CorpusSettings(
        str(corpus), n_positions=3, first_position=5, max_tokens=64, eval_fraction=0.25, documents_per_chunk=5
    )


@pytest.fixture(scope="module")
def whole(target, corpus, tmp_path_factory):
    """The store that one uninterrupted run makes."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    arguments = {"n_positions": 3, "first_position": 5, "max_tokens": 64, "eval_fraction": 0.25}
    extract(CorpusSettings(str(corpus), **arguments, documents_per_chunk=5), target, POINT, folder)
    return folder


def content(folder):
    """Every file of a store by name, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def different(folder, other):
    """Names of files that only one of two stores has, or that differ."""
    one, two = content(folder), content(other)
    return sorted(name for name in {*one, *two} if one.get(name) != two.get(name))


def start(*arguments, **keywords):
    """Extraction in a real process of its own, forked so that nothing is imported again."""
    process = multiprocessing.get_context("fork").Process(target=extract, args=arguments, kwargs=keywords)
    process.start()
    return process


def test_vectors_are_those_of_the_full_model_at_the_token(whole, target, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(target)
    for store in open_splits(whole).values():
        rows = store.activations()
        for vector, span, document, prefix in zip(
            rows.vectors, rows.spans, rows.document.tolist(), store.prefixes(), strict=True
        ):
            ids = tokenizer(rows.texts[document], return_tensors="pt")["input_ids"]
            with torch.no_grad():
                expected = model(ids, output_hidden_states=True).hidden_states[2][0, span.index]
            torch.testing.assert_close(vector, expected, atol=2e-5, rtol=1e-5)
            assert tokenizer(prefix)["input_ids"] == ids[0, : span.index + 1].tolist()


def test_the_manifest_says_what_was_read_and_the_splits_share_no_text(whole, target, settings):
    stores = open_splits(whole)
    manifest = stores["train"].manifest
    assert manifest.target == str(target) and manifest.point == POINT and manifest.d_model == 32
    assert manifest.counts["seen"] == 60 and manifest.counts["duplicates"] > 8
    assert manifest.counts["read"] + manifest.counts["short"] == 60
    assert manifest.settings["n_positions"] == 3 and manifest.settings["seed"] == 0
    norms = stores["train"].vectors[:].norm(dim=1)
    assert math.isclose(manifest.norms["mean"], float(norms.mean()), rel_tol=1e-6)
    texts = {split: set(store.activations().texts) for split, store in stores.items()}
    assert texts["train"].isdisjoint(texts["eval"]) and len(texts["eval"]) > 1
    for store in stores.values():
        store.verify()


def test_two_processes_make_row_for_row_the_store_of_one(whole, target, settings, tmp_path):
    both = [start(settings, target, POINT, tmp_path, process=n, processes=2) for n in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0] and different(tmp_path, whole) == []


def test_the_last_of_several_processes_writes_the_manifest(whole, target, settings, tmp_path):
    assert extract(settings, target, POINT, tmp_path, process=1, processes=2) is None
    with pytest.raises(StoreError, match="not finished"):
        Store.open(tmp_path)
    assert extract(settings, target, POINT, tmp_path, process=0, processes=2) is not None
    assert different(tmp_path, whole) == []
    with pytest.raises(ArgumentError, match="process 2 of 2"):
        extract(settings, target, POINT, tmp_path, process=2, processes=2)


def test_killed_at_random_moments_it_ends_with_the_same_bytes(whole, target, settings, tmp_path):
    def n_done() -> int:
        return len(list((tmp_path / "chunks").glob("0*.json")))

    draw, n_records = random.Random(), [0]
    while len(n_records) < 6 and n_records[-1] < 12:
        process = start(settings, target, POINT, tmp_path)
        while process.is_alive() and n_done() == n_records[-1]:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.04))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        n_records.append(n_done())
    extract(settings, target, POINT, tmp_path)
    assert n_records[1] < 12
    assert different(tmp_path, whole) == []


@pytest.mark.parametrize("moment", ["shard", "record", "manifest"])
def test_killed_in_the_middle_of_a_write_it_ends_with_the_same_bytes(
    whole, target, settings, tmp_path, monkeypatch, moment
):
    """The kill falls while a file has half its bytes, under its temporary name."""
    part = {"shard": "000002.safetensors", "record": "000001.json", "manifest": "manifest.json"}[moment]
    rename = os.replace

    def die(source, aim):
        if str(aim).endswith(part):
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, aim)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        process = start(settings, target, POINT, tmp_path)
        process.join()
    assert process.exitcode == -signal.SIGKILL and any(".tmp" in name for name in content(tmp_path))
    (tmp_path / "train" / ".tmpX1y2Z3").write_bytes(b"safetensors' own")
    extract(settings, target, POINT, tmp_path)
    assert different(tmp_path, whole) == []


def test_only_what_is_missing_is_read_again(whole, target, settings, tmp_path, monkeypatch):
    extract(settings, target, POINT, tmp_path)
    run, rows, write, chunks = extraction.vectors_at, [], extraction._write, []
    monkeypatch.setattr(extraction, "vectors_at", lambda view, ids, *rest: rows.extend(ids) or run(view, ids, *rest))
    monkeypatch.setattr(extraction, "_write", lambda to, work, new: chunks.append(work) or write(to, work, new))
    extract(settings, target, POINT, tmp_path)
    assert rows == chunks == []
    shard = tmp_path / "train" / "000003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    (tmp_path / "chunks" / "000007.json").unlink()
    extract(settings, target, POINT, tmp_path)
    assert [work.chunk for work in chunks] == [3, 7] and rows == [ids for work in chunks for ids in work.ids]
    assert different(tmp_path, whole) == []


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(whole, target, settings, tmp_path):
    (tmp_path / "store.json").write_bytes((whole / "store.json").read_bytes())
    with limited_file_size(), pytest.raises(StorageError, match="free space"):
        extract(settings, target, POINT, tmp_path)
    extract(settings, target, POINT, tmp_path)
    assert different(tmp_path, whole) == []


def test_another_batch_size_gives_the_same_vectors_to_rounding_error(whole, target, settings, tmp_path):
    extract(settings, target, POINT, tmp_path, max_tokens_per_batch=50)
    torch.testing.assert_close(Store.open(tmp_path).vectors[:], Store.open(whole).vectors[:], atol=2e-5, rtol=1e-5)


def test_vectors_are_stored_in_the_targets_dtype(target, settings, tmp_path):
    manifest = extract(settings, target, POINT, tmp_path, dtype="bfloat16")
    assert manifest is not None and manifest.dtype == "bfloat16"
    store = Store.open(tmp_path)
    assert next(store.by_shard(torch.tensor([0])))[0].vectors.dtype == torch.bfloat16
    assert store.vectors[:].bfloat16().float().equal(store.vectors[:])


@pytest.mark.parametrize(("began", "first", "then"), [("bfloat16", "AMX", None), ("float32", None, "AMX")])
def test_a_store_of_dtype_auto_is_read_in_one_type_on_any_machine(
    target, settings, tmp_path, monkeypatch, began, first, then
):
    for process, by in enumerate((first, then)):
        monkeypatch.setattr(load, "_cpu_bfloat16", lambda by=by: by)
        manifest = extract(settings, target, POINT, tmp_path, dtype="auto", process=process, processes=2, device="cpu")
    assert manifest is not None and manifest.dtype == began


def test_what_does_not_fit_is_refused_before_anything_is_written(target, settings, tmp_path, whole):
    with pytest.raises(PointError, match=r"resid_post.9"):
        extract(settings, target, "resid_post.9", tmp_path)
    with pytest.raises(ContextLengthError, match="max_tokens of the corpus to 64"):
        extract(replace(settings, max_tokens=65), target, POINT, tmp_path)
    with pytest.raises(NLAError, match="no/such"):
        extract(settings, tmp_path / "no" / "such", POINT, tmp_path)
    assert not list(tmp_path.iterdir())
    for other in ({"seed": 1}, {"dtype": "bfloat16"}):
        with pytest.raises(StoreError, match="other settings"):
            extract(settings, target, POINT, whole, **other)
    with pytest.raises(StoreError, match=r"settings.n_positions: 3 there, 4 now"):
        extract(replace(settings, n_positions=4), target, POINT, whole)


def test_a_corpus_that_changed_after_the_kill_is_refused(target, settings, tmp_path, corpus):
    copy = tmp_path / "c.jsonl"
    copy.write_bytes(corpus.read_bytes())
    settings = replace(settings, source=str(copy))
    extract(settings, target, POINT, tmp_path / "store", process=0, processes=2)
    copy.write_text(copy.read_text().replace("cat", "dog"))
    with pytest.raises(StoreError, match="corpus_files"):
        extract(settings, target, POINT, tmp_path / "store")


@pytest.fixture
def hub(corpus, monkeypatch):
    """A dataset on the hub; ``hub.main`` is the commit of its main branch, and what was loaded stands in ``loaded``."""
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    found = SimpleNamespace(main="aaa", loaded=[])

    def load(*_, revision, **__):
        found.loaded.append(revision)
        return datasets.Dataset.from_dict({"text": [f"{text} {text}" if revision == "bbb" else text for text in texts]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(corpora, "hub_commit", lambda settings: settings.revision or found.main)
    return found


def test_a_dataset_whose_main_branch_moves_after_the_kill_is_not_mixed(hub, target, settings, tmp_path):
    settings = replace(settings, source="some/data")
    extract(settings, target, POINT, tmp_path / "whole")
    extract(settings, target, POINT, tmp_path / "store", process=0, processes=2)
    hub.main = "bbb"
    extract(settings, target, POINT, tmp_path / "store")
    assert hub.loaded == ["aaa"] * 3 and different(tmp_path / "store", tmp_path / "whole") == []
    with pytest.raises(StoreError, match="revision"):
        extract(replace(settings, revision="bbb"), target, POINT, tmp_path / "store")
    (tmp_path / "new").mkdir()
    extract(settings, target, POINT, tmp_path / "new")
    assert hub.loaded[-1] == "bbb"


def test_a_dataset_that_was_begun_without_the_hub_is_not_continued_at_another_commit(hub, target, settings, tmp_path):
    settings, hub.main = replace(settings, source="some/data"), None
    extract(settings, target, POINT, tmp_path, process=0, processes=2)
    hub.main = "bbb"
    with pytest.raises(StoreError, match=r"corpus_files\.commit: None there, 'bbb' now"):
        extract(settings, target, POINT, tmp_path)


def test_several_documents_are_needed(target, tmp_path):
    (tmp_path / "one.txt").write_text("the cat sat on a mat and a dog ran")
    with pytest.raises(StoreError, match="kind = lines"):
        extract(
            CorpusSettings(str(tmp_path / "one.txt"), first_position=2, max_tokens=64), target, POINT, tmp_path / "s"
        )
