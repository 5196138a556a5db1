"""Fingerprints: of a tokenizer, part by part, and of JSON-like content."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from nla.storage.hashes import digest


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A fingerprint of all that decides a tokenizer's ids: "vocabulary:… special-tokens:… chat-template:… pipeline:…".

    Four hashes, so that a mismatch can say which part differs. Padding and truncation are left out: calls change them.

    Args:
        tokenizer: a transformers tokenizer; its pipeline (normaliser, pre-tokeniser, merges, post-processor) counts
            where it has a tokenizers backend, its class name otherwise.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pipeline: dict[str, Any] = {"class": type(tokenizer).__name__} if backend is None else json.loads(backend.to_str())
    for state in ("padding", "truncation", "added_tokens"):
        pipeline.pop(state, None)
    model = pipeline.get("model")
    if isinstance(model, dict):
        model.pop("vocab", None)  # hashed with the added tokens, as the vocabulary
    added = [
        (index, token.content, token.lstrip, token.rstrip, token.single_word, token.normalized)
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
    ]
    parts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special-tokens": [sorted(tokenizer.special_tokens_map.items()), added],
        "chat-template": tokenizer.chat_template,
        "pipeline": pipeline,
    }
    return " ".join(f"{name}:{digest(part)[:16]}" for name, part in parts.items())


def hash_parts(fingerprint: str) -> dict[str, str]:
    """The parts of a fingerprint by name."""
    return dict(part.split(":", 1) for part in fingerprint.split() if ":" in part)
