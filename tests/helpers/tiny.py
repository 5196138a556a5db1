"""Tiny random models of every supported architecture, a word-level tokenizer and a pair, all made in code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nla.autoencoder import NLA
from nla.config import InjectionConfig, NLAConfig, tokenizer_hash
from nla.metrics import Baseline
from nla.text.tokens import render_prompt

MARKER = "<|activation|>"
WORDS = ["the", "a", "cat", "dog", "red", "blue", "sat", "ran", "on", "under", "mat", "tree", "it", "is", "here"]
WORDS += ["there", "and", "so", "Explain", "Summary"]
TAGS = ["<explanation>", "</explanation>", "<text>", "</text>", "<summary>"]
SPECIAL = ["<|pad|>", "<|unk|>", "<|end|>", "<|user|>", "<|assistant|>", MARKER]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXTS = [
    "the cat sat on the mat.\n",
    "a red dog ran under the blue tree and sat there.\n",
    "it is here.\n",
    "so the dog is under a tree.\nthe cat is on a mat.\n",
]
ARCHITECTURES = ("qwen2", "qwen3", "llama")
"""What most tests run on."""
D_MODEL, N_BLOCKS, CONTEXT = 32, 4, 64
_HEADS: dict[str, Any] = {"head_dim": 8}
_WINDOW: dict[str, Any] = {"sliding_window": 5}
_TYPES: dict[str, Any] = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GPT2: dict[str, Any] = {"n_inner": 48, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", "model.norm", {}),
    "qwen3": ("Qwen3", "model.norm", _HEADS),
    "llama": ("Llama", "model.norm", {}),
    "mistral": ("Mistral", "model.norm", _HEADS | _WINDOW),
    "gemma2": ("Gemma2", "model.norm", _HEADS | _TYPES | {"query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3", "model.norm", _HEADS | _TYPES | {"query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", "model.language_model.norm", _HEADS | _TYPES | {"query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", "model.norm", _WINDOW),
    "olmo": ("Olmo", "model.norm", {}),
    "olmo2": ("Olmo2", "model.norm", {}),
    "olmo3": ("Olmo3", "model.norm", _TYPES),
    "gpt2": ("GPT2", "transformer.ln_f", _GPT2),
    "gpt_neox": ("GPTNeoX", "gpt_neox.final_layer_norm", {}),
    "qwen3_moe": ("Qwen3Moe", "model.norm", _HEADS | {"num_experts": 4, "moe_intermediate_size": 16}),
    "mixtral": ("Mixtral", "model.norm", _HEADS | {"num_local_experts": 4}),
    "gpt_oss": ("GptOss", "model.norm", _HEADS | _TYPES | {"num_local_experts": 4}),
}
"""Every architecture: transformers' name of it, where its final norm is, and what its config needs beside the usual."""


def load_benchmark(name: str) -> ModuleType:
    """A file of benchmarks/, which is no package."""
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_tokenizer() -> PreTrainedTokenizerFast:
    pieces = [*WORDS, *[f" {word}" for word in WORDS], ".", ":", "\n"]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *TAGS, *pieces])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[A-Za-z]+| ?[^\sA-Za-z]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<|unk|>",
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(architecture: str = "qwen2", seed: int = 0, vocab_size: int = 54, n_blocks: int = N_BLOCKS):
    """A random model whose activations have varied directions and whose final norm is not the identity."""
    name, norm, extra = MODELS[architecture]
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": D_MODEL,
        "intermediate_size": 48,
        "num_hidden_layers": n_blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "initializer_range": 0.25,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
        **extra,
    }
    known = {"num_key_value_heads": name not in ("GPTNeoX", "GPT2"), "num_experts_per_tok": "num" in "".join(extra)}
    sizes = {key: value for key, value in sizes.items() if known.get(key, True)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _multimodal(sizes) if architecture == "gemma3" else _causal(name, sizes)
        weight = getattr(model.get_submodule(norm), "weight", None)
        if weight is not None:  # Olmo's norm has none
            torch.nn.init.uniform_(weight, 0.5, 2.0)
    return model.eval()


def _causal(name: str, sizes: dict[str, Any]):
    kind = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    return kind(config(**sizes))


def _multimodal(sizes: dict[str, Any]):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    ids = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(text_config=sizes, vision_config=vision, tie_word_embeddings=False, **ids)
    return transformers.Gemma3ForConditionalGeneration(config)


def make_config(tokenizer, model, point: str = "resid_post.1", **changes) -> NLAConfig:
    prompt = f"Explain:{MARKER}."
    ids = render_prompt(tokenizer, prompt)
    marker_id = tokenizer.convert_tokens_to_ids(MARKER)
    where = ids.index(marker_id)
    fields = {
        "target": "a/target",
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "d_model": D_MODEL,
        "dtype": "float32",
        "point": point,
        "injection": InjectionConfig(
            marker=MARKER, marker_id=marker_id, left_id=ids[where - 1], right_id=ids[where + 1], norm=4.0
        ),
        "encoder_prompt": prompt,
        "decoder_template": "Summary:<text>{explanation}</text><summary>",
        "max_new_tokens": 8,
        "activation_norm": 3.0,
    }
    return NLAConfig(**{**fields, **changes})


def make_pair(architecture: str = "qwen2", seed: int = 0, scale: float = 0.05, **config_changes) -> NLA:
    """A pair whose adapters are random instead of zero, so that a role that is not switched shows."""
    tokenizer, model = make_tokenizer(), make_model(architecture, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vectors = torch.randn(50, D_MODEL, generator=generator)
        pair = NLA.create(
            model,
            tokenizer,
            make_config(tokenizer, model, **config_changes),
            rank=4,
            baselines={"global": Baseline.fit(vectors)},
        )
    for name, parameter in pair.model.named_parameters():
        if "lora_B" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    pair.head.weight.data += 0.01 * torch.randn(D_MODEL, D_MODEL, generator=generator)
    return pair
