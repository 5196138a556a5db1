"""A model's forward pass, held against itself: is what is read between its blocks the residual stream, and does what is
injected reach its row? For models of types that no test knows.

A few tokens go through it: milliseconds on a small model.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nla.errors import ArchitectureError
from nla.models.hooks import inference, inject, record
from nla.models.points import TESTED, Point, backbone, blocks, d_model, device_of, final_norm, truncated_view

N_TOKENS, COLUMN = 6, 2
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest relative difference; 3 % in shorter types."""

_PASSED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_stream(model: PreTrainedModel) -> None:
    """Refuse a model whose residual stream is not found between its blocks; of the types in ``TESTED`` tests show it.

    What each block returns must be what transformers gives as hidden states and, after the final norm, as the last of
    them; the view that is cut after a block must give what the whole model has there; later tokens must not change
    earlier ones; and an injected vector must change its own row alone, from its own column on.

    Args:
        model: a causal LM, or a backbone that is cut after a block. Checked once for each object.

    Raises:
        ArchitectureError: one of these fails; the message says what differed.
    """
    stack = backbone(model)
    if stack.config.model_type in TESTED or stack in _PASSED:
        return
    try:
        with inference(model):
            differed = _first_difference(model, stack)
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


def _first_difference(model: PreTrainedModel, stack: PreTrainedModel) -> str | None:
    """What is not as it must be; None if all is."""
    n_blocks, width = len(blocks(model)), d_model(model)
    points = [Point("resid_post", layer) for layer in range(n_blocks)]
    ids = torch.arange(3, 3 + 2 * N_TOKENS, device=device_of(model)).reshape(2, N_TOKENS) % stack.config.vocab_size
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
    for point, stream, expected in zip(points[:-1], streams, hidden[1:], strict=False):
        if _differ(stream, expected):
            return f"{point} is not hidden state {point.layer + 1} of transformers"
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
    return _misplaced(model, ids, points[0])


def _misplaced(model: PreTrainedModel, ids: Tensor, point: Point) -> str | None:
    """What an injection does that it must not, or does not do; None if all is well."""
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
