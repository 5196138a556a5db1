"""Text-only adversaries, for the families and the comparison of readers: visible texts in, guesses and claims out.

- The **text-only LM** is the target itself, which reads the visible text and goes on writing.
- The **bag of words** is a classifier of the visible text's words.
- The **confabulator** offers several texts that were written from the visible text, and lets the decoder pick the one
  whose reconstruction is closest to the activation: what it gains is the decoder's doing, not the text's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from nla.eval.target import Target, continued, write
from nla.metrics import cosine
from nla.models.points import context_length

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from nla.autoencoder import NLA

N_CONTINUED = 16
"""Tokens that the text-only LM goes on to write."""

Writer = Callable[[int], list[str]]
"""From a seed, one text for every site, written from what is visible there."""


def continue_prefixes(
    target: Target,
    prefixes: Sequence[list[int]],
    temperature: float | None = 1.0,
    seed: int = 0,
    max_new_tokens: int = N_CONTINUED,
) -> list[str]:
    """What the target writes after each prefix of token ids, sampled (None: greedy); empty where no room is left."""
    room = context_length(target.model) - max_new_tokens
    short = [row for row, ids in enumerate(prefixes) if len(ids) <= room]
    texts = [""] * len(prefixes)
    written = continued(target, [prefixes[row] for row in short], max_new_tokens, temperature, seed)
    for row, answer in zip(short, written.rows(), strict=True):
        texts[row] = str(target.tokenizer.decode(answer, skip_special_tokens=True))
    return texts


def continuations(target: Target, prefixes: Sequence[list[int]], max_new_tokens: int = N_CONTINUED) -> Writer:
    """The writer that there always is: the target's sampled continuations."""
    return lambda seed: continue_prefixes(target, prefixes, 1.0, seed, max_new_tokens)


def text_lm_claims(
    target: Target,
    prompts: Sequence[str],
    claim: Callable[[int, str], str],
    max_new_tokens: int = 10,
    stop: str = "\n",
) -> list[str]:
    """The text-only LM asked: it goes on writing each prompt greedily, up to ``stop``.

    Args:
        claim: from a prompt's number and what was written after it, the claim that this makes.
    """
    answers = write(target, prompts, max_new_tokens=max_new_tokens, stop=stop)
    return [claim(row, answer) for row, answer in enumerate(answers)]


def bag_of_words() -> Pipeline:
    """An unfitted classifier of texts: counts of their words, and logistic regression."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = CountVectorizer(lowercase=False, token_pattern=r"\w+")
    return make_pipeline(words, LogisticRegression(max_iter=1000, C=10.0))


def closest_texts(
    nla: NLA, offers: Sequence[Sequence[str]], vectors: Float[Tensor, "n d"], n_picked: int = 1
) -> list[list[str]]:
    """Of the texts offered for each activation, as many for each, those whose reconstructions are closest to it.

    The closest one first.
    """
    n_offers = len(offers[0])
    texts = [offered[number] for number in range(n_offers) for offered in offers]
    closeness = cosine(nla.decoder.decode(texts, strict=False), vectors.repeat(n_offers, 1)).reshape(n_offers, -1)
    best: list[list[int]] = closeness.topk(n_picked, dim=0).indices.T.tolist()
    return [[offered[number] for number in numbers] for offered, numbers in zip(offers, best, strict=True)]


def confabulate(
    nla: NLA, vectors: Float[Tensor, "n d"], writer: Writer, n_tries: int, n_samples: int = 1, seed: int = 0
) -> list[list[str]]:
    """The confabulator: of ``n_tries`` texts for each activation, the ``n_samples`` that are closest to it."""
    tries = [writer(seed + number) for number in range(max(n_tries, n_samples))]
    return closest_texts(nla, list(zip(*tries, strict=True)), vectors, n_samples)
