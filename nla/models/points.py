"""Points: "resid_post.3" names the residual stream after block 3; and where a model keeps its blocks.

A causal LM of transformers that is a stack of blocks will do: what is not in ``TESTED`` is held against transformers
when it is loaded, and may be refused (:mod:`nla.models.selfcheck`).
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nla.errors import ArchitectureError, PointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Layout(NamedTuple):
    """Where a backbone keeps its parts: names of its attributes."""

    blocks: str
    """The list of blocks."""

    norm: str
    """The final norm."""


_FAMILIES = {
    "gemma": ("gemma2", "gemma3", "gemma3_text"),
    "gpt": ("gpt2", "gpt_neox", "gpt_oss"),
    "llama": ("llama", "mistral", "mixtral", "phi3"),
    "olmo": ("olmo", "olmo2", "olmo3"),
    "qwen": ("qwen2", "qwen3", "qwen3_moe"),
}
TESTED = frozenset(name for family in _FAMILIES.values() for name in family)
"""Types of models (``model_type`` of transformers) that all tests of reading, loading, injection, sampling and training
run on; Qwen2.5 is "qwen2", Llama 3 is "llama". Others are checked at load."""

KINDS = ("resid_post",)

_ANOTHER = f"use another target, of type {', '.join(sorted(TESTED))} for example"

NO_LIMIT = 1_000_000

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


class Point(NamedTuple):
    """A place in a model where activations are read: kind and block.

    ``resid_post.K`` is the OUTPUT of block K, which is ``hidden_states[K + 1]`` of transformers except for the last
    block, where transformers gives the stream after the final norm and this point the stream before it.

    >>> Point.parse("resid_post.3")
    Point(kind='resid_post', layer=3)
    >>> str(Point("resid_post", 3))
    'resid_post.3'
    """

    kind: str
    layer: int

    @classmethod
    def parse(cls, text: str | Point) -> Point:
        """Read "resid_post.K".

        Raises:
            PointError: another form or kind.
        """
        match = re.fullmatch(r"([a-z_]+)\.(\d{1,9})", str(text))
        if match is None or match[1] not in KINDS:
            raise PointError(
                f"the point {str(text)!r}",
                f"a kind ({', '.join(KINDS)}), a dot and a block's index, such as 'resid_post.3'",
                "correct the point; `nla info` shows the one that a trained pair uses",
            )
        return cls(match[1], int(match[2]))

    def within(self, n_blocks: int) -> Point:
        """This point, if a model of so many blocks has it.

        Raises:
            PointError: it has not.
        """
        if self.layer >= n_blocks:
            raise PointError(
                f"{self} in a model of {n_blocks} blocks",
                f"resid_post.0 to resid_post.{n_blocks - 1}",
                "choose one of these points",
            )
        return self

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"


def layout(stack: nn.Module) -> Layout:
    """Where a backbone keeps its blocks and its final norm: its list of layers, and the norm that follows it.

    Raises:
        ArchitectureError: it has no such list or norm.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    children = dict(stack.named_children())
    lists = [
        name
        for name, child in children.items()
        if isinstance(child, nn.ModuleList) and all(isinstance(part, GradientCheckpointingLayer) for part in child)
    ]
    # A truncated view has the identity for a norm.
    norms = [name for name, child in children.items() if "Norm" in type(child).__name__ or type(child) is nn.Identity]
    if len(lists) != 1 or not norms:
        kind = getattr(getattr(stack, "config", None), "model_type", type(stack).__name__)
        got = f"a model of type {kind!r} with {len(lists)} lists of blocks and {len(norms)} norms"
        raise ArchitectureError(got, "a stack of blocks and a final norm after it", _ANOTHER)
    after = [name for name in norms if list(children).index(name) > list(children).index(lists[0])]
    return Layout(lists[0], after[0] if after else norms[-1])


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """A model without the wrapper that PEFT puts around it, if there is one."""
    whole: Any = model
    return whole.get_base_model() if hasattr(model, "get_base_model") else whole


def backbone(model: nn.Module) -> PreTrainedModel:
    """The decoder stack (embeddings, blocks, final norm) of a causal LM, with or without PEFT adapters around it.

    Of a multimodal wrapper, the text side.

    Raises:
        ArchitectureError: no model of transformers.
    """
    base: Any = unwrapped(model)
    if not hasattr(base, "get_decoder"):
        raise ArchitectureError(f"a {type(base).__name__}", "a causal LM of transformers", _ANOTHER)
    stack = base.get_decoder()
    if not hasattr(stack, "config"):  # ModernBERT calls its head so
        stack = base.base_model
    return getattr(stack, "model", stack)  # Llama 4's base model is not found by its name


def blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a model, first to last; block K's output is the point ``resid_post.K``.

    Raises:
        ArchitectureError: no stack of blocks.
    """
    stack = backbone(model)
    return getattr(stack, layout(stack).blocks)


def block(model: nn.Module, point: str | Point) -> nn.Module:
    """The block whose output is ``point``.

    Raises:
        PointError: the model has no such block.
        ArchitectureError: no stack of blocks.
    """
    layers = blocks(model)
    return layers[Point.parse(point).within(len(layers)).layer]


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the head."""
    stack = backbone(model)
    return getattr(stack, layout(stack).norm)


