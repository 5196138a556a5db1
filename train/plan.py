"""What a recipe will take before it runs: tokens, steps, memory and time of each stage, from stated arithmetic.

With P parameters that a token passes, a forward pass takes 2P operations a token; a backward pass through frozen
weights, which adapters need, another 2P; computing activations again, another 2P. Sampling reads all weights for every
token of an answer. Nothing here is measured: it says whether a run takes an hour or a week, and whether it fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nla.errors import ArchitectureError, TargetError
from nla.formats.native import read_json
from nla.points import Point

from .settings import require_least, require_positive

if TYPE_CHECKING:
    from .recipe import Recipe

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
QUANTIZED_BYTES = {"8bit": 1.1, "4bit": 0.6}
"""A parameter with its scales."""
TRAINED_BYTES = 16
"""A trained parameter in float32, its gradient, and AdamW's two moments."""
SAVED_BYTES = 34
"""What the backward pass keeps of a block, for a token and each element of its stream."""
PROMPT_TOKENS, CLAIM_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 90, 60, 250, 80
"""Tokens of an encoder prompt, an explanation, a describer's instructions and its answer: what is usual."""
CHARS_PER_TOKEN = 4
DOCUMENT_TOKENS = 600
"""A document of a usual web corpus."""


@dataclass(frozen=True)
class HardwareSettings:
    """What a plan reckons with: one device, and how many there are."""

    name: str = "unnamed"
    devices: int = 1
    tflops: float = 100.0
    """Operations a device can do, in 10¹² a second, dense, in the target's type."""
    memory_gb: float = 80.0
    bandwidth_gbs: float = 2000.0
    """Of its memory, GB a second."""
    utilisation: float = 0.35
    """Share of both that is reached."""

    def __post_init__(self) -> None:
        require_least("hardware", self, devices=1)
        require_positive("hardware", self, "tflops", "memory_gb", "bandwidth_gbs", "utilisation")


@dataclass(frozen=True)
class ShapeSettings:
    """A target's sizes, for a plan before it has been downloaded."""

    n_blocks: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    """Whether embeddings and head are one matrix."""

    def __post_init__(self) -> None:
        sizes = ("n_blocks", "d_model", "d_mlp", "n_heads", "n_kv_heads", "head_dim", "vocabulary")
        require_least("shape", self, **dict.fromkeys(sizes, 1))


class Shape(NamedTuple):
    """What the arithmetic needs of a target."""

    n_blocks: int
    d_model: int
    vocabulary: int
    d_kv: int
    """Keys and values that a block keeps of a token."""
    block: int
    """Parameters of a block."""
    embeddings: int
    """Parameters outside the blocks."""
    lora: int
    """Inputs and outputs of a block's linear layers: times the rank, an adapter's parameters."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.n_blocks * self.block + self.embeddings

    @property
    def head(self) -> int:
        """The language-model head, which every sampled token passes."""
        return self.vocabulary * self.d_model


def shape_of(settings: ShapeSettings) -> Shape:
    """The shape that a recipe states."""
    s = settings
    heads, kv = s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim
    linears = [(s.d_model, heads), (s.d_model, kv), (s.d_model, kv), (heads, s.d_model)]
    linears += [(s.d_model, s.d_mlp), (s.d_model, s.d_mlp), (s.d_mlp, s.d_model)]
    return Shape(
        n_blocks=s.n_blocks,
        d_model=s.d_model,
        vocabulary=s.vocabulary,
        d_kv=2 * kv,
        block=sum(a * b for a, b in linears),
        embeddings=s.vocabulary * s.d_model * (1 if s.tied else 2),
        lora=sum(a + b for a, b in linears),
    )


def find_shape(recipe: Recipe) -> Shape:
    """The shape of a recipe's target: counted where its configuration can be read, otherwise as the recipe states it.

    Raises:
        TargetError, AccessError: it cannot be read, and the recipe states none.
    """
    from .stages import target_folder

    try:
        return count_shape(target_folder(recipe.target), recipe.revision)
    except (TargetError, ArchitectureError):
        if recipe.shape is None:
            raise
        return shape_of(recipe.shape)


def count_shape(source: str, revision: str | None) -> Shape:
    """The shape of a target, counted on a model without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from nla.points import blocks, layout, linear_names
    from nla.target import fetch_file

    path = fetch_file(source, revision, "config.json")
    if path is None:
        raise TargetError(f"{source} without config.json", "a model in the form of transformers", "name another target")
    layout(str(read_json(path).get("model_type")))
    config = AutoConfig.from_pretrained(path.parent).get_text_config()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    first, names = blocks(model)[0], set(linear_names(model))
    block = sum(p.numel() for p in first.parameters())
    linears: list[Any] = [module for name, module in first.named_modules() if name.rsplit(".", 1)[-1] in names]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_blocks = len(blocks(model))
    return Shape(
        n_blocks=n_blocks,
        d_model=config.hidden_size,
        vocabulary=config.vocab_size,
        d_kv=2 * heads * head_dim,
        block=block,
        embeddings=sum(p.numel() for p in model.parameters()) - n_blocks * block,
        lora=sum(sum(module.weight.shape) for module in linears),
    )


