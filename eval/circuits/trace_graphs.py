"""A trace as attribution graphs: one for each pair, in the JSON that circuit-tracer writes and Neuronpedia shows.

Every measured site is a node of type "causal site" (``activation`` is its effect E in this pair), every token of the
prompt an embedding, the donor's continuation the output. Links to the output carry E; links between sites, how much of
the donor's difference arrives. Supernodes name what causal sites hold: at a token that differs between the prompts
its own word, elsewhere the word of the latent.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nla.errors import ArgumentError
from nla.eval.circuits.connections import Source
from nla.eval.circuits.gate import MIN_EFFECT
from nla.eval.circuits.graph_format import CAUSAL_SITE, EMBEDDING, LOGIT, Graph, shown_token, write_graph
from nla.eval.circuits.sites import CAUSAL, SiteMeasurements, TracedSite
from nla.eval.report import to_json
from nla.eval.target import Target
from nla.models.points import Point

GraphNode = dict[str, Any]
"""A node as the file has it."""

_ABOUT = (
    "Residual patching on a minimal pair: weights of links to the output, and activations, are effects (0 none, 1 "
    "the donor's own behaviour); weights of other links, how much of the donor's difference arrives."
)


class TraceResult(NamedTuple):
    """All that a trace measured on a target."""

    name: str
    """Of the target."""
    target: Target
    measured: SiteMeasurements
    sites: list[TracedSite]
    sources: list[Source]


def save_graphs(folder: str | Path, trace: TraceResult) -> list[Path]:
    """Write the graph of every pair as ``NAME-000.json``, ``NAME-001.json``, …

    Raises:
        ArgumentError: the folder holds graphs of an earlier, larger trace, which would be taken for this one's.
        StorageError: the folder cannot be written or the disk is full.
    """
    paths = graph_paths(folder, trace.name, len(trace.measured.pairs))
    for row, path in enumerate(paths):
        write_graph(graph_of(path.stem, trace, row), path)
    return paths


def graph_paths(folder: str | Path, name: str, n_graphs: int) -> list[Path]:
    """Where the graphs of a trace go.

    Raises:
        ArgumentError: see :func:`save_graphs`.
    """
    stem = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[-60:].lower() or "target"
    paths = [Path(folder) / f"{stem}-{row:03d}.json" for row in range(n_graphs)]
    stale = sorted(set(Path(folder).glob(f"{stem}-[0-9][0-9][0-9]*.json")) - set(paths))
    if stale:
        got = f"{len(stale)} graphs of an earlier trace in {folder}, such as {stale[0].name}"
        raise ArgumentError(got, "no others than those to be written", "remove them, or choose another folder")
    return paths


def graph_of(slug: str, trace: TraceResult, row: int) -> Graph:
    """The graph of one pair of a trace."""
    ids = trace.measured.batch.base[row]
    words = [str(trace.target.tokenizer.decode([token])) for token in ids]
    swapped = {int(one.columns[row]): float(one.effect[row]) for one in trace.sources if one.point is None}
    embeddings = [_embedding(i, token, words[i], swapped.get(i, 0.0)) for i, token in enumerate(ids)]
    site_nodes = _site_nodes(trace, words, row)
    output = _output(trace, row)
    nodes = [*embeddings, *site_nodes.values()]
    _set_influence(nodes)
    supernodes = _supernodes(trace, embeddings, site_nodes, words, row)
    pinned = [*dict.fromkeys(member for _, *members in supernodes for member in members), output["node_id"]]
    content = {
        "metadata": _metadata(slug, trace, words, row),
        "qParams": {
            "pinnedIds": pinned,
            "supernodes": supernodes,
            "linkType": "both",
            "clickedId": output["node_id"],
            "sg_pos": "",
        },
        "nodes": [*nodes, output],
        "links": _links(trace.sources, embeddings, site_nodes, output, row),
    }
    return Graph.parse(to_json(content), slug)


def _embedding(position: int, token: int, word: str, effect: float) -> GraphNode:
    return {
        "node_id": f"E_{token}_{position}",
        "feature": position,
        "layer": "E",
        "ctx_idx": position,
        "feature_type": EMBEDDING,
        "jsNodeId": f"E_{token}-{position}",
        "clerp": f'Token "{shown_token(word)}"',
        "activation": effect,
    }


def _site_nodes(trace: TraceResult, words: Sequence[str], row: int) -> dict[tuple[str, str], GraphNode]:
    """The measured sites of a pair, by point and role; of two roles at one token, the first."""
    nodes: dict[tuple[str, str], GraphNode] = {}
    taken: set[str] = set()
    for number, site in enumerate(trace.sites):
        point, role = divmod(number, len(trace.measured.roles))
        position = int(trace.measured.columns[row, role])
        effects, controls = trace.measured.effects(point, role)
        effect, layer = float(effects[row]), Point.parse(site.point).layer
        identity = f"{layer}_0_{position}"
        if position < 0 or math.isnan(effect) or identity in taken:
            continue
        taken.add(identity)
        nodes[site.point, site.role] = {
            "node_id": identity,
            "feature": 0,
            "layer": str(layer),
            "ctx_idx": position,
            "feature_type": CAUSAL_SITE,
            "jsNodeId": f"{layer}_0-{position}",
            "clerp": f'{site.point} at "{shown_token(words[position])}": effect {effect:.3f}',
            "activation": effect,
            "causal_site": {**to_json(site), "controls": controls[row].tolist()},
        }
    return nodes


def _output(trace: TraceResult, row: int) -> GraphNode:
    batch, m = trace.measured.batch, float(trace.measured.bounds.low[row])
    layer, token, last = len(trace.target.points) + 1, batch.wanted[row][0], len(batch.base[row]) - 1
    # Viewers read the probability out of the label, from between "(p=" and ")".
    label = shown_token(trace.measured.pairs[row].donor_continuation).replace("(p=", "(p =")
    return {
        "node_id": f"{layer}_{token}_{last}",
        "feature": token,
        "layer": str(layer),
        "ctx_idx": last,
        "feature_type": LOGIT,
        "jsNodeId": f"L_{token}-{last}",
        "clerp": f'Output "{label}" (p={m:.3f})',
        "token_prob": m,
        "is_target_logit": True,
    }


def _set_influence(nodes: Sequence[GraphNode]) -> None:
    """Cumulative share of all effects: the strongest has the lowest; what has no effect, 1."""
    total, reached = sum(abs(node["activation"]) for node in nodes), 0.0
    for node in sorted(nodes, key=lambda node: -abs(node["activation"])):
        reached += abs(node["activation"])
        node["influence"] = min(1.0, reached / total) if total and node["activation"] else 1.0


def _supernodes(
    trace: TraceResult,
    embeddings: Sequence[GraphNode],
    site_nodes: dict[tuple[str, str], GraphNode],
    words: Sequence[str],
    row: int,
) -> list[list[str]]:
    """Causal sites by what they hold."""
    batch = trace.measured.batch
    differs = [base != donor for base, donor in zip(batch.base[row], batch.donor[row], strict=True)]
    causal = [node for position, node in enumerate(embeddings) if differs[position]]
    names = [(site.point, site.role) for site in trace.sites if site.verdict == CAUSAL]
    causal += [site_nodes[name] for name in names if name in site_nodes]
    groups: dict[str, list[str]] = {}
    for node in causal:
        if node["activation"] >= MIN_EFFECT:
            position = node["ctx_idx"]
            name = str(words[position]).strip() if differs[position] else trace.measured.pairs[row].target
            groups.setdefault(name, []).append(node["node_id"])
    return [[name, *members] for name, members in groups.items() if name]


def _links(
    sources: Sequence[Source],
    embeddings: Sequence[GraphNode],
    site_nodes: dict[tuple[str, str], GraphNode],
    output: GraphNode,
    row: int,
) -> list[dict[str, Any]]:
    """Every measured effect as a link to the output; from causal sites and exchanged tokens, also to later sites."""
    ends = [(node["node_id"], output["node_id"], node["activation"]) for node in site_nodes.values()]
    for source in sources:
        position = int(source.columns[row])
        if position < 0 or (source.point is not None and (source.point, source.role) not in site_nodes):
            continue
        node = embeddings[position] if source.point is None else site_nodes[source.point, source.role]
        if source.point is None:
            ends.append((node["node_id"], output["node_id"], float(source.effect[row])))
        for arrival in source.arrivals:
            share, later = float(arrival.shares[row]), site_nodes.get((arrival.point, arrival.role))
            if later is not None and not math.isnan(share):
                ends.append((node["node_id"], later["node_id"], share))
    return [{"source": source, "target": end, "weight": weight} for source, end, weight in ends]


def _metadata(slug: str, trace: TraceResult, words: Sequence[str], row: int) -> dict[str, Any]:
    measured = trace.measured
    pair = measured.pairs[row]
    return {
        "slug": slug,
        "scan": trace.name,
        "prompt_tokens": [shown_token(word) for word in words],
        "prompt": pair.prompt,
        "node_threshold": 1.0,  # influence is cumulative: below 1, viewers would hide all but the strongest effects
        "info": {
            "description": _ABOUT,
            "generator": {"name": "nla trace", "version": importlib.metadata.version("nla")},
        },
        "generation_settings": {
            "n_pairs": len(measured.pairs),
            "n_controls": measured.n_controls,
            "min_effect": MIN_EFFECT,
        },
        "minimal_pair": {
            "donor_prompt": pair.donor_prompt,
            "continuation": pair.continuation,
            "donor_continuation": pair.donor_continuation,
            "target": pair.target,
            "donor_target": pair.donor_target,
            "document": pair.document,
            "base_probability": float(measured.bounds.low[row]),
            "donor_probability": float(measured.bounds.high[row]),
        },
    }
