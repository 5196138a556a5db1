"""Transcripts and settings in, an audit out: read, explained, held against rubrics, tested against controls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nla.audit.cache import ReadingCache, models_key, reading_key
from nla.audit.findings import Evidence, Matcher, PositionScore, RubricScore, TranscriptScore, score_evidence
from nla.audit.judge import Judge
from nla.audit.reading import Reading, read_batch
from nla.audit.rubric import Rubric, load_rubrics
from nla.audit.settings import BASE, AuditSettings
from nla.errors import ArgumentError
from nla.models.lora import other_base
from nla.models.points import context_length
from nla.organisms import adapter_folder
from nla.progress import Progress, silent
from nla.transcripts.messages import Transcript
from nla.transcripts.prepared import Prepared, Preparer, remarks
from nla.transcripts.rendering import Unread

if TYPE_CHECKING:
    from nla.autoencoder import NLA


ROWS = 512
"""Explanations that are written together."""


@dataclass(frozen=True)
class Audit:
    """What an audit measured."""

    transcripts: list[Transcript]
    readings: list[Reading]
    controls: list[Transcript]
    rubrics: list[Rubric]
    rows: list[PositionScore]
    """Every position under every rubric."""
    scores: list[TranscriptScore]
    """Every transcript under every rubric."""
    results: list[RubricScore]
    """Every rubric."""
    unread: Mapping[str, Sequence[Unread]] = field(default_factory=dict)
    """Of each transcript's id, what of it the target did not read."""
    doubts: Sequence[str] = ()
    """What the pair's own measurements say against it."""
    remarks: Sequence[str] = ()
    """What a reader must know of how the transcripts and controls were read."""
    n_judged: int = 0
    """Explanations that the judge was asked about."""
    n_discarded: int = 0
    """Verdicts of the judge without a literal quote."""

    @property
    def findings(self) -> list[PositionScore]:
        """Positions at which enough samples show the concept, the most significant first."""
        least = {rubric.name: rubric.min_share for rubric in self.rubrics}
        findings = [row for row in self.rows if row.share >= least[row.rubric]]
        return sorted(findings, key=lambda row: (row.q if row.q is not None else 1.0, -row.share))


def audit(
    nla: NLA,
    transcripts: Iterable[Transcript],
    settings: AuditSettings | None = None,
    controls: Iterable[Transcript] | None = None,
    cache: ReadingCache | None = None,
    progress: Progress = silent,
) -> Audit:
    """Audit transcripts with a pair. Nothing is read from or written to disk, except through ``cache`` if one is given.

    Args:
        transcripts: to audit, each with its own id.
        settings: what is looked for, where and how; None: the defaults.
        controls: transcripts in which nothing is expected, read on the control target if there is one.
        cache: keeps readings and finds them again.

    Raises:
        ArgumentError: no transcripts, two of one id, or a target held against itself.
        TranscriptError: a transcript names another model than the target.
        RubricError, JudgeError: see :func:`nla.audit.rubric.load_rubrics` and :class:`nla.audit.judge.Judge`.
        NLAError: see :class:`nla.transcripts.prepared.Preparer` and :func:`nla.audit.reading.read_batch`.
    """
    settings = settings or AuditSettings()
    matcher = matcher_for(settings)
    preparer = preparer_for(nla, settings)
    ours = [preparer.prepare(transcript) for transcript in transcripts]
    theirs = None if controls is None else [preparer.prepare(transcript) for transcript in controls]
    return audit_prepared(nla, ours, theirs, matcher, settings, cache, progress)


def matcher_for(settings: AuditSettings) -> Matcher:
    """The rubrics of an audit, and the judge that some of them ask."""
    judge = None if settings.judge_url is None else Judge(settings.judge_url, settings.judge_model)
    return Matcher(load_rubrics(settings.rubrics), judge)


def preparer_for(nla: NLA, settings: AuditSettings) -> Preparer:
    """What makes transcripts ready for the pair's target."""
    return Preparer(
        tokenizer=nla.tokenizer,
        context=context_length(nla.model),
        target=target_name(nla),
        model_of=settings.model_of,
        positions=settings.positions,
        budget=settings.budget,
        seed=settings.seed,
        window=settings.window,
        trim=settings.trim,
        allow_dropped=settings.allow_dropped,
        fold_system=settings.fold_system,
    )


def target_name(nla: NLA) -> str:
    """The target as users know it: a folder or a hub id."""
    return nla.config.target if nla.target_folder is None else str(nla.target_folder)


