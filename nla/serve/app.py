"""The routes of ``nla serve``: a request in, works for the engine, and what comes of them out as JSON or events."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request  # pyright: ignore[reportMissingImports]
from fastapi.exceptions import RequestValidationError  # pyright: ignore[reportMissingImports]
from fastapi.responses import (  # pyright: ignore[reportMissingImports]
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from fastapi.staticfiles import StaticFiles  # pyright: ignore[reportMissingImports]
from starlette.exceptions import HTTPException  # pyright: ignore[reportMissingImports]

from nla.autoencoder import NLA
from nla.baselines import GLOBAL
from nla.errors import ConfigError, NLAError, RequestError
from nla.metrics import cosine, unit
from nla.models.points import context_length
from nla.pair.explanations import Explanation
from nla.serve import schema
from nla.serve.engine import Call, Continue, Engine, Explain, Prepared, Settings, Ticket, Told, Work, leading
from nla.serve.schema import (
    CompareRequest,
    CompareResponse,
    CompletionEvent,
    CompletionRequest,
    CompletionResponse,
    DescribeEvent,
    DescribeRequest,
    DescribeResponse,
    ErrorEvent,
    ExplainEvent,
    ExplainRequest,
    ExplainResponse,
    ExtractRequest,
    ExtractResponse,
    Health,
    Limits,
    PairInfo,
    Pairs,
    ScoreRequest,
    ScoreResponse,
    StartEvent,
    TextEvent,
    TokenizeRequest,
    TokenizeResponse,
    Writing,
)
from nla.serve.security import MAX_BODY_BYTES, Guard
from nla.text.claims import claims

STATIC = Path(__file__).parent / "static"
TIMEOUT_S = 600.0
"""Of one request, from its admission to its last byte."""
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.Error, "description": description}
    for status, description in {
        401: "Without the token.",
        403: "From another site.",
        404: "No such pair or adapter.",
        413: "Too large.",
        422: "Not such a request.",
        429: "Too many at a time: come back after Retry-After.",
        500: "A fault of the server.",
        503: "The server is ending.",
        504: "It took too long.",
    }.items()
}

log = logging.getLogger(__name__)


def make_app(engine: Engine, token: str | None = None, timeout_s: float = TIMEOUT_S) -> Any:
    """The application, for any ASGI server: the engine starts and ends with it.

    Args:
        token: what requests must bring; None: nothing, and only names of this machine are served.
        timeout_s: of one request.
    """

    @asynccontextmanager
    async def life(_app: Any) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="nla serve",
        description="Natural-language autoencoders over HTTP: activations to explanations, and back.",
        version=importlib.metadata.version("nla"),
        lifespan=life,
        docs_url=None,  # pages with scripts from elsewhere
        redoc_url=None,
        responses=ERRORS,
    )
    server = _Server(engine, timeout_s)

    @app.exception_handler(NLAError)
    async def refused(_request: Request, error: NLAError) -> Response:
        return refusal(error, engine)

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, error: Any) -> Response:
        return refusal(invalid(error.errors()), engine)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: Any) -> Response:
        got, expected = f"{request.method} {request.url.path}", "a route of this server"
        return refusal(RequestError(got, expected, "see /openapi.json", status=error.status_code), engine)

    @app.exception_handler(Exception)
    async def broken(_request: Request, error: Exception) -> Response:
        return refusal(error, engine)

    @app.get("/health")
    async def health() -> Health:
        """Whether the server works. Needs no token."""
        limits = Limits(max_body_bytes=MAX_BODY_BYTES, max_waiting=engine.max_waiting, timeout_s=timeout_s)
        version = importlib.metadata.version("nla")
        return Health(status="ok", version=version, waiting=engine.n_admitted, limits=limits)

    @app.get("/pairs")
    async def pairs() -> Pairs:
        """The pairs that are served; the first answers requests that name none."""
        return Pairs(pairs=[_info(name, nla, list(engine.adapters)) for name, nla in engine.pairs.items()])

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counts and times, as Prometheus reads them."""
        return PlainTextResponse(_metrics(engine), media_type="text/plain; version=0.0.4")

    @app.post("/tokenize")
    async def tokenize(request: Request, body: TokenizeRequest) -> TokenizeResponse:
        """The tokens of a text or chat, with the fragments of characters that are several."""
        pair = engine.pair_of(body.pair)
        prepared = await server.called(request, pair, lambda _nla: engine.prepare(pair, body))
        tokens = [schema.Token(**_token(prepared, index)) for index in range(len(prepared.encoded.ids))]
        return TokenizeResponse(text=prepared.encoded.text, prompt_length=len(tokens), tokens=tokens)

    @app.post("/extract")
    async def extract(request: Request, body: ExtractRequest) -> ExtractResponse:
        """The target's activations at the pair's point."""
        done: Explain = await server.result(request, lambda ticket: server.reading(ticket, body))
        assert done.prepared is not None and done.vectors is not None
        norms = done.vectors.norm(dim=1).tolist()
        rows = zip(done.columns, done.vectors.tolist(), norms, strict=True)
        tokens = [
            schema.TokenActivation(**_token(done.prepared, column), activation=vector, l2_norm=norm)
            for column, vector, norm in rows
        ]
        point = engine.pairs[done.pair].point
        return ExtractResponse(pair=done.pair, point=str(point), layer_index=point.layer, tokens=tokens)

    @app.post("/explain", response_model=ExplainResponse)
    async def explain(request: Request, body: ExplainRequest) -> Any:
        """What the activations of a text hold, in words; with `stream` as events, token by token."""
        settings = _settings(body)
        if body.stream:
            return server.events(lambda ticket, tell: server.reading(ticket, body, settings, tell), _explain_event)
        done: Explain = await server.result(request, lambda ticket: server.reading(ticket, body, settings))
        point = engine.pairs[done.pair].point
        results = [schema.ExplainResult(**_result(done, row)) for row in range(len(done.columns))]
        return ExplainResponse(pair=done.pair, point=str(point), layer_index=point.layer, results=results)

    @app.post("/describe", response_model=DescribeResponse)
    async def describe(request: Request, body: DescribeRequest) -> Any:
        """What vectors hold, in words."""
        pair, settings = engine.pair_of(body.pair), _settings(body)
        vectors = _vectors(engine.pairs[pair], body.activations)
        if body.stream:
            return server.events(
                lambda ticket, tell: server.describing(ticket, pair, vectors, settings, body.seed, tell),
                _describe_event,
            )
        done: Explain = await server.result(
            request, lambda ticket: server.describing(ticket, pair, vectors, settings, body.seed)
        )
        results = [schema.Description(**_description(done.explanations[row])) for row in range(len(vectors))]
        return DescribeResponse(pair=pair, results=results)

    @app.post("/compare")
    async def compare(request: Request, body: CompareRequest) -> CompareResponse:
        """What activation a has that b has not: a - b in words."""
        pair, settings = engine.pair_of(body.pair), _settings(body)
        a, b = _vectors(engine.pairs[pair], [body.activation_a, body.activation_b])
        if torch.equal(a, b):
            raise RequestError("two equal activations", "two that differ", "take other tokens", status=422)
        done: Explain = await server.result(
            request, lambda ticket: server.describing(ticket, pair, (a - b)[None], settings, body.seed)
        )
        norm = float((a - b).norm())
        return CompareResponse(pair=pair, diff_norm=norm, **_description(done.explanations[0]))

    @app.post("/score")
    async def score(request: Request, body: ScoreRequest) -> ScoreResponse:
        """How well an explanation rebuilds an activation, beside what rebuilds it without knowing anything."""
        pair = engine.pair_of(body.pair)
        if body.activation is not None:
            (vector,) = _vectors(engine.pairs[pair], [body.activation])
        else:
            asked = ExtractRequest(
                **body.model_dump(exclude={"description", "activation", "position", "before"}),
                positions=[body.position],
            )
            read: Explain = await server.result(request, lambda ticket: server.reading(ticket, asked))
            assert read.vectors is not None
            vector = read.vectors[0]
        figures = await server.called(request, pair, lambda nla: _score(nla, body, vector))
        return ScoreResponse(pair=pair, **figures)

    @app.post("/completion", response_model=CompletionResponse)
    async def completion(request: Request, body: CompletionRequest) -> Any:
        """How the target goes on: as it is, steered, or under a control of equal norm."""

        def work(ticket: Ticket, tell: Callable[[Told], None] | None = None) -> Continue:
            return Continue(
                ticket=ticket,
                pair=engine.pair_of(body.pair),
                tell=tell,
                source=body,
                max_new_tokens=body.completion_tokens,
                temperature=body.temperature,
                seed=body.seed,
                steer=body.steer,
            )

        if body.stream:
            return server.events(work, _completion_event)
        holder: list[Continue] = []

        def kept(ticket: Ticket) -> Continue:
            holder.append(work(ticket))
            return holder[0]

        written: str = await server.result(request, kept)
        return CompletionResponse(**_completed(holder[0], written))

    if (STATIC / "index.html").exists():
        app.mount("/static", StaticFiles(directory=STATIC), name="static")

        @app.get("/", include_in_schema=False)
        async def page() -> Response:
            return FileResponse(STATIC / "index.html")

    return Guard(app, token)


