"""A recipe for a real target: from a corpus on disk to a scored pair, on a random model in the hub's format."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from nla import NLA
from nla.errors import (
    ArgumentError,
    ConfigError,
    ContextLengthError,
    CorpusError,
    EndpointError,
    PointError,
    RecipeError,
)
from nla.models.lora import ADAPTER_WEIGHTS
from nla.organisms import target_folder
from nla.pair.card import CARD_FILE
from nla.pair.folder import MANIFEST, METRICS_FILE
from nla.storage.files import read_json
from nla.storage.hashes import sha256
from nla.store.reader import Store
from nla.text.tokens import load_tokenizer
from nla.train import run
from nla.train.describe.prompt import quote
from nla.train.pair_config import Prompts, place_marker
from nla.train.recipe import load_recipe
from nla.train.training_data import draw_rows, load_described, save_described
from tests.helpers.shell import in_two_processes
from tests.helpers.tiny import load_benchmark

pytestmark = pytest.mark.slow
benchmark = load_benchmark("recipe")
SMALL = {
    "corpus": {"n_positions": 3, "first_position": 5, "max_tokens": 60, "documents_per_chunk": 32},
    "texts": {"n_train": 40, "n_scored": 20},
    "pair": {"rank": 2, "max_new_tokens": 6},
    "warmstart": {"encoder_steps": 3, "decoder_steps": 3, "batch_size": 4, "save_every": 1},
    "joint": {
        "steps": 2,
        "prompts_per_step": 4,
        "group_size": 2,
        "decoder_mini_batches": 2,
        "eval_every": 2,
        "save_every": 1,
    },
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target and a corpus."""
    folder = tmp_path_factory.mktemp("work")
    benchmark.make_target(folder / "target", benchmark.make_corpus(folder / "corpus.jsonl", 96))
    return folder


