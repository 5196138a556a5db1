"""A pair, and a file of texts or chats, in; a sample of their tokens out, with their kinds of position where known."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from nla.errors import ArgumentError, ParseError
from nla.eval.readers.labelled_file import READERS
from nla.eval.worlds import world_of
from nla.models.points import context_length
from nla.models.read import Activations, Strata
from nla.organisms import ground_truth
from nla.storage.rows import decode, readable
from nla.text.tokens import Positions, Span, encode_batch, select_positions
from nla.transcripts import files
from nla.transcripts.messages import Transcript
from nla.transcripts.positions import writer_of
from nla.transcripts.prepared import remarks
from nla.transcripts.rendering import Chat, render, trimmed

if TYPE_CHECKING:
    from nla.autoencoder import NLA

MAX_TOKENS = 512
"""Longer texts are cut."""
_COLUMN = "text"


class Documents(NamedTuple):
    """Texts to read."""

    texts: list[str]
    strata: Strata | None
    """Names the kinds of their positions; None: unknown."""
    source: str
    """Where they come from, in words."""
    remarks: Sequence[str] = ()
    """What of them the target does not read, a sentence each."""


@dataclass(frozen=True)
class TokenSample:
    """Tokens of documents, to be read as often as needed."""

    texts: list[str]
    columns: list[list[int]]
    """Token indexes of each text, in order."""
    strata: Strata | None

    def read(self, nla: NLA) -> Activations:
        """The activations of these tokens, and of no others."""
        return nla.read(self.texts, lambda number, spans: self.columns[number], self.strata)


def world_documents(nla: NLA, n_documents: int, seed: int) -> Documents:
    """Held-out documents of the embedded world that a pair's target speaks the language of.

    Raises:
        ArgumentError: its target is of no embedded world.
    """
    world = world_of(nla.tokenizer)
    if world is None:
        raise ArgumentError(
            f"no texts for a pair on {nla.config.target}",
            "texts that its target is used on, and that the pair was not trained on",
            "give --texts FILE",
        )
    known = ground_truth.load(world)
    documents = known.splits(1, n_documents, seed)["eval"]
    return Documents(
        [document.text for document in documents],
        lambda number, spans: known.strata(documents[number], spans),
        f"held-out documents of the world {world}",
    )


def load_documents(nla: NLA, path: str | Path, chats: bool, n_documents: int) -> Documents:
    """The first texts of a file, each cut to :data:`MAX_TOKENS` or to the target's context.

    Args:
        path: a .txt file, whose lines are texts; a folder, whose .txt files are texts; or a CSV, TSV, JSON, JSON lines
            or Parquet file with a column "text".
        chats: ``path`` holds transcripts instead, as `nla audit` takes them; white space at the ends of their messages
            is taken off, and what the template drops is named in ``Documents.remarks``. The kinds of their positions
            are who wrote a token, or which part of the template it is.

    Raises:
        ArgumentError: no such file, or of another kind.
        ParseError, TranscriptError: it cannot be read as what it is.
        TemplateError, VocabularyError: the target's template or tokenizer refuses a chat.
    """
    longest = min(MAX_TOKENS, context_length(nla.base_of("target")))
    if not chats:
        texts = islice((text for text in _lines(Path(path)) if text.strip()), n_documents)
        return Documents([_cut(nla.tokenizer, text, longest) for text in texts], None, f"texts of {path}")
    read = [_chat_text(nla.tokenizer, transcript) for transcript in islice(files.load_transcripts(path), n_documents)]
    return Documents(
        [_cut(nla.tokenizer, text, longest) for text, _ in read],
        lambda number, spans: _chat_strata(read[number][1], read[number][0], spans),
        f"chats of {path}",
        remarks(chat for _, chat in read),
    )


def sample_tokens(nla: NLA, documents: Documents, positions: Positions, n_tokens: int, seed: int) -> TokenSample:
    """A random sample of the chosen positions, all if there are fewer; texts without one of them are left out.

    Raises:
        PositionError, VocabularyError, ContextLengthError: see :func:`nla.models.read.read`.
    """
    encoded = encode_batch(nla.tokenizer, documents.texts, context_length(nla.base_of("target")))
    tokens = [
        (number, column)
        for number, entry in enumerate(encoded)
        for column in select_positions(entry.spans, positions, number)
    ]
    columns: dict[int, list[int]] = {}
    drawn = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:n_tokens]
    for row in drawn.sort().values.tolist():
        number, column = tokens[row]
        columns.setdefault(number, []).append(column)
    numbers, strata = list(columns), documents.strata
    return TokenSample(
        [documents.texts[number] for number in numbers],
        list(columns.values()),
        None if strata is None else lambda index, spans: strata(numbers[index], spans),
    )


def _lines(path: Path) -> Iterator[str]:
    """The texts of a file or folder; see :func:`load_documents`."""
    parts = sorted(path.glob("*.txt")) if path.is_dir() else []
    suffix = path.suffix.lower()
    if not parts and (not path.is_file() or suffix not in (".txt", *READERS)):
        raise ArgumentError(
            f"texts in {path}",
            f"a file that ends on .txt, {', '.join(READERS)}, or a folder of .txt files",
            "check the path, or convert the file",
        )
    if parts:
        yield from map(_utf8, parts)
    elif suffix == ".txt":
        yield from re.split(r"\r?\n", _utf8(path))
    else:
        for row in READERS[suffix](path, [_COLUMN]):
            yield str(row[_COLUMN] or "")


def _utf8(path: Path) -> str:
    with readable(str(path), ParseError):
        return decode(path.read_bytes(), str(path), ParseError)


def _chat_text(tokenizer: PreTrainedTokenizerBase, transcript: Transcript) -> tuple[str, Chat]:
    """A chat as the text that gives its tokens when it is read.

    Raises:
        TemplateError, VocabularyError: see :func:`nla.transcripts.rendering.render`.
        ArgumentError: no text gives them.
    """
    chat = render(tokenizer, trimmed(transcript), allow_dropped=True)
    text = chat.text.removeprefix(str(tokenizer.bos_token)) if chat.has_bos else chat.text
    if tokenizer(text)["input_ids"] != chat.ids.tolist():
        raise ArgumentError(
            f"the chat {transcript.id}, to whose tokens the tokenizer adds others when it reads it as a text",
            "a template and a tokenizer that agree on BOS",
            "give plain texts",
        )
    return text, chat


def _chat_strata(chat: Chat, text: str, spans: Sequence[Span]) -> list[str]:
    """Who wrote each token, or which part of the template it is; ``text`` is the end of ``chat.text``."""
    before, starts = len(chat.text) - len(text), [region.start for region in chat.regions]
    regions = (chat.regions[max(0, bisect_right(starts, span.start + before) - 1)] for span in spans)
    return [writer_of(chat, region) for region in regions]


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, longest: int) -> str:
    """The beginning of a text, of about so many tokens at most."""
    spans = encode_batch(tokenizer, [text], None)[0].spans
    return text if len(spans) <= longest else text[: spans[longest - 1].end]