def audit_prepared(
    nla: NLA,
    ours: Sequence[Prepared],
    theirs: Sequence[Prepared] | None,
    matcher: Matcher,
    settings: AuditSettings,
    cache: ReadingCache | None = None,
    progress: Progress = silent,
) -> Audit:
    """:func:`audit` of transcripts that are prepared already."""
    target_adapter, control_target = adapter_folder(settings.target_adapter), adapter_folder(settings.control_target)
    _check_ids(ours)
    _check_control_target(target_adapter, control_target)
    _check_controls(ours, theirs, control_target)
    cache = cache or ReadingCache(None)
    paired = control_target is not None and theirs is None
    readings = _read(nla, ours, target_adapter, settings, cache, "audited", progress)
    controls = ours if paired else theirs or ()
    evidence = None
    if controls:
        adapter = target_adapter if control_target is None else None if control_target == BASE else control_target
        control_readings = _read(nla, controls, adapter, settings, cache, "controls", progress)
        evidence = _evidence(controls, control_readings)
    cache.finish()
    progress("findings", 0.0)
    transcripts = [prepared.transcript for prepared in ours]
    adapters = (target_adapter, None if control_target == BASE else control_target)
    bases = (other_base(adapter, target_name(nla)) for adapter in adapters)
    scores = score_evidence(_evidence(ours, readings), evidence, matcher, paired, settings.seed)
    progress("findings", 1.0)
    return Audit(
        transcripts=transcripts,
        readings=readings,
        controls=transcripts if paired else [prepared.transcript for prepared in controls],
        rubrics=matcher.rubrics,
        rows=scores.positions,
        scores=scores.transcripts,
        results=scores.rubrics,
        unread={prepared.transcript.id: prepared.chat.unread for prepared in ours if prepared.chat.unread},
        doubts=nla.doubts,
        remarks=[
            *remarks(prepared.chat for prepared in (*ours, *(theirs or ()))),
            *(warning for warning in bases if warning is not None),
        ],
        n_judged=0 if matcher.judge is None else matcher.judge.n_asked,
        n_discarded=0 if matcher.judge is None else matcher.judge.n_discarded,
    )


def _evidence(prepared: Sequence[Prepared], readings: Sequence[Reading]) -> Evidence:
    return Evidence([one.transcript for one in prepared], readings, [one.heard for one in prepared])


def _check_ids(ours: Sequence[Prepared]) -> None:
    if not ours or len({prepared.transcript.id for prepared in ours}) < len(ours):
        got = "two transcripts of one id" if ours else "no transcripts"
        raise ArgumentError(got, "transcripts with an id each", "check what was loaded")


def _check_control_target(target_adapter: str | Path | None, control_target: str | Path | None) -> None:
    if control_target is None:
        return
    control = None if control_target == BASE else Path(control_target).resolve()
    if control == (None if target_adapter is None else Path(target_adapter).resolve()):
        raise ArgumentError(
            f"the control target {control_target}, which is the audited target itself",
            "another target: the base under an audited adapter, or a sham adapter",
            "give --target-adapter, or control transcripts (--controls) instead",
        )


def _check_controls(
    ours: Sequence[Prepared], theirs: Sequence[Prepared] | None, control_target: str | Path | None
) -> None:
    if theirs is None:
        return
    if not theirs:
        raise ArgumentError("controls without any transcript", "one or more", "leave controls out to test nothing")
    audited = {prepared.transcript.digest for prepared in ours}
    both = [prepared.transcript.id for prepared in theirs if prepared.transcript.digest in audited]
    if both and control_target is None:
        raise ArgumentError(
            f"{len(both)} control transcripts that are audited too, such as {both[0]!r}",
            "other transcripts, in which nothing is expected",
            "leave them out of one side, or read them on a control target (--control-target)",
        )


def _read(
    nla: NLA,
    transcripts: Sequence[Prepared],
    adapter: str | Path | None,
    settings: AuditSettings,
    cache: ReadingCache,
    stage: str,
    progress: Progress,
) -> list[Reading]:
    """Readings of transcripts under one adapter: from the cache where it has them, else in batches.

    Transcripts of the same words share one reading, which is kept under each one's name.
    """
    by_key: dict[str, Reading] = {}
    keys: list[str] = []
    waiting: dict[str, Prepared] = {}

    def read() -> None:
        def within(_: str, part: float) -> None:
            progress(stage, (len(keys) - (1 - part) * len(waiting)) / len(transcripts))

        for reading in read_batch(nla, list(waiting.values()), list(waiting), settings, within) if waiting else ():
            cache.put(reading)
            by_key[reading.key] = reading
        waiting.clear()
        progress(stage, len(keys) / len(transcripts))

    with nla.planted(adapter):
        models = models_key(nla, adapter)
        n_rows = 0
        for prepared in transcripts:
            key = reading_key(prepared, settings, models)
            keys.append(key)
            if key in by_key or key in waiting:
                cache.note(f"{stage}:{prepared.transcript.id}", key)
                continue
            reading = cache.get(f"{stage}:{prepared.transcript.id}", key)
            if reading is not None:
                by_key[key] = reading
                continue
            waiting[key] = prepared
            n_rows += len(prepared.positions) * settings.samples
            if n_rows >= ROWS:
                read()
                n_rows = 0
        read()
    return [
        replace(by_key[key], transcript=prepared.transcript.id) for key, prepared in zip(keys, transcripts, strict=True)
    ]
