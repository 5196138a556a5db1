"""One client for every chat endpoint: address, name of the key's variable and messages in; a text and its tokens out.

The SDKs of OpenAI and Anthropic make the requests, with their own retries. Around each try this module keeps the key to
one host, holds the time limit over the whole request, reads the answer strictly and says what went wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import ipaddress
import logging
import math
import os
import re
import ssl
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nla.errors import ArgumentError, EndpointError, MissingExtraError, visible

FORMS = {
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "anthropic": ("https://api.anthropic.com", "ANTHROPIC_API_KEY"),
}
"""Of each form, the provider's own address, and the variable that holds the key for it alone."""
PASSING = (408, 409, 425, 429)
"""Statuses, beside 500 and above, after which the same request may well succeed."""
TIMEOUT, CUT_OFF, NO_CONNECTION, MALFORMED = (
    "timeout",
    "answer cut off or connection reset",
    "no connection",
    "malformed answer",
)
LONGEST_WAIT_S = 600.0
"""A server that asks for a longer wait than this is not waited for."""
MAX_BYTES = 1 << 22
"""An answer above this is not read to its end."""
DEFAULT_MAX_TOKENS = 4096
"""Sent where nobody says a limit to a form that demands one."""
_ABOUT_THE_TEXT = {"content_filter", "content_policy_violation", "context_length_exceeded"}
_NOTHING_LEFT = {"insufficient_quota", "billing_error", "billing_hard_limit_reached"}
_LONGEST_NAME = 40
_PART = 6
"""A server's words that hold so many characters of the key in a row are not repeated."""
_HEADERS = {"host", "accept", "accept-encoding", "connection", "content-type", "content-length", "user-agent"}
_HEADERS |= {"anthropic-version", "x-stainless-raw-response"}  # the SDKs look the last up in the request they sent
_ODD = (KeyError, IndexError, TypeError, AttributeError)
"""What reading a body of another form raises."""
_LOGGERS = ("httpx2", "httpx", "openai._base_client", "anthropic._base_client")


class Answer(NamedTuple):
    """What an endpoint wrote, and what it took."""

    text: str
    cut: bool = False
    """It ends at the limit of tokens."""
    refused: bool = False
    """The model, or a filter before it, refuses this very text."""
    tokens_in: int | None = None
    """Of the messages; None: the endpoint does not say."""
    tokens_out: int | None = None


@dataclass
class Try:
    """One request, and what came of it: an answer, or the cause why there is none."""

    answer: Answer | None = None
    cause: str = ""
    passing: bool = False
    """The same request may well succeed later."""
    wait_s: float | None = None
    """How long the server asks to wait."""
    charged: bool = False
    """The endpoint may have charged for it, though there is no answer."""


