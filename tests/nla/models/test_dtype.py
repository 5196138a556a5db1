"""Types: "auto" is what the CPU computes, a named real model takes it, and a pair runs where its type would be slow."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nla.autoencoder import NLA
from nla.config import NLAConfig
from nla.errors import ArgumentError, WeightsError
from nla.models import load as loading
from nla.models.load import fastest_dtype, load_target, load_truncated
from nla.organisms import PACKAGED, TARGETS
from nla.store.reader import Store
from nla.train.data.corpus import CorpusSettings
from nla.train.data.extract import ExtractionSettings, extract_corpus
from tests.helpers.tiny import make_config, make_model, make_tokenizer

FAST, SLOW = "avx512_bf16", None


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Makes this CPU one that computes bfloat16 by these instructions, or by none."""

    def make(by: str | None) -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: by == "avx512_bf16")
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: by == "AMX")
        loading._say.cache_clear()

    return make


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target of the name ``tiny``, as ``smollm2`` is one: bfloat16 on the disk, in a folder that no name tells."""
    folder = tmp_path / "cache" / "0123"
    make_model().bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    package = SimpleNamespace(target=lambda: folder, SHA256="ab" * 32, PAIR=tmp_path / "none", ORIGINAL="an/original")
    monkeypatch.setitem(PACKAGED, "tiny", package)
    return folder


@pytest.mark.parametrize(("by", "dtype"), [(FAST, "bfloat16"), ("AMX", "bfloat16"), (SLOW, "float32")])
def test_auto_is_what_the_cpu_computes_and_said_once(
    cpu: Callable[[str | None], None], named: Path, caplog: pytest.LogCaptureFixture, by: str | None, dtype: str
) -> None:
    cpu(by)
    asked: list[dict] = [{"dtype": "auto"}, {"dtype": None}, {}]
    assert {str(load_target("tiny", device="cpu", **settings)[0].dtype) for settings in asked} == {f"torch.{dtype}"}
    assert load_truncated("tiny", "resid_post.0", device="cpu").dtype == getattr(torch, dtype)
    assert fastest_dtype("tiny", "cpu") == dtype
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"tiny in {dtype}: this CPU" in caplog.text and (by or "neither avx512_bf16 nor AMX") in caplog.text


def test_what_is_asked_for_is_given_and_other_targets_are_as_before(
    cpu: Callable[[str | None], None], named: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cpu(FAST)
    assert load_target("tiny", dtype="float32", device="cpu")[0].dtype == torch.float32
    assert load_target("tiny", dtype="float16", device="cpu")[0].dtype == torch.float16
    for target in ("couplets", TARGETS["couplets/planner"], named):
        assert load_target(target, device="cpu")[0].dtype == torch.float32
    assert load_target(named, dtype=None, device="cpu")[0].dtype == torch.bfloat16
    assert not caplog.records
    with pytest.raises(ArgumentError, match="auto"):
        load_target("tiny", dtype="int4", device="cpu")


def test_the_weights_are_the_same_in_either_type(named: Path) -> None:
    wide, narrow = (load_target("tiny", dtype=dtype, device="cpu")[0] for dtype in ("float32", "bfloat16"))
    assert all(torch.equal(a, b.float()) for a, b in zip(wide.parameters(), narrow.parameters(), strict=True))


@pytest.mark.parametrize(("by", "dtype"), [(FAST, torch.bfloat16), (SLOW, torch.float32)])
def test_a_pair_of_bfloat16_runs_in_float32_where_the_cpu_would_emulate_it(
    cpu: Callable[[str | None], None],
    named: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    by: str | None,
    dtype: torch.dtype,
) -> None:
    cpu(by)
    model, tokenizer = load_target(named, dtype="bfloat16", device="cpu")
    config = make_config(tokenizer, model, target=str(named), dtype="bfloat16")
    NLA.create(model, tokenizer, config, rank=2).save_pretrained(tmp_path / "pair")
    pair = NLA.from_pretrained(tmp_path / "pair", device="cpu")
    assert pair.config.dtype == "bfloat16" and pair.base_of("target").dtype == dtype
    assert f"in {str(dtype).removeprefix('torch.')}: this CPU" in caplog.text
    assert {p.dtype for name, p in pair.model.named_parameters() if "lora_" in name} == {torch.float32}
    assert pair.read("the cat sat", "last").vectors.isfinite().all()


def test_a_pair_of_float32_runs_in_it_everywhere(
    cpu: Callable[[str | None], None], named: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cpu(FAST)
    model, tokenizer = load_target(named, device="cpu")
    NLA.create(model, tokenizer, make_config(tokenizer, model, target=str(named)), rank=2).save_pretrained(
        tmp_path / "p"
    )
    assert NLA.from_pretrained(tmp_path / "p", device="cpu").base_of("target").dtype == torch.float32
    assert not caplog.records


def test_pairs_and_stores_of_a_named_target_hold_its_name_and_no_path(
    named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: Callable[[str | None], None]
) -> None:
    cpu(SLOW)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "tiny").mkdir(parents=True)  # a folder of that name, which is not meant
    monkeypatch.chdir(elsewhere)
    model, tokenizer = load_target("tiny", device="cpu")
    made = NLA.create(model, tokenizer, make_config(tokenizer, model, target="tiny"), rank=2)
    made.save_pretrained("pair")
    assert made.target_folder is None and NLAConfig.load("pair").target == "tiny"
    written = b"".join(path.read_bytes() for path in Path("pair").rglob("*") if path.is_file())
    assert str(named).encode() not in written and b"0123" not in written
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "the cat sat on the mat{" so" * i}"}}\n' for i in range(12)))
    corpus = CorpusSettings(str(texts), n_positions=1, first_position=2, max_tokens=32, eval_fraction=0.3)
    extract_corpus(ExtractionSettings(corpus, "tiny", "resid_post.1", dtype=None), "store")
    manifest = Store.open("store").manifest
    assert (manifest.target, manifest.dtype) == ("tiny", "float32")
    pair = NLA.from_pretrained("pair", device="cpu")
    pair.fit_baselines(Store.open("store"))  # which holds the two against each other
    monkeypatch.setattr(PACKAGED["tiny"], "SHA256", "cd" * 32)
    with pytest.raises(WeightsError, match="sha256 cdcdcdcdcdcd"):
        NLA.from_pretrained("pair", device="cpu")
