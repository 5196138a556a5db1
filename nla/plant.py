"""A LoRA adapter on the target while it is read: a fine-tuned target, audited with the pair of its base."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nla.errors import ArgumentError, ConfigError, WeightsError
from nla.formats.native import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_tensors, read_adapter_config, sha256
from nla.organisms import ADAPTERS
from nla.points import backbone, blocks, layout

if TYPE_CHECKING:
    from nla.autoencoder import NLA

TARGET_ADAPTER = "target"


@contextlib.contextmanager
def planted(nla: NLA, folder: str | Path | None) -> Iterator[NLA]:
    """While active, the role "target" is the base with this adapter; encoder and decoder stay as they are.

    Args:
        folder: a PEFT folder, or a hub id, with a plain LoRA adapter; None: the base itself.

    Raises:
        ConfigError: no such adapter, not plain LoRA, or modules that the target does not have.
        WeightsError, NonFiniteError: weights that are missing, corrupt or of other shapes.
        ArgumentError: an adapter is planted already.
        TargetError, AccessError: the hub does not give it.
    """
    if folder is None:
        yield nla
        return
    folder, target = _located(folder), nla.roles.model_of("target")
    if any(f".{TARGET_ADAPTER}." in name for name, _ in target.named_parameters()):
        raise ArgumentError("a second adapter on the target", "one at a time", "leave the other context first")
    flags = [(parameter, parameter.requires_grad) for parameter in target.parameters()]
    try:
        with _shared(nla, folder) if nla.roles.shared else _alone(target, folder):
            yield nla
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _shared(nla: NLA, folder: Path) -> Iterator[None]:
    """The adapter beside the pair's own on the shared base, which the role "target" switches on."""
    model: Any = nla.model
    config, state = _fitted(folder, model)
    try:
        model.add_adapter(TARGET_ADAPTER, config)
        _fill(folder, model, state)
        nla.target_adapter = TARGET_ADAPTER
        yield
    finally:
        nla.target_adapter = None
        if TARGET_ADAPTER in model.peft_config:
            model.delete_adapter(TARGET_ADAPTER)


@contextlib.contextmanager
def _alone(target: Any, folder: Path) -> Iterator[None]:
    """The adapter on a target that is a model of its own."""
    tuned = _wrapped(target, folder)
    try:
        yield
    finally:
        tuned.unload()


def merge_adapter(model: Any, folder: str | Path) -> None:
    """Add a plain LoRA adapter to the weights of a model, or of a backbone that holds its first blocks, for good.

    Raises:
        ConfigError, WeightsError, NonFiniteError: see :func:`planted`.
    """
    _wrapped(model, _located(folder)).merge_and_unload()
    model.requires_grad_(True)


def _wrapped(model: Any, folder: Path) -> Any:
    """A model with an adapter in its layers, which it keeps until it is unloaded."""
    from peft import get_peft_model

    config, state = _fitted(folder, model)
    config.task_type = None  # a backbone cannot generate, which PEFT's classes for tasks ask of it
    with torch.random.fork_rng(devices=[]):  # PEFT draws initial values that are then overwritten
        tuned: Any = get_peft_model(model, config, adapter_name=TARGET_ADAPTER)
    try:
        _fill(folder, tuned, state)
    except WeightsError:
        tuned.unload()
        raise
    return tuned


def _fitted(folder: Path, model: Any) -> tuple[Any, dict[str, Tensor]]:
    """An adapter's configuration and tensors under the names that ``model`` gives its layers.

    Layers are found by what follows the list of blocks, so an adapter of a multimodal wrapper fits the text side alone,
    and one of a whole model a backbone. What lies above the blocks that ``model`` has is left out; so is the vision.
    """
    config: Any = read_adapter_config(folder)
    stored = load_tensors(folder / ADAPTER_WEIGHTS)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    stack, n_blocks = backbone(base), len(blocks(base))
    place = re.compile(rf"^(?!.*vision).*?\b({layout(stack.config.model_type).blocks}\.(\d+)\..+)$")
    known = {found[1]: name for name, _ in base.named_modules() if (found := place.match(name))}
    layers: dict[str, str] = {}
    state, strange = {}, []
    for name, tensor in stored.items():
        path, _, part = name.rpartition(".lora_")
        found = place.match(path)
        if found is not None and found[1] in known:
            layers[known[found[1]]] = path.removeprefix("base_model.model.")
            state[f"base_model.model.{known[found[1]]}.lora_{part}"] = tensor
        elif not _beyond(name, found, base is stack, n_blocks):
            strange.append(name)
    if strange or not layers:
        raise ConfigError(
            f"{folder}, which does not fit the target ({(strange or ['it reaches none of its layers'])[0]})",
            "an adapter of the pair's target",
            "train the adapter on this target, or use the pair of the other one",
        )
    for name, default in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
        setattr(config, name, _by_layer(getattr(config, name) or {}, layers, default))
    config.target_modules, config.layers_to_transform = set(layers), None
    return config, state


def _by_layer(patterns: dict[str, Any], layers: dict[str, str], default: Any) -> dict[str, Any]:
    """Patterns over the names that layers had in training, ``layers``' values, as values by their names now, its keys.

    A name that is written out in full, as PEFT's data-driven starts write them, would match no layer of a cut target.
    """
    from peft.utils.other import get_pattern_key

    found = {now: patterns.get(get_pattern_key(list(patterns), before), default) for now, before in layers.items()}
    return {f"^{re.escape(name)}": value for name, value in found.items() if value != default}


def _beyond(name: str, place: re.Match[str] | None, is_cut: bool, n_blocks: int) -> bool:
    """Whether a tensor is of a part that a backbone or a text side is rightly without."""
    if place is None:
        return "vision" in name or (is_cut and ".lm_head." in name)
    return is_cut and int(place[2]) >= n_blocks


def _fill(folder: Path, model: Any, state: dict[str, Tensor]) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    current = get_peft_model_state_dict(model, adapter_name=TARGET_ADAPTER, save_embedding_layers=False)
    wrong = sorted(set(current) ^ set(state)) or [n for n, t in state.items() if t.shape != current[n].shape]
    if wrong:
        raise WeightsError(
            f"{folder / ADAPTER_WEIGHTS}, whose {wrong[0]} is missing, unknown or of another shape",
            "the tensors of this adapter's configuration, in the target's shapes",
            "load it with the target and the rank it was made for",
        )
    set_peft_model_state_dict(model, state, adapter_name=TARGET_ADAPTER)


def adapter_folder(name: str | Path | None) -> str | Path | None:
    """An embedded adapter by its name, such as "switchboard/goal"; whatever else is a folder or hub id already."""
    return ADAPTERS.get(str(name), name)


def _located(folder: str | Path) -> Path:
    """A folder as it stands, or where a hub id's files are, which are downloaded if need be.

    Raises:
        TargetError, AccessError: the hub does not give them.
    """
    if Path(folder).is_dir() or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(folder)) is None:
        return Path(folder)
    from nla.target import fetch_file

    files = [fetch_file(str(folder), None, name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    return Path(folder) if files[0] is None else files[0].parent


def adapter_hash(folder: str | Path | None) -> str | None:
    """What identifies an adapter: a hash of its configuration and weights; None for none.

    Raises:
        WeightsError: a file is missing.
        TargetError, AccessError: the hub does not give it.
    """
    if folder is None:
        return None
    folder = _located(folder)
    parts = "".join(sha256(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    return hashlib.sha256(parts.encode()).hexdigest()
