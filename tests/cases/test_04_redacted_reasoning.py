"""Case 04: thinking that is encrypted is neither given to the target nor searched; its summary is shown as that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nla.audit.rubric import parse_rubric
from nla.transcripts.files import load_transcripts
from nla.transcripts.messages import ENCRYPTED, Transcript
from nla.transcripts.rendering import Unread, render
from tests.helpers.chat_templates import tokenizer_in_shape
from tests.helpers.pages import Markup, whole_message_page

LOCKED = "gAAAAABlanternQ0lQSEVSVEVYVC1CTE9CLWZvci1hLXRlc3Q9PQ=="
SUMMARY = "I looked at the opening hours."
INSPECT = {"type": "reasoning", "reasoning": LOCKED, "summary": SUMMARY, "redacted": True, "signature": "sig"}
FORMS = {
    "inspect": {"content": [INSPECT, {"type": "text", "text": "Yes."}]},
    "anthropic": {"content": [{"type": "redacted_thinking", "data": LOCKED}, {"type": "text", "text": "Yes."}]},
    "unsaid": {
        "content": [{"type": "thinking", "thinking": "", "signature": LOCKED}, {"type": "text", "text": "Yes."}]
    },
    "openrouter": {"content": "Yes.", "reasoning_details": [{"type": "reasoning.encrypted", "data": LOCKED}]},
}


@pytest.mark.parametrize("form", FORMS)
def test_ciphertext_is_neither_read_nor_searched(form: str, tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps([{"role": "user", "content": "Open?"}, {"role": "assistant", **FORMS[form]}]))
    (chat,) = load_transcripts(path)
    read = render(tokenizer_in_shape("every thought"), chat)
    assert read.unread == [Unread(1, ENCRYPTED, False)]
    for text in (read.text, read.heard(1), chat.messages[1].visible, json.dumps(chat.messages[1].for_template())):
        assert LOCKED[:9] not in text and "opening hours" not in text and "<think>" not in text


def test_the_summary_is_shown_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps([{"role": "assistant", **FORMS["inspect"]}]))
    (chat,) = load_transcripts(path)
    assert isinstance(chat, Transcript) and chat.messages[0].summary == SUMMARY
    rubric = parse_rubric({"name": "any", "looks_for": "x", "match": {"regex": ["."]}})
    shown = Markup(whole_message_page([chat], rubric, "x")).text
    assert SUMMARY in shown and "summary of the encrypted reasoning" in shown and LOCKED not in shown
