"""The patching engine: what a donor's activation, put at any token and point, changes in what the target writes.

One minimal pair is a prompt, a donor prompt of as many tokens, and the donor's continuation. The measure is m, the
probability that the target writes that continuation; a patch's effect is E = (m_patched − m_base) / (m_donor − m_base):
0 is no effect, 1 the donor's own behaviour. Gates, patch maps and traces all come from the functions of this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nla.errors import ContextLengthError, ShapeError
from nla.eval.target import Patch, Target, check_patches, patched
from nla.metrics import check_finite
from nla.models.hooks import detached_embeddings, inference, record
from nla.models.points import Point, backbone, context_length, device_of, truncated_view
from nla.models.read import padded, vectors_at
from nla.progress import Progress, silent
from nla.text.tokens import length_batches, plain_ids, prompt_ids

MIN_RANGE = 0.1
"""Least difference between m of donor and base: below it, an effect would be a ratio of noise."""
_MAX_TOKENS = 8192
_MAX_LOGITS = 1 << 27


class Batch(NamedTuple):
    """Minimal pairs as token ids: prompts, donor prompts of equal lengths, and the donors' continuations."""

    base: list[list[int]]
    donor: list[list[int]]
    wanted: list[list[int]]

    def __len__(self) -> int:
        return len(self.base)


class Scale(NamedTuple):
    """What m is without a patch: of the prompts, and of the donors' (n,)."""

    low: Tensor
    high: Tensor

    @property
    def usable(self) -> Tensor:
        """Where base and donor differ enough to measure between them (n,)."""
        return self.high - self.low >= MIN_RANGE

    def effect(self, probability: Tensor) -> Tensor:
        """E of patched probabilities (n, …)."""
        shape = (-1, *[1] * (probability.ndim - 1))
        return (probability - self.low.reshape(shape)) / (self.high - self.low).clamp(min=MIN_RANGE).reshape(shape)


class Sweep(NamedTuple):
    """Patches at sites: (pair, point, role), and of their controls; NaN where a site was not measured."""

    effect: Tensor
    """E of the donor's activation, (n, p, r) float64."""
    log_probability: Tensor
    """log m under the donor's activation, (n, p, r)."""
    controls: Tensor
    """E of the controls (n, p, r, c): random directions as far from the base as the donor, then unrelated pairs."""


def encode(target: Target, prompts: Sequence[str], donors: Sequence[str], wanted: Sequence[str]) -> Batch:
    """Minimal pairs as token ids; prompts get the special tokens that the tokenizer adds, continuations none.

    Raises:
        ShapeError: a donor of another number of tokens, so that tokens do not correspond, or an empty continuation.
        ContextLengthError: a prompt with its continuation is longer than the context.
        EmptyTextError, VocabularyError: see :func:`nla.text.tokens.encode_batch`.
    """
    context = context_length(target.model)
    base, donor = (prompt_ids(target.tokenizer, texts, context) for texts in (prompts, donors))
    tails = plain_ids(target.tokenizer, wanted)
    for number, (first, second, tail) in enumerate(zip(base, donor, tails, strict=True)):
        if len(first) != len(second) or not tail:
            raise ShapeError(
                f"pair {number}: {len(first)} tokens, {len(second)} of its donor, {len(tail)} of the continuation",
                "as many tokens in the donor prompt as in the prompt, and a continuation of at least one",
                "write a minimal pair: exchange words for others of as many tokens",
            )
        if len(first) + len(tail) > context:
            raise ContextLengthError(
                f"pair {number} with {len(first)} + {len(tail)} tokens", f"at most {context}", "shorten the prompt"
            )
    return Batch(base, donor, tails)


def log_probabilities(
    target: Target, heads: Sequence[list[int]], tails: Sequence[list[int]], patches: Sequence[Patch] = ()
) -> Tensor:
    """Log-probability (n,) float64 that the target writes exactly these tails after these heads, under patches.

    Logits are taken from the last token of the shortest head of a batch on: the vocabulary is never met before it.
    """
    check_patches(patches, len(heads))
    total = torch.zeros(len(heads), dtype=torch.float64)
    with target.active():
        for chunk, ids, head, end in _batches(target, heads, tails):
            with patched(target, patches, chunk):
                each, column = _scores(target, ids, int(head.min()))
            inside = (column >= head[:, None]) & (column < end[:, None])
            total[chunk] = (each.cpu().double() * inside).sum(1)
    return total


