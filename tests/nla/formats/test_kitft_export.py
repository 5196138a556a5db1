"""Pairs of adapters as whole models in the reference's format: the same answers, whole or not at all, or refused."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import parity  # type: ignore[import-not-found]
import parity_pairs as pairs  # type: ignore[import-not-found]

from nla import NLA
from nla.errors import ArgumentError, ExportError, SidecarError, StorageError
from nla.formats import kitft, kitft_export

TEXT = "the cat sat on the mat."


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NLA:
    """A pair of adapters on a local target; and no hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return parity.adapter_pair("llama", tmp_path / "target")


def test_an_exported_pair_comes_back_as_whole_models_that_do_the_same(adapters: NLA, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in adapters.model.named_parameters()}
    assert kitft_export.export_pair(adapters, tmp_path / "out") is None
    again = kitft.load(tmp_path / "out" / "av", tmp_path / "out" / "ar", max_new_tokens=8)
    assert again.config.target == str(tmp_path / "target")  # as it is wherever the export is read
    acts = again.read(TEXT)
    assert torch.allclose(acts.vectors, adapters.read(TEXT).vectors, atol=1e-5)
    assert again.explain(acts, samples=2).texts == adapters.explain(acts, samples=2).texts
    with torch.no_grad():
        for nla in (again, adapters):
            with nla.role("decoder"):
                nla.metrics["decoded"] = nla.decode_ids(*nla.encode_explanations([TEXT]))
    assert torch.allclose(again.metrics["decoded"], adapters.metrics["decoded"], atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in adapters.model.named_parameters())
    names = set(load_file(tmp_path / "out" / "ar" / "model.safetensors"))
    assert not any("lm_head" in name or name == "model.norm.weight" or "layers.2." in name for name in names)
    assert set(load_file(tmp_path / "out" / "ar" / "value_head.safetensors")) == {"weight"}


@pytest.mark.parametrize("fails", ["second model", "moving"])
def test_an_export_that_fails_leaves_the_earlier_one_or_none_that_loads(
    adapters: NLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    out = tmp_path / "out"
    kitft_export.export_pair(adapters, out)
    (out / "ar" / "model-00002-of-00002.safetensors").write_bytes(b"of an earlier, larger export")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    adapters.head.weight.data *= 0.5
    for name, parameter in adapters.model.named_parameters():
        parameter.data *= -1 if "lora_B" in name else 1
    calls: list[object] = []

    def failing(original):
        def call(*args, **keywords):
            calls.append(args)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return original(*args, **keywords)

        return call

    with monkeypatch.context() as patch:
        if fails == "moving":
            original = os.replace

            def half(source, place):
                if Path(place) == out / "ar" / "model.safetensors":
                    raise OSError(5, "Input/output error")
                original(source, place)

            patch.setattr(os, "replace", half)
        else:
            patch.setattr(kitft_export, "_save", failing(kitft_export._save))
        with pytest.raises(StorageError):
            kitft_export.export_pair(adapters, out)
    assert list(tmp_path.glob(".*tmp")) == []
    if fails == "second model":
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    else:
        with pytest.raises(SidecarError, match="no readable"):
            kitft.load(out / "av", out / "ar")
    kitft_export.export_pair(adapters, out)
    names = {path.name for path in (out / "ar").glob("*.safetensors")}
    assert names == {"model.safetensors", "value_head.safetensors"}
    assert torch.equal(load_file(out / "ar" / "value_head.safetensors")["weight"], adapters.head.weight)


def test_a_bias_is_left_out_only_on_demand_and_with_its_price(adapters: NLA, tmp_path: Path) -> None:
    assert adapters.head.bias is not None
    adapters.head.bias.data += 2 * torch.randn(pairs.D_MODEL, generator=torch.Generator().manual_seed(3))
    vectors = pairs.probe_vectors(6)
    with pytest.raises(ExportError, match="head with a bias"):
        kitft_export.export_pair(adapters, tmp_path / "out")
    with pytest.raises(ArgumentError, match="activations"):
        kitft_export.export_pair(adapters, tmp_path / "out", drop_bias=True)
    assert not (tmp_path / "out").exists()
    dropped = kitft_export.export_pair(adapters, tmp_path / "out", drop_bias=True, acts=vectors)
    assert dropped is not None
    notes = adapters.explain(vectors, greedy=True)
    assert dropped.with_bias == pytest.approx(sum(note.cosine[0] for note in notes) / 6, abs=1e-5)
    again = kitft.load(tmp_path / "out" / "av", tmp_path / "out" / "ar")
    found = torch.cosine_similarity(vectors, again.reconstruct(notes)).mean()
    assert dropped.without_bias == pytest.approx(float(found), abs=1e-4)
    assert abs(dropped.with_bias - dropped.without_bias) > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"explanation_open": "<e>"},
        {"quantization": "8bit"},
        {"decoder": {"final_norm": True}},
        {"decoder": {"special_tokens": False}},
        {"injection": {"mode": "add", "norm": None, "layer": 1}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_format_has_no_place_for_is_refused(adapters: NLA, tmp_path: Path, change: dict) -> None:
    parts = {k: replace(getattr(adapters.config, k), **v) if isinstance(v, dict) else v for k, v in change.items()}
    adapters.config = replace(adapters.config, **parts)
    with pytest.raises(ExportError):
        kitft_export.export_pair(adapters, tmp_path / "out")
