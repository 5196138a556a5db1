"""What the documents show is executed: every shell and Python block, with its stated outcome.

The blocks of a document run in order in one folder, which holds what a clone holds of ``docs/examples``. A command is run
as it stands, through the installed `nla`; where the table says ``append``, options that make it smaller come after it, and
where it says ``instead``, a part is replaced, such as the name of a model on the hub by that of a tiny one here. What is not
run is listed with the reason.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.shell import Shell

ROOT = Path(__file__).parents[1]
PROGRAMS = re.compile(r"(?:^|[|&;]\s*)(nla|python|make|accelerate|git|pip|twine)\b")


class Run(NamedTuple):
    """A command that is run."""

    says: str = ""
    """A regular expression that its output matches."""
    leaves: str = ""
    """A file that is there afterwards."""
    append: str = ""
    """Options that make it smaller."""
    instead: tuple[str, str] = ("", "")
    """A part of the command, and what is run in its place."""
    code: int = 0


class NotRun(NamedTuple):
    """A command that is not run here."""

    reason: str


class Block(NamedTuple):
    """A fenced block of a document."""

    kind: str
    text: str


def blocks(document: str) -> list[Block]:
    """The fenced blocks of a document, in order."""
    return [
        Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    ]


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


def is_open(command: str) -> bool:
    """Is this the beginning of a loop that has not ended?"""
    return len(re.findall(r"\bdo\b", command)) > len(re.findall(r"\bdone\b", command))
