"""A pair whose own figures say that it reads nothing says so in every command that takes a pair, above the output."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from nla.organisms import couplets, switchboard
from tests.helpers.command_line import commands
from tests.helpers.shell import Shell
from tests.nla.cli.test_examples import prepare, workspace
from tests.nla.cli.test_options import PROMPT

__all__ = ["workspace"]

DOUBT = "this pair reads nothing: its FVE is -0.30, and that of the baseline 'mean' is 0.00"
COMMANDS = {
    "explain": "'In spring Anna' --samples 1 --pair couplets/pair --json",
    "steer": f"{shlex.quote(PROMPT)} --replace snake=rake --pair couplets/pair --json",
    "info": "couplets/pair --json",
    "audit": "chats.jsonl --budget 1 --samples 1 --pair switchboard/pair --json",
    "probe": "poems.jsonl --text line --label season --max-rows 40 --samples 1 --pair couplets/pair",
    "eval fidelity": "couplets/pair --items 4",
    "eval claims": "switchboard/pair --store runs/mine/extract --activations 20 --fit 40",
    "eval steering": "switchboard/pair --store runs/mine/extract --items 4 --tokens 4",
    "eval instructions": "switchboard/pair --items 2 --instructions 2 --samples 1 --audited 1 --prompts prompts.yaml",
    "eval two-hop": "switchboard/pair --items 4 --warm-start switchboard/pair",
    "eval transfer": "switchboard/pair --target-adapter switchboard/adapters/goal --items 10 --activations 40",
    "eval graph": "runs/trace/*.json --samples 1 --pair couplets/pair",
    "export kitft": "couplets/pair --out exported --drop-bias --store runs/acts",
}
"""What is typed after each command that takes a pair."""
NOT_HERE = {
    **dict.fromkeys(
        ("eval auditing", "eval plants", "eval readers", "eval rhymes"), "tests/eval judge a doubtful pair"
    ),
    "eval gates": "of a pair the target alone is used",
    "trace": "of a pair the target alone is used",
    **dict.fromkeys(("recipe", "import easynla", "import kitft"), "takes a target"),
    "push": "loads nothing: the card that it publishes says so",
    "serve": "serves until Ctrl-C: /pairs says them of each pair (tests/nla/serve/test_routes.py)",
}


@pytest.fixture
def doubtful(workspace: Path) -> Path:
    """The workspace with the embedded pairs beside their targets, and figures that speak against them."""
    for organism in (couplets, switchboard):
        source = organism.PAIR.parent
        folder = workspace / source.name
        folder.mkdir()
        for part in source.iterdir():
            if part != organism.PAIR:
                (folder / part.name).symlink_to(part)
        shutil.copytree(organism.PAIR, folder / "pair")
        (folder / "pair/metrics.json").write_text('{"joint": {"fve/global": -0.3}}')
    return workspace


@pytest.mark.parametrize("name", COMMANDS)
def test_a_doubtful_pair_is_said_above_the_output_and_in_the_report(name: str, shell: Shell, doubtful: Path) -> None:
    if name in ("eval claims", "eval steering", "eval graph", "export kitft"):
        prepare(name, shell, doubtful)
    report = "--out report" if name.startswith(("eval", "probe")) else ""
    done = shell.run(f"nla {name} {COMMANDS[name]} {report}", doubtful)
    assert done.code == 0, done.stderr
    said = done.stderr.splitlines()
    assert said.count(f"nla: {DOUBT}") == 1
    if report:
        (content,), (page,) = (list((doubtful / "report").glob(f"*.{ending}")) for ending in ("json", "md"))
        doubts = json.loads(content.read_text())["doubts"]
        assert doubts[0] == DOUBT and page.read_text().split("\n\n")[1] == f"**{DOUBT}**"
        assert f"**{DOUBT}**" in done.stdout
        rivals = [f"warm start: {DOUBT}"] if "--warm-start" in COMMANDS[name] else []
        assert doubts[1:] == rivals and all(f"nla: {rival}" in said for rival in rivals)
    elif "--json" in COMMANDS[name]:
        assert json.loads(done.stdout)["doubts"] == [DOUBT]


def test_every_command_that_takes_a_pair_is_here() -> None:
    takes = {
        name
        for name, command in commands().items()
        if any(parameter.metavar in ("PAIR", "MODEL") for parameter in command.params)
    }
    assert takes == {*COMMANDS, *NOT_HERE}
