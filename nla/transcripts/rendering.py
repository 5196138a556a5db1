"""A transcript as the target's exact tokens: rendered with its own chat template, each token with its message and part.

The template is rendered once more with a placeholder in the place of each content. What stands between the
placeholders is the template's own text; putting the contents back must give the rendered text to the letter, so no
template can drop, edit or reorder a message unseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nla.errors import ArgumentError, ConfigError, TemplateError, VocabularyError
from nla.text.tokens import Span, undated, unknown_id
from nla.transcripts.messages import Message, Transcript

CONTROL, CONTENT, CALLS = "control", "content", "calls"
"""Parts of a message: what the template adds, what was written, and tool calls with what the template adds to them."""

_PARTS = 3
_OPEN, _CLOSE = "\ue000", "\ue001"


class Region(NamedTuple):
    """A stretch of the rendered text, ``text[start:end]``, that belongs to one part of one message."""

    start: int
    end: int
    message: int
    section: str


@dataclass(frozen=True)
class Chat:
    """A rendered transcript: columns over its tokens, so that a long one stays small."""

    transcript: Transcript

    text: str
    """What the target reads."""

    regions: list[Region]
    """The text in order, without gaps."""

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

    def __len__(self) -> int:
        return len(self.ids)

    def span(self, index: int) -> Span:
        """One token with its characters."""
        start, end = int(self.starts[index]), int(self.ends[index])
        return Span(int(self.ids[index]), self.text[start:end], start, end, index)

    def region_at(self, index: int) -> Region:
        """The region of one token."""
        return self.regions[int(self.region[index])]

    def offset(self, index: int) -> int:
        """Where a token stands in what can be read of its message (``Message.visible``), in characters.

        Tokens of the template before the content stand at 0, those after it at the end.
        """
        region = self.region_at(index)
        message = self.transcript.messages[region.message]
        if region.section == CONTENT:
            return message.content_start + int(self.ends[index]) - region.start
        return 0 if int(self.region[index]) % _PARTS == 0 else len(message.visible)

    def regions_of(self, message: int) -> list[Region]:
        """The regions of one message: before its content, the content, after it; some may be empty."""
        return self.regions[_PARTS * message : _PARTS * (message + 1)]


def trimmed(transcript: Transcript) -> Transcript:
    """The transcript without white space at the ends of its messages, as some templates write it."""
    messages = tuple(replace(message, content=message.content.strip()) for message in transcript.messages)
    return replace(transcript, messages=messages)


def render(tokenizer: PreTrainedTokenizerBase, transcript: Transcript) -> Chat:
    """Render a transcript as the target's tokens.

    Raises:
        ConfigError: the tokenizer has no chat template.
        TemplateError: the template refuses, drops, repeats, reorders or edits a message.
        VocabularyError: a message holds words that the tokenizer cannot represent.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "a tokenizer without a chat template",
            "one that has it: transcripts are read as the target's own conversations",
            "use an instruction-tuned target's pair",
        )
    text = _apply(tokenizer, transcript.messages, transcript)
    frames = _frames(tokenizer, transcript)
    contents = [message.content for message in transcript.messages]
    rebuilt = "".join(part for pair in zip(frames, [*contents, ""], strict=True) for part in pair)
    if rebuilt != text:
        raise _edited(tokenizer, transcript, text, rebuilt)
    regions = _regions(tokenizer, transcript, frames)
    return _tokens(tokenizer, transcript, text, regions)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], transcript: Transcript) -> str:
    template = undated(tokenizer)
    try:
        entries = [message.for_template() for message in messages]
        text = tokenizer.apply_chat_template(
            entries, chat_template=template, tokenize=False, add_generation_prompt=False
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise TemplateError(
            f"{transcript.source or transcript.id}: the chat template refuses it ({str(error)[:200]})",
            "roles, and an order of them, that the target's template knows",
            _remedy(messages),
        ) from error
    assert isinstance(text, str)  # tokenize=False
    return text


def _remedy(messages: Sequence[Message]) -> str:
    """What can be done about a refusal, by what templates commonly refuse."""
    roles = [message.role for message in messages]
    unusual = list(dict.fromkeys(role for role in roles if role not in ("user", "assistant")))
    if unusual:
        return (
            f"some templates (Gemma's) know no {' or '.join(unusual)}: put that text at the start of the user message "
            "that follows, or use another target"
        )
    if any(first == second for first, second in pairwise(roles)):
        return "templates commonly want user and assistant in turn: join neighbouring messages of one role"
    if roles[0] != "user":
        return "templates commonly want a user first: begin the transcript with the user's message"
    return "change the roles or their order to what the template knows, or use another target"


def _mark(number: int) -> str:
    return f"{_OPEN}{number}{_CLOSE}"


def _frames(tokenizer: PreTrainedTokenizerBase, transcript: Transcript) -> list[str]:
    """What the template writes before the first content, between two, and after the last."""
    source = transcript.source or transcript.id
    for number, message in enumerate(transcript.messages):
        if _OPEN in message.visible:
            raise TemplateError(
                f"{source}: message {number} with the private character U+E000", "text without it", "remove it"
            )
    marked = [replace(message, content=_mark(number)) for number, message in enumerate(transcript.messages)]
    rest, frames = _apply(tokenizer, marked, transcript), []
    for number in range(len(marked)):
        before, mark, after = rest.partition(_mark(number))
        if not mark or _OPEN in before or _mark(number) in after:
            what = "drops or reorders" if not mark or _OPEN in before else "repeats"
            raise TemplateError(
                f"{source}: the chat template {what} message {number} ({transcript.messages[number].role})",
                "a template that writes every message once, in order",
                "merge or remove the message (such as a system message that the template does not know)",
            )
        frames.append(before)
        rest = after
    return [*frames, rest]


def _edited(tokenizer: PreTrainedTokenizerBase, transcript: Transcript, text: str, rebuilt: str) -> TemplateError:
    """The error of a template that changes contents: says where, and whether trimming would do."""
    source = transcript.source or transcript.id
    shorter = min(len(text), len(rebuilt))
    same = next((i for i in range(shorter) if text[i] != rebuilt[i]), shorter)
    got = f"{source}: the chat template changes a message: it writes {text[same : same + 40]!r} for "
    got += f"{rebuilt[same : same + 40]!r}"
    fix = "write the messages as the template gives them (thinking goes into reasoning_content)"
    if any(message.content != message.content.strip() for message in transcript.messages):
        try:
            render(tokenizer, trimmed(transcript))
            fix = "use --trim: the template takes white space off the ends of messages"
        except TemplateError:
            pass
    return TemplateError(got, "contents to the letter", fix)


def _regions(tokenizer: PreTrainedTokenizerBase, transcript: Transcript, frames: list[str]) -> list[Region]:
    """Three regions a message (before, content, after), one after another over the whole text."""
    tails: dict[tuple[str, str], int] = {}
    regions: list[Region] = []
    start, opening = 0, frames[0]
    for number, message in enumerate(transcript.messages):
        frame, is_last = frames[number + 1], number + 1 == len(transcript.messages)
        key = (message.role, frame)
        if not is_last and key not in tails:
            tails[key] = _tail(tokenizer, transcript, message, frame)
        cut = len(frame) if is_last else tails[key]
        after = CALLS if message.calls else CONTROL
        for length, section in ((len(opening), CONTROL), (len(message.content), CONTENT), (cut, after)):
            regions.append(Region(start, start + length, number, section))
            start += length
        opening = frame[cut:]
    return regions


def _tail(tokenizer: PreTrainedTokenizerBase, transcript: Transcript, message: Message, frame: str) -> int:
    """How many characters of the text between two contents close the first message.

    Known from the message rendered alone, or after a user's; where that does not fit, none do.
    """
    for before in ((), (Message("user", "."),)):
        try:
            alone = _apply(tokenizer, [*before, replace(message, content=_mark(0))], transcript)
        except TemplateError:
            continue
        _, mark, tail = alone.partition(_mark(0))
        if mark and frame.startswith(tail):
            return len(tail)
    return 0


def _tokens(tokenizer: PreTrainedTokenizerBase, transcript: Transcript, text: str, regions: list[Region]) -> Chat:
    if not getattr(tokenizer, "is_fast", False):
        raise ArgumentError(
            f"a {type(tokenizer).__name__} without character offsets",
            "a fast tokenizer (tokenizer.json)",
            "load it with nla.text.tokens.load_tokenizer(...) from a folder that holds tokenizer.json",
        )
    # The template writes its own special tokens: BOS stands exactly once.
    batch = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    ids, offsets = torch.tensor(batch["input_ids"]), torch.tensor(batch["offset_mapping"]).reshape(-1, 2)
    borders = torch.tensor([region.end for region in regions])
    region = torch.searchsorted(borders, offsets[:, 0].contiguous(), right=True).clamp(max=len(regions) - 1)
    unknown = unknown_id(tokenizer)
    if unknown is not None and bool((ids == unknown).any()):
        rows = (ids == unknown).nonzero().flatten()[:10].tolist()
        words = ", ".join(dict.fromkeys(repr(text[offsets[row, 0] : offsets[row, 1]].strip()) for row in rows))
        raise VocabularyError(
            f"{transcript.source or transcript.id}: message {regions[int(region[rows[0]])].message} with words outside "
            f"the vocabulary: {words}",
            "words that the target's tokenizer knows",
            "use words of the target's world (an organism knows few), or another target",
        )
    named = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special = torch.isin(ids, torch.tensor(sorted({*named, *tokenizer.all_special_ids})))
    written = torch.tensor([part.section == CONTENT for part in regions])[region]
    has_bos = tokenizer.bos_token_id is not None and len(ids) > 0 and int(ids[0]) == tokenizer.bos_token_id
    forged = int((special & written).sum())
    return Chat(transcript, text, regions, ids.long(), offsets[:, 0], offsets[:, 1], region, has_bos, forged)


def message_starts(chat: Chat) -> list[int]:
    """The index of the first token of each message that has one, in order."""
    counts = torch.bincount(torch.tensor([r.message for r in chat.regions])[chat.region]).tolist()
    return [start for start, count in zip(accumulate([0, *counts]), counts, strict=False) if count]
