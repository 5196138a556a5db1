"""Documents of a corpus as the target reads them: tokens, the positions to read, and the split."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from nla.baselines import UNKNOWN_STRATUM
from nla.errors import ArgumentError, CorpusError, NLAError, TemplateError, TranscriptError, VocabularyError, visible
from nla.storage.files import parse_json
from nla.storage.schema import shown
from nla.store.shards import Document, is_held_out
from nla.text.kinds import token_kinds
from nla.text.tokens import Span, unknown_id
from nla.train.data.corpus import CorpusSettings, Entry
from nla.transcripts.messages import Transcript
from nla.transcripts.positions import BEFORE_ANSWER, TEMPLATE, kinds, spread, structure, writer_of
from nla.transcripts.prepared import remarks
from nla.transcripts.rendering import Chat, render, trimmed

log = logging.getLogger(__name__)

COUNTS = ("seen", "read", "empty", "short", "refused", "unread", "other_split", "cut", "tokens")
"""Documents: looked at; with a vector in the store; blank; without a position to read; that template or tokenizer
refuse; chats of which the target does not read everything, because the template drops it or it is no text; of a split
whose name says nothing, so that their text decides; cut to ``max_tokens``. And the tokens of documents that were read.
"""
_SPLITS = {"train": ("train",), "eval": ("eval", "validation", "valid", "val", "dev", "test")}
"""Names in a column `split`, by the split of ours that they are."""
_MOST_WARNINGS = 3


class Tokens(NamedTuple):
    """A document's tokens, without a Span each: a corpus has many and stores few."""

    number: int
    text: str
    ids: list[int]
    offsets: Any
    """From a token's index to the characters that it covers."""
    eligible: list[int]
    """Tokens that may be read: neither special nor the tokenizer's own."""
    chat: Chat | None


@dataclass
class Prepared:
    """A chunk that is ready for the target."""

    chunk: int
    documents: list[Document] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    """Of each document, the tokens up to the last that is read: what follows cannot change an activation."""
    splits: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))

    @property
    def n_tokens(self) -> int:
        """Tokens that the target runs."""
        return sum(map(len, self.ids))


