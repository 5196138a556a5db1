"""The token view in a browser: by keyboard, on a phone, in light and dark; and hostile texts stay texts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nla.pair.explanations import Explanations
from tests.helpers.pages import MARKUP, ODD
from tests.nla.views.test_tokens import explanations

CHROMIUM = shutil.which("chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def poem() -> Explanations:
    """A text of some lines, a token a word."""
    text = "In winter Anna left a red ribbon near the rat,\n" * 4
    ends = [place for place, letter in enumerate(text) if letter in " ,\n"] + [len(text)]
    places = list(zip([0, *ends], ends, strict=False))
    return explanations(text, places, ["It is winter. Anna is here.", "It is summer. Anna is here."])


def hostile() -> Explanations:
    """A text whose tokens, claims and kinds would all be markup."""
    whole = [bad for bad in [*MARKUP, *ODD] if bad.isprintable() or "\n" in bad]
    text = " ".join(whole)
    starts = [text.index(bad) for bad in whole]
    places = [(start, start + len(bad)) for start, bad in zip(starts, whole, strict=True)]
    return explanations(text, places, whole, "<b>kind</b>")


def opened(browser: Any, file: Path, given: Explanations, width: int = 1280, scheme: str = "light") -> Any:
    """A page of a browser that shows the view; what it says or asks for stands in ``said``."""
    file.write_text(given.to_html("A title", ["a remark"]), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(300_000)  # nothing is timed here, and a machine may be busy
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("dialog", lambda dialog: page.said.append(dialog.message))
    page.on("request", lambda request: page.said.append(request.url))
    page.goto(file.as_uri())
    assert page.said.pop(0) == file.as_uri()
    return page


def tip(page: Any) -> str:
    """What stands beside the token in focus or under the pointer; "none" where nothing does."""
    return page.evaluate(
        "getComputedStyle(document.querySelector('.token:is(:hover, :focus-visible)'), '::after').content"
    )


def test_the_whole_is_reached_by_keyboard(browser: Any, tmp_path: Path) -> None:
    page = opened(browser, tmp_path / "view.html", poem())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "t3"
    assert tip(page) == '"Anna is here. (low trust)"'
    page.keyboard.press("Enter")
    assert page.url.endswith("#c3") and page.locator("#c3").evaluate("card => card.matches(':target')")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#t3"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("#c3 ol").is_visible()
    assert page.locator("#c3 ol li").all_inner_texts()[0].startswith("It is winter. Anna is here.")
    assert page.get_by_role("link", name="Anna: Anna is here. (low trust)").count() > 0
    assert page.said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_width_and_shows_a_claim_under_the_pointer(
    browser: Any, tmp_path: Path, width: int, scheme: str
) -> None:
    page = opened(browser, tmp_path / "view.html", poem(), width, scheme)
    page.locator("#t9").hover()
    assert tip(page) == '"Anna is here. (low trust)"'
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beside = page.locator("#c1").bounding_box()["x"] > page.locator("#t1").bounding_box()["x"] + 100
    assert beside == (width > 1000)


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_that_a_model_wrote_runs_or_asks_for_anything(browser: Any, tmp_path: Path, width: int) -> None:
    page = opened(browser, tmp_path / "view.html", hostile(), width)
    for token in page.locator(".token[data-tip]").all():
        token.focus()
        page.keyboard.press("Enter")
    assert page.said == [] and page.evaluate("document.scripts.length") == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault(browser: Any, tmp_path: Path, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    page = opened(browser, tmp_path / "view.html", poem(), scheme=scheme)
    # axe is a script, which the page's policy forbids: the same page is looked at without it.
    text = (tmp_path / "view.html").read_text(encoding="utf-8")
    page.set_content(text.replace("Content-Security-Policy", "x-was-policy"))
    faults = axe.Axe().run(page).response["violations"]
    assert [(fault["id"], fault["nodes"][0]["html"]) for fault in faults] == []
