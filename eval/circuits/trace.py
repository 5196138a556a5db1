"""`nla trace`: where a target uses the latent in which minimal pairs differ, by residual patching over point × token.

Attribution (one forward and one backward pass for each pair) ranks all sites; real patches measure the first of them,
each beside controls: random directions of equal norm, and activations of unrelated pairs. A site is *causal* if the
donor's activation there does what these do not (randomisation test by document, Holm over all sites) and by at least
0.3 of the donor's own behaviour; *weak* if by 0.01 or more.

The way of a trace: pairs (`minimal_pairs`, `organism_pairs`) → measurements and verdicts (`sites`) → report
(`trace_report`) and, for the graphs, `connections` → `trace_graphs` → `graph_format`; with a pair, the graphs →
`nla.eval.pair.against_graphs`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from nla.config import CONFIG_FILE
from nla.errors import ArgumentError
from nla.eval.circuits.connections import connect
from nla.eval.circuits.minimal_pairs import MinimalPair, read_pairs
from nla.eval.circuits.organism_pairs import PLANTED_SITES, organism_pairs
from nla.eval.circuits.sites import judge_sites, measure_sites
from nla.eval.circuits.trace_graphs import TraceResult, graph_paths, save_graphs
from nla.eval.circuits.trace_report import TraceReport, summarise
from nla.eval.pair.against_graphs import GraphSettings, judge_against_graphs
from nla.eval.settings import EvaluationSettings
from nla.eval.target import Target, check_target, one_place, open_pair
from nla.organisms import full_name, is_target
from nla.pair.separate import Devices
from nla.progress import Progress, silent
from nla.storage.files import temporary_folder

if TYPE_CHECKING:
    from nla.autoencoder import NLA


@dataclass(frozen=True)
class TraceSettings(EvaluationSettings):
    """Which pairs are traced, and how much is measured.

    Raises:
        ArgumentError: a number below 1, or some of the four texts of a pair, or these and a file of pairs.
    """

    least: ClassVar[dict[str, int]] = {"n_pairs": 1, "n_sites": 1, "n_controls": 1, "n_samples": 1}

    pairs: str | Path | Sequence[MinimalPair] | None = None
    """A file of JSON lines (see :func:`nla.eval.circuits.minimal_pairs.read_pairs`), or pairs; None: those of the
    organism."""
    prompt: str | None = None
    """Of one pair instead; give all four texts."""
    donor_prompt: str | None = None
    """As many tokens as the prompt."""
    continuation: str | None = None
    """What the target writes after the prompt."""
    donor_continuation: str | None = None
    """What it writes after the donor prompt."""
    n_pairs: int = 40
    """How many pairs of an organism."""
    all_tokens: bool = False
    """Look at every token, whatever roles the pairs name."""
    n_sites: int = 64
    """Patch so many sites at most, those of the largest attribution."""
    n_controls: int | None = None
    """Controls at each site of each pair; None: 4, or 19 below 8 documents."""
    graphs: str | Path | None = None
    """A folder for attribution graphs, one ``NAME-000.json`` for each pair; None: none are kept."""
    pair: NLA | str | Path | None = None
    """An NLA of the same target, whose explanations are held against the graphs; None: nothing is explained."""
    n_samples: int = 4
    """Explanations of each activation by that pair."""

    def __post_init__(self) -> None:
        super().__post_init__()
        n_texts = sum(text is not None for text in self._texts)
        if n_texts and (n_texts < 4 or self.pairs is not None):
            expected = "prompt, donor prompt, continuation and donor continuation together, or a file of pairs"
            raise ArgumentError(f"{n_texts} of the four texts of a pair", expected, "give all four, and no file")

    @property
    def _texts(self) -> tuple[str | None, ...]:
        return self.prompt, self.donor_prompt, self.continuation, self.donor_continuation

    def own_pairs(self) -> list[MinimalPair] | None:
        """The pairs that were given; None: those of the organism are meant.

        Raises:
            ParseError: the file of pairs cannot be read.
        """
        if self.pairs is not None:
            return read_pairs(self.pairs) if isinstance(self.pairs, str | Path) else list(self.pairs)
        prompt, donor_prompt, continuation, donor_continuation = self._texts
        if prompt is None or donor_prompt is None or continuation is None or donor_continuation is None:
            return None
        return [MinimalPair(prompt, donor_prompt, continuation, donor_continuation)]


def trace(
    model: Target | str | Path = "couplets",
    settings: TraceSettings | None = None,
    progress: Progress = silent,
) -> TraceReport:
    """Trace where a target uses the latent in which minimal pairs differ.

    Args:
        model: "couplets" (its planner), "couplets/plain", "switchboard", a model folder or hub id, a pair's folder (its
            target), or a loaded target.
        settings: None: the default ones.

    Raises:
        ArgumentError: no usable pair.
        ParseError, ShapeError, PositionError: see :func:`nla.eval.circuits.minimal_pairs.read_pairs` and
            :func:`nla.eval.circuits.sites.measure_sites`.
        ConfigError: no such model, or the pair is of another target.
    """
    settings = settings or TraceSettings()
    name, target = open_named(model, settings.device)
    nla = None if settings.pair is None else open_pair(settings.pair, settings.device)
    if nla is not None:
        check_target(nla, target, name)
    given = settings.own_pairs()
    pairs = organism_pairs(name, target, settings.n_pairs, settings.seed) if given is None else given
    if settings.all_tokens:
        pairs = [dataclasses.replace(pair, roles={}) for pair in pairs]
    planted = PLANTED_SITES.get(name) if given is None else None
    if planted is not None and planted.role and settings.all_tokens:
        planted = None  # where every token is looked at, the token of a named role is not known
    if settings.graphs is not None:  # before the work: a folder that holds other graphs is refused
        graph_paths(settings.graphs, name, len(pairs))
    measured = measure_sites(target, pairs, settings.n_sites, settings.n_controls, settings.seed, progress)
    judged = judge_sites(measured, settings.seed)
    report = summarise(name, measured, judged, len(pairs) - len(measured.pairs), settings.seed, planted)
    if settings.graphs is None and nla is None:
        return report
    result = TraceResult(name, target, measured, judged, connect(target, measured, judged))
    with temporary_folder() if settings.graphs is None else contextlib.nullcontext(settings.graphs) as folder:
        paths = save_graphs(folder, result)
        if nla is None:
            return report
        options = GraphSettings(nla, settings.n_samples, seed=settings.seed, device=settings.device)
        return report.explained(judge_against_graphs(paths, options, progress))


def open_named(model: Target | str | Path, device: Devices = None) -> tuple[str, Target]:
    """The name of a target, and the target.

    Raises:
        ConfigError: no such model.
    """
    if isinstance(model, Target):
        return model.model.name_or_path or type(model.model).__name__, model
    if not is_target(model) and (Path(model) / CONFIG_FILE).is_file():
        nla = open_pair(model, device)
        return nla.config.target, Target.of(nla)
    return full_name(model), Target.load(model, "resid_post.0", device=one_place(device))
