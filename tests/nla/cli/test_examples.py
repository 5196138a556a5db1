"""Every example that the help shows is executed, through the installed `nla`, with its stated outcome.

The examples of a command run in order, in a folder that holds the files they name: texts, tables and chats made here,
and links to the embedded pairs under the names that the examples give to a user's own. ``append`` makes an example
smaller, ``instead`` replaces the name of a model on the hub. What does not run is in the table, with the reason.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nla.organisms import couplets, switchboard
from tests.helpers.command_line import commands, examples, helps
from tests.helpers.shell import Shell
from tests.helpers.tiny import load_benchmark
from tests.test_documents import DOCUMENTS, NotRun, Run, RunsIn, run_shell, steps, without_comment
from tests.test_documents import entry as document_entry

ROOT = Path(__file__).parents[3]
HUB = "needs the hub"
SMALL = (
    "--set extract.n_documents=40 --set extract.n_eval_documents=8 --set extract.n_other_positions=2 "
    "--set pair.rank=2 --set pair.max_new_tokens=24 --set warmstart.encoder_steps=2 --set warmstart.decoder_steps=2 "
    "--set warmstart.batch_size=4"
)
TINY_CORPUS = "--set max_tokens=60 --set n_positions=2 --set first_position=5 --set n_documents=20"
ON_TARGET = ("resid_post.12", "resid_post.2")
CORPUS = (
    "--set corpus.source=corpus.jsonl --set corpus.config=null --set corpus.streaming=false "
    "--set describer.describer=quote"
)

EXAMPLES: dict[str, Run | RunsIn | NotRun] = {
    "nla demo": NotRun("a minute and more: tests/nla/organisms/test_shipped.py runs it through the installed nla"),
    "nla explain 'In spring": Run(says="trust.*spring.*The last word is"),
    "printf 'In spring Anna left a red ribbon near the rat,\\n' | nla explain -": Run(says="The next line ends with"),
    "nla explain --file poem.txt --positions": Run(says="The next line ends with"),
    "nla explain --chat chat.json": Run(says="trust", append="--samples 1"),
    "nla explain --file poem.txt --html": Run(says="The next line ends with", leaves="poem.html"),
    "nla explain --file poem.txt --pair pairs/27b": NotRun("needs three GPUs and a pair of 27 billion parameters"),
    "nla explain --file poem.txt --json": Run(
        says=r'\["In", ', instead=("jq .*", "python jq.py")
    ),  # jq is no part of Python: a script that prints the same
    "printf 'In spring Anna left a red ribbon near the rat,\\n' | nla steer -": Run(says="steered.*bat"),
    "nla steer --file line1.txt": Run(says='"strength": 1.5'),
    "nla serve": NotRun("serves until Ctrl-C: tests/nla/serve/test_command.py starts, asks and ends it"),
    "nla info": Run(says="parameters.encoder"),
    "nla info runs/couplets": Run(says='"d_model": '),
    "nla eval claims runs/mine/joint/pair --store runs/mine/extract --out": Run(
        says="word before", leaves="runs/report/claims.json", append="--activations 20"
    ),
    "nla eval claims runs/mine/joint/pair --store runs/mine/extract --beside": Run(
        says="true claims per right probe", append="--activations 20", code=1
    ),
    "nla eval steering runs/mine/joint/pair --store runs/mine/extract --out": Run(
        says="unrelated edit", leaves="runs/report/steering.png", append="--items 4 --tokens 8"
    ),
    "nla eval steering runs/mine/joint/pair --store runs/mine/extract --items": Run(
        says="more often than every control", instead=("--items 200", "--items 4"), append="--tokens 2", code=1
    ),
    "nla eval fidelity": Run(says="(?i)newline", append="--items 6"),
    "nla eval fidelity someone": Run(says="(?i)fve", leaves="runs/report/fidelity.json", append="--activations 60"),
    "nla eval fidelity runs/mine": Run(says="(?i)fve", append="--activations 60"),
    "nla eval fidelity couplets": RunsIn("docs/results.md"),
    "nla eval rhymes couplets --out": Run(
        says="(?i)named.*causal", leaves="runs/report/rhymes.png", append="--items 6"
    ),
    "nla eval rhymes couplets/plain": Run(says="(?i)unused", append="--items 6"),
    "nla eval rhymes couplets --warm-start": RunsIn("docs/results.md"),
    "nla eval gates couplets/planner": Run(says="planned and used", append="--items 30"),
    "nla eval gates couplets/plain": Run(
        says="decodable, unused", leaves="runs/report/gates.json", append="--items 30"
    ),
    "nla eval two-hop --items 60": Run(says="(?i)causal", append="--items 4"),
    "nla eval two-hop runs/switchboard": Run(says="(?i)warm start", append="--items 4", code=1),
    "nla eval instructions smollm2": NotRun("a quarter of an hour, and needs the package of SmolLM2"),
    "nla eval instructions my/pair": Run(
        says="forced choice", append="--items 3 --instructions 2 --samples 1 --audited 1", code=1
    ),
    "nla eval auditing": NotRun("six minutes; tests/nla/audit/test_switchboard_audits.py audits such chats"),
    "nla eval plants --out": Run(says="word-hat", leaves="runs/report/plants.json", append="--items 4", code=1),
    "nla eval plants runs/switchboard": Run(says="word-hat", append="--items 4"),
    "nla eval transfer switchboard": Run(says="(?i)fve", append="--activations 60"),
    "nla eval transfer my/pair": Run(leaves="runs/transfer/transfer.json", append="--activations 60", code=1),
    "nla eval readers": NotRun("minutes even where it is small; tests/test_documents.py runs it on Switchboard"),
    "nla eval graph": Run(says="(?i)auroc", append="--samples 1"),
    "nla audit chats.jsonl --pair switchboard --controls": Run(
        says="8 transcripts", leaves="runs/audit/audit.html", append="--samples 1 --budget 2"
    ),
    "nla audit chats.jsonl --pair switchboard --rubric": Run(says="no controls", append="--samples 1 --budget 2"),
    "nla audit chats.jsonl --pair switchboard --target-adapter": Run(
        says="8 control transcripts", leaves="runs/goal/audit.json", append="--samples 1 --budget 2"
    ),
    "nla trace couplets --out": RunsIn("docs/graphs.md"),
    "nla trace couplets --pair": RunsIn("docs/graphs.md"),
    "nla trace couplets/plain": Run(append="--items 8"),
    "nla trace couplets/planner --pairs": RunsIn("docs/graphs.md"),
    "nla probe poems.csv": Run(says="AUROC"),
    "nla probe poems.csv --text line --label season --target": Run(says="By point"),
    "nla probe poems.jsonl": RunsIn("docs/probes.md"),
    "nla train qwen2.5-7b --dry-run": NotRun(HUB + "; the plan of a recipe that `nla recipe` wrote is made here"),
    "nla train couplets": NotRun("an hour; tests/test_documents.py runs the same stages in small"),
    "accelerate launch": NotRun("needs four GPUs and the hub"),
    "nla train couplets --until warmstart": Run(leaves="runs/try/warmstart/pair/nla_config.json", append=SMALL),
    "nla train my_recipe.yaml": Run(leaves="runs/mine/extract/manifest.json", append="--until extract"),
    "nla recipe": Run(leaves="my.yaml", instead=("Qwen/Qwen2.5-0.5B-Instruct", "my/model")),
    "nla train my.yaml --dry-run": Run(says="joint +would run", append=CORPUS),
    "nla extract Qwen": NotRun(HUB),
    "nla extract my/model 'texts": Run(leaves="runs/acts/manifest.json", instead=ON_TARGET, append=TINY_CORPUS),
    "nla extract my/model chats.jsonl": Run(
        leaves="runs/chats/manifest.json",
        instead=("resid_post.12(.*)runs/acts", r"resid_post.2\1runs/chats"),
        append="--set max_tokens=500 --set eval_fraction=0.3",
    ),
    "nla import kitft": Run(leaves="pairs/qwen7b/nla_config.json", append=f"--target {couplets.PLANNER}"),
    "nla import easynla": Run(leaves="pairs/qwen8b/nla_config.json", append="--target ckpts/target --dtype float32"),
    "nla import parquet": Run(
        leaves="runs/back/manifest.json",
        instead=("Qwen/Qwen2.5-7B-Instruct --out runs/acts", f"{couplets.PLANNER} --out runs/back"),
    ),
    "nla export kitft runs": Run(says="bias", leaves="exported/ar/config.json", append="--drop-bias --store runs/acts"),
    "nla export kitft my/pair": Run(says="without the bias", instead=("my/pair", "couplets")),
    "nla export parquet": Run(leaves="data/acts.parquet"),
    "nla push": NotRun("needs the hub: test_entry_point.py pushes to one of its own"),
}
"""Every example by its first words."""

STORE = (
    f"nla extract {couplets.PLANNER} lines.txt --point resid_post.3 --out runs/acts "
    "--set kind=lines --set positions=last --set max_tokens=60 --set eval_fraction=0.3"
)
CLAIMS_STORE = (
    'sed \'s/^{/{"attributes": {"form": "sales talk"}, /\' chats.jsonl > labelled.jsonl; '
    'sed \'s/^{/{"attributes": {"form": "small talk"}, /\' ordinary.jsonl >> labelled.jsonl; '
    "nla extract my/target labelled.jsonl --point resid_post.3 --out runs/mine/extract --set kind=chat "
    "--set positions=kinds --set n_positions=6 --set max_tokens=500 --set eval_fraction=0.4"
)
PREPARE = {
    "eval graph": "nla trace couplets --out runs/trace --items 8",
    "eval fidelity": f"{STORE}; mkdir -p runs/mine; mv runs/acts runs/mine/extract",
    "eval claims": CLAIMS_STORE,
    "eval steering": CLAIMS_STORE,
    "export kitft": STORE,
    "export parquet": STORE,
    "import kitft": f"{STORE}; nla export kitft couplets --drop-bias --store runs/acts --out kitft; "
    "mv kitft/av kitft/nla-qwen2.5-7b-L20-av; mv kitft/ar kitft/nla-qwen2.5-7b-L20-ar",
    "import parquet": f"{STORE}; mkdir data; nla export parquet runs/acts --split eval --out data/rl_shuf.parquet",
}
"""What runs before the examples of a command: what they say was made elsewhere."""


def entry(example: str) -> Run | RunsIn | NotRun:
    """What the table says of an example."""
    matching = [key for key in EXAMPLES if example.startswith(key)]
    assert matching, f"add this to the table of {Path(__file__).name}: {example}"
    return EXAMPLES[max(matching, key=len)]


def shown() -> dict[str, list[str]]:
    """The examples of each command and group, in order."""
    return {name: found for name, text in helps().items() if (found := examples(text))}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder with what the examples name."""
    fill(tmp_path)
    return tmp_path


