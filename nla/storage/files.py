"""Files written whole or not at all, and JSON and YAML read safely."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from nla.errors import ConfigError, ParseError, StorageError, visible

MAX_YAML_NODES = 100_000
"""Values of a YAML text, aliases written out: above it, a few lines could fill the memory."""
_OF_TAGS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
"""What PyYAML lets through of tags such as ``!!bool x`` and ``!!int ""``."""
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


@contextlib.contextmanager
def replacing(path: Path, private: bool = False) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on a clean exit it takes ``path``'s place, or else it goes.

    Args:
        private: for its owner alone (mode 0600), also while it is written.

    Raises:
        StorageError: the disk is full or the folder cannot be written; an earlier file is as it was.
    """
    if not path.name or path.is_dir():
        got = f"{str(path)!r}, a folder, where a file is to be written"
        raise StorageError(got, "the path of a file", "add a name to it")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if private:
            temporary.touch(mode=0o600)
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


@contextlib.contextmanager
def replacing_files(folder: Path, last: str, outdated: Sequence[str] = ()) -> Iterator[Path]:
    """Give an empty folder beside ``folder``; on a clean exit its files take their places in ``folder``.

    A file that vouches for the others comes last, so that a mixture of old and new files is never vouched for.

    Args:
        last: name of the files that are moved last.
        outdated: patterns of earlier files, relative to ``folder``, that are removed before any is moved.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    new = folder.resolve().with_name(f".{folder.resolve().name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        new.mkdir(parents=True)
        yield new
        for old in [path for pattern in outdated for path in folder.glob(pattern)]:
            old.unlink()
        files = sorted(path for path in new.rglob("*") if path.is_file())
        for source in sorted(files, key=lambda path: path.name == last):
            destination = folder / source.relative_to(new)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, destination)
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{type(error).__name__} while writing {folder}: {error}",
            "room and permission to write the whole folder",
            "free space or choose another folder and run again",
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_atomic(path: str | Path, data: bytes | str, private: bool = False) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename. Text is UTF-8; parents are made.

    Args:
        private: for its owner alone (mode 0600).

    Raises:
        StorageError: the disk is full or the folder cannot be written; the old file, if any, is intact.
    """
    with replacing(Path(path), private) as temporary:
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
    except (ValueError, RecursionError) as error:
        raise ConfigError(got=f"{path}, which is not JSON ({error})", expected="a JSON file", fix=restore) from error
    if not isinstance(content, dict):
        raise ConfigError(got=f"{path} holding a {type(content).__name__}", expected="a JSON object", fix=restore)
    return content


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds, read as :func:`parse_yaml` reads.

    Raises:
        ParseError: the file cannot be read, or :func:`parse_yaml` refuses its text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ParseError(f"no readable {path} ({type(error).__name__})", "a YAML file there", "name another") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """The plain values of a YAML text: no objects, keys that are texts, and no aliases that unfold without end.

    Raises:
        ParseError: it is anything else; the message names ``source`` and the line.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, {})
        return loader.construct_document(node)
    except (yaml.YAMLError, *_OF_TAGS, RecursionError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = source if mark is None else f"{source}, line {mark.line + 1}"
        problem = getattr(error, "problem", None) or ("nested too deep" if isinstance(error, RecursionError) else error)
        got = f"{where}, which is not YAML ({visible(str(problem))[:120]})"
        raise ParseError(got, "plain YAML whose keys are texts", "correct it; a special mark goes in quotes") from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_nodes(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values a node stands for, aliases written out; it refuses too many, and keys that are no texts."""
    if id(node) in sizes:
        if sizes[id(node)] == 0:  # not counted to its end: it holds itself
            raise yaml.MarkedYAMLError(problem="an alias inside of what it stands for", problem_mark=node.start_mark)
        return sizes[id(node)]
    sizes[id(node)], size = 0, 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag not in (_TEXT, _MERGE):
                raise yaml.MarkedYAMLError(problem="a key that is no text", problem_mark=key.start_mark)
            size += 1 + _check_nodes(value, sizes)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check_nodes(value, sizes) for value in node.value)
    if size > MAX_YAML_NODES:
        raise yaml.MarkedYAMLError(problem=f"more than {MAX_YAML_NODES:,} values", problem_mark=node.start_mark)
    sizes[id(node)] = size
    return size
