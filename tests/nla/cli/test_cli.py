"""The commands: help that teaches, JSON for programs, exit codes, and errors that name the next step."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nla.autoencoder import NLA
from nla.cli import console, main
from nla.cli.console import INTERNAL, INTERRUPTED, OK, USAGE
from nla.config import NLAConfig
from nla.errors import InterruptedTraining, RecipeError
from nla.eval.report import Rate
from nla.pair.explanations import Explanation, Trust
from nla.text.tokens import Span
from nla.views.pages import spelled_out
from tests.helpers.command_line import commands, examples, helps
from tests.helpers.pages import Markup
from tests.helpers.tiny import make_model, make_pair, make_tokenizer

HEAVY = ["torch", "transformers", "peft", "trl", "rich", "matplotlib", "scipy"]
COMMANDS = commands()
RUNS = {
    "eval auditing": "nla.eval.families.auditing:evaluate_auditing",
    "eval claims": "nla.eval.pair.claims:judge_claims",
    "eval fidelity": "nla.eval.pair.fidelity:judge_fidelity",
    "eval gates": "nla.eval.families.gates:evaluate_gates",
    "eval graph": "nla.eval.pair.against_graphs:judge_against_graphs",
    "eval plants": "nla.eval.families.plants:evaluate_plants",
    "eval readers": "nla.eval.readers.organisms:compare_on_organism",
    "eval rhymes": "nla.eval.families.rhymes:evaluate_rhymes",
    "eval steering": "nla.eval.pair.steering:evaluate_steering",
    "eval transfer": "nla.eval.pair.transfer:judge_transfer",
    "eval two-hop": "nla.eval.families.two_hop:evaluate_two_hop",
    "trace": "nla.eval.circuits.trace:trace",
    "probe": "nla.eval.readers.labelled_texts:compare_on_labelled_texts",
    "audit": "nla.audit.from_files:audit_files",
}
"""Where the function that does a command's work is; its name, if it is not ``run``."""
NOT_OF_RUN = {"--help", "--json", "--card", "--check", "--out"}
"""Options whose values are not texts that ``run`` takes as they are."""
WORDS = {"--variant": "plain", "--positions": "/cat/", "--point": "resid_post.2"}
"""Texts that are checked before they arrive."""
ALONE = {"--pairs", "--store"}
"""Options that others exclude."""


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random pair and its target, saved."""
    folder = tmp_path_factory.mktemp("cli")
    make_model("llama").save_pretrained(folder / "target")
    make_tokenizer().save_pretrained(folder / "target")
    make_pair("llama", target=str(folder / "target")).save_pretrained(folder / "pair")
    return str(folder / "pair")


def explanation(texts: list[str]) -> Explanation:
    """An explanation with these samples."""
    trust = Trust.of(0.9, 0.7, 0.2)
    return Explanation(texts, [True] * len(texts), [0.9] * len(texts), trust, Span(5, " cat", 0, 4, 0))


# ------------------------------------------------------------------------------------------------------------ help


def test_help_imports_nothing_heavy():
    code = (
        "import sys, nla.cli.main\n"
        "assert nla.cli.main.main(['--help']) == 0\n"
        "assert nla.cli.main.main(['eval', 'rhymes', '--help']) == 0\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


NO_PAIRS = [
    ["info", "@"],
    ["explain", "a cat", "--pair", "@"],
    ["audit", "chats.jsonl", "--pair", "@"],
    ["eval", "rhymes", "@"],
    ["eval", "fidelity", "@"],
    ["eval", "two-hop", "switchboard", "--warm-start", "@"],
    ["eval", "rhymes", "couplets", "--continued", "@"],
    ["eval", "graph", "graph.json", "--pair", "@"],
    ["push", "@", "someone/pair"],
    ["export", "kitft", "@", "--out", "o"],
]


def test_a_wrong_name_of_a_pair_is_refused_before_anything_heavy_is_imported():
    code = (
        "import sys, nla.cli.main\n"
        "for name in ('no-such-pair', 'switchboard/goal', 'couplet'):\n"
        f"    for command in {NO_PAIRS!r}:\n"
        "        words = [name if word == '@' else word for word in command]\n"
        "        assert nla.cli.main.main(words) == 2, words\n"
        f"        loaded = [module for module in {HEAVY!r} if module in sys.modules]\n"
        "        assert not loaded, (words, loaded)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 3 * len(NO_PAIRS) and all("Got no " in line or "an embedded" in line for line in said)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]):
    assert main.main([*command.split(), "--help"]) == OK
    text = capsys.readouterr().out
    assert "--json" in text or command == "serve"  # which answers over HTTP
    assert re.search(rf"examples:\n.*nla {command}", text, re.DOTALL)


def test_help_is_kept_as_it_is_written(capsys: pytest.CaptureFixture[str]):
    assert main.main(["explain", "--help"]) == OK
    out = capsys.readouterr().out
    assert inspect.cleandoc(helps()["explain"]).partition("\n\n")[2] in out
    assert r"--positions '/\n/' --samples 8" in out


def test_top_level_help_lists_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]):
    assert main.main(["--help"]) == OK
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {command.split()[0]}  +\w", text, re.MULTILINE) for command in COMMANDS)
    assert all(re.search(rf"^  {code} ", text, re.MULTILINE) for code in (0, 1, 2, 70, 130))


def test_every_command_shows_examples():
    shown = {name: examples(text) for name, text in helps().items()}
    assert all(shown[command] for command in COMMANDS)
    assert sum(map(len, shown.values())) > 40


@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if name not in ("train", "recipe", "push", "import parquet")]
)
def test_every_command_that_reads_a_model_takes_a_device(name: str):
    wanted = name != "export parquet"
    assert any("--device" in option.opts for option in COMMANDS[name].params) == wanted


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["explian", "the cat"],
        ["explain", "--samples", "many", "the cat"],
        ["explain", "--samples", "0", "the cat"],
        ["explain", "--bogus", "the cat"],
        ["explain", "the cat", "the dog"],
        ["eval"],
        ["eval", "everything"],
        ["eval", "gates", "--variant", "round"],
        ["import"],
        ["steer", "the cat"],
        ["--bogus"],
        ["--\x1b[2J"],
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_next_step_in_one_line(
    argv: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main.main(argv) == USAGE
    captured = capsys.readouterr()
    assert re.fullmatch(r"nla[\w -]*: .*\. Next: `nla[\w -]* --help` shows how it is used\n", captured.err)
    assert not captured.out and "\x1b" not in captured.err


def test_a_misspelt_command_is_answered_with_the_right_one(capsys: pytest.CaptureFixture[str]):
    assert main.main(["explian"]) == USAGE
    assert "'explain'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["explain"],
        ["explain", "the cat", "--file", "poem.txt"],
        ["explain", "--file", "no/such/file.txt"],
        ["explain", "the cat", "--pair", "no-such-pair"],
        ["explain", "the unicorn", "--pair", "PAIR"],
        ["explain", "the cat", "--positions", "/dog/", "--pair", "PAIR"],
        ["explain", "the cat", "--positions", "7", "--pair", "PAIR"],
        ["explain", "", "--pair", "PAIR"],
        ["steer", "the cat", "--replace", "cat", "--pair", "PAIR"],
        ["steer", "the cat", "--replace", "unicorn=dog", "--pair", "PAIR"],
        ["explain", "the \ud800", "--pair", "PAIR"],
        ["info", "no-such-pair"],
        ["train", "no-such-recipe"],
        ["recipe", "no/such/model/at/all"],
        ["eval", "gates", "some/model", "--check"],
        ["eval", "fidelity", "no-such-pair"],
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(
    argv: list[str], pair_folder: str, capsys: pytest.CaptureFixture[str]
):
    code = main.main([pair_folder if part == "PAIR" else part for part in argv])
    captured = capsys.readouterr()
    assert code == USAGE
    assert not captured.out
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("nla: ") and "Next:" in lines[-1]
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), INTERRUPTED),
        (InterruptedTraining("an interrupt", "100 steps", "run the same command"), INTERRUPTED),
        (RecipeError("a recipe", "a better one", "correct it"), USAGE),
        (RuntimeError("a fault"), INTERNAL),
        (EOFError(), INTERNAL),
        (BrokenPipeError(), OK),
    ],
)
def test_exit_codes_of_what_can_happen_in_a_command(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def fail(*_given: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(NLA, "from_pretrained", fail)
    monkeypatch.setattr(os, "dup2", lambda *_files: None)  # of a broken pipe: this process still wants its output
    assert main.main(["info"]) == code
    shown = capfd.readouterr().err
    assert ("Traceback" in shown and type(error).__name__ in shown) == (code == INTERNAL)
    assert code in (OK, INTERRUPTED) or "Next:" in shown.splitlines()[-1]
    assert not isinstance(error, KeyboardInterrupt) or shown == "nla: stopped\n"


def test_an_error_cannot_write_to_the_terminal(
    pair_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(pair_folder, tmp_path / "pair")
    dataclasses.replace(NLAConfig.load(pair_folder), target="./\x1b[2J\x9b31mhostile").save(tmp_path / "pair")
    assert main.main(["info", str(tmp_path / "pair")]) == USAGE

    def fail(*_given: object, **_options: object) -> None:
        raise RuntimeError("\x1b[2J\x9b31mhostile")

    monkeypatch.setattr(NLA, "from_pretrained", fail)
    assert main.main(["info"]) == INTERNAL
    shown = capsys.readouterr().err
    assert shown.count(r"\x1b[2J\x9b31mhostile") >= 2
    assert "\x1b" not in shown and "\x9b" not in shown


@pytest.mark.parametrize(("passed", "check", "code"), [(True, True, 0), (False, True, 1), (False, False, 0)])
def test_a_failed_threshold_exits_with_1_only_where_it_is_asked(
    passed: bool,
    check: bool,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    seen = {}

    def evaluate(model: str, settings: object, progress: object) -> object:
        seen.update(vars(settings), model=model)
        return SimpleNamespace(
            name="gates",
            passed=passed,
            held=[passed],
            doubts=[],
            to_markdown=lambda: "# A report\x1b[2J",
            to_card=lambda: "## In short",
            to_json=lambda: {"passed": passed},
        )

    monkeypatch.setattr(importlib.import_module("nla.eval.families.gates"), "evaluate_gates", evaluate)
    argv = ["eval", "gates", "couplets/plain", "--items", "7", *(["--check"] if check else [])]
    assert main.main(argv) == code
    assert (seen["model"], seen["variant"], seen["n_documents"]) == ("couplets/plain", "plain", 7)
    assert "\x1b" not in capsys.readouterr().out
    main.main([*argv, "--card", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out) == {"passed": passed}
    card = (tmp_path / "README.md").read_text()
    assert "## In short" in card and f"Made by `nla {shlex.join(argv)} --card {tmp_path} --json`." in card


@pytest.mark.parametrize("command", RUNS)
def test_every_option_reaches_the_function_that_does_the_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    where, _, name = RUNS[command].partition(":")
    module, name = importlib.import_module(where), name or "run"
    signature, arrived = inspect.signature(getattr(module, name)), {}

    def run(*given: Any, **options: Any) -> object:
        arrived.update(signature.bind(*given, **options).arguments)
        raise RecipeError("seen", "nothing", "stop")

    monkeypatch.setattr(module, name, run)
    not_of_run = NOT_OF_RUN - ({"--out"} if command == "audit" else set())
    options = [option for option in COMMANDS[command].params if not not_of_run & {*option.opts}]
    alone = [option for option in options if ALONE & {*option.opts} and not option.required]
    for some in ([option for option in options if option not in alone], alone):
        argv, expected = command.split(), []
        for number, option in enumerate(some, start=30):
            texts = {"N": str(number), "MB": f"{number}.5"}
            value = texts.get(option.metavar or "", WORDS.get(option.opts[-1], f"some/value-{number}"))
            flag = getattr(option, "is_flag", False)
            argv += [*(option.opts if option.param_type_name == "option" else []), *([] if flag else [value])]
            expected.append("True" if flag else value)
        if some:
            assert main.main(argv) == USAGE and "seen" in capsys.readouterr().err
            assert {*expected} <= {*map(str, _values(arrived))}


def _values(value: Any) -> list[Any]:
    """The values in arguments: those of lists and of settings dataclasses one by one."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict | list | tuple):
        return [one for part in (value.values() if isinstance(value, dict) else value) for one in _values(part)]
    return [value]


