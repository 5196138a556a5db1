"""Probes: labelled vectors or texts in; what can be learned of the labels, and what a reconstruction keeps of it, out.

scikit-learn fits everything. Vectors are read by logistic regression, by the difference of class means, and by
logistic regression on principal components; texts by logistic regression on TF-IDF weights of their words. Settings
are fixed beforehand, so nothing is chosen on the items that judge. A fitted reader gives each item the log-odds of
every class against the others.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nla.errors import ArgumentError, ShapeError
from nla.eval.auroc import N_BOOT, auroc_difference, macro_auroc, paired_p, ranked_auroc
from nla.metrics import unit
from nla.stats import Interval

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

LOGISTIC, MASS_MEAN, PCA = "logistic regression", "mass-mean", "PCA + logistic regression"
VECTOR_PROBES = (LOGISTIC, MASS_MEAN, PCA)
BUDGETS = (8, 32, 128, 512, 1000)
N_COMPONENTS = 16
N_DRAWS = 3
MIN_RESIDUAL = 1e-5
"""A residual of unit vectors that is shorter is rounding error, which scaling would blow up into a signal."""
N_FOLDS = 5
_MAX_ITER = 1000
_HIGHEST = 30.0

Features = Float[Tensor, "n d"] | Sequence[str]
"""Vectors, or n texts."""

Fitted = Callable[[Features], Float[Tensor, "n k"]]
"""A reader that was fitted: features to log-odds float64 of each class against all others."""


class Budget(NamedTuple):
    """AUROC when fitted on ``n_labels`` only: the mean over draws of the labels, and the lowest and highest of them."""

    n_labels: int
    auroc: float
    low: float
    high: float


class Split(NamedTuple):
    """Items to judge on: class and group of each, int64."""

    labels: Int[Tensor, " n"]
    groups: Int[Tensor, " n"]


class MassMean:
    """Nearest class mean, with scikit-learn's interface: of two classes, a probe along the difference of their means.

    Source: Marks & Tegmark 2023, "The Geometry of Truth", without the covariance.
    """

    def fit(self, vectors: np.ndarray, labels: np.ndarray) -> MassMean:
        """Means (k, d) of the classes among ``labels``, and the spread around them."""
        self.classes_, codes = np.unique(labels, return_inverse=True)
        self.means_ = np.stack([vectors[codes == code].mean(0) for code in range(len(self.classes_))])
        self.variance_ = max(float(((vectors - self.means_[codes]) ** 2).mean()), 1e-12)
        return self

    def decision_function(self, vectors: np.ndarray) -> np.ndarray:
        """(n, k): of two columns, the difference is (vector · difference of means + constant) / variance."""
        return (vectors @ self.means_.T - 0.5 * (self.means_**2).sum(1)) / self.variance_


def make_vector_probe(kind: str, n_items: int, width: int, seed: int = 0) -> Pipeline | MassMean:
    """An unfitted probe of vectors.

    Raises:
        ArgumentError: an unknown kind.
    """
    from sklearn.decomposition import PCA as Components
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if kind == MASS_MEAN:
        return MassMean()
    logistic = LogisticRegression(max_iter=_MAX_ITER, tol=1e-3)
    if kind == LOGISTIC:
        return make_pipeline(StandardScaler(), logistic)
    if kind == PCA:
        components = Components(min(N_COMPONENTS, n_items, width), random_state=seed)
        return make_pipeline(components, StandardScaler(), logistic)
    raise ArgumentError(f"the probe {kind!r}", f"one of {', '.join(VECTOR_PROBES)}", "name one of these")


def make_text_probe() -> Pipeline:
    """An unfitted reader of texts: TF-IDF of lower-cased words, and logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(token_pattern=r"(?u)\w+", sublinear_tf=True)
    return make_pipeline(words, LogisticRegression(max_iter=_MAX_ITER, tol=1e-3, C=10.0))


