"""Describers: what writes warm-start texts. An endpoint or a local model, behind one protocol."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from nla.config import DTYPES, QUANTIZATIONS
from nla.errors import ArgumentError, DescriberError, visible
from nla.train.describe.prompt import Question
from nla.train.fit.settings import refuse, require_least, require_positive, require_seed

DESCRIBERS = ("local", "openai", "anthropic", "quote")
CHARS_PER_TOKEN = 4
"""Of a token, where neither a tokenizer nor an endpoint says: an estimate, and named so wherever it is shown."""


@dataclass(frozen=True)
class DescriberSettings:
    """Who writes the warm-start texts, how, and at what price.

    Raises:
        DescriberError: no such describer.
        ArgumentError: a value is out of range, or does not fit the describer.
    """

    describer: str = "local"
    """``local`` (a Hugging Face model here), ``openai`` (any endpoint of that form), ``anthropic``, or ``quote`` (no
    model: the visible words, repeated; to try a recipe out)."""
    model: str | None = None
    """The endpoint's name of its model; of ``local`` a folder or hub id, None: the target itself."""
    url: str | None = None
    """Base of the endpoint's API, such as ``http://localhost:8000/v1``; None: the provider's own."""
    key_variable: str | None = field(default=None, repr=False)
    """Environment variable that holds the key. None: the provider's own at its own address, no key anywhere else. Not
    shown, lest somebody puts the key itself here."""
    concurrency: int = 16
    """Requests in flight at once; of ``local``, rows of a batch, which in less than float32 sway what is written."""
    timeout_s: float = 60.0
    """Of one request, from its start to the last byte of the answer."""
    tries: int = 6
    """Requests for one text before it counts as failed."""
    temperature: float | None = None
    """Of sampling; 0: the likeliest text. None: the endpoint's own, and the likeliest text of ``local``."""
    max_tokens: int = 250
    """Longest answer, with what some models think before it. Longer ones are cut, and a cut answer counts as none."""
    max_chars: int = 4000
    """Characters of a prefix that are shown: its end."""
    price_in: float | None = None
    """USD for a million tokens of prompts; None: not known, and never guessed."""
    price_out: float | None = None
    """USD for a million tokens of answers; None: not known, and never guessed."""
    budget_usd: float | None = None
    """Stop before a request that could lead above this, counting from the start of the run; None: no limit."""
    failing_share: float = 0.1
    """Stop when more than this share of the texts has failed."""
    seed: int = 0
    """Of ``local``'s sampling. Endpoints are not sent it, but under another seed they are asked anew."""
    dtype: str | None = None
    """Of the weights of ``local``'s own ``model``; None: the target's."""
    revision: str | None = None
    """Commit, tag or branch of that model on the hub; None: its main branch."""
    quantization: str | None = None
    """8bit or 4bit, by bitsandbytes; None: its weights as they are."""
    parameters_b: float | None = None
    """Billions of its parameters, for ``--dry-run`` alone; None: what it takes is not known."""

    def __post_init__(self) -> None:
        if self.describer not in DESCRIBERS:
            got = f"the describer {visible(str(self.describer))[:40]!r}"
            raise DescriberError(got, f"one of {', '.join(DESCRIBERS)}", "set describer to one of these")
        require_least("describer", self, concurrency=1, tries=1, max_tokens=1, max_chars=40)
        require_positive("describer", self, "timeout_s")
        require_seed("describer.seed", self.seed)
        self._check_key_variable()
        for name in ("timeout_s", "temperature", "price_in", "price_out", "budget_usd", "parameters_b"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                refuse(f"describer.{name}", value, "a finite number, 0 or more")
        if not 0 <= self.failing_share < 1:
            refuse("describer.failing_share", self.failing_share, "a share from 0 to below 1")
        for name in ("model", "url", "revision"):
            if getattr(self, name) == "":
                refuse(f"describer.{name}", "", "a text, or null")
        if self.describer in ("local", "quote"):
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
        name: Any = self.key_variable
        if name is None:
            return
        fix = "export the key under a name, and put that name here"
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            got = "a describer.key_variable that is no name (not shown: it may be a key)"
            raise ArgumentError(got, "the name of an environment variable, such as MY_KEY", fix)
        if self.describer in ("local", "quote"):
            raise ArgumentError(f"a describer.key_variable for {self.describer}", "null: it has no key", "remove it")

    def _check_own_model(self) -> None:
        """Refuse what is said of a model that ``local`` loads where it loads none, or what it cannot be loaded as."""
        for name in ("dtype", "revision", "quantization", "parameters_b"):
            if getattr(self, name) is not None and (self.describer != "local" or self.model is None):
                refuse(f"describer.{name}", getattr(self, name), "null: it is said of a local describer's own `model`")
        for name, known in (("dtype", DTYPES), ("quantization", QUANTIZATIONS)):
            if getattr(self, name) not in (None, *known):
                refuse(f"describer.{name}", getattr(self, name), f"one of {', '.join(known)}, or null")
        if self.parameters_b == 0:
            refuse("describer.parameters_b", 0, "above 0, or null")

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """USD of so many tokens; 0 for what asks nobody, None where a price is not known."""
        if self.describer in ("local", "quote"):
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


def open_describer(
    settings: DescriberSettings,
    model: Any = None,
    tokenizer: Any = None,
    *,
    dtype: str = "float32",
    device: Any = None,
) -> Describer:
    """The describer that the settings name.

    Args:
        model, tokenizer: the target, already loaded, for ``local`` without a ``model`` of its own.
        dtype: of the weights of ``local``'s own ``model``, unless the settings say it.
        device: where to put that model; None: the first GPU if there is one, else the CPU.

    Raises:
        DescriberError: the address or the key is not one to be used.
        MissingExtraError: the provider's client is not installed.
        The rest is as for :func:`nla.target.load_target`.
    """
    if settings.describer != "local":
        from nla.train.describe.client import EndpointDescriber

        return EndpointDescriber(settings)
    from nla.train.describe.local import LocalDescriber

    if settings.model is not None:
        from nla.models.load import load_target

        model, tokenizer = load_target(
            settings.model,
            revision=settings.revision,
            dtype=settings.dtype or dtype,
            device=device,
            quantization=settings.quantization,
        )
    if model is None or tokenizer is None:
        got, expected = "a local describer without a model", "the loaded target and its tokenizer, or a model's name"
        raise DescriberError(got, expected, "pass model and tokenizer, or set describer.model")
    return LocalDescriber(settings, model, tokenizer)
