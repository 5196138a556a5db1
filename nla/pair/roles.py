"""The three roles: adapters on one shared base, or whole models that are loaded at first use; and what else a pair is.

A role is a state of the model, so one thread at a time plays one: :meth:`Roles.play` holds a lock until it ends. Leave
it in the thread that entered it; coroutines of one thread are not kept apart.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla.config import NLAConfig
from nla.errors import ArgumentError, SeparateModelsError
from nla.metrics import Baseline
from nla.models.lora import TARGET_ADAPTER, attached, fill, fitted, in_type_of, located, peft_errors, same_gradients
from nla.models.points import device_of, final_norm, is_transposed, layout, linear_names, truncated_view, unwrapped

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

ENCODER_ADAPTER = "default"
"""TRL's reference and resume look for an adapter of this name."""

DECODER_ADAPTER = "decoder"

Role = Literal["target", "encoder", "decoder"]
ROLES: tuple[Role, ...] = get_args(Role)

_ADAPTERS = {"encoder": ENCODER_ADAPTER, "decoder": DECODER_ADAPTER}

T = TypeVar("T")


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


class Roles(Protocol):
    """Who plays target, encoder and decoder."""

    @property
    def shared(self) -> bool:
        """One base plays all roles, with adapters."""
        ...

    @property
    def playing(self) -> Role | None:
        """The role in force."""
        ...

    @property
    def model(self) -> PreTrainedModel:
        """What plays the role in force; outside of any role the shared base with its adapters, or else the target."""
        ...

    @property
    def view(self) -> PreTrainedModel:
        """The decoder's backbone: its ``last_hidden_state`` is what the head reads."""
        ...

    @property
    def head(self) -> Head:
        """The decoder's head, on the decoder's device."""
        ...

    def head_tensors(self) -> dict[str, Tensor]:
        """The head's parameters by name; no other weights are loaded for them."""
        ...

    @property
    def target_adapter(self) -> str | None:
        """Adapter that is on while the target is read, such as a plant's; None: none."""
        ...

    def play(self, name: Role) -> contextlib.AbstractContextManager[None]:
        """While active, ``model`` plays this role. Roles nest; another thread waits until this one's have ended."""
        ...

    def alone(self) -> contextlib.AbstractContextManager[object]:
        """While active, no other thread plays a role."""
        ...

    def model_of(self, name: Role) -> PreTrainedModel:
        """What plays a role, in force or not."""
        ...

    def n_parameters(self) -> dict[str, int]:
        """Number of parameters by role, the decoder's with its head."""
        ...


def adapters_in_type(roles: Roles) -> contextlib.AbstractContextManager[object]:
    """See :func:`nla.models.lora.in_type_of`; models of their own, without adapters, are left as they are."""
    return in_type_of(unwrapped(roles.model)) if roles.shared else contextlib.nullcontext()


class Turn:
    """Whose turn it is: one thread at a time plays roles, which nest."""

    def __init__(self) -> None:
        self._lock, self._roles, self._owner = threading.RLock(), [], 0

    def alone(self) -> contextlib.AbstractContextManager[object]:
        """While active, no other thread plays a role."""
        return self._lock

    @property
    def playing(self) -> Role | None:
        """The role that this thread has in force."""
        return self._roles[-1] if self._roles and self._owner == threading.get_ident() else None

    @contextlib.contextmanager
    def taken(self, name: Role) -> Iterator[None]:
        """While active, this thread plays a role."""
        with self._lock:
            outer, before = list(self._roles), self._owner
            try:
                self._owner = threading.get_ident()
                self._roles.append(name)
                yield
            finally:
                self._roles[:], self._owner = outer, before


