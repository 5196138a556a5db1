from __future__ import annotations

import dataclasses

import pytest
import torch

from nla.errors import ArgumentError, ShapeError
from nla.eval import explainers
from nla.eval.couplet_items import rhyme_items
from nla.eval.families.controls import describer
from nla.eval.families.mention import keeps_facts, named, score, score_texts, visible_claims
from nla.eval.items import retarget

ITEMS = rhyme_items(100)
VECTORS = torch.zeros(100, 4)


def test_the_truthful_reader_scores_near_one_and_the_lying_one_near_zero() -> None:
    truth, lie = (score(name, getattr(explainers, name), ITEMS, VECTORS) for name in ("truthful", "lying"))
    assert truth.named.value >= 0.95 and truth.facts_kept.value >= 0.95
    assert lie.named.value <= 0.05 and lie.facts_kept.value <= 0.05
    assert truth.visible is not None and truth.visible.value >= 0.95
    assert lie.visible is not None and lie.visible.value <= 0.05
    assert truth.margin >= 0.95 and lie.margin <= 0.0


def test_an_outsider_is_right_as_often_as_chance_in_the_family() -> None:
    guess = score("outsider", describer(0.0, seed=1), ITEMS, VECTORS, n_samples=8)
    assert guess.named.low <= 0.25 <= guess.named.high
    assert abs(guess.margin) < 0.12  # siblings are named as often


def test_the_word_counts_only_in_the_claim_about_the_next_line_and_only_alone() -> None:
    item = dataclasses.replace(ITEMS[0], target="cat", distractors=("hat", "bat", "mat"))
    assert named("It is spring. The next line ends with cat.", item)
    assert not named("It is spring. This line ends with cat.", item)
    assert not named("There is a red cat. The next line ends with hat.", item)
    assert not named("The next line ends with cat hat.", item)
    assert not named("The next line ends with cats.", item)
    assert not named("", item)
    other = retarget(item, "bat")
    assert named("The next line ends with bat.", other) and not named("The next line ends with cat.", other)
    assert set(other.distractors) == {"cat", "hat", "mat"}


def test_false_and_uncheckable_claims_count_as_not_true() -> None:
    item = ITEMS[0]
    season = f"It is {item.couplet.season}."
    assert visible_claims(f"{season} Anna or so. The next line ends with cat.", item) == [True, False]


def test_facts_are_kept_when_all_of_them_are_said_and_nothing_false() -> None:
    item = ITEMS[0]
    mark, season = "The last mark is a line break.", f"It is {item.couplet.season}."
    assert keeps_facts(f"The next line ends with cat. {mark}", item)
    assert keeps_facts(f"{season} {mark}", item)  # more than a truthful reader says, and true
    assert not keeps_facts(season, item)
    assert not keeps_facts(f"{mark} The last word is zebra.", item)
    assert not keeps_facts("The last mark is a comma.", item)


def test_samples_of_one_item_do_not_narrow_the_interval_as_items_do() -> None:
    right = [item.target for item in ITEMS]
    texts = [f"The next line ends with {word}." if row % 2 else "" for row, word in enumerate(right)]
    once = score_texts("once", ITEMS, texts)
    repeated = score_texts("repeated", ITEMS, [text for text in texts for _ in range(10)], n_samples=10)
    assert repeated.named.value == once.named.value == 0.5
    assert repeated.named.high - repeated.named.low > 0.8 * (once.named.high - once.named.low)
    assert repeated.per_item == once.per_item


def test_no_items_and_missing_texts_are_refused() -> None:
    with pytest.raises(ArgumentError):
        score_texts("none", [], [])
    with pytest.raises(ShapeError):
        score_texts("short", ITEMS, ["a"])
