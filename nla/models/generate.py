"""How a causal LM continues prompts: token ids in, token ids out, from its plain distribution, ended in one way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
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
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation.logits_process import SuppressTokensLogitsProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nla.errors import ArgumentError, NonFiniteError
from nla.metrics import check_ids
from nla.models.hooks import Intervene, inference
from nla.models.points import attends_plainly, device_of, n_embeddings, unwrapped
from nla.text.tokens import length_batches

MAX_TOKENS_PER_BATCH = 8192
CPU_BYTES, CPU_SHARE = 160 << 20, 0.25
"""Memory that the rows of a batch may take on a CPU, for keys and values and the next token's distributions: so many
bytes, or this share of the weights' own if that is more, since each step reads all weights however many rows there are.
"""
_DISTRIBUTIONS = 5
"""Copies of a row's logits that choosing a token holds at once."""


Watch = Callable[[Int[Tensor, " b"], Int[Tensor, "b t"]], Bool[Tensor, " b"]]
"""From the numbers of a batch's answers and their tokens so far, on the CPU: which end here. What stands after an end
token is no part of an answer."""


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
    forbidden: Sequence[int] = (),
    processors: Sequence[LogitsProcessor] = (),
    stopping: Sequence[StoppingCriteria] = (),
    watch: Watch | None = None,
    intervene: Intervene | None = None,
    batches: Sequence[Sequence[int]] | None = None,
    max_tokens_per_batch: int = MAX_TOKENS_PER_BATCH,
    copies: int = 1,
    common: int | None = None,
) -> Generated:
    """Continue prompts: the only place where a model writes.

    Prompts of different lengths share a batch, padded on the left. The model is in evaluation mode and without its own
    generation settings meanwhile. Of a pair, call it within a role, which sets the adapters and keeps other threads
    from the model.

    transformers writes, except where ``common`` says that all prompts are one but for an intervention: then each token
    of it is computed once, not once for every answer, and an answer that has ended costs nothing more. The answers are
    the same.

    Args:
        prompts: token ids, one token or more each.
        ends: token ids that end an answer, from :func:`ends_of`.
        pad: token id that fills rows up, from :func:`pad_of`.
        temperature: of sampling; None: the likeliest token at each step.
        generator: source of the samples, on the model's device; None: the global random state.
        draws: a number in [0, 1) for each answer and each token of it, which picks the token: answers then do not
            depend on what they share a batch with. In the place of ``generator``.
        forbidden: token ids that are never written.
        processors: what else changes the logits before a token is chosen.
        stopping: what else ends a row, whose answer then has no end token.
        watch: sees each batch's answers after every token, and may end some, which then have no end token either.
        intervene: a context for each batch, such as an injection.
        batches: numbers of the prompts of each batch; None: by length, up to ``max_tokens_per_batch``.
        copies: answers to each prompt: answer ``i * copies + j`` is number j of prompt i.
        common: the prompts are equal, and so many of their leading tokens come before all that ``intervene`` does;
            None: they may differ.

    Raises:
        ArgumentError: a temperature that is not above 0.
        VocabularyError: a prompt holds an id that the model has no embedding for.
    """
    if batches is None:
        lengths = [copies * (len(prompt) + max_new_tokens) for prompt in prompts]
        batches = length_batches(lengths, max_tokens_per_batch)
    if temperature is not None and not temperature > 0:
        raise ArgumentError(f"temperature={temperature}", "a number above 0", "give none for the likeliest text")
    whole: Any = model
    device, answers, real = device_of(model), [], []
    at_once = common is not None and not (stopping or processors) and attends_plainly(model)
    with inference(model), plainly(model):
        for batch in batches:
            numbers = torch.tensor(batch)
            rows = (numbers[:, None] * copies + torch.arange(copies)).reshape(-1)
            drawn = None if draws is None else draws[rows]
            check_ids(torch.tensor([max(prompts[number]) for number in batch]), n_embeddings(unwrapped(model)))
            if at_once and common is not None:
                choose = _Chooser(temperature, generator, drawn, forbidden)
                prompt = _Prompt(torch.tensor(prompts[batch[0]], device=device), common, numbers, copies, intervene)
                answer, lengths = _write_together(whole, prompt, choose, ends, pad, max_new_tokens, watch)
                answers.append(answer.cpu())
                real.append(lengths)
                continue
            ids = pad_sequence(
                [torch.tensor(prompts[number], dtype=torch.int64) for number in batch for _ in range(copies)],
                batch_first=True,
                padding_value=pad,
                padding_side="left",
            )
            padding = ids.shape[1] - torch.tensor([len(prompts[number]) for number in batch for _ in range(copies)])
            mask = (torch.arange(ids.shape[1]) >= padding[:, None]).long()
            banned = [SuppressTokensLogitsProcessor(list(forbidden), str(device))] if forbidden else []
            choosers = [] if temperature is None else [Sampling(temperature, generator, drawn, ids.shape[1])]
            criteria = [*stopping, *([] if watch is None else [_Watching(watch, rows, ids.shape[1])])]
            stops = Stops(criteria, ids)
            owners = numbers.repeat_interleave(copies)
            with intervene(owners, padding) if intervene else contextlib.nullcontext():
                out = whole.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=_settings(ends, pad, max_new_tokens),
                    logits_processor=LogitsProcessorList([*processors, *banned, *choosers]),
                    stopping_criteria=StoppingCriteriaList([stops] if criteria else []),
                )
            answer = out[:, ids.shape[1] :].cpu()
            answers.append(answer)
            real.append(stops.lengths if criteria else torch.full((len(rows),), answer.shape[1]))
    order = [[number * copies + copy for number in batch for copy in range(copies)] for batch in batches]
    return _gathered(answers, real, order, len(prompts) * copies, ends, pad)


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
        drawn = None if self.draws is None else self.draws[:, input_ids.shape[1] - self.prompt_length]
        chosen = sampled(scores / self.temperature, self.generator, drawn)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


