"""The measures of one labelled task, reader by reader, from what the readers gave at its sites.

Without labels: does the reader name the class's word? With labels: what can be fitted on what it gives? Then retention,
what the explanation left out, what it adds to a probe, and a paired test against the best reader of the text alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nla.eval.auroc import (
    N_BOOT,
    Ranked,
    auroc_difference,
    mean_auroc,
    paired_p,
    ranked_auroc,
    resample_groups,
)
from nla.eval.readers import probes
from nla.eval.readers.probes import (
    LOGISTIC,
    Budget,
    Complement,
    Features,
    Reconstructed,
    Retention,
    Split,
    fit_probe,
    select,
)
from nla.eval.readers.tasks import RANDOM, TEST, TRAIN, Task
from nla.eval.report import Figures
from nla.stats import Interval, wilson

PROBE, ACTIVATION, ADVERSARY = "probe", "reads the activation", "adversary"
NLA_READER = "NLA"
CONFABULATOR = "confabulator (decoder picks)"
N_EXAMPLES = 3


@dataclass(frozen=True)
class ReaderOutput:
    """What one reader gives for every site."""

    name: str
    kind: str
    """PROBE: vectors; ACTIVATION: texts from the activation; ADVERSARY: texts from anything else."""

    given: Float[Tensor, "n d"] | list[list[str]]
    """Vectors, or the samples of each site."""

    probe: str = LOGISTIC
    """How vectors are probed."""

    n_tokens: float = 0.0
    """Tokens written for each activation."""

    scores: Callable[[Task], Float[Tensor, "n k"] | None] | None = None
    """Scores without labels; None: by which class's words are in the texts."""

    @property
    def texts(self) -> list[list[str]]:
        """The samples of each site; none of a probe."""
        return [] if isinstance(self.given, Tensor) else self.given

    @property
    def features(self) -> Features:
        """What a classifier is fitted on: the vectors, or all samples of a site as one text."""
        return self.given if isinstance(self.given, Tensor) else self.joined

    @property
    def joined(self) -> list[str]:
        """All samples of each site as one text; none of a probe."""
        return [" \n".join(samples) for samples in self.texts]

    def scores_without_labels(self, task: Task) -> Float[Tensor, "n k"] | None:
        """Scores without any label, or None where nothing names the classes."""
        if isinstance(self.given, Tensor) or not any(task.words.get(name) for name in task.classes):
            return None
        return naming(self.texts, task.words, task.classes) if self.scores is None else self.scores(task)


@dataclass(frozen=True)
class SiteReadings:
    """What all readers give at some sites, shared by all tasks over them."""

    vectors: Float[Tensor, "n d"]
    """Activations."""

    predicted: Float[Tensor, "n d"] | None
    """Reconstructions from the pair's explanations."""

    exchanged: Int[Tensor, " n"]
    """A site of another group for each site: what the baselines are given."""

    outputs: list[ReaderOutput]


class Versus(NamedTuple):
    """A reader against the best adversary of the same task and measure."""

    adversary: str
    difference: Interval
    p_value: float
    """Two-sided, from paired resamples of groups."""

    p_holm: float
    """Corrected over the tasks."""


@dataclass(frozen=True)
class ReaderRow(Figures):
    """One reader on one task. AUROCs by split: "test", and each transfer split; empty where not measured."""

    reader: str
    kind: str
    labelled: dict[str, Interval]
    """Fitted on the train split."""

    zero: dict[str, Interval] = field(default_factory=dict)
    """Without labels."""

    choice: Interval | None = None
    """Forced choice among the classes without labels, corrected for chance: 0 is guessing, 1 always right."""

    budgets: list[Budget] = field(default_factory=list)
    random: Interval | None = None
    """Fitted on coin flips: must be 0.5."""

    n_tokens: float = 0.0
    zero_versus: Versus | None = None
    labelled_versus: Versus | None = None
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TaskResult(Figures):
    """All readers on one task."""

    task: str
    classes: list[str]
    n_items: dict[str, int]
    readers: list[ReaderRow]
    retention: Retention | None = None
    complement: Complement | None = None
    shares_sites: list[str] = field(default_factory=list)
    """Of random labels: the tasks at the same sites."""

    def row(self, reader: str) -> ReaderRow | None:
        """One reader's row, if it was there."""
        return next((row for row in self.readers if row.reader == reader), None)

    def beside(self, coin: TaskResult) -> TaskResult:
        """The same, with what each reader makes of random labels at the same sites."""
        by_reader = {row.reader: row.labelled.get(TEST) for row in coin.readers}
        return replace(self, readers=[replace(row, random=by_reader.get(row.reader)) for row in self.readers])


