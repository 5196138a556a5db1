"""Claims: the sentences of an explanation."""

from __future__ import annotations

import re


def claims(text: str) -> list[str]:
    """The claims (sentences) of an explanation, each with its final mark.

    >>> claims("It is spring. Anna is here. The next line ends with cat.")
    ['It is spring.', 'Anna is here.', 'The next line ends with cat.']
    """
    parts = re.split(r"(?<=[.!?])\s+|\n+", text.strip())
    return [part.strip() for part in parts if part.strip()]


def normalise(claim: str) -> str:
    """A claim as it is compared: lower case, single spaces, no punctuation at its ends.

    >>> normalise("  The next  line ends with Cat. ")
    'the next line ends with cat'
    """
    return re.sub(r"^\W+|\W+$", "", " ".join(claim.lower().split()))
