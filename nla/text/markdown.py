"""Figures in; numbers and tables as Markdown out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from nla.errors import visible
from nla.stats import Interval


def number(value: float | None, sign: bool = False, n_decimals: int = 2) -> str:
    """A figure with two decimals; a dash where there is none, and no minus before zero.

    >>> number(0.126), number(None), number(0.5, sign=True), number(-0.0001, n_decimals=3)
    ('0.13', '–', '+0.50', '0.000')
    """
    if value is None or math.isnan(value):
        return "–"
    rounded = round(value, n_decimals) + 0.0  # -0.0 + 0.0 is 0.0
    return f"{rounded:{'+' if sign else ''}.{n_decimals}f}"


def interval(value: Interval | None) -> str:
    """An estimate between the ends of its interval, with two decimals.

    Where all values are alike, resampling finds no spread; that is no certainty, and is not shown as one.

    >>> interval(Interval(0.5, 0.25, 0.75)), interval(Interval(0.5, 0.5, 0.5)), interval(None)
    ('0.50 [0.25, 0.75]', '0.50', '–')
    """
    if value is None or math.isnan(value.low) or value.low == value.high:
        return number(None if value is None else value.value)
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def p_value(value: float | None) -> str:
    """A p- or q-value; a dash where nothing was tested.

    >>> p_value(0.0421), p_value(0.00002), p_value(None)
    ('0.042', '2e-05', '–')
    """
    return "–" if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def literal(text: str) -> str:
    """A text that Markdown shows as it is: no link, image, emphasis, heading or markup in it.

    >>> print(literal("*b* [a](x)"))
    \\*b\\* \\[a\\]\\(x\\)
    """
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", visible(text))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns are also aligned in plain text; no cell can end itself, its row or the table.

    >>> print(table(("a", "b"), [("x|y", "two\\nlines")]))
    | a    | b         |
    |------|-----------|
    | x\\|y | two⏎lines |
    """
    # Backslashes before a bar are doubled, or they would take the one that escapes it.
    cells = [[re.sub(r"(\\*)\|", r"\1\1\\|", visible(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
