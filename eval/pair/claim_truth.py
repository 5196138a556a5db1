"""Explanations and what is true of their activations in; which of their claims hold, by kind of claim, out.

Readers that write no text are judged alike: by what they would claim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nla.eval.readers.probes import LOGISTIC, MASS_MEAN, Features, fit_probe, select
from nla.store.facts import N_NEXT, TokenNames
from nla.text.claims import claims
from nla.text.facts import INSTRUCTION, stated

NEXT, NEXT_ANY, TOKEN, BEFORE = "next token", "next token, any of four", "token", "word before"
OF_TOKENS = (NEXT, NEXT_ANY, TOKEN, BEFORE)
"""Kinds of claims that need no attributes; the others are called as the attribute is."""
MOST_CLASSES = 64
"""Kinds of more values are probed by class means: logistic regression takes too long on them."""
N_GRAM = 4
Value = tuple[str, ...]


class Truth(NamedTuple):
    """What is true of an activation."""

    following: Value
    """Names of the target's likeliest next tokens."""
    token: str
    before: str
    """Empty: there is no word before."""
    place: str
    attributes: Mapping[str, str]
    """Empty: the document is known to have none; absent: nobody knows."""
    held_out: Collection[str] = ()
    """Attributes whose value or wording no training document has."""

    def value(self, kind: str) -> Value:
        """What a claim of this kind says where it is true; empty where there is nothing to say or nobody knows."""
        if kind in (NEXT, NEXT_ANY):
            return self.following[: 1 if kind == NEXT else None]
        value = {TOKEN: self.token, BEFORE: self.before}.get(kind) or self.attributes.get(kind, "")
        return (value,) if value else ()

    def decides(self, kind: str) -> bool:
        """Whether it is known if a claim of this kind is true."""
        return kind in OF_TOKENS or kind in self.attributes

    def holds(self, kind: str, value: Value) -> bool:
        """Whether a claim of a kind that it decides is true; of the empty value, whether there is nothing to say."""
        if kind == NEXT:
            return value[:1] == self.following[:1]
        if kind == NEXT_ANY:
            return not set(value[:N_NEXT]).isdisjoint(self.following)
        if kind == TOKEN and len(value) == 2:
            token, place = value
            return self.place == place if place == "ahead" else token == self.token and place == self.place
        return [part.casefold() for part in value] == [part.casefold() for part in self.value(kind)]


def attributes_of(known: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, str]:
    """The attributes ``texts`` of a document, and that it has no hidden instruction where the corpus says so."""
    none = {INSTRUCTION: ""} if INSTRUCTION in known and known[INSTRUCTION] is None else {}
    return {**none, **texts}


class Said(NamedTuple):
    """What an explanation states."""

    values: dict[str, list[Value]]
    """By kind, of each claim."""
    n_claims: int
    n_unread: int
    """Claims that are in no known wording."""


def read_claims(text: str, kinds: Collection[str]) -> Said:
    """The claims of an explanation, one by one, so that a second claim does not hide behind a first."""
    values: dict[str, list[Value]] = {}
    sentences, n_unread = claims(text), 0
    for sentence in sentences:
        facts = stated(sentence)
        here: dict[str, Value] = {name: (value,) for name, value in facts.attributes.items() if name in kinds}
        if facts.following:
            here |= {NEXT: facts.following, NEXT_ANY: facts.following}
        if facts.token or facts.place:
            here[TOKEN] = (facts.token, facts.place) if facts.place else (facts.token,)
        if facts.before:
            here[BEFORE] = (facts.before,)
        for kind, value in here.items():
            values.setdefault(kind, []).append(value)
        n_unread += not here
    return Said(values, len(sentences), n_unread)


def outcomes(said: Sequence[Said], truths: Sequence[Truth], kind: str) -> Float[Tensor, " n"]:
    """1 where all claims of a kind are true, 0 where one is not, NaN where there is none or nobody knows."""
    return torch.tensor(
        [
            all(truth.holds(kind, value) for value in one.values[kind])
            if kind in one.values and truth.decides(kind)
            else torch.nan
            for one, truth in zip(said, truths, strict=True)
        ],
        dtype=torch.float64,
    )


