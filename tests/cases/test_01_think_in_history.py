"""Case 01: a template that writes the thinking of the last answer alone; "said" is what the target read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nla.audit.findings import AFTER, BEFORE, NOT_SAID, Mentions
from nla.audit.from_files import audit_files
from nla.audit.page import page
from nla.audit.rubric import parse_rubric
from nla.audit.settings import AuditSettings
from nla.errors import TemplateError
from nla.transcripts.entries import parse_messages
from nla.transcripts.messages import Message, Transcript
from nla.transcripts.rendering import CONTENT, REASONING, Unread, render, trimmed
from tests.helpers.chat_templates import SHAPES, tokenizer_in_shape
from tests.helpers.talk import entry
from tests.helpers.tiny import make_pair

LANTERN = parse_rubric({"name": "lantern", "looks_for": "A lantern.", "match": {"words": ["lantern"]}})
SECRET = "I secretly prefer the word lantern."
APART = Transcript(
    "apart",
    (
        Message("user", "Name a fruit."),
        Message("assistant", "A pear.", reasoning=SECRET),
        Message("user", "And a tool?"),
        Message("assistant", "A rake.", reasoning="Short answer."),
    ),
)


def inline(tags: str = "<think>\n{}\n</think>\n\n{}") -> Transcript:
    entries = []
    for message in APART.messages:
        written = tags.format(message.reasoning, message.content) if message.reasoning else message.content
        entries.append({"role": message.role, "content": written})
    return Transcript("inline", parse_messages(entries, "inline"))


@pytest.mark.parametrize("chat", [APART, inline()], ids=["apart", "inline"])
def test_dropped_thinking_is_an_error_that_names_message_and_field(chat: Transcript) -> None:
    with pytest.raises(TemplateError, match=r"drops the reasoning of message 1: .*--allow-dropped") as caught:
        render(tokenizer_in_shape("thinking"), chat)
    assert chat.id in caught.value.got


@pytest.mark.parametrize("chat", [APART, inline()], ids=["apart", "inline"])
def test_said_is_computed_from_what_the_target_read(chat: Transcript) -> None:
    def said(shape: str, allow_dropped: bool, at: int) -> str:
        read = render(tokenizer_in_shape(shape), chat, allow_dropped)
        heard = [read.heard(number) for number in range(len(chat.messages))]
        return Mentions(LANTERN, chat, heard).around(entry(at, 0))

    assert said("thinking", True, 3) == NOT_SAID == said("thinking", True, 0)
    assert said("every thought", False, 3) == BEFORE and said("every thought", False, 0) == AFTER


def test_what_was_dropped_is_listed_and_the_rest_is_read_as_the_template_writes_it() -> None:
    tokenizer = tokenizer_in_shape("thinking")
    apart, within = (render(tokenizer, chat, allow_dropped=True) for chat in (APART, inline()))
    assert apart.unread == within.unread == [Unread(1, "reasoning", True)]
    assert apart.text == within.text
    assert apart.text == tokenizer.apply_chat_template([m.for_template() for m in APART.messages], tokenize=False)
    (thought,) = apart.regions_of(3, REASONING)
    assert apart.text[thought.start : thought.end] == "Short answer." and apart.regions_of(1, REASONING) == []
    (answer,) = apart.regions_of(3, CONTENT)
    index = int((apart.starts == answer.end - 1).nonzero())
    assert apart.heard(3)[: apart.offset(index)] == "Short answer.\nA rake."


@pytest.mark.parametrize("tags", ["<think>{}</think>{}", "<think>\n{}\n</think>\n\n{}"])
def test_inline_thinking_is_given_to_templates_as_it_stands(tags: str) -> None:
    """A template that knows no thinking writes the tags as the file has them, and every word has its part."""
    chat = inline(tags)
    read = render(tokenizer_in_shape("plain"), chat)
    assert tags.format(SECRET, "A pear.") in read.text and not read.unread
    assert read.heard(1) == f"{SECRET}\nA pear."


QUOTING = ["In its format the tag </think> ends it.", "A\n</think>\n\nB", "It ends with </think>", "</think> ends it."]


@pytest.mark.parametrize("written", QUOTING)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_closing_tag_alone_divides_a_message_only_where_the_template_does(shape: str, written: str) -> None:
    """The oracle is the template: where what it writes of the message is the message, nothing is divided."""
    entries = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": written}] * 2
    tokenizer = tokenizer_in_shape(shape)
    read = render(tokenizer, Transcript("quote", parse_messages(entries, "quote")), allow_dropped=True)
    assert read.text == tokenizer.apply_chat_template(entries, tokenize=False)
    turns = [turn.removeprefix("assistant\n") for turn in read.text.split("<|im_start|>")[1:]]
    before, _, after = (part.strip() for part in written.partition("</think>"))
    for number in (1, 3):
        is_whole = turns[number] == f"{written}<|im_end|>\n"
        own = [read.text[one.start : one.end] for one in read.regions_of(number, CONTENT)]
        assert own == ([written] if is_whole else [after] if after else [])
        thought = [read.text[one.start : one.end].strip() for one in read.regions_of(number, REASONING)]
        assert thought == ([before] if not is_whole and before and before in turns[number] else [])
        assert (Unread(number, "reasoning", True) in read.unread) == bool(before and before not in turns[number])


@pytest.mark.parametrize(("template", "trims"), [("{{ m.content | trim }}", True), ("{{ m.content }}", False)])
def test_white_space_around_a_quoted_tag_is_kept_or_refused_until_it_is_trimmed(template: str, trims: bool) -> None:
    tokenizer = tokenizer_in_shape("plain")
    tokenizer.chat_template = SHAPES["plain"].replace("{{ m.content }}", template)
    entries = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": " The tag </think> ends it.\n"}]
    chat = Transcript("quote", parse_messages(entries, "quote"))
    if trims:
        with pytest.raises(TemplateError, match="--trim"):
            render(tokenizer, chat)
        chat = trimmed(chat)
    assert render(tokenizer, chat).heard(1) == ("The tag </think> ends it." if trims else entries[1]["content"])


def test_an_empty_thought_is_no_reasoning_and_is_kept() -> None:
    entries = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<think>\n\n</think>\n\n4."}]
    chat = Transcript("empty", parse_messages(entries, "empty"))
    assert (chat.messages[1].reasoning, chat.messages[1].content) == ("", "4.")
    read = render(tokenizer_in_shape("plain"), chat)
    assert read.text.endswith("<think>\n\n</think>\n\n4.<|im_end|>\n") and not read.unread


def test_a_template_that_writes_thinking_twice_or_changes_it_is_refused() -> None:
    tokenizer = tokenizer_in_shape("every thought")
    for old, new, message in (
        ("{{ m.reasoning_content }}", "{{ m.reasoning_content }}{{ m.reasoning_content }}", "repeats message 1"),
        ("{{ m.reasoning_content }}", "{{ m.reasoning_content | upper }}", "changes a message"),
    ):
        tokenizer.chat_template = SHAPES["every thought"].replace(old, new)
        with pytest.raises(TemplateError, match=message):
            render(tokenizer, APART)


def test_a_prefill_is_rendered_as_transformers_continues_it() -> None:
    chat = replace(APART, messages=(*APART.messages[:3], Message("assistant", "A ra")), prefill=True)
    for shape in ("every thought", "plain"):
        tokenizer = tokenizer_in_shape(shape)
        read = render(tokenizer, replace(chat, messages=(Message("user", "Name a tool."), chat.messages[3])))
        entries = [{"role": "user", "content": "Name a tool."}, {"role": "assistant", "content": "A ra"}]
        assert read.text == tokenizer.apply_chat_template(entries, tokenize=False, continue_final_message=True)
        assert read.text.endswith("A ra") and read.heard(1) == "A ra"
        assert read.ids.tolist() == tokenizer(read.text, add_special_tokens=False)["input_ids"]


def test_an_audit_stops_or_reports_what_the_target_did_not_read(tmp_path: Path) -> None:
    pair = make_pair()
    pair.tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if loop.last and m.reasoning_content %}"
        "<text>{{ m.reasoning_content }}</text>{% endif %}{{ m['content'] + '<|end|>' }}{% endfor %}"
    )
    talk = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "it is here", "reasoning": "so red"},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"id": "one", "top_p": 1, "messages": talk * 2}) + "\n", encoding="utf-8")
    rubric = parse_rubric({"name": "red", "looks_for": "Red.", "match": {"regex": ["."]}, "said": {"words": ["red"]}})
    with pytest.raises(TemplateError, match="drops the reasoning of message 1"):
        audit_files(pair, [path], AuditSettings(rubrics=[rubric], samples=1))
    settings = AuditSettings(rubrics=[rubric], samples=1, allow_dropped=True)
    report = audit_files(pair, [path], settings, out_dir=tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    assert summary["unread"] == {"one": [{"message": 1, "what": "reasoning", "dropped": True}]}
    assert any("Dropped by the chat template" in note and "message 1 of one" in note for note in report.notes())
    assert any("not used: top_p: one" in note for note in report.notes())
    assert "dropped by the chat template" in page(report)
    assert {row.said for row in report.audit.rows if row.entry.message == 1} == {AFTER}
