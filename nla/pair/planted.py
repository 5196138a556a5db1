"""A LoRA adapter on the target while it is read: a fine-tuned target, audited with the pair of its base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from nla.errors import ArgumentError
from nla.models.adapter import TARGET_ADAPTER, attach, fill, fitted, located
from nla.pair.roles import Roles, SharedBase


@contextlib.contextmanager
def planted(roles: Roles, folder: str | Path | None) -> Iterator[None]:
    """While active, the role "target" is the base with this adapter; encoder and decoder stay as they are.

    Other threads wait for the pair meanwhile: they would read the target with the adapter on.

    Args:
        folder: a PEFT folder, or a hub id, with a plain LoRA adapter; None: the base itself.

    Raises:
        ConfigError: no such adapter, not plain LoRA, or modules that the target does not have.
        WeightsError, NonFiniteError: weights that are missing, corrupt or of other shapes.
        ArgumentError: an adapter is planted already.
        TargetError, AccessError: the hub does not give it.
    """
    if folder is None:
        yield
        return
    folder, target = located(folder), roles.model_of("target")
    if any(f".{TARGET_ADAPTER}." in name for name, _ in target.named_parameters()):
        raise ArgumentError("a second adapter on the target", "one at a time", "leave the other context first")
    flags = [(parameter, parameter.requires_grad) for parameter in target.parameters()]
    try:
        with roles.alone(), _shared(cast(SharedBase, roles), folder) if roles.shared else _alone(target, folder):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _shared(roles: SharedBase, folder: Path) -> Iterator[None]:
    """The adapter beside the pair's own on the shared base, which the role "target" switches on."""
    model: Any = roles.model
    config, state = fitted(folder, model)
    try:
        model.add_adapter(TARGET_ADAPTER, config)
        fill(folder, model, state)
        roles.target_adapter = TARGET_ADAPTER
        yield
    finally:
        roles.target_adapter = None
        if TARGET_ADAPTER in model.peft_config:
            model.delete_adapter(TARGET_ADAPTER)


@contextlib.contextmanager
def _alone(target: Any, folder: Path) -> Iterator[None]:
    """The adapter on a target that is a model of its own."""
    tuned = attach(target, folder)
    try:
        yield
    finally:
        tuned.unload()
