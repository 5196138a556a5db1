"""Readings and rubrics in; out comes, for each position, how often explanations show a rubric's concept, whether the
text that the target read says it too, and how rare that is in controls."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from nla.audit.controls import controls_needed, rank_p_values, stratified_permutation
from nla.audit.judge import Judge
from nla.audit.reading import Entry, Reading
from nla.audit.rubric import Rubric
from nla.errors import RubricError
from nla.pair.explanations import Trust
from nla.stats import Interval, benjamini_hochberg, bootstrap, holm, paired_permutation
from nla.transcripts.messages import Transcript

NOT_SAID, BEFORE, AFTER, BOTH = "not said", "said before", "said after", "said before and after"
ALPHA = 0.05
"""A finding is significant if its q-value is at most this."""


class Judged(NamedTuple):
    """One position held against one rubric."""

    shown: tuple[bool, ...]
    """Per sample: its explanation shows the concept."""
    said: str
    """Whether the visible text says it, before or after the token."""
    value: str | None = None
    """For a mismatch: the value that most samples claim."""
    written: str | None = None
    """For a mismatch: the value that the message shows."""

    @property
    def share(self) -> float:
        """Share of samples that show it."""
        return sum(self.shown) / len(self.shown)


@dataclass(frozen=True)
class PositionScore:
    """One position under one rubric, tested against the controls."""

    rubric: str
    transcript: str
    entry: Entry
    judged: Judged
    control_rate: float | None
    """Mean share over control positions of the same kind; None without any."""
    n_controls: int
    """Control transcripts with such positions; of a paired control, the positions."""
    p: float | None
    """p-value of the share against those positions; None without controls."""
    q: float | None
    """``p`` with the false-discovery rate controlled over the rubric's positions."""

    @property
    def share(self) -> float:
        """Share of samples that show the concept."""
        return self.judged.share

    @property
    def said(self) -> str:
        """Whether the visible text says it."""
        return self.judged.said

    @property
    def trust(self) -> Trust:
        """Trust of the position's explanations."""
        return self.entry.trust

    @property
    def evidence(self) -> str:
        """The first explanation that shows the concept; empty if none does."""
        shows = zip(self.entry.texts, self.judged.shown, strict=True)
        return next((text for text, shown in shows if shown), "")

    @property
    def significant(self) -> bool | None:
        """Whether it is rarer in controls than chance allows; None without controls."""
        return None if self.q is None else self.q <= ALPHA


@dataclass(frozen=True)
class TranscriptScore:
    """One transcript under one rubric."""

    rubric: str
    transcript: str
    share: float
    """Mean share over its positions."""
    highest: float
    n_findings: int
    n_not_said: int
    p: float | None
    """p-value of the mean share among control transcripts; None without controls."""


@dataclass(frozen=True)
class RubricScore:
    """One rubric over all transcripts."""

    rubric: str
    title: str
    n_positions: int
    n_findings: int
    n_not_said: int
    """Number of findings that are thought and not said."""
    n_significant: int | None
    """Number of findings that are significant against the controls; None without controls."""
    least_controls: int | None
    """Controls of each kind without which no finding can be significant; None without findings, or without
    controls."""
    rate: Interval
    """Mean share over positions, with an interval that resamples transcripts."""
    control: Interval | None
    p: float | None
    """p-value of audited against control transcripts as a whole, with kinds of position as strata."""
    p_holm: float | None
    """``p``, corrected over rubrics (Holm)."""


class Mentions:
    """Where the text of a transcript that the target read says what a rubric looks for."""

    def __init__(self, rubric: Rubric, transcript: Transcript, heard: Sequence[str]) -> None:
        roles = [message.role for message in transcript.messages]
        self.rubric = rubric
        self.heard = [(n, text) for n, text in enumerate(heard) if roles[n] in rubric.said_in]
        if rubric.kind == "mismatch":
            self.languages = [rubric.written(text) for text in heard]
            self.overall = rubric.written("\n".join(heard))
            self.of_value = {value: self._value_mentions(value) for value in rubric.values}

    @cached_property
    def of_concept(self) -> list[tuple[int, int]]:
        """Message and end of every hit, in order."""
        return [(number, hit.end) for number, text in self.heard for hit in self.rubric.said_words.hits(text)]

    def _value_mentions(self, value: str) -> list[tuple[int, int]]:
        """Where a value is named, and the ends of the messages that show it."""
        words = self.rubric.values[value].claimed_words
        named = [(number, hit.end) for number, text in self.heard for hit in words.hits(text)]
        return sorted(named + [(n, len(text)) for n, text in self.heard if self.languages[n] == value])

    def around(self, entry: Entry, value: str | None = None) -> str:
        """Whether it is said before or after a position."""
        mentions = self.of_concept if value is None else self.of_value[value]
        split = bisect.bisect_right(mentions, (entry.message, entry.offset))
        return {(True, True): BOTH, (True, False): BEFORE, (False, True): AFTER}.get(
            (split > 0, split < len(mentions)), NOT_SAID
        )


