"""Tokens of a text in, what kind of word or mark each is out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import regex

CONTENT_WORD, FUNCTION_WORD, PUNCTUATION = "content word", "function word", "punctuation"
SENTENCE_END, LINE_BREAK = "sentence end", "line break"
KINDS = (CONTENT_WORD, FUNCTION_WORD, PUNCTUATION, SENTENCE_END, LINE_BREAK)

_WORDS = """
a an the this that these those each every either neither some any no all both few many much more most other
another such own same
i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours
ourselves they them their theirs themselves who whom whose which what
am is are was were be been being have has had having do does did doing can could may might must shall should will
would ought
about above across after against along among around as at before behind below beneath beside between beyond by
despite down during except for from in inside into of off on onto out outside over since through
throughout to toward towards under until up upon via with within without
and but or nor so yet if then else because although though unless while whereas whether than
not there here when where why how too very just only also even again
don didn doesn isn aren wasn weren hasn haven hadn won wouldn couldn shouldn
"""
FUNCTION_WORDS = frozenset(_WORDS.split())
"""English words that say how others go together, in small letters; of a contraction, what stands before the mark."""

_PARTS = regex.compile(
    r"""(?P<word>[\p{L}\p{N}][\p{L}\p{M}\p{N}]*(?:['’][\p{L}\p{M}\p{N}]+)*)
    |(?P<end>[。！？]|(?<!^[\ \t]*\p{N}+)[.!?…]+[\p{Pe}\p{Pf}"'*_]*(?=\s|$))
    |(?P<line>[\n\r\v\f\x85\u2028\u2029])
    |(?P<mark>\S)""",
    regex.VERBOSE | regex.MULTILINE,
)
_NAMES = np.array(["", *KINDS])
_CODES = {kind: code for code, kind in enumerate(["", *KINDS])}


def token_kinds(text: str, starts: Sequence[int] | np.ndarray, ends: Sequence[int] | np.ndarray) -> np.ndarray:
    """The kind of each token of a text, one of ``KINDS``: that of its last character that is not white space.

    A token inside a word is of the whole word's kind: a "function word" is one of :data:`FUNCTION_WORDS`, any other
    word or number a "content word". A "sentence end" is one of . ! ? … before white space, with the quotes and brackets
    that close there, but not the point of a list's number. A "line break" is white space with one. The rest is
    "punctuation".

    Args:
        starts: character where each of the n tokens starts.
        ends: where it ends; no later than the text.

    Returns:
        (n,) names; empty for a token that covers no character, such as BOS.
    """
    codes = np.zeros(len(text) + 1, dtype=np.int8)
    for match in _PARTS.finditer(text):
        codes[match.start() : match.end()] = _CODES[_kind_of(match)]
    is_break = codes == _CODES[LINE_BREAK]
    places = np.where((codes > 0) & ~is_break, np.arange(len(codes)), -1)
    last = np.maximum.accumulate(places)
    n_breaks = np.concatenate([[0], np.cumsum(is_break)])
    starts, ends = np.asarray(starts, dtype=np.int64), np.asarray(ends, dtype=np.int64)
    visible = last[ends - 1]
    blank = np.where(n_breaks[ends] > n_breaks[starts], _CODES[LINE_BREAK], _CODES[PUNCTUATION])
    found = np.where((visible >= starts) & (ends > 0), codes[visible], blank)
    return _NAMES[np.where(ends > starts, found, 0)]


def _kind_of(match: regex.Match[str]) -> str:
    if match.lastgroup != "word":
        return {"end": SENTENCE_END, "line": LINE_BREAK}.get(str(match.lastgroup), PUNCTUATION)
    word = match[0].lower().replace("’", "'")
    return FUNCTION_WORD if word in FUNCTION_WORDS or word.split("'")[0] in FUNCTION_WORDS else CONTENT_WORD
