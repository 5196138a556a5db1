"""Graphs of `nla trace` and a pair in; whether explanations follow a latent that is patched upstream, out.

The donor's activation is put in at a causal site, the text stays, and what is read lies downstream: a later token, or a
deeper block. A reader of the text cannot notice. Reading the very place that was overwritten would repeat the donor,
and is never done; where no causal site lies upstream of the pair's point, one block deeper is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nla.eval.adversaries import continue_prefixes
from nla.eval.circuits import patching
from nla.eval.circuits.gate import MIN_EFFECT
from nla.eval.circuits.graph_format import CAUSAL_SITE, Graph, concept_words
from nla.eval.circuits.patching import Batch
from nla.eval.explainers import explain
from nla.eval.pair.graph_concepts import Concept, Text, document_of, names, pair_word
from nla.eval.report import Figures, Rate
from nla.eval.target import Patch, Target
from nla.models.points import Point, d_model

if TYPE_CHECKING:
    from nla.autoencoder import NLA


@dataclass(frozen=True)
class GraphCounterfactual(Figures):
    """What is named downstream of a patch; all rates are of single explanations, resampled by document."""

    n_graphs: int
    """Graphs of the files in which a causal site has something downstream that can be read."""
    places: dict[str, int]
    """Where the donor's activation is put in and where is read, and in how many graphs."""
    effect: Rate
    """E of the patch on what the target writes."""
    arrived: Rate
    """Share of the donor's difference that is there where is read: 1 repeats the donor's own activation."""
    donor: Rate
    """Patched: the donor's word is named."""
    base: Rate
    """Patched: the prompt's own word is still named."""
    unpatched: Rate
    """Nothing patched: the prompt's own word is named, so well is this place read at all."""
    random: Rate
    """A random direction of equal norm put in at the same site: the donor's word is named."""
    text: Rate
    """The donor's word in the target's own continuation of the unchanged text."""


_PAIR_TEXTS = ("donor_prompt", "donor_continuation", "target", "donor_target")


class _Swap(NamedTuple):
    """One graph's patch: columns are the pair's tokens."""

    site: str
    column: int
    read: str
    read_column: int
    effect: float
    words: tuple[Concept, Concept]
    """What the prompt and the donor prompt hold where is read."""


