"""benchmarks/gpu.sh without a GPU: what it packs, what its table says of parts that fail, and a dry run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.tiny import load_benchmark

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
SHAPES = ("smollm2", "qwen2-1.5b", "qwen3-8b")


def run(*arguments: object, python: object = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": str(python)}
    return subprocess.run(["bash", SCRIPT, *map(str, arguments)], env=environment, capture_output=True, text=True)


def table(out: Path) -> dict[tuple[str, str], dict[str, object]]:
    return {(row["part"], row["measure"]): row for row in json.loads((out / "table.json").read_text())}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A folder with a wheel that stands for those of a registry, in parts of 2,000 bytes."""
    wheels = tmp_path / "folder" / "wheels"
    wheels.mkdir(parents=True)
    about = "standin-1.0.dist-info"
    with zipfile.ZipFile(wheels / "standin-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("standin.py", f"# {os.urandom(4000).hex()}\n")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: standin\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    assert run("pack", wheels.parent, 2000).returncode == 0
    return wheels.parent


@pytest.fixture
def pretender(tmp_path: Path) -> Path:
    """A Python that is the real one for all but the parts: of these one succeeds, one ends badly, one is killed."""
    path = tmp_path / "python"
    path.write_text(
        "#!/usr/bin/env bash\n"
        "case ${2:-} in\n"
        f"    machine) {sys.executable} -c 'import standin' && exit 0; exit 9 ;;\n"
        "    train) exit 7 ;;\n"
        "    smollm2) kill -KILL $$ ;;\n"
        f'    qwen*) exec {sys.executable} "$1" failed "$3" "$2" pretended ;;\n'
        "esac\n"
        f'exec {sys.executable} "$@"\n'
    )
    path.chmod(0o755)
    return path


def test_parts_are_of_the_size_asked_for_have_their_checksums_and_hold_what_was_packed(packed: Path) -> None:
    parts = sorted(packed.glob("part-*"))
    assert len(parts) > 5 and all(part.stat().st_size == 2000 for part in parts[:-1])
    assert 0 < parts[-1].stat().st_size <= 2000
    sums = dict(line.split()[::-1] for line in (packed / "SHA256SUMS").read_text().splitlines())
    assert sums == {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in parts}
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        names = [member.name for member in archive if member.isfile()]
        assert names == ["./standin-1.0-py3-none-any.whl"]
        whole = archive.extractfile(names[0])
        assert whole is not None
        assert whole.read() == (packed / "wheels" / "standin-1.0-py3-none-any.whl").read_bytes()


def test_packing_again_leaves_no_part_of_before(packed: Path) -> None:
    next((packed / "wheels").iterdir()).write_bytes(b"small")
    assert run("pack", packed, 20_000).returncode == 0
    assert [part.name for part in packed.glob("part-*")] == ["part-00"]


def test_what_travels_is_all_that_nla_needs_but_what_the_machine_has_in_the_versions_tested() -> None:
    gpu, root = load_benchmark("gpu"), SCRIPT.parents[1]
    travels = dict(line.split("==") for line in gpu.wheels())
    needed = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    names = {canonicalize_name(Requirement(text).name) for text in needed["dependencies"]}
    assert names - gpu.AT_HAND <= set(travels) and "gguf" in travels and not gpu.AT_HAND & set(travels)
    assert not [name for name in travels if name.startswith("nvidia") or name in ("triton", "pytest", "openai")]
    tested = dict(line.split("==") for line in (root / "constraints.txt").read_text().split() if "==" in line)
    assert travels.items() <= tested.items()


def test_each_parts_failure_is_a_line_and_not_the_end(packed: Path, pretender: Path, tmp_path: Path) -> None:
    result = run("--dry-run", tmp_path / "out", packed, python=pretender)
    rows = table(tmp_path / "out")
    said = {part: re.sub(r"after \d+ s", "after n s", str(row["note"])) for (part, _), row in rows.items()}
    # The part `machine` imported the wheel that travelled, and has nothing to say.
    assert said == {
        "train": "ended with 7: see log.txt",
        "smollm2": "killed after n s of 1100",
        "qwen2-1.5b": "pretended",
        "qwen3-8b": "pretended",
    }
    assert result.returncode == 1 and all(row["value"] is None for row in rows.values())
    assert result.stdout == (tmp_path / "out" / "table.md").read_text() and result.stdout.count("**failed**") == 4


def test_a_damaged_part_is_a_line_too(packed: Path, pretender: Path, tmp_path: Path) -> None:
    part = packed / "part-01"
    part.write_bytes(bytes(2000))
    assert run("--dry-run", tmp_path / "out", packed, python=pretender).returncode == 1
    rows = table(tmp_path / "out")
    assert ("setup", "whole") in rows and rows["machine", "whole"]["note"] == "ended with 9: see log.txt"
    assert ("qwen3-8b", "whole") in rows and "part-01: FAILED" in (tmp_path / "out" / "log.txt").read_text()


def test_a_word_that_it_does_not_know_is_refused_with_its_usage(tmp_path: Path) -> None:
    result = run("measure", tmp_path)
    assert result.returncode == 2 and "benchmarks/gpu.sh prepare FOLDER" in result.stderr


def test_a_line_is_on_disk_at_once_and_an_error_is_one(tmp_path: Path) -> None:
    out = load_benchmark("gpu").Out(tmp_path, "part")
    out.line("rate", 1234.5678, "tokens/s", "a | b")
    with out.or_failed("other"):
        raise ValueError("no\nroom")
    assert (tmp_path / "table.md").read_text().splitlines()[2:] == [
        "| part | rate | 1235 | tokens/s | a / b |",
        "| part | other | **failed** |  | ValueError: no room |",
    ]
    assert table(tmp_path)["part", "rate"]["value"] == 1234.5678 and table(tmp_path)["part", "other"]["value"] is None


@pytest.mark.slow
def test_a_dry_run_measures_all_that_the_run_does(tmp_path: Path) -> None:
    result = run("--dry-run", tmp_path)
    assert result.returncode == 0, (tmp_path / "log.txt").read_text()[-4000:]
    rows = table(tmp_path)
    for shape in SHAPES:
        for measure, unit in (("extraction", "tokens/s"), ("explanation", "positions/s"), ("joint step", "rollouts/s")):
            row = rows[shape, measure]
            assert isinstance(row["value"], float) and row["value"] > 0 and row["unit"] == unit
            assert "GB at most" in str(row["note"])
        assert all(f"{phase} " in str(rows[shape, "joint step: phases"]["value"]) for phase in ("sampling", "decoder"))
    for stage in ("sample", "extract", "describe", "warmstart", "joint"):
        assert "times the recipe's" in str(rows["train", f"{stage}: seconds"]["note"])
    assert isinstance(rows["train", "sampled FVE, held out"]["value"], float)
    parts = sorted(tmp_path.glob("pair.tgz-*"))
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        assert {"pair/nla_config.json", "pair/decoder/head.safetensors"} <= set(archive.getnames())
    assert len(list(tmp_path.iterdir())) <= 8
