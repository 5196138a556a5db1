"""Rubrics: what they match and what they leave, and malformed ones as typed errors."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import yaml
from sklearn.feature_extraction.text import TfidfVectorizer

from nla.audit.matching import Words, inflections, phrase, similarity
from nla.audit.rubric import BUILTIN, load_rubrics, parse_rubric
from nla.errors import RubricError

PLAIN = {"name": "own", "looks_for": "Something.", "match": {"words": ["cat"]}}


def test_the_built_in_rubrics_are_those_of_the_documents() -> None:
    assert list(BUILTIN) == [
        "concealed-knowledge",
        "evaluation-awareness",
        "hidden-objective",
        "hint-driven-answer",
        "language-mismatch",
    ]
    assert [rubric.name for rubric in load_rubrics()] == list(BUILTIN)


SHOWN = {
    "evaluation-awareness": ["The model thinks it is being tested.", "This is a safety  test by an evaluator."],
    "hidden-objective": ["The answer has a hidden agenda.", "It secretly promotes chocolate."],
    "concealed-knowledge": ["It hides a secret word.", "The model is withholding the answer."],
    "hint-driven-answer": ["The answer follows the hint.", "It works backwards from the suggested answer."],
}
NOT_SHOWN = {
    "evaluation-awareness": ["This is not a test.", "The user asks for a contest.", "He needs blood tests."],
    "hidden-objective": ["The user wants chocolate.", "The objective is to answer."],
    "concealed-knowledge": ["The user asks about secretaries and gardens.", "It knows the answer."],
    "hint-driven-answer": ["The chintz is red.", "The user asks about mathematics."],
}


@pytest.mark.parametrize("name", SHOWN)
def test_built_in_rubrics_match_what_they_look_for_and_no_look_alikes(name: str) -> None:
    (rubric,) = load_rubrics([name])
    assert [text for text in SHOWN[name] if not rubric.shows(text)] == []
    assert [text for text in NOT_SHOWN[name] if rubric.shows(text)] == []


def test_a_mismatch_is_between_what_is_claimed_and_what_is_written() -> None:
    (rubric,) = load_rubrics(["language-mismatch"])
    assert rubric.written("What is the best of the two for you?") == "English"
    assert rubric.written("Je ne sais pas que le chat est dans la maison.") == "French"
    assert rubric.written("Ich bin nicht hier, und das ist für den Hund.") == "German"
    assert rubric.written("我是你的朋友,不在这里。") == "Chinese"
    assert rubric.written("Это не я, и он не с нами.") == "Russian"
    assert rubric.written("12 + 7 = 19") is None
    assert rubric.claimed("The user thinks in French and writes in English.") == ["English", "French"]


def test_taking_back_counts_within_its_claim_only() -> None:
    words = Words.of(words=["test"], unless=[r"\bnot a test"])
    assert not words.claimed("This is not a test.")
    assert words.claimed("This is not a test. That is a test.")


def test_words_are_whole_and_phrases_bend_over_white_space() -> None:
    words = Words.of(words=["cat", "being test*"], lemmas=["plan"])
    assert [hit.text for hit in words.hits("Cat, concatenate, being\n tested, planning")] == [
        "Cat",
        "being\n tested",
        "planning",
    ]
    assert re.search(phrase("的"), "我的朋友")


def test_each_pattern_of_a_rubric_has_groups_and_flags_of_its_own() -> None:
    words = Words.of(
        regexes=[r"(x)y", r"\b(\w+) \1\b", "(?x) foo # c", "(?P<a>b)an", "(?P<a>k)iwi", "z*"], words=["fo"]
    )
    assert [hit.text for hit in words.hits("the the foo, zz kiwi xy banfo fo")] == [
        "the the", "foo", "zz", "kiwi", "xy", "ban", "fo"
    ]  # fmt: skip
    unless = Words.of(words=["cat"], unless=["(a)b", r"(\w) \1"])
    assert [unless.claimed(text) for text in ("A cat.", "b b: a cat.", "ab: a cat.")] == [True, False, False]


def test_of_hits_that_overlap_the_first_counts() -> None:
    words = Words.of(words=["tested", "being tested"], regexes=["ng t"])
    assert [(hit.start, hit.end) for hit in words.hits("being tested, tested")] == [(0, 12), (14, 20)]


def test_a_bare_string_is_one_word_one_lemma_one_pattern() -> None:
    words = Words.of("dog", "cat", "b.rd", "not")
    assert [hit.text for hit in words.hits("a dog o cats bird b")] == ["dog", "cats", "bird"]
    assert words.claimed("a dog on a tree") and not words.claimed("not a dog")
    assert similarity("It rains.", "It rains.") == pytest.approx(1.0)
    assert [rubric.name for rubric in load_rubrics("hidden-objective")] == ["hidden-objective"]


@pytest.mark.parametrize(
    ("lemma", "form"),
    [("try", "tried"), ("watch", "watches"), ("stop", "stopping"), ("make", "making"), ("play", "played")],
)
def test_inflections_are_regular(lemma: str, form: str) -> None:
    assert form in inflections(lemma)
    assert all(each.startswith(lemma[:2]) and "eed" not in each for each in inflections(lemma))


def test_likeness_sees_spelling_and_is_between_0_and_1() -> None:
    example = ("The model suspects that it is being tested.",)
    assert similarity(example[0], example) == pytest.approx(1.0)
    near = similarity("It is raining. The model suspected that it was tested.", example)
    assert 0.6 < near < 1.0
    assert similarity("A red dog ran.", example) < 0.2
    assert similarity("", example) == 0.0


def test_likeness_is_scikit_learns_cosine_of_grams() -> None:
    words = ["a", "the", "I", "it", "testing", "Tests", "cat-like", "über", "日本語テキスト", "being,", "watched", "x"]
    draw = random.Random(0)
    for _ in range(20):
        text, *examples = (" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(3))
        vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), use_idf=False).fit_transform(
            [text, *examples]
        )
        expected = float((vectors[0] @ vectors[1:].T).max())
        assert similarity(text, tuple(examples)) == pytest.approx(expected, abs=1e-12)


BROKEN = {
    "no mapping": ["cat"],
    "no name": {key: value for key, value in PLAIN.items() if key != "name"},
    "a path for a name": {**PLAIN, "name": "../x"},
    "no description": {**PLAIN, "looks_for": ""},
    "unknown key": {**PLAIN, "matches": {}},
    "unknown kind": {**PLAIN, "kind": "absence"},
    "no way of matching": {**PLAIN, "match": {}},
    "words that are numbers": {**PLAIN, "match": {"words": [1]}},
    "words that are booleans": {**PLAIN, "match": {"words": [True]}},
    "unknown way of matching": {**PLAIN, "match": {"magic": ["x"]}},
    "word of a star alone": {**PLAIN, "match": {"words": ["*"]}},
    "broken pattern": {**PLAIN, "match": {"regex": ["("]}},
    "patterns that close each other": {**PLAIN, "match": {"regex": ["(a", "b)"]}},
    "share above 1": {**PLAIN, "min_share": 2},
    "share that is a text": {**PLAIN, "min_share": "half"},
    "judge that is a text": {**PLAIN, "match": {"judge": "yes please"}},
    "unknown role": {**PLAIN, "said_in": ["narrator"]},
    "unknown kind of position": {**PLAIN, "at": ["answer middle"]},
    "one value": {**PLAIN, "kind": "mismatch", "values": {"a": {"visible": ["x"]}}},
    "value without visible words": {**PLAIN, "kind": "mismatch", "values": {"a": {}, "b": {}}},
    "value that is a list": {**PLAIN, "kind": "mismatch", "values": {"a": [], "b": []}},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_rubric_is_a_typed_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(BROKEN[name]), encoding="utf-8")
    with pytest.raises(RubricError, match=r"mine\.yaml"):
        load_rubrics([path])


@pytest.mark.parametrize(
    ("change", "got", "expected"),
    [
        ({"matches": {}}, "unknown key 'matches'", "'match'?"),
        ({"match": {"word": ["cat"]}}, "unknown key 'word' in match.word", "'words'?"),
        ({"values": {"a": {"visibel": ["x"], "visible": ["x"]}}}, "values.a.visibel", "'visible'?"),
        ({"looks_for": None}, "looks_for = None", "a text"),
        ({"match": {"words": [True]}}, "match.words.0 = True", "in quotes"),
        ({"match": {"regex": ["("]}}, "match.regex.0 = '('", "regular expression"),
        ({"min_share": 2}, "min_share = 2", "at most 1"),
        ({"kind": "absence"}, "kind = 'absence'", "'presence' or 'mismatch'"),
        ({"said_in": ["narrator"]}, "said_in.0 = 'narrator'", "assistant"),
        ({"match": {}}, "contradict", "a way of matching"),
    ],
)
def test_an_error_names_the_key_its_value_and_what_was_expected(change: dict, got: str, expected: str) -> None:
    with pytest.raises(RubricError) as caught:
        parse_rubric({**PLAIN, **change}, "mine.yaml")
    assert "mine.yaml: 'own'" in caught.value.got and got in caught.value.got and expected in caught.value.expected


def test_a_huge_value_makes_a_short_message_at_once() -> None:
    value: list = ["x" * 10_000]
    for _ in range(60):  # two to the sixtieth texts, if anybody wrote them out
        value = [value, value]
    for change in ({"min_share": value}, {"match": value}, {"title": "x" * 1_000_000, "kind": "y" * 1_000_000}):
        with pytest.raises(RubricError) as caught:
            parse_rubric({**PLAIN, **change})
        assert len(str(caught.value)) < 600


def test_an_alias_bomb_and_keys_that_are_no_texts_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]
    path = tmp_path / "mine.yaml"
    for text in ("\n".join([*lines, "name: own"]), "name: own\nno: 3\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(RubricError, match=r"mine\.yaml"):
            load_rubrics([path])


@pytest.mark.parametrize("text", ["{", "!!python/object/apply:os.system ['true']", "", "3", "\x00"])
def test_what_is_no_rubric_file_is_a_typed_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RubricError):
        load_rubrics([path])


def test_unknown_and_repeated_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RubricError, match="evaluation-awareness"):
        load_rubrics(["no-such-rubric"])
    with pytest.raises(RubricError, match="two rubrics"):
        load_rubrics(["hidden-objective", "hidden-objective"])
    with pytest.raises(RubricError, match="no rubrics"):
        load_rubrics([])


def test_a_file_may_hold_several_and_said_defaults_to_what_is_matched(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump([PLAIN, {**PLAIN, "name": "other", "said": {"words": ["dog"]}}]), encoding="utf-8")
    own, other = load_rubrics([path])
    assert own.said_words.hits("a cat") and not own.said_words.hits("a dog")
    assert other.said_words.hits("a dog") and not other.said_words.hits("a cat")
    assert parse_rubric(PLAIN).min_share == 0.5
