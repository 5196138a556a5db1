"""Describers against a real server that misbehaves: no text is lost, and every fault is asked again and counted."""

from __future__ import annotations

import dataclasses
import email.utils
import json
import random
import time
from pathlib import Path

import anyio
import pytest

from nla.errors import DescriberError
from nla.models.endpoint import asked_wait
from nla.train.describe.cache import TextCache
from nla.train.describe.client import EndpointDescriber
from nla.train.describe.describer import DescriberSettings
from nla.train.describe.prompt import ask_about
from nla.train.describe.texts import describe_texts
from tests.helpers.endpoint_server import (
    CLAIMS,
    CUT_REASON,
    Act,
    Server,
    described,
    describer,
    first_time,
    prefixes,
    text_of,
)


def misbehaviours(form: str) -> dict[str, Act]:
    body = Server(form).body_of
    whole = CLAIMS.format(tag="claims", item=1)
    refusal = "I'm sorry, but I cannot help with that."
    empty = {"openai": b'{"choices": []}', "anthropic": b'{"content": []}'}[form]
    return {
        "HTTP 408": Act(status=408),
        "HTTP 409": Act(status=409, body=b"busy"),
        "HTTP 429": Act(status=429, body=b'{"error": {"message": "slow down", "type": "rate_limit_error"}}'),
        "HTTP 500": Act(status=500, body=b"<html>oops"),
        "HTTP 500 ": Act(status=500, body=b"[" * 100_000),
        "HTTP 502": Act(status=502, body=b""),
        "HTTP 503": Act(status=503, headers={"Retry-After": "0.01"}),
        "HTTP 529": Act(status=529),
        "timeout": Act(wait_s=9.0),
        "timeout ": Act(drip=True, cut=1000),
        "answer cut off or connection reset": Act(cut=50),
        "answer cut off or connection reset ": Act(reset=True),
        "malformed answer": Act(body=b'{"choices": [{"mess'),
        "malformed answer ": Act(body=empty),
        "malformed answer  ": Act(body=b"[" * 100_000),
        "malformed answer   ": Act(body=b'"text"', headers={"Content-Type": "text/plain"}),
        "malformed answer    ": Act(body=body(["a", 1])),
        "malformed answer     ": Act(body=b'{"choices": {"0": 1}, "content": "text", "usage": 3}'),
        "malformed answer       ": Act(body=body("A \ud800 b.")),
        "malformed answer      ": Act(body=b"\xff\xfe\x00", headers={"Content-Encoding": "identity"}),
        "answer cut": Act(body=body(whole, **CUT_REASON[form])),
        "answer cut ": Act(body=body(whole[:-20])),
        "no tags around the claims": Act(body=body(refusal)),
        "too few claims": Act(body=body("<claims>It is a list.</claims>")),
    }


def test_texts_come_in_the_order_of_their_prefixes(form: str, tmp_path: Path) -> None:
    wait = random.Random(0)
    with Server(form, lambda item, before: Act("good", wait_s=wait.random() / 50)) as server:
        found = described(server, tmp_path, 40)
    assert found.texts == [text_of(i) for i in range(40)]
    s = found.summary
    assert (s.n_rows, s.n_texts, s.n_answered, s.n_cached, s.n_open, s.n_requests) == (40, 40, 40, 0, 0, 40)
    assert (s.tokens_in, s.tokens_out, s.n_estimated, s.cost) == (40 * 120, 40 * 30, 0, None)
    assert not s.retried and not s.failed and 1 < server.n_most <= 8
    assert json.loads(json.dumps(s.to_json()))["n_answered"] == 40 and "40 of 40" in str(s)


@pytest.mark.parametrize("cause", list(misbehaviours("openai")))
def test_each_misbehaviour_is_asked_again_and_counted(form: str, cause: str, tmp_path: Path) -> None:
    act = dataclasses.replace(misbehaviours(form)[cause], name=cause)
    with Server(form, first_time(act)) as server:
        started = time.monotonic()
        found = described(server, tmp_path, timeout_s=0.3 if "timeout" in cause else 5.0)
        assert "timeout" not in cause or time.monotonic() - started < 5  # of the whole request, not of a part of it
        assert found.texts == [text_of(i) for i in range(3)]
        assert found.summary.retried == {cause.strip(): 1} and server.acts[cause] == 1
        assert found.summary.n_requests == server.n_requests == 4


