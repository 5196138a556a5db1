"""Case 20: a target whose weights are stored quantised is read through transformers' quantiser, or refused by scheme
and package. Its numbers are never taken for weights without their scales."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nla.errors import ArgumentError, MissingExtraError, NLAError, WeightsError
from nla.models.load import load_target, load_truncated
from tests.helpers.tiny import make_model, make_tokenizer

IDS = torch.tensor([[11, 33, 37, 40, 12, 20, 21]])
SCHEMES: dict[str, dict[str, Any]] = {
    "fp8": {"activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "compressed-tensors": {"format": "float-quantized", "config_groups": {}},
    "gptq": {"bits": 4, "group_size": 32},
    "awq": {"bits": 4, "group_size": 32},
    "bitsandbytes": {"load_in_8bit": True},
    "mxfp4": {},
    "a-scheme-of-2031": {},
}
PACKAGES = {"gptq": "optimum", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes"}
PACKAGES |= {"compressed-tensors": "compressed_tensors"}


def stored(folder: Path, scheme: str | None, scale: str = "weight_scale_inv") -> tuple[Path, Any]:
    """A Llama whose linear layers are stored as float8 with a scale each, and the model that they stand for."""
    model = make_model("llama")
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    tensors, out = load_file(folder / "model.safetensors"), {}
    state = model.state_dict()
    for name, tensor in tensors.items():
        if not name.endswith("proj.weight"):
            out[name] = tensor
            continue
        factor = tensor.abs().max() / 448.0
        out[name] = (tensor / factor).to(torch.float8_e4m3fn)
        out[name.replace("weight", scale)] = factor.reshape(1, 1)
        state[name].copy_(out[name].float() * factor)
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    if scheme is not None:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config["quantization_config"] = {"quant_method": scheme, **SCHEMES[scheme]}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder, model


@torch.no_grad()
def test_float8_weights_are_read_with_their_scales(tmp_path: Path) -> None:
    folder, meant = stored(tmp_path, "fp8")
    loaded, _ = load_target(folder, device="cpu")
    assert torch.allclose(loaded(IDS).logits, meant(IDS).logits, atol=1e-4)
    view = load_truncated(folder, "resid_post.1", device="cpu")
    expected = meant(IDS, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(view(input_ids=IDS).last_hidden_state, expected, atol=1e-4)


@pytest.mark.parametrize("scheme", [None, "mxfp4", "a-scheme-of-2031"])
def test_float8_weights_that_nothing_scales_are_refused(scheme: str | None, tmp_path: Path) -> None:
    folder, _ = stored(tmp_path, scheme)
    with pytest.raises(WeightsError, match=scheme or "without quantization_config"):
        load_target(folder, device="cpu")
    with pytest.raises(WeightsError, match=scheme or "without quantization_config"):
        load_truncated(folder, "resid_post.1", device="cpu")


@pytest.mark.parametrize("scheme", PACKAGES)
def test_a_scheme_whose_package_is_missing_is_refused_by_both_names(scheme: str, tmp_path: Path) -> None:
    folder, _ = stored(tmp_path, scheme)
    missing = find_spec(PACKAGES[scheme]) is None
    with pytest.raises(MissingExtraError if missing else NLAError, match=scheme) as raised:
        load_target(folder, device="cpu")
    assert not missing or PACKAGES[scheme].replace("_", "-") in str(raised.value)


@pytest.mark.parametrize("asked", [{"quantization": "8bit"}, {"adapter": "somewhere"}])
def test_what_would_quantise_again_or_merge_is_refused(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nla.models.load.find_spec", lambda _name: True)
    folder, _ = stored(tmp_path, "fp8")
    with pytest.raises(ArgumentError, match="stored quantised"):
        load_target(folder, device="cpu", **asked)
