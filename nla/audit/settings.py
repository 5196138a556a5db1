"""AuditSettings: everything that an audit can be told, checked once; the command line fills the same object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nla.audit.rubric import Rubric
from nla.errors import ArgumentError, PositionError
from nla.transcripts.positions import BUDGET, check_choice

BASE = "base"
"""A control target: the pair's target without any adapter."""


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """What an audit looks for, where, on which target, and beside which controls.

    Raises:
        ArgumentError, PositionError: a value is out of range.
    """

    rubrics: str | Path | Rubric | Sequence[str | Path | Rubric] | None = None
    """Names, YAML files or rubrics, or one of them; None: the built-in ones."""

    positions: str = "structure"
    """"structure", "all", "random", or a pattern such as "/\\n/"; see :func:`nla.transcripts.positions.select`."""

    budget: int | None = BUDGET
    """Most positions of a transcript that are read; None: no limit."""

    samples: int = 4
    """Number of explanations of each position."""

    seed: int = 0
    """Seed of the samples, the random positions and the permutation tests."""

    window: int | None = None
    """Tokens of a window, for transcripts beyond the context; None: one pass."""

    trim: bool = False
    """Strip white space from the ends of messages, for chat templates that do so."""

    allow_dropped: bool = False
    """Read on where the chat template leaves fields out, such as the reasoning of earlier turns; the report lists
    them."""

    fold_system: bool = False
    """Where the chat template takes no system text, put it at the start of the first user message."""

    target_adapter: str | Path | None = None
    """A LoRA adapter that is on while the target reads: a PEFT folder, a hub id, or an embedded plant such as
    "switchboard/goal". None: the base."""

    control_target: str | Path | None = None
    """"base", or another adapter (such as a sham) that the controls are read with instead of ``target_adapter``.
    Without control transcripts these are the audited ones, read once more."""

    model_of: str | None = None
    """A model whose transcripts are accepted beside the target's own, or "any"."""

    judge_url: str | None = None
    """Base of an OpenAI-compatible endpoint, asked by rubrics with ``judge: true``; its key is in NLA_JUDGE_KEY."""

    judge_model: str = "judge"
    """The judge's model."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ArgumentError(f"samples={self.samples}", "1 or more", "raise --samples")
        if self.budget is not None and self.budget < 1:
            raise PositionError(f"a budget of {self.budget} positions", "1 or more", "raise --budget")
        if self.window is not None and self.window < 2:
            raise ArgumentError(f"window={self.window}", "2 or more tokens", "raise --window")
        check_choice(self.positions)
