"""The target as the suite uses it: read it, let it write, and intervene on it, all in batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla.autoencoder import NLA
from nla.config import CONFIG_FILE
from nla.errors import ArgumentError, ConfigError, ShapeError
from nla.models.checkpoint import read_config
from nla.models.generate import Generated, ends_of, generate, pad_of, seeded
from nla.models.hooks import add, inference, replace
from nla.models.load import LoadSettings, load_target
from nla.models.lora import attached, located
from nla.models.points import Point, blocks, context_length, device_of, unwrapped
from nla.models.read import read
from nla.organisms import PAIRS, TARGETS, full_name, is_target
from nla.pair.separate import Devices
from nla.text.tokens import prompt_ids


@dataclass(frozen=True)
class Target:
    """The model that is read and intervened on, at the point of interest."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    point: Point
    role: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    """A context in which ``model`` is the bare target (a pair switches its adapters off)."""

    @classmethod
    def load(cls, name: str | Path, point: str | Point, **settings: Unpack[LoadSettings]) -> Target:
        """A target without a pair: an embedded name such as "couplets/plain", a GGUF file, a model folder or a hub id.

        Raises:
            PointError: the model has no such point; nothing but its configuration is read before.
            TargetError, WeightsError, NonFiniteError: there is no such model, or its weights are not whole, finite
                safetensors. The rest is as for :func:`nla.models.load.load_target`.
        """
        at = Point.parse(point).within(read_config(name, settings.get("revision")).num_hidden_layers)
        model, tokenizer = load_target(name, **settings)
        return cls(model, tokenizer, at)

    @classmethod
    def of(cls, nla: NLA) -> Target:
        """The target of a pair."""
        return cls(nla.base_of("target"), nla.tokenizer, Point.parse(nla.point), lambda: nla.role("target"))

    @property
    def points(self) -> list[str]:
        """Every point of the same kind, first block to last."""
        return [str(Point(self.point.kind, layer)) for layer in range(len(blocks(self.model)))]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The bare target, without gradients and in evaluation mode."""
        with self.role(), inference(self.model):
            yield


def open_pair(pair: NLA | str | Path, device: Devices = None) -> NLA:
    """A pair: as it is if it is loaded, or else loaded from a name, folder or hub id.

    Raises:
        See :meth:`nla.NLA.from_pretrained`.
    """
    return NLA.from_pretrained(pair, device=device) if isinstance(pair, str | Path) else pair


def open_rival(pair: NLA | str | Path, nla: NLA, device: Devices = None) -> NLA:
    """A pair to compare another with, such as its warm start.

    Raises:
        ConfigError: it reads another point or another target than ``nla``, or see :func:`open_pair`.
    """
    other = open_pair(pair, device)
    if str(other.point) != str(nla.point):
        raise ConfigError(f"a pair at {other.point}", f"{nla.point}, as the pair that is judged", "give pairs of it")
    if not _same_weights(other.base_of("target"), nla.base_of("target")):
        raise ConfigError(
            f"a pair of the target {other.config.target}, whose weights differ",
            f"the target of the pair that is judged, {nla.config.target}",
            "give pairs that were trained on the same target",
        )
    return other


def check_target(nla: NLA, target: Target, name: str) -> None:
    """Refuse a pair of another target.

    Raises:
        ConfigError: the weights differ.
    """
    if not _same_weights(nla.base_of("target"), target.model):
        raise ConfigError(
            f"a pair of the target {nla.config.target}, whose weights differ from those of {name}",
            "a pair that was trained on the model that is traced",
            "give the pair's own target, or a pair of this one",
        )


def _same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether two models have the same weights, adapters, types and devices aside."""
    weights, expected = (
        {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if "lora_" not in name}
        for model in (first, second)
    )
    return weights.keys() == expected.keys() and all(
        torch.equal(expected[name].to(p.device, p.dtype), p) for name, p in weights.items()
    )


def doubts(nla: NLA | None, **others: NLA | None) -> list[str]:
    """What pairs' own measurements say against them: the judged one's, then the others', named by their keywords."""
    named = {"": nla, **{f"{name.replace('_', ' ')}: ": pair for name, pair in others.items()}}
    return [name + doubt for name, pair in named.items() if pair is not None for doubt in pair.doubts]


