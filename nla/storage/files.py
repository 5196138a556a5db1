"""Files written whole or not at all, and JSON read safely."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nla.errors import ConfigError, StorageError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on a clean exit it takes ``path``'s place, otherwise it is removed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            got=f"{type(error).__name__} while writing {path}: {error}",
            expected="room and permission to write the whole file",
            fix="free space or choose another folder and run again; an earlier version of the file is untouched",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename. Text is UTF-8; parents are made.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the old file, if any, is intact.
    """
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically.

    Raises:
        StorageError: see :func:`write_atomic`.
    """
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: the file is missing, not JSON, or not an object.
    """
    path = Path(path)
    restore = f"restore {path.name} from where the folder came, or make the folder again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(got=f"no readable {path}", expected="a JSON file there", fix=restore) from error
    except ValueError as error:
        raise ConfigError(got=f"{path}, which is not JSON ({error})", expected="a JSON file", fix=restore) from error
    if not isinstance(content, dict):
        raise ConfigError(got=f"{path} holding a {type(content).__name__}", expected="a JSON object", fix=restore)
    return content
