"""Patterns of users and files: as Python's own, and never without end."""

from __future__ import annotations

import hashlib
import random
import re
import threading
import time

import pytest

from nla.errors import ParseError, PositionError
from nla.text import patterns
from nla.text.patterns import compile_pattern

LETTERS = r"""a b c ab . \w \b \s {e<=1} \{i} { [{] [a-b] [^a] ^ $ [[:alpha:]] [^[:a:]{] [\[:a] []{] [:a:] (?#[)
\N{BULLET} [\N{BULLET}b]"""


def random_pattern(draw: random.Random, depth: int = 3) -> str:
    """A small regular expression over a few letters."""
    if depth == 0:
        return draw.choice([*LETTERS.split(), "#{\n", "[^ {]"])
    one, two = (random_pattern(draw, depth - 1) for _ in range(2))
    return draw.choice([f"(?:{one})*", f"(?:{one}){{1,2}}?", f"{one}|{two}", one + two, f"({one})", f"(?={one}){two}"])


@pytest.mark.parametrize("ignore_case", [False, True])
def test_matches_are_those_of_python(ignore_case: bool) -> None:
    draw, n_matching = random.Random(5), 0
    for _ in range(1800):
        text, string = draw.choice(["", "(?x)"]) + random_pattern(draw), "".join(draw.choices("abcAB{e} \n•[:]#", k=8))
        theirs = re.compile(text, re.IGNORECASE if ignore_case else 0)
        ours = compile_pattern(text, "it", ignore_case=ignore_case)
        assert [m.span() for m in ours.findall(string)] == [m.span() for m in theirs.finditer(string)], (text, string)
        for found, expected in (
            (ours.search(string), theirs.search(string)),
            (ours.fullmatch(string), theirs.fullmatch(string)),
        ):
            assert (found and found.span()) == (expected and expected.span()), (text, string)
            n_matching += found is not None
    assert n_matching > 300


@pytest.mark.parametrize("text", ["(a|aa)+$", r"^(\w|\w\w)*$", "(?:a|a)*$", "(?=(a|aa)+$)", r"(a|aa)+\b$"])
def test_a_search_without_end_is_a_typed_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "LIMIT_S", 0.05)
    with pytest.raises(PositionError, match=r"the pattern .* too long in a text of 61 characters"):
        compile_pattern(text, "the pattern", error=PositionError).search("a" * 60 + "!")


def test_many_short_searches_have_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "LIMIT_S", 0.05)
    slow = compile_pattern("(a|aa)+$", "the pattern")
    with pytest.raises(ParseError, match="too long"):
        for _ in range(10_000):
            slow.search("a" * 20 + "b")


@pytest.mark.parametrize(
    "text",
    [
        "(",
        "a**",
        "[",
        r"\1",
        "(?R)",
        "a{99999999999999999999}",
        "(" * 5000 + ")" * 5000,
        "a" * 20_000,
    ],
)
def test_what_is_no_pattern_is_a_short_typed_error(text: str) -> None:
    with pytest.raises(ParseError, match=r"the pattern of x .*a regular expression") as caught:
        compile_pattern(text, "the pattern of x")
    assert len(str(caught.value)) < 500


def test_a_limit_is_of_the_time_of_the_thread_that_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, string, done = r"(?:a|aa)+$", "a" * 22 + "b", threading.Event()
    started = time.thread_time()
    compile_pattern(slow, "the pattern").search(string)
    monkeypatch.setattr(patterns, "LIMIT_S", 3 * (time.thread_time() - started))

    def work() -> None:
        while not done.is_set():
            hashlib.pbkdf2_hmac("sha256", b"", b"", 5000)  # lets other threads run

    others = [threading.Thread(target=work) for _ in range(6)]
    for thread in others:
        thread.start()
    try:
        assert compile_pattern(slow, "the pattern").search(string) is None
        with pytest.raises(ParseError, match="too long"):
            compile_pattern(slow, "the pattern").search("a" * 40 + "b")
    finally:
        done.set()
        for thread in others:
            thread.join()
