from __future__ import annotations

import pytest

from nla.errors import ArgumentError
from nla.eval.couplet_items import SHOWN_PLANS, documents, rhyme_items, trained_on
from nla.organisms import ground_truth
from nla.organisms.couplets import tokenizer as couplets_tokenizer
from nla.organisms.couplets import world
from nla.train.data.world import documents as training_documents
from nla.train.organisms.couplets import OrganismSettings
from nla.train.recipe import load_recipe


def test_items_are_seeded_and_no_prompt_occurs_twice() -> None:
    items = rhyme_items(120, seed=3)
    assert items == rhyme_items(120, seed=3)
    assert len({item.prompt for item in items}) == 120
    assert {item.prompt for item in items}.isdisjoint({item.prompt for item in rhyme_items(120, seed=4)})


def test_no_document_is_one_that_the_targets_or_the_pair_were_trained_on() -> None:
    recipe = load_recipe("couplets")
    organism = OrganismSettings()
    splits = training_documents(ground_truth.load(recipe.world), recipe.extract, recipe.seed)
    known = {couplet.line1 for couplet in splits["train"]}
    known |= {couplet.line1 for couplet in world.sample(organism.n_documents, organism.seed)}
    assert known == trained_on()
    assert known.isdisjoint(couplet.line1 for couplet in documents(3000, seed=0))
    assert known.isdisjoint(item.prompt for item in rhyme_items(500))
    assert not known.isdisjoint(couplet.line1 for couplet in world.sample(3000, 14_000_000))  # it does happen


def test_default_items_have_neither_targets_nor_donors_among_the_held_out_plans() -> None:
    for item in rhyme_items(150):
        assert item.target in SHOWN_PLANS and item.donor_target in SHOWN_PLANS and not item.held_out
    assert all(item.held_out for item in rhyme_items(20, plans=world.HELD_OUT_PLANS))


def test_a_donor_is_a_minimal_pair_with_a_sibling_for_its_plan() -> None:
    tokenizer = couplets_tokenizer.build()
    for item in rhyme_items(100):
        own, other = (tokenizer(text)["input_ids"] for text in (item.prompt, item.donor_prompt))
        assert sum(a != b for a, b in zip(own, other, strict=True)) == 1
        assert item.donor_target in item.distractors and f" {item.target}" not in item.prompt
        assert item.continuation == world.second_line(item.target)


def test_the_read_token_is_the_line_break_and_later_the_last_word() -> None:
    import dataclasses

    item = rhyme_items(1)[0]
    assert item.prompt[item.span.start : item.span.end] == "\n"
    later = dataclasses.replace(item, prompt=item.prompt + item.continuation.split()[0])
    assert world.stratum(later.couplet, later.span) == "line 2"
    assert later.couplet.text[later.span.start : later.span.end] == item.continuation.split()[0]


@pytest.mark.parametrize("arguments", [{"n_items": 0}, {"seed": -1}, {"plans": ["zebra"]}])
def test_bad_arguments_are_refused(arguments: dict) -> None:
    with pytest.raises(ArgumentError):
        rhyme_items(**arguments)


def test_a_bare_string_is_one_plan() -> None:
    assert rhyme_items(2, plans="cat") == rhyme_items(2, plans=["cat"])
