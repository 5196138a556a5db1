"""`nla probe`: the readers compared on a user's own labelled texts, with a picture.

The texts are split by group: equal texts, and rows of the same group, never stand on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nla.errors import ArgumentError, ContextLengthError, PositionError, VocabularyError
from nla.eval.readers import labelled_file as files
from nla.eval.readers.compare import Options, Sources, compare
from nla.eval.readers.labelled_file import Row, Rows
from nla.eval.readers.measures import NLA_READER, TaskResult
from nla.eval.readers.patchscopes import load_oracle
from nla.eval.readers.probes import LOGISTIC
from nla.eval.readers.tables import LEGEND, figure, plain, random_check, tables
from nla.eval.readers.tasks import TEST, TRAIN, Sites, Task
from nla.eval.report import Check, Report, checks_table, save
from nla.eval.target import Progress, Target, open_pair, silent
from nla.models.points import context_length
from nla.text.tokens import Span, encode_batch, select_positions

if TYPE_CHECKING:
    from nla.autoencoder import NLA

N_FOLDS = 3
MAX_SITES = 20_000
_SHOWN = 5


@dataclass(frozen=True)
class ProbeReport(Report):
    """Everything `nla probe` measures."""

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

    def to_markdown(self) -> str:
        """The readable report."""
        about = (
            f"`{plain(self.data)}`: {self.n_texts} texts of {self.n_rows} rows, {self.n_sites} activations of "
            f"{plain(self.target)} at `{self.point}`, positions {plain(self.positions)}. {LEGEND}"
        )
        notes = "\n".join(f"- {note}" for note in self.notes)
        parts = [
            "## Probes, readers of the text, and the NLA",
            about,
            notes,
            checks_table(self.checks),
            tables(self.tasks),
        ]
        return "\n\n".join(part for part in parts if part)


class _Places(NamedTuple):
    rows: list[Row]
    tokens: list[int]
    n_unreadable: int
    n_unmatched: int


def run(
    data: str | Path,
    text: str,
    label: str,
    pair: NLA | str | Path = "couplets",
    positions: str = "last",
    group: str | None = None,
    words: Sequence[str] = (),
    n_samples: int = 2,
    max_rows: int = files.MAX_ROWS,
    skip: bool = False,
    oracle: str | Path | None = None,
    question: str = "",
    seed: int = 0,
    out_dir: str | Path | None = None,
    progress: Progress = silent,
) -> ProbeReport:
    """The readers' table on labelled texts.

    Args:
        data: a CSV, TSV, JSON, JSON lines or Parquet file.
        text, label, group: columns; without a group, equal texts are one.
        pair: name, folder or hub id of a trained pair; its target reads the texts.
        positions: "last", "all", or a pattern such as "/\\n/"; a text without a match is left out.
        words: "LABEL=WORD,WORD" for the judgement without labels; a class that is not given stands for itself.
        n_samples: explanations of each activation.
        max_rows: of a larger file a random sample.
        skip: leave out texts that the target cannot read (unknown words, too long) instead of refusing the file.
        oracle: a PEFT folder of an activation oracle on the pair's target, asked ``question``.
        out_dir: where ``probe.json``, ``.md`` and ``.png`` go; None: nowhere.

    Raises:
        ArgumentError, EmptyTextError, ParseError: see :func:`nla.eval.rows.load`.
        VocabularyError, ContextLengthError: a text cannot be read, and ``skip`` is off.
        PositionError: no text has such a position.
    """
    _check_options(oracle, question, n_samples, seed)
    loaded = files.load(data, text, label, group, max_rows, seed)
    names = class_words(sorted({row.label for row in loaded.rows}), words)
    progress("load", 1.0)
    nla = open_pair(pair)
    target = Target.of(nla)
    places = find_places(target, loaded.rows, positions, skip)
    task = make_task(label, places.rows, places.tokens, names, seed)
    asked = None if oracle is None else load_oracle(nla.target_folder or nla.config.target, oracle, target)
    tasks = compare([task], Sources(target, nla, asked, question), Options(n_samples=n_samples, seed=seed), progress)
    report = _report(data, nla, loaded, places, positions, max_rows, task, tasks)
    if out_dir is not None:
        title = f"{report.data}: {label} at {report.point} of {report.target}"
        save(out_dir, "probe", report, report.to_markdown(), figure({label: tasks[0]}, title))
    return report


def _check_options(oracle: str | Path | None, question: str, n_samples: int, seed: int) -> None:
    if (oracle is None) != (not question):
        raise ArgumentError(
            f"oracle={oracle}, question={question!r}", "both or neither", "give --oracle and --question"
        )
    if n_samples < 1 or seed < 0:
        raise ArgumentError(f"n_samples={n_samples}, seed={seed}", "1 or more; 0 or more", "correct them")


def _report(
    data: str | Path,
    nla: NLA,
    loaded: Rows,
    places: _Places,
    positions: str,
    max_rows: int,
    task: Task,
    tasks: list[TaskResult],
) -> ProbeReport:
    return ProbeReport(
        checks=_checks(tasks),
        data=Path(data).name,
        target=Path(nla.config.target).name,
        point=str(nla.point),
        positions=positions,
        n_rows=loaded.n_read,
        n_texts=len(task.sites.unique_texts),
        n_sites=len(task.sites),
        notes=_notes(loaded, places, max_rows),
        tasks=tasks,
    )


def class_words(labels: Sequence[str], given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The words that name each class: those given as "LABEL=WORD,WORD", else the label itself if it has a letter.

    Raises:
        ArgumentError: another form, or a label that is not there.
    """
    found: dict[str, tuple[str, ...]] = {
        label: (label,) if any(one.isalpha() for one in label) else () for label in labels
    }
    for entry in given:
        name, separator, listed = entry.partition("=")
        listed_words = tuple(word.strip() for word in listed.split(",") if word.strip())
        if not separator or not listed_words or name.strip() not in found:
            raise ArgumentError(
                f"--words {entry}", f"LABEL=WORD,WORD with a label among {list(labels)[:20]}", "write it like that"
            )
        found[name.strip()] = listed_words
    return found


