"""What every describer does: it takes questions and gives a reply to each, with all that was spent on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from nla.train.describe.prompt import Question
from nla.train.describe.settings import DescriberSettings


@dataclass
class Reply:
    """What became of one question, with all that was spent on it."""

    number: int
    text: str | None = None
    """The explanation; None: there is none."""
    answer: str | None = None
    """What the describer wrote in full, if it finished an answer."""
    problem: str = ""
    """Why there is no explanation."""
    settled: bool = True
    """False: the run was stopped before this question was through; it is neither answered nor failed."""
    n_requests: int = 0
    retried: Counter[str] = field(default_factory=Counter)
    """Requests that were followed by another for the same question, by cause."""
    tokens_in: int = 0
    tokens_out: int = 0
    n_estimated: int = 0
    """Answers whose tokens the endpoint did not say: their characters / 4 are counted."""
    n_unknown: int = 0
    """Requests without an answer that an endpoint may have charged for: no tokens are counted for them."""


class Describer(Protocol):
    """Answers questions in any order, keeping its own concurrency, retries and budget."""

    @property
    def settings(self) -> DescriberSettings: ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that decides its answers; never a key."""
        ...

    @property
    def counted_by(self) -> str:
        """How :meth:`count` counts."""
        ...

    @property
    def together(self) -> int:
        """How many questions decide one another's answers, if ever so little: so many in a row are asked together.

        1: each stands for itself.
        """
        ...

    def count(self, text: str) -> int:
        """Tokens of a prompt, for the estimate."""
        ...

    def ask(self, questions: Iterator[Question], stop: Callable[[], bool]) -> Iterator[Reply]:
        """A reply to each question as soon as it is there; questions are taken from their iterator as they are needed.

        Of a describer with ``together`` above 1, each so many questions in a row are one group.

        Args:
            stop: asked all the time; once true, no new request is made, and those under way are finished.

        Raises:
            DescriberError: nothing more can be asked; replies that are there are given first.
        """
        ...
