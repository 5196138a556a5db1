"""Encoder: activations to explanations, by sampling from the constant prompt with the activation injected."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from nla.activations import device_of, inference
from nla.confidence import Trust
from nla.config import NLAConfig
from nla.errors import ArgumentError, ContextLengthError, visible
from nla.injection import inject, rescale
from nla.points import context_length
from nla.tokens import Span

if TYPE_CHECKING:
    from nla.autoencoder import NLA


def mask_marker(logits: Tensor, marker_id: int) -> Tensor:
    """Logits (..., vocabulary) with the marker's at −∞: the distribution that the encoder samples from.

    Training and reference log-probabilities use the same, or they would not be those of the rollouts.
    """
    return logits.index_fill(-1, torch.tensor([marker_id], device=logits.device), -torch.inf)


class MarkerMask(LogitsProcessor):
    """Forbids the marker in sampling: a policy that writes it could stand in for the injected activation."""

    def __init__(self, marker_id: int) -> None:
        self.marker_id = marker_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        return mask_marker(scores, self.marker_id)


class Rollouts(NamedTuple):
    """Sampled answers, activation by activation: row ``i * samples + j`` is sample j of activation i."""

    ids: Tensor
    """(rows, t) int64 without the prompt: answer and end token, then padding."""

    mask: Tensor
    """(rows, t) int64: 1 up to and including the end token, 0 after it."""

    texts: list[str]
    """The answers as text, without the end token: "<explanation>…</explanation>" if all is well."""


def end_ids(nla: NLA) -> list[int]:
    """Token ids that end an answer: those that the pair names, or else :func:`ends_of` the encoder."""
    return list(nla.config.end_ids or ()) or ends_of(nla.base_of("encoder"), nla.tokenizer)


def ends_of(base: Any, tokenizer: Any) -> list[int]:
    """Token ids that end a text of a causal LM: the tokenizer's, and those in its generation settings."""
    named = base.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({token for token in (tokenizer.eos_token_id, *named) if token is not None})


def pad_of(tokenizer: Any) -> int:
    """Token id that fills rows up; masks tell it from text."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def generate(
    nla: NLA,
    vectors: Tensor,
    samples: int = 4,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
    seed: int | None = 0,
    greedy: bool = False,
    batch_size: int = 512,
) -> Rollouts:
    """Answers of the encoder to activations (n, d), of any norm.

    Args:
        samples: answers per activation; they share batches with those of other activations.
        temperature: of sampling, above 0; 1 samples from the encoder's own distribution.
        max_new_tokens: longest answer; None: as in training.
        seed: of sampling; the global random state is left as it was. None: draws from the global state.
        greedy: the likeliest token at each step instead of sampling.
        batch_size: rows (activations × samples) at a time.

    Raises:
        ArgumentError: an argument is out of range.
        ContextLengthError: prompt and longest answer together do not fit the context.
        ShapeError, NonFiniteError: see :func:`nla.injection.rescale`.
    """
    length = nla.config.max_new_tokens if max_new_tokens is None else max_new_tokens
    for name, value in (("samples", samples), ("max_new_tokens", length), ("batch_size", batch_size)):
        if value < 1:
            raise ArgumentError(f"{name}={value}", "1 or more", f"give {name} a positive number")
    model = nla.base_of("encoder")
    context, prompt = context_length(model), nla.prompt_ids.shape[1]
    if prompt + length > context:
        raise ContextLengthError(
            f"max_new_tokens={length} after a prompt of {prompt} tokens",
            f"at most {context} tokens together, the model's context",
            f"give max_new_tokens={context - prompt} or less",
        )
    if not greedy and not temperature > 0:
        raise ArgumentError(f"temperature={temperature}", "a number above 0", "use greedy=True for the likeliest text")
    rows = rescale(nla.check_width(vectors), nla.config.injection.norm).repeat_interleave(samples, dim=0)
    settings = plain_settings(end_ids(nla), nla.pad_id, length, None if greedy else temperature)
    chunks: list[Tensor] = []
    place = device_of(model)
    with _seeded(seed, place), nla.role("encoder"), inference(model), plainly(model):
        for chunk in rows.split(batch_size) if len(rows) else ():
            chunks.append(_answers(nla, model, chunk.to(place), settings))
    return _rollouts(nla, chunks)


def plain_settings(ends: list[int], pad: int, max_new_tokens: int, temperature: float | None) -> GenerationConfig:
    """Sampling from the plain distribution, or greedy for None: a model's own top-p or penalties are overridden.

    What is left open here (a least probability, suppressed tokens, a static cache, …) transformers takes from the model
    unless it generates :func:`plainly`.
    """
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "typical_p": 1.0}
    return GenerationConfig(
        do_sample=temperature is not None,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_beams=1,
        use_cache=True,
        **({} if temperature is None else sampling),
    )


@contextlib.contextmanager
def plainly(base: Any) -> Iterator[None]:
    """While active, a causal LM (in PEFT's wrapper or not) has no generation settings; on exit its own are back.

    transformers fills every open field of the settings that a call gives from the model's, so that rollouts would not
    be of its plain distribution. Ask for :func:`ends_of` before: in here the model names no end tokens.
    """
    base = base.get_base_model() if hasattr(base, "get_base_model") else base  # PEFT's wrapper shows the base's
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def _answers(nla: NLA, model: Any, vectors: Tensor, settings: GenerationConfig) -> Tensor:
    """Token ids (b, t) of one batch's answers, without the prompt."""
    prompt = nla.prompt_ids.to(vectors.device).expand(len(vectors), -1)
    where = torch.full((len(vectors),), nla.marker_position, device=vectors.device)
    with inject(model, vectors, where, nla.config.injection.layer):
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=settings,
            logits_processor=LogitsProcessorList([MarkerMask(nla.config.injection.marker_id)]),
        )
    return out[:, prompt.shape[1] :]


