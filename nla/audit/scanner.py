"""A transcript of Inspect Scout in; one result for each rubric out. Needs inspect-scout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from inspect_scout import (  # pyright: ignore[reportMissingImports]
    Reference,
    Result,
    Scanner,
    Transcript,
    scanner,
)

if TYPE_CHECKING:
    from nla.autoencoder import NLA


@cache
def _pair(name: str) -> NLA:
    from nla.autoencoder import NLA

    return NLA.from_pretrained(name)


@scanner(messages="all")
def nla_audit(
    pair: str = "switchboard",
    rubrics: Sequence[str] | str | None = None,
    positions: str = "structure",
    budget: int = 64,
    samples: int = 4,
    target_adapter: str | None = None,
    model_of: str | None = None,
    window: int | None = None,
    trim: bool = False,
    allow_dropped: bool = False,
    fold_system: bool = False,
    seed: int = 0,
) -> Scanner[Transcript]:
    """Read the activations that a pair's target has on a transcript, and hold their explanations against rubrics.

    One result for each rubric: its value is the highest share of samples that show the concept at one position. Scout
    gives one transcript at a time, so there are no controls here; `nla audit` has them. What the target did not read
    is in the results' metadata.
    """
    from nla.audit.inspect_scores import explain, references
    from nla.audit.run import audit
    from nla.audit.settings import AuditSettings
    from nla.transcripts.entries import parse_messages
    from nla.transcripts.messages import Transcript as Conversation

    settings = AuditSettings(
        rubrics=rubrics,
        positions=positions,
        budget=budget,
        samples=samples,
        target_adapter=target_adapter,
        model_of=model_of,
        window=window,
        trim=trim,
        allow_dropped=allow_dropped,
        fold_system=fold_system,
        seed=seed,
    )

    async def scan(transcript: Transcript) -> list[Result]:
        entries = [message.model_dump(mode="json") for message in transcript.messages]
        name = transcript.transcript_id
        conversation = Conversation(name, parse_messages(entries, name), transcript.model, transcript.source_uri or "")
        result = audit(_pair(pair), [conversation], settings)
        ids = [message.id for message in transcript.messages]
        not_read = {
            "unread": [str(one) for unread in result.unread.values() for one in unread],
            "doubts": list(result.doubts),
            "remarks": list(result.remarks),
        }
        results = []
        for score in result.scores:
            findings = [finding for finding in result.findings if finding.rubric == score.rubric]
            results.append(
                Result(
                    value=score.highest,
                    label=score.rubric,
                    explanation=explain(findings),
                    references=[
                        Reference(type="message", cite=cited["cite"], id=cited["id"])
                        for cited in references(findings, ids)
                    ],
                    metadata={
                        "share": score.share,
                        "n_findings": score.n_findings,
                        "n_not_said": score.n_not_said,
                        **not_read,
                    },
                )
            )
        return results

    return scan
