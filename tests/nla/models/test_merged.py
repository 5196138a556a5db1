"""A copy with the adapter merged: it says what the adapted model says, and the model stays as it is."""

from __future__ import annotations

import pytest
import torch

from nla.models.merged import MergedCopy, can_merge
from tests.helpers.tiny import MODELS, make_pair
from tests.helpers.training import assert_same

IDS = torch.tensor([[14, 15, 16, 17], [18, 20, 21, 22]])


@pytest.mark.parametrize("architecture", MODELS)
def test_a_merged_copy_says_what_the_adapter_says_and_follows_it(architecture: str) -> None:
    pair = make_pair(architecture, scale=0.3)
    weights = {name: p.detach().clone() for name, p in pair.model.named_parameters()}
    assert can_merge(pair.model, "default")
    merged = MergedCopy(pair.model, "default")
    before = torch.zeros(0)
    with pair.role("encoder"), torch.no_grad():
        for _ in range(2):
            merged.refresh()
            expected = pair.model(IDS).logits
            torch.testing.assert_close(merged.model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
            assert not torch.equal(before, expected)
            before = expected
            now = {name: p.detach().clone() for name, p in pair.model.named_parameters()}
            assert_same(now, weights)
            for name, parameter in pair.model.named_parameters():
                if "lora_B.default" in name:
                    parameter.mul_(2)
                    weights[name] = parameter.detach().clone()
    with pair.role("target"), torch.no_grad():
        assert (pair.model(IDS).logits - expected).abs().max() > 1e-2, "without an adapter that acts this test is void"


def test_a_merged_copy_shares_what_no_adapter_changes_and_is_rounded_once() -> None:
    pair = make_pair(scale=0.3)
    pair.base.to(torch.bfloat16)
    for name, parameter in pair.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    merged = MergedCopy(pair.model, "default")
    merged.refresh()
    layer = pair.base.model.layers[1].self_attn.q_proj
    own = merged.model.get_submodule("model.layers.1.self_attn.q_proj").weight
    added = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    assert torch.equal(own, (layer.base_layer.weight.float() + added).bfloat16())
    theirs = {p.data_ptr() for p in pair.base.parameters()}
    alone = [p for p in merged.model.parameters() if p.data_ptr() not in theirs]
    assert sum(p.nbytes for p in alone) == merged.nbytes and len(alone) == 4 * 7


def test_what_is_no_plain_adapter_is_not_merged() -> None:
    pair = make_pair()
    assert not can_merge(pair.base.lm_head, "default") and not can_merge(pair.model, "other")
    layer = pair.base.model.layers[0].mlp.up_proj
    layer.base_layer = torch.nn.Sequential(layer.base_layer)  # as a quantised layer, of another class
    layer.base_layer.weight = layer.base_layer[0].weight
    assert not can_merge(pair.model, "default")
