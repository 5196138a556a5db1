"""Tiny random pairs as other projects save them: full-weight AV and AR folders, and LoRA pairs that share a base."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import yaml
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

D_MODEL, N_BLOCKS, LAYER, NORM = 32, 4, 1, 40.0
MARKER = "㈎"
WORDS = "You explain the vector a cat dog red blue sat ran on under mat tree it is here Here Summary of following text"
TAGS = ["<concept>", "</concept>", "<explanation>", "</explanation>", "<text>", "</text>", "<summary>", MARKER]
SPECIAL = ["<pad>", "<unk>", "<bos>", "<end>", "<user>", "<assistant>"]
ENCODER_TEMPLATE = "You explain the vector.\nHere it is: <concept>{injection_char}</concept>."
DECODER_TEMPLATE = "Summary of the following text: <text>{explanation}</text> <summary>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TEXTS = ["the cat sat on the mat.", "a red dog ran under the blue tree.\nHere is the text"]
"""Explanations that are decoded."""

ARCHITECTURES = ("qwen2", "llama", "gemma3", "gemma3 multimodal")
"""Qwen2 has no BOS; Gemma-3 scales its embeddings, and its AV may be saved inside the multimodal wrapper."""

_NAMES = {"qwen2": "Qwen2", "llama": "Llama", "gemma3": "Gemma3", "gemma3 multimodal": "Gemma3"}


class Folders(NamedTuple):
    """Where the parts of a pair were written."""

    target: Path
    av: Path
    ar: Path


def make_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Words and tags; with ``bos`` the tokenizer puts it first, and the chat template writes it."""
    words = WORDS.split()
    pieces = [*words, *[f" {word}" for word in words], ".", ":", "\n", " "]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *TAGS, *pieces])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[A-Za-z]+| |[^\sA-Za-z]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<end>",
        chat_template=("<bos>" if bos else "") + CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        **({"bos_token": "<bos>"} if bos else {}),
    )


def make_model(architecture: str, seed: int, n_blocks: int = N_BLOCKS) -> Any:
    """A random causal LM in float32 whose norms are not the identity."""
    sizes = {
        "vocab_size": len(make_tokenizer()),
        "hidden_size": D_MODEL,
        "intermediate_size": 48,
        "num_hidden_layers": n_blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": architecture.startswith("gemma"),
        "pad_token_id": 0,
        "bos_token_id": None if architecture == "qwen2" else 2,
        "eos_token_id": 3,
    }
    if architecture == "qwen2":
        del sizes["head_dim"]
    name = _NAMES[architecture]
    with torch.random.fork_rng():
        if architecture == "gemma3 multimodal":
            model = _multimodal(sizes)
        else:
            kind = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
            model = getattr(transformers, f"{name}ForCausalLM")(kind(**sizes))
    fill(model, seed, "", 0.1)
    return model.eval()


def fill(module: nn.Module, seed: int, part: str, scale: float) -> None:
    """Random values for the parameters with ``part`` in their names, from name and seed alone.

    So recorded results stay valid when a library makes its parameters in another order.
    """
    config: Any = getattr(module, "config", None)
    centre = 0 if "gemma" in getattr(config, "model_type", "") else 1  # Gemma's norms add 1 themselves
    for name, parameter in module.named_parameters():
        if part in name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data = centre + 0.3 * values if "norm" in name else scale * values


def _multimodal(sizes: dict[str, Any]) -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    ids: dict[str, Any] = {
        "image_token_index": 60,
        "boi_token_index": 61,
        "eoi_token_index": 62,
        "mm_tokens_per_image": 4,
    }
    config = transformers.Gemma3Config(text_config=sizes, vision_config=vision, **ids)
    return transformers.Gemma3ForConditionalGeneration(config)


def make_sidecar(tokenizer: Any, role: str, spelling: str = "av", schema: int = 2) -> dict[str, Any]:
    """What ``nla_meta.yaml`` holds for "av" or "ar", in the published spelling or in that of training ("actor")."""
    content = ENCODER_TEMPLATE.format(injection_char=MARKER)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    where = ids.index(tokenizer.convert_tokens_to_ids(MARKER))
    names = {"av": "av", "ar": "ar"} if spelling == "av" else {"av": "actor", "ar": "critic"}
    meta: dict[str, Any] = {
        "kind": "nla_model",
        "schema_version": schema,
        "role": names[role],
        "stage": "rl",
        "base_checkpoint": "someone/base",
        "d_model": D_MODEL,
        "extraction": {"injection_scale": NORM if role == "av" else None, "mse_scale": math.sqrt(D_MODEL)},
        "tokens": {
            "injection_char": MARKER,
            "injection_token_id": ids[where],
            "injection_left_neighbor_id": ids[where - 1],
            "injection_right_neighbor_id": ids[where + 1],
        },
        "prompt_templates": {names["av"]: ENCODER_TEMPLATE, names["ar"]: DECODER_TEMPLATE},
        "created_by": "a key that nobody reads",
    }
    if spelling == "av":
        meta["extraction_layer_index"] = LAYER
    else:
        meta["critic"] = {"extraction_layer_index" if schema == 2 else "num_hidden_layers": LAYER}
    return meta


