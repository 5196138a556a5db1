"""The figures mean what they say: against closed forms, numpy and scipy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.nn.functional import mse_loss, one_hot

from nla.errors import ArgumentError, BaselineError, NonFiniteError, ShapeError
from nla.metrics import Baseline, cosine, fve, fve_from_errors, fve_interval, mse
from nla.stats import Interval, bootstrap, derangement, holm, paired_permutation, spearman, wilson


@pytest.fixture
def vectors():
    """Activations (60, 8) with a common direction and very different norms."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(60, 8, generator=generator) + 1.5
    return directions * torch.rand(60, 1, generator=generator).mul(5).exp()


@pytest.fixture
def noisy(vectors):
    return vectors + 0.3 * vectors.norm(dim=1, keepdim=True) * torch.randn(
        60, 8, generator=torch.Generator().manual_seed(1)
    )


def numpy_fve(target, predicted, reference=None):
    """FVE as the method notes state it, written out in numpy float64."""
    h, p = (x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True) for x in (target, predicted))
    r = h if reference is None else reference.double().numpy()
    r = r / np.linalg.norm(r, axis=1, keepdims=True)
    return 1 - np.mean(((h - p) ** 2).sum(1)) / np.mean(((r - r.mean(0)) ** 2).sum(1))


def test_cosine_is_numpys(vectors, noisy):
    a, b = vectors.double().numpy(), noisy.double().numpy()
    oracle = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert np.allclose(cosine(vectors, noisy), oracle, atol=1e-6)


def test_mse_is_the_mean_squared_error_at_norm_sqrt_d_and_twice_one_minus_cosine(vectors, noisy):
    scaled = [math.sqrt(8) * x / x.norm(dim=1, keepdim=True) for x in (vectors, noisy)]
    assert torch.allclose(mse(vectors, noisy), mse_loss(*scaled, reduction="none").mean(1), atol=1e-5)
    assert torch.allclose(mse(vectors, noisy), 2 * (1 - cosine(vectors, noisy)), atol=1e-5)


