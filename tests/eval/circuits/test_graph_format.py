"""Attribution-graph JSON: the traps of the format, the published schema, round trips and malformed files."""

from __future__ import annotations

import copy
import json
import random

import pytest

from nla.errors import NLAError, ParseError
from nla.eval.circuits import graph_format
from nla.eval.circuits.graph_format import Graph, concept_words, read_graph, write_graph
from nla.eval.pair.graph_concepts import Text, align, tokens_and_cells
from tests.helpers.graph_schema import FIXTURES, PUBLISHED, complaints
from tests.helpers.tiny import make_tokenizer

TWO_HOP = FIXTURES / "two-hop-graph.json"
CONTENT = json.loads(TWO_HOP.read_text())


@pytest.fixture
def content() -> dict:
    return copy.deepcopy(CONTENT)


def node_of(graph: Graph, identity: str, kind: str):
    return next(node for node in graph.nodes if (node.id, node.kind) == (identity, kind))


def test_an_error_node_that_shares_its_id_with_a_feature_of_layer_0_is_told_apart() -> None:
    graph = read_graph(TWO_HOP)
    feature = node_of(graph, "0_7_9", "cross layer transcoder")
    error = node_of(graph, "0_7_9", "mlp reconstruction error")
    assert (feature.layer, feature.position, feature.feature) == (0, 9, 7)
    assert (error.layer, error.position, error.feature, error.is_error) == (7, 9, None, True)
    dallas = graph.supernodes[0]
    assert dallas.members[0] is feature
    backwards = Graph.parse({**CONTENT, "nodes": CONTENT["nodes"][::-1]})
    assert not backwards.supernodes[0].members[0].is_error


def test_an_embedding_has_its_vocabulary_id_from_its_node_id_and_stands_before_block_0() -> None:
    node = node_of(read_graph(TWO_HOP), "E_26865_9", "embedding")
    assert (node.feature, node.position, node.layer) == (26865, 9, graph_format.EMBEDDING_LAYER)


def test_a_feature_is_parsed_from_its_node_id_since_feature_mixes_in_the_layer() -> None:
    raw = next(node for node in CONTENT["nodes"] if node["node_id"] == "14_2268_9")
    assert raw["feature"] != 2268
    assert node_of(read_graph(TWO_HOP), "14_2268_9", "cross layer transcoder").feature == 2268


def test_influence_is_kept_as_the_file_has_it() -> None:
    graph = read_graph(TWO_HOP)
    strong, weak = (node_of(graph, name, "cross layer transcoder") for name in ("20_15589_10", "3_88_4"))
    assert (strong.influence, weak.influence) == (0.2, 0.75)


def test_a_supernode_answers_at_its_tokens_from_the_layers_of_its_nodes_on() -> None:
    texas = read_graph(TWO_HOP).supernodes[1]
    assert texas.words == ("texas",)
    assert [len(texas.at(9, layer)) for layer in (13, 14, 20)] == [0, 1, 1]
    assert [len(texas.at(10, layer)) for layer in (14, 16)] == [0, 1] and texas.at(8, 26) == []


def test_members_may_be_named_by_what_the_viewer_calls_them(content: dict) -> None:
    content["qParams"]["supernodes"] = [["Austin", "20_15589-0"]]
    assert Graph.parse(content).supernodes[0].members[0].id == "20_15589_10"
    # circuit-tracer gives a feature the same jsNodeId at every token: such a name says nothing of the token.
    content["nodes"].append({**content["nodes"][5], "node_id": "20_15589_9", "ctx_idx": 9})
    with pytest.raises(ParseError, match=r"supernodes\[0\]\[1\]"):
        Graph.parse(content)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ('say "Austin"', ("austin",)),
        ("Texas", ("texas",)),
        ("EU/European", ("eu", "european")),
        ("the", ("the",)),
        ("say a capital", ("capital",)),
        ("", ()),
        ("Москва (city)", ("москва", "city")),
    ],
)
def test_labels_come_from_the_names_of_supernodes(name: str, words: tuple) -> None:
    assert concept_words(name) == words


def test_reading_writing_and_reading_again_keeps_everything(tmp_path, content: dict) -> None:
    content["new_key"] = {"of": ["another", "tool", None, 1.5]}
    content["nodes"][0]["extra"], content["metadata"]["schema_version"] = "kept ⏎ é", 1
    (tmp_path / "a.json").write_text(json.dumps(content))
    first = read_graph(tmp_path / "a.json")
    write_graph(first, tmp_path / "b.json")
    assert read_graph(tmp_path / "b.json") == first
    assert json.loads((tmp_path / "b.json").read_text()) == content


