"""Requests and a target in, its own documents out: JSON lines of chats whose attributes are known.

A chunk of documents is a file that is written whole or not at all, so a run that was killed goes on with the next one
and ends with the same bytes: each answer is drawn by random numbers of its own, keyed by the seed and the request.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import MinNewTokensLengthLogitsProcessor

from nla.errors import ContextLengthError, ParseError
from nla.models.generate import ends_of, generate, pad_of
from nla.models.points import context_length, device_of
from nla.storage.files import read_json_lines, write_atomic
from nla.text.prompts import ChatPrompts
from nla.train.data.requests import Request
from nla.train.schema import Count, Decides, Number, Positive, section

log = logging.getLogger(__name__)
_FEW = 512
"""Tokens that hold a nucleus more often than not; to find them takes a fifteenth of the time of sorting 50,000."""
_DECIDES = Decides("sample", but_for_default=True)


@section("sample")
class SampleSettings:
    """How a target writes the documents of ``corpus.source: self``."""

    max_new_tokens: Annotated[Count, _DECIDES] = 128
    """Longest answer, in tokens; a longer one is cut here, and marked as cut."""
    temperature: Annotated[Positive, _DECIDES] = 1.0
    top_p: Annotated[Annotated[Number, Field(gt=0, le=1)], _DECIDES] = 0.95
    """Tokens are drawn from the likeliest that hold this share of the probability."""
    batch_size: Annotated[Count, _DECIDES] = 64
    """Answers that are written together; in bfloat16 and float16 they influence one another."""


class Figures(NamedTuple):
    """What a batch, or a run, wrote."""

    answers: int
    tokens: int
    seconds: float


def sample_corpus(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    settings: SampleSettings,
    seed: int,
    folder: Path,
    documents_per_chunk: int,
    process: int = 0,
    processes: int = 1,
) -> Figures:
    """Write the documents of requests as ``folder``/000000.jsonl …; files that are there are whole, and stay.

    A line is a document: ``id``, its place in the corpus; ``messages``; ``attributes`` (see
    :func:`nla.train.data.requests.draw_requests`; ``ended``: its answer ended by itself, and was not cut); ``split``.

    Args:
        process: which of the ``processes`` that share the chunks this is, from 0.

    Raises:
        ConfigError, TemplateError: the tokenizer has no chat template, or one that edits messages.
        ContextLengthError: a request and the longest answer do not fit the target's context.
        StorageError: a file could not be written.
    """
    chunks = list(_chunks(requests, documents_per_chunk))
    mine = [
        (number, first, chunk)
        for number, (first, chunk) in enumerate(chunks)
        if number % processes == process and not chunk_file(folder, number).is_file()
    ]
    asked = ChatPrompts.of(tokenizer)
    total, started = Figures(0, 0, 0.0), time.monotonic()
    with _bar(sum(len(chunk) for *_, chunk in mine), process == 0) as bar:
        for number, first, chunk in mine:
            lines: list[str] = []
            answers = _answers(model, asked, chunk, settings, seed, bar)
            for request, (text, ended, _) in zip(chunk, answers, strict=True):
                for reading in request.readings:
                    messages = [*asked.messages(reading.system, request.user), {"role": "assistant", "content": text}]
                    attributes = reading.attributes | {"ended": ended}
                    document = {"id": first + len(lines), "messages": messages, "attributes": attributes}
                    lines.append(json.dumps(document | {"split": request.split}, ensure_ascii=False) + "\n")
            write_atomic(chunk_file(folder, number), "".join(lines))
            n_tokens = total.tokens + sum(n for *_, n in answers)
            total = Figures(total.answers + len(chunk), n_tokens, time.monotonic() - started)
            rate = total.tokens / total.seconds
            log.info("sample: chunk %d of %d is written (%.0f tokens/s).", number + 1, len(chunks), rate)
    return total


def chunk_file(folder: Path, number: int) -> Path:
    """Where a chunk of documents stands."""
    return folder / f"{number:06d}.jsonl"


def count_documents(folder: Path) -> dict[str, int]:
    """How many chunks and documents a folder of samples holds, documents of each split, and answers not cut.

    Raises:
        ParseError: a line is no document.
    """
    paths = sorted(folder.glob("[0-9]*.jsonl"))
    counts = Counter({"chunks": len(paths), "documents": 0, "train": 0, "eval": 0, "ended": 0})
    for path in paths:
        try:
            for document in read_json_lines(path):
                counts.update(["documents", document["split"], *(["ended"] if document["attributes"]["ended"] else [])])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ParseError(f"{path}, which is damaged", "a document a line", f"delete {path}") from error
    return dict(counts)


class Nucleus(LogitsProcessor):
    """Leaves of each row the fewest tokens, the likeliest, that hold a share of the probability at a temperature.

    The same as transformers' ``TemperatureLogitsWarper`` and ``TopPLogitsWarper``, which sort the whole vocabulary, but
    that all tokens as likely as the last of them are left, too.
    """

    def __init__(self, temperature: float, share: float) -> None:
        self.temperature, self.share = temperature, share

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        scores = scores.float() / self.temperature
        if self.share == 1:
            return scores
        whole = scores.logsumexp(dim=-1, keepdim=True)
        lowest = torch.empty_like(whole)
        rows = torch.arange(len(scores), device=scores.device)
        for few in (min(_FEW, scores.shape[-1]), scores.shape[-1]):
            likeliest = (scores if len(rows) == len(scores) else scores[rows]).topk(few).values
            held = (likeliest - whole[rows]).exp().cumsum(dim=-1)
            last = (held < self.share).sum(dim=-1, keepdim=True).clamp_(max=few - 1)
            lowest[rows] = likeliest.gather(1, last)
            rows = rows[held[:, -1] < self.share]  # flat distributions: of these, the whole vocabulary
            if not len(rows):
                break
        return scores.masked_fill(scores < lowest, -torch.inf)


def _chunks(requests: Sequence[Request], size: int) -> Iterator[tuple[int, list[Request]]]:
    """Requests whose documents make up a chunk, or a few more; and the number of the first of these documents."""
    first, n, chunk = 0, 0, []
    for request in requests:
        chunk.append(request)
        n += len(request.readings)
        if n >= size:
            yield first, chunk
            first, n, chunk = first + n, 0, []
    if chunk:
        yield first, chunk


def _answers(
    model: PreTrainedModel,
    asked: ChatPrompts,
    chunk: Sequence[Request],
    settings: SampleSettings,
    seed: int,
    bar: Any,
) -> list[tuple[str, bool, int]]:
    """The answer to each request, whether it ended by itself, and its tokens; in batches of similar length."""
    prompts = [asked.ids(request.system, request.user) for request in chunk]
    context, longest = context_length(model), max(map(len, prompts))
    if longest + settings.max_new_tokens > context:
        raise ContextLengthError(
            f"a request of {longest} tokens and {settings.max_new_tokens} for the answer",
            f"at most {context} together, the target's context",
            "lower sample.max_new_tokens",
        )
    ends, tokenizer = ends_of(model, asked.tokenizer), asked.tokenizer
    order = sorted(range(len(chunk)), key=lambda row: (len(prompts[row]), row))
    answers: dict[int, tuple[str, bool, int]] = {}
    for start in range(0, len(order), settings.batch_size):
        batch = order[start : start + settings.batch_size]
        width = max(len(prompts[row]) for row in batch)
        processors: list[LogitsProcessor] = [Nucleus(settings.temperature, settings.top_p)]
        if ends:  # an answer without a token is no document
            least = MinNewTokensLengthLogitsProcessor(width, 1, ends, device=str(device_of(model)))
            processors.insert(0, least)
        written = generate(
            model,
            [prompts[row] for row in batch],
            ends=ends,
            pad=pad_of(tokenizer),
            max_new_tokens=settings.max_new_tokens,
            temperature=1.0,
            draws=torch.stack([_draws(seed, chunk[row].number, settings.max_new_tokens) for row in batch]),
            processors=processors,
            batches=[range(len(batch))],
        )
        for row, ids, ended in zip(batch, written.rows(), written.ended.tolist(), strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            # Cut inside a character, a text ends with what stands for none.
            answers[row] = (text if ended else text.rstrip("\N{REPLACEMENT CHARACTER}"), ended, len(ids))
        bar.update(len(batch))
    return [answers[row] for row in range(len(chunk))]


def _draws(seed: int, request: int, n_tokens: int) -> Float[Tensor, " t"]:
    """The random numbers that choose the tokens of one answer."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{request}".encode()).digest()[:7], "big")
    return torch.rand(n_tokens, generator=torch.Generator().manual_seed(key), dtype=torch.float64)


def _bar(n: int, shown: bool) -> Any:
    from tqdm import tqdm

    every_s = 0.1 if sys.stderr.isatty() else 30.0  # a line now and then where nobody sees a bar
    return tqdm(total=n, desc="sample", unit=" answers", mininterval=every_s, disable=not shown)