def writes(target: Target, heads: Sequence[list[int]], tails: Sequence[list[int]]) -> Tensor:
    """Whether the target, greedy, writes exactly these tails after these heads, (n,) bool."""
    right = torch.zeros(len(heads), dtype=torch.bool)
    with target.active():
        for chunk, ids, head, end in _batches(target, heads, tails):
            start = int(head.min())
            first = (_logits(target, ids, start).argmax(-1) == ids[:, start:]).cpu()
            column = torch.arange(start, ids.shape[1])
            right[chunk] = (first | (column < head[:, None]) | (column >= end[:, None])).all(1)
    return right


def scale(target: Target, batch: Batch) -> Scale:
    """m of the prompts and of the donor prompts."""
    low, high = (log_probabilities(target, heads, batch.wanted).exp() for heads in (batch.base, batch.donor))
    return Scale(low, high)


def read_sites(
    target: Target, ids: Sequence[list[int]], points: Sequence[str], columns: Tensor, patches: Sequence[Patch] = ()
) -> Tensor:
    """Activations (n, p, r, d) float32 at every point and at columns (n, r), in one pass; a column of −1 gives zeros.

    Raises:
        PointError: the model has no such point.
        NonFiniteError: the target gave NaN or infinity.
    """
    check_patches(patches, len(ids))
    view = truncated_view(target.model, max(points, key=lambda point: Point.parse(point).layer))
    wanted = [[column for column in row if column >= 0] for row in columns.tolist()]
    with target.active():
        streams = vectors_at(
            view, ids, wanted, _MAX_TOKENS, lambda rows, padding: patched(target, patches, rows, padding), points=points
        ).float()
    check_finite(streams)
    out = torch.zeros(len(ids), len(points), columns.shape[1], streams.shape[-1])
    pair, role = (columns >= 0).nonzero(as_tuple=True)
    out[pair, :, role] = streams
    return out


def attribution(target: Target, batch: Batch, points: Sequence[str], columns: Tensor, difference: Tensor) -> Tensor:
    """First-order estimate (n, p, r) of what each patch adds to log m: gradient at the site · (donor − base).

    One forward and one backward pass a pair give every site at once. It ranks sites; it does not measure them.

    Args:
        difference: (n, p, r, d), donor − base.

    Source: attribution patching (Nanda 2023).
    """
    out = torch.zeros(difference.shape[:3], dtype=torch.float64)
    with target.role(), inference(target.model), torch.enable_grad():
        for chunk, ids, head, end in _batches(target, batch.base, batch.wanted):
            # Detached at the embedding: nothing below it, and no parameter, needs a gradient.
            with detached_embeddings(target.model), record(target.model, points) as seen:
                each, column = _scores(target, ids, int(head.min()))
            inside = ((column >= head[:, None]) & (column < end[:, None])).to(each.device)
            gradients = torch.autograd.grad((each * inside).sum(), [seen[point] for point in points])
            rows, where = torch.arange(len(chunk))[:, None], columns[chunk].clamp(min=0)
            for place, gradient in enumerate(gradients):
                local = gradient[rows.to(gradient.device), where.to(gradient.device)].float().cpu()
                out[chunk, place] = (local * difference[chunk, place]).sum(-1).double()
    return out * (columns >= 0)[:, None]


