"""The commands that make stores and carry pairs and data in and out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nla import NLA
from nla.cli import main
from nla.cli.console import USAGE
from nla.config import DecoderConfig
from nla.errors import RecipeError
from nla.pair import publish
from nla.store.reader import Store
from nla.store.shards import Shard
from tests.helpers.tiny import WORDS, load_benchmark, make_model, make_pair, make_tokenizer


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, a corpus, a store of its activations, and a pair whose head has no bias."""
    folder = tmp_path_factory.mktemp("formats")
    made = load_benchmark("recipe")
    made.make_target(folder / "target", made.make_corpus(folder / "corpus.jsonl", 60))
    assert main.main(["extract", *where(folder), "--out", str(folder / "store"), *FEW]) == 0
    make_model("llama").save_pretrained(folder / "small")
    make_tokenizer().save_pretrained(folder / "small")
    pair = make_pair("llama", target=str(folder / "small"), decoder=DecoderConfig(head_bias=False))
    pair.save_pretrained(folder / "pair")
    return folder


FEW = [
    "--set",
    "max_tokens=100",
    "--set",
    "n_positions=3",
    "--set",
    "first_position=5",
    "--set",
    "documents_per_chunk=16",
]


def where(folder: Path) -> list[str]:
    return [str(folder / "target"), str(folder / "corpus.jsonl"), "--point", "resid_post.2"]


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_extract_makes_a_store_in_shares_that_is_the_one_of_a_single_process(work, tmp_path, capsys):
    for share in ("0/2", "1/2"):
        command = ["extract", *where(work), "--out", str(tmp_path / "store"), *FEW, "--process", share, "--json"]
        assert main.main(command) == 0
        told = said(capsys)
    assert told["finished"] and told["counts"]["seen"] == 60 and told["counts"]["duplicates"] == 10
    for split in ("train", "eval"):
        mine, whole = Store.open(tmp_path / "store", split), Store.open(work / "store", split)
        assert torch.equal(mine.vectors[:], whole.vectors[:])
        assert len(mine) == told["n"][split]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--set", "n_positions=0"], "n_positions"),
        (["--set", "colour=red"], "colour"),
        (["--process", "2"], "0/4"),
        (["--process", "2/2"], "process"),
        (["--dtype", "int4"], "bfloat16"),
        (["--revision", "main", "--set", "source=elsewhere", "--point", "resid_post.9"], "resid_post.3"),
    ],
)
def test_extract_refuses_what_it_cannot_do(work, tmp_path, capsys, more, says):
    assert main.main(["extract", *where(work), "--out", str(tmp_path / "store"), *FEW, *more]) == 2
    assert says in capsys.readouterr().err


def test_a_store_travels_as_parquet_and_back(work, tmp_path, capsys):
    file = tmp_path / "acts.parquet"
    assert main.main(["export", "parquet", str(work / "store"), "--out", str(file), "--json"]) == 0
    n = said(capsys)["n"]
    command = ["import", "parquet", str(file), "--tokenizer", str(work / "target"), "--out", str(tmp_path / "back")]
    assert main.main([*command, "--json"]) == 0
    assert sum(said(capsys)["n"].values()) == n == len(Store.open(work / "store"))
    back = torch.cat([Store.open(tmp_path / "back", split).vectors[:] for split in ("train", "eval")])
    there = Store.open(work / "store").vectors[:]
    assert torch.equal(back.sort(dim=0).values, there.sort(dim=0).values)


def test_a_pair_travels_in_the_references_format_and_back(work, tmp_path, capsys):
    assert main.main(["export", "kitft", str(work / "pair"), "--out", str(tmp_path / "theirs"), "--json"]) == 0
    told = said(capsys)
    command = ["import", "kitft", told["av"], told["ar"], "--out", str(tmp_path / "ours")]
    assert main.main([*command, "--target", str(work / "small"), "--json"]) == 0
    assert said(capsys)["injection"] == "replace"
    before, after = NLA.from_pretrained(work / "pair"), NLA.from_pretrained(tmp_path / "ours")
    texts = ["the cat sat.", "a red dog ran."]
    cosine = torch.cosine_similarity(before.reconstruct(texts), after.reconstruct(texts))
    assert cosine.min() > 1 - 1e-5
    assert torch.equal(after.read("the cat sat.").vectors, before.read("the cat sat.").vectors)


