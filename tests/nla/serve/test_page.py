"""The page without a browser: its files, their policy, and what it asks for beyond the API."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nla.autoencoder import NLA
from tests.helpers.pages import MARKUP, ODD, Markup
from tests.helpers.serve import LINE, events

STATIC = Path(__file__).parents[3] / "nla/serve/static"
FILES = sorted(path.name for path in STATIC.iterdir())
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
SENDABLE = [text for text in [*MARKUP, *ODD] if text.isprintable() or text.encode(errors="replace").decode() == text]


@pytest.fixture(scope="module")
def results(client: Any) -> list[dict[str, Any]]:
    """What the page has of a text: the last event of each token."""
    asked = {"text": LINE, "samples": 2, "stream": True}
    return [event for event in events(client.post("/explain", json=asked).text) if event["kind"] == "result"]


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_the_page_is_served_under_its_type_and_the_policy(client: Any, name: str) -> None:
    answer = client.get("/" if name == "index.html" else f"/static/{name}")
    assert answer.status_code == 200 and answer.content == (STATIC / name).read_bytes()
    assert answer.headers["content-type"].startswith(TYPES[Path(name).suffix])
    policy = answer.headers["content-security-policy"]
    assert (
        "default-src 'none'" in policy
        and "unsafe" not in policy
        and answer.headers["x-content-type-options"] == "nosniff"
    )


def test_whatever_the_page_names_is_there_and_from_this_server(client: Any) -> None:
    text = (STATIC / "index.html").read_text()
    named = re.findall(r'(?:src|href)="(/[^"]*)"', text)
    modules = {
        f"/static/{name}" for path in STATIC.glob("*.js") for name in re.findall(r'from "\./([^"]+)"', path.read_text())
    }
    assert len(named) >= 4 and len(modules) >= 5
    for path in [*named, *modules]:
        assert client.get(path).status_code == 200, path


@pytest.mark.parametrize("name", FILES)
def test_the_page_has_no_inline_code_no_markup_from_text_and_no_outside_address(name: str) -> None:
    text = (STATIC / name).read_text()
    outside = [url for url in re.findall(r"\b(?:https?:)?//[\w.]+[\w/.]*", text) if url != "http://www.w3.org/2000/svg"]
    assert [url for url in outside if url.startswith("http")] == [] and "@import" not in text and "url(" not in text
    if name.endswith(".html"):
        assert not re.search(r"<[^>]*\s(?:on\w+|style)\s*=|<style|<script(?![^>]*src=)|javascript:", text)
    if name.endswith(".js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|srcdoc", text
        )


def test_every_control_of_the_page_has_a_name() -> None:
    text = (STATIC / "index.html").read_text()
    for control in re.findall(r"<(?:input|select|textarea|progress)\b[^>]*>", text):
        before = text[: text.index(control)]
        assert "aria-label=" in control or before.rfind("<label") > before.rfind("</label"), control


def test_the_saved_file_is_what_the_library_writes_of_the_same_tokens(
    client: Any, couplets: NLA, results: list[dict[str, Any]]
) -> None:
    asked = {"title": "couplets at resid_post.3", "text": LINE, "results": results[::-1]}
    saved = client.post("/page/html", json=asked)
    explained = couplets.explain(couplets.read([LINE]), samples=2)
    library = explained.to_html("couplets at resid_post.3")
    strip = lambda text: re.sub(r'<p class="about">.*?</p>', "", text)  # noqa: E731
    assert saved.status_code == 200 and strip(saved.text) == strip(library)


@pytest.mark.parametrize("hostile", SENDABLE)
def test_hostile_texts_stay_text_in_the_saved_file(client: Any, results: list[dict[str, Any]], hostile: str) -> None:
    one = json.loads(json.dumps(results[0]))
    one |= {"token": hostile, "start": 0, "end": len(hostile), "description": hostile}
    for sample in one["samples"]:
        sample |= {"text": hostile, "claims": [hostile]}
    asked = {"title": hostile, "text": hostile, "results": [one], "remarks": [hostile]}
    saved = client.post("/page/html", json=asked).text
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', saved)
    assert policy is not None and "default-src 'none'" in policy[1]
    tags = set(Markup(saved).tags)
    assert not tags & {"script", "img", "svg", "iframe", "b"} and "\u202e" not in saved


def test_conversations_of_a_file_are_opened_whatever_its_form(client: Any) -> None:
    turns = [{"role": "user", "content": "so it is"}, {"role": "assistant", "content": "here"}]
    lines = "\n".join(json.dumps({"id": name, "messages": turns}) for name in ("a", "b"))
    opened = client.post("/page/transcripts", params={"name": "two.jsonl"}, content=lines.encode()).json()
    assert [one["id"] for one in opened["transcripts"]] == ["a", "b"]
    assert [(one["role"], one["content"]) for one in opened["transcripts"][0]["messages"]] == [
        ("user", "so it is"), ("assistant", "here"),
    ]  # fmt: skip
    chat = client.post(
        "/page/transcripts", params={"name": "x.chat"}, content=b"user: so it is\nassistant: here"
    ).json()
    assert chat["transcripts"][0]["messages"] == opened["transcripts"][0]["messages"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "x.jsonl", "", "<b>.eval", "a\x00.json", "x" * 5000])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[[[[", b'{"messages": 3}', b"PK\x03\x04"])
def test_what_is_no_conversation_is_refused_with_what_to_do(client: Any, name: str, content: bytes) -> None:
    answer = client.post("/page/transcripts", params={"name": name}, content=content)
    assert answer.status_code in (422, 500) and all(answer.json().values()), answer.text
    assert "/tmp" not in answer.text, "where the server keeps it is nobody's business"
    assert answer.status_code == 422 or "inspect" in answer.text
