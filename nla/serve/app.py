"""The routes of ``nla serve``: a request in, works for the engine, and what comes of them out as JSON or events."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Literal

import torch
from fastapi import FastAPI, Request  # pyright: ignore[reportMissingImports]
from fastapi.exceptions import RequestValidationError  # pyright: ignore[reportMissingImports]
from fastapi.responses import (  # pyright: ignore[reportMissingImports]
    JSONResponse,
    Response,
    StreamingResponse,
)
from jaxtyping import Float
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException  # pyright: ignore[reportMissingImports]
from torch import Tensor

from nla.autoencoder import NLA
from nla.errors import NLAError, RequestError
from nla.serve import answers, schema
from nla.serve.engine import Engine
from nla.serve.metrics import Measured
from nla.serve.page import add_page
from nla.serve.schema import (
    CompareRequest,
    CompareResponse,
    CompletionRequest,
    CompletionResponse,
    DescribeRequest,
    DescribeResponse,
    ExplainRequest,
    ExplainResponse,
    ExtractRequest,
    ExtractResponse,
    Health,
    Limits,
    Pairs,
    ScoreRequest,
    ScoreResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from nla.serve.security import MAX_BODY_BYTES, Guard
from nla.serve.works import Call, Continue, Explain, Settings, Ticket, Told, Work

TIMEOUT_S = 600.0
"""Of one request, from its admission to its last byte."""
MAX_LAG = 1000
"""Events that wait for a slow client, before texts that are still being written are left out."""
ENDING_S = 1
"""How long responses may go on when the server ends."""
STATUSES = {
    401: "Without the token.",
    403: "From another site, or under another name.",
    404: "No such pair, adapter or route.",
    413: "Too large.",
    422: "Not a request of this route.",
    429: "Too many at a time: come back after Retry-After seconds.",
    500: "A fault of the server.",
    503: "The server is ending.",
    504: "It took too long.",
}
EVENTS: dict[str, list[type[schema.Wire]]] = {
    "/explain": [schema.StartEvent, schema.TextEvent, schema.ExplainEvent, schema.ErrorEvent],
    "/describe": [schema.StartEvent, schema.TextEvent, schema.DescribeEvent, schema.ErrorEvent],
    "/completion": [schema.StartEvent, schema.TextEvent, schema.CompletionEvent, schema.ErrorEvent],
}
"""What the lines after `data: ` hold where a route streams, but for the last, which is [DONE]."""

Tell = Callable[[Told], None]


def make_app(engine: Engine, token: str | None = None, timeout_s: float = TIMEOUT_S) -> Any:
    """The application, for any ASGI server; the engine starts and ends with it.

    Args:
        token: what requests must bring; None: nothing, and only names of this machine are served.
        timeout_s: of one request.
    """

    @contextlib.asynccontextmanager
    async def life(_app: Any) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(engine.close)

    version = importlib.metadata.version("nla")
    limits = Limits(max_body_bytes=MAX_BODY_BYTES, max_waiting=engine.max_waiting, timeout_s=timeout_s)
    known = [answers.described_pair(name, nla, list(engine.adapters)) for name, nla in engine.pairs.items()]
    app = FastAPI(
        title="nla serve",
        summary="Natural-language autoencoders over HTTP: activations to explanations, and back.",
        version=version,
        lifespan=life,
        docs_url=None,  # pages whose scripts come from elsewhere
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        responses={status: {"model": schema.Error, "description": said} for status, said in STATUSES.items()},
    )
    server = _Server(engine, timeout_s)
    measured = Measured(app, engine)

    @app.exception_handler(NLAError)
    @app.exception_handler(Exception)
    async def failed(_request: Request, error: Exception) -> Response:
        return server.refusal(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, error: Any) -> Response:
        return server.refusal(answers.invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: Any) -> Response:
        got, fix = f"{request.method} {request.url.path} ({error.detail})", "see /openapi.json"
        return server.refusal(RequestError(got, "a route of this server", fix, status=error.status_code))

    @app.get("/health")
    async def health() -> Health:
        """Whether the server works, and how much it has to do. Needs no token."""
        if not engine.alive:
            raise RequestError("a server whose worker has ended", "one that works", "start nla serve again", status=503)
        return Health(status="ok", version=version, waiting=engine.n_admitted, limits=limits)

    @app.get("/pairs")
    async def pairs() -> Pairs:
        """The pairs that are served; the first answers requests that name none."""
        return Pairs(pairs=known)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counts and times, in Prometheus's text format."""
        return Response(measured.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/tokenize")
    async def tokenize(request: Request, body: TokenizeRequest) -> TokenizeResponse:
        """The tokens of a text or chat, and which part of how many each is where several share a character."""
        pair = engine.pair_of(body.pair)
        return answers.tokenized(await server.called(request, pair, lambda _nla: engine.prepare(pair, body)))

    @app.post("/extract")
    async def extract(request: Request, body: ExtractRequest) -> ExtractResponse:
        """The target's activations of a text or chat at the pair's point."""
        done = await server.done(request, server.reading(body))
        return answers.extracted(done, engine.pairs[done.pair].point)

    @app.post("/explain", response_model=ExplainResponse, responses=_streams("/explain"))
    async def explain(request: Request, body: ExplainRequest) -> Any:
        """What the activations of a text or chat hold, in words; streamed, token by token."""
        if body.stream:
            return server.events(server.reading(body))
        done = await server.done(request, server.reading(body))
        point = engine.pairs[done.pair].point
        results = [schema.ExplainResult(**answers.explained(done, row)) for row in range(len(done.columns))]
        return ExplainResponse(pair=done.pair, point=str(point), layer_index=point.layer, results=results)

    @app.post("/describe", response_model=DescribeResponse, responses=_streams("/describe"))
    async def describe(request: Request, body: DescribeRequest) -> Any:
        """What vectors hold, in words."""
        pair = engine.pair_of(body.pair)
        work = server.describing(pair, _vectors(engine.pairs[pair], body.activations), body)
        if body.stream:
            return server.events(work)
        done = await server.done(request, work)
        results = [schema.Description(**answers.description(done.explanations[row])) for row in done.planned]
        return DescribeResponse(pair=pair, results=results)

    @app.post("/compare")
    async def compare(request: Request, body: CompareRequest) -> CompareResponse:
        """What one activation has that another has not: a - b in words."""
        pair = engine.pair_of(body.pair)
        a, b = _vectors(engine.pairs[pair], [body.activation_a, body.activation_b])
        if torch.equal(a, b):
            raise RequestError("two equal activations", "two that differ", "take another token", status=422)
        done = await server.done(request, server.describing(pair, (a - b)[None], body))
        norm = float((a - b).norm())
        return CompareResponse(pair=pair, diff_norm=norm, **answers.description(done.explanations[0]))

    @app.post("/score")
    async def score(request: Request, body: ScoreRequest) -> ScoreResponse:
        """How well an explanation rebuilds an activation, beside what knows nothing of it."""
        pair = engine.pair_of(body.pair)
        if body.activation is not None:
            (vector,) = _vectors(engine.pairs[pair], [body.activation])
        else:
            named = body.model_dump(include=set(schema.Read.model_fields))
            read = await server.done(request, server.reading(ExtractRequest(**named, positions=[body.position])))
            assert read.vectors is not None
            (vector,) = read.vectors
        figures = await server.called(
            request, pair, lambda nla: answers.scored(nla, vector, body.description, body.before)
        )
        return ScoreResponse(pair=pair, **figures)

    @app.post("/completion", response_model=CompletionResponse, responses=_streams("/completion"))
    async def completion(request: Request, body: CompletionRequest) -> Any:
        """How the target goes on: as it is, steered, or under a control of equal norm."""
        if body.stream:
            return server.events(server.continuing(body))
        return CompletionResponse(**answers.completed(await server.done(request, server.continuing(body))))

    add_page(app)
    stated = app.openapi

    def openapi() -> dict[str, Any]:
        """The schema, with what FastAPI does not know: events, and the ways in which a token is brought."""
        if app.openapi_schema is None:
            events = sorted({model for models in EVENTS.values() for model in models}, key=lambda model: model.__name__)
            sent: list[tuple[type[schema.Wire], Literal["serialization"]]] = [(one, "serialization") for one in events]
            _, found = models_json_schema(sent, ref_template="#/components/schemas/{model}")
            components = stated()["components"]
            components["schemas"] = dict(sorted({**found["$defs"], **components["schemas"]}.items()))
            components["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-SECRET-KEY"},
            }
            stated()["security"] = [{}, {"bearer": []}, {"key": []}]
        return stated()

    app.openapi = openapi
    return Guard(measured, token)


