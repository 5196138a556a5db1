"""The page in a browser: each view on Couplets, by pointer and keyboard, and with hostile texts."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from nla.autoencoder import NLA
from nla.stats import wilson
from nla.views.pages import spelled_out
from tests.helpers.pages import MARKUP, ODD
from tests.helpers.serve import LINE

CHROMIUM = shutil.which("chromium")
MISSING = [name for name, there in (("playwright", find_spec("playwright")), ("chromium", CHROMIUM)) if not there]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed: see CONTRIBUTING.md"),
]
OTHER = "In winter Clara left a red ribbon near the rat,\n"
CHATS = Path(__file__).parents[3] / "docs" / "examples" / "goal.jsonl"
PATIENCE_MS = 120_000
"""For what takes a second on an idle machine."""


@pytest.fixture(scope="module")
def address(couplets: NLA) -> Iterator[str]:
    """A server of Couplets, and of Switchboard, which speaks in chats, on a free port."""
    import uvicorn  # pyright: ignore[reportMissingImports]

    from nla.serve.app import make_app
    from nla.serve.engine import Engine

    engine = Engine({"couplets": couplets, "switchboard": NLA.from_pretrained("switchboard", device="cpu")})
    server = uvicorn.Server(uvicorn.Config(make_app(engine), log_level="warning"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Seen:
    """A page that is watched: no script of a text may run, and no request may leave."""

    def __init__(self, browser: Any, address: str) -> None:
        self.address = address
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        self.context.set_default_timeout(PATIENCE_MS)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.page.on("dialog", lambda dialog: (self.faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("pageerror", lambda error: self.faults.append(f"error {error}"))
        self.page.on("console", lambda said: said.type == "error" and self.faults.append(f"console {said.text}"))
        self.context.on("request", self._requested)

    def _requested(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:,", f"blob:{self.address}")):
            self.faults.append(f"request {request.url}")

    def open(self, **state: Any) -> Any:
        """The page as a link shows it, when all that it asks for is there."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.address}#{urlencode(state)}", wait_until="commit")
        self.until("document.body?.dataset.ready === 'yes'")
        if state.get("shown"):
            self.idle()
        return self.page

    def until(self, expression: str) -> None:
        """Waits until it holds. Playwright's own wait evaluates a string in the page, which the policy forbids."""
        ends = time.monotonic() + PATIENCE_MS / 1000
        while not self.page.evaluate(expression):
            assert time.monotonic() < ends, (expression, self.page.inner_text("main"))
            self.page.wait_for_timeout(100)

    def idle(self) -> None:
        """Waits until everything is explained."""
        self.until("/^\\d+ of \\d+ tokens explained|second text is explained|^Steering/.test(said.textContent)")
        self.until("document.getElementById('progress').hidden")


@pytest.fixture()
def seen(browser: Any, address: str) -> Iterator[Seen]:
    watched = Seen(browser, address)
    yield watched
    watched.context.close()
    assert watched.faults == []


def answering(body: str) -> Callable[[Any], None]:
    """What answers a route in the server's place."""
    return lambda call: call.fulfill(status=200, body=body)


def test_a_typed_text_is_explained_and_a_token_pinned_by_keyboard(seen: Seen) -> None:
    page = seen.open()
    page.fill("#text", LINE)
    page.click("#read")
    seen.idle()
    tokens = page.locator("#tokens .token")
    levels = tokens.evaluate_all("all => all.map(one => one.className)")
    assert len(levels) > 8 and all(re.search("low|medium|high", level) for level in levels)
    first = page.locator("#tokens .token[tabindex='0']")
    assert first.count() == 1
    first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#tokens .token[aria-pressed='true']").get_attribute("data-position") == "1"
    card = page.locator("#pinned .card").inner_text()
    assert "cosine" in card and "agreement" in card and "margin" in card and "4 samples" in card
    tip = tokens.nth(1).get_attribute("data-tip")
    assert tip.split(" (")[0] in card


def test_a_link_holds_the_whole_view(seen: Seen) -> None:
    page = seen.open(text=LINE, shown=1, token=3, samples=2, seed=7, view="ask", word="spring")
    assert page.input_value("#text") == LINE.replace("\r", "") and page.input_value("#samples") == "2"
    assert page.input_value("#seed") == "7" and page.input_value("#word") == "spring"
    assert page.locator("#to-ask").get_attribute("aria-current") == "page"
    assert page.locator("#tokens .token[aria-pressed='true']").get_attribute("data-position") == "3"
    page.click("#to-read")
    seen.until("!location.hash.includes('view=ask')")
    assert "seed=7" in page.evaluate("location.hash")


def test_asking_for_a_word_marks_the_tokens_whose_samples_say_it(seen: Seen, couplets: NLA) -> None:
    page = seen.open(text=LINE, shown=1, samples=4, view="ask", word="spring, cat")
    explained = couplets.explain(couplets.read([LINE]), samples=4)
    said = [sum(bool(re.search(r"\b(spring|cat)\b", text, re.I)) for text in one.texts) for one in explained.items]
    marked = page.locator("#tokens .token").evaluate_all("all => all.map(one => one.classList.contains('match'))")
    assert marked == [k > 0 for k in said] and any(marked)
    assert page.locator(".strip .bar").count() == len(said)
    box = page.locator(".strip .bar").evaluate_all("all => all.map(one => Number(one.getAttribute('height')) / 48)")
    assert box == pytest.approx([k / 4 for k in said])
    assert page.evaluate("import('/static/ask.js').then(m => m.wilson(3, 8))") == pytest.approx(
        wilson(3, 8)[1:], abs=1e-9
    )