def guessed(values: Sequence[Value], truths: Sequence[Truth], kind: str) -> Float[Tensor, " n"]:
    """The same of one value for each row."""
    return outcomes([Said({kind: [value]}, 1, 0) for value in values], truths, kind)


def somewhere(truths: Sequence[Truth], kind: str) -> Bool[Tensor, " n"]:
    """The rows at which there is something true to say."""
    return torch.tensor([bool(truth.value(kind)) for truth in truths], dtype=torch.bool)


# Readers without texts of their own


def commonest(kind: str, fit: Sequence[Truth], strata_fit: Sequence[str], strata: Sequence[str]) -> list[Value]:
    """For each row the commonest value, or values, of the training rows of its kind of token; else of all."""
    counts: dict[str, Counter[str]] = {"": Counter()}
    for truth, stratum in zip(fit, strata_fit, strict=True):
        for name in truth.value(kind)[:1]:
            counts[""][name] += 1
            counts.setdefault(stratum, Counter())[name] += 1
    n = N_NEXT if kind == NEXT_ANY else 1
    best = {stratum: tuple(name for name, _ in count.most_common(n)) for stratum, count in counts.items()}
    return [best.get(stratum, best[""]) for stratum in strata]


def probed(kind: str, fit: Sequence[Truth], features: Features, others: Features, seed: int) -> list[Value] | None:
    """What a linear probe of vectors, or a TF-IDF reader of texts, makes of each of ``others``; None: nothing to fit.

    Args:
        features: of the training rows ``fit``.
    """
    rows = [row for row, truth in enumerate(fit) if truth.decides(kind)]
    values = [next(iter(fit[row].value(kind)), "") for row in rows]
    names = sorted(set(values))
    if len(names) < 2:
        return None
    codes = {name: code for code, name in enumerate(names)}
    labels = torch.tensor([codes[value] for value in values])
    means = MASS_MEAN if len(names) > MOST_CLASSES else LOGISTIC
    scores = fit_probe(select(features, rows), labels, len(names), means, seed)(others)
    best = scores.topk(min(N_NEXT if kind == NEXT_ANY else 1, len(names)), dim=1).indices.tolist()
    return [tuple(name for code in row if (name := names[code])) for row in best]


class NGrams:
    """What follows the longest known end of a context in the training texts, up to :data:`N_GRAM` − 1 tokens."""

    def __init__(self, ids: Iterable[Sequence[int]]) -> None:
        parts = [np.concatenate([np.asarray(row, dtype=np.int64), [-1]]) for row in ids]
        self.ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def following(self, context: Sequence[int]) -> list[tuple[int, float]]:
        """The :data:`N_NEXT` most frequent next tokens, those after the longest end first, with their counts."""
        out: dict[int, float] = {}
        for length in range(min(N_GRAM - 1, len(context)), -1, -1):
            n = len(self.ids) - length
            matches = np.ones(max(n, 0), dtype=bool)
            for back in range(length):
                matches &= self.ids[back : back + n] == context[len(context) - length + back]
            after = self.ids[length:][matches]
            tokens, counts = np.unique(after[after >= 0], return_counts=True)
            for at in np.argsort(-counts, kind="stable")[: N_NEXT + len(out)]:
                out.setdefault(int(tokens[at]), float(counts[at]))
            if len(out) >= N_NEXT:
                break
        return list(out.items())[:N_NEXT]


def n_gram_values(
    training: Sequence[Sequence[int]], contexts: Sequence[Sequence[int]], texts: Sequence[str], names: TokenNames
) -> list[Value]:
    """For each context of token ids, whose text is also given, the names of what an n-gram model holds likely next."""
    model = NGrams(training)
    return [
        tuple(name for name, _ in names.shares(model.following(context), text))
        for context, text in zip(contexts, texts, strict=True)
    ]


def spread(strata: Sequence[str], n: int, seed: int) -> Int[Tensor, " m"]:
    """``n`` rows at random, rising, as evenly as can be over their kinds of token."""
    names = list(strata)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    turns: Counter[str] = Counter()
    ranked = []
    for row in order:
        ranked.append((turns[names[row]], len(ranked), row))
        turns[names[row]] += 1
    return torch.tensor(sorted(row for *_, row in sorted(ranked)[:n]), dtype=torch.int64)
