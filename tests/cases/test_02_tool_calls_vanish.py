"""Case 02: tool calls and lists of tools, on templates that write them and on templates that do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nla.errors import TemplateError
from nla.transcripts.files import load_transcripts
from nla.transcripts.messages import Message, Transcript
from nla.transcripts.rendering import CALLS, TOOLS, Unread, render
from tests.helpers.chat_templates import SHAPES, tokenizer_in_shape

CLOCK = {"name": "clock", "description": 'Tells the time of a "town"', "parameters": {"type": "object"}}
TALK = (
    Message("user", "What is the time in Lima?"),
    Message("assistant", "", ({"name": "clock", "arguments": {"town": 'Li"ma', "hours": 24}},), call_ids=("c1",)),
    Message("tool", "09:30", call_id="c1"),
    Message("assistant", "Half past nine."),
)
TOOL = ({"type": "function", "function": CLOCK},)


def test_calls_that_the_template_drops_are_an_error_that_names_the_message() -> None:
    plain = tokenizer_in_shape("plain")
    with pytest.raises(TemplateError, match="drops the tool calls of message 1"):
        render(plain, Transcript("calls", TALK))
    read = render(plain, Transcript("calls", TALK), allow_dropped=True)
    assert read.unread == [Unread(1, "tool calls", True)] and read.heard(1) == ""
    assert "clock" not in "".join(read.heard(number) for number in range(4))


def test_tools_are_given_to_templates_that_write_them() -> None:
    tokenizer, chat = tokenizer_in_shape("calling"), Transcript("tools", TALK, tools=TOOL)
    read = render(tokenizer, chat)
    own = [message.for_template() for message in TALK]
    assert read.text == tokenizer.apply_chat_template(own, tools=list(TOOL), tokenize=False)
    assert not read.unread and "Tells the time" in read.heard(0)
    (calls,) = read.regions_of(1, CALLS)
    assert read.text[calls.start : calls.end].startswith("clock") and '"hours": 24' in read.heard(1)
    assert read.text[calls.end :].startswith("<|im_end|>\n<|im_start|>tool")
    assert [region.message for region in read.regions if region.section == TOOLS] == [0]
    assert "".join(read.text[region.start : region.end] for region in read.regions) == read.text


def test_a_list_of_tools_that_the_template_drops_is_an_error() -> None:
    chat = Transcript("tools", (TALK[0], TALK[3]), tools=TOOL)
    with pytest.raises(TemplateError, match="drops the list of tools"):
        render(tokenizer_in_shape("plain"), chat)
    assert render(tokenizer_in_shape("plain"), chat, True).unread == [Unread(None, "list of tools", True)]


def test_arguments_alone_that_are_left_out_count_as_dropped_calls() -> None:
    tokenizer = tokenizer_in_shape("calling")
    tokenizer.chat_template = SHAPES["calling"].replace("{{ c.function.arguments | tojson }}", "{}")
    with pytest.raises(TemplateError, match="drops the tool calls of message 1"):
        render(tokenizer, Transcript("calls", TALK))


def test_calls_in_tags_are_written_as_calls_or_stay_in_the_content(tmp_path: Path) -> None:
    """Hermes' tags: what knows calls writes its own form; what does not reads the tags, as the model wrote them."""
    said = '<tool_call>\n{"name": "clock", "arguments": {"town": "Lima"}}\n</tool_call>'
    talk = [
        ("human", "The time?"),
        ("gpt", said),
        ("tool", "<tool_response>\n09:30\n</tool_response>"),
        ("gpt", "9:30"),
    ]
    path = tmp_path / "hermes.json"
    path.write_text(json.dumps({"conversations": [{"from": role, "value": text} for role, text in talk]}))
    (chat,) = load_transcripts(path)
    assert chat.messages[1].calls == ({"name": "clock", "arguments": {"town": "Lima"}},)
    assert said in render(tokenizer_in_shape("calling"), chat).text
    plain = render(tokenizer_in_shape("plain"), chat)
    assert said in plain.text and "<tool_response>\n09:30\n</tool_response>" in plain.text and not plain.unread
    assert "clock" in plain.heard(1)
