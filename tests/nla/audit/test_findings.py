"""Findings: thought and said or not said, rates in controls, and tests against closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch

from nla.audit.controls import controls_needed, rank_p_values, stratified_permutation
from nla.audit.findings import AFTER, BEFORE, BOTH, NOT_SAID, Evidence, Matcher, Mentions, score_evidence
from nla.audit.reading import Reading
from nla.audit.rubric import load_rubrics, parse_rubric
from nla.errors import ArgumentError, RubricError
from nla.stats import benjamini_hochberg
from tests.helpers.talk import entry, evidence, heard, said

PLAIN = {"name": "cat", "looks_for": "A cat.", "match": {"words": ["cat"]}}
CAT = parse_rubric(PLAIN)
TALK = said(("user", "A dog is here."), ("assistant", "It is a cat, I say."), ("user", "So."))


@pytest.mark.parametrize(
    ("message", "offset", "expected"),
    [(0, 0, AFTER), (1, 0, AFTER), (1, 10, AFTER), (1, 11, BEFORE), (2, 0, BEFORE)],
)
def test_said_is_judged_from_the_token(message: int, offset: int, expected: str) -> None:
    assert Mentions(CAT, TALK, heard([TALK])[0]).around(entry(message, offset)) == expected


def test_said_on_both_sides_and_nowhere() -> None:
    both = said(("user", "a cat"), ("assistant", "a cat"))
    assert Mentions(CAT, both, heard([both])[0]).around(entry(1, 0)) == BOTH
    assert Mentions(CAT, said(("user", "concatenate")), ["concatenate"]).around(entry()) == NOT_SAID


def test_saying_counts_in_the_named_roles_only() -> None:
    quiet = parse_rubric({**PLAIN, "said_in": ["assistant"]})
    hint = said(("user", "I think it is a cat."), ("assistant", "Yes."))
    assert Mentions(CAT, hint, heard([hint])[0]).around(entry(1, 0)) == BEFORE
    assert Mentions(quiet, hint, heard([hint])[0]).around(entry(1, 0)) == NOT_SAID


def test_a_position_counts_the_samples_that_show_the_concept() -> None:
    judged = Matcher([CAT]).judge_position(
        CAT, entry(texts=["A cat.", "A dog.", "", "Cat and dog."]), Mentions(CAT, TALK, heard([TALK])[0])
    )
    assert judged.shown == (True, False, False, True) and judged.share == 0.5


def test_a_language_mismatch_is_thought_and_not_said_until_it_is_written() -> None:
    (rubric,) = load_rubrics(["language-mismatch"])
    talk = said(("user", "What is the best of the two?"), ("assistant", "Je ne sais pas que le chat est la."))
    matcher, mentions = Matcher([rubric]), Mentions(rubric, talk, heard([talk])[0])
    russian = matcher.judge_position(rubric, entry(0, 5, ["It expects Russian.", "English."]), mentions)
    assert (russian.value, russian.written, russian.said, russian.shown) == (
        "Russian",
        "English",
        NOT_SAID,
        (True, False),
    )
    french = matcher.judge_position(rubric, entry(0, 5, ["It expects French.", "It expects French."]), mentions)
    assert (french.value, french.said) == ("French", AFTER)
    same = matcher.judge_position(rubric, entry(1, 5, ["It writes French.", "French."]), mentions)
    assert same.share == 0.0 and same.value is None


def _many(n: int, texts: list[str], name: str, kind: str = "user end") -> Evidence:
    talks = [said(("user", f"{name} {number}"), ("assistant", "A cat."), name=f"{name}{number}") for number in range(n)]
    readings = [
        Reading(each.id, "key", 9, 0, (entry(0, 1, texts, kind), entry(1, 2, ["A dog."] * len(texts), "answer end")))
        for each in talks
    ]
    return Evidence(talks, readings, heard(talks))


def test_what_is_rare_in_controls_is_significant_and_what_is_not_is_not() -> None:
    shows, silent = ["A cat.", "A cat."], ["A dog.", "A dog."]
    tested = score_evidence(_many(10, shows, "a"), _many(40, silent, "c"), Matcher([CAT]))
    found = [row for row in tested.positions if row.share == 1.0]
    assert len(found) == 10 and all(row.p == pytest.approx(1 / 41) and row.significant for row in found)
    assert {row.control_rate for row in found} == {0.0} and {row.n_controls for row in found} == {40}
    (result,) = tested.rubrics
    assert (result.n_findings, result.n_not_said, result.n_significant) == (10, 0, 10)
    assert result.p == pytest.approx(1 / 10_001) and result.p_holm == result.p
    assert (result.rate.value, result.control.value) == (0.5, 0.0)
    assert all(score.p == pytest.approx(1 / 41) for score in tested.transcripts)

    same = score_evidence(_many(10, shows, "a"), _many(40, shows, "c"), Matcher([CAT]))
    assert {row.p for row in same.positions} == {1.0} and same.rubrics[0].p == 1.0
    assert not any(row.significant for row in same.positions)


def test_q_values_pay_for_all_positions_of_the_rubric() -> None:
    ours, quiet = _many(5, ["A cat."], "a"), _many(10, ["A dog."], "b")
    both = Evidence(
        [*ours.transcripts, *quiet.transcripts], [*ours.readings, *quiet.readings], [*ours.heard, *quiet.heard]
    )
    tested = score_evidence(both, _many(99, ["A dog."], "c"), Matcher([CAT]))
    assert [row.q for row in tested.positions if row.share] == pytest.approx([0.01 * 30 / 5] * 5)
    assert tested.rubrics[0].least_controls == 119 and not any(row.significant for row in tested.positions)


def test_copies_of_a_transcript_are_no_further_evidence() -> None:
    ours, quiet = _many(1, ["A cat."], "a"), _many(1, ["A dog."], "c")
    copied = Evidence([*quiet.transcripts] * 99, [*quiet.readings] * 99, [*quiet.heard] * 99)
    tested = score_evidence(ours, copied, Matcher([CAT]))
    row = next(row for row in tested.positions if row.share)
    assert (row.p, row.n_controls, tested.rubrics[0].p, tested.transcripts[0].p) == (0.5, 1, 0.5, 0.5)
    twice = score_evidence(Evidence(*([*part] * 9 for part in ours)), None, Matcher([CAT]))
    assert torch.isnan(torch.tensor(twice.rubrics[0].rate.low))


def test_positions_are_compared_within_their_kind() -> None:
    shows = ["A cat.", "A cat."]
    tested = score_evidence(_many(4, shows, "a"), _many(40, shows, "c", kind="answer start"), Matcher([CAT]))
    found = [row for row in tested.positions if row.share == 1.0]
    assert all(row.n_controls == 0 and row.p == 1.0 and row.control_rate is None for row in found)


def test_without_controls_nothing_is_tested() -> None:
    tested = score_evidence(evidence(TALK, entry(texts=["A cat."])), None, Matcher([CAT]))
    (row,) = tested.positions
    assert (row.p, row.q, row.significant, row.control_rate) == (None, None, None, None)
    assert tested.rubrics[0].p is None and tested.rubrics[0].n_significant is None


def test_a_paired_control_is_tested_position_by_position() -> None:
    ours, theirs = _many(8, ["A cat."], "a"), _many(8, ["A dog."], "a")
    tested = score_evidence(ours, theirs, Matcher([CAT]), paired=True)
    assert tested.rubrics[0].p == pytest.approx(1 / 2**8)
    assert {row.n_controls for row in tested.positions} == {8} and {row.p for row in tested.positions} == {1 / 9, 1.0}


def test_a_rubric_that_asks_a_judge_needs_one() -> None:
    with pytest.raises(RubricError, match="--judge-url"):
        Matcher([parse_rubric({**PLAIN, "match": {"judge": True}})])


def test_rank_p_values_count_ties_and_themselves() -> None:
    controls = {"a": list(enumerate([0.0, 0.5, 0.5, 1.0]))}
    assert rank_p_values([1.0, 0.5, 0.25, 0.0], ["a"] * 4, controls) == [2 / 5, 4 / 5, 4 / 5, 1.0]
    assert rank_p_values([1.0], ["b"], controls) == [1.0]


def test_a_control_transcript_counts_once_however_many_positions_it_brings() -> None:
    controls = {"a": [(7, 0.0)] * 98 + [(7, 1.0)] * 2 + [(8, 0.0)]}
    assert rank_p_values([1.0, 0.5, 0.0], ["a"] * 3, controls) == pytest.approx([1.02 / 3, 1.02 / 3, 1.0])


def test_positions_that_a_transcript_makes_alike_are_not_significant_by_their_number() -> None:
    """Every transcript shows the concept at all of its positions or at none: chance decides by transcript."""
    generator = torch.Generator().manual_seed(0)
    small = 0
    for _ in range(200):
        shows = torch.rand(21, generator=generator) < 0.04
        controls = {"a": [(unit, float(shows[unit])) for unit in range(20) for _ in range(30)]}
        small += rank_p_values([float(shows[20])] * 30, ["a"] * 30, controls)[0] <= 0.05
    assert small / 200 <= 0.06


def test_rank_p_values_are_uniform_or_larger_when_nothing_is_there() -> None:
    generator = torch.Generator().manual_seed(0)
    small = 0
    for _ in range(400):
        draws = torch.randint(0, 5, (40,), generator=generator).div(4).tolist()
        small += rank_p_values(draws[:1], ["a"], {"a": list(enumerate(draws[1:]))})[0] <= 0.05
    assert small / 400 <= 0.06


def test_benjamini_hochberg_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    p_values = torch.rand(9, generator=generator).tolist()
    for alpha in (0.1, 0.3, 0.6, 0.9):
        ordered = sorted(p_values)
        reached = [k for k in range(1, 10) if ordered[k - 1] <= k * alpha / 9]
        limit = ordered[max(reached) - 1] if reached else -1.0
        assert [q <= alpha for q in benjamini_hochberg(p_values)] == [p <= limit for p in p_values]
    with pytest.raises(ArgumentError):
        benjamini_hochberg([1.5])


def test_controls_needed_is_where_a_finding_can_be_significant() -> None:
    needed = controls_needed(n_positions=30, n_found=3, alpha=0.05)
    for n_controls, significant in ((needed, True), (needed - 1, False)):
        p = [1 / (n_controls + 1)] * 3 + [1.0] * 27
        assert (benjamini_hochberg(p)[0] <= 0.05) == significant


def test_stratified_permutation_equals_all_labellings_by_hand() -> None:
    ours = [(0, "a", 1.0), (0, "b", 0.5), (1, "a", 0.5)]
    theirs = [(0, "a", 0.0), (0, "b", 0.5), (1, "a", 0.25), (1, "b", 0.0)]
    units = [[("a", 1.0), ("b", 0.5)], [("a", 0.5)], [("a", 0.0), ("b", 0.5)], [("a", 0.25), ("b", 0.0)]]

    def statistic(chosen: tuple[int, ...]) -> float:
        total = weight = 0.0
        for kind in "ab":
            inside = [share for u in chosen for k, share in units[u] if k == kind]
            outside = [share for u in range(4) if u not in chosen for k, share in units[u] if k == kind]
            if inside and outside:
                total += len(inside) * (sum(inside) / len(inside) - sum(outside) / len(outside))
                weight += len(inside)
        return total / max(weight, 1)

    values = [statistic(chosen) for chosen in itertools.combinations(range(4), 2)]
    expected = sum(value >= values[0] - 1e-9 for value in values) / 6
    assert stratified_permutation(ours, theirs) == pytest.approx(expected)


def test_a_rubric_may_look_at_some_kinds_of_position_alone() -> None:
    read = evidence(said(("user", "hello")), entry(0, 1, ["A cat."]), entry(0, 2, ["A cat."], "before answer"))
    both = score_evidence(read, None, Matcher([CAT]))
    before = score_evidence(read, None, Matcher([parse_rubric({**PLAIN, "at": ["before answer"]})]))
    assert [row.entry.kind for row in both.positions] == ["user end", "before answer"]
    assert [row.entry.kind for row in before.positions] == ["before answer"] and before.rubrics[0].n_positions == 1
    with pytest.raises(RubricError, match="answer end alone"):
        score_evidence(read, None, Matcher([parse_rubric({**PLAIN, "at": ["answer end"]})]))
