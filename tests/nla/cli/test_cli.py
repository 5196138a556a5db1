"""The commands: help that teaches, JSON for programs, exit codes, and errors that name the next step."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from nla import view
from nla.cli import console, main
from nla.cli.usage import build_parser
from nla.config import NLAConfig
from nla.errors import InterruptedTraining, RecipeError, visible
from nla.eval.report import Rate
from nla.pair.confidence import Trust
from nla.pair.explanations import Explanation
from nla.text.tokens import Span
from tests.helpers.tiny import make_model, make_pair, make_tokenizer

EVALUATIONS = ["auditing", "fidelity", "gates", "graph", "plants", "readers", "rhymes", "transfer", "two-hop"]
FORMATS = ["import kitft", "import easynla", "import parquet", "export kitft", "export parquet"]
COMMANDS = ["demo", "explain", "steer", "audit", "probe", "trace", "train", "extract", "push", "info", *FORMATS]
COMMANDS += [f"eval {evaluation}" for evaluation in EVALUATIONS]
HEAVY = ["torch", "transformers", "peft", "trl", "rich", "matplotlib"]


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random pair and its target, saved."""
    folder = tmp_path_factory.mktemp("cli")
    make_model("llama").save_pretrained(folder / "target")
    make_tokenizer().save_pretrained(folder / "target")
    make_pair("llama", target=str(folder / "target")).save_pretrained(folder / "pair")
    return str(folder / "pair")


def note(texts: list[str], token: str = " cat", complete: bool = True) -> Explanation:
    """A note with these samples."""
    trust = Trust.of(0.9, 0.7, 0.2)
    cosine = [0.9] * len(texts)
    return Explanation(texts, [complete] * len(texts), cosine, trust, Span(5, token, 0, len(token), 0))


def shown(renderable: object) -> str:
    """What stands on a plain terminal."""
    console = Console(width=100, file=io.StringIO(), markup=False)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------------ help


