"""`nla probe`: a user's own labelled texts in, the readers compared on them out, with a picture.

The texts are split by group: equal texts, and rows of the same group, are never on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nla.errors import ArgumentError, ContextLengthError, PositionError, VocabularyError
from nla.eval.readers.compare import SELFIE, ComparisonSettings, Sources, compare_points, compare_readers
from nla.eval.readers.labelled_file import MAX_ROWS, LabelledRow, LabelledRows, read_labelled_file
from nla.eval.readers.measures import NLA_READER, TaskResult
from nla.eval.readers.probes import LOGISTIC
from nla.eval.readers.tables import LEGEND, points_table, random_check, readers_figure, tables
from nla.eval.readers.tasks import TEST, TRAIN, Sites, Task
from nla.eval.report import Check, Report, checks_table, one_line, paragraphs
from nla.eval.target import Target, doubts, one_place, open_pair
from nla.models.points import Point, blocks, context_length
from nla.progress import Progress, silent
from nla.text.tokens import Span, encode_batch, select_positions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nla.autoencoder import NLA

N_FOLDS = 3
MAX_SITES = 20_000
_SHOWN = 5


@dataclass(frozen=True)
class ProbeReport(Report):
    """Everything `nla probe` measures."""

    name = "probe"
    data: str
    target: str
    point: str
    positions: str
    n_rows: int
    """Rows in the file."""

    n_texts: int
    n_sites: int
    notes: list[str]
    """What was left out or should be known of the data."""

    tasks: list[TaskResult]
    by_point: dict[str, TaskResult]
    """Probes and the logit lens at each point, first block to last; empty where there is one point."""

    def body(self) -> str:
        """The readable report."""
        about = (
            f"`{one_line(self.data)}`: {self.n_texts} texts of {self.n_rows} rows, {self.n_sites} activations of "
            f"{one_line(self.target)} at `{self.point}`, positions {one_line(self.positions)}. {LEGEND}"
        )
        notes = "\n".join(f"- {note}" for note in self.notes)
        title = "## Probes, readers of the text, and the NLA"
        points = points_table(self.by_point) if self.by_point else ""
        return paragraphs(title, about, notes, checks_table(self.checks), tables(self.tasks), points)

    def figure(self) -> Figure:
        """The readers of the labels, without the coin flips."""
        task = self.tasks[0]
        return readers_figure({task.task: task}, f"{self.data}: {task.task} at {self.point} of {self.target}")


class LabelledSites(NamedTuple):
    """A row of the file for every token that is read, that token's index, and how many texts were left out."""

    rows: list[LabelledRow]
    tokens: list[int]
    n_unreadable: int
    n_unmatched: int


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(ComparisonSettings):
    """Which texts are compared on, where they are read, and how the readers are run.

    Raises:
        ArgumentError: see :class:`nla.eval.readers.compare.ComparisonSettings`.
        PointError: see :meth:`nla.models.points.Point.parse`.
    """

    text: str
    """The column of the texts."""

    label: str
    """The column of the labels."""

    group: str | None = None
    """The column of the document that a row belongs to; None: equal texts are a group."""

    pair: NLA | str | Path | None = None
    """Name, folder or hub id of a trained pair, or a loaded one; its target reads the texts. None: ``target`` does, or
    the target of "couplets"."""

    target: str | Path | None = None
    """A model without a pair, instead: name, folder, hub id or GGUF file. The readers that need no pair are run."""

    points: str | Sequence[str] = ()
    """Where else probes and the logit lens read, such as "resid_post.3"; a target without a pair is read by all readers
    at the first."""

    positions: str = "last"
    """"last", "all", or a pattern such as "/\\n/"; a text without a match is left out."""

    words: str | Sequence[str] = ()
    """"LABEL=WORD,WORD" for the judgement without labels; a class that is not given is named by itself."""

    max_rows: int = MAX_ROWS
    """Of a larger file a random sample."""

    skip: bool = False
    """Leave out texts that the target cannot read (unknown words, too long) instead of refusing the file."""

    n_samples: int = 2
    """Explanations of each activation, by every reader that samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        points = (self.points,) if isinstance(self.points, str) else tuple(dict.fromkeys(self.points))
        object.__setattr__(self, "points", points)
        for point in points:
            Point.parse(point)


def compare_on_labelled_texts(data: str | Path, settings: ProbeSettings, progress: Progress = silent) -> ProbeReport:
    """The readers' table on labelled texts.

    Args:
        data: a CSV, TSV, JSON, JSON lines or Parquet file.

    Raises:
        ArgumentError, EmptyTextError, ParseError: see :func:`nla.eval.readers.labelled_file.read_labelled_file`; also a
            target and a pair, or a target without a point or with an oracle.
        VocabularyError, ContextLengthError: a text cannot be read, and ``settings.skip`` is off.
        PositionError: no text has such a position.
    """
    labelled = read_labelled_file(data, settings.text, settings.label, settings.group, settings.max_rows, settings.seed)
    names = class_words(sorted({row.label for row in labelled.rows}), settings.words)
    progress("load", 1.0)
    sources = _open(settings)
    target, nla = sources.target, sources.nla
    points = _points(target, settings.points)
    sites = find_sites(sources.target, labelled.rows, settings.positions, settings.skip)
    task = make_task(settings.label, sites.rows, sites.tokens, names, settings.seed)
    tasks = compare_readers([task], sources, settings, progress)
    notes = _notes(labelled, sites, settings.max_rows)
    if tasks[0].row(SELFIE) is None:
        notes.append("SelfIE was left out: the target has no chat template, or does not know the words of its question")
    return ProbeReport(
        checks=_checks(tasks),
        doubts=doubts(nla),
        data=Path(data).name,
        target=Path(settings.target or (nla and nla.config.target) or "").name,
        point=str(target.point),
        positions=settings.positions,
        n_rows=labelled.n_read,
        n_texts=len(task.sites.unique_texts),
        n_sites=len(task.sites),
        notes=notes,
        tasks=tasks,
        by_point=compare_points(task, target, points, settings) if len(points) > 1 else {},
    )


def _open(settings: ProbeSettings) -> Sources:
    """The pair and its target, or a target alone.

    Raises:
        ArgumentError: both; a target without a point, or with an oracle.
    """
    target, points = settings.target, settings.points
    if target is None:
        return Sources.of_pair(open_pair(settings.pair or "couplets", settings.device), settings)
    if settings.pair is not None:
        got = f"the target {target} and the pair {one_line(str(settings.pair))}"
        raise ArgumentError(got, "one of them: a pair has its own target", "leave out --target or --pair")
    if not points:
        raise ArgumentError(f"the target {target} without a point", "where to read it", "give --point")
    if settings.oracle is not None:
        got = "an oracle on a target without a pair"
        raise ArgumentError(got, "a pair, whose marker the oracle's question holds", "give --pair, or no --oracle")
    return Sources(Target.load(target, points[0], device=one_place(settings.device)))


def _points(target: Target, others: Sequence[str]) -> list[Point]:
    """The target's own point and the others, first block to last.

    Raises:
        PointError: the target has no such point.
    """
    points = {target.point, *(Point.parse(point).within(len(blocks(target.model))) for point in others)}
    return sorted(points, key=lambda point: point.layer)


def class_words(labels: Sequence[str], given: str | Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The words that name each class: those given as "LABEL=WORD,WORD", else the label itself if it has a letter.

    Raises:
        ArgumentError: another form, or a label that is not there.
    """
    words_of: dict[str, tuple[str, ...]] = {
        label: (label,) if any(one.isalpha() for one in label) else () for label in labels
    }
    for entry in [given] if isinstance(given, str) else given:
        name, separator, listed = entry.partition("=")
        listed_words = tuple(word.strip() for word in listed.split(",") if word.strip())
        if not separator or not listed_words or name.strip() not in words_of:
            raise ArgumentError(
                f"--words {entry}", f"LABEL=WORD,WORD with a label among {list(labels)[:20]}", "write it like that"
            )
        words_of[name.strip()] = listed_words
    return words_of


