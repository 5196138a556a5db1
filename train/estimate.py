"""What a recipe will take before it runs: tokens, steps, memory and time of each stage, from stated arithmetic.

With P parameters that a token passes, a forward pass takes 2P operations a token; a backward pass through frozen
weights, which adapters need, another 2P; computing activations again, another 2P. Sampling reads all weights for every
token of an answer, and takes the time that transformers' ``generate`` takes. Every process has a copy of the target, so
several divide operations and rows, and neither weights nor their reading. Nothing here is measured by us: it says
whether a run takes an hour or a week, and whether it fits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from nla.errors import TargetError
from nla.models.points import Point
from nla.organisms import target_folder
from nla.text.prompts import load_prompts
from nla.train.data.requests import draw_requests
from nla.train.describe.describer import CHARS_PER_TOKEN
from nla.train.recipe import N_WATCHED, Recipe, ShapeSettings

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
QUANTIZED_BYTES = {"8bit": 1.1, "4bit": 0.6}
"""A parameter of a block with its scales; embeddings and head stay as they are."""
TRAINED_BYTES = 16
"""A trained parameter in float32, its gradient, and AdamW's two moments."""
SHARED_BYTES = 4
"""Of several processes, a trained parameter's place in the buckets or the flat copy in which gradients are summed."""
RESERVED_GB = 2.0
"""The device's own context, work space of its libraries, and memory lost between tensors."""
BLOCK_S, ROW_S = 9e-4, 5.5e-5
"""Seconds that transformers' ``generate`` takes for a token in a block: at least the first, to start its kernels, and
the second for each row. ROW_S is a fit to one published row: Qwen3-8B with LoRA on one H200, 256 rollouts, 93 to 95 s a
step. Neither its batches nor its length are known (150 tokens are supposed); another's step takes a third of that."""
PREFILL_COPIES = 3
"""Of a block's widest activation, that are alive at once."""
PROMPT_TOKENS, CLAIM_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 90, 60, 250, 80
"""Tokens of an encoder prompt, an explanation, a describer's instructions and its answer: what is usual."""
REQUEST_TOKENS = 60
"""Of what a target is asked for its own corpus, with the system message."""
DOCUMENT_TOKENS = 600
"""A document of a usual web corpus; a position in it has half of them before it."""
READ_TOKENS = 16_384
"""Of a batch of extraction."""


