"""Score: figures with intervals, beside baselines that must fail."""

from __future__ import annotations

import json

import pytest
import torch

from nla import NLA
from nla.errors import BaselineError, NonFiniteError, ShapeError
from nla.metrics import Baseline
from nla.pair.score import score
from tests.helpers.tiny import D_MODEL, TEXTS, make_pair

GENERATOR = torch.Generator().manual_seed(0)
N = 60
STRATA = ["a", "b", "c"] * 20
CENTRES = {name: torch.randn(D_MODEL, generator=GENERATOR) for name in "abc"}
TARGET = torch.stack([CENTRES[name] for name in STRATA]) + 0.5 * torch.randn(N, D_MODEL, generator=GENERATOR)
DOCUMENTS = torch.arange(N) // 3
BASELINES = {"global": Baseline.fit(TARGET)} | {
    name: Baseline.fit(TARGET[[stratum == name for stratum in STRATA]]) for name in "abc"
}
EMPTY = torch.ones(D_MODEL)


def judge(predicted: torch.Tensor, strata=STRATA, target=TARGET, baselines=BASELINES):
    return score(target, predicted, strata, DOCUMENTS[: len(target)], baselines, EMPTY, n_boot=200)


def test_a_perfect_reconstruction_scores_one_and_its_baselines_fail() -> None:
    found = judge(TARGET * 7)
    assert found.cosine.value == pytest.approx(1)
    assert found.fve.value == pytest.approx(1)
    assert found.mse.value == pytest.approx(0, abs=1e-6)
    assert all(part.fve.value == pytest.approx(1) and part.n == 20 for part in found.by_stratum.values())
    assert all(interval.value < 0.05 for interval in found.baselines.values())
    assert all(part.shuffled is not None and part.shuffled.value < 0.05 for part in found.by_stratum.values())


def test_a_reader_of_the_kind_alone_passes_the_global_score_and_fails_within_strata() -> None:
    """The trap that strata are for: naming the kind of position explains most of the global variance."""
    found = judge(torch.stack([CENTRES[name] for name in STRATA]))
    assert found.fve.value > 0.5
    assert all(part.fve.value < 0.1 for part in found.by_stratum.values())
    assert found.baselines["shuffled_within"].value < 0.1


def test_figures_equal_their_formulas() -> None:
    predicted = TARGET + torch.randn(N, D_MODEL, generator=GENERATOR)
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (TARGET, predicted))
    found = judge(predicted)
    assert found.cosine.value == pytest.approx(float((a * b).sum(1).mean()), abs=1e-5)
    assert found.mse.value == pytest.approx(float((2 - 2 * (a * b).sum(1)).mean()), abs=1e-5)
    spread = (a - a.mean(0)).square().sum(1).mean()
    assert found.fve.value == pytest.approx(1 - float((a - b).square().sum(1).mean() / spread), abs=1e-4)
    assert found.fve.low < found.fve.value < found.fve.high
    for name, part in found.by_stratum.items():
        rows = [stratum == name for stratum in STRATA]
        spread = (a[rows] - a[rows].mean(0)).square().sum(1).mean()
        assert part.fve.value == pytest.approx(1 - float((a - b)[rows].square().sum(1).mean() / spread), abs=1e-4)


def test_unknown_strata_give_global_figures_only() -> None:
    found = judge(TARGET, ["all"] * N)
    assert found.by_stratum == {}
    assert set(found.baselines) == {"empty", "mean", "shuffled", "other_document"}


def test_a_single_activation_has_no_shuffles() -> None:
    found = judge(TARGET[:1], STRATA[:1], TARGET[:1])
    assert set(found.baselines) == {"empty", "mean"}
    assert found.by_stratum["a"].shuffled is None


def test_the_mean_baseline_is_zero_over_the_activations_that_it_was_fitted_on() -> None:
    found = judge(TARGET.flip(0)).baselines["mean"]
    assert found.value == pytest.approx(0, abs=1e-5)
    assert found.low < 0 < found.high


def test_one_document_is_scored_without_intervals() -> None:
    found = score(TARGET, TARGET, ["all"] * N, torch.zeros(N, dtype=torch.int64), BASELINES, EMPTY)
    assert f"{found.fve.value:.3f} (one document: no interval)" in str(found)
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (content["fve"]["low"], content["baselines"]["empty"]["high"]) == (None, None)


def test_no_activations_are_refused_as_such() -> None:
    with pytest.raises(BaselineError, match="no activations"):
        judge(TARGET[:0], [], TARGET[:0])


def test_a_missing_baseline_is_refused_by_name() -> None:
    with pytest.raises(BaselineError, match="'d'"):
        judge(TARGET, ["d"] * N)
    with pytest.raises(BaselineError, match="global"):
        judge(TARGET, baselines={})


def test_shapes_and_numbers_are_checked() -> None:
    with pytest.raises(ShapeError):
        judge(TARGET[1:])
    with pytest.raises(NonFiniteError):
        judge(TARGET * torch.nan)


def test_the_pair_scores_its_own_reading(pair: NLA) -> None:
    acts = pair.read(TEXTS)
    found = pair.score(acts, pair.reconstruct(pair.explain(acts, samples=2)), n_boot=50)
    assert found.n == len(acts)
    assert set(found.to_json()) == {"n", "cosine", "mse", "fve", "by_stratum", "baselines"}
    assert "baseline: empty" in str(found)
    with pytest.raises(ShapeError):
        pair.score(acts, torch.ones(1, D_MODEL))
    with pytest.raises(ShapeError, match="width"):
        pair.score(torch.ones(4, 5), torch.ones(4, 5))


def test_an_interval_counts_documents_not_rows() -> None:
    """Ten copies of each document's error leave the interval as it was."""
    pair = make_pair()
    vectors, predicted = torch.randn(20, D_MODEL), torch.randn(20, D_MODEL)
    acts = pair.read([TEXTS[0]] * 20, positions=[0]).replace(vectors=vectors)
    once = pair.score(acts, predicted)
    rows = torch.arange(20).repeat_interleave(10)
    many = pair.score(acts[rows], predicted[rows])
    assert many.fve.low == pytest.approx(once.fve.low, abs=1e-4)
    assert many.fve.high == pytest.approx(once.fve.high, abs=1e-4)