class SharedBase:
    """One base: bare as the target, with the adapter "default" as the encoder, and cut with "decoder" as the decoder.

    Adapters are switched by :meth:`play` alone and never merged.
    """

    shared = True

    def __init__(self, model: PeftModel, head: Head, config: NLAConfig) -> None:
        """Raises PointError, ArchitectureError: the model has no such point."""
        self.model = cast(PreTrainedModel, model)  # PEFT's wrapper has what the model has
        self.head = head
        self.cut(config)
        self._target_adapter: str | None = None
        self._turn = Turn()
        self._found: tuple[tuple[str, ...], list[BaseTunerLayer], list[nn.Parameter]] | None = None

    @property
    def target_adapter(self) -> str | None:
        """Adapter that is on while the target is read; None: none."""
        return self._target_adapter

    @target_adapter.setter
    def target_adapter(self, adapter: str | None) -> None:
        self._target_adapter, self._found = adapter, None

    def cut(self, config: NLAConfig) -> None:
        """Let the view end at the config's point, with the final norm or without it.

        Raises:
            PointError: the model has no such point.
        """
        self.view = truncated_view(self.model, config.point)
        if config.decoder.final_norm:
            setattr(self.view, layout(self.view).norm, final_norm(self.model))

    @classmethod
    def create(cls, target: PreTrainedModel, config: NLAConfig, rank: int, alpha: float | None) -> SharedBase:
        """Untrained adapters on a target, and an identity head. See :meth:`nla.NLA.create`."""
        from peft import get_peft_model

        below = list(range(config.layer + 1))
        adapters = [_lora(target, rank, alpha, layers) for layers in (None, below)]
        model: Any = get_peft_model(target, adapters[0], adapter_name=ENCODER_ADAPTER)
        model.add_adapter(DECODER_ADAPTER, adapters[1])
        return cls(model, Head(config.d_model, config.decoder.head_bias).to(device_of(target)), config)

    @property
    def playing(self) -> Role | None:
        """The role that this thread has in force."""
        return self._turn.playing

    def model_of(self, name: Role) -> PreTrainedModel:
        """The base, whatever the role."""
        return self.model

    @contextlib.contextmanager
    def play(self, name: Role) -> Iterator[None]:
        """Switch adapters; on exit they and every ``requires_grad`` are as they were.

        In a role exactly its adapter is active and trainable ("target": none). Span forward AND backward: a switch
        between them loses gradients.
        """
        with self._turn.taken(name):
            layers, parameters = self._adapted()
            before = [(layer.active_adapters, layer.disable_adapters) for layer in layers]
            model: Any = self.model
            active, flags = model.active_adapter, [parameter.requires_grad for parameter in parameters]
            try:
                self._switch(layers, self.target_adapter if name == "target" else _ADAPTERS[name])
                yield
            finally:
                self._set_active(active)
                for layer, (adapters, disabled) in zip(layers, before, strict=True):
                    if layer.active_adapters != adapters:
                        layer.set_adapter(adapters)
                    if layer.disable_adapters != disabled:
                        layer.enable_adapters(not disabled)
                for parameter, flag in zip(parameters, flags, strict=True):
                    parameter.requires_grad_(flag)

    def _adapted(self) -> tuple[list[BaseTunerLayer], list[nn.Parameter]]:
        """The layers that have adapters, and all parameters; found once for each set of adapters."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        model: Any = self.model
        names = tuple(model.peft_config)
        if self._found is None or self._found[0] != names:
            layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
            self._found = names, layers, list(model.parameters())
        return self._found[1:]

    def _switch(self, layers: list[BaseTunerLayer], adapter: str | None) -> None:
        """Switch one adapter on, or all off. PEFT's own ``set_adapter`` walks all modules, twice."""
        if adapter is None:
            for layer in layers:
                layer.enable_adapters(False)
            return
        self._set_active(adapter)
        for layer in layers:
            layer.set_adapter(adapter)
            if layer.disable_adapters:
                layer.enable_adapters(True)

    def _set_active(self, adapter: str) -> None:
        """Note the adapter that is on where PEFT does."""
        model: Any = self.model
        model.active_adapter = model.base_model.active_adapter = adapter

    def alone(self) -> contextlib.AbstractContextManager[object]:
        """While active, no other thread plays a role."""
        return self._turn.alone()

    def head_tensors(self) -> dict[str, Tensor]:
        """The head's parameters by name."""
        return self.head.state_dict()

    def n_parameters(self) -> dict[str, int]:
        """Of the target, of each adapter (the decoder's with its head)."""
        counts = {"target": 0, "encoder": 0, "decoder": _count(self.head)}
        for name, parameter in self.model.named_parameters():
            owner = next((role for role, adapter in _ADAPTERS.items() if f".{adapter}." in name), "target")
            counts[owner if "lora_" in name else "target"] += parameter.numel()
        return counts