class _Measured(NamedTuple):
    row: ReaderRow
    zero: Ranked | None
    labelled: Ranked


def judge_task(task: Task, at: SiteReadings, sizes: Sequence[int], n_boot: int = 500, seed: int = 0) -> TaskResult:
    """Every measure of a task; ``sizes`` are numbers of labels to fit on."""
    measured = [_measure(task, output, sizes, n_boot, seed) for output in at.outputs]
    kept = complement = None
    explained = next((output.joined for output in at.outputs if output.name == NLA_READER), None)
    if at.predicted is not None and explained is not None:
        train, test, k = task.rows(TRAIN), task.rows(TEST), len(task.classes)
        on, judged = _split(task, TRAIN), _split(task, TEST)
        first, second = (Reconstructed(at.vectors[rows], at.predicted[rows]) for rows in (train, test))
        shuffled = at.predicted[at.exchanged[test]]
        kept = probes.retention(first, on.labels, second, shuffled, judged, k, n_boot, seed)
        texts = [explained[row] for row in train], [explained[row] for row in test]
        complement = probes.complement(first.vectors, texts[0], on, second.vectors, texts[1], judged, k, n_boot, seed)
    return TaskResult(
        task=task.name,
        classes=task.classes,
        n_items={split: len(task.rows(split)) for split in (TRAIN, TEST, *task.transfers)},
        readers=_versus(measured),
        retention=kept,
        complement=complement,
    )


def judge_coins(
    coins: Sequence[Task], at: SiteReadings, beside: Sequence[str], n_boot: int = 500, seed: int = 0
) -> TaskResult:
    """What can be fitted on each reader where labels are coin flips, on average over several: 0.5 but for chance.

    The coins are of the same sites and splits; an interval resamples groups, the same for all coins.
    """
    train, test = coins[0].rows(TRAIN), coins[0].rows(TEST)
    rows = []
    for output in at.outputs:
        known, others = select(output.features, train), select(output.features, test)
        ranked = []
        for coin in coins:
            fitted = fit_probe(known, coin.codes(train), len(coin.classes), output.probe, seed)
            ranked.append(ranked_auroc(fitted(others), *_split(coin, TEST), n_boot, seed))
        labelled = {TEST: mean_auroc(ranked)}
        rows.append(ReaderRow(output.name, output.kind, labelled=labelled, n_tokens=output.n_tokens))
    sizes = {TRAIN: len(train), TEST: len(test)}
    return TaskResult(RANDOM, coins[0].classes, sizes, rows, shares_sites=list(beside))


def _split(task: Task, split: str) -> Split:
    rows = task.rows(split)
    return Split(task.codes(rows), task.group_codes(rows))


def _measure(task: Task, output: ReaderOutput, sizes: Sequence[int], n_boot: int, seed: int) -> _Measured:
    train, k, features = task.rows(TRAIN), len(task.classes), output.features
    labels, test = task.codes(train), task.rows(TEST)
    fitted = fit_probe(select(features, train), labels, k, output.probe, seed)
    named = output.scores_without_labels(task)
    ranked: dict[str, Ranked] = {}
    without: dict[str, Ranked] = {}
    for split in (TEST, *task.transfers):
        rows, judged = task.rows(split), _split(task, split)
        if len(judged.labels.unique()) < 2:
            continue
        ranked[split] = ranked_auroc(fitted(select(features, rows)), *judged, n_boot, seed)
        if named is not None:
            without[split] = ranked_auroc(named[rows], *judged, n_boot, seed)
    few = [size for size in sizes if size < len(train)]
    budgets = probes.auroc_by_budget(
        select(features, train), labels, select(features, test), _split(task, TEST), k, output.probe, few, seed
    )
    budgets.append(Budget(len(train), *[ranked[TEST].auroc.value] * 3))
    row = ReaderRow(
        reader=output.name,
        kind=output.kind,
        zero={split: one.auroc for split, one in without.items()},
        choice=None if named is None else forced_choice(named[test], *_split(task, TEST), n_boot, seed),
        labelled={split: one.auroc for split, one in ranked.items()},
        budgets=budgets,
        n_tokens=output.n_tokens,
        examples=[output.texts[row][0] for row in test[:N_EXAMPLES]] if output.texts else [],
    )
    return _Measured(row, without.get(TEST), ranked[TEST])


