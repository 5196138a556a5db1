"""Tables and plots for notebooks: what stands in them is what was measured, and no token is taken for a formula."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from nla.errors import MissingExtraError
from nla.views import figures
from tests.helpers.pages import MARKUP

matplotlib.use("Agg")

HOSTILE = ["$\\frac{$", "$$", "a$b$c", "_hidden", "\x1b[2J", "", "x" * 400, *MARKUP]


@pytest.fixture(autouse=True)
def _closed():
    yield
    pyplot.close("all")


def test_explanations_are_a_table_of_their_samples_and_a_bar_for_each_token(pair, texts) -> None:
    acts = pair.read(texts)
    said = pair.explain(acts, samples=2, max_new_tokens=4)
    table = said.to_dataframe()
    assert list(table["text"]) == [text for one in said for text in one.texts]
    assert table.groupby(["document", "index"], sort=False)["cosine"].mean().tolist() == pytest.approx(
        [trust.cosine for trust in said.trust]
    )
    assert all(texts[row.document][row.start : row.end] == row.token for row in table.itertuples())
    axes = said.plot()
    bars = sorted(axes.patches, key=lambda bar: bar.get_x())
    assert [bar.get_height() for bar in bars] == pytest.approx([trust.cosine for trust in said.trust])
    assert [bar.get_facecolor() for bar in bars] == [
        matplotlib.colors.to_rgba(figures.COLOURS[trust.level]) for trust in said.trust
    ]
    (dots,) = axes.lines
    assert list(dots.get_ydata()) == pytest.approx([cosine for one in said for cosine in one.cosine])


def test_activations_are_a_table_of_their_tokens_and_a_bar_for_each(pair, texts) -> None:
    acts = pair.read(texts, strata=lambda number, spans: [f"text {number}"] * len(spans))
    table = acts.to_dataframe()
    assert list(table["token"]) == [span.text for span in acts.spans] and list(table["stratum"]) == acts.strata
    assert list(table["norm"]) == pytest.approx(acts.vectors.double().norm(dim=1).tolist(), rel=1e-5)
    axes = Figure().add_subplot()
    assert acts.plot(axes) is axes and len(axes.patches) == len(acts)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["text 0", "text 1", "text 2", "text 3"]


def test_no_token_is_a_formula_hidden_or_a_control_character_in_a_plot() -> None:
    n = len(HOSTILE)
    plots = [
        figures.trust_bars(HOSTILE, ["low", "high"] * (n // 2) + ["medium"] * (n % 2), [[0.5]] * n, [0.1] * n),
        figures.group_bars(HOSTILE, HOSTILE, [1.0] * n, "norm"),
    ]
    for axes in plots:
        axes.figure.canvas.draw()  # a formula that is none is an error here
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels[:4] == HOSTILE[:4] and labels[4] == "\\x1b[2J" and max(map(len, labels)) <= 24
    assert [text.get_text() for text in plots[1].get_legend().get_texts()][:4] == HOSTILE[:4]


def test_of_many_bars_none_is_named() -> None:
    axes = figures.group_bars(["x"] * 200, ["all"] * 200, [1.0] * 200, "norm")
    assert "x" not in [label.get_text() for label in axes.get_xticklabels()] and axes.get_xlabel() == "activation"


def test_a_missing_pandas_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"no pandas.*nla\[notebook\]"):
        figures.data_frame({"a": [1]})


@pytest.mark.slow
def test_neither_pandas_nor_matplotlib_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import nla.views.figures, nla.views.tokens, sys; sys.exit(bool({'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
