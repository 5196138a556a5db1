"""Chats of whatever is given: the same tokens from a file, messages, an object, a transcript; system text folded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nla.errors import TemplateError, TranscriptError
from nla.transcripts.files import load_transcripts
from nla.transcripts.prepared import Preparer, chats_of, remarks
from nla.transcripts.rendering import Chat, Unread
from tests.helpers.chat_templates import tokenizer_of
from tests.helpers.talk import said

MESSAGES = [{"role": "user", "content": "Is it 5?"}, {"role": "assistant", "content": "Yes."}]
SYSTEM = {"role": "system", "content": "Be brief."}


def test_a_chat_is_the_same_however_it_is_given(tmp_path: Path) -> None:
    tokenizer, path = tokenizer_of("chatml"), tmp_path / "chat.json"
    path.write_text(json.dumps(MESSAGES), encoding="utf-8")
    (transcript,) = load_transcripts(path)
    texts = set()
    for given in (MESSAGES, {"messages": MESSAGES}, path, str(path), transcript):
        (chat,) = chats_of(tokenizer, given)
        texts.add(chat.text)
        assert chat.ids.tolist() == tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    assert len(texts) == 1
    with pytest.raises(TranscriptError, match="the messages"):
        chats_of(tokenizer, {"turns": []})


def test_a_system_text_that_the_template_refuses_is_folded_and_said() -> None:
    gemma = tokenizer_of("gemma")
    with pytest.raises(TemplateError, match="--fold-system"):
        chats_of(gemma, [SYSTEM, *MESSAGES])
    (chat,) = chats_of(gemma, [SYSTEM, *MESSAGES], fold_system=True)
    assert chat.text.startswith("<bos><start_of_turn>user\nBe brief.\n\nIs it 5?<end_of_turn>\n")
    assert any("--fold-system" in remark for remark in chat.transcript.remarks)
    llama = tokenizer_of("llama3")
    assert (
        chats_of(llama, [SYSTEM, *MESSAGES], fold_system=True)[0].text == chats_of(llama, [SYSTEM, *MESSAGES])[0].text
    )


def test_a_system_text_that_the_template_drops_is_folded_too() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chat = said(("system", "Be brief."), ("user", "Is it 5?"), ("assistant", "Yes."))
    with pytest.raises(TemplateError, match=r"drops the content of message 0.*--fold-system"):
        chats_of(tokenizer, chat)
    for allow in (False, True):
        options = {"context": 99, "target": "t", "fold_system": True, "allow_dropped": allow}
        read = Preparer(tokenizer=tokenizer, **options).prepare(chat).chat
        assert read.text.startswith("user: Be brief.\n\nIs it 5?") and not read.unread


def test_remarks_do_not_grow_with_what_a_file_holds() -> None:
    """Keys, names of media, ids and texts of a file, as many and as long as it likes."""
    (plain,) = chats_of(tokenizer_of("chatml"), MESSAGES)

    def chat(name: str, **fields: object) -> Chat:
        return replace(plain, transcript=replace(plain.transcript, id=name, **fields))

    assert remarks([chat("a", unused=("top_p", "toxic")), chat("b", unused=("top_p",))]) == [
        "Fields of the file that are not used: top_p, toxic: a, b."
    ]
    (many,) = remarks([chat("a", unused=tuple(f"k{n}" for n in range(50_000)))])
    assert "k0, k1, " in many and "and 49988 more: a." in many and len(many) < 300
    for long in (
        chat("a", unused=("![x](a.png)" + "A" * 100_000,)),
        chat("a" * 100_000, unused=("b",)),
        chat("a", remarks=("a" * 100_000,)),
        replace(plain, unread=[Unread(0, "a" * 100_000, False)]),
    ):
        assert all(len(remark) < 500 for remark in remarks([long]))
    media = replace(plain, unread=[Unread(0, f"medium {n}", False) for n in range(5_000)])
    said_of = remarks([media])
    assert len(said_of) < 60 and "medium 0: message 0 of" in said_of[0] and said_of[-1].startswith("4950 more")
