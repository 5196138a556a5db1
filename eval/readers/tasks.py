"""Labelled tasks: sites in texts, a label at each, and who may be fitted on what.

A caller makes :class:`Sites` (where to read) and any number of :class:`Task` over them (what to tell apart): the
activations and explanations of equal sites are made once and shared.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nla.errors import ArgumentError
from nla.eval.target import Target
from nla.metrics import check_finite
from nla.models.points import Point, context_length, truncated_view
from nla.models.read import read, vectors_at
from nla.text.tokens import Encoded, Span, encode_batch

TRAIN, TEST = "train", "test"
MIN_PER_CLASS = 2
RANDOM = "random labels"
_SHOWN = 5
_MAX_TOKENS = 8192


@dataclass(frozen=True)
class Sites:
    """Where activations are read: one token of one text a site."""

    texts: Sequence[str]
    tokens: Sequence[int]
    """Token index in the text of each site, from 0, or negative from the end."""

    groups: Sequence[int]
    """Document or cluster of each site: never divided between splits, and resampled as a whole."""

    def __post_init__(self) -> None:
        for name in ("texts", "tokens", "groups"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # hashable, whatever sequence was given
        if not len(self.texts) == len(self.tokens) == len(self.groups):
            raise ArgumentError(
                f"{len(self.texts)} texts, {len(self.tokens)} tokens, {len(self.groups)} groups",
                "as many of each",
                "give one of each a site",
            )
        if not self.texts:
            raise ArgumentError("no sites", "1 or more", "check the selection of texts and positions")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def unique_texts(self) -> list[str]:
        """Each text once, in order."""
        return list(dict.fromkeys(self.texts))

    def spans(self, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
        """The token of each site."""
        encoded = self._encoded(tokenizer)
        return [encoded[text].spans[token] for text, token in zip(self.texts, self.tokens, strict=True)]

    def visible(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """What a reader of the text may see at each site: everything up to and including its token."""
        return [text[: span.end] for text, span in zip(self.texts, self.spans(tokenizer), strict=True)]

    def prefixes(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Token ids up to and including each site's token, as they are in its whole text."""
        encoded = self._encoded(tokenizer)
        ends = [span.index + 1 for span in self.spans(tokenizer)]
        return [encoded[text].ids[:end] for text, end in zip(self.texts, ends, strict=True)]

    def _encoded(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Encoded]:
        unique = self.unique_texts
        return dict(zip(unique, encode_batch(tokenizer, unique, None), strict=True))


def read_task_sites(target: Target, sites: Sites) -> Float[Tensor, "n d"]:
    """Activations float32 of the sites at the target's point; each text runs once.

    Raises:
        PositionError, ContextLengthError, VocabularyError: see :func:`nla.models.read.read`.
    """
    wanted, order = _by_text(sites)
    texts = sites.unique_texts
    with target.role():
        acts = read(target.model, target.tokenizer, texts, target.point, lambda document, _spans: wanted[document])
    return acts.vectors[order]


def read_task_sites_at(target: Target, sites: Sites, points: Sequence[Point]) -> Float[Tensor, "n p d"]:
    """Activations float32 of the sites at several points, by one pass up to the last of them; each text runs once.

    Raises:
        PointError, ContextLengthError, VocabularyError, NonFiniteError: see :func:`nla.models.read.read`.
    """
    wanted, order = _by_text(sites)
    encoded = encode_batch(target.tokenizer, sites.unique_texts, context_length(target.model))
    columns = [[one.spans[token].index for token in tokens] for one, tokens in zip(encoded, wanted, strict=True)]
    with target.role():
        view = truncated_view(target.model, max(points, key=lambda point: point.layer))
        streams = vectors_at(view, [one.ids for one in encoded], columns, _MAX_TOKENS, points=points).float()
    check_finite(streams)
    return streams[order]