def find_places(target: Target, rows: Sequence[Row], positions: str, skip: bool) -> _Places:
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
    kept: list[Row] = []
    tokens: list[int] = []
    n_unmatched, last = 0, None
    for row, found in zip(rows, spans, strict=True):
        if found is None:
            continue
        try:
            chosen = select_positions(found, positions, row.number)
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
    return _Places(kept, tokens, sum(one is None for one in spans), n_unmatched)


def make_task(
    name: str, rows: Sequence[Row], tokens: Sequence[int], words: Mapping[str, tuple[str, ...]], seed: int = 0
) -> Task:
    """The task of labelled rows: a third of the groups to judge on, with as even a share of each class as they allow.

    Raises:
        ArgumentError: a class lies in one group only, so that it cannot be both fitted and judged.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    labels, groups = [row.label for row in rows], group_numbers(rows)
    counts = Counter(labels)
    lonely = [
        one for one in counts if len({group for group, own in zip(groups, labels, strict=True) if own == one}) < 2
    ]
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


def group_numbers(rows: Sequence[Row]) -> list[int]:
    """The group of each row: rows that share a text or a group are of one, and so is what these share with others."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for row in rows:
        own = root(("text", row.text))
        if row.group is not None:
            parent[own] = root(("group", row.group))
    numbers: dict[tuple[str, str], int] = {}
    return [numbers.setdefault(root(("text", row.text)), len(numbers)) for row in rows]


def _notes(loaded: Rows, places: _Places, max_rows: int) -> list[str]:
    counts = (
        (loaded.n_duplicates, "rows that repeat an earlier one (text, label and group) were left out"),
        (loaded.n_conflicts, "texts stand there with more than one label"),
        (places.n_unreadable, "texts that the target cannot read were left out"),
        (places.n_unmatched, "texts without such a position were left out"),
        (loaded.n_read - max_rows, f"rows beyond a random sample of {max_rows} were left out"),
    )
    return [f"{count} {what}" for count, what in counts if count > 0]


def _checks(tasks: Sequence[TaskResult]) -> list[Check]:
    task, coin = tasks[0], tasks[-1]
    checks = []
    for reader in (LOGISTIC, NLA_READER):
        row = task.row(reader)
        if row is not None:
            checks.append(Check(f"{reader}, fitted", row.labelled.get(TEST), "reported"))
            if row.zero:
                checks.append(Check(f"{reader} names the class, without labels", row.zero[TEST], "reported"))
    return [*checks, random_check(coin, "fitted on coin flips")]
