"""Targets load whole or cut, from folders and from a hub, with no byte read that is not needed, or are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, SmolVLMConfig, SmolVLMForConditionalGeneration

from nla import NLA
from nla.errors import (
    ArchitectureError,
    ArgumentError,
    ConfigError,
    MissingExtraError,
    NonFiniteError,
    PointError,
    TargetError,
    VocabularyError,
    WeightsError,
)
from nla.models import load as module
from nla.models.generate import ends_of, generate, pad_of
from nla.models.load import load_target, load_truncated
from nla.models.long_text import read_ids
from nla.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, other_base, save_adapter
from nla.models.points import n_embeddings
from nla.models.read import read
from nla.organisms import TARGETS
from nla.storage.files import read_json, write_json
from nla.text.tokens import encode, load_tokenizer
from tests.helpers.targets import IDS, INDEX, POINT, activations_of, files_of, saved
from tests.helpers.tiny import TEXTS, make_config, make_model, make_pair, make_tokenizer

PLANNER = TARGETS["couplets/planner"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A target of four blocks in many files."""
    return saved(tmp_path / "target")


def cut_of(folder: Path, **keywords) -> torch.Tensor:
    return load_truncated(folder, "resid_post.1", device="cpu", **keywords)(input_ids=IDS).last_hidden_state


def test_files_that_hold_only_upper_parts_are_not_even_opened(folder: Path) -> None:
    files = files_of(folder)
    low = ("model.embed_tokens", "model.layers.0.", "model.layers.1.")
    needed = {file for name, file in files.items() if name.startswith(low)}
    unneeded = set(files.values()) - needed
    assert len(unneeded) > 2 and files["model.norm.weight"] in unneeded and files["lm_head.weight"] in unneeded
    for file in unneeded:
        (folder / file).write_bytes(b"not safetensors")
    assert torch.equal(cut_of(folder), activations_of(make_model("llama")))
    with pytest.raises(WeightsError):
        load_target(folder, device="cpu")
    (folder / sorted(needed)[0]).unlink()
    with pytest.raises(WeightsError, match="without model-"):
        cut_of(folder)


def test_of_one_file_the_upper_parts_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.core_model_loading as loading

    folder, materialised = saved(tmp_path, shard="1GB"), []
    original = loading._materialize_copy

    def counted(tensor, *args, **kwargs):
        materialised.append(tensor.get_shape())
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(loading, "_materialize_copy", counted)
    view = load_truncated(folder, "resid_post.1", device="cpu")
    assert len(list(view.parameters())) == 1 + 2 * 9
    assert len(materialised) == 1 + 2 * 9 + 1, "embeddings, two blocks, and the final norm, which is dropped"
    assert torch.equal(view(input_ids=IDS).last_hidden_state, activations_of(make_model("llama")))


