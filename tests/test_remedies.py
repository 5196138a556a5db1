"""Every way out that an error names exists: commands, options, extras, settings and files."""

from __future__ import annotations

import ast
import dataclasses
import re
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from nla import errors
from nla.storage.schema import dataclass_in
from nla.train.recipe import Recipe
from tests.helpers.command_line import commands

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