class Shape(NamedTuple):
    """What the arithmetic needs of a target."""

    n_blocks: int
    d_model: int
    vocabulary: int
    d_kv: int
    """Keys and values that a block keeps of a token."""
    widest: int
    """Elements of a token's widest activation in a block."""
    block: int
    """Parameters of a block."""
    embeddings: int
    """Parameters outside the blocks."""
    lora: int
    """Inputs and outputs of a block's linear layers: times the rank, an adapter's parameters."""
    source: str = "stated"
    """"stated" in the recipe, or "counted" on the target itself."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.n_blocks * self.block + self.embeddings


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
        widest=max(map(max, linears)),
        block=sum(a * b for a, b in linears),
        embeddings=s.vocabulary * s.d_model * (1 if s.tied else 2),
        lora=sum(a + b for a, b in linears),
    )


def usual_shape(parameters: float) -> Shape:
    """A dense model's of which only the size is known: 12 d² parameters a block, and d = 128 times the blocks."""
    n_blocks = max(1, round((parameters / (12 * 128**2)) ** (1 / 3)))
    d_model = 128 * n_blocks
    return Shape(n_blocks, d_model, 0, d_model // 2, 4 * d_model, round(parameters / n_blocks), 0, 0)


def find_shape(recipe: Recipe) -> Shape:
    """The shape of a recipe's target: counted, or as the recipe states it where the target cannot be reached.

    Raises:
        TargetError: there is no such target, or it cannot be reached and the recipe states no shape.
        AccessError: it is gated or private, and no token opens it.
        ArchitectureError: a type of model whose blocks are not known.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return count_shape(target_folder(recipe.target), recipe.revision)
    except TargetError as error:
        # Neither here nor a network to ask: any other error would meet the run, too.
        if recipe.shape is None or not isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
        return shape_of(recipe.shape)


def count_shape(source: str, revision: str | None) -> Shape:
    """The shape of a target, counted on a model without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from nla.models.checkpoint import read_config
    from nla.models.points import blocks, linear_names

    config = read_config(source, revision)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    first, names = blocks(model)[0], set(linear_names(model))
    block = sum(p.numel() for p in first.parameters())
    linears: list[Any] = [module for name, module in first.named_modules() if name.rsplit(".", 1)[-1] in names]
    n_heads = getattr(config, "num_attention_heads", None) or 0  # a recurrent model has none
    kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(n_heads, 1)
    n_blocks = len(blocks(model))
    return Shape(
        n_blocks=n_blocks,
        d_model=config.hidden_size,
        vocabulary=config.vocab_size,
        d_kv=2 * kv_heads * head_dim,
        widest=max([config.hidden_size, *(max(module.weight.shape) for module in linears)]),
        block=block,
        embeddings=sum(p.numel() for p in model.parameters()) - n_blocks * block,
        lora=sum(sum(module.weight.shape) for module in linears),
        source="counted",
    )


class Device(NamedTuple):
    """Rates of one device, as they are reached, and how many there are."""

    flops: float
    bytes: float
    n: int

    def seconds(self, operations: float, read: float = 0.0) -> float:
        """Time for operations that all devices share, and bytes that each of them reads by itself."""
        return operations / (self.flops * self.n) + read / self.bytes


class Weights(NamedTuple):
    """A model's weights as they lie in memory."""

    block: float
    """Bytes of a parameter of a block."""
    rest: float
    """Bytes of a parameter outside the blocks, of an activation, and of a key or a value."""

    def of(self, blocks: float, others: float) -> float:
        """Bytes of so many parameters."""
        return blocks * self.block + others * self.rest

    def read(self, shape: Shape) -> float:
        """Bytes that a pass over the whole model moves: what is quantised is unpacked, written and read again."""
        unpacked = 2 * self.rest if self.block != self.rest else 0.0
        return self.of(shape.n_blocks * shape.block, shape.embeddings) + unpacked * shape.n_blocks * shape.block


def weights_as(dtype: str, quantization: str | None) -> Weights:
    """Weights in a type, or quantised."""
    return Weights(QUANTIZED_BYTES[quantization] if quantization else BYTES[dtype], BYTES[dtype])


def estimate(recipe: Recipe, shape: Shape) -> dict[str, dict[str, Any]]:
    """For each stage: ``tokens``, ``steps``, ``memory_gb`` of one device, ``hours``, whether it ``fits``, and of which
    ``shape`` this is: "counted" on the target, or as the recipe "stated" it.

    None where it is not known: a corpus without ``n_documents``, or a describer that is another model without
    ``parameters_b``; ``not_known`` then names what is missing.
    """
    h = recipe.hardware
    reached = Device(h.tflops * 1e12 * h.utilisation, h.bandwidth_gbs * 1e9 * h.utilisation, h.devices)
    below = shape.block * (Point.parse(recipe.point).layer + 1)
    stages = {
        **({"sample": _sample(recipe, shape, reached)} if recipe.writes_corpus else {}),
        "extract": _extract(recipe, shape, reached, below),
        "describe": _describe(recipe, shape, reached),
        "warmstart": _warmstart(recipe, shape, reached, below),
        "joint": _joint(recipe, shape, reached, below),
    }
    for figures in stages.values():
        figures["shape"] = shape.source
        if figures["hours"] is not None:
            figures["hours"] = float(f"{figures['hours']:.3g}")
        if figures["memory_gb"] is not None:
            figures["memory_gb"] = round(figures["memory_gb"], 1)
            figures["fits"] = figures["memory_gb"] <= h.memory_gb
    return stages


def _memory_gb(*parts: float) -> float:
    """GB of so many bytes, and what is reserved."""
    return sum(parts) / 1e9 + RESERVED_GB


def _sample(recipe: Recipe, shape: Shape, device: Device) -> dict[str, Any]:
    s, corpus = recipe.sample, recipe.corpus
    assert corpus is not None and corpus.n_documents is not None
    weights = weights_as(recipe.dtype, recipe.quantization)
    prompts = load_prompts(corpus.prompts)
    n = len(draw_requests(prompts, corpus.n_documents, recipe.seed, corpus.eval_share, corpus.split_key))
    batches = math.ceil(n / device.n / s.batch_size)
    memory = _memory_gb(
        weights.of(shape.n_blocks * shape.block, shape.embeddings),
        _cache(shape, weights, s.batch_size, REQUEST_TOKENS + s.max_new_tokens),
    )
    seconds = batches * _sampling(shape, weights, device, s.batch_size, REQUEST_TOKENS, s.max_new_tokens)
    return {"tokens": n * s.max_new_tokens, "answers": n, "hours": seconds / 3600, "memory_gb": memory}


def _extract(recipe: Recipe, shape: Shape, device: Device, below: int) -> dict[str, Any]:
    corpus = recipe.corpus
    assert corpus is not None
    weights = weights_as(recipe.dtype, recipe.quantization)
    inside = (PREFILL_COPIES * shape.widest + 4 * shape.d_model) * weights.rest
    memory = _memory_gb(weights.of(below, shape.vocabulary * shape.d_model), READ_TOKENS * inside)
    if corpus.n_documents is None or corpus.mix:
        unknown = "how many documents corpus.mix has" if corpus.mix else "corpus.n_documents"
        return {"tokens": None, "hours": None, "memory_gb": memory, "not_known": unknown}
    tokens = corpus.n_documents * min(corpus.max_tokens, DOCUMENT_TOKENS)
    rows = corpus.n_documents * corpus.n_positions if corpus.positions in ("random", "kinds") else None
    disk = None if rows is None else round(rows * shape.d_model * BYTES[recipe.dtype] / 1e9, 2)
    return {
        "tokens": tokens,
        "disk_gb": disk,
        "hours": device.seconds(2 * below * tokens) / 3600,
        "memory_gb": memory,
    }


def _sampling(shape: Shape, weights: Weights, device: Device, rows: float, length: int, answer: int) -> float:
    """Seconds of one batch a device: prompts of ``length`` tokens, ``answer`` tokens written, and ``rows`` of them."""
    work = device.seconds(2 * shape.parameters * rows * device.n * (length + answer), answer * weights.read(shape))
    return max(work, answer * shape.n_blocks * max(BLOCK_S, rows * ROW_S))


def _cache(shape: Shape, weights: Weights, rows: float, tokens: float) -> float:
    """Bytes of keys and values, and of the logits that are sampled from, in float32 and a few copies."""
    return rows * (tokens * shape.d_kv * shape.n_blocks * weights.rest + 12 * shape.vocabulary)


def _describe(recipe: Recipe, shape: Shape, device: Device) -> dict[str, Any]:
    n, d, corpus = recipe.texts.n_train + N_WATCHED, recipe.describer, recipe.corpus
    assert corpus is not None
    if d.describer == "quote":
        return {"questions": 0, "hours": 0.0, "memory_gb": 0.0}
    if d.describer == "structured":
        return _extract(recipe, shape, device, shape.n_blocks * shape.block) | {"questions": 0, "disk_gb": 0.0}
    shown = min(d.max_chars // CHARS_PER_TOKEN, corpus.max_tokens)
    length = QUESTION_TOKENS + min(shown, DOCUMENT_TOKENS // 2)
    asked: dict[str, Any] = {"questions": n, "tokens": n * (length + ANSWER_TOKENS)}
    asked["usd"] = d.cost(n * length, n * ANSWER_TOKENS)
    if d.describer != "local":
        return asked | {"hours": n / d.concurrency * 3 / 3600, "memory_gb": 0.0}
    weights = weights_as(recipe.dtype, recipe.quantization)
    if d.model is not None:
        if d.parameters_b is None:
            return asked | {"hours": None, "memory_gb": None, "not_known": "describer.parameters_b"}
        shape, weights = usual_shape(d.parameters_b * 1e9), weights_as(d.dtype or recipe.dtype, d.quantization)
    batches = math.ceil(n / device.n / d.concurrency)
    hours = batches * _sampling(shape, weights, device, d.concurrency, length, ANSWER_TOKENS) / 3600
    longest = QUESTION_TOKENS + shown  # batches are of similar length, so one of them has nothing but the longest
    memory = _memory_gb(
        weights.of(shape.n_blocks * shape.block, shape.embeddings),
        _cache(shape, weights, d.concurrency, longest + ANSWER_TOKENS),
        d.concurrency * longest * PREFILL_COPIES * shape.widest * weights.rest,
    )
    return asked | {"hours": hours, "memory_gb": memory}


def _held(recipe: Recipe, shape: Shape) -> float:
    """Bytes that training holds throughout: weights, both adapters and the head with all that AdamW needs of them."""
    weights = weights_as(recipe.dtype, recipe.quantization).of(shape.n_blocks * shape.block, shape.embeddings)
    cut = Point.parse(recipe.point).layer + 1
    trained = recipe.pair.rank * shape.lora * (shape.n_blocks + cut) + shape.d_model**2
    return weights + (TRAINED_BYTES + (SHARED_BYTES if recipe.hardware.devices > 1 else 0)) * trained


def _backward(recipe: Recipe, shape: Shape, rows: float, tokens: int, scored: int, checkpointed: bool) -> float:
    """Bytes that a backward pass of the encoder keeps: of a block's activations all, or its input and one block's all;
    adapters keep the inputs of linear layers in float32; and the logits of ``scored`` tokens, twice in float32.
    """
    size = BYTES[recipe.dtype]
    whole = size * (10 * shape.d_model + 4 * shape.widest) + 4 * (6 * shape.d_model + shape.widest)
    kept = whole + shape.n_blocks * size * shape.d_model if checkpointed else shape.n_blocks * whole
    return rows * (tokens * kept + scored * shape.vocabulary * 8)


def _warmstart(recipe: Recipe, shape: Shape, device: Device, below: int) -> dict[str, Any]:
    w, weights = recipe.warmstart, weights_as(recipe.dtype, recipe.quantization)
    passes = 6 if w.gradient_checkpointing else 4
    said, read = PROMPT_TOKENS + CLAIM_TOKENS, CLAIM_TOKENS + 15
    encoder, decoder = w.encoder_steps * w.batch_size * said, w.decoder_steps * w.batch_size * read
    rows = w.rows_per_backward or w.batch_size / device.n
    steps = w.encoder_steps + w.decoder_steps
    moved = steps * w.batch_size / device.n / rows * passes / 2 * weights.read(shape)
    watched = steps / w.eval_every * N_WATCHED * said * device.n  # by every process
    work = passes * (shape.parameters * encoder + below * decoder) + 2 * shape.parameters * watched
    memory = _held(recipe, shape), _backward(recipe, shape, rows, said, said, w.gradient_checkpointing)
    hours = device.seconds(work, moved) / 3600
    return {"tokens": encoder + decoder, "steps": steps, "hours": hours, "memory_gb": _memory_gb(*memory)}


def _joint(recipe: Recipe, shape: Shape, device: Device, below: int) -> dict[str, Any]:
    j, longest, weights = recipe.joint, recipe.pair.max_new_tokens, weights_as(recipe.dtype, recipe.quantization)
    passes = (6 if j.gradient_checkpointing else 4) + (2 if j.beta else 0)
    rows_a_device = j.rows / device.n
    rows = j.rows_per_backward or rows_a_device
    read = round(j.rows * (1 + j.replay_fraction)) * (longest + 15)
    sampled = _sampling(shape, weights, device, rows_a_device, PROMPT_TOKENS, longest)
    work = passes * shape.parameters * j.rows * (PROMPT_TOKENS + longest) + 4 * below * read
    step = sampled + device.seconds(work, rows_a_device / rows * passes / 2 * weights.read(shape))
    # Watched and scored rows are divided to be sampled, in batches as of rollouts; all processes read all, a few times.
    watched, scored = (j.steps // j.eval_every + 1) * N_WATCHED, recipe.texts.n_scored
    seconds = j.steps * step + (watched + scored) / j.rows * sampled
    seconds += device.seconds(2 * below * 4 * (watched + scored) * (longest + 15) * device.n)
    backward = _backward(recipe, shape, rows, PROMPT_TOKENS + longest, longest, j.gradient_checkpointing)
    reference = 4 * recipe.pair.rank * shape.lora * shape.n_blocks if j.beta else 0
    most = max(backward, _cache(shape, weights, rows_a_device, PROMPT_TOKENS + longest))
    return {
        "tokens": j.steps * (j.rows * longest + read),
        "steps": j.steps,
        "rollouts": j.steps * j.rows,
        "seconds_a_step": round(step, 2),
        "hours": seconds / 3600,
        "memory_gb": _memory_gb(_held(recipe, shape), reference, most),
    }
