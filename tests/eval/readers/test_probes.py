"""Probes and AUROC against closed forms and scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from nla.errors import ArgumentError, NonFiniteError, ShapeError
from nla.eval import auroc
from nla.eval.auroc import auroc_difference, macro_auroc, paired_p, ranked_auroc, resample_groups
from nla.eval.readers import probes
from nla.eval.readers.probes import Reconstructed, Split, complement, fit_probe, retention
from nla.metrics import unit

GENERATOR = torch.Generator().manual_seed(0)
N, D, K = 240, 12, 3
LABELS = torch.arange(N) % K
GROUPS = torch.arange(N) // 2
CODES = torch.eye(K, D) * 6
"""Class c lies around 6 along axis c: separable."""
VECTORS = CODES[LABELS] + 0.3 * torch.randn(N, D, generator=GENERATOR)
NOISE = torch.randn(N, D, generator=GENERATOR)
TRAIN, TEST = torch.arange(0, 160), torch.arange(160, N)
JUDGED = Split(LABELS[TEST], GROUPS[TEST])
TEXTS = [f"it is {('red', 'blue', 'green')[label]}." for label in LABELS.tolist()]


def test_auroc_equals_scikit_learns_with_ties_and_weights() -> None:
    scores = torch.randint(0, 6, (80,), generator=GENERATOR).double()
    positive = torch.rand(80, generator=GENERATOR) > 0.4
    assert float(auroc.auroc(scores, positive)) == pytest.approx(roc_auc_score(positive, scores))
    weights = resample_groups(torch.arange(80) // 4, 5, seed=3)
    for found, each in zip(auroc.auroc(scores, positive, weights).tolist(), weights, strict=True):
        assert found == pytest.approx(roc_auc_score(positive, scores, sample_weight=each))
    with pytest.raises(NonFiniteError):
        auroc.auroc(torch.tensor([0.0, math.nan]), torch.tensor([True, False]))
    with pytest.raises(ShapeError):
        auroc.auroc(scores, positive[:3])


def test_macro_equals_scikit_learns_one_versus_rest() -> None:
    scores = torch.randn(90, 4, generator=GENERATOR).softmax(1).double()
    labels = torch.arange(90) % 4
    assert float(macro_auroc(scores, labels)) == pytest.approx(roc_auc_score(labels, scores, multi_class="ovr"))
    assert float(macro_auroc(scores, torch.zeros(90, dtype=torch.long)).isnan())  # one class: nothing to rank
    kept = labels != 2  # a class without items does not count
    expected = sum(roc_auc_score(labels[kept] == c, scores[kept, c]) for c in (0, 1, 3)) / 3
    assert float(macro_auroc(scores[kept], labels[kept])) == pytest.approx(expected)


def test_groups_are_drawn_whole() -> None:
    weights = resample_groups(GROUPS, 50, seed=1)
    assert torch.equal(weights[:, 0::2], weights[:, 1::2])
    assert (weights.sum(1) == N).all() and weights.max() > 1


def test_an_interval_is_wider_where_groups_are_larger_and_never_a_point() -> None:
    scores = torch.stack([-VECTORS[:, 5], VECTORS[:, 5]], 1) + 0.5 * (LABELS[:, None] == torch.tensor([0, 1]))
    labels = (LABELS == 1).long()
    repeated, copies = scores.repeat(4, 1), labels.repeat(4)
    fine = ranked_auroc(repeated, copies, torch.arange(4 * N)).auroc
    coarse = ranked_auroc(repeated, copies, torch.arange(N).repeat(4)).auroc
    assert coarse.high - coarse.low > 1.5 * (fine.high - fine.low)
    perfect = ranked_auroc(torch.nn.functional.one_hot(LABELS, K).double(), LABELS, GROUPS).auroc
    assert perfect.value == 1.0 == perfect.high and 0.95 < perfect.low < 1.0
    with pytest.raises(ArgumentError, match="one class"):
        ranked_auroc(repeated, torch.zeros_like(copies), torch.arange(4 * N))


def test_paired_p_is_one_for_a_reader_against_itself_and_least_where_it_always_wins() -> None:
    good, bad = (ranked_auroc(one, LABELS, GROUPS, 200) for one in (VECTORS[:, :K].double(), NOISE[:, :K].double()))
    assert paired_p(good, good) == 1.0
    assert paired_p(good, bad) == pytest.approx(2 / 201) == paired_p(bad, good)
    gain = auroc_difference(good, bad)
    assert gain.value == pytest.approx(good.auroc.value - bad.auroc.value) and gain.low > 0.3
    perfect, constant = (ranked_auroc(one, LABELS, GROUPS, 200) for one in (torch.eye(K)[LABELS], torch.zeros(N, K)))
    sure = auroc_difference(perfect, constant)
    assert sure.value == 0.5 and sure.high == pytest.approx(0.5) and 0.45 < sure.low < 0.5  # never a point


def test_there_is_no_interval_where_one_group_is_all_of_a_class() -> None:
    labels, groups = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1])
    first, other = (ranked_auroc(one[:5, :2].double(), labels, groups, 50) for one in (NOISE, NOISE.roll(1, 1)))
    assert first.auroc.value != other.auroc.value and math.isnan(first.auroc.low)
    assert paired_p(first, other) == 1.0 and math.isnan(auroc_difference(first, other).low)


@pytest.mark.parametrize("kind", probes.VECTOR_PROBES)
def test_separable_classes_are_told_apart_and_random_labels_are_not(kind: str) -> None:
    fitted = fit_probe(VECTORS[TRAIN], LABELS[TRAIN], K, kind)
    assert float(macro_auroc(fitted(VECTORS[TEST]), LABELS[TEST])) == 1.0
    coin = torch.randint(0, 2, (N,), generator=torch.Generator().manual_seed(1))
    fooled = fit_probe(VECTORS[TRAIN], coin[TRAIN], 2, kind)(VECTORS[TEST])
    assert abs(float(macro_auroc(fooled, coin[TEST])) - 0.5) < 0.15
    scores = fitted(VECTORS[TEST])
    assert scores.sigmoid().sum(1) == pytest.approx(torch.ones(len(TEST)).double())


def test_mass_mean_ranks_by_the_difference_of_class_means() -> None:
    labels = (LABELS == 0).long()
    direction = VECTORS[TRAIN][labels[TRAIN] == 1].mean(0) - VECTORS[TRAIN][labels[TRAIN] == 0].mean(0)
    scores = fit_probe(VECTORS[TRAIN], labels[TRAIN], 2, probes.MASS_MEAN)(NOISE)
    expected = (NOISE.double() @ direction.double()).argsort()
    assert torch.equal((scores[:, 1] - scores[:, 0]).argsort(), expected)
    long = CODES * torch.tensor([[1.0], [2.0], [0.1]])  # of unequal length: the nearest mean, not the likest direction
    vectors = long[LABELS] + NOISE / 4
    means = torch.stack([vectors[label == LABELS].mean(0) for label in range(K)])
    nearest = torch.cdist(NOISE, means).argmin(1)
    assert torch.equal(fit_probe(vectors, LABELS, K, probes.MASS_MEAN)(NOISE).argmax(1), nearest)


def test_confident_items_do_not_tie() -> None:
    line = CODES[1] + torch.linspace(-30, 30, 60)[:, None] * torch.eye(2, D)[:1]  # margins of many thousands
    fitted = fit_probe(torch.cat([CODES[:2], CODES[:2] + 0.1]), torch.tensor([0, 1, 0, 1]), 2, probes.MASS_MEAN)(line)
    assert (fitted[:, 0].diff() > 0).all() and (fitted[:, 1].diff() < 0).all()
    half = torch.arange(60) < 30
    assert float(macro_auroc(fitted, half.long())) == 1.0


def test_texts_are_read_by_their_words_and_texts_without_words_say_nothing() -> None:
    fitted = fit_probe([TEXTS[row] for row in TRAIN.tolist()], LABELS[TRAIN], K)
    assert float(macro_auroc(fitted([TEXTS[row] for row in TEST.tolist()]), LABELS[TEST])) == 1.0
    empty = fit_probe(["", "…"] * 3, torch.tensor([0, 1] * 3), 2)
    assert float(macro_auroc(empty(["a", "b"]), torch.tensor([0, 1]))) == 0.5


def test_a_class_without_an_example_ranks_lowest_and_unequal_lengths_are_refused() -> None:
    rows = TRAIN[LABELS[TRAIN] != 2]
    scores = fit_probe(VECTORS[rows], LABELS[rows], K)(VECTORS[TEST])
    assert bool(scores[:, 2].isinf().all()) and not bool(scores[:, :2].isinf().any())
    with pytest.raises(ShapeError):
        fit_probe(VECTORS[:3], LABELS[:2], K)
    with pytest.raises(ArgumentError, match="mass-mean"):
        fit_probe(VECTORS, LABELS, K, "forest")


def test_few_labels_are_drawn_class_by_class_and_more_labels_help() -> None:
    assert sorted(LABELS[probes._in_turn(LABELS, 6, 0)].tolist()) == [0, 0, 1, 1, 2, 2]
    mixed = 0.15 * VECTORS + NOISE
    found = probes.auroc_by_budget(mixed[TRAIN], LABELS[TRAIN], mixed[TEST], JUDGED, K, sizes=(6, 150, 1000))
    assert [one.n_labels for one in found] == [6, 150]
    assert found[0].low <= found[0].auroc <= found[0].high and found[0].auroc < found[1].auroc


def test_a_perfect_reconstruction_retains_everything_and_leaves_nothing() -> None:
    mixed = 0.3 * VECTORS + NOISE
    train = Reconstructed(mixed[TRAIN], 5 * mixed[TRAIN])  # of another length, as a decoder gives it
    test = Reconstructed(mixed[TEST], 5 * mixed[TEST])
    found = retention(train, LABELS[TRAIN], test, 5 * mixed[TEST].roll(1, 0), JUDGED, K)
    probe = fit_probe(unit(mixed[TRAIN]), LABELS[TRAIN], K)
    assert found.activation == ranked_auroc(probe(unit(mixed[TEST])), *JUDGED).auroc
    assert found.reconstruction.value == pytest.approx(found.activation.value, abs=1e-6)
    assert found.retained == pytest.approx(1.0, abs=1e-5)
    assert found.residual.value == 0.5
    assert found.shuffled.value < 0.6 < found.activation.value


def test_a_reconstruction_that_knows_nothing_leaves_the_label_in_the_residual() -> None:
    found = retention(
        Reconstructed(VECTORS[TRAIN], NOISE[TRAIN]),
        LABELS[TRAIN],
        Reconstructed(VECTORS[TEST], NOISE[TEST]),
        NOISE[TEST],
        JUDGED,
        K,
    )
    assert found.retained < 0.35 and found.residual.value > 0.95


def test_text_that_knows_the_label_adds_to_a_probe_and_noise_does_not_harm() -> None:
    mixed = 0.15 * VECTORS + NOISE
    train, test = ([TEXTS[row] for row in rows.tolist()] for rows in (TRAIN, TEST))
    on = Split(LABELS[TRAIN], GROUPS[TRAIN])
    knows = complement(mixed[TRAIN], train, on, mixed[TEST], test, JUDGED, K)
    assert knows.both.value == 1.0 and knows.gain.low > 0 and knows.p_value < 0.05 and knows.text_weight > 1
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2)).tolist()
    false = [TEXTS[row] for row in order]
    noise = complement(mixed[TRAIN], false[:160], on, mixed[TEST], false[160:], JUDGED, K)
    assert noise.p_value > 0.05 and abs(noise.gain.value) < 0.05 and 0 <= noise.text_weight < 1


def test_of_two_readers_in_one_the_useless_one_gets_no_weight() -> None:
    right = torch.eye(K, dtype=torch.float64)[LABELS].log_softmax(1)
    assert probes._weight(right, -right, LABELS) == 0.0 and probes._weight(-right, right, LABELS) == math.inf
    on, train, test = Split(LABELS[TRAIN], GROUPS[TRAIN]), TEXTS[:160], TEXTS[160:]
    blank = torch.ones(N, D)
    alone = complement(blank[TRAIN], train, on, blank[TEST], test, JUDGED, K)
    assert alone.probe.value == 0.5 and alone.both.value == 1.0 and alone.text_weight > 100
    silent = complement(VECTORS[TRAIN], [""] * 160, on, VECTORS[TEST], [""] * 80, JUDGED, K)
    assert silent.text_weight == 0.0 and silent.gain.value == 0.0 and silent.p_value == 1.0
