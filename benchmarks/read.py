"""Reading activations: nla.read beside the usual way, in one run on the same texts.

The usual way is a full forward pass with ``output_hidden_states=True`` in corpus order, padded, of which one layer is
kept. The target is a random Qwen2 shape with 12 blocks, read at two thirds of its depth; texts differ widely in length.

    python benchmarks/read.py
"""

from __future__ import annotations

import random
import statistics
import time

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from nla.models.read import read
from nla.organisms.couplets import tokenizer as couplets_tokenizer
from nla.organisms.couplets import world

POINT, BLOCK, BATCH_SIZE, CONTEXT, N_TEXTS, ROUNDS = "resid_post.7", 7, 16, 512, 64, 3


def make_target(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Random weights in the shape of a small Qwen2, with a vocabulary of usual size."""
    config = Qwen2Config(
        vocab_size=32_000,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).eval()


def make_texts(seed: int = 0) -> list[str]:
    """Runs of 1 to 15 short poems, most of them short."""
    rng = random.Random(seed)
    lengths = [min(15, 1 + int(rng.expovariate(1 / 4))) for _ in range(N_TEXTS)]
    return ["".join(couplet.text for couplet in world.sample(n, seed + number)) for number, n in enumerate(lengths)]


@torch.inference_mode()
def usual_way(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Activations (n, d) of every token of every text."""
    rows = []
    for start in range(0, len(texts), BATCH_SIZE):
        batch = tokenizer(texts[start : start + BATCH_SIZE], return_tensors="pt", padding=True)
        out = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}, output_hidden_states=True)
        rows.append(out.hidden_states[BLOCK + 1][batch["attention_mask"].bool()])
    return torch.cat(rows)


def main() -> None:
    tokenizer = couplets_tokenizer.build()
    tokenizer.padding_side = "right"
    model, texts = make_target(tokenizer), make_texts()
    ways = {
        "usual way": lambda: usual_way(model, tokenizer, texts),
        "nla.read": lambda: read(model, tokenizer, texts, POINT, max_tokens_per_batch=BATCH_SIZE * CONTEXT).vectors,
    }
    found = {name: way() for name, way in ways.items()}  # the first round warms up, and is compared
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    n_tokens, middle = len(found["nla.read"]), {name: statistics.median(each) for name, each in seconds.items()}
    print(f"{N_TEXTS} texts, {n_tokens} tokens, {torch.get_num_threads()} threads, median of {ROUNDS} rounds")
    for name, each in middle.items():
        print(f"{name:10s} {n_tokens / each:8.0f} tokens/s")
    print(f"ratio      {middle['usual way'] / middle['nla.read']:8.2f}")
    print(f"largest difference of an activation: {(found['usual way'] - found['nla.read']).abs().max():.1e}")


if __name__ == "__main__":
    main()
