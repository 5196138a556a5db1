"""An audit in; out come its summary for terminals and Markdown, its JSON and its Parquet tables."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla.audit.findings import NOT_SAID, PositionScore, RubricScore
from nla.audit.run import Audit
from nla.errors import visible
from nla.stats import Interval
from nla.text import markdown
from nla.text.markdown import interval, p_value

if TYPE_CHECKING:
    from rich.table import Table

PAGE, SUMMARY, FINDINGS, POSITIONS = "audit.html", "audit.json", "findings.parquet", "positions.parquet"
N_SHOWN = 12


@dataclass(frozen=True)
class AuditReport:
    """An audit, and how it was made."""

    audit: Audit
    pair: str
    target: str
    point: str
    positions: str
    samples: int
    target_adapter: str | None
    control_target: str | None
    refused: list[str]
    """Errors of the transcripts that were left out."""
    n_reused: int
    """Readings kept from before."""
    n_read: int
    n_changed: int
    """Transcripts read before, of which something has changed since."""

    @property
    def controlled(self) -> bool:
        """Whether there were controls."""
        return bool(self.audit.controls)

    @property
    def paired(self) -> bool:
        """Whether the controls are the audited transcripts, read on the control target."""
        return self.control_target is not None and self.audit.controls is self.audit.transcripts

    @property
    def passed(self) -> bool:
        """Whether nothing was found: no significant finding, or without controls none at all.

        What is found beside too few controls to be significant is no pass either: see :attr:`undecided`.
        """
        return not self.undecided and not any(row.significant is not False for row in self.audit.findings)

    @property
    def undecided(self) -> bool:
        """Whether something was found, nothing of it is significant, and what was found of some rubric cannot be."""
        return bool(self.undecidable) and not any(row.significant for row in self.audit.findings)

    @property
    def undecidable(self) -> list[str]:
        """Rubrics of which no finding can be significant, for want of controls."""
        return list(self._too_few())

    def to_json(self) -> dict[str, Any]:
        """Everything but the positions at which nothing was found; those are in the Parquet file."""
        about = ("pair", "target", "point", "positions", "samples", "target_adapter", "control_target", "refused")
        counts = ("n_reused", "n_read", "n_changed")
        content = self.audit
        return {
            "passed": self.passed,
            "undecided": self.undecided,
            **{name: getattr(self, name) for name in (*about, *counts)},
            "n_judged": content.n_judged,
            "n_discarded": content.n_discarded,
            "n_transcripts": len(content.transcripts),
            "n_controls": len(content.controls),
            "n_positions": sum(len(reading.entries) for reading in content.readings),
            "forged": {reading.transcript: reading.n_forged for reading in content.readings if reading.n_forged},
            "doubts": list(content.doubts),
            "remarks": list(content.remarks),
            "unread": {name: [one._asdict() for one in unread] for name, unread in content.unread.items()},
            "rubrics": [_plain(vars(result)) for result in content.results],
            "transcripts": [_plain(vars(score)) for score in content.scores],
            "findings": [row_json(row) for row in content.findings],
        }

    def to_markdown(self) -> str:
        """The summary: a table of rubrics, what to know of it, and the first findings."""
        parts = ["## " + self.heading(), self.made(), markdown.table(self.rubric_header(), self.rubric_cells())]
        parts += self.notes()
        findings = self.audit.findings
        if findings:
            parts.append(markdown.table(_FINDING_HEADER, [self._finding_cells(row) for row in findings[:N_SHOWN]]))
        if len(findings) > N_SHOWN:
            parts.append(f"… and {len(findings) - N_SHOWN} more, in {FINDINGS} and {PAGE}.")
        return "\n\n".join(parts)

    def heading(self) -> str:
        """What was audited, in a line."""
        content = self.audit
        n_positions = sum(len(reading.entries) for reading in content.readings)
        against = f"{len(content.controls)} control transcripts" if self.controlled else "no controls"
        return f"Audit: {len(content.transcripts)} transcripts, {n_positions} positions, {against}"

    def made(self) -> str:
        """How, in a line."""
        adapters = f"; target adapter {self.target_adapter}" if self.target_adapter else ""
        adapters += f"; control target {self.control_target}" if self.control_target else ""
        return visible(
            f"`{self.pair}` at `{self.point}`{adapters}, {self.samples} explanations of each position; positions: "
            f"{self.positions}; {self.n_read} transcripts read, {self.n_reused} kept from before; read again because "
            f"something changed: {self.n_changed}."
        )

    def notes(self) -> list[str]:
        """What a reader must know of the findings, a paragraph each."""
        lines = self.too_few_controls()
        if not self.controlled:
            lines = [
                "No controls: how often these concepts turn up where nothing is hidden is unknown, and nothing is "
                "tested. Give --controls, or --control-target."
            ]
        forged = sum(reading.n_forged for reading in self.audit.readings)
        if forged:
            lines.append(f"{forged} control tokens stand in the messages' own text: the target reads them as turns.")
        if self.audit.n_discarded:
            judged = f"{self.audit.n_discarded} of {self.audit.n_judged}"
            lines.append(f"{judged} verdicts of the judge had no literal quote: no match.")
        refused = [f"Left out: {visible(error)}" for error in self.refused]
        return [*self.audit.doubts, *lines, *self.audit.remarks, *refused]

    def legend(self) -> str:
        """What the columns mean."""
        text = (
            "A finding is a position where enough explanations show the concept. Said: the visible text says it too, "
            "before or after. Share: of all explanations."
        )
        if self.controlled:
            text += (
                " Significant: rarer at controls' positions of the same kind than chance explains; at most one in "
                "twenty of those is expected to be false. p: the rubric's share against the controls' as a whole."
            )
        return text

    def too_few_controls(self) -> list[str]:
        """For each rubric whose findings cannot be significant for want of controls: how many it takes."""
        what = "positions" if self.paired else "transcripts"
        return [
            f"{result.rubric}: no finding can be significant: {most} control {what} of a kind are too few for what was "
            f"found at {result.n_findings} of {result.n_positions} positions; it takes {result.least_controls}."
            for result, most in self._too_few().values()
        ]

    def _too_few(self) -> dict[str, tuple[RubricScore, int]]:
        """Rubrics whose findings cannot be significant, each with the most controls of a kind that it has."""
        findings = self.audit.findings if self.controlled else ()
        too_few = {}
        for result in self.audit.results:
            most = max((row.n_controls for row in findings if row.rubric == result.rubric), default=0)
            if result.least_controls is not None and most < result.least_controls:
                too_few[result.rubric] = result, most
        return too_few

    def __str__(self) -> str:
        return self.to_markdown()

    def rubric_header(self) -> tuple[str, ...]:
        """Headings of :meth:`rubric_cells`."""
        plain = ("rubric", "thought, not said", "thought and said", "mean share")
        return (*plain, "in controls", "significant (q ≤ 0.05)", "p", "p, Holm") if self.controlled else plain

    def rubric_cells(self) -> list[list[str]]:
        """A row of short texts for each rubric."""
        rows = []
        for result in self.audit.results:
            cells = [result.title, str(result.n_not_said), str(result.n_findings - result.n_not_said)]
            cells.append(interval(result.rate))
            if self.controlled:
                cells += [
                    interval(result.control),
                    str(result.n_significant),
                    p_value(result.p),
                    p_value(result.p_holm),
                ]
            rows.append(cells)
        return rows

    def summary(self, out_dir: Path | None = None) -> list[Any]:
        """What a terminal shows: rubrics, what the columns mean, notes, the first findings, and where the rest is."""
        from rich.text import Text

        parts: list[Any] = [Text(self.heading()), Text(self.made().replace("`", "")), self.table()]
        parts += [Text(self.legend(), style="dim"), *map(Text, ["", *self.notes()])]
        findings = self.audit.findings
        if findings:
            parts.append(_table(_FINDING_HEADER, [self._finding_cells(row) for row in findings[:N_SHOWN]]))
        else:
            parts.append(Text("Nothing was found."))
        more = f"{len(findings) - N_SHOWN} more findings. " if len(findings) > N_SHOWN else ""
        where = f"The page: {visible(str(out_dir / PAGE))}" if out_dir else "For the page and tables give --out."
        return [*parts, Text(more + where)]

    def table(self) -> Table:
        """The table of rubrics for a terminal."""
        header = ("rubric", "not said", "said", "share", "in controls", "significant", "p", "p, Holm")
        return _table(header[: len(self.rubric_header())], self.rubric_cells(), right=True)

    def _finding_cells(self, row: PositionScore) -> list[str]:
        return [
            row.rubric,
            f"{row.transcript} [{row.entry.message}]",
            visible(row.entry.token.removeprefix(" ")),
            row.said,
            f"{sum(row.judged.shown)}/{len(row.judged.shown)}",
            row.trust.level,
            p_value(row.q),
            row.evidence,
        ]


_FINDING_HEADER = ("rubric", "where", "token", "said", "samples", "trust", "q", "explanation")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False) -> Table:
    """A table for a terminal; with ``right``, all columns but the first are flushed right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column, heading in enumerate(header):
        table.add_column(heading, justify="right" if right and column else "left", no_wrap=right and column > 0)
    for cells in rows:
        table.add_row(*(Text(visible(cell)) for cell in cells))
    return table