def embeddings(model: nn.Module) -> nn.Module:
    """The module that turns token ids into input embeddings; its output is what enters the first block."""
    whole: Any = model
    return whole.get_input_embeddings()


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go."""
    whole: Any = embeddings(model)
    return whole.weight.device


def n_embeddings(model: nn.Module) -> int:
    """How many token ids a model has embeddings for."""
    whole: Any = embeddings(model)
    return whole.weight.shape[0]


def d_model(model: nn.Module) -> int:
    """Width of the residual stream."""
    return backbone(model).config.hidden_size


def attends_plainly(model: nn.Module) -> bool:
    """Whether every block attends to all earlier tokens by the usual formula, and the head is all that makes logits.

    So it is with a tested type that transformers runs by ``sdpa`` without windows: what is known of its keys and values
    then holds for any of its tokens. A quantised, recurrent or unknown model is left to transformers' own code.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    config: Any = backbone(model).config
    plain = config.model_type in TESTED and config._attn_implementation == "sdpa"
    return plain and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def context_length(model: nn.Module) -> int:
    """Longest input in tokens; where positions have no limit, as of a recurrent model, a million."""
    longest: Any = getattr(backbone(model).config, "max_position_embeddings", None)
    return longest or NO_LIMIT


def linear_names(model: nn.Module) -> list[str]:
    """The linear layers of the blocks (attention and MLP) of a model without adapters, for LoRA's ``target_modules``.

    Experts that transformers keeps fused in one parameter are no layers: LoRA reaches the attention beside them. In a
    multimodal wrapper the vision side has layers of the same names, so there the names are whole paths.
    """
    from transformers.pytorch_utils import Conv1D

    layers, stack = blocks(model), backbone(model)
    names = {
        f"{number}.{name}"
        for number, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _adaptable(layer, name)
    }
    whole: Any = model
    if whole.base_model is stack:
        return sorted({name.rsplit(".", 1)[-1] for name in names})
    where = next(name for name, module in model.named_modules() if module is layers)
    return sorted(f"{where}.{name}" for name in names)


def is_transposed(model: nn.Module) -> bool:
    """Whether its blocks keep the weights of linear layers transposed (GPT-2's Conv1D): PEFT's ``fan_in_fan_out``."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in blocks(model).modules())


def _adaptable(layer: nn.Module, name: str) -> bool:
    """Whether LoRA can stand in for a linear layer: not for a router that returns more than its product, nor for the
    output of a state-space mixer, whose kernel takes the weight itself."""
    parent, _, leaf = name.rpartition(".")
    router = type(layer.get_submodule(name)).__module__.startswith("transformers.models.")
    return not router and not (leaf == "out_proj" and "Mixer" in type(layer.get_submodule(parent)).__name__)


def cut_config(config: PretrainedConfig, n_blocks: int) -> PretrainedConfig:
    """A copy of a backbone's config for its first blocks alone, with every list that has an entry a block cut too."""
    cut, n_all = copy.deepcopy(config), config.num_hidden_layers
    cut.num_hidden_layers = n_blocks
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == n_all and name in ("layer_types", "mlp_layer_types"):
            setattr(cut, name, value[:n_blocks])
    return cut


def truncated_view(model: nn.Module, point: str | Point) -> PreTrainedModel:
    """The backbone cut after a point, without the final norm: its ``last_hidden_state`` is the activation.

    A view: it shares every block, parameter and adapter with ``model`` and costs no memory. Keep it out of the module
    tree of ``model`` (do not assign it to an attribute of a module).

    Raises:
        PointError: the model has no such block.
        ArchitectureError: no stack of blocks.
    """
    full, layers = backbone(model), blocks(model)
    n_blocks, parts = Point.parse(point).within(len(layers)).layer + 1, layout(full)
    view = _shallow(full)
    setattr(view, parts.blocks, nn.ModuleList(list(layers)[:n_blocks]))
    setattr(view, parts.norm, nn.Identity())
    return view


def entering_view(model: nn.Module) -> PreTrainedModel:
    """The backbone without its blocks: its ``last_hidden_state`` is what enters the first of them."""
    view = truncated_view(model, Point("resid_post", 0))
    setattr(view, layout(view).blocks, nn.ModuleList())
    return view


class _Entering(nn.Module):
    """The final norm of given streams (n, d), whatever stream reaches it."""

    def __init__(self, norm: nn.Module, streams: Tensor) -> None:
        super().__init__()
        self.norm, self.streams = norm, streams

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.streams.to(hidden.device, hidden.dtype)[:, None])


def logits_after(model: nn.Module, streams: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
    """What a causal LM says next where its last block's output is ``streams``; differentiable.

    The model's own forward pass without its blocks: the final norm, the unembedding, and whatever an architecture does
    to its logits (Gemma 2 caps them, Granite and Cohere scale them) are its own code.

    Raises:
        ArchitectureError: no stack of blocks.
    """
    base: Any = unwrapped(model)
    stack = backbone(base)
    path = next(name for name, module in base.named_modules() if module is stack)
    whole = view = _shallow(base)
    for part in path.split("."):
        child = _shallow(getattr(view, part))
        setattr(view, part, child)
        view = child
    parts = layout(stack)
    setattr(view, parts.blocks, nn.ModuleList())
    setattr(view, parts.norm, _Entering(final_norm(base), streams))
    ids = torch.zeros(len(streams), 1, dtype=torch.int64, device=base.get_input_embeddings().weight.device)
    return whole(input_ids=ids, use_cache=False).logits[:, 0]


def _shallow(module: Any) -> Any:
    """A copy of a module that shares its parts, in which parts can be exchanged.

    ``copy.copy`` alone shares the dict of submodules and hooks too: writing to it would cut the model itself.
    """
    view = copy.copy(module)
    view.__dict__["_modules"] = dict(module._modules)
    for name in _HOOKS:
        view.__dict__[name] = OrderedDict()
    # transformers installs its hidden-state recorders on blocks once per model; through the view they would be doubled.
    view._output_capturing_hooks_installed = True
    return view
