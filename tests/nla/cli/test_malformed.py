"""Whatever is typed for an option ends in one sentence and exit code 2, never in a fault of nla itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nla.cli import main
from nla.cli.console import USAGE
from tests.helpers.command_line import commands
from tests.helpers.tiny import load_benchmark, make_pair

YAMLS = [
    "a=[",
    "a={",
    "a=}",
    "=",
    "a",
    "",
    "a.b",
    ".=1",
    "a..b=1",
    "=1",
    "n_documents=[",
    "n_documents=&x",
    "n_documents=*x",
]
YAMLS += [
    "n_documents=!!python/object:os.system",
    "n_documents=!!int x",
    "n_documents=!!bool maybe",
    "n_documents=!!float x",
]
YAMLS += [
    "n_documents=!!timestamp x",
    "n_documents=2020-99-99",
    "n_documents=!!binary x",
    "n_documents=\x00",
    "n_documents=\x1b[2J",
]
YAMLS += [
    "n_documents=" + "[" * 5000,
    "n_documents=1e999",
    "n_documents=.nan",
    "n_documents=-1",
    "n_documents=0",
    "n_documents=many",
]
YAMLS += [
    "n_documents={? {}: 1}",
    "n_documents=" + "9" * 5000,
    "n_documents.a=1",
    "n_documents=\ud800",
    "positions=every:0",
]
YAMLS += [
    "positions=7",
    "eval_fraction=1",
    "streaming=perhaps",
    "\x00=1",
    "n_documents=@",
    "n_documents=`",
    "n_documents=%",
    "n_documents=: :",
]
NUMBERS = ["", " ", "x", "1.5", "0", "-1", "1e3", "--", "\x1b[2J", "\ud800", "NaN", "inf", "1" * 5000, "0x10", "１x"]
DEVICES = [
    ["cpu", "cuda"],
    ["encoder=cpu", "encoder=cpu"],
    ["encoder="],
    ["=cpu"],
    ["="],
    [""],
    ["nowhere"],
    ["cuda:99"],
]
DEVICES += [
    ["driver=cpu"],
    ["cpu:x"],
    ["\x1b[2J"],
    ["meta:meta:1"],
    ["\ud800"],
    ["encoder=nowhere"],
    ["cpu:7000000000000000000000"],
]
POSITIONS = [
    "",
    "x",
    "/",
    "//",
    "/(/",
    "/[/",
    "/a",
    "/*/",
    "3,",
    ",3",
    "3,,5",
    "99",
    "-99",
    "1" * 5000,
    "3, 5",
    "/\ud800/",
    "\x1b[2J",
]
SHARES = [
    "",
    "x",
    "1",
    "/",
    "1/",
    "/1",
    "1/1",
    "2/1",
    "-1/2",
    "0/0",
    "1.5/2",
    "0/1/2",
    "9" * 5000 + "/1",
    "0/" + "9" * 5000,
    "\x1b[2J",
]
REPLACEMENTS = ["", "x", "=", "a=", "=b", " = ", "unicorn=dog", "(=b", "\\=b", "\ud800=b", "\x1b[2J=x"]
WORDS = ["", "x", "=", "a=", "=b", "nobody=x", "winter=", "winter=,", "\x1b[2J", "winter=a\x00b"]
POINTS = [
    "",
    "x",
    "resid_post",
    "resid_post.",
    "resid_post.x",
    "resid_post.-1",
    "resid_post.99",
    "resid_pre.1",
    "resid_post." + "9" * 5000,
]
TYPES = ["", "int4", "float99", "torch.float32x", "\x1b[2J"]
FLOATS = ["", "x", "nan", "inf", "-inf", "1e999", "1,5", "\x1b[2J"]
SEEDS = ["", "x", "-1", "1.5", str(2**63), "9" * 400]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target with a corpus, a pair, labelled texts and a chat."""
    folder = tmp_path_factory.mktemp("malformed")
    recipe = load_benchmark("recipe")
    recipe.make_target(folder / "target", recipe.make_corpus(folder / "corpus.jsonl", 20))
    from tests.helpers.tiny import make_model, make_tokenizer

    make_model("llama").save_pretrained(folder / "small")
    make_tokenizer().save_pretrained(folder / "small")
    make_pair("llama", target=str(folder / "small")).save_pretrained(folder / "pair")
    (folder / "poems.csv").write_text(
        "line,season\n" + "".join(f"the cat sat.,{s}\n" for s in ("winter", "summer") * 9)
    )
    (folder / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "the cat"}]}\n')
    (folder / "notes.txt").write_text("{not json: [")
    return folder


def extract(*more: str) -> list[str]:
    return ["extract", "FOLDER/target", "FOLDER/corpus.jsonl", "--out", "FOLDER/out", *more]