class Lazy(Generic[T]):
    """Something that is loaded when it is first asked for, and kept."""

    def __init__(self, load: Callable[[], T]) -> None:
        self._load: Callable[[], T] | None = load
        self._value: T | None = None

    @property
    def loaded(self) -> bool:
        """It has been asked for."""
        return self._load is None

    @property
    def value(self) -> T:
        """The thing itself; whatever loading raises is raised here."""
        if self._load is not None:
            self._value = self._load()
            self._load = None
        return cast(T, self._value)


class SeparateModels:
    """Three whole models, each loaded at first use onto a device of its own, frozen.

    Reading needs the target alone, reconstructing the decoder alone, explaining the encoder, and the decoder for the
    cosine.
    """

    shared = False
    target_adapter = None

    def __init__(
        self,
        target: Callable[[], PreTrainedModel],
        encoder: Callable[[], PreTrainedModel],
        view: Callable[[], PreTrainedModel],
        head: Callable[[], Head],
    ) -> None:
        """Each argument loads a part; ``view`` the decoder's backbone, already cut, ``head`` to the CPU."""
        self._models = {"target": Lazy(target), "encoder": Lazy(encoder), "decoder": Lazy(view)}
        self._head = Lazy(head)
        self._turn = Turn()

    @property
    def playing(self) -> Role | None:
        """The role that this thread has in force."""
        return self._turn.playing

    @property
    def model(self) -> PreTrainedModel:
        """The model of the role in force; outside of any role the target, so that what only reads still works."""
        return self.model_of(self.playing or "target")

    @property
    def view(self) -> PreTrainedModel:
        """The decoder's backbone."""
        return self.model_of("decoder")

    @property
    def head(self) -> Head:
        """The decoder's head."""
        with self._turn.alone():
            return self._head.value.to(device_of(self.view))

    def head_tensors(self) -> dict[str, Tensor]:
        """The head's parameters by name; no model is loaded for them."""
        with self._turn.alone():
            return self._head.value.state_dict()

    @property
    def loaded(self) -> list[str]:
        """The roles whose models are in memory."""
        return [name for name, model in self._models.items() if model.loaded]

    def model_of(self, name: Role) -> PreTrainedModel:
        """The model of a role, loaded if it is not yet."""
        with self._turn.alone():
            fresh = not self._models[name].loaded
            model = self._models[name].value
            return model.requires_grad_(False).eval() if fresh else model

    @contextlib.contextmanager
    def play(self, name: Role) -> Iterator[None]:
        """Nothing but the role's name changes: there are no adapters to switch."""
        with self._turn.taken(name):
            yield

    def alone(self) -> contextlib.AbstractContextManager[object]:
        """While active, no other thread plays a role."""
        return self._turn.alone()

    def n_parameters(self) -> dict[str, int]:
        """Of each model that is loaded."""
        return {
            name: _count(model.value) + (_count(self.head) if name == "decoder" else 0)
            for name, model in self._models.items()
            if model.loaded
        }


@dataclass(frozen=True)
class Parts:
    """A pair in pieces."""

    roles: Roles
    """Who plays target, encoder and decoder."""

    tokenizer: PreTrainedTokenizerBase

    config: NLAConfig

    baselines: dict[str, Baseline] = field(default_factory=dict)
    """Of unit-normalised training activations, by stratum, and "global"."""

    metrics: dict[str, object] = field(default_factory=dict)
    """What was measured, as saved in metrics.json."""

    target_folder: Path | None = None
    """Where a local target lies."""

    weight_folders: dict[str, Path] = field(default_factory=dict)
    """Where the full weights of a local encoder and decoder lie, by role."""

    origin: tuple[str, str | None] | None = None
    """What it was loaded from: a folder's absolute path or a hub id, and the revision; None: made here."""


