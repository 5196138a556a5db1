"""Numbers and tables as Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from nla.errors import visible


def number(value: float | None, sign: bool = False) -> str:
    """A figure with two decimals; a dash where there is none.

    >>> number(0.126), number(None), number(0.5, sign=True)
    ('0.13', '–', '+0.50')
    """
    if value is None or math.isnan(value):
        return "–"
    return f"{value:+.2f}" if sign else f"{value:.2f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns are also aligned in plain text; no cell can end itself, its row or the table.

    >>> print(markdown(("a", "b"), [("x|y", "two\\nlines")]))
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
