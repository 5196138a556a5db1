"""Models with names of their own, small ones with planted behaviour and a real one: from a name to its folder.

The one resolver of embedded names. Every command that takes a target, a pair or an adapter asks here first; a name that
is not embedded is a folder or a hub id, and comes back as it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from nla.errors import ConfigError
from nla.organisms import couplets, smollm2, switchboard
from nla.storage.files import folder_of
from nla.storage.hub import is_hub_id
from nla.storage.schema import shown

TARGETS = {
    "couplets/planner": couplets.PLANNER,
    "couplets/plain": couplets.PLAIN,
    "switchboard/target": switchboard.TARGET,
}
"""Folders of the embedded targets."""
PACKAGED = {smollm2.NAME: smollm2}
"""Targets that come in packages of their own, and what finds them there: a name that is the same on every machine."""
PAIRS = {"couplets/planner": couplets.PAIR, "switchboard/target": switchboard.PAIR}
"""Folders of the embedded pairs, by their targets."""
PAIRS |= {name: package.PAIR for name, package in PACKAGED.items() if package.PAIR.is_dir()}
ADAPTERS = {
    f"{organism}/{config.parent.name}": config.parent
    for organism, folder in (("switchboard", switchboard.ADAPTERS_FOLDER), (smollm2.NAME, smollm2.ADAPTERS_FOLDER))
    for config in folder.glob("*/adapter_config.json")
}
"""Folders of the embedded adapters on targets: plants and their shams."""
RUBRICS = {f"switchboard/{file.stem}": file for file in switchboard.RUBRICS_FOLDER.glob("*.yaml")}
"""What audits of those plants look for."""

ORGANISMS = {name.split("/")[0]: name for name in {**PAIRS, **PACKAGED}}
"""A model's name alone means the target, or the pair, whichever a command takes."""

_NEAR = 0.88
"""How much of a name is an embedded one's, of 1, for it to be meant: "couplet" of "couplets", but no "triplets"."""

_N_NAMED = 5
_WITH_ARTICLE = {"target": "a target", "pair": "a pair", "adapter": "an adapter"}


def full_name(name: str | Path) -> str:
    """The whole name of an embedded target; anything else as it is.

    >>> full_name("couplets"), full_name("couplets/plain"), full_name("someone/model")
    ('couplets/planner', 'couplets/plain', 'someone/model')
    """
    return ORGANISMS.get(str(name), str(name))


def is_target(name: str | Path) -> bool:
    """Whether a name is one of a target, whatever lies under it in the working directory.

    >>> is_target("couplets"), is_target("smollm2"), is_target("switchboard/goal")
    (True, True, False)
    """
    return full_name(name) in TARGETS or full_name(name) in PACKAGED


def target_folder(name: str | Path) -> str:
    """Where a target is: a named one's folder, such as of "couplets" or "smollm2"; of a GGUF file, that of its
    safetensors, which are made if need be.

    Raises:
        ConfigError: an embedded name that is none of a target.
        TargetError, MissingExtraError, WeightsError, StorageError: see :func:`nla.storage.gguf.safetensors_of` and
            :func:`nla.organisms.smollm2.target`.
    """
    if str(name) in PACKAGED:
        return str(PACKAGED[str(name)].target())
    if str(name).lower().endswith(".gguf") and folder_of(name) is None:
        from nla.storage.gguf import safetensors_of  # torch, which only this needs

        return str(safetensors_of(name))
    return _found(name, "target", TARGETS)


def noted_target(name: str | Path) -> str:
    """What a pair or a store notes of its target: a packaged one's name; of others where they are.

    >>> noted_target("smollm2"), noted_target("someone/model")
    ('smollm2', 'someone/model')
    """
    return str(name) if str(name) in PACKAGED else target_folder(name)


def local_folder(target: str | Path) -> Path | None:
    """The folder that a noted target is; None: a packaged one, whatever lies under its name, or a hub id."""
    return None if str(target) in PACKAGED else folder_of(target)


def hash_target(target: str | Path) -> str | None:
    """What the weights of a noted target are known by; None for a hub id, whose revision says it.

    Raises:
        WeightsError, ConfigError: see :func:`nla.storage.hashes.hash_weights`.
    """
    from nla.storage.hashes import hash_weights  # torch

    return PACKAGED[str(target)].SHA256 if str(target) in PACKAGED else hash_weights(target)


def pair_folder(name: str | Path) -> str:
    """Where a pair is: an embedded one's folder, such as of "couplets" or "switchboard"; a folder; a hub id.

    Raises:
        ConfigError: an embedded name that is none of a pair, or what can be no pair's name at all.
    """
    source = _found(name, "pair", PAIRS)
    if folder_of(source) is None and not is_hub_id(source):
        named = ", ".join(target.split("/")[0] for target in PAIRS)
        raise ConfigError(
            f"no pair {shown(source)}",
            f"a folder, a hub id such as 'someone/pair', or one of {named}",
            "check the name; a pair is made with `nla train RECIPE`",
        )
    return source


def adapter_folder(name: str | Path | None) -> str | None:
    """Where an adapter on a target is: an embedded one's folder, such as of "switchboard/goal"; None for None.

    Raises:
        ConfigError: an embedded name that is none of an adapter.
    """
    return None if name is None else _found(name, "adapter", ADAPTERS)


def _found(name: str | Path, kind: str, folders: Mapping[str, Path]) -> str:
    """The folder of an embedded name of a kind; what is neither embedded nor meant to be comes back as it is.

    Names that begin with an organism's, and those that nearly are embedded ones, are never asked of a hub.
    """
    full = full_name(name)
    if full in folders or folder_of(name) is not None:
        return str(folders.get(full, name))
    kinds = {
        **dict.fromkeys(RUBRICS, "rubric"),
        **dict.fromkeys(ADAPTERS, "adapter"),
        **dict.fromkeys((*TARGETS, *PACKAGED), "target"),
    }
    names = [short for short, whole in ORGANISMS.items() if whole in folders or kind == "target"]
    names += [] if kind == "pair" else [embedded for embedded in sorted(folders) if embedded not in names]
    organism = full.split("/")[0]
    meant, nearest = (difflib.get_close_matches(str(name), known, 1, _NEAR) for known in ([*names, *kinds], names))
    if not meant and organism not in ORGANISMS:
        return str(name)
    got, fix = f"no embedded {kind} {shown(name)}", f"did you mean {nearest[0]}?" if nearest else "check the name"
    if full in kinds:
        got = f"{str(name)!r}, an embedded {kinds[full]}, where {_WITH_ARTICLE[kind]} is expected"
        fix = f"give an adapter of {organism}, or none" if kind == "adapter" else f"give {organism}"
        if kind == "pair" and full in PACKAGED:
            fix = f"make a pair on it: nla recipe {full} > my.yaml, and nla train my.yaml"
    raise ConfigError(got, f"a folder, a hub id, or {', '.join(names[:_N_NAMED])}{' …' * (len(names) > _N_NAMED)}", fix)