def test_mse_of_equal_orthogonal_and_opposite_vectors_is_0_2_and_4():
    a = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    b = torch.tensor([[9.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    assert mse(a, b).tolist() == [0.0, 2.0, 4.0]


def test_the_length_of_a_reconstruction_does_not_matter(vectors, noisy):
    lengths = torch.linspace(0.01, 100, 60)[:, None]
    assert fve(vectors, noisy * lengths) == pytest.approx(fve(vectors, noisy), abs=1e-6)


def test_an_empty_reconstruction_has_cosine_zero_and_no_nan(vectors):
    zero = torch.zeros_like(vectors)
    assert cosine(vectors, zero).eq(0).all() and torch.allclose(mse(vectors, zero), torch.ones(60))


def test_gradients_of_mse_reach_the_prediction(vectors, noisy):
    noisy.requires_grad_()
    mse(vectors, noisy).mean().backward()
    assert noisy.grad is not None and noisy.grad.abs().sum() > 0


def test_low_precision_vectors_are_scored_in_float32(vectors, noisy):
    rounded = vectors.bfloat16(), noisy.bfloat16()
    assert cosine(*rounded).dtype == torch.float32
    assert fve(*rounded) == pytest.approx(numpy_fve(rounded[0].float(), rounded[1].float()), abs=1e-5)


def test_fve_is_the_formula_of_the_method_notes(vectors, noisy):
    assert fve(vectors, noisy) == pytest.approx(numpy_fve(vectors, noisy), abs=1e-5)


def test_fve_with_a_baseline_divides_by_the_baselines_variance(vectors, noisy):
    baseline = Baseline.fit(vectors[:40])
    oracle = numpy_fve(vectors[40:], noisy[40:], reference=vectors[:40])
    assert fve(vectors[40:], noisy[40:], baseline) == pytest.approx(oracle, abs=1e-5)
    assert fve(vectors[40:], noisy[40:]) != pytest.approx(oracle, abs=1e-3)


def test_a_perfect_reconstruction_has_fve_one_even_alone(vectors):
    assert fve(vectors, 3 * vectors) == pytest.approx(1, abs=1e-6)
    assert fve(vectors[:1], vectors[:1], Baseline.fit(vectors)) == pytest.approx(1, abs=1e-6)


def test_the_mean_is_not_renormalised(vectors):
    """|h̄| = m gives variance 1 − m², and predicting the mean's direction gives (m − 1) / (m + 1), below 0."""
    baseline = Baseline.fit(vectors)
    m = float(baseline.mean.norm())
    assert m < 0.95
    assert baseline.variance == pytest.approx(1 - m * m, abs=1e-6)
    assert fve(vectors, baseline.mean.expand(60, -1)) == pytest.approx((m - 1) / (m + 1), abs=1e-5)


def test_orthogonal_vectors_have_the_closed_form_variance_one_minus_one_over_n():
    baseline = Baseline.fit(torch.eye(10) * torch.arange(1, 11)[:, None])
    assert baseline.variance == pytest.approx(0.9, abs=1e-6) and baseline.n == 10


@pytest.mark.parametrize("rows", [0, 1])
def test_fve_of_fewer_than_two_vectors_needs_a_baseline(vectors, rows):
    with pytest.raises(BaselineError, match="pass the baseline"):
        fve(vectors[:rows], vectors[:rows])


def test_vectors_of_one_direction_have_no_fve(vectors):
    same = vectors[:1] * torch.arange(1, 21)[:, None]
    with pytest.raises(BaselineError, match="more than one direction"):
        fve(same, same)
    with pytest.raises(BaselineError, match="more than one direction"):
        fve(vectors, vectors, Baseline(torch.zeros(8), 0.0, 9))


def test_fve_of_no_vectors_is_refused_even_with_a_baseline(vectors):
    with pytest.raises(BaselineError, match="no vectors"):
        fve(vectors[:0], vectors[:0], Baseline.fit(vectors))


def test_other_shapes_and_values_that_are_not_finite_are_refused(vectors):
    for score in (cosine, mse, fve):
        with pytest.raises(ShapeError):
            score(vectors, vectors[:5])
        with pytest.raises(ShapeError):
            score(vectors[0], vectors[0])
        with pytest.raises(NonFiniteError):
            score(vectors, vectors * float("nan"))


@pytest.mark.parametrize("successes, n", [(0, 10), (3, 10), (10, 10), (199, 200), (1, 1)])
def test_wilson_is_the_formula_of_1927(successes, n):
    z, share = scipy.stats.norm.ppf(0.975), successes / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert wilson(successes, n) == pytest.approx((share, max(0, middle - half), min(1, middle + half)), abs=1e-12)


def test_ends_of_wilson_at_all_and_none_are_exact():
    assert wilson(0, 7).low == 0.0 and wilson(7, 7).high == 1.0


def test_spearman_shares_ranks_among_ties_and_takes_batches():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(4, (6, 9), generator=generator).double() for _ in range(2))
    expected = [scipy.stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert spearman(a, b).tolist() == pytest.approx(expected, abs=1e-12)
    # Ranked in the order they come in, these would agree to 1.0.
    assert float(spearman(torch.tensor([1.0, 1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0, 0.0]))) == pytest.approx(
        -0.7746, abs=1e-4
    )
    assert spearman(torch.ones(3), torch.arange(3.0)).isnan()


@pytest.mark.parametrize("successes, n", [(0, 0), (5, 4), (-1, 4)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ArgumentError):
        wilson(successes, n)


def test_the_bootstrap_of_independent_values_is_the_normal_interval():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    interval = bootstrap(values, n_boot=4000)
    half = 1.96 * values.std().item() / math.sqrt(2000)
    assert interval.value == pytest.approx(values.mean().item())
    assert interval.high - interval.value == pytest.approx(half, rel=0.1)
    assert interval.value - interval.low == pytest.approx(half, rel=0.1)


def test_copies_within_a_document_do_not_narrow_the_interval():
    documents = torch.randn(100, generator=torch.Generator().manual_seed(0))
    copies, clusters = documents.repeat_interleave(25), torch.arange(100).repeat_interleave(25)
    width = {
        name: interval.high - interval.low
        for name, interval in {
            "documents": bootstrap(documents),
            "clustered": bootstrap(copies, clusters),
            "naive": bootstrap(copies),
        }.items()
    }
    assert width["clustered"] == pytest.approx(width["documents"], rel=1e-6)
    assert width["naive"] == pytest.approx(width["documents"] / 5, rel=0.15)


@pytest.mark.parametrize("clusters", [[4] * 30, None])
def test_one_document_has_a_value_and_no_interval(clusters):
    values = torch.rand(1 if clusters is None else 30, 2, generator=torch.Generator().manual_seed(0))
    interval = bootstrap(values, clusters, lambda mean: mean[..., 0] / mean[..., 1])
    assert interval.value == pytest.approx(float(values[:, 0].mean() / values[:, 1].mean()))
    assert math.isnan(interval.low) and math.isnan(interval.high)
    assert str(interval) == f"{interval.value:.3f} (one document: no interval)"
    assert interval.to_json() == {"value": interval.value, "low": None, "high": None}
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


def test_clusters_of_unequal_size_follow_the_ratio_estimators_variance():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 20, (400,), generator=generator)
    clusters = torch.arange(400).repeat_interleave(sizes)
    values = 5 + torch.randn(400, generator=generator)[clusters] + torch.randn(len(clusters), generator=generator)
    mean = values.mean()
    residuals = torch.zeros(400).index_add_(0, clusters, values - mean)
    deviation = float(residuals.square().sum().sqrt() / len(clusters))
    interval = bootstrap(values, 1000 + 7 * clusters, n_boot=4000)
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(deviation, rel=0.1)


def test_the_bootstrap_is_seeded_and_takes_a_statistic_of_several_means():
    values = torch.rand(300, 2, generator=torch.Generator().manual_seed(0))
    gap = bootstrap(values, statistic=lambda mean: mean[..., 0] - mean[..., 1], seed=3)
    assert gap == pytest.approx(bootstrap(values[:, 0] - values[:, 1], seed=3), abs=1e-9)
    assert gap == bootstrap(values, statistic=lambda mean: mean[..., 0] - mean[..., 1], seed=3)
    assert gap != bootstrap(values, statistic=lambda mean: mean[..., 0] - mean[..., 1], seed=4)


def test_resampling_in_chunks_keeps_every_resample(monkeypatch):
    monkeypatch.setattr("nla.stats._CHUNK_ELEMENTS", 700)
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    interval = bootstrap(values, n_boot=1003)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std().item() / 10, rel=0.15)


def test_the_fve_interval_is_the_one_of_resampled_fves(vectors, noisy):
    baseline = Baseline.fit(vectors)
    errors = mse(vectors, noisy)
    interval = fve_interval(errors, baseline, n_boot=4000)
    assert interval.value == pytest.approx(fve(vectors, noisy, baseline), abs=1e-6)
    rng = np.random.default_rng(0)
    draws = [fve_from_errors(errors[rng.integers(0, 60, 60)], baseline) for _ in range(4000)]
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.02)


def test_bad_input_to_the_bootstrap_is_refused():
    for values, options in [(torch.empty(0), {}), (torch.ones(3), {"n_boot": 0}), (torch.ones(3), {"confidence": 1.0})]:
        with pytest.raises(ArgumentError):
            bootstrap(values, **options)
    with pytest.raises(ShapeError):
        bootstrap(torch.ones(3), clusters=[0, 1])
    with pytest.raises(NonFiniteError):
        bootstrap(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
@pytest.mark.parametrize("n", [8, 40])
def test_the_permutation_test_is_scipys(n, alternative):
    generator = torch.Generator().manual_seed(n)
    a, b = torch.randn(n, generator=generator) + 0.4, torch.randn(n, generator=generator)
    oracle = scipy.stats.permutation_test(
        (a.numpy(), b.numpy()),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=10_000,
        alternative=alternative,
        rng=0,
    ).pvalue
    tolerance = 1e-9 if n == 8 else 0.02
    assert paired_permutation(a, b, alternative=alternative) == pytest.approx(oracle, abs=tolerance)


def test_equal_scores_give_p_one_and_a_clear_difference_a_small_p():
    a = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert paired_permutation(a, a) == 1
    assert paired_permutation(a + 1, a) == pytest.approx(1 / 10_001)
    assert paired_permutation(a, a + 1, alternative="greater") == 1


def test_items_of_one_document_are_flipped_together():
    """Four documents that all favour a: exactly 2 of the 16 sign flips are as extreme, however many items they hold."""
    clusters = torch.arange(4).repeat_interleave(10)
    assert paired_permutation(torch.ones(40), torch.zeros(40), clusters) == 2 / 16
    assert paired_permutation(torch.ones(40), torch.zeros(40)) < 0.001


def test_bad_input_to_the_permutation_test_is_refused():
    with pytest.raises(ShapeError):
        paired_permutation(torch.ones(3), torch.ones(4))
    with pytest.raises(ArgumentError):
        paired_permutation(torch.ones(3), torch.ones(3), alternative="less")
    with pytest.raises(ArgumentError):
        paired_permutation(torch.ones(0), torch.ones(0))
    with pytest.raises(NonFiniteError):
        paired_permutation(torch.tensor([1.0, float("nan")]), torch.ones(2))


def test_holm_adjusts_the_textbook_example_in_its_own_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
    with pytest.raises(ArgumentError):
        holm([0.5, 1.5])


@pytest.mark.parametrize("n", [2, 3, 50])
def test_a_derangement_moves_every_index_and_keeps_all(n):
    for seed in range(20):
        order = derangement(n, seed)
        assert sorted(order.tolist()) == list(range(n))
        assert (order != torch.arange(n)).all()


def test_derangements_of_three_are_both_drawn_and_seeded():
    drawn = {tuple(derangement(3, seed).tolist()) for seed in range(30)}
    assert drawn == {(1, 2, 0), (2, 0, 1)}
    assert derangement(50, 7).equal(derangement(50, 7))


def test_a_derangement_within_strata_stays_within_them():
    strata = ["newline" if i % 4 == 0 else "line 1" for i in range(40)]
    order = derangement(40, 0, strata)
    assert all(strata[i] == strata[int(j)] for i, j in enumerate(order))
    assert sorted(order.tolist()) == list(range(40)) and (order != torch.arange(40)).all()


def test_what_cannot_be_deranged_is_refused():
    with pytest.raises(ArgumentError, match="single item"):
        derangement(1, 0)
    with pytest.raises(ArgumentError, match="'b'"):
        derangement(3, 0, ["a", "a", "b"])
    with pytest.raises(ShapeError):
        derangement(3, 0, ["a", "a"])


def test_shuffled_reconstructions_of_independent_vectors_have_fve_minus_one():
    """Independent one-hot directions: E‖h − ĥ‖² is twice the variance, so the baseline is at 1 − 2 = −1."""
    classes = torch.randint(16, (4000,), generator=torch.Generator().manual_seed(0))
    vectors = one_hot(classes, 16).float()
    assert fve(vectors, vectors[derangement(4000, 1)]) == pytest.approx(-1, abs=0.05)
