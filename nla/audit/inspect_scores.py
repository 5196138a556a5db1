"""Findings as scores in a copy of an Inspect log, which Inspect's viewer shows beside the messages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nla.audit.findings import NOT_SAID, PositionScore
from nla.audit.run import Audit
from nla.errors import visible
from nla.storage.files import replacing
from nla.text.markdown import literal
from nla.transcripts.inspect_logs import EPOCH, SAMPLE, require_inspect
from nla.transcripts.messages import bad

SCORER = "nla_audit"
N_CITED = 20
"""Findings of a sample that a score cites."""


def write_scores(audit: Audit, path: Path, out: Path) -> None:
    """Write a copy of a log with a score for each rubric on every audited sample; the log itself stays as it is.

    A score is the highest share of samples that show the rubric's concept at one position. Its explanation cites
    messages, and names them for viewers that link citations.

    Raises:
        MissingExtraError: inspect-ai is not installed.
        TranscriptError: the log cannot be read again, or the copy not be written.
    """
    log_module = require_inspect()
    if out.resolve() == path.resolve():
        raise bad(str(out), "the audited log itself as the place of its copy", "another folder", "change --out")
    try:
        log = log_module.read_eval_log(str(path), resolve_attachments=True)
        audited = {
            (transcript.metadata.get(SAMPLE), transcript.metadata.get(EPOCH)): transcript
            for transcript in audit.transcripts
            if transcript.source.startswith(f"{path}, sample ")
        }
        for sample in log.samples or []:
            if (sample.id, sample.epoch) in audited:
                one = audited[sample.id, sample.epoch]
                ids = [message.id for message in one.messages]
                sample.scores = {**(sample.scores or {}), **_scores(audit, one.id, ids)}
        _add_results(log, audit, {transcript.id for transcript in audited.values()})
        with replacing(out) as temporary:
            form = "json" if out.suffix == ".json" else "eval"  # the temporary path does not say it
            log_module.write_eval_log(log, str(temporary), format=form)
    except Exception as error:
        shown = visible(f"{type(error).__name__}: {error}")[:160]
        raise bad(str(path), f"a log whose scored copy cannot be made ({shown})", "a whole log", "check it") from error


def _scores(audit: Audit, transcript: str, message_ids: Sequence[str | None]) -> dict[str, Any]:
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


def explain(rows: Sequence[PositionScore]) -> str:
    """Findings of one transcript and rubric in words, citing messages as [M1], [M2]…"""
    lines = []
    for row in rows[:N_CITED]:
        said = "thought, not said" if row.said == NOT_SAID else f"thought and {row.said}"
        tested = "" if row.q is None else f", q = {row.q:.3f}"
        shown = f"{sum(row.judged.shown)}/{len(row.judged.shown)}{tested}"
        lines.append(
            f"[M{row.entry.message + 1}] at “{literal(row.entry.token)}”: {said} ({shown}): {literal(row.evidence)}"
        )
    if len(rows) > N_CITED:
        lines.append(f"… and {len(rows) - N_CITED} more")
    return "\n\n".join(lines) or "nothing found"


def references(rows: Sequence[PositionScore], message_ids: Sequence[str | None]) -> list[dict[str, str]]:
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