def follow_patches(
    nla: NLA, graphs: Sequence[Graph], texts: Sequence[Text], n_samples: int = 1, seed: int = 0
) -> GraphCounterfactual | None:
    """Patch each graph's causal site upstream, read downstream; None where no graph has such a site.

    Args:
        texts: how the graphs' tokens are the pair's (:func:`nla.eval.pair.graph_concepts.align`).

    Raises:
        ShapeError: see :func:`nla.eval.circuits.patching.encode`.
    """
    target = Target.of(nla)
    kept = [i for i, graph in enumerate(graphs) if all(pair_word(graph, name) for name in _PAIR_TEXTS)]
    if not kept:
        return None
    donors, wanted = ([graphs[i].content["metadata"]["minimal_pair"][name] for i in kept] for name in _PAIR_TEXTS[:2])
    batch = patching.encode(target, [texts[i].prompt for i in kept], donors, wanted)
    found = [_swap(target, graphs[i], texts[i], batch, row) for row, i in enumerate(kept)]
    rows = [row for row, swap in enumerate(found) if swap is not None]
    labels = [document_of(graphs[kept[row]]) for row in rows]
    owner = [labels.index(label) for label in labels]
    swaps = [swap for swap in found if swap is not None]
    if not swaps:
        return None
    batch = Batch(*([side[row] for row in rows] for side in batch))
    base, donor, patched, random = _readings(target, batch, swaps, seed)
    difference = (donor - base).double()
    arrived = ((patched - base).double() * difference).sum(1) / difference.square().sum(1).clamp(min=1e-12)
    prefixes = [ids[: swap.read_column + 1] for ids, swap in zip(batch.base, swaps, strict=True)]

    def rate(said: Sequence[str], which: int) -> Rate:
        hits = [names(text, swaps[row // n_samples].words[which]) for row, text in enumerate(said)]
        owners = [document for document in owner for _ in range(n_samples)]
        return Rate.clustered(torch.tensor(hits, dtype=torch.float64), owners, seed)

    def explained(vectors: Float[Tensor, "n d"]) -> list[str]:
        return explain(nla, vectors.repeat_interleave(n_samples, dim=0), seed=seed)

    said = explained(patched)
    return GraphCounterfactual(
        n_graphs=len(swaps),
        places=dict(Counter(map(_described, swaps))),
        effect=Rate.clustered(torch.tensor([swap.effect for swap in swaps]).double(), owner, seed),
        arrived=Rate.clustered(arrived, owner, seed),
        donor=rate(said, 1),
        base=rate(said, 0),
        unpatched=rate(explained(base), 0),
        random=rate(explained(random), 1),
        text=rate(continue_prefixes(target, [one for one in prefixes for _ in range(n_samples)], 1.0, seed), 1),
    )


def _described(swap: _Swap) -> str:
    later = "at a later token" if swap.column < swap.read_column else "at the same token"
    return f"{swap.site}, read at {swap.read} {later}"


def _swap(target: Target, graph: Graph, text: Text, batch: Batch, row: int) -> _Swap | None:
    """Where to patch and to read in one graph.

    Read is the last token that has a causal site at the pair's point or before. Put in is the strongest causal site at
    an earlier token, or else that of the lowest block at this one.
    """
    at = target.point
    members = (node for one in graph.supernodes for node in one.members if node.kind == CAUSAL_SITE)
    sites = [node for node in members if node.layer <= at.layer and text.columns[node.position] >= 0]
    # Of another hand's graph a supernode may hold sites without an effect.
    sites = [node for node in sites if (node.activation or 0.0) >= MIN_EFFECT]
    if not sites:
        return None
    position = max(node.position for node in sites)
    earlier = [node for node in sites if node.position < position and node.layer < at.layer]
    if earlier:
        site = max(earlier, key=lambda node: node.activation or 0.0)
    else:
        site = min((node for node in sites if node.position == position), key=lambda node: node.layer)
    read = at.layer + (site.position == position and site.layer == at.layer)
    if read >= len(target.points):
        return None
    column = text.columns[position]
    here, there = batch.base[row][column], batch.donor[row][column]
    words = (pair_word(graph, "target"), pair_word(graph, "donor_target"))
    if here != there:
        own, other = (str(target.tokenizer.decode([token])).strip() for token in (here, there))
        words = (concept_words(own), concept_words(other))
    if not words[0] or not words[1] or set(words[0]) & set(words[1]):
        return None
    return _Swap(
        str(Point(at.kind, site.layer)),
        text.columns[site.position],
        str(Point(at.kind, read)),
        column,
        float(site.activation or 0.0),
        words,
    )


def _readings(
    target: Target, batch: Batch, swaps: Sequence[_Swap], seed: int
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"], Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """What is read of the prompts, of the donors, under the donor's patch, and under a random one of equal norm."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(4, len(swaps), d_model(target.model))
    groups: dict[tuple[str, str], list[int]] = {}
    for row, swap in enumerate(swaps):
        groups.setdefault((swap.site, swap.read), []).append(row)
    for (site, read), rows in groups.items():
        base, donor = ([side[row] for row in rows] for side in (batch.base, batch.donor))
        put, seen = (torch.tensor([[getattr(swaps[row], name)] for row in rows]) for name in ("column", "read_column"))
        here, there = (patching.read_sites(target, ids, [site], put)[:, 0, 0] for ids in (base, donor))
        for place, (ids, vectors) in enumerate(
            [(base, None), (donor, None), (base, there), (base, patching.random_difference(here, there, generator))]
        ):
            patches = [] if vectors is None else [Patch(site, put[:, 0], vectors)]
            out[place, rows] = patching.read_sites(target, ids, [read], seen, patches)[:, 0, 0]
    return out[0], out[1], out[2], out[3]
