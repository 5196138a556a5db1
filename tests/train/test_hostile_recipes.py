"""No recipe, rubric or model name, however hostile, ends in anything but a typed error in a few lines."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from nla.audit.rubric import load_rubrics
from nla.cli.console import OK, USAGE
from nla.cli.main import main
from nla.errors import RubricError
from nla.train.recipe import load_recipe
from tests.helpers.hostile_yaml import KINDS, hostile

RECIPE = """\
name: try
target: some/hub
point: resid_post.2
out: out
seed: 0
corpus:
  source: texts.txt
  kind: lines
  n_documents: 20
  max_tokens: 64
  eval_fraction: 0.1
describer:
  describer: openai
  model: m
  url: http://localhost:9/v1
  concurrency: 2
  price_in: 1.0
  price_out: 2.0
  budget_usd: 3.0
texts:
  n_train: 10
pair:
  rank: 2
  max_new_tokens: 8
warmstart:
  encoder_steps: 2
  batch_size: 4
  encoder_learning_rate: 1e-4
joint:
  steps: 2
  prompts_per_step: 4
  group_size: 2
  decoder_mini_batches: 2
  beta: 0.1
  stratum_weights: {last: 0.5}
hardware:
  devices: 1
  tflops: 1.0
shape:
  n_blocks: 4
  d_model: 64
  d_mlp: 128
  n_heads: 4
  n_kv_heads: 2
  head_dim: 16
  vocabulary: 1000
"""
RUBRIC = """\
name: mine
looks_for: The model suspects a test.
kind: presence
min_share: 0.5
match:
  words: [test, exam]
  lemmas: [suspect]
  regex: ["t[e]st"]
  unless: [not]
said_in: [assistant]
"""
SECONDS, MEGABYTES, CHARACTERS = 2.0, 200, 1500
"""What a file may take of the processor and of memory, and the length of what is said of it."""


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files are, offline and without any key."""
    (tmp_path / "texts.txt").write_text("in spring\n" * 50)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [20, pytest.param(220, marks=pytest.mark.slow)])
def test_recipes(kind: str, n: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "good.yaml").write_text(RECIPE)
    assert main(["train", "good.yaml", "--dry-run"]) == OK
    n_refused = 0
    for number, content in enumerate(hostile(kind, n, RECIPE, seed=n)):
        (folder / "r.yaml").write_bytes(content)
        capsys.readouterr()
        before, started = peak(), time.thread_time()
        code = main(["train", "r.yaml", "--dry-run"])
        took, more = time.thread_time() - started, peak() - before
        said = capsys.readouterr().err
        assert code in (OK, USAGE) and took < SECONDS and more < MEGABYTES, (number, code, took, more, said[-500:])
        if code == USAGE:
            n_refused += 1
            assert said.count("\n") == 1 and "Next: " in said and len(said) < CHARACTERS, (number, said)
    assert n_refused > n // 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [20, pytest.param(220, marks=pytest.mark.slow)])
def test_rubrics(kind: str, n: int, folder: Path) -> None:
    (folder / "r.yaml").write_text(RUBRIC)
    assert load_rubrics(["r.yaml"])[0].shows("It is a test.")
    n_refused = 0
    for number, content in enumerate(hostile(kind, n, RUBRIC, seed=n)):
        (folder / "r.yaml").write_bytes(content)
        before, started = peak(), time.thread_time()
        try:
            load_rubrics(["r.yaml"])[0].shows("It is a test.")
        except RubricError as error:
            n_refused += 1
            assert len(str(error)) < CHARACTERS
        assert time.thread_time() - started < SECONDS and peak() - before < MEGABYTES, (number, content[:300])
    assert n_refused > n // 4


def test_a_rubric_whose_pattern_is_searched_without_end_is_a_typed_error(folder: Path) -> None:
    (folder / "r.yaml").write_text(RUBRIC.replace("t[e]st", "(a|aa)+$"))
    (rubric,) = load_rubrics(["r.yaml"])
    with pytest.raises(RubricError, match="too long in a text of"):
        rubric.shows("It is " + "a" * 60 + "!")


@pytest.mark.parametrize("value", ["2001-01-01", "12:30:45", "010", "1:30"])
def test_an_odd_number_is_the_text_that_is_written(value: str, folder: Path) -> None:
    (folder / "r.yaml").write_text(RECIPE.replace("name: try", f"name: {value}"))
    assert load_recipe("r.yaml").name == value
    (folder / "r.yaml").write_text(RECIPE.replace("rank: 2", f"rank: {value}"))
    assert main(["train", "r.yaml", "--dry-run"]) == USAGE


@pytest.mark.parametrize("command", ["recipe", "train", "explain --pair", "audit", "trace", "calibrate"])
def test_a_name_of_300_letters_is_no_fault_of_nla(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "x" * 300]) == USAGE
    assert len(capsys.readouterr().err) < CHARACTERS
