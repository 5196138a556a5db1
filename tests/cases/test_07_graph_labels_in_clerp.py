"""Case 07: a graph as it is downloaded by somebody who pinned nothing: labels in `clerp`, no supernodes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from nla.errors import ArgumentError
from nla.eval.circuits.graph_format import Graph, read_graph
from nla.eval.pair.against_graphs import GraphSettings, judge_against_graphs
from nla.eval.pair.graph_concepts import HERE, SAME, Text, tokens_and_cells
from tests.helpers.shell import Shell
from tests.helpers.tiny import make_model, make_pair, make_tokenizer

TOKENS = ["the", " cat", " sat"]
EMPTY = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
ABSENT = {"linkType": "both"}


def node(identity: str, kind: str, layer: str, position: int, feature: int, label: str = "") -> dict:
    place = {"node_id": identity, "layer": layer, "ctx_idx": position, "feature": feature, "jsNodeId": identity}
    return {**place, "feature_type": kind, "clerp": label, "influence": 0.4, "activation": 2.0}


CONTENT = {
    "metadata": {"slug": "labels", "scan": "tiny", "prompt": "the cat sat", "prompt_tokens": TOKENS},
    "nodes": [
        node("E_5_0", "embedding", "E", 0, 0, 'Token "the"'),
        node("E_6_1", "embedding", "E", 1, 1, 'Token " cat"'),
        node("E_7_2", "embedding", "E", 2, 2, 'Token " sat"'),
        node("0_11_1", "cross layer transcoder", "0", 1, 77, "cats and other felines"),
        node("1_12_2", "cross layer transcoder", "1", 2, 78, "verbs of resting"),
        node("0_13_2", "lorsa", "0", 2, 79, "previous token"),
        node("1_14_1", "lorsa", "1", 1, 80, "pets (attention)"),
        node("0_1_0", "mlp reconstruction error", "1", 0, 0, "Err: mlp of the first"),
        node("5_9_2", "logit", "5", 2, 9, 'Output " on" (p=0.500)'),
    ],
    "links": [{"source": "E_6_1", "target": "0_11_1", "weight": 1.0}],
}


def graph(view: dict, **changes: object) -> Graph:
    return Graph.parse({**copy.deepcopy(CONTENT), "qParams": view, **changes})


@pytest.mark.parametrize("view", [EMPTY, ABSENT])
def test_the_labels_of_features_are_the_concepts_at_their_tokens_and_layers(view: dict) -> None:
    labelled = graph(view)
    assert labelled.labelled and {one.name: one.words for one in labelled.supernodes} == {
        "cats and other felines": ("cats", "felines"),
        "verbs of resting": ("verbs", "resting"),
        "previous token": (),  # says where a head looks, not what is there
        "pets (attention)": ("pets", "attention"),
    }
    text = Text("the cat sat", [0, 1, 2])
    for layer, here in ((0, {(1, "cats")}), (1, {(1, "cats"), (1, "pets"), (2, "verbs")})):
        tokens, cells = tokens_and_cells([labelled], [text], layer)
        asked = {(tokens[cell.token].position, cell.concept[0], cell.kind) for cell in cells}
        assert {(position, word) for position, word, kind in asked if kind == HERE} == here
        assert all(position != 1 for position, word, kind in asked if word == "cats" and kind == SAME)


def test_names_that_somebody_gave_come_before_labels() -> None:
    named = graph({**EMPTY, "supernodes": [["felines", "0_11_1"]]})
    assert not named.labelled and [one.name for one in named.supernodes] == ["felines"]


def test_a_pair_is_judged_by_labels_and_the_report_says_so(tmp_path: Path) -> None:
    files = []
    for name, view in (("empty", EMPTY), ("absent", ABSENT)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({**CONTENT, "qParams": view}))
    report = judge_against_graphs(files, GraphSettings(make_pair(), n_samples=1))
    assert (report.n_graphs, report.n_concepts, report.labelled) == (2, 6, True)
    assert "according to labels of features" in report.to_markdown()
    assert read_graph(files[0]).supernodes == read_graph(files[1]).supernodes


def test_without_names_and_labels_the_next_step_is_said(shell: Shell, tmp_path: Path) -> None:
    bare = copy.deepcopy(CONTENT)
    for one in bare["nodes"]:
        one["clerp"] = "" if one["feature_type"] in ("cross layer transcoder", "lorsa") else one["clerp"]
    (tmp_path / "bare.json").write_text(json.dumps({**bare, "qParams": ABSENT}))
    with pytest.raises(ArgumentError, match=r"clerp.*name nodes in the viewer"):
        judge_against_graphs(tmp_path / "bare.json", GraphSettings(make_pair()))
    (tmp_path / "labels.json").write_text(json.dumps({**CONTENT, "qParams": EMPTY}))
    make_model().save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    make_pair(target=str(tmp_path / "target")).save_pretrained(tmp_path / "pair")
    done = shell.run("nla eval graph labels.json --pair pair --samples 1", tmp_path)
    assert done.code == 0 and "3 concepts that are there, according to labels of features" in done.stdout, done.stderr
    assert shell.run("nla eval graph bare.json --pair pair", tmp_path).code == 2
