"""Readers compared, as tables, as one picture, and against what coin flips must give."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nla.eval.readers.compare import SHUFFLED, TEXT_LM
from nla.eval.readers.measures import ADVERSARY, NLA_READER, ReaderRow, TaskResult, Versus
from nla.eval.readers.probes import LOGISTIC
from nla.eval.readers.tasks import TEST
from nla.eval.report import Check, Report, new_figure, one_line, paragraphs, table
from nla.stats import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEGEND = (
    "AUROC, 0.5 is chance; 95 % intervals resample groups. *Named*: without labels, by whether the reader names the "
    "class's word and not another's. *Fitted*: a classifier on what the reader gives, fitted on the train split. "
    "*Random*: fitted on coin flips, must be 0.5. *Against*: minus the best adversary of the same column, with its "
    "p-value from paired resamples, Holm over the tasks; the confabulator is no such adversary, since the decoder "
    "picks its texts by the activation."
)
TITLE = "Who can tell the label, and how"
PROBE_MIN, NAMING_MIN = 0.9, 0.9
"""AUROC that a probe, and the NLA without labels, must reach where the label is there by construction."""
SUMMARY = ("probe", "NLA names", "NLA, fitted", "probe keeps of ĥ", "shuffled NLA names", "text-only LM names")
"""Headers of the fields of :class:`Summary`."""
_N_EXAMPLES = 1


@dataclass(frozen=True)
class ReadersReport(Report):
    """What `nla eval readers` measures, on any organism."""

    name = "readers"

    @property
    @abstractmethod
    def panels(self) -> Mapping[str, TaskResult]:
        """What the picture shows."""

    def figure(self) -> Figure:
        """A panel for each task."""
        return readers_figure(self.panels, TITLE)


class Summary(NamedTuple):
    """AUROCs on one task whose classes have words, and what the reconstruction keeps of the probe's."""

    probe: Interval
    named: Interval
    fitted: Interval
    retained: float | None
    shuffled: Interval
    text_lm: Interval


def summary(result: TaskResult) -> Summary:
    """The figures that sum up a task."""
    rows = {row.reader: row for row in result.readers}
    kept = None if result.retention is None else result.retention.retained
    return Summary(
        probe=rows[LOGISTIC].labelled[TEST],
        named=rows[NLA_READER].zero[TEST],
        fitted=rows[NLA_READER].labelled[TEST],
        retained=None if kept is None or math.isnan(kept) else kept,
        shuffled=rows[SHUFFLED].zero[TEST],
        text_lm=rows[TEXT_LM].zero[TEST],
    )


def chance_check(name: str, value: Interval | None) -> Check:
    """Whether an AUROC is at 0.5, but for chance (three standard errors); reported only where it has no interval."""
    bound = "within 3 s.e. of 0.5"
    if value is None or math.isnan(value.low):
        return Check(name, value, bound)
    error = (value.high - value.low) / (2 * 1.96)
    return Check(name, value, bound, abs(value.value - 0.5) <= 3 * error)


def random_check(coin: TaskResult, where: str) -> Check:
    """Whether a probe that was fitted on coin flips is at 0.5. Few groups may leave it without an interval."""
    row = coin.row(LOGISTIC)
    beside = ", ".join(map(one_line, coin.shares_sites))
    name = f"{where}, sites of {beside}: a probe of random labels"
    return chance_check(name, None if row is None else row.labelled.get(TEST))


def tables(results: Sequence[TaskResult], level: str = "###") -> str:
    """Every task's readers, then what reconstructions keep and explanations add."""
    kept = [result for result in results if result.retention is not None]
    return paragraphs(
        *(_task(result, level) for result in results if not result.shares_sites),
        _reconstructions(kept, level) if kept else "",
    )


def points_table(by_point: Mapping[str, TaskResult], level: str = "###") -> str:
    """Where a label can be read: the probes by number of labels, and the logit lens without labels, at each point."""
    results = list(by_point.values())
    sizes = [budget.n_labels for budget in results[0].readers[0].budgets]
    rows = [
        (point, row.reader, *[budget.auroc for budget in row.budgets[:-1]], row.labelled.get(TEST), row.zero.get(TEST))
        for point, result in by_point.items()
        for row in result.readers
    ]
    header = ("point", "reader", *map(str, sizes), "named")
    return paragraphs(f"{level} By point", "AUROC by number of labels, and without any:", table(header, rows))


