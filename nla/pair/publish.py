"""Publishing a pair on the hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from nla.config import CONFIG_FILE, NLAConfig, is_local, resolve
from nla.errors import ConfigError
from nla.pair.card import CARD_FILE, card, renewed
from nla.pair.folder import METRICS_FILE, check_files, manifest, save
from nla.pair.roles import Parts
from nla.storage.files import read_bytes, read_json, temporary_folder
from nla.storage.hub import download, hub_errors

_LONGEST_CARD = 2**20
"""Bytes of a model card."""


def push(
    parts: Parts, repo_id: str, private: bool = False, revision: str | None = None, commit_message: str | None = None
) -> str:
    """What ``NLA.push_to_hub`` promises; returns the commit's address."""
    _refuse_local(parts.weight_folders | ({"target": parts.target_folder} if parts.target_folder else {}))
    with temporary_folder() as folder:
        old = _loaded_from(parts.origin) / CARD_FILE if parts.origin else None
        if old is not None and old.is_file():
            shutil.copyfile(old, folder / CARD_FILE)
        save(parts, folder)
        return push_folder(folder, repo_id, private, revision, commit_message)


def push_folder(
    folder: Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Publish the files that a saved pair consists of, checked but not loaded; returns the commit's address.

    Of its card the header and what stands between the marks of the generated part are made anew, and the rest is kept.

    Raises:
        ConfigError, WeightsError: it is no whole pair; or the target or other weights lie in a folder of this machine.
        HubError, AccessError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    config = NLAConfig.load(folder)
    check_files(config, folder)
    _refuse_local(_local_parts(config, folder))
    metrics = read_json(folder / METRICS_FILE) if os.path.lexists(folder / METRICS_FILE) else {}
    old = _read_card(folder / CARD_FILE) if os.path.lexists(folder / CARD_FILE) else ""
    text = renewed(old, card(metrics, config, repo_id, local=False))
    contents: dict[str, str | bytes] = {name: str(folder / name) for name in (*manifest(config), CONFIG_FILE)}
    contents |= {METRICS_FILE: str(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else b"{}"}
    operations = [CommitOperationAdd(name, data) for name, data in (contents | {CARD_FILE: text.encode()}).items()]
    message = commit_message or f"Pair for {config.target} at {config.point}"
    with hub_errors(repo_id, revision):
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return str(commit.commit_url)


def _read_card(path: Path) -> str:
    """A card that is there.

    Raises:
        ConfigError: it is no text, or too long for one.
    """
    try:
        return read_bytes(path, _LONGEST_CARD).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"no readable {path} ({error})", "a text in UTF-8", "correct the card, or delete it"
        ) from error


def _loaded_from(origin: tuple[str, str | None]) -> Path:
    """The folder that a pair was loaded from; of one on the hub, a folder with its card."""
    name, revision = origin
    return Path(name) if Path(name).is_absolute() else download(name, revision, [CARD_FILE])


def _local_parts(config: NLAConfig, folder: Path) -> dict[str, Path]:
    """What a saved pair refers to in folders of this machine, by role."""
    sources = {"target": config.target}
    for role, weights in (("encoder", config.encoder_weights), ("decoder", config.decoder_weights)):
        sources |= {} if weights is None else {role: weights.source}
    paths = {role: Path(resolve(source, folder)) for role, source in sources.items()}
    return {role: path for role, path in paths.items() if is_local(sources[role]) or path.is_dir()}


def _refuse_local(places: Mapping[str, Path]) -> None:
    """Refuse to publish a pair that refers to folders of this machine.

    Raises:
        ConfigError: its target or other weights are local.
    """
    if places:
        raise ConfigError(
            f"a pair whose {', '.join(places)} lie in folders of this machine ({', '.join(map(str, places.values()))})",
            "a target on the hub, and weights on the hub",
            "publish these models first, load the pair's parts by their hub ids, and save it again",
        )
