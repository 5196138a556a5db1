"""What the commands show: the token view and tables of figures, for a terminal, as SVG or as Markdown.

Text from models and users becomes rich ``Text`` with control characters spelled out, never markup: nothing that a model
writes can colour, hide or move what stands on the screen.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nla.errors import visible
from nla.text.markdown import number

if TYPE_CHECKING:
    from nla.pair.explanations import Explanation
    from nla.pair.score import Score


LEVEL_STYLES = {"high": "bold green", "medium": "yellow", "low": "red"}


def leading(texts: Sequence[str], wanted: Callable[[str], bool] | None = None) -> str | None:
    """The explanation that stands for a note: the one that most samples gave, the first of equals; None if none is
    ``wanted``.

    >>> leading(["It is spring.", "It is winter.", "It is winter."])
    'It is winter.'
    """
    counts = Counter(text for text in texts if wanted is None or wanted(text))
    return counts.most_common(1)[0][0] if counts else None


def token_view(notes: Sequence[Explanation], title: str) -> Table:
    """One row a token: its explanation, and trust with the three figures it comes from."""
    table = Table(title=Text(visible(title)) if title else None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("token", no_wrap=True, justify="right")
    table.add_column("explanation", ratio=1)
    table.add_column("trust", no_wrap=True)
    for heading in ("cosine", "agreement", "margin"):
        table.add_column(heading, no_wrap=True, justify="right")
    for note in notes:
        shown = leading(note.texts) or ""
        whole = note.complete[note.texts.index(shown)]
        trust = note.trust
        table.add_row(
            Text(visible(note.token.removeprefix(" ")) + _part(note), style="bold"),
            Text(visible(shown) + ("" if whole else " …"), style="" if whole else "dim"),
            Text(trust.level, style=LEVEL_STYLES[trust.level]),
            Text(number(trust.cosine)),
            Text(number(trust.agreement)),
            Text(number(trust.margin, sign=True)),
        )
    return table


def _part(note: Explanation) -> str:
    """Which part of a character a token is, such as " 2/4" of an emoji; nothing of a whole one."""
    span = note.span
    return "" if span is None or span.fragments == 1 else f" {span.fragment}/{span.fragments}"


def score_table(score: Score) -> Table:
    """FVE by kind of position and over all, beside the baselines."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind of position")
    for heading in ("n", "FVE", "shuffled within"):
        table.add_column(heading, justify="right")
    for name, part in score.by_stratum.items():
        table.add_row(Text(visible(name)), *map(Text, (str(part.n), str(part.fve), str(part.shuffled or "–"))))
    table.add_row("all", *map(Text, (str(score.n), str(score.fve), str(score.baselines.get("shuffled_within", "–")))))
    for name, interval in score.baselines.items():
        table.add_row(Text(f"baseline: {visible(name)}", style="dim"), "", Text(str(interval), style="dim"), "")
    return table


def rates(found: Mapping[str, Any]) -> Table:
    """Names and measured shares, with their intervals."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("measured", ratio=1)
    table.add_column("share", no_wrap=True, justify="right")
    for name, rate in found.items():
        table.add_row(Text(visible(name)), Text(f"{rate:.3f}" if isinstance(rate, float) else str(rate)))
    return table


def facts(rows: Mapping[str, Any], title: str) -> Table:
    """Names and values, a row each."""
    table = Table(title=Text(visible(title)), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(ratio=1)
    for name, value in rows.items():
        table.add_row(Text(visible(name)), Text(visible(str(value))))
    return table


def stages(summary: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """A plan, a row a stage: whether it would run, and what it is reckoned to take; a dash where that is not known."""
    table = Table(title=Text(visible(title)), title_justify="left", box=None, pad_edge=False)
    columns = {"tokens": "tokens", "steps": "steps", "memory_gb": "GB a device", "hours": "hours", "usd": "USD"}
    for name in ("stage", "", *columns.values(), ""):
        table.add_column(name, justify="left" if name in ("stage", "") else "right")
    for stage, figures in summary.items():
        state = "would run" if figures.get("would_run") else "done"
        known = figures if figures.get("would_run") else {}
        values = ["–" if known.get(key) is None else f"{known[key]:,}" for key in columns]
        note = f"not known without {known['not_known']}" if "not_known" in known else ""
        table.add_row(stage, state, *values, note if known.get("fits", True) else "does not fit")
    return table


def svg(renderable: Any, title: str, width: int = 112) -> str:
    """A picture of a table, as it stands in a terminal of ``width`` columns."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(renderable)
    picture = console.export_svg(title=visible(title), unique_id="nla")
    # Without rich's web font, so that the picture fetches nothing.
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested content as dotted names and short values; lists of more than a line's worth are only counted.

    >>> flat({"a": {"b": 0.12345}, "c": [1, 2]})
    {'a.b': '0.123', 'c': '1, 2'}
    """
    rows: dict[str, str] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            interval = value.keys() >= {"value", "low", "high"}
            rows |= {name: _interval(value)} if interval else flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            short = len(value) <= 8 and not any(isinstance(part, Mapping | list | tuple) for part in value)
            rows[name] = ", ".join(_short(part) for part in value) if short else f"{len(value)} entries"
        else:
            rows[name] = _short(value)
    return rows


def _short(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _interval(value: Mapping[str, Any]) -> str:
    middle, low, high = (_short(value[part]) for part in ("value", "low", "high"))
    return f"{middle} [{low}, {high}]"
