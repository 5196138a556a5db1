"""Texts to judge a pair on: what is read of files, folders and chats, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nla import NLA
from nla.errors import ArgumentError, ParseError
from nla.eval.pair.fidelity import FidelitySettings, judge_fidelity
from nla.eval.pair.texts import _lines, load_documents, sample_tokens, world_documents
from nla.eval.pair.transfer import TransferSettings, judge_transfer
from tests.helpers.adapters import lora_folder
from tests.helpers.planted import planted_pair
from tests.helpers.tiny import TEMPLATE, TEXTS, make_pair


def test_chats_are_read_as_the_target_reads_them_and_their_positions_named_by_who_wrote_them(
    pair: NLA, tmp_path: Path
) -> None:
    messages = [[{"role": "user", "content": f"the {word}"}] for word in ("cat", "dog")]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(json.dumps({"id": str(n), "messages": chat}) for n, chat in enumerate(messages)))
    found = load_documents(pair, chats, True, 9)
    assert found.texts == [pair.tokenizer.apply_chat_template(chat, tokenize=False) for chat in messages]
    acts = sample_tokens(pair, found, "all", 99, 0).read(pair)
    named = {(span.text.strip(), stratum) for span, stratum in zip(acts.spans, acts.strata, strict=True)}
    assert ("cat", "user") in named and ("dog", "user") in named
    assert {stratum for _, stratum in named} == {"user", "user control"}
    assert all(stratum == "user" for text, stratum in named if text in ("the", "cat", "dog"))


def test_what_the_template_drops_of_chats_is_said(tmp_path: Path) -> None:
    pair = make_pair()
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "system", "content": "so red"}, {"role": "user", "content": "the cat"}]
    chats.write_text("\n".join(json.dumps({"id": name, "messages": turns}) for name in ("one", "two")))
    pair.tokenizer.chat_template = TEMPLATE.replace("in messages", "in messages if m['role'] != 'system'")
    found = load_documents(pair, chats, True, 9)
    assert found.texts == ["<|user|>the cat<|end|>"] * 2
    (remark,) = found.remarks
    assert "Dropped by the chat template" in remark and "content: message 0 of one, message 0 of two." in remark
    tuned = lora_folder(tmp_path / "tuned")
    pair.fit_baselines(pair.read(TEXTS))
    for report in (
        judge_fidelity(pair, FidelitySettings(texts=chats, chats=True)),
        judge_transfer(pair, TransferSettings(tuned, texts=chats, chats=True)),
    ):
        assert report.to_json()["remarks"] == [remark] and remark in report.to_markdown()


def test_long_texts_are_cut_and_the_first_are_taken(pair: NLA, tmp_path: Path) -> None:
    table = tmp_path / "texts.jsonl"
    table.write_text("\n".join(json.dumps({"text": text}) for text in [*TEXTS, " ".join(["the"] + ["cat"] * 99)]))
    found = load_documents(pair, table, False, 9)
    assert found.texts[:-1] == TEXTS and found.strata is None
    assert found.texts[-1] and len(pair.tokenizer(found.texts[-1])["input_ids"]) <= 64
    assert len(load_documents(pair, table, False, 2).texts) == 2


def test_a_line_of_a_file_and_a_file_of_a_folder_are_texts(pair: NLA, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("the cat sat.\n\nthe dog sat.\n")
    (tmp_path / "a.txt").write_text("the dog ran.")
    (tmp_path / "c.txt").write_bytes("the cat\u2028 sat.\r\nthe\x85 dog".encode())
    (tmp_path / "notes.md").write_text("no text")
    assert load_documents(pair, tmp_path / "b.txt", False, 9).texts == ["the cat sat.", "the dog sat."]
    assert list(_lines(tmp_path / "c.txt")) == ["the cat\u2028 sat.", "the\x85 dog"]
    (tmp_path / "c.txt").unlink()
    assert load_documents(pair, tmp_path, False, 9).texts == ["the dog ran.", "the cat sat.\n\nthe dog sat.\n"]


def test_the_sample_keeps_the_order_of_texts_and_tokens_and_leaves_out_texts_without_one(pair: NLA) -> None:
    documents = load_documents_of(pair, TEXTS)
    everything = sample_tokens(pair, documents, "all", 10**6, 0)
    some = sample_tokens(pair, documents, "all", 5, 0)
    assert sum(map(len, some.columns)) == 5 and len(some.texts) == len(some.columns)
    every = dict(zip(everything.texts, everything.columns, strict=True))
    for text, columns in zip(some.texts, some.columns, strict=True):
        assert set(columns) <= set(every[text]) and columns == sorted(columns)


def load_documents_of(pair: NLA, texts: list[str]):
    from nla.eval.pair.texts import Documents

    return Documents(texts, None, "texts")


def test_what_is_no_text_is_refused(pair: NLA, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("the café sat.".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("words\nthe cat\n")
    for path, error, message in (
        ("latin.txt", ParseError, "UTF-8"),
        ("empty", ArgumentError, "check the path"),
        ("none.txt", ArgumentError, "check the path"),
        ("table.csv", ArgumentError, "text"),
    ):
        with pytest.raises(error, match=message):
            load_documents(pair, tmp_path / path, False, 9)


def test_a_pair_of_an_embedded_world_brings_its_own_documents_and_another_does_not(pair: NLA) -> None:
    couplets = planted_pair()
    found = world_documents(couplets, 5, 0)
    assert len(found.texts) == 5 and "couplets" in found.source
    acts = sample_tokens(couplets, found, "all", 40, 0).read(couplets)
    assert {"line 1", "line 2"} <= set(acts.strata) <= {"line 1", "newline", "line 2", "line 3"}
    with pytest.raises(ArgumentError, match="--texts FILE"):
        world_documents(pair, 5, 0)
