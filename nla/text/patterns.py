"""A regular expression from a user or a file in; one that is searched under a time limit out.

Python's own ``re`` has no limit: ``(a|aa)+$`` on forty letters takes longer than anybody waits.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import regex

from nla.errors import NLAError, ParseError
from nla.storage.schema import shown

LIMIT_S, LIMIT_S_PER_CHARACTER = 0.5, 5e-6
"""What the searches of a pattern may take beside that, and for each character that they look through."""
_ALONE = 0.9
"""Share of a limit that a thread has spent itself when no other thread has spent any."""
MAX_CHARACTERS = 10_000
"""Of a pattern."""
_PARTS = r"(?P<kept>\\N\{[^}]*\}|\\.|\(\?#[^)]*\)%s)|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])|(?P<brace>\{(?!\d*,?\d*\}))"
_PLAIN = re.compile(_PARTS % "", re.DOTALL)
_VERBOSE = re.compile(_PARTS % r"|#[^\n]*", re.DOTALL)
_CLASS = re.compile(r"\\.|\[(?=:)", re.DOTALL)
"""Of a pattern: what stays as it is (an escaped character, a comment), a set, a brace that counts no repetitions."""
Found = TypeVar("Found")


@dataclass
class Pattern:
    """A regular expression of Python's ``re``, searched by ``regex``, whose searches cannot hang; not for two threads.

    Its methods are those of ``re``. Their error, of the type ``error``, says that the limit is reached.
    """

    text: str
    what: str
    """Where it comes from, for messages."""
    error: type[NLAError]
    compiled: regex.Pattern[str] = field(repr=False)
    left_s: float = LIMIT_S

    def search(self, string: str) -> regex.Match[str] | None:
        """The first match."""
        return self._limited(string, lambda limit: self.compiled.search(string, timeout=limit))

    def fullmatch(self, string: str) -> regex.Match[str] | None:
        """The match of the whole string."""
        return self._limited(string, lambda limit: self.compiled.fullmatch(string, timeout=limit))

    def findall(self, string: str) -> list[regex.Match[str]]:
        """All matches, left to right."""
        return self._limited(string, lambda limit: list(self.compiled.finditer(string, timeout=limit)))

    def _limited(self, string: str, find: Callable[[float], Found]) -> Found:
        more = (len(string) + 1) * LIMIT_S_PER_CHARACTER
        self.left_s = min(self.left_s, LIMIT_S) + more
        own_s = limit = max(self.left_s, more)
        while True:
            before = time.thread_time()
            try:
                result = find(limit)
                self.left_s -= time.thread_time() - before
                return result
            except TimeoutError:
                spent = time.thread_time() - before
            if spent >= _ALONE * own_s:
                self.left_s -= spent
                raise self.error(
                    f"{self.what} {shown(self.text)}, which is searched for too long in a text of {len(string)} "
                    "characters",
                    "a regular expression that does not try the same characters again and again",
                    "take the repetition inside of another repetition out, such as that in (a+)+",
                )
            limit *= 2  # regex counts the time of all threads, and others were busy


def compile_pattern(text: str, what: str, *, ignore_case: bool = False, error: type[NLAError] = ParseError) -> Pattern:
    r"""A regular expression in Python's syntax, to be searched under a time limit.

    It matches what it matches in ``re``, but for two classes: ``\w`` (and so ``\b``) also takes the marks that are part
    of a word, such as the vowel signs of Hindi and Thai, and ``\s`` does not take the separators U+001C to U+001F.

    Args:
        what: where it comes from, for messages, such as "the pattern of target_modules".
        error: what is raised for a wrong one, and for a search that takes too long.

    >>> compile_pattern("(a|aa)+$", "the pattern").search("a" * 50 + "b")
    Traceback (most recent call last):
    nla.errors.ParseError: Got the pattern '(a|aa)+$', which is searched for too long in a text of 51 characters; ...
    """
    problem = f"of {len(text)} characters" if len(text) > MAX_CHARACTERS else ""
    try:
        if not problem:
            flags = re.compile(text).flags  # re first: recursion, which only regex knows, could fill the memory
            plain = (_VERBOSE if flags & re.VERBOSE else _PLAIN).sub(_escaped, text)
            return Pattern(text, what, error, regex.compile(plain, regex.IGNORECASE if ignore_case else 0))
    except RecursionError:
        problem = "nested too deep"
    except (re.error, regex.error, OverflowError, ValueError) as wrong:
        problem = str(wrong)
    raise error(
        f"{what} {shown(text)} ({problem})",
        f"a regular expression of at most {MAX_CHARACTERS} characters",
        "escape its special characters, such as \\( for a bracket",
    )


def _escaped(part: re.Match[str]) -> str:
    """A part of a pattern as ``regex`` takes it for what it is to ``re``: no fuzzy matching, no named classes."""
    if part["set"]:
        return part["set"][0] + _CLASS.sub(lambda match: "\\[" if match[0] == "[" else match[0], part["set"][1:])
    return "\\{" if part["brace"] else part[0]