def test_a_body_that_is_compressed_wrongly_is_asked_again(form: str, tmp_path: Path) -> None:
    act = Act("bad", body=b"not gzip", headers={"Content-Encoding": "gzip"})
    with Server(form, first_time(act)) as server:
        found = described(server, tmp_path)
        assert None not in found.texts and found.summary.retried.total() == 1


def test_a_server_that_is_not_there_is_tried_and_then_named(form: str, tmp_path: Path) -> None:
    with Server(form) as server:
        url = server.url
    gone = EndpointDescriber(DescriberSettings(form, "m", url, tries=3, failing_share=0.0))
    with pytest.raises(DescriberError, match=r"no connection"):
        describe_texts(prefixes(2), gone, tmp_path)


def test_a_stated_wait_is_kept_by_all_requests(form: str, tmp_path: Path) -> None:
    times: list[float] = []

    def plan(item: str, before: int) -> Act | None:
        times.append(time.monotonic())
        first = len(times) == 1
        return Act("bad", 429, headers={"Retry-After": "0.5"}) if first else Act("good", wait_s=0.1)

    with Server(form, plan) as server:
        found = described(server, tmp_path, 6, concurrency=2)
    assert found.summary.retried == {"HTTP 429": 1} and None not in found.texts
    assert all(later - times[0] >= 0.5 for later in times[2:])  # the second was under way already


def test_waits_are_read_in_every_form() -> None:
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < (asked_wait({"retry-after": date}) or 0) <= 30
    assert asked_wait({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert asked_wait({"retry-after": "-3"}) == 0.0
    for odd in ({}, {"retry-after": "nan"}, {"retry-after": "soon"}, {"retry-after": "inf"}):
        assert asked_wait(odd) is None


def test_a_stop_does_not_sit_out_the_waits_between_tries(form: str) -> None:
    with Server(form, lambda *_: Act("busy", 503, headers={"Retry-After": "50"})) as server:
        asked = (ask_about(i, f"A list, item {i}", 100) for i in range(50))
        replies = describer(server, concurrency=4).ask(asked, lambda: server.n_requests >= 4)
        started = time.monotonic()
        assert [reply.settled for reply in replies] == [False] * 4
        assert time.monotonic() - started < 10 and server.n_requests == 4


def test_a_wait_of_hours_is_refused(form: str, tmp_path: Path) -> None:
    with (
        Server(form, lambda *_: Act(status=429, headers={"Retry-After": "7200"})) as server,
        pytest.raises(DescriberError, match="asks to wait 7200 s"),
    ):
        described(server, tmp_path)


def test_waits_grow_between_tries(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(anyio, "sleep", sleep)
    with Server(form, lambda *_: Act("bad", 500)) as server, pytest.raises(DescriberError, match=r"HTTP 500"):
        monkeypatch.setattr(f"{form}._base_client.INITIAL_RETRY_DELAY", 0.5)  # as it is outside of tests
        describe_texts(prefixes(1), describer(server, tries=9), tmp_path)
    assert server.n_requests == 9
    assert len(waits) == 8 and all(2**i / 4 <= wait <= 2**i / 2 for i, wait in enumerate(waits[:5]))
    assert max(waits) <= 60


def test_an_endpoint_that_falls_silent_is_not_waited_for_text_by_text(form: str, tmp_path: Path) -> None:
    with Server(form, lambda item, _: None if int(item) < 20 else Act("bad", 503)) as server:
        with pytest.raises(DescriberError, match="HTTP 503 at each of 2 tries for 4 texts"):
            described(server, tmp_path, 500, concurrency=4, tries=2)
        assert server.n_requests < 20 + 2 * 8
        server.plan = lambda *_: None
        again = described(server, tmp_path, 50, concurrency=4)
    assert None not in again.texts and again.summary.n_cached == 20


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 302, 307])
def test_what_will_not_pass_stops_at_once(form: str, status: int, tmp_path: Path) -> None:
    said = json.dumps({"error": {"message": "no such model"}}).encode()
    with Server(form, lambda *_: Act("bad", status, said, {"Location": "http://127.0.0.1:1/v1"})) as server:
        with pytest.raises(DescriberError, match=f"HTTP {status}") as caught:
            described(server, tmp_path, 100)
        assert server.n_requests <= 8
    assert ("no such model" in str(caught.value)) == (status not in (401, 403))


def test_an_empty_account_stops_at_once_and_an_unwanted_text_is_its_own_failure(tmp_path: Path) -> None:
    empty = b'{"error": {"code": "insufficient_quota", "type": "insufficient_quota", "message": "pay"}}'
    with (
        Server(plan=lambda *_: Act("bad", 429, empty)) as server,
        pytest.raises(DescriberError, match="insufficient_quota"),
    ):
        described(server, tmp_path, 50)
    unwanted = b'{"error": {"code": "content_filter", "message": "policy"}}'
    with Server(plan=lambda item, _: Act("bad", 400, unwanted) if item == "1" else None) as server:
        found = described(server, tmp_path)
    assert found.texts == [text_of(0), None, text_of(2)] and found.summary.failed == {"the describer refuses": 1}


@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("openai", {"refusal": "No."}),
        ("openai", {"finish": "content_filter"}),
        ("anthropic", {"stop": "refusal"}),
    ],
)
def test_a_refusal_is_not_asked_again_in_the_same_run(form: str, more: dict[str, str], tmp_path: Path) -> None:
    act = Act("bad", body=Server(form).body_of("No.", **more))
    with Server(form, lambda item, _: act if item == "1" else None) as server:
        found = described(server, tmp_path)
        assert found.texts[1] is None and found.summary.failed == {"the describer refuses": 1}
        assert server.n_requests == 3 and found.summary.tokens_in == 360


