"""How far a long job has come: the callback that audits and evaluations take."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Called with the name of a stage and the fraction of it that is done."""


def silent(_stage: str, _fraction: float) -> None:
    """Progress that nobody watches."""
