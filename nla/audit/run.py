"""Audit transcripts: read, explain, hold against rubrics, test against controls; and the same with files around it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nla.audit.findings import Evidence, Matcher, RubricResult, Tested, TranscriptScore, weigh
from nla.audit.findings import Row as Row
from nla.audit.judge import Judge
from nla.audit.reading import Progress, Reading, Settings, prepare, read_transcript, silent
from nla.audit.readings import Store
from nla.audit.rubric import Rubric, load
from nla.errors import ArgumentError, NLAError, TranscriptError
from nla.organisms import adapter_folder
from nla.pair.planted import planted
from nla.transcripts import files
from nla.transcripts.messages import Transcript
from nla.transcripts.positions import BUDGET
from nla.transcripts.rendering import trimmed

if TYPE_CHECKING:
    from nla.audit.report import AuditReport
    from nla.autoencoder import NLA

BASE = "base"
"""A control target: the pair's target without any adapter."""


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    transcripts: list[Transcript]
    readings: list[Reading]
    controls: list[Transcript]
    rubrics: list[Rubric]
    rows: list[Row]
    """Every position under every rubric."""
    scores: list[TranscriptScore]
    """Every transcript under every rubric."""
    results: list[RubricResult]
    """Every rubric."""

    @property
    def findings(self) -> list[Row]:
        """Rows whose concept enough samples show, those that stand against the controls first."""
        least = {rubric.name: rubric.min_share for rubric in self.rubrics}
        found = [row for row in self.rows if row.share >= least[row.rubric]]
        return sorted(found, key=lambda row: (row.q if row.q is not None else 1.0, -row.share))


def audit(
    nla: NLA,
    transcripts: Iterable[Transcript],
    rubrics: Sequence[str | Path | Rubric] | None = None,
    positions: str = "structure",
    budget: int | None = BUDGET,
    samples: int = 4,
    controls: Sequence[Transcript] | None = None,
    target_adapter: str | Path | None = None,
    control_target: str | Path | None = None,
    seed: int = 0,
    window: int | None = None,
    trim: bool = False,
    judge: Judge | None = None,
    store: Store | None = None,
    progress: Progress = silent,
) -> Audit:
    """Audit transcripts with a pair. Nothing is read from or written to disk, but through ``store`` if one is given.

    Args:
        transcripts: to audit, each with its own id.
        rubrics: names, YAML files or rubrics; None: the built-in ones.
        positions: see :func:`nla.audit.positions.select`; ``budget`` is of each transcript.
        samples: explanations of each position.
        controls: transcripts in which nothing is expected, read on the control target if there is one.
        target_adapter: PEFT folder of a LoRA adapter that is on while the target reads, or the name of an embedded
            plant, such as "switchboard/goal"; None: the base.
        control_target: "base", or the folder or name of another adapter (such as a sham): read with it instead of
            ``target_adapter``, ``controls``, or without any, the same transcripts once more.
        window: for transcripts beyond the context; see :func:`nla.audit.stream.read_chat`.
        trim: take white space off the ends of messages, for templates that do.
        judge: for rubrics that ask one.
        store: keeps readings and finds them again.

    Raises:
        ArgumentError: no transcripts, two of one id, or a target held against itself.
        NLAError: see :func:`nla.audit.reading.read_transcript` and :func:`nla.audit.rubric.load`.
    """
    matcher = Matcher(load(rubrics), judge)
    target_adapter, control_target = adapter_folder(target_adapter), adapter_folder(control_target)
    ours = [trimmed(each) if trim else each for each in transcripts]
    if not ours or len({each.id for each in ours}) < len(ours):
        got = "two transcripts of one id" if ours else "no transcripts"
        raise ArgumentError(got, "transcripts with an id each", "check what was loaded")
    theirs = [trimmed(each) if trim else each for each in controls or []]
    paired = control_target is not None and controls is None
    _check_control(target_adapter, control_target)
    _check_controls(ours, None if controls is None else theirs, control_target)
    settings = Settings(positions, budget, samples, seed, window)
    store = store or Store(None)
    readings = _read(nla, ours, target_adapter, settings, store, "audited", progress)
    evidence = None
    if theirs or paired:
        theirs = ours if paired else theirs
        adapter = target_adapter if control_target is None else None if control_target == BASE else control_target
        evidence = Evidence(theirs, _read(nla, theirs, adapter, settings, store, "controls", progress))
    store.finish()
    progress("findings", 0.0)
    found: Tested = weigh(Evidence(ours, readings), evidence, matcher, paired, seed)
    progress("findings", 1.0)
    return Audit(ours, readings, theirs, matcher.rubrics, found.rows, found.scores, found.results)