def test_a_cut_target_is_read_as_the_whole_one(folder: Path) -> None:
    view, (model, tokenizer) = load_truncated(folder, "resid_post.2", device="cpu"), load_target(folder, device="cpu")
    assert len(view.layers) == view.config.num_hidden_layers == 3
    found, expected = (read(each, tokenizer, TEXTS, "resid_post.2") for each in (view, model))
    assert torch.equal(found.vectors, expected.vectors) and found.spans == expected.spans
    with pytest.raises(PointError):
        read(view, tokenizer, TEXTS, "resid_post.3")
    with pytest.raises(PointError, match=r"resid_post\.3"):
        load_truncated(folder, "resid_post.4")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_type_is_what_is_asked_for(folder: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    model, _ = load_target(folder, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {kind}
    assert not model.training and model.name_or_path == str(folder)
    plain = LlamaForCausalLM.from_pretrained(folder, dtype=kind)
    assert torch.equal(cut_of(folder, dtype=dtype), activations_of(plain))


def test_a_frozen_target_has_no_dropout(tmp_path: Path) -> None:
    model = make_model("gpt2")
    model.config.update({"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1})
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    loaded = load_target(tmp_path, device="cpu")[0].train()
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


def test_a_multimodal_wrapper_in_either_spelling_gives_its_text_side_alone(tmp_path: Path) -> None:
    """transformers 4 wrote language_model.model.layers…, transformers 5 model.language_model.layers…."""
    expected = make_model("gemma3")
    new = saved(tmp_path / "new", "gemma3", "1GB")
    weights = load_file(new / "model.safetensors")
    old = saved(tmp_path / "old", "gemma3", "1GB")
    spelt = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    spelt |= {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    other = {}
    for name, tensor in weights.items():
        start = next((start for start in spelt if name.startswith(start)), "")
        other[spelt.get(start, "") + name.removeprefix(start)] = tensor
    assert set(other) != set(weights)
    save_file(other, old / "model.safetensors", metadata={"format": "pt"})
    for folder in (new, old):
        model, _ = load_target(folder, device="cpu")
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
        assert type(model).__name__ == "Gemma3ForCausalLM"
        assert torch.equal(cut_of(folder), activations_of(expected))


def tiny_smolvlm() -> SmolVLMForConditionalGeneration:
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    config = SmolVLMConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, image_token_id=60)
    return SmolVLMForConditionalGeneration(config).eval()


def test_a_wrapper_that_calls_its_text_side_otherwise_gives_it_too(tmp_path: Path) -> None:
    expected = tiny_smolvlm()
    expected.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert {name.split(".")[1] for name in load_file(tmp_path / "model.safetensors")} >= {"text_model", "vision_model"}
    model, _ = load_target(tmp_path, device="cpu")
    assert type(model) is LlamaForCausalLM and torch.equal(model(IDS).logits, expected(IDS).logits)
    assert torch.equal(cut_of(tmp_path), activations_of(expected))


def test_weights_without_a_text_side_are_said_to_be_without_it(tmp_path: Path) -> None:
    tiny_smolvlm().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    renamed = {name.replace("text_model", "speaker"): tensor for name, tensor in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    for load in (load_target, lambda folder, **keywords: load_truncated(folder, POINT, **keywords)):
        with pytest.raises(WeightsError, match=r"without weights of blocks.*text_model: …layers\.0"):
            load(tmp_path, device="cpu")


# Adapters


def lora(folder: Path, architecture: str = "llama", modules: tuple[str, ...] = ("q_proj", "up_proj")):
    """A tuned model of that architecture, whose adapter is saved in ``folder``."""
    tuned = get_peft_model(
        make_model(architecture), LoraConfig(r=4, target_modules=list(modules), fan_in_fan_out=architecture == "gpt2")
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(folder, tuned, "default")
    return tuned.eval()


@pytest.mark.parametrize(("architecture", "modules"), [("llama", ("q_proj", "up_proj")), ("gpt2", ("c_attn", "c_fc"))])
def test_an_adapter_is_merged_into_whole_and_cut_targets(tmp_path: Path, architecture: str, modules: tuple) -> None:
    folder = saved(tmp_path / "target", architecture)
    tuned = lora(tmp_path / "adapter", architecture, modules)
    model, _ = load_target(folder, device="cpu", adapter=tmp_path / "adapter")
    assert torch.allclose(model(IDS).logits, tuned(IDS).logits, atol=1e-4)
    assert not torch.allclose(model(IDS).logits, make_model(architecture)(IDS).logits, atol=1e-2)
    assert not [name for name, _ in model.named_parameters() if "lora" in name] and not hasattr(model, "peft_config")
    assert torch.allclose(cut_of(folder, adapter=tmp_path / "adapter"), activations_of(tuned), atol=1e-4)


def test_an_adapter_of_the_wrapper_fits_the_text_side(tmp_path: Path) -> None:
    folder = saved(tmp_path / "target", "gemma3")
    tuned = lora(tmp_path / "adapter", "gemma3", ("q_proj", "k_proj"))  # of these the vision has some too
    model, _ = load_target(folder, device="cpu", adapter=tmp_path / "adapter")
    assert torch.allclose(model(IDS).logits, tuned(IDS).logits, atol=1e-4)


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    lora(tmp_path / "adapter", "gpt2", ("c_attn",))
    with pytest.raises(ConfigError, match="does not fit"):
        load_target(folder, device="cpu", adapter=tmp_path / "adapter")
    with pytest.raises(ConfigError, match="does not fit"):
        load_truncated(folder, "resid_post.1", device="cpu", adapter=tmp_path / "adapter")


@pytest.mark.parametrize(("architecture", "module"), [("llama", "q_proj"), ("llama", "down_proj"), ("gpt2", "c_fc")])
@pytest.mark.parametrize("part", ["A", "B"])
def test_a_matrix_of_another_shape_is_refused_before_peft_makes_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, module: str, part: str
) -> None:
    target, adapter = saved(tmp_path / "target", architecture), tmp_path / "adapter"
    lora(adapter, architecture, (module,))
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    name = next(n for n in tensors if f"lora_{part}" in n)
    rows, columns = tensors[name].shape
    wrong = (rows, columns + 8) if part == "A" else (rows + 8, columns)
    save_file({**tensors, name: torch.zeros(wrong)}, adapter / ADAPTER_WEIGHTS)
    monkeypatch.setattr("peft.get_peft_model", lambda *_, **__: pytest.fail("PEFT made matrices"))
    with pytest.raises(WeightsError) as refused:
        load_target(target, device="cpu", adapter=adapter)
    assert f"lora_{part} of " in refused.value.got and module in refused.value.got and str(wrong) in refused.value.got
    assert str((rows, columns)) in refused.value.expected


def test_a_base_of_another_name_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target, adapter = saved(tmp_path / "Tiny-1B", "llama"), tmp_path / "adapter"
    lora(adapter)
    config = read_json(adapter / ADAPTER_CONFIG)
    same = ["someone/tiny-1b", "../../Tiny-1B/", "/root/.cache/huggingface/hub/models--someone--Tiny-1B/snapshots/0f0f"]
    for base, warned in [*((name, False) for name in (*same, None, "")), ("someone/Tiny-7B", True)]:
        caplog.clear()
        write_json(adapter / ADAPTER_CONFIG, {**config, "base_model_name_or_path": base})
        load_target(target, device="cpu", adapter=adapter)
        assert [r.levelname for r in caplog.records] == ["WARNING"] * warned, base
        assert ("someone/Tiny-7B" in caplog.text) == warned == (other_base(adapter, target) is not None)


# Refusals


def test_no_target_of_that_name() -> None:
    for name in ("no/such/folder", "../none", "a b"):
        with pytest.raises(TargetError, match="hub id"):
            load_target(name)


def test_weights_that_could_run_code_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    torch.save(make_model("llama").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(TargetError, match=r"without safetensors.*save_pretrained"):
        load_target(tmp_path)


def test_an_unknown_architecture_is_refused_before_weights_are_looked_for(tmp_path: Path) -> None:
    for kind in ("t5", "no-such-type"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ArchitectureError, match=kind):
            load_target(tmp_path)


def test_an_adapter_or_code_beside_the_weights_is_not_followed(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else", "peft_type": "LORA"}')
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit")
    model, _ = load_target(folder, device="cpu", trust_remote_code=True)
    assert torch.equal(model(IDS).logits, make_model("llama")(IDS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"])
def test_weights_that_are_missing_odd_or_not_finite_are_refused_where_they_are_read(folder: Path, name: str) -> None:
    path = folder / files_of(folder)[name]
    whole, low = load_file(path), "layers.0" in name
    for bad, error in (
        ({key: tensor for key, tensor in whole.items() if key != name}, WeightsError),
        ({**whole, name: whole[name][:5].clone()}, WeightsError),
        ({**whole, name: whole[name] * torch.nan}, NonFiniteError),
    ):
        save_file(bad, path, metadata={"format": "pt"})
        with pytest.raises(error, match=r"up_proj|does not load"):
            load_target(folder, device="cpu")
        if low:
            with pytest.raises(error):
                cut_of(folder)
        else:
            cut_of(folder)


def test_an_index_that_leads_out_of_the_folder_is_refused(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../../secret.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="names no safetensors"):
        load_target(folder)


def test_keywords_out_of_range_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for keywords in ({"dtype": "int8"}, {"quantization": "2bit"}, {"quantization": "8bit", "adapter": tmp_path}):
        with pytest.raises(ArgumentError):
            load_target(folder, **keywords)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    for quantization in ("8bit", "4bit"):
        with pytest.raises(MissingExtraError, match="pip install bitsandbytes"):
            load_target(folder, quantization=quantization)


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "meta", 3.5])
def test_a_device_that_is_not_here_is_refused_before_anything_is_read(device) -> None:
    for load in (
        lambda: load_target("no/such/model", device=device),
        lambda: load_truncated("x", POINT, device=device),
    ):
        with pytest.raises(ArgumentError, match="device="):
            load()


def test_a_tokenizer_is_asked_for_before_weights_are_read(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"not safetensors")
    with pytest.raises(WeightsError, match="without a vocabulary"):
        load_target(folder, device="cpu")


# Settings


def test_four_bits_are_nf4_with_quantised_constants_in_the_targets_type(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    seen = {}

    def stop(*_, **keywords):
        seen.update(keywords)
        raise ValueError("enough")

    monkeypatch.setattr(module, "find_spec", lambda name: True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", stop)
    with pytest.raises(WeightsError, match="enough"):
        load_target(PLANNER, dtype="bfloat16", device="cpu", quantization="4bit")
    found = seen["quantization_config"]
    assert found.load_in_4bit and not found.load_in_8bit
    assert (found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == ("nf4", True)
    assert found.bnb_4bit_compute_dtype == torch.bfloat16 == seen["dtype"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_a_target_without_generation_settings_ends_where_its_configuration_says(tmp_path: Path, architecture) -> None:
    model = make_model(architecture)
    model.config.eos_token_id = [2, 30]
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    loaded, tokenizer = load_target(tmp_path, device="cpu")
    assert ends_of(loaded, tokenizer) == [2, 30]
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert torch.equal(cut_of(tmp_path), activations_of(model))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_no_type_means_the_checkpoints_own(tmp_path: Path, architecture: str) -> None:
    make_model(architecture).to(torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    kinds = {parameter.dtype for parameter in load_target(tmp_path, dtype=None, device="cpu")[0].parameters()}
    kinds |= {parameter.dtype for parameter in load_truncated(tmp_path, POINT, dtype=None, device="cpu").parameters()}
    assert kinds == {torch.bfloat16}
    config = json.loads((tmp_path / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    kinds = {parameter.dtype for parameter in load_target(tmp_path, dtype=None, device="cpu")[0].parameters()}
    assert kinds == {torch.float32}


def test_a_tokenizer_whose_words_go_beyond_the_embeddings_is_refused(tmp_path: Path) -> None:
    make_model("llama", vocab_size=50).save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    first = repr(tokenizer.convert_ids_to_tokens(50))
    for load in (load_target, load_tokenizer):
        with pytest.raises(WeightsError, match=rf"{re.escape(first)} has the id 50 \(4 such\); expected ids below 50"):
            load(tmp_path)


def test_added_tokens_beyond_the_embeddings_are_refused_where_they_are_met(tmp_path: Path) -> None:
    expected, added = make_pair("llama"), "<[PAD]>"
    make_model("llama").save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": added})
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_target(tmp_path, device="cpu")
    assert n_embeddings(model) == tokenizer.convert_tokens_to_ids(added) == len(tokenizer) - 1

    acts = read(model, tokenizer, TEXTS, POINT)
    assert acts.vectors.equal(expected.read(TEXTS).vectors)
    prompts = [encode(tokenizer, text, 100).ids for text in (TEXTS[0], f"{TEXTS[0]} {TEXTS[0]}")]
    short, long = (
        generate(model, rows, ends=[2], pad=pad_of(tokenizer), max_new_tokens=8).rows()
        for rows in (prompts[:1], prompts)
    )
    assert short == long[:1]
    ids = torch.tensor(tokenizer(added)["input_ids"])
    pair = NLA.create(model, tokenizer, make_config(tokenizer, model), rank=2)
    for use in (
        lambda: read(model, tokenizer, [*TEXTS, f"{TEXTS[0]}{added}"], POINT),
        lambda: read_ids(model, ids, POINT, [0]),
        lambda: generate(model, [ids.tolist()], ends=[2], pad=0, max_new_tokens=1),
        lambda: pair.reconstruct(f"{TEXTS[0]}{added}"),
    ):
        with pytest.raises(VocabularyError, match="the token with the id 54; expected ids below 54"):
            use()
    assert pair.decoder.prompt_rows([added], strict=False) == pair.decoder.prompt_rows([""], strict=False)
