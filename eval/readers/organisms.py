"""`nla eval readers`: probes, lenses, readers of the text and the NLA on the same activations of an organism's targets.

In goes a pair on Couplets or on Switchboard, out comes that organism's report: see `couplets` and `switchboard`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from nla.errors import ArgumentError
from nla.eval.families.plants import adapters_of
from nla.eval.readers.compare import ComparisonSettings
from nla.eval.readers.couplets import CONTRAST, compare_on_couplets
from nla.eval.readers.switchboard import compare_on_switchboard
from nla.eval.readers.tables import ReadersReport
from nla.eval.target import Target, doubts, open_pair
from nla.eval.worlds import COUPLETS, SWITCHBOARD, require_world
from nla.progress import Progress, silent

if TYPE_CHECKING:
    from nla.autoencoder import NLA

MIN_ITEMS = 20


@dataclass(frozen=True, kw_only=True)
class ReadersSettings(ComparisonSettings):
    """What readers are compared on, and how they are run.

    Raises:
        ArgumentError: too few items, or see :class:`nla.eval.readers.compare.ComparisonSettings`.
    """

    least: ClassVar[dict[str, int]] = {**ComparisonSettings.least, "n_items": MIN_ITEMS, "n_train": 1}

    contrast: Target | str | Path | None = CONTRAST
    """Of Couplets: a target of the same tokenizer and width, read by the same pair; None: the pair's target alone."""

    plants: str | Path | None = None
    """Of Switchboard: the folder of the adapters, one sub-folder for each plant; None: the embedded ones."""

    n_items: int = 300
    """Held-out documents to judge on, half as many in each transfer split; of Switchboard, activations."""

    n_train: int = 1000
    """As many to fit on."""


def compare_on_organism(
    model: NLA | str | Path = "couplets",
    settings: ReadersSettings | None = None,
    progress: Progress = silent,
) -> ReadersReport:
    """Every reader on Couplets' tasks, on the pair's target and on one that does not use its plan; or on Switchboard's.

    Args:
        model: a pair on Couplets, whose target is the planner, or on Switchboard.
        settings: None: the default ones.

    Raises:
        ArgumentError: a pair of no embedded world, or options of the other organism.
        ConfigError, ShapeError, WeightsError: no such model, a contrast of another tokenizer or width, or an adapter
            that is missing or does not fit.
    """
    settings = settings or ReadersSettings()
    nla = open_pair(model, settings.device)
    sizes = (settings.n_train, settings.n_items)
    if require_world(nla.tokenizer, [COUPLETS, SWITCHBOARD], model, "nla eval readers") == SWITCHBOARD:
        if settings.contrast not in (None, CONTRAST):
            got = f"the contrast {settings.contrast} with plants"
            raise ArgumentError(got, "shams as contrasts", "leave --contrast out")
        report = compare_on_switchboard(nla, adapters_of(nla, settings.plants), sizes, settings, progress)
    elif settings.plants is not None:
        wanted = "a pair on Switchboard's target"
        raise ArgumentError(f"plants of a pair on {nla.config.target}", wanted, "leave --plants out, or name that pair")
    else:
        report = compare_on_couplets(nla, settings.contrast, sizes, settings, progress)
    return replace(report, doubts=doubts(nla))