def _check_control(target_adapter: str | Path | None, control_target: str | Path | None) -> None:
    if control_target is None:
        return
    control = None if control_target == BASE else Path(control_target).resolve()
    if control == (None if target_adapter is None else Path(target_adapter).resolve()):
        raise ArgumentError(
            f"the control target {control_target}, which is the audited target itself",
            "another target: the base under an audited adapter, or a sham adapter",
            "give --target-adapter, or control transcripts (--controls) instead",
        )


def _check_controls(ours: list[Transcript], theirs: list[Transcript] | None, control_target: str | Path | None) -> None:
    if theirs is None:
        return
    if not theirs:
        raise ArgumentError("controls without any transcript", "one or more", "leave controls out to test nothing")
    audited = {each.digest for each in ours}
    both = [each.id for each in theirs if each.digest in audited]
    if both and control_target is None:
        raise ArgumentError(
            f"{len(both)} control transcripts that are audited too, such as {both[0]!r}",
            "other transcripts, in which nothing is expected",
            "leave them out of one side, or read them on a control target (--control-target)",
        )


def _read(
    nla: NLA,
    transcripts: Sequence[Transcript],
    adapter: str | Path | None,
    settings: Settings,
    store: Store,
    stage: str,
    progress: Progress,
) -> list[Reading]:
    """Readings of transcripts under one adapter: from the store where it has them."""
    readings: list[Reading] = []
    with planted(nla, adapter):
        for number, transcript in enumerate(transcripts):

            def within(_: str, part: float, number: int = number) -> None:
                progress(stage, (number + part) / len(transcripts))

            key = settings.key(nla, transcript, adapter)
            reading = store.get(f"{stage}:{transcript.id}", key)
            if reading is None:
                reading = read_transcript(nla, transcript, settings, key, within)
                store.put(reading)
            # Transcripts of the same words share one reading; it stands under each one's name.
            readings.append(replace(reading, transcript=transcript.id))
            progress(stage, (number + 1) / len(transcripts))
    return readings


