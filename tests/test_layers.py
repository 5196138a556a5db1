"""The plan of the house, held: no import circle of any length, and no import that goes upward, not even by string."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = (
    ("errors", "progress", "storage", "stats", "metrics", "baselines"),
    ("text", "views", "config", "organisms"),
    ("models",),
    ("transcripts", "store", "pair"),
    ("autoencoder",),
    ("audit", "formats", "serve"),
    ("train", "eval"),
    ("cli",),
)
"""From the ground up; a room imports rooms before it. Within one floor the order is from left to right, too."""

ORDER = {room: height for height, room in enumerate(room for floor in ROOMS for room in floor)}
APART = {("train", "eval")}
"""Rooms, imported and importing, that are left apart although the order would allow it."""


def modules() -> dict[str, Path]:
    """Every module by its name as installed."""
    paths = {}
    for top in ("nla", "train", "eval"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            name = name if top == "nla" else f"nla.{name}"
            paths[name.removesuffix(".__init__")] = path
    return paths


def imported(name: str, tree: ast.Module, is_package: bool, known: set[str]) -> set[str]:
    """Modules of ours that a module imports: at its top, in functions, for types alone, or by a string."""
    home, wanted = name.split(".") if is_package else name.split(".")[:-1], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*home[: len(home) - node.level + 1], node.module or ""]).rstrip(".") if node.level else ""
            base = base or node.module or ""
            wanted |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("nla."):
            wanted.add(node.value)
    return (wanted & known) - {name}


def imports() -> dict[str, set[str]]:
    """The modules that each module imports. The façade, ``nla``, names its parts by string and is left out."""
    known = {name: path for name, path in modules().items() if name != "nla"}
    return {
        name: imported(name, ast.parse(path.read_text("utf-8")), path.name == "__init__.py", set(known))
        for name, path in known.items()
    }


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that import each other in a circle, of whatever length."""
    reach: dict[str, set[str]] = {}
    for start in edges:
        seen, todo = set(), list(edges[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += edges[name]
        reach[start] = seen
    groups = defaultdict(list)
    for name in edges:
        if name in reach[name]:
            groups[frozenset(other for other in reach[name] if name in reach[other])].append(name)
    return [sorted(group) for group in groups.values()]


def room(name: str) -> str:
    """The folder or file directly below ``nla`` that a module is in; what ``python -m`` starts is a command."""
    return "cli" if name.endswith("__main__") else name.split(".")[1]


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports of a room above, or of a room that is to be left apart."""
    return [
        f"{name} imports {other}"
        for name, others in edges.items()
        for other in sorted(others)
        if ORDER[room(other)] > ORDER[room(name)] or (room(other), room(name)) in APART
    ]


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(imports()) == []


def test_no_import_goes_upward() -> None:
    assert upward(imports()) == []


def test_a_circle_and_an_upward_import_are_found() -> None:
    edges = {
        "nla.text.a": {"nla.pair.b"},
        "nla.pair.b": {"nla.pair.c"},
        "nla.pair.c": {"nla.text.a"},
        "nla.eval.d": set(),
    }
    assert circles(edges) == [["nla.pair.b", "nla.pair.c", "nla.text.a"]]
    assert upward(edges) == ["nla.text.a imports nla.pair.b"]
    assert upward({"nla.eval.d": {"nla.train.e"}, "nla.train.e": set()}) == ["nla.eval.d imports nla.train.e"]
    tree = ast.parse("def f():\n    import_module('nla.pair.b')\n    from ..models import c\n")
    assert imported("nla.text.a", tree, False, {"nla.pair.b", "nla.models.c"}) == {"nla.pair.b", "nla.models.c"}
