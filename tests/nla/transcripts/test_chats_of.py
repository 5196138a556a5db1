"""Chats of whatever is given: the same tokens from a file, messages, an object, a transcript; system text folded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nla.errors import TemplateError, TranscriptError
from nla.transcripts.files import load_transcripts
from nla.transcripts.prepared import Preparer, chats_of
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