def naming(
    texts: Sequence[Sequence[str]], words: Mapping[str, Sequence[str]], classes: Sequence[str]
) -> Float[Tensor, "n k"]:
    """How much more often texts name a class than another one: in [−1, 1].

    The share of a site's samples with one of the class's words, minus its mean over the other classes: a text that
    names them all has named none. Whole words, in any case. A class that alone has no words, such as a sham, is what
    is left when no other is named.
    """
    patterns = [_pattern(words.get(name, ())) for name in classes]
    wordless = [column for column, pattern in enumerate(patterns) if pattern is None]
    hits = {text: [bool(one and one.search(text)) for one in patterns] for samples in texts for text in samples}
    if len(wordless) == 1:
        for row in hits.values():
            row[wordless[0]] = not any(row)
    shares = torch.stack([torch.tensor([hits[text] for text in samples]).double().mean(0) for samples in texts])
    others = (shares.sum(1, keepdim=True) - shares) / max(1, len(classes) - 1)
    return shares - others


def _pattern(words: Sequence[str]) -> re.Pattern[str] | None:
    if not words:
        return None
    return re.compile(r"(?<!\w)(?:" + "|".join(re.escape(word) for word in words) + r")(?!\w)", re.IGNORECASE)


def forced_choice(
    scores: Float[Tensor, "n k"],
    labels: Int[Tensor, " n"],
    groups: Int[Tensor, " n"],
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> Interval:
    """Share of items whose class scores highest, ties shared, corrected for chance: (share − 1/k) / (1 − 1/k).

    The share is the mean of the classes' own, so that always choosing the commonest class earns 0 like any guess.
    """
    n_classes, n_groups = scores.shape[1], len(groups.unique())
    best = scores == scores.amax(1, keepdim=True)
    credit = best[torch.arange(len(labels)), labels].double() / best.sum(1)
    members = torch.nn.functional.one_hot(labels, n_classes).double()

    def share(weights: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
        return ((weights * credit) @ members / (weights @ members)).nanmean(1)  # 0 / 0: a class that was not drawn

    value = float(share(torch.ones(1, len(labels), dtype=torch.float64)))
    if n_groups < 2:
        interval = Interval(value, math.nan, math.nan)
    elif value in (0.0, 1.0):
        interval = wilson(round(value * n_groups), n_groups)
    else:
        ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
        draws = share(resample_groups(groups, n_boot, seed).double())
        interval = Interval(value, *torch.quantile(draws, ends).tolist())
    return Interval(*[(part - 1 / n_classes) / (1 - 1 / n_classes) for part in interval])


def _versus(measured: Sequence[_Measured]) -> list[ReaderRow]:
    """Every reader against the adversary that scores highest on the same measure, of those that no activation helps."""
    rivals = [one for one in measured if one.row.kind == ADVERSARY and one.row.reader != CONFABULATOR]

    def against(reader: Ranked | None, measure: str) -> Versus | None:
        known = [(getattr(rival, measure), rival.row.reader) for rival in rivals]
        known = [(ranked, name) for ranked, name in known if ranked is not None]
        if reader is None or not known:
            return None
        best, name = max(known, key=lambda pair: pair[0].auroc.value)
        p_value = paired_p(reader, best)
        return Versus(name, auroc_difference(reader, best), p_value, p_value)

    return [
        one.row
        if one.row.kind == ADVERSARY
        else replace(one.row, zero_versus=against(one.zero, "zero"), labelled_versus=against(one.labelled, "labelled"))
        for one in measured
    ]
