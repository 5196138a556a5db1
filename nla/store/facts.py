"""Rows of a store and the whole target in; what is true of each out: what comes next, where it stands, what is known.

The describer ``structured`` states it, and `nla eval claims` holds explanations against it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla.errors import StoreError
from nla.models.generate import ends_of
from nla.models.points import blocks, logits_after, truncated_view
from nla.models.read import Activations, vectors_at
from nla.store.reader import Store
from nla.text.facts import BOOKKEEPING, last_word, token_name
from nla.text.tokens import Span
from nla.transcripts.messages import ROLES
from nla.transcripts.positions import ANSWER_START, BEFORE_ANSWER

N_NEXT = 4
"""Tokens that are named as likely next."""
_MAX_TOKENS, _ROWS_AT_ONCE = 4096, 256
_ROLE = re.compile(rf"\s*(?:{'|'.join((*ROLES, 'model'))})(?:\n|$)")


class TokenFacts(NamedTuple):
    """What is true at a token."""

    following: list[tuple[str, float]]
    """Names of the tokens that the target gives most probability next, with it, the likeliest first, equal names once;
    empty where it was not asked."""
    token: str
    """Its name, see :func:`nla.text.facts.token_name`."""
    before: str
    """The word before it in the same message; empty where there is none."""
    place: str
    """"ahead": an answer is about to begin; "opening": the token is its first; else empty."""
    visible: str
    """The text of its message up to and including it: what stands after the last mark of the chat."""


def token_facts(
    acts: Activations, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, following: bool = True
) -> list[TokenFacts]:
    """What is true at each activation's token.

    Args:
        model: the whole target, which says what comes next.
        following: whether it is asked, which takes a forward pass of the documents.

    Raises:
        StoreError: the tokenizer no longer divides a stored text as it did.
    """
    names = TokenNames(model, tokenizer)
    of_document: dict[int, list[int]] = defaultdict(list)
    for row, document in enumerate(acts.document.tolist()):
        of_document[document].append(row)
    ids = [
        document_ids(tokenizer, acts.texts[document], [acts.spans[row] for row in rows])
        for document, rows in of_document.items()
    ]
    columns = [[acts.spans[row].index for row in rows] for rows in of_document.values()]
    order = [row for rows in of_document.values() for row in rows]
    likely = dict(zip(order, next_tokens(model, ids, columns), strict=True)) if following else {}
    out = []
    for row, (span, document, stratum) in enumerate(zip(acts.spans, acts.document.tolist(), acts.strata, strict=True)):
        text = acts.texts[document]
        inside = span.start > 0 and text[span.start - 1].isalnum()
        out.append(
            TokenFacts(
                following=names.shares(likely.get(row, ()), text[: span.end]),
                token=names.name(span.token_id, inside),
                before=last_word(names.after_marks(text[: span.start])),
                place={BEFORE_ANSWER: "ahead", ANSWER_START: "opening"}.get(stratum, ""),
                visible=names.after_marks(text[: span.end]),
            )
        )
    return out


def next_tokens(
    model: PreTrainedModel, ids: Sequence[Sequence[int]], columns: Sequence[Sequence[int]]
) -> list[list[tuple[int, float]]]:
    """The :data:`N_NEXT` likeliest tokens after the chosen columns of rows of token ids, row after row, with their
    probabilities."""
    whole = truncated_view(model, f"resid_post.{len(blocks(model)) - 1}")
    streams = vectors_at(whole, ids, columns, _MAX_TOKENS, progress=True)
    out = []
    with torch.inference_mode():
        for part in streams.split(_ROWS_AT_ONCE):
            top = logits_after(model, part).float().softmax(-1).topk(N_NEXT)
            out += [
                list(zip(*pair, strict=True)) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
    return out


def document_ids(tokenizer: Any, text: str, spans: Sequence[Span]) -> list[int]:
    """The token ids of a stored text, up to the last of some of its spans; of a chat, as its template rendered it.

    Raises:
        StoreError: the tokenizer no longer divides it as it did.
    """
    for added in (True, False):
        ids = tokenizer(text, add_special_tokens=added, verbose=False)["input_ids"]
        if all(span.index < len(ids) and ids[span.index] == span.token_id for span in spans):
            return ids[: max(span.index for span in spans) + 1]
    raise StoreError(
        f"a stored text whose tokens are others now ({text[:40]!r} …)",
        "the tokens that it was read with",
        "read the corpus again with this tokenizer",
    )


class TokenNames:
    """Names of token ids, each made once."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        # Marks of some templates, such as Llama 3's headers, are special tokens that no list of a tokenizer names.
        added = [i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        self.special = {str(tokenizer.convert_ids_to_tokens(i)): i for i in (*tokenizer.all_special_ids, *added)}
        self.ends = frozenset(ends_of(model, tokenizer))
        self._texts: dict[int, str] = {}

    def name(self, token: int, inside: bool) -> str:
        """The name of a token; ``inside``: a letter or digit stands before it."""
        if token in self.ends:
            return "the end of the message"
        if token in self.special.values():
            return "a mark of the chat"
        if token not in self._texts:
            # Decoded alone, some tokenizers' tokens lose the space that they begin with.
            alone, together = (self.tokenizer.decode(ids) for ids in ([self._anchor], [self._anchor, token]))
            self._texts[token] = together[len(alone) :]
        return token_name(self._texts[token], inside)

    def shares(self, likely: Sequence[tuple[int, float]], text: str) -> list[tuple[str, float]]:
        """Names of tokens that may come after a text, the first of equal ones, with their probabilities."""
        inside = text[-1:].isalnum()
        out: dict[str, float] = {}
        for token, share in likely:
            out.setdefault(self.name(token, inside), share)
        return list(out.items())

    @cached_property
    def _anchor(self) -> int:
        return self.tokenizer.encode("a", add_special_tokens=False)[-1]

    def after_marks(self, text: str) -> str:
        """What of a text stands after the last mark of a chat, and after the role's name that follows it."""
        end = max((at + len(mark) for mark in self.special if (at := text.rfind(mark)) >= 0), default=0)
        return text[end:].removeprefix(_header(text[end:])) if end else text


def _header(text: str) -> str:
    """The name of a role in a line of its own that a text begins with; empty if it begins with none."""
    match = _ROLE.match(text)
    return match[0] if match else ""


def known_attributes(attributes: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Of what a corpus says of documents (:meth:`nla.store.reader.Store.attributes`), what they are, such as their
    topic; no bookkeeping (:data:`nla.text.facts.BOOKKEEPING`)."""
    return [
        {name: value for name, value in known.items() if isinstance(value, str) and name not in BOOKKEEPING}
        for known in attributes
    ]


def answers_of(store: Store, rows: Tensor, attributes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for what each row's document shares with others: the request whose answer they read, or itself alone."""
    numbers = store.documents(rows).tolist()
    return [str(known.get("request", f"document {number}")) for known, number in zip(attributes, numbers, strict=True)]
