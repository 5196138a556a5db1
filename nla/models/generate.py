"""How a causal LM continues prompts: token ids in, token ids out, from its plain distribution, ended in one way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from nla.errors import ArgumentError, NonFiniteError
from nla.metrics import check_ids
from nla.models.hooks import Intervene, inference
from nla.models.points import device_of, n_embeddings, unwrapped
from nla.text.tokens import length_batches

MAX_TOKENS_PER_BATCH = 8192
CPU_BYTES, CPU_SHARE = 160 << 20, 0.25
"""Memory that the rows of a batch may take on a CPU, for keys and values and the next token's distributions: so many
bytes, or this share of the weights' own if that is more, since each step reads all weights however many rows there are.
"""
_DISTRIBUTIONS = 5
"""Copies of a row's logits that choosing a token holds at once."""


class Generated(NamedTuple):
    """What a model wrote after each prompt, in the order of the prompts."""

    ids: Int[Tensor, "n t"]
    """The tokens added, on the CPU, with the end token if there is one; padding after it."""

    lengths: Int[Tensor, " n"]
    """How many tokens each answer has, without its end token."""

    ended: Bool[Tensor, " n"]
    """The answer ended by itself; otherwise it was cut off at its longest."""

    @property
    def mask(self) -> Int[Tensor, "n t"]:
        """1 up to and including the end token, 0 after it."""
        return (torch.arange(self.ids.shape[1]) < (self.lengths + self.ended)[:, None]).long()

    def rows(self) -> list[list[int]]:
        """Each answer's token ids without its end token."""
        return [row[:length] for row, length in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Each answer as text, special tokens included, exactly as its tokens spell it."""
        return [str(tokenizer.decode(row, clean_up_tokenization_spaces=False)) for row in self.rows()]


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Sequence[int],
    pad: int,
    max_new_tokens: int,
    temperature: float | None = None,
    generator: torch.Generator | None = None,
    draws: Float[Tensor, "n t"] | None = None,
    processors: Sequence[LogitsProcessor] = (),
    stopping: Sequence[StoppingCriteria] = (),
    intervene: Intervene | None = None,
    batches: Sequence[Sequence[int]] | None = None,
    max_tokens_per_batch: int = MAX_TOKENS_PER_BATCH,
) -> Generated:
    """Continue prompts: the only place where a model writes.

    Prompts of different lengths share a batch, padded on the left. The model is in evaluation mode and without its own
    generation settings meanwhile. Of a pair, call it within a role, which sets the adapters and keeps other threads
    from the model.

    Args:
        prompts: token ids, one token or more each.
        ends: token ids that end an answer, from :func:`ends_of`.
        pad: token id that fills rows up, from :func:`pad_of`.
        temperature: of sampling; None: the likeliest token at each step.
        generator: source of the samples, on the model's device; None: the global random state.
        draws: a number in [0, 1) for each prompt and each token of its answer, which picks the token: answers then do
            not depend on what they share a batch with. In the place of ``generator``.
        processors: what else changes the logits before a token is chosen.
        stopping: what else ends a row, whose answer then has no end token.
        intervene: a context for each batch, such as an injection.
        batches: numbers of the prompts of each batch; None: by length, up to ``max_tokens_per_batch``.

    Raises:
        ArgumentError: a temperature that is not above 0.
        VocabularyError: a prompt holds an id that the model has no embedding for.
    """
    if batches is None:
        batches = length_batches([len(prompt) + max_new_tokens for prompt in prompts], max_tokens_per_batch)
    if temperature is not None and not temperature > 0:
        raise ArgumentError(f"temperature={temperature}", "a number above 0", "give none for the likeliest text")
    whole: Any = model
    device, answers, real = device_of(model), [], []
    with inference(model), plainly(model):
        for batch in batches:
            rows = [torch.tensor(prompts[row], dtype=torch.int64) for row in batch]
            ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
            check_ids(ids, n_embeddings(unwrapped(model)))
            padding = ids.shape[1] - torch.tensor([len(row) for row in rows])
            mask = (torch.arange(ids.shape[1]) >= padding[:, None]).long()
            drawn = None if draws is None else draws[torch.tensor(batch)]
            choosers = [] if temperature is None else [Sampling(temperature, generator, drawn, ids.shape[1])]
            stops = Stops(stopping, ids)
            with intervene(torch.tensor(batch), padding) if intervene else contextlib.nullcontext():
                out = whole.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=_settings(ends, pad, max_new_tokens),
                    logits_processor=LogitsProcessorList([*processors, *choosers]),
                    stopping_criteria=StoppingCriteriaList([stops] if stopping else []),
                )
            answer = out[:, ids.shape[1] :].cpu()
            answers.append(answer)
            real.append(stops.lengths if stopping else torch.full((len(batch),), answer.shape[1]))
    return _gathered(answers, real, batches, len(prompts), ends, pad)


class Sampling(LogitsProcessor):
    """Makes one sampled token of each row the likeliest, with a random source of its own.

    transformers itself samples from the global random state alone, which two pairs in two threads would share.
    """

    def __init__(
        self,
        temperature: float,
        generator: torch.Generator | None,
        draws: Float[Tensor, "b t"] | None = None,
        prompt_length: int = 0,
    ) -> None:
        self.temperature, self.generator = temperature, generator
        self.draws, self.prompt_length = draws, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        probabilities = torch.softmax(scores / self.temperature, dim=-1)
        if not probabilities[:, -1].isfinite().all():  # one logit that is not finite leaves a row of nothing else
            fix = "restore the weights, or use another dtype: values of this size overflow in it"
            raise NonFiniteError("logits that are NaN or infinite", "finite ones", fix)
        if self.draws is None:
            chosen = torch.multinomial(probabilities, num_samples=1, generator=self.generator)
        else:
            drawn = self.draws[:, input_ids.shape[1] - self.prompt_length, None].to(scores.device)
            heights = probabilities.double().cumsum(dim=-1)
            chosen = torch.searchsorted(heights, drawn.double() * heights[:, -1:], right=True)
            chosen.clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


class Stops(StoppingCriteria):
    """Ends a row once any of some criteria does, and notes how long its answer is then; transformers pads it after."""

    def __init__(self, criteria: Sequence[StoppingCriteria], prompts: Int[Tensor, "b t"]) -> None:
        self.criteria, self.prompt_length = criteria, prompts.shape[1]
        self.lengths: Int[Tensor, " b"] = torch.zeros(len(prompts), dtype=torch.int64)
        """Of each answer: at its end, or so far."""
        self._done: Bool[Tensor, " b"] = torch.zeros(len(prompts), dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:  # type: ignore[override]
        criteria: list[Any] = list(self.criteria)
        done = torch.stack([ends(input_ids, scores) for ends in criteria]).any(dim=0)
        self.lengths[~self._done] = input_ids.shape[1] - self.prompt_length
        self._done |= done.cpu()
        return done


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a text of a causal LM: the tokenizer's, and those in its generation settings."""
    settings: Any = model.generation_config
    named = None if settings is None else settings.eos_token_id
    tokens: list[Any] = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return sorted({token for token in tokens if token is not None})


def pad_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token id that fills rows up; masks tell it from text. 0 where the tokenizer names neither padding nor an end."""
    named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in named if isinstance(token, int)), 0)


def seeded(seed: int | None, device: torch.device) -> torch.Generator | None:
    """A random source of its own for a seed; None, the global random state, for none."""
    return None if seed is None else torch.Generator(device).manual_seed(seed)


def rows_at_a_time(model: PreTrainedModel, n_tokens: int, most: int) -> int:
    """How many rows of ``n_tokens`` a model writes together: ``most``, or on a CPU what :data:`CPU_BYTES` hold."""
    if device_of(model).type != "cpu":
        return most
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if heads:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cached = n_tokens * config.num_hidden_layers * 2 * heads * width * model.dtype.itemsize
    else:  # Mamba: a state of fixed size
        cached = 4 * config.num_hidden_layers * config.hidden_size * config.expand * config.state_size
    bound = max(CPU_BYTES, int(CPU_SHARE * sum(parameter.nbytes for parameter in model.parameters())))
    return max(1, min(most, bound // (cached + _DISTRIBUTIONS * 4 * config.vocab_size)))


def _settings(ends: Sequence[int], pad: int, max_new_tokens: int) -> GenerationConfig:
    """The likeliest token after all processors; nothing else may choose."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_beams=1,
        use_cache=True,
    )