def test_a_head_with_a_bias_is_not_exported_unless_it_is_dropped(work, tmp_path, capsys):
    pair = make_pair("llama", target=str(work / "small"))
    pair.head.bias.data += 0.1
    pair.save_pretrained(tmp_path / "pair")
    assert main.main(["export", "kitft", str(tmp_path / "pair"), "--out", str(tmp_path / "out")]) == 2
    assert "bias" in capsys.readouterr().err


def test_push_publishes_the_folder_as_it_was_asked_for(work, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(publish, "push_folder", lambda *given: asked.append(given) or "https://example.org/commit")
    monkeypatch.setattr(NLA, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    command = ["push", str(work / "pair"), "someone/pair", "--private", "--message", "first", "--json"]
    assert main.main(command) == 0
    assert asked == [(work / "pair", "someone/pair", True, None, "first")]
    assert said(capsys)["commit"].endswith("commit")


def test_extract_reads_in_the_targets_own_type_unless_told(work, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    shutil.copytree(work / "target", tmp_path / "target")
    AutoModelForCausalLM.from_pretrained(work / "target").bfloat16().save_pretrained(tmp_path / "target")
    command = ["extract", str(tmp_path / "target"), *where(work)[1:], *FEW, "--json"]
    for more, dtype in (([], torch.bfloat16), (["--dtype", "float32"], torch.float32)):
        folder = tmp_path / str(dtype)
        assert main.main([*command, "--out", str(folder), *more]) == 0
        name = str(dtype).removeprefix("torch.")
        assert said(capsys)["dtype"] == name == Store.open(folder).manifest.dtype
        assert Shard(folder / Store.open(folder).entries[0].file).vectors.dtype == dtype


def test_a_denominator_comes_from_a_store_of_the_same_target_alone(work, tmp_path, capsys):
    assert main.main(["export", "kitft", str(work / "pair"), "--out", str(tmp_path / "theirs"), "--json"]) == 0
    told = said(capsys)
    command = ["import", "kitft", told["av"], told["ar"], "--target", str(work / "small"), "--json"]
    assert main.main([*command, "--out", str(tmp_path / "no"), "--store", str(work / "store")]) == 2
    assert "another target" in capsys.readouterr().err and not (tmp_path / "no").exists()
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": f"{one} {two} sat."}) for one in WORDS for two in WORDS[:8]))
    store = ["extract", str(work / "small"), str(corpus), "--point", "resid_post.1", "--out", str(tmp_path / "acts")]
    small = ["--set", "max_tokens=20", "--set", "n_positions=2", "--set", "first_position=1"]
    assert main.main([*store, *small, "--set", "eval_fraction=0.2", "--json"]) == 0
    assert main.main([*command, "--out", str(tmp_path / "yes"), "--store", str(tmp_path / "acts")]) == 0
    pair, acts = NLA.from_pretrained(tmp_path / "yes"), Store.open(tmp_path / "acts")
    assert pair.baselines["global"].variance == acts.manifest.variance["global"]
    assert pair.config.activation_norm == acts.manifest.norms["mean"]
    capsys.readouterr()
    assert main.main(["info", str(tmp_path / "yes")]) == 0
    assert "each a whole model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ([], None),
        (["cpu"], "cpu"),
        (["target=cuda:0", "encoder=cuda:1"], {"target": "cuda:0", "encoder": "cuda:1"}),
    ],
)
def test_a_device_is_one_place_or_one_for_each_role(
    given: list[str], place: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def load(_pair: str, **options: object) -> None:
        assert options == {"device": place}
        raise RecipeError("seen", "nothing", "stop")

    monkeypatch.setattr(NLA, "from_pretrained", load)
    argv = [part for each in given for part in ("--device", each)]
    for command in (["explain", "the cat"], ["steer", "the cat", "--replace", "a=b"], ["info"]):
        assert main.main([*command, *argv]) == USAGE
        assert "seen" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["cpu", "cuda"], ["encoder=cpu", "encoder=cuda"], ["encoder=", "target=cpu"]])
def test_a_device_that_is_said_twice_or_not_at_all_is_refused(given: list[str], capsys: pytest.CaptureFixture[str]):
    assert main.main(["info", *[part for each in given for part in ("--device", each)]]) == USAGE
    assert "ROLE=PLACE" in capsys.readouterr().err


def test_the_plan_of_a_recipe_is_a_table(capsys, monkeypatch):
    from nla.train import run

    plan = {"extract": {"skipped": True}, "joint": {"would_run": True, "hours": 2.5, "tokens": 1000, "fits": False}}
    monkeypatch.setattr(run, "run_recipe", lambda *_, **__: plan)
    assert main.main(["train", "qwen2.5-7b", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "1,000" in out and "2.5" in out and "done" in out
