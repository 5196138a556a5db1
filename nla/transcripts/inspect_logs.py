"""Inspect's logs in, their samples out as transcripts."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nla.errors import MissingExtraError, TranscriptError, visible
from nla.transcripts.calls import read_tools
from nla.transcripts.entries import parse_messages
from nla.transcripts.messages import Transcript, bad

MAX_ENTRY_MB = 1024
"""Largest sample of a log, unpacked."""

MAX_LOG_MB = 16 * 1024
"""Largest log, unpacked."""

TARGET = "target"
"""The role, timeline and span of the model that an audit is about."""

_NO_CALLS = "log without the model's calls, so that its tools are unknown"
SAMPLE, EPOCH = "inspect_sample", "inspect_epoch"
"""Keys of a transcript's metadata: which sample of its log it is."""


def require_inspect() -> Any:
    """The module ``inspect_ai.log``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import inspect_ai.log  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError(
            f"an Inspect log without inspect-ai ({visible(str(error))})",
            "the extra 'audit'",
            "pip install 'nla[audit]', or export the messages as JSON",
        ) from error
    return inspect_ai.log


def read_log(path: Path) -> Iterator[Transcript | TranscriptError]:
    """The samples of a log, one after another; in the place of one that is no transcript, its error.

    Raises:
        MissingExtraError: inspect-ai is not installed.
        TranscriptError: the log is cut, corrupt, too large, or has no samples.
    """
    log = require_inspect()
    _check_size(path)
    try:
        header = log.read_eval_log(str(path), header_only=True)
        if header.eval.dataset.sample_ids is None:  # a log that was made by hand: it cannot be read sample by sample
            samples = log.read_eval_log(str(path), resolve_attachments=True).samples or []
        else:
            samples = log.read_eval_log_samples(str(path), all_samples_required=False, resolve_attachments=True)
        count = 0
        for sample in samples:
            count += 1
            yield _transcript(sample, header, path)
    except TranscriptError:
        raise
    except Exception as error:  # what inspect-ai raises for a broken log is of many kinds
        shown = visible(f"{type(error).__name__}: {error}")[:160]
        raise bad(str(path), f"no readable Inspect log ({shown})", "a whole log", "restore or recover it") from error
    if count == 0:
        raise bad(str(path), "a log without samples", "one or more", "check that the evaluation ran")


def _check_size(path: Path) -> None:
    """Refuse a log that would unpack to more than fits."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        sizes = [entry.file_size for entry in archive.infolist()]
    for what, size, most in (("a sample", max(sizes, default=0), MAX_ENTRY_MB), ("samples", sum(sizes), MAX_LOG_MB)):
        if size > most * 2**20:
            expected = f"{what} of at most {most} MB"
            raise bad(str(path), f"{what} of {size >> 20} MB, unpacked", expected, "export the messages as JSON")


def _transcript(sample: Any, header: Any, path: Path) -> Transcript | TranscriptError:
    name = str(sample.id) if header.eval.config.epochs in (None, 1) else f"{sample.id} (epoch {sample.epoch})"
    source = f"{path}, sample {name}"
    try:
        messages, tools, model = _conversation(sample, header, source)
        notes = {SAMPLE: sample.id, EPOCH: sample.epoch, "task": header.eval.task}
        return Transcript(
            id=name,
            messages=parse_messages([message.model_dump(mode="json") for message in messages], source),
            model=model,
            source=source,
            metadata=notes,
            tools=read_tools([_tool(tool) for tool in tools or ()], source)[0],
            remarks=(*_remarks(sample, header), *([] if tools is not None else [_NO_CALLS])),
        )
    except TranscriptError as error:
        return error


def _remarks(sample: Any, header: Any) -> Iterator[str]:
    """What did not go as planned, so that the conversation may stop in the middle."""
    if header.status != "success":
        yield f"log with the status {header.status}"
    if sample.error is not None:
        yield "sample that ended with an error"
    if sample.limit is not None:
        yield f"sample that a limit stopped ({sample.limit.type})"


def _conversation(sample: Any, header: Any, source: str) -> tuple[Sequence[Any], Sequence[Any] | None, str | None]:
    """Messages, tools and model of whom the evaluation is about; None for tools that the log does not hold.

    That is the log's model, or in a log of several roles the role "target": what its last call read and wrote, wherever
    the sample's own messages are another's (Petri's auditor's, up to 3.1.0).

    Raises:
        TranscriptError: there is a target, and nothing here says what it read.
    """
    roles = {name: config.model for name, config in (header.eval.model_roles or {}).items()}
    calls = _target_calls(sample)
    authors = {message.model for message in sample.messages if message.role == "assistant" and message.model}
    if not calls and TARGET not in roles:
        named = None if header.eval.model.startswith("none") else header.eval.model
        model = named or (authors.pop() if len(authors) == 1 else None)
        calls = _finished_calls(sample)
        ours = [call for call in calls if not call.role and _last(call.model) == _last(model or "")]
        last = _surviving(calls, sample) or (ours[-1] if ours else None)
        return sample.messages, last and last.tools, model
    if not calls:
        if authors and all(_last(author) == _last(roles[TARGET]) for author in authors):
            return sample.messages, None, roles[TARGET]
        others = ", ".join(sorted(authors)) or "others"
        known = ", ".join(f"{name} ({model})" for name, model in sorted(roles.items()))
        got = f"messages of {others}, in a log of the roles {known}, without a call to the target"
        raise bad(source, got, "what the target read and wrote", "write the log with its events, or check that the "
                  "audit reached its target")  # fmt: skip
    call = _surviving(calls, sample)
    if call is not None:
        return sample.messages, call.tools, roles.get(TARGET, call.model)
    last = calls[-1]
    return [*last.input, last.output.message], last.tools, roles.get(TARGET, last.model)


def _surviving(calls: Sequence[Any], sample: Any) -> Any:
    """The last of the calls whose messages the sample still has."""
    told = [_told(message) for message in sample.messages]
    for call in reversed(calls):
        read = [_told(message) for message in [*call.input, call.output.message]]
        if told[: len(read)] == read:
            return call
    return None


def _finished_calls(sample: Any) -> list[Any]:
    return [event for event in sample.events if event.event == "model" and not event.error and event.output.choices]


def _target_calls(sample: Any) -> list[Any]:
    """The finished calls to the target, in order: by their role, or by the timeline or span of its name."""
    calls = _finished_calls(sample)
    of_role = [call for call in calls if call.role == TARGET]
    if of_role:
        return of_role
    lines = [line.root for line in sample.timelines or () if line.name == TARGET]
    if lines:
        inside = {id(event) for line in lines for event in _events(line)}
        return [call for call in calls if id(call) in inside]
    spans: set[str] = set()
    for event in sample.events:
        if event.event == "span_begin" and (event.name == TARGET or event.parent_id in spans):
            spans.add(event.id)
    return [call for call in calls if call.span_id in spans]


def _events(span: Any) -> Iterator[Any]:
    for part in span.content:
        if hasattr(part, "content"):
            yield from _events(part)
        else:
            yield part.event


def _told(message: Any) -> tuple[str, str]:
    return message.role, message.text


def _tool(tool: Any) -> dict[str, Any]:
    parameters = tool.parameters.model_dump(mode="json", exclude_none=True)
    return {"name": tool.name, "description": tool.description, "parameters": parameters}


def _last(model: str) -> str:
    return model.rsplit("/", 1)[-1]
