"""Findings: what explanations show of each rubric, whether the visible text says it, how rare that is in controls."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from nla.audit.judge import Judge
from nla.audit.reading import Entry, Reading
from nla.audit.rubric import Rubric
from nla.audit.statistics import controls_needed, rank_p_values, stratified_permutation
from nla.errors import RubricError
from nla.pair.confidence import Trust
from nla.stats import Interval, benjamini_hochberg, bootstrap, holm, paired_permutation
from nla.transcripts.messages import Transcript

NOT_SAID, BEFORE, AFTER, BOTH = "not said", "said before", "said after", "said before and after"
ALPHA = 0.05


class Judged(NamedTuple):
    """One position held against one rubric."""

    shown: tuple[bool, ...]
    """Per sample: its explanation shows the concept."""
    said: str
    """Whether the visible text says it, before or after the token."""
    value: str | None = None
    """Of a mismatch: the value that most samples claim."""
    written: str | None = None
    """Of a mismatch: the value that the message shows."""

    @property
    def share(self) -> float:
        """Share of samples that show it."""
        return sum(self.shown) / len(self.shown)


@dataclass(frozen=True)
class Row:
    """One position and one rubric, tested."""

    rubric: str
    transcript: str
    entry: Entry
    judged: Judged
    control_rate: float | None
    """Mean share over control positions of the same kind; None without any."""
    n_controls: int
    """Control transcripts with such positions; of a paired control, the positions."""
    p: float | None
    """Of the share against those; None without controls."""
    q: float | None
    """The same with the false-discovery rate controlled over the rubric's positions."""

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
        """Of the position's explanations."""
        return self.entry.trust

    @property
    def stands(self) -> bool | None:
        """Whether it is rarer in controls than chance allows; None without controls."""
        return None if self.q is None else self.q <= ALPHA


@dataclass(frozen=True)
class TranscriptScore:
    """One transcript and one rubric."""

    rubric: str
    transcript: str
    share: float
    """Mean share over its positions."""
    highest: float
    n_findings: int
    n_not_said: int
    p: float | None
    """Of the mean share among control transcripts; None without controls."""


@dataclass(frozen=True)
class RubricResult:
    """One rubric over all transcripts."""

    rubric: str
    title: str
    n_positions: int
    n_findings: int
    n_not_said: int
    """Findings thought and not said."""
    n_standing: int | None
    """Findings that stand against the controls; None without."""
    least_controls: int | None
    """Controls of each kind without which no finding can stand; None without findings, or without controls."""
    rate: Interval
    """Mean share over positions, resampling transcripts."""
    control: Interval | None
    p: float | None
    """Of audited against control transcripts as a whole, with kinds of position as strata."""
    p_holm: float | None
    """The same, corrected over rubrics."""


class Said:
    """Where the visible text of a transcript says what a rubric looks for."""

    def __init__(self, rubric: Rubric, transcript: Transcript) -> None:
        self.rubric, self.transcript = rubric, transcript
        self.heard = [(n, m.visible) for n, m in enumerate(transcript.messages) if m.role in rubric.said_in]
        if rubric.kind == "mismatch":
            self.languages = [rubric.written(message.visible) for message in transcript.messages]
            self.overall = rubric.written("\n".join(message.visible for message in transcript.messages))
            self.places = {value.name: self._value_places(value.name) for value in rubric.values}

    @cached_property
    def hits(self) -> list[tuple[int, int]]:
        """Message and end of every hit, in order."""
        return [(number, hit.end) for number, text in self.heard for hit in self.rubric.said.hits(text)]

    def _value_places(self, name: str) -> list[tuple[int, int]]:
        """Where a value is named, and the ends of the messages that show it."""
        words = self.rubric.by_name[name].claimed
        named = [(number, hit.end) for number, text in self.heard for hit in words.hits(text)]
        return sorted(named + [(n, len(text)) for n, text in self.heard if self.languages[n] == name])

    def at(self, entry: Entry, value: str | None = None) -> str:
        """Whether it is said before or after a position."""
        places = self.hits if value is None else self.places[value]
        split = bisect.bisect_right(places, (entry.message, entry.offset))
        return {(True, True): BOTH, (True, False): BEFORE, (False, True): AFTER}.get(
            (split > 0, split < len(places)), NOT_SAID
        )


