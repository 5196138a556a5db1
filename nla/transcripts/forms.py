"""One decoded JSON value in, the conversations that it holds out: a table of forms, with one small reader for each.

A form is a way in which a program or a data set writes conversations. What looks like none of them, or like one whose
conversation is not all there, is refused with a sentence that says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from nla.transcripts import petri
from nla.transcripts.entries import parse_messages
from nla.transcripts.messages import Transcript, bad
from nla.transcripts.responses import is_items, read_items

Object = Mapping[str, Any]

_IDS = ("id", "conversation_id", "conversation_hash", "custom_id", "prompt_id", "question_id")
_MODELS = ("model", "target_model", "model_name", "modelId")
_COMMON = {*_IDS, *_MODELS, "metadata", "tools", "functions"}
_CONTINUES = ("prefix", "partial")
"""What DeepSeek and Mistral, and Moonshot, call a last message that is the beginning of an answer."""


@dataclass(frozen=True)
class Found:
    """A conversation as its file has it: entries as of OpenAI or Anthropic, and what stands beside them."""

    entries: Sequence[Any]
    beside: Object
    """The object that it stands in; id, model, metadata and tools are taken from there."""
    used: frozenset[str] = frozenset()
    """Keys of it that were read here."""
    tools: Any = None
    """Where they stand elsewhere."""


class Form(NamedTuple):
    """How one kind of file is known, and read."""

    name: str
    fits: Callable[[Object], bool]
    read: Callable[[Object, str], list[Found]]


def read_value(content: Any, name: str, source: str) -> list[Transcript]:
    """The transcripts of one decoded JSON value.

    Raises:
        TranscriptError: it is of no known form, or a message in it cannot be read.
    """
    if isinstance(content, Mapping):
        if petri.is_petri(content):
            return [petri.parse(content, name, source)]
        form = next((form for form in FORMS if form.fits(content)), None)
        if form is None:
            raise _refusal(content, source)
        found = form.read(content, source)
        names = [name] if len(found) == 1 else [f"{name}:{number}" for number in range(len(found))]
        return [_transcript(one, own, source) for one, own in zip(found, names, strict=True)]
    if not isinstance(content, Sequence) or isinstance(content, str):
        got = f"JSON that is a {type(content).__name__}"
        raise bad(source, got, "a list of messages, or an object with messages", "check the file")
    if content and (all(map(_is_record, content)) or all(isinstance(entry, list) for entry in content)):
        return [
            transcript
            for number, entry in enumerate(content)
            for transcript in read_value(entry, f"{name}:{number}", f"{source}, entry {number}")
        ]
    return [_transcript(Found(_entries(content, source), {}), name, source)]


def is_message(content: Any) -> bool:
    """Whether a JSON value is one message, and no conversation."""
    return isinstance(content, Mapping) and not _is_record(content)


def _is_record(content: Any) -> bool:
    if not isinstance(content, Mapping) or any(form.fits(content) for form in FORMS):
        return isinstance(content, Mapping)
    if {"role", "from", "content"} & set(content) and "stop_reason" not in content:
        return False
    return "type" not in content or any(refusal.fits(content) for refusal in REFUSALS)


def _transcript(found: Found, name: str, source: str) -> Transcript:
    beside, metadata = found.beside, found.beside.get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    models = [owner.get(key) for owner in (beside, metadata) for key in _MODELS]
    names = [str(beside[key]) for key in _IDS if isinstance(beside.get(key), str | int) and str(beside[key]).strip()]
    tools, unknown = read_tools(found.tools or beside.get("tools") or beside.get("functions"), source)
    last = found.entries[-1] if found.entries else None
    continued = isinstance(last, Mapping) and any(last.get(key) is True for key in _CONTINUES)
    unused = {key for key, value in beside.items() if value is not None} - found.used - _COMMON
    return Transcript(
        id=names[0] if names else name,
        messages=parse_messages(found.entries, source),
        model=next((model for model in models if isinstance(model, str) and model), None),
        source=source,
        metadata={str(key): value for key, value in metadata.items()},
        tools=tools,
        prefill=continued or beside.get("continue_final_message") is True,
        unused=tuple(sorted([*map(str, unused - {"continue_final_message"}), *unknown])),
    )


def read_tools(tools: Any, source: str) -> tuple[tuple[Object, ...], list[str]]:
    """Tools as OpenAI's chat API has them, from its several forms, Anthropic's, and JSON in a string.

    Returns:
        The tools, and the names of those that are the provider's own, which no chat template can write.

    Raises:
        TranscriptError: no list of tools.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except (ValueError, RecursionError) as error:
            raise bad(source, "tools that are a string and no JSON", "a list of tools", "check the file") from error
    if not isinstance(tools, Sequence) and tools is not None:
        raise bad(source, f"tools that are a {type(tools).__name__}", "a list of tools", "check the file")
    ours, unknown = [], []
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            raise bad(source, "a tool that is no object", "a function with a name", "check the file")
        if not isinstance(function.get("name"), str) or tool.get("type", "function") not in ("function", "custom"):
            unknown.append(f"tool {tool.get('type') or function.get('name')}")
            continue
        parameters = function.get("parameters", function.get("input_schema", {"type": "object", "properties": {}}))
        known = {"name": function["name"], "description": str(function.get("description") or "")}
        ours.append({"type": "function", "function": {**known, "parameters": parameters}})
    return tuple(ours), unknown


