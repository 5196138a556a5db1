"""One decoded JSON value in, the conversations that it holds out: a table of forms, with one small reader for each.

A form is a way in which a program or a data set writes conversations. What looks like none of them, or like one whose
conversation is not all there, is refused with a sentence that says so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from nla.transcripts import petri
from nla.transcripts.calls import read_tools
from nla.transcripts.entries import parse_messages, unused_keys
from nla.transcripts.messages import ROLES, Transcript, bad, known_of, role_of
from nla.transcripts.responses import is_items, read_items

Object = Mapping[str, Any]

_IDS = ("id", "conversation_id", "conversation_hash", "custom_id", "prompt_id", "question_id")
_MODELS = ("model", "target_model", "model_name", "modelId")
_COMMON = {*_IDS, *_MODELS, "metadata", "tools", "functions", "toolConfig"}
_ENVELOPE = ("model", "usage", "stop_reason", "stop_sequence")
"""What stands in an answer of Anthropic's besides the message."""
_GROUPS = ("conversation_id", "conversation_hash", "session_id", "thread_id", "chat_id", "dialogue_id", "dialog_id")
"""Keys of single messages that say of which conversation they are."""
_TEXT_PARTS = ("text", "output_text")
"""Types of the parts of a content that are text."""
_CONTINUES = ("prefix", "partial")
"""What DeepSeek and Mistral, and Moonshot, call a last message that is the beginning of an answer."""
_CONTINUE_FINAL = "continue_final_message"
"""What vLLM calls that in a request."""


@dataclass(frozen=True)
class Found:
    """A conversation as its file has it: entries as of OpenAI or Anthropic, and what stands beside them."""

    entries: Sequence[Any]
    beside: Object
    """The object that it stands in; id, model, metadata and tools are taken from there."""
    used: frozenset[str] = frozenset()
    """Keys of it that were read here."""
    remarks: tuple[str, ...] = ()
    """What a reader must know of how it was read."""


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
        read = [_transcript(one, own, source) for one, own in zip(found, names, strict=True)]
        times = Counter(one.id for one in read)  # the answers to one request
        return [replace(one, id=f"{one.id}:{n}") if times[one.id] > 1 else one for n, one in enumerate(read)]
    if not isinstance(content, Sequence) or isinstance(content, str):
        got = f"JSON that is a {type(content).__name__}"
        raise bad(source, got, "a list of messages, or an object with messages", "check the file")
    if content and (all(map(_is_record, content)) or all(isinstance(entry, list) for entry in content)):
        return [
            transcript
            for number, entry in enumerate(content)
            for transcript in read_value(entry, f"{name}:{number}", f"{source}, entry {number}")
        ]
    return [
        _transcript(Found(_entries(entries, source), {} if key is None else {"conversation_id": key}), name, source)
        for key, entries in _by_conversation(content, source).items()
    ]


def _by_conversation(messages: Sequence[Any], source: str) -> Mapping[str | int | None, Sequence[Any]]:
    """Single messages by the conversation that they say they are of; under None, all, where they say nothing."""
    column = next((key for key in _GROUPS if any(_group(message, key) is not None for message in messages)), None)
    if column is None:
        return {None: messages}
    groups: dict[str | int | None, list[Any]] = {}
    for number, message in enumerate(messages):
        key = _group(message, column)
        if key is None:
            got = f"message {number} without {column}, which others have"
            raise bad(source, got, "the conversation of each message", "name it, or take the key from all of them")
        groups.setdefault(key, []).append({name: value for name, value in message.items() if name != column})
    return groups


def _group(message: Any, key: str) -> str | int | None:
    value = message.get(key) if isinstance(message, Mapping) else None
    return value if isinstance(value, str | int) and str(value).strip() else None


def is_message(content: Any) -> bool:
    """Whether a JSON value is one message, and no conversation."""
    return isinstance(content, Mapping) and not _is_record(content)


def holds_messages(content: Any) -> bool:
    """Whether a JSON value is messages, one, or a request or response with some; any other is somebody's text."""
    if isinstance(content, Mapping):
        known = content.get("object") in ("response", "chat.completion", "error") or _are_messages([content])
        return known or _are_messages(content.get("messages")) or _are_objects(content.get("choices"), "message")
    return _are_messages(content) or (_are_objects(content) and is_items(content))


def _are_messages(values: Any) -> bool:
    return _are_objects(values, "role", "from") and all(
        role_of(str(one.get("role", one.get("from")))) in ROLES for one in values
    )


