"""What requests want done, and what they hear of it while it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from nla.autoencoder import NLA
from nla.pair.explanations import Explanation
from nla.serve.prepare import Prepared
from nla.serve.schema import Read, Steer


class Settings(NamedTuple):
    """How explanations are sampled."""

    samples: int
    temperature: float
    """0: the likeliest text, and one sample."""
    max_new_tokens: int | None
    """None: as in training."""


class Told(NamedTuple):
    """What a request hears of its work: that it begins, a text so far, or a finished explanation."""

    row: int | None = None
    """The activation; None: what is to be read has been read."""
    sample: int = 0
    text: str = ""
    done: Explanation | None = None


class Ticket:
    """The place of one request that was admitted."""

    def __init__(self, leave: Callable[[], None]) -> None:
        self.cancelled = False
        """Nobody waits for it any more: whatever is done for it stops at its next token."""
        self._leave: Callable[[], None] | None = leave

    def release(self) -> None:
        """The request is over, however it ended."""
        self.cancelled = True
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


@dataclass(eq=False, kw_only=True)
class Work:
    """Something that a request wants done."""

    ticket: Ticket
    pair: str
    tell: Callable[[Told], None] | None = None
    """Hears of what is done, in the worker's thread; None: only the result is wanted."""
    future: Future[Any] = field(default_factory=Future)

    def say(self, told: Told) -> None:
        """Pass it on to who listens."""
        if self.tell is not None:
            self.tell(told)

    def fail(self, error: BaseException) -> None:
        """End without a result, unless it has ended."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)

    def finish(self, result: Any) -> None:
        """End with a result, unless it has ended."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(result)


@dataclass(eq=False, kw_only=True)
class Call(Work):
    """A function that needs a pair's models or tokenizer for a moment, such as decoding one text."""

    function: Callable[[NLA], Any]


@dataclass(eq=False, kw_only=True)
class Explain(Work):
    """Activations, of a text or given; and their explanations if ``settings`` are given. Its result is itself."""

    source: Read | None = None
    """What is read; None: ``vectors`` are given."""
    positions: Sequence[int] = ()
    """Token indexes; none: all."""
    near: int | None = None
    """The token from which on it is explained; None: in the order of the positions."""
    reverse: bool = False
    steer: Steer | None = None
    settings: Settings | None = None
    seed: int = 0
    vectors: Float[Tensor, "n d"] | None = None
    prepared: Prepared | None = None
    columns: list[int] = field(default_factory=list)
    """The tokens that were read, in the order of the positions."""
    seeds: list[int] = field(default_factory=list)
    planned: list[int] = field(default_factory=list)
    """Rows of ``vectors`` in the order in which they are explained."""
    order: list[int] = field(default_factory=list)
    """Of these, those that no cache had."""
    begun: int = 0
    """How many of ``order`` are written or being written."""
    explanations: dict[int, Explanation] = field(default_factory=dict)
    """By row."""

    def done(self, row: int, explanation: Explanation) -> None:
        """One activation is explained."""
        self.explanations[row] = explanation
        self.say(Told(row, done=explanation))
        if len(self.explanations) == len(self.planned):
            self.finish(self)


@dataclass(eq=False, kw_only=True)
class Continue(Work):
    """A text that the target continues. Its result is what the target wrote."""

    source: Read
    max_new_tokens: int
    temperature: float = 0.0
    """0: the likeliest text."""
    seed: int = 0
    steer: Steer | None = None
    prepared: Prepared | None = None
