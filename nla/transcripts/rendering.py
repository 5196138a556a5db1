"""A transcript as the target's exact tokens: rendered with its own chat template, each token with its message and part.

The template is rendered once more with a mark in the place of each field: content, reasoning, the words and numbers of
tool calls and of the list of tools. What stands between the marks is the template's own text; putting the
fields back must give the rendered text to the letter, so no template can edit or reorder a message unseen. A mark that
is missing is a field that the target never reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nla.errors import ArgumentError, ConfigError, TemplateError, VocabularyError
from nla.text.templates import render_template
from nla.text.tokens import Encoded, Span, undated, unknown_id
from nla.transcripts.marks import (
    CALLS,
    CONTENT,
    CONTROL,
    NAMES,
    REASONING,
    TOOLS,
    Edit,
    Marked,
    Placed,
    texts_after_tools,
)
from nla.transcripts.marks import Span as Placement
from nla.transcripts.messages import Message, Transcript
from nla.transcripts.pieces import tokenise

__all__ = ["CALLS", "CONTENT", "CONTROL", "REASONING", "TOOLS", "Chat", "Region", "Unread", "render", "trimmed"]

_ALONE = "\ue000\ue001"
_THINK = "<think>"
_OFFERING = ("system", "user")
"""Roles of messages that a list of tools may stand in."""
_MOVED = (
    "the chat template writes the text beside tool calls after the tools' answers: it counts as a message of its own"
)
_GATHERED = (
    "in a message the assistant thought after it wrote, or wrote after it called a tool: the chat template takes one "
    "message at a time, so that all its thinking is read first, then its text, then its calls"
)
_LISTED = "the chat template lists the tools between messages of the assistant: the list counts as a system's message"


class Region(NamedTuple):
    """A stretch of the rendered text, ``text[start:end]``, that belongs to one part of one message."""

    start: int
    end: int
    message: int
    section: str


class Unread(NamedTuple):
    """Something of a transcript that the target does not read."""

    message: int | None
    """Its message; None: of the whole conversation."""
    what: str
    """A field that the template drops, or what is no text: "reasoning", "tool calls", "tools", "image"."""
    dropped: bool
    """By the chat template; otherwise no target of text could read it."""

    def __str__(self) -> str:
        where = "" if self.message is None else f" of message {self.message}"
        return f"{self.what}{where}"


@dataclass(frozen=True)
class Chat:
    """A rendered transcript: columns over its tokens, so that a long one stays small."""

    transcript: Transcript

    text: str
    """What the target reads."""

    regions: list[Region]
    """The text in order, without gaps; none is empty."""

    ids: Int[Tensor, " t"]
    """Token ids."""

    starts: Int[Tensor, " t"]
    """Character of the text where each token starts."""

    ends: Int[Tensor, " t"]
    """Where it ends."""

    region: Int[Tensor, " t"]
    """Index into ``regions``; a token over a border belongs to where it starts."""

    has_bos: bool
    """Whether the template begins with BOS, whose activation is an outlier."""

    n_forged: int
    """Control tokens that messages write in their contents: the target takes them for turns of the conversation."""

    unread: list[Unread] = field(default_factory=list)
    """What of the transcript is not in the text."""

    def __len__(self) -> int:
        return len(self.ids)

    def span(self, index: int) -> Span:
        """One token with its characters."""
        start, end = int(self.starts[index]), int(self.ends[index])
        return Span(int(self.ids[index]), self.text[start:end], start, end, index)

    @property
    def encoded(self) -> Encoded:
        """All tokens, as :func:`nla.models.read.read` takes them; BOS counts as added."""
        spans = [self.span(index) for index in range(len(self))]
        if self.has_bos:
            spans[0] = spans[0]._replace(added=True)
        return Encoded(self.ids.tolist(), spans, self.text)

    def region_at(self, index: int) -> Region:
        """The region of one token."""
        return self.regions[int(self.region[index])]

    def regions_of(self, message: int, section: str | None = None) -> list[Region]:
        """The regions of one message in order, or of one of its sections."""
        return [one for one in self._by_message[message] if section in (None, one.section)]

    def heard(self, message: int) -> str:
        """All that the target reads of one message: its parts without the template's own text, a line for each."""
        return "\n".join(self.text[one.start : one.end] for one in self._by_message[message] if one.section != CONTROL)

    def offset(self, index: int) -> int:
        """Where a token ends in what the target reads of its message (:meth:`heard`), in characters.

        Tokens of the template stand where the part before them ends.
        """
        here, before = self.region_at(index), 0
        for region in self._by_message[here.message]:
            if region == here:
                break
            before += 0 if region.section == CONTROL else region.end - region.start + 1
        inside = before + int(self.ends[index]) - here.start
        return max(before - 1, 0) if here.section == CONTROL else min(inside, before + here.end - here.start)

    @cached_property
    def _by_message(self) -> list[list[Region]]:
        by_message: list[list[Region]] = [[] for _ in self.transcript.messages]
        for region in self.regions:
            by_message[region.message].append(region)
        return by_message


