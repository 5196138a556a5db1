"""Interchange training of an organism's target: a forward pass that is recorded, one that is intervened on, a loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nla.models.points import blocks


def next_token_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy of ``ids[:, 1:]`` weighted by ``weights[:, 1:]`` ((b, t)); logits (b, t, v)."""
    weights = weights[:, 1:].flatten().float()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights).sum() / weights.sum()


def recorded(model: nn.Module, ids: Tensor, columns: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits (b, t, v) of ids (b, t), and each block's output (n, d) at ``columns`` (n,) of the first n rows."""
    rows, found = torch.arange(len(columns), device=ids.device), {}
    with contextlib.ExitStack() as stack:
        for layer, block in enumerate(blocks(model)):
            stack.enter_context(hooked(block, lambda out, layer=layer: found.update({layer: out[rows, columns]})))
        return model(input_ids=ids).logits, found


def exchanged(
    model: nn.Module, ids: Tensor, columns: Tensor, layers: Tensor, vectors: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Logits (b, t, v) of ids (b, t) with each row's vector at its column (b,) exchanged after its block (b,).

    Args:
        vectors: from a block and the numbers of the rows that are exchanged there, what is put in, (rows, d).
    """
    with contextlib.ExitStack() as stack:
        for layer, block in enumerate(blocks(model)):
            here = (layers == layer).nonzero()[:, 0]
            if len(here):
                given = vectors(layer, here)

                def put(out: Tensor, here: Tensor = here, new: Tensor = given) -> Tensor:
                    return out.index_put((here, columns[here]), new)

                stack.enter_context(hooked(block, put))
        return model(input_ids=ids).logits


class hooked:
    """A context in which ``change`` sees a block's output (b, t, d) and may return another in its place."""

    def __init__(self, block: nn.Module, change) -> None:
        self.block, self.change = block, change

    def __enter__(self) -> None:
        def hook(_module, _args, output):
            first = output[0] if isinstance(output, tuple) else output
            changed = self.change(first)
            if not isinstance(changed, Tensor):
                return output
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        self.handle = self.block.register_forward_hook(hook)

    def __exit__(self, *_exc) -> None:
        self.handle.remove()
