"""A target writes its own documents: as transformers samples, in any batch, and the same after a kill."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from nla.errors import ArgumentError, ContextLengthError, CorpusError, RecipeError
from nla.models import load
from nla.pair.folder import METRICS_FILE
from nla.storage.files import read_json
from nla.store.reader import Store
from nla.text.prompts import load_prompts
from nla.train import run
from nla.train.data import sample
from nla.train.data.corpus import CorpusSettings, open_corpus
from nla.train.data.requests import draw_requests
from nla.train.data.sample import Nucleus, SampleSettings, _draws, count_documents, sample_corpus
from nla.train.recipe import load_recipe
from nla.train.run import run_recipe
from tests.helpers.shell import in_two_processes
from tests.helpers.tiny import load_benchmark

benchmark = load_benchmark("recipe")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "target"
    benchmark.make_target(
        folder, [json.dumps(request) for request in draw_requests(load_prompts(None), 300, 0, 0.1, "")]
    )
    return folder


@pytest.fixture(scope="module")
def loaded(target: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_bytes().split(b"\n")[:-1]]


def small(n: int = 12) -> list[Any]:
    return draw_requests(load_prompts(None), n, 0, 0.3, "nla")


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 5.0])
@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.95), (0.7, 0.5), (1.3, 1.0), (1.0, 1e-6)])
def test_the_nucleus_is_that_of_transformers(spread: float, temperature: float, share: float) -> None:
    logits = torch.randn(6, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float() * spread
    logits += torch.linspace(0, 1e-2, 2000).roll(700)  # no two alike, where the order would be open
    logits[::2] *= 0.1  # flat rows and steep ones
    both = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(share)])
    expected = both(torch.zeros(6, 1, dtype=torch.int64), logits)
    ours = Nucleus(temperature, share)(torch.zeros(6, 1, dtype=torch.int64), logits)
    assert torch.equal(ours.isfinite(), expected.isfinite()) or spread == 0.0
    assert int((ours.isfinite().sum(1) - expected.isfinite().sum(1)).abs().max()) <= 1, "within rounding"
    shared = ours.isfinite() & expected.isfinite()
    torch.testing.assert_close(ours[shared], expected[shared])


def test_tokens_as_likely_as_the_last_of_the_nucleus_are_all_in_it() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 1.0, 1.0, 0.5]])
    left = Nucleus(1.0, 0.75)(torch.zeros(1, 1, dtype=torch.int64), logits)
    assert left.isfinite().tolist() == [[False, True, True, True, True, False]]


def test_answers_are_drawn_token_by_token_from_the_targets_own_distribution(loaded, tmp_path) -> None:
    """The oracle: whole forward passes, transformers' warpers and a search by hand, a request at a time."""
    model, tokenizer = loaded
    requests, settings = small(6), SampleSettings(max_new_tokens=12, temperature=0.8, top_p=0.9, batch_size=4)
    sample_corpus(model, tokenizer, requests, settings, 5, tmp_path, 100)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9)])
    documents = written(tmp_path)
    for request in requests:
        asked = [{"role": "system", "content": request.system}, {"role": "user", "content": request.user}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids, answer = ids["input_ids"], []
        for draw in _draws(5, request.number, 12).tolist():
            with torch.no_grad():
                logits = model(ids).logits[:, -1]
            if not answer:
                logits[:, tokenizer.eos_token_id] = -torch.inf
            heights = warpers(ids, logits).softmax(-1).double().cumsum(-1)[0]
            token = next(n for n, height in enumerate(heights.tolist()) if height > draw * float(heights[-1]))
            if token == tokenizer.eos_token_id:
                break
            answer.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        text = tokenizer.decode(answer, skip_special_tokens=True)
        mine = [document for document in documents if document["attributes"]["request"] == request.number]
        for document, reading in zip(mine, request.readings, strict=True):
            assert document["messages"] == [
                {"role": "system", "content": reading.system},
                {"role": "user", "content": request.user},
                {"role": "assistant", "content": text if len(answer) < 12 else text.rstrip("\ufffd")},
            ]
            assert document["attributes"] == {**reading.attributes, "ended": len(answer) < 12}
            assert document["split"] == request.split
    assert [document["id"] for document in documents] == list(range(6))


def test_neither_batches_nor_processes_nor_chunks_change_what_is_written(loaded, tmp_path) -> None:
    model, tokenizer = loaded
    for name, size, shares in (("one", 1, 1), ("many", 64, 1), ("two", 3, 2)):
        for process in range(shares):
            settings = SampleSettings(max_new_tokens=6, batch_size=size)
            sample_corpus(model, tokenizer, small(), settings, 0, tmp_path / name, 4, process, shares)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert len(files) == 3 and sum(data.count(b"\n") for data in files.values()) == 12
    for name in ("many", "two"):
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == files
    assert count_documents(tmp_path / "one")["documents"] == 12
    sample_corpus(model, tokenizer, small(), SampleSettings(max_new_tokens=6), 0, tmp_path / "whole", 100)
    assert written(tmp_path / "whole") == written(tmp_path / "one")
    sample_corpus(model, tokenizer, small(), SampleSettings(max_new_tokens=6), 1, tmp_path / "seed", 4)
    assert (tmp_path / "seed" / "000000.jsonl").read_bytes() != files["000000.jsonl"]


def test_an_answer_has_a_token_also_where_the_target_would_say_nothing(loaded, tmp_path, monkeypatch) -> None:
    model, tokenizer = loaded
    word = tokenizer.convert_tokens_to_ids("a")
    monkeypatch.setattr(sample, "ends_of", lambda *_: [token for token in range(len(tokenizer)) if token != word])
    sample_corpus(model, tokenizer, small(4), SampleSettings(max_new_tokens=5), 0, tmp_path, 100)
    answers = [document["messages"][-1]["content"] for document in written(tmp_path)]
    assert answers == ["a"] * 4 and all(document["attributes"]["ended"] for document in written(tmp_path))


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\x1e", "\r", "\n"])
def test_an_answer_with_any_end_of_a_line_is_counted_and_read_as_it_is(loaded, tmp_path, monkeypatch, end) -> None:
    monkeypatch.setattr(sample, "_answers", lambda model, asked, chunk, *_: [(f"one{end}two", True, 3) for _ in chunk])
    sample_corpus(*loaded, small(4), SampleSettings(), 0, tmp_path, 100)
    assert count_documents(tmp_path)["documents"] == 4 == count_documents(tmp_path)["ended"]
    settings = CorpusSettings(str(tmp_path))
    chunks = open_corpus(settings).chunks(settings, lambda chunk: True)
    read = [entry.parse() for _, chunk in chunks for entry in chunk or ()]
    answers = [chat.messages[-1].content for chat in read if not isinstance(chat, str)]
    assert answers == [f"one{end}two"] * 4


@pytest.mark.parametrize("way", ["refuses", "drops"])
def test_a_template_without_system_messages_has_the_instruction_in_the_users(loaded, tmp_path, way) -> None:
    model, tokenizer = loaded[0], AutoTokenizer.from_pretrained(loaded[1].name_or_path)
    check = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}"
    plain = tokenizer.chat_template
    tokenizer.chat_template = {
        "refuses": check + plain,
        "drops": plain.replace("in messages", "in messages if m['role'] != 'system'"),
    }[way]
    sample_corpus(model, tokenizer, small(4), SampleSettings(max_new_tokens=2), 0, tmp_path, 100)
    readings = [(request, reading) for request in small(4) for reading in request.readings]
    for document, (request, reading) in zip(written(tmp_path), readings, strict=True):
        assert document["messages"][0] == {"role": "user", "content": f"{reading.system}\n\n{request.user}"}