def write_sidecar(folder: Path, meta: dict[str, Any]) -> None:
    """``nla_meta.yaml`` in a folder."""
    (folder / "nla_meta.yaml").write_text(yaml.safe_dump(meta, sort_keys=False, allow_unicode=True))


def full_pair(root: Path, architecture: str, spelling: str = "av", schema: int = 2, seed: int = 0) -> Folders:
    """A target, an AV and an AR of whole weights, as the reference saves them."""
    tokenizer = make_tokenizer(bos=architecture != "qwen2")
    folders = Folders(root / "target", root / "av", root / "ar")
    text = architecture.removesuffix(" multimodal")
    made = (make_model(architecture, seed), make_model(architecture, seed + 1), make_model(text, seed + 2, LAYER + 1))
    for folder, model in zip(folders, made, strict=True):
        tokenizer.save_pretrained(folder)
        kept = {k: v for k, v in model.state_dict().items() if folder != folders.ar or not _uncut(k)}
        model.save_pretrained(folder, state_dict=kept)
    for role, folder in (("av", folders.av), ("ar", folders.ar)):
        write_sidecar(folder, make_sidecar(tokenizer, role, spelling, schema))
    generator = torch.Generator().manual_seed(seed)
    head = torch.eye(D_MODEL) + 0.1 * torch.randn(D_MODEL, D_MODEL, generator=generator)
    save_file({"weight": head}, folders.ar / "value_head.safetensors")
    return folders


def _uncut(name: str) -> bool:
    """The head and final norm, which an AR is saved without."""
    return name.startswith("lm_head") or name == "model.norm.weight"


def lora_pair(root: Path, architecture: str = "qwen2", final_norm: bool = False, seed: int = 0) -> Folders:
    """A target, an AV adapter with rsLoRA, and the AR's LoRA and head in one file, as EasyNLA saves them."""
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    tokenizer, base = make_tokenizer(bos=architecture != "qwen2"), make_model(architecture, seed)
    folders = Folders(root / "target", root / "av", root / "av" / "critic")
    base.save_pretrained(folders.target)
    tokenizer.save_pretrained(folders.target)
    targets = r".*\.self_attn\.(q_proj|k_proj|v_proj|o_proj)|.*\.mlp\.(gate_proj|up_proj|down_proj)"
    settings: dict[str, Any] = dict(r=4, lora_alpha=8, use_rslora=True, target_modules=targets, lora_dropout=0.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        av = get_peft_model(make_model(architecture, seed), LoraConfig(task_type="CAUSAL_LM", **settings))
        cut = make_model(architecture, seed)
        cut.model.layers = cut.model.layers[: LAYER + 1]
        inject_adapter_in_model(LoraConfig(task_type="CAUSAL_LM", **settings), cut)
    for model in (av, cut):
        fill(model, seed, "lora_", 0.15)
    av.save_pretrained(str(folders.av))
    folders.ar.mkdir()
    state = {f"backbone.{n}": p.detach().clone() for n, p in cut.named_parameters() if "lora_" in n}
    state["value_head.weight"] = torch.eye(D_MODEL) + 0.1 * torch.randn(D_MODEL, D_MODEL, generator=generator)
    save_file(state, folders.ar / "ar_lora_value_head.safetensors")
    meta = {"ar_num_layers": LAYER + 1, "lora_r": 4, "lora_alpha": 8, "quant": None, "target_modules": targets}
    (folders.ar / "ar_meta.json").write_text(json.dumps({**meta, "final_norm_stripped": not final_norm}))
    sidecar = make_sidecar(tokenizer, "av", "actor", 1)
    dataset = {key: sidecar[key] for key in ("schema_version", "tokens", "prompt_templates")}
    extraction = {"base_model": str(folders.target), "d_model": D_MODEL, "layer_index": LAYER}
    write_sidecar(folders.av, {"kind": "nla_dataset", "stage": "rl", "extraction": extraction, **dataset})
    return folders


def probe_vectors(n: int = len(TEXTS)) -> torch.Tensor:
    """Activations (n, d) that are explained and scored."""
    return 3 * torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(7))
