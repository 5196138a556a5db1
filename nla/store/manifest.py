"""The manifest of a finished store: what was read from where, how much there is of it, and every shard's hash."""

from __future__ import annotations

import typing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nla.errors import ConfigError, StoreError
from nla.storage.files import read_json
from nla.storage.schema import Problem, checked, shown
from nla.store.shards import ShardEntry

MANIFEST_FILE, SETTINGS_FILE = "manifest.json", "store.json"
STORE_VERSION = 1


def _refuse(problem: Problem) -> StoreError:
    return StoreError(problem.got, problem.expected, "make the store again")


@checked(_refuse)
class Manifest:
    """What a finished store says of itself."""

    target: str
    """Folder or hub id of the target."""
    revision: str | None
    """Commit, branch or tag of the target on the hub."""
    tokenizer_hash: str
    """Fingerprint of its tokenizer."""
    point: str
    """Where vectors were read, such as "resid_post.20"."""
    dtype: str
    """Of the stored vectors: the target's own."""
    d_model: int
    """Their width."""
    counts: dict[str, int]
    """Of documents: seen, read, left out and why, cut, duplicates; and the tokens that were run."""
    n: dict[str, int]
    """Vectors of each split."""
    n_documents: dict[str, int]
    """Documents of each split."""
    norms: dict[str, float]
    """Mean and quantiles of the L2 norms of the training vectors."""
    variance: dict[str, float]
    """Of the unit-normalised training vectors, all ("global") and by stratum: FVE's denominators."""
    mean_norm: dict[str, float]
    """L2 norm of their mean, which baselines.safetensors holds."""
    settings: dict[str, Any]
    """How documents and positions were chosen."""
    baselines_sha256: str
    """Of baselines.safetensors."""
    shards: dict[str, list[ShardEntry]]
    """The files of each split, in order."""
    version: int = STORE_VERSION
    """Of the layout."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict, which :meth:`load` reads."""
        shards = {split: [entry._asdict() for entry in entries] for split, entries in self.shards.items()}
        return {**asdict(self), "shards": shards}

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """The manifest of a finished store.

        Raises:
            StoreError: there is none, it is of another version, or malformed.
        """
        path = Path(folder) / MANIFEST_FILE
        try:
            content = read_json(path)
        except ConfigError as error:
            begun = (Path(folder) / SETTINGS_FILE).exists()
            what = "a store that is not finished" if begun else "no store"
            fix = "run the command that makes it again: it continues" if begun else "correct the folder"
            raise StoreError(f"{what} in {folder}", f"a readable {MANIFEST_FILE} there", fix) from error
        if content.get("version") != STORE_VERSION or set(content) != set(typing.get_type_hints(cls)):
            raise StoreError(
                f"{path} of version {content.get('version')!r}",
                f"a store of version {STORE_VERSION}",
                "install the version of nla that wrote it, or read the corpus again",
            )
        fix = "restore the file from where the store came; or delete it and run the command that made it again"
        try:
            shards = {split: _entries(entries) for split, entries in content["shards"].items()}
            return cls(**{**content, "shards": shards})
        except (TypeError, AttributeError) as error:
            raise StoreError(f"{path}, which is malformed ({error})", "a manifest as it was written", fix) from error
        except StoreError as error:
            got = f"{path}, which is malformed ({error.got})"
            raise StoreError(got, error.expected, fix) from error


def _entries(content: Any) -> list[ShardEntry]:
    """Shards from JSON; their values are checked with the manifest's."""
    if not isinstance(content, list):
        raise TypeError(f"shards: {shown(content)}")
    return [ShardEntry(**entry) for entry in content]
