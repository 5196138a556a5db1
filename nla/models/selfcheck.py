"""A model's forward pass, held against itself: is what is read between its blocks the residual stream, and does what is
injected reach its row? For models of types that no test knows.

A few tokens go through it: milliseconds on a small model.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from nla.errors import ArchitectureError
from nla.models.hooks import embedding_scale, inference, inject, record
from nla.models.points import (
    TESTED,
    Point,
    backbone,
    blocks,
    d_model,
    device_of,
    embeddings,
    final_norm,
    truncated_view,
)

N_TOKENS, COLUMN, PADDING = 6, 2, 3
_CANDIDATES = 512
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest relative difference; 3 % in shorter types."""

_PASSED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_WHOLE: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Of them, those that give other values if a row goes through a cache in parts of several tokens."""


def check_stream(model: PreTrainedModel) -> None:
    """Refuse a model whose residual stream is not found between its blocks; of the types in ``TESTED`` tests show it.

    What each block returns must be what transformers gives as hidden states and, after the final norm, as the last of
    them; the view that is cut after a block must give what the whole model has there; later tokens must not change
    earlier ones; an injected vector must enter the first block as it is, and change its own row alone, from its own
    column on; and padding on the left and a cache must change nothing while tokens are written one by one.

    Args:
        model: a causal LM, or a backbone that is cut after a block. Checked once for each object.

    Raises:
        ArchitectureError: one of these fails; the message says what differed.
    """
    stack = backbone(model)
    if stack.config.model_type in TESTED or stack in _PASSED:
        return
    in_parts = True
    try:
        with inference(model):
            differed = _first_difference(model, stack)
            in_parts = bool(differed) or _alike_in_parts(model)
    except ArchitectureError:
        raise
    except Exception as error:  # a forward pass of anybody's code
        differed = f"its forward pass on {N_TOKENS} tokens fails ({type(error).__name__}: {str(error)[:200]})"
    if differed:
        raise ArchitectureError(
            f"a model of type {stack.config.model_type!r}, of which {differed}",
            "blocks that each return the residual stream, which flows from one to the next and nowhere else",
            f"use another target, of type {', '.join(sorted(TESTED))} for example",
        )
    _PASSED.add(stack)
    if not in_parts:
        _WHOLE.add(stack)


def reads_in_parts(model: PreTrainedModel) -> bool:
    """Whether a row may go through a cache in parts of several tokens. Mamba's layers use their state, in many types,
    for single tokens alone: Jamba, Bamba, Zamba.

    Raises:
        ArchitectureError: see :func:`check_stream`.
    """
    check_stream(model)
    return backbone(model) not in _WHOLE


def _first_difference(model: PreTrainedModel, stack: PreTrainedModel) -> str | None:
    """What is not as it must be; None if all is."""
    n_blocks, width = len(blocks(model)), d_model(model)
    points = [Point("resid_post", layer) for layer in range(n_blocks)]
    ids = _telling_ids(model)
    with record(model, points) as at:
        out = stack(input_ids=ids, use_cache=False, output_hidden_states=True)
    streams = [at.get(str(point), torch.empty(0)) for point in points]
    for point, stream in zip(points, streams, strict=True):
        if stream.shape != (*ids.shape, width):
            return f"{point} has the shape {tuple(stream.shape)} and not {(*ids.shape, width)}"
        if not bool(stream.isfinite().all()):
            return f"{point} is not finite"
    hidden = out.hidden_states or ()
    if len(hidden) != n_blocks + 1:
        return f"transformers gives {len(hidden)} hidden states for {n_blocks} blocks"
    strange = [
        [point for point, *two in zip(points[:-1], streams, hidden[first:], strict=False) if _differ(*two)]
        for first in (1, 0)  # Mamba's hidden states begin after the first block
    ]
    if all(strange):
        return f"{strange[0][0]} is not hidden state {strange[0][0].layer + 1} of transformers"
    if _differ(final_norm(model)(streams[-1]), out.last_hidden_state):
        return f"{points[-1]} after the final norm is not the last hidden state of transformers"
    for layer in sorted({n_blocks // 2, n_blocks - 1}):
        view = truncated_view(model, points[layer])
        if _differ(view(input_ids=ids, use_cache=False).last_hidden_state, streams[layer]):
            return f"{points[layer]} of the view that is cut there is not that of the whole model"
    later = ids.clone()
    later[:, -1] = ids[:, 0]
    changed = truncated_view(model, points[-1])(input_ids=later, use_cache=False).last_hidden_state
    if _differ(changed[:, :-1], streams[-1][:, :-1]) or not _differ(changed[:, -1], streams[-1][:, -1]):
        return "a token changes what stands before it, or not what stands at it"
    return _misplaced(model, ids, points[0]) or _changed_by_padding(model, ids, streams[-1])


def _telling_ids(model: PreTrainedModel) -> Tensor:
    """Token ids, (2, N_TOKENS), whose embeddings are not nothing and point in different directions, as far as there are
    any: those of untrained tokens are zero or equal."""
    known = torch.arange(min(_CANDIDATES, backbone(model).config.vocab_size), device=device_of(model))
    vectors = embeddings(model)(known).float()
    lengths = vectors.norm(dim=1)
    alike = (nn.functional.normalize(vectors, dim=1) @ nn.functional.normalize(vectors, dim=1).T) > 0.99
    new = ~alike.tril(diagonal=-1).any(dim=1) & (lengths > 0.1 * lengths.median())
    telling = known[new] if bool(new.any()) else known
    return telling[torch.arange(2 * N_TOKENS, device=telling.device) % len(telling)].reshape(2, N_TOKENS)


def _changed_by_padding(model: PreTrainedModel, ids: Tensor, streams: Tensor) -> str | None:
    """Whether rows that are padded on the left, and whose last tokens come one by one, differ from the plain ones."""
    view = truncated_view(model, Point("resid_post", len(blocks(model)) - 1))
    padded = torch.cat([ids[:, :PADDING], ids], dim=1)
    mask = (torch.arange(padded.shape[1], device=ids.device) >= PADDING).long().expand_as(padded)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    takes_places = "position_ids" in inspect.signature(view.forward).parameters
    writes = model is not backbone(model)  # a backbone alone does not
    known = inspect.signature(view.forward).parameters
    kept = "cache_params" if "cache_params" in known else "past_key_values"
    cache, given, starts = None, [], [0, *range(padded.shape[1] - 2, padded.shape[1])] if writes else [0]
    for start, end in zip(starts, [*starts[1:], padded.shape[1]], strict=True):
        own: dict[str, Any] = {"position_ids": places[:, start:end]} if takes_places else {}
        own |= {kept: cache, "use_cache": True} if writes else {"use_cache": False}
        seen = mask[:, :end] if kept == "past_key_values" or not start else None
        out = view(input_ids=padded[:, start:end], attention_mask=seen, **own)
        cache = getattr(out, kept, None)  # RecurrentGemma keeps its state in itself
        given.append(out.last_hidden_state)
    first = given[0][:, PADDING:]
    if _differ(first, streams[:, : first.shape[1]]):
        return "padding on the left changes what stands after it"
    if len(given) > 1 and _differ(torch.cat(given[1:], dim=1), streams[:, first.shape[1] :]):
        return "a token that comes alone, with those before it in a cache, is not read as in one pass"
    return None


def _alike_in_parts(model: PreTrainedModel) -> bool:
    """Whether a row in two parts, through a cache such as :mod:`nla.models.long_text` gives, is the row in one."""
    view = truncated_view(model, Point("resid_post", len(blocks(model)) - 1))
    ids, cache = _telling_ids(model), DynamicCache(config=view.config)
    whole = view(input_ids=ids, use_cache=False).last_hidden_state
    try:
        parts = [
            view(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state
            for part in ids.split(N_TOKENS // 2, dim=1)
        ]
    except Exception:  # a cache of its own kind
        return False
    return not _differ(torch.cat(parts, dim=1), whole)


def _misplaced(model: PreTrainedModel, ids: Tensor, point: Point) -> str | None:
    """What an injection does that it must not, or does not do; None if all is well."""
    embedding_scale(model)
    view, columns = truncated_view(model, point), torch.full((2,), COLUMN, device=ids.device)
    plain = view(input_ids=ids, use_cache=False).last_hidden_state
    vectors = 2 * model.get_input_embeddings()(ids[:, COLUMN]).detach().roll(1, dims=1)
    given = []
    for signs in ([1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]):
        with inject(model, vectors * vectors.new_tensor(signs)[:, None], columns):
            given.append(view(input_ids=ids, use_cache=False).last_hidden_state)
    for row, (own, other) in enumerate(((given[1], given[2]), (given[2], given[1]))):
        if _differ(given[0][row, :COLUMN], plain[row, :COLUMN]):
            return "an injected vector changes what stands before it"
        if not (_differ(given[0][row, COLUMN], plain[row, COLUMN]) and _differ(own[row, COLUMN], other[row, COLUMN])):
            return "an injected vector does not reach its row"
        if _differ(given[0][row], other[row]):
            return "an injected vector reaches another row"
    return None


def _differ(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return True
    return bool((a - b).float().norm() > _TOLERANCE.get(a.dtype, 3e-2) * b.float().norm())
