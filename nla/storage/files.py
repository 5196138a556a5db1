"""Files written whole or not at all, and JSON and YAML read safely."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from nla.errors import ConfigError, NLAError, ParseError, StorageError, visible

MAX_JSON_BYTES, MAX_JSON_VALUES, MAX_JSON_DEPTH, MAX_DIGITS = 64 * 2**20, 2_000_000, 100, 300
"""Of a JSON file that is read whole. A number of more digits is no float either."""
MAX_YAML_BYTES, MAX_YAML_NODES = 200_000, 100_000
"""Of a YAML text, above which reading takes seconds; and its values, aliases written out, above which a few lines could
fill the memory."""
_OF_TAGS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
"""What PyYAML lets through of tags such as ``!!bool x`` and ``!!int ""``."""
_TEXT, _MERGE, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("str", "merge", "int", "float"))
_PLAIN = {_TEXT, _MERGE, *(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "seq", "map"))}


_NAME_IT = "the path of a file", "add a name to it"


@contextlib.contextmanager
def replacing(path: Path, private: bool = False) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on a clean exit it takes ``path``'s place, or else it goes.

    Args:
        private: for its owner alone (mode 0600), also while it is written.

    Raises:
        StorageError: the disk is full or the folder cannot be written; an earlier file is as it was.
    """
    if not path.name or path.is_dir():
        raise StorageError(f"{str(path)!r}, a folder, where a file is to be written", *_NAME_IT)
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
    except (OSError, SafetensorError, UnicodeEncodeError) as error:
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
    if not folder.resolve().name:
        got = f"{str(folder)!r}, which has no folder beside it"
        raise StorageError(got, "a folder inside of another", "choose another folder")
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
    except (OSError, SafetensorError, UnicodeEncodeError) as error:
        raise StorageError(
            f"{type(error).__name__} while writing {folder}: {error}",
            "room and permission to write the whole folder",
            "free space or choose another folder and run again",
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def try_folder(folder: Path | None) -> None:
    """Refuse a folder for results in which nothing can be written: before the work, and not after it.

    A folder that is not there is tried under another name, beside which other processes may make and fill it.

    Raises:
        StorageError: no permission, no room, a file of that name, or no name for a folder. What was made to try it is
            gone again.
    """
    if folder is None:
        return
    try:
        there = next((part for part in (folder, *folder.parents) if os.path.lexists(part)), folder)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=there, ignore_cleanup_errors=True) as name:
            inner = name / folder.relative_to(there)
            inner.mkdir(parents=True, exist_ok=True)
            (inner / "0").write_bytes(b"\0")
    except (OSError, ValueError) as error:
        got = f"the folder {str(folder)!r}, in which nothing can be written ({error})"
        raise StorageError(got, "one to write into, with room", "choose another folder, or free space") from error


def try_file(path: Path | None) -> None:
    """Refuse a file for results that cannot be written; see :func:`try_folder`."""
    if path is not None and path.is_dir():
        raise StorageError(f"{str(path)!r}, a folder, where a file is to be written", *_NAME_IT)
    try_folder(None if path is None else path.parent)


def write_atomic(path: str | Path, data: bytes | str, private: bool = False) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename. Text is UTF-8; parents are made.

    Args:
        private: for its owner alone (mode 0600).

    Raises:
        StorageError: the disk is full or the folder cannot be written; the old file, if any, is intact.
    """
    try:
        content = data.encode() if isinstance(data, str) else data
    except UnicodeEncodeError as error:
        got = f"a text with {data[error.start]!r}, half of a character, for {path}"
        raise StorageError(got, "whole characters", "rename the folder or file that it names, or correct it") from error
    with replacing(Path(path), private) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, content: object) -> None:
    """Write ``content`` as indented JSON, atomically.

    Raises:
        StorageError: see :func:`write_atomic`.
    """
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def folder_of(source: str | Path) -> Path | None:
    """The folder that a source names, with ``~`` written out; None: it names none, whatever it is.

    >>> folder_of("a" * 300), folder_of("a\\0b"), folder_of("someone/model")
    (None, None, None)
    """
    path = os.path.expanduser(source)
    return Path(path) if os.path.isdir(path) else None


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder that is gone again afterwards.

    Raises:
        StorageError: nothing can be written where temporary files go.
    """
    place = "none of the usual folders"
    try:
        place = tempfile.gettempdir()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            yield Path(name)
    except OSError as error:
        inside = any(str(path).startswith(place) for path in (error.filename, error.filename2) if path is not None)
        if isinstance(error, NLAError) or not (inside or error.filename is None):
            raise
        got = f"no room for temporary files ({error.strerror} in {place})"
        raise StorageError(got, "room for a few files", "free space, or set TMPDIR to another folder") from error


@contextlib.contextmanager
def open_regular(path: str | Path) -> Iterator[BufferedReader]:
    """A file opened to be read; what is no regular file, such as a pipe or a device, is refused and not waited for.

    Raises:
        OSError: there is no such file, it is of another kind, or it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # NUL in a name, or what no name of a file can hold
        raise OSError(errno.EINVAL, str(error)) from error
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        yield file


def read_bytes(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises:
        OSError: see :func:`open_regular`; or it is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"{size:,} bytes, where {most:,} are the most")
        return file.read(most)


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: the file is missing, not JSON (see :func:`parse_json`), or not an object.
    """
    path = Path(path)
    restore = f"restore {path.name} from where the folder came, or make the folder again"
    try:
        content = parse_json(read_bytes(path, MAX_JSON_BYTES).decode())
    except OSError as error:
        raise ConfigError(
            got=f"no readable {path} ({error.strerror})", expected="a JSON file there", fix=restore
        ) from error
    except ValueError as error:
        raise ConfigError(got=f"{path}, which is not JSON ({error})", expected="a JSON file", fix=restore) from error
    if not isinstance(content, dict):
        raise ConfigError(got=f"{path} holding a {type(content).__name__}", expected="a JSON object", fix=restore)
    return content


