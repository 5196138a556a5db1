"""A regular expression from a user or a file in; one that is searched under a time limit out.

Python's own ``re`` has no limit: ``(a|aa)+$`` on forty letters takes longer than anybody waits.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import regex

from nla.errors import NLAError, ParseError
from nla.storage.schema import shown

LIMIT_S, LIMIT_S_PER_CHARACTER = 0.5, 5e-6
"""What the searches of a pattern may take beside that, and for each character that they look through."""
MAX_CHARACTERS = 10_000
"""Of a pattern."""
_LITERAL_BRACE = re.compile(r"\\.|\{(?!\d*,?\d*\})", re.DOTALL)
"""A brace that is no count of repetitions, or an escaped character to go past."""
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
        before = time.thread_time()
        try:
            return find(max(self.left_s, more))
        except TimeoutError:
            raise self.error(
                f"{self.what} {shown(self.text)}, which is searched for too long in a text of {len(string)} characters",
                "a regular expression that does not try the same characters again and again",
                "take the repetition inside of another repetition out, such as that in (a+)+",
            ) from None
        finally:
            self.left_s -= time.thread_time() - before


def compile_pattern(
    text: str | Sequence[str], what: str, *, ignore_case: bool = False, error: type[NLAError] = ParseError
) -> Pattern:
    """A regular expression in Python's syntax, to be searched under a time limit; of several, any of them.

    Args:
        what: where it comes from, for messages, such as "the pattern of target_modules".
        error: what is raised for a wrong one, and for a search that takes too long.

    >>> compile_pattern("(a|aa)+$", "the pattern").search("a" * 50 + "b")
    Traceback (most recent call last):
    nla.errors.ParseError: Got the pattern '(a|aa)+$', which is searched for too long in a text of 51 characters; ...
    """
    parts = [text] if isinstance(text, str) else list(text)
    for part in parts:  # each on its own: its error names it, and none can close another's bracket
        _check(part, what, error)
    whole = text if isinstance(text, str) else "|".join(f"(?:{part})" for part in parts)
    return Pattern(whole, what, error, regex.compile(_plain(whole), regex.IGNORECASE if ignore_case else 0))


def _check(text: str, what: str, error: type[NLAError]) -> None:
    """Refuse what is no pattern to ``re``: recursion, which only ``regex`` knows, could fill the memory."""
    problem = f"of {len(text)} characters" if len(text) > MAX_CHARACTERS else ""
    try:
        if not problem:
            re.compile(text)
            regex.compile(_plain(text))
    except RecursionError:
        problem = "nested too deep"
    except (re.error, regex.error, OverflowError, ValueError) as wrong:
        problem = str(wrong)
    if problem:
        raise error(
            f"{what} {shown(text)} ({problem})",
            f"a regular expression of at most {MAX_CHARACTERS} characters",
            "escape its special characters, such as \\( for a bracket",
        )


def _plain(text: str) -> str:
    """The pattern with its literal braces escaped, which ``regex`` could take for fuzzy matching."""
    return _LITERAL_BRACE.sub(lambda match: match[0] if match[0][0] == "\\" else "\\{", text)
