"""What the documents show is executed: every shell block and every Python block, with its outcome.

The blocks of a document run in order, in one folder that holds the repository's examples. A command runs as it is
written, through the installed `nla`, with two exceptions that the table below states: ``append`` holds options that
make it smaller, and ``instead`` replaces a part, such as the name of a model on the hub. What does not run is in the
table, with the reason.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.endpoint_server import Server
from tests.helpers.shell import Shell
from tests.helpers.tiny import load_benchmark

ROOT = Path(__file__).parents[1]
PROGRAMS = re.compile(r"(?:^|[|&;]\s*)(?:\S*/)?(?:nla|python3?|make|accelerate|git|pip|twine|sed|cd|curl)\b")
"""A command with one of these is in the table; others, such as ``printf``, only prepare a folder and must succeed."""
WRITTEN = ("yaml", "text")
"""Blocks of these kinds whose first line is ``# FILE`` are put into that file."""


class Run(NamedTuple):
    """A command that is run."""

    says: str = ""
    """A regular expression that its output matches."""
    leaves: str = ""
    """A file that is there afterwards."""
    append: str = ""
    """Options that make it smaller."""
    instead: tuple[str, str] = ("", "")
    """A regular expression of a part of the command, and what is run in its place."""
    code: int = 0
    real: bool = False
    """It needs the real model, and is run where that is installed."""


class NotRun(NamedTuple):
    """A command that is not run here."""

    reason: str


class RunsIn(NamedTuple):
    """A command that runs once, where the same command is shown: in a document, or among the examples of a help."""

    place: str
    """The document's path, or the command whose help it is, such as "eval rhymes"."""


class Block(NamedTuple):
    """A fenced block of a document."""

    kind: str
    text: str


CORPUS = (
    "--set corpus.source=corpus.jsonl --set corpus.config=null --set corpus.streaming=false --set corpus.max_tokens=60 "
    "--set corpus.n_positions=3 --set corpus.first_position=5 --set describer.describer=quote "
)
"""In place of a corpus on the hub and of a describer that a random model would be."""
SMALL = (
    "--set texts.n_train=40 --set texts.n_scored=20 --set pair.rank=2 --set pair.max_new_tokens=6 "
    "--set warmstart.encoder_steps=2 --set warmstart.decoder_steps=2 --set warmstart.batch_size=4 "
    "--set warmstart.rows_per_backward=null --set joint.steps=2 --set joint.prompts_per_step=4 "
    "--set joint.group_size=2 --set joint.rows_per_backward=null --set joint.decoder_mini_batches=2"
)
SMALL_COUPLETS = (
    "--set extract.n_documents=40 --set extract.n_eval_documents=8 --set extract.n_other_positions=2 "
    "--set pair.rank=2 --set pair.max_new_tokens=24 --set warmstart.encoder_steps=2 --set warmstart.decoder_steps=2 "
    "--set warmstart.batch_size=4 --set joint.steps=2 --set joint.prompts_per_step=4 --set joint.group_size=2 "
    "--set joint.decoder_mini_batches=2 --set joint.eval_every=1 --set joint.save_every=1"
)
INSTALLS = "installs everything into a new environment; its commands run in CI and in this suite"
HUB = "needs the hub"

