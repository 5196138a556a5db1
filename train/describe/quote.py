"""The describer that quotes: it repeats the visible words and knows nothing. Free, instant, and needs no model.

For trying a recipe out, and as the least that a describer's texts must beat: what it tells of an activation is only
which words came before.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

N_BEFORE = 5
"""Words before the last that are repeated."""


def quote(prefix: str, refused: Collection[str] = ()) -> str | None:
    """Two claims made of the visible words; None where there are none that a claim may hold.

    >>> quote("One spring morning, Anna left")
    'The words before are One spring morning Anna. The final word is left.'
    """
    words = re.findall(r"\w+", prefix)[-N_BEFORE - 1 :]
    if not words:
        return None
    before = f"The words before are {' '.join(words[:-1])}." if len(words) > 1 else "It is the first word."
    text = f"{before} The final word is {words[-1]}."
    return None if any(mark and mark in text for mark in refused) else text


def quote_all(prefixes: Sequence[str], refused: Collection[str] = ()) -> list[str | None]:
    """A quotation for each visible prefix."""
    return [quote(prefix, refused) for prefix in prefixes]
