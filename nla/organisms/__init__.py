"""Small models with planted, verified behaviour that come with the library: from a name to its folder.

The one resolver of embedded names. Every command that takes a target, a pair or an adapter asks here first; a name that
is not embedded is a folder or a hub id, and comes back as it is.
"""

from __future__ import annotations

from pathlib import Path

from nla.organisms import couplets, switchboard
from nla.storage.files import folder_of

TARGETS = {
    "couplets/planner": couplets.PLANNER,
    "couplets/plain": couplets.PLAIN,
    "switchboard/target": switchboard.TARGET,
}
"""Folders of the embedded targets."""
PAIRS = {"couplets/planner": couplets.PAIR, "switchboard/target": switchboard.PAIR}
"""Folders of the embedded pairs, by their targets."""
_CONFIGS = switchboard.ADAPTERS_FOLDER.glob("*/adapter_config.json")
ADAPTERS = {f"switchboard/{config.parent.name}": config.parent for config in _CONFIGS}
"""Folders of the embedded adapters on targets: plants and their shams."""
RUBRICS = {f"switchboard/{file.stem}": file for file in switchboard.RUBRICS_FOLDER.glob("*.yaml")}
"""What audits of those plants look for."""

ORGANISMS = {name.split("/")[0]: name for name in PAIRS}
"""An organism's name alone means its target, or its pair, whichever a command takes."""


def full_name(name: str | Path) -> str:
    """The whole name of an embedded target; anything else as it is.

    >>> full_name("couplets"), full_name("couplets/plain"), full_name("someone/model")
    ('couplets/planner', 'couplets/plain', 'someone/model')
    """
    return ORGANISMS.get(str(name), str(name))


def target_folder(name: str | Path) -> str:
    """Where a target is: an embedded one's folder, such as of "couplets" or "couplets/plain"; of a GGUF file, that of
    its safetensors, which are made if need be.

    Raises:
        TargetError, MissingExtraError, WeightsError, StorageError: see :func:`nla.storage.gguf.safetensors_of`.
    """
    if str(name).lower().endswith(".gguf") and folder_of(name) is None:
        from nla.storage.gguf import safetensors_of  # torch, which only this needs

        return str(safetensors_of(name))
    return str(TARGETS.get(full_name(name), name))


def pair_folder(name: str | Path) -> str:
    """Where a pair is: an embedded one's folder, such as of "couplets" or "switchboard"."""
    return str(PAIRS.get(full_name(name), name))


def adapter_folder(name: str | Path | None) -> str | None:
    """Where an adapter on a target is: an embedded one's folder, such as of "switchboard/goal"; None for None."""
    return None if name is None else str(ADAPTERS.get(str(name), name))