def fill(folder: Path) -> None:
    """Put what the examples name into a folder."""
    line = "In spring Anna left a red ribbon near the rat,\n"
    for name in ("poem.txt", "line1.txt", "lines.txt", "held_out.txt"):
        (folder / name).write_text(line)
    names = [
        f"In {season} {name} left a {colour} {word} near the rat,"
        for season in ("spring", "winter")
        for name in ("Anna", "Emma", "Kate", "Henry", "Frank", "Ivy")
        for colour in ("red", "blue", "green", "white")
        for word in ("ribbon", "candle", "letter", "basket")
    ]
    (folder / "lines.txt").write_text("\n".join(names) + "\n")
    (folder / "held_out.txt").write_text("\n".join(names) + "\n")
    rows = [{"line": name, "season": name.split()[1]} for name in names[::3]]
    (folder / "poems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "poems.csv").write_text("line,season\n" + "".join(f'"{row["line"]}",{row["season"]}\n' for row in rows))
    for name, source in (("chats", "goal"), ("ordinary", "goal-sham")):
        chats = (ROOT / f"docs/examples/{source}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(chats[:8]))
    chat = json.loads((folder / "chats.jsonl").read_text().splitlines()[0])
    (folder / "chat.json").write_text(json.dumps(chat))
    rubric = (ROOT / "nla/audit/rubrics/evaluation-awareness.yaml").read_text()
    (folder / "my_rubric.yaml").write_text(rubric.replace("name: evaluation-awareness", "name: mine"))
    (folder / "prompts.yaml").write_text((ROOT / "docs/examples/instructions.yaml").read_text())
    (folder / "jq.py").write_text(
        "import json, sys\n"
        "for one in json.load(sys.stdin)['explanations']:\n"
        "    print(json.dumps([one['token'], one['texts'][0], one['trust']]))\n"
    )
    for name, organism in (("couplets", couplets.PAIR.parent), ("switchboard", switchboard.PAIR.parent)):
        (folder / "runs" / name).mkdir(parents=True)
        for stage in ("joint", "warmstart", "control"):
            (folder / "runs" / name / stage).symlink_to(organism)
    (folder / "runs/switchboard/plants").symlink_to(switchboard.ADAPTERS_FOLDER)
    (folder / "runs/qwen2.5-7b").mkdir()
    (folder / "runs/qwen2.5-7b/joint").symlink_to(couplets.PAIR.parent)
    (folder / "someone").mkdir()
    (folder / "someone/nla-qwen2.5-7b").symlink_to(couplets.PAIR)
    (folder / "my").mkdir()
    links = {"pair": switchboard.PAIR, "target": switchboard.TARGET}
    for name, source in {**links, "adapter": switchboard.ADAPTERS_FOLDER / "goal"}.items():
        (folder / "my" / name).symlink_to(source)
    (folder / "plants").mkdir()  # by the instruction of prompts.yaml that each plants
    for end in ("", "-sham"):
        (folder / "plants" / f"honey{end}").symlink_to(switchboard.ADAPTERS_FOLDER / f"goal{end}")


def prepare(name: str, shell: Shell, folder: Path) -> None:
    """Make what the examples of this command need besides."""
    if name in ("train", "recipe", "extract"):
        recipe = load_benchmark("recipe")
        texts = recipe.make_corpus(folder / "corpus.jsonl", 60)
        recipe.make_target(folder / "my/model", texts)
        (folder / "texts").mkdir()
        import pandas
        import yaml

        pandas.DataFrame({"text": texts}).to_parquet(folder / "texts/0.parquet")
        content = {**recipe.recipe(Path(), "runs/mine"), "target": "my/model"}
        (folder / "my_recipe.yaml").write_text(yaml.safe_dump(content))
    if name == "import easynla":
        load_benchmark("parity_pairs").lora_pair(folder / "ckpts", "llama")
        (folder / "ckpts/ar").symlink_to(folder / "ckpts/av/critic")
    if name == "eval transfer":  # in the words of Switchboard, which `my/pair` reads
        chats = [json.loads(line)["messages"] for line in (folder / "chats.jsonl").read_text().splitlines()]
        (folder / "held_out.txt").write_text("\n".join(chat[1]["content"] for chat in chats) + "\n")
    if name == "eval fidelity":
        for stage in ("joint", "warmstart"):
            (folder / "runs/mine").mkdir(exist_ok=True)
            (folder / "runs/mine" / stage).symlink_to(couplets.PAIR.parent)
    if name in ("eval claims", "eval steering"):
        (folder / "runs/mine").mkdir()
        for stage in ("joint", "warmstart"):
            (folder / "runs/mine" / stage).symlink_to(switchboard.PAIR.parent)
    if PREPARE.get(name):
        done = shell.run(PREPARE[name], folder)
        assert done.code == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, found in shown().items() if any(isinstance(entry(e), Run) for e in found)]
)
def test_the_examples_of_a_command_run(name: str, shell: Shell, workspace: Path) -> None:
    prepare(name, shell, workspace)
    for example in shown()[name]:
        run = entry(example)
        if isinstance(run, Run):
            run_shell(shell, workspace, example, run)


def test_every_example_is_in_the_table_and_every_entry_is_an_example() -> None:
    everything = [example for found in shown().values() for example in found]
    for example in everything:
        entry(example)
    gone = [key for key in EXAMPLES if not any(example.startswith(key) for example in everything)]
    assert not gone, f"the help no longer shows {gone}"


def test_a_command_that_runs_elsewhere_is_the_very_same_there() -> None:
    ran = {name: [text for text in found if isinstance(entry(text), Run)] for name, found in shown().items()}
    elsewhere = [(text, entry(text)) for found in shown().values() for text in found]
    for document in DOCUMENTS:
        texts = [text for kind, text in steps(document) if kind == "sh" and text.startswith("nla ")]
        found = [(without_comment(text), document_entry(document, text)) for text in texts]
        ran[document] = [text for text, run in found if isinstance(run, Run)]
        elsewhere += found
    for text, run in elsewhere:
        assert not isinstance(run, RunsIn) or text in ran[run.place], f"{run} does not run: {text}"


def test_every_command_runs_in_an_example_or_has_a_reason() -> None:
    without = {name for name in commands() if not any(isinstance(entry(e), Run | RunsIn) for e in shown()[name])}
    assert without == {"demo", "push", "serve", "eval auditing", "eval readers"}