def test_requests_beyond_the_context_are_refused(loaded, tmp_path) -> None:
    with pytest.raises(ContextLengthError, match="max_new_tokens"):
        sample_corpus(*loaded, small(4), SampleSettings(max_new_tokens=510), 0, tmp_path, 100)
    assert not list(tmp_path.iterdir())


# The stage of a recipe


def recipe(target: Path, out: Path, **corpus: Any) -> Path:
    settings = {"source": "self", "n_documents": 40, "documents_per_chunk": 8, "eval_fraction": 0.3}
    content = {
        "name": "own",
        "target": str(target),
        "point": "resid_post.2",
        "out": str(out),
        "corpus": settings | {"positions": "kinds", "n_positions": 6, "max_tokens": 500} | corpus,
        "sample": {"max_new_tokens": 24, "batch_size": 4},
        "describer": {"describer": "quote"},
        "texts": {"n_train": 20},
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def whole(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to the end of its extraction, with a folder of texts mixed in."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "texts").mkdir()
    for name in ("a", "b"):
        (folder / "texts" / f"{name}.txt").write_text(f"Text {name} of the folder. " * 12)
    summary = run_recipe(recipe(target, folder / "run", mix=[str(folder / "texts")]), until="extract")
    assert summary["sample"]["documents"] == 40 == summary["sample"]["train"] + summary["sample"]["eval"]
    assert summary["sample"]["last_run"]["tokens_per_s"] > 0 and summary["extract"]["seen"] == 42
    return folder / "run"


def test_every_row_of_the_store_knows_the_attributes_of_its_document(whole: Path) -> None:
    documents = {document["id"]: document for document in written(whole / "sample")}
    mixed = 0
    for split in ("train", "eval"):
        store = Store.open(whole / "extract", split)
        rows, numbers = store.activations(), store.documents().tolist()
        for number, known, at, span in zip(
            numbers, store.attributes(), rows.document.tolist(), rows.spans, strict=True
        ):
            if number >= 40:
                mixed += known == {} and rows.texts[at].startswith("Text ")
                continue
            assert known == documents[number]["attributes"] and split == documents[number]["split"]
            assert documents[number]["messages"][-1]["content"].strip() in rows.texts[at]
            assert rows.texts[at][span.start :].startswith(span.text)
        assert {"answer start", "template token", "prompt content word"} <= set(store.strata())
    assert mixed == 12, "both texts follow the documents of the target"


@pytest.mark.parametrize("gone", ["000000.jsonl", "000002.jsonl", "000004.jsonl"])
def test_any_chunk_that_is_gone_from_a_finished_stage_is_written_again(target, whole, tmp_path, gone) -> None:
    shutil.copytree(whole, tmp_path / "run")
    path, place = (
        recipe(target, tmp_path / "run", mix=[str(whole.parent / "texts")]),
        tmp_path / "run" / "sample" / gone,
    )
    place.unlink()
    assert "would_run" in run_recipe(path, until="extract", dry_run=True)["sample"]
    summary = run_recipe(path, until="extract")
    assert summary["sample"]["documents"] == 40 and summary["sample"]["chunks"] == 5
    assert place.read_bytes() == (whole / "sample" / gone).read_bytes() and summary["extract"]["skipped"]


@pytest.mark.slow
def test_a_run_killed_while_it_writes_goes_on_to_the_same_bytes(target, whole, tmp_path, shell) -> None:
    path = recipe(target, tmp_path / "run", mix=[str(whole.parent / "texts")])
    for reached in ("000001.jsonl", "000003.jsonl"):
        command = ["nla", "train", str(path), "--until", "extract"]
        under_way = shell.start(command, tmp_path, tmp_path / "log")
        while not (tmp_path / "run" / "sample" / reached).exists() and under_way.ended() is None:
            time.sleep(0.005)
        assert under_way.kill() == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
        assert not (tmp_path / "run" / "sample" / "stage.json").exists(), "killed too late to show anything"
    done = shell.run(f"nla train {path} --until extract --json", tmp_path)
    assert done.code == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout)
    assert (
        0
        < summary["sample"]["last_run"]["answers"]
        < len({one["attributes"]["request"] for one in written(whole / "sample")})
    )
    assert "tokens/s" in done.stderr and " answers/s" in done.stderr  # a line now and then, without a terminal too
    for part in ("sample/*.jsonl", "extract/*/*.safetensors"):
        files = {str(path.relative_to(whole)): path.read_bytes() for path in whole.glob(part)}
        assert files and files == {
            str(path.relative_to(tmp_path / "run")): path.read_bytes() for path in (tmp_path / "run").glob(part)
        }
    again = json.loads(shell.run(f"nla train {path} --until extract --json", tmp_path).stdout)
    assert again["sample"]["skipped"] and again["extract"]["skipped"]


@pytest.mark.parametrize("began", ["bfloat16", "float32"])
def test_a_run_of_dtype_auto_keeps_the_type_that_it_began_with_on_another_machine(
    target, tmp_path, monkeypatch, caplog, began
) -> None:
    fast = {"bfloat16": "AMX", "float32": None}
    path = recipe(target, tmp_path / "run", n_documents=16)
    chosen = {"overrides": ["dtype=auto", "sample.max_new_tokens=4"], "until": "extract"}
    monkeypatch.setattr(load, "_cpu_bfloat16", lambda: fast[began])
    monkeypatch.setattr(run, "run_stage", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # as soon as the first stage has begun
        run_recipe(path, **chosen)
    monkeypatch.undo()
    monkeypatch.setattr(load, "_cpu_bfloat16", lambda: next(by for dtype, by in fast.items() if dtype != began))
    caplog.clear()
    run_recipe(path, **chosen)
    assert Store.open(tmp_path / "run" / "extract").manifest.dtype == began
    assert [text for text in caplog.messages if "began in" in text] == [
        f"The run in {tmp_path / 'run'} began in {began}, and goes on in it."
    ]
    assert all(stage["skipped"] for stage in run_recipe(path, **chosen).values())
    assert not list((tmp_path / "run").glob("*.old-*"))


@pytest.mark.slow
def test_two_processes_write_and_read_what_one_does(target, whole, tmp_path, shell) -> None:
    path = recipe(target, tmp_path / "run", mix=[str(whole.parent / "texts")])
    done = shell.run(in_two_processes(f"-m nla.train {path} --until extract --json"), tmp_path)
    assert done.code == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout)["sample"]
    requests = {one["attributes"]["request"] for one in written(whole / "sample")}
    assert summary["documents"] == 40 and summary["last_run"]["answers"] == len(requests)
    for one in (whole / "sample").glob("*.jsonl"):
        assert (tmp_path / "run" / "sample" / one.name).read_bytes() == one.read_bytes()
    for split in ("train", "eval"):
        ours, theirs = (Store.open(out / "extract", split) for out in (tmp_path / "run", whole))
        assert ours.attributes() == theirs.attributes() and ours.prefixes() == theirs.prefixes()


@pytest.mark.slow
def test_a_pair_is_trained_on_what_the_target_wrote(target, tmp_path) -> None:
    path = recipe(target, tmp_path / "run", n_documents=60)
    steps = ["warmstart.encoder_steps=2", "warmstart.decoder_steps=2", "warmstart.batch_size=4"]
    steps += ["joint.steps=1", "joint.prompts_per_step=4", "joint.group_size=2", "joint.decoder_mini_batches=2"]
    steps += ["joint.stratum_weights={answer start: 0.5}", "texts.n_scored=10", "pair.rank=2", "pair.max_new_tokens=6"]
    summary = run_recipe(path, overrides=steps)
    assert list(summary) == ["sample", "extract", "describe", "warmstart", "joint"]
    metrics = read_json(tmp_path / "run" / "joint" / "pair" / METRICS_FILE)
    n = Store.open(tmp_path / "run" / "extract").manifest.n_documents
    assert metrics["data"] == f"self: {n['train']} documents; scored on {n['eval']} others" and sum(n.values()) == 60


def test_a_plan_says_what_writing_takes(target, tmp_path) -> None:
    plan = run_recipe(recipe(target, tmp_path / "run"), dry_run=True)
    assert list(plan) == ["sample", "extract", "describe", "warmstart", "joint"]
    n = len(draw_requests(load_prompts(None), 40, 0, 0.3, "nla"))
    assert plan["sample"]["answers"] == n < 40 and plan["sample"]["tokens"] == n * 24
    assert plan["sample"]["hours"] > 0 and plan["sample"]["fits"] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["corpus.n_documents=null"], "n_documents"),
        (["corpus.kind=text"], "corpus.kind"),
        (["corpus.text_column=body"], "corpus.text_column"),
        (["corpus.prompts=klingon"], "english"),
        (["corpus.source=some/data", "corpus.prompts=english"], "corpus.prompts"),
        (["corpus.source=some/data"], "no such section"),
        (["sample.top_p=0"], "above 0"),
        (["corpus.mix=[no/such.txt]"], "no such file"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_runs(target, tmp_path, changes, says) -> None:
    with pytest.raises((RecipeError, CorpusError), match=says):
        run_recipe(recipe(target, tmp_path / "run"), overrides=changes)
    assert not (tmp_path / "run").exists()


def test_another_recipe_has_no_such_stage_and_extraction_alone_no_such_corpus(target) -> None:
    assert load_recipe("qwen2.5-0.5b").stages == ["extract", "describe", "warmstart", "joint"]
    with pytest.raises(CorpusError, match="nla train"):
        open_corpus(CorpusSettings("self", n_documents=3))
    with pytest.raises(ArgumentError, match=r"corpus\.prompts"):
        CorpusSettings("some/data", prompts="english")
