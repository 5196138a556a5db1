"""Measured figures in; JSON, a readable table and one picture out, each written whole or not at all."""

from __future__ import annotations

import dataclasses
import io
import math
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nla.errors import ParseError, visible
from nla.pair.card import CARD_FILE
from nla.stats import Interval, bootstrap, wilson
from nla.storage.files import write_atomic, write_json
from nla.text import markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABEL_WIDTH = 48
_CLIP = 110


class Rate(NamedTuple):
    """A share of trials with its 95 % interval (NaN where one document gives none), and the number of trials."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, hits: Iterable[bool]) -> Rate:
        """Wilson interval of independent trials.

        Raises:
            ArgumentError: there are none.
        """
        outcomes = [bool(hit) for hit in hits]
        return cls(*wilson(sum(outcomes), len(outcomes)), len(outcomes))

    @classmethod
    def clustered(
        cls, scores: Float[Tensor, " n"], documents: Int[Tensor, " n"] | Sequence[int], seed: int = 0
    ) -> Rate:
        """Mean of scores whose trials share documents: bootstrap over documents; n counts the documents.

        A share of exactly 0 or 1, which resampling cannot widen, takes the Wilson interval over documents.
        """
        n_documents = len(set(torch.as_tensor(documents).tolist()))
        value = float(scores.double().mean())
        if scores.min() == scores.max() and value in (0.0, 1.0):
            return cls(*wilson(round(value * n_documents), n_documents), n_documents)
        return cls(*bootstrap(scores, documents, seed=seed), n_documents)

    @classmethod
    def of_counts(cls, counts: Float[Tensor, "n 2"], documents: Int[Tensor, " n"], seed: int = 0) -> Rate | None:
        """Hits (the first column) per trial (the second), both summed over all rows; documents are resampled whole.

        None without a trial. Exactly 0 or 1 takes the Wilson interval over documents.
        """
        n_hits, n_trials = counts.sum(0).tolist()
        if n_trials == 0:
            return None
        n_documents = len(documents.unique())
        if n_hits in (0.0, n_trials):
            return cls(*wilson(round(n_hits / n_trials * n_documents), n_documents), n_documents)
        share = bootstrap(counts, documents, lambda mean: mean[..., 0] / mean[..., 1].clamp(min=1e-9), seed=seed)
        return cls(*share, n_documents)

    def above(self, other: Rate) -> bool:
        """Whether the intervals are disjoint and this one lies higher; not if either is unknown."""
        return self.low > other.high

    def __str__(self) -> str:
        return str(Interval(self.value, self.low, self.high))


@dataclass(frozen=True)
class Check:
    """One measured figure, the bound that it is held against, and whether it holds."""

    name: str
    value: Rate | Interval | None
    """None: not measured, for want of something to compare with."""
    bound: str = "reported"
    passed: bool | None = None
    """None: reported, not a condition here."""

    @classmethod
    def at_least(cls, name: str, value: Rate | Interval, bound: float, held: bool = True) -> Check:
        """Whether the estimate reaches the bound; not ``held``: reported beside it, not a condition here."""
        return cls(name, value, f"≥ {bound}", value.value >= bound if held else None)

    @classmethod
    def at_most(cls, name: str, value: Rate | Interval, bound: float, held: bool = True) -> Check:
        """Whether the estimate stays within the bound; not ``held``: reported beside it, not a condition here."""
        return cls(name, value, f"≤ {bound}", value.value <= bound if held else None)

    @property
    def share(self) -> float:
        """The estimate; NaN if it was not measured."""
        return math.nan if self.value is None else self.value.value


class Figures:
    """A dataclass of figures as JSON: its fields, and the properties named in ``derived`` before them."""

    derived: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        names = [*self.derived, *(field.name for field in dataclasses.fields(self))]  # type: ignore[arg-type]
        return {name: to_json(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class Report(Figures, ABC):
    """What an evaluation measured, and whether it holds."""

    name: ClassVar[str]
    """Of the evaluation: its files and its section of a model card are called so."""
    derived = ("passed",)
    checks: list[Check]
    doubts: Sequence[str] = dataclasses.field(default=(), kw_only=True)
    """What the pairs' own measurements say against them (:func:`nla.eval.target.doubts`); stands below the title."""

    @property
    def held(self) -> list[Check]:
        """The conditions that could be held against something."""
        return [check for check in self.checks if check.passed is not None]

    @property
    def passed(self) -> bool:
        """Whether all of these hold; where there was none, nothing has."""
        return bool(self.held) and all(check.passed for check in self.held)

    def __str__(self) -> str:
        return self.to_markdown()

    def to_markdown(self) -> str:
        """The readable report."""
        return self._with_doubts(self.body())

    def to_card(self) -> str:
        """The section of the model card."""
        return self._with_doubts(self.section())

    def _with_doubts(self, text: str) -> str:
        title, _, rest = text.partition("\n\n")
        return paragraphs(title, *(f"**{doubt}**" for doubt in self.doubts), rest)

    @abstractmethod
    def body(self) -> str:
        """The readable report without doubts, its title first."""

    def section(self) -> str:
        """The section of the model card without doubts, its title first."""
        return self.body()

    @abstractmethod
    def figure(self) -> Figure:
        """The picture."""

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``NAME.json``, ``NAME.md`` and ``NAME.png`` into a folder, each atomically; their paths.

        Raises:
            StorageError: the folder cannot be written or the disk is full.
        """
        paths = [Path(folder) / f"{self.name}.{ending}" for ending in ("json", "md", "png")]
        picture = io.BytesIO()
        self.figure().savefig(picture, format="png", dpi=130)
        write_json(paths[0], to_json(self))
        write_atomic(paths[1], self.to_markdown().rstrip() + "\n")
        write_atomic(paths[2], picture.getvalue())
        return paths


def to_json(value: Any) -> Any:
    """A JSON-ready copy of dataclasses, named tuples, tensors and containers; a number that is not finite is None."""
    if hasattr(value, "to_json"):
        return to_json(value.to_json())
    if isinstance(value, Tensor):
        return to_json(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): to_json(part) for key, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return to_json(value._asdict())  # type: ignore[attr-defined]
    if isinstance(value, list | tuple):
        return [to_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def cell(value: Any) -> str:
    """One cell of a table: intervals with their ends, numbers with three digits, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, Rate | Interval):
        return str(value)
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return markdown.number(value, n_decimals=3) if isinstance(value, float) else str(value)