@contextlib.contextmanager
def planted(roles: Roles, folder: str | Path | None) -> Iterator[None]:
    """While active, the role "target" is the base with this adapter; encoder and decoder stay as they are.

    Other threads wait for the pair meanwhile: they would read the target with the adapter on.

    Args:
        folder: a PEFT folder, or a hub id, with a plain LoRA adapter; None: the base itself.

    Raises:
        ConfigError: no such adapter, not plain LoRA, or modules that the target does not have.
        WeightsError, NonFiniteError: weights that are missing, corrupt or of other shapes.
        ArgumentError: an adapter is planted already, or a role is in force, which would not see it.
        TargetError, AccessError: the hub does not give it.
    """
    if folder is None:
        yield
        return
    folder = located(folder)
    with roles.alone():
        if roles.playing is not None:
            raise ArgumentError(
                f"an adapter on the target within the role {roles.playing!r}", "no role in force", "plant it before"
            )
        target = roles.model_of("target")
        if any(f".{TARGET_ADAPTER}." in name for name, _ in target.named_parameters()):
            raise ArgumentError("a second adapter on the target", "one at a time", "leave the other context first")
        with _shared(cast(SharedBase, roles), folder) if roles.shared else attached(target, folder):
            yield


@contextlib.contextmanager
def _shared(roles: SharedBase, folder: Path) -> Iterator[None]:
    """The adapter beside the pair's own on the shared base, which the role "target" switches on."""
    model: Any = roles.model
    config, state = fitted(folder, model)
    with same_gradients(model):
        try:
            with torch.random.fork_rng(devices=[]), peft_errors(folder):  # PEFT draws initial values, then overwritten
                model.add_adapter(TARGET_ADAPTER, config)
            fill(folder, model, state)
            roles.target_adapter = TARGET_ADAPTER
            yield
        finally:
            roles.target_adapter = None
            if TARGET_ADAPTER in model.peft_config:
                model.delete_adapter(TARGET_ADAPTER)


def check_role(name: str) -> None:
    """Refuse what is no role.

    Raises:
        ArgumentError: another name.
    """
    if name not in ROLES:
        raise ArgumentError(f"role {name!r}", '"target", "encoder" or "decoder"', "use one of these")


def refuse_own_adapters(model: nn.Module) -> None:
    """Refuse a shared base on which the encoder's or the decoder's adapter is on: it is not the bare target.

    Raises:
        ArgumentError: one of them is.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    if layer is None or layer.disable_adapters or not set(_ADAPTERS.values()) <= set(getattr(layer, "lora_A", ())):
        return
    on = set(layer.active_adapters) & set(_ADAPTERS.values())
    if on:
        raise ArgumentError(
            f"a pair's base with its adapter {min(on)!r} on", "the bare target", 'call it within nla.role("target")'
        )


def require_shared(roles: Roles, what: str) -> SharedBase:
    """The shared base that ``what`` needs, such as "joint training".

    Raises:
        SeparateModelsError: encoder and decoder are whole models of their own.
    """
    if not roles.shared:
        raise SeparateModelsError(
            f"{what} with a pair of separate models",
            "a pair whose encoder and decoder are adapters on its target",
            "train a pair with `nla train`; imported full weights can be read, explained, reconstructed and scored",
        )
    return cast(SharedBase, roles)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _lora(target: PreTrainedModel, rank: int, alpha: float | None, layers: list[int] | None) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=linear_names(target),
        fan_in_fan_out=is_transposed(target),
        layers_to_transform=layers,
        bias="none",
        task_type="CAUSAL_LM",
    )