def sweep(
    target: Target,
    batch: Batch,
    points: Sequence[str],
    columns: Tensor,
    vectors: tuple[Tensor, Tensor],
    chosen: Tensor | None = None,
    n_controls: int = 0,
    seed: int = 0,
    measured: Scale | None = None,
    progress: Progress = silent,
    others: Tensor | None = None,
) -> Sweep:
    """Patch the donor's activation at each chosen site of each pair, one site at a time, with controls beside it.

    All roles, controls and pairs of a point share batches.

    Args:
        columns: (n, r) token of each role; −1: this pair has none.
        vectors: activations (n, p, r, d) of base and donor, from :func:`read_sites`.
        chosen: (p, r) sites to measure; None: all.
        n_controls: random directions of the donor's distance at each site, drawn anew for each pair.
        others: (n, c) numbers of unrelated pairs that have the same roles, whose activations are controls, too.
    """
    base, donor = vectors
    others = torch.zeros(len(batch), 0, dtype=torch.int64) if others is None else others
    bounds = scale(target, batch) if measured is None else measured
    wanted = torch.ones(len(points), columns.shape[1], dtype=torch.bool) if chosen is None else chosen
    n_patches = 1 + n_controls + others.shape[1]
    values = torch.full((*base.shape[:3], n_patches), torch.nan, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for place, point in enumerate(points):
        pair, role = torch.nonzero((columns >= 0) & wanted[place], as_tuple=True)
        if len(pair):
            here, there = base[pair, place, role], donor[pair, place, role]
            drawn = [random_difference(here, there, generator) for _ in range(n_controls)]
            new = torch.cat([there, *drawn, *(base[other[pair], place, role] for other in others.T)])
            rows = pair.repeat(n_patches)
            moved = Patch(point, columns[pair, role].repeat(n_patches), new)
            found = log_probabilities(
                target,
                [batch.base[row] for row in rows.tolist()],
                [batch.wanted[row] for row in rows.tolist()],
                [moved],
            )
            values[pair, place, role] = found.reshape(n_patches, -1).T
        progress("patches", (place + 1) / len(points))
    effects = bounds.effect(values.exp())
    return Sweep(effects[..., 0], values[..., 0], effects[..., 1:])


def everywhere(
    target: Target, batch: Batch, points: Sequence[str], columns: Tensor, donor: Tensor, bounds: Scale
) -> Tensor:
    """E of the donor's activations (n, p, r, d) at one token at every point at once, (n, r); NaN where none is."""
    pair, role = torch.nonzero(columns >= 0, as_tuple=True)
    patches = [Patch(point, columns[pair, role], donor[pair, place, role]) for place, point in enumerate(points)]
    heads, tails = ([side[row] for row in pair.tolist()] for side in (batch.base, batch.wanted))
    m = torch.full(columns.shape, torch.nan, dtype=torch.float64)
    m[pair, role] = log_probabilities(target, heads, tails, patches).exp()
    return bounds.effect(m)


def first_difference(batch: Batch) -> Tensor:
    """The first token (n,) in which a donor differs; before it, base and donor are the same by causality."""
    pairs = zip(batch.base, batch.donor, strict=True)
    return torch.tensor(
        [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0])) for pair in pairs]
    )


def random_difference(base: Tensor, donor: Tensor, generator: torch.Generator) -> Tensor:
    """``base`` (n, …, d) moved in a random direction by as much as ``donor`` differs from it."""
    direction = torch.randn(base.shape, generator=generator)
    return base + direction / direction.norm(dim=-1, keepdim=True) * (donor - base).norm(dim=-1, keepdim=True)


def random_vector(donor: Tensor, generator: torch.Generator) -> Tensor:
    """Random directions (n, d) of the donors' lengths."""
    direction = torch.randn(donor.shape, generator=generator)
    return direction / direction.norm(dim=1, keepdim=True) * donor.norm(dim=1, keepdim=True)


def unrelated(words: Sequence[str], exclude: Sequence[Sequence[str]], generator: torch.Generator) -> Tensor:
    """For each item the number of another whose word is not among those excluded for it, (n,)."""
    n = len(words)
    allowed = torch.tensor([[words[j] not in exclude[i] for j in range(n)] for i in range(n)], dtype=torch.float)
    if not allowed.any(1).all():
        raise ShapeError("an item to which every other is related", "items of several words", "use more items")
    return torch.multinomial(allowed, 1, generator=generator)[:, 0]


def _batches(
    target: Target, heads: Sequence[list[int]], tails: Sequence[list[int]]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Batches of similar length: row numbers, ids, and where each row's tail begins and ends."""
    rows = [head + tail for head, tail in zip(heads, tails, strict=True)]
    vocabulary = backbone(target.model).config.vocab_size
    limit = max(1, min(_MAX_TOKENS, _MAX_LOGITS // vocabulary))
    for chunk in length_batches([len(row) for row in rows], limit):
        ids = padded([rows[row] for row in chunk]).to(device_of(target.model))
        start = torch.tensor([len(heads[row]) for row in chunk])
        yield torch.tensor(chunk), ids, start, torch.tensor([len(rows[row]) for row in chunk])


def _scores(target: Target, ids: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Log-probability of each token from column ``start`` on, (b, t), and the numbers (t,) of these columns."""
    logits = _logits(target, ids, start)
    picked = logits.gather(2, ids[:, start:, None])[..., 0]
    return picked - logits.logsumexp(-1), torch.arange(start, ids.shape[1])


def _logits(target: Target, ids: Tensor, start: int) -> Tensor:
    """Logits (b, t, v) float32 of each token from column ``start`` on, given those before it."""
    keep = ids.shape[1] - start + 1
    return target.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[:, :-1].float()
