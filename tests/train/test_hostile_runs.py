"""A damaged file in a recipe's folder is done again, or refused with what to delete: never a fault of nla."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nla.cli.console import OK, USAGE
from nla.cli.main import main

SETTINGS = {"extract.n_documents": 40, "extract.n_eval_documents": 8, "extract.n_other_positions": 1, "pair.rank": 2}
SETTINGS |= {f"warmstart.{name}": 2 for name in ("encoder_steps", "decoder_steps", "eval_every")}
SETTINGS |= {"warmstart.batch_size": 4, "warmstart.save_every": 1}
RAW = [b"", b"[", b"[]", b"null", b"{}", b"3", b'"x"', b"[" * 100_000, b'{"a":' * 100_000, b'{"a": 1e999}', b"\xff\xfe"]
RAW += [b'{"a": NaN}', b"\0" * 50, b'{"a": ' + b"9" * 10_000 + b"}", b"\xef\xbb\xbf{}"]
ODD: list[Any] = [
    None,
    True,
    "x",
    [],
    {},
    -1,
    1e308,
    10**30,
    [[]],
    {"a": {"b": 1}},
    "../..",
    float("inf"),
    float("nan"),
]
FILES = {
    "describe/stage.json": "describe",
    "describe/started.json": "describe",
    "extract/manifest.json": "warmstart",
    "describe/train.jsonl": "warmstart",
    "describe/eval.jsonl": "warmstart",
    "extract/train/activations.safetensors": "warmstart",
    "extract/baselines.safetensors": "warmstart",
    "warmstart/encoder/metrics.jsonl": "warmstart",
    "warmstart/encoder/run.json": "warmstart",
    "warmstart/encoder/checkpoint-2/manifest.json": "warmstart",
    "warmstart/encoder/checkpoint-2/weights.safetensors": "warmstart",
}
"""Files of a run, and the stage that is done again and reads them."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train(out, "warmstart") == OK
    return out


def train(out: Path, until: str) -> int:
    chosen = [word for name, value in (SETTINGS | {"out": out}).items() for word in ("--set", f"{name}={value}")]
    return main(["train", "couplets", "--until", until, *chosen])


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(content: Any, draw: random.Random) -> bytes:
    """JSON with another value, or none, at one place."""
    content = copy.deepcopy(content)
    *path, last = draw.choice(list(places(content)))
    inner = content
    for key in path:
        inner = inner[key]
    if draw.random() < 0.2 and isinstance(inner, dict):
        del inner[last]
    else:
        inner[last] = draw.choice(ODD)
    return json.dumps(content).encode()


def damaged(name: str, data: bytes, n: int) -> Iterator[bytes]:
    draw = random.Random(name)
    yield from RAW
    for _ in range(n):
        at = draw.randrange(len(data))
        if name.endswith(".json"):
            yield changed(json.loads(data), draw)
        elif name.endswith(".jsonl"):
            lines = data.splitlines()
            row = draw.randrange(len(lines))
            yield b"\n".join([*lines[:row], changed(json.loads(lines[row]), draw), *lines[row + 1 :]])
        else:
            yield draw.choice(
                [data[:at], data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :], draw.randbytes(200) + data]
            )


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_run_is_no_fault_of_nla(
    name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = set()
    for number, data in enumerate(damaged(name, (finished / name).read_bytes(), 4)):
        out = tmp_path / str(number)
        shutil.copytree(finished, out)
        (out / FILES[name] / "stage.json").unlink()
        (out / name).write_bytes(data)
        capsys.readouterr()
        code = train(out, FILES[name])
        said = capsys.readouterr().err.splitlines()
        assert code in (OK, USAGE), (number, data[:100], said[-5:])
        assert code == OK or ("Next: " in said[-1] and len(said[-1]) < 1500), (number, said[-1:])
        codes.add(code)
        shutil.rmtree(out)
    assert name.endswith((".jsonl", "started.json", "stage.json")) or USAGE in codes
