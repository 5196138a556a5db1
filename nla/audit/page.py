"""A report in, one HTML page out: transcripts with marked tokens, findings beside them.

How it is kept from doing anything with what files and models hold: :mod:`nla.views.pages`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nla.audit.findings import NOT_SAID, PositionScore
from nla.audit.report import AuditReport
from nla.transcripts.messages import Message, Transcript
from nla.transcripts.rendering import Unread
from nla.views import pages

TEMPLATES = Path(__file__).with_name("templates")
N_COLOURS = 6
N_LISTED = 40
"""Transcripts up to which their list is open."""
_TEMPLATE_TOKEN = -1


@dataclass(frozen=True)
class Mark:
    """A position with findings: the token that is marked, and what its card says."""

    order: int
    """Number in its transcript, from 1."""
    scores: list[PositionScore]
    """Of each rubric that finds something there."""
    colours: list[int]
    """Of each of those rubrics, its number in the audit."""
    token: str
    """As it is shown in the text; part of a character where another token shows the rest."""

    @property
    def inside(self) -> bool:
        """It is in the message's own text and not in what the chat template writes."""
        return self.scores[0].entry.start != _TEMPLATE_TOKEN

    @property
    def rubrics(self) -> list[str]:
        """Names of the rubrics."""
        return [score.rubric for score in self.scores]

    @property
    def not_said(self) -> bool:
        """The visible text does not say what one of the rubrics finds."""
        return any(score.said == NOT_SAID for score in self.scores)

    @property
    def significant(self) -> bool:
        """One of the findings is."""
        return any(score.significant for score in self.scores)

    @property
    def shown(self) -> list[bool]:
        """Of each explanation, whether it shows what one of the rubrics looks for."""
        return [any(flags) for flags in zip(*(score.judged.shown for score in self.scores), strict=True)]


class Turn(NamedTuple):
    """A message as it is shown."""

    message: Message
    marks: list[Mark]
    pieces: list[tuple[str, Mark | None]]
    """The content in order: some text, and the marked token after it."""

    unread: list[Unread]
    """What of the message the target did not read."""

    @property
    def calls(self) -> str:
        """The message's tool calls."""
        return "\n".join(json.dumps(dict(call), ensure_ascii=False) for call in self.message.calls)

    @property
    def dropped(self) -> list[str]:
        """Fields of the message that the chat template leaves out."""
        return [one.what for one in self.unread if one.dropped]

    @property
    def unseen(self) -> list[str]:
        """What is no text."""
        return [one.what for one in self.unread if not one.dropped]


class Talk(NamedTuple):
    """A transcript as it is shown."""

    transcript: Transcript
    n_tokens: int
    turns: list[Turn]

    @property
    def n_marks(self) -> int:
        """Positions with findings."""
        return sum(len(turn.marks) for turn in self.turns)


def page(report: AuditReport) -> str:
    """The whole page."""
    audit = report.audit
    colours = {rubric.name: colour for colour, rubric in enumerate(audit.rubrics)}
    findings: dict[str, dict[int, list[PositionScore]]] = {}
    for score in sorted(audit.findings, key=lambda score: colours[score.rubric]):
        findings.setdefault(score.transcript, {}).setdefault(score.entry.index, []).append(score)
    n_tokens = {reading.transcript: reading.n_tokens for reading in audit.readings}
    talks = [
        _talk(one, n_tokens[one.id], findings.get(one.id, {}), colours, audit.unread.get(one.id, ()))
        for one in audit.transcripts
    ]
    about = [f"{report.pair} at {report.point}", f"{report.samples} explanations of each position"]
    about += [f"positions: {report.positions}"]
    about += [f"target adapter {report.target_adapter}"] if report.target_adapter else []
    about += [f"control target {report.control_target}"] if report.control_target else []
    return pages.page(
        "page.html",
        pages.css("page.css", TEMPLATES),
        _filters(len(colours)),
        folder=TEMPLATES,
        report=report,
        findings=audit.findings,
        talks=talks,
        about=about,
        titles={rubric.name: rubric.title for rubric in audit.rubrics},
        n_colours=N_COLOURS,
        n_listed=N_LISTED,
        not_said=NOT_SAID,
    )


def _filters(n_rubrics: int) -> str:
    """Rules that hide what a chosen filter leaves out; without ``:has`` everything stays shown.

    Cards and the template's tokens disappear; a message's own tokens stay and lose their mark.
    """
    chosen = [(f"#only{colour}", f".of{colour}") for colour in range(n_rubrics)] + [
        ("#unsaid", ".hid"),
        ("#firm", ".significant"),
    ]
    return "".join(
        f"body:has({box}:checked) :is(.card, .mark.template):not({kept}) {{ display: none; }}\n"
        f"body:has({box}:checked) .mark:not({kept}) {{ background: none; border-color: transparent; }}\n"
        f"body:has({box}:checked) .mark:not({kept}) sup {{ display: none; }}\n"
        for box, kept in chosen
    )


def _talk(
    transcript: Transcript,
    n_tokens: int,
    findings: dict[int, list[PositionScore]],
    colours: dict[str, int],
    unread: Sequence[Unread],
) -> Talk:
    by_message: dict[int, list[Mark]] = {}
    for order, (_, scores) in enumerate(sorted(findings.items()), start=1):
        mark = Mark(order, scores, [colours[score.rubric] for score in scores], scores[0].entry.token)
        by_message.setdefault(scores[0].entry.message, []).append(mark)
    turns = [
        _turn(message, by_message.get(number, []), [one for one in unread if one.message == number])
        for number, message in enumerate(transcript.messages)
    ]
    return Talk(transcript, n_tokens, turns)


def _turn(message: Message, marks: Sequence[Mark], unread: list[Unread]) -> Turn:
    """The message's content cut into text and marked tokens."""
    pieces: list[tuple[str, Mark | None]] = []
    last = 0
    inside = [mark for mark in marks if mark.inside]
    for mark in sorted(inside, key=lambda mark: (mark.scores[0].entry.start, mark.order)):
        # Two tokens can share a character, each with some of its bytes: it is shown once.
        start, token = mark.scores[0].entry.start, mark.scores[0].entry.token
        end = max(last, min(start + len(token), len(message.content)))
        start = max(start, last)
        pieces.append(
            (message.content[last:start], Mark(mark.order, mark.scores, mark.colours, message.content[start:end]))
        )
        last = end
    return Turn(message, list(marks), [*pieces, (message.content[last:], None)], unread)