def _are_objects(values: Any, *keys: str) -> bool:
    """Whether a value is a list of objects and not empty; where keys are given, with one of them each."""
    if not isinstance(values, list) or not values:
        return False
    return all(isinstance(one, Mapping) and (not keys or {*keys} & set(one)) for one in values)


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
    config = beside.get("toolConfig")
    config = config if isinstance(config, Mapping) else {}
    tools, unknown = read_tools(beside.get("tools") or beside.get("functions") or config.get("tools"), source)
    unknown += [f"toolConfig.{key}" for key in config if key != "tools"]
    unknown += [f"{key} of messages" for key in unused_keys(found.entries)]
    last = found.entries[-1] if found.entries else None
    continued = isinstance(last, Mapping) and any(last.get(key) is True for key in _CONTINUES)
    known = known_of(beside)
    is_known = {"attributes": bool(known["attributes"]), "split": isinstance(known["split"], str)}
    used = found.used | _COMMON | {key for key, is_there in is_known.items() if is_there}
    unused = {key for key, value in beside.items() if value is not None} - used
    return Transcript(
        id=names[0] if names else name,
        messages=parse_messages(found.entries, source),
        model=next((model for model in models if isinstance(model, str) and model), None),
        source=source,
        metadata={str(key): value for key, value in metadata.items()},
        tools=tools,
        prefill=continued or beside.get(_CONTINUE_FINAL) is True,
        unused=tuple(sorted([*map(str, unused - {_CONTINUE_FINAL}), *unknown])),
        remarks=found.remarks,
        **known,
    )


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
    continued = ["previous_response_id"] if content.get("previous_response_id") else []
    continued += ["conversation"] if key == "input" and content.get("conversation") else []
    continued += ["prompt"] if key in ("input", "prompt") and _is_stored(content.get("prompt")) else []
    if continued:
        got = f"a request of which a part is stored at the provider ({continued[0]})"
        raise bad(source, got, "the whole conversation", "put the earlier items before these")
    value = content[key]
    if isinstance(value, Mapping) and "messages" in value:  # a log of calls to a chat model
        inner = _request(value, source)
        return replace(inner, beside={**value, **content}, used=inner.used | {key})
    if isinstance(value, str) and key in ("input", "prompt"):
        value = [{"role": "user", "content": value}]
    beside = ("system", "system_prompt", *(["instructions"] if key == "input" else []))
    entries = _entries(value, source)
    for text in reversed([content[name] for name in beside if content.get(name)]):
        first = entries[0] if entries and isinstance(entries[0], Mapping) else {}
        repeated = role_of(str(first.get("role"))) == "system" and _words(first.get("content")) == _words(text)
        if not repeated or _words(text) is None:
            entries.insert(0, {"role": "system", "content": text})
    return Found(entries, content, frozenset({key, *beside}))


def _is_stored(prompt: Any) -> bool:
    return isinstance(prompt, Mapping) and "id" in prompt and "messages" not in prompt


