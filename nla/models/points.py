"""Points: "resid_post.3" names the residual stream after block 3. The only file that knows architectures.

To add one: a line in ``ARCHITECTURES`` and one in ``MODELS`` of tests/helpers/tiny.py. Then ``pytest tests -k TYPE``
holds reading, loading, injection, sampling and training on it against transformers itself.
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
    """Where an architecture keeps its parts."""

    blocks: str = "layers"
    """The list of blocks, an attribute of the backbone."""

    norm: str = "norm"
    """The final norm, an attribute of the backbone."""

    text: str = ""
    """In a multimodal wrapper, the text backbone: an attribute of the wrapper's own backbone."""


ARCHITECTURES = {
    "gemma2": Layout(),
    "gemma3": Layout(text="language_model"),
    "gemma3_text": Layout(),
    "gpt2": Layout(blocks="h", norm="ln_f"),
    "gpt_neox": Layout(norm="final_layer_norm"),
    "gpt_oss": Layout(),
    "llama": Layout(),
    "mistral": Layout(),
    "mixtral": Layout(),
    "olmo": Layout(),
    "olmo2": Layout(),
    "olmo3": Layout(),
    "phi3": Layout(),
    "qwen2": Layout(),
    "qwen3": Layout(),
    "qwen3_moe": Layout(),
}
"""By ``model_type`` of transformers; Qwen2.5 is "qwen2", Llama 3 is "llama"."""

KINDS = ("resid_post",)

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


def layout(model_type: str) -> Layout:
    """Where a type of model keeps its parts.

    Raises:
        ArchitectureError: a type whose blocks are not known.
    """
    if model_type not in ARCHITECTURES:
        raise ArchitectureError(
            f"a model of type {model_type!r}",
            f"a causal LM of type {', '.join(ARCHITECTURES)}",
            "use a target of one of these types; or, if it is a stack of blocks that each return the residual stream, "
            "add it to ARCHITECTURES in nla/models/points.py and to MODELS in tests/helpers/tiny.py, and run "
            f"`pytest tests -k {model_type}`: if that passes, the type works",
        )
    return ARCHITECTURES[model_type]


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """A model without the wrapper that PEFT puts around it, if there is one."""
    whole: Any = model
    return whole.get_base_model() if hasattr(model, "get_base_model") else whole


def backbone(model: nn.Module) -> PreTrainedModel:
    """The decoder stack (embeddings, blocks, final norm) of a causal LM, with or without PEFT adapters around it.

    Of a multimodal wrapper, the text side.

    Raises:
        ArchitectureError: an architecture whose blocks are not known.
    """
    base: Any = unwrapped(model)
    parts = layout(getattr(getattr(base, "config", None), "model_type", type(base).__name__))
    stack = base.base_model  # of transformers: the model without its head; a model that has none is its own
    return getattr(stack, parts.text) if parts.text else stack


def _layout(stack: Any) -> Layout:
    return layout(stack.config.model_type)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a model, first to last; block K's output is the point ``resid_post.K``.

    Raises:
        ArchitectureError: an architecture whose blocks are not known.
    """
    stack = backbone(model)
    return getattr(stack, _layout(stack).blocks)


def block(model: nn.Module, point: str | Point) -> nn.Module:
    """The block whose output is ``point``.

    Raises:
        PointError: the model has no such block.
        ArchitectureError: an architecture whose blocks are not known.
    """
    layers = blocks(model)
    return layers[Point.parse(point).within(len(layers)).layer]


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the head."""
    stack = backbone(model)
    return getattr(stack, _layout(stack).norm)


def embeddings(model: nn.Module) -> nn.Module:
    """The module that turns token ids into input embeddings; its output is what enters the first block."""
    whole: Any = model
    return whole.get_input_embeddings()


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go."""
    whole: Any = embeddings(model)
    return whole.weight.device


def d_model(model: nn.Module) -> int:
    """Width of the residual stream."""
    return backbone(model).config.hidden_size


def context_length(model: nn.Module) -> int:
    """Longest input in tokens."""
    return backbone(model).config.max_position_embeddings


def linear_names(model: nn.Module) -> list[str]:
    """The linear layers of the blocks (attention and MLP) of a model without adapters, for LoRA's ``target_modules``.

    Experts that transformers keeps fused in one parameter are no layers: of them LoRA reaches the attention alone. In a
    multimodal wrapper the vision side has layers of the same names, so there the names are whole paths.
    """
    from transformers.pytorch_utils import Conv1D

    layers, stack = blocks(model), backbone(model)
    names = {name for name, module in layers[0].named_modules() if isinstance(module, nn.Linear | Conv1D)}
    whole: Any = model
    if whole.base_model is stack:
        return sorted({name.rsplit(".", 1)[-1] for name in names})
    where = next(name for name, module in model.named_modules() if module is layers)
    return sorted(f"{where}.{number}.{name}" for number in range(len(layers)) for name in names)


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
        ArchitectureError: an architecture whose blocks are not known.
    """
    full, layers = backbone(model), blocks(model)
    n_blocks, parts = Point.parse(point).within(len(layers)).layer + 1, _layout(full)
    view = _shallow(full)
    setattr(view, parts.blocks, nn.ModuleList(list(layers)[:n_blocks]))
    setattr(view, parts.norm, nn.Identity())
    view.config = cut_config(full.config, n_blocks)
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
        ArchitectureError: an architecture whose blocks are not known.
    """
    base: Any = unwrapped(model)
    stack = backbone(base)
    path = next(name for name, module in base.named_modules() if module is stack)
    whole = view = _shallow(base)
    for part in path.split("."):
        child = _shallow(getattr(view, part))
        setattr(view, part, child)
        view = child
    parts = _layout(stack)
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