@contextlib.contextmanager
def plainly(model: PreTrainedModel) -> Iterator[None]:
    """While active, a causal LM (in PEFT's wrapper or not) has no generation settings; on exit its own are back.

    transformers fills every open field of the settings that a call gives from the model's, so that answers would not
    be of its plain distribution. Ask for :func:`ends_of` before: in here the model names no end tokens.
    """
    base: Any = unwrapped(model)  # PEFT's wrapper shows the base's settings
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def _gathered(
    answers: list[Tensor],
    real_lengths: list[Tensor],
    batches: Sequence[Sequence[int]],
    n_prompts: int,
    ends: Sequence[int],
    pad: int,
) -> Generated:
    """Batches of answers as one tensor in the order of the prompts, padded after each end."""
    width = max((answer.shape[1] for answer in answers), default=0)
    ids = torch.full((n_prompts, width), pad, dtype=torch.int64)
    longest = torch.zeros(n_prompts, dtype=torch.int64)
    for batch, answer, real in zip(batches, answers, real_lengths, strict=True):
        rows = torch.tensor(batch)
        ids[rows, : answer.shape[1]] = answer
        longest[rows] = real
    # A batch stops at its longest row, and a stopped row before it: columns beyond are padding and no answer.
    real = torch.arange(width) < longest[:, None]
    is_end = torch.isin(ids, torch.tensor(list(ends), dtype=torch.int64)) & real
    ended = is_end.any(dim=1)
    lengths = torch.where(ended, is_end.int().argmax(dim=1) if width else longest, longest)
    kept = torch.arange(width) < (lengths + ended)[:, None]
    return Generated(torch.where(kept, ids, pad), lengths, ended)
