"""The two forms of endpoint: where they are, with which key, how they are asked, and what their answers say.

Keys come from the environment alone and go to one host alone. The providers' own clients make the requests, with their
retries switched off: :mod:`nla.train.asking` counts and spaces them.
"""

from __future__ import annotations

import ipaddress
import os
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from nla.errors import DescriberError, MissingExtraError, visible
from nla.train.describe.describer import DescriberSettings

REFUSED = "the describer refuses"
_LONGEST_NAME = 40
_PART = 6
"""A server's words that hold so many characters of the key in a row are not repeated."""
_HEADERS = {"host", "accept", "accept-encoding", "connection", "content-type", "content-length", "user-agent"}
_HEADERS |= {"anthropic-version", "x-stainless-raw-response"}  # the clients look the last up in the request they sent


class Written(NamedTuple):
    """An answer as an endpoint gives it."""

    text: str
    cut: bool = False
    refused: bool = False
    tokens_in: int | None = None
    tokens_out: int | None = None


class Malformed(ValueError):
    """A body that is no answer of this form."""


@dataclass(frozen=True)
class Form:
    """One form of endpoint."""

    name: str
    url: str
    key_variable: str


FORMS = {
    "openai": Form("openai", "https://api.openai.com/v1", "OPENAI_API_KEY"),
    "anthropic": Form("anthropic", "https://api.anthropic.com", "ANTHROPIC_API_KEY"),
}


class Endpoint(NamedTuple):
    """Where to ask; the name of the key's variable, never the key."""

    form: Form
    url: str
    host: str
    key_variable: str | None


def endpoint_of(settings: DescriberSettings) -> Endpoint:
    """The endpoint that the settings name, checked together with the environment.

    Raises:
        DescriberError: not an http(s) address, one that holds a password or query, plain http with a key to another
            machine, or a variable without a usable key.
    """
    form = FORMS[settings.describer]
    url = (settings.url or form.url).rstrip("/")
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = (parts.hostname or "").lower(), parts.port
    except ValueError:
        parts, host = urllib.parse.urlsplit(""), ""
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc or parts.query or parts.fragment:
        raise DescriberError(
            "a describer's address that is not one, or that holds a name, a password or a query",
            "a plain http or https address such as http://localhost:8000/v1",
            "correct describer.url; a key belongs into an environment variable that describer.key_variable names",
        )
    variable = settings.key_variable or (form.key_variable if url == form.url else None)
    if variable is not None:
        read_key(variable)
        if parts.scheme == "http" and not is_loopback(host):
            raise DescriberError(
                f"the describer {visible(host)[:80]} over plain http with the key in {shown_variable(variable)}",
                "https: anyone on the way could read the key",
                "use https, or set describer.key_variable to null",
            )
    return Endpoint(form, url, host, variable)


def read_key(variable: str) -> str:
    """The key in an environment variable.

    Raises:
        DescriberError: it is not set, or holds what cannot be sent; the message never shows it.
    """
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        got = f"no usable key in {shown_variable(variable)}"
        raise DescriberError(got, "a key of printable ASCII", "export the variable with the key, and run again")
    return key


def shown_variable(variable: str) -> str:
    """A variable's name for a message, where it looks like one: many a key has the form of a name, too.

    >>> shown_variable("OPENAI_API_KEY")
    'the environment variable OPENAI_API_KEY'
    >>> shown_variable("gsk_0123abcd")
    'the environment variable that describer.key_variable names'
    """
    usual = re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*", variable) and len(variable) <= _LONGEST_NAME
    return f"the environment variable {variable if usual else 'that describer.key_variable names'}"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_client(endpoint: Endpoint, settings: DescriberSettings) -> Any:
    """The provider's client, which holds the key: it lives as long as one run, and nothing else keeps it.

    Raises:
        MissingExtraError: the provider's package is not installed.
    """
    try:
        if endpoint.form.name == "openai":
            import openai as package  # pyright: ignore[reportMissingImports]

            kind: Any = package.AsyncOpenAI
        else:
            import anthropic as package  # pyright: ignore[reportMissingImports]

            kind = package.AsyncAnthropic
    except ImportError as error:
        got = f"the describer {endpoint.form.name} without the package {endpoint.form.name}"
        raise MissingExtraError(got, "the extra 'describe'", "pip install 'nla[describe]'") from error
    key = None if endpoint.key_variable is None else read_key(endpoint.key_variable)
    # A redirect could carry the key and the texts to another host, and so could a proxy on the way to this machine.
    direct: dict[str, Any] = {"trust_env": False, "mounts": dict.fromkeys(("http://", "https://", "all://"))}
    connections = package.DefaultAsyncHttpxClient(
        follow_redirects=False,
        timeout=settings.timeout_s,
        # Where no TLS is spoken no certificates are loaded, which takes longer than a request.
        verify=urllib.parse.urlsplit(endpoint.url).scheme != "http",
        event_hooks={"request": [_only_what_is_needed(endpoint.host, key)]},
        **(direct if is_loopback(endpoint.host) else {}),
    )
    return kind(
        api_key=key or "none",  # not None, which makes clients look for keys of their own; the hook takes it off again
        base_url=endpoint.url,
        max_retries=0,
        timeout=settings.timeout_s,
        http_client=connections,
    )


