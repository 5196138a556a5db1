"""A valid file in, a hostile one out: what may be wrong with JSON, YAML, safetensors and with files as such.

Each mutation takes its choices from a ``random.Random``, so a case is known by its seed.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

Mutation = Callable[[Path, Random], None]

_SLOT = "@slot@"
DEEP, LONG = 100_000, 10_000
NUMBERS = ["-1", "0", "0.5", "1e999", "NaN", "-Infinity", "1e-320", "2147483648", "9223372036854775808", "1" + "0" * 30]
NUMBERS += ["9" * LONG, "-" + "9" * 400, "1000000", "7", "true", "null"]
TEXTS = [
    "",
    "x",
    "\x00",
    "\ud800",
    "\x1b[2J\u202e\n",
    "x" * 2_000_000,
    "9" * LONG,
    "(a+)+$",
    "{",
    "{explanation}",
    "%s",
]
TEXTS += [
    "../../../../etc/passwd",
    "/dev/zero",
    "~",
    ".",
    "someone/model",
    "a" * 300,
    "{{ ''.__class__ }}",
    "\U000e0001",
]
CONTAINERS = ["[]", "{}", '[["x"]]', '{"a": {"b": 1}}', "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP]
CONTAINERS += ["[" + "0," * 300_000 + "0]", "[NaN, -1]", '{"x": null, "x": 1}']
RAW = [*NUMBERS, *map(json.dumps, TEXTS), *CONTAINERS]
"""Values in JSON's spelling, some of which no JSON writer would write."""

BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10) if n else '1, 2'}]\n" for n in range(9))
YAMLS = [BOMB, "a: &a [*a]", "!!python/object:os.system x", "a: !!int x", "? {}\n: 1", "a: 2020-99-99", "- 1", "1: 2"]
YAMLS += [
    "%",
    "a: b: c",
    "a: !!binary x",
    "[" * 5000,
    "yes",
    "a: .nan",
    "a: 0o777777777777",
    "\t",
    "a: 1:2:3:4",
    "<<: 1",
]


TEMPLATES = ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 10**10 }}"]
TEMPLATES += [
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__ }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
]
TEMPLATES += ["{{ messages[9].content }}", "{% include 'x' %}", "{{ 1 / 0 }}", "{%", ""]
TEMPLATES += [
    "{{ messages[0].content * 100000 }}",
    "{{ cycler.__init__.__globals__ }}",
    "x" * 1_000_000,
    "{{ 9 ** 9 ** 9 }}",
]


def json_value(path: Path, random: Random) -> None:
    """One value of a JSON (or JSON-like YAML) file replaced, dropped, renamed or written twice."""
    content = (json.loads if path.suffix == ".json" else yaml.safe_load)(path.read_text())
    places = _places(content)
    said = [place for place in places if place[0][place[1]] not in (None, False, [], {})]
    parent, key = random.choice(said if said and random.random() < 0.7 else places)
    act, raw = random.choice(["replace"] * 6 + ["drop", "rename", "twice"]), random.choice(RAW)
    if act == "replace":
        parent[key] = _SLOT
    elif act == "drop":
        del parent[key]
    elif isinstance(parent, dict):
        name = random.choice(TEXTS) if act == "rename" else key + _SLOT
        parent[name] = parent.pop(key) if act == "rename" else parent[key]
    text = json.dumps(content)
    text = text.replace(f'{key}{_SLOT}": ', f'{key}": {raw}, "{key}": ') if act == "twice" else text
    path.write_text(text.replace(f'"{_SLOT}"', raw))


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = content.keys() if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    return [place for key in keys for place in [(content, key), *_places(content[key])]]


def content_as_such(path: Path, random: Random) -> None:
    """A file that is cut, doubled, of another encoding, or nothing of its kind at all."""
    old = path.read_bytes()
    cut = random.randrange(len(old) + 1)
    choices = [
        b"",
        old[:cut],
        old + old,
        b"\xef\xbb\xbf" + old,
        old.decode(errors="replace").encode("utf-16"),
        b"\x00" * 100,
        b"null",
    ]
    choices += [
        b"[]",
        b'"x"',
        b"1",
        RAW[-1].encode(),
        CONTAINERS[4].encode(),
        CONTAINERS[5].encode(),
        old[:cut] + b"\xff",
    ]
    choices += [_flipped(old, random), b"[" + old + b"]", b"9" * LONG, random.randbytes(200)]
    path.write_bytes(random.choice(choices))


def yaml_as_such(path: Path, random: Random) -> None:
    """A YAML file with a piece of YAML in it that bombs, runs code, or is of no type that it says."""
    piece, old = random.choice(YAMLS), path.read_text()
    path.write_text(random.choice([piece, f"{piece}\n{old}", f"{old}\n{piece}", old.replace(": ", f": {piece} ", 1)]))


def template(path: Path, random: Random) -> None:
    """A chat template that loops, grows, refuses, reaches for what it must not have, or is none."""
    path.write_text(random.choice([random.choice(TEMPLATES), path.read_text() + random.choice(TEMPLATES)]))


