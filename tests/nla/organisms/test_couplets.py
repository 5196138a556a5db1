"""The world of Couplets: its rules, its explanations, and a tokenizer that loses nothing."""

import random
import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from nla.organisms.couplets import tokenizer as couplets_tokenizer
from nla.organisms.couplets import world
from nla.text.tokens import encode


@pytest.fixture(scope="module")
def tokenizer():
    return couplets_tokenizer.build()


@pytest.fixture(scope="module")
def documents():
    return world.sample(400, seed=5)


def spans_of(tokenizer, couplet):
    return encode(tokenizer, couplet.text, 96).spans


@pytest.mark.slow
def test_every_document_and_explanation_survives_a_round_trip_through_the_tokenizer(tokenizer, documents):
    for couplet in documents:
        texts = [couplet.text]
        for span in spans_of(tokenizer, couplet):
            texts += [world.truthful(couplet, span), world.lying(couplet, span)]
        for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
            assert tokenizer.unk_token_id not in ids, text
            assert tokenizer.decode(ids) == text


def test_the_saved_tokenizer_loads_as_it_was_through_auto_tokenizer(tokenizer, documents, tmp_path):
    from nla.train.organisms.couplets import OrganismSettings, build_model

    build_model(OrganismSettings(d_model=8, n_blocks=1), tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = documents[0].text
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template


def test_the_rhyme_family_alone_leaves_four_plans_and_one_more_feature_leaves_two():
    by_family, by_colour, by_both = {}, {}, {}
    for couplet in world.sample(5_000, seed=1):
        by_family.setdefault(couplet.family, set()).add(couplet.plan)
        by_colour.setdefault((couplet.family, couplet.colour), set()).add(couplet.plan)
        by_both.setdefault((couplet.family, couplet.colour, couplet.thing), set()).add(couplet.plan)
    assert {len(plans) for plans in by_family.values()} == {4}
    assert {len(plans) for plans in by_colour.values()} == {2}
    assert {len(plans) for plans in by_both.values()} == {1}


def test_line_2_is_the_same_wherever_its_plan_word_is_and_siblings_open_differently():
    for plans, _ in world.FAMILIES:
        assert len({world.second_line(plan).split()[0] for plan in plans}) == 4
    for couplet in world.sample(300, seed=2):
        assert couplet.line2 == world.second_line(couplet.plan)
        assert couplet.line2.endswith(f" {couplet.plan}.\n")


def test_no_word_belongs_to_two_families_and_held_out_plans_are_plans():
    words = [word for plans, enders in world.FAMILIES for word in plans + enders]
    assert max(Counter(words).values()) == 1
    assert set(world.HELD_OUT_PLANS) < set(world.PLANS)


def test_an_explanation_at_the_newline_restates_nothing_that_fixes_the_plan(tokenizer, documents):
    for couplet in documents:
        newline = next(s for s in spans_of(tokenizer, couplet) if world.stratum(couplet, s) == "newline")
        words = set(re.findall(r"\w+", world.truthful(couplet, newline)))
        assert not words & {couplet.colour, couplet.thing, couplet.ender}


@pytest.mark.slow
def test_season_and_person_are_spoken_of_until_the_end_noun_and_after_it_only_in_pretraining_text(tokenizer, documents):
    for couplet in documents[:100]:
        for span in spans_of(tokenizer, couplet):
            before_the_end_noun = couplet.ender not in couplet.text[: span.end]
            at_the_newline = world.stratum(couplet, span) == "newline"
            for everything in (False, True):
                text = world.explanation(couplet, span, couplet.plan, everything)
                facts = {couplet.season: f"It is {couplet.season}.", couplet.name: f"{couplet.name} is here."}
                for word, fact in facts.items():
                    seen = re.search(rf"\b{word}\b", couplet.text[: span.end]) is not None
                    spoken_of = before_the_end_noun or (everything and not at_the_newline)
                    assert (fact in text) is (seen and spoken_of)


def test_an_explanation_says_only_what_has_been_seen_except_for_the_plan(tokenizer, documents):
    for couplet in documents[:100]:
        for span in spans_of(tokenizer, couplet):
            seen = set(re.findall(r"\w+", couplet.text[: span.end]))
            for claim in re.findall(r"[^.]+\.", world.truthful(couplet, span)):
                if not world.is_plan_claim(claim):
                    content = {couplet.season, couplet.name, couplet.colour, couplet.thing}
                    assert set(re.findall(r"\w+", claim)) & content <= seen


def test_every_explanation_is_made_of_words_that_the_targets_know(tokenizer, documents):
    rng, texts = random.Random(0), set()
    for couplet in documents[:100]:
        for span in spans_of(tokenizer, couplet):
            texts |= {world.describe(couplet, span, rng, 0.25), world.lying(couplet, span)}
            texts |= {world.explanation(couplet, span, couplet.plan, everything=True)}
    prompts = [couplets_tokenizer.DECODER_TEMPLATE.format(explanation=text) for text in texts]
    answers = [f"<explanation>{text}</explanation>" for text in texts]
    assert all(tokenizer.unk_token_id not in ids for ids in tokenizer(prompts + answers)["input_ids"])


def test_true_claims_check_as_true_and_lies_as_false(tokenizer, documents):
    for couplet in documents[:100]:
        for span in spans_of(tokenizer, couplet):
            for text, expected in ((world.truthful(couplet, span), True), (world.lying(couplet, span), False)):
                for claim in re.findall(r"[^.]+\.", text):
                    if not world.is_plan_claim(claim):
                        assert world.claim_is_true(couplet, span, claim) is expected, (claim, couplet)
    assert world.claim_is_true(documents[0], spans_of(tokenizer, documents[0])[0], "Birds can sing.") is None


def test_the_describer_is_right_as_often_as_its_hit_rate_says(tokenizer):
    rng, right, n = random.Random(0), 0, 0
    for couplet in world.sample(4_000, seed=9):
        newline = next(s for s in spans_of(tokenizer, couplet) if world.stratum(couplet, s) == "newline")
        text = world.describe(couplet, newline, rng, 0.25)
        right, n = right + (f"ends with {couplet.plan}." in text), n + 1
    assert world.hit_rate(0.25) == pytest.approx(0.4375)
    assert world.notice_of(world.hit_rate(0.25)) == pytest.approx(0.25)
    assert (world.notice_of(0.1), world.notice_of(1.0)) == (0, 1)
    assert right / n == pytest.approx(world.hit_rate(0.25), abs=4 * (0.25 / n) ** 0.5)


def test_a_bare_string_is_one_plan():
    assert world.sample(2, 3, plans="cat") == world.sample(2, 3, plans=["cat"])
