"""Logit lens and tuned lens: what the target would say next if it spoke from the point at once.

The tuned lens first moves the activation by an affine map that was fitted to make the target's own next-token
distribution come out; it starts as the identity. Both read a place as the tokens that come out on top.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nla.errors import ArgumentError, ShapeError
from nla.eval.target import Target
from nla.metrics import check_finite
from nla.models.points import Point, blocks, context_length, d_model, device_of, logits_after, truncated_view
from nla.models.read import vectors_at
from nla.progress import Progress, silent
from nla.text.tokens import Span, encode_batch, plain_ids, unknown_id

N_TOP = 10
N_STEPS, BATCH, LEARNING_RATE = 200, 256, 1e-3
MAX_ACTIVATIONS = 8192
_CHUNK = 512
_MAX_TOKENS = 8192
_ROUNDING = 1e-12


class TunedLens(NamedTuple):
    """An affine map of activations h at a point: h + change(h)."""

    change: nn.Linear
    loss: float
    """Mean KL divergence from the target's own next-token distribution, on the last steps; NaN before fitting."""

    plain_loss: float
    """The logit lens's, on the activations that it was fitted on."""

    def __call__(self, vectors: Tensor) -> Tensor:
        """Activations (n, d) as they would be at the last point, (n, d) float32."""
        with torch.no_grad():
            return (vectors + self.change(vectors.to(self.change.weight.device)).to(vectors.device)).float()


def identity_lens(width: int) -> TunedLens:
    """The lens before it is fitted: it changes nothing."""
    change = nn.Linear(width, width)
    nn.init.zeros_(change.weight)
    nn.init.zeros_(change.bias)
    return TunedLens(change, float("nan"), float("nan"))


def logits(target: Target, vectors: Tensor, lens: TunedLens | None = None) -> Tensor:
    """Next-token logits (n, vocabulary) float32 on the CPU: the target's own head, from the final norm on, on (n, d).

    At the last point these are the target's own. ``lens`` moves the activations first.

    Raises:
        ShapeError: another width than the target's.
    """
    if vectors.ndim != 2 or vectors.shape[1] != d_model(target.model):
        raise ShapeError(f"vectors {tuple(vectors.shape)}", f"(n, {d_model(target.model)})", "read them at the point")
    moved = vectors if lens is None else lens(vectors)
    with target.active():
        parts = [logits_after(target.model, part).float().cpu() for part in moved.split(_CHUNK)]
    return torch.cat(parts) if parts else torch.empty(0, 0)


def fit_lens(
    target: Target,
    texts: Sequence[str],
    n_steps: int = N_STEPS,
    seed: int = 0,
    progress: Progress = silent,
) -> TunedLens:
    """Fit the affine map on up to 8,192 tokens of texts, by the KL divergence from the target's own distribution.

    Args:
        texts: of the train split only.
        n_steps: of Adam; 0: the identity.

    Raises:
        ArgumentError: no texts, or a negative number of steps.

    Source: Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens".
    """
    if not texts or n_steps < 0:
        raise ArgumentError(f"{len(texts)} texts, n_steps={n_steps}", "1 or more, 0 or more", "correct the call")
    here, final = _both_ends(target, texts, seed)
    lens = identity_lens(here.shape[1])
    device = device_of(target.model)
    change = lens.change.to(device)
    with target.active():
        plain = _divergence(target, here[:_CHUNK].to(device), final[:_CHUNK].to(device)).item()
    if not n_steps:
        return lens._replace(loss=plain, plain_loss=plain)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(change.parameters(), lr=LEARNING_RATE)
    losses: list[float] = []
    with target.active(), torch.enable_grad():
        for step in range(n_steps):
            rows = torch.randint(len(here), (min(BATCH, len(here)),), generator=generator)
            vectors = here[rows].to(device)
            loss = _divergence(target, vectors + change(vectors), final[rows].to(device))
            gradients = torch.autograd.grad(loss, list(change.parameters()))  # of the lens alone
            for parameter, gradient in zip(change.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / n_steps)
            optimizer.step()
            losses.append(loss.item())
            progress("tuned lens", (step + 1) / n_steps)
    last = losses[-10:]
    return lens._replace(loss=sum(last) / len(last), plain_loss=plain)