class Device(NamedTuple):
    """Rates of all devices together, as they are reached."""

    flops: float
    bytes: float

    def hours(self, operations: float, read: float = 0.0) -> float:
        """Time for so many operations, and bytes read one after the other."""
        return (operations / self.flops + read / self.bytes) / 3600


def plan(recipe: Recipe, shape: Shape) -> dict[str, dict[str, Any]]:
    """For each stage: ``tokens``, ``steps``, ``memory_gb`` of one device, ``hours``, and whether it ``fits``.

    None where it is not known: a corpus without ``n_documents``, a describer that is another model.
    """
    h = recipe.hardware
    reached = Device(h.tflops * 1e12 * h.utilisation * h.devices, h.bandwidth_gbs * 1e9 * h.utilisation)
    below = shape.block * (Point.parse(recipe.point).layer + 1)
    stages = {
        "extract": _extract(recipe, shape, reached, below),
        "describe": _describe(recipe, shape, reached),
        "warmstart": _warmstart(recipe, shape, reached, below),
        "joint": _joint(recipe, shape, reached, below),
    }
    for figures in stages.values():
        if figures["hours"] is not None:
            figures["hours"] = float(f"{figures['hours']:.3g}")
        if figures["memory_gb"] is not None:
            figures["memory_gb"] = round(figures["memory_gb"], 1)
            figures["fits"] = figures["memory_gb"] <= h.memory_gb
    return stages


def _weight_bytes(recipe: Recipe) -> float:
    return QUANTIZED_BYTES[recipe.quantization] if recipe.quantization else BYTES[recipe.dtype]


def _extract(recipe: Recipe, shape: Shape, device: Device, below: int) -> dict[str, Any]:
    corpus = recipe.corpus
    assert corpus is not None
    if corpus.n_documents is None:
        return {"tokens": None, "hours": None, "memory_gb": below * _weight_bytes(recipe) / 1e9}
    tokens = corpus.n_documents * min(corpus.max_tokens, DOCUMENT_TOKENS)
    weights = (below + shape.vocabulary * shape.d_model) * _weight_bytes(recipe)
    streams = 16_384 * shape.d_model * SAVED_BYTES
    rows = corpus.n_documents * corpus.n_positions if corpus.positions == "random" else None
    disk = None if rows is None else round(rows * shape.d_model * BYTES[recipe.dtype] / 1e9, 2)
    hours = device.hours(2 * below * tokens)
    return {"tokens": tokens, "disk_gb": disk, "hours": hours, "memory_gb": (weights + streams) / 1e9}