class _Server:
    """What the routes share: admission, waiting, and events."""

    def __init__(self, engine: Engine, timeout_s: float) -> None:
        self.engine, self.timeout_s = engine, timeout_s

    def reading(
        self,
        ticket: Ticket,
        body: ExtractRequest,
        settings: Settings | None = None,
        tell: Callable[[Told], None] | None = None,
    ) -> Explain:
        """The work of /extract and /explain."""
        work = Explain(
            ticket=ticket,
            pair=self.engine.pair_of(body.pair),
            tell=tell,
            source=body,
            positions=body.positions or (),
            steer=body.steer,
            settings=settings,
        )
        if isinstance(body, ExplainRequest):
            work.near, work.reverse, work.seed = body.near, body.reverse, body.seed
        return work

    def describing(
        self,
        ticket: Ticket,
        pair: str,
        vectors: torch.Tensor,
        settings: Settings,
        seed: int,
        tell: Callable[[Told], None] | None = None,
    ) -> Explain:
        """The work of /describe and /compare."""
        return Explain(ticket=ticket, pair=pair, tell=tell, vectors=vectors, settings=settings, seed=seed)

    async def called(self, request: Request, pair: str, function: Callable[[NLA], Any]) -> Any:
        """What a function gives in the worker's thread."""
        return await self.result(request, lambda ticket: Call(ticket=ticket, pair=pair, function=function))

    async def result(self, request: Request, work_of: Callable[[Ticket], Work]) -> Any:
        """Have something done and wait for it, for as long as the client does.

        Raises:
            NLAError: of the work; or it took too long, or there are too many.
        """
        ticket = self.engine.admit()
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            work = work_of(ticket)
            self.engine.begin(work)
            done = asyncio.wrap_future(work.future)
            await asyncio.wait({done, gone}, timeout=self.timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                done.cancel()
                raise _too_long(self.timeout_s)
            return done.result()
        finally:
            gone.cancel()
            ticket.release()

    def events(
        self,
        work_of: Callable[[Ticket, Callable[[Told], None]], Any],
        event_of: Callable[[Engine, Any, Told], Any],
    ) -> Response:
        """Have something done and send what comes of it as server-sent events, the last of which says [DONE]."""
        ticket, loop = self.engine.admit(), asyncio.get_running_loop()
        queue: asyncio.Queue[Told | None] = asyncio.Queue()

        def tell(told: Told | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, told)

        try:
            work = work_of(ticket, tell)
            work.future.add_done_callback(lambda _future: tell(None))
            self.engine.begin(work)
        except BaseException:
            ticket.release()
            raise

        async def lines() -> AsyncIterator[str]:
            try:
                async with asyncio.timeout(self.timeout_s):
                    while (told := await queue.get()) is not None:
                        yield _line(event_of(self.engine, work, told))
                    work.future.result()
                if isinstance(work, Continue):
                    yield _line(CompletionEvent(**_completed(work, work.future.result())))
            except TimeoutError:
                yield _line(_error_event(_too_long(self.timeout_s)))
            except Exception as error:
                yield _line(_error_event(error))
            yield "data: [DONE]\n\n"

        return _Events(lines(), ticket)


class _Events(StreamingResponse):
    """Server-sent events that give their place back however they end, even if they never begin."""

    def __init__(self, lines: AsyncIterator[str], ticket: Ticket) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self.ticket = ticket

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ticket.release()


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _line(event: Any) -> str:
    return f"data: {event.model_dump_json()}\n\n"


def _settings(body: Writing) -> Settings:
    return Settings(body.samples, body.temperature, body.max_new_tokens)


def _vectors(nla: NLA, rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """Vectors (n, d) of a request.

    Raises:
        ShapeError, NonFiniteError: not the pair's width, or beyond float32.
    """
    widths = {len(row) for row in rows}
    if widths != {nla.config.d_model}:
        got = f"activations of width {', '.join(map(str, sorted(widths)))}"
        expected = f"{nla.config.d_model}, the width of {nla.config.target}"
        raise RequestError(got, expected, "take them from /extract of the same pair", status=422)
    return nla.config.check_vectors(torch.tensor(rows, dtype=torch.float32))


def _token(prepared: Prepared, index: int) -> dict[str, Any]:
    span, place = prepared.encoded.spans[index], prepared.places[index]
    token = {
        "token": span.text,
        "token_id": span.token_id,
        "position": span.index,
        "start": span.start,
        "end": span.end,
        "fragment_index": span.fragment - 1,
        "fragment_count": span.fragments,
        "added": span.added,
    }
    if place is not None:
        token |= {"role": place.role, "message_index": place.message, "section": place.section}
    return token


def _description(explanation: Explanation) -> dict[str, Any]:
    mean = explanation.trust.cosine
    return {
        "description": leading(explanation.texts),
        "mse": 2 * (1 - mean),
        "cosine_similarity": mean,
        "samples": [
            {"text": text, "claims": claims(text), "complete": complete, "cosine": one}
            for text, complete, one in zip(explanation.texts, explanation.complete, explanation.cosine, strict=True)
        ],
        "trust": explanation.trust._asdict(),
    }


def _result(work: Explain, row: int) -> dict[str, Any]:
    assert work.prepared is not None and work.vectors is not None
    norm = float(work.vectors[row].norm())
    return {**_token(work.prepared, work.columns[row]), **_description(work.explanations[row]), "l2_norm": norm}


def _completed(work: Continue, written: str) -> dict[str, Any]:
    assert work.prepared is not None
    text = work.prepared.encoded.text + written
    return {
        "pair": work.pair,
        "completion": written,
        "text": text,
        "steered": work.steer is not None,
        "seed": work.seed,
    }


def _explain_event(engine: Engine, work: Explain, told: Told) -> Any:
    if told.row is None:
        assert work.prepared is not None
        positions = [work.columns[row] for row in work.planned]
        return StartEvent(
            pair=work.pair,
            layer_index=engine.pairs[work.pair].point.layer,
            total=len(work.columns),
            prompt_length=len(work.prepared.encoded.ids),
            positions=positions,
        )
    if told.done is None:
        return TextEvent(position=work.columns[told.row], sample=told.sample, text=told.text)
    return ExplainEvent(**_result(work, told.row))


def _describe_event(engine: Engine, work: Explain, told: Told) -> Any:
    if told.row is None:
        layer = engine.pairs[work.pair].point.layer
        return StartEvent(pair=work.pair, layer_index=layer, total=len(work.planned), positions=work.planned)
    if told.done is None:
        return TextEvent(position=told.row, sample=told.sample, text=told.text)
    return DescribeEvent(position=told.row, **_description(told.done))


def _completion_event(engine: Engine, work: Continue, told: Told) -> Any:
    if told.row is None:
        assert work.prepared is not None
        layer, n = engine.pairs[work.pair].point.layer, len(work.prepared.encoded.ids)
        return StartEvent(pair=work.pair, layer_index=layer, total=1, prompt_length=n)
    return TextEvent(position=0, sample=told.sample, text=told.text)


def _score(nla: NLA, body: ScoreRequest, vector: torch.Tensor) -> dict[str, Any]:
    """The figures of /score, in the worker's thread."""
    texts = [body.description, *([] if not body.before else [body.before])]
    rebuilt = nla.decoder.decode(texts)
    knows_nothing = [nla.decoder.decode([""], strict=False)[0]]
    baseline = nla.baselines.get(GLOBAL)
    if baseline is not None:
        knows_nothing.append(baseline.mean)
    reached = float(cosine(vector[None], rebuilt[:1])[0])
    margin = reached - max(float(cosine(vector[None], one[None])[0]) for one in knows_nothing)
    error = float((unit(vector[None]) - unit(rebuilt[:1])).square().sum())
    moved = float(cosine(rebuilt[:1], rebuilt[1:])[0]) if len(rebuilt) > 1 else None
    fve = None if baseline is None else 1 - error / baseline.variance
    return {"mse": 2 * (1 - reached), "cosine_similarity": reached, "margin": margin, "fve": fve, "moved": moved}


def _info(name: str, nla: NLA, adapters: list[str]) -> PairInfo:
    config = nla.config
    return PairInfo(
        name=name,
        target=config.target,
        point=str(nla.point),
        layer_index=nla.point.layer,
        d_model=config.d_model,
        context=context_length(nla.base_of("target")),
        max_new_tokens=config.max_new_tokens,
        chat=bool(nla.tokenizer.chat_template),
        activation_norm=config.activation_norm,
        doubts=nla.doubts,
        metrics=json.loads(json.dumps(nla.metrics, default=str)),
        target_adapters=adapters,
    )


def _metrics(engine: Engine) -> str:
    """Counts as Prometheus's text format."""
    figures = {
        "nla_requests_waiting": engine.n_admitted,
        "nla_request_seconds_mean": engine.mean_s,
        **{f'nla_turns_total{{kind="{kind}"}}': n for kind, n in engine.turns.items()},
    }
    return "".join(f"{name} {value}\n" for name, value in figures.items())


def _too_long(timeout_s: float) -> RequestError:
    got, fix = f"a request that takes more than {timeout_s:g} s", "ask for fewer tokens or samples"
    return RequestError(got, "one that is done in that time", fix, status=504)


def invalid(errors: Sequence[Any]) -> RequestError:
    """What pydantic found wrong, as a typed error."""
    first = errors[0]
    where = ".".join(str(part) for part in first.get("loc", ()) if part != "body") or "the body"
    got = f"{where} = {json.dumps(first.get('input'), default=str)}"
    more = f" ({len(errors) - 1} more are wrong)" if len(errors) > 1 else ""
    expected = str(first.get("msg", "a request of this route")).removeprefix("Value error, ")
    return RequestError(got, expected + more, "see the route's schema in /openapi.json", status=422)


def typed(error: BaseException) -> tuple[NLAError, int]:
    """Any error as a typed one, and its status. What is no fault of the request is logged, not shown."""
    if isinstance(error, RequestError):
        return error, error.status
    if isinstance(error, NLAError):
        return error, 422 if isinstance(error, ValueError | ConfigError) else 500
    log.error("a request failed", exc_info=error)
    fix = "see the server's log, and report it"
    return RequestError("a fault of nla itself", "an answer", fix, status=500), 500


def refusal(error: BaseException, engine: Engine) -> Response:
    """An error as a response."""
    known, status = typed(error)
    headers = {"retry-after": str(engine.retry_after_s)} if status == 429 else {}
    content = {"got": known.got, "expected": known.expected, "fix": known.fix}
    return JSONResponse(content, status_code=status, headers=headers)


def _error_event(error: BaseException) -> ErrorEvent:
    known, _ = typed(error)
    return ErrorEvent(got=known.got, expected=known.expected, fix=known.fix)
