"""Every way out that an error names exists (commands, options, extras, settings, files), and helps when it is taken."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import re
import shutil
import tomllib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from nla import errors
from nla.organisms import couplets
from nla.storage.schema import dataclass_in
from nla.train.recipe import Recipe
from tests.helpers.command_line import commands
from tests.helpers.shell import Shell
from tests.nla.cli.test_examples import STORE, fill, prepare
from tests.nla.cli.test_options import ORACLE

ROOT = Path(__file__).parents[1]
ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.NLAError)}
PLACEHOLDER = "…"
_COMMAND = re.compile(r"(?:`|^|: )nla ((?:[a-z][a-z-]*)(?: [a-z][a-z-]*)?)")
_OPTION = re.compile(r"(?<![\w/-])--[a-z][\w-]*")


class Remedy(NamedTuple):
    """What an error says to do next, and where it is said."""

    place: str
    text: str


def text_of(node: ast.AST | None) -> str:
    """The texts of an expression, with a mark where something is put in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(text_of(value) for value in values)
        case ast.BinOp(left=left, right=right):
            return text_of(left) + text_of(right)
        case ast.IfExp(body=body, orelse=other):
            return f"{text_of(body)}; {text_of(other)}"
        case _:
            return PLACEHOLDER


def remedies() -> Iterator[Remedy]:
    """The third argument of every typed error, in the call or in a name such as ``fix``."""
    for path in sorted(path for top in ("nla", "train", "eval") for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            written: list[ast.AST] = []
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                written += [keyword.value for keyword in node.keywords if keyword.arg == "fix"]
                if name in ERRORS | {"Problem", "bad", "_refuse"} and len(node.args) >= 3:
                    written.append(node.args[-1])
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name) and target.id.lower() in ("fix", "restore", "login", "advice"):
                        written.append(node.value)
                    elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        names = [getattr(element, "id", "") for element in target.elts]
                        written += [v for n, v in zip(names, node.value.elts, strict=False) if n == "fix"]
            for value in written:
                text = " ".join(text_of(value).split())
                if text.strip(PLACEHOLDER):
                    yield Remedy(f"{path.relative_to(ROOT)}:{node.lineno}", text)


REMEDIES = list(remedies())
ALL_COMMANDS = {
    name: {option for parameter in command.params for option in parameter.opts} for name, command in commands().items()
}


def test_enough_remedies_are_found_to_say_anything() -> None:
    assert len(REMEDIES) > 350
    assert sum(bool(_OPTION.search(text)) for _, text in REMEDIES) > 20


@pytest.mark.parametrize("place, text", [r for r in REMEDIES if _COMMAND.search(r.text) or _OPTION.search(r.text)])
def test_commands_and_options_of_remedies_exist(place: str, text: str) -> None:
    named = []
    for match in _COMMAND.finditer(text):
        words = match[1].split()
        known = [name for name in (" ".join(words), words[0]) if name in ALL_COMMANDS or is_group(name)]
        assert known, f"{place}: no command `nla {match[1]}`"
        named += [name for name in ALL_COMMANDS if name == known[0] or name.startswith(f"{known[0]} ")]
    options = set().union(*(ALL_COMMANDS[name] for name in named or ALL_COMMANDS))
    for option in _OPTION.findall(text):
        assert option in options, f"{place}: no option {option}"


def is_group(name: str) -> bool:
    return any(command.startswith(f"{name} ") for command in ALL_COMMANDS)


