"""What every evaluation can be told, whatever it measures: its own settings are these and more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nla.errors import ArgumentError
from nla.pair.separate import Devices


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """A seed and a device.

    Raises:
        ArgumentError: a count below its least.
    """

    least: ClassVar[dict[str, int]] = {}
    """The fields that are counts, and the least that each may be; None is always allowed."""

    seed: int = 0
    """Of every draw: items, samples, random directions, intervals."""
    device: Devices = None
    """Where to put what is loaded here; None: the first GPU if there is one, else the CPU."""

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in (*self.least, "seed")}
        if any(value is not None and value < self.least.get(name, 0) for name, value in counts.items()):
            got = ", ".join(f"{name}={value}" for name, value in counts.items())
            expected = ", ".join(f"{name} {self.least.get(name, 0)}" for name in counts)
            raise ArgumentError(got, f"at least {expected}", "ask for more")