def trimmed(transcript: Transcript) -> Transcript:
    """The transcript without white space at the ends of its messages, as some templates write it."""
    messages = tuple(_trimmed(message) for message in transcript.messages)
    return replace(transcript, messages=messages)


def _trimmed(message: Message) -> Message:
    opening, middle = message.tags
    content = message.content.strip()
    if not (opening or middle):
        return replace(message, content=content, reasoning=message.reasoning.strip())
    reasoning = message.reasoning if opening else message.reasoning.lstrip()
    return replace(
        message,
        content=content,
        reasoning=reasoning,
        tags=(opening.lstrip(), middle if content else middle.rstrip()),
    )


def system_folded(transcript: Transcript) -> Transcript:
    """The transcript with its first system text at the start of the user's message that follows.

    A transcript that does not begin with a system and a user message is returned as it is.
    """
    first, second, *rest = (*transcript.messages, None, None)
    if first is None or second is None or (first.role, second.role) != ("system", "user"):
        return transcript
    joined = replace(second, content=f"{first.content}\n\n{second.content}")
    return replace(transcript, messages=(joined, *(message for message in rest if message is not None)))


def render(tokenizer: PreTrainedTokenizerBase, transcript: Transcript, allow_dropped: bool = False) -> Chat:
    """Render a transcript as the target's tokens.

    Args:
        allow_dropped: read on where the template leaves fields out, and list them in ``Chat.unread``.

    Raises:
        ConfigError: the tokenizer has no chat template.
        TemplateError: the template refuses, repeats, reorders or edits a message, or drops one of its fields.
        VocabularyError: a message holds words that the tokenizer cannot represent.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "a tokenizer without a chat template",
            "one that has it: transcripts are read as the target's own conversations",
            "use an instruction-tuned target's pair",
        )
    try:
        text, placed, way = _placed(tokenizer, transcript)
    except TemplateError:
        if not any(message.continues for message in transcript.messages):
            raise
        return render(tokenizer, _gathered(transcript), allow_dropped)
    if placed.moved:
        transcript = texts_after_tools(transcript).transcript
        transcript = replace(transcript, remarks=(*transcript.remarks, _MOVED))
    lacks_calls = any(what == "tool calls" for _, what in placed.dropped)
    if lacks_calls and any(message.untagged for message in transcript.messages):
        # The calls stood in tags inside the content: there they are read as they are.
        inside = tuple(message.with_tags() for message in transcript.messages)
        return render(tokenizer, replace(transcript, messages=inside), allow_dropped)
    transcript, placed = _unsplit(transcript, text, placed)
    if placed.edited is not None:
        raise _edited(tokenizer, transcript, text, placed.edited, allow_dropped)
    if transcript.prefill:
        text, placed = _unended(text, placed, transcript)

    @cache
    def tail_of(role: str) -> str:
        return _tail(tokenizer, transcript, role, way)

    transcript, placed = _with_owners(transcript, text, placed, tail_of)
    dropped = [Unread(message, what, True) for message, what in placed.dropped]
    if dropped and not allow_dropped:
        raise _dropped(transcript, dropped)
    regions = _regions(transcript, text, placed, tail_of)
    media = [Unread(n, what, False) for n, message in enumerate(transcript.messages) for what in message.unseen]
    return _tokens(tokenizer, transcript, text, regions, sorted(dropped + media, key=lambda one: one.message or 0))


Way = Callable[[dict[str, Any]], dict[str, Any]]
"""How a message is written for a template."""


def _plainly(entry: dict[str, Any]) -> dict[str, Any]:
    return entry


def _arguments_as_text(entry: dict[str, Any]) -> dict[str, Any]:
    """As DeepSeek V3's template wants calls, and OpenAI's API writes them."""
    calls = []
    for call in entry.get("tool_calls", ()):
        given = call["function"]["arguments"]
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**entry, "tool_calls": calls} if calls else entry


def _content_as_parts(entry: dict[str, Any]) -> dict[str, Any]:
    """As templates of models that see images want it."""
    return {**entry, "content": [{"type": "text", "text": entry["content"]}]}


def _placed(tokenizer: PreTrainedTokenizerBase, transcript: Transcript) -> tuple[str, Placed, Way]:
    """The rendered text and where the fields stand in it, in the first way that the template takes whole contents in.

    What a template joins to a text as Python's form of a mapping it takes as text.

    Raises:
        TemplateError: it takes none; the error of the plain way.
    """
    marked = Marked.of(transcript)
    taken: list[tuple[str, Placed, Way]] = []
    is_whole = False
    error: TemplateError | None = None
    for way in (_plainly, _arguments_as_text, _content_as_parts):
        if way is _arguments_as_text and not any(message.calls for message in transcript.messages):
            continue
        if way is _content_as_parts and is_whole:
            break
        try:
            text, marked_text = _apply(tokenizer, transcript, way), _apply(tokenizer, marked.transcript, way)
            placed = marked.place(marked_text, text, _shortened(tokenizer, marked, way))
        except TemplateError as refusal:
            error = error or refusal
            continue
        taken.append((text, placed, way))
        is_whole = is_whole or all(what != "content" for _, what in placed.dropped)
        if is_whole and not (way is _plainly and _is_pythons(marked.transcript, marked_text)):
            return taken[-1]
    if not taken:
        assert error is not None
        raise error
    return taken[0]


def _gathered(transcript: Transcript) -> Transcript:
    """The transcript with messages that continue others joined to them, for templates that take one of a role only."""
    messages: list[Message] = []
    for message in transcript.messages:
        if message.continues:
            messages[-1] = messages[-1].joined(message)
        else:
            messages.append(message)
    return replace(transcript, messages=tuple(messages), remarks=(*transcript.remarks, _GATHERED))


def _unsplit(transcript: Transcript, text: str, placed: Placed) -> tuple[Transcript, Placed]:
    """Messages that a closing think tag without an opening one might divide, whole where the template divides none.

    There the tag stands in the text as it was written: it is quoted, or the template knows no thinking.
    """
    messages, spans, edited = list(transcript.messages), [], placed.edited
    for span in placed.spans:
        number, message = span.message or 0, messages[span.message or 0]
        if span.message is None or message.tags[0] or not message.tags[1]:
            spans.append(span)
            continue
        if span.section == CONTENT and spans and spans[-1].end > span.start:
            continue  # its second half, which the first has taken in
        whole = message.reasoning + message.tags[1] + message.content
        start = span.start if message.reasoning else span.start - len(message.tags[1])
        is_first = span.section == (REASONING if message.reasoning else CONTENT)
        written = next((one for one in (whole, whole.strip()) if text.startswith(one, start)), None)
        if not is_first or written is None or text[max(start - 9, 0) : start].rstrip("\n").endswith(_THINK):
            spans.append(span)
            continue
        if written != whole:
            edited = edited or Edit(start, whole[:40], CONTENT)
        spans.append(Placement(start, start + len(written), number, CONTENT))
        messages[number] = replace(message, content=whole, reasoning="", tags=("", ""))
    return replace(transcript, messages=tuple(messages)), placed._replace(spans=spans, edited=edited)


def _shortened(tokenizer: PreTrainedTokenizerBase, marked: Marked, way: Way) -> str | None:
    if marked.shortened is not None:
        with suppress(TemplateError):  # a template may insist on parameters
            return _apply(tokenizer, marked.shortened, way)
    return None


def _is_pythons(marked: Transcript, marked_text: str) -> bool:
    """Whether the arguments of a call stand in the text as Python writes them."""
    given = (call["arguments"] for message in marked.messages for call in message.calls)
    return any(str(one) in marked_text for one in given if isinstance(one, Mapping) and one)


def _apply(
    tokenizer: PreTrainedTokenizerBase, transcript: Transcript, way: Way = _plainly, template: str | None = None
) -> str:
    template = template or undated(tokenizer, transcript.tools)
    try:
        entries = [way(message.for_template()) for message in transcript.messages]
        tools: Any = [dict(tool) for tool in transcript.tools] or None
        return render_template(tokenizer, template, entries, tools=tools, add_generation_prompt=False)
    except TemplateError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        raise TemplateError(
            f"{transcript.source or transcript.id}: the chat template refuses it ({str(error)[:200]})",
            "roles, and an order of them, that the target's template knows",
            _remedy(transcript.messages),
        ) from error


def _remedy(messages: Sequence[Message]) -> str:
    """What can be done about a refusal, by what templates commonly refuse."""
    roles = [message.role for message in messages]
    unusual = list(dict.fromkeys(role for role in roles if role not in ("user", "assistant")))
    if unusual:
        fold = " (--fold-system does that)" if unusual == ["system"] and roles[:2] == ["system", "user"] else ""
        return (
            f"some templates (Gemma's) know no {' or '.join(unusual)}: put that text at the start of the user message "
            f"that follows{fold}, or use another target"
        )
    if any(first == second for first, second in pairwise(roles)):
        return "templates commonly want user and assistant in turn: join neighbouring messages of one role"
    if roles[0] != "user":
        return "templates commonly want a user first: begin the transcript with the user's message"
    return "change the roles or their order to what the template knows, or use another target"


def _dropped(transcript: Transcript, dropped: Sequence[Unread]) -> TemplateError:
    """The error of a template that leaves fields out."""
    shown = ", ".join(map(str, dropped[:4])) + (f" and {len(dropped) - 4} more" if len(dropped) > 4 else "")
    first = transcript.messages[0]
    folds = first.role == "system" and any((one.message, one.what) == (0, "content") for one in dropped)
    return TemplateError(
        f"{transcript.source or transcript.id}: the chat template drops the {shown}: the target never reads it",
        "every field of every message in what the target reads",
        ("--fold-system puts the system text into the user's message; " if folds else "")
        + "--allow-dropped reads it as the target does, without what is dropped, and lists that in the report",
    )


def _edited(
    tokenizer: PreTrainedTokenizerBase, transcript: Transcript, text: str, edit: Edit, allow_dropped: bool
) -> TemplateError:
    """The error of a template that changes contents: says where, and whether trimming would do."""
    what, written = "a message", text[edit.at : edit.at + 40]
    fix = "write the messages as the template gives them (thinking goes into reasoning_content)"
    if edit.section == TOOLS:
        what, fix = "the list of tools", "write the tools as the template gives them, or leave them out"
    source = transcript.source or transcript.id
    got = f"{source}: the chat template changes {what}: it writes {written!r} for {edit.expected!r}"
    if transcript != trimmed(transcript):
        try:
            render(tokenizer, trimmed(transcript), allow_dropped)
            fix = "use --trim: the template takes white space off the ends of messages"
        except TemplateError:
            pass
    return TemplateError(got, "contents to the letter", fix)


def _unended(text: str, placed: Placed, transcript: Transcript) -> tuple[str, Placed]:
    """The text up to where the last message, the beginning of an answer, stops; what stands after it is not read."""
    last = len(transcript.messages) - 1
    end = max((span.end for span in placed.spans if (span.message, span.section) == (last, CONTENT)), default=None)
    if end is None:
        raise _dropped(transcript, [Unread(last, "content", True)])
    after = [(span.message, NAMES[span.section]) for span in placed.spans if span.start >= end]
    kept = [span._replace(end=min(span.end, end)) for span in placed.spans if span.start < end]
    return text[:end], placed._replace(spans=kept, dropped=list(dict.fromkeys([*placed.dropped, *after])))


def _regions(transcript: Transcript, text: str, placed: Placed, tail_of: Callable[[str], str]) -> list[Region]:
    """The text cut into regions: fields where they stand, calls with all that is written of them, the rest control."""
    roles = [message.role for message in transcript.messages]
    runs = [(message or 0, list(spans)) for message, spans in groupby(placed.spans, lambda span: span.message)]
    if not runs:  # nothing that was written is in the text
        return [Region(0, len(text), 0, CONTROL)]
    regions: list[Region] = []

    def add(end: int, message: int, section: str) -> None:
        start = regions[-1].end if regions else 0
        if regions and end > start and regions[-1][2:] == (message, section):
            regions[-1] = regions[-1]._replace(end=end)
        elif end > start:
            regions.append(Region(start, end, message, section))

    for number, (message, spans) in enumerate(runs):
        is_last = number + 1 == len(runs)
        end = spans[-1].end
        gap = text[end:] if is_last else text[end : runs[number + 1][1][0].start]
        # What closes the message stands right after its content, or after what else is written of calls and tools.
        tail, is_open = tail_of(roles[message]), any(span.section in (CALLS, TOOLS) for span in spans)
        at = (gap.find(tail) if is_open else 0 if gap.startswith(tail) else -1) if tail else -1
        for span, after in zip(spans, [*spans[1:], None], strict=True):
            add(span.start, message, CONTROL)
            is_whole = after is None or after.section != span.section or span.section in (CONTENT, REASONING)
            add(span.end if is_whole or after is None else after.start, message, span.section)
        if spans[-1].section == CALLS and at > 0:
            add(end + at, message, CALLS)
        add(len(text) if is_last else end + max(at + len(tail), 0) if at >= 0 else end, message, CONTROL)
    return regions


def _with_owners(
    transcript: Transcript, text: str, placed: Placed, tail_of: Callable[[str], str]
) -> tuple[Transcript, Placed]:
    """Give lists of tools to the messages in which they stand.

    That is the message before one if it is a system's or user's and not closed yet; otherwise that after it, or before
    it, whichever is a system's or user's. Beside others it is a system's message of its own: nobody there wrote it.
    """
    messages, spans = list(transcript.messages), []
    added: list[int] = []
    """Old numbers of the messages before which one was put in."""
    owner = 0
    for number, span in enumerate(placed.spans):
        if span.message is not None:
            owner = span.message + len(added)
        elif number == 0 or placed.spans[number - 1].message is not None:
            following = next((one.message for one in placed.spans[number:] if one.message is not None), None)
            after = len(messages) if following is None else following + len(added)
            before = owner if number else -1
            tail = tail_of(messages[before].role) if number else ""
            is_open = tail and tail not in text[placed.spans[number - 1].end : span.start]
            order = (before, after) if is_open else (after, before)
            owner = next((one for one in order if 0 <= one < len(messages) and messages[one].role in _OFFERING), -1)
            if owner < 0:
                owner = after
                messages.insert(owner, Message("system", ""))
                added.append(len(transcript.messages) if following is None else following)
        spans.append(span._replace(message=owner))
    if not added:
        return transcript, placed._replace(spans=spans)
    dropped = [
        (None if number is None else number + sum(place <= number for place in added), what)
        for number, what in placed.dropped
    ]
    remarks = (*transcript.remarks, _LISTED)
    whole = replace(transcript, messages=tuple(messages), remarks=remarks)
    return whole, placed._replace(spans=spans, dropped=dropped)


def _tail(tokenizer: PreTrainedTokenizerBase, transcript: Transcript, role: str, way: Way) -> str:
    """What closes a message of a role: known from one rendered alone, or after a user's; empty where neither works."""
    for before in ((), (Message("user", "."),)):
        try:
            short = Transcript(transcript.id, (*before, Message(role, _ALONE)))
            alone = _apply(tokenizer, short, way, undated(tokenizer, transcript.tools))
        except TemplateError:
            continue
        _, mark, tail = alone.partition(_ALONE)
        if mark:
            return tail
    return ""


