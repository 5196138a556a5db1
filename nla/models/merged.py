"""A copy of a model with its LoRA adapter added to the weights: what a policy samples from, while its adapter learns.

The model itself is never changed. The copy has weights of its own where the adapter acts, and shares all other tensors.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nla.models.points import unwrapped


class _Adapted(NamedTuple):
    layer: Any
    """PEFT's layer, with the base's weight and the adapter's two."""
    weight: Tensor
    """The copy's: base and adapter together, in the base's type."""


class MergedCopy:
    """A copy of a model with one LoRA adapter merged; it holds what the adapter was at the last :meth:`refresh`."""

    def __init__(self, model: nn.Module, adapter: str) -> None:
        """``model`` in PEFT's wrapper, for which :func:`can_merge` holds. The copy is filled by :meth:`refresh`."""
        self.adapter = adapter
        self._adapted: list[_Adapted] = []
        self.model = cast(PreTrainedModel, self._copied(unwrapped(model), {}))

    @property
    def nbytes(self) -> int:
        """Memory that the copy has to itself."""
        return sum(part.weight.nbytes for part in self._adapted)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the adapter as it now is: W + B·A·scale, computed in float32 and rounded once, to the base's type."""
        for layer, weight in self._adapted:
            base, scale = layer.get_base_layer().weight, layer.scaling[self.adapter]
            down, up = layer.lora_A[self.adapter].weight.float(), layer.lora_B[self.adapter].weight.float()
            added = up @ down
            weight.copy_(torch.add(base.float(), added.T if layer.fan_in_fan_out else added, alpha=scale))

    def _copied(self, module: Any, copies: dict[int, Any]) -> Any:
        if id(module) in copies:
            return copies[id(module)]
        adapted = is_adapted(module)
        source = module.get_base_layer() if adapted else module
        made = copies[id(module)] = copy.copy(source)
        for name in ("forward", "_output_capturing_hooks_installed"):  # a trainer's; transformers installs hooks anew
            made.__dict__.pop(name, None)
        for name, value in vars(source).items():
            if name.endswith("_hooks") or name.endswith("_hooks_with_kwargs"):
                made.__dict__[name] = OrderedDict()
            elif name in ("_parameters", "_buffers"):
                made.__dict__[name] = dict(value)
        made.__dict__["_modules"] = {name: self._copied(child, copies) for name, child in source._modules.items()}
        if adapted:
            made.weight = nn.Parameter(torch.empty_like(source.weight), requires_grad=False)
            self._adapted.append(_Adapted(module, made.weight))
        return made


def is_adapted(module: nn.Module) -> bool:
    """Whether PEFT has put adapters on a layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def can_merge(model: nn.Module, adapter: str) -> bool:
    """Whether every adapted layer is a plain one of floats with a plain LoRA adapter: not of a quantised model."""
    layers: list[Any] = [module for module in model.modules() if is_adapted(module)]
    return bool(layers) and all(
        type(layer.get_base_layer()) in (nn.Linear, Conv1D)
        and layer.get_base_layer().weight.is_floating_point()
        and adapter in layer.lora_A
        and not layer.use_dora.get(adapter, False)
        for layer in layers
    )
