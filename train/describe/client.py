"""A describer behind an endpoint: many requests at once, retries counted, a budget that is never exceeded."""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nla.errors import BudgetError, DescriberError, NLAError
from nla.models.endpoint import Answer, Endpoint, Session, Try
from nla.train.describe.describer import CHARS_PER_TOKEN, DescriberSettings, Reply
from nla.train.describe.prompt import CUT, Question

REFUSED = "the describer refuses"
_OVERHEAD_TOKENS = 100
"""What a chat template may add to a prompt."""


@dataclass
class EndpointDescriber:
    """Asks an endpoint; see :class:`nla.train.describe.describer.Describer`.

    Raises:
        EndpointError: the address or the key is not one to be used.
    """

    settings: DescriberSettings

    def __post_init__(self) -> None:
        s = self.settings
        self.endpoint = Endpoint(
            s.model or "", s.describer, s.url, s.key_variable, s.timeout_s, s.tries, s.temperature, s.max_tokens
        )
        self.counted_by = f"characters / {CHARS_PER_TOKEN}"
        self.together = 1

    @property
    def identity(self) -> Mapping[str, Any]:
        """Form, address, model, temperature, seed; not the limit of tokens, since cut answers are not kept."""
        s = self.settings
        decides = {"model": s.model, "temperature": s.temperature, "seed": s.seed}
        return {"describer": s.describer, "url": self.endpoint.base, **decides}

    def count(self, text: str) -> int:
        """Characters / 4."""
        return math.ceil(len(text) / CHARS_PER_TOKEN)

    def ask(self, questions: Iterator[Question], stop: Callable[[], bool]) -> Iterator[Reply]:
        """See :meth:`nla.train.describe.describer.Describer.ask`. Requests are made in a thread.

        It has its own event loop, so this works inside a running event loop too, and a slow reader holds no request up.
        """
        run = _Run(self, questions)
        thread = threading.Thread(target=run.main, name="nla-describer", daemon=True)
        thread.start()
        try:
            while True:
                if stop():
                    run.halt()
                with contextlib.suppress(queue.Empty):
                    if (reply := run.replies.get(timeout=0.1)) is None:
                        break
                    yield reply
        finally:
            run.abort()
            thread.join()
        if run.error is not None:
            raise run.error


