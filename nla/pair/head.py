"""The decoder's head: the stream at the last token to a reconstruction."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Head(nn.Module):
    """The affine map d → d on the last token's stream: float32, the identity before training.

    In bfloat16 an identity cannot absorb small updates, so it stays in float32 under autocast too. Without a bias it is
    linear, as imported heads are.
    """

    def __init__(self, d_model: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(d_model, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(d_model, dtype=torch.float32)) if bias else None

    def forward(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The stream in any float type to reconstructions in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight, self.bias)
