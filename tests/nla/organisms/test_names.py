"""Embedded names: found, told from those of another kind, and never asked of a hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nla.errors import ConfigError
from nla.organisms import (
    ADAPTERS,
    ORGANISMS,
    PACKAGED,
    PAIRS,
    RUBRICS,
    TARGETS,
    adapter_folder,
    pair_folder,
    target_folder,
)

KINDS = {target_folder: {**TARGETS}, pair_folder: {**PAIRS}, adapter_folder: {**ADAPTERS}}
ALL = sorted({*ORGANISMS, *TARGETS, *PAIRS, *ADAPTERS, *RUBRICS} - {*PACKAGED})


@pytest.mark.parametrize("find", KINDS)
def test_every_embedded_name_is_found_or_refused_as_of_another_kind(find: Callable) -> None:
    for name in ALL:
        full = ORGANISMS.get(name, name)
        if full in KINDS[find]:
            assert find(name) == str(KINDS[find][full])
        else:
            with pytest.raises(ConfigError, match=r"an embedded (target|adapter|rubric), where"):
                find(name)


@pytest.mark.parametrize("find", KINDS)
def test_other_names_come_back_and_misspelt_ones_do_not(find: Callable, tmp_path: Path) -> None:
    for name in ("gpt2", "triplets", "someone/model", "switchers/goal", str(tmp_path), "../couplets/x", "a" * 5000):
        assert find(name) == name
    for name in ("couplets/planer", "couplets/x", "switchboard/gaol", "switchbord/goal", "couplet/planner"):
        with pytest.raises(ConfigError, match="no embedded"):
            find(name)


def test_a_folder_of_the_users_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("couplets/mine").mkdir(parents=True)
    assert pair_folder("couplets/mine") == "couplets/mine"


def test_what_was_meant_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean couplets"):
        pair_folder("couplet")
    with pytest.raises(ConfigError, match=r"give switchboard$"):
        pair_folder("switchboard/goal")
    with pytest.raises(ConfigError, match="did you mean switchboard/goal"):
        adapter_folder("switchboard/gaol")