def test_the_examples_of_the_published_schema_parse() -> None:
    def example(schema: dict):
        if schema.get("type") == "object":
            return {name: example(part) for name, part in schema["properties"].items() if name in schema["required"]}
        return schema["items"]["examples"] if schema.get("type") == "array" else schema["examples"][0]

    parts = PUBLISHED["properties"]
    kinds = parts["nodes"]["items"]["properties"]["feature_type"]["examples"]
    node, link = (example({**parts[name]["items"]}) for name in ("nodes", "links"))
    token = {**node, "node_id": link["source"], "layer": "E", "ctx_idx": 0, "feature_type": "embedding"}
    content = {
        "metadata": example(parts["metadata"]),
        "qParams": {"supernodes": [["cat", node["node_id"]]], "linkType": "both"},
        "nodes": [token, node, {**node, "feature_type": kinds[1]}],
        "links": [link],
    }
    assert complaints(content) == []
    assert Graph.parse(content).supernodes[0].members[0].feature == 253
    layers = parts["nodes"]["items"]["properties"]["layer"]["examples"]
    assert [
        Graph.parse({**content, "nodes": [token, {**node, "layer": layer}]}).nodes[1].layer for layer in layers
    ] == [
        0,
        1,
    ]


def test_the_fixture_fits_the_published_schema_and_a_broken_one_does_not(content: dict) -> None:
    assert complaints(content) == []
    content["nodes"][3]["ctx_idx"] = "10"
    del content["metadata"]["slug"]
    assert len(complaints(content)) == 2


def broken(path: str, value):
    return pytest.param(path, value, id=f"{path}={str(value)[:20]}")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        broken("metadata", None),
        broken("metadata.prompt_tokens", "Fact"),
        broken("metadata.prompt_tokens.3", 7),
        broken("metadata.prompt", ["Fact"]),
        broken("metadata.slug", "\ud800"),
        broken("qParams", []),
        broken("qParams.supernodes", "Texas"),
        broken("qParams.supernodes.1", []),
        broken("qParams.supernodes.1.2", "16_26_10"),
        broken("qParams.supernodes.1.0", 5),
        broken("nodes", {}),
        broken("nodes.2", "14_2268_9"),
        broken("nodes.2.node_id", 14),
        broken("nodes.2.node_id", "14_2268_8"),
        broken("nodes.2.node_id", "6_4012_9"),
        broken("nodes.2.ctx_idx", 11),
        broken("nodes.2.ctx_idx", -1),
        broken("nodes.2.ctx_idx", True),
        broken("nodes.2.ctx_idx", 9.0),
        broken("nodes.2.layer", "E"),
        broken("nodes.2.layer", "-1"),
        broken("nodes.2.layer", 1.5),
        broken("nodes.2.feature", "2268"),
        broken("nodes.2.feature_type", None),
        broken("nodes.2.clerp", None),
        broken("nodes.2.influence", float("nan")),
        broken("nodes.2.influence", "0.3"),
        broken("nodes.2.activation", 10**400),
        broken("nodes.9.node_id", "E_9"),
        broken("links.0", ["E_26865_9", "0_7_9", 1.0]),
        broken("links.0.source", "E_1_1"),
        broken("links.0.target", None),
        broken("links.0.weight", "much"),
        broken("links.0.weight", float("inf")),
    ],
)
def test_a_wrong_value_is_refused_and_its_place_named(content: dict, path: str, value) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = content
    for part in parents:
        place = place[part]
    place[last] = value
    with pytest.raises(ParseError) as error:
        Graph.parse(content, "file.json")
    named = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in [*parents, last]).lstrip(".")
    assert f"file.json: {named}" in str(error.value)


@pytest.mark.parametrize("key", ["metadata", "qParams", "nodes", "links"])
def test_a_missing_part_is_refused_by_name(content: dict, key: str) -> None:
    del content[key]
    with pytest.raises(ParseError, match=key):
        Graph.parse(content)


def test_files_that_are_cut_huge_deep_or_no_json_are_refused(tmp_path, monkeypatch) -> None:
    path, text = tmp_path / "graph.json", TWO_HOP.read_text()
    bad = [text[:size] for size in range(0, len(text) - 2, 97)]
    bad += [text.replace("0.31", value, 1) for value in ("NaN", "Infinity", "-Infinity", "1e999", "0x1", "")]
    bad += ["[" * 100_000, "null", "[]", '"text"', "{}", "\x00", "9" * 5000]
    for content in bad:
        path.write_text(content)
        with pytest.raises(ParseError, match=r"graph\.json"):
            read_graph(path)
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(ParseError):
        read_graph(path)
    with pytest.raises(ParseError):
        read_graph(tmp_path)
    monkeypatch.setattr(graph_format, "MAX_BYTES", 1 << 12)
    path.write_text(text)
    with pytest.raises(ParseError, match="MiB"):
        read_graph(path)


