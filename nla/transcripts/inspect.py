"""Inspect's logs: samples as transcripts, and findings as scores that Inspect's viewer shows beside the messages."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla.audit.findings import NOT_SAID, Row
from nla.errors import MissingExtraError, TranscriptError, visible
from nla.transcripts.messages import Transcript, bad, parse_messages

if TYPE_CHECKING:
    from nla.audit.run import Audit

SCORER = "nla_audit"
MAX_ENTRY_MB = 1024
"""Largest sample of a log, unpacked."""

N_CITED = 20
_SAMPLE, _EPOCH = "inspect_sample", "inspect_epoch"


def require() -> Any:
    """The module ``inspect_ai.log``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import inspect_ai.log  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError(
            f"an Inspect log without inspect-ai ({visible(str(error))})",
            "the extra 'audit'",
            "pip install 'nla[audit]', or export the messages as JSON",
        ) from error
    return inspect_ai.log


def load(path: Path) -> Iterator[Transcript | TranscriptError]:
    """The samples of a log, one after another; in the place of one that is no transcript, its error.

    Raises:
        MissingExtraError: inspect-ai is not installed.
        TranscriptError: the log is cut, corrupt, too large, or has no samples.
    """
    log = require()
    _check_size(path)
    try:
        header = log.read_eval_log(str(path), header_only=True)
        if header.eval.dataset.sample_ids is None:  # a log that was made by hand: it cannot be read sample by sample
            samples = log.read_eval_log(str(path), resolve_attachments=True).samples or []
        else:
            samples = log.read_eval_log_samples(str(path), all_samples_required=False, resolve_attachments=True)
        count = 0
        for sample in samples:
            count += 1
            yield _transcript(sample, header, path)
    except TranscriptError:
        raise
    except Exception as error:  # what inspect-ai raises for a broken log is of many kinds
        shown = visible(f"{type(error).__name__}: {error}")[:160]
        raise bad(str(path), f"no readable Inspect log ({shown})", "a whole log", "restore or recover it") from error
    if count == 0:
        raise bad(str(path), "a log without samples", "one or more", "check that the evaluation ran")


def _check_size(path: Path) -> None:
    """Refuse a log that would unpack to more than fits."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        largest = max((entry.file_size for entry in archive.infolist()), default=0)
    if largest > MAX_ENTRY_MB * 2**20:
        expected = f"samples of at most {MAX_ENTRY_MB} MB"
        raise bad(str(path), f"a sample of {largest >> 20} MB", expected, "export its messages as JSON")


def _transcript(sample: Any, header: Any, path: Path) -> Transcript | TranscriptError:
    name = str(sample.id) if header.eval.config.epochs in (None, 1) else f"{sample.id} (epoch {sample.epoch})"
    source = f"{path}, sample {name}"
    try:
        messages = parse_messages([message.model_dump(mode="json") for message in sample.messages], source)
        notes = {_SAMPLE: sample.id, _EPOCH: sample.epoch, "task": header.eval.task}
        return Transcript(name, messages, header.eval.model, source, notes)
    except TranscriptError as error:
        return error


def write_scores(audit: Audit, path: Path, out: Path) -> None:
    """Write a copy of a log with a score for each rubric on every audited sample; the log itself stays as it is.

    A score is the highest share of samples that show the rubric's concept at one position. Its explanation cites
    messages, and names them for viewers that link citations.

    Raises:
        MissingExtraError: inspect-ai is not installed.
        TranscriptError: the log cannot be read again, or the copy not be written.
    """
    log_module = require()
    if out.resolve() == path.resolve():
        raise bad(str(out), "the audited log itself as the place of its copy", "another folder", "change --out")
    try:
        log = log_module.read_eval_log(str(path), resolve_attachments=True)
        ours = {
            (each.metadata.get(_SAMPLE), each.metadata.get(_EPOCH)): each.id
            for each in audit.transcripts
            if each.source.startswith(f"{path}, sample ")
        }
        for sample in log.samples or []:
            if (sample.id, sample.epoch) in ours:
                ids = [message.id for message in sample.messages]
                sample.scores = {**(sample.scores or {}), **_scores(audit, ours[sample.id, sample.epoch], ids)}
        _add_results(log, audit, set(ours.values()))
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.stem}.tmp{out.suffix}")
        log_module.write_eval_log(log, str(temporary))
        temporary.replace(out)
    except Exception as error:
        shown = visible(f"{type(error).__name__}: {error}")[:160]
        raise bad(str(path), f"a log whose scored copy cannot be made ({shown})", "a whole log", "check it") from error


def _scores(audit: Audit, transcript: str, message_ids: list[str | None]) -> dict[str, Any]:
    """A score for each rubric of one transcript."""
    from inspect_ai.scorer import Score  # pyright: ignore[reportMissingImports]

    scores = {}
    for score in audit.scores:
        if score.transcript != transcript:
            continue
        rows = [row for row in audit.findings if (row.rubric, row.transcript) == (score.rubric, transcript)]
        figures = {name: getattr(score, name) for name in ("share", "n_findings", "n_not_said", "p")}
        scores[f"{SCORER}/{score.rubric}"] = Score(
            value=score.highest,
            explanation=explain(rows),
            metadata={**figures, "scanner_references": references(rows, message_ids)},
        )
    return scores


def explain(rows: list[Row]) -> str:
    """Findings of one transcript and rubric in words, citing messages as [M1], [M2]…"""
    lines = []
    for row in rows[:N_CITED]:
        text = next(text for text, shown in zip(row.entry.texts, row.judged.shown, strict=True) if shown)
        said = "thought, not said" if row.said == NOT_SAID else f"thought and {row.said}"
        tested = "" if row.q is None else f", q = {row.q:.3f}"
        shown = f"{sum(row.judged.shown)}/{len(row.judged.shown)}{tested}"
        lines.append(f"[M{row.entry.message + 1}] at “{visible(row.entry.token)}”: {said} ({shown}): {visible(text)}")
    if len(rows) > N_CITED:
        lines.append(f"… and {len(rows) - N_CITED} more")
    return "\n\n".join(lines) or "nothing found"


def references(rows: list[Row], message_ids: list[str | None]) -> list[dict[str, str]]:
    """What the cites of :func:`explain` point to, as Inspect's viewer reads it."""
    cited = dict.fromkeys(row.entry.message for row in rows[:N_CITED])
    return [
        {"type": "message", "cite": f"[M{number + 1}]", "id": message_ids[number] or ""}
        for number in cited
        if message_ids[number]
    ]


def _add_results(log: Any, audit: Audit, names: set[str]) -> None:
    """Means over samples, for the log's overview."""
    from inspect_ai.log import EvalMetric, EvalResults, EvalScore  # pyright: ignore[reportMissingImports]

    if log.results is None:
        log.results = EvalResults(total_samples=len(names), completed_samples=len(names))
    for rubric in audit.rubrics:
        highest = [score.highest for score in audit.scores if score.rubric == rubric.name and score.transcript in names]
        if highest:
            metric = EvalMetric(name="mean", value=sum(highest) / len(highest))
            name = f"{SCORER}/{rubric.name}"
            log.results.scores.append(EvalScore(name=name, scorer=SCORER, metrics={"mean": metric}))