def parse_json(text: str) -> Any:
    """The value of a JSON text whose keys stand once, whose texts are whole characters, and whose size is bounded.

    Raises:
        ValueError: it is anything else.
    """
    if sum(map(text.count, "[{,")) > MAX_JSON_VALUES:
        raise ValueError(f"more than {MAX_JSON_VALUES:,} values")
    try:
        content = json.loads(text, object_pairs_hook=_once, parse_int=_integer)
        depth, level = 0, _containers([content])
        while level:
            depth += 1
            if depth > MAX_JSON_DEPTH:
                raise RecursionError
            level = [inner for value in level for inner in _containers(value)]
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH}") from error
    return content


def read_json_lines(path: str | Path) -> Iterator[Any]:
    """The values of a file with one JSON text a line, each read as :func:`parse_json` reads.

    A line ends in a line feed alone: the other characters that end one in Unicode, such as U+2028, stand in texts.

    Raises:
        OSError, ValueError: the file cannot be read, or a line is no such text.
    """
    with open(path, "rb") as lines:
        for line in lines:
            yield parse_json(line.decode())


def _containers(values: Any) -> list[Any]:
    """The mappings and lists among the values of one."""
    return [v for v in (values.values() if isinstance(values, dict) else values) if isinstance(v, (dict, list))]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {twice[:60]!r} twice")
    return content


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def read_yaml(path: str | Path, foreign: bool = False) -> Any:
    """What a YAML file holds, read as :func:`parse_yaml` reads.

    Raises:
        ParseError: the file cannot be read, or :func:`parse_yaml` refuses its text.
    """
    try:
        text = read_bytes(path, MAX_YAML_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ParseError(f"no readable {path} ({error})", "a YAML file there", "name another") from error
    return parse_yaml(text, str(path), foreign)


class _PlainLoader(yaml.SafeLoader):
    """YAML 1.1 but for its odd numbers and dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as in the class above)
        first: [rule for rule in rules if rule[0].rpartition(":")[2] not in ("int", "float", "timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_PlainLoader.add_implicit_resolver(
    _INT, re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)\Z"), list("-+0123456789")
)
_PlainLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, source: str, foreign: bool = False) -> Any:
    """The plain values of a YAML text, those that JSON has: keys that are texts, no objects, no endless aliases.

    What YAML 1.1 takes for a date, a number to base 60 (1:30) or one to base 8 (010) is a text here, and 1e-4 is a
    number.

    Args:
        foreign: it was written for other programs: all that PyYAML's safe loader takes, as it takes it.

    Raises:
        ParseError: it is anything else; the message names ``source`` and the line.
    """
    loader = None
    try:
        if len(text) > MAX_YAML_BYTES or sum(map(text.count, "\n,[{")) > MAX_YAML_NODES:
            raise ValueError(f"more than {MAX_YAML_BYTES:,} characters or {MAX_YAML_NODES:,} values")
        loader = (yaml.SafeLoader if foreign else _PlainLoader)(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, {}, plain=not foreign)
        return loader.construct_document(node)
    except (yaml.YAMLError, *_OF_TAGS, RecursionError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = source if mark is None else f"{source}, line {mark.line + 1}"
        problem = getattr(error, "problem", None) or ("nested too deep" if isinstance(error, RecursionError) else error)
        got = f"{where}, which is not YAML ({visible(str(problem))[:120]})"
        expected = "YAML" if foreign else "plain YAML whose keys are texts"
        raise ParseError(got, expected, "correct it; a special mark goes in quotes") from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_nodes(node: yaml.Node, sizes: dict[int, int], plain: bool) -> int:
    """How many values a node stands for, aliases written out; too many are refused, and so are long numbers.

    Args:
        plain: odd tags, keys that are no texts and keys that stand twice are refused, too.
    """
    if id(node) in sizes:
        if sizes[id(node)] == 0:  # not counted to its end: it holds itself
            raise yaml.MarkedYAMLError(problem="an alias inside of what it stands for", problem_mark=node.start_mark)
        return sizes[id(node)]
    sizes[id(node)], size = 0, 1
    if plain and node.tag not in _PLAIN:
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag!r}", problem_mark=node.start_mark)
    if node.tag in (_INT, _FLOAT) and len(node.value) > MAX_DIGITS:
        problem = f"a number of {len(node.value)} characters"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if plain and key.tag not in (_TEXT, _MERGE):
                raise yaml.MarkedYAMLError(problem="a key that is no text", problem_mark=key.start_mark)
            if plain and key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value[:40]!r} twice", problem_mark=key.start_mark)
            if plain:
                keys.add(key.value)
            size += _check_nodes(key, sizes, plain) + _check_nodes(value, sizes, plain)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check_nodes(value, sizes, plain) for value in node.value)
    if size > MAX_YAML_NODES:
        raise yaml.MarkedYAMLError(problem=f"more than {MAX_YAML_NODES:,} values", problem_mark=node.start_mark)
    sizes[id(node)] = size
    return size