def file_as_such(path: Path, random: Random) -> None:
    """Something else where a file belongs: nothing, a folder, a link, a pipe, a device, or 64 GB of nothing."""
    old = path.read_bytes()
    act = random.choice(
        ["gone", "empty", "folder", "fifo", "zero", "null", "loop", "dangling", "outside", "sparse", "mode"]
    )
    if act in ("sparse", "empty"):
        os.truncate(path, 0 if act == "empty" else 64 * 2**30)
        return
    if act == "mode":
        path.chmod(0)
        return
    path.unlink()
    if act == "folder":
        path.mkdir()
    elif act == "fifo":
        os.mkfifo(path)
    elif act == "outside":  # the same bytes elsewhere: nothing is wrong with them
        elsewhere = path.with_name(f"{path.name}.elsewhere")
        elsewhere.write_bytes(old)
        path.symlink_to(elsewhere)
    elif act != "gone":
        path.symlink_to({"zero": "/dev/zero", "null": "/dev/null", "loop": path.name, "dangling": "nothing"}[act])


def read_tensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_tensors(path: Path, header: dict[str, Any] | str | bytes, data: bytes, length: int | None = None) -> None:
    """A safetensors file from its parts, which need not fit each other."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    raw += b" " * (-len(raw) % 8 if isinstance(header, dict) else 0)  # as safetensors has it, though it need not be
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def tensor_header(path: Path, random: Random) -> None:
    """A safetensors file whose header lies about types, shapes, places, names or its own length."""
    header, data = read_tensors(path)
    name = random.choice([key for key in header if key != "__metadata__"])
    entry, other = header[name], random.choice([e for key, e in header.items() if key != "__metadata__"])
    start, end = entry["data_offsets"]
    act = random.choice(["shape", "dtype", "offsets", "name", "length", "bytes", "raw", "many", "metadata", "tail"])
    if act == "shape":
        size = math.prod(entry["shape"])
        shapes = [[], [size], [1, size], [-1], [0], [2**62], [2**31, 2**31, 2**31], [0.5], ["x"], [*entry["shape"], 1]]
        entry["shape"] = random.choice([*shapes, entry["shape"][::-1], [*entry["shape"], 0], "x", None, [10**400]])
    elif act == "dtype":
        entry["dtype"] = random.choice(["F16", "BF16", "F64", "I64", "I8", "BOOL", "F8_E4M3", "F4", "C64", "x", "", 7])
    elif act == "offsets":
        end = random.choice([end + 4, end - 4, start, -1, 2**63, 2**64 - 1, len(data) + 10**12, 0.5, "x"])
        entry["data_offsets"] = random.choice(
            [[start, end], [end, start], other["data_offsets"], [-8, end], [], [start]]
        )
    elif act == "name":
        header[random.choice([*TEXTS, "a\nb", "../x", "base_model.model.x.lora_A.weight"])] = header.pop(name)
    elif act == "many":
        more = {f"x{n}": {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2} for n in range(100_000)}
        header = header | more
    elif act == "metadata":
        header["__metadata__"] = random.choice(
            [{"sha256": "x"}, {"sha256": 7}, "x", None, {"format": "x" * 10**6}, [1]]
        )
    elif act == "tail":
        data = random.choice([data[:-4], data + b"\x00" * 4, b"", data[: len(data) // 2]])
    text = json.dumps(header)
    if act == "length":
        write_tensors(path, text, data, random.choice([0, 1, 2, len(text) - 1, len(text) + 1, 2**40, 2**63, 2**64 - 1]))
        return
    if act == "bytes":
        text = _flipped(text.encode(), random)
    elif act == "raw":
        text = text.replace(json.dumps(entry), random.choice(RAW), 1)
    write_tensors(path, header if text == json.dumps(header) and random.random() < 0.9 else text, data)


def tensor_values(path: Path, random: Random) -> None:
    """A whole safetensors file with other values: NaN, infinity, numbers that overflow in the next step, nothing."""
    header, data = read_tensors(path)
    names = [key for key, entry in header.items() if key != "__metadata__" and entry["data_offsets"][1] > 0]
    start, end = header[random.choice(names)]["data_offsets"]
    values = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, 0.0, 1e20, -1.0]
    piece = struct.pack("<f", random.choice(values)) if random.random() < 0.7 else random.randbytes(8)
    where = random.choice([0, random.randrange(max(1, (end - start) // 8)) * 8, None])
    new = (piece * (end - start))[: end - start] if where is None else piece
    at = start + (where or 0)
    write_tensors(path, header, data[:at] + new + data[at + len(new) :])


def _flipped(old: bytes, random: Random) -> bytes:
    """Some bytes with one to three bits turned."""
    new = bytearray(old)
    for _ in range(random.randint(1, 3)):
        new[random.randrange(len(new))] ^= 1 << random.randrange(8)
    return bytes(new)


def mutate(path: Path, random: Random) -> None:
    """Make a file hostile, in a way that fits what it is."""
    kinds: dict[str, list[Mutation]] = {
        ".json": [json_value] * 8,
        ".yaml": [json_value] * 5 + [yaml_as_such] * 3,
        ".safetensors": [tensor_header] * 5 + [tensor_values] * 3,
        ".jinja": [template] * 5,
    }
    random.choice([*kinds.get(path.suffix, [content_as_such]), content_as_such, file_as_such])(path, random)
