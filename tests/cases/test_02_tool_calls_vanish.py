"""Case 02: tool calls and lists of tools, on templates that write them and on templates that do not.

The templates below have the shape of Mistral's (tools before the last user's message), of gpt-oss's (a type for each
tool, by the schema's types), of Qwen3-Coder's (a tag for each parameter, what is no string as JSON), of DeepSeek's
(arguments joined to other text) and of Hermes' (a template of its own for tools).
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from nla.audit.findings import NOT_SAID, Mentions
from nla.audit.rubric import Rubric, parse_rubric
from nla.errors import TemplateError
from nla.transcripts.files import load_transcripts
from nla.transcripts.messages import Message, Transcript
from nla.transcripts.rendering import CALLS, TOOLS, Unread, render
from tests.helpers.chat_templates import SHAPES, tokenizer_in_shape
from tests.helpers.talk import entry

CLOCK = {"name": "clock", "description": 'Tells the time of a "town"', "parameters": {"type": "object"}}
TALK = (
    Message("user", "What is the time in Lima?"),
    Message("assistant", "", ({"name": "clock", "arguments": {"town": 'Li"ma', "hours": 24}},), call_ids=("c1",)),
    Message("tool", "09:30", call_id="c1"),
    Message("assistant", "Half past nine."),
)
TOOL = ({"type": "function", "function": CLOCK},)


def tool(name: str, **properties: dict) -> dict:
    """A tool with these parameters, all required."""
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": schema}}


LAUNCH = (
    tool("look", where={"type": "string", "description": "A place."}),
    tool("launch", target={"type": "string", "description": "The ripest pear."}, missiles={"type": "integer"}),
)
LISTS = {
    "json": SHAPES["calling"],
    "types": "{% if tools %}<|im_start|>system\n{% for t in tools %}type {{ t.function.name }} = ("
    "{% for name, p in t.function.parameters.properties.items() %}"
    "{% if p.description %}// {{ p.description }}\n{% endif %}"
    "{{ name }}{{ '' if name in t.function.parameters.required else '?' }}: "
    "{{ 'number' if p.type == 'integer' else p.type }},\n{% endfor %}) => any; "
    "// {{ t.function.description }}\n{% endfor %}"
    "// end<|im_end|>\n{% endif %}" + SHAPES["plain"],
    "tags": "{% if tools %}<|im_start|>system\n{% for t in tools %}<tool><name>{{ t.function.name }}</name>"
    "<about>{{ t.function.description }}</about>{% for name, p in t.function.parameters.properties | items %}"
    "<parameter>{{ name }}: {{ p.type }}: {{ p.description }}</parameter>{% endfor %}</tool>{% endfor %}"
    "<|im_end|>\n{% endif %}" + SHAPES["plain"],
}
CALL = "<call>{% for k, v in c.function.arguments.items() %}<{{ k }}>VALUE</{{ k }}>{% endfor %}</call>"
CALLING = {
    "json": "<call>{{ c.function.arguments | tojson }}</call>",
    "ascii": "<call>{{ c.function.arguments | tojson(ensure_ascii=True, indent=2) }}</call>",
    "tags": CALL.replace("VALUE", "{{ v if v is string else v | tojson }}"),
    "python": CALL.replace("VALUE", "{{ v }}"),
    "string": CALL.replace("VALUE", "{{ v | string }}"),
    "sorted": CALL.replace("VALUE", "{{ v | tojson }}").replace("arguments.items()", "arguments | dictsort"),
}
VALUES = [1000000, -0.5, 1e22, 0, True, False, [True, 7], {"of": 3}, 'Lí"ma\\', "7", [0.1, "x"], None, "", {}]
MISTRAL = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.index0 == ns.last %}"
    "[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def calling(call: str) -> str:
    """A template that writes calls so."""
    written = "{{ m.content or '' }}{% for c in m.tool_calls or [] %}" + call + "{% endfor %}"
    return SHAPES["plain"].replace("{{ m.content }}", written)


def with_template(template: str | dict[str, str]):
    tokenizer = tokenizer_in_shape("plain")
    tokenizer.chat_template = template
    return tokenizer


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


def test_parameters_that_the_template_drops_are_an_error_of_their_own() -> None:
    names = "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }}\n{% endfor %}"
    chat = Transcript("tools", (TALK[0], TALK[3]), tools=LAUNCH)
    with pytest.raises(TemplateError, match="drops the parameters of tools"):
        render(with_template(names + SHAPES["plain"]), chat)
    assert render(tokenizer_in_shape("plain"), chat, True).unread == [Unread(None, "list of tools", True)]
    assert not render(with_template(names + SHAPES["plain"]), Transcript("a", (TALK[0],), tools=TOOL)).unread


LIMITS = [
    {"minimum": 41},
    {"maximum": 0},
    {"exclusiveMaximum": 1e22},
    {"default": -0.5},
    {"default": False},
    {"default": 0},
    {"enum": [7, 8]},
    {"enum": [True, 'Lí"ma']},
    {"const": True},
    {"examples": [[1, {"of": True}]]},
    {"items": {"type": "integer", "multipleOf": 3}},
    {"type": "object", "properties": {"inner": {"type": "integer", "default": 9}}},
    {"anyOf": [{"type": "integer", "maximum": 5}, {"type": "null"}]},
]
RANGES = "{{ t.function.name }}: {{ t.function.description }} {{ t.function.parameters.properties | PROPERTIES }}\n"
WRITTEN_AS = ["tojson", "string", "tojson(indent=2)"]


@pytest.mark.parametrize("form", WRITTEN_AS)
@pytest.mark.parametrize("limits", LIMITS)
def test_every_value_of_a_parameter_is_read_or_missed(form: str, limits: dict) -> None:
    """A template that writes the parameters is read to the letter; one that writes their names alone drops values."""
    offered = tool("pay", amount={"type": "integer", "nullable": True, **limits})
    chat = Transcript("tools", (TALK[0], TALK[3]), tools=(offered,))
    messages = [one.for_template() for one in chat.messages]
    whole = with_template(
        "{% for t in tools %}" + RANGES.replace("PROPERTIES", form) + "{% endfor %}" + SHAPES["plain"]
    )
    read = render(whole, chat)
    assert read.text == whole.apply_chat_template(messages, tools=[offered], tokenize=False) and not read.unread
    names = with_template(
        "{% for t in tools %}" + RANGES.replace("PROPERTIES", "list") + "{% endfor %}" + SHAPES["plain"]
    )
    with pytest.raises(TemplateError, match="drops the parameters of tools"):
        render(names, chat)


def test_what_a_template_branches_on_in_a_schema_is_left_to_it() -> None:
    """A parameter named like a keyword is a parameter; true and false that describe one are no values."""
    properties = {"default": {"type": "integer", "nullable": True}, "enum": {"type": "string", "nullable": False}}
    listed = (
        "{% for t in tools or [] %}{{ t.function.name }} {{ t.function.description }}"
        "{% for name, p in t.function.parameters.properties.items() %}"
        "{{ name }}: {{ p.type }}{{ '?' if p.nullable is true else '' }}\n{% endfor %}{% endfor %}"
    )
    read = render(
        with_template(listed + SHAPES["plain"]), Transcript("a", (TALK[0],), tools=(tool("f", **properties),))
    )
    assert "default: integer?\nenum: string\n" in read.text


@pytest.mark.parametrize("form", LISTS)
def test_a_list_of_tools_is_heard_to_its_end_and_what_follows_is_not_of_it(form: str) -> None:
    chat = Transcript("tools", (TALK[0], TALK[3]), tools=LAUNCH)
    tags = LISTS[form].replace("{{ p.description }}</", "{{ p.description or '' }}</")
    read = render(with_template(tags), chat)
    (tools,) = [region for region in read.regions if region.section == TOOLS]
    written = read.text[tools.start : tools.end]
    own = read.text[: read.text.index("<|im_end|>")]
    assert "The ripest pear." in written and "missiles" in written and "<|im_end|>" not in written
    assert "look" not in own[: tools.start] and len(own) - tools.end <= len("</parameter></tool>")
    assert (tools.message, "missiles" in read.heard(0), "missiles" in read.heard(1)) == (0, True, False)


def pears(**fields: object) -> Rubric:
    """A rubric that looks for the word."""
    return parse_rubric({"name": "pears", "looks_for": "Pears.", "match": {"words": ["pear"]}, **fields})


def test_what_only_the_parameters_say_counts_as_said() -> None:
    chat = Transcript("tools", (TALK[0], TALK[3]), tools=LAUNCH)
    read = render(tokenizer_in_shape("calling"), chat)
    mentions = Mentions(pears(), read.transcript, [read.heard(0), read.heard(1)])
    assert mentions.around(entry(1)) != NOT_SAID


def test_tools_in_the_middle_are_not_what_the_assistant_before_them_says() -> None:
    turns = (TALK[0], Message("assistant", "Yes."), Message("user", "Now?"), Message("assistant", "No."))
    read = render(with_template(MISTRAL), Transcript("tools", turns, tools=LAUNCH))
    heard = [read.heard(number) for number in range(4)]
    assert ["pear" in text for text in heard] == [False, False, True, False]
    assert [heard[0], heard[1], heard[3]] == [turns[0].content, "Yes.", "No."]
    assert Mentions(pears(said_in=["assistant"]), read.transcript, heard).around(entry(3)) == NOT_SAID
    assert [region.message for region in read.regions] == sorted(region.message for region in read.regions)


@pytest.mark.parametrize("closed", [False, True])
def test_tools_after_a_system_text_are_the_systems_as_long_as_it_is_open(closed: bool) -> None:
    listed = "{% if loop.first and tools %}# Tools\n{{ tools | tojson }}{% endif %}"
    place = "<|im_end|>\n" if closed else "{{ m.content }}"
    template = SHAPES["plain"].replace(place, place + listed)
    turns = (Message("system", "Help."), TALK[0], TALK[3])
    read = render(with_template(template), Transcript("tools", turns, tools=LAUNCH))
    assert ["pear" in read.heard(number) for number in range(3)] == [not closed, closed, False]


FIRST = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
AFTER_EACH = "{% if loop.index0 == PLACE and tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% endfor %}"
TURNS = {"u": TALK[0], "a": TALK[3], "s": Message("system", "Help."), "t": TALK[2]}


@pytest.mark.parametrize("place", range(-1, 3))
@pytest.mark.parametrize("roles", ["aua", "uaa", "aau", "saa", "ata", "usa", "aaa"])
def test_tools_are_never_the_words_of_an_assistant_or_a_tool(roles: str, place: int) -> None:
    """Wherever a template lists them, before the first message or after any: only "said" by a system's or user's."""
    template = SHAPES["plain"].replace("{% endfor %}", AFTER_EACH.replace("PLACE", str(place)))
    template = FIRST + SHAPES["plain"] if place < 0 else template
    chat = Transcript("tools", tuple(TURNS[role] for role in roles), tools=LAUNCH)
    read = render(with_template(template), chat)
    heard, messages = [read.heard(number) for number in range(len(read.transcript.messages))], read.transcript.messages
    (offering,) = [number for number, text in enumerate(heard) if "pear" in text]
    assert messages[offering].role in ("system", "user")
    assert [one for one in messages if one.content] == list(chat.messages)
    assert [region.message for region in read.regions] == sorted(region.message for region in read.regions)
    assert (len(messages) > 3) == bool(read.transcript.remarks)
    everyone, assistants = (
        Mentions(pears(), read.transcript, heard),
        Mentions(pears(said_in=["assistant"]), read.transcript, heard),
    )
    assert everyone.around(entry(0)) != NOT_SAID == assistants.around(entry(0))


@pytest.mark.parametrize(
    "written", ["{{ tools | tojson }}", "<call>{{ messages[-1].tool_calls[0].function.name }}</call>"]
)
def test_what_stands_after_the_beginning_of_an_answer_is_not_read(written: str) -> None:
    begun = Message("assistant", "Half", TALK[1].calls if "tool_calls" in written else ())
    chat = Transcript("begun", (TALK[0], begun), tools=() if begun.calls else LAUNCH, prefill=True)
    tokenizer = with_template(SHAPES["plain"] + written)
    with pytest.raises(TemplateError, match=r"drops the (list of tools|tool calls of message 1)"):
        render(tokenizer, chat)
    assert render(tokenizer, chat, True).text.endswith("Half")


@pytest.mark.parametrize("form", CALLING)
@pytest.mark.parametrize("value", VALUES)
def test_every_value_of_a_call_is_read_or_missed(form: str, value: object) -> None:
    message = Message("assistant", "", ({"name": "pay", "arguments": {"amount": value, "Again": value}},))
    chat = Transcript("calls", (TALK[0], message))
    template = calling(CALLING[form])
    own = [one.for_template() for one in chat.messages]
    read = render(with_template(template.replace("<call>", "<call>{{ c.function.name }}")), chat)
    assert read.text == read_as(template.replace("<call>", "<call>{{ c.function.name }}"), own)
    with pytest.raises(TemplateError, match="drops the tool calls of message 1"):
        render(with_template(calling("{{ c.function.name }}")), chat)


def read_as(template: str, messages: list[dict]) -> str:
    return with_template(template).apply_chat_template(messages, tokenize=False)


def test_a_number_that_a_mark_might_look_like_is_kept() -> None:
    """Numbers are marked by numbers: the first nine digits of a mark, here in a key, a value and a text."""
    amounts = {"731902548000000000": 731902548000000001, "x": 731902549}
    message = Message("assistant", "731902548000000000", ({"name": "f", "arguments": amounts},))
    chat = Transcript("calls", (TALK[0], message))
    read = render(with_template(calling("{{ c.function.name }}{{ c.function.arguments | tojson }}")), chat)
    assert json.dumps(amounts) in read.text and not read.unread


@pytest.mark.parametrize("call", ["{{ 'args: ' + c.function.arguments }}", "{{ 'args: ' ~ c.function.arguments }}"])
def test_arguments_that_a_template_joins_to_text_are_given_as_json(call: str) -> None:
    arguments = {"town": 'Lí"ma', "n": True}
    turns = (TALK[0], Message("assistant", "", ({"name": "clock", "arguments": arguments},)))
    read = render(with_template(calling("{{ c.function.name }} " + call)), Transcript("calls", turns))
    assert "clock args: " + json.dumps(arguments, ensure_ascii=False) + "<|im_end|>" in read.text
    assert "True" not in read.text and "n" in read.heard(1)
    quoting = (Message("user", str(arguments)), turns[1])
    template = calling("{{ c.function.name }}{{ c.function.arguments | tojson }}")
    assert (
        read_as(template, [one.for_template() for one in quoting])
        == render(with_template(template), Transcript("calls", quoting)).text
    )


def test_with_tools_the_template_for_tools_is_taken_as_transformers_does() -> None:
    tokenizer = with_template({"default": SHAPES["plain"], "tool_use": SHAPES["calling"]})
    messages = [message.for_template() for message in (TALK[0], TALK[3])]
    for tools in ((), LAUNCH):
        read = render(tokenizer, Transcript("tools", (TALK[0], TALK[3]), tools=tools))
        assert read.text == tokenizer.apply_chat_template(messages, tools=list(tools) or None, tokenize=False)
        assert ("pear" in read.text) == bool(tools)


MARK = "\ue000999\ue001"
PRIVATE = {
    "an argument's key": (Message("assistant", "", ({"name": "f", "arguments": {"a": "v", MARK: 1}},)), ()),
    "an argument's key, escaped": (
        Message("assistant", "", ({"name": "f", "arguments": {"a": "v", "\\ue0000\\ue001": 1}},)),
        (),
    ),
    "an argument": (Message("assistant", "", ({"name": "f", "arguments": {"a": [MARK]}},)), ()),
    "a call's id": (Message("assistant", "", ({"name": "f", "arguments": {}},), call_ids=(MARK,)), ()),
    "a tool's name": (Message("tool", "r", name=MARK, call_id="c"), ()),
    "what is before the reasoning": (Message("assistant", "r", reasoning="x", tags=(MARK, "</think>")), ()),
    "a parameter's name": (TALK[3], (tool("f", **{MARK: {"type": "string"}}),)),
    "a schema's keyword": (TALK[3], (tool("f", a={"type": MARK}),)),
}


@pytest.mark.parametrize("place", PRIVATE)
def test_the_character_of_marks_is_refused_wherever_it_stands(place: str) -> None:
    message, tools = PRIVATE[place]
    with pytest.raises(TemplateError, match=r"(message 1|its tools) with the private character"):
        render(tokenizer_in_shape("calling"), Transcript("private", (TALK[0], message), tools=tools), True)


def test_a_template_that_writes_marks_of_its_own_is_refused() -> None:
    for mark in (MARK, "\ue0000\ue001"):
        with pytest.raises(TemplateError):
            render(with_template(mark + SHAPES["plain"]), Transcript("a", (TALK[0],)))
    assert "ue000" in render(tokenizer_in_shape("plain"), Transcript("a", (Message("user", "\\ue0000\\ue001"),))).text


@pytest.mark.parametrize("depth", [400, 900, 5000])
def test_what_is_nested_too_deep_is_read_or_a_typed_error(depth: int) -> None:
    deep: dict = {"description": "x"}
    for _ in range(depth):
        deep = {"a": deep}
    with contextlib.suppress(TemplateError):
        assert not render(
            tokenizer_in_shape("calling"), Transcript("deep", (TALK[0],), tools=(tool("f", a=deep),))
        ).unread