def run(
    pair: str | Path | NLA,
    paths: Sequence[str | Path],
    rubrics: Sequence[str | Path] | None = None,
    positions: str = "structure",
    budget: int | None = BUDGET,
    samples: int = 4,
    controls: Sequence[str | Path] | None = None,
    target_adapter: str | Path | None = None,
    control_target: str | Path | None = None,
    model_of: str | None = None,
    window: int | None = None,
    trim: bool = False,
    max_mb: float = files.MAX_MB,
    skip_bad: bool = False,
    judge_url: str | None = None,
    judge_model: str = "judge",
    seed: int = 0,
    out_dir: str | Path | None = None,
    progress: Progress = silent,
) -> AuditReport:
    """Audit transcript files, and write what was found into a folder.

    Readings are kept there one by one: after an interruption the same command goes on where it stopped, and reads
    again only what has changed.

    Args:
        pair: name, folder, hub id, or a loaded pair.
        paths: files and folders; see :func:`nla.audit.transcripts.load`.
        controls: files and folders of control transcripts.
        model_of: the model whose transcripts are accepted beside the target's own, or "any".
        skip_bad: leave out transcripts that cannot be read, and list them, instead of stopping at the first.
        judge_url: base of an OpenAI-compatible endpoint, asked by rubrics with ``judge: true``.
        out_dir: gets ``audit.html``, ``audit.json``, ``findings.parquet``, ``positions.parquet``, and a scored copy
            of every Inspect log among ``paths``; None: nothing is written.

    The other arguments are those of :func:`audit`, whose errors this raises too.

    Raises:
        TranscriptError: a transcript that cannot be read, or is of another model.
        StorageError: a file could not be written whole.
    """
    from nla.audit.report import AuditReport
    from nla.autoencoder import NLA

    loaded_rubrics = load(rubrics)
    judge = None if judge_url is None else Judge(judge_url, judge_model)
    Matcher(loaded_rubrics, judge)  # refuses a missing judge before anything is loaded or read
    nla = pair if isinstance(pair, NLA) else NLA.from_pretrained(pair)
    target = nla.config.target if nla.target_folder is None else str(nla.target_folder)
    refused: list[str] = []
    settings = Settings(positions, budget, samples, seed, window)

    def load_all(some: Sequence[str | Path], what: str) -> list[Transcript]:
        left_out = len(refused)
        found = _load(nla, some, target, model_of, settings, max_mb, trim, skip_bad, refused)
        # Without its controls an audit would test nothing, unasked.
        if not found and refused[left_out:]:
            got = f"{len(refused) - left_out} {what}, none of which can be read; the first: {refused[left_out]}"
            raise TranscriptError(got, f"one {what[:-1]} or more", "correct them")
        return found

    ours = load_all(paths, "transcripts")
    theirs = None if controls is None else load_all(controls, "control transcripts")
    store = Store(out_dir)
    found = audit(
        nla, ours, loaded_rubrics, positions, budget, samples, theirs, target_adapter, control_target, seed, window,
        trim, judge, store, progress,
    )  # fmt: skip
    report = AuditReport(
        audit=found,
        pair=str(pair) if isinstance(pair, str | Path) else target,
        target=target,
        point=str(nla.point),
        positions=positions,
        samples=samples,
        target_adapter=None if target_adapter is None else str(target_adapter),
        control_target=None if control_target is None else str(control_target),
        refused=refused,
        n_reused=store.n_reused,
        n_read=store.n_read,
        n_changed=store.n_changed,
        n_judged=0 if judge is None else judge.n_asked,
        n_discarded=0 if judge is None else judge.n_discarded,
    )
    if out_dir is not None:
        _save(report, paths, Path(out_dir))
    return report


def _save(report: AuditReport, paths: Sequence[str | Path], out_dir: Path) -> None:
    """All files of an audit; of each Inspect log a copy with scores."""
    report.save(out_dir)
    logs = [path for path in files.find(paths) if path.suffix.lower() == ".eval"]
    if logs:
        from nla.transcripts import inspect

        for path in logs:
            inspect.write_scores(report.audit, path, out_dir / path.name)


def _load(
    nla: NLA,
    paths: Sequence[str | Path],
    target: str,
    model_of: str | None,
    settings: Settings,
    max_mb: float,
    trim: bool,
    skip_bad: bool,
    refused: list[str],
) -> list[Transcript]:
    """Transcripts of files that the target can read; with ``skip_bad`` the others are noted in ``refused``."""
    found: list[Transcript] = []
    seen: set[str] = set()
    for path in files.find(paths) if paths else ():
        for loaded in files.load_each(path, max_mb):
            try:
                if isinstance(loaded, TranscriptError):
                    raise loaded
                files.refuse_other_models(loaded, target, model_of)
                transcript = files.distinct(loaded, path, seen)
                # Before anything is read: the thousandth transcript does not stop an audit of hours.
                prepare(nla, trimmed(transcript) if trim else transcript, settings)
            except NLAError as error:
                if not skip_bad:
                    raise
                refused.append(str(error))
            else:
                seen.add(transcript.id)
                found.append(transcript)
    return found
