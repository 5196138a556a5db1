"""The audit as a scanner for Inspect Scout: `scout scan nla/nla_audit -T ./logs`. Loaded by its entry point only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from nla.audit.run import audit
from nla.errors import MissingExtraError
from nla.transcripts import inspect
from nla.transcripts.files import refuse_other_models
from nla.transcripts.messages import Transcript as Conversation
from nla.transcripts.messages import parse_messages
from nla.transcripts.positions import BUDGET

try:
    from inspect_scout import (  # pyright: ignore[reportMissingImports]
        Reference,
        Result,
        Scanner,
        Transcript,
        scanner,
    )
except ImportError as error:
    raise MissingExtraError(
        "Inspect Scout's scanner without inspect-scout", "the extra 'audit'", "pip install 'nla[audit]'"
    ) from error


@cache
def _pair(name: str) -> Any:
    from nla.autoencoder import NLA

    return NLA.from_pretrained(name)


@scanner(messages="all")
def nla_audit(
    pair: str = "couplets",
    rubrics: Sequence[str] | str | None = None,
    positions: str = "structure",
    budget: int = BUDGET,
    samples: int = 4,
    target_adapter: str | None = None,
    model_of: str | None = None,
    window: int | None = None,
    trim: bool = False,
    seed: int = 0,
) -> Scanner[Transcript]:
    """Read the activations that a pair's target has on a transcript, and hold their explanations against rubrics.

    One result a rubric: its value is the highest share of samples that show the concept at one position. Scout gives
    one transcript at a time, so there are no controls here; `nla audit` has them.
    """
    names = [rubrics] if isinstance(rubrics, str) else rubrics

    async def scan(transcript: Transcript) -> list[Result]:
        nla = _pair(pair)
        entries = [message.model_dump(mode="json") for message in transcript.messages]
        name = transcript.transcript_id
        conversation = Conversation(name, parse_messages(entries, name), transcript.model, transcript.source_uri or "")
        refuse_other_models(conversation, str(nla.target_folder or nla.config.target), model_of)
        found = audit(
            nla,
            [conversation],
            names,
            positions=positions,
            budget=budget,
            samples=samples,
            target_adapter=target_adapter,
            window=window,
            trim=trim,
            seed=seed,
        )
        ids = [message.id for message in transcript.messages]
        results = []
        for score in found.scores:
            rows = [row for row in found.findings if row.rubric == score.rubric]
            results.append(
                Result(
                    value=score.highest,
                    label=score.rubric,
                    explanation=inspect.explain(rows),
                    references=[Reference(**each) for each in inspect.references(rows, ids)],
                    metadata={"share": score.share, "n_findings": score.n_findings, "n_not_said": score.n_not_said},
                )
            )
        return results

    return scan