# Requests and responses of APIs


def _entries(content: Any, source: str) -> list[Any]:
    """A list of messages or of the Responses API's items, as entries."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        got = "no messages" if content is None else f"messages that are a {type(content).__name__}"
        raise bad(source, got, "a list of messages with role and content", "check the file")
    entries = read_items(content, source) if is_items(content) else list(content)
    return [_sharegpt(entry, f"{source}, message {n}") for n, entry in enumerate(entries)]


def _request(content: Object, source: str) -> Found:
    """What a model was asked: messages with a system text beside them, the Responses API's input, or a prompt."""
    for key in ("messages", "input", "conversations", "conversation", "prompt"):
        if key in content:
            break
    else:
        raise _refusal(content, source)
    if content.get("previous_response_id"):
        got = "a request that goes on from another one (previous_response_id)"
        raise bad(source, got, "the whole conversation", "put the earlier items before these")
    value, opening = content[key], []
    if isinstance(value, Mapping) and "messages" in value:  # a log of calls to a chat model
        inner = _request(value, source)
        return replace(inner, beside={**value, **content}, used=inner.used | {key})
    for name in ("system", "instructions", "system_prompt"):
        if content.get(name):
            opening.append({"role": "system", "content": content[name]})
    if isinstance(value, str) and key in ("input", "prompt"):
        value = [{"role": "user", "content": value}]
    entries = opening + _entries(value, source)
    return Found(entries, content, frozenset({key, "system", "instructions", "system_prompt"}))


def _answers(content: Any, source: str) -> list[list[Any]]:
    """What came back: one list of entries for each answer.

    Raises:
        TranscriptError: nothing that is an answer.
    """
    if isinstance(content, str):
        return [[{"role": "assistant", "content": content}]]
    if isinstance(content, list) and content:
        return [_entries(content, source)]
    if isinstance(content, Mapping):
        if isinstance(content.get("choices"), list):
            messages = [choice.get("message") for choice in content["choices"] if isinstance(choice, Mapping)]
            return [[message] for message in messages if isinstance(message, Mapping)]
        if "role" in content:
            return [[content]]
        for key in ("body", "message", "output", "completion"):
            if content.get(key):
                return _answers(content[key], source)
    raise bad(source, "a response that holds no answer", "what the model answered", "leave out requests that failed")


def _exchange(request: Object, response: Any, beside: Object, used: set[str], source: str) -> list[Found]:
    found, answers = _request(request, source), _answers(response, source)
    if not answers:
        raise bad(source, "a response that holds no answer", "what the model answered", "leave out what failed")
    beside = {**request, **beside}
    return [replace(found, entries=[*found.entries, *one], beside=beside, used=found.used | used) for one in answers]


def _batch(content: Object, source: str) -> list[Found]:
    inner = content.get("body", content.get("params")) if isinstance(content, Mapping) else None
    if not isinstance(inner, Mapping):
        raise bad(source, "a request of a batch without a body", "what was asked", "leave it out")
    found = _request(inner, source)
    keys = frozenset({"body", "params", "method", "url"})
    return [replace(found, beside={**found.beside, **content}, used=found.used | keys)]