class Matcher:
    """Holds explanations against rubrics; equal explanations are looked at once."""

    def __init__(self, rubrics: Sequence[Rubric], judge: Judge | None = None) -> None:
        needing = [rubric.name for rubric in rubrics if rubric.judge]
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
            self._known[key] = rubric.shows(text) or (
                rubric.judge and self.judge is not None and bool(text) and self.judge.shows(rubric, text)
            )
        return self._known[key]

    def hold(self, rubric: Rubric, entry: Entry, said: Said) -> Judged:
        """One position against one rubric; ``said`` is of its transcript and this rubric."""
        if rubric.kind == "presence":
            return Judged(tuple(self.shows(rubric, text) for text in entry.texts), said.at(entry))
        written = said.languages[entry.message] or said.overall
        claimed = [
            [name for name in rubric.claimed(text) if written not in (None, name)] for text in entry.texts
        ]  # fmt: skip
        counts = [sum(value.name in names for names in claimed) for value in rubric.values]
        most = rubric.values[counts.index(max(counts))].name if max(counts) else None
        where = NOT_SAID if most is None else said.at(entry, most)
        return Judged(tuple(bool(names) for names in claimed), where, most, written)


class Evidence(NamedTuple):
    """Readings and the transcripts that they are of, in the same order."""

    transcripts: Sequence[Transcript]
    readings: Sequence[Reading]

    def judged(self, matcher: Matcher, rubric: Rubric) -> list[tuple[int, Entry, Judged]]:
        """Every position: its transcript's number, what was read, and how it holds against the rubric."""
        found = []
        for number, (transcript, reading) in enumerate(zip(self.transcripts, self.readings, strict=True)):
            said = Said(rubric, transcript)
            here = [entry for entry in reading.entries if not rubric.at or entry.kind in rubric.at]
            found += [(number, entry, matcher.hold(rubric, entry, said)) for entry in here]
        if not found and any(reading.entries for reading in self.readings):
            raise RubricError(
                f"{rubric.name}, looked for at {', '.join(rubric.at)} alone, and no such position",
                "one that was read",
                "read positions by structure, or take `at` out of the rubric",
            )
        return found


class Tested(NamedTuple):
    """All rows of an audit, and its summaries."""

    rows: list[Row]
    scores: list[TranscriptScore]
    results: list[RubricResult]


def weigh(
    audited: Evidence, controls: Evidence | None, matcher: Matcher, paired: bool = False, seed: int = 0
) -> Tested:
    """Hold every position against every rubric, and test it against the controls.

    Args:
        paired: the controls are the same transcripts at the same positions, read on a control target.
    """
    rows: list[Row] = []
    scores: list[TranscriptScore] = []
    results: list[RubricResult] = []
    for rubric in matcher.rubrics:
        ours = audited.judged(matcher, rubric)
        theirs = None if controls is None else _by_text(controls, controls.judged(matcher, rubric))
        tested = _rows(rubric, audited, ours, theirs, paired)
        per_transcript = _scores(rubric, audited, ours, theirs, tested)
        rows += tested
        scores += per_transcript
        results.append(_result(rubric, _by_text(audited, ours), theirs, tested, paired, seed))
    if controls is not None and results:
        corrected = holm([result.p or 1.0 for result in results])
        results = [RubricResult(**{**vars(r), "p_holm": p}) for r, p in zip(results, corrected, strict=True)]
    return Tested(rows, scores, results)


Held = list[tuple[int, Entry, Judged]]


def _by_text(evidence: Evidence, held: Held) -> Held:
    """The same with one number for all transcripts of the same words: copies are no further evidence."""
    first: dict[str, int] = {}
    numbers = [first.setdefault(each.digest, number) for number, each in enumerate(evidence.transcripts)]
    return [(numbers[number], entry, judged) for number, entry, judged in held]