def one_line(text: str, limit: int = _CLIP) -> str:
    """One line of a text from a model or a file, shortened, without what could act on a terminal, table or browser."""
    line = visible(text).replace("|", "¦").replace("`", "'").replace("<", "‹").replace("](", "] (")
    return line if len(line) <= limit else line[: limit - 1] + "…"


def paragraphs(*parts: str) -> str:
    """The parts that say something, as paragraphs of Markdown."""
    return "\n\n".join(part for part in parts if part)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table whose columns are also aligned in plain text."""
    return markdown.table(header, ([cell(value) for value in row] for row in rows))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def checks_table(checks: Iterable[Check]) -> str:
    """Checks as a table: what, how much, the bound, whether it holds."""

    def held(check: Check) -> str | bool:
        if check.passed is None:
            return "not measured" if check.value is None else "reported"
        return check.passed

    rows = [(check.name, check.value, check.bound, held(check)) for check in checks]
    return table(("measured", "value", "bound", "holds"), rows)


def write_card(folder: str | Path, name: str, text: str, command: str) -> Path:
    """Put a report into a model card (the folder's README.md), as a section that a later run replaces.

    Args:
        name: of the evaluation; the section is found again by it.
        command: what made the report; is named below it.

    Raises:
        ParseError, StorageError: see :func:`read_card`; the folder cannot be written or the disk is full.
    """
    old, (begin, end) = read_card(folder), (f"<!-- {name} -->", f"<!-- /{name} -->")
    section = f"{begin}\n{text.rstrip()}\n\nMade by `{command}`.\n{end}"
    if begin in old and end in old:
        new = old[: old.index(begin)] + section + old[old.index(end) + len(end) :]
    else:
        new = f"{old.rstrip()}\n\n{section}\n"
    path = Path(folder) / CARD_FILE
    write_atomic(path, new)
    return path


def read_card(folder: str | Path) -> str:
    """A folder's model card; of one without, a title.

    Raises:
        ParseError: it is no text.
    """
    path = Path(folder) / CARD_FILE
    if not path.exists():
        return f"# {path.resolve().parent.name}\n"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ParseError(f"{path}, not readable ({error})", "a model card, UTF-8", "correct or move it") from error


def bars(
    axes: Axes,
    values: Mapping[str, Rate | Interval | float],
    title: str,
    controls: Collection[str] = (),
    bound: float | None = None,
) -> None:
    """Horizontal bars with intervals, first on top; ``controls`` in grey, the bound of the others as a line."""
    names, heights = list(values), list(range(len(values)))[::-1]
    for height, name in zip(heights, names, strict=True):
        value = values[name]
        middle = value.value if isinstance(value, Rate | Interval) else value
        axes.barh(height, middle, color="#b8bcc2" if name in controls else "#2f6599", height=0.65)
        if isinstance(value, Rate | Interval) and math.isfinite(value.low):
            ends = [[max(0.0, middle - value.low)], [max(0.0, value.high - middle)]]
            axes.errorbar(middle, height, xerr=ends, color="#222222", capsize=2, linewidth=1)
    if bound is not None:
        axes.axvline(bound, color="#b03a2e", linewidth=1, linestyle="--")
    axes.set_yticks(heights, [textwrap.fill(name, _LABEL_WIDTH) for name in names], fontsize=7)
    axes.tick_params("x", labelsize=7)
    axes.set_xlim(min(0.0, *axes.get_xlim()), 1.02)
    axes.set_title(title, fontsize=9)


def heat(
    axes: Axes, points: Sequence[str], tokens: Sequence[str], values: Sequence[Sequence[float]], title: str
) -> None:
    """A (point × token) map with its numbers."""
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            shade = "white" if value > 0.6 else "#222222"
            axes.text(column, row, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center", fontsize=6, color=shade)
    axes.set_xticks(range(len(tokens)), tokens, fontsize=7, rotation=30)
    axes.set_yticks(range(len(points)), points, fontsize=7)
    axes.set_title(title, fontsize=9)