def _by_text(sites: Sites) -> tuple[list[list[int]], Int[Tensor, " n"]]:
    """The tokens wanted of each unique text, and where each site is when they are read text after text."""
    document_of = {text: number for number, text in enumerate(sites.unique_texts)}
    wanted: list[list[int]] = [[] for _ in document_of]
    row_of: list[tuple[int, int]] = []
    for text, token in zip(sites.texts, sites.tokens, strict=True):
        document = document_of[text]
        row_of.append((document, len(wanted[document])))
        wanted[document].append(token)
    starts = torch.tensor([0, *map(len, wanted)]).cumsum(0).tolist()
    return wanted, torch.tensor([starts[document] + offset for document, offset in row_of])


@dataclass(frozen=True)
class Task:
    """A classification task: the label of each site, and what is fitted and judged on."""

    name: str
    sites: Sites
    labels: Sequence[str | None]
    """Class of each site; None: the site has no part in this task."""

    splits: Sequence[str]
    """"train", "test", or the name of a transfer split: judged by what was fitted on "train"."""

    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For a judgement without labels: words that name a class. Empty: no such judgement."""

    def __post_init__(self) -> None:
        for name in ("labels", "splits"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.labels) == len(self.splits) == len(self.sites):
            raise ArgumentError(
                f"{len(self.labels)} labels and {len(self.splits)} splits for {len(self.sites)} sites",
                "one of each a site",
                "align them",
            )
        self._check_classes()
        owner: dict[int, str] = {}
        for row, group in enumerate(self.sites.groups):
            if self.labels[row] is not None and owner.setdefault(group, self.splits[row]) != self.splits[row]:
                raise ArgumentError(
                    f"task {self.name!r}: group {group} in {owner[group]} and {self.splits[row]}",
                    "a group in one split only",
                    "split by group, never by row",
                )

    def _check_classes(self) -> None:
        train = Counter(self.labels[row] for row in self.rows(TRAIN))
        if len(train) < 2 or min(train.values()) < MIN_PER_CLASS:
            rare = ", ".join(f"{label!r} {count}" for label, count in train.most_common()[: -_SHOWN - 1 : -1])
            raise ArgumentError(
                f"task {self.name!r}: {len(train)} classes to fit on, of which the rarest are {rare or 'none'}",
                f"two classes or more, each with {MIN_PER_CLASS} items or more",
                "add items to fit on, or leave rare classes out",
            )
        if len({self.labels[row] for row in self.rows(TEST)}) < 2:
            raise ArgumentError(f"task {self.name!r}: one class or none in its test split", "two", "add items")

    @functools.cached_property
    def classes(self) -> list[str]:
        """The classes of the train split, in order."""
        pairs = zip(self.labels, self.splits, strict=True)
        return sorted({label for label, split in pairs if label is not None and split == TRAIN})

    def rows(self, split: str) -> list[int]:
        """Sites of a split whose label was fitted on."""
        known, pairs = set(self.classes), enumerate(zip(self.labels, self.splits, strict=True))
        return [row for row, (label, in_split) in pairs if in_split == split and label in known]

    @property
    def transfers(self) -> list[str]:
        """Names of the transfer splits."""
        return [split for split in dict.fromkeys(self.splits) if split not in (TRAIN, TEST) and self.rows(split)]

    def codes(self, rows: Sequence[int]) -> Int[Tensor, " n"]:
        """Class numbers int64 of sites."""
        number = {name: code for code, name in enumerate(self.classes)}
        return torch.tensor([number[str(self.labels[row])] for row in rows])

    def group_codes(self, rows: Sequence[int]) -> Int[Tensor, " n"]:
        """Groups int64 of sites."""
        return torch.tensor([self.sites.groups[row] for row in rows])


def random_task(sites: Sites, splits: Sequence[str], seed: int = 0) -> Task:
    """Coin flips, one a group, as many heads as tails in each split: what is learned of them cannot reach other splits.

    Source: Hewitt & Liang 2019, "Designing and Interpreting Probes with Control Tasks".
    """
    rng = random.Random(seed)
    members: dict[str, list[int]] = {}
    for group, split in dict.fromkeys(zip(sites.groups, splits, strict=True)):
        members.setdefault(split, []).append(group)
    coin: dict[int, str] = {}
    for groups in members.values():
        rng.shuffle(groups)
        coin |= {group: ("heads", "tails")[number % 2] for number, group in enumerate(groups)}
    return Task(RANDOM, sites, tuple(coin[group] for group in sites.groups), tuple(splits))