def _tokens(
    tokenizer: PreTrainedTokenizerBase, transcript: Transcript, text: str, regions: list[Region], unread: list[Unread]
) -> Chat:
    if not getattr(tokenizer, "is_fast", False):
        raise ArgumentError(
            f"a {type(tokenizer).__name__} without character offsets",
            "a fast tokenizer (tokenizer.json)",
            "load it with nla.text.tokens.load_tokenizer(...) from a folder that holds tokenizer.json",
        )
    # The template writes its own special tokens: BOS stands exactly once.
    ids, starts, ends = tokenise(tokenizer, text)
    borders = torch.tensor([region.end for region in regions], dtype=torch.int32)
    region = torch.searchsorted(borders, starts, right=True, out_int32=True).clamp_(max=len(regions) - 1)
    unknown = unknown_id(tokenizer)
    if unknown is not None and bool((ids == unknown).any()):
        rows = (ids == unknown).nonzero().flatten()[:10].tolist()
        words = ", ".join(dict.fromkeys(repr(text[starts[row] : ends[row]].strip()) for row in rows))
        raise VocabularyError(
            f"{transcript.source or transcript.id}: message {regions[int(region[rows[0]])].message} with words outside "
            f"the vocabulary: {words}",
            "words that the target's tokenizer knows",
            "use words of the target's world (an organism knows few), or the pair of another target (--pair)",
        )
    named = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special = torch.isin(ids, torch.tensor(sorted({*named, *tokenizer.all_special_ids})))
    written = torch.tensor([part.section in (CONTENT, REASONING) for part in regions])[region]
    has_bos = tokenizer.bos_token_id is not None and len(ids) > 0 and int(ids[0]) == tokenizer.bos_token_id
    forged = int((special & written).sum())
    return Chat(transcript, text, regions, ids, starts, ends, region, has_bos, forged, unread)


def message_starts(chat: Chat) -> list[int]:
    """The index of the first token of each message that has one, in order."""
    counts = torch.bincount(torch.tensor([r.message for r in chat.regions])[chat.region]).tolist()
    return [start for start, count in zip(accumulate([0, *counts]), counts, strict=False) if count]