# -------------------------------------------------------------------------------------------------------- commands


def test_explain_prints_json_for_programs(pair_folder: str, capsys: pytest.CaptureFixture[str]):
    argv = ["explain", "the cat sat", "--pair", pair_folder, "--positions", "0,2", "--samples", "2", "--json"]
    assert main.main(argv) == OK
    content = json.loads(capsys.readouterr().out)
    assert content["point"] == "resid_post.1"
    assert [(one["token"], len(one["texts"])) for one in content["explanations"]] == [("the", 2), (" sat", 2)]


def test_explanations_in_json_stand_under_their_old_name_too(pair_folder: str, capsys: pytest.CaptureFixture[str]):
    assert main.main(["explain", "the cat", "--pair", pair_folder, "--samples", "1", "--json"]) == OK
    content = json.loads(capsys.readouterr().out)
    assert content["notes"] == content["explanations"] and content["notes"]
    assert 'old name "notes", which the\nnext release leaves out' in helps()["explain"]


def test_a_text_may_begin_with_a_dash(pair_folder: str, capsys: pytest.CaptureFixture[str]):
    for argv in (["- the cat", "--pair", pair_folder], ["--pair", pair_folder, "--", "- the cat"]):
        assert main.main(["explain", "--json", *argv]) == USAGE  # the tiny tokenizer knows no dash
        assert "outside the vocabulary" in capsys.readouterr().err


