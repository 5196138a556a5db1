"""Texts and what was read at their tokens in; the token view out: a page, or a fragment for a notebook.

The text stands with its tokens marked, by trust if they were explained; beside it a card for each token. A token shows
its first claim under the pointer and in focus, and leads to its card; the card leads back.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nla.text import markdown
from nla.text.claims import claims, normalise
from nla.views import pages

if TYPE_CHECKING:
    from nla.text.tokens import Span

LEVELS = ("low", "medium", "high")
"""Of trust."""
N_IN_NOTEBOOK = 300
"""Tokens that a notebook shows: more would make its file large and slow."""
_EMPTY, _AGAIN = "∅", "″"
_SPACES = str.maketrans({" ": "␣", "\t": "⇥"})


class Sample(NamedTuple):
    """One explanation of a token."""

    text: str
    cosine: float
    complete: bool
    """It is one whole explanation."""


class Claim(NamedTuple):
    """A claim, and the number of samples that make it."""

    text: str
    n_samples: int


@dataclass(frozen=True)
class Note:
    """A token as it is shown."""

    token: str
    """Its text; empty where none is known."""
    place: tuple[int, int] | None
    """The characters that it covers; None: not known."""
    part: tuple[int, int]
    """Which part of its characters it is, of how many."""
    document: int | None
    """Index of its text; None: not known."""
    figures: Mapping[str, str]
    """What was measured, by name."""
    level: str | None = None
    """Of trust; None: it was not explained."""
    samples: Sequence[Sample] = ()

    @property
    def claims(self) -> list[Claim]:
        """What the samples claim: first what most of them do, in the order in which it is written."""
        written: dict[str, str] = {}
        made: Counter[str] = Counter()
        for sample in self.samples:
            said = claims(sample.text)
            made.update({normalise(claim) for claim in said})
            for claim in said:
                written.setdefault(normalise(claim), claim)
        return [Claim(written[key], made[key]) for key in sorted(written, key=lambda key: -made[key])]

    @property
    def name(self) -> str:
        """The token in one line."""
        text = self.token.strip(" ") or self.token.translate(_SPACES)
        part = "" if self.part[1] == 1 else f" {self.part[0]}/{self.part[1]}"
        return (text or _EMPTY) + part

    @property
    def tip(self) -> str:
        """What it shows under the pointer and in focus: its first claim, or else its figures."""
        if not self.samples:
            return self.figures_line
        said = self.claims
        return f"{said[0].text if said else 'nothing'} ({self.level} trust)"

    @property
    def figures_line(self) -> str:
        """Its figures in one line."""
        return ", ".join(f"{name} {value}" for name, value in self.figures.items())


def trust_figures(cosine: float, agreement: float | None, margin: float) -> dict[str, str]:
    """The three numbers that trust comes from, as they are shown."""
    return {
        "cosine": markdown.number(cosine),
        "agreement": markdown.number(agreement),
        "margin": markdown.number(margin, sign=True),
    }


def note_of(
    span: Span | None,
    document: int | None,
    figures: Mapping[str, str],
    level: str | None = None,
    samples: Sequence[Sample] = (),
) -> Note:
    """A token as it is shown, from where it stands and what is known of it."""
    if span is None:
        return Note("", None, (1, 1), document, figures, level, samples)
    part = (span.fragment, span.fragments)
    return Note(span.text, (span.start, span.end), part, document, figures, level, samples)


def span_columns(spans: Sequence[Span | None]) -> dict[str, list[Any]]:
    """Where tokens stand, as columns of a table; None where it is not known."""
    names = ("index", "text", "token_id", "start", "end")
    columns = {name: [None if span is None else getattr(span, name) for span in spans] for name in names}
    return {"token" if name == "text" else name: column for name, column in columns.items()}


class Piece(NamedTuple):
    """Some text that was not read, and the token after it."""

    before: str
    shown: str = ""
    """What stands for the token."""
    after: str = ""
    """Line breaks that it ends with."""
    number: int = 0
    """Of the note, from 1."""
    note: Note | None = None


class Passage(NamedTuple):
    """A text as it is shown."""

    title: str
    pieces: list[Piece]


def page(documents: Sequence[str], notes: Sequence[Note], title: str, about: str, remarks: Sequence[str] = ()) -> str:
    """A self-contained HTML page.

    Args:
        documents: the texts that notes name by their index.
        about: a line below the title.
        remarks: what readers should be warned of.
    """
    return pages.page(
        "tokens_page.html",
        pages.css("tokens.css"),
        title=title,
        about=about,
        remarks=remarks,
        levels=_levels(notes),
        passages=passages(documents, notes),
        prefix="",
    )


def fragment(documents: Sequence[str], notes: Sequence[Note], about: str) -> str:
    """An HTML fragment with its own style, of the first ``N_IN_NOTEBOOK`` notes; it says how many it leaves out."""
    shown = notes[:N_IN_NOTEBOOK]
    cut = passages(documents, shown)
    # The links of two views in one notebook must not meet.
    prefix = "v" + hashlib.sha256(repr((about, cut)).encode("utf-8", "backslashreplace")).hexdigest()[:12]
    return pages.fragment(
        "tokens_fragment.html",
        pages.css("tokens.css"),
        about=about,
        levels=_levels(shown),
        passages=cut,
        prefix=prefix,
        n_left_out=len(notes) - len(shown),
    )


def _levels(notes: Iterable[Note]) -> list[tuple[str, int]]:
    """How many notes are of each level of trust; empty where none was explained."""
    n_of = Counter(note.level for note in notes if note.level is not None)
    return [(level, n_of[level]) for level in reversed(LEVELS)] if n_of else []


def passages(documents: Sequence[str], notes: Sequence[Note]) -> list[Passage]:
    """The texts that notes are of, cut at their tokens; notes of no known text last."""
    by_document: dict[int | None, list[tuple[int, Note]]] = {}
    for number, note in enumerate(notes, start=1):
        known = note.document is not None and note.place is not None and note.document < len(documents)
        by_document.setdefault(note.document if known else None, []).append((number, note))
    cut = []
    for document, numbered in sorted(by_document.items(), key=lambda one: (one[0] is None, one[0] or 0)):
        if document is None:
            cut.append(Passage("", [Piece(" ", *_shown(note.name), number, note) for number, note in numbered]))
        else:
            title = f"Text {document}" if len(documents) > 1 else ""
            cut.append(Passage(title, _pieces(documents[document], numbered)))
    return cut


def _pieces(text: str, numbered: Sequence[tuple[int, Note]]) -> list[Piece]:
    """A text cut into what was not read and tokens; a character of several tokens is shown once, by the first."""
    pieces, last = [], 0
    for number, note in sorted(numbered, key=lambda one: (one[1].place or (0, 0), one[0])):
        start, end = note.place or (0, 0)
        token = text[max(start, last) : max(end, last)]
        before = text[last : max(start, last)]
        if token:
            lead = token[: len(token) - len(token.lstrip(" "))] if token.strip(" ") else ""
            pieces.append(Piece(before + lead, *_shown(token[len(lead) :]), number, note))
        else:
            repeated = f"{note.part[0]}/{note.part[1]}" if note.part[1] > 1 else _AGAIN if end > start else _EMPTY
            pieces.append(Piece(before, repeated, "", number, note))
        last = max(end, last)
    return [*pieces, Piece(text[last:])]


def _shown(token: str) -> tuple[str, str]:
    """What stands for a token, and the line breaks after it."""
    inner = token.rstrip("\n")
    body = inner if inner.strip(" \t") else inner.translate(_SPACES)
    n_breaks = len(token) - len(inner)
    return body.replace("\n", "⏎\n") + "⏎" * n_breaks, "\n" * n_breaks
