"""What every forward pass needs: padding, the device, and evaluation mode without gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def pad_left(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one tensor (b, longest), filled up on the left, and the padding (b,) of each."""
    longest = max(map(len, rows))
    padding = torch.tensor([longest - len(row) for row in rows])
    return torch.tensor([[*[value] * (longest - len(row)), *row] for row in rows]), padding


def pad_right(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """Rows of token ids as one tensor (b, longest), filled up on the right."""
    longest = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)


def device_of(model: Any) -> torch.device:
    """Where a model's inputs go."""
    return model.get_input_embeddings().weight.device


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients, and the model in evaluation mode; each module's own mode is restored on exit."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