def _describe(recipe: Recipe, shape: Shape, device: Device) -> dict[str, Any]:
    n = recipe.texts.n_train
    if recipe.describer.describer == "quote":
        return {"questions": 0, "hours": 0.0, "memory_gb": 0.0}
    tokens_in, tokens_out = n * (QUESTION_TOKENS + recipe.describer.max_chars // CHARS_PER_TOKEN), n * ANSWER_TOKENS
    found: dict[str, Any] = {"questions": n, "tokens": tokens_in + tokens_out}
    found["usd"] = recipe.describer.cost(tokens_in, tokens_out)
    if recipe.describer.describer != "local":
        return found | {"hours": n / recipe.describer.concurrency * 3 / 3600, "memory_gb": 0.0}
    if recipe.describer.model is not None:
        return found | {"hours": None, "memory_gb": None}
    batches = n / recipe.describer.concurrency / recipe.hardware.devices
    weights = shape.parameters * _weight_bytes(recipe)
    cache = recipe.describer.concurrency * (tokens_in / n + ANSWER_TOKENS) * shape.d_kv * shape.n_blocks * 2
    hours = device.hours(2 * shape.parameters * (tokens_in + tokens_out), batches * ANSWER_TOKENS * weights)
    return found | {"hours": hours, "memory_gb": (weights + cache) / 1e9}


def _adapters(recipe: Recipe, shape: Shape) -> float:
    """Bytes of both adapters, their optimizers and the head."""
    cut = Point.parse(recipe.point).layer + 1
    lora = recipe.pair.rank * shape.lora * (shape.n_blocks + cut)
    return TRAINED_BYTES * (lora + shape.d_model**2)


def _backward_bytes(shape: Shape, rows: float, tokens: int, checkpointed: bool) -> float:
    """What a backward pass of the encoder keeps: streams of every block, and the answers' logits, twice in float32."""
    kept = shape.n_blocks * (2 if checkpointed else SAVED_BYTES) + (SAVED_BYTES if checkpointed else 0)
    return rows * (tokens * shape.d_model * kept + CLAIM_TOKENS * shape.vocabulary * 8)


def _warmstart(recipe: Recipe, shape: Shape, device: Device, below: int) -> dict[str, Any]:
    w = recipe.warmstart
    passes = 6 if w.gradient_checkpointing else 4
    encoder = w.encoder_steps * w.batch_size * (PROMPT_TOKENS + CLAIM_TOKENS)
    decoder = w.decoder_steps * w.batch_size * (CLAIM_TOKENS + 15)
    rows = w.rows_per_backward or w.batch_size / recipe.hardware.devices
    memory = shape.parameters * _weight_bytes(recipe) + _adapters(recipe, shape)
    memory += _backward_bytes(shape, rows, PROMPT_TOKENS + CLAIM_TOKENS, w.gradient_checkpointing)
    hours = device.hours(passes * (shape.parameters * encoder + below * decoder))
    steps = w.encoder_steps + w.decoder_steps
    return {"tokens": encoder + decoder, "steps": steps, "hours": hours, "memory_gb": memory / 1e9}


def _joint(recipe: Recipe, shape: Shape, device: Device, below: int) -> dict[str, Any]:
    j, longest = recipe.joint, recipe.pair.max_new_tokens
    passes = (6 if j.gradient_checkpointing else 4) + (2 if j.beta else 0)
    whole, written = j.rows * (PROMPT_TOKENS + longest), j.rows * longest
    read = round(j.rows * (1 + j.replay_fraction)) * (longest + 15)
    weights = shape.parameters * _weight_bytes(recipe)
    work = passes * shape.parameters * whole + 2 * shape.parameters * whole
    work += below * (4 * read)
    hours = j.steps * device.hours(work, longest * weights)
    rows = j.rows_per_backward or j.rows / recipe.hardware.devices
    backward = _backward_bytes(shape, rows, PROMPT_TOKENS + longest, j.gradient_checkpointing)
    cache = j.rows / recipe.hardware.devices * (PROMPT_TOKENS + longest) * shape.d_kv * shape.n_blocks * 2
    reference = 4 * recipe.pair.rank * shape.lora * shape.n_blocks if j.beta else 0
    memory = weights + _adapters(recipe, shape) + reference + max(backward, cache)
    return {
        "tokens": j.steps * (written + read),
        "steps": j.steps,
        "rollouts": j.steps * j.rows,
        "seconds_a_step": round(hours / j.steps * 3600, 2),
        "hours": hours,
        "memory_gb": memory / 1e9,
    }
