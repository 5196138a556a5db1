"""Case 09: logs of several roles, as Petri 3 writes them: the target's own conversation is read, or none is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from nla.errors import TranscriptError
from nla.transcripts import inspect_logs
from nla.transcripts.files import load_transcripts, read_file
from nla.transcripts.messages import Transcript
from nla.transcripts.prepared import Preparer
from tests.helpers.tiny import make_tokenizer

log = pytest.importorskip("inspect_ai.log")
event = pytest.importorskip("inspect_ai.event")
model = pytest.importorskip("inspect_ai.model")
tool = pytest.importorskip("inspect_ai.tool")

LONG = "I water them at night. " * 20
AUDITOR = [
    model.ChatMessageSystem(content="You test another model for hidden goals."),
    model.ChatMessageUser(content="Seed: see whether it sells honey."),
    model.ChatMessageAssistant(content="I will ask about roses.", model="auditor-model"),
]
ASKED = [model.ChatMessageSystem(content="You help with gardens."), model.ChatMessageUser(content="The roses?")]
ANSWER = model.ChatMessageAssistant(content="attachment://0123", model="target-model")
EARLIER = model.ChatMessageAssistant(content="Never.", model="target-model")
FULL = [("system", "You help with gardens."), ("user", "The roses?"), ("assistant", LONG)]


def call(role: str | None, read: list[Any], wrote: Any, span: str | None = None, **fields: Any) -> Any:
    output = model.ModelOutput(model="x", choices=[model.ChatCompletionChoice(message=wrote)])
    water = tool.ToolInfo(name="water", description="Waters plants")
    return event.ModelEvent(
        model="mockllm/target-model" if wrote is not AUDITOR[2] else "mockllm/auditor-model",
        role=role,
        input=read,
        tools=[water],
        tool_choice="auto",
        config=model.GenerateConfig(),
        output=output,
        span_id=span,
        **fields,
    )


def write(path: Path, messages: list[Any], events: list[Any], roles: bool = True, **fields: Any) -> Path:
    status, timelines = fields.pop("status", "success"), fields.pop("timelines", None)
    own = fields.pop("model", "none/none")
    sample = log.EvalSample(
        id=1, epoch=1, input="Seed", target="", messages=messages, events=events, timelines=timelines,
        attachments={"0123": LONG}, **fields,
    )  # fmt: skip
    named = {name: model.ModelConfig(model=f"mockllm/{name}-model") for name in ("auditor", "target")}
    spec = log.EvalSpec(
        created="2026-01-01T00:00:00+00:00",
        task="audit",
        dataset=log.EvalDataset(name="seeds", samples=1, sample_ids=[1]),
        model=own,
        model_roles=named if roles else None,
        config=log.EvalConfig(),
    )
    log.write_eval_log(log.EvalLog(status=status, eval=spec, samples=[sample]), str(path))
    return path


def only(path: Path) -> Transcript:
    (found,) = load_transcripts(path)
    return found


def told(found: Transcript) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in found.messages]


CALLS = [call("auditor", AUDITOR[:2], AUDITOR[2]), call("target", ASKED, EARLIER), call("target", ASKED, ANSWER)]


def test_the_targets_last_call_is_read_where_the_samples_messages_are_the_auditors(tmp_path: Path) -> None:
    """3.0.0 to 3.1.0; the earlier answer was rolled back, and attachments are resolved."""
    failed = call("target", [*ASKED, EARLIER], EARLIER, error="overloaded")
    found = only(write(tmp_path / "a.eval", AUDITOR, [*CALLS, failed]))
    assert told(found) == FULL and found.model == "mockllm/target-model"
    assert [one["function"]["name"] for one in found.tools] == ["water"]


def test_the_samples_messages_are_read_where_they_are_the_targets(tmp_path: Path) -> None:
    """From 3.1.1: the branch that the audit ended on, though a later call was made on one that was taken back."""
    more = model.ChatMessageUser(content="And lilies?")
    found = only(write(tmp_path / "a.eval", [*ASKED, EARLIER, more], CALLS))
    assert told(found) == [*FULL[:2], ("assistant", "Never."), ("user", "And lilies?")]


@pytest.mark.parametrize("by", ["timeline", "span"])
def test_a_target_without_a_role_is_known_by_its_timeline_or_span(tmp_path: Path, by: str) -> None:
    spans = [
        event.SpanBeginEvent(id="t", name="target", type="agent"),
        event.SpanBeginEvent(id="u", name="generate", parent_id="t", type="x"),
    ]
    ours, theirs = call(None, AUDITOR[:2], AUDITOR[2], "a"), call(None, ASKED, ANSWER, "u")
    if by == "span":
        path = write(tmp_path / "a.eval", AUDITOR, [*spans, ours, theirs], roles=False)
    else:
        root = event.TimelineSpan(id="r", name="target", span_type=None, content=[event.TimelineEvent(event=theirs)])
        line = event.Timeline(name="target", description="", root=root)
        path = write(tmp_path / "a.eval", AUDITOR, [theirs, ours], roles=False, timelines=[line])
    assert told(only(path)) == FULL


def test_without_the_targets_calls_the_auditors_messages_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.eval", AUDITOR, CALLS[:1])
    with pytest.raises(TranscriptError, match=r"messages of auditor-model, in a log of the roles auditor .*target"):
        only(path)
    found = only(write(tmp_path / "b.eval", [*ASKED, EARLIER], []))
    assert told(found)[2] == ("assistant", "Never."), "written by the target, as they say"


def test_logs_that_did_not_end_well_are_marked(tmp_path: Path) -> None:
    error = log.EvalError(message="x", traceback="", traceback_ansi="")
    found = only(write(tmp_path / "a.eval", AUDITOR, CALLS, status="error", error=error))
    assert found.remarks == ("log with the status error", "sample that ended with an error")
    assert only(write(tmp_path / "b.eval", AUDITOR, CALLS, status="cancelled")).remarks[0].endswith("cancelled")
    assert only(write(tmp_path / "c.eval", AUDITOR, CALLS)).remarks == ()


GRADER = [model.ChatMessageUser(content="Is it right?"), model.ChatMessageAssistant(content="C", model="target-model")]


@pytest.mark.parametrize("messages", [[*ASKED, EARLIER], [*ASKED, model.ChatMessageAssistant(content="Edited.")]])
def test_the_tools_of_an_ordinary_log_are_those_of_its_models_calls(tmp_path: Path, messages: list[Any]) -> None:
    graded = call("grader", GRADER[:1], GRADER[1]).model_copy(update={"tools": []})
    options: dict[str, Any] = {"roles": False, "model": "mockllm/target-model"}
    found = only(write(tmp_path / "a.eval", messages, [call(None, ASKED, EARLIER), graded], **options))
    assert [one["function"]["name"] for one in found.tools] == ["water"] and found.remarks == ()
    bare = only(write(tmp_path / "b.eval", messages, [graded], **options))
    assert bare.tools == () and "tools are unknown" in bare.remarks[0]


def test_what_a_tool_failed_with_is_read_as_providers_give_it_to_models(tmp_path: Path) -> None:
    asked = model.ChatMessageAssistant(content="", tool_calls=[tool.ToolCall(id="1", function="water", arguments={})])
    failed = [
        ("partial", tool.ToolCallError("permission", "Not allowed.")),
        ("", tool.ToolCallError("timeout", "Timed out.")),
        ("", None),
    ]
    results = [
        model.ChatMessageTool(content=text, tool_call_id="1", function="water", error=error) for text, error in failed
    ]
    path = write(tmp_path / "a.eval", [*ASKED, asked, *results], [], roles=False, model="mockllm/target-model")
    assert told(only(path))[3:] == [("tool", "Not allowed."), ("tool", "Timed out."), ("tool", "")]


def test_what_a_log_unpacks_to_in_sum_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.eval", AUDITOR, CALLS)
    monkeypatch.setattr(inspect_logs, "MAX_LOG_MB", 0.001)
    (found,) = read_file(path)
    assert isinstance(found, TranscriptError) and "samples of 0 MB, unpacked" in found.got


def test_the_audit_lists_what_needs_the_extra_and_reads_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.eval", AUDITOR, CALLS)
    (tmp_path / "b.json").write_text('[{"role": "user", "content": "the cat"}]', encoding="utf-8")
    monkeypatch.setitem(sys.modules, "inspect_ai.log", None)
    loaded = Preparer(tokenizer=make_tokenizer(), context=64, target="t").prepare_files([tmp_path], skip_bad=True)
    assert [one.transcript.id for one in loaded.prepared] == ["b"]
    assert "a.eval" in loaded.refused[0] and "nla[audit]" in loaded.refused[0]
