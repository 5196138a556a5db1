"""Forms that could be read as another conversation than they hold: each is read as what it is, or refused by name."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table
from pyarrow.parquet import write_table

from nla.errors import TranscriptError
from nla.transcripts.files import load_transcripts, read_file
from nla.transcripts.forms import read_value
from nla.transcripts.messages import ENCRYPTED, Transcript
from nla.transcripts.rendering import render
from tests.helpers.chat_templates import SHAPES, tokenizer_in_shape

ASKED = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yo"}
TOLD = [("user", "Hi"), ("assistant", "Yo")]


def read(value: Any) -> Transcript:
    (found,) = read_value(value, "a", "a.json")
    return found


def told(found: Transcript) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in found.messages]


def calls(found: Transcript) -> list[tuple[str, Any]]:
    return [(call["name"], call["arguments"]) for message in found.messages for call in message.calls]


def exchange(response: Any, **fields: Any) -> dict[str, Any]:
    return {"request": {"messages": [ASKED]}, "response": response, **fields}


FAILED = {
    "vllm": {"object": "error", "message": "The context is too long.", "type": "BadRequestError", "code": 400},
    "anthropic": {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
    "openai": {"error": {"message": "No quota", "code": 429}},
    "a message that is no object": {"message": "Internal error"},
    "a body that is text": {"status_code": 500, "body": "Internal error"},
    "batch": {"status_code": 400, "body": {"error": {"message": "no"}}},
    "responses": {"object": "response", "status": "failed", "error": {"message": "x"}, "output": [ANSWER]},
    "a choice": {"choices": [{"message": ANSWER, "finish_reason": "error", "error": {"message": "cut"}}]},
}


@pytest.mark.parametrize("name", FAILED)
def test_a_request_that_failed_is_no_answer(name: str) -> None:
    with pytest.raises(TranscriptError, match=r"failed|holds no answer"):
        read(exchange(FAILED[name]))
    with pytest.raises(TranscriptError, match="failed"):
        read(exchange("Connection reset", error="ConnectionError"))
    assert told(read(exchange({"message": ANSWER, "error": None}, error=None))) == TOLD


STORED = {"previous_response_id": "resp_1", "conversation": "conv_1", "prompt": {"id": "pmpt_1", "variables": {}}}


@pytest.mark.parametrize("key", STORED)
@pytest.mark.parametrize("rest", [{"input": "And Spain?"}, {"input": "And Spain?", "output": "Madrid."}])
def test_what_is_stored_at_the_provider_is_missing(key: str, rest: dict[str, Any]) -> None:
    with pytest.raises(TranscriptError, match=key):
        read({**rest, key: STORED[key]})
    assert read(rest).messages[0].content == "And Spain?"


JSON_TEXTS = ['{"output": "secret", "score": 3}', '{"message": "Hello"}', "[1, 2]", '{"choices": [{"a": 1}]}']
JSON_TEXTS += ['[{"name": "ant"}]', '{"messages": ["x"]}', '{"content": "x"}', '[{"role": "engineer", "name": "Ada"}]']


@pytest.mark.parametrize("text", JSON_TEXTS)
def test_json_that_somebody_wrote_into_a_table_stays_text(text: str, tmp_path: Path) -> None:
    for keys in (("prompt", "completion"), ("input", "output")):
        rows = [dict(zip(keys, pair, strict=True)) for pair in ((text, "Yo"), ("Hi", text))]
        quoted = ['"' + one.replace('"', '""') + '"' for row in rows for one in row.values()]
        (tmp_path / "a.csv").write_text("{},{}\n{},{}\n{},{}\n".format(*keys, *quoted), encoding="utf-8")
        write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
        for name in ("a.csv", "a.parquet"):
            found = [told(one) for one in load_transcripts(tmp_path / name)]
            assert found == [[("user", text), ("assistant", "Yo")], [("user", "Hi"), ("assistant", text)]]


def test_messages_in_the_cells_of_a_table_are_messages(tmp_path: Path) -> None:
    exchanges = [
        {"prompt": [ASKED], "completion": [ANSWER]},
        {"input": [ASKED], "output": {"choices": [{"message": ANSWER}]}},
        {"input": {"messages": [ASKED]}, "output": ANSWER},
        {"input": "Hi", "output": [{"type": "message", **ANSWER}]},
        {"messages": [ASKED], "response": {"object": "response", "output": [{"type": "message", **ANSWER}]}},
    ]
    for cells in exchanges:
        rows = [{key: value if isinstance(value, str) else json.dumps(value) for key, value in cells.items()}]
        write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
        assert [told(one) for one in load_transcripts(tmp_path / "a.parquet")] == [TOLD]


def test_keys_that_parquet_fills_with_nulls_are_no_arguments(tmp_path: Path) -> None:
    def message(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"id": name, "type": "function", "function": {"name": name, "arguments": arguments}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}

    def tool(name: str, key: str) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {key: {"type": "string"}}}
        return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}

    used = [("weather", {"city": "Lima", "near": {"km": 3}}), ("pay", {"amount": 3, "near": {"m": [1]}}), ("stop", {})]
    tools = [tool("weather", "city"), tool("pay", "amount")]
    write_table(
        Table.from_pylist([{"messages": [ASKED, *(message(*one) for one in used)], "tools": tools}]),
        tmp_path / "a.parquet",
    )
    (found,) = load_transcripts(tmp_path / "a.parquet")
    assert calls(found) == used and list(found.tools) == tools


ARGUMENTS = {"path": "/etc"}
WRITTEN = {
    "openai": {"tool_calls": [{"id": "1", "function": {"name": "rm", "arguments": json.dumps(ARGUMENTS)}}]},
    "openai custom": {"tool_calls": [{"type": "custom", "custom": {"name": "rm", "input": json.dumps(ARGUMENTS)}}]},
    "langchain": {"tool_calls": [{"name": "rm", "args": ARGUMENTS, "id": "1", "type": "tool_call"}]},
    "llama": {"function_call": {"name": "rm", "parameters": ARGUMENTS}},
    "inspect": {"tool_calls": [{"function": "rm", "arguments": ARGUMENTS}]},
    "anthropic": {"content": [{"type": "tool_use", "id": "1", "name": "rm", "input": ARGUMENTS}]},
    "bedrock": {"content": [{"toolUse": {"toolUseId": "1", "name": "rm", "input": ARGUMENTS}}]},
    "hermes": {"content": f'<tool_call>\n{{"name": "rm", "parameters": {json.dumps(ARGUMENTS)}}}\n</tool_call>'},
    "sharegpt": {"from": "function_call", "value": json.dumps({"name": "rm", "parameters": ARGUMENTS})},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_calls_arguments_are_read_under_each_of_their_names(name: str) -> None:
    entry = WRITTEN[name] if "from" in WRITTEN[name] else {"role": "assistant", "content": "", **WRITTEN[name]}
    found = read({"messages": [ASKED, entry]})
    assert calls(found) == [("rm", ARGUMENTS)]
    assert [call["function"]["arguments"] for call in found.messages[1].for_template()["tool_calls"]] == [ARGUMENTS]


def test_a_call_without_arguments_is_refused_and_in_tags_it_is_text() -> None:
    for call in ({"name": "rm", "kwargs": ARGUMENTS}, {"function": {"name": "rm"}}):
        with pytest.raises(TranscriptError, match="'rm' without arguments"):
            read([ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}])
    with pytest.raises(TranscriptError, match="without arguments"):
        read({"input": [ASKED, {"type": "function_call", "call_id": "1", "name": "rm"}]})
    none = {"role": "assistant", "tool_calls": [{"function": {"name": "ls", "arguments": None}}]}
    assert calls(read([ASKED, none])) == [("ls", {})]
    text = '<tool_call>{"name": "rm", "kwargs": {"path": "/etc"}}</tool_call>'
    found = read([ASKED, {"role": "assistant", "content": text}])
    assert told(found)[1] == ("assistant", text) and not calls(found)


TAG = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("text", [f"First.\n{TAG}\nThen.", f"{TAG}\nThen.\n{TAG}", f"{TAG}\n<tool_call>\nlook\n"])
def test_text_after_calls_in_tags_stays_after_them(text: str) -> None:
    found = read([ASKED, {"role": "assistant", "content": text}])
    assert told(found)[1] == ("assistant", text) and not calls(found)


def test_calls_in_tags_at_the_end_are_calls() -> None:
    message = read([ASKED, {"role": "assistant", "content": f"First.\n{TAG}\n{TAG} \n"}]).messages[1]
    assert message.content == "First." and [call["name"] for call in message.calls] == ["look", "look"]
    assert message.untagged == f"First.\n{TAG}\n{TAG} \n"


def test_text_after_calls_in_parts_stays_after_them() -> None:
    use = {"type": "tool_use", "id": "1", "name": "look", "input": {}}
    parts = [{"type": "text", "text": "A"}, use, use, {"type": "text", "text": "B"}, use]
    found = read([ASKED, {"role": "assistant", "content": parts}])
    assert [(one.content, len(one.calls)) for one in found.messages[1:]] == [("A", 2), ("B", 1)]
    silent = [use, {"type": "text", "text": ""}, use, {"cachePoint": {"type": "default"}}]
    assert [len(one.calls) for one in read([ASKED, {"role": "assistant", "content": silent}]).messages] == [0, 2]


def part(kind: str, word: str) -> dict[str, Any]:
    if kind == "tool_use":
        return {"type": kind, "id": word, "name": word, "input": {"on": word}}
    return {"type": kind, kind: word}


KINDS = ["thinking", "text", "tool_use"]
ORDERS = [[*order, last] for n in (1, 2, 3) for order in product(KINDS, repeat=n) for last in ("text", "tool_use")]
IN_TURN = "{% if m.role == messages[loop.index0 - 1].role and loop.index0 %}{{ raise_exception('in turn') }}{% endif %}"


@pytest.mark.parametrize("kinds", ORDERS, ids=lambda kinds: " ".join(kinds))
def test_thinking_text_and_calls_are_read_in_the_order_in_which_they_were_written(kinds: list[str]) -> None:
    """The order stays where a template takes several messages of the assistant's; elsewhere the report says so."""
    words = [f"word{number}" for number in range(len(kinds))]
    parts = [part(*one) for one in zip(kinds, words, strict=True)]
    found = read([ASKED, {"role": "assistant", "content": parts}, ASKED])
    tokenizer = tokenizer_in_shape("plain")
    tokenizer.chat_template = SHAPES["calling"].replace("{{ m.content", "{{ m.reasoning_content or '' }} {{ m.content")
    chat = render(tokenizer, found)
    at = [chat.text.index(word) for word in words]
    assert at == sorted(at) and not chat.unread and not chat.transcript.remarks

    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>{{", IN_TURN + "<|im_start|>{{")
    chat = render(tokenizer, found)
    at = [chat.text.index(word) for word in words]
    stages = [KINDS.index(kind) for kind in kinds]
    assert [words[n] for n in sorted(range(len(at)), key=lambda n: at[n])] == [
        words[n] for n in sorted(range(len(at)), key=lambda n: (stages[n], n))
    ]
    assert len(chat.transcript.messages) == 3 and not chat.unread
    assert bool(chat.transcript.remarks) == (stages != sorted(stages)) == (len(found.messages) > 3)


def test_what_is_locked_or_blank_between_parts_cuts_nothing() -> None:
    locked = [{"type": "redacted_thinking", "data": "x"}, {"type": "thinking", "thinking": "", "signature": "s"}]
    parts = [part("thinking", "a"), part("text", "b"), *locked, part("text", "\n\n"), part("tool_use", "c")]
    (_, message) = read([ASKED, {"role": "assistant", "content": parts}]).messages
    assert (message.reasoning, message.content, message.unseen) == ("a", "b\n\n\n", (ENCRYPTED, ENCRYPTED))


def test_calls_beside_parts_belong_to_the_last_of_them() -> None:
    parts = [part("thinking", "a"), part("text", "b"), {"type": "reasoning", "reasoning": "c"}, part("text", "d")]
    call = {"id": "1", "function": {"name": "look", "arguments": "{}"}}
    found = read([ASKED, {"role": "assistant", "id": "m", "content": parts, "tool_calls": [call]}])
    assert [(one.reasoning, one.content, len(one.calls)) for one in found.messages[1:]] == [
        ("a", "b", 0),
        ("c", "d", 1),
    ]
    assert [one.continues for one in found.messages] == [False, False, True] and not found.unused


@pytest.mark.parametrize("rows", ["grouped", "mixed"])
def test_messages_are_gathered_by_the_conversation_they_name(rows: str, tmp_path: Path) -> None:
    table = [("c1", "user", "Hi"), ("c1", "assistant", "Yo"), ("c2", "user", "Bye"), ("c2", "assistant", "Ciao")]
    table = table if rows == "grouped" else [table[0], table[2], table[1], table[3]]
    for key in ("conversation_id", "session_id"):
        entries = [{key: name, "role": role, "content": text} for name, role, text in table]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
        (tmp_path / "b.json").write_text(json.dumps(entries), encoding="utf-8")
        lines = [f"{key},role,content", *(",".join(row) for row in table)]
        (tmp_path / "c.csv").write_text("\n".join(lines), encoding="utf-8")
        for path in sorted(tmp_path.iterdir()):
            found = list(load_transcripts(path))
            assert [(one.id, told(one)) for one in found] == [
                ("c1", TOLD),
                ("c2", [("user", "Bye"), ("assistant", "Ciao")]),
            ]
            assert all(one.unused == () for one in found)
    with pytest.raises(TranscriptError, match="message 1 without conversation_id"):
        read([{**ASKED, "conversation_id": "c1"}, ANSWER])


ENCRYPTED_DETAIL = {"type": "reasoning.encrypted", "data": "gAAA"}
SUMMARY = {"type": "reasoning.summary", "summary": "I added."}
WORDS = {"type": "reasoning.text", "text": "Two and two."}


@pytest.mark.parametrize(
    ("details", "beside", "reasoning", "summary"),
    [
        ([SUMMARY, ENCRYPTED_DETAIL], "I added.", "", "I added."),
        ([ENCRYPTED_DETAIL], "I added.", "", "I added."),
        ([SUMMARY], "I added.", "", "I added."),
        ([SUMMARY, ENCRYPTED_DETAIL], None, "", "I added."),
        ([WORDS, ENCRYPTED_DETAIL], "Two and two.", "", "Two and two."),  # Gemini's, which sums up in its own form
        ([WORDS | {"signature": "s"}, ENCRYPTED_DETAIL], "Two and two.", "Two and two.", ""),  # Anthropic's
        ([WORDS], "Two and two.", "Two and two.", ""),
        ([WORDS], None, "Two and two.", ""),
    ],
)
def test_a_summary_of_locked_reasoning_is_not_given_to_the_target(
    details: list[Any], beside: str | None, reasoning: str, summary: str
) -> None:
    message = read([ASKED, {**ANSWER, "reasoning": beside, "reasoning_details": details}]).messages[1]
    assert (message.reasoning, message.summary) == (reasoning, summary)
    locked = ENCRYPTED_DETAIL in details or SUMMARY in details
    assert message.unseen == ((ENCRYPTED,) if locked else ())


BEGUN = {"role": "assistant", "content": '{"a":'}
ENDED = {"role": "assistant", "content": " 1}"}
CONTINUED = {
    "anthropic": ({}, BEGUN, {**ENDED, "type": "message", "stop_reason": "end_turn"}),
    "anthropic parts": (
        {},
        {**BEGUN, "content": [{"type": "text", "text": BEGUN["content"]}]},
        {"role": "assistant", "content": [{"type": "text", "text": " 1}"}], "stop_reason": "end_turn"},
    ),
    "bedrock": (
        {},
        {**BEGUN, "content": [{"text": BEGUN["content"]}]},
        {"output": {"message": {"role": "assistant", "content": [{"text": " 1}"}]}}, "stopReason": "end_turn"},
    ),
    "deepseek": ({}, {**BEGUN, "prefix": True}, {"choices": [{"message": ENDED}]}),
    "mistral": ({}, {**BEGUN, "prefix": True}, {"choices": [{"message": {**ENDED, "content": '{"a": 1}'}}]}),
    "moonshot": ({}, {**BEGUN, "partial": True}, {"choices": [{"message": ENDED}]}),
    "vllm": ({"continue_final_message": True}, BEGUN, {"choices": [{"message": ENDED}]}),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_an_answer_goes_on_from_the_beginning_that_was_asked_for(name: str) -> None:
    fields, begun, response = CONTINUED[name]
    found = read({"request": {**fields, "messages": [ASKED, begun]}, "response": response})
    assert told(found) == [("user", "Hi"), ("assistant", '{"a": 1}')] and not found.prefill


def test_an_answer_after_an_assistants_message_is_another_message() -> None:
    found = read({"request": {"messages": [ASKED, BEGUN]}, "response": {"choices": [{"message": ENDED}]}})
    assert told(found)[1:] == [("assistant", '{"a":'), ("assistant", " 1}")]


@pytest.mark.parametrize("response", ["Yo", {"choices": [{"message": ANSWER}, {"message": ANSWER}]}, [ANSWER], ANSWER])
def test_an_answer_that_the_messages_hold_already_is_read_once(response: Any) -> None:
    for found in read_value({"messages": [ASKED, ANSWER], "response": response}, "a", "a"):
        assert told(found) == TOLD
    asked_twice = [ASKED, ANSWER, ASKED]
    assert told(read_value({"messages": asked_twice, "response": response}, "a", "a")[0]) == [*TOLD, *TOLD]


ANSWERED: dict[str, Any] = {
    "text": "Yo",
    "message": ANSWER,
    "messages": [ANSWER],
    "openai": {"object": "chat.completion", "choices": [{"message": ANSWER}]},
    "responses": {"object": "response", "output": [{"type": "message", **ANSWER}]},
    "items": [{"type": "message", **ANSWER}],
    "parts": [{"type": "text", "text": "Yo"}],
    "output parts": [{"type": "output_text", "text": "Yo", "annotations": []}],
    "bedrock": {"message": {"role": "assistant", "content": [{"text": "Yo"}]}},
}


@pytest.mark.parametrize("key", ["output", "completion", "response"])
@pytest.mark.parametrize("name", ANSWERED)
def test_the_answer_beside_messages_is_the_assistants(name: str, key: str, tmp_path: Path) -> None:
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
    }
    for asked in ([ASKED], [ASKED, called, {"role": "tool", "tool_call_id": "1", "content": "so"}]):
        found = read({"messages": asked, key: ANSWERED[name], "score": 3})
        assert told(found)[-1] == ("assistant", "Yo") and len(found.messages) == len(asked) + 1
        assert found.unused == ("score",) and told(found)[0] == ("user", "Hi")
    cells = {"messages": json.dumps([ASKED]), key: ANSWERED[name]}
    cells[key] = cells[key] if isinstance(cells[key], str) else json.dumps(cells[key])
    write_table(Table.from_pylist([cells]), tmp_path / "a.parquet")
    in_cells = (
        cells[key] if name in ("bedrock", "parts", "output parts") else "Yo"
    )  # JSON in a cell is text, unless it is messages
    assert [told(one) for one in load_transcripts(tmp_path / "a.parquet")] == [[TOLD[0], ("assistant", in_cells)]]


PARTS = [
    [{"type": "text"}],
    [{"type": "text", "text": 3}],
    [{"type": "score", "text": "x"}],
    [{"type": "text", "text": " "}],
]
NO_ANSWERS = [
    *PARTS,
    3,
    0.5,
    True,
    "",
    "  ",
    [],
    {},
    ["x"],
    [1],
    {"score": 3},
    {"messages": [ASKED, ANSWER]},
    {"message": "x"},
]


@pytest.mark.parametrize("key", ["output", "completion"])
def test_what_is_no_answer_to_messages_is_named_as_unused(key: str) -> None:
    for value in NO_ANSWERS:
        found = read({"messages": [ASKED], key: value})
        assert told(found) == TOLD[:1] and found.unused == (key,)
    for last in (ANSWER, {"role": "system", "content": "Stop."}):
        found = read({"messages": [ASKED, last], key: "Else"})
        assert len(found.messages) == 2 and found.unused == (key,)


@pytest.mark.parametrize("key", ["output", "completion"])
def test_that_a_text_beside_messages_was_taken_for_the_answer_is_a_remark(key: str) -> None:
    for value in ("positive", "0.93", ANSWER, ANSWERED["parts"]):
        (remark,) = read({"messages": [ASKED], key: value}).remarks
        assert f"under {key} beside the messages was taken for the assistant's answer" in remark
    assert not read({"messages": [ASKED, ANSWER], key: "positive"}).remarks
    assert not read({"messages": [ASKED], key: 3}).remarks


def test_what_is_known_of_a_chat_is_used() -> None:
    found = read({"messages": [ASKED, ANSWER], "attributes": {"topic": "x"}, "split": "train", "score": 3})
    assert (found.attributes, found.split, found.unused) == ({"topic": "x"}, "train", ("score",))
    odd = {"messages": [ASKED, ANSWER], "attributes": ["x"], "split": {"a": 1}}
    assert read(odd).unused == ("attributes", "split")


def test_an_answer_that_is_an_error_is_none() -> None:
    with pytest.raises(TranscriptError, match="failed"):
        read({"messages": [ASKED], "output": FAILED["vllm"]})


@pytest.mark.parametrize("key", ["system", "system_prompt", "instructions"])
def test_a_system_text_that_the_messages_hold_is_read_once(key: str) -> None:
    place = "input" if key == "instructions" else "messages"
    for text in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        for first in (
            [],
            [{"role": "system", "content": "Be brief."}],
            [{"role": "developer", "content": "Be brief."}],
        ):
            assert told(read({key: text, place: [*first, ASKED]})) == [("system", "Be brief."), ("user", "Hi")]
    both = read({key: "Be brief.", place: [{"role": "system", "content": "Be kind."}, ASKED]})
    assert told(both)[:2] == [("system", "Be brief."), ("system", "Be kind.")]
    assert told(read({"system": "A", "system_prompt": "B", "prompt": "Hi", "completion": "Yo"}))[:2] == [
        ("system", "A"),
        ("system", "B"),
    ]


def test_instructions_beside_messages_are_no_system_text() -> None:
    found = read({"messages": [ASKED, ANSWER], "instructions": "Rate the answer."})
    assert told(found) == TOLD and found.unused == ("instructions",)


def test_fields_of_messages_that_nothing_uses_are_named() -> None:
    use = {"type": "tool_use", "id": "1", "name": "rm", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": "no", "is_error": True}
    messages = [
        {**ASKED, "name": "ada", "annotations": [], "toxic": False},
        {"role": "assistant", "content": [use], "weight": 0},
        {"role": "user", "content": [result]},
        {"from": "gpt", "value": "Yo", "markdown": None, "train": True},
        {"role": "tool", "content": "x", "name": "rm", "tool_call_id": "1"},
    ]
    named = ("is_error of messages", "name of messages", "train of messages", "weight of messages")
    assert read({"messages": messages}).unused == named
    lines = [{"input": "Hi", "output": [{"type": "message", "phase": "final", "status": "completed", **ANSWER}]}]
    assert read(lines).unused == ("phase of messages",)


@pytest.mark.parametrize(
    "extra",
    [
        {"toolInvocations": [{"state": "result", "toolName": "rm", "args": {"a": 1}, "result": "gone"}]},
        {"parts": [{"type": "text", "text": "Yo"}, {"type": "tool-rm", "input": {"a": 1}, "output": "gone"}]},
    ],
)
def test_calls_beside_the_content_under_other_names_are_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(TranscriptError, match="toolInvocations, parts"):
        read([ASKED, {**ANSWER, **extra}])
    assert told(read([ASKED, {**ANSWER, "toolInvocations": [], "parts": [{"type": "text", "text": "Yo"}]}])) == TOLD


def test_reasoning_before_a_users_item_is_not_the_next_answers() -> None:
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Stop?"}]}
    ask = {"type": "message", **ASKED}
    answer = {"type": "message", **ANSWER}
    found = read({"input": [ask, thought, ask, answer]})
    assert [(one.role, one.reasoning) for one in found.messages] == [
        ("user", ""), ("assistant", "Stop?"), ("user", ""), ("assistant", ""),
    ]  # fmt: skip
    call = {"type": "function_call", "call_id": "1", "name": "rm", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "1", "output": ""}
    found = read({"input": [ask, call, thought, output, answer]})
    assert [(one.role, one.reasoning) for one in found.messages][2:] == [
        ("assistant", "Stop?"), ("tool", ""), ("assistant", ""),
    ]  # fmt: skip


EMPTY = {
    "openai": [{"role": "tool", "tool_call_id": "1", "content": ""}],
    "openai parts": [{"role": "tool", "tool_call_id": "1", "content": []}],
    "anthropic": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1"}]}],
    "parts of a tool": [{"role": "tool", "content": [{"type": "tool_result", "tool_use_id": "1", "content": ""}]}],
    "bedrock": [{"role": "user", "content": [{"toolResult": {"toolUseId": "1", "content": []}}]}],
    "responses": [{"type": "function_call_output", "call_id": "1", "output": ""}],
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_tool_that_printed_nothing_is_read(name: str) -> None:
    found = read({"input": [ASKED, *EMPTY[name], ANSWER]})
    assert told(found) == [TOLD[0], ("tool", ""), TOLD[1]] and found.messages[1].call_id == "1"


def test_only_a_tool_may_say_nothing() -> None:
    for entry in ({"role": "tool", "tool_call_id": "1"}, {**ASKED, "content": ""}, {**ANSWER, "content": []}):
        with pytest.raises(TranscriptError, match="content"):
            read([ASKED, entry])


@pytest.mark.parametrize("key", ["id", "custom_id", None])
def test_the_answers_to_one_request_are_numbered(key: str | None, tmp_path: Path) -> None:
    answers = {"choices": [{"message": {**ANSWER, "content": text}} for text in "abc"]}
    record = exchange(answers, **({key: "x1"} if key else {}))
    (tmp_path / "f.json").write_text(json.dumps(record), encoding="utf-8")
    found = list(load_transcripts(tmp_path))
    assert [one.id for one in found] == [f"{'x1' if key else 'f'}:{n}" for n in range(3)]
    assert [one.messages[-1].content for one in found] == ["a", "b", "c"]


def test_bedrocks_tools_reasoning_and_media_are_read() -> None:
    spec = {"name": "clock", "description": "Tells", "inputSchema": {"json": {"type": "object", "required": ["town"]}}}
    thought = {"reasoningContent": {"reasoningText": {"text": "Which?", "signature": "s"}}}
    use = {"toolUse": {"toolUseId": "1", "name": "clock", "input": {"town": "Lima"}}}
    results = [{"json": {"time": "9:30"}}, {"text": "or so"}, {"image": {"format": "png", "source": {"bytes": "x"}}}]
    found = read(
        {
            "modelId": "m",
            "system": [{"text": "Be brief."}, {"cachePoint": {"type": "default"}}],
            "messages": [
                {"role": "user", "content": [{"text": "Hi"}, {"document": {"name": "d"}}]},
                {"role": "assistant", "content": [thought, use]},
                {
                    "role": "user",
                    "content": [{"toolResult": {"toolUseId": "1", "content": results, "status": "error"}}],
                },
                {"role": "assistant", "content": [{"reasoningContent": {"redactedContent": "x"}}, {"text": "Yo"}]},
            ],
            "toolConfig": {"tools": [{"toolSpec": spec}, {"cachePoint": {}}], "toolChoice": {"any": {}}},
        }
    )
    assert told(found) == [
        ("system", "Be brief."), ("user", "Hi"), ("assistant", ""), ("tool", '{"time": "9:30"}\nor so'),
        ("assistant", "Yo"),
    ]  # fmt: skip
    assert calls(found) == [("clock", {"town": "Lima"})] and found.messages[2].reasoning == "Which?"
    assert [one.unseen for one in found.messages] == [(), ("document",), (), ("image",), (ENCRYPTED,)]
    assert found.messages[2].call_ids == ("1",) and found.messages[3].call_id == "1"
    function = found.tools[0]["function"]
    assert (function["name"], function["parameters"]) == ("clock", spec["inputSchema"]["json"])
    assert found.unused == ("status of messages", "tool cachePoint", "toolConfig.toolChoice")
    with pytest.raises(TranscriptError, match="part of type"):
        read([ASKED, {"role": "assistant", "content": [{"guardContent": {"text": {"text": "x"}}}]}])


def test_the_schemas_of_mcps_tools_are_read() -> None:
    schema = {"type": "object", "properties": {"town": {"type": "string"}}}
    found = read({"messages": [ASKED], "tools": [{"name": "clock", "inputSchema": schema}]})
    assert found.tools[0]["function"]["parameters"] == schema


def test_text_without_roles_is_refused_as_no_conversation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("It was a quiet day.\n", encoding="utf-8")
    (found,) = read_file(tmp_path / "a.txt")
    assert isinstance(found, TranscriptError) and "a conversation" in found.expected
