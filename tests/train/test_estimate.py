"""What a recipe is said to take."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from transformers import LlamaConfig, Qwen2Config

from nla.errors import AccessError, RecipeError, TargetError
from nla.train.estimate import count_shape, estimate, find_shape, shape_of, usual_shape
from nla.train.recipe import SHIPPED, ShapeSettings, load_recipe
from tests.helpers.tiny import make_model, make_tokenizer

CORPORA = sorted(path.stem for path in SHIPPED.glob("*.yaml") if "corpus:" in path.read_text())
PUBLISHED = {"qwen2.5-0.5b": 0.494, "qwen2.5-7b": 7.62, "qwen3-8b": 8.19, "gemma-3-12b": 11.77, "llama-3.3-70b": 70.55}
PUBLISHED["smollm2"] = 0.1345
"""Billions of parameters of the text models, as their cards say."""


@pytest.mark.parametrize("name", CORPORA)
def test_a_shipped_recipe_says_what_it_takes_and_fits_the_hardware_it_names(name):
    recipe = load_recipe(name, ["dtype=bfloat16"])
    shape = shape_of(recipe.shape)
    assert shape.parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.005)
    stages = estimate(recipe, shape)
    assert list(stages) == [stage for stage in recipe.stages if stage != "control"]
    assert all(figures["fits"] and figures["hours"] is not None for figures in stages.values())
    assert stages["joint"]["rollouts"] == recipe.joint.steps * recipe.joint.rows


@pytest.mark.parametrize("name", CORPORA)
def test_a_shipped_recipe_trains_on_no_text_twice_and_divides_among_its_devices(name):
    recipe = load_recipe(name)
    w, j, devices = recipe.warmstart, recipe.joint, recipe.hardware.devices
    told = recipe.texts.n_train * (1 - recipe.describer.failing_share)
    assert max(w.encoder_steps, w.decoder_steps) * w.batch_size <= told
    assert w.batch_size % (devices * w.rows_per_backward) == 0
    assert j.rows % (devices * j.rows_per_backward) == 0 and j.prompts_per_step % devices == 0
    assert j.prompts_per_step // devices >= j.decoder_mini_batches
    assert recipe.corpus.n_documents * recipe.corpus.n_positions > recipe.texts.n_train


def test_a_step_takes_about_as_long_as_the_published_one():
    """One H200, Qwen3-8B with LoRA, 256 rollouts, transformers' generate: 93 to 95 s."""
    recipe = load_recipe("qwen3-8b")
    assert recipe.joint.rows == 256 and recipe.hardware.devices == 1
    assert estimate(recipe, shape_of(recipe.shape))["joint"]["seconds_a_step"] == pytest.approx(94, rel=0.25)


def planned(name, *overrides):
    recipe = load_recipe(name, overrides)
    return estimate(recipe, shape_of(recipe.shape))


@pytest.mark.parametrize("name", ["qwen2.5-7b", "llama-3.3-70b"])
def test_twice_the_devices_do_twice_the_rows_and_each_reads_its_own_copy(name):
    one = planned(name, "hardware.devices=2", "joint.rows_per_backward=4", "warmstart.rows_per_backward=4")
    rows = ["joint.prompts_per_step=64", "warmstart.batch_size=128", "texts.n_train=200000"]
    two = planned(name, "hardware.devices=4", "joint.rows_per_backward=4", "warmstart.rows_per_backward=4", *rows)
    assert two["joint"]["seconds_a_step"] == pytest.approx(one["joint"]["seconds_a_step"], rel=1e-3)
    for stage in ("warmstart", "describe"):
        assert two[stage]["hours"] == pytest.approx(one[stage]["hours"], rel=0.01)
        assert two[stage]["memory_gb"] == one[stage]["memory_gb"]


def test_processes_that_divide_the_same_work_save_less_than_their_number():
    one, eight = (planned("llama-3.3-70b", f"hardware.devices={n}") for n in (1, 8))
    assert one["describe"]["hours"] == pytest.approx(8 * eight["describe"]["hours"], rel=0.01)
    assert one["joint"]["hours"] < 7 * eight["joint"]["hours"]  # weights are read for a token, however few its rows
    single = planned("qwen2.5-7b", "hardware.devices=1")["warmstart"]["memory_gb"]
    assert planned("qwen2.5-7b", "hardware.devices=2")["warmstart"]["memory_gb"] > single  # sums of gradients


def test_embeddings_stay_as_they_are_when_blocks_are_quantised():
    recipe = load_recipe("llama-3.3-70b")
    s = recipe.shape
    embeddings = 2 * s.vocabulary * s.d_model * 2 / 1e9
    blocks = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672) / 2 / 1e9
    for stage in ("describe", "warmstart", "joint"):
        assert planned("llama-3.3-70b")[stage]["memory_gb"] > embeddings + blocks > 38
    plain, packed = (planned("llama-3.3-70b", f"quantization={how}")["joint"] for how in ("null", "4bit"))
    assert plain["memory_gb"] - packed["memory_gb"] == pytest.approx(4 * blocks - 0.6 * 2 * blocks, abs=0.2)
    bare = planned("llama-3.3-70b", "corpus.n_documents=null", "corpus.n_eval=null")["extract"]
    assert bare["hours"] is None and bare["not_known"] == "corpus.n_documents"
    assert bare["memory_gb"] == planned("llama-3.3-70b")["extract"]["memory_gb"] > 54 / 80 * blocks + embeddings / 2


