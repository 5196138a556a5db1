"""The manifest of a finished store: what was read from where, how much there is of it, and every shard's hash."""

from __future__ import annotations

import os
import re
import typing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from nla.errors import ConfigError, StoreError
from nla.storage.files import read_json
from nla.storage.schema import Problem, checked, shown
from nla.store.shards import ShardEntry

MANIFEST_FILE, SETTINGS_FILE = "manifest.json", "store.json"
STORE_VERSION = 1
Count = Annotated[int, Field(ge=0)]


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
    d_model: Annotated[int, Field(gt=0)]
    """Their width."""
    counts: dict[str, int]
    """Of documents: seen, read, left out and why, cut, duplicates; and the tokens that were run."""
    n: dict[str, Count]
    """Vectors of each split."""
    n_documents: dict[str, Count]
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

    def __post_init__(self) -> None:
        rows = {split: sum(entry.rows for entry in entries) for split, entries in self.shards.items()}
        documents = {split: sum(entry.documents for entry in entries) for split, entries in self.shards.items()}
        if rows != self.n or documents != self.n_documents:
            got = f"shards of {shown(rows)} vectors and {shown(documents)} documents"
            raise _refuse(Problem(got, f"n = {shown(self.n)} and n_documents = {shown(self.n_documents)}"))
        if "mean" not in self.norms:
            raise _refuse(Problem(f"norms = {shown(self.norms)}", "the mean among them"))

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
            begun = os.path.exists(Path(folder) / SETTINGS_FILE)
            what = "a store that is not finished" if begun else "no store"
            fix = "run the command that makes it again: it continues" if begun else "correct the folder"
            raise StoreError(f"{what} in {folder}", f"a readable {MANIFEST_FILE} there", fix) from error
        if content.get("version") != STORE_VERSION or set(content) != set(typing.get_type_hints(cls)):
            raise StoreError(
                f"{path} of version {shown(content.get('version'))}",
                f"a store of version {STORE_VERSION}",
                "install the version of nla that wrote it, or read the corpus again",
            )
        fix = "restore the file from where the store came; or delete it and run the command that made it again"
        try:
            shards = {
                split: [entry_from_json(entry) for entry in _checked(entries, list)]
                for split, entries in _checked(content["shards"], dict).items()
            }
            return cls(**{**content, "shards": shards})
        except StoreError as error:
            got = f"{path}, which is malformed ({error.got})"
            raise StoreError(got, error.expected, fix) from error


def entry_from_json(content: object) -> ShardEntry:
    """A shard as a manifest or record lists it.

    Raises:
        StoreError: it is none, or a file outside of the store.
    """
    fields = _checked(content, dict)
    if set(fields) != set(ShardEntry._fields):
        raise _refuse(Problem(f"a shard with {shown(sorted(fields))}", f"exactly {', '.join(ShardEntry._fields)}"))
    entry = ShardEntry(**fields)
    numbers = (entry.rows, entry.documents, entry.bytes)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise _refuse(Problem(f"a shard of {shown(numbers)}", "numbers of rows, documents and bytes"))
    if re.fullmatch(r"[\w-]+/\d{6,12}\.safetensors", str(entry.file)) is None:
        raise _refuse(
            Problem(f"the shard {shown(entry.file)}", "a file of the store, such as train/000000.safetensors")
        )
    if re.fullmatch(r"[0-9a-f]{64}", str(entry.sha256)) is None:
        raise _refuse(Problem(f"a shard with sha256 = {shown(entry.sha256)}", "64 digits and letters a to f"))
    return entry


def _checked(content: Any, kind: type) -> Any:
    if not isinstance(content, kind):
        raise _refuse(Problem(shown(content), f"a {'mapping' if kind is dict else 'list'} of shards"))
    return content


@checked(_refuse)
class Record:
    """What a finished chunk left behind."""

    chunk: int
    counts: dict[str, int]
    """Of its documents, by any names."""
    shards: dict[str, ShardEntry]
    """Its file in each split that has one."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict, which :meth:`load` reads."""
        return {**asdict(self), "shards": {split: entry._asdict() for split, entry in self.shards.items()}}

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record.

        Raises:
            StoreError: it is none.
        """
        try:
            content = read_json(path)
            if set(content) != {"chunk", "counts", "shards"}:
                raise _refuse(Problem(shown(content), "chunk, counts and shards"))
            shards = _checked(content["shards"], dict).items()
            return cls(**{**content, "shards": {split: entry_from_json(entry) for split, entry in shards}})
        except (ConfigError, StoreError) as error:
            got = f"{path}, which is malformed ({error.got})"
            raise StoreError(
                got, error.expected, "delete it and run the command again: it reads the chunk again"
            ) from error