Around = Callable[[Try], contextlib.AbstractAsyncContextManager[None]]
"""What a caller does before and after each request; it may hold the request back, or cancel it."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask which model, and how. It holds the name of the key's variable and never the key.

    Raises:
        EndpointError: not an http(s) address, one that holds a password or a query, plain http with a key to another
            machine, or a variable without a usable key.
        ArgumentError: an unknown form, or what cannot be the name of a variable.
    """

    model: str
    """The endpoint's name of it."""
    form: str = "openai"
    """``openai`` (any endpoint of that form) or ``anthropic``."""
    url: str | None = None
    """Base of the API, such as ``http://localhost:8000/v1``; None: the provider's own."""
    key_variable: str | None = field(default=None, repr=False)
    """Environment variable that holds the key. None: the provider's own at its own address, no key anywhere else."""
    timeout_s: float = 60.0
    """Of one request, from its start to the last byte of the answer."""
    tries: int = 3
    """Requests for one answer."""
    temperature: float | None = None
    """Of sampling; None: the endpoint's own."""
    max_tokens: int | None = None
    """Longest answer; None: the endpoint's own limit, and ``DEFAULT_MAX_TOKENS`` where the form demands one."""

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            got = f"an endpoint of the form {visible(str(self.form))[:40]!r}"
            raise ArgumentError(got, f"one of {', '.join(FORMS)}", "name one of them")
        if self.key_variable is not None:
            check_variable(self.key_variable, "the variable of an endpoint's key")
        scheme, host = _address(self.base)
        if self.variable is not None:
            read_key(self.variable)
            if scheme == "http" and not is_loopback(host):
                got = f"the endpoint {visible(host)[:80]} over plain http with a key"
                fix = f"use https, or send no key: not that in {shown_variable(self.variable)}"
                raise EndpointError(got, "https: anyone on the way could read the key", fix)

    @property
    def base(self) -> str:
        """The address that requests go below."""
        return (FORMS[self.form][0] if self.url is None else self.url.strip()).rstrip("/")

    @property
    def host(self) -> str:
        """The one host that is asked."""
        return _address(self.base)[1]

    @property
    def variable(self) -> str | None:
        """The variable whose key is sent; None: no key is."""
        base, variable = FORMS[self.form]
        return self.key_variable or (variable if self.base == base else None)

    def error(self, cause: str) -> EndpointError:
        """What to raise when nothing can be had from here."""
        key = "no key" if self.variable is None else f"the key in {shown_variable(self.variable)}"
        return EndpointError(
            f"{cause} from {visible(self.host)[:80]}, asked for {visible(self.model)[:80]}",
            "an endpoint that answers",
            f"check url, model and {key}",
        )

    def ask(self, messages: Sequence[Mapping[str, str]]) -> Answer:
        """The answer to messages, each with a ``role`` (user or assistant) and ``content``.

        Raises:
            EndpointError: there was none in all tries.
            MissingExtraError: the provider's package is not installed.
        """
        tries: list[Try] = []

        async def once() -> None:
            async with self.connect() as session:
                await session.ask(messages, tries)

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(once())
        else:  # inside a running loop another needs a thread of its own
            with ThreadPoolExecutor(1) as pool:
                pool.submit(asyncio.run, once()).result()
        answer = tries[-1].answer
        if answer is None:
            raise self.error(tries[-1].cause)
        return answer

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[Session]:
        """Connections for many questions; the key lives as long as they do.

        Raises:
            EndpointError: there is no usable key any more.
            MissingExtraError: the provider's package is not installed.
        """
        session = Session(self)
        try:
            with _quiet():
                yield session
        finally:
            await session.sdk.close()


class Session:
    """Open connections to an endpoint; use :meth:`Endpoint.connect`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.sdk: Any = _open_sdk(endpoint)

    async def ask(
        self,
        messages: Sequence[Mapping[str, str]],
        tries: list[Try],
        most: int | None = None,
        around: Around = lambda _: contextlib.nullcontext(),
    ) -> None:
        """Ask until there is an answer, nothing more can be expected, or ``most`` requests were made.

        Args:
            tries: gets each request as it is made; the last one has the answer, or says why there is none.
            most: None: the endpoint's ``tries``.
            around: entered before each request, and left with what came of it.
        """
        e, token = self.endpoint, _ASKED.set((tries, around))
        n_before = len(tries)
        request: dict[str, Any] = {"model": e.model, "messages": list(messages)}
        if e.temperature is not None:  # not an argument of every client, since not every model takes one
            request["extra_body"] = {"temperature": e.temperature}
        if e.form == "anthropic" or e.max_tokens is not None:
            # OpenAI's own newer models know the limit under its new name only; most other servers the old one only.
            new = e.base == FORMS["openai"][0]
            request["max_completion_tokens" if new else "max_tokens"] = e.max_tokens or DEFAULT_MAX_TOKENS
        client = self.sdk.with_options(max_retries=(most or e.tries) - 1)
        where = client.chat.completions if e.form == "openai" else client.messages
        try:
            await where.with_raw_response.create(**request)
        except Exception as error:  # not kept: it holds the request with its key, and the tries say what went wrong
            if len(tries) == n_before or not (tries[-1].cause or tries[-1].answer):
                tries.append(Try(cause=f"{type(error).__name__} in the client"))
        finally:
            _ASKED.reset(token)


_ASKED: ContextVar[tuple[list[Try], Around]] = ContextVar("asked")
"""What the task is asking, for the SDK's requests to be counted by."""