def test_help_imports_nothing_heavy():
    code = (
        "import sys, nla.cli.main\n"
        "try: nla.cli.main.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main.main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--json" in text
    assert command == "demo" or re.search(rf"examples:\n.*nla {command}", text, re.DOTALL)


def test_top_level_help_lists_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    text = capsys.readouterr().out
    assert all(command.split()[0] in text for command in COMMANDS)
    assert all(re.search(rf"^  {code} ", text, re.MULTILINE) for code in (0, 1, 2, 70, 130))


def test_every_example_in_the_help_parses():
    epilogs, pending = [], [build_parser()]
    while pending:
        parser = pending.pop()
        epilogs.append(parser.epilog or "")
        for action in parser._actions:
            if isinstance(action.choices, dict):
                pending += action.choices.values()
    lines = "\n".join(epilogs).replace("\\\n", " ").splitlines()
    examples = [re.split(r"\s{3,}|\s\| jq ", line.strip())[0] for line in lines if re.search(r"^  .*\bnla [a-z]", line)]
    commands = [shlex.split(example)[-len(shlex.split(example.split("nla ", 1)[1])) :] for example in examples]
    assert len(commands) > 12
    for command in commands:
        if command[0] != "COMMAND":
            assert build_parser().parse_args(command).command


def test_every_command_has_a_function():
    assert sorted(main.COMMANDS) == sorted(COMMANDS)


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["explain", "--samples", "many", "the cat"],
        ["eval", "everything"],
        ["steer", "the cat"],
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_next_step(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main.main(argv)
    captured = capsys.readouterr()
    assert stop.value.code == main.USAGE
    assert "Next:" in captured.err and not captured.out


@pytest.mark.parametrize(
    "argv",
    [
        ["explain"],
        ["explain", "the cat", "--file", "poem.txt"],
        ["explain", "--file", "no/such/file.txt"],
        ["explain", "the cat", "--pair", "no-such-pair"],
        ["explain", "the unicorn", "--pair", "PAIR"],
        ["explain", "the cat", "--samples", "0", "--pair", "PAIR"],
        ["explain", "the cat", "--positions", "/dog/", "--pair", "PAIR"],
        ["explain", "the cat", "--positions", "7", "--pair", "PAIR"],
        ["explain", "", "--pair", "PAIR"],
        ["steer", "the cat", "--replace", "cat", "--pair", "PAIR"],
        ["steer", "the cat", "--replace", "unicorn=dog", "--pair", "PAIR"],
        ["explain", "the \ud800", "--pair", "PAIR"],
        ["info", "no-such-pair"],
        ["train", "no-such-recipe"],
        ["eval", "gates", "some/model", "--check"],
        ["eval", "fidelity", "no-such-pair"],
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(
    argv: list[str], pair_folder: str, capsys: pytest.CaptureFixture[str]
):
    code = main.main([pair_folder if part == "PAIR" else part for part in argv])
    captured = capsys.readouterr()
    assert code == main.USAGE
    assert not captured.out
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("nla: ") and "Next:" in lines[-1]
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (InterruptedTraining("an interrupt", "100 steps", "run the same command"), 130),
        (RecipeError("a recipe", "a better one", "correct it"), 2),
        (RuntimeError("a fault"), 70),
    ],
)
def test_exit_codes_of_what_can_happen_in_a_command(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(_args: object) -> int:
        raise error

    monkeypatch.setitem(main.COMMANDS, "info", fail)
    assert main.main(["info"]) == code
    shown = capsys.readouterr().err
    assert ("Traceback" in shown and "RuntimeError: a fault" in shown) == (code == 70)
    assert code == 130 or "Next:" in shown.splitlines()[-1]


def test_an_error_cannot_write_to_the_terminal(
    pair_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(pair_folder, tmp_path / "pair")
    dataclasses.replace(NLAConfig.load(pair_folder), target="./\x1b[2J\x9b31mhostile").save(tmp_path / "pair")
    assert main.main(["info", str(tmp_path / "pair")]) == main.USAGE

    def fail(_args: object) -> int:
        raise RuntimeError("\x1b[2J\x9b31mhostile")

    monkeypatch.setitem(main.COMMANDS, "demo", fail)
    assert main.main(["demo"]) == main.INTERNAL
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

    def run(model: str, **options: object) -> object:
        seen.update(options, model=model)
        return SimpleNamespace(
            passed=passed,
            to_markdown=lambda: "# A report\x1b[2J",
            to_card=lambda: "## In short",
            to_json=lambda: {"passed": passed},
        )

    monkeypatch.setattr(importlib.import_module("nla.eval.families.gates"), "run", run)
    argv = ["eval", "gates", "couplets/plain", "--items", "7", *(["--check"] if check else [])]
    assert main.main(argv) == code
    assert (seen["model"], seen["variant"], seen["n_documents"]) == ("couplets/plain", "plain", 7)
    assert "\x1b" not in capsys.readouterr().out
    main.main([*argv, "--card", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out) == {"passed": passed}
    card = (tmp_path / "README.md").read_text()
    assert "## In short" in card and f"Made by `nla {shlex.join(argv)} --card {tmp_path} --json`." in card


def test_every_option_of_an_evaluation_is_a_parameter_of_its_run():
    for name, where in main.EVALUATIONS.items():
        module, function, settings = [*where.split(":"), "", ""][:3]
        words = {"graph": "eval graph file", "trace": "trace", "probe": "probe data --text a --label b"}
        options = build_parser().parse_args(words.get(name, f"eval {name.replace('_', '-')}").split()).options
        evaluate = getattr(importlib.import_module(module), function or "run")
        takes = getattr(importlib.import_module(module), settings) if settings else evaluate
        assert set(options) <= set(inspect.signature(takes).parameters), name
        assert {"out_dir", "progress"} <= set(inspect.signature(evaluate).parameters), name


# -------------------------------------------------------------------------------------------------------- commands


def test_explain_prints_json_for_programs(pair_folder: str, capsys: pytest.CaptureFixture[str]):
    argv = ["explain", "the cat sat", "--pair", pair_folder, "--positions", "0,2", "--samples", "2", "--json"]
    assert main.main(argv) == main.OK
    content = json.loads(capsys.readouterr().out)
    assert content["point"] == "resid_post.1"
    assert [(one["token"], len(one["texts"])) for one in content["notes"]] == [("the", 2), (" sat", 2)]


def test_explain_reads_standard_input_unchanged(
    pair_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat.\n")))
    assert main.main(["explain", "-", "--pair", pair_folder, "--positions", "last", "--json"]) == main.OK
    assert [one["token"] for one in json.loads(capsys.readouterr().out)["notes"]] == ["\n"]


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_line_ends_are_read_as_they_are(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "the cat\r\nsat\ron\nthe grün mat"
    (tmp_path / "file").write_bytes(text.encode("utf-8-sig"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="latin-1"))
    argv = ["--file", str(tmp_path / "file")] if source == "file" else ["-"]
    assert console.given_text(build_parser().parse_args(["explain", *argv])) == text


def test_explain_shows_a_row_a_token_and_writes_a_picture(
    pair_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    picture = tmp_path / "view.svg"
    assert main.main(["explain", "the cat sat", "--pair", pair_folder, "--svg", str(picture)]) == main.OK
    text = capsys.readouterr().out
    assert all(re.search(rf"^\s*{token}\b", text, re.MULTILINE) for token in ("the", "cat", "sat"))
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert "url(http" not in picture.read_text(encoding="utf-8")


def test_info_says_what_the_pair_is(pair_folder: str, capsys: pytest.CaptureFixture[str]):
    assert main.main(["info", pair_folder, "--json"]) == main.OK
    content = json.loads(capsys.readouterr().out)
    assert (content["architecture"], content["d_model"], content["point"]) == ("llama", 32, "resid_post.1")
    assert content["parameters"]["decoder"] > 0 and content["versions"]["nla"]
    assert main.main(["info", pair_folder]) == main.OK
    assert "parameters.encoder" in capsys.readouterr().out


def test_steer_shows_the_edit_beside_a_random_direction_of_equal_norm(
    pair_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from nla.autoencoder import NLA

    monkeypatch.setattr(
        NLA, "explain", lambda *_args, **_options: [note(["the cat sat.", "the dog sat.", "a dog sat."])]
    )
    argv = ["steer", "the cat", "--pair", pair_folder, "--replace", "cat=tree", "--json"]
    assert main.main(argv) == main.OK
    content = json.loads(capsys.readouterr().out)
    assert (content["explanation"], content["edited"]) == ("the cat sat.", "the tree sat.")
    assert {"continuation", "steered", "random direction of equal norm"} <= set(content)
    assert main.main([*argv, "--strength", "nan"]) == main.USAGE
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
    assert main.main(argv) == main.OK
    expected = {"path": "couplets", "overrides": ["seed=1", "joint.steps=2"], "until": "extract", "dry_run": True}
    assert asked == expected
    assert json.loads(capsys.readouterr().out) == {"extract": {"would_run": True}}


# ------------------------------------------------------------------------------------------------------ token view


@pytest.mark.parametrize("hostile", ["[bold red]cat[/]", "\x1b[2Jcat", "cat\r\nrat", "[/]", ":cat:"])
def test_text_from_a_model_is_shown_as_it_is(hostile: str):
    text = shown(view.token_view([note([hostile], token=hostile)], title=hostile))
    assert "\x1b" not in text and "\r" not in text
    assert text.count(visible(hostile)) >= 2


def test_text_from_a_model_is_escaped_in_the_picture():
    picture = view.svg(view.token_view([note(["</text><script>alert(1)</script>"])], title=""), "<b>")
    assert "<script>" not in picture and "<b>" not in picture
    ElementTree.fromstring(picture)


def test_the_view_shows_what_most_samples_say_and_marks_a_text_that_was_cut_off():
    assert view.leading(["a.", "b.", "b."]) == "b."
    assert view.leading(["a.", "b."]) == "a."
    assert view.leading(["a."], lambda text: "z" in text) is None
    assert "b. …" in shown(view.token_view([note(["a.", "b.", "b."], complete=False)], ""))


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
