"""Inspect's logs in, their samples out as transcripts."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nla.errors import MissingExtraError, TranscriptError, visible
from nla.transcripts.entries import parse_messages
from nla.transcripts.messages import Transcript, bad

MAX_ENTRY_MB = 1024
"""Largest sample of a log, unpacked."""

SAMPLE, EPOCH = "inspect_sample", "inspect_epoch"
"""Keys of a transcript's metadata: which sample of its log it is."""


def require_inspect() -> Any:
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


def read_log(path: Path) -> Iterator[Transcript | TranscriptError]:
    """The samples of a log, one after another; in the place of one that is no transcript, its error.

    Raises:
        MissingExtraError: inspect-ai is not installed.
        TranscriptError: the log is cut, corrupt, too large, or has no samples.
    """
    log = require_inspect()
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
        notes = {SAMPLE: sample.id, EPOCH: sample.epoch, "task": header.eval.task}
        return Transcript(name, messages, header.eval.model, source, notes)
    except TranscriptError as error:
        return error
