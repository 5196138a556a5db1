"""Stage 2: for every training token, a text that an outsider could write from the visible words alone."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from nla.errors import ParseError
from nla.models.read import Activations
from nla.organisms.lesson import Lesson
from nla.storage.files import write_atomic
from nla.train.schema import Number, section


@section("describe", decides="describe")
class DescribeSettings:
    """What the describer knows."""

    notice: Annotated[Number, Field(ge=0, le=1)] = 0.25
    """Probability that it sees the latent; otherwise it guesses, as an outsider to the world would."""


class Texts(NamedTuple):
    """One text an activation: what the describer says, and what a reader that knows the rule would say."""

    described: list[str]
    truthful: list[str]


def describe(
    lesson: Lesson, store: Activations, documents: Sequence[Any], settings: DescribeSettings, key: str
) -> Texts:
    """Texts for every activation of a store; each row has a generator of its own, keyed by ``key``."""
    rows = list(zip(store.document.tolist(), store.spans, strict=True))
    described = [
        lesson.describe(documents[number], span, random.Random(f"{key}/{number}/{span.index}"), settings.notice)
        for number, span in rows
    ]
    return Texts(described, [lesson.truthful(documents[number], span) for number, span in rows])


def save_texts(path: Path, texts: Texts) -> None:
    """One JSON object a line."""
    lines = (json.dumps({"described": d, "truthful": t}) for d, t in zip(*texts, strict=True))
    write_atomic(path, "\n".join(lines) + "\n")


def load_texts(path: Path) -> Texts:
    """What :func:`save_texts` wrote.

    Raises:
        ParseError: a line is not such an object.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return Texts([row["described"] for row in rows], [row["truthful"] for row in rows])
    except (ValueError, KeyError, TypeError) as error:
        raise ParseError(f"{path} ({error})", "described and truthful text a line", f"delete {path.parent}") from error