def find_sites(target: Target, rows: Sequence[LabelledRow], positions: str, skip: bool) -> LabelledSites:
    """A row for every token that is read, with that token's index.

    Raises:
        VocabularyError, ContextLengthError: a text cannot be read, and ``skip`` is off; the message names the row.
        PositionError: no text has such a position, or ``positions`` is of no known form.
        ArgumentError: too many positions.
    """
    limit = context_length(target.model)
    spans: list[list[Span] | None] = []
    for row in rows:
        try:
            spans.append(encode_batch(target.tokenizer, [row.text], limit)[0].spans)
        except (VocabularyError, ContextLengthError) as error:
            if not skip:
                fix = f"{error.fix}; or leave out what the target cannot read (--skip)"
                raise type(error)(f"row {row.number}: {error.got}", error.expected, fix) from error
            spans.append(None)
    kept: list[LabelledRow] = []
    tokens: list[int] = []
    n_unmatched, last = 0, None
    for row, tokens_of_row in zip(rows, spans, strict=True):
        if tokens_of_row is None:
            continue
        try:
            chosen = select_positions(tokens_of_row, positions, row.number)
        except PositionError as error:
            n_unmatched, last = n_unmatched + 1, error
            continue
        kept += [row] * len(chosen)
        tokens += chosen
    if last is not None and not kept:
        raise last
    if not kept or len(kept) > MAX_SITES:
        got = f"{len(kept)} positions in {len(rows)} texts"
        raise ArgumentError(got, f"1 to {MAX_SITES}", "choose other positions, or other texts, or allow fewer rows")
    return LabelledSites(kept, tokens, sum(one is None for one in spans), n_unmatched)


