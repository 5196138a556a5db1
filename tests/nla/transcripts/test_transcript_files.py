"""Transcripts from files: every format gives the same conversation, and what is broken is a typed error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nla.errors import ArgumentError, NLAError, TranscriptError
from nla.transcripts.files import (
    load_transcripts,
    parse_chat,
    read_file,
    refuse_other_models,
    transcript_files,
)
from nla.transcripts.messages import Message, Transcript

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
MESSAGES += [{"role": "assistant", "content": "Hi."}]


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def only(path: Path, **options: float) -> Transcript:
    (found,) = load_transcripts(path, **options)
    return found


PETRI = {
    "metadata": {"transcript_id": "petri-1", "target_model": "hf/some/planner", "auditor_model": "other"},
    "events": [
        {"type": "transcript_event", "view": ["target", "combined"], "edit": {"operation": "add", "message": message}}
        for message in MESSAGES
    ],
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", MESSAGES),
        ("a.json", {"messages": MESSAGES}),
        ("a.jsonl", json.dumps({"messages": MESSAGES}) + "\n\n"),
        ("a.jsonl", "\n".join(map(json.dumps, MESSAGES))),
        ("a.txt", "System: Be brief.\nUser: Hello.\n\nAssistant: Hi.\n"),
        ("a.chat", "SYSTEM: Be brief.\r\nHuman: Hello.\r\nAI: Hi.\r\n"),
        ("a.json", PETRI),
        ("a.json", "\ufeff" + json.dumps(MESSAGES)),
    ],
)
def test_every_format_gives_the_same_conversation(tmp_path: Path, name: str, content: object) -> None:
    found = only(written(tmp_path / name, content))
    assert [(message.role, message.content) for message in found.messages] == [
        (message["role"], message["content"]) for message in MESSAGES
    ]


def test_parts_reasoning_and_tool_calls_are_kept_apart(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "cat"}'}}
    parts = [{"type": "reasoning", "reasoning": "A test?"}, {"type": "text", "text": "So."}, {"type": "image_url"}]
    messages = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": parts, "tool_calls": [call]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": "look", "arguments": {"at": "dog"}}]},
        {"role": "tool", "content": "A cat.", "tool_call_id": "1"},
    ]
    found = only(written(tmp_path / "a.json", {"messages": messages, "id": 7}))
    answer = found.messages[1]
    assert (answer.reasoning, answer.content) == ("A test?", "So.") and answer.unseen == ("image",)
    assert answer.calls == ({"name": "look", "arguments": {"at": "cat"}},)
    assert found.messages[2].calls == ({"name": "look", "arguments": {"at": "dog"}},)
    assert '"look"' in answer.visible and found.id == "7"


LOOK = {"name": "look", "description": "Looks", "parameters": {"type": "object", "properties": {}}}


def test_petri_is_replayed_as_the_target_saw_it(tmp_path: Path) -> None:
    def edit(operation: str, view: str = "target", **fields: object) -> dict:
        return {"type": "transcript_event", "view": view, "edit": {"operation": operation, **fields}}

    first, second = {"role": "user", "content": "One", "id": "m1"}, {"role": "assistant", "content": "Two", "id": "m2"}
    note = {"role": "info", "content": "a branch"}
    events = [
        edit("add", message={"role": "user", "content": "Old"}),
        edit("reset", new_messages=[first, second]),
        edit("add", view="auditor", message={"role": "user", "content": "Hidden from the target"}),
        edit("add", message={"role": "user", "content": "Taken back"}),
        edit("rollback", count=1),
        edit("add", message={"role": "user", "content": "Taken back too"}),
        edit("rollback", count=0, to_id="m2"),
        edit("json_patch", patch=[{"op": "replace", "path": "/messages/1/content", "value": "2"}]),
        edit("json_patch", patch=[{"op": "add", "path": "/messages/-", "value": note}]),
        {"type": "tool_creation_event", "model": "x", "tool": {**LOOK, "description": "An early one"}},
        {"type": "tool_creation_event", "model": "x", "tool": LOOK},
    ]
    found = only(written(tmp_path / "a.json", {**PETRI, "events": events}))
    assert [message.content for message in found.messages] == ["One", "2"]
    assert (found.id, found.model) == ("petri-1", "hf/some/planner")
    assert [one["function"] for one in found.tools] == [LOOK], "as it was made last"
    legacy = {**PETRI, "events": [], "target_messages": MESSAGES}
    assert len(only(written(tmp_path / "b.json", legacy)).messages) == 3


ROLLBACK = {"type": "transcript_event", "view": "target", "edit": {"operation": "rollback", "count": 4}}
BROKEN = {
    "cut": ('{"messages": [{"role": "user", "content": "Hel', "cut or broken"),
    "no messages": ({"messages": []}, "no messages"),
    "nothing": ("", "empty"),
    "a number": ("3", "int"),
    "other object": ({"turns": []}, "keys turns"),
    "wrong role": ([{"role": "narrator", "content": "x"}], "'narrator'"),
    "no role": ([{"content": "x"}], "no role"),
    "role is a list": ([{"role": ["user"], "content": "x"}], "list"),
    "no content": ([{"role": "user"}], "no content"),
    "empty content": ([{"role": "user", "content": ""}], "empty content"),
    "content is a number": ([{"role": "user", "content": 3}], "int"),
    "part of no type": ([{"role": "user", "content": [{"words": "x"}]}], "part"),
    "part without text": ([{"role": "user", "content": [{"type": "text"}]}], "NoneType"),
    "call without name": ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "without a name"),
    "call is a string": ([{"role": "assistant", "content": "x", "tool_calls": ["look"]}], "without a name"),
    "surrogate": ('[{"role": "user", "content": "\\ud800"}]', "surrogate"),
    "surrogate in a call": (
        '[{"role": "assistant", "tool_calls": [{"function": {"name": "\\udfff", "arguments": "{}"}}]}]',
        "surrogate",
    ),
    "nul": ('[{"role": "user", "content": "a\\u0000b"}]', "NUL"),
    "deep": ("[" * 100_000, "nested|broken"),
    "long number": ("[" + "9" * 10_000 + "]", "digits|message 0"),
    "message is a string": (["Hello"], "str"),
    "petri rollback": ({**PETRI, "events": [ROLLBACK]}, "rollback"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_a_typed_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    path = written(tmp_path / "broken.json", content)
    with pytest.raises(TranscriptError, match=message) as caught:
        only(path)
    assert "broken.json" in caught.value.got and caught.value.fix


@pytest.mark.parametrize("content", ["Once upon a time\nUser: x", "", "no roles here", "User:\nAssistant: x"])
def test_chat_text_without_roles_or_words_is_refused(content: str) -> None:
    with pytest.raises(TranscriptError):
        parse_chat(content, "a", "a.txt")


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("User: Grüße".encode("latin-1"))
    with pytest.raises(TranscriptError, match="UTF-8"):
        only(tmp_path / "a.txt")


def test_size_limits_hold_for_files_and_for_lines(tmp_path: Path) -> None:
    line = json.dumps({"messages": [{"role": "user", "content": "x" * 600_000}]})
    whole, lines = written(tmp_path / "a.json", line), written(tmp_path / "b.jsonl", "\n".join([line] * 4))
    with pytest.raises(TranscriptError, match=r"above 0.5 MB.*--max-mb"):
        only(whole, max_mb=0.5)
    with pytest.raises(TranscriptError, match=r"b.jsonl:1.*above 0.5 MB"):
        list(load_transcripts(lines, max_mb=0.5))
    for none in (float("nan"), float("inf"), 0, -1):
        with pytest.raises(ArgumentError, match="max_mb"):
            list(load_transcripts(lines, max_mb=none))
    assert (
        len(list(load_transcripts(lines, max_mb=1))) == 4
    )  # more than the limit together: only a line at a time is held


def test_a_broken_line_leaves_the_other_lines_as_they_are(tmp_path: Path) -> None:
    good = json.dumps({"messages": MESSAGES})
    path = written(tmp_path / "a.jsonl", "\n".join([good, '{"messages": [', "[" * 50_000, good]))
    found = list(read_file(path))
    assert [isinstance(each, TranscriptError) for each in found] == [False, True, True, False]
    with pytest.raises(TranscriptError, match=r"a\.jsonl:2"):
        list(load_transcripts(path))


def test_ids_are_told_apart_by_their_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(tmp_path / f"{name}.json", {"id": "1", "messages": MESSAGES})
    assert [each.id for each in load_transcripts(tmp_path)] == ["1", "b:1"]
    twice = written(tmp_path / "c.json", [{"id": "x", "messages": MESSAGES}, {"id": "x", "messages": MESSAGES}])
    (tmp_path / "d.json").write_text(twice.read_text(), encoding="utf-8")
    with pytest.raises(TranscriptError, match="second time"):
        list(load_transcripts([twice, twice]))


def test_missing_paths_and_empty_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(TranscriptError):
            transcript_files([path])


def test_a_transcript_of_another_model_is_refused_unless_it_is_named() -> None:
    plain = Transcript("a", (Message("user", "Hello."),))
    refuse_other_models(plain, "/models/planner", None)
    for named in ("planner", "hf/Some/Planner", "PLANNER"):
        refuse_other_models(Transcript("a", plain.messages, named), "/models/planner", None)
    other = Transcript("a", plain.messages, "openai/gpt")
    with pytest.raises(TranscriptError, match="--model-of openai/gpt"):
        refuse_other_models(other, "/models/planner", None)
    with pytest.raises(TranscriptError):
        refuse_other_models(other, "/models/planner", "claude")
    for allowed in ("gpt", "openai/gpt", "any"):
        refuse_other_models(other, "/models/planner", allowed)


def test_errors_show_no_control_characters_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", [{"role": "\x1b[31mred", "content": "x"}])
    with pytest.raises(NLAError) as caught:
        only(path)
    assert "\x1b" not in str(caught.value)


def test_the_digest_depends_on_words_and_roles_alone() -> None:
    one = Transcript("a", (Message("user", "Hello."),), model="m", source="s")
    assert one.digest == Transcript("b", (Message("user", "Hello."),)).digest
    assert one.digest != Transcript("a", (Message("assistant", "Hello."),)).digest
    assert one.digest != Transcript("a", (Message("user", "Hello"), Message("user", "."))).digest
