"""YAML files that nobody should have to read: a kind, a seed and a good file in, bytes of hostile ones out."""

from __future__ import annotations

import random
from collections.abc import Iterator

import yaml

KINDS = ("aliases", "scalars", "keys", "bytes", "nesting")
NUMBERS = ["9" * 4000, "9" * 10_000, "-" + "9" * 10_000, "0." + "3" * 10_000, "1e" + "9" * 5000, "1" + "0" * 30, "1:30"]
NUMBERS += ["190:20:30", "1:30.5", ":".join(["1"] * 200), "010", "0o17", "0xFF", "1_000", "1e3", "1e999", "-1e999"]
NUMBERS += [
    ".nan",
    ".inf",
    "-.Inf",
    "nan",
    "inf",
    "0",
    "-1",
    "-0.0",
    "1.5",
    "4294967296",
    "9007199254740993",
    "1.8e308",
]
NUMBERS += ["5e-324", "'1'", "１", "٣"]
WORDS = ["2001-01-01", "2001-99-99", "2001-12-14t21:59:43.10-05:00", "yes", "no", "on", "~", "Null", "", "=", "<<"]
WORDS += [
    "x" * 300,
    "x" * 100_000,
    "\u202eabc",
    "\x85",
    "\ufeff1",
    "'",
    '"',
    '"\\ud800"',
    '"\\x00"',
    '"\\q"',
    "@a",
    "%a",
]
WORDS += [
    "|",
    "|9",
    "> x",
    "*x",
    "&x 1",
    "&x [*x]",
    ": x",
    "a: b: c",
    "- 1",
    "? [a] : b",
    "\x1b[31m",
    "`a`",
    "/" * 5000,
]
LISTS = ["[", "]", "{", "}", "[1, 2", "{a: 1", "[]", "{}", "[[]]", "{a: {b: {c: 1}}}", "{1: 2}", "{~: 1}", "[{a: 1}]"]
TAGS = ["!!int x", '!!int ""', "!!float _", "!!bool maybe", "!!null x", "!!timestamp x", "!!binary x", "!!set {a, b}"]
TAGS += ["!!omap [a: 1]", "!!pairs [a: 1]", "!!python/object/apply:os.system ['true']", "!!python/name:os.system"]
TAGS += ["!foo bar", "!<tag:yaml.org,2002:int> 3", "!!str 3", "!!binary aGVsbG8="]
SCALARS = [*NUMBERS, *WORDS, *LISTS, *TAGS]
KEYS = ["1: 2", "yes: 1", "~: 1", "[a]: 1", "? {a: 1}\n: 2", "<<: 1", "<<: [1]", "<<: {name: x}", "'': 1", "1.5: 2"]
KEYS += [
    "x" * 300 + ": 1",
    "x" * 100_000 + ": 1",
    "__class__: 1",
    "__init__: {a: 1}",
    "self: 1",
    '"\\u202e": 1',
    "2001-01-01: 1",
]


def hostile(kind: str, n: int, good: str, seed: int = 0) -> Iterator[bytes]:
    """``n`` files of one of ``KINDS``, most of them a good file with something in it."""
    draw = random.Random(f"{kind}/{seed}")
    make = {"aliases": _aliases, "scalars": _scalar, "keys": _key, "bytes": _bytes, "nesting": _nesting}[kind]
    for number in range(n):
        made = make(draw, good, number)
        yield made if isinstance(made, bytes) else made.encode()


def _aliases(draw: random.Random, good: str, number: int) -> str:
    """Aliases that unfold a million times, hold themselves, or merge without end."""
    depth, width, kind = (
        draw.randint(3, 12),
        draw.randint(2, 20),
        draw.choice(["list", "map", "merge", "merges", "self"]),
    )
    if kind == "self":
        return draw.choice(["a: &a [*a]", "a: &a {b: *a}", "&a [*a]", "a: &a\n  <<: *a", "a: &a {? *a : 1}"])
    flow = {"list": "[{}]", "map": "{{{}}}"}.get(kind, "{{{}}}")
    words = ["x"] * width if kind == "list" else [f"v{i}: 1" for i in range(width)]
    lines = [f"k0: &k0 {flow.format(', '.join(words))}"]
    for level in range(1, depth):
        before, items = f"*k{level - 1}", [f"*k{level - 1}"] * width
        body = {
            "list": f"[{', '.join(items)}]",
            "map": f"{{{', '.join(f'v{i}: {before}' for i in range(width))}}}",
            "merge": f"\n  <<: {before}\n  x{level}: {before}",
            "merges": f"\n  <<: [{', '.join(items)}]",
        }[kind]
        lines.append(f"k{level}: &k{level} {body}")
    return (good if draw.random() < 0.5 else "") + "\n".join(lines) + "\n"


def _scalar(draw: random.Random, good: str, number: int) -> str:
    """A value that is odd, at one of the keys."""
    lines = good.splitlines()
    places = [i for i, line in enumerate(lines) if line.partition(":")[1]]
    place = draw.choice(places)
    name = lines[place].partition(":")[0]
    end = place + 1
    while end < len(lines) and len(lines[end]) - len(lines[end].lstrip()) > len(name) - len(name.lstrip()):
        end += 1
    return "\n".join([*lines[:place], f"{name}: {SCALARS[number % len(SCALARS)]}", *lines[end:]]) + "\n"


def _key(draw: random.Random, good: str, number: int) -> str:
    """A key that is odd, unknown, or there twice."""
    names = list(yaml.safe_load(good))
    odd = draw.choice([*KEYS, f"{draw.choice(names)}: 1", f"{draw.choice(names)}x: 1", f"{draw.choice(names)}: []"])
    return good + ("  " if draw.random() < 0.3 else "") + odd + "\n"


def _bytes(draw: random.Random, good: str, number: int) -> bytes:
    """Damaged bytes: not UTF-8, NUL, other encodings, cut, mixed up."""
    data = bytearray(good.encode())
    at = draw.randrange(len(data))
    noise = bytes(draw.randrange(256) for _ in range(draw.randint(1, 30)))
    inserted = [noise, b"\0", b"\xe4\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x1b[2J", "\u2028".encode(), b"\t"]
    kind = draw.randrange(len(inserted) + 4)
    if kind < len(inserted):
        return bytes(data[:at] + inserted[kind] + data[at:])
    if kind == len(inserted):
        return good.encode(draw.choice(["utf-16", "utf-32", "utf-7"]))
    if kind == len(inserted) + 1:
        return bytes(data[:at])
    if kind == len(inserted) + 2:
        return bytes(data[:at] + data[at + draw.randint(1, 200) :])
    for _ in range(draw.randint(1, 20)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def _nesting(draw: random.Random, good: str, number: int) -> str:
    """Up to a hundred thousand of something inside of or after one another."""
    n = draw.choice([200, 1000, 10_000, 100_000])
    stairs = "".join(f"{' ' * level}a:\n" for level in range(min(n, 2000)))
    repeated = [
        "[",
        "{a: ",
        "- ",
        "? ",
        '{"a":',
        "!!x ",
        "&a ",
        "'",
        "--- a\n",
        "%TAG ! x\n",
        "&a a: *a\n",
        "{a: b}, ",
        "#",
    ]
    texts = [piece * n for piece in repeated]
    texts += ["[" * n + "]" * n, '{"a":' * n + "1" + "}" * n, f"a: {'[' * n}{']' * n}", f"[{'1,' * n}]", stairs]
    texts += ["\n".join(f"k{i}: {i}" for i in range(n)), 'a: "' + "\\n" * n + '"', "a: |\n" + " x\n" * n]
    return draw.choice(texts)
