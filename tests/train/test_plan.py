"""What a recipe is said to take."""

from __future__ import annotations

import pytest
from conftest import make_model, make_tokenizer
from transformers import LlamaConfig, Qwen2Config

from nla.errors import RecipeError, TargetError
from nla.train.plan import ShapeSettings, count_shape, find_shape, plan, shape_of
from nla.train.recipe import SHIPPED, load_recipe

CORPORA = sorted(path.stem for path in SHIPPED.glob("*.yaml") if "corpus:" in path.read_text())
PUBLISHED = {"qwen2.5-0.5b": 0.494, "qwen2.5-7b": 7.62, "qwen3-8b": 8.19, "gemma-3-12b": 11.77, "llama-3.3-70b": 70.55}
"""Billions of parameters of the text models, as their cards say."""


@pytest.mark.parametrize("name", CORPORA)
def test_a_shipped_recipe_says_what_it_takes_and_fits_the_hardware_it_names(name):
    recipe = load_recipe(name)
    shape = shape_of(recipe.shape)
    assert shape.parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.005)
    stages = plan(recipe, shape)
    assert list(stages) == ["extract", "describe", "warmstart", "joint"]
    assert all(figures.get("fits", True) for figures in stages.values())
    assert stages["joint"]["rollouts"] == recipe.joint.steps * recipe.joint.rows


@pytest.mark.parametrize("config", [Qwen2Config, LlamaConfig])
def test_a_stated_shape_is_that_of_the_model_but_for_norms_and_biases(config, tmp_path):
    sizes = ShapeSettings(
        n_blocks=6, d_model=512, d_mlp=1024, n_heads=8, n_kv_heads=2, head_dim=64, vocabulary=3000, tied=False
    )
    config(
        num_hidden_layers=6,
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=3000,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)
    counted, stated = count_shape(str(tmp_path), None), shape_of(sizes)
    assert counted.parameters == pytest.approx(stated.parameters, rel=2e-3)
    assert counted[:4] == stated[:4] and counted.lora == stated.lora


def test_a_plan_grows_with_what_is_asked_for():
    recipe = load_recipe("qwen2.5-7b")
    shape = shape_of(recipe.shape)
    before = plan(recipe, shape)
    more = plan(load_recipe("qwen2.5-7b", ["joint.steps=2000", "corpus.n_documents=200000"]), shape)
    assert more["joint"]["hours"] == pytest.approx(2 * before["joint"]["hours"], rel=0.01)
    assert more["extract"]["tokens"] == 2 * before["extract"]["tokens"]
    assert more["warmstart"] == before["warmstart"]
    two = plan(load_recipe("qwen2.5-7b", ["hardware.devices=2"]), shape)
    assert before["warmstart"]["hours"] / 2 == pytest.approx(two["warmstart"]["hours"], rel=0.01)
    small = plan(load_recipe("qwen2.5-7b", ["hardware.memory_gb=16"]), shape)
    assert not small["joint"]["fits"]


def test_a_target_that_is_here_is_counted_and_one_that_is_nowhere_needs_a_shape(tmp_path):
    make_model("qwen2").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    recipe = load_recipe("qwen2.5-7b", [f"target={tmp_path}"])
    assert find_shape(recipe).parameters == sum(p.numel() for p in make_model("qwen2").parameters())
    with pytest.raises(TargetError):
        find_shape(load_recipe("qwen2.5-7b", ["target=./no-such-folder", "shape=null"]))


def test_hardware_out_of_range_is_refused():
    with pytest.raises(RecipeError, match="tflops"):
        load_recipe("qwen2.5-7b", ["hardware.tflops=0"])
