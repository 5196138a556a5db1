"""Hashes of files, of weights and of JSON-like content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from nla.errors import ConfigError, WeightsError
from nla.storage.files import MAX_JSON_BYTES, folder_of, open_regular, read_bytes, read_json, write_json
from nla.storage.tensors import read_header


def digest(content: object) -> str:
    """SHA-256 of JSON-like content, whatever the order of its keys."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
"""Where transformers keeps a model's weights: the index of several files, or the only one."""
_REMEMBERED_BYTES = 64 * 2**20
"""Files of so many bytes or more are not hashed again while they stay as they are."""
_REMEMBERED_FILES = 1000


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, all of which are read: about a second for each GB.

    Before that the header of safetensors is held against the file, and the size of JSON against the most that is read.

    Raises:
        WeightsError: the file is missing, cannot be read, or is visibly not what its name says.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            read_header(path)
        elif path.suffix == ".json":
            return hashlib.sha256(read_bytes(path, MAX_JSON_BYTES)).hexdigest()
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        fix = f"restore {path.name} from where the folder came, or train the pair again"
        raise WeightsError(f"no readable {path} ({error.strerror})", "a file there", fix) from error


def hash_weights(source: str | Path) -> str | None:
    """SHA-256 over config.json and the weights of a model's folder; None for a hub id, whose revision says it.

    The weights are the files that the index names, or model.safetensors, or, with neither, all safetensors; copies of
    them in another layout do not count. Every byte does, since a fine-tuned model may differ anywhere: about a second
    for each GB, once for each large file (see :func:`remembered_sha256`).

    Raises:
        WeightsError: a file that the index names is missing or cannot be read.
        ConfigError: the index is not JSON.
    """
    folder = folder_of(source)
    if folder is None:
        return None
    if (folder / INDEX_FILE).is_file():
        weights = read_json(folder / INDEX_FILE).get("weight_map")
        names = {Path(str(name)).name for name in weights.values()} if isinstance(weights, dict) else set()
    else:
        names = {SINGLE_FILE} if (folder / SINGLE_FILE).is_file() else {p.name for p in folder.glob("*.safetensors")}
    names |= {"config.json"} if (folder / "config.json").is_file() else set()
    listing = "\n".join(f"{remembered_sha256(folder / name)} {name}" for name in sorted(names))
    return hashlib.sha256(listing.encode()).hexdigest()


def cache_folder() -> Path:
    """Where what can be made again is kept for the user: nla in the cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nla"


def remembered_sha256(path: Path) -> str:
    """SHA-256 of a file; of a large one, what it was when a file of this place, size, times and inode was last hashed.

    The notes lie in nla/sha256.json of the user's cache folder; where they cannot be read or written, files are hashed
    each time.

    Raises:
        WeightsError: the file is missing or cannot be read.
    """

    def mark() -> list[int]:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]

    try:
        before = mark()
    except OSError:
        return sha256(path)  # says what is wrong
    if before[0] < _REMEMBERED_BYTES:
        return sha256(path)
    notes = cache_folder() / "sha256.json"
    key = str(path.resolve())
    known = _notes(notes)
    if known.get(key, [None])[0] == before:
        return str(known[key][1])
    digest = sha256(path)
    with contextlib.suppress(OSError):  # StorageError is one
        if mark() == before:
            known = {name: entry for name, entry in _notes(notes).items() if name != key}
            write_json(notes, dict([*known.items(), (key, [before, digest])][-_REMEMBERED_FILES:]))
    return digest


def _notes(path: Path) -> dict[str, list[Any]]:
    """The notes of :func:`remembered_sha256` that have their form; none if there are none, or they are damaged."""
    try:
        content = read_json(path)
    except ConfigError:
        return {}
    return {name: entry for name, entry in content.items() if isinstance(entry, list) and len(entry) == 2}
