"""The installed `nla`, in processes of their own: it answers at once, completes its commands, and reaches a hub."""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.hub_server import Hub
from tests.helpers.shell import Shell
from tests.helpers.tiny import load_benchmark, make_pair

NLA = Path(sys.executable).parent / "nla"
HELP_S = 0.4


def nla(*words: str, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [NLA, *words], cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def test_help_answers_at_once():
    """Of its own time, which other processes on the machine do not lengthen."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert nla("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < HELP_S


def test_version():
    import importlib.metadata

    done = nla("--version")
    assert (done.returncode, done.stdout) == (0, f"nla {importlib.metadata.version('nla')}\n")


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("nla expl", ["explain"]), ("nla eval rh", ["rhymes"]), ("nla explain --posi", ["--positions"])],
)
def test_the_shell_completes_commands_and_options(typed: str, completed: list[str]):
    n_words = len(typed.split()) - 1
    done = nla(_NLA_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(n_words))
    assert done.stdout.split() == completed


def test_completion_can_be_installed(tmp_path: Path):
    done = nla("--install-completion", "bash", HOME=str(tmp_path), _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert any("_NLA_COMPLETE" in path.read_text() for path in tmp_path.rglob("*nla*") if path.is_file())


def test_wrong_usage_and_bad_input_exit_with_2():
    for words in (
        ["explian"],
        ["explain"],
        ["explain", "--file", "no-such-file.txt"],
        ["extract", "a", "b", "--point", "x", "--out", "y", "--process", "1/1"],
    ):
        done = nla(*words)
        assert done.returncode == 2 and not done.stdout
        assert len(done.stderr.splitlines()) == 1 and "Next: " in done.stderr


@pytest.mark.slow
def test_probe_works_from_the_command_line(shell: Shell, tmp_path: Path):
    """It never did in 0.3: what --words held was overwritten before it arrived."""
    rows = [(season, word) for season in ("winter", "summer") for word in ("ribbon", "candle", "letter", "basket") * 3]
    names = ["Anna", "Emma", "Kate", "Ivy", "Henry", "Frank"] * 4
    lines = [
        f'"In {season} {name} left a red {word} near the rat,",{season}'
        for (season, word), name in zip(rows, names, strict=True)
    ]
    (tmp_path / "poems.csv").write_text("line,season\n" + "\n".join(lines) + "\n")
    words = [
        "probe",
        "poems.csv",
        "--text",
        "line",
        "--label",
        "season",
        "--words",
        "winter=winter",
        "--words",
        "summer=summer",
    ]
    done = shell.run(shlex.join(["nla", *words, "--positions", "/ near/", "--device", "cpu", "--json"]), tmp_path)
    assert done.code == 0, done.stderr
    content = json.loads(done.stdout)
    assert (content["data"], content["positions"], content["n_rows"]) == ("poems.csv", "/ near/", 24)
    assert content["tasks"][0]["classes"] == ["summer", "winter"]


@pytest.mark.slow
def test_a_recipe_is_printed_that_the_plan_of_its_training_takes(shell: Shell, tmp_path: Path):
    recipe = load_benchmark("recipe")
    recipe.make_target(tmp_path / "target", recipe.make_corpus(tmp_path / "corpus.jsonl", 60))
    made = shell.run("nla recipe target", tmp_path)
    assert made.code == 0, made.stderr
    content = yaml.safe_load(made.stdout)
    assert (content["point"], content["dtype"], content["shape"]["n_blocks"]) == ("resid_post.2", "float32", 4)
    (tmp_path / "my.yaml").write_text(made.stdout)
    planned = shell.run("nla train my.yaml --dry-run --json", tmp_path)
    assert planned.code == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert list(plan) == ["extract", "describe", "warmstart", "joint"]
    assert all(stage["would_run"] and stage["shape"] == "counted" for stage in plan.values())


@pytest.mark.slow
def test_push_publishes_a_pair_on_a_hub(tmp_path: Path):
    make_pair(target="someone/target").save_pretrained(tmp_path / "pair")
    hub = Hub()
    hub_of = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    try:
        done = nla("push", "pair", "someone/pair", "--private", "--json", folder=tmp_path, **hub_of)
    finally:
        hub.server.shutdown()
        hub.server.server_close()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"].startswith(f"{hub.address}/someone/pair/commit/")
    assert "nla_config.json" in hub.repositories["someone/pair"]["main"]
    assert hub.tokens - {None} == {"Bearer hf_secret"}
