"""The describer ``structured``: rows of a store in, plain claims about each out, from what is known or computed.

No model is asked to describe anything. Of each activation it says what the target itself holds likely next, which
token it stands at, and what the corpus knows of the document (its form, topic, hidden instruction, …); of the last only
what a linear probe on the activation finds, so that the encoder is not taught to invent.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla.errors import StoreError
from nla.models.generate import ends_of
from nla.models.points import blocks, logits_after, truncated_view
from nla.models.read import vectors_at
from nla.store.reader import Store
from nla.text.facts import Facts, last_word, state, token_name
from nla.text.tokens import Span
from nla.train.data.requests import BOOKKEEPING
from nla.transcripts.positions import ANSWER_START, BEFORE_ANSWER

N_NEXT, LEAST_SHARE, SURE = 4, 0.03, 0.7
"""Tokens that are named as likely next; the least probability of those after the first; of a first that is sure."""
N_FOLDS, RIDGE = 5, 0.3
"""Of the probes: each document is judged by one that did not see it; their penalty per row, on standardised vectors."""
USUAL = 0.8
"""A value that so many of the known texts have is not said."""
LEAST_SKILL = 0.1
"""A kind of token holds an attribute if probes of it are this far from the commonest value (0) to all right (1)."""
_MAX_TOKENS, _ROWS_AT_ONCE = 4096, 256


class Rows(NamedTuple):
    """Rows of one split, as describing needs them."""

    store: Store
    rows: Tensor


def describe_rows(
    splits: Mapping[str, Rows], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """A text for each row of each split, and how often each attribute was said of how many documents' rows.

    Args:
        splits: "train", which probes are fitted on, and others.
        model: the whole target, which says what comes next.
        seed: decides, with a row's number, in which words a claim is put.

    Raises:
        StoreError: the tokenizer no longer divides a stored text as it did.
    """
    known = {split: _documents(part) for split, part in splits.items()}
    said, figures = _said(splits, known)
    ends = frozenset(ends_of(model, tokenizer))
    namer = _Namer(tokenizer, ends)
    texts = {}
    for split, part in splits.items():
        acts = part.store.activations(part.rows)
        following = _following(acts.spans, acts.texts, acts.document.tolist(), model, tokenizer)
        texts[split] = [
            state(
                _facts(span, acts.texts[document], stratum, likely, attributes, namer),
                random.Random(f"{seed}/{split}/{row}"),
            )
            for row, span, document, stratum, likely, attributes in zip(
                part.rows.tolist(), acts.spans, acts.document.tolist(), acts.strata, following, said[split], strict=True
            )
        ]
    return texts, figures


def _facts(
    span: Span, text: str, stratum: str, likely: list[tuple[int, float]], attributes: dict[str, str], namer: _Namer
) -> Facts:
    inside = span.start > 0 and text[span.start - 1].isalnum()
    goes_on = span.end > 0 and text[span.end - 1].isalnum()
    names = dict.fromkeys(
        namer.name(token, goes_on) for n, (token, share) in enumerate(likely) if share >= LEAST_SHARE or n == 0
    )
    return Facts(
        following=tuple(names),
        sure=likely[0][1] >= SURE,
        token=namer.name(span.token_id, inside),
        before=last_word(namer.after_marks(text[: span.start])),
        place={BEFORE_ANSWER: "ahead", ANSWER_START: "opening"}.get(stratum, ""),
        attributes=attributes,
    )


class _Namer:
    """Names of token ids, each made once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> None:
        self.tokenizer: Any = tokenizer
        self.special = {str(tokenizer.convert_ids_to_tokens(i)): i for i in tokenizer.all_special_ids}
        self.ends = ends
        self._texts: dict[int, str] = {}

    def name(self, token: int, inside: bool) -> str:
        """The name of a token; ``inside``: a letter or digit stands before it."""
        if token in self.ends:
            return "the end of the answer"
        if token in self.special.values():
            return "a mark of the chat"
        if token not in self._texts:
            # Decoded alone, some tokenizers' tokens lose the space that they begin with.
            alone, together = (self.tokenizer.decode(ids) for ids in ([self._anchor], [self._anchor, token]))
            self._texts[token] = together[len(alone) :]
        return token_name(self._texts[token], inside)

    @property
    def _anchor(self) -> int:
        return self.tokenizer.encode("a", add_special_tokens=False)[-1]

    def after_marks(self, text: str) -> str:
        """What of a text stands after the last token that is a mark of a chat."""
        end = max((at + len(mark) for mark in self.special if (at := text.rfind(mark)) >= 0), default=0)
        return text[end:]


def _following(
    spans: Sequence[Span],
    texts: Sequence[str],
    documents: Sequence[int],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[tuple[int, float]]]:
    """The likeliest tokens after each span, with their probabilities."""
    rows: dict[int, list[int]] = defaultdict(list)
    for row, document in enumerate(documents):
        rows[document].append(row)
    ids = [_ids(tokenizer, text, [spans[row] for row in rows[number]]) for number, text in enumerate(texts)]
    columns = [[spans[row].index for row in rows[number]] for number in range(len(texts))]
    whole = truncated_view(model, f"resid_post.{len(blocks(model)) - 1}")
    streams = vectors_at(whole, ids, columns, _MAX_TOKENS, progress=True)
    out: list[list[tuple[int, float]]] = [[] for _ in spans]
    order = [row for number in range(len(texts)) for row in rows[number]]
    with torch.inference_mode():
        for part in torch.arange(len(order)).split(_ROWS_AT_ONCE):
            top = logits_after(model, streams[part]).float().softmax(-1).topk(N_NEXT)
            for place, tokens, shares in zip(part.tolist(), top.indices.tolist(), top.values.tolist(), strict=True):
                out[order[place]] = list(zip(tokens, shares, strict=True))
    return out


