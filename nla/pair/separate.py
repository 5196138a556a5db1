"""Pairs of separate models: full weights of encoder and decoder, referred to and loaded at first use."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nla.config import CONFIG_FILE, NLAConfig, WeightsConfig, is_local, resolve
from nla.errors import ArgumentError, ConfigError, TokenizerMismatchError, WeightsError
from nla.metrics import Baseline
from nla.models.load import load_target, load_truncated
from nla.organisms import hash_target, local_folder
from nla.pair.roles import ROLES, Head, Parts, SeparateModels, check_role
from nla.storage.files import folder_of
from nla.storage.hub import hub_errors
from nla.text.tokens import load_tokenizer

Devices = Mapping[str, str | torch.device] | str | torch.device | None
"""Where each role's model goes: one place for all, or places by role; a role that is not named goes to the first GPU if
there is one, else to the CPU."""

_PROBE = "A probe of 2 lines:\nspaces, Übung, \u32ce."


class Sources(NamedTuple):
    """What each model is loaded from: a folder's absolute path or a hub id."""

    target: str
    encoder: str
    decoder: str


def assemble(
    config: NLAConfig,
    sources: Sources,
    head: Callable[[], Head],
    device: Devices = None,
    baselines: dict[str, Baseline] | None = None,
    metrics: dict[str, object] | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
) -> Parts:
    """A pair of separate models. Only the encoder's tokenizer is loaded here; every model at its first use.

    Args:
        config: its ``encoder_weights`` and ``decoder_weights`` say revision and hash; its ``quantization`` is that of
            all three models.
        head: loads the decoder's head.
        verify: hold local weights against the hashes in ``config`` before they are used.

    Raises:
        ArgumentError: ``device`` names what is no role.
        HubError, AccessError: the encoder's tokenizer cannot be had from the hub.
    """
    places = place_roles(device)
    encoder_weights, decoder_weights = _weights(config.encoder_weights), _weights(config.decoder_weights)
    with hub_errors(sources.encoder, encoder_weights.revision):
        tokenizer = load_tokenizer(sources.encoder, encoder_weights.revision, trust_remote_code)
    loaded_as: dict[str, Any] = {"dtype": config.dtype, "quantization": config.quantization}
    whole = {**loaded_as, "trust_remote_code": trust_remote_code}

    def check(source: str, expected: str | None, what: str) -> None:
        if verify:
            check_weights(source, expected, what)

    def target() -> Any:
        check(sources.target, config.target_weights, "the target")
        revision = config.target_revision if local_folder(sources.target) is None else None
        model, of_target = load_target(sources.target, revision=revision, device=places["target"], **whole)
        config.check_model(model.config)
        check_same_ids(tokenizer, of_target, sources.encoder, sources.target)
        return model

    def encoder() -> Any:
        check(sources.encoder, encoder_weights.sha256, "the encoder")
        model, _ = load_target(sources.encoder, revision=encoder_weights.revision, device=places["encoder"], **whole)
        check_width(model.config, config, sources.encoder)
        return model

    def view() -> Any:
        check(sources.decoder, decoder_weights.sha256, "the decoder")
        revision, device = decoder_weights.revision, places["decoder"]
        backbone = load_truncated(sources.decoder, config.point, revision=revision, device=device, **loaded_as)
        check_width(backbone.config, config, sources.decoder)
        return backbone

    folders = {role: found for role, s in zip(ROLES, sources, strict=True) if (found := local_folder(s)) is not None}
    return Parts(
        SeparateModels(target, encoder, view, head),
        tokenizer,
        config,
        baselines or {},
        metrics or {},
        target_folder=folders.pop("target", None),
        weight_folders=folders,
    )


def place_roles(device: Devices) -> dict[str, str | torch.device | None]:
    """A place for each role; None: the first GPU if there is one, else the CPU.

    Raises:
        ArgumentError: a name that is no role.
    """
    if not isinstance(device, Mapping):
        return dict.fromkeys(ROLES, device)
    for name in device:
        check_role(name)
    return {role: device.get(role) for role in ROLES}


def source_of(weights: WeightsConfig, folder: Path, from_hub: bool) -> str:
    """What to load an encoder or decoder from, for a pair in ``folder``. See :func:`refuse_outside`.

    Raises:
        ConfigError: its folder is missing, or lies outside a downloaded pair.
    """
    refuse_outside(weights.source, folder, from_hub)
    source = resolve(weights.source, folder)
    if is_local(weights.source) and folder_of(source) is None:
        raise ConfigError(
            f"no weights at {(folder / weights.source).resolve()}",
            f"the folder that {CONFIG_FILE} in {folder} refers to",
            "put it back, or import the pair again from where its weights lie now",
        )
    return source


def expand(source: str | Path) -> str:
    """A folder's path with ``~`` written out; a hub id as it is.

    >>> expand("someone/model")
    'someone/model'
    """
    return os.path.expanduser(source)


def refuse_outside(source: str, folder: Path, from_hub: bool) -> None:
    """Refuse a path that leads out of the folder of a pair from the hub: it would read whatever lies there.

    Raises:
        ConfigError: it does.
    """
    where = Path(os.path.realpath(folder / source.replace("\0", "")))
    if from_hub and (is_local(source) or folder_of(where)) and not where.is_relative_to(folder.resolve()):
        raise ConfigError(
            f"a pair from the hub that refers to {source!r}",
            "a hub id, or a folder inside the pair",
            "do not use this pair, or download it and its target yourself and load the folder",
        )


def check_weights(source: str, expected: str | None, what: str) -> None:
    """Refuse a folder whose weights or config.json are not those that were imported.

    Raises:
        WeightsError: they are others, or a folder stands where a hub id was, or the reverse.
    """
    actual = hash_target(source)
    if actual != expected:
        names = [f"sha256 {digest[:12]}…" if digest else "on the hub" for digest in (actual, expected)]
        raise WeightsError(
            f"{what} in {source}, whose weights or config.json are others ({names[0]})",
            f"those that the pair was made with ({names[1]})",
            f"restore {what}, or train or import a pair for this one",
        )


def check_width(model_config: PretrainedConfig, config: NLAConfig, source: str) -> None:
    """Refuse a model of another width than the pair's.

    Raises:
        ConfigError: it has one.
    """
    width = model_config.get_text_config().hidden_size
    if width != config.d_model:
        raise ConfigError(
            f"a model of width {width} in {source}",
            f"d_model {config.d_model}",
            "use the encoder, decoder and target of one pair",
        )


def check_same_ids(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, where: str, other: str) -> None:
    """Refuse two tokenizers that do not give the same ids, special tokens included.

    Raises:
        TokenizerMismatchError: their vocabularies, or their ids of a probe, differ.
    """
    same_words = first.get_vocab() == second.get_vocab()
    if same_words and first(_PROBE)["input_ids"] == second(_PROBE)["input_ids"]:
        return
    what = "in how they split a text" if same_words else "in their vocabularies"
    raise TokenizerMismatchError(
        f"tokenizers in {where} and {other} that differ {what}",
        "one tokenizer for target, encoder and decoder",
        "use the encoder, decoder and target of one pair",
    )


def _weights(config: WeightsConfig | None) -> WeightsConfig:
    if config is None:
        raise ArgumentError("a config without full weights", "encoder_weights and decoder_weights", "name them")
    return config
