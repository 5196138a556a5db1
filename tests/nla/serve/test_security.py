"""Who may ask: names, origins, tokens, sizes; and what every response says of scripts."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from nla.autoencoder import NLA
from nla.cli import main
from nla.serve.security import HEADERS, Guard
from tests.helpers.serve import LINE, REQUESTS, example

TOKEN = "a-token_of-16-up"


@pytest.fixture(scope="module")
def guarded(couplets: NLA) -> Iterator[Any]:
    """A server that asks for a token, as other machines see it."""
    from starlette.testclient import TestClient  # pyright: ignore[reportMissingImports]

    from nla.serve.app import make_app
    from nla.serve.engine import Engine

    app = make_app(Engine({"couplets": couplets}), TOKEN)
    with TestClient(app, base_url="http://lab.example:8017") as client:
        yield client


ROUTES = [("GET", "/"), ("GET", "/pairs"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/static/index.html")]
ROUTES += [("POST", route) for route in REQUESTS]


def body_of(route: str) -> dict[str, Any]:
    return {"json": example(route)} if route in REQUESTS else {}


@pytest.mark.parametrize("method, route", ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong-token-16-up"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": TOKEN},
        {"x-secret-key": TOKEN[:-1]},
        {"cookie": "nla_8017=; nla_8017=x"},
        {"cookie": f"nla_1={TOKEN}"},
        {"cookie": '\\"; ='},
    ],
)
def test_nothing_is_answered_without_the_token(guarded: Any, method: str, route: str, headers: dict[str, str]) -> None:
    answer = guarded.request(method, route, headers=headers, **body_of(route))
    assert answer.status_code == 401 and answer.json()["fix"]


@pytest.mark.parametrize("method, route", ROUTES)
@pytest.mark.parametrize("header", ["authorization", "x-secret-key", "cookie"])
def test_the_token_opens_every_route_in_each_way(guarded: Any, method: str, route: str, header: str) -> None:
    value = {"authorization": f"bearer {TOKEN}", "x-secret-key": TOKEN, "cookie": f"a=b; nla_8017={TOKEN}"}[header]
    assert guarded.request(method, route, headers={header: value}, **body_of(route)).status_code == 200


def test_the_address_with_the_token_leaves_a_cookie_that_no_script_and_no_other_site_has(guarded: Any) -> None:
    answer = guarded.get("/", params={"token": TOKEN}, follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "/" and not answer.content
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"nla_8017={TOKEN};") and {"HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
    guarded.cookies.clear()
    assert guarded.get("/", params={"token": "wrong"}).status_code == 401
    assert guarded.get("/pairs", params={"token": TOKEN}).status_code == 401, "in an address only where it is taken off"


def test_health_needs_no_token(guarded: Any) -> None:
    assert guarded.get("/health").json()["status"] == "ok"


@pytest.mark.parametrize(
    "host, status",
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8017", 200),
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("[::1]:8017", 200),
        ("evil.example", 403),
        ("evil.example:8017", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("evil.example@127.0.0.1.evil.example", 403),
        ("0.0.0.0", 403),
        ("192.168.1.2", 403),
        ("", 403),
        ("[", 400),
        ("127.0.0.1:port", 400),
    ],
)
def test_without_a_token_only_names_of_this_machine_are_served(client: Any, host: str, status: int) -> None:
    for method, route in (("GET", "/health"), ("GET", "/pairs"), ("POST", "/tokenize")):
        answer = client.request(method, route, headers={"host": host}, **body_of(route))
        assert answer.status_code == status, (route, answer.text)


@pytest.mark.parametrize(
    "origin, status",
    [
        ("http://127.0.0.1:8017", 200),
        ("http://127.0.0.1:8018", 403),
        ("http://localhost:8017", 403),
        ("https://evil.example", 403),
        ("http://127.0.0.1:8017.evil.example", 403),
        ("null", 403),
        ("", 403),
        ("file://", 403),
    ],
)
def test_pages_of_other_sites_are_refused_with_or_without_a_token(
    client: Any, guarded: Any, origin: str, status: int
) -> None:
    for one, more in ((client, {}), (guarded, {"authorization": f"Bearer {TOKEN}"})):
        headers = {"host": "127.0.0.1:8017", "origin": origin, **more}
        assert one.post("/tokenize", json={"text": LINE}, headers=headers).status_code == status


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_what_a_form_of_another_site_can_send_is_no_request(client: Any, kind: str) -> None:
    answer = client.post("/tokenize", content=b'{"text": "In spring"}', headers={"content-type": kind})
    assert answer.status_code == 422


def test_every_response_forbids_scripts_but_the_pages_own_files(client: Any, guarded: Any) -> None:
    policy = HEADERS["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy and "*" not in policy and "http" not in policy
    answers = [
        *(client.request(method, route, **body_of(route)) for method, route in ROUTES),
        client.get("/nowhere"),
        client.get("/pairs", headers={"host": "evil.example"}),
        client.post("/explain", json={"text": LINE, "stream": True}),
        client.post("/explain", json={}),
        guarded.get("/pairs"),
        guarded.get("/", params={"token": TOKEN}, follow_redirects=False),
    ]
    guarded.cookies.clear()
    for answer in answers:
        assert HEADERS.items() <= dict(answer.headers).items(), answer.url
    assert "cdn" not in client.get("/").text and client.get("/docs").status_code == 404


async def asked(app: Any, parts: list[bytes], headers: dict[str, str]) -> int:
    """The status of what an application answers to a body that comes in parts."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/tokenize",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in {"host": "localhost", **headers}.items()],
    }
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"] if sent else 0


@pytest.mark.parametrize(
    "parts, headers",
    [
        ([b"x" * 11], {}),
        ([b"x" * 6, b"x" * 6, b"x" * 10**6], {}),
        ([], {"content-length": "11"}),
        ([], {"content-length": "9" * 400}),
        ([], {"content-length": "-1"}),
    ],
)
def test_a_body_beyond_its_bound_is_refused_before_it_is_read_whole(
    parts: list[bytes], headers: dict[str, str]
) -> None:
    async def never(*_: Any) -> None:
        raise AssertionError("it must not come so far")

    before = len(parts)
    assert asyncio.run(asked(Guard(never, max_body_bytes=10), parts, headers)) == 413
    assert before == len(parts)


def test_a_client_that_goes_before_its_body_has_come_asks_nothing() -> None:
    async def never(*_: Any) -> None:
        raise AssertionError("it must not come so far")

    assert asyncio.run(asked(Guard(never), [b"x"], {})) == 0


@pytest.mark.parametrize(
    "words, said",
    [
        (["--host", "0.0.0.0"], "--token"),
        (["--host", "::"], "--token"),
        (["--token", "short"], "8 or more"),
        (["--token", "with spaces in it"], "8 or more"),
        (["--token", "a;b=c\r\nd: efgh"], "8 or more"),
        (["--host", "no.such.host.invalid", "--token", TOKEN], "an address of this machine"),
        (["--port", "70000"], "65535"),
        (["--pair", "no-such-pair"], "no-such-pair"),
    ],
)
def test_the_command_refuses_what_is_unsafe_or_impossible(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["serve", "--port", "0", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main.main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "free" in capsys.readouterr().err
