"""Who may ask, from where, and how much: one layer around the application that every request passes first."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs, urlsplit

from nla.errors import RequestError

MAX_BODY_BYTES = 32 * 2**20
BODY_S = 30
"""How long a request's body may take to come."""
OPEN = frozenset({"/health"})
"""What is answered without the token."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of every response: no script but the page's own files, no request to elsewhere, no frame around it."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own, which no other machine reaches.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def error_body(error: Any) -> bytes:
    """A typed error as JSON."""
    return json.dumps({"got": error.got, "expected": error.expected, "fix": error.fix}).encode()


class Guard:
    """Lets through what may come in, with its body bounded, and puts the headers on what goes out.

    Without a token only this machine's own names are taken as Host, so that a foreign name that points here (DNS
    rebinding) reaches nothing. A request that a page of another site makes names that site as its Origin, and is
    refused with or without a token.
    """

    def __init__(self, app: Any, token: str | None = None, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.app, self.token, self.max_body_bytes = app, token, max_body_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """See the specification of ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                names = {name for name, _ in message["headers"]}
                fixed = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(one for one in fixed if one[0] not in names)]
            await send(message)

        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check_place(headers)
            query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
            if self.token is not None and scope["path"] == "/" and self._is_token(query.get("token", [""])[0]):
                cookie = f"{_cookie_name(headers)}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                await _respond(sending, 303, b"", [(b"set-cookie", cookie.encode()), (b"location", b"/")])
                return
            if scope["path"] not in OPEN:
                self._check_token(headers)
            body = await self._body(headers, receive)
            if body is not None:
                await self.app(scope, _replayed(body, receive), sending)
        except RequestError as error:
            if started:
                raise
            await _respond(sending, error.status, error_body(error), [(b"content-type", b"application/json")])

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes | None:
        """The whole body; None: the client has gone.

        Raises:
            RequestError: it is too large, or does not come.
        """
        stated = headers.get("content-length", "0")
        if not stated.isdecimal() or int(stated) > self.max_body_bytes:
            raise _too_large(stated, self.max_body_bytes)
        parts, n_bytes, more = [], 0, True
        try:
            async with asyncio.timeout(BODY_S):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    n_bytes, more = n_bytes + len(parts[-1]), message.get("more_body", False)
                    if n_bytes > self.max_body_bytes:
                        raise _too_large(n_bytes, self.max_body_bytes)
        except TimeoutError as error:
            got, expected = "a body that does not come to its end", f"all of it within {BODY_S} s"
            raise RequestError(got, expected, "send it faster, or less of it", status=408) from error
        return b"".join(parts)

    def _check_place(self, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        name, _ = _name_and_port(host)
        if self.token is None and not is_loopback(name):
            expected = "127.0.0.1 or localhost"
            raise RequestError(f"the Host {host!r}", expected, "open the address that nla serve printed", status=403)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            got = f"a request from a page of {origin!r}"
            raise RequestError(got, f"one of {host!r} itself", "send it from a program or from the page", status=403)

    def _check_token(self, headers: dict[str, str]) -> None:
        if self.token is None:
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [bearer.strip() if scheme.lower() == "bearer" else "", headers.get("x-secret-key", "")]
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(_cookie_name(headers))
        except CookieError:
            morsel = None
        given.append("" if morsel is None else morsel.value)
        if not any([self._is_token(one) for one in given]):  # all are compared, however many fit
            fix = "send Authorization: Bearer TOKEN, or open the address with ?token=TOKEN"
            raise RequestError("a request without the right token", "the one that nla serve was given", fix, status=401)

    def _is_token(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())


def _cookie_name(headers: dict[str, str]) -> str:
    """Servers on several ports of one host share cookies: each has its own."""
    return f"nla_{_name_and_port(headers.get('host', ''))[1]}"


def _name_and_port(host: str) -> tuple[str, int]:
    """What a Host header says.

    Raises:
        RequestError: it says nothing.
    """
    try:
        parts = urlsplit(f"//{host}")
        return parts.hostname or "", parts.port or 80
    except ValueError as error:
        expected, fix = "a name and a port", "open the address that nla serve printed"
        raise RequestError(f"the Host {host!r}", expected, fix, status=400) from error


def _too_large(n_bytes: int | str, most: int) -> RequestError:
    got = f"a body of {n_bytes[:20] if isinstance(n_bytes, str) else n_bytes} bytes"
    return RequestError(got, f"at most {most:,}", "send fewer vectors or a shorter text at a time", status=413)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What an application receives when the body has been read before it: the body, then whatever comes."""
    bodies = iter([body])

    async def received() -> Message:
        given = next(bodies, None)
        return await receive() if given is None else {"type": "http.request", "body": given, "more_body": False}

    return received


async def _respond(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})