def fit_probe(
    features: Features, labels: Int[Tensor, " n"], n_classes: int, kind: str = LOGISTIC, seed: int = 0
) -> Fitted:
    """Fit a reader on features of either kind and labels int64; ``kind`` is for vectors.

    A class without an item to fit on gets the lowest score everywhere; with one class only, all scores are equal. So
    they are where no text holds a word.

    Raises:
        ShapeError: not one label for each item.
    """
    if len(features) != len(labels):
        raise ShapeError(f"{len(features)} items, {len(labels)} labels", "as many of each", "align them")
    known, rows = _array(features), labels.numpy()
    if len(np.unique(rows)) < 2 or _without_words(features):
        return lambda others: torch.zeros(len(others), n_classes, dtype=torch.float64)
    model = (
        make_text_probe() if not isinstance(features, Tensor) else make_vector_probe(kind, *features.shape, seed=seed)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)  # a budget of one item a class
        model.fit(known, rows)

    return lambda others: _log_odds(model, _array(others), n_classes)


def select(features: Features, rows: Sequence[int]) -> Features:
    """Some items' features."""
    return features[list(rows)] if isinstance(features, Tensor) else [features[row] for row in rows]


def auroc_by_budget(
    features: Features,
    labels: Int[Tensor, " n"],
    others: Features,
    judged: Split,
    n_classes: int,
    kind: str = LOGISTIC,
    sizes: Sequence[int] = BUDGETS,
    seed: int = 0,
) -> list[Budget]:
    """AUROC on other items after fitting on few labels, for every size that there are labels for.

    Labels are drawn class by class in turn, so that a small budget holds as many classes as it can.
    """
    budgets = []
    for size in sizes:
        if size > len(labels):
            continue
        values = []
        for draw in range(N_DRAWS if size < len(labels) else 1):
            rows = _in_turn(labels, size, seed + draw)
            fitted = fit_probe(select(features, rows), labels[rows], n_classes, kind, seed)
            values.append(float(macro_auroc(fitted(others), judged.labels)))
        budgets.append(Budget(size, sum(values) / len(values), min(values), max(values)))
    return budgets


class Retention(NamedTuple):
    """What of a label survives in the reconstruction, by probes of unit vectors."""

    activation: Interval
    """AUROC of a probe for activations, on activations."""

    reconstruction: Interval
    """The same probe, on reconstructions."""

    retained: float
    """What it keeps of its AUROC above chance: 1 all, 0 nothing, below 0 misled; NaN if there was nothing to keep."""

    residual: Interval
    """AUROC of a fresh probe on activation − reconstruction: what the explanation left out. Chance is 0.5."""

    shuffled: Interval
    """AUROC of the first probe on another item's reconstruction: what a baseline keeps."""


class Reconstructed(NamedTuple):
    """Activations and their reconstructions."""

    vectors: Float[Tensor, "n d"]
    predicted: Float[Tensor, "n d"]


