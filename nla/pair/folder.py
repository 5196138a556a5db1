"""Loading and saving a whole pair: where it lies, its target, its parts, all checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from nla.baselines import BASELINES_FILE, load_baselines, save_baselines
from nla.config import CONFIG_FILE, NLAConfig, WeightsConfig, is_local
from nla.errors import ArgumentError, ConfigError, WeightsError
from nla.models.generate import ends_of
from nla.models.load import AUTO, load_target
from nla.models.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    load_adapter,
    peft_errors,
    read_adapter_config,
    resolve_patterns,
    save_adapter,
)
from nla.models.points import device_of, is_transposed, unwrapped
from nla.organisms import local_folder, pair_folder
from nla.pair.card import CARD_FILE, card
from nla.pair.roles import DECODER_ADAPTER, ENCODER_ADAPTER, Head, Parts, SharedBase
from nla.pair.separate import Devices, Sources, assemble, check_weights, refuse_outside, source_of
from nla.storage.files import folder_of, read_json, replacing_files, write_atomic, write_json
from nla.storage.hashes import hash_weights, sha256
from nla.storage.hub import download, place_of
from nla.storage.tensors import headers_once, load_tensors, save_tensors

if TYPE_CHECKING:
    from peft import PeftModel


ENCODER_FOLDER = "encoder"
DECODER_FOLDER = "decoder"
HEAD_FILE = "head.safetensors"
METRICS_FILE = "metrics.json"
MANIFEST = (
    f"{ENCODER_FOLDER}/{ADAPTER_CONFIG}",
    f"{ENCODER_FOLDER}/{ADAPTER_WEIGHTS}",
    f"{DECODER_FOLDER}/{ADAPTER_CONFIG}",
    f"{DECODER_FOLDER}/{ADAPTER_WEIGHTS}",
    f"{DECODER_FOLDER}/{HEAD_FILE}",
    BASELINES_FILE,
)
"""Files of a pair whose hashes stand in its config; figures and model card may be edited."""

SEPARATE_MANIFEST = (f"{DECODER_FOLDER}/{HEAD_FILE}", BASELINES_FILE)
"""The same of a pair of separate models, which refers to the other weights."""


@headers_once()
def load(
    name_or_path: str | Path,
    revision: str | None,
    devices: Devices,
    trust_remote_code: bool,
) -> Parts:
    """The parts of the pair that ``NLA.from_pretrained`` puts together."""
    folder, from_hub = find_folder(name_or_path, revision)
    config = NLAConfig.load(folder)
    check_files(config, folder)
    source = target_source(config, folder, from_hub)
    baselines = load_baselines(folder / BASELINES_FILE, config.d_model)
    metrics = read_json(folder / METRICS_FILE) if os.path.lexists(folder / METRICS_FILE) else {}
    origin = (place_of(name_or_path), revision)
    head_file = folder / DECODER_FOLDER / HEAD_FILE
    if config.encoder_weights is not None and config.decoder_weights is not None:
        sources = [source_of(part, folder, from_hub) for part in (config.encoder_weights, config.decoder_weights)]
        parts = assemble(
            config,
            Sources(source, *sources),
            lambda: load_head(config, head_file),
            devices,
            baselines,
            metrics,
            trust_remote_code,
        )
        return replace(parts, origin=origin)
    if isinstance(devices, Mapping):
        raise ArgumentError(
            f"devices {dict(devices)} for a pair whose roles share one base",
            "one device",
            "give device=..., or load a pair of separate models",
        )
    check_weights(source, config.target_weights, "the target")
    target_folder = local_folder(source)
    model, tokenizer = load_target(
        source,
        revision=config.target_revision if target_folder is None else None,
        dtype=AUTO if config.dtype == "bfloat16" else config.dtype,  # which a CPU may have to emulate
        device=devices,
        quantization=config.quantization,
        trust_remote_code=trust_remote_code,
    )
    config.check(tokenizer, model)
    return Parts(
        load_shared(model, config, folder, load_head(config, head_file)),
        tokenizer,
        config,
        baselines,
        metrics,
        target_folder=target_folder,
        origin=origin,
    )


def load_shared(model: PreTrainedModel, config: NLAConfig, folder: Path, head: Head) -> SharedBase:
    """A target with the two adapters of the pair in ``folder``, in evaluation mode on the target's device.

    Raises:
        ConfigError, WeightsError, NonFiniteError: an adapter is not plain LoRA, or its weights do not fit.
    """
    from peft import get_peft_model

    folders = [folder / part for part in (ENCODER_FOLDER, DECODER_FOLDER)]
    adapters = [read_adapter_config(part) for part in folders]
    names = [name for name, _ in model.named_modules()]
    for adapter, part in zip(adapters, folders, strict=True):
        resolve_patterns(adapter, names, part / ADAPTER_CONFIG)
        adapter.base_model_name_or_path = model.name_or_path
        adapter.fan_in_fan_out = is_transposed(model)  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):  # PEFT draws initial values that are then overwritten
        with peft_errors(folders[0]):
            shared: Any = get_peft_model(model, adapters[0], adapter_name=ENCODER_ADAPTER)
        with peft_errors(folders[1]):
            shared.add_adapter(DECODER_ADAPTER, adapters[1])
    for part, adapter in zip(folders, (ENCODER_ADAPTER, DECODER_ADAPTER), strict=True):
        load_adapter(part, shared, adapter)
    shared.eval()
    return SharedBase(shared, head.to(device_of(model)), config)


def find_folder(name_or_path: str | Path, revision: str | None = None) -> tuple[Path, bool]:
    """The pair's folder, and whether it came from the hub.

    Raises:
        ConfigError: there is no such pair.
        HubError: the hub lacks it, does not open it, or cannot be reached.
    """
    name = pair_folder(name_or_path)
    folder = folder_of(name)
    if folder is not None:
        return folder, False
    return download(name, revision), True


def target_source(config: NLAConfig, folder: Path, from_hub: bool) -> str:
    """What to load the target from: a folder's absolute path or a hub id.

    Raises:
        ConfigError: the target's folder is missing, or lies outside a downloaded pair.
    """
    refuse_outside(config.target, folder, from_hub)
    source = config.resolve_target(folder)
    if is_local(config.target) and folder_of(source) is None:
        raise ConfigError(
            f"no target at {(folder / config.target).resolve()}",
            f"the folder that the pair in {folder} was trained on",
            "put the target back beside the pair; a pair and its target move together",
        )
    return source


def manifest(config: NLAConfig) -> tuple[str, ...]:
    """Files that a pair's config vouches for: of separate models only what lies in the folder itself."""
    return SEPARATE_MANIFEST if config.separate else MANIFEST


