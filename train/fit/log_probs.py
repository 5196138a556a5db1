"""Log-probabilities of answers by a pass that computes their prompt once: up to the marker for all, then by group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from nla.models.hooks import inject
from nla.models.points import attends_plainly, backbone

TOKENS_PROJECTED, TOKENS_NORMALISED = 512, 32
"""Tokens whose logits are held at once, in the model's type, and of these in float32: few enough for a CPU's cache."""
ROWS_TOGETHER, PASSES = 32, 4
"""Answers of like length that one pass takes: so many or more, in at most so many passes."""


class SharedPrompt(NamedTuple):
    """The constant prompt of the encoder and what is injected in it, for each activation that has answers."""

    ids: Int[Tensor, " t"]
    marker: int
    """Its column."""
    vectors: Float[Tensor, "u d"]
    """At the injection norm, each activation once."""
    layer: int | None
    """See :func:`nla.models.hooks.inject`."""


class LogProbs(NamedTuple):
    """Of each token of each answer, float32; 0 beyond an answer's end."""

    chosen: Float[Tensor, "b t"]
    entropies: Float[Tensor, "b t"]
    """Of the whole next-token distribution, without a gradient."""
    likeliest: Float[Tensor, "b t"]
    """1 where no token is likelier, without a gradient."""


def shares_prompt(model: PreTrainedModel, gradient_checkpointing: bool) -> bool:
    """Whether answers may share the keys of their prompt in training: blocks that are computed again in the backward
    pass take none from outside."""
    return attends_plainly(model) and not gradient_checkpointing


def take_prompts(model: PreTrainedModel, of_answers: Callable[..., Any]) -> None:
    """Let a model's ``forward`` give what ``of_answers`` gives, where it is called with a ``prompt``.

    It is inside all wrappers: those of several processes see one pass.
    """
    whole: Any = model.forward

    def forward(*args: Any, prompt: SharedPrompt | None = None, **kwargs: Any) -> Any:
        return whole(*args, **kwargs) if prompt is None else of_answers(prompt=prompt, **kwargs)

    model.forward = forward


def answer_log_probs(
    model: PreTrainedModel,
    prompt: SharedPrompt,
    owners: Int[Tensor, " b"],
    answers: Int[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    temperature: float,
) -> LogProbs:
    """Log-probabilities of ``answers`` after the prompt with the vectors of ``owners``; gradients flow if enabled.

    Keys and values of what answers have in common are computed once and used by all, with their gradients.

    Args:
        model: a causal LM for which :func:`nla.models.points.attends_plainly` holds.
        answers: padded on the right, where ``mask`` is false.
    """
    stack: Any = backbone(model)
    shared, last = _read_prompt(model, stack, prompt), prompt.ids[-1:]
    lengths, hidden, order = mask.sum(dim=1), [], mask.sum(dim=1).argsort(stable=True)
    # Rows of like length share a pass, so that little of it is padding.
    for rows in order.split(max(ROWS_TOGETHER, -(-len(order) // PASSES))):
        width = int(lengths[rows].max())
        ids = torch.cat([last.expand(len(rows), 1), answers[rows, : width - 1]], dim=1)
        out = stack(input_ids=ids, past_key_values=_taken(shared, owners[rows]), use_cache=True).last_hidden_state
        hidden.append(out[mask[rows, :width]])
    head: Any = model.get_output_embeddings()
    sorted_mask = mask[order]
    of_tokens = token_log_probs(torch.cat(hidden), head, answers[order][sorted_mask], temperature)
    back = order.argsort()
    blank = torch.zeros(mask.shape, device=mask.device)
    return LogProbs(*(blank.masked_scatter(sorted_mask, values)[back] for values in of_tokens))


def _read_prompt(model: PreTrainedModel, stack: Any, prompt: SharedPrompt) -> DynamicCache:
    """Keys and values of all but the prompt's last token, for each vector."""
    cache, last = DynamicCache(config=stack.config), len(prompt.ids) - 1
    before = max(0, min(prompt.marker, last - 2))  # inject leaves single tokens alone: they are steps of an answer
    if before:
        stack(input_ids=prompt.ids[None, :before], past_key_values=cache, use_cache=True)
        cache = _taken(cache, torch.zeros(len(prompt.vectors), dtype=torch.int64, device=prompt.ids.device))
    columns = torch.full((len(prompt.vectors),), prompt.marker - before, device=prompt.ids.device)
    with inject(model, prompt.vectors, columns, prompt.layer):
        rest = prompt.ids[None, before:last].expand(len(columns), -1)
        stack(input_ids=rest, past_key_values=cache, use_cache=True)
    return cache


def _taken(cache: DynamicCache, rows: Int[Tensor, " b"]) -> DynamicCache:
    """Some rows of a cache, or the same several times; the cache stays as it is, and gradients flow back into it."""
    layers: list[Any] = cache.layers
    taken = ((layer.keys.index_select(0, rows), layer.values.index_select(0, rows)) for layer in layers)
    return DynamicCache(ddp_cache_data=taken)


def token_log_probs(
    hidden: Float[Tensor, "m d"], head: nn.Linear, targets: Int[Tensor, " m"], temperature: float = 1.0
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Log-probability of each target, entropy of its distribution, and 1 where the target is likeliest, in float32.

    The head is frozen. The whole matrix of logits never exists. The gradient with respect to ``hidden`` is made in the
    same pass, in which the probabilities are at hand; entropy and likeliest have none.
    """
    return _TokenLogProbs.apply(hidden, head.weight, head.bias, targets, temperature)  # pyright: ignore


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        m = len(hidden)
        chosen, entropies, likeliest = (torch.empty(m, dtype=torch.float32, device=hidden.device) for _ in range(3))
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in torch.arange(m, device=hidden.device).split(TOKENS_PROJECTED):
            logits = nn.functional.linear(hidden[rows], weight, bias)
            for part in torch.arange(len(rows), device=hidden.device).split(TOKENS_NORMALISED):
                log_p, at = torch.log_softmax(logits[part].float() / temperature, dim=-1), targets[rows[part], None]
                chosen[rows[part]] = of_targets = log_p.gather(1, at)[:, 0]
                likeliest[rows[part]] = (of_targets >= log_p.amax(dim=-1)).float()
                p = log_p.exp()
                entropies[rows[part]] = -torch.nan_to_num(log_p.mul_(p)).sum(dim=-1)
                if slopes is not None:  # of the logits: 1 at the target, less the probabilities
                    logits[part] = p.neg_().scatter_add_(1, at, torch.ones_like(at, dtype=p.dtype)).to(logits.dtype)
            if slopes is not None:
                slopes[rows] = (logits @ weight) / temperature
        ctx.slopes = slopes
        ctx.mark_non_differentiable(entropies, likeliest)
        return chosen, entropies, likeliest

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None, None]:
        return (gradients[0][:, None] * ctx.slopes).to(ctx.slopes.dtype), None, None, None, None
