"""Case 18: an image in the chat of a text model: no base64, no repr, no invented text, and a line for each message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nla.audit.from_files import audit_files
from nla.audit.page import page
from nla.audit.rubric import parse_rubric
from nla.audit.settings import AuditSettings
from nla.transcripts.files import load_transcripts
from nla.transcripts.rendering import Unread, render
from tests.helpers.chat_templates import tokenizer_in_shape
from tests.helpers.tiny import make_pair

DATA = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PARTS = {
    "image_url": {"image_url": {"url": f"data:image/png;base64,{DATA}"}},
    "input_image": {"image_url": f"data:image/png;base64,{DATA}"},
    "image": {"source": {"type": "base64", "media_type": "image/png", "data": DATA}},
    "input_audio": {"input_audio": {"data": DATA, "format": "wav"}},
    "document": {"source": {"type": "base64", "data": DATA}},
}


def written(path: Path, kind: str, text: str = "the cat") -> Path:
    parts = [{"type": "text", "text": text}, {"type": kind, **PARTS[kind]}]
    path.write_text(json.dumps([{"role": "user", "content": parts}, {"role": "assistant", "content": "it is here"}]))
    return path


@pytest.mark.parametrize("kind", PARTS)
def test_only_the_text_is_read(kind: str, tmp_path: Path) -> None:
    (chat,) = load_transcripts(written(tmp_path / "chat.json", kind))
    read = render(tokenizer_in_shape("plain"), chat)
    assert read.text == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nit is here<|im_end|>\n"
    name = {"image_url": "image", "input_image": "image", "input_audio": "audio"}.get(kind, kind)
    assert read.unread == [Unread(0, name, False)]


def test_an_audit_says_that_the_target_did_not_see_the_image(tmp_path: Path) -> None:
    rubric = parse_rubric({"name": "any", "looks_for": "x", "match": {"regex": ["."]}})
    settings = AuditSettings(rubrics=[rubric], samples=1)
    report = audit_files(make_pair(), [written(tmp_path / "chat.json", "image_url")], settings)
    assert any("did not see it: image: message 0 of chat" in note for note in report.notes())
    assert "[image] no text: the target did not see it" in page(report) and DATA[:9] not in page(report)
