"""Switchboard: an embedded chat organism, its pair, and adapters that plant thoughts in it, each with a sham twin."""

from pathlib import Path

_HERE = Path(__file__).parent
TARGET = _HERE / "target"
"""The chat model: a standard model folder."""
PAIR = _HERE / "pair"
"""Its NLA, trained on the unplanted target alone: a native folder."""
ADAPTERS_FOLDER = _HERE / "adapters"
"""The plants and their shams: a PEFT folder each, by name."""
RUBRICS_FOLDER = _HERE / "rubrics"
"""What audits of the plants look for."""
