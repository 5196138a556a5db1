"""A real HTTP server on loopback that answers in both forms of endpoint, and misbehaves as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nla.train.describe.client import EndpointDescriber
from nla.train.describe.describer import DescriberSettings
from nla.train.describe.texts import Described, describe_texts

FORMS = ("openai", "anthropic")
CUT_REASON = {"openai": {"finish": "length"}, "anthropic": {"stop": "max_tokens"}}
CLAIMS = "<{tag}>It is a note about item {item}. A verb comes next. The final token is a number.</{tag}>"
SECRET = "sk-test-0123456789abcdef"
USAGE = (120, 30)
Asked = dict[str, Any]


def item_of(prompt: str) -> str:
    """The number that the prefix of a prompt ends with; the text's own mark."""
    found = re.search(r"item (\d+)</passage", prompt)
    return found[1] if found else "0"


def text_of(item: object) -> str:
    """The explanation that the server gives of a prefix which ends with an item."""
    return CLAIMS.format(tag="x", item=item)[3:-4]


def openai_body(text: object, finish: str | None = "stop", usage: Any = USAGE, **message: Any) -> bytes:
    spent = {"prompt_tokens": usage[0], "completion_tokens": usage[1]} if isinstance(usage, tuple) else usage
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": spent}).encode()


def anthropic_body(text: object, stop: str | None = "end_turn", usage: Any = USAGE, **content: Any) -> bytes:
    spent = {"input_tokens": usage[0], "output_tokens": usage[1]} if isinstance(usage, tuple) else usage
    blocks = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": text}]
    body = {"id": "1", "type": "message", "content": blocks, "stop_reason": stop, "usage": spent, **content}
    return json.dumps(body).encode()


@dataclass
class Act:
    """What the server does with one request."""

    name: str = "good"
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    wait_s: float = 0.0
    drip: bool = False
    """Send the body byte by byte, without an end."""
    cut: int = 0
    """Bytes that the header announces and that are never sent."""
    reset: bool = False


class Server:
    """Answers well, but for the requests of which ``plan`` says otherwise; remembers all of them."""

    def __init__(self, form: str = "openai", plan: Callable[[str, int], Act | None] | None = None) -> None:
        """``plan`` gets an item and how often it has been asked about before."""
        self.form, self.plan = form, plan or (lambda item, before: None)
        self.asked: list[tuple[dict[str, str], Asked]] = []
        self.keep_asked = True
        self.per_item: Counter[str] = Counter()
        self.acts: Counter[str] = Counter()
        self.n_now, self.n_most = 0, 0
        self._ready = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._main, daemon=True)

    def __enter__(self) -> Server:
        package = importlib.import_module(f"{self.form}._base_client")  # here: the import takes seconds
        package.INITIAL_RETRY_DELAY = 0.001  # waits too short to notice, in tests alone
        self.thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._end.set)
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}" + ("/v1" if self.form == "openai" else "")

    @property
    def n_requests(self) -> int:
        return self.acts.total()

    @property
    def n_bad(self) -> int:
        return self.acts.total() - self.acts["good"]

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._one(reader, writer):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
        asked = json.loads(await reader.readexactly(int(headers["content-length"])))
        assert first.split()[1] == ("/v1/chat/completions" if self.form == "openai" else "/v1/messages")
        prompt = asked["messages"][0]["content"]
        item = item_of(prompt)
        act = self.plan(item, self.per_item[item]) or Act()
        self.per_item[item] += 1
        self.acts[act.name] += 1
        if self.keep_asked:
            self.asked.append((headers, asked))
        self.n_now += 1
        self.n_most = max(self.n_most, self.n_now)
        try:
            return await self._perform(act, prompt, writer)
        finally:
            self.n_now -= 1

    async def _perform(self, act: Act, prompt: str, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(act.wait_s)
        if act.reset:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return False
        body = self.good(prompt) if act.body is None else act.body
        fields = {"Content-Type": "application/json", "Content-Length": str(len(body) + act.cut), **act.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"HTTP/1.1 {act.status} Any\r\n{head}\r\n".encode())
        if act.drip:
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.write(body)
        await writer.drain()
        return not act.cut

    def good(self, prompt: str) -> bytes:
        found = re.search(r"between <(claims[^>]*)>", prompt)
        return self.body_of(CLAIMS.format(tag=found[1] if found else "claims", item=item_of(prompt)))

    def body_of(self, text: object, **more: Any) -> bytes:
        """The body of an answer in the server's form."""
        return (openai_body if self.form == "openai" else anthropic_body)(text, **more)


def prefixes(n: int) -> list[str]:
    """Texts that end with their own item."""
    return [f"A list of things, and then item {i}" for i in range(n)]


def describer(server: Server, **changes: Any) -> EndpointDescriber:
    """One that asks the server."""
    defaults: dict[str, Any] = dict(
        describer=server.form, model="m", url=server.url, concurrency=8, timeout_s=5.0, failing_share=0.9
    )
    return EndpointDescriber(DescriberSettings(**{**defaults, **changes}))


def described(server: Server, folder: Path, n: int = 3, **changes: Any) -> Described:
    """What comes of the first prefixes."""
    return describe_texts(prefixes(n), describer(server, **changes), folder)


def first_time(act: Act, item: str = "1") -> Callable[[str, int], Act | None]:
    """A plan that misbehaves the first time that an item is asked about."""
    return lambda asked, before: act if asked == item and before == 0 else None