def _both_ends(target: Target, texts: Sequence[str], seed: int) -> tuple[Tensor, Tensor]:
    """Activations (n, d) of the same tokens, in random order, at the target's point and at the last point."""
    last = Point(target.point.kind, len(blocks(target.model)) - 1)
    chosen = random.Random(seed).sample(list(texts), min(len(texts), MAX_ACTIVATIONS))
    quota = -(-MAX_ACTIVATIONS // len(chosen))  # all tokens of long texts would not fit the memory

    def some(document: int, spans: list[Span]) -> list[int]:
        own = [span.index for span in spans if not span.added]
        return sorted(random.Random(f"{seed} {document}").sample(own, min(quota, len(own))))

    encoded = encode_batch(target.tokenizer, chosen, context_length(target.model))
    columns = [some(number, entry.spans) for number, entry in enumerate(encoded)]
    view, points = truncated_view(target.model, last), (target.point, last)
    with target.role():
        ends = vectors_at(view, [entry.ids for entry in encoded], columns, _MAX_TOKENS, points=points).float()
    check_finite(ends)
    here, final = ends[:, 0], ends[:, 1]
    kept = torch.randperm(len(here), generator=torch.Generator().manual_seed(seed))[:MAX_ACTIVATIONS]
    return here[kept], final[kept]


def _divergence(target: Target, vectors: Tensor, final: Tensor) -> Tensor:
    """Mean KL divergence of what comes out of vectors from what comes out of the last point's activations."""
    with torch.no_grad():
        wanted = logits_after(target.model, final).float().log_softmax(-1)
    found = logits_after(target.model, vectors).float().log_softmax(-1)
    return torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")


def top_tokens(target: Target, vectors: Tensor, lens: TunedLens | None = None, n_top: int = N_TOP) -> list[str]:
    """The likeliest tokens at each activation (n, d), likeliest first, as one text."""
    texts = []
    for part in vectors.split(_CHUNK):  # all logits of a large vocabulary would not fit the memory
        found = logits(target, part, lens)
        for row in found.topk(min(n_top, found.shape[1]), dim=1).indices.tolist():
            pieces = [str(target.tokenizer.decode([token])).strip() for token in row]
            texts.append(" ".join(piece for piece in pieces if piece))
    return texts


def class_scores(
    target: Target,
    vectors: Tensor,
    words: Mapping[str, Sequence[str]],
    classes: Sequence[str],
    lens: TunedLens | None = None,
) -> Tensor | None:
    """How far the logits at activations (n, d) favour each class's words: (n, k), the likeliest one's log-probability.

    A word stands for its first token, with and without the space before it. If every class has a word, scores are
    among the classes (they sum to probability 1). A class whose words the vocabulary lacks scores what the others
    leave, as the log-probability of none of their words; None if all classes lack them.
    """
    tokens = [sorted({one for word in words.get(name, ()) for one in first_tokens(target, word)}) for name in classes]
    if not any(tokens):
        return None
    out = torch.full((len(vectors), len(classes)), float("-inf"), dtype=torch.float64)
    for start in range(0, len(vectors), _CHUNK):
        found = logits(target, vectors[start : start + _CHUNK], lens).double().log_softmax(-1)
        for column, own in enumerate(tokens):
            if own:
                out[start : start + _CHUNK, column] = found[:, own].amax(1)
    if all(tokens):
        return out.log_softmax(1)
    left = torch.log1p(-out.exp().sum(1, keepdim=True).clamp(max=1 - _ROUNDING))
    return torch.where(torch.tensor([bool(own) for own in tokens]), out, left)


def first_tokens(target: Target, word: str) -> set[int]:
    """First token of a word at the start of a text and after a space, without the unknown token."""
    found: set[int] = set()
    for text in (word, f" {word}"):
        ids = plain_ids(target.tokenizer, [text])[0]
        if not ids:
            continue
        blank = not str(target.tokenizer.decode(ids[:1])).strip() and len(ids) > 1
        found.add(ids[1] if blank else ids[0])
    return found - {unknown_id(target.tokenizer)}
