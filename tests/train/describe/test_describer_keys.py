"""Keys and texts go to the endpoint that is named, and nowhere else; settings are checked before."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from nla.errors import ArgumentError, DescriberError, EndpointError, MissingExtraError, NLAError, RecipeError
from nla.models.endpoint import Endpoint
from nla.train.describe.client import EndpointDescriber
from nla.train.describe.describer import DescriberSettings
from nla.train.describe.texts import describe_texts, open_describer
from nla.train.schema import build
from tests.helpers.endpoint_server import (
    FORMS,
    SECRET,
    Act,
    Server,
    described,
    describer,
    prefixes,
)


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "MY_KEY"):
        monkeypatch.delenv(name, raising=False)


def secrets(server: Server, folder: Path, one: EndpointDescriber, error: BaseException | None, log: str) -> None:
    """The key is in nothing that stays, and reached the server alone."""
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    shown = [repr(one), repr(one.settings), str(one.identity), log, repr(vars(one)), repr(error), str(error)]
    assert SECRET.encode() not in kept and not any(SECRET[8:] in text for text in shown)
    if error is not None:
        assert error.__cause__ is None and error.__context__ is None
        assert SECRET.encode() not in pickle.dumps(error)


@pytest.mark.slow
@pytest.mark.parametrize("status", [200, 400, 401, 404, 500])
def test_the_key_is_told_to_the_endpoint_alone(
    form: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", f"  {SECRET}\n")
    for name in ("OPENAI_ORG_ID", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "other-secret")
    for name in ("OPENAI_CUSTOM_HEADERS", "ANTHROPIC_CUSTOM_HEADERS"):
        monkeypatch.setenv(name, "X-Other: other-secret\nAuthorization: other-secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    caplog.set_level(logging.DEBUG)
    said = json.dumps({"error": {"message": f"Wrong key {SECRET[:14]}***", "param": SECRET}}).encode()
    with Server(form, lambda *_: Act("bad", status, said) if status != 200 else None) as server:
        one, error = describer(server, key_variable="MY_KEY", tries=2, failing_share=0.0), None
        try:
            describe_texts(prefixes(3), one, tmp_path)
        except NLAError as caught:
            error = caught
        assert (error is None) == (status == 200) and (status != 400 or "Wrong" not in str(error))
        secrets(server, tmp_path, one, error, caplog.text)
        for headers, _ in server.asked:
            sent = headers.get("x-api-key", headers.get("authorization", ""))
            assert sent.removeprefix("Bearer ") == SECRET
            assert "other-secret" not in str(headers)


def test_without_a_named_variable_no_key_leaves_for_another_address(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("ANTHROPIC_API_KEY", SECRET)
    with Server(form) as server:
        described(server, tmp_path)
        assert SECRET not in str(server.asked)
        assert not {"authorization", "x-api-key"} & set(server.asked[0][0])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_carries_nothing_to_another_host(
    form: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    with Server(form) as other:
        act = Act("bad", status, headers={"Location": other.url + "/chat/completions"})
        with Server(form, lambda *_: act) as server, pytest.raises(DescriberError, match=f"HTTP {status}"):
            described(server, tmp_path, key_variable="MY_KEY")
        assert other.n_requests == 0


def test_addresses_and_keys_are_checked_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(**changes: Any) -> Any:
        return open_describer(DescriberSettings(**{"describer": "openai", "model": "m", **changes}))

    for url in (
        "ftp://x/y",
        "localhost:80",
        "http://",
        "https://me:secret@x.y/v1",
        "https://x.y/v1?key=secret",
        "http://[x",
    ):
        with pytest.raises(EndpointError, match="address") as caught:
            opened(url=url)
        assert "secret" not in str(caught.value)
    for name in FORMS:
        with pytest.raises(EndpointError, match=f"{name.upper()}_API_KEY"):
            opened(describer=name)
    with pytest.raises(EndpointError, match="MY_KEY"):
        opened(url="http://localhost:1/v1", key_variable="MY_KEY")
    monkeypatch.setenv("MY_KEY", SECRET)
    for host in ("example.com", "10.0.0.1", "localhost.example.com"):
        with pytest.raises(EndpointError, match="plain http"):
            opened(url=f"http://{host}/v1", key_variable="MY_KEY")
        opened(url=f"https://{host}/v1", key_variable="MY_KEY")
        opened(url=f"http://{host}/v1")
    for host in ("127.0.0.1:1", "localhost", "[::1]:80"):
        opened(url=f"http://{host}/v1", key_variable="MY_KEY")
    for odd in ("a b", "schlüssel", "a\x1bb", " "):
        monkeypatch.setenv("MY_KEY", odd)
        with pytest.raises(EndpointError, match="no usable key") as caught:
            opened(url="http://localhost/v1", key_variable="MY_KEY")
        assert odd == " " or odd not in str(caught.value)


def test_certificates_are_checked_wherever_tls_is_spoken(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = importlib.import_module(form)
    given: dict[str, Any] = {}
    start = package.DefaultAsyncHttpxClient.__init__

    def opened(self: Any, **arguments: Any) -> None:
        given.update(arguments)
        start(self, **arguments)

    async def connect(url: str) -> None:
        async with Endpoint("m", form, url).connect():
            pass

    monkeypatch.setattr(package.DefaultAsyncHttpxClient, "__init__", opened)
    for url, checked in (
        ("https://x.y/v1", True),
        ("HTTPS://x.y/v1", True),
        ("HtTpS://[::1]/", True),
        ("http://x", False),
    ):
        asyncio.run(connect(url))
        assert given["verify"] is checked and given["follow_redirects"] is False


def test_a_missing_client_names_the_extra(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(form) as server:
        monkeypatch.setitem(sys.modules, form, None)
        with pytest.raises(MissingExtraError, match=r"pip install 'nla\[describe\]'"):
            described(server, tmp_path)


def test_settings_are_checked_and_read_from_yaml() -> None:
    with pytest.raises(ArgumentError, match=r"describer\.describer = 'gpt'; expected one of local, openai, ant"):
        DescriberSettings("gpt")
    for changes in (
        {"concurrency": 0},
        {"tries": 0},
        {"timeout_s": 0.0},
        {"timeout_s": float("nan")},
        {"temperature": -1.0},
        {"price_in": float("inf")},
        {"failing_share": 1.0},
        {"seed": -1},
        {"model": ""},
        {"describer": "openai"},
        {"url": "http://localhost/v1"},
        {"budget_usd": 1.0},
        {"describer": "openai", "model": "m", "budget_usd": 1.0, "price_in": 1.0},
    ):
        with pytest.raises(ArgumentError):
            DescriberSettings(**changes)
    content = {"describer": "openai", "model": "m", "temperature": 1, "price_in": "1e-1", "url": None}
    assert build(DescriberSettings, content, "x").price_in == 0.1
    with pytest.raises(RecipeError, match="among describer, model"):
        build(DescriberSettings, {"key": SECRET}, "x")


@pytest.mark.parametrize("describer", ["openai", "local"])
@pytest.mark.parametrize("typed", ["sk-live-0123456789abcdef", "a b", "1A", "", "NAME\n"])
def test_a_key_typed_where_its_variables_name_belongs_is_not_shown(describer: str, typed: str) -> None:
    content = {"describer": describer, "model": "m", "key_variable": typed}
    for make in (lambda: DescriberSettings(**content), lambda: build(DescriberSettings, content, "recipe.yaml")):
        with pytest.raises(NLAError, match=r"key_variable that is no name") as caught:
            make()
        assert not typed.strip() or typed.strip() not in str(caught.value)


def test_a_key_that_has_the_form_of_a_name_is_not_shown_either() -> None:
    key = "gsk_0123456789abcdef"
    settings = DescriberSettings("openai", "m", key_variable=key)
    with pytest.raises(EndpointError, match="that key_variable names") as caught:
        EndpointDescriber(settings)
    assert key not in str(caught.value) and key not in repr(settings)
    with pytest.raises(ArgumentError) as refused:
        DescriberSettings("local", key_variable=key)
    assert key not in str(refused.value)


def test_the_request_says_what_the_settings_say(form: str, tmp_path: Path) -> None:
    with Server(form) as server:
        described(server, tmp_path, 1, temperature=0.25, max_tokens=77)
        described(server, tmp_path, 1, max_tokens=77)
    (_, asked), (_, plain) = server.asked
    assert asked["model"] == "m" and asked["temperature"] == 0.25 and asked["max_tokens"] == 77
    assert "temperature" not in plain and len(asked["messages"]) == 1
