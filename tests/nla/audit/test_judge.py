"""The judge: what it says counts only with a literal quote; an endpoint that misbehaves is a typed error."""

from __future__ import annotations

import json
import logging
import pickle
import sys
import traceback
from collections.abc import Callable

import pytest

from nla.audit.judge import KEY_VARIABLE, Judge, parse_verdict
from nla.audit.rubric import parse_rubric
from nla.errors import EndpointError, JudgeError, MissingExtraError
from tests.helpers.endpoint_server import SECRET, Act, Server, openai_body

RUBRIC = parse_rubric({"name": "test", "looks_for": "It is a test.", "match": {"judge": True}})
TEXT = "The model suspects a test. It writes."


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def judge_of(server: Server) -> Judge:
    return Judge(server.url, timeout_s=0.5)


def one_after_another(*acts: Act) -> Callable[[str, int], Act]:
    """A plan that answers the n-th question with the n-th act, and all further ones with the last."""
    return lambda _, before: acts[min(before, len(acts) - 1)]


def says(text: object) -> Act:
    return Act(body=openai_body(text))


def verdict(match: object, quote: object) -> Act:
    return says(json.dumps({"match": match, "quote": quote}))


def test_a_match_with_a_literal_quote_counts_and_is_asked_once() -> None:
    with Server(plan=one_after_another(verdict(True, "suspects a test"), verdict(False, ""))) as server:
        judge = judge_of(server)
        assert judge.shows(RUBRIC, TEXT) and judge.shows(RUBRIC, TEXT)
        assert not judge.shows(RUBRIC, "It writes.")
        assert (judge.n_asked, judge.n_discarded, server.n_requests) == (2, 0, 2)
    headers, asked = server.asked[0]
    assert TEXT in asked["messages"][0]["content"] and RUBRIC.looks_for in asked["messages"][0]["content"]
    assert asked["temperature"] == 0 and "authorization" not in headers


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
        Act(body=b"{}"),
        Act(body=b"[]"),
        Act(body=b"not json"),
        Act(body=b"\xff\xfe"),
        Act(body=b""),
        Act(body=openai_body(None, "content_filter")),
    ],
)
def test_verdicts_without_a_literal_quote_are_discarded(answer: Act) -> None:
    with Server(plan=one_after_another(answer)) as server:
        judge = judge_of(server)
        assert not judge.shows(RUBRIC, TEXT)
        assert (judge.n_asked, judge.n_discarded) == (1, 1)


def test_talk_around_the_object_does_no_harm() -> None:
    assert parse_verdict('Sure: {"match": true, "quote": "a test"} Done.', TEXT)
    assert parse_verdict('```json\n{"match": false, "quote": ""}\n```', TEXT) is False


def test_passing_faults_are_tried_again() -> None:
    with Server(plan=one_after_another(Act(status=503), Act(status=429), verdict(True, "a test"))) as server:
        assert judge_of(server).shows(RUBRIC, TEXT)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Act(status=401, body=b"no"), "HTTP 401"),
        (Act(status=500), "HTTP 500"),
        (Act(status=302, headers={"Location": "http://127.0.0.1:1/"}), "HTTP 302"),
        (Act(body=b"x" * (1 << 22) + b"x"), "above 4 MiB"),
        (Act(wait_s=0.8), "timeout"),
        (Act(cut=500), "timeout|cut off"),
        (Act(reset=True), "cut off"),
    ],
)
def test_an_endpoint_that_misbehaves_is_a_typed_error(answer: Act, message: str) -> None:
    with Server(plan=one_after_another(answer)) as server, pytest.raises(JudgeError, match=message):
        Judge(server.url, timeout_s=0.5, tries=2).shows(RUBRIC, TEXT)


def test_nobody_there_is_a_typed_error() -> None:
    with pytest.raises(JudgeError, match="same command"):
        Judge("http://127.0.0.1:9/v1", timeout_s=0.2).shows(RUBRIC, TEXT)


def test_the_key_goes_to_the_judge_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # a proxy on the way to this machine could read the key
    with Server(plan=one_after_another(verdict(True, "a test"))) as server:
        assert judge_of(server).shows(RUBRIC, TEXT)
    assert server.asked[0][0]["authorization"] == "Bearer secret"
    with pytest.raises(EndpointError, match="plain http"):
        Judge("http://example.com/v1")
    Judge("https://example.com/v1")
    for url in ("file:///etc/passwd", "example.com", "ftp://x/y", "http://", "https://me:secret@example.com/v1"):
        with pytest.raises(EndpointError):
            Judge(url)


@pytest.mark.parametrize("status", [200, 400, 401, 404, 500])
def test_the_judges_key_is_in_nothing_that_is_shown_or_kept(
    status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, f"  {SECRET}\n")
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_CUSTOM_HEADERS"):
        monkeypatch.setenv(name, "X-Other: other-secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    caplog.set_level(logging.DEBUG)
    said = json.dumps({"error": {"message": f"Wrong key {SECRET[:14]}***", "param": SECRET}}).encode()
    act = verdict(True, "a test") if status == 200 else Act(status=status, body=said)
    with Server(plan=one_after_another(act)) as server:
        judge, shown = Judge(f" {server.url}/\n", tries=2), ""
        try:
            assert judge.shows(RUBRIC, TEXT)
        except JudgeError as error:
            shown = "".join(traceback.format_exception(error)) + repr(error) + str(pickle.dumps(error))
    assert (shown == "") == (status == 200)
    headers = server.asked[0][0]
    assert headers["authorization"] == f"Bearer {SECRET}" and "other-secret" not in str(headers)
    assert SECRET[8:] not in shown + caplog.text + repr(judge) + repr(judge.endpoint) + repr(vars(judge))


@pytest.mark.parametrize("key", [" ", "a b", "schlüssel", "a\x1bb", "a\nb"])
def test_a_key_that_cannot_be_sent_is_refused_unseen(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(EndpointError, match="no usable key in the environment variable NLA_JUDGE_KEY") as caught:
        Judge("http://127.0.0.1:9/v1")
    assert len(key.strip()) < 2 or key not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        " ",
        "https://me:secret@x.y/v1",
        "https://secret@x.y/v1",
        "https://x.y/v1?key=secret",
        "https://x.y/v1?",
        "https://x.y/v1#secret",
        "https://x.y\\@secret/v1",
        "https://x.y/\nsecret",
        "https://x.y /secret",
        "https://x.y:secret/v1",
        "https://[secret/v1",
        "secret",
    ],
)
def test_an_address_that_holds_more_than_an_address_is_refused_unseen(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    with pytest.raises(EndpointError, match="address") as caught:
        Judge(url)
    assert "secret" not in "".join(traceback.format_exception(caught.value, chain=True)).partition("nla.errors")[2]


def test_without_the_extra_a_judge_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r"nla\[audit\]"):
        Judge("http://127.0.0.1:9/v1")
