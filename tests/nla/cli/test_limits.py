"""What a shell can do to any command: names that no file can have, folders that nobody may write, output that ends."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nla.cli import console, main
from nla.cli.console import USAGE
from nla.errors import StorageError
from nla.storage import files
from tests.helpers.command_line import commands
from tests.helpers.shell import Shell

LONG = "a" * 300
COMMANDS = commands()
NEEDED = {"probe": ["--text", "line", "--label", "season"], "eval transfer": ["--target-adapter", "switchboard/goal"]}
NEEDED |= {"eval claims": ["--store", "no-such"], "eval steering": ["--store", "no-such"]}
"""Options without which a command does not begin."""
REPORTS = sorted(name for name, one in COMMANDS.items() if any("--card" in option.opts for option in one.params))
"""Commands that write a report."""
FOLDERS = {"FILE", "DATA", "FOLDER", "PAIR", "MODEL"}


def subject(name: str, value: str) -> list[str]:
    """The command's argument, if it takes one."""
    return [value] if any(one.param_type_name == "argument" for one in COMMANDS[name].params) else []


@pytest.mark.parametrize("name", REPORTS)
def test_a_name_that_no_file_can_have_is_refused_wherever_it_is_given(name: str, capsys: pytest.CaptureFixture[str]):
    named = [one for one in COMMANDS[name].params if (one.metavar or "") in FOLDERS]
    assert named
    for option in named:
        given = [LONG] if option.param_type_name == "argument" else [option.opts[-1], LONG]
        other = [] if option.param_type_name == "argument" else subject(name, "no-such") if name == "probe" else []
        if name == "eval graph" and not other and option.param_type_name != "argument":
            other = ["no-such.json"]
        assert main.main([*name.split(), *other, *NEEDED.get(name, []), *given]) == USAGE, option.opts
        captured = capsys.readouterr()
        last = captured.err.splitlines()[-1]
        assert "Next: " in last and "Traceback" not in captured.err and len(last) < 1000 and not captured.out, last


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("option", ["--out", "--card"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    name: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A file in its place, since root may write everywhere; nothing is loaded before that is found."""
    (tmp_path / "file").write_text("a file")
    monkeypatch.setattr("nla.autoencoder.NLA.from_pretrained", lambda *_given, **_options: pytest.fail("it has begun"))
    monkeypatch.setattr("nla.eval.target.Target.load", lambda *_given, **_options: pytest.fail("it has begun"))
    subjects = {"probe": ["no-such"], "eval graph": ["no-such"]}
    subjects |= {pair_and_store: ["switchboard"] for pair_and_store in ("eval claims", "eval steering")}
    argv = [*name.split(), *subjects.get(name, []), *NEEDED.get(name, [])]
    assert main.main([*argv, option, str(tmp_path / "file" / "folder")]) == USAGE
    assert re.search(r"nothing can be written.*Next: choose another folder", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "command",
    [
        "audit none.jsonl --pair couplets --out {}",
        "explain In --svg {}.svg",
        "explain In --html {}.html",
        "extract couplets none.txt --point resid_post.2 --out {}",
        "import kitft none none --out {}",
        "import easynla none none --out {}",
        "import parquet none.parquet --tokenizer none --out {}",
        "export kitft couplets --out {}",
        "export parquet none --out {}.parquet",
        "train couplets --set out={}",
    ],
)
def test_a_place_for_results_is_tried_before_anything_is_read(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("a file")
    monkeypatch.setattr("nla.autoencoder.NLA.from_pretrained", lambda *_given, **_options: pytest.fail("it has begun"))
    assert main.main(command.format(tmp_path / "file" / "results").split()) == USAGE
    assert re.search(r"nothing can be written.*Next: choose another folder", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_the_place_of_a_file_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nla.autoencoder.NLA.from_pretrained", lambda *_given, **_options: pytest.fail("it has begun"))
    assert main.main(["explain", "In", "--svg", str(tmp_path)]) == USAGE
    assert "a folder, where a file is to be written" in capsys.readouterr().err


def test_trying_a_folder_leaves_nothing_and_keeps_what_was_there(tmp_path: Path):
    files.try_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "kept").mkdir()
    files.try_folder(tmp_path / "kept")
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]


def test_a_folder_is_tried_while_others_make_and_try_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, make = tmp_path / "a" / "b", Path.mkdir

    def others_come_first(path: Path, *given: Any, **options: Any) -> None:
        os.makedirs(folder, exist_ok=True)
        make(path, *given, **options)

    monkeypatch.setattr(Path, "mkdir", others_come_first)
    files.try_folder(folder)
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", folder], "what another process made is there still"
    monkeypatch.undo()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(files.try_folder, [tmp_path / "c" / str(number // 50) / "d" for number in range(400)]))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["dangling", "dangling/b", "file/b", "a/" + "x" * 300, "a\0b"])
def test_a_folder_that_cannot_be_made_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="nothing can be written"):
        files.try_folder(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


PRINTS = {
    "help": "nla --help",
    "help of a command": "nla eval rhymes --help",
    "json": "nla info couplets --json",
    "table": "nla info couplets",
    "recipe": "nla train couplets --dry-run --json",
    "tokens": "nla explain 'In spring Anna' --samples 1 --json",
    "report": "nla eval fidelity couplets --texts texts.txt --json",
}


@pytest.mark.parametrize("command", PRINTS.values(), ids=list(PRINTS))
def test_a_reader_that_has_seen_enough_is_no_failure(command: str, shell: Shell, tmp_path: Path):
    (tmp_path / "texts.txt").write_text("In spring Anna left a red ribbon near the rat,\n" * 3)
    for reader in ("head -1", "true"):
        done = shell.run(f"set +o pipefail; {command} | {reader}; echo ${{PIPESTATUS[0]}}", tmp_path)
        assert done.stdout.splitlines()[-1] == "0" and "Traceback" not in done.stderr, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("command", PRINTS.values(), ids=list(PRINTS))
def test_an_output_that_takes_no_more_is_said_and_is_a_failure(command: str, shell: Shell, tmp_path: Path):
    (tmp_path / "texts.txt").write_text("In spring Anna left a red ribbon near the rat,\n" * 3)
    done = shell.run(f"{command} > /dev/full || echo $? >&2", tmp_path)
    assert done.stderr.splitlines()[-1] == "2" and "Traceback" not in done.stderr, done.stderr
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize(
    "hostile", ["\x9b31m", "\x85", "\u202e", "\u2066", "\u200f", "\x7f", "\ud800", "\U000e0001", "\x1b[2J"]
)
def test_json_escapes_what_could_act_on_a_terminal_and_means_the_same(hostile: str, capsys: pytest.CaptureFixture[str]):
    content = {f"key{hostile}": ["grün 猫 🙂", f"text{hostile}", 0.5]}
    console.emit(content)
    written = capsys.readouterr().out
    assert all(one.isprintable() or one == "\n" for one in written) and "grün 猫 🙂" in written
    assert json.loads(written) == content


PAIR = {
    "prompt": "In summer Clara put a blue candle past the flake,\n",
    "continuation": "Soon they wanted a quiet snake.\n",
    "donor_prompt": "In summer Clara put a green candle past the flake,\n",
    "donor_continuation": "Today they chased a wooden rake.\n",
}


def test_a_check_with_nothing_to_hold_against_has_a_code_and_a_sentence_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Where a latent of one's own is used, nothing says beforehand."""
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**PAIR, "roles": {"newline": -1}}))
    argv = ["trace", "couplets/planner", "--pairs", str(tmp_path / "pairs.jsonl"), "--controls", "1"]
    assert main.main(argv) == console.OK
    assert main.main([*argv, "--check"]) == console.UNDECIDED == 3
    assert "nothing was held against a threshold. Next: " in capsys.readouterr().err
