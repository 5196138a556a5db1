"""Who writes the warm-start texts: a describer's settings and price, and what every describer does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from pydantic import Field

from nla.config import DTYPES, QUANTIZATIONS
from nla.errors import ArgumentError
from nla.models.endpoint import check_variable
from nla.train.describe.prompt import Question
from nla.train.schema import (
    NOTHING,
    Count,
    Decides,
    NotNegative,
    Number,
    Positive,
    Seed,
    Text,
    one_of,
    refuse,
    section,
)

DESCRIBERS = ("local", "openai", "anthropic", "structured", "quote")
UNASKED = ("structured", "quote")
"""Describers that ask no model to describe."""
AT_HOME = ("local", *UNASKED)
"""Describers without an endpoint."""
CHARS_PER_TOKEN = 4
"""Of a token, where neither a tokenizer nor an endpoint says: an estimate, and named so wherever it is shown."""


@section("describer", decides="describe")
class DescriberSettings:
    """Who writes the warm-start texts, how, and at what price.

    Raises:
        ArgumentError: a value is out of range, or does not fit the describer.
    """

    describer: Annotated[str, one_of(*DESCRIBERS)] = "local"
    """``local`` (a Hugging Face model here), ``openai`` (any endpoint of that form), ``anthropic``, ``structured`` (no
    model: what is known of the documents and of what the target does next), or ``quote`` (no model: the visible words,
    repeated; to try a recipe out)."""
    model: Text | None = None
    """The endpoint's name of its model; of ``local`` a folder or hub id, None: the target itself."""
    url: Text | None = None
    """Base of the endpoint's API, such as ``http://localhost:8000/v1``; None: the provider's own."""
    key_variable: Annotated[str | None, NOTHING] = field(default=None, repr=False)
    """Environment variable that holds the key. None: the provider's own at its own address, no key anywhere else. It is
    never shown, in case the key itself is put here."""
    concurrency: Annotated[Count, NOTHING] = 16
    """Requests in flight at once; for ``local``, rows of a batch, which in less than float32 influence one another."""
    timeout_s: Annotated[Positive, NOTHING] = 60.0
    """Longest time of one request, from its start to the last byte of the answer."""
    tries: Annotated[Count, Decides("describe", but_for_default=True)] = 6
    """Requests for one text before it counts as failed."""
    temperature: NotNegative | None = None
    """Temperature of sampling; 0: the likeliest text. None: the endpoint's own, and the likeliest text of ``local``."""
    max_tokens: Count = 250
    """Longest answer, with what some models think before it. Longer ones are cut, and a cut answer counts as none."""
    max_chars: Annotated[int, Field(ge=40)] = 4000
    """Characters of a prefix that are shown: its end."""
    price_in: Annotated[NotNegative | None, NOTHING] = None
    """USD for a million tokens of prompts; None: not known, and never guessed."""
    price_out: Annotated[NotNegative | None, NOTHING] = None
    """USD for a million tokens of answers; None: not known, and never guessed."""
    budget_usd: Annotated[NotNegative | None, NOTHING] = None
    """Stop before a request that could lead above this, counting from the start of the run; None: no limit."""
    failing_share: Annotated[Number, Field(ge=0, lt=1), NOTHING] = 0.1
    """Stop when more than this share of the texts has failed."""
    seed: Seed = 0
    """Seed of ``local``'s sampling. Endpoints are not sent it, but under another seed they are asked again."""
    dtype: Annotated[str, one_of(*DTYPES)] | None = None
    """Type of the weights of ``local``'s own ``model``; None: the target's."""
    revision: Text | None = None
    """Commit, tag or branch of that model on the hub; None: its main branch."""
    quantization: Annotated[str, one_of(*QUANTIZATIONS)] | None = None
    """8bit or 4bit, by bitsandbytes; None: its weights as they are."""
    parameters_b: Annotated[Positive | None, NOTHING] = None
    """Billions of its parameters, for ``--dry-run`` alone; None: what it takes is not known."""

    def __post_init__(self) -> None:
        self._check_key_variable()
        if self.describer in AT_HOME:
            for name in ("url", "budget_usd"):
                if getattr(self, name) is not None:
                    refuse(f"describer.{name}", getattr(self, name), f"null: {self.describer} has none")
        elif self.model is None:
            refuse("describer.model", None, f"the name of the model to ask at the {self.describer} endpoint")
        if self.budget_usd is not None and None in (self.price_in, self.price_out):
            raise ArgumentError("budget_usd without prices", "price_in and price_out", "set both, or no budget")
        self._check_own_model()

    def _check_key_variable(self) -> None:
        """Refuse what cannot be a variable's name; it may be the key itself, so no message repeats it."""
        if self.key_variable is None:
            return
        check_variable(self.key_variable, "a describer.key_variable")
        if self.describer in AT_HOME:
            raise ArgumentError(f"a describer.key_variable for {self.describer}", "null: it has no key", "remove it")

    def _check_own_model(self) -> None:
        """Refuse what is said of a model that ``local`` loads where it loads none, or what it cannot be loaded as."""
        for name in ("dtype", "revision", "quantization", "parameters_b"):
            if getattr(self, name) is not None and (self.describer != "local" or self.model is None):
                refuse(f"describer.{name}", getattr(self, name), "null: it is said of a local describer's own `model`")

    @property
    def attempts(self) -> int:
        """Answers that one text may have: the likeliest text of ``local`` would be the same each time."""
        return 1 if self.describer == "local" and not self.temperature else self.tries

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """USD of so many tokens; 0 for what asks nobody, None where a price is not known."""
        if self.describer in AT_HOME:
            return 0.0
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


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
        """How many questions in a row are asked together, because they influence one another's answers, however little.

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
