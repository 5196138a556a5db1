"""Readings are found again exactly when all that determines them is the same, by content."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nla.audit import cache
from nla.audit.cache import models_key, reading_key
from nla.audit.run import audit, preparer_for
from nla.audit.settings import AuditSettings
from nla.autoencoder import NLA
from nla.metrics import Baseline
from nla.transcripts.messages import Transcript
from tests.helpers.adapters import lora_folder
from tests.helpers.talk import said, transcript
from tests.helpers.tiny import CONTEXT, D_MODEL, make_model, make_pair, make_tokenizer

TALK = transcript(4)


@pytest.fixture(scope="module")
def nla() -> NLA:
    return make_pair()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a target and a pair beside it."""
    root = tmp_path_factory.mktemp("models")
    make_model().save_pretrained(root / "planner")
    make_tokenizer().save_pretrained(root / "planner")
    make_pair(target=str(root / "planner")).save_pretrained(root / "pair")
    return root


def key(nla: NLA, talk: Transcript = TALK, adapter: Path | None = None, **settings: Any) -> str:
    chosen = AuditSettings(**settings)
    return reading_key(preparer_for(nla, chosen).prepare(talk), chosen, models_key(nla, adapter))


def configured(**changes: Any) -> Callable[[NLA], None]:
    """A change of the config, as another pair would have it."""

    def change(nla: NLA) -> None:
        nla.config = replace(nla.config, **changes)

    return change


def shifted(*parts: str) -> Callable[[NLA], None]:
    """A change of one number of the first weight whose name holds all of these."""

    def change(nla: NLA) -> None:
        weights = dict(nla.model.named_parameters())
        next(weight for name, weight in weights.items() if all(part in name for part in parts)).data.view(-1)[0] += 1

    return change


def _other_head(nla: NLA) -> None:
    nla.head.bias.data[0] += 1


def _other_mean(nla: NLA) -> None:
    nla.baselines = {"global": Baseline.fit(torch.randn(20, D_MODEL))}


def _scaled(nla: NLA) -> None:
    next(module for module in nla.model.modules() if hasattr(module, "lora_A")).scaling["default"] *= 2


def _narrow(nla: NLA) -> None:
    nla.roles.model_of("target").to(torch.bfloat16)


INGREDIENTS: dict[str, Callable[[NLA], None]] = {
    "type in the config": configured(dtype="bfloat16"),
    "quantisation": configured(quantization="4bit"),
    "tokenizer": configured(tokenizer_hash="vocabulary:1 special-tokens:2 chat-template:3 pipeline:4"),
    "point": configured(point="resid_post.2"),
    "encoder prompt": configured(encoder_prompt="so, Explain:<|activation|>."),
    "tags": configured(explanation_open="<note>"),
    "decoder template": configured(decoder_template="Summary: {explanation}<summary>"),
    "length": configured(max_new_tokens=9),
    "end tokens": configured(end_ids=[3]),
    "injection": lambda nla: configured(injection=replace(nla.config.injection, norm=5.0))(nla),
    "decoder": lambda nla: configured(decoder=replace(nla.config.decoder, special_tokens=False))(nla),
    "target in memory": shifted("embed_tokens"),
    "type in memory": _narrow,
    "encoder in memory": shifted("lora_B", ".default."),
    "decoder in memory": shifted("lora_B", ".decoder."),
    "strength of an adapter": _scaled,
    "head in memory": _other_head,
    "mean activation": _other_mean,
}


@pytest.mark.parametrize("name", INGREDIENTS)
def test_every_part_of_a_pair_that_determines_a_reading_changes_its_key(name: str) -> None:
    pair = make_pair()
    before = models_key(pair, None)
    assert models_key(make_pair(), None) == before
    INGREDIENTS[name](pair)
    assert models_key(pair, None) != before


def test_the_transcript_the_settings_the_adapter_and_the_format_change_the_key(
    nla: NLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = transcript(60)
    keys = [
        key(nla),
        key(nla, said(("user", "the cat"), ("assistant", "it is here."))),
        key(nla, said(("assistant", "the cat"), ("assistant", "it is here."))),
        key(nla, positions="all"),
        key(nla, budget=2),
        key(nla, samples=5),
        key(nla, seed=1),
        key(nla, trim=True),
        key(nla, adapter=lora_folder(tmp_path / "one")),
        key(nla, adapter=lora_folder(tmp_path / "two", seed=2)),
        key(nla, long, window=CONTEXT),
        key(nla, long, window=CONTEXT // 2),
    ]
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    keys.append(key(nla))
    assert len(set(keys)) == len(keys)


def test_nothing_else_changes_the_key(nla: NLA) -> None:
    same = [
        key(nla),
        key(nla, replace(TALK, id="other", model="a/target", source="file.json:3", metadata={"a": 1})),
        key(nla, budget=60),  # as many positions as before
        key(nla, window=CONTEXT),  # one pass does
        key(nla, rubrics=["hidden-objective"], control_target="base", model_of="any", judge_url="http://localhost/v1"),
    ]
    config = nla.config
    try:
        nla.config = replace(config, activation_norm=9.0, files={"a": "b"}, target="another/name")
        same.append(key(nla))
        nla.target_folder = Path("/somewhere/else")
        same.append(key(nla))
    finally:
        nla.config, nla.target_folder = config, None
    assert len(set(same)) == 1


def test_a_loaded_pair_is_known_by_what_it_is_and_not_by_where_it_is(models: Path, tmp_path: Path) -> None:
    here = NLA.from_pretrained(models / "pair", device="cpu")
    shutil.copytree(models, tmp_path / "moved")
    moved = NLA.from_pretrained(tmp_path / "moved" / "pair", device="cpu")
    assert key(here) == key(moved)
    moved.config = replace(moved.config, target_weights="0" * 64)
    assert key(here) != key(moved)
    pinned = [replace(here.config, target_weights=None, target_revision=commit * 40) for commit in ("a", "b")]
    keys = []
    for here.config in pinned:
        keys.append(key(here))
    assert len({*keys, key(moved)}) == 3
    shifted("lora_B", ".default.")(moved)
    moved.config = replace(moved.config, target_weights=NLA.from_pretrained(models / "pair").config.target_weights)
    assert key(moved) != key(NLA.from_pretrained(models / "pair", device="cpu"))


def test_weights_that_changed_in_memory_are_read_anew(tmp_path: Path) -> None:
    """What went wrong before: readings of a folder were taken for those of a pair that had been trained on since."""
    pair, settings = make_pair(), AuditSettings(samples=1)

    def counts() -> tuple[int, int, int]:
        readings = cache.ReadingCache(tmp_path)
        audit(pair, [TALK], settings, cache=readings)
        return readings.n_read, readings.n_reused, readings.n_changed

    assert (counts(), counts()) == ((1, 0, 0), (0, 1, 0))
    shifted("lora_B", ".default.")(pair)
    assert counts() == (1, 0, 1)


def test_a_reading_depends_on_whose_words_the_tokens_are(nla: NLA) -> None:
    """Of the same text another version of nla may say that a part belongs to another message."""
    settings = AuditSettings()
    prepared = preparer_for(nla, settings).prepare(TALK)
    regions = [prepared.chat.regions[0]._replace(section="tools"), *prepared.chat.regions[1:]]
    other = prepared._replace(chat=replace(prepared.chat, regions=regions))
    models = models_key(nla, None)
    assert reading_key(prepared, settings, models) == key(nla) != reading_key(other, settings, models)
