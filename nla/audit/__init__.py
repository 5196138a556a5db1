"""Transcripts audited: positions read and explained, held against rubrics, tested against controls.

from nla.audit import audit, load_transcripts
controls = list(load_transcripts("ordinary.jsonl"))
found = audit(nla, load_transcripts("talks.jsonl"), ["evaluation-awareness"], controls=controls)
for row in found.findings: ...
"""

from nla.audit.judge import Judge
from nla.audit.messages import Message, Transcript
from nla.audit.rubric import Rubric
from nla.audit.rubric import load as load_rubrics
from nla.audit.run import Audit, audit
from nla.audit.transcripts import load as load_transcripts
from nla.plant import planted

__all__ = [
    "Audit",
    "Judge",
    "Message",
    "Rubric",
    "Transcript",
    "audit",
    "load_rubrics",
    "load_transcripts",
    "planted",
]