def hash_files(folder: Path, names: Sequence[str] = MANIFEST) -> dict[str, str]:
    """SHA-256 of files that a pair's config vouches for, by their path in the folder.

    Raises:
        WeightsError: a file is missing or cannot be read.
    """
    return {name: sha256(folder / name) for name in names}


def check_files(config: NLAConfig, folder: Path) -> None:
    """Refuse a pair whose files are not those that its config was saved with.

    Raises:
        ConfigError: the config vouches for other files than a pair has, or an adapter's configuration was changed.
        WeightsError: weights are missing or were changed.
    """
    fix, names = "restore the folder from where it came, or save or train the pair again", manifest(config)
    if set(config.files) != set(names):
        got = f"{folder / CONFIG_FILE} with hashes of {sorted(config.files) or 'no files'}"
        raise ConfigError(got, f"hashes of {', '.join(names)}", fix)
    for name, digest in hash_files(folder, names).items():
        if digest != config.files[name]:
            kind = WeightsError if name.endswith(".safetensors") else ConfigError
            got = f"{folder / name}, which is truncated, edited or of another pair (sha256 {digest[:12]}…)"
            raise kind(got, f"the file that {CONFIG_FILE} was saved with ({config.files[name][:12]}…)", fix)


def load_head(config: NLAConfig, path: Path) -> Head:
    """The head of a pair's decoder, on the CPU.

    Raises:
        WeightsError, NonFiniteError: missing, corrupt, or not a head of this width.
    """
    d = config.d_model
    shapes = {"weight": (d, d)} | ({"bias": (d,)} if config.decoder.head_bias else {})
    tensors = load_tensors(path, expected_keys=shapes)
    wrong = [name for name, shape in shapes.items() if tensors[name].shape != shape]
    if wrong:
        raise WeightsError(
            f"{path}, where {wrong[0]} is {tuple(tensors[wrong[0]].shape)}",
            f"{shapes[wrong[0]]}, the target's width",
            "restore the head that was trained with this pair",
        )
    head = Head(d, config.decoder.head_bias)
    head.load_state_dict(tensors)
    return head