DOCUMENTS: dict[str, dict[str, Run | RunsIn | NotRun]] = {
    "README.md": {
        "nla explain 'The capital of France is a city": Run(says="city", leaves="docs/token-view.svg", real=True),
        "make demo": NotRun(INSTALLS + " (tests/nla/organisms/test_shipped.py runs `nla demo`)"),
        "make real": NotRun(INSTALLS),
        "make test": NotRun(INSTALLS),
        "nla recipe": Run(leaves="my.yaml", instead=("Qwen/Qwen2.5-0.5B-Instruct", "my/model")),
        "nla train my.yaml --dry-run": Run(says="joint +would run", append=CORPUS),
        "nla train my.yaml  ": Run(leaves="runs/model/joint/pair/nla_config.json", append=CORPUS + SMALL),
        "nla explain 'The capital of France is' --pair": Run(
            says="what each activation holds", instead=("runs/qwen2.5-0.5b-instruct", "runs/model")
        ),
        "from nla import NLA": Run(says=r"cosine.*fve +-?\d"),
    },
    "CONTRIBUTING.md": {
        "make check": NotRun(INSTALLS),
        "make test": NotRun(INSTALLS),
        "make docs": NotRun(INSTALLS + " (tests/test_site.py builds the site)"),
        ".venv/bin/python -m pytest tests/nla/test_metrics.py -k fve": NotRun("it is this suite"),
        "sed -i": NotRun("changes the repository"),
        ".venv/bin/python -m pytest tests/nla/test_metrics.py -k fve   # must fail": NotRun("needs the line above"),
        "git checkout": NotRun("changes the repository"),
        ".venv/bin/python -m build": NotRun("test_packaging.py builds"),
        ".venv/bin/twine": NotRun("needs the line above"),
        "python3 -m venv": NotRun(INSTALLS),
        "/tmp/release/bin/pip": NotRun(INSTALLS),
        "cd ": NotRun("needs the line above; tests/nla/organisms/test_shipped.py runs `nla demo`"),
    },
    "docs/audit.md": {
        "cp docs/examples": Run(instead=(r"cp (\S+) +(\S+)", r"head -n 5 \1 > \2")),
        "nla audit chats.jsonl --controls": Run(
            says="5 transcripts", leaves="runs/audit/audit.html", append="--samples 1"
        ),
        "nla audit chats.jsonl --pair switchboard --rubric": Run(
            says="no controls", leaves="runs/two-rubrics/findings.parquet", append="--samples 1"
        ),
        "nla audit chats.jsonl --pair switchboard --target-adapter": Run(
            says="5 control transcripts", leaves="runs/adapter/audit.json", append="--samples 1"
        ),
        "nla audit chats.jsonl --rubric secret-word.yaml": Run(says="5 transcripts", append="--samples 1"),
        "from nla import NLA": Run(),
    },
    "docs/describers.md": {
        "from nla.train.describe": Run(says="2 texts", instead=("http://localhost:8000/v1", "ENDPOINT")),
    },
    "docs/evaluation.md": {
        "nla eval fidelity couplets --texts": Run(says="(?i)fve"),
        "nla eval claims": RunsIn("eval claims"),
        "nla eval steering": RunsIn("eval steering"),
    },
    "docs/serve.md": {
        "pip install": NotRun(INSTALLS),
        "nla serve": NotRun("serves until Ctrl-C: tests/nla/serve/test_command.py starts, asks and ends it"),
        "curl": NotRun("tests/nla/serve/test_command.py sends what it sends"),
    },
    "docs/graphs.md": {
        "nla trace couplets --out": Run(says="causal", leaves="runs/trace/report/trace.json", append="--items 10"),
        "nla trace couplets --pair": Run(says="(?s)text-only LM.*patched upstream", append="--items 4 --samples 1"),
        "nla trace couplets/planner --pairs": Run(says="resid_post", leaves="runs/mine/report/trace.json"),
        "nla trace smollm2 --pairs": NotRun("a minute, and its package; tests/eval/circuits/test_trace.py traces some"),
        "nla trace Qwen/Qwen3-0.6B --prompt": NotRun(HUB),
        "nla eval graph runs/trace": Run(says="AUROC", append="--samples 1"),
    },
    "docs/probes.md": {
        "nla eval readers couplets": NotRun(
            "minutes even where it is small; tests/eval/readers/test_readers.py runs it"
        ),
        "nla eval readers switchboard": NotRun(
            "a minute where it is small; tests/eval/readers/test_readers.py runs it"
        ),
        "nla probe poems.jsonl --text line --label season --out": Run(says="AUROC", leaves="runs/probe/probe.json"),
        "nla probe poems.jsonl --text line --label season --positions": Run(says="AUROC"),
        "nla train smollm2": NotRun(
            "two minutes, and needs smollm2; docs/real-models.md runs the stage on another target"
        ),
        "python -m nla.eval.readers.example_tasks": Run(
            leaves="runs/tasks/number.jsonl", instead=("--written runs/written/sample", "")
        ),
        "nla probe runs/tasks": NotRun("minutes, and needs smollm2; tests/eval/readers/test_example_tasks.py reads it"),
        "from nla import NLA": Run(says="season"),
    },
    "docs/real-models.md": {
        "nla train qwen2.5-7b --dry-run": NotRun(HUB),
        "nla recipe my/model": Run(leaves="mine.yaml"),
        "nla train mine.yaml --dry-run": Run(says="joint +would run", append=CORPUS),
        "nla train qwen2.5-7b  ": NotRun("needs a GPU and the hub"),
        "nla train mine.yaml --until sample": Run(
            says=r"sample\.documents +12",
            leaves="runs/model/sample/000000.jsonl",
            append="--set corpus.n_documents=12 --set sample.max_new_tokens=4 --set out=runs/model",
        ),
        "accelerate launch": NotRun("needs four GPUs and the hub"),
        "benchmarks/gpu.sh prepare": NotRun("needs a network; tests/test_gpu_script.py packs a stand-in"),
        "benchmarks/gpu.sh run": NotRun("needs a GPU and what was prepared"),
        "benchmarks/gpu.sh --dry-run": NotRun("tests/test_gpu_script.py runs it"),
        "nla extract couplets/planner": Run(leaves="runs/acts/manifest.json"),
        "nla push": NotRun(HUB + "; tests/nla/pair/test_publish.py pushes to a server of its own"),
        "nla info someone": NotRun(HUB),
        "nla import kitft": NotRun(HUB + "; tests/nla/formats/test_kitft.py imports such a pair"),
        "nla import easynla": NotRun(HUB + "; tests/nla/formats/test_easynla.py imports such a pair"),
        "nla explain 'Some text'": NotRun("needs the pair of the line above"),
        "nla export kitft": NotRun(
            "needs the pair of the line above; tests/nla/formats/test_kitft_export.py exports one"
        ),
        "nla eval transfer": Run(says="(?i)fve", leaves="runs/transfer/transfer.json", append="--activations 100"),
    },
    "docs/results.md": {
        "import torch\nfrom nla import NLA\n\npair": NotRun(
            "needs the run; tests/nla/pair/test_folder.py saves a pair so"
        ),
        "nla train couplets": Run(leaves="runs/couplets/control/pair/nla_config.json", append=SMALL_COUPLETS),
        "nla eval rhymes couplets": Run(says="(?i)warm start", append="--items 8"),
        "nla eval fidelity couplets": Run(says="(?i)newline", append="--items 8"),
        "nla eval gates": RunsIn("eval gates"),
        "python -m nla.train.organisms.couplets planner": Run(
            leaves="planner/model.safetensors", append="--steps 2 --n-documents 400"
        ),
        "python -m nla.train.organisms.couplets plain": Run(
            leaves="plain/model.safetensors", append="--steps 2 --n-documents 400"
        ),
    },
    "docs/explain.md": {
        "nla explain 'In spring": RunsIn("explain"),
        "printf 'In spring Anna left a red ribbon near the rat,\\n' | nla explain": RunsIn("explain"),
        "head -n 1 docs/examples/goal.jsonl": Run(says="trust", append="--samples 1"),
        "printf 'In spring Anna left a red ribbon near the rat,\\n' | nla steer": RunsIn("steer"),
        "from nla import NLA": Run(says=r"The next line ends with cat\. .*(high|medium)"),
    },
    "docs/families/auditing.md": {
        "nla eval auditing": NotRun("six minutes; tests/nla/audit/test_switchboard_audits.py audits such chats"),
    },
    "docs/families/gates.md": {"nla eval gates": RunsIn("eval gates")},
    "docs/families/instructions.md": {
        "nla eval instructions switchboard": Run(
            says="forced choice", append="--items 4 --instructions 3 --samples 1 --audited 2"
        ),
        "python -m nla.train.organisms.goals": NotRun(
            "minutes, and needs smollm2; tests/train/organisms/test_goals.py plants a goal in Switchboard's target"
        ),
        "nla eval instructions smollm2 --plants": NotRun(
            "a quarter of an hour, and needs smollm2; tests/eval/families/test_instructions.py judges such adapters"
        ),
    },
    "docs/families/plants.md": {"nla eval plants": RunsIn("eval plants")},
    "docs/families/rhymes.md": {"nla eval rhymes couplets --out": RunsIn("eval rhymes")},
    "docs/families/two-hop.md": {"nla eval two-hop": RunsIn("eval two-hop")},
    "docs/samples.md": {"from nla import NLA": Run(says="cosine")},
    "docs/switchboard.md": {
        "nla audit docs/examples": Run(
            says="(?i)selling", leaves="runs/audit/audit.html", append="--samples 1 --budget 4"
        ),
        "python -m nla.train.organisms.switchboard": NotRun("45 minutes; tests/train/organisms runs a part"),
        "nla train switchboard": NotRun("55 minutes; docs/results.md runs the same stages on Couplets"),
        "python -m nla.train.organisms.adapters": NotRun(
            "35 minutes; tests/train/organisms/test_adapters.py runs a part"
        ),
        "nla eval two-hop": RunsIn("eval two-hop"),
        "nla eval plants": RunsIn("eval plants"),
        "nla eval auditing": NotRun("six minutes; tests/nla/audit/test_switchboard_audits.py audits such chats"),
    },
}
"""Every documented command by its first words, document by document."""


