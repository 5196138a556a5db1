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

from nla.store.facts import TokenFacts, known_attributes, token_facts
from nla.store.reader import Store
from nla.text.facts import Facts, state

LEAST_SHARE, SURE = 0.03, 0.7
"""The least probability of tokens that are named as likely next, after the first; of a first that is sure."""
N_FOLDS, RIDGE = 5, 0.3
"""Of the probes: each document is judged by one that did not see it; their penalty per row, on standardised vectors."""
USUAL = 0.8
"""A value that so many of the known texts have is not said."""
LEAST_SKILL = 0.1
"""A kind of token holds an attribute if probes of it are this far from the commonest value (0) to all right (1)."""


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
    texts = {}
    for split, part in splits.items():
        facts = token_facts(part.store.activations(part.rows), model, tokenizer)
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


def _documents(part: Rows) -> _Known:
    attributes, numbers = part.store.attributes(part.rows), part.store.documents(part.rows).tolist()
    return _Known(
        known_attributes(part.store, part.rows),
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
        right = found_by_probe(vectors, values, known["train"].group)
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


def found_by_probe(
    vectors: Mapping[str, Float[Tensor, "n d"]], values: Mapping[str, list[str | None]], groups: Sequence[str]
) -> dict[str, list[bool]]:
    """Whether a ridge classifier that did not see the row's document names its value; False where none is known.

    Args:
        vectors: of each split; "train" is judged in folds, the others by what was fitted on all of it.
        groups: of the rows of "train": rows of one group share a fold.
    """
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
