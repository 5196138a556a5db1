"""The readers of the visible text: each against the model's own output, or scikit-learn's, on its own."""

from __future__ import annotations

import torch

from nla.eval import adversaries
from nla.eval.readers.tasks import Sites
from nla.eval.target import Target, write
from nla.models.points import Point
from tests.helpers.tiny import CONTEXT, TEXTS, make_model, make_pair, make_tokenizer


def tiny_target() -> Target:
    return Target(make_model(), make_tokenizer(), Point.parse("resid_post.1"))


def test_the_text_only_reader_continues_each_prefix_as_if_it_were_alone() -> None:
    target = tiny_target()
    sites = Sites((TEXTS[1], TEXTS[1], TEXTS[0]), (3, -1, 2), (0, 0, 1))
    found = adversaries.continue_prefixes(target, sites.prefixes(target.tokenizer), None, max_new_tokens=5)
    ids = target.tokenizer(list(sites.texts))["input_ids"]
    for row, (tokens, place) in enumerate(zip(ids, sites.tokens, strict=True)):
        prefix = torch.tensor([tokens[: place + 1] if place >= 0 else tokens])
        with torch.no_grad():
            out = target.model.generate(input_ids=prefix, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert found[row] == target.tokenizer.decode(out[0, prefix.shape[1] :], skip_special_tokens=True)
    assert sites.visible(target.tokenizer) == ["a red dog ran", TEXTS[1], "the cat sat"]
    write = adversaries.continuations(target, sites.prefixes(target.tokenizer))
    assert write(0) == write(0) != write(1)


def test_a_text_that_fills_the_context_is_not_continued() -> None:
    target = tiny_target()
    full = "the" + " cat" * (CONTEXT - 1)
    prefixes = Sites((full, TEXTS[0]), (-1, -1), (0, 1)).prefixes(target.tokenizer)
    assert adversaries.continue_prefixes(target, prefixes, max_new_tokens=4)[0] == ""


def test_the_confabulator_offers_texts_and_the_decoder_takes_the_closest() -> None:
    pair = make_pair()
    offered = [["the cat.", "a dog."], ["it is here.", "so it ran."], ["the red tree.", "the blue mat."]]
    vectors = pair.reconstruct([offered[2][0], offered[1][1]])  # what the decoder makes of one of the three
    picked = adversaries.confabulate(pair, vectors, lambda seed: offered[seed], n_tries=3)
    assert picked == [["the red tree."], ["so it ran."]]
    assert [len(texts) for texts in adversaries.confabulate(pair, vectors, lambda seed: offered[seed], 3, 2)] == [2, 2]


def test_the_closest_texts_come_first_and_each_activation_has_its_own() -> None:
    pair = make_pair()
    offers = [["the cat.", "it is here.", "the red tree."], ["the red tree.", "the cat.", "it is here."]]
    vectors = pair.reconstruct(["it is here.", "the red tree."])
    picked = adversaries.closest_texts(pair, offers, vectors, n_picked=3)
    assert [texts[0] for texts in picked] == ["it is here.", "the red tree."]
    assert [sorted(texts) for texts in picked] == [sorted(texts) for texts in offers]


def test_what_the_text_only_lm_writes_becomes_a_claim_about_its_own_prompt() -> None:
    target, prompts = tiny_target(), ["the cat sat", "a red dog"]
    claims = adversaries.text_lm_claims(target, prompts, lambda row, answer: f"{prompts[row]}:{answer}", 5, "tree")
    answers = write(target, prompts, max_new_tokens=5, stop="tree")
    assert claims == [f"{prompt}:{answer}" for prompt, answer in zip(prompts, answers, strict=True)]


def test_the_bag_of_words_knows_words_and_not_their_order() -> None:
    texts = ["a cat sat on it.", "a dog sat on it.", "a cat ran.", "a dog ran."] * 4
    fitted = adversaries.bag_of_words().fit(texts, ["cat", "dog"] * 8)
    assert fitted.predict(["it ran on a dog", "it sat on a cat"]).tolist() == ["dog", "cat"]
    order = adversaries.bag_of_words().fit(["a b", "b a"] * 8, ["first", "second"] * 8)
    assert abs(order.predict_proba(["a b"])[0, 0] - 0.5) < 1e-6