EXTRACT = extract("--point", "resid_post.2", "--set", "max_tokens=50")
EXPLAIN = ["explain", "the cat", "--pair", "FOLDER/pair", "--samples", "1"]
STEER = ["steer", "the cat", "--pair", "FOLDER/pair"]
PROBE = ["probe", "FOLDER/poems.csv", "--text", "line", "--label", "season", "--pair", "FOLDER/pair"]
AUDIT = ["audit", "FOLDER/chats.jsonl", "--pair", "FOLDER/pair"]
DEVICE_COMMANDS = [EXPLAIN, ["info", "FOLDER/pair"], EXTRACT, PROBE, AUDIT, ["trace", "FOLDER/target"]]
DEVICE_COMMANDS += [
    ["eval", name] for name in ("fidelity", "rhymes", "gates", "two-hop", "plants", "auditing", "readers")
]
CASES = [
    *[(EXTRACT, ["--set", value]) for value in YAMLS],
    *[(["train", "couplets", "--dry-run"], ["--set", value]) for value in YAMLS],
    *[(EXTRACT, ["--process", value]) for value in SHARES],
    *[(EXTRACT, ["--seed", value]) for value in SEEDS],
    *[(AUDIT, ["--seed", value]) for value in SEEDS],
    *[(extract(), ["--point", value]) for value in POINTS],
    *[(EXTRACT, ["--dtype", value]) for value in TYPES],
    *[(EXTRACT, ["--quantization", value]) for value in TYPES],
    *[(EXPLAIN, ["--positions", value]) for value in POSITIONS],
    *[(AUDIT, ["--positions", value]) for value in POSITIONS if value not in ("99", "-99", "3,5")],
    *[(PROBE, ["--positions", value]) for value in POSITIONS],
    *[(PROBE, ["--words", value]) for value in WORDS],
    *[(STEER, ["--replace", value]) for value in REPLACEMENTS],
    *[([*STEER, "--replace", "the=a"], ["--strength", value]) for value in FLOATS],
    *[(AUDIT, ["--max-mb", value]) for value in FLOATS if value != "inf"],
    *[
        (command, [part for value in values for part in ("--device", value)])
        for command in DEVICE_COMMANDS
        for values in DEVICES
    ],
    *[
        (name.split(), [option.opts[-1], value])
        for name, command in commands().items()
        for option in command.params
        if option.metavar == "N" and "--seed" not in option.opts
        for value in NUMBERS
    ],
    (["train", "FOLDER/notes.txt"], []),
    (["train", "FOLDER/corpus.jsonl"], []),
    (["train", "FOLDER"], []),
    (["train", "couplets"], ["--until", "dinner"]),
    (["trace", "FOLDER/target", "--pairs", "FOLDER/notes.txt"], []),
    (["trace", "FOLDER/target", "--pairs", "FOLDER"], []),
    (["trace", "FOLDER/target", "--prompt", "the cat"], []),
    (["eval", "graph", "FOLDER/notes.txt"], []),
    (["eval", "graph", "FOLDER"], []),
    (["eval", "graph", "FOLDER/nothing"], []),
    (["eval", "fidelity", "FOLDER/pair", "--texts", "FOLDER/nothing"], []),
    (["eval", "fidelity", "FOLDER/pair", "--store", "FOLDER/pair"], []),
    (["eval", "transfer", "FOLDER/pair"], []),
    (["audit", "FOLDER/notes.txt", "--pair", "FOLDER/pair"], []),
    ([*AUDIT, "--rubric", "FOLDER/notes.txt"], []),
    ([*AUDIT, "--rubric", "no-such-rubric"], []),
    ([*AUDIT, "--judge-url", "not a url", "--rubric", "no-such-rubric"], []),
    (["probe", "FOLDER/notes.txt", "--text", "a", "--label", "b"], []),
    (["probe", "FOLDER/poems.csv", "--text", "nothing", "--label", "season"], []),
    (["import", "parquet", "FOLDER/notes.txt", "--tokenizer", "FOLDER/small", "--out", "FOLDER/x"], []),
    (["import", "kitft", "FOLDER/pair", "FOLDER/pair", "--out", "FOLDER/x"], []),
    (["import", "easynla", "FOLDER/pair", "--out", "FOLDER/x"], []),
    (["export", "parquet", "FOLDER/pair", "--out", "FOLDER/x"], []),
    (["export", "kitft", "FOLDER/small", "--out", "FOLDER/x"], []),
    (["push", "FOLDER/small", "someone/pair"], []),
    (["push", "FOLDER/pair", "not a repo/at/all"], []),
    (["recipe", "FOLDER/pair"], []),
    (["recipe", "FOLDER"], []),
    (["info", "FOLDER/notes.txt"], []),
]


@pytest.mark.parametrize(
    ("command", "more"),
    CASES,
    ids=[ascii(" ".join([*command, *more]))[:60] + str(i) for i, (command, more) in enumerate(CASES)],
)
def test_a_malformed_value_is_refused_in_a_sentence(
    command: list[str], more: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
):
    argv = [part.replace("FOLDER", str(folder)) for part in [*command, *more]]
    assert main.main(argv) == USAGE
    captured = capsys.readouterr()
    said = captured.err.splitlines()[-1]
    assert re.match(r"nla[\w -]*: ", said) and "Next: " in said
    assert "Traceback" not in captured.err and "\x1b" not in captured.err
    assert not captured.out


OTHERS = [
    ("rhymes", "switchboard", "couplets"),
    ("rhymes", "FOLDER/pair", "couplets"),
    ("gates", "switchboard", "couplets"),
    ("gates", "FOLDER/small", "couplets"),
    ("two-hop", "couplets", "switchboard"),
    ("plants", "couplets", "switchboard"),
    ("auditing", "couplets", "switchboard"),
]
"""Evaluations of a family, and a pair or target of another; of which world the family is."""


@pytest.mark.parametrize(("family", "name", "world"), OTHERS)
def test_a_family_says_whose_it_is(
    family: str, name: str, world: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert main.main(["eval", family, name.replace("FOLDER", str(folder)), "--items", "20"]) == USAGE
    captured = capsys.readouterr()
    assert world in captured.err.lower() and "Next: " in captured.err and not captured.out