class _Run:
    """One run of requests, in one thread. A task that is in no request is cancelled once the run is halted."""

    def __init__(self, describer: EndpointDescriber, questions: Iterator[Question]) -> None:
        self.describer, self.settings, self.questions = describer, describer.settings, questions
        self.replies: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self.error: BaseException | None = None
        self.halted = False
        self.not_before = 0.0
        self.n_in_a_row = 0
        self.spent, self.reserved = 0.0, 0.0
        self.settled = asyncio.Event()
        self.loop = asyncio.new_event_loop()
        self.main_task: asyncio.Task[None] | None = None
        self.workers: set[asyncio.Task[None]] = set()
        self.in_request: set[asyncio.Task[Any] | None] = set()

    def main(self) -> None:
        """Run to the end; errors are kept for the reader, and the queue always ends with None."""
        try:
            with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
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
            self.loop.call_soon_threadsafe(self._halt)

    def abort(self) -> None:
        """Stop at once, whatever is under way."""
        self.halt()
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(lambda: self.main_task and self.main_task.cancel())

    def _halt(self) -> None:
        if not self.halted:
            self.halted = True
            for task in self.workers - self.in_request - {asyncio.current_task()}:
                task.cancel()

    def _fail(self, error: NLAError) -> None:
        """Stop for good: the first error is what the reader gets, after the replies that are still under way."""
        self.error = self.error or error
        self._halt()

    async def _ask_all(self) -> None:
        self.main_task = asyncio.current_task()
        async with self.describer.endpoint.connect() as session:
            self.workers = {asyncio.create_task(self._work(session)) for _ in range(self.settings.concurrency)}
            try:
                await asyncio.gather(*self.workers)
            finally:
                for worker in self.workers:
                    worker.cancel()
                await asyncio.gather(*self.workers, return_exceptions=True)

    async def _work(self, session: Session) -> None:
        while not self.halted:
            try:
                question = next(self.questions, None)
            except NLAError as error:
                return self._fail(error)
            if question is None:
                return
            self.replies.put(await self._settle(session, question))

    async def _settle(self, session: Session, question: Question) -> Reply:
        """Ask until there is an explanation or there are no tries left."""
        reply, tries = Reply(question.number, settled=False), list[Try]()
        messages, n_most = [{"role": "user", "content": question.prompt}], self.settings.tries
        try:
            while len(tries) < n_most and not reply.settled and not self.halted:
                n_left = n_most - len(tries)
                await session.ask(messages, tries, n_left, lambda made: self._around(made, question.prompt))
                self._read(question, tries, reply)
        except asyncio.CancelledError:
            if not self.halted:
                raise
        reply.n_requests = len(tries)
        reply.retried = Counter(made.cause for made in tries[:-1])
        for made in tries:
            if made.answer is not None:
                tokens_in, tokens_out = _tokens(question.prompt, made.answer)
                reply.tokens_in += tokens_in
                reply.tokens_out += tokens_out
                reply.n_estimated += not _is_counted(made.answer)
            reply.n_unknown += made.charged
        return reply

    def _read(self, question: Question, tries: list[Try], reply: Reply) -> None:
        """Take what the last request brought into the reply; after it, the reply is settled or is asked for again."""
        last, no_tries_left = tries[-1], len(tries) >= self.settings.tries
        reply.answer = None
        if last.answer is None:
            reply.problem = last.cause
            if not last.passing:
                self._fail(self._refusal(last.cause))
            elif no_tries_left:
                reply.settled = True
                self._count_silence(last.cause)
            return
        self.n_in_a_row = 0
        if last.answer.refused:
            last.cause = REFUSED
        elif last.answer.cut:
            last.cause = CUT
        else:
            reply.text, last.cause = question.read(last.answer.text)
            if last.cause != CUT:  # without its closing tag an answer was cut, whatever the endpoint says
                reply.answer = last.answer.text
        reply.problem = last.cause
        reply.settled = reply.text is not None or last.answer.refused or no_tries_left

    def _count_silence(self, cause: str) -> None:
        """Stop when the endpoint is gone: as many texts in a row as are asked at once had no answer in all tries."""
        self.n_in_a_row += 1
        if self.n_in_a_row >= self.settings.concurrency:
            self._fail(self._refusal(f"{cause} at each of {self.settings.tries} tries for {self.n_in_a_row} texts"))

    def _refusal(self, cause: str) -> DescriberError:
        error = self.describer.endpoint.error(cause)
        fix = f"{error.fix}; what is answered is kept, and the same command goes on from there"
        return DescriberError(error.got, error.expected, fix)

    @contextlib.asynccontextmanager
    async def _around(self, made: Try, prompt: str) -> AsyncIterator[None]:
        """Hold a request back until a stated wait is over and the budget covers it; then count what it cost."""
        s, task = self.settings, asyncio.current_task()
        while (left := self.not_before - time.monotonic()) > 0:
            await asyncio.sleep(left + random.uniform(0.0, min(1.0, left)))  # not all of them at one moment
        # No tokenizer makes more tokens of a text than it has bytes.
        most = s.cost(len(prompt.encode()) + _OVERHEAD_TOKENS, s.max_tokens) or 0.0
        while s.budget_usd is not None and self.spent + self.reserved + most > s.budget_usd and not self.halted:
            if not self.reserved:
                self._fail(_too_dear(self.spent, s.budget_usd, most))
            else:
                await self.settled.wait()
        if self.halted:
            raise asyncio.CancelledError
        self.reserved += most
        self.in_request.add(task)
        try:
            yield
        finally:
            self.in_request.discard(task)
            self.reserved = self.reserved - most if len(self.in_request) else 0.0
            if made.answer is not None:
                self.spent += s.cost(*_tokens(prompt, made.answer)) or 0.0
            elif made.charged:
                self.spent += most
            if made.wait_s is not None:
                self.not_before = max(self.not_before, time.monotonic() + made.wait_s)
            self.settled.set()
            self.settled = asyncio.Event()


def _is_counted(answer: Answer) -> bool:
    """Whether the endpoint says what an answer took."""
    return answer.tokens_in is not None and answer.tokens_out is not None


def _tokens(prompt: str, answer: Answer) -> tuple[int, int]:
    """Tokens of a prompt and its answer; characters / 4 where the endpoint does not say."""
    if answer.tokens_in is not None and answer.tokens_out is not None:
        return answer.tokens_in, answer.tokens_out
    return math.ceil(len(prompt) / CHARS_PER_TOKEN), math.ceil(len(answer.text) / CHARS_PER_TOKEN)


def _too_dear(spent: float, budget: float, most: float) -> BudgetError:
    got = f"{spent:.4f} USD spent, or possibly charged, of {budget:.4f}; the next request could cost {most:.4f}"
    fix = "raise describer.budget_usd; what is answered is kept and not paid again"
    return BudgetError(got, "a budget that covers the next request", fix)