def blocks(document: str) -> list[Block]:
    """The fenced blocks of a document, in order."""
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)]


def commands(text: str) -> list[str]:
    """The commands of a shell block: lines, joined where they go on, without comments of their own."""
    found: list[str] = []
    open_until = None
    for line in text.splitlines():
        if open_until is not None or (found and (found[-1].endswith("\\") or is_open(found[-1]))):
            found[-1] += "\n" + line
            open_until = None if line == open_until else open_until
        elif line.strip() and not line.startswith("#"):
            found.append(line)
            heredoc = re.search(r"<<'?(\w+)'?", line)
            open_until = heredoc[1] if heredoc else None
    return found


def first_line(command: str) -> str:
    """The line in which a command names its program; the others may be a text that it writes."""
    return command.partition("\n")[0]


def is_open(command: str) -> bool:
    """Is this the beginning of a loop that has not ended?"""
    return len(re.findall(r"\bdo\b", command)) > len(re.findall(r"\bdone\b", command))


def without_comment(command: str) -> str:
    """The command alone."""
    return command.partition("   #")[0].rstrip()


def run_shell(shell: Shell, folder: Path, command: str, run: Run) -> None:
    """Run a command in the folder, and hold it against its outcome."""
    words = f"{without_comment(command)} {run.append}".rstrip()
    words = re.sub(*run.instead, words) if run.instead[0] else words
    result = shell.run(words, folder)
    assert result.code == run.code, f"{words}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    assert re.search(run.says, result.stdout, re.DOTALL), f"{words}\n{result.stdout[-4000:]}"
    assert (folder / run.leaves).exists(), f"{words}: no {run.leaves}"