def retention(
    train: Reconstructed,
    labels: Int[Tensor, " n"],
    test: Reconstructed,
    shuffled: Float[Tensor, "n_test d"],
    judged: Split,
    n_classes: int,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> Retention:
    """Probe activations and reconstructions of train and test items.

    A reconstruction has direction only, so everything is scaled to unit norm before anything is fitted.

    Args:
        labels: classes of the train items.
        shuffled: another item's reconstruction for each test item: the control.
    """
    probe = fit_probe(unit(train.vectors), labels, n_classes, seed=seed)
    fresh = fit_probe(residual(*train), labels, n_classes, seed=seed)

    def judge(scores: Tensor) -> Interval:
        return ranked_auroc(scores, judged.labels, judged.groups, n_boot, seed).auroc

    whole, kept = judge(probe(unit(test.vectors))), judge(probe(unit(test.predicted)))
    share = (kept.value - 0.5) / (whole.value - 0.5) if whole.low > 0.5 else float("nan")
    return Retention(whole, kept, share, judge(fresh(residual(*test))), judge(probe(unit(shuffled))))


def residual(vectors: Float[Tensor, "n d"], predicted: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Unit activation minus unit reconstruction; 0 where they differ by rounding only."""
    left = unit(vectors) - unit(predicted)
    return torch.where(left.norm(dim=1, keepdim=True) < MIN_RESIDUAL, 0.0, left)


class Complement(NamedTuple):
    """Nested: a probe of activations alone, and one that is given the explanation's words too."""

    probe: Interval
    both: Interval
    gain: Interval
    """AUROC with the text minus without."""

    p_value: float
    """That the text adds nothing: two-sided, from paired resamples."""

    text_weight: float
    """Weight of the text's log-odds where the probe's own have 1: 0 where it adds nothing, infinite where the
    probe does not."""


def complement(
    vectors: Float[Tensor, "n d"],
    texts: Sequence[str],
    fitted_on: Split,
    test: Float[Tensor, "n_test d"],
    test_texts: Sequence[str],
    judged: Split,
    n_classes: int,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> Complement:
    """Does the text know anything of the label that a linear probe of the unit activation does not?

    Each is fitted by itself; how the two log-odds are added is one more number, fitted on the train items as
    readers that were not fitted on them see them (five folds by group). A reader whose weight comes out below 0 gets
    none: without a signal, readers of held-out folds tend to be wrong about the very groups that they lack.
    """
    vectors, test = unit(vectors), unit(test)
    of_probe, of_text = (_held_out(features, fitted_on, n_classes, seed) for features in (vectors, texts))
    weight = _weight(of_probe, of_text, fitted_on.labels)
    alone, text = (
        fit_probe(train, fitted_on.labels, n_classes, seed=seed)(others)
        for train, others in ((vectors, test), (texts, test_texts))
    )
    joined = alone if weight == 0 else text if weight == math.inf else alone + weight * text
    first, both = (ranked_auroc(one, judged.labels, judged.groups, n_boot, seed) for one in (alone, joined))
    return Complement(first.auroc, both.auroc, auroc_difference(both, first), paired_p(both, first), weight)


def _held_out(features: Features, fitted_on: Split, n_classes: int, seed: int) -> Float[Tensor, "n k"]:
    """Log-odds of every train item, within ±30, by a reader that was fitted without its group."""
    from sklearn.model_selection import GroupKFold

    out = torch.zeros(len(features), n_classes, dtype=torch.float64)
    groups = fitted_on.groups.numpy()
    folds: Any = GroupKFold(min(N_FOLDS, len(np.unique(groups))))
    for train, other in folds.split(groups, groups=groups):
        fitted = fit_probe(select(features, train.tolist()), fitted_on.labels[train], n_classes, seed=seed)
        out[other] = fitted(select(features, other.tolist())).clamp(-_HIGHEST, _HIGHEST)
    return out


def _weight(probe: Float[Tensor, "n k"], text: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> float:
    """Weight of the text's log-odds beside the probe's, by which of the k classes is the true one."""
    from sklearn.linear_model import LogisticRegression

    pairs = torch.stack([probe, text], dim=-1).reshape(-1, 2).numpy()
    true = torch.nn.functional.one_hot(labels, probe.shape[1]).reshape(-1).numpy()
    of_probe, of_text = LogisticRegression(max_iter=_MAX_ITER).fit(pairs, true).coef_[0].tolist()
    if of_text <= 0:
        return 0.0
    return of_text / of_probe if of_probe > 0 else math.inf


def _log_odds(model: Pipeline | MassMean, features: Any, n_classes: int) -> Float[Tensor, "n k"]:
    """float64; from the margins, since probabilities and their logarithms round to 1 and 0 and then tie."""
    margins = torch.from_numpy(np.asarray(model.decision_function(features), dtype=np.float64))
    margins = torch.stack([-margins / 2, margins / 2], dim=1) if margins.ndim == 1 else margins
    out = torch.full((len(margins), n_classes), float("-inf"), dtype=torch.float64)
    best = margins.argmax(1, keepdim=True)
    others = margins.scatter(1, best, float("-inf")).logsumexp(1, keepdim=True)
    lower = margins.log_softmax(1).scatter(1, best, float("-inf"))  # of the best class 1 − p would round to 0
    odds = (lower - torch.log1p(-lower.exp())).scatter(1, best, margins.gather(1, best) - others)
    out[:, torch.from_numpy(model.classes_)] = odds
    return out


def _array(features: Features) -> Any:
    return features.double().numpy() if isinstance(features, Tensor) else list(features)


def _without_words(features: Features) -> bool:
    return not isinstance(features, Tensor) and not any(any(c.isalnum() or c == "_" for c in text) for text in features)


def _in_turn(labels: Int[Tensor, " n"], size: int, seed: int) -> list[int]:
    """``size`` items at random, one of each class in turn as long as the class lasts."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    taken: dict[int, int] = {}
    turns = []
    for row in order:
        label = int(labels[row])
        turns.append((taken.get(label, 0), len(turns), row))
        taken[label] = taken.get(label, 0) + 1
    return [row for _turn, _number, row in sorted(turns)[:size]]
