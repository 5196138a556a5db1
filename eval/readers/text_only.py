"""Readers of the visible text alone: what could be known without looking inside.

The text-only LM is the target itself, which reads the text up to the token and goes on writing. The confabulator
offers several texts that were written from the visible text, and lets the decoder pick the one whose reconstruction
is closest to the activation: what it gains is the decoder's doing, not the text's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nla.eval.readers.patchscopes import base_of
from nla.eval.readers.tasks import Sites
from nla.eval.target import Target, generate, token_ids
from nla.metrics import cosine
from nla.models.forward import device_of
from nla.models.generate import ends_of, pad_of, plain_settings
from nla.models.points import context_length
from nla.pair.decoder import decode

if TYPE_CHECKING:
    from nla.autoencoder import NLA

N_CONTINUED = 16

Writer = Callable[[int], list[str]]
"""From a seed, one text for every site, written from what is visible there."""


def continue_sites(
    target: Target,
    sites: Sites,
    temperature: float | None = 1.0,
    seed: int = 0,
    max_new_tokens: int = N_CONTINUED,
) -> list[str]:
    """What the target writes after each site's visible text, sampled (None: greedy); empty where no room is left."""
    found = _prompts(target, sites)
    room = context_length(target.model) - max_new_tokens
    pad, device = pad_of(target.tokenizer), device_of(target.model)
    settings = plain_settings(ends_of(base_of(target.model), target.tokenizer), pad, max_new_tokens, temperature)
    short = [row for row, ids in enumerate(found) if len(ids) <= room]
    texts = [""] * len(found)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        added = generate(target, [found[row] for row in short], settings)
    for row, answer in zip(short, added, strict=True):
        texts[row] = target.tokenizer.decode(answer, skip_special_tokens=True)
    return texts


def _prompts(target: Target, sites: Sites) -> list[list[int]]:
    """Token ids up to and including each site's token, as they stand in its text."""
    unique = sites.unique_texts
    encoded = dict(zip(unique, token_ids(target, unique), strict=True))
    return [
        encoded[text][: token + 1 if token >= 0 else len(encoded[text]) + token + 1]
        for text, token in zip(sites.texts, sites.tokens, strict=True)
    ]


def text_lm(
    target: Target, sites: Sites, n_samples: int, seed: int = 0, max_new_tokens: int = N_CONTINUED
) -> list[list[str]]:
    """The visible text and, after it, what the target goes on to write: ``n_samples`` texts a site."""
    seen = sites.visible(target.tokenizer)
    drawn = [continue_sites(target, sites, 1.0, seed + sample, max_new_tokens) for sample in range(n_samples)]
    return [[before + one[row] for one in drawn] for row, before in enumerate(seen)]


def continuations(target: Target, sites: Sites, max_new_tokens: int = N_CONTINUED) -> Writer:
    """The writer of last resort: the target's sampled continuations, for a task that brings no better one."""
    return lambda seed: continue_sites(target, sites, 1.0, seed, max_new_tokens)


def confabulate(
    nla: NLA, vectors: Tensor, writer: Writer, n_tries: int, n_samples: int = 1, seed: int = 0
) -> list[list[str]]:
    """Of ``n_tries`` texts a site, the ``n_samples`` whose reconstructions are closest to its activation (n, d)."""
    tries = [writer(seed + number) for number in range(max(n_tries, n_samples))]
    texts: Sequence[str] = [text for one in tries for text in one]
    closeness = cosine(decode(nla, texts, strict=False), vectors.repeat(len(tries), 1)).reshape(len(tries), -1)
    best = closeness.topk(n_samples, dim=0).indices.T.tolist()
    return [[tries[number][row] for number in numbers] for row, numbers in enumerate(best)]
