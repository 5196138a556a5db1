"""Points: what "resid_post.K" means, and that the truncated view is a view."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nla.errors import ArchitectureError, PointError
from nla.models.points import (
    Point,
    backbone,
    block,
    blocks,
    context_length,
    cut_config,
    d_model,
    linear_names,
    truncated_view,
)
from tests.helpers.tiny import N_BLOCKS, make_model, make_pair

IDS = torch.tensor([[11, 33, 37, 40, 12, 20, 21]])


def test_a_point_survives_the_round_trip_through_text() -> None:
    assert str(Point.parse("resid_post.12")) == "resid_post.12"
    assert Point.parse(Point.parse("resid_post.2")).layer == 2


@pytest.mark.parametrize("text", ["resid_post", "resid_post.-1", "resid_pre.1", "3", "resid_post.1 ", ""])
def test_an_unknown_point_is_refused_and_the_form_is_named(text: str) -> None:
    with pytest.raises(PointError, match=r"resid_post\.3"):
        Point.parse(text)


def test_a_point_beyond_the_model_is_refused_and_the_valid_ones_are_named() -> None:
    with pytest.raises(PointError, match=rf"resid_post\.{N_BLOCKS - 1}"):
        truncated_view(make_model(), f"resid_post.{N_BLOCKS}")


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="qwen2"):
        blocks(nn.Linear(2, 2))


def test_the_view_gives_hidden_states_k_plus_1(model) -> None:
    hidden = model(IDS, output_hidden_states=True).hidden_states
    for layer in range(N_BLOCKS - 1):
        found = truncated_view(model, f"resid_post.{layer}")(input_ids=IDS).last_hidden_state
        assert torch.equal(found, hidden[layer + 1])
        assert not torch.allclose(found, hidden[layer], atol=1e-3)


def test_the_last_point_is_before_the_final_norm(model) -> None:
    after_norm = model(IDS, output_hidden_states=True).hidden_states[-1]
    found = truncated_view(model, f"resid_post.{N_BLOCKS - 1}")(input_ids=IDS).last_hidden_state
    assert not torch.allclose(found, after_norm, atol=1e-2)
    assert torch.allclose(model.model.norm(found), after_norm, atol=1e-6)


def test_the_view_leaves_the_target_untouched(model) -> None:
    before = model(IDS).logits
    modules = {name: id(module) for name, module in model.named_modules()}
    config = model.config.to_dict()
    view = truncated_view(model, "resid_post.0")
    view(input_ids=IDS)
    view.register_forward_hook(lambda *args: pytest.fail("a hook on the view ran in the target"))
    assert torch.equal(model(IDS).logits, before)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert model.config.to_dict() == config
    assert len(model(IDS, output_hidden_states=True).hidden_states) == N_BLOCKS + 1


def test_the_view_does_not_double_the_targets_recorded_hidden_states(model) -> None:
    view = truncated_view(model, "resid_post.1")
    view(input_ids=IDS, output_hidden_states=True)
    assert len(model(IDS, output_hidden_states=True).hidden_states) == N_BLOCKS + 1


def test_the_view_shares_parameters_and_holds_no_upper_block(model) -> None:
    view = truncated_view(model, "resid_post.1")
    whole = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in whole for parameter in view.parameters())
    assert len(view.layers) == 2
    with torch.no_grad():
        blocks(model)[0].mlp.down_proj.weight.add_(0.1)
    hidden = model(IDS, output_hidden_states=True).hidden_states[2]
    assert torch.equal(view(input_ids=IDS).last_hidden_state, hidden)


def test_adapters_added_later_act_in_the_view() -> None:
    pair = make_pair(scale=0.3)
    with torch.no_grad(), pair.role("target"):
        plain = pair.roles.view(input_ids=IDS).last_hidden_state
    with torch.no_grad(), pair.role("encoder"):
        adapted = pair.roles.view(input_ids=IDS).last_hidden_state
        oracle = pair.model(IDS, output_hidden_states=True).hidden_states[2]
    assert torch.equal(adapted, oracle)
    assert not torch.allclose(adapted, plain, atol=1e-2)


def test_backbone_and_sizes_are_the_same_with_and_without_adapters() -> None:
    pair = make_pair()
    base = pair.model.get_base_model()
    assert backbone(pair.model) is backbone(base) is base.model
    assert d_model(pair.model) == base.config.hidden_size
    assert context_length(pair.model) == base.config.max_position_embeddings
    assert block(pair.model, "resid_post.2") is base.model.layers[2]


def test_every_linear_layer_of_a_block_is_named(model) -> None:
    assert linear_names(model) == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


def test_in_a_wrapper_the_linear_layers_are_those_of_the_text_alone() -> None:
    model = make_model("gemma3")
    names = linear_names(model)
    assert len(names) == 7 * N_BLOCKS and len(set(names)) == len(names)
    assert all(isinstance(model.get_submodule(name), nn.Linear) and "language_model" in name for name in names)
    vision = [name for name, _ in model.named_modules() if "vision" in name and name.endswith("q_proj")]
    assert vision and not any(name.endswith(known) for name in vision for known in names)


def test_a_cut_config_has_an_entry_for_each_block_that_is_left() -> None:
    config = make_model("gemma3_text").config
    cut = cut_config(config, 3)
    assert cut.num_hidden_layers == len(cut.layer_types) == 3 and cut.layer_types == config.layer_types[:3]
    assert config.num_hidden_layers == len(config.layer_types) == N_BLOCKS
