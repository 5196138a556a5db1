"""The package is what pyproject.toml says it is."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
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
    newest = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
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
    assert commands[-1] == "exec make real-install test"
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


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution, built from a copy of the repository."""
    source, out = tmp_path_factory.mktemp("source") / "nla", tmp_path_factory.mktemp("dist")
    left_out = shutil.ignore_patterns(".git", ".venv", "__pycache__", "build", "dist", "runs", ".*_cache", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=left_out)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def packaged_files() -> set[str]:
    """What the packages and their data are, as the names that they have when installed."""
    names = set()
    for package in SETUPTOOLS["packages"]:
        top = package.split(".")[1] if package.split(".")[1:2] in (["train"], ["eval"]) else "nla"
        folder = ROOT / top / "/".join(package.removeprefix(FOLDERS[top]).strip(".").split("."))
        patterns = ["*.py", *SETUPTOOLS["package-data"].get(package, [])]
        for path in (path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
            names.add("/".join((*package.split("."), *path.relative_to(folder).parts)))
    return names


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_their_data_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == packaged_files()
    stated = re.search(r"and is (\d+) MB large", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert stated is not None and abs(wheel.stat().st_size / 1e6 - int(stated[1])) < 1


@pytest.mark.slow
def test_the_source_distribution_holds_tests_documents_and_what_builds_it(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    for folder in ("nla", "train", "eval", "tests", "docs", "benchmarks"):
        files = {path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        assert {str(path.relative_to(ROOT)) for path in files} <= names, folder
    assert {
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "constraints.txt",
        "real.txt",
        ".ci/run",
    } <= names


@pytest.mark.slow
def test_twine_finds_nothing_wrong(built: Path) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_alone_explains_a_text(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (tmp_path / "empty").mkdir()
    code = (
        "import sys, nla; from nla.cli.main import main; print(nla.__file__);"
        "sys.exit(main(['explain', 'In spring Anna left a red ribbon near the rat,', '--samples', '1']))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "installed")) and "resid_post.3" in done.stdout
