"""Embedded names: found, told from those of another kind, and never asked of a hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nla import NLA
from nla.errors import ConfigError
from nla.models.checkpoint import read_config
from nla.models.load import load_target, load_truncated
from nla.models.lora import adapter_hash, other_base
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
    for name in ("someone/model", "switchers/goal", str(tmp_path)):
        assert find(name) == name
    for name in ("gpt2", "triplets", "../couplets/x", "a" * 5000):  # a pair's is a folder, or somebody's on the hub
        if find is pair_folder:
            with pytest.raises(ConfigError, match="no pair"):
                find(name)
        else:
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


def test_every_loader_takes_embedded_names() -> None:
    name, folder, adapter = "switchboard", TARGETS["switchboard/target"], "switchboard/goal"
    ids = torch.tensor([[5, 6, 7]])

    def outputs(target: str | Path, plant: str | Path) -> list[torch.Tensor]:
        model, _ = load_target(target, device="cpu")
        with_adapter, _ = load_target(target, device="cpu", adapter=plant)
        view = load_truncated(target, "resid_post.1", device="cpu")
        return [model(ids).logits, with_adapter(ids).logits, view(ids).last_hidden_state]

    by_name, expected = outputs(name, adapter), outputs(folder, ADAPTERS[adapter])
    assert all(one.equal(other) for one, other in zip(by_name, expected, strict=True))
    assert not by_name[0].equal(by_name[1]) and adapter_hash(adapter) == adapter_hash(ADAPTERS[adapter])
    assert read_config(name, None).to_dict() == read_config(folder, None).to_dict()
    for load in (load_target, lambda name: load_truncated(name, "resid_post.1"), lambda name: read_config(name, None)):
        with pytest.raises(ConfigError, match="an embedded adapter, where a target"):
            load(adapter)


def test_a_pair_that_is_made_on_an_embedded_name_finds_its_target_again(tmp_path: Path) -> None:
    model, tokenizer = load_target("couplets", device="cpu")
    config = replace(NLA.from_pretrained("couplets", device="cpu").config, target="couplets")
    made = NLA.create(model, tokenizer, config, rank=1)
    made.save_pretrained(tmp_path)
    assert made.target_folder == NLA.from_pretrained(tmp_path, device="cpu").target_folder
    assert made.target_folder == TARGETS["couplets/planner"].resolve()


def test_an_adapter_of_a_packaged_target_is_not_warned_of_where_that_was_converted_to(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "smollm2"}')
    converted = f"/home/me/.cache/nla/gguf/{PACKAGED['smollm2'].SHA256}-bfloat16"
    assert other_base(tmp_path, converted) is None is other_base(tmp_path, "smollm2")
    for other in ("/home/me/.cache/nla/gguf/0123-bfloat16", "couplets/planner"):
        assert "names the base 'smollm2'" in str(other_base(tmp_path, other))