def small(work: Path, out: Path) -> Path:
    """A recipe whose every stage is small."""
    content = benchmark.recipe(work, "run") | {"out": str(out)}
    for section, values in SMALL.items():
        content[section] = content[section] | values
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def tiny(work: Path, tmp_path: Path) -> Path:
    return small(work, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from nothing to a scored pair."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert list(run.run_recipe(small(work, out))) == ["extract", "describe", "warmstart", "joint"]
    return out


def trained(out: Path) -> dict[str, str]:
    return {name: sha256(out / "joint" / "pair" / name) for name in MANIFEST}


def test_the_pair_of_a_corpus_loads_and_its_card_has_its_score(whole):
    pair = NLA.from_pretrained(whole / "joint" / "pair")
    assert pair.config.injection.marker == "<|reserved_0|>"
    assert len(pair.explain(pair.read("Anna found a lamp near the harbour.", positions="last"), samples=1)) == 1
    metrics = read_json(whole / "joint" / "pair" / METRICS_FILE)
    assert metrics["score"]["n"] == 20 and set(metrics["score"]["baselines"]) >= {"empty", "shuffled"}
    card = (whole / "joint" / "pair" / CARD_FILE).read_text()
    assert f"{metrics['score']['fve']['value']:.3f}" in card and "corpus.jsonl" in card


def test_a_second_run_skips_every_stage_and_more_texts_rerun_all_but_the_reading(whole, work):
    path = whole.with_suffix(".yaml")
    assert all(stage["skipped"] for stage in run.run_recipe(path).values())
    again = run.run_recipe(path, overrides="texts.n_train=41", dry_run=True)
    assert again["extract"]["skipped"] and all(
        again[stage]["would_run"] for stage in ("describe", "warmstart", "joint")
    )
    assert again["joint"]["rollouts"] == 16


def test_another_corpus_under_the_same_name_is_read_anew(tiny, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    benchmark.make_corpus(corpus, 40)
    override = [f"corpus.source={corpus}"]
    run.run_recipe(tiny, overrides=override, until="extract")
    with corpus.open("a") as file:
        file.write(json.dumps({"text": "One more note about Omar, who heard a song near school in 1931."}) + "\n")
    assert "would_run" in run.run_recipe(tiny, overrides=override, until="extract", dry_run=True)["extract"]
    assert run.run_recipe(tiny, overrides=override, until="extract")["extract"]["seen"] == 41


def test_only_described_rows_have_texts_and_they_are_the_visible_words(whole):
    store = Store.open(whole / "extract")
    told = load_described(whole / "describe" / "train.jsonl", len(store))
    assert len(told.rows) == 40 < len(store)
    assert told.texts == [quote(prefix) for prefix in store.prefixes(told.rows)]


def test_a_run_killed_at_random_moments_ends_as_a_whole_one(work, whole, tmp_path, shell):
    path, rng = small(work, tmp_path / "run"), random.Random(0)
    for reached in ("extract/stage.json", "warmstart/encoder/checkpoint-*", "joint/run/checkpoint-*"):
        run_under_way = shell.start(["python", "-m", "nla.train", str(path), "--json"], tmp_path, tmp_path / "log")
        while not list((tmp_path / "run").glob(reached)) and run_under_way.ended() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        assert run_under_way.kill() == -signal.SIGKILL, f"nothing was under way after {reached}"
    run.run_recipe(path)
    assert trained(tmp_path / "run") == trained(whole)


def test_a_recipe_in_two_processes_reads_the_same_rows_and_learns_as_one(work, whole, tmp_path, shell):
    path = small(work, tmp_path / "run")
    done = shell.run(in_two_processes(f"-m nla.train {path}"), tmp_path)
    assert done.code == 0, done.stderr[-3000:]
    assert done.stdout.count("joint.seconds") == 1, "one process speaks for both"
    for split in ("train", "eval"):
        ours, theirs = (Store.open(out / "extract", split) for out in (tmp_path / "run", whole))
        assert torch.equal(ours.vectors[:], theirs.vectors[:])
    for part in ("encoder", "decoder"):
        ours, theirs = (
            load_file(out / "warmstart" / "pair" / part / ADAPTER_WEIGHTS) for out in (tmp_path / "run", whole)
        )
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        (["point=resid_post.4"], PointError, "resid_post.0 to resid_post.3"),
        (["corpus.source=./no-such.jsonl"], CorpusError, "no-such"),
        (["corpus.text_column=body"], CorpusError, "text"),
        (["world=couplets"], RecipeError, "documents come from one of them"),
        (["corpus=null"], RecipeError, "documents come from one of them"),
        (["describer.describer=oracle"], RecipeError, "anthropic"),
        (["describe.notice=0.5"], RecipeError, "describe"),
        (["dtype=int4"], RecipeError, "bfloat16"),
        (["quantization=2bit"], RecipeError, "4bit"),
        (["pair.encoder_prompt=Explain."], RecipeError, "{marker} once"),
        (["texts.n_train=0"], RecipeError, "n_train"),
        (["describer.key_variable=[sk-live-1]"], RecipeError, r"key_variable = a list(?!.*sk-live)"),
        (["pair.max_new_tokens=600"], ContextLengthError, "512"),
        (["pair.marker=two words"], ConfigError, "marker"),
        (["warmstart.rows_per_backward=3"], ArgumentError, "batch_size"),
        (["describer.describer=openai", "describer.model=m"], EndpointError, "OPENAI_API_KEY"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(tiny, tmp_path, monkeypatch, overrides, error, says):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(error, match=says):
        run.run_recipe(tiny, overrides=overrides)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*/stage.json"))


def test_a_target_without_a_chat_template_is_refused(work, tiny, tmp_path):
    shutil.copytree(work / "target", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="chat template"):
        run.run_recipe(tiny, overrides=[f"target={tmp_path / 'base'}"])
    assert not (tmp_path / "run").exists()


def test_the_marker_is_one_token_that_stands_once(work):
    tokenizer = load_tokenizer(work / "target")
    marker, number, left, right = place_marker(tokenizer, Prompts("Say: {marker}.", "{explanation}"))
    assert (marker, number) == ("<|reserved_0|>", tokenizer.convert_tokens_to_ids("<|reserved_0|>"))
    assert tokenizer.decode([left]) == ":" or tokenizer.decode([left]).endswith(" ")
    assert tokenizer.decode([right]) == "."
    for wrong in ("two words", "<|end|>", "Say"):
        with pytest.raises(ConfigError, match="marker"):
            place_marker(tokenizer, Prompts("Say: {marker}. Say.", "{explanation}", wrong))


def test_rows_are_drawn_by_their_key_and_rise():
    rows = draw_rows(100, 10, "0/train")
    assert len(rows) == 10 and bool((rows.diff() > 0).all())
    assert torch.equal(rows, draw_rows(100, 10, "0/train")) and not torch.equal(rows, draw_rows(100, 10, "1/train"))
    assert torch.equal(draw_rows(5, 10, "x"), torch.arange(5))


def test_texts_of_failed_rows_are_left_out_and_none_at_all_is_an_error(tmp_path):
    path = tmp_path / "train.jsonl"
    assert save_described(path, torch.tensor([2, 5, 9]), ["a.", None, "b."]) == 2
    assert load_described(path, 10).rows.tolist() == [2, 9]
    with pytest.raises(Exception, match="rising rows below 9"):
        load_described(path, 9)
    with pytest.raises(Exception, match="no text"):
        save_described(path, torch.tensor([2]), [None])


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-7b", "qwen3-8b", "gemma-3-12b", "llama-3.3-70b"])
def test_a_shipped_recipe_shares_its_steps_over_the_devices_it_names(name):
    recipe = load_recipe(name)
    devices = recipe.hardware.devices
    assert recipe.joint.prompts_per_step % devices == 0
    assert recipe.joint.prompts_per_step // devices >= recipe.joint.decoder_mini_batches
    assert recipe.warmstart.batch_size % (devices * (recipe.warmstart.rows_per_backward or 1)) == 0
    assert (recipe.joint.rows // devices) % (recipe.joint.rows_per_backward or 1) == 0
    assert target_folder(recipe.target) == recipe.target
