"""A LoRA adapter on the target while it is read: a fine-tuned target, audited with the pair of its base."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla.errors import ArgumentError, ConfigError
from nla.formats.native import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter, read_adapter_config, sha256
from nla.organisms import ADAPTERS

if TYPE_CHECKING:
    from nla.autoencoder import NLA

TARGET_ADAPTER = "target"


@contextlib.contextmanager
def planted(nla: NLA, folder: str | Path | None) -> Iterator[NLA]:
    """While active, the role "target" is the base with this adapter; encoder and decoder stay as they are.

    Args:
        folder: a PEFT folder with a plain LoRA adapter; None: the base itself.

    Raises:
        ConfigError: no such adapter, not plain LoRA, or modules that the target does not have.
        WeightsError, NonFiniteError: weights that are missing, corrupt or of other shapes.
        ArgumentError: an adapter is planted already.
    """
    if folder is None:
        yield nla
        return
    if nla.target_adapter is not None:
        raise ArgumentError("a second adapter on the target", "one at a time", "leave the other context first")
    model: Any = nla.model
    config = read_adapter_config(folder)
    # The active adapter and every requires_grad are put back: PEFT makes a new adapter's weights trainable.
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        try:
            model.add_adapter(TARGET_ADAPTER, config)
        except ValueError as error:
            raise ConfigError(
                f"{folder}, which does not fit the target ({error})",
                "an adapter of the pair's target",
                "train the adapter on this target, or use the pair of the other one",
            ) from error
        load_adapter(folder, model, TARGET_ADAPTER)
        nla.target_adapter = TARGET_ADAPTER
        yield nla
    finally:
        nla.target_adapter = None
        if TARGET_ADAPTER in model.peft_config:
            model.delete_adapter(TARGET_ADAPTER)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def adapter_folder(name: str | Path | None) -> str | Path | None:
    """An embedded adapter by its name, such as "switchboard/goal"; whatever else is a folder already."""
    return ADAPTERS.get(str(name), name)


def adapter_hash(folder: str | Path | None) -> str | None:
    """What identifies an adapter: a hash of its configuration and weights; None for none.

    Raises:
        WeightsError: a file is missing.
    """
    if folder is None:
        return None
    parts = "".join(sha256(Path(folder) / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    return hashlib.sha256(parts.encode()).hexdigest()
