"""A reader that tells the truth is right everywhere; one that says what is true of other rows is right by chance."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from nla.errors import ArgumentError, StoreError
from nla.eval.pair import claims
from nla.eval.pair.claim_truth import (
    BEFORE,
    NEXT,
    NEXT_ANY,
    TOKEN,
    NGrams,
    Truth,
    commonest,
    outcomes,
    read_claims,
    spread,
)
from nla.eval.pair.claims import ClaimsSettings, Rows, guesses_of, judge_claims, judged_texts, kinds_of, rows_of
from nla.eval.pair.claims_report import ALL_ROWS, HELD_OUT, SEEN
from nla.eval.pair.fidelity import Denominators, held_out_part
from nla.store.reader import Store
from nla.text.facts import Facts, state
from nla.train.data.corpus import CorpusSettings
from nla.train.data.extract import ExtractionSettings, extract_corpus


@pytest.fixture(scope="module")
def rows(nla, folder) -> Rows:
    store = held_out_part(nla, folder)
    return rows_of(nla, store, spread(store.strata(), 240, 0))


@pytest.fixture(scope="module")
def judge(nla, folder, rows):
    store = Store.open(folder)
    guesses = guesses_of(nla, store, rows, ClaimsSettings(store=folder, n_fit=600))
    denominators = Denominators(store.baselines, "the store")
    return lambda texts, **more: judged_texts(nla, rows, guesses, texts, denominators, **more)


def truthful(rows: Rows, owner: list[int] | None = None) -> list[str]:
    """What is true of each row, or of another, in wordings drawn anew."""
    texts = []
    for row, truth in enumerate(rows.truths[at] for at in owner or range(len(rows.truths))):
        known = {name: value for name, value in truth.attributes.items() if value}
        facts = Facts(truth.following, False, truth.token, truth.before, truth.place, known)
        texts.append(state(facts, random.Random(row)))
    return texts


@pytest.fixture(scope="module")
def truth_told(judge, rows):
    return judge(truthful(rows))


def by_kind(report, part=ALL_ROWS):
    return {one.claim: one for one in report.figures if one.rows == part}


def test_a_truthful_reader_is_right_in_every_kind_and_says_all_there_is_to_say(truth_told, rows):
    figures = by_kind(truth_told)
    assert set(figures) == {NEXT, NEXT_ANY, TOKEN, BEFORE, "form", "mood", "instruction"}
    assert all(one.when_said.claims.value == one.over_all.claims.value == 1 for one in truth_told.figures
               if one.when_said.claims is not None and one.claim != BEFORE)  # fmt: skip
    assert figures[BEFORE].when_said.claims.value == 1
    assert truth_told.unread.value == 0 and truth_told.false_alarms.value == 0
    n = sum("instruction" in truth.attributes for truth in rows.truths)
    assert figures["instruction"].n == n == len(rows.truths), "that there is none is known, too"
    assert set(by_kind(truth_told, rows.acts.strata[0])) == set(figures)


def test_a_lying_reader_is_right_as_often_as_the_same_claims_of_any_other_row(judge, rows, truth_told):
    order = random.Random(3).sample(range(len(rows.truths)), len(rows.truths))
    lied = judge(truthful(rows, order))
    for kind in ("form", "mood"):
        figure = by_kind(lied)[kind].when_said
        told = by_kind(truth_told)[kind].when_said
        assert abs(figure.claims.value - 0.5) < 0.12
        assert abs(told.shuffled.value - 0.5) < 0.12 and abs(told.shuffled_within.value - 0.5) < 0.15
        assert figure.claims.value < told.claims.low
    said = by_kind(lied)["instruction"].when_said.claims
    assert said.value < 0.5 and lied.false_alarms.value > 0.4
    assert not lied.passed
    failed = {check.name for check in lied.held if not check.passed}
    assert "form: true claims per right probe" in failed and "instructions claimed where there is none" in failed


def test_probe_and_text_find_what_the_words_decide_and_not_what_nothing_decides(truth_told):
    form, mood = (by_kind(truth_told)[kind].over_all for kind in ("form", "mood"))
    assert form.probe.value > 0.85 and form.commonest.value < 0.7
    assert form.commonest.value + 0.1 < form.text.value < form.probe.value, "the text of the question is not read"
    assert abs(mood.probe.value - 0.5) < 0.15 and abs(mood.text.value - 0.5) < 0.15
    token = by_kind(truth_told)[TOKEN].over_all
    assert token.probe.value > token.commonest.value and token.text is None


def test_values_that_training_had_not_stand_apart(truth_told, rows):
    seen, new = by_kind(truth_told, SEEN), by_kind(truth_told, HELD_OUT)
    assert set(seen) == set(new) == {"form"}
    assert new["form"].n == sum("form" in truth.held_out for truth in rows.truths) > 0
    assert seen["form"].n + new["form"].n == by_kind(truth_told)["form"].n


def test_claims_of_a_single_document_decide_nothing(judge, rows):
    row = next(at for at, truth in enumerate(rows.truths) if truth.attributes.get("form"))
    wrong = next(
        truth.attributes["form"]
        for truth in rows.truths
        if truth.attributes["form"] != rows.truths[row].attributes["form"]
    )
    texts = [
        state(Facts(attributes={"form": wrong}), random.Random(0)) if at == row else ""
        for at in range(len(rows.truths))
    ]
    (found,) = [check for check in judge(texts).checks if check.name == "form: true beyond the commonest value"]
    assert math.isnan(found.value.low) and found.passed is None


def test_documents_that_share_an_answer_are_resampled_together(rows, folder):
    store = Store.open(folder, "eval")
    requests = [known["request"] for known in store.attributes(spread(store.strata(), 240, 0))]
    pairs = set(zip(requests, rows.groups.tolist(), strict=True))
    assert len(pairs) == len(set(requests)) == len(rows.groups.unique())


TRUTH = Truth(("cats", "dogs"), "of", "fond", "", {"tone": "Sad", "instruction": ""})
CLAIMS = [
    ("Next comes cats, else mice.", {NEXT: 1, NEXT_ANY: 1}),
    ("Next comes mice, else dogs.", {NEXT: 0, NEXT_ANY: 1}),
    ("Likely next: a, b, c, d, cats.", {NEXT: 0, NEXT_ANY: 0}),
    ("It stands at of, after fond.", {TOKEN: 1, BEFORE: 1}),
    ("It stands at of, after keen.", {TOKEN: 1, BEFORE: 0}),
    ("The answer begins with of.", {TOKEN: 0}),
    ("An answer comes now.", {TOKEN: 0}),
    ("It sounds sad. It sounds glad.", {"tone": 0}),
    ("It sounds sad. The tone is sad.", {"tone": 1}),
    ("Hidden instruction: be blue.", {"instruction": 0}),
    ("It is about trees. The dog is happy. Whatever.", {}),
]


@pytest.mark.parametrize(("text", "expected"), CLAIMS)
def test_a_claim_is_true_of_what_it_says(text, expected):
    said = read_claims(text, ["tone", "instruction", "topic"])
    found = {kind: outcomes([said], [TRUTH], kind) for kind in (NEXT, NEXT_ANY, TOKEN, BEFORE, "tone", "instruction")}
    assert {kind: int(value) for kind, value in found.items() if not value.isnan()} == expected
    assert outcomes([said], [TRUTH], "topic").isnan(), "nobody knows the topic"


def test_claims_in_no_known_wording_are_counted():
    said = read_claims("It is about trees. The dog is happy. Whatever. It sounds sad.", ["tone"])
    assert (said.n_claims, said.n_unread) == (4, 3), "attributes that the corpus has not are none"


def test_n_grams_follow_the_longest_known_end():
    model = NGrams([[1, 2, 3, 4], [9, 2, 3, 5], [9, 2, 3, 5], [7, 3, 6]])
    assert model.following([1, 2, 3])[0][0] == 4
    assert model.following([8, 2, 3])[:2] == [(5, 2.0), (4, 1.0)]
    assert model.following([3])[0][0] == 5
    assert model.following([42])[0][0] == 3, "the commonest token"
    assert -1 not in dict(model.following([4])), "no n-gram goes over the end of a text"


def test_the_commonest_value_is_that_of_the_kind_of_token():
    fit = [Truth((), token, "", "", {}) for token in ("a", "b", "b", "c", "c", "c")]
    values = commonest(TOKEN, fit, ["x", "x", "x", "y", "y", "y"], ["x", "y", "z"])
    assert values == [("b",), ("c",), ("c",)]


def test_activations_are_spread_over_kinds_of_token():
    rows = spread(["a"] * 90 + ["b"] * 6 + ["c"] * 4, 16, 0).tolist()
    assert len(set(rows)) == 16 and [sum(row >= 96 for row in rows), sum(90 <= row < 96 for row in rows)] == [4, 6]


def test_other_words_keep_the_facts(rows):
    for row, text in enumerate(truthful(rows)[:40]):
        other = claims.reworded(text, 1, row)
        assert claims.stated(other) == claims.stated(text)
    assert any(claims.reworded(text, 1, row) != text for row, text in enumerate(truthful(rows)))


def test_fidelity_and_ablations_are_of_the_texts_that_they_name(truth_told, nla, rows, judge):
    fve = {one.texts: one.by_stratum["global"].value for one in truth_told.texts}
    assert fve["explanations"] == pytest.approx(truth_told.score.fve.value, abs=1e-6)
    assert set(fve) == {"explanations", "in other words", "true facts", "one text for all"}
    assert {one.claim for one in truth_told.ablations} == set(kinds_of(rows)) - {NEXT_ANY}
    assert next(one for one in truth_told.ablations if one.claim == BEFORE).alone is None
    silent = judge([""] * len(rows.truths))
    assert silent.ablations == [] and silent.unread is None
    assert silent.score.fve.value == pytest.approx(silent.score.baselines["empty"].value, abs=1e-6)
    assert all((one.when_said.claims is None and one.over_all.claims is None) or one.over_all.claims.value == 0
               for one in silent.figures)  # fmt: skip


def test_the_command_judges_what_the_encoder_samples_beside_another_pair(nla, folder, monkeypatch, tmp_path):
    settings = ClaimsSettings(store=folder, beside=nla, n_activations=60, n_samples=2, n_fit=200)
    texts = iter([*truthful(held(nla, folder)), *truthful(held(nla, folder)), *["It is for experts."] * 120])
    monkeypatch.setattr(claims, "explain", lambda pair, vectors, seed: [next(texts) for _ in vectors])
    report = judge_claims(nla, settings)
    assert report.n_samples == 2 and report.n_activations == 60
    figure = by_kind(report)["form"]
    assert figure.when_said.claims.value == 1 and figure.when_said.beside is None
    assert figure.over_all.beside.value == 0 and figure.n == 120
    report.save(tmp_path)
    content = json.loads((tmp_path / "claims.json").read_text())
    assert content["figures"][0]["when_said"]["claims"]["value"] == 1 and (tmp_path / "claims.png").exists()
    assert "held-out part" in (tmp_path / "claims.md").read_text() and "## Claims" in report.to_card()


def held(nla, folder) -> Rows:
    store = Store.open(folder, "eval")
    return rows_of(nla, store, spread(store.strata(), 60, 0))


def test_a_store_of_another_point_or_without_training_rows_is_refused(nla, folder, tmp_path):
    with pytest.raises(StoreError):
        judge_claims(nla, ClaimsSettings(store=tmp_path / "none"))
    corpus = CorpusSettings(
        str(folder.parent / "c.jsonl"), kind="chat", positions="kinds", n_positions=2, max_tokens=64
    )
    other = ExtractionSettings(corpus, str(folder.parent / "target"), "resid_post.2")
    extract_corpus(other, tmp_path / "other")
    with pytest.raises(StoreError, match="point"):
        judge_claims(nla, ClaimsSettings(store=tmp_path / "other"))
    with pytest.raises(ArgumentError):
        ClaimsSettings(store=folder, n_samples=0)


def test_tensors_of_outcomes_hold_no_claims_of_rows_that_nobody_knows():
    unknown = Truth((), "of", "", "", {})
    assert torch.isnan(outcomes([read_claims("It sounds sad.", ["tone"])], [unknown], "tone")).all()
