"""Transcripts audited: positions read and explained, held against rubrics, tested against controls.

from nla.audit import audit, load_transcripts
controls = list(load_transcripts("ordinary.jsonl"))
found = audit(nla, load_transcripts("talks.jsonl"), ["evaluation-awareness"], controls=controls)
for row in found.findings: ...
"""

from nla.audit.judge import Judge
from nla.audit.rubric import Rubric
from nla.audit.rubric import load as load_rubrics
from nla.audit.run import Audit, audit
from nla.pair.planted import planted
from nla.transcripts.files import load as load_transcripts
from nla.transcripts.messages import Message, Transcript

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
