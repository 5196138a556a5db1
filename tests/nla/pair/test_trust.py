"""Trust needs all three of its numbers; agreement counts claims, not wording at the edges."""

import itertools
import random

import pytest

from nla.errors import ArgumentError
from nla.pair.explanations import LEVELS, Trust, agreement, normalise


def test_alike_samples_agree_fully_and_strangers_not_at_all():
    assert agreement([["It is spring.", "Anna is here."]] * 3) == 1
    assert agreement([["It is spring."], ["It is autumn."]]) == 0


def test_agreement_is_the_mean_jaccard_index_of_all_pairs():
    """Pairs: {a,b}·{b,c} = 1/3, {a,b}·{a,b} = 1, {b,c}·{a,b} = 1/3."""
    assert agreement([["a", "b"], ["b", "c"], ["a", "b"]]) == pytest.approx(5 / 9)


def test_case_order_spaces_repeats_and_full_stops_do_not_count():
    assert agreement([["It is spring.", "Anna is here."], ["anna  is here", "It IS spring!", "It is spring."]]) == 1


def test_one_changed_word_makes_another_claim():
    assert agreement([["The next line ends with cat."], ["The next line ends with rat."]]) == 0


def test_agreement_does_not_depend_on_the_order_of_samples():
    rng = random.Random(0)
    samples = [[rng.choice("abcd") for _ in range(3)] for _ in range(4)]
    values = [agreement(list(order)) for order in itertools.permutations(samples)]
    assert values == pytest.approx([values[0]] * 24) and 0 < values[0] < 1


def test_samples_without_claims_do_not_agree_with_each_other():
    assert agreement([[], []]) == 0
    assert agreement([[], ["a"], ["a"]]) == pytest.approx(1 / 3)
    assert agreement([["."], [" "]]) == 0


def test_one_sample_has_no_agreement_and_none_is_refused():
    assert agreement([["It is spring."]]) is None
    with pytest.raises(ArgumentError, match="at least 1"):
        agreement([])


@pytest.mark.parametrize(
    "raw, compared",
    [("  The  next ", "the next"), ("\u201cCat\u201d.", "cat"), ("It's \n a cat", "it's a cat"), ("...", "")],
)
def test_a_claim_is_compared_without_case_and_edges(raw, compared):
    assert normalise(raw) == compared


def test_all_three_good_is_high():
    assert Trust.of(cosine=0.95, agreement=0.9, margin=0.4).level == "high"


@pytest.mark.parametrize("weak", ["cosine", "agreement", "margin"])
def test_one_bad_number_makes_trust_low_whatever_the_others(weak):
    numbers = {"cosine": 1.0, "agreement": 1.0, "margin": 1.0}
    assert Trust.of(**{**numbers, weak: 0.0}).level == "low"
    assert Trust.of(**{**numbers, weak: float("nan")}).level == "low"


def test_a_cosine_of_099_that_the_mean_direction_also_reaches_is_not_trusted():
    assert Trust.of(cosine=0.99, agreement=1.0, margin=0.0).level == "low"


def test_a_single_sample_never_earns_high_trust():
    assert Trust.of(cosine=1.0, agreement=None, margin=1.0).level == "medium"


def test_trust_never_falls_when_a_number_rises():
    grid = [i / 10 for i in range(11)]
    rank = {numbers: LEVELS.index(Trust.of(*numbers).level) for numbers in itertools.product(grid, repeat=3)}
    assert set(rank.values()) == {0, 1, 2}
    for numbers, level in rank.items():
        for place in range(3):
            higher = tuple(min(1.0, round(v + 0.1, 1)) if i == place else v for i, v in enumerate(numbers))
            assert rank[higher] >= level


def test_trust_shows_its_numbers():
    shown = str(Trust.of(0.91, None, 0.2))
    assert "medium" in shown and "0.91" in shown and "+0.20" in shown and "–" in shown


def test_a_bare_string_is_one_claim() -> None:
    assert agreement(["It is spring.", ["it is spring"], "It is so."]) == pytest.approx(1 / 3)