class Reader:
    """Turns a chunk's entries into documents.

    Raises:
        ArgumentError: the tokenizer cannot say which characters a token covers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: CorpusSettings, seed: int) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ArgumentError(
                f"a {type(tokenizer).__name__} without character offsets",
                "a fast tokenizer (tokenizer.json)",
                "use a target whose folder holds tokenizer.json",
            )
        self.tokenizer: Any = tokenizer
        self.settings, self.seed = settings, seed
        named = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.special = frozenset({*named, *tokenizer.all_special_ids})
        self._n_warned: Counter[str] = Counter()

    def prepare(self, chunk: int, entries: Sequence[Entry]) -> Prepared:
        """Tokens, positions and splits of a chunk.

        Raises:
            CorpusError: an entry is no text, or "turns" are asked of texts.
            NLAError: the first chunk holds no document that can be read: the reason of the first.
        """
        out, errors = Prepared(chunk), []
        out.counts["seen"] = len(entries)
        for tokens in self._tokenised(entries, out.counts, errors):
            self._add(out, tokens)
        if errors and chunk == 0 and out.counts["refused"] == out.counts["seen"] - out.counts["empty"]:
            raise errors[0]
        return out

    def _add(self, out: Prepared, tokens: Tokens) -> None:
        ids, limit = tokens.ids, self.settings.max_tokens
        text, eligible = tokens.text, tokens.eligible
        if len(ids) > limit:
            # What is left is the document: two that begin alike and are cut are one text, and share a split.
            text = text[: max(tokens.offsets(index)[1] for index in range(limit))]
            eligible = [index for index in eligible if index < limit]
            out.counts["cut"] += 1
        chosen = self._positions(tokens, text, eligible, min(len(ids), limit))
        if not chosen:
            out.counts["short"] += 1
            return
        spans, strata = [], []
        for index in chosen:
            start, end = tokens.offsets(index)
            spans.append(Span(ids[index], text[start:end], start, end, index))
            strata.append(_stratum(tokens.chat, index, chosen[index]))
        transcript = None if tokens.chat is None else tokens.chat.transcript
        attributes = {} if transcript is None else transcript.attributes
        out.documents.append(Document(tokens.number, text, spans, strata, attributes=attributes))
        out.ids.append(ids[: max(chosen) + 1])
        held_out = is_held_out(text, self.settings.eval_share, self.settings.split_key)
        stated = None if transcript is None else self._stated(tokens.number, transcript.split, out.counts)
        out.splits.append(stated or ("eval" if held_out else "train"))
        out.counts["read"] += 1
        out.counts["tokens"] += min(len(ids), limit)

    def _stated(self, number: int, split: Any, counts: Counter[str]) -> str | None:
        """The split that a corpus states of a document, by its names in data sets; None: it is for the text to say."""
        name = split.lower() if isinstance(split, str) else None
        known = next((ours for ours, names in _SPLITS.items() if name in names), None)
        if known is None and split is not None:
            counts["other_split"] += 1
            names = ", ".join(name for names in _SPLITS.values() for name in names)
            ignored = f"Document {number} of the split {shown(split)}, which is none of {names}"
            self._warn("split", f"{ignored}: its split follows from its text, as in a corpus without that column.")
        return known

    def _positions(self, tokens: Tokens, text: str, eligible: list[int], n: int) -> dict[int, str | None]:
        """Token indexes in order, each with its kind if the choice names kinds."""
        settings = self.settings
        if settings.positions == "turns":
            if tokens.chat is None:
                raise CorpusError(
                    'positions "turns" in a corpus of texts', "a corpus of chats", 'choose "random", or kind = chat'
                )
            return {index: kind for index, kind in structure(tokens.chat) if index < n}
        if settings.positions == "last":
            return dict.fromkeys(eligible[-1:])
        late = [index for index in eligible if index >= settings.first_position]
        if settings.positions.startswith("every:"):
            step = int(settings.positions.removeprefix("every:"))
            return dict.fromkeys(index for index in late if (index - settings.first_position) % step == 0)
        # Keyed by the text, so that neither order nor number of the other documents changes what is drawn.
        draw = random.Random(hashlib.sha256(f"{self.seed}|{text}".encode()).digest())
        if settings.positions == "kinds":
            return dict(spread(self._kinds(tokens, text, late, n), settings.n_positions, draw))
        return dict.fromkeys(sorted(draw.sample(late, min(settings.n_positions, len(late)))))

    def _kinds(self, tokens: Tokens, text: str, late: list[int], n: int) -> np.ndarray:
        """The kind of each of the first ``n`` tokens; empty for those that are not to be read.

        Of a chat these are the first token, on which models put outliers, and control tokens that a message spells.
        """
        if tokens.chat is None:
            names = np.full(n, "", dtype=object)
            starts, ends = np.array([tokens.offsets(index) for index in late], dtype=np.int64).reshape(-1, 2).T
            names[late] = token_kinds(text, starts, ends)
            return names
        names = kinds(tokens.chat)[:n]
        is_eligible = np.isin(np.arange(n), tokens.eligible) | np.isin(names, (TEMPLATE, BEFORE_ANSWER))
        return np.where(is_eligible & (np.arange(n) > 0), names, "")

    def _tokenised(self, entries: Sequence[Entry], counts: Counter[str], errors: list[NLAError]) -> list[Tokens]:
        by_number: dict[int, Tokens | None] = {}
        texts: dict[int, str] = {}
        for number, parse in entries:
            try:
                content = parse()
                if isinstance(content, Transcript):
                    _check_attributes(number, content.attributes)
                    by_number[number] = self._of_chat(number, content, counts)
                elif content.strip():
                    content.encode()
                    texts[number] = content
                else:
                    counts["empty"] += 1
            except (TranscriptError, TemplateError, VocabularyError, UnicodeEncodeError) as error:
                self._refuse(number, error, counts, errors)
        for tokens in self._of_texts(texts, counts, errors):
            by_number[tokens.number] = tokens
        return [tokens for _, tokens in sorted(by_number.items()) if tokens is not None]

    def _of_texts(self, texts: dict[int, str], counts: Counter[str], errors: list[NLAError]) -> list[Tokens]:
        if not texts:
            return []
        plain = {"padding": False, "truncation": False, "verbose": False, "return_attention_mask": False}
        batch = self.tokenizer(list(texts.values()), **plain)
        unknown, out = unknown_id(self.tokenizer), []
        # The encodings give the characters of single tokens; lists of all offsets would cost more than the rest.
        for (number, text), ids, encoding in zip(texts.items(), batch["input_ids"], batch.encodings, strict=True):
            own, special = encoding.special_tokens_mask, self.special
            strange = [n for n, token in enumerate(ids) if token == unknown and not own[n]] if unknown in ids else []
            if strange:
                start, end = encoding.token_to_chars(strange[0]) or (0, 0)
                got, fix = f"document {number} with {text[start:end]!r}", "use a target that knows the corpus' words"
                self._refuse(number, VocabularyError(got, "words that the tokenizer knows", fix), counts, errors)
                continue
            eligible = [n for n, (token, added) in enumerate(zip(ids, own, strict=True)) if not added]
            eligible = [n for n in eligible if ids[n] not in special]
            out.append(Tokens(number, text, ids, _characters(encoding), eligible, None))
        return out

    def _of_chat(self, number: int, transcript: Transcript, counts: Counter[str]) -> Tokens:
        chat = render(self.tokenizer, trimmed(transcript), allow_dropped=True)
        if chat.unread:
            counts["unread"] += 1
            for remark in remarks([replace(chat, transcript=replace(transcript, unused=(), remarks=()))]):
                self._warn("unread", f"Document {number}: {remark}")
        ids, starts, ends = chat.ids.tolist(), chat.starts.tolist(), chat.ends.tolist()
        eligible = [index for index, token in enumerate(ids) if token not in self.special]
        return Tokens(number, chat.text, ids, lambda index: (starts[index], ends[index]), eligible, chat)

    def _refuse(self, number: int, error: Exception, counts: Counter[str], errors: list[NLAError]) -> None:
        counts["refused"] += 1
        if not isinstance(error, NLAError):
            error = CorpusError(f"document {number} ({error})", "whole characters", "read the corpus as UTF-8")
        errors.append(error)
        self._warn("refused", f"Document {number} is left out: {error}")

    def _warn(self, kind: str, text: str) -> None:
        self._n_warned[kind] += 1
        if self._n_warned[kind] <= _MOST_WARNINGS:
            log.warning("%s", text)


def _check_attributes(number: int, attributes: Mapping[str, Any]) -> None:
    """Refuse what a store could not give back: it keeps JSON, and reads no more of it than :func:`parse_json` does."""
    try:
        parse_json(json.dumps(dict(attributes), default=str, allow_nan=False))
    except (ValueError, TypeError, RecursionError) as error:
        got = f"document {number}, whose attributes are not to be stored ({visible(str(error))[:120]})"
        raise CorpusError(got, "JSON in the column `attributes`", "correct them, or rename the column") from error


def _characters(encoding: Any) -> Any:
    return lambda index: encoding.token_to_chars(index) or (0, 0)


def _stratum(chat: Chat | None, index: int, kind: str | None) -> str:
    """The kind that the choice gives; of a chat, otherwise, who wrote the token or which part of the template it is."""
    return kind or (UNKNOWN_STRATUM if chat is None else writer_of(chat, chat.region_at(index)))
