"""Who writes the warm-start texts: the settings of a describer, and what they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nla.config import DTYPES, QUANTIZATIONS
from nla.errors import ArgumentError, DescriberError, visible
from nla.models.endpoint import check_variable
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
        if self.key_variable is None:
            return
        check_variable(self.key_variable, "a describer.key_variable")
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
