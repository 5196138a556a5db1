"""How close a reconstruction is: cosine, MSE, FVE. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nla.errors import BaselineError, NonFiniteError, ShapeError, VocabularyError
from nla.stats import Interval, bootstrap


def check_finite(vectors: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFiniteError: the message names the first such row.
    """
    finite = torch.isfinite(vectors).flatten(1).all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise NonFiniteError(
            f"NaN or infinity in row {row} of {len(vectors)} vectors",
            "finite vectors",
            "find where it arose: a half-precision overflow in the target, or a division by zero",
        )


def rescale(vectors: Float[Tensor, "n d"], norm: float | None) -> Float[Tensor, "n d"]:
    """Vectors (n, d) scaled TO the L2 norm ``norm`` (not multiplied by it), float32; None: to 1, for "add".

    Raises:
        ShapeError: not two-dimensional.
        NonFiniteError: NaN, infinity, or a vector of length zero, which has no direction.
    """
    if vectors.ndim != 2:
        raise ShapeError(f"vectors of shape {tuple(vectors.shape)}", "(n, d)", "pass a batch, such as vector[None]")
    check_finite(vectors)
    lengths = vectors.float().norm(dim=-1, keepdim=True)
    if (lengths == 0).any():
        row = int((lengths[:, 0] == 0).nonzero()[0])
        raise NonFiniteError(f"a vector of zeros in row {row}", "a direction", "drop this row; it has nothing to read")
    return vectors.float() / lengths * (1.0 if norm is None else norm)


def unit(vectors: Tensor) -> Tensor:
    """Vectors (n, d) at L2 norm 1, in float32 at least; a zero vector stays zero (a reconstruction may be empty).

    Raises:
        ShapeError: not two-dimensional.
        NonFiniteError: NaN or infinity.
    """
    if vectors.ndim != 2:
        raise ShapeError(f"shape {tuple(vectors.shape)}", "(n, d)", "stack the vectors, one a row")
    if not torch.isfinite(vectors).all():
        raise NonFiniteError("NaN or infinity in the vectors", "finite values", "find the row that is not finite")
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    return torch.nn.functional.normalize(vectors, dim=1, eps=1e-30)


class Baseline(NamedTuple):
    """Mean (d,) of unit-normalised vectors, not renormalised; mean squared distance to it; how many there were."""

    mean: Tensor
    variance: float
    n: int

    @classmethod
    def fit(cls, vectors: Tensor) -> Baseline:
        """The baseline of vectors (n, d).

        Raises:
            BaselineError: fewer than two vectors, or all of one direction.
            ShapeError, NonFiniteError: see :func:`unit`.
        """
        if len(vectors) < 2:
            raise BaselineError(
                got=f"{len(vectors)} vectors",
                expected="at least 2 to take a variance from",
                fix="score more positions, or pass the baseline of the training activations",
            )
        normalised = unit(vectors.detach()).cpu().double()
        mean = normalised.mean(0)
        baseline = cls(mean.float(), float((normalised - mean).square().sum(1).mean()), len(vectors))
        baseline.check()
        return baseline

    def check(self) -> None:
        """Refuse a variance that FVE cannot divide by.

        Raises:
            BaselineError: the variance is zero, below rounding error of unit vectors, or not finite.
        """
        if not (math.isfinite(self.variance) and self.variance > 1e-10):
            raise BaselineError(
                got=f"variance {self.variance} over {self.n} vectors",
                expected="vectors of more than one direction",
                fix="score positions that differ, or pass the baseline of the training activations",
            )


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each row of ``a`` (n, d) with the same row of ``b``: (n,), in [-1, 1]; 0 where a row is zero.

    Raises:
        ShapeError: the shapes differ.
    """
    _check_pair(a, b)
    return (unit(a) * unit(b)).sum(1).clamp(-1, 1)


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each row of (n, d), both scaled to norm √d: (n,), equal to 2(1 − cosine), in [0, 4].

    √d cancels the mean over d, so this is the squared distance of the unit vectors, and FVE is 1 − its mean / variance.
    1 where one of the rows is zero.

    Raises:
        ShapeError: the shapes differ.

    Source: NLA paper, training loss.
    """
    _check_pair(a, b)
    return (unit(a) - unit(b)).square().sum(1)


def fve(target: Tensor, predicted: Tensor, baseline: Baseline | None = None) -> float:
    """Fraction of variance explained by direction: 1 is perfect, 0 is "no better than the mean", below 0 is worse.

    Args:
        target: activations (n, d), any norm.
        predicted: reconstructions (n, d), any norm.
        baseline: mean and variance of the normalised training activations; None takes them from ``target``.

    Raises:
        ShapeError: the shapes differ.
        BaselineError: no baseline and n < 2, n = 0, or a variance of zero.

    Source: NLA paper, metrics: 1 − E‖h − ĥ‖² / E‖h − h̄‖², h̄ the mean of the normalised activations, not renormalised.
    """
    baseline = Baseline.fit(target) if baseline is None else baseline
    return fve_from_errors(mse(target, predicted), baseline)


def fve_from_errors(errors: Tensor, baseline: Baseline) -> float:
    """FVE of the errors (n,) that :func:`mse` gives.

    Raises:
        BaselineError: no errors, or a variance of zero.
    """
    baseline.check()
    if len(errors) == 0:
        raise BaselineError("no vectors", "at least 1 to score", "check the selection of positions")
    return 1.0 - float(errors.detach().cpu().double().mean()) / baseline.variance


def fve_interval(
    errors: Tensor,
    baseline: Baseline,
    clusters: Tensor | Sequence[int] | None = None,
    n_boot: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """FVE of per-vector ``errors`` (n,) with its bootstrap interval by document; the baseline is held fixed.

    Raises:
        BaselineError: the baseline has no variance.
        ArgumentError, ShapeError: see :func:`bootstrap`.
    """
    baseline.check()
    return bootstrap(errors, clusters, lambda mean: 1 - mean / baseline.variance, n_boot, confidence, seed)


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 2:
        raise ShapeError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}", "two times (n, d)", "pass the same positions")


def check_ids(ids: Tensor, n_tokens: int) -> None:
    """Refuse token ids that a model has no embeddings for.

    Args:
        ids: of any shape, on the CPU.
        n_tokens: how many it has.

    Raises:
        VocabularyError: there is one.
    """
    most = int(ids.max()) if ids.numel() else 0
    if most >= n_tokens:
        raise VocabularyError(
            f"the token with the id {most}",
            f"ids below {n_tokens}, the target's embeddings: its tokenizer has more tokens than it",
            "take the text of this token out; tokenizer.convert_ids_to_tokens(id) says what it is",
        )