def run_python(folder: Path, code: str, namespace: dict[str, object], run: Run) -> None:
    """Run a Python block in the folder; blocks of one document share their names. ENDPOINT is a server of our own."""
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed), Server() as server:
        exec(code.replace(run.instead[0], server.url) if run.instead[1] == "ENDPOINT" else code, namespace)
    assert re.search(run.says, printed.getvalue(), re.DOTALL), printed.getvalue()


def steps(document: str) -> list[tuple[str, str]]:
    """What a document shows to be run, in order: pairs of a kind, "sh" or "python", and a command or block."""
    shown: list[tuple[str, str]] = []
    for block in blocks((ROOT / document).read_text(encoding="utf-8")):
        if block.kind == "sh":
            shown += [("sh", command) for command in commands(block.text)]
        else:
            shown.append(block)
    return shown


def entry(document: str, shown: str, prepares: bool = False) -> Run | RunsIn | NotRun:
    """What the table says of a command or block; one that only prepares the folder need not be there."""
    matching = [key for key in DOCUMENTS[document] if shown.startswith(key)]
    if prepares and not matching:
        return Run()
    assert matching, f"{document}: add this to the table of tests/test_documents.py: {shown}"
    return DOCUMENTS[document][max(matching, key=len)]


def shows(document: str, real: bool) -> bool:
    """Whether a document shows something to be run, with the real model or without."""
    return any(isinstance(run, Run) and run.real == real for run in DOCUMENTS[document].values())