def _only_what_is_needed(host: str, key: str | None) -> Any:
    """A hook that lets a request out to one host only, without the headers that clients gather from the environment."""

    async def hook(request: Any) -> None:
        if request.url.host.lower().strip("[]") != host:
            raise ConnectionError("a request to another host")
        for name in list(request.headers):
            if name.lower() == "authorization" and key is not None:
                request.headers[name] = f"Bearer {key}"
            elif name.lower() == "x-api-key" and key is not None:
                request.headers[name] = key
            elif name.lower() not in _HEADERS:
                del request.headers[name]

    return hook


async def send(client: Any, endpoint: Endpoint, settings: DescriberSettings, prompt: str) -> bytes:
    """The body of the answer to one prompt, as it came; errors are the client's own."""
    request: dict[str, Any] = {"model": settings.model, "messages": [{"role": "user", "content": prompt}]}
    if settings.temperature is not None:  # not an argument of every client, since not every model takes one
        request["extra_body"] = {"temperature": settings.temperature}
    # OpenAI's own newer models know the limit under its new name only; most other servers under the old one only.
    new = endpoint.form.name == "openai" and endpoint.url == endpoint.form.url
    request["max_completion_tokens" if new else "max_tokens"] = settings.max_tokens
    where = client.chat.completions if endpoint.form.name == "openai" else client.messages
    return (await where.with_raw_response.create(**request)).http_response.content


def read_body(form: Form, body: bytes) -> Written:
    """What an endpoint's answer says.

    Raises:
        Malformed: not JSON, or not of this form.
    """
    # Comes with both clients; deep nesting is an error to it, where json would run into the limit of recursion.
    from pydantic_core import from_json

    try:
        content = from_json(body)
    except ValueError:
        raise Malformed("not JSON") from None
    if not isinstance(content, Mapping):
        raise Malformed("not an object")
    usage = content.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    return (_read_openai if form.name == "openai" else _read_anthropic)(content, usage)


def said_by(error: Exception, endpoint: Endpoint) -> str:
    """What the server says in an error, if nothing of it could be a part of the key; empty where it may name one."""
    body: Any = getattr(error, "body", None)
    body = body.get("error", body) if isinstance(body, Mapping) else None
    said = body.get("message") if isinstance(body, Mapping) else None
    if not isinstance(said, str) or getattr(error, "status_code", 0) in (401, 403):
        return ""
    key = "" if endpoint.key_variable is None else os.environ.get(endpoint.key_variable, "").strip()
    parts = {key[start : start + _PART] for start in range(max(1, len(key) - _PART + 1))} - {""}
    return "" if any(part in said for part in parts) else visible(said)[:160]


def _read_openai(content: Mapping[str, Any], usage: Mapping[str, Any]) -> Written:
    choices = content.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or not isinstance(message, Mapping):
        raise Malformed("no choices")
    spent = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    reason = choice.get("finish_reason")
    if reason == "content_filter" or (isinstance(message.get("refusal"), str) and message["refusal"]):
        return Written("", False, True, *spent)
    text, cut = message.get("content"), reason == "length"
    if not isinstance(text, str):
        if not cut:
            raise Malformed("no text")
        text = ""  # a model that thought until it was cut has written nothing
    return Written(text, cut, False, *spent)


def _read_anthropic(content: Mapping[str, Any], usage: Mapping[str, Any]) -> Written:
    blocks, reason = content.get("content"), content.get("stop_reason")
    spent = _count(usage, "input_tokens"), _count(usage, "output_tokens")
    if reason == "refusal":
        return Written("", False, True, *spent)
    if not isinstance(blocks, list) or not all(isinstance(block, Mapping) for block in blocks):
        raise Malformed("no content")
    texts = [block.get("text") for block in blocks if block.get("type") == "text"]
    cut = reason in ("max_tokens", "model_context_window_exceeded")
    if not all(isinstance(text, str) for text in texts) or not (texts or cut):
        raise Malformed("no text")
    return Written("".join(map(str, texts)), cut, False, *spent)


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if type(value) is int and 0 <= value < 1 << 40 else None
