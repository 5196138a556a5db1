"""A model's configuration and tokenizer in; a ready recipe for a pair on it out: ``nla recipe MODEL``.

No weights are read. What cannot be known from these two, such as the corpus and the number of steps, is what the
shipped recipes take. A real model with a name has a shipped recipe of that name, which is its recipe.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nla.config import DTYPES
from nla.errors import ContextLengthError
from nla.models.checkpoint import read_config
from nla.models.points import NO_LIMIT
from nla.organisms import PACKAGED, target_folder
from nla.storage.files import read_yaml
from nla.text.tokens import load_tokenizer, render_prompt
from nla.train.estimate import count_shape, shape_of
from nla.train.fingerprints import target_print
from nla.train.pair_config import DECODER_TEMPLATE, ENCODER_PROMPT, SLOT, Prompts, place_marker
from nla.train.recipe import SHIPPED, Recipe, ShapeSettings
from nla.train.schema import build

DEPTH = 2 / 3
"""Of the blocks, the share that lies below the point: where published pairs read."""
N_DOCUMENTS, N_TEXTS, N_POSITIONS, N_EVAL = 50_000, 50_000, 8, 1000
MAX_TOKENS, ANSWER_TOKENS, LEAST_ANSWER = 1024, 150, 16
BATCH = 64
TRAINED = {"rows_per_backward": 32, "encoder_learning_rate": 1e-4, "decoder_learning_rate": 1e-4}


def recipe_for(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """A recipe for a model, as the mapping that its YAML holds.

    The point lies about two thirds up. The marker is one token of the tokenizer that stands once in the rendered
    prompt, with neighbours on both sides. ``shape`` is there where it says what the model's own blocks say.

    Args:
        model: an embedded name, a folder or a hub id.

    Raises:
        TargetError, AccessError, ArchitectureError: there is no such model, or its blocks are not known.
        RecipeError: a revision of an embedded name.
        ConfigError, TemplateError: no token can be the marker, or there is no chat template.
        ContextLengthError: the prompt leaves no room for an answer.
    """
    source = target_folder(model)
    if str(model) in PACKAGED:
        target_print(str(model), revision)
        return read_yaml(_shipped(model))
    config, tokenizer = read_config(source, revision), load_tokenizer(source, revision)
    marker, *_ = place_marker(tokenizer, Prompts(ENCODER_PROMPT, DECODER_TEMPLATE))
    context = int(getattr(config, "max_position_embeddings", None) or NO_LIMIT)
    max_tokens = min(MAX_TOKENS, context)
    content: dict[str, Any] = {
        "name": Path(str(model)).name.lower(),
        "target": str(model),
        "point": f"resid_post.{int(config.num_hidden_layers * DEPTH)}",
        "out": f"runs/{Path(str(model)).name.lower()}",
        "dtype": _dtype(config),
        "seed": 0,
        "corpus": {
            "source": "HuggingFaceFW/fineweb",
            "config": "sample-10BT",
            "streaming": True,
            "n_documents": N_DOCUMENTS,
            "max_tokens": max_tokens,
            "n_positions": N_POSITIONS,
            "first_position": min(50, max_tokens // 4),
            "n_eval": N_EVAL,
        },
        "describer": {"describer": "local", "concurrency": 16},
        "texts": {"n_train": N_TEXTS},
        "pair": {
            "rank": 64,
            "max_new_tokens": _answer_tokens(tokenizer, marker, context),
            "marker": marker,
        },
        "warmstart": {
            "encoder_steps": N_TEXTS // BATCH,
            "decoder_steps": N_TEXTS // BATCH,
            "batch_size": BATCH,
            **TRAINED,
            "head_learning_rate": 1e-4,
            "gradient_checkpointing": True,
        },
        "joint": {
            "steps": 1000,
            "prompts_per_step": 32,
            "group_size": 8,
            "rows_per_backward": 32,
            "encoder_learning_rate": 2e-5,
            "decoder_learning_rate": 5e-5,
            "beta": 0.02,
            "replay_fraction": 0.5,
            "gradient_checkpointing": True,
            "eval_every": 50,
            "save_every": 50,
        },
        "hardware": {"name": "H100 80GB", "tflops": 990, "memory_gb": 80, "bandwidth_gbs": 3350},
    }
    if revision is not None:
        content["revision"] = revision
    shape = _shape(source, revision, config)
    if shape is not None:
        content["shape"] = asdict(shape)
    build(Recipe, content, "the recipe")
    return content


def as_yaml(content: dict[str, Any]) -> str:
    """A recipe as the text of its file, with comments on top and a blank line before each section; a shipped one as it
    is."""
    if content["target"] in PACKAGED:
        return _shipped(content["target"]).read_text(encoding="utf-8")
    lines = [
        f"# {content['target']}: a recipe that `nla recipe` wrote. It fits the model; nobody has run it yet.",
        "# `nla train FILE --dry-run` says what it will take on the hardware below; then the same without --dry-run.",
        "# The describer writes the warm-start texts: the target itself here. A larger model writes better ones.",
    ]
    for key, value in content.items():
        lines += [""] if isinstance(value, dict) else []
        lines.append(yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=1000).rstrip("\n"))
    return "\n".join(lines) + "\n"


def _shipped(name: str | Path) -> Path:
    return SHIPPED / f"{name}.yaml"


def _dtype(config: PretrainedConfig) -> str:
    """The type of the checkpoint's weights; float32 where the configuration does not say it."""
    name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _answer_tokens(tokenizer: PreTrainedTokenizerBase, marker: str, context: int) -> int:
    """The longest answer that the context has room for after the encoder's prompt, up to the usual one."""
    prompt = len(render_prompt(tokenizer, ENCODER_PROMPT.replace(SLOT, marker)))
    if context - prompt < LEAST_ANSWER:
        raise ContextLengthError(
            f"a context of {context} tokens, of which the encoder's prompt takes {prompt}",
            f"room for an answer of {LEAST_ANSWER} tokens",
            "take a model with a longer context, or write a recipe with a shorter pair.encoder_prompt",
        )
    return min(ANSWER_TOKENS, context - prompt)


def _shape(source: str, revision: str | None, config: PretrainedConfig) -> ShapeSettings | None:
    """The model's sizes, for plans where it cannot be reached; None for one that these sizes do not describe."""
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "intermediate_size", None)
    if not heads or not width:
        return None
    shape = ShapeSettings(
        n_blocks=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_mlp=width,
        n_heads=heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
    )
    counted = count_shape(source, revision).parameters
    return shape if abs(shape_of(shape).parameters - counted) <= 0.03 * counted else None