def one_place(device: Devices) -> str | torch.device | None:
    """Where the one model of a target goes.

    Raises:
        ArgumentError: places by role.
    """
    if isinstance(device, Mapping):
        raise ArgumentError(f"device={dict(device)}", "one place: one model is loaded", "such as cuda:0")
    return device


def open_target(model: Target | NLA | str | Path, point: str | Point, device: Devices = None) -> Target:
    """A target: as it is, of a pair (loaded, or its folder), or loaded from a name, folder or hub id.

    Args:
        point: where a target without a pair is read; a pair and a loaded target have their own.
        device: where to load it; None: the first GPU if there is one, else the CPU.

    Raises:
        See :meth:`Target.load` and :meth:`nla.NLA.from_pretrained`.
    """
    if isinstance(model, Target):
        return model
    if isinstance(model, NLA):
        return Target.of(model)
    if not is_target(model) and (Path(model) / CONFIG_FILE).is_file():
        return Target.of(open_pair(model, device))
    return Target.load(model, point, device=one_place(device))


def open_model(
    model: NLA | Target | str | Path, point: str | None = None, device: Devices = None
) -> tuple[NLA | None, Target]:
    """The pair, if there is one, and its target.

    Args:
        point: where a target without a pair is read; None: after two thirds of its blocks.

    Raises:
        ConfigError, PointError: see :meth:`Target.load` and ``NLA.from_pretrained``.
    """
    if isinstance(model, Target):
        return None, model
    if isinstance(model, NLA):
        return model, Target.of(model)
    if (
        str(model) in TARGETS
        or (is_target(model) and full_name(model) not in PAIRS)
        or ((Path(model) / "config.json").is_file() and not (Path(model) / CONFIG_FILE).is_file())
    ):
        return None, open_target(model, point or two_thirds(read_config(model, None).num_hidden_layers), device)
    nla = open_pair(model, device)
    return nla, Target.of(nla)


def two_thirds(n_blocks: int) -> str:
    """The point after two thirds of a target's blocks.

    >>> two_thirds(30), two_thirds(1)
    ('resid_post.19', 'resid_post.0')
    """
    return f"resid_post.{max(1, round(2 * n_blocks / 3)) - 1}"


@contextlib.contextmanager
def planted(target: Target, nla: NLA | None, adapter: str | Path) -> Iterator[Target]:
    """The target with an adapter on it, while active.

    Args:
        nla: the pair that it is the target of; None: it has none.

    Raises:
        ConfigError, WeightsError, NonFiniteError, ArgumentError, TargetError, AccessError: see
            :func:`nla.pair.roles.planted`.
    """
    if nla is not None:
        with nla.planted(adapter):
            yield Target.of(nla)
        return
    with attached(target.model, located(adapter)):
        yield target


class Patch(NamedTuple):
    """Vectors (n, d) put at a point in place of those of one token of each prompt, at columns ``positions`` (n,)."""

    point: str
    positions: Tensor
    vectors: Tensor

    def rows(self, index: Tensor) -> Patch:
        """The patch of some of the prompts."""
        return Patch(self.point, self.positions[index], self.vectors[index])

    def active(self, model: PreTrainedModel, padding: Tensor | int) -> contextlib.AbstractContextManager[None]:
        """A context in which a model runs on the prompts, whose columns ``padding`` on the left has moved."""
        return replace(model, self.point, self.positions + padding, self.vectors)


class Shift(NamedTuple):
    """Directions (n, d) added at a point, ``strength`` times as long as the activation that each is added to.

    That of one token of each prompt, at columns ``positions`` (n,), and of all after it, the written ones among them.
    """

    point: str
    positions: Tensor
    vectors: Tensor
    strength: float

    def rows(self, index: Tensor) -> Shift:
        """The shift of some of the prompts."""
        return self._replace(positions=self.positions[index], vectors=self.vectors[index])

    def active(self, model: PreTrainedModel, padding: Tensor | int) -> contextlib.AbstractContextManager[None]:
        """As :meth:`Patch.active`."""
        return add(model, self.point, self.positions + padding, self.vectors, self.strength, onwards=True)


