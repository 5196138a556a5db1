"""Targets on disk, and what they give."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.helpers.tiny import make_model, make_tokenizer

IDS = torch.tensor([[11, 33, 37, 40, 12, 20, 21]])


POINT = "resid_post.1"


def saved(folder: Path, architecture: str = "llama", shard: str = "20KB") -> Path:
    make_model(architecture).save_pretrained(folder, max_shard_size=shard)
    make_tokenizer().save_pretrained(folder)
    return folder


INDEX = "model.safetensors.index.json"


def files_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def activations_of(model, layer: int = 1) -> torch.Tensor:
    return model(IDS, output_hidden_states=True).hidden_states[layer + 1]
