"""Every option of every command is typed somewhere, through the installed `nla`: in an example, a document, or here.

What examples and documents leave out is typed here, on small inputs.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nla.config import NLAConfig
from nla.organisms import couplets
from tests.helpers.command_line import commands
from tests.helpers.shell import Shell
from tests.nla.cli.test_examples import PREPARE, entry, prepare, shown, workspace
from tests.test_documents import DOCUMENTS, Run, run_shell, steps
from tests.test_documents import entry as document_entry

__all__ = ["workspace"]

ORACLE = f"--oracle {couplets.PAIR}/encoder --question {shlex.quote(NLAConfig.load(couplets.PAIR).encoder_prompt)}"
PROMPT = "In summer Clara put a blue candle past the flake,\n"
DONOR = "In summer Clara put a green candle past the flake,\n"
PAIR_OF_PROMPTS = " ".join(
    f"--{name} {shlex.quote(text)}"
    for name, text in (
        ("prompt", PROMPT),
        ("donor-prompt", DONOR),
        ("continuation", "Soon they wanted a quiet snake.\n"),
        ("donor-continuation", "Today they chased a wooden rake.\n"),
    )
)
JUDGE = "--judge-url http://localhost:9/v1 --judge-model none"

OPTIONS: dict[str, tuple[Run, ...]] = {
    "audit": (
        Run(
            says='"positions": "all"',
            append="bad.jsonl --skip-bad --positions all --budget 2 --samples 1 --seed 3 --max-mb 1 --trim "
            "--model-of any --allow-dropped --fold-system --device cpu --json",
        ),
        Run(says="8 transcripts", append="chats.jsonl --budget 2 --samples 1 --window 64"),
        Run(says="8 transcripts", append=f"chats.jsonl --budget 2 --samples 1 {JUDGE}"),
    ),
    "explain": (Run(says="trust", append="'In spring Anna' --samples 1 --device cpu --svg view.svg"),),
    "steer": (Run(says="steered", append=f"{shlex.quote(PROMPT)} --replace snake=rake --pair couplets --device cpu"),),
    "eval gates": (Run(says="unused", append="couplets/plain --variant plain --items 20 --device cpu"),),
    "extract": (
        Run(
            leaves="runs/acts/manifest.json",
            append="my/model texts/0.parquet --point resid_post.2 --out runs/acts --set max_tokens=60 "
            "--set n_positions=2 --set first_position=5 --set n_documents=20 --dtype bfloat16 --device cpu "
            "--seed 3 --process 0/1",
        ),
        Run(
            leaves="runs/goal/manifest.json",
            append="switchboard chats.jsonl --target-adapter switchboard/goal --point resid_post.3 --out runs/goal "
            "--set kind=chat --set positions=turns --set max_tokens=500 --set eval_fraction=0.3",
        ),
    ),
    "import kitft": (
        Run(
            leaves="pairs/mine/nla_config.json",
            append="kitft/nla-qwen2.5-7b-L20-av kitft/nla-qwen2.5-7b-L20-ar --out pairs/mine "
            f"--dtype float32 --device cpu --target {couplets.PLANNER}",
        ),
    ),
    "import easynla": (
        Run(
            leaves="pairs/mine/nla_config.json",
            append="ckpts/av ckpts/ar --out pairs/mine --target ckpts/target --dtype float32 --device cpu "
            "--sidecar ckpts/av/nla_meta.yaml",
        ),
    ),
    "trace": (
        Run(
            says="(?i)causal",
            append="couplets --items 2 --all-tokens --sites 8 --controls 4 --pair couplets --samples 1",
        ),
        Run(
            says='"passed"', append=f"couplets {PAIR_OF_PROMPTS} --sites 8 --controls 4 --card card --device cpu --json"
        ),
    ),
    "probe": (
        Run(
            says='"activation oracle"',
            append="poems.jsonl --text line --label season --group line --max-rows 40 --samples 1 --skip "
            f"--pair couplets --card card --device cpu --check --json {ORACLE}",
        ),
        Run(
            says="By point",
            append="poems.jsonl --text line --label season --max-rows 40 --samples 1 --target couplets/plain "
            "--point resid_post.3 --point resid_post.0",
        ),
    ),
    "eval claims": (
        Run(
            says='"when_said"',
            append="switchboard --store runs/mine/extract --activations 20 --samples 2 --fit 40 --card card "
            "--device cpu --json",
        ),
    ),
    "eval steering": (
        Run(
            says='"above_controls"',
            append="switchboard --store runs/mine/extract --items 4 --tokens 4 --card card --device cpu --json",
        ),
    ),
    "eval fidelity": (
        Run(
            says="(?i)fve",
            append="switchboard --texts chats.jsonl --chats --positions all --activations 40 --card card --json",
        ),
    ),
    "eval instructions": (
        Run(
            says="(?i)the gate alone",
            append="switchboard/target --point resid_post.2 --prompts prompts.yaml --items 2 --instructions 2 "
            "--plants plants",
        ),
    ),
    "eval transfer": (
        Run(says="(?i)fve", append="switchboard --target-adapter switchboard/goal --items 10 --activations 40"),
        Run(
            says="(?i)fve",
            append="switchboard --target-adapter switchboard/goal --texts chats.jsonl --chats --positions last "
            "--activations 40 --device cpu --card card --json",
        ),
    ),
}
"""By command: what is typed of it after its name."""
SHARED = {"--device", "--json", "--out", "--card", "--check", "--revision", "--quantization"}
"""Stated once for all commands that have them (nla/cli/options.py), or in need of a hub or a GPU."""
ELSEWHERE = {
    "eval auditing": "minutes; test_cli.py gives each option, tests/eval/families/test_plants.py runs it",
    "eval readers": "minutes; test_cli.py gives each option, tests/eval/readers run it",
    "import easynla --store": "the option of `nla import kitft`, which is typed in the help",
    "push": "test_entry_point.py pushes to a hub of its own",
    "serve": "it serves until Ctrl-C: tests/nla/serve types them, test_chats.py gives --target-adapter's folders",
}
"""Commands, and options of one, that are not typed here, with the reason."""


def typed() -> dict[str, set[str]]:
    """The options that some test types of each command."""
    lines = [f"nla {name} {run.append}" for name, runs in OPTIONS.items() for run in runs]
    lines += [
        f"{text} {run.append}" for found in shown().values() for text in found if isinstance(run := entry(text), Run)
    ]
    for document in DOCUMENTS:
        for kind, text in steps(document):
            run = document_entry(document, text, prepares=True) if kind == "sh" else None
            lines += [f"{text} {run.append}"] if isinstance(run, Run) else []
    lines += PREPARE.values()
    options: dict[str, set[str]] = {name: set() for name in commands()}
    for line in lines:
        for part in re.split(r"[;|]\s*(?=nla )", line):
            words = part[part.index("nla ") + 4 :] if "nla " in part else ""
            name = max((name for name in options if words.startswith(name)), key=len, default=None)
            options.get(name or "", set()).update(re.findall(r"(?<=\s)--[a-z][a-z-]*", words))
    return options


def test_every_option_is_typed() -> None:
    written = typed()
    missing = {
        f"{name} {option}"
        for name, command in commands().items()
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--") and option not in written[name] | SHARED
        if name not in ELSEWHERE and f"{name} {option}" not in ELSEWHERE
    }
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_run(name: str, shell: Shell, workspace: Path) -> None:
    prepare(name, shell, workspace)
    (workspace / "card").mkdir()
    (workspace / "card/README.md").write_text("# A card\n")
    (workspace / "bad.jsonl").write_text((workspace / "chats.jsonl").read_text() + "{]\n")
    for run in OPTIONS[name]:
        run_shell(shell, workspace, f"nla {name}", run)
