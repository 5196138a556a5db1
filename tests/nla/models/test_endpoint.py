"""The client that describers and judges share: an answer, typed errors, and a key for one host."""

from __future__ import annotations

import asyncio
import time

import pytest

from nla.errors import ArgumentError, EndpointError
from nla.models import endpoint
from nla.models.endpoint import Answer, Endpoint
from tests.helpers.endpoint_server import FORMS, SECRET, Act, Server

MESSAGES = [{"role": "user", "content": "A list, and then item 7</passage> Write between <claims> and </claims>."}]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


def test_an_answer_has_its_text_and_what_it_took(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {SECRET}\n")
    with Server(form) as server:
        one = Endpoint("m", form, server.url, "MY_KEY", temperature=0.0)
        answer = one.ask(MESSAGES)
        (headers, asked), *_ = server.asked
    assert "It is a note about item 7." in answer.text and answer[1:] == (False, False, 120, 30)
    assert asked["messages"] == MESSAGES and asked["temperature"] == 0.0 and asked["model"] == "m"
    assert ("max_tokens" in asked) == (form == "anthropic")
    assert SECRET in str(headers) and SECRET not in repr(one) + repr(vars(one))


def test_it_works_inside_a_running_event_loop(form: str) -> None:
    async def main(server: Server) -> Answer:
        return Endpoint("m", form, server.url).ask(MESSAGES)

    with Server(form) as server:
        assert "item 7" in asyncio.run(main(server)).text


def test_a_fault_that_passes_is_tried_again_and_the_last_one_is_named(form: str) -> None:
    with Server(form, lambda _, before: Act("bad", 503) if before < 2 else None) as server:
        assert "item 7" in Endpoint("m", form, server.url, tries=3).ask(MESSAGES).text
        assert server.n_requests == 3
    with Server(form, lambda *_: Act("bad", 503)) as server:
        with pytest.raises(EndpointError, match=r"HTTP 503 from 127\.0\.0\.1, asked for m"):
            Endpoint("m", form, server.url, tries=3).ask(MESSAGES)
        assert server.n_requests == 3
    with Server(form, lambda *_: Act("bad", 404, b'{"error": {"message": "no such model"}}')) as server:
        with pytest.raises(EndpointError, match="HTTP 404: no such model"):
            Endpoint("m", form, server.url).ask(MESSAGES)
        assert server.n_requests == 1


def test_an_endless_answer_is_not_read_to_its_end(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_BYTES", 1 << 20)
    with Server(form, lambda *_: Act("long", body=b"x" * (2 << 20), cut=1 << 30)) as server:
        started = time.monotonic()
        with pytest.raises(EndpointError, match="above 1 MiB"):
            Endpoint("m", form, server.url, timeout_s=20.0).ask(MESSAGES)
        assert time.monotonic() - started < 10 and server.n_requests == 1


def test_what_is_no_endpoint_is_refused_and_no_key_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    monkeypatch.setenv("MY_KEY", SECRET)
    for url in (
        f"https://me:{SECRET}@x.y/v1",
        f"https://x.y/v1?key={SECRET}",
        f"https://x.y/v1#{SECRET}",
        "x.y",
        "ftp://x",
    ):
        with pytest.raises(EndpointError, match="address") as caught:
            Endpoint("m", url=url)
        assert SECRET not in str(caught.value)
    with pytest.raises(EndpointError, match="plain http"):
        Endpoint("m", url="http://example.com", key_variable="MY_KEY")
    with pytest.raises(EndpointError, match="no usable key in the environment variable NO_KEY"):
        Endpoint("m", url="http://localhost", key_variable="NO_KEY")
    with pytest.raises(ArgumentError, match="no name") as refused:
        Endpoint("m", url="http://localhost", key_variable=SECRET)
    assert SECRET not in str(refused.value)
    with pytest.raises(ArgumentError, match="openai, anthropic"):
        Endpoint("m", "gemini")