def make_task(
    name: str, rows: Sequence[LabelledRow], tokens: Sequence[int], words: Mapping[str, tuple[str, ...]], seed: int = 0
) -> Task:
    """The task of labelled rows: a third of the groups to judge on, with as even a share of each class as they allow.

    Raises:
        ArgumentError: a class lies in one group only, so that it cannot be both fitted and judged.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    labels, groups = [row.label for row in rows], group_numbers(rows)
    counts = Counter(labels)
    groups_of: dict[str, set[int]] = {}
    for label, group in zip(labels, groups, strict=True):
        groups_of.setdefault(label, set()).add(group)
    lonely = [label for label, members in groups_of.items() if len(members) < 2]
    if len(set(groups)) < 2 * N_FOLDS or lonely:
        shown = f"the classes {lonely[:_SHOWN]} in one group each" if lonely else f"{len(set(groups))} groups of texts"
        raise ArgumentError(shown, f"at least {2 * N_FOLDS} groups, two with each class", "give more or other groups")
    n_folds = min(N_FOLDS, min(counts.values()))
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    splits = [TRAIN] * len(rows)
    for row in next(iter(folds.split(labels, labels, groups)))[1]:
        splits[int(row)] = TEST
    sites = Sites(tuple(row.text for row in rows), tuple(tokens), tuple(groups))
    return Task(name, sites, tuple(labels), tuple(splits), words)


def group_numbers(rows: Sequence[LabelledRow]) -> list[int]:
    """The group of each row: rows that share a text or a group are of one, and so is what these share with others."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for row in rows:
        of_text = root(("text", row.text))
        if row.group is not None:
            parent[of_text] = root(("group", row.group))
    numbers: dict[tuple[str, str], int] = {}
    return [numbers.setdefault(root(("text", row.text)), len(numbers)) for row in rows]


def _notes(labelled: LabelledRows, sites: LabelledSites, max_rows: int) -> list[str]:
    counts = (
        (labelled.n_duplicates, "rows that repeat an earlier one (text, label and group) were left out"),
        (labelled.n_conflicts, "texts are there with more than one label"),
        (sites.n_unreadable, "texts that the target cannot read were left out"),
        (sites.n_unmatched, "texts without such a position were left out"),
        (labelled.n_read - max_rows, f"rows beyond a random sample of {max_rows} were left out"),
    )
    return [f"{count} {what}" for count, what in counts if count > 0]


def _checks(tasks: Sequence[TaskResult]) -> list[Check]:
    task, coin = tasks[0], tasks[-1]
    checks = []
    for reader in (LOGISTIC, NLA_READER):
        row = task.row(reader)
        if row is not None:
            checks.append(Check(f"{reader}, fitted", row.labelled.get(TEST)))
            if row.zero:
                checks.append(Check(f"{reader} names the class, without labels", row.zero[TEST]))
    return [*checks, random_check(coin, "fitted on coin flips")]