@pytest.mark.parametrize("place, text", [r for r in REMEDIES if "pip install" in r.text])
def test_what_a_remedy_installs_is_known(place: str, text: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [line for group in project["optional-dependencies"].values() for line in group] + project["dependencies"]
    packages = {re.split(r"[\[<>=~]", line)[0] for line in named}
    (what,) = re.findall(r"pip install '?([\w.-]+(?:\[\w+\])?)", text)
    extra = re.fullmatch(r"nla\[(\w+)\]", what)
    assert (extra[1] in project["optional-dependencies"]) if extra else (what in packages), f"{place}: {what}"


def test_settings_that_a_remedy_names_exist() -> None:
    inner = {name: dataclass_in(hint) for name, hint in typing.get_type_hints(Recipe).items()}
    sections = {name: {f.name for f in dataclasses.fields(cls)} for name, cls in inner.items() if cls is not None}  # pyright: ignore
    for place, text in REMEDIES:
        for section, key in re.findall(r"\b([a-z]+)\.([a-z_]+)\b", text):
            if section in sections and key not in ("md", "yaml", "py"):
                assert key in sections[section], f"{place}: no {section}.{key}"


def test_words_with_underscores_in_remedies_are_names_that_can_be_used() -> None:
    """Arguments, settings and functions: what a user can give or call, and no property that can only be read."""
    usable = set()
    for path in (path for top in ("nla", "train", "eval") for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                usable |= {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
                if not any(getattr(d, "id", "") in ("property", "cached_property") for d in node.decorator_list):
                    usable.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                usable.add(node.target.id)
    for place, text in REMEDIES:
        for word in re.findall(r"(?<![\w./<|'\[])[a-z]+_[a-z_]+[a-z](?![\w.|(]|>)", text):
            assert word in usable | FOREIGN, f"{place}: {word!r} in {text!r}"


FOREIGN = {
    "path_initial_model_for_weight_conversion",
    "modules_to_save",
    "reasoning_content",
    "eos_token",
    "eos_token_id",
}
"""Names of transformers, PEFT and chats that a remedy may name."""


def test_files_that_a_remedy_names_are_there() -> None:
    for place, text in REMEDIES:
        for name in re.findall(r"\b(?:docs|train|nla|eval)/[\w./-]+\.(?:md|py|yaml)", text):
            assert (ROOT / name).is_file(), f"{place}: no {name}"


# What is said to be done is done


class Way(NamedTuple):
    """How an error is met, and what its remedy says to do; what is no Python is a shell command."""

    wrong: str
    right: tuple[str, ...]
    """Each with {printed}, what of the message ``takes`` matches, put in."""
    before: tuple[str, ...] = ()
    needs: str = ""
    """The command whose examples' files are needed; see :func:`tests.nla.cli.test_examples.prepare`."""
    takes: str = ""


TINY = "from tests.helpers.tiny import *; pair = nla = make_pair(); acts = pair.read(TEXTS)"
SAVED = (
    f"{TINY}; make_model().save_pretrained('target'); make_tokenizer().save_pretrained('target'); "
    "bare = make_pair(target='target'); bare.baselines = {}; bare.save_pretrained('bare')",
    "from itertools import product; "
    "Path('many.txt').write_text(''.join(f'{a} {b} {c} on the mat.\\n' for a, b, c in product(WORDS[:2], WORDS[2:6], "
    "WORDS[6:8])))",
)
CHATS = (
    "from nla.transcripts.prepared import chats_of; from tests.helpers.chat_templates import tokenizer_of; "
    "from tests.helpers.talk import said",
    "chat = said(('system', 'Be brief.'), ('user', 'Is it 5? '), ('assistant', 'Yes.'))",
)
AUDIT = "nla audit chats.jsonl --samples 1 --budget 1"
WHOLE = AUDIT.replace("chats.jsonl", "whole.json")
LINE = "'In spring Anna left a red ribbon near the rat,\n'"
MY_STORE = "--point resid_post.2 --out acts --set max_tokens=60 --set n_positions=2 --set first_position=2"
EXTRACT = f"nla extract my/model corpus.jsonl {MY_STORE} --set n_documents=20"
PLAN = "nla train my_recipe.yaml --dry-run"
ALONE = "--target couplets/plain --point resid_post.3"
PROBE = "--text line --label season --max-rows 40 --samples 1"
EASY = "nla import easynla ckpts/av --out mine --dtype float32"
LOAD = "import nla.formats.easynla as easynla; easynla.load"
KITFT = "nla import kitft kitft/nla-qwen2.5-7b-L20-av kitft/nla-qwen2.5-7b-L20-ar"
JUDGED = "settings = {'rubrics': ['judged.yaml'], 'judge_url': 'http://localhost:9/v1'}"

WAYS: dict[str, Way] = {
    "eval/pair/fidelity.py: give more texts; or the training activations": Way(
        "judge_fidelity(bare, FidelitySettings(texts='one.txt'))",
        (
            "judge_fidelity(bare, FidelitySettings(texts='many.txt'))",
            "nla eval fidelity bare --store acts --activations 20",
            "nla = bare; nla.fit_baselines(nla.read(TEXTS)); judge_fidelity(nla, FidelitySettings(texts='one.txt'))",
        ),
        (
            *SAVED,
            "from nla.eval.pair.fidelity import *; Path('one.txt').write_text('the cat sat on the mat.\\n')",
            "nla extract target many.txt --point resid_post.1 --out acts --set kind=lines --set max_tokens=20 "
            "--set first_position=0 --set n_positions=2 --set eval_fraction=0.4",
        ),
    ),
    "eval/pair/fidelity.py: give --texts or --store": Way(
        "nla eval fidelity --texts lines.txt --store runs/acts",
        (
            "nla eval fidelity --texts lines.txt --activations 20",
            "nla eval fidelity --store runs/acts --activations 20",
        ),
        needs="export kitft",
    ),
    "eval/pair/fidelity.py: give --texts FILE": Way(
        "nla eval fidelity switchboard --chats",
        ("nla eval fidelity switchboard --chats --texts chats.jsonl --activations 20",),
    ),
    "eval/pair/texts.py: give --texts FILE": Way(
        "nla eval fidelity bare", ("nla eval fidelity bare --texts many.txt --activations 20",), SAVED
    ),
    "eval/pair/transfer.py: give --target-adapter, such as": Way(
        "nla eval transfer switchboard",
        ("nla eval transfer switchboard --target-adapter {printed} --items 10 --activations 40",),
        takes="such as (switchboard/goal)",
    ),
    "eval/pair/transfer.py: nla.fit_baselines(acts)": Way(
        "judge_transfer('pairs/mine', settings)",
        (
            f"{KITFT} --target {couplets.PLANNER} --out pairs/mine --store runs/acts",
            "nla = NLA.from_pretrained('pairs/mine'); acts = nla.read(lines); nla.fit_baselines(acts)",
        ),
        (
            f"{KITFT} --target {couplets.PLANNER} --out pairs/mine",
            "from nla import NLA; from nla.eval.pair.transfer import *",
            "lines = Path('lines.txt').read_text().splitlines()",
            "settings = TransferSettings(target_adapter='any', texts='lines.txt')",
        ),
        needs="import kitft",
    ),
    "eval/readers/compare.py: give --oracle and --question": Way(
        f"nla probe poems.jsonl {PROBE} --question 'What is it?'", (f"nla probe poems.jsonl {PROBE} {ORACLE}",)
    ),
    "eval/readers/labelled_texts.py: leave out --target or --pair": Way(
        f"nla probe poems.jsonl {PROBE} {ALONE} --pair couplets",
        (f"nla probe poems.jsonl {PROBE} {ALONE}", f"nla probe poems.jsonl {PROBE} --pair couplets"),
    ),
    "eval/readers/labelled_texts.py: give --point": Way(
        f"nla probe poems.jsonl {PROBE} --target couplets/plain", (f"nla probe poems.jsonl {PROBE} {ALONE}",)
    ),
    "eval/readers/labelled_texts.py: give --pair, or no --oracle": Way(
        f"nla probe poems.jsonl {PROBE} {ALONE} {ORACLE}",
        (f"nla probe poems.jsonl {PROBE} {ALONE}", f"nla probe poems.jsonl {PROBE} --pair couplets {ORACLE}"),
    ),
    "eval/readers/labelled_texts.py: …; or leave out": Way(
        f"nla probe odd.jsonl {PROBE}",
        (f"nla probe odd.jsonl {PROBE} --skip",),
        ('cat poems.jsonl > odd.jsonl; echo \'{"line": "zebra", "season": "winter"}\' >> odd.jsonl',),
    ),
    "nla/audit/findings.py: give --judge-url": Way(
        f"{AUDIT} --rubric judged.yaml",
        (
            f"{JUDGED}; from nla.audit.run import AuditSettings, matcher_for; matcher_for(AuditSettings(**settings))",
            AUDIT,
        ),
        ("sed 's/^match:/match:\\n  judge: true/' my_rubric.yaml > judged.yaml",),
    ),
    "nla/audit/run.py: give --target-adapter": Way(
        f"{AUDIT} --control-target base",
        (f"{AUDIT} --control-target base --target-adapter switchboard/goal", f"{AUDIT} --controls ordinary.jsonl"),
    ),
    "nla/audit/run.py: leave them out of one side": Way(
        f"{AUDIT} --controls chats.jsonl",
        (
            f"{AUDIT} --controls ordinary.jsonl",
            f"{AUDIT} --controls chats.jsonl --control-target switchboard/goal-sham",
        ),
    ),
    "nla/audit/settings.py: raise --samples": Way(
        "AuditSettings(samples=0)", ("AuditSettings(samples=1)",), ("from nla.audit.settings import *",)
    ),
    "nla/audit/settings.py: raise --budget": Way(
        "AuditSettings(budget=0)", ("AuditSettings(budget=1)",), ("from nla.audit.settings import *",)
    ),
    "nla/audit/settings.py: raise --window": Way("nla audit chats.jsonl --window 1", (f"{AUDIT} --window 64",)),
    "nla/transcripts/positions.py: raise --budget": Way(
        "select(chat, 'structure', budget=0)",
        ("select(chat, 'structure', budget=1)",),
        (*CHATS, "from nla.transcripts.positions import *; chat = chats_of(tokenizer_of('chatml'), chat)[0]"),
    ),
    "nla/baselines.py: pass acts.strata": Way(
        "fit_baselines(acts.vectors, ['all'])",
        ("fit_baselines(acts.vectors, acts.strata)",),
        (TINY, "from nla.baselines import *"),
    ),
    "nla/stats.py: pass acts.strata": Way(
        "derangement(len(acts), 0, ['all'])",
        ("derangement(len(acts), 0, acts.strata)",),
        (TINY, "from nla.stats import *"),
    ),
    "nla/cli/console.py: give TEXT, --file or -": Way(
        "nla steer --replace ribbon=candle",
        (
            f"nla steer {LINE} --replace cat=bat",
            "nla steer --file line1.txt --replace cat=bat",
            f"printf {LINE} | nla steer - --replace cat=bat",
        ),
    ),
    "nla/cli/console.py: give it alone, or audit them all": Way(
        "nla explain --chat chats.jsonl --pair switchboard",
        ("nla explain --chat chat.json --pair switchboard --samples 1 --positions last", AUDIT),
    ),
    "nla/cli/explain.py: give TEXT, --file or --chat": Way(
        f"nla explain {LINE} --chat chat.json",
        (
            f"nla explain {LINE} --samples 1",
            "nla explain --file line1.txt --samples 1",
            "nla explain --chat chat.json --pair switchboard --samples 1",
        ),
    ),
    "nla/cli/options.py: such as --device cuda:0": Way(
        f"{EXTRACT} --device encoder=cpu", (f"{EXTRACT} --device cpu",), needs="extract"
    ),
    "nla/cli/options.py: such as --device encoder=cuda:1": Way(
        "nla info --device encoder=",
        ("from nla.cli.options import places; device = '{printed}'.split()[1:]; assert 'encoder' in places(device)",),
        takes="--device encoder=cuda:1",
    ),
    "nla/cli/options.py: write it like --replace cat=bat": Way(
        f"nla steer {LINE} --replace cat", (f"nla steer {LINE} {{printed}}",), takes="--replace cat=bat"
    ),
    "nla/config.py: restore the file from where the pair came; to change": Way(
        "NLAConfig.load(folder)",
        ("import dataclasses; dataclasses.replace(config, target='b').save(folder); NLAConfig.load(folder)",),
        (
            TINY,
            "from nla.config import *; folder, config = Path('pair'), pair.config; folder.mkdir(); config.save(folder)",
            "sed -i 's/a.target/b/' pair/nla_config.json",
        ),
    ),
    "nla/formats/easynla.py: give --sidecar FILE": Way(
        f"{EASY} --target ckpts/target",
        (
            f"{EASY} --target ckpts/target --sidecar ckpts/data.nla_meta.yaml",
            f"{LOAD}('ckpts/av', target='ckpts/target', sidecar='ckpts/data.nla_meta.yaml')",
        ),
        ("mv ckpts/av/nla_meta.yaml ckpts/data.nla_meta.yaml",),
        needs="import easynla",
    ),
    "nla/formats/easynla.py: if they are the same model give --target": Way(
        f"{EASY} --sidecar other.yaml",
        (
            f"{EASY} --sidecar other.yaml --target ckpts/target",
            "from nla.formats.easynla import *; load('ckpts/av', sidecar='other.yaml', target='ckpts/target')",
        ),
        (
            "sed 's/base_model:.*/base_model: someone\\/other/' ckpts/av/nla_meta.yaml > other.yaml",
            "import json; file = Path('ckpts/av/adapter_config.json'); content = json.loads(file.read_text())",
            "file.write_text(json.dumps(content | {'base_model_name_or_path': 'ckpts/target'}))",
        ),
        needs="import easynla",
    ),
    "nla/formats/easynla.py: give it: --sidecar FILE": Way(
        f"{EASY} --target ckpts/target --sidecar other.yaml",
        (
            f"{EASY} --target ckpts/target --sidecar ckpts/av/nla_meta.yaml",
            f"{LOAD}('ckpts/av', target='ckpts/target', sidecar='ckpts/av/nla_meta.yaml')",
        ),
        ("sed 's/layer_index:.*/layer_index: 0/' ckpts/av/nla_meta.yaml > other.yaml",),
        needs="import easynla",
    ),
    "nla/formats/kitft.py: give --dtype": Way(
        f"{KITFT} --target {couplets.PLANNER} --out mine",
        (
            f"{KITFT} --target {couplets.PLANNER} --out mine --dtype float32",
            f"from nla.formats.kitft import *; load(*sorted(Path('kitft').iterdir())[::-1], '{couplets.PLANNER}', "
            "dtype='float32')",
        ),
        ("sed -i '/dtype/d' kitft/*/config.json",),
        needs="import kitft",
    ),
    "nla/formats/kitft_export.py: give --drop-bias and --store": Way(
        "nla export kitft couplets --out out",
        (
            "nla export kitft couplets --out out --drop-bias --store runs/acts",
            "from nla.formats.kitft_export import *; from nla import NLA; nla = NLA.from_pretrained('couplets'); "
            "export_pair(nla, 'out', drop_bias=True, acts=nla.read('In spring Anna'))",
        ),
        needs="export kitft",
    ),
    "nla/formats/kitft_export.py: give --store STORE": Way(
        "nla export kitft couplets --out out --drop-bias",
        (
            "nla export kitft couplets --out out --drop-bias --store runs/acts",
            "from nla.formats.kitft_export import *; from nla import NLA; nla = NLA.from_pretrained('couplets'); "
            "export_pair(nla, 'out', True, acts=nla.read('In spring Anna'))",
        ),
        needs="export kitft",
    ),
    "nla/models/hooks.py: build the prompt from the pair's encoder_prompt, which": Way(
        "locate_marker([ids + ids], pair.config.injection)",
        ("locate_marker([render_prompt(pair.tokenizer, pair.config.encoder_prompt)], pair.config.injection)",),
        (TINY, "from nla.models.hooks import *; ids = render_prompt(pair.tokenizer, pair.config.encoder_prompt)"),
    ),
    "nla/models/hooks.py: build the prompt from the pair's encoder_prompt and": Way(
        "locate_marker([ids[::-1]], pair.config.injection)",
        ("locate_marker([render_prompt(pair.tokenizer, pair.config.encoder_prompt)], pair.config.injection)",),
        (TINY, "from nla.models.hooks import *; ids = render_prompt(pair.tokenizer, pair.config.encoder_prompt)"),
    ),
    "nla/models/checkpoint.py: convert it where you trust it": Way(
        "nla extract pickled many.txt --point resid_post.1 --out acts",
        (
            "from transformers import AutoModelForCausalLM",
            "AutoModelForCausalLM.from_pretrained('pickled').save_pretrained('pickled')",
            "from nla.models.load import load_target; load_target('pickled')",
        ),
        (
            *SAVED,
            "import torch, shutil; from safetensors.torch import load_file; shutil.copytree('target', 'pickled')",
            "torch.save(load_file('pickled/model.safetensors'), 'pickled/pytorch_model.bin')",
            "rm pickled/model.safetensors",
        ),
    ),
    "nla/models/load.py: pip install bitsandbytes, or use": Way(
        "load_target('target', quantization='8bit', device='cpu')",
        ("load_target('target', dtype='bfloat16', device='cpu')",),
        (*SAVED, "from nla.models.load import load_target"),
    ),
    "nla/models/long_text.py: read it in overlapping windows: --window …": Way(
        "nla audit long.json --samples 1 --budget 1 --pair bare",
        ("nla audit long.json --samples 1 --budget 1 --pair bare {printed}",),
        (
            *SAVED,
            "import json; turns = [dict(role=role, content='the cat sat on') for role in ('user', 'assistant') * 40]",
            "Path('long.json').write_text(json.dumps(turns))",
        ),
        takes=r"--window \d+",
    ),
    "nla/models/points.py: correct the point; `nla info`": Way(
        "nla extract my/model corpus.jsonl --point 2 --out acts", ("nla info",), needs="extract"
    ),
    "nla/models/read.py: index Activations as a whole": Way(
        "dataclasses.replace(acts, vectors=acts.vectors[:2])",
        ("acts[:2]", "acts.replace(vectors=acts.vectors * 2)"),
        (TINY, "import dataclasses"),
    ),
    "nla/pair/decoder.py: pad decoder prompts on the right": Way(
        "with nla.role('decoder'): nla.decode_ids(ids.flip(1), mask.flip(1))",
        (
            "ids, mask = nla.decoder.encode_explanations(['the cat', 'a dog sat'])",
            "with nla.role('decoder'): nla.decode_ids(ids, mask) # as Decoder.encode_explanations does",
        ),
        (TINY, "ids, mask = nla.encode_explanations(['the cat', 'a dog sat'])"),
    ),
    "nla/pair/decoder.py: write `with nla.role": Way(
        "nla.decode_ids(ids, mask)",
        ('with nla.role("decoder"): nla.decode_ids(ids, mask).sum().backward()', "nla.reconstruct('the cat')"),
        (TINY, "ids, mask = nla.encode_explanations(['the cat'])"),
    ),
    "nla/pair/decoder.py: use per_sample=False": Way(
        "nla.reconstruct([['the cat'], ['a dog', 'a cat']], per_sample=True)",
        ("nla.reconstruct([['the cat'], ['a dog', 'a cat']], per_sample=False)",),
        (TINY,),
    ),
    "nla/pair/decoder.py: leave it out; what the decoder makes of no text": Way(
        "nla.reconstruct(['the cat', ''])",
        (
            "predicted = nla.reconstruct(['the cat'])",
            "assert 'empty' in nla.score(acts, predicted.expand(len(acts), -1)).baselines",
        ),
        (TINY, "nla.fit_baselines(acts)"),
    ),
    "nla/pair/encoder.py: use greedy=True": Way(
        "nla.explain(acts[:1], temperature=0)", ("nla.explain(acts[:1], greedy=True)",), (TINY,)
    ),
    "nla/pair/encoder.py: give max_new_tokens=…": Way(
        "nla.explain(acts[:1], samples=1, max_new_tokens=10_000)",
        ("nla.explain(acts[:1], samples=1, {printed})",),
        (TINY,),
        takes=r"max_new_tokens=\d+",
    ),
    "nla/pair/explanations.py: explain the activation with samples=2": Way(
        "agreement([])",
        ("agreement(nla.explain(acts[:1], samples=2).texts[0])",),
        (TINY, "from nla.pair.explanations import *"),
    ),
    "nla/pair/fidelity.py: read with strata": Way(
        "baseline_of(nla.baselines, 'global')",
        ("nla.fit_baselines(acts); baseline_of(nla.baselines, 'global')",),
        (TINY, "nla.baselines = {}; from nla.pair.fidelity import *"),
    ),
    "nla/pair/folder.py: give device=..., or": Way(
        "nla explain 'In spring' --device encoder=cpu --samples 1",
        (
            "nla explain 'In spring' --device cpu --samples 1",
            "from nla import NLA; NLA.from_pretrained('couplets', device='cpu')",
        ),
    ),
    "nla/organisms/__init__.py: check the name; a pair is made with": Way(
        "nla info no/such/pair", ("nla train couplets --dry-run", "nla info my/pair")
    ),
    "nla/pair/roles.py: call it within nla.role": Way(
        "generate_patched(nla.base, nla.tokenizer, TEXTS[:1], nla.point, 'last', None)",
        ('with nla.role("target"): generate_patched(nla.base, nla.tokenizer, TEXTS[:1], nla.point, "last", None)',),
        (TINY, "from nla.pair.steer import *; role = nla.role('encoder'); role.__enter__()"),
    ),
    "nla/pair/roles.py: train a pair with `nla train`": Way(
        "nla export kitft pairs/mine --out out",
        ("nla train couplets --dry-run", "nla info pairs/mine"),
        (f"{KITFT} --target {couplets.PLANNER} --out pairs/mine",),
        needs="import kitft",
    ),
    "nla/pair/score.py: read a corpus with this pair's target": Way(
        "nla eval fidelity switchboard --store runs/acts",
        (
            "nla extract switchboard chats.jsonl --point resid_post.3 --out right --set kind=chat "
            "--set positions=turns --set max_tokens=500 --set eval_fraction=0.3",
            "nla eval fidelity switchboard --store right --activations 20",
        ),
        needs="export kitft",
    ),
    "nla/pair/steer.py: shorten the text, or continue by fewer tokens": Way(
        "generate_patched(nla.base, nla.tokenizer, TEXTS[:1], nla.point, 'last', None, 1000)",
        ("generate_patched(nla.base, nla.tokenizer, TEXTS[:1], nla.point, 'last', None, max_new_tokens=4)",),
        (TINY, "from nla.pair.steer import *; role = nla.role('target'); role.__enter__()"),
    ),
    "nla/text/tokens.py: read the text as UTF-8, or replace it": Way(
        "check_texts(text)",
        ("text = text.encode(errors='replace').decode(); check_texts(text)",),
        ("from nla.text.tokens import *; text = 'the \\ud800 cat'",),
    ),
    "nla/text/tokens.py: put the target's tokenizer beside it": Way(
        "nla extract words many.txt --point resid_post.1 --out acts",
        ("make_tokenizer().save_pretrained('words')", "from nla.text.tokens import *; load_tokenizer('words')"),
        (*SAVED, "make_model().save_pretrained('words')"),
    ),
    "nla/metrics.py: take the text of this token out": Way(
        "check_ids(ids, most)",
        (
            "text = text.replace(tokenizer.convert_ids_to_tokens(most), '')",
            "check_ids(torch.tensor(tokenizer(text)['input_ids']), most)",
        ),
        (
            "import torch; from tests.helpers.tiny import *; from nla.metrics import check_ids",
            "tokenizer, text = make_tokenizer(), 'the cat sat on a mat'",
            "ids = torch.tensor(tokenizer(text)['input_ids']); most = int(ids.max())",
        ),
    ),
    "nla/text/tokens.py: set tokenizer.chat_template": Way(
        "chats_of(tokenizer, chat)",
        ("tokenizer.chat_template = templates['b']; chats_of(tokenizer, chat)",),
        (
            *CHATS,
            "tokenizer = tokenizer_of('chatml'); chat = said(('user', 'Is it 5?'))",
            "templates = {'a': '', 'b': tokenizer.chat_template}; tokenizer.chat_template = templates",
        ),
    ),
    "nla/text/tokens.py: load it with nla.text.tokens.load_tokenizer": Way(
        "encode_batch(Slow(), ['the cat'], None)",
        ("import nla.text.tokens; encode_batch(nla.text.tokens.load_tokenizer('target'), ['the cat'], None)",),
        (*SAVED, "from nla.text.tokens import encode_batch\nclass Slow: is_fast = False"),
    ),
    "nla/transcripts/rendering.py: load it with nla.text.tokens.load_tokenizer": Way(
        "chats_of(slow, chat)",
        ("import nla.text.tokens; chats_of(nla.text.tokens.load_tokenizer('target'), chat)",),
        (
            *SAVED,
            *CHATS,
            "chat = said(('user', 'the cat')); slow = make_tokenizer()",
            "slow.__class__ = type('Slow', (type(slow),), {'is_fast': False})",
        ),
    ),
    "nla/transcripts/files.py: raise it (--max-mb)": Way(
        f"{WHOLE} --max-mb 0.00001",
        (f"{WHOLE} --max-mb 1", AUDIT),
        ("Path('whole.json').write_text(Path('chats.jsonl').read_text().splitlines()[0])",),
    ),
    "nla/transcripts/files.py: use --model-of …": Way(
        "nla audit other.json --samples 1 --budget 1",
        (
            "nla audit other.json --samples 1 --budget 1 {printed}",
            "nla audit other.json --samples 1 --budget 1 --model-of any",
        ),
        ('sed \'s/"messages"/"model": "x-9", "messages"/\' chat.json > other.json',),
        takes="--model-of x-9",
    ),
    "nla/transcripts/rendering.py: --fold-system puts": Way(
        "chats_of(tokenizer, chat)",
        (
            "chats_of(tokenizer, chat, fold_system=True)",
            "assert chats_of(tokenizer, chat, allow_dropped=True)[0].unread",
        ),
        (
            *CHATS,
            "tokenizer = tokenizer_of('chatml'); chat = said(('system', 'Be brief.'), ('user', 'Is it 5?'))",
            "start, end = '{% for m in messages if m.role != \"system\" %}', '{% endfor %}'",
            "tokenizer.chat_template = start + '{{ m.role }}: {{ m.content }}\\n' + end",
        ),
    ),
    "nla/transcripts/rendering.py: use --trim": Way(
        "chats_of(tokenizer_of('gemma'), chat, fold_system=True)",
        ("chats_of(tokenizer_of('gemma'), chat, fold_system=True, trim=True)",),
        CHATS,
    ),
    "nla/transcripts/rendering.py: use words of the target's world": Way(
        "nla audit strange.json --samples 1 --budget 1",
        (
            "nla audit chat.json --samples 1 --budget 1",
            "nla audit strange.json --samples 1 --budget 1 --pair bare",
        ),
        (*SAVED, 'echo \'[{"role": "user", "content": "under the tree"}]\' > strange.json'),
    ),
    "train/data/corpus.py: name the column": Way(
        f"nla extract my/model poems.jsonl {MY_STORE} --set eval_fraction=0.3",
        (f"nla extract my/model poems.jsonl {MY_STORE} --set eval_fraction=0.3 --set text_column={{printed}}",),
        needs="extract",
        takes="text_column = (.*)",
    ),
    "train/data/corpus.py: name another text_column": Way(
        f"nla extract my/model numbers.jsonl {MY_STORE} --set text_column=number",
        (
            f"nla extract my/model numbers.jsonl {MY_STORE} --set text_column=text",
            "nla extract switchboard chats.jsonl --point resid_post.3 --out chats --set kind=chat "
            "--set positions=turns --set max_tokens=500 --set eval_fraction=0.3",
        ),
        ("sed 's/{/{\"number\": 3, /' corpus.jsonl > numbers.jsonl",),
        needs="extract",
    ),
    "eval/pair/steering.py: judge fewer tokens": Way(
        "nla eval steering switchboard --store runs/mine/extract --items 4 --tokens 1000000",
        ("nla eval steering switchboard --store runs/mine/extract --items 4 --tokens 2",),
        needs="eval steering",
    ),
    "train/data/extract.py: set max_tokens of the corpus": Way(
        f"{EXTRACT} --set max_tokens=1000000",
        (f"{EXTRACT} --set max_tokens={{printed}}",),
        needs="extract",
        takes=r"max_tokens of the corpus to (\d+)",
    ),
    "nla/store/writer.py: choose another folder, or delete this one": Way(
        f"{EXTRACT} --set n_documents=21",
        (
            f"{EXTRACT.replace('acts', 'others')} --set n_documents=21",
            f"rm -r acts; {EXTRACT} --set n_documents=21",
        ),
        (EXTRACT,),
        needs="extract",
    ),
    "nla/store/writer.py: give more documents": Way(
        f"nla extract my/model lines.txt {MY_STORE}",
        (
            f"nla extract my/model lines.txt {MY_STORE.replace('acts', 'lines')} --set kind=lines",
            f"nla extract my/model lines.txt {MY_STORE.replace('acts', 'low')} --set kind=lines --set first_position=0",
            f"nla extract my/model lines.txt {MY_STORE.replace('acts', 'b')} --set kind=lines --set eval_fraction=0.4",
        ),
        needs="extract",
    ),
    "nla/store/reader.py: run the command that made the store again": Way(
        "nla eval fidelity couplets --store runs/acts --activations 20",
        (f"{STORE}; nla eval fidelity couplets --store runs/acts --activations 20",),
        ("truncate -s 100 runs/acts/eval/*.safetensors",),
        needs="export kitft",
    ),
    "nla/store/reader.py: restore the file from where the store came": Way(
        "Store.open('runs/acts', 'eval').verify()",
        (f"rm runs/acts/eval/*.safetensors; {STORE}", "Store.open('runs/acts', 'eval').verify()"),
        (
            "from nla.store.reader import Store; (file,) = Path('runs/acts/eval').glob('*.safetensors')",
            "data = bytearray(file.read_bytes()); data[-1] ^= 1; file.write_bytes(bytes(data))",
        ),
        needs="export kitft",
    ),
    "nla/store/manifest.py: restore the file from where the store came": Way(
        "nla eval fidelity couplets --store runs/acts --activations 20",
        (f"rm runs/acts/manifest.json; {STORE}; nla eval fidelity couplets --store runs/acts --activations 20",),
        ('sed -i \'s/"rows": [0-9]*/"rows": "many"/\' runs/acts/manifest.json',),
        needs="export kitft",
    ),
    "train/schema.py: write it like joint.steps=100": Way(
        f"{PLAN} --set joint.steps", (f"{PLAN} --set {{printed}}",), needs="train", takes="joint.steps=100"
    ),
    "train/stages.py: lower pair.max_new_tokens": Way(
        f"{PLAN} --set pair.max_new_tokens=100000", (f"{PLAN} --set pair.max_new_tokens=20",), needs="train"
    ),
    "train/pair_config.py: set pair.marker": Way(
        f"{PLAN} --set pair.marker='no such token'", (f"{PLAN} --set 'pair.marker=<|reserved_0|>'",), needs="train"
    ),
    "train/recipe_for.py: take a model with a longer context": Way(
        "nla recipe small",
        ("nla recipe my/model", f"{PLAN} --set pair.encoder_prompt='Say {{marker}} now'"),
        (
            "cp -r my/model small",
            'sed -i \'s/"max_position_embeddings": .*,/"max_position_embeddings": 40,/\' small/config.json',
        ),
        needs="train",
    ),
    "train/fit/processes.py: change …, rows_per_backward": Way(
        "share(8, 'batch_size', 3)",
        ("rows_per_backward = 4; share(8, 'batch_size', rows_per_backward)",),
        ("from nla.train.fit.processes import *",),
    ),
    "train/describe/local.py: name an instruction-tuned one": Way(
        "open_describer(settings, model, tokenizer)",
        ("tokenizer = make_tokenizer(); open_describer(settings, model, tokenizer) # describer.model",),
        (
            TINY,
            "from nla.train.describe.texts import *; from nla.train.describe.describer import *",
            "settings = DescriberSettings(describer='local'); model = make_model(); tokenizer = make_tokenizer()",
            "tokenizer.chat_template = None",
        ),
    ),
    "train/describe/texts.py: pass model and tokenizer": Way(
        "open_describer(DescriberSettings(describer='local'))",
        (
            "open_describer(DescriberSettings(describer='local'), make_model(), make_tokenizer())",
            "open_describer(DescriberSettings(describer='local', model='target')) # describer.model",
        ),
        (*SAVED, "from nla.train.describe.texts import *; from nla.train.describe.describer import *"),
    ),
}
"""Remedies by where they stand and how they begin: each is met, done as it says, and must help."""

NOT_RUN = {
    "pip install": "installs; the name of the extra is held against pyproject.toml above",
    "correct the name; log in (`hf auth login`)": "logs in at a hub",
    "delete": "tests/hostile and the tests of the stages damage such files, delete them, and run again",
    "eval/circuits/organism_pairs.py": "tests/eval/circuits/test_trace.py traces pairs given in both ways",
    "eval/families/instruction_items.py": "seconds: test_options.py asks for fewer, and gives other prompts",
    "eval/families/plants.py": "seconds: the example `nla eval plants ... --plants` runs",
    "eval/pair/fidelity.py: read a corpus with eval_fraction": "no command makes a store without them",
    "eval/worlds.py": "seconds: the first example in the help of each such command",
    "eval/readers/example_tasks.py": "docs/probes.md shows that command; it needs smollm2",
    "eval/readers/organisms.py": "minutes: tests/test_documents.py runs `nla eval readers`",
    "nla/audit/inspect_scores.py": "needs the extra 'audit': tests/nla/audit/test_inspect.py",
    "nla/cli/serve.py": "serves until Ctrl-C: tests/nla/serve/test_command.py",
    "nla/serve/": "of requests over HTTP: tests/nla/serve",
    "nla/models/hooks.py: repeat or slice them with the rows": "of one's own code: tests/nla/models/test_generate.py",
    "nla/models/long_text.py: read it in overlapping windows: --window 2048": "a text of that length; as the other",
    "nla/models/lora.py": "of others' adapters, in other programs",
    "nla/organisms/__init__.py: make a pair on it": "of a model that is packed with nla only at a release",
    "nla/pair/card.py": "tests/nla/pair/test_publish.py",
    "nla/pair/publish.py": "tests/nla/pair/test_publish.py",
    "nla/store/manifest.py: delete it": "a mark that stands only while a store is made: tests/nla/store",
    "nla/store/shards.py": "of weights that overflow, and of files that change while they are read",
    "nla/transcripts/rendering.py: write the messages": "tests/cases/test_01_think_in_history.py",
    "train/describe/client.py": "tests/train/describe/test_describers.py",
    "train/describe/local.py: lower": "tests/train/describe/test_local.py",
    "train/fit": "of one's own loop or several processes: tests/train/fit",
    "train/run.py": "a GPU that is full",
}
"""Remedies that are not done here, by how they or their places begin, and why."""

_ARGUMENT = re.compile(r"\b[a-z_]+(?==)|[A-Za-z_.]*[a-z_]+(?=\()")
_SETTING = re.compile(
    r"(?<![\w./<|'\[])(?:[a-z]+_[a-z_]+|(?:pair|joint|describer|warmstart|extract|corpus)\.[a-z_]+)(?![\w.|(/]|>)"
)


def names_in(text: str) -> set[str]:
    """Commands, options, arguments, functions and settings that a remedy names."""
    commands = {f"nla {match[1].split()[0]}" for match in _COMMAND.finditer(text)}
    options = {option.removeprefix("--").replace("-", "_") for option in _OPTION.findall(text)}
    return commands | options | {*_ARGUMENT.findall(text)} | {*_SETTING.findall(text)}


def is_to_be_done(text: str) -> bool:
    return bool(names_in(text) or re.search(r"\b[Dd]elete\b|pip install|hf auth", text))


def key_of(remedy: Remedy) -> str:
    return f"{remedy.place.split(':')[0]}: {remedy.text}"


def test_every_remedy_that_names_what_to_do_is_done_or_says_why_not() -> None:
    keys = [key_of(remedy) for remedy in REMEDIES if is_to_be_done(remedy.text)]
    entries = [*WAYS, *NOT_RUN]
    missing = [
        key for key in keys if not any(entry in (key[: len(entry)], text_in(key)[: len(entry)]) for entry in entries)
    ]
    assert not missing, "\n".join(missing)
    everything = [key_of(remedy) for remedy in REMEDIES]
    gone = [
        entry
        for entry in entries
        if not any(entry in (key[: len(entry)], text_in(key)[: len(entry)]) for key in everything)
    ]
    assert not gone, f"no remedy begins so any more: {gone}"


def text_in(key: str) -> str:
    return key.partition(": ")[2]


@pytest.fixture(scope="module")
def prepared(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with what the examples of a command need, made once."""

    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("needs")
        fill(folder)
        prepare(name, shell, folder)
        return folder

    return make


@pytest.mark.parametrize("key", WAYS)
def test_what_a_remedy_says_helps(key: str, shell: Shell, prepared: Callable[[str], Path], tmp_path: Path) -> None:
    way, folder = WAYS[key], tmp_path / "work"
    shutil.copytree(prepared(way.needs), folder, symlinks=True)
    names: dict[str, object] = {"Path": Path}

    def do(step: str) -> str | None:
        """Take a step; what an error of ours says to do next, None if there is none."""
        try:
            ast.parse(step)
        except SyntaxError:
            done = shell.run(step, folder)
            assert done.code in (0, 2), f"{step}: {done.stderr}"
            return done.stderr.partition(". Next: ")[2].strip() if done.code else None
        with contextlib.chdir(folder):
            try:
                exec(step, names)
            except errors.NLAError as error:
                return error.fix
        return None

    for step in way.before:
        assert do(step) is None, step
    said = do(way.wrong)
    assert said is not None, f"no error: {way.wrong}"
    (text,) = {remedy.text for remedy in REMEDIES if key_of(remedy).startswith(key)}
    assert any(part in said for part in re.split("…|; ", text) if part.strip("` ,")), said
    printed = ""
    if way.takes:
        found = re.search(way.takes, said)
        assert found, f"{said!r} does not say {way.takes!r}"
        printed = found[found.re.groups]
    steps = [step.replace("{printed}", printed) for step in way.right]
    taken = "\n".join([*steps, *way.right]).replace("-", "_")
    unused = {name for name in names_in(text) if name.replace("-", "_") not in taken}
    assert not unused, f"nobody does what the remedy names: {unused}"
    for step in steps:
        assert (left := do(step)) is None, f"{step}\nstill says: {left}"
