"""Transcript files in; their audit as a report out, and in a folder as a page, tables and scored logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nla.audit.cache import ReadingCache
from nla.audit.inspect_scores import write_scores
from nla.audit.page import page
from nla.audit.report import FINDINGS, PAGE, POSITIONS, SUMMARY, AuditReport, parquet
from nla.audit.run import audit_prepared, matcher_for, preparer_for, target_name
from nla.audit.settings import AuditSettings
from nla.errors import TranscriptError
from nla.pair.separate import Devices
from nla.progress import Progress, silent
from nla.storage.files import write_atomic, write_json
from nla.transcripts.files import MAX_MB
from nla.transcripts.prepared import Loaded

if TYPE_CHECKING:
    from nla.autoencoder import NLA


def audit_files(
    pair: str | Path | NLA,
    paths: Sequence[str | Path],
    settings: AuditSettings | None = None,
    controls: Sequence[str | Path] | None = None,
    max_mb: float = MAX_MB,
    skip_bad: bool = False,
    out_dir: str | Path | None = None,
    device: Devices = None,
    progress: Progress = silent,
) -> AuditReport:
    """Audit transcript files, and write what was measured into a folder.

    Readings are kept there one by one: after an interruption the same command goes on where it stopped, and reads
    again only what has changed.

    Args:
        pair: name, folder, hub id, or a loaded pair.
        paths: files and folders; see :func:`nla.transcripts.files.load_transcripts`.
        settings: what is looked for, where and how; None: the defaults.
        controls: files and folders of control transcripts.
        max_mb: refuse JSON and text files, and lines of JSONL, above this size.
        skip_bad: leave out transcripts that cannot be read, and list them, instead of stopping at the first.
        out_dir: gets ``audit.html``, ``audit.json``, ``findings.parquet``, ``positions.parquet``, and a scored copy
            of every Inspect log among ``paths``; None: nothing is written.
        device: where a pair that is not loaded yet is put; see :meth:`nla.NLA.from_pretrained`.

    Raises:
        TranscriptError: a transcript that cannot be read, or is of another model.
        StorageError: a file could not be written whole.
        NLAError: see :func:`nla.audit.run.audit`.
    """
    from nla.autoencoder import NLA

    settings = settings or AuditSettings()
    matcher = matcher_for(settings)  # refuses rubrics, and a missing judge, before anything is loaded or read
    nla = pair if isinstance(pair, NLA) else NLA.from_pretrained(pair, device=device)
    preparer = preparer_for(nla, settings)
    ours = preparer.prepare_files(paths, max_mb, skip_bad)
    theirs = None if controls is None else preparer.prepare_files(controls, max_mb, skip_bad)
    _check_some("transcripts", ours)
    _check_some("control transcripts", theirs)
    cache = ReadingCache(out_dir)
    control_chats = None if theirs is None else theirs.prepared
    audit = audit_prepared(nla, ours.prepared, control_chats, matcher, settings, cache, progress)
    adapters = [None if name is None else str(name) for name in (settings.target_adapter, settings.control_target)]
    report = AuditReport(
        audit=audit,
        pair=str(pair) if isinstance(pair, str | Path) else target_name(nla),
        target=target_name(nla),
        point=str(nla.point),
        positions=settings.positions,
        samples=settings.samples,
        target_adapter=adapters[0],
        control_target=adapters[1],
        refused=ours.refused + (theirs.refused if theirs else []),
        n_reused=cache.n_reused,
        n_read=cache.n_read,
        n_changed=cache.n_changed,
    )
    if out_dir is not None:
        save(report, ours.files, Path(out_dir))
    return report


def save(report: AuditReport, files: Sequence[Path], out_dir: Path) -> None:
    """Write page, summary and tables, and of each Inspect log among ``files`` a copy with scores.

    Raises:
        StorageError: one of them could not be written whole.
    """
    write_json(out_dir / SUMMARY, report.to_json())
    write_atomic(out_dir / FINDINGS, parquet(report.audit.findings))
    write_atomic(out_dir / POSITIONS, parquet(report.audit.rows))
    write_atomic(out_dir / PAGE, page(report))
    for path in files:
        if path.suffix.lower() == ".eval":
            write_scores(report.audit, path, out_dir / path.name)


def _check_some(what: str, loaded: Loaded | None) -> None:
    """Refuse to go on when all were left out: without its controls an audit would test nothing, unasked."""
    if loaded is not None and loaded.refused and not loaded.prepared:
        got = f"{len(loaded.refused)} {what}, none of which can be read; the first: {loaded.refused[0]}"
        raise TranscriptError(got, f"one {what[:-1]} or more", "correct them")
