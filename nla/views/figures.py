"""Values in; a table of pandas or a plot of matplotlib out, for notebooks. Both are imported when asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nla.errors import MissingExtraError, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

COLOURS = {"high": "#0b5fa5", "medium": "#b35c00", "low": "#6f6f6f"}
"""Of trust, as in the token view (templates/tokens.css)."""
_HATCHES = {"high": "", "medium": "//", "low": ".."}
_N_NAMED = 80
"""Bars up to which each has its token below it."""


def data_frame(columns: Mapping[str, Sequence[Any]]) -> DataFrame:
    """A table of these columns.

    Raises:
        MissingExtraError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingExtraError("no pandas", "the extra 'notebook'", "pip install 'nla[notebook]'") from error
    return pandas.DataFrame(columns)


def trust_bars(
    names: Sequence[str],
    levels: Sequence[str],
    samples: Sequence[Sequence[float]],
    baselines: Sequence[float],
    axes: Axes | None = None,
) -> Axes:
    """A bar for each token: its mean cosine, in colour and hatch of its trust.

    Args:
        samples: the cosine of each of its samples, a dot each.
        baselines: the cosine of its best baseline, a line across its bar.
    """
    axes = axes or _new_axes(len(names))
    at = range(len(names))
    means = [sum(cosines) / len(cosines) for cosines in samples]
    for level in COLOURS:
        chosen = [place for place in at if levels[place] == level]
        if chosen:
            heights, label = [means[place] for place in chosen], f"{level} trust"
            axes.bar(chosen, heights, color=COLOURS[level], hatch=_HATCHES[level], edgecolor="white", label=label)
    dots = [(place, cosine) for place in at for cosine in samples[place]]
    axes.plot(*_columns(dots), "o", color="black", markersize=2.5, label="a sample")
    axes.hlines(baselines, [place - 0.4 for place in at], [place + 0.4 for place in at], "black", label="best baseline")
    axes.set_ylabel("cosine")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _named(axes, names)


def group_bars(
    names: Sequence[str], groups: Sequence[str], heights: Sequence[float], quantity: str, axes: Axes | None = None
) -> Axes:
    """A bar for each token, coloured by its group where there are several."""
    axes = axes or _new_axes(len(names))
    by_group: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        by_group.setdefault(group, []).append(place)
    bars = [axes.bar(places, [heights[place] for place in places]) for places in by_group.values()]
    axes.set_ylabel(quantity)
    if len(bars) > 1:
        legend = axes.legend(bars, map(_short, by_group), loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return _named(axes, names)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _new_axes(n_bars: int) -> Axes:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(min(16.0, max(5.0, 0.3 * n_bars)), 3.5), layout="constrained")[1]


def _named(axes: Axes, names: Sequence[str]) -> Axes:
    """The axes with tokens below their bars, or with numbers where they are too many."""
    if len(names) <= _N_NAMED:
        axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=90, parse_math=False)
    else:
        axes.set_xlabel("activation")
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _short(text: str) -> str:
    """A label of a line."""
    return visible(text if len(text) <= 24 else text[:23] + "…")
