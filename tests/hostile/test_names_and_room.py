"""Paths that no file can have, places that cannot be written, and disks that fill up while something is saved."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from nla import NLA
from nla.cli import main
from nla.cli.console import USAGE
from nla.errors import NLAError, StorageError
from nla.formats import kitft_export
from nla.formats.parquet import export_parquet
from nla.models.load import load_target
from nla.pair.folder import find_folder
from nla.storage import files
from nla.store.reader import SPLITS, Store
from nla.store.shards import Document
from nla.store.writer import StoreWriter
from nla.text.tokens import Span
from tests.helpers.disk import limited_file_size
from tests.helpers.tiny import make_model, make_pair, make_tokenizer
from tests.hostile.kinds import ABOUT

NAMES = {
    "long": "a" * 300,
    "deep": "a/" * 3000,
    "nul": "a\0b",
    "not UTF-8": os.fsdecode(b"a\xff"),
    "newline": "a\nb",
    "colour": "\x1b[2Jx",
    "turned": "x\u202ey\u2066",
    "nobody": "~nobody-of-this-name/x",
    "empty": "",
    "device": "/dev/null",
    "long id": "someone/" + "b" * 300,
}
LOADERS: dict[str, Callable[[str], object]] = {
    "pair": NLA.from_pretrained,
    "folder": find_folder,
    "target": load_target,
    "store": Store.open,
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_nothing_is_a_typed_error(name: str, loader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NLAError) as caught:
        LOADERS[loader](NAMES[name])
    assert len(str(caught.value)) < 3_100


COMMANDS = [
    ["info", "@"],
    ["explain", "the cat", "--pair", "@"],
    ["extract", "@", "corpus.jsonl", "--out", "o", "--point", "resid_post.1"],
    ["import", "kitft", "@", "pair", "--out", "o"],
    ["import", "easynla", "@", "--out", "o"],
    ["import", "parquet", "@", "--tokenizer", "couplets", "--out", "o"],
    ["export", "kitft", "@", "--out", "o"],
    ["export", "parquet", "@", "--out", "o"],
    ["push", "@", "someone/x"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "-".join(command[:2]))
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("nul", "device", "empty")])
def test_a_command_names_a_strange_path_in_one_line_that_hides_nothing(
    name: str,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main.main([NAMES[name] if word == "@" else word for word in command]) == USAGE
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Next: " in said and all(part.isprintable() for part in said.splitlines())


@pytest.mark.parametrize(
    "command",
    [
        ["import", "kitft", "no/av", "no/ar", "--out"],
        ["import", "easynla", "no/av", "--out"],
        ["import", "parquet", "no.parquet", "--tokenizer", "no/target", "--out"],
        ["export", "kitft", "no/pair", "--out"],
        ["export", "parquet", "no-store", "--out"],
    ],
)
def test_where_nothing_can_be_written_is_said_before_anything_is_read(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main.main([*command, str(tmp_path / "file" / "x" / "y")]) == USAGE
    assert "nothing can be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("place", ["nowhere", "file"])
def test_no_room_for_temporary_files_is_a_typed_error(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model().save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path / place))
    with pytest.raises(StorageError, match=r"temporary files.*TMPDIR"):
        load_target(tmp_path / "target", device="cpu")


@pytest.fixture(scope="module")
def pair() -> NLA:
    pair = make_pair(explanation_open="<explanation>")
    pair.head.bias = None
    return pair


def _save_pair(folder: Path, pair: NLA) -> None:
    pair.save_pretrained(folder / "pair")


def _save_store(folder: Path, pair: NLA) -> None:
    writer, vectors = (
        StoreWriter(folder / "store", ABOUT),
        torch.randn(600, 6, generator=torch.Generator().manual_seed(0)),
    )
    for chunk, split in enumerate(SPLITS):
        texts = [f"{split} {number}" for number in range(300)]
        spans = [[Span(1, text[i], i, i + 1, i) for i in range(2)] for text in texts]
        documents = [Document(300 * chunk + n, text, spans[n], ["all"] * 2) for n, text in enumerate(texts)]
        writer.write(chunk, {split: (documents, vectors)}, {"seen": 300})
    writer.finish(2)


def _export_kitft(folder: Path, pair: NLA) -> None:
    kitft_export.export_pair(pair, folder / "kitft")


def _export_parquet(folder: Path, pair: NLA) -> None:
    if not (folder / "store").exists():
        _save_store(folder, pair)
    export_parquet(Store.open(folder / "store"), folder / "acts.parquet")


@pytest.mark.parametrize("save", [_save_pair, _save_store, _export_kitft, _export_parquet])
def test_a_disk_that_fills_up_leaves_what_was_saved_before(
    save: Callable[[Path, NLA], None], pair: NLA, tmp_path: Path
) -> None:
    save(tmp_path, pair)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with limited_file_size(), pytest.raises(StorageError, match="free space"):
        save(tmp_path, pair)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
