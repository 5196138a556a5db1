"""Transcripts audited: positions read and explained, held against rubrics, tested against controls.

from nla.audit import AuditSettings, audit, load_transcripts
settings = AuditSettings(rubrics=["evaluation-awareness"])
result = audit(nla, load_transcripts("talks.jsonl"), settings, load_transcripts("ordinary.jsonl"))
for finding in result.findings: ...
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nla.audit.findings import PositionScore as PositionScore
    from nla.audit.from_files import audit_files as audit_files
    from nla.audit.judge import Judge as Judge
    from nla.audit.rubric import Rubric as Rubric
    from nla.audit.rubric import load_rubrics as load_rubrics
    from nla.audit.run import Audit as Audit
    from nla.audit.run import audit as audit
    from nla.audit.settings import AuditSettings as AuditSettings
    from nla.transcripts.files import load_transcripts as load_transcripts
    from nla.transcripts.messages import Message as Message
    from nla.transcripts.messages import Transcript as Transcript

_HOMES = {
    "Audit": "nla.audit.run",
    "AuditSettings": "nla.audit.settings",
    "Judge": "nla.audit.judge",
    "Message": "nla.transcripts.messages",
    "PositionScore": "nla.audit.findings",
    "Rubric": "nla.audit.rubric",
    "Transcript": "nla.transcripts.messages",
    "audit": "nla.audit.run",
    "audit_files": "nla.audit.from_files",
    "load_rubrics": "nla.audit.rubric",
    "load_transcripts": "nla.transcripts.files",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: Inspect loads :mod:`nla.audit.scout` at its start, and needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nla.audit' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
