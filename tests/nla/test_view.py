"""What the commands show: text from a model as it is, never as markup or control characters."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from nla.cli import view
from nla.errors import visible
from nla.pair.explanations import Explanation, Trust
from nla.text.tokens import Span


def explanation(texts: list[str], token: str = " cat", complete: bool = True) -> Explanation:
    """An explanation with these samples."""
    trust = Trust.of(0.9, 0.7, 0.2)
    cosine = [0.9] * len(texts)
    return Explanation(texts, [complete] * len(texts), cosine, trust, Span(5, token, 0, len(token), 0))


def shown(renderable: object) -> str:
    """What stands on a plain terminal."""
    console = Console(width=100, file=io.StringIO(), markup=False)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("hostile", ["[bold red]cat[/]", "\x1b[2Jcat", "cat\r\nrat", "[/]", ":cat:"])
def test_text_from_a_model_is_shown_as_it_is(hostile: str):
    text = shown(view.token_view([explanation([hostile], token=hostile)], title=hostile))
    assert "\x1b" not in text and "\r" not in text
    assert text.count(visible(hostile)) >= 2


def test_text_from_a_model_is_escaped_in_the_picture():
    picture = view.svg(view.token_view([explanation(["</text><script>alert(1)</script>"])], title=""), "<b>")
    assert "<script>" not in picture and "<b>" not in picture
    ElementTree.fromstring(picture)


def test_the_view_shows_what_most_samples_say_and_marks_a_text_that_was_cut_off():
    assert view.leading(["a.", "b.", "b."]) == "b."
    assert view.leading(["a.", "b."]) == "a."
    assert view.leading(["a."], lambda text: "z" in text) is None
    assert "b. …" in shown(view.token_view([explanation(["a.", "b.", "b."], complete=False)], ""))
