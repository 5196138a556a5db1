"""The kind of a token follows from its last visible character; a second implementation, by characters, agrees."""

from __future__ import annotations

import random

import pytest

from nla.text.kinds import FUNCTION_WORDS, KINDS, token_kinds

TEXT = "The theatre's lamp — it isn't \"old.\"\n1. Buy 3.5 eggs!\n\n  Why?"
EXPECTED = [
    ("The", "function word"),
    (" the", "content word"),  # of theatre
    ("atre", "content word"),
    ("'s", "content word"),
    (" lamp", "content word"),
    (" —", "punctuation"),
    (" it", "function word"),
    (" isn", "function word"),
    ("'t", "function word"),
    (' "', "punctuation"),
    ("old", "content word"),
    ('."', "sentence end"),
    ("\n", "line break"),
    ("1", "content word"),
    (".", "punctuation"),  # of a list
    (" Buy", "content word"),
    (" ", "punctuation"),
    ("3", "content word"),
    (".", "punctuation"),  # of a number
    ("5", "content word"),
    (" eggs", "content word"),
    ("!\n", "sentence end"),
    ("\n  ", "line break"),
    ("Why", "function word"),
    ("?", "sentence end"),
]


def spans(pieces: list[str]) -> tuple[list[int], list[int]]:
    ends = [len("".join(pieces[: n + 1])) for n in range(len(pieces))]
    return [0, *ends[:-1]], ends


def test_the_kinds_of_a_sentence_are_those_that_a_reader_gives() -> None:
    pieces = [piece for piece, _ in EXPECTED]
    assert "".join(pieces) == TEXT
    assert token_kinds(TEXT, *spans(pieces)).tolist() == [kind for _, kind in EXPECTED]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("naïve", "content word"),
        ("हिन्दी", "content word"),
        ("犬。", "sentence end"),
        ("THE", "function word"),
        ("can’t", "function word"),
        ("snake_case", "content word"),
        ("…", "sentence end"),
        ("wait...", "sentence end"),
        ("**bold.**", "sentence end"),
        ("http://a.b", "content word"),
        (",", "punctuation"),
        ("🐝", "punctuation"),
        ("\u2028", "line break"),
        ("\t", "punctuation"),
    ],
)
def test_the_last_visible_character_decides(text: str, kind: str) -> None:
    assert token_kinds(text, [0], [len(text)]).tolist() == [kind]


def test_a_token_without_characters_has_no_kind_and_a_text_without_tokens_has_none() -> None:
    assert token_kinds("a b", [0, 0, 3], [0, 1, 3]).tolist() == ["", "function word", ""]
    assert token_kinds("", [], []).tolist() == []


def by_characters(text: str, start: int, end: int) -> str:
    """The kind of a token in words of letters a to z, by walking over characters."""
    last = next((at for at in range(end - 1, start - 1, -1) if not text[at].isspace()), None)
    if last is None:
        return "line break" if "\n" in text[start:end] else "punctuation"
    if text[last].isalpha():
        begin, stop = last, last
        while begin > 0 and text[begin - 1].isalpha():
            begin -= 1
        while stop + 1 < len(text) and text[stop + 1].isalpha():
            stop += 1
        return "function word" if text[begin : stop + 1] in FUNCTION_WORDS else "content word"
    at = last
    while at > 0 and text[at] == ")":
        at -= 1
    after = last
    while after < len(text) and text[after] in ".!":
        after += 1
    while after < len(text) and text[after] == ")":
        after += 1
    closes = after == len(text) or text[after].isspace()
    return "sentence end" if text[at] in ".!" and closes else "punctuation"


def test_random_texts_cut_at_random_have_the_kinds_of_the_walk_over_characters() -> None:
    draw, seen = random.Random(0), set()
    parts = ["the", "of", "cat", "there", "a", "then", " ", " ", " ", "\n", ". ", "!", ",", ")", ".)\n", "-"]
    for _ in range(300):
        text = "".join(draw.choices(parts, k=draw.randint(1, 30)))
        cuts = sorted({0, len(text), *(draw.randrange(len(text) + 1) for _ in range(20))})
        starts, ends = cuts[:-1], cuts[1:]
        expected = [by_characters(text, start, end) for start, end in zip(starts, ends, strict=True)]
        assert token_kinds(text, starts, ends).tolist() == expected, text
        seen |= set(expected)
    assert seen == set(KINDS)
