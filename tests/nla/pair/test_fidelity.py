"""The core of every measurement of a pair: errors to FVE by stratum, with intervals by document."""

from __future__ import annotations

import pytest
import torch

from nla.errors import BaselineError, ShapeError
from nla.metrics import Baseline
from nla.pair.fidelity import (
    FidelityByStratum,
    fve_by_stratum,
    fve_gain_by_stratum,
    other_document_rows,
    reconstruction_errors,
)
from nla.pair.score import score

STRATA = ["a", "b", "a", "b", "a", "b"]
DOCUMENTS = torch.tensor([0, 0, 1, 1, 2, 2])
ERRORS = torch.tensor([0.2, 0.4, 0.4, 0.8, 0.6, 1.2])
BASELINES = {name: Baseline(torch.zeros(4), variance, 9) for name, variance in {"global": 2.0, "a": 1.0}.items()}
BOTH = BASELINES | {"b": Baseline(torch.zeros(4), 4.0, 9)}


def test_each_stratum_is_judged_by_its_own_variance_and_one_without_a_baseline_is_left_out() -> None:
    assert fve_by_stratum(ERRORS, STRATA, BASELINES) == pytest.approx({"global": 1 - 0.6 / 2, "a": 1 - 0.4})
    assert fve_by_stratum(ERRORS, STRATA, BOTH)["b"] == pytest.approx(1 - 0.8 / 4)
    with pytest.raises(BaselineError, match="global"):
        fve_by_stratum(ERRORS, STRATA, {})


def test_a_gain_is_the_difference_of_the_fves() -> None:
    gain = fve_gain_by_stratum(ERRORS / 2, ERRORS, STRATA, BOTH)
    assert gain == pytest.approx({"global": 0.3 / 2, "a": 0.2, "b": 0.4 / 4})


def test_intervals_surround_the_same_figures_and_count_documents() -> None:
    judged = FidelityByStratum(STRATA, DOCUMENTS, BOTH, n_boot=400)
    plain = fve_by_stratum(ERRORS, STRATA, BOTH)
    for name in (*judged.strata, "global"):
        assert judged.fve(name, ERRORS).value == pytest.approx(plain[name])
        gain = judged.fve_gain(name, ERRORS / 2, ERRORS)
        assert gain.value == pytest.approx(fve_gain_by_stratum(ERRORS / 2, ERRORS, STRATA, BOTH)[name])
        assert judged.error_removed(name, ERRORS / 2, ERRORS) == pytest.approx((0.5, 0.5, 0.5))
    # Errors that differ within documents but not between them say that documents agree.
    even = torch.tensor([0.2, 0.8, 0.2, 0.8, 0.2, 0.8])
    interval = judged.fve("global", even)
    assert interval.high - interval.low < 1e-6


def test_a_known_stratum_without_a_baseline_is_refused_and_unknown_strata_are_not_judged() -> None:
    with pytest.raises(BaselineError, match="'b'"):
        FidelityByStratum(STRATA, DOCUMENTS, BASELINES)
    assert FidelityByStratum(["all"] * 6, DOCUMENTS, BASELINES).strata == []


def test_another_documents_row_is_never_of_the_same_document_and_any_other_may_be_drawn() -> None:
    documents = torch.tensor([5, 0, 0, 9, 0, 0, 5, 0])  # one document has most rows: no derangement would do
    drawn = [other_document_rows(documents, seed) for seed in range(200)]
    assert all(rows is not None and (documents[rows] != documents).all() for rows in drawn)
    assert {int(rows[0]) for rows in drawn if rows is not None} == {1, 2, 3, 4, 5, 7}
    assert other_document_rows(torch.zeros(4, dtype=torch.int64), 0) is None


def test_an_activation_without_a_readable_explanation_counts_as_reconstructed_at_right_angles() -> None:
    vectors = torch.eye(3)
    errors = reconstruction_errors(vectors, vectors[[0, 2]], readable=[True, False, True])
    assert errors.tolist() == pytest.approx([0.0, 2.0, 0.0])
    assert reconstruction_errors(vectors, -vectors).tolist() == pytest.approx([4.0] * 3)
    with pytest.raises(ShapeError):
        reconstruction_errors(vectors, vectors, readable=[True, False, True])


def test_a_bare_string_is_one_stratum() -> None:
    one, place = ERRORS[:1], DOCUMENTS[:1]
    named = BASELINES | {"newline": Baseline(torch.zeros(4), 1.0, 9)}
    assert fve_by_stratum(one, "newline", named) == fve_by_stratum(one, ["newline"], named)
    assert fve_gain_by_stratum(one, one, "newline", named) == {"global": 0, "newline": 0}
    assert FidelityByStratum("newline", place, named).strata == ["newline"]
    row = torch.ones(1, 4)
    assert score(row, row, "newline", place, named, torch.zeros(4), n_boot=9).by_stratum.keys() == {"newline"}
