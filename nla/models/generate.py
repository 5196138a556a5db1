"""How a causal LM continues prompts: from its plain distribution, with one way of ending texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig


def ends_of(base: Any, tokenizer: Any) -> list[int]:
    """Token ids that end a text of a causal LM: the tokenizer's, and those in its generation settings."""
    named = base.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({token for token in (tokenizer.eos_token_id, *named) if token is not None})


def pad_of(tokenizer: Any) -> int:
    """Token id that fills rows up; masks tell it from text."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def plain_settings(ends: list[int], pad: int, max_new_tokens: int, temperature: float | None) -> GenerationConfig:
    """Sampling from the plain distribution, or greedy for None: a model's own top-p or penalties are overridden.

    What is left open here (a least probability, suppressed tokens, a static cache, …) transformers takes from the model
    unless it generates :func:`plainly`.
    """
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "typical_p": 1.0}
    return GenerationConfig(
        do_sample=temperature is not None,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_beams=1,
        use_cache=True,
        **({} if temperature is None else sampling),
    )


@contextlib.contextmanager
def plainly(base: Any) -> Iterator[None]:
    """While active, a causal LM (in PEFT's wrapper or not) has no generation settings; on exit its own are back.

    transformers fills every open field of the settings that a call gives from the model's, so that rollouts would not
    be of its plain distribution. Ask for :func:`ends_of` before: in here the model names no end tokens.
    """
    base = base.get_base_model() if hasattr(base, "get_base_model") else base  # PEFT's wrapper shows the base's
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed the global random state for a while and put it back."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