def check_variable(name: object, what: str) -> None:
    """Refuse what cannot be a variable's name; it may be the key itself, so no message repeats it.

    Raises:
        ArgumentError: it is no such name.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        got = f"{what} that is no name (not shown: it may be a key)"
        fix = "export the key under a name, and give that name here"
        raise ArgumentError(got, "the name of an environment variable, such as MY_KEY", fix)


def read_key(variable: str) -> str:
    """The key in an environment variable.

    Raises:
        EndpointError: it is not set, or holds what cannot be sent; the message never shows it.
    """
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        got = f"no usable key in {shown_variable(variable)}"
        raise EndpointError(got, "a key of printable ASCII", "export the variable with the key, and run again")
    return key


def shown_variable(variable: str) -> str:
    """A variable's name for a message, where it looks like one: many a key has the form of a name, too.

    >>> shown_variable("OPENAI_API_KEY")
    'the environment variable OPENAI_API_KEY'
    >>> shown_variable("gsk_0123abcd")
    'the environment variable that key_variable names'
    """
    usual = re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*", variable) and len(variable) <= _LONGEST_NAME
    return f"the environment variable {variable if usual else 'that key_variable names'}"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: ``retry-after-ms``, or ``Retry-After`` as seconds or as a date.

    >>> asked_wait({"retry-after": "2"})
    2.0
    >>> asked_wait({"retry-after": "soon"}) is None
    True
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError, TypeError):
            seconds = float(headers.get(name, "")) * unit
            if math.isfinite(seconds):
                return max(0.0, seconds)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    return None


def _address(url: str) -> tuple[str, str]:
    """Scheme and host of an address that holds nothing secret."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = (parts.hostname or "").lower(), parts.port
        readable = url.isprintable() and not set(url) & set(" \\?#")
    except ValueError:
        parts, host, readable = urllib.parse.urlsplit(""), "", False
    if (
        not readable
        or parts.scheme not in ("http", "https")
        or not host
        or "@" in parts.netloc
        or parts.query
        or parts.fragment
    ):
        raise EndpointError(
            "an endpoint's address that is not one, or that holds a name, a password or a query",
            "a plain http or https address such as http://localhost:8000/v1",
            "correct the address; a key belongs into an environment variable, of which the name is given",
        )
    return parts.scheme, host


def _open_sdk(endpoint: Endpoint) -> Any:
    """The provider's client, over connections that let out what is needed and no more."""
    form = endpoint.form
    try:
        if form == "openai":
            import openai as package  # pyright: ignore[reportMissingImports]

            kind: Any = package.AsyncOpenAI
        else:
            import anthropic as package  # pyright: ignore[reportMissingImports]

            kind = package.AsyncAnthropic
    except ImportError as error:
        got = f"an endpoint of the form {form} without the package {form}"
        raise MissingExtraError(got, "the extra 'describe'", "pip install 'nla[describe]'") from error
    import httpx2  # comes with both

    key = None if endpoint.variable is None else read_key(endpoint.variable)

    class Connections(package.DefaultAsyncHttpxClient):
        async def send(self, request: Any, *, stream: bool = False, **how: Any) -> Any:
            tries, around = _ASKED.get()
            _strip(request, endpoint.host, key)
            made = Try()
            async with around(made):
                tries.append(made)
                try:
                    async with asyncio.timeout(endpoint.timeout_s):
                        response = await super().send(request, stream=True, **how)
                        body = await _read(response)
                except (TimeoutError, httpx2.TimeoutException):
                    made.cause, made.passing, made.charged = TIMEOUT, True, True
                    raise httpx2.ReadTimeout(TIMEOUT, request=request) from None
                except httpx2.DecodingError:
                    made.cause, made.passing, made.charged = MALFORMED, True, True
                    raise
                except (httpx2.RequestError, ssl.SSLError, OSError) as error:
                    cut = isinstance(error, httpx2.RemoteProtocolError | httpx2.ReadError)
                    made.cause, made.passing, made.charged = CUT_OFF if cut else NO_CONNECTION, True, cut
                    raise
                _judge_response(made, endpoint, response.status_code, response.headers, body)
                if made.cause == MALFORMED:  # an error of the connection, for the SDK to try again
                    raise httpx2.RemoteProtocolError(MALFORMED, request=request)
            headers = {"x-should-retry": str(made.passing).lower()}
            if made.wait_s is not None:
                headers["retry-after"] = str(made.wait_s)
            return httpx2.Response(response.status_code, headers=headers, request=request)

    # A redirect could carry the key and the texts to another host, and so could a proxy on the way to this machine.
    direct: dict[str, Any] = {"trust_env": False, "mounts": dict.fromkeys(("http://", "https://", "all://"))}
    connections = Connections(
        follow_redirects=False,
        timeout=endpoint.timeout_s,
        # Where no TLS is spoken no certificates are loaded, which takes longer than a request.
        verify=urllib.parse.urlsplit(endpoint.base).scheme != "http",
        **(direct if is_loopback(endpoint.host) else {}),
    )
    # Not None, which makes the SDKs look for keys of their own; it is taken off again where there is none.
    return kind(api_key=key or "none", base_url=endpoint.base, timeout=endpoint.timeout_s, http_client=connections)


