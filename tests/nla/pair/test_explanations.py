"""Explanations as they are kept and printed: what was saved comes back, and a repr is a line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nla.errors import ConfigError, NonFiniteError
from nla.pair.explanations import EXPLANATIONS_FILE, Explanation, Explanations, Trust
from nla.text.tokens import Span
from tests.helpers.tiny import make_pair


@pytest.fixture(scope="module")
def said() -> Explanations:
    nla = make_pair()
    return nla.explain(nla.read(["the cat sat on the mat.\n", "it is here.\n"]), samples=2, max_new_tokens=4)


def test_what_was_saved_comes_back_to_the_bit(said: Explanations, tmp_path: Path) -> None:
    said.save(tmp_path)
    assert Explanations.load(tmp_path) == said and said.documents and said.point == "resid_post.1"
    odd = Explanation(["a\u2028\x00\u202e ", ""], [True, False], [0.1, -0.3], Trust.of((0.1 - 0.3) / 2, 0.0, -0.5))
    added = Explanation(["x"], [True], [0.5], Trust.of(0.5, None, 0.2), Span(3, "", 0, 0, 0, True, 1, 1), 0, "bos")
    for items in ([], [odd, added]):
        Explanations(items).save(tmp_path)
        assert Explanations.load(tmp_path) == Explanations(items)


def _row(**values: Any) -> Callable[[Any], None]:
    return lambda content: content["explanations"][1].update(values)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda content: content.pop("documents"), "documents"),
        (lambda content: content.update(format_version=2), "format_version"),
        (lambda content: content.update(more=1), "more"),
        (_row(texts=[]), "texts"),
        (_row(texts=["x"]), "1 texts, 2 complete"),
        (_row(texts=["x", 3]), "texts"),
        (_row(cosine=[math.nan, 0.5]), "cosine"),
        (_row(margin=math.inf), "margin"),
        (_row(trust="sure"), "trust"),
        (_row(token="dog"), "dog"),
        (_row(document=9), "document 9 of 2"),
        (_row(document=-1), "document"),
        (_row(end=None), "places"),
        (_row(fragment=0), "fragment"),
        (_row(added="no"), "added"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    spoil: Callable[[Any], None], named: str, said: Explanations, tmp_path: Path
) -> None:
    said.save(tmp_path)
    content = json.loads((tmp_path / EXPLANATIONS_FILE).read_text(encoding="utf-8"))
    spoil(content)
    (tmp_path / EXPLANATIONS_FILE).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=named):
        Explanations.load(tmp_path)


def test_a_missing_file_and_figures_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=EXPLANATIONS_FILE):
        Explanations.load(tmp_path)
    with pytest.raises(NonFiniteError, match="explanation 0"):
        Explanations([Explanation(["x"], [True], [math.nan], Trust.of(math.nan, None, 0.0))]).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_repr_is_a_line_that_says_what_there_is(said: Explanations) -> None:
    n_low = sum(trust.level == "low" for trust in said.trust)
    assert repr(said).startswith(f"Explanations({len(said)} activations at resid_post.1, 2 samples of each; trust: ")
    assert f"{n_low} low" in repr(said) and len(repr(said)) < 120
    assert repr(Explanations()) == "Explanations(0 activations)"
    one = Explanation(["x"], [True], [0.5], Trust.of(0.9, None, 0.5))
    assert repr(Explanations([one])) == "Explanations(1 activation, 1 sample of each; trust: 1 medium)"
    two = Explanation(["x", "y"], [True] * 2, [0.5] * 2, Trust.of(0.9, 1.0, 0.5))
    assert repr(Explanations([one, two])).endswith("1 to 2 samples of each; trust: 1 high, 1 medium)")


def test_a_slice_keeps_the_texts_and_the_point(said: Explanations) -> None:
    assert (said[2:4].documents, said[2:4].point) == (said.documents, said.point)


def test_a_pair_and_activations_say_what_they_are() -> None:
    nla = make_pair()
    nla.metrics = {"joint": {"fve/global": 0.5}}
    assert repr(nla) == "NLA(a/target at resid_post.1, width 32, adapters on the target; FVE 0.500)"
    nla.metrics = {"joint": {"fve/global": -0.5}}
    assert "reads nothing" in repr(nla)
    nla.metrics = {"joint": 3}
    assert "does not hold such figures" in repr(nla)
    assert repr(nla.read(["the cat", "it is"])) == "Activations(4 × 32 at resid_post.1, of 2 texts)"
