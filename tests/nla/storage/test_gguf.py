"""GGUF files become targets: with the weights and tokenizer that they hold, once, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nla.errors import MissingExtraError, NLAError, TargetError, WeightsError
from nla.eval.target import Target
from nla.models.checkpoint import read_config
from nla.models.load import load_target, load_truncated
from nla.models.read import read
from nla.organisms import target_folder
from nla.storage import gguf as module
from tests.helpers.tiny import N_BLOCKS, make_model

gguf = pytest.importorskip("gguf")
LETTERS = [chr(code) for code in range(97, 123)]
TOKENS = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", *LETTERS, "Ġ", *(f"Ġ{letter}" for letter in LETTERS)]
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
NAMES |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
NAMES |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nla" / "gguf"


def name_of(name: str) -> str:
    """GGUF's name of a parameter of Llama."""
    path, _, kind = name.rpartition(".")
    if path in WHOLE:
        return f"{WHOLE[path]}.{kind}"
    _, _, block, part = path.split(".", 3)
    return f"blk.{block}.{NAMES[part]}.{kind}"


def value_of(name: str, weight: torch.Tensor, config: Any) -> np.ndarray:
    """A weight as llama.cpp stores it: the rotary halves of each head of queries and keys are interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    values = weight.detach().numpy()
    if heads is None:
        return values
    return np.ascontiguousarray(values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape))


def write(path: Path, model: Any, left_out: str = "", **changes: Any) -> Path:
    """A model of type Llama as a GGUF file, with other settings where they are given."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(changes.get("n_blocks", config.num_hidden_layers))
    writer.add_feed_forward_length(changes.get("width", config.intermediate_size))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in TOKENS])
    writer.add_token_merges([f"Ġ {letter}" for letter in LETTERS])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.named_parameters():
        if name_of(name) != left_out:
            writer.add_tensor(name_of(name), value_of(name, weight, config))
    if "strange" in changes:
        writer.add_tensor(changes["strange"], np.zeros(config.hidden_size, np.float32))
    if "scaled" in changes:
        writer.add_tensor(changes["scaled"], np.full(4, 8, np.float32))
    if "scaling" in changes:
        writer.add_rope_scaling_type(changes["scaling"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama", vocab_size=len(TOKENS))


def test_a_file_means_the_model_that_it_was_written_from(tmp_path: Path, llama: Any, cache: Path) -> None:
    file = write(tmp_path / "tiny.gguf", llama)
    read, tokenizer = load_target(file, device="cpu")
    ids = torch.tensor([tokenizer("a cat ran")["input_ids"]])
    assert torch.allclose(read(ids).logits, llama(ids).logits, atol=1e-4)
    assert [TOKENS[token] for token in ids[0].tolist()] == ["a", "Ġc", "a", "t", "Ġr", "a", "n"]
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|pad|>", "<|end|>", "<|pad|>")
    assert tokenizer("<|user|>a")["input_ids"] == [3, 4]
    assert max(tokenizer("a <|endoftext|> b")["input_ids"]) < len(TOKENS) == len(tokenizer)  # which transformers adds
    assert Path(str(read.name_or_path)).parent == cache and not hasattr(read.config, "quantization_config")


def test_every_loader_takes_the_file_itself(tmp_path: Path, llama: Any) -> None:
    file = write(tmp_path / "tiny.gguf", llama)
    model, tokenizer = load_target(str(file), device="cpu")
    config = read_config(file, None)
    view, target = load_truncated(file, "resid_post.1", device="cpu"), Target.load(file, "resid_post.1", device="cpu")
    whole, *others = (read(each, tokenizer, "a cat", "resid_post.1").vectors for each in (model, view, target.model))
    assert all(whole.equal(other) for other in others) and config.hidden_size == whole.shape[1]


def test_quantised_weights_have_the_values_of_the_quantisation(tmp_path: Path, llama: Any) -> None:
    file, kind = tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q8_0
    rounded = {}
    for name, parameter in llama.named_parameters():
        values = parameter.detach().numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0 and "q_proj" not in name and "k_proj" not in name:
            scale = np.abs(values.reshape(-1, 32)).max(1, keepdims=True) / 127  # Q8_0's definition
            whole = np.round(values.reshape(-1, 32) / np.maximum(scale, 1e-9))
            rounded[name] = (whole * scale.astype(np.float16).astype(np.float32)).reshape(values.shape)

    def add(self: Any, name: str, tensor: np.ndarray, **_: Any) -> None:
        if name in {name_of(one) for one in rounded}:
            original(self, name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            original(self, name, tensor)

    original = gguf.GGUFWriter.add_tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add)
        write(file, llama)
    read, _ = load_target(file, device="cpu")
    state = read.state_dict()
    assert len(rounded) > N_BLOCKS
    for name, values in rounded.items():
        assert np.allclose(state[name].numpy(), values, atol=2e-3 * np.abs(values).max()), name
    assert state["model.norm.weight"].equal(llama.model.norm.weight)


def test_a_file_is_converted_once_by_its_content(
    tmp_path: Path, llama: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = target_folder(write(tmp_path / "tiny.gguf", llama))
    assert str(tmp_path / "tiny.gguf") in caplog.text and folder in caplog.text
    (tmp_path / "tiny.gguf").rename(tmp_path / "other.GGUF")
    monkeypatch.setattr(module, "_model_of", lambda *_: pytest.fail("converted again"))
    assert target_folder(tmp_path / "other.GGUF") == folder and [Path(folder)] == list(cache.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left_out": "blk.1.ffn_down.weight"}, "weights"),
        ({"left_out": "output_norm.weight"}, "weights"),
        ({"left_out": "output_norm.weight", "strange": "norm.weight"}, "without model.norm.weight"),
        ({"n_blocks": 1_000_000_000}, "of 1000000000 blocks"),
        ({"n_blocks": 2}, "of 2 blocks"),
        ({"width": 2_000_000_000}, "weights"),
        ({"width": 40}, "not load|without"),
        ({"scaled": "rope_freqs.weight"}, "rope_freqs.weight"),
        ({"scaling": gguf.RopeScalingType.YARN}, "rope.scaling.type"),
    ],
)
def test_what_would_be_read_as_another_model_is_refused(
    tmp_path: Path, llama: Any, cache: Path, change: dict[str, Any], message: str
) -> None:
    file = write(tmp_path / "tiny.gguf", llama, **change)
    with pytest.raises(WeightsError, match=message):
        target_folder(file)
    assert not cache.exists() or not list(cache.iterdir())


def test_damaged_files_are_refused_and_leave_nothing(tmp_path: Path, llama: Any, cache: Path) -> None:
    file = write(tmp_path / "tiny.gguf", llama)
    whole, random = file.read_bytes(), np.random.default_rng(0)
    cuts = [whole[:size] for size in (0, 3, 4, 20, 300, len(whole) // 2, len(whole) - 64)]
    noise = []
    for _ in range(40):
        damaged = bytearray(whole)
        for place in random.integers(4, 1500, 4):
            damaged[place] = random.integers(256)
        noise.append(bytes(damaged))
    for content in (*cuts, b"PK\x03\x04" + whole[4:]):
        file.write_bytes(content)
        with pytest.raises(WeightsError):
            target_folder(file)
    assert not cache.exists() or not list(cache.iterdir())
    for content in noise:  # a damaged name may still be a whole file
        file.write_bytes(content)
        try:
            target_folder(file)
        except NLAError as error:
            assert isinstance(error, WeightsError)


def test_no_file_and_no_package_are_named(tmp_path: Path, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match=r"no readable models/none\.gguf"):
        target_folder("models/none.gguf")  # which has the form of a hub id
    file = write(tmp_path / "tiny.gguf", llama)
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'nla\[gguf\]'"):
        target_folder(file)
