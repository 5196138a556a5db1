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
from torch.nn.functional import one_hot
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla.stats import wilson
from nla.store.facts import TokenFacts, answers_of, known_attributes, token_facts
from nla.store.reader import Store
from nla.text.facts import Facts, state

LEAST_SHARE, SURE = 0.03, 0.7
"""The least probability of tokens that are named as likely next, after the first; of a first that is sure."""
N_FOLDS, RIDGE = 5, 0.3
"""Of the probes: each document is judged by one that did not see it; their penalty per row, on standardised vectors."""
USUAL = 0.8
"""A value that so many of the known texts have is not said."""
CONFIDENCE, LUCK = 0.95, 1 / 3
"""Of the bound that probes of an attribute must pass at a kind of token; the most that luck may have of their hits."""


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
    acts = {split: part.store.activations(part.rows) for split, part in splits.items()}
    known = {split: _documents(part, acts[split].strata) for split, part in splits.items()}
    said, figures = _said({split: part.vectors for split, part in acts.items()}, known)
    texts = {}
    for split, part in splits.items():
        facts = token_facts(acts[split], model, tokenizer)
        texts[split] = [
            state(_facts(known, attributes), random.Random(f"{seed}/{split}/{row}"))
            for row, known, attributes in zip(part.rows.tolist(), facts, said[split], strict=True)
        ]
    return texts, figures


def _facts(known: TokenFacts, attributes: dict[str, str]) -> Facts:
    names = [name for n, (name, share) in enumerate(known.following) if share >= LEAST_SHARE or n == 0]
    sure = known.following[0][1] >= SURE
    return Facts(tuple(names), sure, known.token, known.before, known.place, attributes)


# What the vectors hold of what is known of their documents


class _Known(NamedTuple):
    """Of each row."""

    attributes: list[dict[str, str]]
    group: list[str]
    """What shares an answer, and so one fold."""
    stratum: list[str]


def _documents(part: Rows, strata: list[str]) -> _Known:
    attributes = part.store.attributes(part.rows)
    return _Known(known_attributes(attributes), answers_of(part.store, part.rows, attributes), strata)


def _said(
    vectors: Mapping[str, Float[Tensor, "n d"]], known: Mapping[str, _Known]
) -> tuple[dict[str, list[dict[str, str]]], dict[str, Any]]:
    """Of each row of each split the attributes that a probe finds in its vector; and figures by attribute."""
    said: dict[str, list[dict[str, str]]] = {split: [{} for _ in part] for split, part in vectors.items()}
    names = list(dict.fromkeys(name for row in known["train"].attributes for name in row))
    probes = Probes(vectors, known["train"].group)
    figures: dict[str, Any] = {}
    for name in names:
        values = {split: [row.get(name) for row in rows.attributes] for split, rows in known.items()}
        common, n_common = Counter(v for v in values["train"] if v is not None).most_common(1)[0]
        n_known = sum(v is not None for v in values["train"])
        usual = common if n_common >= USUAL * n_known else None  # what most texts are is not said
        right = probes.right(values)
        held = _strata_that_hold(values["train"], right["train"], known["train"])
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


class Probes:
    """Ridge classifiers on standardised vectors: which rows' values does one name that did not see their documents?

    Args:
        vectors: of each split; "train" is judged in folds, the others by what was fitted on all of it.
        groups: of the rows of "train": rows of one group share a fold.
    """

    def __init__(self, vectors: Mapping[str, Float[Tensor, "n d"]], groups: Sequence[str]) -> None:
        mean, scale = vectors["train"].mean(0), vectors["train"].std(0).clamp_min(1e-8)
        self.vectors = {split: (part - mean) / scale for split, part in vectors.items()}
        folds = {group: n % N_FOLDS for n, group in enumerate(sorted(set(groups), key=_scrambled))}
        self.fold = torch.tensor([folds[group] for group in groups])
        self._grams: dict[bytes, list[Tensor]] = {}

    def right(self, values: Mapping[str, list[str | None]]) -> dict[str, list[bool]]:
        """Whether each row's value is named; False where none is known. ``values`` are those of each split's rows."""
        classes = {value: n for n, value in enumerate(sorted({v for v in values["train"] if v is not None}))}
        codes = {s: torch.tensor([-1 if v is None else classes.get(v, -1) for v in part]) for s, part in values.items()}
        right = {split: torch.zeros(len(part), dtype=torch.bool) for split, part in codes.items()}
        y = codes["train"]
        for number in range(N_FOLDS + 1):  # the last is fitted on all training documents
            judged = {"train": (y >= 0) & (self.fold == number)}
            if number == N_FOLDS:
                judged = {split: part >= 0 for split, part in codes.items() if split != "train"}
            if int(((y >= 0) & (self.fold != number)).sum()) < 2 or not any(
                bool(rows.any()) for rows in judged.values()
            ):
                continue
            weights, base = self._fit(y, number, len(classes))
            for split, rows in judged.items():
                right[split][rows] = (self.vectors[split][rows] @ weights + base).argmax(1) == codes[split][rows]
        return {split: hits.tolist() for split, hits in right.items()}

    def _fit(self, y: Tensor, left_out: int, n_classes: int) -> tuple[Tensor, Tensor]:
        """Weights (d, classes) and constants of one ridge regression per class, on the rows of all folds but one."""
        used = (y >= 0) & (self.fold != left_out)
        z, targets = self.vectors["train"][used], one_hot(y[used], n_classes).float()
        base, mean = targets.mean(0), z.mean(0)
        grams = [gram for number, gram in enumerate(self._folds_of(y >= 0)) if number != left_out]
        gram = torch.stack(grams).sum(0) - len(z) * torch.outer(mean, mean).double()
        gram = gram + RIDGE * len(z) * torch.eye(len(mean)).double()
        weights = torch.linalg.solve(gram, (z.T @ (targets - base)).double()).float()
        return weights, base - mean @ weights

    def _folds_of(self, known: Tensor) -> list[Tensor]:
        """Gram matrix of each fold's known rows: computed once for all attributes that the same rows have."""
        key = known.numpy().tobytes()
        if key not in self._grams:
            parts = [self.vectors["train"][known & (self.fold == number)] for number in range(N_FOLDS)]
            self._grams = {key: [(part.T @ part).double() for part in parts]}  # the last ones, for memory
        return self._grams[key]


def _scrambled(group: str) -> float:
    return random.Random(group).random()


def _strata_that_hold(values: Sequence[str | None], right: Sequence[bool], known: _Known) -> set[str]:
    """The kinds of token in whose vectors probes find the attribute: surely more often than its commonest value is, and
    so often that most of what they name rightly is not luck. Rows of one document are taken for one."""
    rows: dict[str, list[tuple[str, bool, str]]] = defaultdict(list)
    for value, hit, stratum, group in zip(values, right, known.stratum, known.group, strict=True):
        if value is not None:
            rows[stratum].append((value, hit, group))
    held = set()
    for stratum, judged in rows.items():
        chance = Counter(value for value, _, _ in judged).most_common(1)[0][1] / len(judged)
        accuracy = sum(hit for _, hit, _ in judged) / len(judged)
        n = len({group for _, _, group in judged})
        surely = wilson(round(accuracy * n), n, 1 - (1 - CONFIDENCE) / len(rows)).low
        if surely > chance and chance * (1 - (accuracy - chance) / (1 - chance)) <= LUCK * accuracy:
            held.add(stratum)
    return held
