"""An adapter on the target of a pair: it changes what is read, and goes without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from nla.autoencoder import NLA
from nla.errors import ArgumentError, ConfigError, WeightsError
from nla.models.lora import TARGET_ADAPTER, adapter_hash, merge_adapter, save_adapter
from nla.models.points import truncated_view
from nla.models.read import read
from nla.pair import roles
from nla.pair.roles import Head, SeparateModels
from nla.storage.tensors import load_tensors, save_tensors
from tests.helpers.adapters import LORA, lora_folder
from tests.helpers.tiny import D_MODEL, TEXTS, make_config, make_model, make_pair, make_tokenizer

POINT = "resid_post.1"


@pytest.fixture(params=["shared", "separate"])
def pair(request: pytest.FixtureRequest) -> NLA:
    """A pair of adapters on one base, and one of three whole models, of the same target."""
    if request.param == "shared":
        return make_pair()
    roles = SeparateModels(
        make_model, lambda: make_model(seed=1), lambda: truncated_view(make_model(seed=2), POINT), lambda: Head(D_MODEL)
    )
    return NLA(roles, make_tokenizer(), make_config(make_tokenizer(), make_model()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter in a block below the point."""
    return lora_folder(tmp_path / "plant")


def test_an_adapter_changes_what_is_read_and_nothing_else(pair: NLA, folder: Path) -> None:
    before, names = pair.read(TEXTS).vectors, [name for name, _ in pair.model.named_parameters()]
    notes, flags = pair.explain(before[:2], seed=3).texts, [p.requires_grad for p in pair.model.parameters()]
    oracle = get_peft_model(make_model(), LORA)
    oracle.load_adapter(folder, "default")
    expected = read(oracle.eval(), pair.tokenizer, TEXTS, POINT).vectors
    with pair.planted(folder):
        assert torch.allclose(pair.read(TEXTS).vectors, expected, atol=1e-6)
        assert pair.explain(before[:2], seed=3).texts == notes
        with pytest.raises(ArgumentError), pair.planted(folder):
            pass
        assert torch.allclose(pair.read(TEXTS).vectors, expected, atol=1e-6)
    assert not torch.allclose(before, expected, atol=1e-2)
    assert torch.equal(pair.read(TEXTS).vectors, before)
    assert [name for name, _ in pair.model.named_parameters()] == names
    assert [p.requires_grad for p in pair.model.parameters()] == flags


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_target_as_it_was(pair: NLA, folder: Path) -> None:
    before, weights = pair.read(TEXTS).vectors, folder / "adapter_model.safetensors"
    whole = load_tensors(weights)
    with pytest.raises(ConfigError), pair.planted(folder / "none"):
        pass
    for changed, error, says in (
        ({name.replace("q_proj", "no_such"): tensor for name, tensor in whole.items()}, ConfigError, "does not fit"),
        ({name: tensor[:1].clone() for name, tensor in whole.items()}, ConfigError, "rank"),
        (dict(list(whole.items())[1:]), WeightsError, ""),
        (None, WeightsError, ""),
    ):
        if changed is None:
            weights.write_bytes(b"cut")
        else:
            save_tensors(weights, changed)
        with pytest.raises(error, match=says or None), pair.planted(folder):
            pass
        assert torch.equal(pair.read(TEXTS).vectors, before)


def test_an_adapter_on_the_hub_is_downloaded(pair: NLA, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(source: str, revision: str | None, name: str) -> Path:
        asked.append((source, name))
        return folder / name

    monkeypatch.setattr("nla.models.lora.fetch_file", fetch)
    assert adapter_hash("someone/tune") == adapter_hash(folder)
    with pair.planted(folder):
        expected = pair.read(TEXTS).vectors
    with pair.planted("someone/tune"):
        assert torch.equal(pair.read(TEXTS).vectors, expected)
    assert set(asked) == {("someone/tune", f"adapter_{name}") for name in ("config.json", "model.safetensors")}


@pytest.mark.parametrize("keys", [("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"), ("q_proj",)])
@pytest.mark.parametrize("named", ["rank_pattern", "alpha_pattern"])
def test_patterns_over_names_hold_on_a_cut_target_too(tmp_path: Path, named: str, keys: tuple) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], **{named: dict.fromkeys(keys, 8)})
    tuned = get_peft_model(make_model("llama"), config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(tmp_path, tuned, "default")
    expected = read(tuned.eval(), make_tokenizer(), TEXTS, POINT).vectors
    whole, cut = make_model("llama"), truncated_view(make_model("llama"), POINT)
    for model in (whole, cut):
        merge_adapter(model, tmp_path)
        assert torch.allclose(read(model, make_tokenizer(), TEXTS, POINT).vectors, expected, atol=1e-4)


def test_adapters_planted_one_after_another_reach_the_target_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "linear_names", lambda _: ["q_proj"])  # so that each adapter makes layers of its own
    pair = make_pair()
    plain, said = pair.read(TEXTS).vectors, pair.reconstruct(["the cat sat."])
    for module in ("up_proj", "down_proj", "up_proj"):
        config = LoraConfig(r=2, target_modules=[module], task_type="CAUSAL_LM")
        with pair.planted(lora_folder(tmp_path / module, config=config)):
            assert pair.reconstruct(["the cat sat."]).equal(said)
            assert not pair.read(TEXTS).vectors.allclose(plain, atol=1e-2)
            with pair.role("target"):
                on = {name for name, parameter in pair.model.named_parameters() if parameter.requires_grad}
            assert on == {name for name, _ in pair.model.named_parameters() if f".{TARGET_ADAPTER}." in name}
    assert pair.read(TEXTS).vectors.equal(plain) and pair.reconstruct(["the cat sat."]).equal(said)
