"""How a rubric finds its concept in a text: words and their inflections, regular expressions, likeness of spelling."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from nla.errors import RubricError
from nla.text.claims import claims
from nla.text.patterns import Pattern, compile_pattern

_VOWELS = "aeiou"
_UNSPACED = "\u2e80"
_BORDERS = (r"(?<!\w)", r"(?!\w)")


class Hit(NamedTuple):
    """Where a text shows a concept: characters, and the words that do."""

    start: int
    end: int
    text: str


def inflections(lemma: str) -> list[str]:
    """The regular English forms of a word, itself first: plural, third person, past and -ing, -er.

    >>> inflections("test"), inflections("hide")[:4]
    (['test', 'tests', 'tested', 'testing', 'tester', 'testers'], ['hide', 'hides', 'hided', 'hiding'])
    >>> inflections("deny")[:4], inflections("plan")[:4]
    (['deny', 'denies', 'denied', 'denying'], ['plan', 'plans', 'planned', 'planning'])
    """
    stem, plural = lemma, lemma + "s"
    if lemma.endswith("e"):
        stem = lemma[:-1]
    elif lemma.endswith("y") and lemma[-2:-1] not in _VOWELS:
        stem, plural = lemma[:-1] + "i", lemma[:-1] + "ies"
    elif lemma.endswith(("s", "x", "z", "ch", "sh")):
        plural = lemma + "es"
    elif _doubles(lemma):
        stem = lemma + lemma[-1]
    going = lemma if stem.endswith("i") and lemma.endswith("y") else stem
    return list(dict.fromkeys([lemma, plural, f"{stem}ed", f"{going}ing", f"{stem}er", f"{stem}ers"]))


def _doubles(word: str) -> bool:
    """Whether a short word doubles its last letter: consonant, vowel, consonant other than w, x, y."""
    return (
        2 < len(word) < 5
        and word[-1] not in _VOWELS + "wxy"
        and word[-2] in _VOWELS
        and word[-3] not in _VOWELS
    )  # fmt: skip


def phrase(entry: str) -> str:
    """A regular expression for a word or phrase: whole words, any white space between them, ``*`` for any ending.

    >>> bool(re.search(phrase("being test*"), "It is being  tested."))
    True
    """
    parts = [re.escape(part.rstrip("*")) + (r"\w*" if part.endswith("*") else "") for part in entry.split()]
    # Scripts that write no spaces between words have no borders of words to ask for.
    ends = zip(entry[0] + entry[-1], _BORDERS, strict=True)
    before, after = ("" if letter >= _UNSPACED else border for letter, border in ends)
    return before + r"\s+".join(parts) + after


class Words(NamedTuple):
    """Patterns that show a concept, and patterns that, in the same claim, take it back."""

    shows: tuple[Pattern, ...] = ()
    unless: tuple[Pattern, ...] = ()

    @classmethod
    def of(
        cls,
        words: str | Sequence[str] = (),
        lemmas: str | Sequence[str] = (),
        regexes: str | Sequence[str] = (),
        unless: str | Sequence[str] = (),
    ) -> Words:
        """From lists of words and phrases, lemmas (matched in all regular forms) and regular expressions.

        Raises:
            RubricError: a regular expression is none.
        """
        words, lemmas, regexes, unless = ([x] if isinstance(x, str) else x for x in (words, lemmas, regexes, unless))
        entries = [*words, *(form for lemma in lemmas for form in inflections(lemma))]
        return cls(_compiled([*map(phrase, entries), *regexes]), _compiled(unless))

    def hits(self, text: str) -> list[Hit]:
        """All places of a text that show the concept, left to right; of places that overlap, the first."""
        found = [Hit(match.start(), match.end(), match[0]) for each in self.shows for match in each.findall(text)]
        hits: list[Hit] = []
        for hit in sorted(found, key=lambda hit: hit.start):
            if hit.text and hit.start >= (hits[-1].end if hits else 0):
                hits.append(hit)
        return hits

    def claimed(self, text: str) -> bool:
        """Whether a claim of the text shows the concept and does not take it back."""
        return any(
            self.hits(claim) and not any(unless.search(claim) for unless in self.unless) for claim in claims(text)
        )


def _compiled(patterns: Sequence[str]) -> tuple[Pattern, ...]:
    """Each on its own: groups, flags and limits of one are not those of another."""
    what = "the pattern of a rubric"
    return tuple(compile_pattern(pattern, what, ignore_case=True, error=RubricError) for pattern in patterns)


def similarity(text: str, examples: str | tuple[str, ...]) -> float:
    """The highest likeness, in [0, 1], of a claim of the text to an example: cosine of character 3- to 5-grams.

    It needs no model and no network: it sees inflections, word order and typing errors, not synonyms.
    """
    parts, examples = claims(text), (examples,) if isinstance(examples, str) else examples
    pairs = product(map(_grams, parts), map(_grams, examples))
    return max((sum(share * other.get(gram, 0.0) for gram, share in one.items()) for one, other in pairs), default=0.0)


@lru_cache(maxsize=1024)
def _grams(text: str) -> dict[str, float]:
    """Counts of the 3- to 5-grams of a text's words with a blank on each side, as a vector of length one.

    They are those of scikit-learn's ``char_wb``, whose import alone takes 90 MB.
    """
    counts: Counter[str] = Counter()
    for word in text.lower().split():
        padded = f" {word} "
        counts.update(
            padded[at : at + n] for n in range(3, min(len(padded), 5) + 1) for at in range(len(padded) - n + 1)
        )
    length = math.hypot(*counts.values())
    return {gram: count / length for gram, count in counts.items()}
