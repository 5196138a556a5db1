"""Chat templates as model makers ship them (TRL has copies): what they write of a chat, and what they leave out."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files

import pytest

from nla.errors import TemplateError
from nla.transcripts.messages import Message, Transcript
from nla.transcripts.rendering import CALLS, CONTENT, TOOLS, render
from tests.helpers.chat_templates import tokenizer_of
from tests.helpers.talk import said

TEMPLATES = files("trl") / "chat_templates"
NAMES = sorted(
    path.name.removesuffix(".jinja")
    for path in TEMPLATES.iterdir()
    if path.name.endswith(".jinja") and not path.name.endswith("_training.jinja")
)
CLOCK = {"name": "clock", "description": "Tells the time", "parameters": {"type": "object", "properties": {}}}
AGENT = Transcript(
    "agent",
    (
        Message("user", "What is the time?"),
        Message("assistant", "", ({"name": "clock", "arguments": {"town": 'the "old" town'}},)),
        Message("tool", "09:30", call_id="call00000", name="clock"),
        Message("assistant", "Half past nine."),
    ),
    tools=({"type": "function", "function": CLOCK},),
)
THINKING = Transcript(
    "thinking",
    (
        Message("user", "Two and two?"),
        Message("assistant", "Four.", reasoning="Add them."),
        Message("user", "Three and three?"),
        Message("assistant", "Six.", reasoning="Add these."),
    ),
)


def tokenizer(name: str):
    made = tokenizer_of("llama3")
    made.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_chat_is_read_whole_under_every_template(name: str) -> None:
    chat = said(("user", "Is it 5?"), ("assistant", "Yes: 5."), ("user", "And 6?"), ("assistant", "No."))
    read = render(tokenizer(name), chat)
    assert [read.heard(number) for number in range(4)] == [message.content for message in chat.messages]
    assert not read.unread and "".join(read.text[one.start : one.end] for one in read.regions) == read.text
    assert [region.message for region in read.regions] == sorted(region.message for region in read.regions)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_6", "glm4moe", "gptoss", "llama3_1", "llama3_2", "gemma4"])
def test_calls_and_tools_are_read_under_templates_that_know_them(name: str) -> None:
    read = render(tokenizer(name), AGENT)
    assert not read.unread and "clock" in read.heard(1) and "old" in read.heard(1)
    assert read.regions_of(1, CALLS) and "Tells the time" in read.text


BOUNDED = {
    "pears": {"type": "integer", "description": "How many.", "minimum": 1, "maximum": 90, "default": 5},
    "price": {"type": "number", "description": "At most.", "enum": [0.5, 0, 2]},
    "ripe": {"type": "boolean", "description": "Only those.", "default": False},
}
LISTS_TOOLS = ["gemma4", "glm4moe", "gptoss", "lfm2", "llama3_1", "llama3_2", "muse_glimmer", "nemotron_3_nano"]
LISTS_TOOLS += ["qwen2_5", "qwen3", "qwen3_6"]


GEMMAS = sorted(name for name in NAMES if name.startswith(("gemma4", "diffusion_gemma")))


@pytest.mark.parametrize("n_calls", [1, 2])
@pytest.mark.parametrize("name", GEMMAS)
def test_text_that_a_template_moves_behind_the_tools_answers_is_read_there(name: str, n_calls: int) -> None:
    calls = tuple({"name": "clock", "arguments": {"town": town}} for town in ("Lima", "Cairo")[:n_calls])
    answers = [Message("tool", f"09:3{n}", call_id=f"call0000{n}", name="clock") for n in range(n_calls)]
    asked, rest = Message("user", "What is the time?"), (Message("user", "Thanks."), Message("assistant", "Bye."))
    turns = (asked, Message("assistant", "Let me look.", calls), *answers, Message("assistant", "Half past."), *rest)
    read = render(tokenizer(name), Transcript("agent", turns, tools=AGENT.tools))
    own = [one.for_template() for one in turns]
    assert read.text == tokenizer(name).apply_chat_template(own, tools=list(AGENT.tools), tokenize=False)
    messages, found = read.transcript.messages, [region.message for region in read.regions]
    assert found == sorted(found) and not read.unread
    contents = ["".join(read.text[r.start : r.end] for r in read.regions_of(n, CONTENT)) for n in range(len(messages))]
    assert contents == [one.content for one in messages]
    positions = [read.text.index(text) for text in contents if text]
    assert positions == sorted(positions), "messages are numbered in the order in which they are read"
    assert sorted(contents) == sorted(["", *(one.content for one in turns)] if len(messages) > len(turns) else contents)
    assert "Lima" in read.heard(1) and "Let me look." in "".join(contents)
    is_moved = read.text.index("Let me look.") > read.text.index("09:30")
    assert is_moved == any("after the tools' answers" in remark for remark in read.transcript.remarks)


@pytest.mark.parametrize("parameter", BOUNDED)
@pytest.mark.parametrize("name", LISTS_TOOLS)
def test_values_of_parameters_are_in_the_text_or_named_as_dropped(name: str, parameter: str) -> None:
    """Values that stand nowhere in the text are dropped; what JSON or Python writes of them is there otherwise."""
    values = [one for key, one in BOUNDED[parameter].items() if key in ("minimum", "maximum", "default", "enum")]
    schema = {"type": "object", "properties": {parameter: BOUNDED[parameter]}}
    tool = {"type": "function", "function": {"name": "eat", "description": "Eats", "parameters": schema}}
    read = render(tokenizer(name), replace(said(("user", "Eat."), ("assistant", "No.")), tools=(tool,)), True)
    own = read.text[read.text.index(parameter) :].split(BOUNDED["ripe"]["description"])[-1]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    is_read = all(json.dumps(one) in own or str(one) in own for one in flat)
    assert [str(one) for one in read.unread] == ([] if is_read else ["parameters of tools"])


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("qwen3", "drops the reasoning of message 1: "),
        ("qwen3_instruct_2507", "drops the reasoning of message 1, reasoning of message 3: "),
        ("deepseek_r1_distill", "drops the reasoning of message 1, reasoning of message 3: "),
        ("gptoss", "drops the reasoning of message 1: "),
        ("glm4moe", "drops the reasoning of message 1: "),
    ],
)
def test_thinking_that_a_template_leaves_out_is_named(name: str, dropped: str) -> None:
    with pytest.raises(TemplateError, match=dropped):
        render(tokenizer(name), THINKING)
    read = render(tokenizer(name), THINKING, allow_dropped=True)
    assert ("Add these." in read.heard(3)) == ("message 3" not in dropped) and "Add them." not in read.text


def test_arguments_are_given_as_text_to_templates_that_join_strings() -> None:
    read = render(tokenizer("deepseekv3"), AGENT, allow_dropped=True)
    assert [str(one) for one in read.unread] == ["list of tools"] and r'{"town": "the \"old\" town"}' in read.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen2_5", 0),
        ("qwen3", 0),
        ("qwen3_6", 0),
        ("glm4moe", 0),
        ("nemotron_3_nano", 0),
        ("gptoss", 0),
        ("llama3_1", 1),
    ],
)
def test_parameters_of_tools_are_read_in_the_message_where_the_template_writes_them(name: str, message: int) -> None:
    schema = {"type": "object", "properties": {"pears": {"type": "integer"}}, "required": ["pears"]}
    tool = {"type": "function", "function": {"name": "eat", "description": "Eats", "parameters": schema}}
    turns = said(
        ("system", "Help."), ("user", "Is it 5?"), ("assistant", "Yes."), ("user", "And 6?"), ("assistant", "No.")
    )
    read = render(tokenizer(name), replace(turns, tools=(tool,)))
    assert ["pears" in read.heard(number) for number in range(5)] == [number == message for number in range(5)]
    (tools,) = [region for region in read.regions if region.section == TOOLS]
    assert not any(mark in read.text[tools.start : tools.end] for mark in ("<|im_end|>", "<|im_start|>", "<|eot_id|>"))
    assert [read.text[one.start : one.end] for one in read.regions_of(2, CONTENT)] == ["Yes."]
