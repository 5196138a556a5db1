"""The parts of a pair, as they are loaded and saved: what plays the roles, and what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nla.config import NLAConfig
from nla.metrics import Baseline
from nla.pair.roles import Roles


@dataclass(frozen=True)
class Parts:
    """A pair in pieces."""

    roles: Roles
    """Who plays target, encoder and decoder."""

    tokenizer: PreTrainedTokenizerBase

    config: NLAConfig

    baselines: dict[str, Baseline] = field(default_factory=dict)
    """Of unit-normalised training activations, by stratum, and "global"."""

    metrics: dict[str, Any] = field(default_factory=dict)
    """What was measured, as saved in metrics.json."""

    target_folder: Path | None = None
    """Where a local target lies."""

    weight_folders: dict[str, Path] = field(default_factory=dict)
    """Where the full weights of a local encoder and decoder lie, by role."""

    origin: tuple[str, str | None] | None = None
    """What it was loaded from: a folder's absolute path or a hub id, and the revision; None: made here."""