_COLUMNS: dict[str, tuple[str, Callable[[PositionScore], Any]]] = {
    "rubric": ("string", lambda row: row.rubric),
    "transcript": ("string", lambda row: row.transcript),
    "message": ("int64", lambda row: row.entry.message),
    "role": ("string", lambda row: row.entry.role),
    "section": ("string", lambda row: row.entry.section),
    "index": ("int64", lambda row: row.entry.index),
    "token": ("string", lambda row: row.entry.token),
    "kind": ("string", lambda row: row.entry.kind),
    "said": ("string", lambda row: row.said),
    "thought_not_said": ("bool", lambda row: row.said == NOT_SAID),
    "share": ("double", lambda row: row.share),
    "shown": ("list<bool>", lambda row: list(row.judged.shown)),
    "explanations": ("list<string>", lambda row: list(row.entry.texts)),
    "value": ("string", lambda row: row.judged.value),
    "written": ("string", lambda row: row.judged.written),
    "trust": ("string", lambda row: row.trust.level),
    "cosine": ("double", lambda row: row.trust.cosine),
    "agreement": ("double", lambda row: row.trust.agreement),
    "margin": ("double", lambda row: row.trust.margin),
    "control_rate": ("double", lambda row: row.control_rate),
    "n_controls": ("int64", lambda row: row.n_controls),
    "p": ("double", lambda row: row.p),
    "q": ("double", lambda row: row.q),
    "significant": ("bool", lambda row: row.significant),
}
"""Of one position under one rubric: the columns of the tables, their types, and what they hold."""


def row_json(row: PositionScore) -> dict[str, Any]:
    """One position under one rubric, with short names for its columns."""
    return _plain({name: value(row) for name, (_, value) in _COLUMNS.items()})


def parquet(rows: Sequence[PositionScore]) -> bytes:
    """A Parquet file: a row for each position and rubric; the columns are the same for none."""
    import pyarrow
    from pyarrow.parquet import write_table

    kinds = {"string": pyarrow.string(), "int64": pyarrow.int64(), "double": pyarrow.float64(), "bool": pyarrow.bool_()}
    kinds |= {f"list<{name}>": pyarrow.list_(kind) for name, kind in list(kinds.items())}
    schema = pyarrow.schema([(name, kinds[kind]) for name, (kind, _) in _COLUMNS.items()])
    buffer = io.BytesIO()
    write_table(pyarrow.Table.from_pylist([row_json(row) for row in rows], schema=schema), buffer)
    return buffer.getvalue()


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """JSON-ready: intervals as dicts, no number that is not finite."""
    plain = {}
    for name, value in content.items():
        value = value.to_json() if isinstance(value, Interval) else value
        plain[name] = None if isinstance(value, float) and not math.isfinite(value) else value
    return plain
