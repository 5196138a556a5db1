"""The page of ``nla serve``: its files, and what it asks for beyond the API."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request  # pyright: ignore[reportMissingImports]
from fastapi.responses import FileResponse, HTMLResponse, Response  # pyright: ignore[reportMissingImports]
from fastapi.staticfiles import StaticFiles  # pyright: ignore[reportMissingImports]
from pydantic import Field

from nla.errors import TranscriptError
from nla.serve.schema import MAX_CHARACTERS, MAX_MESSAGES, ExplainEvent, Message, Wire
from nla.transcripts.files import SUFFIXES, load_transcripts
from nla.transcripts.messages import Transcript
from nla.views import pages, tokens

STATIC = Path(__file__).parent / "static"
SHARED = ("base.css", "tokens.css")
"""Style sheets that the page shares with every HTML file of ours."""
MAX_TRANSCRIPTS = 200
"""Of one file; more would make its menu long and the page slow."""


class HtmlRequest(Wire):
    """Explained tokens of a text, to be one HTML file."""

    title: str = Field(max_length=1024)
    text: str = Field(max_length=4 * MAX_CHARACTERS)
    results: list[ExplainEvent]
    remarks: list[str] = Field([], max_length=64)


class Conversation(Wire):
    """A conversation of a file."""

    id: str
    messages: list[Message]


class Opened(Wire):
    """The conversations of a file."""

    transcripts: list[Conversation]
    remarks: list[str] = Field(description="What of the file is not shown.")


def add_page(app: FastAPI) -> None:
    """The page's routes. They are no part of the API, and its schema does not hold them."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html")

    for name in SHARED:
        app.get(f"/static/views/{name}", include_in_schema=False)(_style(name))
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.post("/page/html", include_in_schema=False)
    async def html(body: HtmlRequest) -> Response:
        return HTMLResponse(await asyncio.to_thread(_html, body))

    @app.post("/page/transcripts", include_in_schema=False)
    async def transcripts(request: Request, name: str) -> Opened:
        return await asyncio.to_thread(_opened, name, await request.body())


def _style(name: str) -> Any:
    async def style() -> Response:
        return Response(pages.css(name), media_type="text/css")

    return style


def _html(body: HtmlRequest) -> str:
    """The token view as one file, as `nla explain --html` writes it."""
    results = sorted(body.results, key=lambda one: one.position)
    notes = [
        tokens.Note(
            one.token,
            (one.start, one.end),
            (one.fragment_index + 1, one.fragment_count),
            0,
            tokens.trust_figures(one.trust.cosine, one.trust.agreement, one.trust.margin),
            one.trust.level,
            [tokens.Sample(sample.text, sample.cosine, sample.complete) for sample in one.samples],
        )
        for one in results
    ]
    return tokens.page([body.text], notes, body.title, f"{len(notes)} activations", body.remarks)


def _opened(name: str, content: bytes) -> Opened:
    """The conversations in a file that was sent.

    Raises:
        TranscriptError, MissingExtraError: see :func:`nla.transcripts.files.load_transcripts`.
    """
    suffix = Path(name).suffix.lower()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix if suffix in SUFFIXES else ''}"
        path.write_bytes(content)
        try:
            found = list(load_transcripts(path))
        except TranscriptError as error:
            said = [part.replace(str(path), name) for part in (error.got, error.expected, error.fix)]
            raise TranscriptError(*said) from error
    remarks = []
    if len(found) > MAX_TRANSCRIPTS:
        remarks.append(f"The first {MAX_TRANSCRIPTS} of {len(found)} conversations are listed.")
    if any(message.calls for one in found for message in one.messages):
        remarks.append("Tool calls are left out.")
    if any(len(one.messages) > MAX_MESSAGES for one in found):
        remarks.append(f"Of long conversations the first {MAX_MESSAGES} messages are listed.")
    return Opened(transcripts=[_conversation(one) for one in found[:MAX_TRANSCRIPTS]], remarks=remarks)


def _conversation(transcript: Transcript) -> Conversation:
    messages = [
        Message(role=message.role, content=str(message.for_template()["content"])[:MAX_CHARACTERS], channel=None)
        for message in transcript.messages[:MAX_MESSAGES]
    ]
    return Conversation(id=transcript.id, messages=messages)
