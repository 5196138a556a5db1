"""A trace as attribution graphs: one for each pair, in the JSON that circuit-tracer writes and Neuronpedia shows.

Every measured site is a node of type "causal site" (``activation`` is its effect E in this pair), every token of the
prompt an embedding, the donor's continuation the output. Links to the output carry E; links between sites, how much of
the donor's difference arrives. Supernodes name what causal places hold: at a token that differs between the prompts
its own word, elsewhere the word of the latent.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nla.errors import ArgumentError
from nla.eval.circuits import graphs
from nla.eval.circuits.gate import MIN_EFFECT
from nla.eval.circuits.graphs import CAUSAL_SITE, EMBEDDING, LOGIT, Graph
from nla.eval.circuits.sites import CAUSAL, Measured, Site, Source
from nla.eval.report import to_json
from nla.eval.target import Target
from nla.models.points import Point


def save_graphs(
    folder: str | Path, name: str, target: Target, found: Measured, sites: Sequence[Site], sources: Sequence[Source]
) -> list[Path]:
    """Write the graph of every pair as ``NAME-000.json``, ``NAME-001.json``, …

    Raises:
        ArgumentError: the folder holds graphs of an earlier, larger trace, which would be taken for this one's.
        StorageError: the folder cannot be written or the disk is full.
    """
    paths = graph_paths(folder, name, len(found.pairs))
    for row, path in enumerate(paths):
        graphs.write(graph_of(path.stem, name, target, found, sites, sources, row), path)
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


def graph_of(
    slug: str,
    name: str,
    target: Target,
    found: Measured,
    sites: Sequence[Site],
    sources: Sequence[Source],
    row: int,
) -> Graph:
    """The graph of one pair of a trace."""
    ids = found.batch.base[row]
    words = [target.tokenizer.decode([token]) for token in ids]
    swapped = {int(one.columns[row]): float(one.effect[row]) for one in sources if one.point is None}
    embeddings = [_embedding(i, token, words[i], swapped.get(i, 0.0)) for i, token in enumerate(ids)]
    measured = _site_nodes(found, sites, words, row)
    output = _output(target, found, row)
    nodes = [*embeddings, *measured.values()]
    _set_influence(nodes)
    groups = _supernodes(found, sites, embeddings, measured, words, row)
    content = {
        "metadata": _metadata(slug, name, words, found, row),
        "qParams": {
            "pinnedIds": [*dict.fromkeys(member for _, *members in groups for member in members), output["node_id"]],
            "supernodes": groups,
            "linkType": "both",
            "clickedId": output["node_id"],
            "sg_pos": "",
        },
        "nodes": [*nodes, output],
        "links": _links(found, sources, embeddings, measured, output, row),
    }
    return Graph.parse(to_json(content), slug)


def _embedding(position: int, token: int, word: str, effect: float) -> dict[str, Any]:
    return {
        "node_id": f"E_{token}_{position}",
        "feature": position,
        "layer": "E",
        "ctx_idx": position,
        "feature_type": EMBEDDING,
        "jsNodeId": f"E_{token}-{position}",
        "clerp": f'Token "{graphs.shown_token(word)}"',
        "activation": effect,
    }


def _site_nodes(
    found: Measured, sites: Sequence[Site], words: Sequence[str], row: int
) -> dict[tuple[str, str], dict[str, Any]]:
    """The measured sites of a pair, by point and role; of two roles at one token, the first."""
    nodes: dict[tuple[str, str], dict[str, Any]] = {}
    taken: set[str] = set()
    for number, site in enumerate(sites):
        point, role = divmod(number, len(found.roles))
        position, effect = int(found.columns[row, role]), float(found.sweep.effect[row, point, role])
        identity = f"{Point.parse(site.point).layer}_0_{position}"
        if position < 0 or math.isnan(effect) or identity in taken:
            continue
        taken.add(identity)
        nodes[site.point, site.role] = {
            "node_id": identity,
            "feature": 0,
            "layer": str(Point.parse(site.point).layer),
            "ctx_idx": position,
            "feature_type": CAUSAL_SITE,
            "jsNodeId": f"{identity.rsplit('_', 1)[0]}-{position}",
            "clerp": f'{site.point} at "{graphs.shown_token(words[position])}": effect {effect:.3f}',
            "activation": effect,
            "causal_site": {**to_json(site), "controls": found.sweep.controls[row, point, role].tolist()},
        }
    return nodes


def _output(target: Target, found: Measured, row: int) -> dict[str, Any]:
    pair, last, m = found.pairs[row], len(found.batch.base[row]) - 1, float(found.bounds.low[row])
    layer, token = len(target.points) + 1, found.batch.wanted[row][0]
    # Viewers read the probability out of the label, from between "(p=" and ")".
    label = graphs.shown_token(pair.donor_continuation).replace("(p=", "(p =")
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


def _set_influence(nodes: Sequence[dict[str, Any]]) -> None:
    """Cumulative share of all effects: the strongest has the lowest; what has no effect, 1."""
    total, reached = sum(abs(node["activation"]) for node in nodes), 0.0
    for node in sorted(nodes, key=lambda node: -abs(node["activation"])):
        reached += abs(node["activation"])
        node["influence"] = min(1.0, reached / total) if total and node["activation"] else 1.0


def _supernodes(
    found: Measured,
    sites: Sequence[Site],
    embeddings: Sequence[dict[str, Any]],
    measured: dict[tuple[str, str], dict[str, Any]],
    words: Sequence[str],
    row: int,
) -> list[list[str]]:
    """Causal places by what they hold."""
    differs = [a != b for a, b in zip(found.batch.base[row], found.batch.donor[row], strict=True)]
    causal = [node for position, node in enumerate(embeddings) if differs[position]]
    causal += [
        measured[site.point, site.role]
        for site in sites
        if site.verdict == CAUSAL and (site.point, site.role) in measured
    ]
    groups: dict[str, list[str]] = {}
    for node in causal:
        if node["activation"] >= MIN_EFFECT:
            position = node["ctx_idx"]
            name = str(words[position]).strip() if differs[position] else found.pairs[row].target
            groups.setdefault(name, []).append(node["node_id"])
    return [[name, *members] for name, members in groups.items() if name]


def _links(
    found: Measured,
    sources: Sequence[Source],
    embeddings: Sequence[dict[str, Any]],
    measured: dict[tuple[str, str], dict[str, Any]],
    output: dict[str, Any],
    row: int,
) -> list[dict[str, Any]]:
    """Every measured effect as a link to the output; from causal sites and exchanged tokens, also to later sites."""
    ends = [(node["node_id"], output["node_id"], node["activation"]) for node in measured.values()]
    for source in sources:
        position = int(source.columns[row])
        if position < 0 or (source.point is not None and (source.point, source.role) not in measured):
            continue
        node = embeddings[position] if source.point is None else measured[source.point, source.role]
        if source.point is None:
            ends.append((node["node_id"], output["node_id"], float(source.effect[row])))
        for arrival in source.arrivals:
            share, later = float(arrival.values[row]), measured.get((arrival.point, arrival.role))
            if later is not None and not math.isnan(share):
                ends.append((node["node_id"], later["node_id"], share))
    return [{"source": source, "target": end, "weight": weight} for source, end, weight in ends]


def _metadata(slug: str, name: str, words: Sequence[str], found: Measured, row: int) -> dict[str, Any]:
    pair = found.pairs[row]
    about = (
        "Residual patching on a minimal pair: weights of links to the output, and activations, are effects (0 none, 1 "
        "the donor's own behaviour); weights of other links, how much of the donor's difference arrives."
    )
    return {
        "slug": slug,
        "scan": name,
        "prompt_tokens": [graphs.shown_token(word) for word in words],
        "prompt": pair.prompt,
        "node_threshold": 1.0,  # influence is cumulative: below 1, viewers would hide all but the strongest effects
        "info": {
            "description": about,
            "generator": {"name": "nla trace", "version": importlib.metadata.version("nla")},
        },
        "generation_settings": {
            "n_pairs": len(found.pairs),
            "n_controls": found.sweep.controls.shape[-1],
            "min_effect": MIN_EFFECT,
        },
        "minimal_pair": {
            "donor_prompt": pair.donor_prompt,
            "continuation": pair.continuation,
            "donor_continuation": pair.donor_continuation,
            "target": pair.target,
            "donor_target": pair.donor_target,
            "document": pair.document,
            "base_probability": float(found.bounds.low[row]),
            "donor_probability": float(found.bounds.high[row]),
        },
    }
