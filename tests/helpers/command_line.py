"""The commands of `nla` as its own help has them: names, options, and the examples that the help shows."""

from __future__ import annotations

import re
from typing import Any

import nla.cli.main


def commands() -> dict[str, Any]:
    """Every command that does something, by its name, such as "eval rhymes"."""
    return {name: command for name, command in _all().items() if not hasattr(command, "commands")}


def helps() -> dict[str, str]:
    """The help texts of all commands and groups, by name; that of `nla` itself under ""."""
    return {name: command.help or "" for name, command in _all().items()}


def examples(text: str) -> list[str]:
    """The commands that a help text shows, without the remarks beside them."""
    joined = re.sub(r"\\\n\s+", "", text)
    shown = [line.strip() for line in joined.splitlines() if line.startswith("  ") and re.search(r"\bnla\b", line)]
    lines = [re.split(r"\s{3,}", line)[0] for line in shown]
    return [line for line in lines if re.match(r"nla [a-z]|printf .*\| nla |accelerate ", line)]


def _all() -> dict[str, Any]:
    found, pending = {}, [("", nla.cli.main.commands())]
    while pending:
        name, command = pending.pop()
        found[name] = command
        for inner, one in getattr(command, "commands", {}).items():
            pending.append((f"{name} {inner}".strip(), one))
    return dict(sorted(found.items()))
