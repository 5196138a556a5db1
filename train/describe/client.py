"""Asking an endpoint: many requests at once, faults waited out and counted, a budget that is never exceeded."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import logging
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from nla.errors import BudgetError, DescriberError, NLAError, visible
from nla.train.describe.describer import CHARS_PER_TOKEN, DescriberSettings, Reply
from nla.train.describe.endpoint import (
    REFUSED,
    Endpoint,
    Malformed,
    endpoint_of,
    open_client,
    read_body,
    said_by,
    send,
    shown_variable,
)
from nla.train.describe.prompt import CUT, Question

PASSING = (408, 409, 425, 429)
"""Statuses, beside 500 and above, after which the same request may well succeed."""
LONGEST_WAIT_S = 60.0
LONGEST_ASKED_WAIT_S = 600.0
"""A server that asks for a longer wait than this is not waited for."""
_ABOUT_THE_TEXT = ("content_filter", "content_policy_violation", "context_length_exceeded")
_NOTHING_LEFT = ("insufficient_quota", "billing_error", "billing_hard_limit_reached")
_OVERHEAD_TOKENS = 100
"""What a chat template may add to a prompt."""


class Fault(NamedTuple):
    """What went wrong with one request."""

    cause: str
    passing: bool
    wait_s: float | None = None
    """How long the server asks to wait."""
    charged: bool = False
    """Whether the endpoint may have charged for it."""
    about_text: bool = False
    """Another text may well succeed."""
    answered: bool = False
    """The endpoint did answer, only not well: there is nothing to wait for."""


@dataclass
class EndpointDescriber:
    """Asks an endpoint of a known form; see :class:`nla.train.describers.Describer`."""

    settings: DescriberSettings
    backoff_s: float = 1.0
    """First wait after a fault; it doubles with each try, up to a minute, and is shortened at random by up to half."""

    def __post_init__(self) -> None:
        self.endpoint: Endpoint = endpoint_of(self.settings)
        self.counted_by = f"characters / {CHARS_PER_TOKEN}"
        self.together = 1

    @property
    def identity(self) -> Mapping[str, Any]:
        """Form, address, model, temperature, seed; not the limit of tokens, since cut answers are not kept."""
        s = self.settings
        return {
            "describer": s.describer,
            "url": self.endpoint.url,
            "model": s.model,
            "temperature": s.temperature,
            "seed": s.seed,
        }

    def count(self, text: str) -> int:
        """Characters / 4."""
        return math.ceil(len(text) / CHARS_PER_TOKEN)

    def ask(self, questions: Iterator[Question], stop: Callable[[], bool]) -> Iterator[Reply]:
        """See :meth:`nla.train.describers.Describer.ask`. Requests are made in a thread with an event loop of its own.

        So this works inside a running event loop too, and a slow reader holds no request up.
        """
        run = _Run(self, questions)
        thread = threading.Thread(target=run.main, name="nla-describer", daemon=True)
        thread.start()
        try:
            while True:
                if stop():
                    run.halt()
                try:
                    reply = run.replies.get(timeout=0.1)
                except queue.Empty:
                    continue
                if reply is None:
                    break
                yield reply
        finally:
            run.abort()
            thread.join()
        if run.error is not None:
            raise run.error


class _Run:
    """One run of requests, in one thread."""

    def __init__(self, describer: EndpointDescriber, questions: Iterator[Question]) -> None:
        self.settings, self.endpoint, self.backoff_s = describer.settings, describer.endpoint, describer.backoff_s
        self.questions = questions
        self.replies: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self.error: BaseException | None = None
        self.random = random.Random()  # jitter must differ between processes that are turned away together
        self.not_before = 0.0
        self.n_in_a_row = 0
        self.spent, self.reserved, self.n_reserved = 0.0, 0.0, 0
        self.loop = asyncio.new_event_loop()
        self.halted, self.settled = asyncio.Event(), asyncio.Condition()
        self.task: asyncio.Task[None] | None = None

    def main(self) -> None:
        """Run to the end; errors are kept for the reader, and the queue always ends with None."""
        try:
            with _quiet(), asyncio.Runner(loop_factory=lambda: self.loop) as runner:
                runner.run(self._ask_all())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self.error = self.error or error
        finally:
            self.replies.put(None)

    def halt(self) -> None:
        """Make no new request; those under way go on."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: there is nothing left to stop
            self.loop.call_soon_threadsafe(self.halted.set)

    def abort(self) -> None:
        """Stop at once, whatever is under way."""
        self.halt()
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(lambda: self.task and self.task.cancel())

    async def _ask_all(self) -> None:
        self.task = asyncio.current_task()
        client = open_client(self.endpoint, self.settings)
        try:
            workers = [asyncio.create_task(self._work(client)) for _ in range(self.settings.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        finally:
            await client.close()

    async def _work(self, client: Any) -> None:
        while not self.halted.is_set():
            try:
                question = next(self.questions, None)
            except NLAError as error:
                self._fail(error)
                return
            if question is None:
                return
            self.replies.put(await self._settle(client, question))

    def _fail(self, error: BaseException) -> None:
        """Stop for good: the first error is what the reader gets, after the replies that are still under way."""
        self.error = self.error or error
        self.halted.set()

    async def _settle(self, client: Any, question: Question) -> Reply:
        """Ask until there is an explanation or there are no tries left."""
        reply = Reply(question.number)
        for attempt in range(self.settings.tries):
            most = self._most(question.prompt)
            if not await self._admit(most):
                return self._unsettled(reply)
            before = reply.tokens_in, reply.tokens_out
            fault = await self._request(client, question, reply)
            own = self.settings.cost(reply.tokens_in - before[0], reply.tokens_out - before[1]) or 0.0
            await self._release(most, most if fault is not None and fault.charged else own)
            reply.problem = "" if fault is None else fault.cause
            if fault is None or fault.about_text:
                return reply
            if not fault.passing:
                self._fail(self._refusal(fault.cause))
                return self._unsettled(reply)
            if attempt + 1 < self.settings.tries:
                if not await self._wait(fault, attempt):
                    return self._unsettled(reply)
                reply.retried[fault.cause] += 1
            elif not fault.answered:
                self._count_silence(fault.cause)
        return reply

    def _count_silence(self, cause: str) -> None:
        """Stop when the endpoint is gone: as many texts in a row as are asked at once had no answer in all tries."""
        self.n_in_a_row += 1
        if self.n_in_a_row >= self.settings.concurrency:
            self._fail(self._refusal(f"{cause} at each of {self.settings.tries} tries for {self.n_in_a_row} texts"))

    async def _request(self, client: Any, question: Question, reply: Reply) -> Fault | None:
        """One request; what it brings goes into the reply."""
        reply.n_requests += 1
        reply.answer = None
        body, fault = b"", None
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                body = await send(client, self.endpoint, self.settings, question.prompt)
        except asyncio.CancelledError:
            raise
        except TimeoutError:
            fault = Fault("timeout", True, charged=True)
        except Exception as error:
            fault = self._fault(error)
        if fault is None:
            return self._read(body, question, reply)
        reply.n_unknown += fault.charged
        if fault.wait_s is not None:
            self.not_before = max(self.not_before, time.monotonic() + fault.wait_s)
        return fault

    def _read(self, body: bytes, question: Question, reply: Reply) -> Fault | None:
        """Take the body of an answer into the reply."""
        try:
            written = read_body(self.endpoint.form, body)
        except Malformed:
            reply.n_unknown += 1
            return Fault("malformed answer", True, charged=True)
        self.n_in_a_row = 0
        known = written.tokens_in is not None and written.tokens_out is not None
        reply.n_estimated += not known
        ratio = CHARS_PER_TOKEN
        reply.tokens_in += written.tokens_in if known else math.ceil(len(question.prompt) / ratio)  # type: ignore[operator]
        reply.tokens_out += written.tokens_out if known else math.ceil(len(written.text) / ratio)  # type: ignore[operator]
        if written.refused:
            return Fault(REFUSED, False, about_text=True)
        if written.cut:
            return Fault(CUT, True, answered=True)
        found = question.read(written.text)
        reply.text = found.text
        if found.text is not None or found.problem != CUT:
            reply.answer = written.text
        return None if found.text is not None else Fault(found.problem, True, answered=True)

    def _fault(self, error: Exception) -> Fault:
        """What an error of a client means; nothing of it is kept, since it holds the request with its key."""
        status = getattr(error, "status_code", None)
        if isinstance(status, int):
            response: Any = getattr(error, "response", None)
            codes = _codes(getattr(error, "body", None))
            for code in set(codes).intersection(_NOTHING_LEFT):
                return Fault(f"HTTP {status}, {code}", False)
            if 400 <= status < 500 and set(codes).intersection(_ABOUT_THE_TEXT):
                return Fault(REFUSED, False, about_text=True)
            if status in PASSING or status >= 500:
                wait_s = asked_wait(getattr(response, "headers", {}))
                if wait_s is not None and wait_s > LONGEST_ASKED_WAIT_S:
                    return Fault(f"HTTP {status}, which asks to wait {wait_s:.0f} s", False)
                return Fault(f"HTTP {status}", True, wait_s)
            said = said_by(error, self.endpoint)
            return Fault(f"HTTP {status}: {said}" if said else f"HTTP {status}", False)
        name = type(error).__name__
        if "Timeout" in name:
            return Fault("timeout", True, charged=True)
        if "Connection" in name or isinstance(error, OSError):
            cause = type(error.__cause__).__name__
            cut = cause == "RemoteProtocolError" or "Read" in cause
            return Fault("answer cut off or connection reset" if cut else "no connection", True, charged=cut)
        return Fault(f"{name} in the client", False)

    def _refusal(self, cause: str) -> DescriberError:
        variable = self.endpoint.key_variable
        key = "no key" if variable is None else f"the key in {shown_variable(variable)}"
        return DescriberError(
            f"{cause} from {visible(self.endpoint.host)[:80]}, asked for {visible(self.settings.model or '')[:80]}",
            "an endpoint that answers",
            f"check url, model and {key}; what is answered is kept, and the same command goes on from there",
        )

    async def _wait(self, fault: Fault, attempt: int) -> bool:
        """Wait as the server asks, or longer each time; False: halted meanwhile."""
        if fault.answered:
            return not self.halted.is_set()
        if fault.wait_s is None:
            longest = min(LONGEST_WAIT_S, self.backoff_s * 2.0**attempt)
            return await self._pause(longest * self.random.uniform(0.5, 1.0))
        # Those that were turned away together must not come back together.
        return await self._pause(fault.wait_s + self.random.uniform(0.0, min(1.0, self.backoff_s)))

    async def _pause(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.halted.wait(), seconds)
        return not self.halted.is_set()

    async def _admit(self, most: float) -> bool:
        """Wait until a request of at most this cost may be made; False: it must not be made."""
        while (left := self.not_before - time.monotonic()) > 0:
            if not await self._pause(left):
                return False
        budget = self.settings.budget_usd
        if budget is not None:
            async with self.settled:
                while self.spent + self.reserved + most > budget and self.n_reserved and not self.halted.is_set():
                    await self.settled.wait()
                if self.spent + self.reserved + most > budget and not self.halted.is_set():
                    self._fail(_too_dear(self.spent, budget, most))
                if not self.halted.is_set():
                    self.reserved += most
                    self.n_reserved += 1
        return not self.halted.is_set()

    async def _release(self, most: float, own: float) -> None:
        """Put what a request really cost in the place of what it could have cost."""
        if self.settings.budget_usd is not None:
            async with self.settled:
                self.reserved -= most
                self.n_reserved -= 1
                self.spent += own
                self.settled.notify_all()

    def _most(self, prompt: str) -> float:
        """USD that one request can cost: no tokenizer makes more tokens of a text than it has bytes."""
        return self.settings.cost(len(prompt.encode()) + _OVERHEAD_TOKENS, self.settings.max_tokens) or 0.0

    def _unsettled(self, reply: Reply) -> Reply:
        reply.settled = False
        return reply


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the clients' line for each request, unless somebody looks for faults."""
    loggers = [logging.getLogger(name) for name in ("httpx", "httpx2")]

    def wanted(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or logging.getLogger(record.name).isEnabledFor(logging.DEBUG)

    for logger in loggers:
        logger.addFilter(wanted)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(wanted)


def _too_dear(spent: float, budget: float, most: float) -> BudgetError:
    got = f"{spent:.4f} USD spent, or possibly charged, of {budget:.4f}; the next request could cost {most:.4f}"
    fix = "raise describer.budget_usd; what is answered is kept and not paid again"
    return BudgetError(got, "a budget that covers the next request", fix)


def _codes(body: Any) -> list[str]:
    """The codes and types of an error's body."""
    inner = body.get("error", body) if isinstance(body, Mapping) else None
    found = [inner.get("code"), inner.get("type")] if isinstance(inner, Mapping) else []
    return [code for code in found if isinstance(code, str)]


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