def _rows(rubric: Rubric, audited: Evidence, ours: Held, theirs: Held | None, paired: bool) -> list[Row]:
    by_kind: dict[str, list[tuple[int, float]]] = {}
    for place, (number, entry, judged) in enumerate(theirs or []):
        # Paired controls have the audited positions, one by one: what transcripts differ in is on both sides.
        by_kind.setdefault(entry.kind, []).append((place if paired else number, judged.share))
    rates = {
        kind: (sum(share for _, share in values) / len(values), len({unit for unit, _ in values}))
        for kind, values in by_kind.items()
    }
    p_values: Sequence[float | None] = [None] * len(ours)
    q_values: Sequence[float | None] = p_values
    if theirs is not None:
        kinds = [entry.kind for _, entry, _ in ours]
        p_values = tested = rank_p_values([judged.share for _, _, judged in ours], kinds, by_kind)
        q_values = benjamini_hochberg(tested)
    rows = []
    for (number, entry, judged), p, q in zip(ours, p_values, q_values, strict=True):
        rate, n_units = rates.get(entry.kind, (None, 0))
        rows.append(Row(rubric.name, audited.transcripts[number].id, entry, judged, rate, n_units, p, q))
    return rows


def _scores(
    rubric: Rubric, audited: Evidence, ours: Held, theirs: Held | None, rows: list[Row]
) -> list[TranscriptScore]:
    def means(held: Held) -> Mapping[int, list[float]]:
        found: dict[int, list[float]] = {}
        for number, _, judged in held:
            found.setdefault(number, []).append(judged.share)
        return found

    controls = None if theirs is None else sorted(sum(each) / len(each) for each in means(theirs).values())
    by_number: dict[int, list[Row]] = {}
    for (number, _, _), row in zip(ours, rows, strict=True):
        by_number.setdefault(number, []).append(row)
    scores = []
    for number, each in by_number.items():
        share = sum(row.share for row in each) / len(each)
        found = [row for row in each if row.share >= rubric.min_share]
        p = None
        if controls is not None:
            higher = len(controls) - bisect.bisect_left(controls, share - 1e-12)
            p = (1 + higher) / (1 + len(controls))
        unsaid = sum(row.said == NOT_SAID for row in found)
        highest = max(row.share for row in each)
        scores.append(
            TranscriptScore(rubric.name, audited.transcripts[number].id, share, highest, len(found), unsaid, p)
        )
    return scores


def _result(rubric: Rubric, ours: Held, theirs: Held | None, rows: list[Row], paired: bool, seed: int) -> RubricResult:
    found = [row for row in rows if row.share >= rubric.min_share]
    p = None
    if theirs and ours:
        if paired:
            a, b = (torch.tensor([judged.share for _, _, judged in held]) for held in (ours, theirs))
            p = paired_permutation(a, b, [number for number, _, _ in ours], "greater", seed=seed)
        else:
            sides = [[(number, entry.kind, judged.share) for number, entry, judged in held] for held in (ours, theirs)]
            p = stratified_permutation(sides[0], sides[1], seed)
    return RubricResult(
        rubric=rubric.name,
        title=rubric.title,
        n_positions=len(ours),
        n_findings=len(found),
        n_not_said=sum(row.said == NOT_SAID for row in found),
        n_standing=None if theirs is None else sum(bool(row.stands) for row in found),
        # Rows without any share have p = 1: only the others can share the cost of the rest.
        least_controls=controls_needed(len(rows), sum(row.share > 0 for row in rows), ALPHA)
        if theirs is not None and found
        else None,
        rate=_rate(ours, seed),
        control=_rate(theirs, seed) if theirs else None,
        p=p,
        p_holm=None,
    )


def _rate(held: Held, seed: int) -> Interval:
    shares = torch.tensor([judged.share for _, _, judged in held])
    return bootstrap(shares, [number for number, _, _ in held], seed=seed)