def test_explain_reads_standard_input_unchanged(
    pair_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat.\n")))
    assert main.main(["explain", "-", "--pair", pair_folder, "--positions", "last", "--json"]) == OK
    assert [one["token"] for one in json.loads(capsys.readouterr().out)["explanations"]] == ["\n"]


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_line_ends_are_read_as_they_are(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "the cat\r\nsat\ron\nthe grün mat"
    (tmp_path / "file").write_bytes(text.encode("utf-8-sig"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="latin-1"))
    assert console.given_text(*((None, tmp_path / "file") if source == "file" else ("-", None))) == text


def test_explain_shows_a_row_a_token_and_writes_a_picture(
    pair_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    picture = tmp_path / "view.svg"
    assert main.main(["explain", "the cat sat", "--pair", pair_folder, "--svg", str(picture)]) == OK
    text = capsys.readouterr().out
    assert all(re.search(rf"^\s*{token}\b", text, re.MULTILINE) for token in ("the", "cat", "sat"))
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert "url(http" not in picture.read_text(encoding="utf-8")


def test_explain_writes_a_page_of_its_own_with_what_speaks_against_the_pair(
    pair_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(NLA, "doubts", ["<b>this pair reads nothing</b>"])
    page = tmp_path / "view.html"
    assert main.main(["explain", "the cat sat", "--pair", pair_folder, "--html", str(page), "--json"]) == OK
    said = json.loads(capsys.readouterr().out)["explanations"]
    markup = Markup(page.read_text(encoding="utf-8"))
    markup.check()
    assert "<b>this pair reads nothing</b>" in markup.text and pair_folder in markup.text
    assert all(spelled_out(text) in markup.text for row in said for text in row["texts"])
    assert len(markup.tips) == len(said) == 3


def test_info_says_what_the_pair_is(pair_folder: str, capsys: pytest.CaptureFixture[str]):
    assert main.main(["info", pair_folder, "--json"]) == OK
    content = json.loads(capsys.readouterr().out)
    assert (content["architecture"], content["d_model"], content["point"]) == ("llama", 32, "resid_post.1")
    assert content["parameters"]["decoder"] > 0 and content["versions"]["nla"]
    assert main.main(["info", pair_folder]) == OK
    assert "parameters.encoder" in capsys.readouterr().out


def test_steer_shows_the_edit_beside_a_random_direction_of_equal_norm(
    pair_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    samples = ["the cat sat.", "the dog sat.", "a dog sat."]
    monkeypatch.setattr(NLA, "explain", lambda *_args, **_options: [explanation(samples)])
    argv = ["steer", "the cat", "--pair", pair_folder, "--replace", "cat=tree", "--json"]
    assert main.main(argv) == OK
    content = json.loads(capsys.readouterr().out)
    assert (content["explanation"], content["edited"]) == ("the cat sat.", "the tree sat.")
    assert {"continuation", "steered", "random direction of equal norm"} <= set(content)
    assert main.main([*argv, "--strength", "nan"]) == USAGE
    assert "strength=nan" in capsys.readouterr().err


def test_train_passes_what_was_asked_to_the_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import nla.train.run as run

    asked = {}

    def run_recipe(path: str, **options: object) -> dict:
        asked.update(options, path=path)
        return {"extract": {"would_run": True}}

    monkeypatch.setattr(run, "run_recipe", run_recipe)
    argv = [
        "train",
        "couplets",
        "--dry-run",
        "--until",
        "extract",
        "--set",
        "seed=1",
        "--set",
        "joint.steps=2",
        "--json",
    ]
    assert main.main(argv) == OK
    expected = {"path": "couplets", "overrides": ["seed=1", "joint.steps=2"], "until": "extract", "dry_run": True}
    assert asked == expected
    assert json.loads(capsys.readouterr().out) == {"extract": {"would_run": True}}


# ---------------------------------------------------------------------------------------------------------- console


def test_without_a_terminal_progress_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress_bar() as progress:
        for second in range(100):
            now = float(second)
            progress("patches\x1b[2J", second / 100)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [rf"nla: patches\x1b[2J, {percent}%" for percent in (30, 60, 90)]
    assert not captured.out


def test_json_has_null_where_a_number_is_not_finite(capsys: pytest.CaptureFixture[str]):
    console.emit({"margin": float("nan"), "vector": torch.tensor([1.0, float("inf")])})
    assert json.loads(capsys.readouterr().out) == {"margin": None, "vector": [1.0, None]}


def test_a_share_within_one_document_has_no_interval_in_text_in_json_and_in_comparisons(
    capsys: pytest.CaptureFixture[str],
):
    rate = Rate.clustered(torch.tensor([1.0, 0.0]), [7, 7])
    assert str(rate) == "0.500 (one document: no interval)"
    assert not rate.above(Rate(0.1, 0.0, 0.2, 9)) and not Rate(0.9, 0.8, 1.0, 9).above(rate)
    console.emit({"rate": rate})
    assert json.loads(capsys.readouterr().out) == {"rate": {"value": 0.5, "low": None, "high": None, "n": 1}}


def test_an_option_that_the_command_lacks_is_said_to_be_anothers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts that several commands share name options that some of them do not have."""

    def refuse(*_: object) -> None:
        raise RecipeError("a chat", "another", "use --trim, --pair X, or `nla extract --dtype float32`")

    monkeypatch.setattr("nla.cli.explain.given_text", refuse)
    assert main.main(["explain", "a"]) == USAGE
    assert capsys.readouterr().err.endswith("`nla extract --dtype float32` (--trim: of `nla audit`)\n")
