"""bfloat16 beside float32 on this machine: a forward pass and a LoRA step of SmolLM2, in one process.

    python benchmarks/dtype.py

It is the reason of the rule in ``nla.models.load.fastest_dtype``. Trained parameters are float32 either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model

from nla.models.load import load_target

ROWS, LENGTH, RANK, ROUNDS = 8, 128, 16, 5
DTYPES = ("float32", "bfloat16")


def steps_of(dtype: str) -> dict[str, Callable[[], None]]:
    """A forward pass and a training step, each of ``ROWS × LENGTH`` tokens."""
    model, _ = load_target("smollm2", dtype=dtype, device="cpu")
    tuned = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(10, 49_000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))

    def forward() -> None:
        with torch.inference_mode():
            tuned(input_ids=ids)

    def train() -> None:
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"forward": forward, "LoRA step": train}


def main() -> None:
    steps = {dtype: steps_of(dtype) for dtype in DTYPES}
    print(f"SmolLM2-135M, {ROWS} × {LENGTH} tokens, {torch.get_num_threads()} threads, best of {ROUNDS} rounds")
    for name in steps["float32"]:
        seconds: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
        for round_ in range(ROUNDS + 1):  # the first warms up; the types take turns, since a machine's speed drifts
            for dtype in DTYPES:
                started = time.perf_counter()
                steps[dtype][name]()
                if round_:
                    seconds[dtype].append(time.perf_counter() - started)
        best = {dtype: min(each) for dtype, each in seconds.items()}
        figures = "   ".join(f"{dtype} {ROWS * LENGTH / each:6.0f} tokens/s" for dtype, each in best.items())
        print(f"{name:10s} {figures}   ratio {best['float32'] / best['bfloat16']:.2f}")


if __name__ == "__main__":
    main()