def token_ids(target: Target, prompts: str | Sequence[str]) -> list[list[int]]:
    """Token ids of prompts as :func:`nla.models.read.read` reads them, with the special tokens that are added."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    return prompt_ids(target.tokenizer, texts, context_length(target.model))


def last_token(target: Target, prompts: str | Sequence[str]) -> Tensor:
    """Column of each prompt's last token, (n,)."""
    return torch.tensor([len(ids) - 1 for ids in token_ids(target, prompts)])


def read_last(
    target: Target, prompts: str | Sequence[str], point: str | None = None, patches: Sequence[Patch] = ()
) -> Tensor:
    """Activations (n, d) float32 of each prompt's last token, at the target's point or another, under interventions."""
    check_patches(patches, 1 if isinstance(prompts, str) else len(prompts))
    with target.role():
        return read(
            target.model,
            target.tokenizer,
            prompts,
            point or target.point,
            positions="last",
            intervene=(lambda rows, padding: patched(target, patches, rows, padding)) if patches else None,
        ).vectors


@contextlib.contextmanager
def patched(
    target: Target, patches: Sequence[Patch | Shift], index: Tensor, padding: Tensor | int = 0
) -> Iterator[None]:
    """A context with the patches of some prompts, whose columns ``padding`` on the left has moved."""
    with contextlib.ExitStack() as stack:
        for one in patches:
            stack.enter_context(one.rows(index).active(target.model, padding))
        yield


def write(
    target: Target,
    prompts: str | Sequence[str],
    patches: Sequence[Patch] = (),
    max_new_tokens: int = 10,
    stop: str = "\n",
) -> list[str]:
    """The target's greedy continuation of each prompt, up to and including ``stop``, under interventions."""
    stop_id: Any = target.tokenizer.convert_tokens_to_ids(stop)
    written = continued(target, token_ids(target, prompts), max_new_tokens, patches=patches, ends=[stop_id])
    texts = []
    for row, (ids, length) in enumerate(zip(written.ids.tolist(), written.lengths.tolist(), strict=True)):
        stopped = bool(written.ended[row]) and ids[length] == stop_id
        texts.append(target.tokenizer.decode(ids[: length + stopped], skip_special_tokens=False))
    return texts


def continued(
    target: Target,
    ids: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float | None = None,
    seed: int | None = 0,
    patches: Sequence[Patch | Shift] = (),
    ends: Sequence[int] = (),
) -> Generated:
    """What the target writes after prompts under interventions; positions count from each prompt's own start.

    Args:
        temperature: of sampling; None: greedy.
        seed: of the samples; None: the global random state.
        ends: token ids that end an answer beside the model's own.
    """
    check_patches(patches, len(ids))
    model = unwrapped(target.model)
    with target.active():
        return generate(
            target.model,
            ids,
            ends=sorted({*ends, *ends_of(model, target.tokenizer)}),
            pad=pad_of(target.tokenizer),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            generator=seeded(seed, device_of(model)),
            intervene=lambda rows, padding: patched(target, patches, rows, padding),
        )


def last_word(line: str) -> str:
    """The word that a line ends on, without punctuation; empty if the line has none or was not ended.

    >>> last_word("Soon they found a tiny cat.\\n")
    'cat'
    """
    words = line.rstrip("\n").rstrip(".").split() if line.endswith("\n") else []
    return words[-1] if words else ""


def check_patches(patches: Sequence[Patch | Shift], n_prompts: int) -> None:
    """Refuse patches of another number of prompts.

    Raises:
        ShapeError: not one vector and one position a prompt.
    """
    for one in patches:
        if len(one.vectors) != n_prompts or len(one.positions) != n_prompts:
            raise ShapeError(
                f"{len(one.vectors)} vectors and {len(one.positions)} positions for {n_prompts} prompts",
                "one of each a prompt",
                "repeat or slice them with the prompts",
            )
