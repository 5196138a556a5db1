"""The package is what pyproject.toml says it is."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {"nla": "nla", "train": "nla.train", "eval": "nla.eval"}


def test_the_package_list_equals_the_folders_with_an_init_file():
    found = set()
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *inner)))
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)
    assert SETUPTOOLS["package-dir"] == {package: folder for folder, package in FOLDERS.items()}


def test_every_package_data_pattern_matches_a_file():
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = next(f for f, p in reversed(FOLDERS.items()) if package == p or package.startswith(f"{p}."))
        inner = package.removeprefix(FOLDERS[folder]).strip(".").replace(".", "/")
        for pattern in patterns:
            matched = [path for path in (ROOT / folder / inner).glob(pattern) if path.is_file()]
            assert matched, f"{package}: {pattern} matches no file"


def test_versions_agree():
    version = PROJECT["project"]["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert importlib.metadata.version("nla") == version
    assert newest is not None and newest[1] == version


def test_constraints_pin_what_is_required():
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split() if "==" in line
    )
    project = PROJECT["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[\[<>=!~; ]", requirement)[0].lower() for requirement in required}
    assert names <= set(pinned), f"constraints.txt lacks {sorted(names - set(pinned))}"


def test_ci_runs_the_test_command_of_the_readme():
    script, readme = (ROOT / ".ci/run"), (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [line for line in script.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert commands[-1] == "exec make test"
    assert re.search(r"^make test\b", readme, re.MULTILINE)
    assert os.access(script, os.X_OK)


def test_importing_nla_is_light() -> None:
    code = "import nla, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules; nla.NLAError"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_an_unknown_public_name_is_refused_and_the_known_ones_listed() -> None:
    import nla

    with pytest.raises(AttributeError, match="NLAConfig"):
        nla.Autoencoder  # noqa: B018
    assert set(nla.__all__) <= set(dir(nla))