def test_a_thousand_random_mutations_parse_or_are_refused() -> None:
    rng, n_refused = random.Random(0), 0
    values = [None, True, -1, 0, 10**30, 1.5, "", "E", "0_7_9", "\ud800", [], {}, [[]], ["x", "y"], {"node_id": 3}]
    for _ in range(1000):
        content = copy.deepcopy(CONTENT)
        for _ in range(rng.randint(1, 3)):
            place = content
            while isinstance(place, dict | list) and place:
                key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
                if rng.random() < 0.4 or not isinstance(place[key], dict | list):
                    place[key] = rng.choice(values)
                    break
                place = place[key]
        try:
            Graph.parse(content)
        except ParseError as error:
            n_refused += 1
            assert len(str(error)) < 600
    assert 300 < n_refused < 1000


def test_control_characters_of_a_file_do_not_reach_the_message(content: dict) -> None:
    content["links"][0]["source"] = "\x1b[31mred"
    with pytest.raises(ParseError) as error:
        Graph.parse(content, "\x1b[2J.json")
    assert "\x1b" not in str(error.value)


def hostile_file(rng: random.Random) -> bytes:
    """A graph file that somebody, or a bad transfer, has spoilt: in its bytes, its JSON or its values."""
    content = copy.deepcopy(CONTENT)
    nodes, links, view = content["nodes"], content["links"], content["qParams"]
    node = rng.choice(nodes)
    spoil = rng.choice(
        [
            lambda: node.update({rng.choice(list(node)): rng.choice(ODD)}),
            lambda: rng.choice(links).update({rng.choice(["source", "target", "weight"]): rng.choice(ODD)}),
            lambda: content["metadata"].update({rng.choice(list(content["metadata"])): rng.choice(ODD)}),
            lambda: content.update({rng.choice(list(content)): rng.choice(ODD)}),
            lambda: view.update(supernodes=rng.choice([ODD, [ODD], [[one] for one in ODD], [["a", *ODD]]])),
            lambda: view.update(supernodes=[[f"n{i}", nodes[2]["node_id"]] for i in range(20_000)]),
            lambda: (view.update(supernodes=[]), [one.update(clerp=f"label {i} " * 50) for i, one in enumerate(nodes)]),
            lambda: nodes.extend([dict(node)] * rng.choice([1, 5_000])),
            lambda: content["metadata"].update(prompt_tokens=["a"] * 50_000, prompt="a" * 50_000),
            lambda: content["metadata"].update(minimal_pair=rng.choice(ODD), generation_settings=rng.choice(ODD)),
        ]
    )
    for _ in range(rng.randint(0, 2)):
        spoil()
    written = json.dumps(content).encode()
    cut = rng.randrange(len(written))
    changes = [
        lambda: written,
        lambda: written[:cut],
        lambda: written[:cut] + rng.randbytes(rng.randint(1, 9)) + written[cut + 1 :],
        lambda: written.replace(b"0.", rng.choice([b"9" * 5000, b"1e999", b"NaN", b"-Infinity"]), 1),
        lambda: written.replace(b"[", b"[" * 100_000, 1),
        lambda: written.replace(b'"clerp"', b'"a":' + b'{"a":' * 50_000 + b'1,"clerp"', 1),
        lambda: written + rng.randbytes(40),
        lambda: written.decode().encode("utf-16"),
        lambda: rng.randbytes(2_000),
        lambda: written.replace(
            b'"ctx_idx": 9', b'"ctx_idx": ' + rng.choice([b"-9", b"9e0", b"99999999999999999999"]), 1
        ),
    ]
    return rng.choice(changes)()


ODD = [
    None,
    True,
    -1,
    10**400,
    1.5,
    "",
    "\ud800",
    "\x1b[2J\u202e",
    "a" * 100_000,
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    "0_7_9",
]


def test_300_spoilt_files_are_read_or_refused_in_a_sentence(tmp_path) -> None:
    rng, n_refused, tokenizer = random.Random(7), 0, make_tokenizer()
    for _ in range(300):
        (tmp_path / "graph.json").write_bytes(hostile_file(rng))
        try:
            graph = read_graph(tmp_path / "graph.json")
            tokens_and_cells([graph], [Text(graph.prompt, list(range(len(graph.tokens))))], layer=20)
        except ParseError as error:
            n_refused += 1
            said = str(error)
        else:
            with pytest.raises(NLAError) as refused:  # the words of these prompts are not the tiny tokenizer's
                align(graph, tokenizer, None)
            said = str(refused.value)
        assert len(said) < 1500 and said.isprintable(), said[:300]
    assert 150 < n_refused < 300