_CHUNK = 256
"""Tokens of a vocabulary whose probabilities are summed together when one is drawn."""


def sampled(
    logits: Float[Tensor, "n v"], generator: torch.Generator | None, drawn: Float[Tensor, " n"] | None
) -> Int[Tensor, " n"]:
    """A token of each row's distribution: by ``drawn`` in [0, 1), its place among the probabilities, or by a source.

    Raises:
        NonFiniteError: a logit is NaN or infinite.
    """
    probabilities = torch.softmax(logits, dim=-1)
    if not probabilities[:, -1].isfinite().all():  # one logit that is not finite leaves a row of nothing else
        fix = "restore the weights, or use another dtype: values of this size overflow in it"
        raise NonFiniteError("logits that are NaN or infinite", "finite ones", fix)
    if drawn is None:
        return torch.multinomial(probabilities, num_samples=1, generator=generator)[:, 0]
    # The sums of chunks say in which chunk the token is, so that only that one is summed token by token.
    chunks = nn.functional.pad(probabilities, (0, -probabilities.shape[1] % _CHUNK)).unflatten(1, (-1, _CHUNK))
    heights = chunks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    height = drawn.to(logits.device).double()[:, None] * heights[:, -1:]
    chunk = torch.searchsorted(heights, height, right=True).clamp_(max=heights.shape[1] - 1)
    below = torch.where(chunk > 0, heights.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inner = chunks[torch.arange(len(chunks), device=chunks.device), chunk[:, 0]].double().cumsum(dim=-1)
    token = torch.searchsorted(inner, height - below, right=True).clamp_(max=_CHUNK - 1)
    return (chunk * _CHUNK + token)[:, 0].clamp(max=logits.shape[1] - 1)


@dataclass(frozen=True)
class _Prompt:
    """One prompt that some answers share, but for what ``intervene`` does after its ``common`` leading tokens."""

    ids: Int[Tensor, " t"]
    common: int
    numbers: Int[Tensor, " u"]
    """Of the activations, or whatever it is that ``intervene`` tells apart."""
    copies: int
    intervene: Intervene | None


class _Chooser:
    """Picks the next token of each answer that goes on."""

    def __init__(
        self,
        temperature: float | None,
        generator: torch.Generator | None,
        draws: Float[Tensor, "n t"] | None,
        forbidden: Sequence[int],
    ) -> None:
        self.temperature, self.generator, self.draws, self.forbidden = temperature, generator, draws, list(forbidden)
        self.by_row = temperature is None or draws is not None
        """Whether an answer's tokens do not depend on which others there are, so that ended ones may be left out."""

    def __call__(self, logits: Float[Tensor, "n v"], rows: Int[Tensor, " n"], step: int) -> Int[Tensor, " n"]:
        drawn = None if self.draws is None else self.draws[rows.cpu(), step]
        parts = torch.arange(len(rows)).split(_ROWS_CHOSEN if self.by_row else len(rows))
        return torch.cat([self._choose(logits[part], None if drawn is None else drawn[part]) for part in parts])

    def _choose(self, logits: Tensor, drawn: Tensor | None) -> Tensor:
        scores = logits.to(torch.float32, copy=True)
        scores[:, self.forbidden] = -torch.inf
        if self.temperature is None:
            return scores.argmax(dim=-1)
        return sampled(scores / self.temperature, self.generator, drawn)


_ROWS_CHOSEN = 64
"""Answers whose next token is chosen at a time: their distributions in float32 are what choosing holds."""
_FEWER = 0.85
"""Ended answers are left out once no more than this share of the rows in the batch goes on: leaving out copies."""


def _write_together(
    model: Any,
    prompt: _Prompt,
    choose: _Chooser,
    ends: Sequence[int],
    pad: int,
    max_new_tokens: int,
    watch: Watch | None,
) -> tuple[Int[Tensor, "n t"], Int[Tensor, " n"]]:
    """Answers to one prompt, ``copies`` for each of its numbers, and how many tokens each has unless it ends before."""
    cache, logits = _read_once(model, prompt)
    n, device = len(prompt.numbers) * prompt.copies, logits.device
    rows = torch.arange(n, device=device)
    numbers = (prompt.numbers[:, None] * prompt.copies + torch.arange(prompt.copies)).reshape(-1)
    lengths = torch.full((n,), max_new_tokens)
    answers = torch.full((n, max_new_tokens), pad, dtype=torch.int64, device=device)
    stops, done = torch.tensor(list(ends), dtype=torch.int64, device=device), torch.zeros(n, dtype=torch.bool)
    together = _Together(cache, prompt.copies, max_new_tokens)
    logits = logits.repeat_interleave(prompt.copies, dim=0)
    with together.attending(model):
        for step in range(max_new_tokens):
            tokens = choose(logits, rows, step)
            answers[rows, step] = tokens
            done |= torch.isin(tokens, stops).cpu()
            if watch is not None:
                told = watch(numbers, answers[:, : step + 1].cpu()) & (lengths > step)
                lengths[told] = step + 1
                done |= told[rows.cpu()]
            if done.all() or step + 1 == max_new_tokens:
                return answers[:, : step + 1], lengths
            if choose.by_row and (~done).sum() <= _FEWER * len(done):
                kept = (~done).nonzero()[:, 0].to(device)
                together.keep(kept)
                rows, tokens, done = rows[kept], tokens[kept], torch.zeros(len(kept), dtype=torch.bool)
            out = model(input_ids=tokens[:, None], past_key_values=together.cache, use_cache=True)
            logits = out.logits[:, -1]
    return answers, lengths


def _read_once(model: Any, prompt: _Prompt) -> tuple[DynamicCache, Float[Tensor, "u v"]]:
    """Keys and values of the prompt, and what comes next after it, for each of its numbers."""
    # Two tokens or more go through the intervention: one alone would look like a step of an answer.
    common, u = max(0, min(prompt.common, len(prompt.ids) - 2)), len(prompt.numbers)
    cache = DynamicCache(config=unwrapped(model).config)
    if common:
        model(input_ids=prompt.ids[None, :common], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(u)
    passed = torch.full((u,), -common)
    with prompt.intervene(prompt.numbers, passed) if prompt.intervene else contextlib.nullcontext():
        rest = prompt.ids[None, common:].expand(u, -1)
        out = model(input_ids=rest, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, out.logits[:, -1]


class _AnswersLayer(DynamicLayer):
    """One block's keys and values: the prompts', once for all answers, and each answer's own, written in place."""

    def __init__(self, prompt: Any, n: int, most: int) -> None:
        super().__init__()
        self.prompt_keys: Float[Tensor, "u h p d"] = prompt.keys
        self.prompt_values: Float[Tensor, "u h p e"] = prompt.values
        self.own = [part.new_empty(n, part.shape[1], most, part.shape[3]) for part in (prompt.keys, prompt.values)]
        self.n_own, self.is_initialized = 0, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for own, new in zip(self.own, (key_states, value_states), strict=True):
            own[:, :, self.n_own : self.n_own + 1] = new
        self.n_own += 1
        keys, values = (own[:, :, : self.n_own] for own in self.own)
        self.keys, self.values = keys, values
        return keys, values

    def get_seq_length(self) -> int:
        return self.prompt_keys.shape[2] + self.n_own

    def keep(self, rows: Int[Tensor, " m"]) -> None:
        kept = [own.new_empty(len(rows), *own.shape[1:]) for own in self.own]
        for new, own in zip(kept, self.own, strict=True):
            new[:, :, : self.n_own] = own[rows, :, : self.n_own]
        self.own = kept


class _Together:
    """Attention of answers to one prompt each, which several share: its keys meet all their queries in one product."""

    NAME = "nla_answers"

    def __init__(self, prompts: DynamicCache, copies: int, most: int) -> None:
        layers: list[Any] = prompts.layers
        self.u, self.copies = len(layers[0].keys), copies
        self.slots: Tensor = torch.arange(self.u * copies, device=layers[0].device)
        """Of each answer that goes on, its place among all: its prompt is number ``slot // copies``."""
        self.layers = [_AnswersLayer(layer, self.u * copies, most) for layer in layers]
        self.cache = DynamicCache()
        self.cache.layers = list[Any](self.layers)

    def keep(self, rows: Int[Tensor, " m"]) -> None:
        """Go on with some of the answers."""
        self.slots = self.slots[rows]
        for layer in self.layers:
            layer.keep(rows)

    @contextlib.contextmanager
    def attending(self, model: nn.Module) -> Iterator[None]:
        """While active, the model's blocks attend by this; one token of each answer at a time."""
        config: Any = unwrapped(model).config
        before, name = config._attn_implementation, f"{self.NAME}_{id(self)}"
        ALL_ATTENTION_FUNCTIONS.register(name, self.attend)
        config._attn_implementation = name
        try:
            yield
        finally:
            config._attn_implementation = before
            del ALL_ATTENTION_FUNCTIONS._global_mapping[name]

    def attend(
        self,
        module: Any,
        query: Float[Tensor, "n heads 1 d"],
        key: Float[Tensor, "n h t d"],
        value: Float[Tensor, "n h t e"],
        attention_mask: None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Float[Tensor, "n 1 heads e"], None]:
        """As transformers calls it; the softmax, over the prompt's tokens and the answer's, is in float32."""
        layer = self.layers[module.layer_idx]
        (n, heads, _one, d), h = query.shape, key.shape[1]
        grouped, together = query.reshape(n, h, heads // h, d), (self.u, h, self.copies * (heads // h))
        of_prompt = self._from_slots(self._to_slots(grouped, together) @ layer.prompt_keys.transpose(2, 3), grouped)
        scores = torch.cat([of_prompt, grouped @ key.transpose(2, 3)], dim=-1).float()
        weights = torch.softmax(scores * (d**-0.5 if scaling is None else scaling), dim=-1).to(value.dtype)
        on_prompt, on_own = weights.tensor_split([of_prompt.shape[-1]], dim=-1)
        out = self._from_slots(self._to_slots(on_prompt, together) @ layer.prompt_values, grouped) + on_own @ value
        return out.reshape(n, 1, heads, -1), None

    def _to_slots(self, rows: Float[Tensor, "n h g x"], together: tuple[int, int, int]) -> Float[Tensor, "u h cg x"]:
        """Rows of answers side by side with those of the same prompt; zeros where an answer has ended."""
        all_rows = rows.new_zeros(self.u * self.copies, *rows.shape[1:]).index_copy_(0, self.slots, rows)
        return all_rows.unflatten(0, (self.u, self.copies)).transpose(1, 2).reshape(*together, rows.shape[-1])

    def _from_slots(self, all_rows: Float[Tensor, "u h cg x"], like: Float[Tensor, "n h g d"]) -> Tensor:
        h, g = like.shape[1:3]
        rows = all_rows.reshape(self.u, h, self.copies, g, -1).transpose(1, 2).flatten(0, 1)
        return rows[self.slots]


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


class _Watching(StoppingCriteria):
    """A watch as transformers calls it."""

    def __init__(self, watch: Watch, rows: Int[Tensor, " b"], prompt_length: int) -> None:
        self.watch, self.rows, self.prompt_length = watch, rows, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:  # type: ignore[override]
        return self.watch(self.rows, input_ids[:, self.prompt_length :].cpu()).to(input_ids.device)


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
    """How many rows of ``n_tokens`` a model writes together: ``most``, or on a CPU what ``CPU_BYTES`` hold."""
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