def _completion(content: Object, source: str) -> list[Found]:
    """A prompt and what follows it, as texts or as messages."""
    return _exchange({"prompt": content["prompt"]}, content["completion"], content, {"completion"}, source)


def _sharegpt(entry: Any, source: str) -> Any:
    """ShareGPT's entry as OpenAI's; any other as it is."""
    if not isinstance(entry, Mapping) or "from" not in entry or "role" in entry:
        return entry
    role, value = entry["from"], entry.get("value")
    if role != "function_call":
        return {"role": role, "content": value}
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise bad(source, "a function call that is no JSON", "name and arguments", "check the file") from error
    return {"role": "assistant", "content": None, "tool_calls": call if isinstance(call, list) else [call]}


def _has(*keys: str) -> Callable[[Object], bool]:
    return lambda content: all(content.get(key) is not None for key in keys)


def _is_batch(content: Object) -> bool:
    return "custom_id" in content and isinstance(content.get("body", content.get("params")), Mapping)


FORMS = (
    Form("batch of requests", lambda c: isinstance(c.get("requests"), list),
         lambda c, s: [one for request in c["requests"] for one in _batch(request, s)]),
    Form("request of a batch", _is_batch, _batch),
    Form("request and response", lambda c: isinstance(c.get("request"), Mapping) and c.get("response") is not None,
         lambda c, s: _exchange(c["request"], c["response"], c, {"request", "response"}, s)),
    Form("messages and response", _has("messages", "response"),
         lambda c, s: _exchange(c, c["response"], c, {"response"}, s)),
    Form("input and output", lambda c: _has("input", "output")(c) and not {"object", "instruction"} & set(c),
         lambda c, s: _exchange(c, c["output"], c, {"output"}, s)),
    Form("messages", lambda c: "messages" in c, lambda c, s: [_request(c, s)]),
    Form("prompt and completion", _has("prompt", "completion"), _completion),
    Form("conversations", lambda c: isinstance(c.get("conversations", c.get("conversation")), list),
         lambda c, s: [_request(c, s)]),
    Form("input of the Responses API", lambda c: isinstance(c.get("input"), str | list) and "instruction" not in c,
         lambda c, s: [_request(c, s)]),
)  # fmt: skip
"""How conversations are written. The first that fits is read."""


class Refusal(NamedTuple):
    """A form whose conversation is not all there, or not one."""

    fits: Callable[[Object], bool]
    got: str
    fix: str


_ALONE = "a response without the request that it answers"
_PUT = "put the list of messages under 'messages'"
REFUSALS = (
    Refusal(lambda c: "choices" in c or c.get("object") == "response" or {"stop_reason", "content"} <= set(c)
            or "result" in c or (isinstance(c.get("response"), Mapping) and "request" not in c),
            _ALONE, "write a line for each exchange: {\"request\": …, \"response\": …}"),
    Refusal(_has("chosen", "rejected"), "two answers to choose from (chosen, rejected)", "keep one, under 'messages'"),
    Refusal(lambda c: "preferred_output" in c, "several answers (preferred_output)", "keep one, under 'messages'"),
    Refusal(_has("conversation_a", "conversation_b"), "two conversations (conversation_a, conversation_b)",
            "keep one, under 'messages'"),
    Refusal(lambda c: "contents" in c, "Gemini's form (contents with parts)", "convert it to OpenAI's messages"),
    Refusal(lambda c: "mapping" in c, "a tree of messages (mapping)", "write the branch that is meant as messages"),
    Refusal(lambda c: "chat_history" in c, "a message with its history apart (chat_history)", _PUT),
    Refusal(_has("instruction", "output"), "an instruction and an output, without the prompt that joined them",
            "write what the model was given as messages"),
    Refusal(lambda c: isinstance(c.get("message"), Mapping) and "type" in c, "one event of a session (type, message)",
            "gather the messages of the session under 'messages'"),
)  # fmt: skip


def _refusal(content: Object, source: str) -> Exception:
    """The error of an object that is of no form."""
    refusal = next((refusal for refusal in REFUSALS if refusal.fits(content)), None)
    if refusal is not None:
        return bad(source, refusal.got, "one conversation, all of it", refusal.fix)
    got = f"an object with the keys {', '.join(sorted(map(str, content)))[:80]}"
    return bad(source, got, "an object with messages", _PUT)
