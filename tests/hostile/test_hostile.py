"""Whatever a file holds: a typed error within two seconds and 200 MB, or finite and right values.

The suite tries a few artefacts of each kind; ``python -m tests.hostile.table 200`` tries many and prints the table.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from nla.errors import ConfigError
from tests.hostile.kinds import KINDS, break_one
from tests.hostile.watch import GOOD, watched

TRIED = {"store": 24, "begun store": 20, "card": 20, "explanations": 20, "parquet": 16, "tokenizer": 12}
"""How many of the kinds that are cheap; of the others six."""


@pytest.mark.parametrize("name", KINDS)
def test_a_hostile_file_is_refused_or_read_rightly(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kind, original = KINDS[name], tmp_path / "original"
    original.mkdir()
    kind.make(original)
    shutil.copytree(original, tmp_path / "whole")
    kind.use(tmp_path / "whole")
    outcomes = {}
    for number in range(TRIED.get(name, 6)):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        broken = break_one(kind, folder, f"suite {name} {number}")
        outcomes[f"{number} {broken}"] = watched(kind.use, folder, cpu_s=8.0)  # what is slow is for the table to judge
    assert {case: outcome for case, outcome in outcomes.items() if outcome.word not in GOOD} == {}
    assert any(outcome.word == "refused" for outcome in outcomes.values())


def _spin(folder: Path) -> None:
    while True:
        pass


def _grow(folder: Path) -> None:
    torch.ones(80 * 2**20)  # 320 MB
    raise ConfigError("a file", "another", "take it")


def _crash(folder: Path) -> None:
    raise KeyError(folder)


def _shout(folder: Path) -> None:
    raise ConfigError("a file", "another", "take it")


@pytest.mark.parametrize(
    ("use", "word"), [(_spin, "hung"), (_grow, "memory"), (_crash, "crashed"), (_shout, "refused")]
)
def test_the_watch_sees_what_it_is_there_for(use, word: str, tmp_path: Path) -> None:
    assert watched(use, tmp_path).word == word


@pytest.mark.slow
def test_a_case_is_known_by_its_seed(tmp_path: Path) -> None:
    kind, contents = KINDS["store"], []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        kind.make(tmp_path / name)
        break_one(kind, tmp_path / name, "a seed 2")
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append([path.read_bytes() for path in files])
    assert contents[0] == contents[1]
