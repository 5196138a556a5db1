"""Case 08: one character that is several tokens: each row of `nla explain --json` says which part of it it is."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nla.cli import explain, view
from nla.pair.explanations import Explanation, Trust
from nla.text.tokens import Span, encode
from tests.helpers.tiny import make_pair


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, but for a merge of the space with the first two bytes of an emoji."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first, second = (
        "\u0120\u00f0",
        "\u0120\u00f0\u0141",
    )  # space, F0, 9F as byte-level BPE spells them
    vocabulary = {token: number for number, token in enumerate([*alphabet, first, second])}
    backend = Tokenizer(models.BPE(vocabulary, [("\u0120", "\u00f0"), (first, "\u0141")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def parts(text: str) -> list[tuple[str, int, int]]:
    return [(span.text, span.fragment, span.fragments) for span in encode(byte_tokenizer(), text, 100).spans]


def test_four_parts_of_an_emoji_are_told_from_four_emojis() -> None:
    assert parts("a😀") == [("a", 1, 1), *(("😀", part, 4) for part in (1, 2, 3, 4))]
    assert parts("😀😀") == [("😀", part, 4) for part in (1, 2, 3, 4)] * 2
    assert parts("it is") == [(letter, 1, 1) for letter in "it is"]


def test_a_token_that_holds_a_space_and_a_part_of_a_character_is_a_part_too() -> None:
    assert parts("a 😀") == [("a", 1, 1), (" 😀", 1, 3), ("😀", 2, 3), ("😀", 3, 3)]


def test_rows_carry_token_id_characters_and_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pair = make_pair()
    monkeypatch.setattr(explain, "load", lambda *_: pair)
    explain.explain("the cat sat.", samples=1, json=True)
    rows = json.loads(capsys.readouterr().out)["explanations"]
    ids = pair.tokenizer("the cat sat.")["input_ids"]
    assert [row["token_id"] for row in rows] == ids and [row["index"] for row in rows] == list(range(len(ids)))
    assert ["the cat sat."[row["start"] : row["end"]] for row in rows] == [row["token"] for row in rows]
    assert {(row["fragment"], row["fragments"]) for row in rows} == {(1, 1)}


def test_the_table_shows_which_part_a_token_is() -> None:
    trust = Trust.of(0.9, None, 0.5)
    spans = [Span(7, "😀", 0, 1, part - 1, False, part, 4) for part in (1, 2, 3, 4)]
    notes = [Explanation(["a face"], [True], [0.9], trust, span) for span in spans]
    tokens = [str(cell) for cell in view.token_view(notes, "").columns[0].cells]
    assert tokens == ["😀 1/4", "😀 2/4", "😀 3/4", "😀 4/4"]