def save(parts: Parts, folder: Path, adapter_dtype: torch.dtype | None = None) -> None:
    """Write a pair as ``NLA.save_pretrained`` promises.

    Raises:
        ArgumentError: ``adapter_dtype`` is no floating-point type, or the pair is of whole models, without adapters.
    """
    if adapter_dtype is not None and not adapter_dtype.is_floating_point:
        got = f"adapter_dtype={adapter_dtype}"
        raise ArgumentError(got, "a floating-point type", "give torch.bfloat16 for half the size, or none")
    if adapter_dtype is not None and parts.config.separate:
        fix = "leave it out: weights of whole models are referred to where they lie"
        raise ArgumentError(f"adapter_dtype={adapter_dtype} with a pair of whole models", "a pair of adapters", fix)
    config = _moved(parts, folder)
    if not config.separate:  # a pair of whole models would load its encoder for it
        ends = config.end_ids or ends_of(unwrapped(parts.roles.model_of("encoder")), parts.tokenizer)
        config = replace(config, end_ids=ends or None)
    with replacing_files(folder, last=CONFIG_FILE) as new:
        if not config.separate:
            for part, adapter in ((ENCODER_FOLDER, ENCODER_ADAPTER), (DECODER_FOLDER, DECODER_ADAPTER)):
                save_adapter(new / part, cast("PeftModel", parts.roles.model), adapter, adapter_dtype)
                # PEFT notes where the base was loaded from: a path of this machine, of no use on another.
                content = read_json(new / part / ADAPTER_CONFIG)
                write_json(new / part / ADAPTER_CONFIG, {**content, "base_model_name_or_path": config.target})
        save_tensors(new / DECODER_FOLDER / HEAD_FILE, parts.roles.head_tensors())
        save_baselines(new / BASELINES_FILE, parts.baselines)
        write_json(new / METRICS_FILE, parts.metrics)
        if not (folder / CARD_FILE).exists():
            write_atomic(new / CARD_FILE, card(parts.metrics, config, local=parts.target_folder is not None))
        replace(config, files=hash_files(new, manifest(config))).save(new)


def _moved(parts: Parts, folder: Path) -> NLAConfig:
    """The pair's config with local targets and weights written relative to ``folder``, and hashed if they are not."""

    def relative(source: Path) -> str:
        path = os.path.relpath(source, folder.resolve())
        return path if path.startswith(".") else f"./{path}"

    config = parts.config
    if parts.target_folder is not None:
        digest = config.target_weights or hash_weights(parts.target_folder)
        config = replace(config, target=relative(parts.target_folder), target_weights=digest)
    for role, source in parts.weight_folders.items():
        name = f"{role}_weights"
        weights: WeightsConfig = getattr(config, name)
        weights = replace(weights, source=relative(source), sha256=weights.sha256 or hash_weights(source))
        config = replace(config, **{name: weights})
    return config
