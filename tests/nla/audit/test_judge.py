"""The judge: what it says counts only with a literal quote; a server that misbehaves is a typed error."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from nla.audit.judge import KEY_VARIABLE, Judge, parse_verdict
from nla.audit.rubric import parse_rubric
from nla.errors import ArgumentError, JudgeError

RUBRIC = parse_rubric({"name": "test", "looks_for": "It is a test.", "match": {"judge": True}})
TEXT = "The model suspects a test. It writes."


class Server:
    """A loopback endpoint that answers as it is told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.asked: list[tuple[dict[str, Any], dict[str, str]]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                owner.asked.append((json.loads(self.rfile.read(length)), dict(self.headers)))
                owner.answers.pop(0)(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def judge(self) -> Judge:
        return Judge(f"http://127.0.0.1:{self.http.server_port}/v1", timeout_s=0.3, wait=lambda seconds: None)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    one = Server()
    yield one
    one.http.shutdown()
    one.thread.join()
    one.http.server_close()


def raw(data: bytes, status: int = 200, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def says(text: object) -> Callable[[BaseHTTPRequestHandler], None]:
    return raw(json.dumps({"choices": [{"message": {"content": text}}]}).encode())


def verdict(match: object, quote: object) -> Callable[[BaseHTTPRequestHandler], None]:
    return says(json.dumps({"match": match, "quote": quote}))


def test_a_match_with_a_literal_quote_counts_and_is_asked_once(server: Server) -> None:
    server.answers = [verdict(True, "suspects a test"), verdict(False, "")]
    judge = server.judge
    assert judge.shows(RUBRIC, TEXT) and judge.shows(RUBRIC, TEXT)
    assert not judge.shows(RUBRIC, "It writes.")
    assert (judge.n_asked, judge.n_discarded) == (2, 0)
    asked, headers = server.asked[0]
    assert TEXT in asked["messages"][0]["content"] and RUBRIC.looks_for in asked["messages"][0]["content"]
    assert asked["temperature"] == 0 and "Authorization" not in headers


@pytest.mark.parametrize(
    "answer",
    [
        verdict(True, "suspects an exam"),
        verdict(True, ""),
        verdict(True, "a"),
        verdict(True, None),
        verdict("true", "suspects a test"),
        says("Yes, it does."),
        says("[1, 2]"),
        says("{" * 5_000 + "}"),
        says(None),
        says([{"text": "x"}]),
        raw(b"{}"),
        raw(b"[]"),
        raw(b"not json"),
        raw(b"\xff\xfe"),
        raw(b""),
    ],
)
def test_verdicts_without_a_literal_quote_are_discarded(server: Server, answer: Callable) -> None:
    server.answers = [answer]
    judge = server.judge
    assert not judge.shows(RUBRIC, TEXT)
    assert judge.n_discarded == 1


def test_talk_around_the_object_does_no_harm() -> None:
    assert parse_verdict('Sure: {"match": true, "quote": "a test"} Done.', TEXT)
    assert parse_verdict('```json\n{"match": false, "quote": ""}\n```', TEXT) is False


def test_passing_faults_are_tried_again(server: Server) -> None:
    server.answers = [raw(b"", 503), raw(b"", 429), verdict(True, "a test")]
    assert server.judge.shows(RUBRIC, TEXT)


def _hang(handler: BaseHTTPRequestHandler) -> None:
    threading.Event().wait(0.6)


def _cut(handler: BaseHTTPRequestHandler) -> None:
    raw(b'{"choices"', **{"Content-Length": "500"})(handler)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (raw(b"no", 401), "HTTP 401"),
        (raw(b"", 500), "HTTP 500"),
        (raw(b"", 302, Location="http://127.0.0.1:1/"), "HTTP 302"),
        (raw(b"x" * (1 << 20) + b"x"), "above 1 MB"),
        (_hang, "imed out|Disconnected"),
        (_cut, "cut"),
    ],
)
def test_a_server_that_misbehaves_is_a_typed_error(server: Server, answer: Callable, message: str) -> None:
    server.answers = [answer] * 3
    with pytest.raises(JudgeError, match=message):
        server.judge.shows(RUBRIC, TEXT)


def test_nobody_there_is_a_typed_error() -> None:
    with pytest.raises(JudgeError):
        Judge("http://127.0.0.1:9/v1", timeout_s=0.2, wait=lambda seconds: None).shows(RUBRIC, TEXT)


def test_the_key_goes_to_the_judge_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    server.answers = [verdict(True, "a test")]
    server.judge.shows(RUBRIC, TEXT)
    assert server.asked[0][1]["Authorization"] == "Bearer secret"
    with pytest.raises(ArgumentError, match="plain http"):
        Judge("http://example.com/v1")
    Judge("https://example.com/v1")
    for url in ("file:///etc/passwd", "example.com", "ftp://x/y", "http://"):
        with pytest.raises(ArgumentError):
            Judge(url)