def _words(content: Any) -> str | None:
    """The text of content that is nothing else."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return "\n".join(map(str, texts)) if texts and all(isinstance(text, str) for text in texts) else None


def _answers(content: Any, source: str) -> list[list[Any]]:
    """What came back: one list of entries for each answer.

    Raises:
        TranscriptError: nothing that is an answer.
    """
    if isinstance(content, str) or _is_text(content):
        return [[{"role": "assistant", "content": content}]]
    if isinstance(content, list) and content:
        return [_entries(content, source)]
    if isinstance(content, Mapping):
        _refuse_failed(content, source)
        if isinstance(content.get("choices"), list):
            choices = [choice for choice in content["choices"] if isinstance(choice, Mapping)]
            for choice in choices:
                _refuse_failed(choice, source)
            return [[choice["message"]] for choice in choices if isinstance(choice.get("message"), Mapping)]
        if "role" in content:
            return [[{key: value for key, value in content.items() if key not in _ENVELOPE}]]
        for key in ("body", "message", "output", "completion"):
            if content.get(key) and (key in ("output", "completion") or isinstance(content[key], Mapping)):
                return _answers(content[key], source)
    raise bad(source, "a response that holds no answer", "what the model answered", "leave out requests that failed")


def _refuse_failed(content: Object, source: str) -> None:
    """Refuse a response, or a record of one, that says that there was an error."""
    if content.get("error") or "error" in (content.get("object"), content.get("type"), content.get("finish_reason")):
        error = content.get("error") or content
        said = error.get("message") or error.get("type") if isinstance(error, Mapping) else error
        got = f"a request that failed ({str(said)[:80]})"
        raise bad(source, got, "what the model answered", "leave out requests that failed")


def _exchange(request: Object, response: Any, beside: Object, used: set[str], source: str) -> list[Found]:
    _refuse_failed(beside, source)
    found, answers = _request(request, source), _answers(response, source)
    if not answers:
        raise bad(source, "a response that holds no answer", "what the model answered", "leave out what failed")
    before, begun = list(found.entries), None
    if any(_same(before[-len(answer) :], answer, source) for answer in answers):  # it was put there by who logged it
        before = before[: -len(answers[0])]
    elif _is_begun(before, request, response):
        *before, begun = before
    beside = {key: value for key, value in {**request, **beside}.items() if key != _CONTINUE_FINAL}
    return [
        replace(found, entries=[*before, *_finished(begun, answer)], beside=beside, used=found.used | used)
        for answer in answers
    ]


def _same(ours: Sequence[Any], answer: Sequence[Any], source: str) -> bool:
    """Whether the last messages of a request say what was answered."""
    if len(ours) != len(answer) or not all(isinstance(one, Mapping) for one in ours):
        return False
    if role_of(str(ours[0].get("role"))) != "assistant":
        return False
    told = [[(m.role, m.content, m.calls) for m in parse_messages(entries, source)] for entries in (ours, answer)]
    return told[0] == told[1]


def _is_begun(entries: Sequence[Any], request: Object, response: Any) -> bool:
    """Whether the response goes on with the last message: it was asked to, or is Anthropic's or Bedrock's."""
    last = entries[-1] if entries and isinstance(entries[-1], Mapping) else {}
    if role_of(str(last.get("role"))) != "assistant" or last.get("tool_calls") or not _words(last.get("content")):
        return False
    asked = request.get(_CONTINUE_FINAL) is True or any(last.get(key) is True for key in _CONTINUES)
    return asked or (isinstance(response, Mapping) and bool({"stop_reason", "stopReason"} & set(response)))


def _finished(begun: Any, answer: list[Any]) -> list[Any]:
    """An answer with its beginning, which some APIs (Mistral's) repeat."""
    if begun is None:
        return answer
    first, *rest = answer
    if not isinstance(first, Mapping) or role_of(str(first.get("role"))) != "assistant":
        return [begun, *answer]
    opening, content = str(_words(begun.get("content"))), first.get("content")
    parts = list(content) if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    place = next((n for n, part in enumerate(parts) if isinstance(part, Mapping) and _words([part]) is not None), None)
    if place is None:
        place, parts = 0, [{"type": "text", "text": ""}, *parts]
    text = str(_words([parts[place]]))
    repeated = begun.get("prefix") is True and text.startswith(opening)
    parts[place] = {**parts[place], "text": text if repeated else opening + text}
    kept = {key: value for key, value in begun.items() if key not in _CONTINUES}
    return [{**kept, **{key: value for key, value in first.items() if value is not None}, "content": parts}, *rest]


def _batch(content: Object, source: str) -> list[Found]:
    inner = content.get("body", content.get("params")) if isinstance(content, Mapping) else None
    if not isinstance(inner, Mapping):
        raise bad(source, "a request of a batch without a body", "what was asked", "leave it out")
    found = _request(inner, source)
    keys = frozenset({"body", "params", "method", "url"})
    return [replace(found, beside={**found.beside, **content}, used=found.used | keys)]


def _completion(content: Object, source: str) -> list[Found]:
    """A prompt and what follows it, as texts or as messages."""
    asked = {key: content[key] for key in ("prompt", "system", "system_prompt") if key in content}
    return _exchange(asked, content["completion"], content, {"completion"}, source)


def _sharegpt(entry: Any, source: str) -> Any:
    """ShareGPT's entry as OpenAI's; any other as it is."""
    if not isinstance(entry, Mapping) or "from" not in entry or "role" in entry:
        return entry
    role, value = entry["from"], entry.get("value")
    others = {key: inner for key, inner in entry.items() if key not in ("from", "value")}
    if role != "function_call":
        return {**others, "role": role, "content": value}
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise bad(source, "a function call that is no JSON", "name and arguments", "check the file") from error
    return {**others, "role": "assistant", "content": None, "tool_calls": call if isinstance(call, list) else [call]}


def _has(*keys: str) -> Callable[[Object], bool]:
    return lambda content: all(content.get(key) is not None for key in keys)


def _answer_key(content: Object) -> str | None:
    """Under which key the answer stands to messages that end with a user's or a tool's; None where none may be one."""
    messages = content.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    role = role_of(str(last.get("role", last.get("from")))) if isinstance(last, Mapping) else ""
    if role not in ("user", "tool"):
        return None
    return next((key for key in ("output", "completion") if _is_answer(content.get(key))), None)


def _is_answer(value: Any) -> bool:
    """Whether a value may be what a model wrote: a text, whatever it says, parts of text, a message or a response.

    A number, an object of scores or a program's whole state is none. A label that is a text cannot be told from a short
    answer: that it was taken for one is a remark.
    """
    if isinstance(value, str) or _is_text(value):
        return bool((_words(value) or "").strip())
    if isinstance(value, Mapping):  # Bedrock's and Ollama's answers hold the message
        inner = value.get("message")
        return "messages" not in value and (
            holds_messages(value) or (isinstance(inner, Mapping) and holds_messages(inner))
        )
    return holds_messages(value)


def _is_text(value: Any) -> bool:
    """Whether a value is the parts of a content, and all of them text."""
    return _are_objects(value, "text") and all(
        part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str) for part in value
    )


def _taken(content: Object, source: str) -> list[Found]:
    """Messages that end with a question, and what is taken for the answer to it."""
    key = str(_answer_key(content))
    remark = f"what the file has under {key} beside the messages was taken for the assistant's answer"
    found = _exchange(content, content[key], content, {key}, source)
    return [replace(one, remarks=(*one.remarks, remark)) for one in found]


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
    Form("messages and answer", lambda c: _answer_key(c) is not None, _taken),
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