def _task(result: TaskResult, level: str) -> str:
    transfers = [split for split in result.n_items if split not in ("train", TEST)]
    header = ("reader", "kind", "named", "forced choice", "fitted", "random", *transfers, "tokens", "against, named")
    rows = [_cells(row, transfers) for row in result.readers]
    sizes = [budget.n_labels for budget in max((row.budgets for row in result.readers), key=len)]
    few = [
        (row.reader, *[next((one.auroc for one in row.budgets if one.n_labels == size), None) for size in sizes])
        for row in result.readers
    ]
    counts = ", ".join(f"{n} {split}" for split, n in result.n_items.items())
    shown = [
        f"- {row.reader}: “{one_line(text)}”"
        for row in result.readers
        if row.examples
        for text in row.examples[:_N_EXAMPLES]
    ]
    return paragraphs(
        f"{level} {one_line(result.task)}",
        f"{len(result.classes)} classes; {counts}.",
        table((*header, "against, fitted"), rows),
        "AUROC by number of labels (mean of three draws):",
        table(("reader", *map(str, sizes)), few),
        "\n".join(["First test item:", "", *shown]) if shown else "",
    )


def _cells(row: ReaderRow, transfers: Sequence[str]) -> tuple[Any, ...]:
    return (
        row.reader,
        row.kind,
        row.zero.get(TEST),
        row.choice,
        row.labelled.get(TEST),
        row.random,
        *[row.labelled.get(split) for split in transfers],
        f"{row.n_tokens:.1f}",
        _versus(row.zero_versus),
        _versus(row.labelled_versus),
    )


def _versus(one: Versus | None) -> str | None:
    return None if one is None else f"{one.difference.value:+.3f}, p {one.p_holm:.3f} ({one.adversary})"


def _reconstructions(results: Sequence[TaskResult], level: str) -> str:
    header = ("task", "activation", "reconstruction", "retained", "residual, fresh probe", "shuffled reconstruction")
    kept = [(one_line(one.task), *map(_known, one.retention)) for one in results if one.retention is not None]
    nested = [(one_line(one.task), *one.complement) for one in results if one.complement is not None]
    return paragraphs(
        f"{level} What reconstructions keep, and what explanations add",
        "A probe of unit activations, applied to reconstructions (retained: share of its AUROC above chance); a "
        "fresh probe of activation − reconstruction finds what was left out, however faint it is.",
        table(header, kept),
        "Nested: the probe alone, and with the explanation's words beside it (weight: of the text's "
        "log-odds where the probe's have 1).",
        table(("task", "probe", "probe + text", "gain", "p", "weight"), nested),
    )


def _known(value: Interval | float) -> Interval | float | None:
    """Nothing for a share that has no meaning."""
    return None if isinstance(value, float) and math.isnan(value) else value


def readers_figure(panels: Mapping[str, TaskResult], title: str = "") -> Figure:
    """One panel a task: a filled dot for what can be fitted on each reader, an open one for what it names."""
    n_columns = 4 if len(panels) % 4 == 0 else min(3, len(panels))
    n_rows = -(-len(panels) // n_columns)
    n_readers = max(len(result.readers) for result in panels.values())
    figure = new_figure(4.6 * n_columns, (0.24 * n_readers + 1.1) * n_rows)
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharey=False)
    for number, (name, result) in enumerate(panels.items()):
        _panel(axes[number // n_columns][number % n_columns], _drawn(name), result, number % n_columns == 0)
    for number in range(len(panels), n_rows * n_columns):
        axes[number // n_columns][number % n_columns].set_axis_off()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=7, frameon=False)
    if title:
        figure.suptitle(_drawn(title), fontsize=9)
    return figure


def _panel(axes: Any, title: str, result: TaskResult, named: bool) -> None:
    rows = result.readers[::-1]
    for series, (label, offset, filled) in enumerate(
        (("fitted on labels", 0.14, True), ("named, no labels", -0.14, False))
    ):
        for height, row in enumerate(rows):
            value: Interval | None = (row.labelled if filled else row.zero).get(TEST)
            if value is None:
                continue
            colour = "#8a8f98" if row.kind == ADVERSARY else "#2f6599" if filled else "#c2571a"
            width = [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]
            axes.errorbar(
                value.value,
                height + offset,
                xerr=width if value.low == value.low else None,
                fmt="o" if series == 0 else "s",
                markersize=3.5,
                color=colour,
                markerfacecolor=colour if filled else "white",
                linewidth=1,
                label=label if height == len(rows) - 1 or (not filled and row.reader == "NLA") else None,
            )
    axes.axvline(0.5, color="#b03a2e", linewidth=0.8, linestyle="--")
    axes.set_xlim(min(0.3, axes.get_xlim()[0]), 1.03)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(range(len(rows)), [row.reader for row in rows] if named else [""] * len(rows), fontsize=7)
    axes.tick_params("x", labelsize=7)
    axes.set_xlabel("AUROC (test)", fontsize=7)
    axes.set_title(title, fontsize=9)
    axes.grid(axis="x", linewidth=0.3)


def _drawn(text: str) -> str:
    """A text in a picture: a dollar sign is one, not the start of a formula."""
    return one_line(text, 60).replace("$", r"\$")