def test_a_describer_of_its_own_is_reckoned_with_if_its_size_is_stated():
    own = planned("qwen2.5-0.5b")["describe"]
    assert 7.6 * 2 < own["memory_gb"] < 24 and own["hours"] > 1
    half = planned("qwen2.5-0.5b", "describer.quantization=4bit")["describe"]
    assert half["memory_gb"] < own["memory_gb"] - 9
    unknown = planned("qwen2.5-0.5b", "describer.parameters_b=null")["describe"]
    assert unknown["hours"] is unknown["memory_gb"] is None and unknown["not_known"] == "describer.parameters_b"
    shape = usual_shape(7.6e9)
    real = shape_of(load_recipe("qwen2.5-7b").shape)
    assert shape.parameters == pytest.approx(7.6e9, rel=0.01) and shape.n_blocks == pytest.approx(
        real.n_blocks, rel=0.3
    )


def test_longer_batches_and_prefixes_take_memory_and_time():
    usual = planned("qwen2.5-7b")
    short, long = (planned("qwen2.5-7b", f"describer.max_chars={n}")["describe"] for n in (400, 40000))
    assert short["tokens"] < usual["describe"]["tokens"] == long["tokens"]  # half a usual document is before a position
    assert short["memory_gb"] < usual["describe"]["memory_gb"] < 1.1 * long["memory_gb"]
    wide = planned("qwen2.5-7b", "describer.concurrency=128")["describe"]
    assert wide["memory_gb"] > usual["describe"]["memory_gb"] + 64 * 1250 * 18944 * 2 * 3 / 1e9
    often = planned("qwen2.5-7b", "joint.eval_every=5")["joint"]
    rest = (often["hours"] - usual["joint"]["hours"]) * 3600 / (201 - 21)  # of an evaluation of 600 rows
    assert rest == pytest.approx(600 / 256 * 59, rel=0.15) and often["steps"] == usual["joint"]["steps"]


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
    assert counted[:5] == stated[:5] and counted.lora == stated.lora
    assert (counted.source, stated.source) == ("counted", "stated")


def test_a_plan_grows_with_what_is_asked_for():
    recipe = load_recipe("qwen2.5-7b")
    shape = shape_of(recipe.shape)
    before = estimate(recipe, shape)
    more = estimate(load_recipe("qwen2.5-7b", ["joint.steps=2000", "corpus.n_documents=200000"]), shape)
    assert more["joint"]["hours"] == pytest.approx(2 * before["joint"]["hours"], rel=0.01)
    assert more["extract"]["tokens"] == 2 * before["extract"]["tokens"]
    assert more["warmstart"] == before["warmstart"]
    two = estimate(load_recipe("qwen2.5-7b", ["hardware.devices=2"]), shape)
    assert before["describe"]["hours"] / 2 == pytest.approx(two["describe"]["hours"], rel=0.01)
    assert before["warmstart"]["hours"] / 2 == pytest.approx(two["warmstart"]["hours"], rel=0.2)
    small = estimate(load_recipe("qwen2.5-7b", ["hardware.memory_gb=16"]), shape)
    assert not small["joint"]["fits"]


def test_a_target_that_is_here_is_counted_and_one_that_is_nowhere_needs_a_shape(tmp_path):
    make_model("qwen2").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    recipe = load_recipe("qwen2.5-7b", [f"target={tmp_path}"])
    assert find_shape(recipe).parameters == sum(p.numel() for p in make_model("qwen2").parameters())
    assert {stage["shape"] for stage in estimate(recipe, find_shape(recipe)).values()} == {"counted"}
    with pytest.raises(TargetError):
        find_shape(load_recipe("qwen2.5-7b", ["target=./no-such-folder", "shape=null"]))


def test_the_stated_shape_is_used_only_where_the_target_cannot_be_reached(tmp_path, monkeypatch):
    def answer(error):
        def download(*_, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    answer(LocalEntryNotFoundError("no network"))
    recipe = load_recipe("gemma-3-12b")
    assert {stage["shape"] for stage in estimate(recipe, find_shape(recipe)).values()} == {"stated"}
    with pytest.raises(TargetError, match="cannot be reached"):
        find_shape(load_recipe("gemma-3-12b", ["shape=null"]))
    with pytest.raises(TargetError, match="no target"):
        find_shape(load_recipe("gemma-3-12b", ["target=/tmp/no such model"]))
    answer(GatedRepoError.__new__(GatedRepoError))
    with pytest.raises(AccessError):
        find_shape(recipe)
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 8}')
    recurrent = find_shape(load_recipe("gemma-3-12b", [f"target={tmp_path}", "point=resid_post.2"]))
    assert (recurrent.source, recurrent.n_blocks, recurrent.d_model, recurrent.d_kv) == ("counted", 8, 64, 0)


def test_hardware_out_of_range_is_refused():
    with pytest.raises(RecipeError, match="tflops"):
        load_recipe("qwen2.5-7b", ["hardware.tflops=0"])
