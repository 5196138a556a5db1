"""A describer on this machine: a chat model of Hugging Face's form, by default the target itself. Free and private."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from nla.errors import ConfigError, ContextLengthError, TemplateError
from nla.models.generate import ends_of, generate, pad_of
from nla.models.points import context_length, device_of
from nla.storage.hashes import digest
from nla.storage.tensors import hash_tensors
from nla.text.fingerprint import tokenizer_hash
from nla.text.templates import render_template
from nla.text.tokens import undated
from nla.train.describe.describer import DescriberSettings, Reply
from nla.train.describe.prompt import CUT, Question

_CONTENT = "\N{OBJECT REPLACEMENT CHARACTER}here\N{OBJECT REPLACEMENT CHARACTER}"
_BATCHES = 16
"""Whose failed samples are drawn again together: fewer, and most of a later try would be spent on a few rows."""
_TAIL_TOKENS = 16
"""The closing tag is looked for in so many tokens at the end; it has fewer in any tokenizer."""


@dataclass
class LocalDescriber:
    """Asks a loaded model in batches; see :class:`nla.train.describe.describer.Describer`.

    The answer starts behind the opening tag, which small models would forget. Sampling is keyed by text, so in float32
    neither batch nor order changes what is drawn, but for ties within rounding. In bfloat16 and float16 a row's numbers
    follow from the others of its batch, too: what is written is a function of a whole group of ``together`` questions.
    """

    settings: DescriberSettings
    model: Any
    """A causal LM without hooks or adapters of a pair."""
    tokenizer: Any

    def __post_init__(self) -> None:
        """Raises: ConfigError, TemplateError: the tokenizer has no chat template, or one that edits messages."""
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "a local describer whose tokenizer has no chat template",
                "a chat model",
                "name an instruction-tuned one as describer.model, or use an endpoint",
            )
        self.counted_by = "the describer's tokenizer"
        self._identity = {
            "describer": "local",
            "weights": weights_print(self.model),
            "tokenizer": tokenizer_hash(self.tokenizer),
            "max_tokens": self.settings.max_tokens,
            "temperature": self.settings.temperature or 0.0,
            "seed": self.settings.seed if self.settings.temperature else None,
        }
        if self.model.dtype != torch.float32:  # the size of a batch is part of what is drawn
            self._identity["concurrency"] = self.settings.concurrency
        self._before, self._after = self._render()
        self.together = self.settings.concurrency * (_BATCHES if self.settings.temperature else 1)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Weights, tokenizer and sampling; the model's name may stand for other weights tomorrow."""
        return self._identity

    def count(self, text: str) -> int:
        """Tokens of the whole prompt, with the chat template and the opening tag."""
        return len(self._ids(text, ""))

    def ask(self, questions: Iterator[Question], stop: Callable[[], bool]) -> Iterator[Reply]:
        """See :meth:`nla.train.describe.describer.Describer.ask`; ``stop`` is asked between batches.

        A batch is so many questions in a row, so those in a row should be of similar length.

        Raises:
            ContextLengthError: a prompt and the longest answer do not fit the model's context.
        """
        s = self.settings
        while group := list(itertools.islice(questions, self.together)):
            waiting = [(question, Reply(question.number)) for question in group]
            for attempt in range(s.attempts):
                again = []
                for start in range(0, len(waiting), s.concurrency):
                    if stop():
                        return
                    batch = waiting[start : start + s.concurrency]
                    self._answer(batch, [self._ids(question.prompt, question.tag) for question, _ in batch], attempt)
                    for question, reply in batch:
                        if reply.text is None and attempt + 1 < s.attempts:
                            reply.retried[reply.problem] += 1
                            again.append((question, reply))
                        else:
                            yield reply
                waiting = again

    def _ids(self, prompt: str, tag: str) -> list[int]:
        """Token ids of the chat up to where the claims begin; control tokens that the prompt spells stay plain text."""
        after = self._after + (f"<{tag}>" if tag else "")
        parts = (self._before, False), (prompt, True), (after, False)
        encoded = [self.tokenizer(t, add_special_tokens=False, split_special_tokens=plain) for t, plain in parts]
        return [token for part in encoded for token in part["input_ids"]]

    def _render(self) -> tuple[str, str]:
        """What the chat template writes before and after a message."""
        messages = [{"role": "user", "content": _CONTENT}]
        chat = render_template(
            self.tokenizer, undated(self.tokenizer), messages, add_generation_prompt=True, enable_thinking=False
        )
        before, content, after = chat.partition(_CONTENT)
        if not content:
            raise TemplateError("a chat template that edits messages", "one that shows them", "use another describer")
        return before, after

    def _answer(self, waiting: Sequence[tuple[Question, Reply]], ids: list[list[int]], attempt: int) -> None:
        """Write one batch's answers into their replies."""
        s, context = self.settings, context_length(self.model)
        longest = max(map(len, ids))
        if longest + s.max_tokens > context:
            raise ContextLengthError(
                f"a prompt of {longest} tokens and {s.max_tokens} for the answer",
                f"at most {context} together, the describer's context",
                "lower describer.max_chars or describer.max_tokens",
            )
        closings = [f"</{question.tag}>" for question, _ in waiting]
        processors: list[LogitsProcessor] = []
        if s.temperature:
            keys = [f"{s.seed}/{attempt}/{question.prompt}" for question, _ in waiting]
            processors.append(KeyedSampling(keys, s.temperature, device_of(self.model)))
        written = generate(
            self.model,
            ids,
            ends=ends_of(self.model, self.tokenizer),
            pad=pad_of(self.tokenizer),
            max_new_tokens=s.max_tokens,
            processors=processors,
            stopping=[Closed(self.tokenizer, closings, longest)],
            batches=[range(len(ids))],
        )
        answers = zip(written.rows(), written.ended.tolist(), ids, waiting, strict=True)
        for row, ended, prompt, (question, reply) in answers:
            text = self.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            before, closing, _ = text.partition(f"</{question.tag}>")
            reply.answer = f"<{question.tag}>{before}{closing}"
            reply.text, reply.problem = question.read(reply.answer)
            if not ended and not closing:
                reply.problem = CUT
            reply.n_requests += 1
            reply.tokens_in += len(prompt)
            reply.tokens_out += len(row)


class KeyedSampling(LogitsProcessor):
    """Makes the likeliest token of each row a sample from its distribution, by Gumbel noise keyed to the row."""

    def __init__(self, keys: Sequence[str], temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(_seed(key)) for key in keys]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        noise = torch.stack([torch.empty_like(row, dtype=torch.float32) for row in scores])
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self.temperature - noise.log()


class Closed(StoppingCriteria):
    """Ends a row once it has written its closing tag."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, closings: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.closings, self.prompt_length = tokenizer, closings, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        written = input_ids[:, self.prompt_length :][:, -_TAIL_TOKENS:]
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        closed = [closing in text for closing, text in zip(self.closings, texts, strict=True)]
        return torch.tensor(closed, device=input_ids.device)


def weights_print(model: PreTrainedModel) -> str:
    """A hash of a model as it stands in memory: its configuration, and all of its tensors; a second for each GB."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith(("_", "transformers"))}
    return digest([config, hash_tensors(tensors)])[:32]


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
