"""The shipped pair of the real model: small on disk, and what it says follows the activation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nla import NLA
from nla.organisms import smollm2 as organism
from nla.storage.tensors import load_tensors
from nla.text.facts import stated

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "England": "London"}


@pytest.fixture(scope="module")
def pair(smollm2: str) -> NLA:
    return NLA.from_pretrained(smollm2, device="cpu")


def test_it_is_small_and_its_adapters_are_rounded() -> None:
    files = [path for path in Path(organism.PAIR).rglob("*") if path.is_file()]
    assert all(path.stat().st_size < 16 << 20 for path in files)
    assert sum(path.stat().st_size for path in files) < 30e6
    for part in ("encoder", "decoder"):
        weights = load_tensors(organism.PAIR / part / "adapter_model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_it_names_what_the_target_holds_next_and_rebuilds_the_activation_from_that(pair: NLA) -> None:
    acts = pair.read([f"The capital of {country} is" for country in CAPITALS], positions="last")
    texts = [samples[0] for samples in pair.explain(acts, samples=1, greedy=True).texts]
    named = [city in stated(text).following for city, text in zip(CAPITALS.values(), texts, strict=True)]
    assert sum(named) >= 3, texts
    rebuilt = torch.nn.functional.normalize(pair.reconstruct(texts), dim=1)
    vectors = torch.nn.functional.normalize(acts.vectors, dim=1)
    assert ((rebuilt @ vectors.T).argmax(dim=1) == torch.arange(len(texts))).sum() >= 3
    assert (rebuilt * vectors).sum(dim=1).min() > 0.8