def _strip(request: Any, host: str, key: str | None) -> None:
    """Let a request out to one host only, without the headers that SDKs gather from the environment."""
    if request.url.host.lower().strip("[]") != host:
        raise RuntimeError("a request to another host")
    for name in list(request.headers):
        if name.lower() == "authorization" and key is not None:
            request.headers[name] = f"Bearer {key}"
        elif name.lower() == "x-api-key" and key is not None:
            request.headers[name] = key
        elif name.lower() not in _HEADERS:
            del request.headers[name]


async def _read(response: Any) -> bytes:
    """The body, or a little more than may be read of it."""
    body = bytearray()
    try:
        async for part in response.aiter_bytes():
            body += part
            if len(body) > MAX_BYTES:
                break
    finally:
        await response.aclose()
    return bytes(body)


def _judge_response(made: Try, endpoint: Endpoint, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Write down what a response means."""
    # Comes with both SDKs; deep nesting is an error to it, where json would run into the limit of recursion.
    from pydantic_core import from_json

    if len(body) > MAX_BYTES:
        made.cause, made.charged = f"an answer above {MAX_BYTES >> 20} MiB", True
        return
    try:
        content = from_json(body)
    except ValueError:
        content = None
    content = content if isinstance(content, Mapping) else {}
    if 200 <= status < 300:
        try:
            made.answer = (_read_openai if endpoint.form == "openai" else _read_anthropic)(content)
        except _ODD:
            made.cause, made.passing, made.charged = MALFORMED, True, True
        return
    inner = content.get("error", content)
    inner = inner if isinstance(inner, Mapping) else {}
    codes = {code for code in (inner.get("code"), inner.get("type")) if isinstance(code, str)}
    made.cause, made.wait_s = f"HTTP {status}", asked_wait(headers)
    if codes & _NOTHING_LEFT:
        made.cause += f", {min(codes & _NOTHING_LEFT)}"
    elif 400 <= status < 500 and codes & _ABOUT_THE_TEXT:
        made.cause, made.answer = "", Answer("", refused=True, tokens_in=0, tokens_out=0)
    elif status in PASSING or status >= 500:
        made.passing = made.wait_s is None or made.wait_s <= LONGEST_WAIT_S
        made.cause += "" if made.passing else f", which asks to wait {made.wait_s:.0f} s"
    elif said := _said(inner.get("message"), endpoint, status):
        made.cause += f": {said}"


def _said(message: object, endpoint: Endpoint, status: int) -> str:
    """What the server says in an error, if nothing of it could be a part of the key; empty where it may name one."""
    if not isinstance(message, str) or status in (401, 403):
        return ""
    key = "" if endpoint.variable is None else os.environ.get(endpoint.variable, "").strip()
    parts = {key[start : start + _PART] for start in range(max(1, len(key) - _PART + 1))} - {""}
    return "" if any(part in message for part in parts) else visible(message)[:160]


def _read_openai(content: Mapping[str, Any]) -> Answer:
    """The answer in a body of this form; what is not there, or of another type, is one of ``_ODD``."""
    choice, spent = content["choices"][0], _spent(content, "prompt_tokens", "completion_tokens")
    message, reason = choice["message"], choice.get("finish_reason")
    if reason == "content_filter" or message.get("refusal"):
        return Answer("", False, True, *spent)
    text, cut = message.get("content"), reason == "length"
    return Answer(_text("" if text is None and cut else text), cut, False, *spent)  # cut while thinking: no text


def _read_anthropic(content: Mapping[str, Any]) -> Answer:
    """As :func:`_read_openai`."""
    spent, reason = _spent(content, "input_tokens", "output_tokens"), content.get("stop_reason")
    if reason == "refusal":
        return Answer("", False, True, *spent)
    texts = [_text(block.get("text")) for block in content["content"] if block.get("type") == "text"]
    cut = reason in ("max_tokens", "model_context_window_exceeded")
    return Answer("".join(texts) if texts or cut else _text(None), cut, False, *spent)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _spent(content: Mapping[str, Any], *names: str) -> list[int | None]:
    usage = content.get("usage")
    counts = [usage.get(name) if isinstance(usage, Mapping) else None for name in names]
    return [count if type(count) is int and 0 <= count < 1 << 40 else None for count in counts]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the SDKs' line for each request, unless somebody looks for faults."""

    def wanted(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or logging.getLogger(record.name).isEnabledFor(logging.DEBUG)

    for name in _LOGGERS:
        logging.getLogger(name).addFilter(wanted)
    try:
        yield
    finally:
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(wanted)
