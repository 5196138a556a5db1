"""Positions: where turns are decided, and budgets that thin them out evenly."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from nla.errors import PositionError
from nla.transcripts.messages import Message, Transcript
from nla.transcripts.positions import ANSWER_END, ANSWER_START, BEFORE_ANSWER, TEMPLATE, kinds, select, spread
from nla.transcripts.rendering import Chat, render
from tests.helpers.talk import said, transcript
from tests.helpers.tiny import make_tokenizer


def chat(*turns: tuple[str, str]) -> Chat:
    return render(make_tokenizer(), said(*turns))


def shown(rendered: Chat, *args) -> list[tuple[str, str]]:
    return [(rendered.span(position.index).text, position.kind) for position in select(rendered, *args)]


def test_structure_is_where_turns_are_decided_and_end() -> None:
    rendered = chat(("user", "the cat sat"), ("assistant", "it is here"))
    assert shown(rendered) == [
        (" sat", "user end"),
        ("<|assistant|>", BEFORE_ANSWER),
        ("it", ANSWER_START),
        (" here", ANSWER_END),
    ]


def test_a_one_token_answer_is_read_once() -> None:
    rendered = chat(("user", "the cat sat"), ("assistant", "it"))
    assert [kind for _, kind in shown(rendered)] == ["user end", BEFORE_ANSWER, ANSWER_START]


CALL = ({"name": "cat", "arguments": {"on": "mat"}},)
CALLING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.reasoning_content or '' }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<text>{{ c.function.name }} {{ c.function.arguments.on }}</text>{% endfor %}"
    "<|end|>{% endfor %}"
)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (Message("assistant", "", CALL), ["<text>", "cat", "</text>"]),
        (Message("assistant", "", CALL * 2), ["<text>", "cat", "</text>"]),
        (Message("assistant", "", CALL, reasoning="so red"), ["<text>", "cat", "</text>"]),
        (Message("assistant", "it is here", CALL), ["<|assistant|>", "it", " here"]),
        (Message("assistant", "", reasoning="so red"), ["<|assistant|>", "so", " red"]),
    ],
)
def test_a_turn_without_text_is_decided_and_ends_where_its_calls_or_its_reasoning_do(message, expected) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CALLING
    rendered = render(tokenizer, Transcript("a", (Message("user", "the cat sat"), message, Message("user", "so"))))
    kinds = ["user end", BEFORE_ANSWER, ANSWER_START, ANSWER_END, "user end"]
    assert shown(rendered) == list(zip([" sat", *expected, "so"], kinds, strict=True))


def test_without_a_word_there_is_no_structure() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{% endfor %}"
    empty = render(tokenizer, Transcript("a", (Message("assistant", "", CALL),)), allow_dropped=True)
    with pytest.raises(PositionError, match="no message has text"):
        select(empty)
    assert select(empty, "all")


def test_a_budget_is_shared_by_kinds_and_spread_over_the_transcript() -> None:
    rendered = render(make_tokenizer(), transcript(200))
    everything, chosen = select(rendered, "structure", None), select(rendered, "structure", 40)
    assert len(everything) == 400 and len(chosen) == 40
    assert set(Counter(kind for _, kind in chosen).values()) == {10}
    assert {index for index, _ in chosen} <= {index for index, _ in everything}
    ends = [index for index, kind in chosen if kind == "user end"]
    gaps = [b - a for a, b in pairwise(ends)]
    assert max(gaps) < 1.5 * len(rendered) / 9 and max(ends) > 0.95 * len(rendered)


def test_what_a_rare_kind_leaves_goes_to_the_others() -> None:
    turns = [("user", "so it is"), *[("assistant", "it is here")] * 10]
    counts = Counter(kind for _, kind in select(chat(*turns), "structure", 22))
    assert counts == {"user end": 1, BEFORE_ANSWER: 7, ANSWER_START: 7, ANSWER_END: 7}


def test_random_positions_depend_on_transcript_and_seed_alone() -> None:
    one, other = (render(make_tokenizer(), transcript(40, first=first)) for first in (0, 1))
    assert select(one, "random", 10, 0) == select(render(make_tokenizer(), transcript(40)), "random", 10, 0)
    assert select(one, "random", 10, 0) != select(one, "random", 10, 1)
    assert [p.index for p in select(one, "random", 10, 0)] != [p.index for p in select(other, "random", 10, 0)]
    assert len(select(one, "random", 10_000)) == len(one)


def test_patterns_match_single_tokens_and_say_who_wrote_them() -> None:
    rendered = chat(("user", "the cat sat"), ("assistant", "the cat ran"))
    assert shown(rendered, "/cat/") == [(" cat", "user content"), (" cat", "assistant content")]
    assert len(select(rendered, "/./", 3)) == 3


@pytest.mark.parametrize("positions", ["/zebra/", "/(/", "structures", "//"])
def test_unknown_positions_are_refused(positions: str) -> None:
    with pytest.raises(PositionError):
        select(chat(("user", "the cat")), positions)


def test_a_budget_below_one_is_refused() -> None:
    with pytest.raises(PositionError, match="budget"):
        select(chat(("user", "the cat")), "all", 0)


def test_every_token_of_a_chat_has_the_kind_of_who_wrote_it_and_what_it_is() -> None:
    rendered = chat(("user", "the cat."), ("assistant", "it sat.\n so"), ("user", "ran"), ("assistant", "here."))
    assert [(rendered.span(index).text, kind) for index, kind in enumerate(kinds(rendered))] == [
        ("<|user|>", TEMPLATE),
        ("the", "prompt function word"),
        (" cat", "prompt content word"),
        (".", "prompt punctuation"),
        ("<|end|>", TEMPLATE),
        ("<|assistant|>", BEFORE_ANSWER),
        ("it", ANSWER_START),
        (" sat", "content word"),
        (".", "sentence end"),
        ("\n", "line break"),
        (" so", "function word"),
        ("<|end|>", TEMPLATE),
        ("<|user|>", TEMPLATE),
        ("ran", "prompt content word"),
        ("<|end|>", TEMPLATE),
        ("<|assistant|>", BEFORE_ANSWER),
        ("here", ANSWER_START),
        (".", "sentence end"),  # the template goes on at once
        ("<|end|>", TEMPLATE),
    ]


def test_tokens_are_spread_evenly_over_kinds_and_what_a_rare_kind_leaves_goes_to_others() -> None:
    names = np.array(["a"] * 50 + [""] * 50 + ["b"] * 30 + ["c"])
    chosen = spread(names, 21, random.Random(0))
    assert Counter(chosen.values()) == {"a": 10, "b": 10, "c": 1} and list(chosen) == sorted(chosen)
    assert all(names[index] == kind for index, kind in chosen.items())
    assert spread(names, 21, random.Random(0)) == chosen != spread(names, 21, random.Random(1))
    assert len(spread(names, 200, random.Random(0))) == 81
    seldom = Counter(kind for seed in range(300) for kind in spread(names, 1, random.Random(seed)).values())
    assert set(seldom) == {"a", "b", "c"} and min(seldom.values()) > 60