def _ids(tokenizer: Any, text: str, spans: Sequence[Span]) -> list[int]:
    """The token ids of a stored text, up to its last span; of a chat, as its template rendered it."""
    for added in (True, False):
        ids = tokenizer(text, add_special_tokens=added, verbose=False)["input_ids"]
        if all(span.index < len(ids) and ids[span.index] == span.token_id for span in spans):
            return ids[: max(span.index for span in spans) + 1]
    raise StoreError(
        f"a stored text whose tokens are others now ({text[:40]!r} …)",
        "the tokens that it was read with",
        "read the corpus again with this tokenizer",
    )


# What the vectors hold of what is known of their documents


class _Known(NamedTuple):
    """Of each row."""

    attributes: list[dict[str, str]]
    group: list[str]
    """What shares an answer, and so one fold."""
    stratum: list[str]


def _documents(part: Rows) -> _Known:
    attributes = part.store.attributes(part.rows)
    numbers = part.store.documents(part.rows).tolist()
    return _Known(
        [{k: v for k, v in known.items() if isinstance(v, str) and k not in BOOKKEEPING} for known in attributes],
        [str(known.get("request", f"document {number}")) for known, number in zip(attributes, numbers, strict=True)],
        part.store.strata(part.rows),
    )


def _said(
    splits: Mapping[str, Rows], known: Mapping[str, _Known]
) -> tuple[dict[str, list[dict[str, str]]], dict[str, Any]]:
    """Of each row of each split the attributes that a probe finds in its vector; and figures by attribute."""
    said = {split: [{} for _ in part.rows] for split, part in splits.items()}
    names = list(dict.fromkeys(name for row in known["train"].attributes for name in row))
    vectors = {split: part.store.vectors[part.rows].double() for split, part in splits.items()}
    figures: dict[str, Any] = {}
    for name in names:
        values = {split: [row.get(name) for row in rows.attributes] for split, rows in known.items()}
        common, n_common = Counter(v for v in values["train"] if v is not None).most_common(1)[0]
        n_known = sum(v is not None for v in values["train"])
        usual = common if n_common >= USUAL * n_known else None  # what most texts are is not said
        right = _found(vectors, values, known["train"].group)
        held = _strata_that_hold(values["train"], right["train"], known["train"].stratum)
        for split, rows in known.items():
            for row, (value, hit, stratum) in enumerate(zip(values[split], right[split], rows.stratum, strict=True)):
                if hit and value is not None and value != usual and stratum in held:
                    said[split][row][name] = value
        figures[name] = {
            "known": n_known,
            "probe": sum(right["train"]) / max(n_known, 1),
            "said": sum(name in row for row in said["train"]),
            "kinds": sorted(held),
        }
    return said, figures


def _found(
    vectors: Mapping[str, Float[Tensor, "n d"]], values: Mapping[str, list[str | None]], groups: Sequence[str]
) -> dict[str, list[bool]]:
    """Whether a ridge classifier that did not see the row's document names its value; False where none is known."""
    classes = {value: n for n, value in enumerate(sorted({v for v in values["train"] if v is not None}))}
    folds = {group: n % N_FOLDS for n, group in enumerate(sorted(set(groups), key=_scrambled))}
    fold = torch.tensor([folds[group] for group in groups])
    codes = {split: torch.tensor([classes.get(v, -1) if v else -1 for v in row]) for split, row in values.items()}
    right = {split: torch.zeros(len(row), dtype=torch.bool) for split, row in codes.items()}
    x, y = vectors["train"], codes["train"]
    for number in range(N_FOLDS + 1):
        used, judged = (y >= 0) & (fold != number), (y >= 0) & (fold == number)
        if int(used.sum()) < 2 or (number < N_FOLDS and not bool(judged.any())):
            continue
        probe = _ridge(x[used], y[used], len(classes))
        if number < N_FOLDS:
            right["train"][judged] = probe(x[judged]) == y[judged]
        else:  # fitted on all training documents
            for split in set(vectors) - {"train"}:
                right[split] = (probe(vectors[split]) == codes[split]) & (codes[split] >= 0)
    return {split: hits.tolist() for split, hits in right.items()}


def _scrambled(group: str) -> float:
    return random.Random(group).random()


def _ridge(x: Float[Tensor, "n d"], y: Tensor, n_classes: int) -> Any:
    """One ridge regression per class on standardised vectors; what it makes of vectors is the class with the most."""
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-8)
    z = (x - mean) / scale
    targets = torch.nn.functional.one_hot(y, n_classes).double()
    base = targets.mean(0)
    penalty = RIDGE * len(z) * torch.eye(z.shape[1], dtype=z.dtype)
    weights = torch.linalg.solve(z.T @ z + penalty, z.T @ (targets - base))
    return lambda vectors: ((vectors - mean) / scale @ weights + base).argmax(1)


def _strata_that_hold(values: Sequence[str | None], right: Sequence[bool], strata: Sequence[str]) -> set[str]:
    """The kinds of token in whose vectors probes find the attribute more often than its commonest value is."""
    rows: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for value, hit, stratum in zip(values, right, strata, strict=True):
        if value is not None:
            rows[stratum].append((value, hit))
    held = set()
    for stratum, judged in rows.items():
        chance = Counter(value for value, _ in judged).most_common(1)[0][1] / len(judged)
        accuracy = sum(hit for _, hit in judged) / len(judged)
        if chance < 1 and (accuracy - chance) / (1 - chance) >= LEAST_SKILL:
            held.add(stratum)
    return held
