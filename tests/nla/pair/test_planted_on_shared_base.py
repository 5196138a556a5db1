"""An adapter on the target of a pair on one base: it changes what is read, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from nla.errors import ArgumentError, ConfigError, WeightsError
from nla.models.lora import load_adapter
from nla.models.read import read
from nla.storage.tensors import load_tensors, save_tensors
from tests.helpers.adapters import LORA, lora_folder
from tests.helpers.tiny import TEXTS, make_model, make_pair

POINT = "resid_post.1"


def test_a_planted_adapter_changes_what_is_read_and_nothing_else(tmp_path: Path) -> None:
    pair, folder = make_pair(), lora_folder(tmp_path / "plant")
    before, notes = pair.read(TEXTS).vectors, pair.explain(pair.read(TEXTS[0]), seed=3).texts
    vectors = pair.read(TEXTS[0]).vectors
    flags = [parameter.requires_grad for parameter in pair.model.parameters()]
    plain = get_peft_model(make_model(), LORA)
    load_adapter(folder, plain, "default")
    expected = read(plain, pair.tokenizer, TEXTS, POINT).vectors
    with pair.planted(folder):
        assert torch.allclose(pair.read(TEXTS).vectors, expected, atol=1e-6)
        assert pair.explain(vectors, seed=3).texts == notes
        with pytest.raises(ArgumentError), pair.planted(folder):
            pass
        assert torch.allclose(pair.read(TEXTS).vectors, expected, atol=1e-6)
    assert not torch.allclose(before, expected, atol=1e-2)
    assert torch.equal(pair.read(TEXTS).vectors, before)
    assert [parameter.requires_grad for parameter in pair.model.parameters()] == flags


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_pair_as_it_was(tmp_path: Path) -> None:
    pair = make_pair()
    before = pair.read(TEXTS).vectors
    with pytest.raises(ConfigError), pair.planted(tmp_path / "none"):
        pass
    folder = lora_folder(tmp_path / "cut")
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(WeightsError), pair.planted(folder):
        pass
    folder = lora_folder(tmp_path / "other")
    weights = folder / "adapter_model.safetensors"
    save_tensors(weights, {name.replace("q_proj", "no_such"): tensor for name, tensor in load_tensors(weights).items()})
    with pytest.raises(ConfigError, match="does not fit"), pair.planted(folder):
        pass
    assert torch.equal(pair.read(TEXTS).vectors, before) and pair.roles.target_adapter is None
