"""Encoder: activations to explanations, by sampling from the constant prompt with the activation injected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from nla.config import NLAConfig
from nla.errors import ArgumentError, ContextLengthError
from nla.models.forward import device_of, inference
from nla.models.generate import _seeded, ends_of, plain_settings, plainly
from nla.models.hooks import inject, rescale
from nla.models.points import context_length

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
