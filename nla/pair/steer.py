"""Interventions on the target: replace activations, add directions, and continue texts under them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla.errors import ArgumentError, ContextLengthError, PositionError, ShapeError
from nla.metrics import unit
from nla.models.generate import MAX_TOKENS_PER_BATCH, Watch, ends_of, generate, pad_of
from nla.models.hooks import add, replace
from nla.models.points import Point, context_length, unwrapped
from nla.pair.decoder import Decoder
from nla.pair.roles import refuse_own_adapters
from nla.text.tokens import Span, encode_batch, select_positions


def generate_patched(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str] | Sequence[Sequence[int]],
    point: str | Point,
    positions: str | Sequence[int] | Int[Tensor, " n"],
    vectors: Float[Tensor, "n d"] | None,
    max_new_tokens: int = 32,
    strength: float | None = None,
    max_tokens_per_batch: int = MAX_TOKENS_PER_BATCH,
    temperature: float | None = None,
    draws: Float[Tensor, "n t"] | None = None,
    watch: Watch | None = None,
) -> list[str]:
    """Continuations of texts, each with an intervention at one of its tokens; greedy if no temperature is given.

    Args:
        model: a causal LM, as it stands; of a pair ``nla.base``, within ``nla.role("target")``.
        texts: texts, or their token ids.
        positions: token index in each text, or "last" or a pattern that matches one token of each.
        vectors: one per text; None: no intervention.
        strength: None: :func:`nla.models.hooks.replace`; a number: :func:`nla.models.hooks.add` with this strength.
        temperature, draws, watch: see :func:`nla.models.generate.generate`.

    Returns:
        What follows each text, without the end token.

    Raises:
        PositionError: an index is out of range, or a pattern matches no token or several.
        ArgumentError: the base of a pair outside the role "target": an adapter of the pair is on.
        ArgumentError, ShapeError, NonFiniteError, ContextLengthError: see the two hooks.
    """
    if max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens={max_new_tokens}", "1 or more", "continue by at least one token")
    base = unwrapped(model)
    refuse_own_adapters(base)
    ids, columns = _prompts(tokenizer, texts, positions, context_length(base), max_new_tokens)
    if vectors is not None and len(vectors) != len(ids):
        raise ShapeError(f"{len(vectors)} vectors for {len(ids)} texts", "one for each", "repeat it for each text")

    def changed(rows: Tensor, padding: Tensor) -> contextlib.AbstractContextManager[None]:
        if vectors is None:
            return contextlib.nullcontext()
        where = (base, point, columns[rows] + padding, vectors[rows])
        return replace(*where) if strength is None else add(*where, strength)

    written = generate(
        base,
        ids,
        ends=ends_of(base, tokenizer),
        pad=pad_of(tokenizer),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        draws=draws,
        watch=watch,
        intervene=changed,
        max_tokens_per_batch=max_tokens_per_batch,
    )
    return written.texts(tokenizer)


def _prompts(
    tokenizer: Any,
    texts: str | Sequence[str] | Sequence[Sequence[int]],
    positions: Any,
    context: int,
    max_new_tokens: int,
) -> tuple[list[list[int]], Tensor]:
    """Token ids of each text, which leave room to continue, and the index (n,) of the token to intervene on."""
    texts = [texts] if isinstance(texts, str) else texts
    if not len(texts):
        raise ArgumentError(f"texts={texts!r}", "a list of one text or more", "pass [text]")
    spans: list[list[Span]] | None = None
    if isinstance(texts[0], str):
        encoded = encode_batch(tokenizer, texts, None)  # type: ignore[arg-type]
        ids, spans = [entry.ids for entry in encoded], [entry.spans for entry in encoded]
    else:
        ids = [[int(token) for token in row] for row in texts]
    bad = [number for number, row in enumerate(ids) if not 0 < len(row) <= context - max_new_tokens]
    if bad:
        raise ContextLengthError(
            f"{len(ids[bad[0]])} tokens in text {bad[0]}",
            f"1 to {context - max_new_tokens}: the context of {context} less the {max_new_tokens} to write",
            "shorten the text, or continue by fewer tokens (max_new_tokens)",
        )
    if positions == "last":
        return ids, torch.tensor([len(row) - 1 for row in ids])
    chosen = _matches(spans, positions) if isinstance(positions, str) else [int(index) for index in positions]
    if len(chosen) != len(ids):
        raise PositionError(f"{len(chosen)} positions for {len(ids)} texts", "one for each", "repeat it for each text")
    wrong = [number for number, index in enumerate(chosen) if not -len(ids[number]) <= index < len(ids[number])]
    if wrong:
        got = f"position {chosen[wrong[0]]} in text {wrong[0]}"
        raise PositionError(got, f"below its {len(ids[wrong[0]])} tokens", "count its tokens from 0, or from -1 back")
    return ids, torch.tensor([index % len(row) for index, row in zip(chosen, ids, strict=True)])


def _matches(spans: list[list[Span]] | None, pattern: str) -> list[int]:
    """The one token of each text that a pattern matches."""
    if spans is None:
        raise PositionError(f"positions {pattern!r} for token ids", "indexes or 'last'", "pass texts instead of ids")
    matches = [select_positions(matched, pattern, number) for number, matched in enumerate(spans)]
    for number, matched in enumerate(matches):
        if len(matched) != 1:
            raise PositionError(
                f"{len(matched)} tokens of text {number} that match {pattern!r}",
                "exactly one token of each text",
                "write a narrower pattern, or give token indexes",
            )
    return [matched[0] for matched in matches]


def edit_direction(
    decoder: Decoder, before: str | Sequence[str], after: str | Sequence[str]
) -> Float[Tensor, " d"] | Float[Tensor, "n d"]:
    """The direction (d,) in which an edit of an explanation moves its reconstruction; (n, d) for lists.

    The difference of the unit reconstructions, after minus before; :func:`add` sets its length.

    Raises:
        ArgumentError: different numbers of texts, or an edit that changes nothing.
        EmptyTextError, VocabularyError, ContextLengthError: see :func:`nla.pair.decoder.Decoder.prompt_rows`.
    """
    pairs = [[text] if isinstance(text, str) else list(text) for text in (before, after)]
    same = [old for old, new in zip(*pairs, strict=False) if old == new]
    if len(pairs[0]) != len(pairs[1]) or same:
        raise ArgumentError(
            f"{len(pairs[0])} texts before and {len(pairs[1])} after, {len(same)} of them unchanged",
            "as many before as after, each changed",
            "edit each explanation, for example by replacing one word",
        )
    old, new = (unit(decoder.decode(texts)) for texts in pairs)
    return (new - old)[0] if isinstance(before, str) else new - old