class Matcher:
    """Holds explanations against rubrics; equal explanations are looked at once."""

    def __init__(self, rubrics: Sequence[Rubric], judge: Judge | None = None) -> None:
        """Raises RubricError: a rubric asks a judge, and there is none."""
        needing = [rubric.name for rubric in rubrics if rubric.match.judge]
        if needing and judge is None:
            raise RubricError(
                f"the rubric {needing[0]}, which asks a judge, and no judge",
                "the address of a judge",
                "give --judge-url, or leave the rubric out",
            )
        self.rubrics, self.judge = list(rubrics), judge
        self._known: dict[tuple[str, str], bool] = {}

    def shows(self, rubric: Rubric, text: str) -> bool:
        """Whether an explanation shows a rubric's concept."""
        key = (rubric.name, text)
        if key not in self._known:
            judge = self.judge if rubric.match.judge and text else None
            self._known[key] = rubric.shows(text) or (judge is not None and judge.shows(rubric, text))
        return self._known[key]

    def judge_position(self, rubric: Rubric, entry: Entry, mentions: Mentions) -> Judged:
        """One position against one rubric; ``mentions`` are of its transcript and this rubric."""
        if rubric.kind == "presence":
            return Judged(tuple(self.shows(rubric, text) for text in entry.texts), mentions.around(entry))
        written = mentions.languages[entry.message] or mentions.overall
        claimed = [[value for value in rubric.claimed(text) if written not in (None, value)] for text in entry.texts]
        counts = {value: sum(value in values for values in claimed) for value in rubric.values}
        most = max(counts, key=lambda value: counts[value])
        shown = tuple(bool(values) for values in claimed)
        if not any(shown):
            return Judged(shown, NOT_SAID, None, written)
        return Judged(shown, mentions.around(entry, most), most, written)


class JudgedPosition(NamedTuple):
    """A position and how it holds against a rubric."""

    unit: int
    """Number of its transcript; transcripts of the same words share one where they are tested."""
    entry: Entry
    judged: Judged


class Evidence(NamedTuple):
    """Readings and the transcripts that they are of, in the same order."""

    transcripts: Sequence[Transcript]
    readings: Sequence[Reading]
    heard: Sequence[Sequence[str]]
    """Of each transcript, what the target read of each message; offsets of the readings count in it."""

    def judged(self, matcher: Matcher, rubric: Rubric) -> list[JudgedPosition]:
        """Every position that the rubric looks at.

        Raises:
            RubricError: no position is of a kind that the rubric looks at.
        """
        positions = []
        for number, (transcript, reading, heard) in enumerate(zip(*self, strict=True)):
            mentions = Mentions(rubric, transcript, heard)
            for entry in reading.entries:
                if not rubric.at or entry.kind in rubric.at:
                    positions.append(JudgedPosition(number, entry, matcher.judge_position(rubric, entry, mentions)))
        if not positions and any(reading.entries for reading in self.readings):
            raise RubricError(
                f"{rubric.name}, looked for at {', '.join(rubric.at)} alone, and no such position",
                "one that was read",
                "read positions by structure, or take `at` out of the rubric",
            )
        return positions

    def by_text(self, positions: Sequence[JudgedPosition]) -> list[JudgedPosition]:
        """The same with one unit for all transcripts of the same words: copies are no further evidence."""
        first: dict[str, int] = {}
        units = [first.setdefault(transcript.digest, number) for number, transcript in enumerate(self.transcripts)]
        return [position._replace(unit=units[position.unit]) for position in positions]


class Scores(NamedTuple):
    """Everything that an audit measures, position by position, transcript by transcript and rubric by rubric."""

    positions: list[PositionScore]
    transcripts: list[TranscriptScore]
    rubrics: list[RubricScore]


def score_evidence(
    audited: Evidence, controls: Evidence | None, matcher: Matcher, paired: bool = False, seed: int = 0
) -> Scores:
    """Hold every position against every rubric, and test it against the controls.

    Args:
        paired: the controls are the same transcripts at the same positions, read on a control target.
    """
    scores = Scores([], [], [])
    for rubric in matcher.rubrics:
        ours = audited.judged(matcher, rubric)
        theirs = None if controls is None else controls.by_text(controls.judged(matcher, rubric))
        positions = _position_scores(rubric, audited, ours, theirs, paired)
        scores.positions.extend(positions)
        scores.transcripts.extend(_transcript_scores(rubric, audited, ours, theirs, positions))
        scores.rubrics.append(_rubric_score(rubric, audited.by_text(ours), theirs, positions, paired, seed))
    if controls is None or not scores.rubrics:
        return scores
    corrected = holm([score.p or 1.0 for score in scores.rubrics])
    return scores._replace(
        rubrics=[replace(score, p_holm=p) for score, p in zip(scores.rubrics, corrected, strict=True)]
    )


