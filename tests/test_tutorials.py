"""The tutorials: notebooks without outputs, whose cells run in order and show what their text says."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot

from tests.helpers.pages import Markup

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "tutorials"
NAMES = ["audit", "compare", "explain", "train"]


def cells(name: str) -> list[dict[str, Any]]:
    """The cells of a tutorial."""
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def run(name: str, folder: Path) -> tuple[dict[str, Any], str, list[str]]:
    """Run a tutorial's cells in a folder: their names, what was printed, and what each that ends in a value shows.

    A value is shown as Jupyter shows it: by its ``_repr_html_``, or else by its ``repr``.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed, shown = io.StringIO(), []
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        for cell in cells(name):
            if cell["cell_type"] != "code":
                continue
            tree = ast.parse("".join(cell["source"]))
            last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, f"{name}.ipynb", "exec"), namespace)
            value = None if last is None else eval(compile(last, f"{name}.ipynb", "eval"), namespace)
            if value is not None:
                shown.append(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
    return namespace, printed.getvalue(), shown


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a tutorial runs, with the examples where it expects them."""
    matplotlib.use("Agg")
    shutil.copytree(ROOT / "docs" / "examples", tmp_path / "examples")
    (tmp_path / "tutorials").mkdir()
    yield tmp_path / "tutorials"
    pyplot.close("all")


def test_there_is_a_tutorial_for_each_job() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_tutorial_is_a_notebook_without_outputs_that_needs_no_jupyter(name: str) -> None:
    content = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", one) for one in ids)
    assert content["cells"][0]["cell_type"] == "markdown" and "".join(content["cells"][0]["source"]).startswith("# ")
    for cell in content["cells"]:
        fields = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))  # no magic, and no command of a shell
            assert cell["outputs"] == [] and cell["execution_count"] is None
            fields |= {"outputs", "execution_count"}
        assert set(cell) == fields and cell["metadata"] == {}


@pytest.mark.slow
def test_explain(folder: Path) -> None:
    names, printed, shown = run("explain", folder)
    assert shown[0].startswith("NLA(") and "FVE" in shown[0]
    view = Markup(shown[1])
    view.check()
    assert len(view.tips) == len(names["acts"])
    assert names["planned"] not in names["text"]  # the thought is in no word of the text
    assert names["edited"].rstrip(" .\n").endswith(names["wanted"])
    assert not names["plain"].rstrip(" .\n").endswith(names["wanted"])
    assert not names["control"].rstrip(" .\n").endswith(names["wanted"])
    assert len(pyplot.gcf().axes[0].patches) == len(names["acts"]) and "fve" in printed
    loaded = type(names["explanations"]).load(folder / "runs" / "explain")
    assert loaded == names["explanations"]
    Markup((folder / "runs" / "explain" / "explanations.html").read_text(encoding="utf-8")).check()


@pytest.mark.slow
def test_audit(folder: Path) -> None:
    names, printed, shown = run("audit", folder)
    assert "A wish to sell" in printed and names["finding"].said == "not said"
    assert "It wants to sell" in names["finding"].entry.texts[0]
    # What the text says of controls: too few for one position, enough for all.
    assert names["result"].n_significant == 0 and names["result"].least_controls > 24 and names["result"].p < 0.001
    Markup((folder / "runs" / "audit" / "audit.html").read_text(encoding="utf-8")).check()
    Markup(shown[-1]).check()


@pytest.mark.slow
def test_compare(folder: Path) -> None:
    names, printed, _ = run("compare", folder)
    assert names["tasks"][1].sites.tokens == (11,) * 12
    assert "'\\n'" in printed and "NLA" in printed and "season, at the line break" in printed


@pytest.mark.slow
def test_train(folder: Path) -> None:
    names, _, shown = run("train", folder)
    assert list(names["summary"]) == names["recipe"].stages == ["extract", "describe", "warmstart", "joint"]
    assert set(names["again"]) == set(names["summary"]) and all(one["skipped"] for one in names["again"].values())
    assert names["pair"].doubts and "reads nothing" in shown[-1]
    untrained, trained = names["scores"]
    assert trained.fve.value > untrained.fve.value