def test_a_text_that_fails_every_time_is_none_and_named(form: str, tmp_path: Path) -> None:
    with Server(form, lambda item, _: Act("bad", 500) if item == "1" else None) as server:
        found = described(server, tmp_path, tries=4)
        assert found.texts == [text_of(0), None, text_of(2)]
        assert found.summary.failed == {"HTTP 500": 1} and found.summary.retried == {"HTTP 500": 3}
        assert server.acts["bad"] == 4
        server.plan = lambda *_: None
        assert described(server, tmp_path).texts[1] == text_of(1)  # no answer was on disk, so it is asked again
        assert server.n_requests == 7


def test_too_many_failures_stop_the_run_with_the_main_reason(form: str, tmp_path: Path) -> None:
    act = Act("bad", body=Server(form).body_of("…", **CUT_REASON[form]))
    with Server(form, lambda *_: act) as server:
        with pytest.raises(DescriberError, match=r"answer cut.*raise describer\.max_tokens"):
            described(server, tmp_path, 300, failing_share=0.1, tries=2)
        assert server.n_requests < 2 * 60  # 31 failures decide it; the other 269 texts are not paid for


def mixed(item: str, before: int) -> Act | None:
    """Three requests in ten go wrong, each item's first five at most."""
    draw = random.Random(f"{item}/{before}").random()
    acts = list(misbehaviours("openai").items())
    name, act = acts[int(draw * 997) % len(acts)]
    # The clients read an error's body themselves, and a deep one, read again and again, upsets pytest's own checks.
    if before >= 5 or draw > 0.3 or "timeout" in name or name == "HTTP 500 ":
        return None
    return dataclasses.replace(act, name=name)


@pytest.mark.parametrize("n", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_text_is_lost_and_the_retries_are_those_that_the_server_counted(n: int, tmp_path: Path) -> None:
    with Server(plan=mixed) as server:
        server.keep_asked = False
        found = described(server, tmp_path, n, concurrency=32, timeout_s=60.0)
        assert found.texts == [text_of(i) for i in range(n)]
        assert found.summary.retried.total() == server.n_bad > n / 5
        expected: dict[str, int] = {}
        for name, count in server.acts.items():
            expected[name.strip()] = expected.get(name.strip(), 0) + count
        expected.pop("good")
        assert found.summary.retried == expected and len(expected) > 10
        assert found.summary.n_requests == server.n_requests and server.n_most <= 32
    with TextCache(tmp_path) as cache:
        assert len(cache) == n
