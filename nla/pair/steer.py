"""Interventions on the target: replace activations, add directions, and continue texts under them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nla.errors import ArgumentError, ContextLengthError, PositionError, ShapeError
from nla.metrics import unit
from nla.models.forward import device_of, inference, pad_left
from nla.models.generate import ends_of, pad_of, plain_settings, plainly
from nla.models.hooks import add, patch
from nla.models.points import Point, context_length
from nla.pair import decoder
from nla.text.tokens import Span, encode_batch, length_batches, select_positions

if TYPE_CHECKING:
    from nla.autoencoder import NLA


def generate_patched(
    model: NLA | nn.Module,
    tokenizer: Any,
    texts: Sequence[str] | Sequence[Sequence[int]],
    point: str | Point,
    positions: str | Sequence[int] | Tensor,
    vectors: Tensor | None,
    max_new_tokens: int = 32,
    strength: float | None = None,
    max_tokens_per_batch: int = 8192,
) -> list[str]:
    """Greedy continuations of texts, each with an intervention at one of its tokens.

    Args:
        model: a causal LM, or an NLA, whose target is used.
        texts: texts, or their token ids.
        positions: token index in each text, or "last" or a pattern that matches one token of each.
        vectors: (n, d), one per text; None: no intervention.
        strength: None: :func:`patch`; a number: :func:`add` with this strength.

    Returns:
        What follows each text, without the end token.

    Raises:
        PositionError: an index is out of range, or a pattern matches no token or several.
        ArgumentError, ShapeError, NonFiniteError, ContextLengthError: see :func:`patch` and :func:`add`.
    """
    if max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens={max_new_tokens}", "1 or more", "continue by at least one token")
    role = contextlib.nullcontext() if isinstance(model, nn.Module) else model.role("target")
    module: Any = model if isinstance(model, nn.Module) else model.model
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    ids, where = _prompts(tokenizer, texts, positions, context_length(base), max_new_tokens)
    if vectors is not None and len(vectors) != len(ids):
        raise ShapeError(f"{len(vectors)} vectors for {len(ids)} texts", "one for each", "repeat it for each text")
    ends, pad = ends_of(base, tokenizer), pad_of(tokenizer)
    settings = plain_settings(ends, pad, max_new_tokens, None)
    out = [""] * len(ids)
    with role, inference(base):
        for batch in length_batches([len(row) + max_new_tokens for row in ids], max_tokens_per_batch):
            tokens, padding = pad_left([ids[row] for row in batch], pad)
            mask = (torch.arange(tokens.shape[1]) >= padding[:, None]).long().to(device_of(base))
            edit: contextlib.AbstractContextManager = contextlib.nullcontext()
            if vectors is not None:
                place = (base, point, where[batch] + padding, vectors[batch])
                edit = patch(*place) if strength is None else add(*place, strength)
            with edit, plainly(base):
                found = base.generate(input_ids=tokens.to(mask.device), attention_mask=mask, generation_config=settings)
            for row, answer in zip(batch, found[:, tokens.shape[1] :].tolist(), strict=True):
                stop = next((i for i, token in enumerate(answer) if token in ends), len(answer))
                out[row] = tokenizer.decode(answer[:stop], skip_special_tokens=False)
    return out


def _prompts(
    tokenizer: Any, texts: Sequence[str] | Sequence[Sequence[int]], positions: Any, context: int, max_new_tokens: int
) -> tuple[list[list[int]], Tensor]:
    """Token ids of each text, which leave room to continue, and the index (n,) of the token to intervene on."""
    if isinstance(texts, str) or not len(texts):
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
    places = [select_positions(found, pattern, number) for number, found in enumerate(spans)]
    for number, found in enumerate(places):
        if len(found) != 1:
            raise PositionError(
                f"{len(found)} tokens of text {number} that match {pattern!r}",
                "exactly one token of each text",
                "write a narrower pattern, or give token indexes",
            )
    return [found[0] for found in places]


def edit_direction(nla: NLA, before: str | Sequence[str], after: str | Sequence[str]) -> Tensor:
    """The direction (d,) in which an edit of an explanation moves its reconstruction; (n, d) for lists.

    The difference of the unit reconstructions, after minus before; :func:`add` sets its length.

    Raises:
        ArgumentError: different numbers of texts, or an edit that changes nothing.
        EmptyTextError, VocabularyError, ContextLengthError: see :func:`nla.decoder.prompt_rows`.
    """
    pairs = [[text] if isinstance(text, str) else list(text) for text in (before, after)]
    same = [old for old, new in zip(*pairs, strict=False) if old == new]
    if len(pairs[0]) != len(pairs[1]) or same:
        raise ArgumentError(
            f"{len(pairs[0])} texts before and {len(pairs[1])} after, {len(same)} of them unchanged",
            "as many before as after, each changed",
            "edit each explanation, for example by replacing one word",
        )
    old, new = (unit(decoder.decode(nla, texts)) for texts in pairs)
    return (new - old)[0] if isinstance(before, str) else new - old
