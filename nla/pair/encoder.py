"""Encoder: activations to explanations, by sampling from the constant prompt with the activation injected."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nla.config import NLAConfig
from nla.errors import ArgumentError, ContextLengthError
from nla.metrics import rescale
from nla.models.generate import Watch, ends_of, generate, pad_of, rows_at_a_time, seeded
from nla.models.hooks import inject, locate_marker
from nla.models.points import context_length, device_of, unwrapped
from nla.pair.roles import Roles, adapters_in_type
from nla.storage.schema import shown
from nla.text.tokens import render_prompt


class Rollouts(NamedTuple):
    """Sampled answers, activation by activation: row ``i * samples + j`` is sample j of activation i."""

    ids: Int[Tensor, "r t"]
    """Token ids without the prompt: answer and end token, then padding."""

    mask: Int[Tensor, "r t"]
    """1 up to and including the end token, 0 after it."""

    texts: list[str]
    """The answers as text, without the end token: "<explanation>…</explanation>" if all is well."""

    explanations: list[str]
    """What there is of an explanation in each answer, without its tags."""

    complete: list[bool]
    """Per answer: it is one whole explanation between its tags."""


class Encoder:
    """The encoder of a pair: its prompt with the marker in it, and sampling from it."""

    def __init__(self, roles: Roles, tokenizer: PreTrainedTokenizerBase, config: NLAConfig) -> None:
        """Raises MarkerError: the prompt does not hold the marker once, between its neighbours."""
        self.roles, self.tokenizer, self.config = roles, tokenizer, config
        self.prompt_ids: Int[Tensor, "1 t"] = torch.tensor([render_prompt(tokenizer, config.encoder_prompt)])
        """The same for every activation."""
        self.marker_position = int(locate_marker(self.prompt_ids, config.injection)[0])
        """Column of the marker in the prompt."""
        self.pad_id = pad_of(tokenizer)

    @property
    def end_ids(self) -> list[int]:
        """Token ids that end an answer: those that the pair names, or else the model's own."""
        return list(self.config.end_ids or ()) or ends_of(unwrapped(self.roles.model_of("encoder")), self.tokenizer)

    def generate(
        self,
        vectors: Float[Tensor, "n d"],
        samples: int = 4,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
        seed: int | Sequence[int] | None = 0,
        greedy: bool = False,
        batch_size: int = 512,
        watch: Watch | None = None,
    ) -> Rollouts:
        """Answers to activations of any norm.

        Args:
            samples: answers per activation; they share batches with those of other activations.
            temperature: of sampling, above 0; 1 samples from the encoder's own distribution.
            max_new_tokens: longest answer; None: as in training.
            seed: of a random source for this call alone, or one for each activation, whose answers then do not depend
                on the others in the call; None draws from the global random state.
            greedy: the likeliest token at each step instead of sampling.
            batch_size: rows (activations × samples) at a time; see :func:`nla.models.generate.rows_at_a_time`.
            watch: sees the answers grow, and may end some; see :func:`nla.models.generate.generate`.

        Raises:
            ArgumentError: an argument is out of range, or a seed is no whole number.
            ContextLengthError: prompt and longest answer together do not fit the context.
            ShapeError, NonFiniteError: see :func:`nla.metrics.rescale`.
        """
        length = self.config.max_new_tokens if max_new_tokens is None else max_new_tokens
        for name, value in (("samples", samples), ("max_new_tokens", length), ("batch_size", batch_size)):
            if value < 1:
                raise ArgumentError(f"{name}={value}", "1 or more", f"give {name} a positive number")
        if not greedy and not temperature > 0:
            raise ArgumentError(
                f"temperature={temperature}", "a number above 0", "use greedy=True for the likeliest text"
            )
        model = unwrapped(self.roles.model_of("encoder"))
        self._check_room(context_length(model), length)
        entering = rescale(self.config.check_vectors(vectors), self.config.injection.norm)
        device = device_of(model)

        seed = whole_seeds(seed)
        own = draws_of(seed, samples, length) if isinstance(seed, list) else None
        if own is not None and len(own) != len(entering) * samples:
            got = f"{len(own) // samples} seeds for {len(entering)} activations"
            raise ArgumentError(got, "one seed, or one for each activation", "give as many")

        def injected(rows: Tensor, padding: Tensor) -> contextlib.AbstractContextManager[None]:
            columns = padding + self.marker_position
            return inject(model, entering[rows].to(device), columns.to(device), self.config.injection.layer)

        size = rows_at_a_time(model, self.prompt_ids.shape[1] + length, batch_size)
        together = max(part for part in range(1, min(samples, size) + 1) if samples % part == 0)
        entering, n = entering.repeat_interleave(samples // together, dim=0), max(1, size // together)
        with self.roles.play("encoder"), adapters_in_type(self.roles):
            written = generate(
                model,
                self.prompt_ids.tolist() * len(entering),
                ends=self.end_ids,
                pad=self.pad_id,
                max_new_tokens=length,
                temperature=None if greedy else temperature,
                generator=None if isinstance(seed, list) else seeded(seed, device),
                draws=own,
                forbidden=[self.config.injection.marker_id],
                watch=watch,
                intervene=injected,
                batches=[range(len(entering))[i : i + n] for i in range(0, len(entering), n)],
                copies=together,
                common=self.marker_position,
            )
        texts = written.texts(self.tokenizer)
        parsed = [parse(text, self.config) for text in texts]
        explanations = [one or strip_tags(text, self.config) for one, text in zip(parsed, texts, strict=True)]
        return Rollouts(written.ids, written.mask, texts, explanations, [one is not None for one in parsed])

    def _check_room(self, context: int, max_new_tokens: int) -> None:
        prompt = self.prompt_ids.shape[1]
        if prompt + max_new_tokens > context:
            raise ContextLengthError(
                f"max_new_tokens={max_new_tokens} after a prompt of {prompt} tokens",
                f"at most {context} tokens together, the model's context",
                f"give max_new_tokens={context - prompt} or less",
            )


def whole_seeds(seed: Any) -> int | list[int] | None:
    """A seed, or one for each activation, as whole numbers; NumPy's and torch's are such, too.

    Raises:
        ArgumentError: they are not, or are beyond 64 bits.
    """
    if seed is None:
        return None
    several = hasattr(seed, "__len__") and getattr(seed, "ndim", 1) > 0
    try:
        seeds = [operator.index(one) for one in seed] if several else [operator.index(seed)]
    except TypeError:
        seeds = [2**64]
    if not all(-(2**63) <= one < 2**64 for one in seeds):
        expected = "a whole number of 64 bits, or one for each activation"
        raise ArgumentError(f"seed={shown(seed)}", expected, "give a number such as 0")
    return seeds if several else seeds[0]


def draws_of(seeds: Sequence[int], samples: int, length: int) -> Float[Tensor, "n t"]:
    """A number in [0, 1) for each token of each answer, from a random source of each activation's own."""
    draws = torch.empty(len(seeds), samples, length, dtype=torch.float64)
    for row, seed in zip(draws, seeds, strict=True):
        row.uniform_(generator=torch.Generator().manual_seed(seed))
    return draws.flatten(0, 1)


def mask_marker(logits: Float[Tensor, "... v"], marker_id: int) -> Float[Tensor, "... v"]:
    """Logits with the marker's at −∞: the distribution that the encoder samples from.

    Training and reference log-probabilities use the same, or they would not be those of the rollouts.
    """
    return logits.index_fill(-1, torch.tensor([marker_id], device=logits.device), -torch.inf)


def parse(text: str, config: NLAConfig) -> str | None:
    """The explanation in an answer, or None if the answer is not one explanation between its two tags.

    Text outside the tags, a missing, repeated or unclosed tag, and an empty explanation all give None.
    """
    text, opening, closing = text.strip(), config.explanation_open, config.explanation_close
    if not (text.startswith(opening) and text.endswith(closing) and text.count(opening) == text.count(closing) == 1):
        return None
    return text[len(opening) : -len(closing)].strip() or None


def strip_tags(text: str, config: NLAConfig) -> str:
    """What there is of an explanation in an answer that does not parse, such as one cut off at its longest."""
    return text.replace(config.explanation_open, "").replace(config.explanation_close, "").strip()