def serve(engine: Engine, listener: socket.socket, token: str | None = None) -> None:
    """Serve at a socket that listens, until Ctrl-C or SIGTERM: works that are done then stop at their next token."""
    import uvicorn  # pyright: ignore[reportMissingImports]

    class Server(uvicorn.Server):
        """A server whose responses do not wait for the engine when it ends."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            engine.stop()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        make_app(engine, token),
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=ENDING_S,
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn ends in order, and passes the signal on after it
        Server(config).run(sockets=[listener])


class _Server:
    """What the routes share: works of requests, admission, waiting, and events."""

    def __init__(self, engine: Engine, timeout_s: float) -> None:
        self.engine, self.timeout_s = engine, timeout_s

    def reading(self, body: ExtractRequest) -> Callable[[Ticket], Explain]:
        """The work of /extract and /explain."""
        pair = self.engine.pair_of(body.pair)
        settings: Settings | None = None
        order: dict[str, Any] = {}
        if isinstance(body, ExplainRequest):
            settings = Settings(body.samples, body.temperature, body.max_new_tokens)
            order = {"near": body.near, "reverse": body.reverse, "seed": body.seed}
        return lambda ticket: Explain(
            ticket=ticket,
            pair=pair,
            source=body,
            positions=body.positions or (),
            steer=body.steer,
            settings=settings,
            **order,
        )

    def describing(
        self, pair: str, vectors: Float[Tensor, "n d"], body: schema.Sampling
    ) -> Callable[[Ticket], Explain]:
        """The work of /describe and /compare."""
        settings = Settings(body.samples, body.temperature, body.max_new_tokens)
        return lambda ticket: Explain(ticket=ticket, pair=pair, vectors=vectors, settings=settings, seed=body.seed)

    def continuing(self, body: CompletionRequest) -> Callable[[Ticket], Continue]:
        """The work of /completion."""
        pair = self.engine.pair_of(body.pair)
        return lambda ticket: Continue(
            ticket=ticket,
            pair=pair,
            source=body,
            max_new_tokens=body.completion_tokens,
            temperature=body.temperature,
            seed=body.seed,
            steer=body.steer,
        )

    async def called(self, request: Request, pair: str, function: Callable[[NLA], Any]) -> Any:
        """What a function gives in the worker's thread."""
        done = await self.done(request, lambda ticket: Call(ticket=ticket, pair=pair, function=function))
        return done.future.result()

    async def done(self, request: Request, work_of: Callable[[Ticket], Any]) -> Any:
        """The work when it is done. It is given up when the client goes, or after ``timeout_s``.

        Raises:
            NLAError: there are too many, it took too long, or what the work itself raises.
        """
        ticket = self.engine.admit()
        gone = asyncio.ensure_future(_disconnected(request.receive))
        try:
            work: Work = work_of(ticket)
            self.engine.begin(work)
            result = asyncio.wrap_future(work.future)
            await asyncio.wait({result, gone}, timeout=self.timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                result.cancel()
                raise _gone() if gone.done() else self._too_long()
            result.result()
            return work
        finally:
            gone.cancel()
            ticket.release()

    def events(self, work_of: Callable[[Ticket], Any]) -> Response:
        """What comes of a work as server-sent events, the last of which says [DONE].

        Raises:
            NLAError: there are too many.
        """
        ticket, loop = self.engine.admit(), asyncio.get_running_loop()
        queue: asyncio.Queue[Told | None] = asyncio.Queue()

        def tell(told: Told | None) -> None:
            if told is not None and told.text and queue.qsize() > MAX_LAG:
                return  # a later one says more
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(queue.put_nowait, told)

        try:
            work: Explain | Continue = work_of(ticket)
            work.tell = tell
            work.future.add_done_callback(lambda _future: tell(None))
            self.engine.begin(work)
        except BaseException:
            ticket.release()
            raise
        point = self.engine.pairs[work.pair].point

        async def lines() -> AsyncIterator[str]:
            ends = loop.time() + self.timeout_s
            try:
                while (told := await asyncio.wait_for(queue.get(), ends - loop.time())) is not None:
                    yield _line(answers.event(work, told, point))
                work.future.result()
                if isinstance(work, Continue):
                    yield _line(schema.CompletionEvent(**answers.completed(work)))
            except Exception as error:
                said, _ = answers.typed(self._too_long() if isinstance(error, TimeoutError) else error)
                yield _line(schema.ErrorEvent(**said.model_dump()))
            yield "data: [DONE]\n\n"

        return _Events(lines(), ticket)

    def refusal(self, error: BaseException) -> Response:
        """An error as a response."""
        said, status = answers.typed(error)
        headers = {"retry-after": str(self.engine.retry_after_s)} if status == 429 else {}
        return JSONResponse(said.model_dump(), status_code=status, headers=headers)

    def _too_long(self) -> RequestError:
        got, fix = f"a request that takes more than {self.timeout_s:g} s", "ask for fewer tokens or samples"
        return RequestError(got, "one that is done in that time", fix, status=504)


class _Events(StreamingResponse):
    """Server-sent events whose work ends with the connection, and whose place is given back however they end."""

    def __init__(self, lines: AsyncIterator[str], ticket: Ticket) -> None:
        super().__init__(lines, media_type="text/event-stream")
        self.ticket = ticket

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # Starlette itself, by the version of ASGI, may see that a client has gone only at the next event.
        sent, gone = asyncio.ensure_future(self.stream_response(send)), asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sent, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.ticket.release()
            sent.cancel()
            gone.cancel()
            await asyncio.gather(sent, gone, return_exceptions=True)
        if not sent.cancelled():
            sent.result()


def _line(event: schema.Wire) -> str:
    return f"data: {event.model_dump_json()}\n\n"


def _streams(route: str) -> dict[int | str, dict[str, Any]]:
    """What the schema says of a route that can stream."""
    events = {"oneOf": [{"$ref": f"#/components/schemas/{model.__name__}"} for model in EVENTS[route]]}
    said = "With `stream`: lines `data: EVENT`, and at the end `data: [DONE]`."
    return {200: {"description": said, "content": {"text/event-stream": {"schema": events}}}}


def _gone() -> RequestError:
    """Read by nobody but the counts."""
    return RequestError("a client that has gone", "one that waits", "send it again", status=499)


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _vectors(nla: NLA, rows: Sequence[Sequence[float]]) -> Float[Tensor, "n d"]:
    """Vectors of a request.

    Raises:
        RequestError: not the pair's width, or of length zero.
        NonFiniteError: beyond float32.
    """
    width = nla.config.d_model
    wrong = next((len(row) for row in rows if len(row) != width), None)
    if wrong is not None:
        got, expected = f"an activation of width {wrong}", f"{width}, the width of {nla.config.target}"
        raise RequestError(got, expected, "take it from /extract of the same pair", status=422)
    vectors = nla.config.check_vectors(torch.tensor(rows, dtype=torch.float32))
    if not vectors.norm(dim=1).all():
        raise RequestError("an activation of length zero", "one with a direction", "leave it out", status=422)
    return vectors