def test_an_edited_claim_moves_the_reconstruction_and_steers(seen: Seen) -> None:
    page = seen.open(text=LINE, shown=1, token=11, view="edit")
    seen.until("document.querySelector('#panel .figures')?.textContent.includes('Cosine')")
    box = page.locator(".claims-edit textarea").first
    box.fill("The next line ends with bat.")
    seen.until("!/reconstructions: 1.00/.test(document.querySelector('#panel .figures').textContent)")
    page.get_by_role("button", name="Continue the text").click()
    seen.until("said.textContent.startsWith('Steering')")
    arms = page.locator(".arm").all_inner_texts()
    assert [arm.split("\n")[0] for arm in arms] == ["As it is", "Steered", "Control"] and "seed 0" in arms[2]
    assert "bat" in page.evaluate("decodeURIComponent(location.hash)")


def test_two_texts_are_compared_at_aligned_tokens(seen: Seen) -> None:
    page = seen.open(text=LINE, shown=1, token=4, view="compare", text_b=OTHER, compared=1)
    seen.until("document.querySelectorAll('#panel .arm').length === 3")
    seen.until("said.textContent.includes('second text is explained')")
    assert page.locator("#panel .token").count() > 8
    aligned = page.evaluate("import('/static/compare.js').then(m => m.aligned([1, 2, 3, 5], [1, 9, 3, 4, 5]))")
    assert aligned == [[0, 0], [1, 1], [2, 2], [3, 4]]


def test_a_dropped_chat_is_shown_as_bubbles_and_saved_as_a_file(seen: Seen) -> None:
    page = seen.open(pair="switchboard", samples=1)
    content = CHATS.read_bytes().splitlines()[0]
    first = json.loads(content)
    turns = first["messages"] if isinstance(first, dict) else first
    page.set_input_files("#file", {"name": "a.jsonl", "mimeType": "application/json", "buffer": content})
    seen.until("said.textContent.startsWith('Opened')")
    assert page.input_value("[aria-label='message 1']") == turns[0]["content"]
    page.click("#read")
    seen.idle()
    assert page.locator(".bubble.user").count() == sum(turn["role"] == "user" for turn in turns)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as one HTML").click()
    saved = download.value.path().read_text("utf-8")
    assert "Content-Security-Policy" in saved and saved.count('class="card ') == page.locator("#tokens .token").count()


def test_what_the_server_refuses_is_said_and_the_page_goes_on(seen: Seen) -> None:
    page = seen.open()
    page.click("#read")
    page.wait_for_selector("#failed:not([hidden])")
    assert "What to do" in page.inner_text("#failed")
    page.fill("#text", LINE)
    page.click("#read")
    seen.idle()
    assert page.locator("#failed").is_hidden()
    seen.faults[:] = [fault for fault in seen.faults if "422" not in fault]


def test_hostile_texts_of_models_and_users_stay_text_in_every_view(seen: Seen) -> None:
    hostile = " ".join([*MARKUP, *(text.encode(errors="replace").decode() for text in ODD)])

    def explained(position: int) -> dict[str, Any]:
        sample = {"text": hostile, "claims": [hostile, *MARKUP], "complete": False, "cosine": 0.5}
        trust = {"level": "high", "cosine": 0.5, "agreement": None, "margin": 0.1}
        token = {"token": hostile[:40], "token_id": 1, "position": position, "start": 0, "end": len(hostile)}
        rest = {"fragment_index": 0, "fragment_count": 1, "added": False, "role": hostile, "message_index": position}
        figures = {"description": hostile, "mse": 1.0, "cosine_similarity": 0.5, "l2_norm": 1.0, "section": hostile}
        return {**token, **rest, **figures, "samples": [sample], "trust": trust, "kind": "result"}

    tokens = [explained(n) for n in range(2)]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in tokens) + "data: [DONE]\n\n"
    answers = {
        "tokenize": json.dumps({"text": hostile, "prompt_length": 2, "tokens": tokens}),
        "explain": stream,
        "score": json.dumps({"pair": hostile, "mse": 1, "cosine_similarity": 0.5, "margin": 0, "moved": 0.5}),
        "completion": "".join(
            f"data: {json.dumps(event)}\n\n" for event in [{"kind": "result", "completion": hostile}]
        ) + "data: [DONE]\n\n",
    }  # fmt: skip
    for route, body in answers.items():
        seen.page.route(f"**/{route}", answering(body))
    for view in ("read", "ask", "edit", "compare"):
        state = {"word": "cat", "edit": hostile, "continued": 1, "text_b": hostile, "compared": 1, "pair_b": hostile}
        page = seen.open(text=hostile, shown=1, token=1, view=view, **state)
        page.wait_for_timeout(1500)
        assert page.locator(":is(#panel, #tokens) :is(script, img, iframe, a, b)").count() == 0
        assert page.locator("#panel *").count() > 3, view
        shown = page.evaluate("result.textContent")
        assert "<script>alert(1)</script>" in shown and not re.search("[\u202e\u200b\u2028\x1b\x00]", shown), view
    said = page.evaluate("texts => import('/static/dom.js').then(m => texts.map(m.spelledOut))", ODD[:7])
    assert said == [spelled_out(text) for text in ODD[:7]]