Positions = Sequence[JudgedPosition]


def _position_scores(
    rubric: Rubric, audited: Evidence, ours: Positions, theirs: Positions | None, paired: bool
) -> list[PositionScore]:
    by_kind: dict[str, list[tuple[int, float]]] = {}
    for number, (unit, entry, judged) in enumerate(theirs or ()):
        # Paired controls have the audited positions, one by one: what transcripts differ in is on both sides.
        by_kind.setdefault(entry.kind, []).append((number if paired else unit, judged.share))
    rates = {
        kind: (sum(share for _, share in values) / len(values), len({unit for unit, _ in values}))
        for kind, values in by_kind.items()
    }
    p_values: Sequence[float | None] = [None] * len(ours)
    q_values: Sequence[float | None] = p_values
    if theirs is not None:
        kinds = [entry.kind for _, entry, _ in ours]
        p_values = ranks = rank_p_values([judged.share for _, _, judged in ours], kinds, by_kind)
        q_values = benjamini_hochberg(ranks)
    scores = []
    for (number, entry, judged), p, q in zip(ours, p_values, q_values, strict=True):
        rate, n_units = rates.get(entry.kind, (None, 0))
        scores.append(PositionScore(rubric.name, audited.transcripts[number].id, entry, judged, rate, n_units, p, q))
    return scores


def _transcript_scores(
    rubric: Rubric,
    audited: Evidence,
    ours: Positions,
    theirs: Positions | None,
    positions: Sequence[PositionScore],
) -> list[TranscriptScore]:
    controls = None
    if theirs is not None:
        shares: dict[int, list[float]] = {}
        for unit, _, judged in theirs:
            shares.setdefault(unit, []).append(judged.share)
        controls = sorted(sum(values) / len(values) for values in shares.values())
    by_transcript: dict[int, list[PositionScore]] = {}
    for (number, _, _), position in zip(ours, positions, strict=True):
        by_transcript.setdefault(number, []).append(position)
    scores = []
    for number, of_one in by_transcript.items():
        findings = [position for position in of_one if position.share >= rubric.min_share]
        share, p = sum(position.share for position in of_one) / len(of_one), None
        if controls is not None:
            higher = len(controls) - bisect.bisect_left(controls, share - 1e-12)
            p = (1 + higher) / (1 + len(controls))
        scores.append(
            TranscriptScore(
                rubric=rubric.name,
                transcript=audited.transcripts[number].id,
                share=share,
                highest=max(position.share for position in of_one),
                n_findings=len(findings),
                n_not_said=sum(position.said == NOT_SAID for position in findings),
                p=p,
            )
        )
    return scores


def _rubric_score(
    rubric: Rubric,
    ours: Positions,
    theirs: Positions | None,
    positions: Sequence[PositionScore],
    paired: bool,
    seed: int,
) -> RubricScore:
    findings = [position for position in positions if position.share >= rubric.min_share]
    p = None
    if theirs and ours:
        if paired:
            a, b = (torch.tensor([judged.share for _, _, judged in side]) for side in (ours, theirs))
            p = paired_permutation(a, b, [unit for unit, _, _ in ours], "greater", seed=seed)
        else:
            sides = [[(unit, entry.kind, judged.share) for unit, entry, judged in side] for side in (ours, theirs)]
            p = stratified_permutation(sides[0], sides[1], seed)
    least = None
    if theirs is not None and findings:
        # Positions without any share have p = 1: only the others can share the cost of the rest.
        least = controls_needed(len(positions), sum(position.share > 0 for position in positions), ALPHA)
    return RubricScore(
        rubric=rubric.name,
        title=rubric.title,
        n_positions=len(ours),
        n_findings=len(findings),
        n_not_said=sum(position.said == NOT_SAID for position in findings),
        n_significant=None if theirs is None else sum(bool(position.significant) for position in findings),
        least_controls=least,
        rate=_rate(ours, seed),
        control=_rate(theirs, seed) if theirs else None,
        p=p,
        p_holm=None,
    )


def _rate(positions: Positions, seed: int) -> Interval:
    shares = torch.tensor([judged.share for _, _, judged in positions])
    return bootstrap(shares, [unit for unit, _, _ in positions], seed=seed)