@pytest.mark.slow
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if shows(name, real=False)])
def test_what_a_document_shows_runs(document: str, shell: Shell, tmp_path: Path) -> None:
    run_document(document, shell, tmp_path, real=False)


@pytest.mark.slow
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if shows(name, real=True)])
def test_what_a_document_shows_of_the_real_model_runs(
    document: str, shell: Shell, tmp_path: Path, smollm2: str
) -> None:
    run_document(document, shell, tmp_path, real=True)


def run_document(document: str, shell: Shell, folder: Path, real: bool) -> None:
    """Run what a document shows in a folder with its examples: the commands of the real model, or all others."""
    shutil.copytree(ROOT / "docs" / "examples", folder / "docs" / "examples")
    if "my/model" in str(DOCUMENTS[document]) and not real:
        recipe = load_benchmark("recipe")
        recipe.make_target(folder / "my" / "model", recipe.make_corpus(folder / "corpus.jsonl", 96))
    namespace: dict[str, object] = {}
    ran: set[str] = set()
    for kind, shown in steps(document):
        if kind in WRITTEN:
            if named := re.match(r"# (\S+\.\w+)\n", shown):
                (folder / named[1]).write_text(shown, encoding="utf-8")
            continue
        prepares = kind == "sh" and not PROGRAMS.search(first_line(shown))
        run = entry(document, shown, prepares)
        if not isinstance(run, Run) or (run.real != real and not prepares):
            continue
        if kind == "python":
            run_python(folder, shown, namespace, run)
        elif without_comment(shown) not in ran:
            run_shell(shell, folder, shown, run)
            ran.add(without_comment(shown))


def test_every_document_is_in_the_table_and_every_block_has_a_kind() -> None:
    documents = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]}
    for document in sorted(documents):
        text = (ROOT / document).read_text(encoding="utf-8")
        assert {block.kind for block in blocks(text)} <= {"sh", "python", *WRITTEN}, document
        assert not re.search(r"^    (nla|python|make|pip) ", text, re.MULTILINE), (
            f"{document}: a command without a fence"
        )
        assert document in DOCUMENTS or not steps(document), f"{document} is not in the table"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_in_the_table_and_every_entry_is_in_the_document(document: str) -> None:
    shown = [text for kind, text in steps(document) if kind not in WRITTEN]
    for kind, text in steps(document):
        if kind == "python" or (kind == "sh" and PROGRAMS.search(first_line(text))):
            entry(document, text)
    gone = [key for key in DOCUMENTS[document] if not any(text.startswith(key) for text in shown)]
    assert not gone, f"{document} no longer shows {gone}"


def test_commands_are_told_apart() -> None:
    block = "# a comment\ncat > a <<'EOF'\nnla x\nEOF\nnla a \\\n  b\nfor x in y; do\n  echo $x\ndone\nnla c\n"
    assert commands(block) == [
        "cat > a <<'EOF'\nnla x\nEOF",
        "nla a \\\n  b",
        "for x in y; do\n  echo $x\ndone",
        "nla c",
    ]