def _rollouts(nla: NLA, chunks: list[Tensor]) -> Rollouts:
    width = max((chunk.shape[1] for chunk in chunks), default=0)
    pad, ends = nla.pad_id, torch.tensor(end_ids(nla))
    padded = [torch.nn.functional.pad(chunk, (0, width - chunk.shape[1]), value=pad) for chunk in chunks]
    ids = torch.cat(padded) if padded else torch.empty(0, 0, dtype=torch.int64)
    ended = torch.isin(ids, ends.to(ids.device))
    # Chunks stop at their longest row; columns that only the padding above made are no answer either.
    real = torch.arange(width, device=ids.device) < torch.tensor(
        [chunk.shape[1] for chunk in chunks for _ in range(len(chunk))], device=ids.device
    ).reshape(-1, 1)
    mask = ((ended.cumsum(dim=1) - ended.long()) == 0) & real
    ids = torch.where(mask, ids, pad)
    lengths = (mask & ~ended).sum(dim=1).tolist()
    rows = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    texts = [nla.tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in rows]
    return Rollouts(ids, mask.long(), texts)


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed the global random state for a while and put it back."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


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


def claims(text: str) -> list[str]:
    """The claims (sentences) of an explanation, each with its final mark.

    >>> claims("It is spring. Anna is here. The next line ends with cat.")
    ['It is spring.', 'Anna is here.', 'The next line ends with cat.']
    """
    parts = re.split(r"(?<=[.!?])\s+|\n+", text.strip())
    return [part.strip() for part in parts if part.strip()]


@dataclass
class Note:
    """The explanation of one activation: samples of it, and how far they can be trusted."""

    texts: list[str]
    """One explanation per sample."""

    complete: list[bool]
    """Per sample: it was one whole explanation. What there is of another is kept in ``texts``, and counts."""

    cosine: list[float]
    """Per sample: cosine of the activation with the reconstruction from this text alone."""

    trust: Trust
    """Level from cosine, agreement and margin together; never from cosine alone."""

    span: Span | None = None
    """The token that was read, if known."""

    document: int | None = None
    """The text that it stands in, if known."""

    stratum: str | None = None
    """Kind of position, if known."""

    @property
    def token(self) -> str:
        """Text of the token that was read; empty if unknown."""
        return "" if self.span is None else self.span.text

    @property
    def agreement(self) -> float | None:
        """Mean overlap of claims between samples, in [0, 1]; None for one sample."""
        return self.trust.agreement

    @property
    def margin(self) -> float:
        """Mean cosine minus the best rock's on this activation."""
        return self.trust.margin

    @property
    def claims(self) -> list[list[str]]:
        """The claims of each sample."""
        return [claims(text) for text in self.texts]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            "token": self.token,
            "index": None if self.span is None else self.span.index,
            "document": self.document,
            "stratum": self.stratum,
            "texts": self.texts,
            "complete": self.complete,
            "cosine": self.cosine,
            "agreement": self.agreement,
            "margin": self.margin,
            "trust": self.trust.level,
        }


@dataclass
class Notes(Sequence[Note]):
    """One note per activation, in their order."""

    notes: list[Note] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.notes)

    def __getitem__(self, index: Any) -> Any:
        """A note by int; Notes by slice."""
        return Notes(self.notes[index]) if isinstance(index, slice) else self.notes[index]

    @property
    def texts(self) -> list[list[str]]:
        """Explanations by activation and sample."""
        return [note.texts for note in self.notes]

    @property
    def agreement(self) -> list[float | None]:
        """Agreement by activation."""
        return [note.agreement for note in self.notes]

    @property
    def cosine(self) -> list[list[float]]:
        """Cosine by activation and sample."""
        return [note.cosine for note in self.notes]

    @property
    def strata(self) -> list[str | None]:
        """Kind of position by activation."""
        return [note.stratum for note in self.notes]

    @property
    def trust(self) -> list[Trust]:
        """Trust by activation."""
        return [note.trust for note in self.notes]

    def to_json(self) -> list[dict[str, Any]]:
        """A JSON-ready list."""
        return [note.to_json() for note in self.notes]

    def __str__(self) -> str:
        return "\n".join(f"{visible(note.token)}  {note.trust.level}  {visible(note.texts[0])}" for note in self.notes)
