"""Scoring an NLA on graphs: a truthful reader near 1, a lying one near 0, and what counts as being there."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from nla.errors import ArgumentError, ConfigError, ParseError, ShapeError, TokenizerMismatchError
from nla.eval.circuits import patching
from nla.eval.circuits.connections import connect
from nla.eval.circuits.graph_format import Graph, write_graph
from nla.eval.circuits.minimal_pairs import of_items
from nla.eval.circuits.sites import judge_sites, measure_sites
from nla.eval.circuits.trace import TraceSettings, trace
from nla.eval.circuits.trace_graphs import TraceResult, graph_of
from nla.eval.couplet_items import rhyme_items
from nla.eval.pair import against_graphs as scorer
from nla.eval.pair import graph_counterfactual as counterfactual
from nla.eval.pair.against_graphs import GraphSettings
from nla.eval.pair.graph_concepts import DONOR, HERE, OTHER, SAME, UNUSED, Text, align, names, tokens_and_cells
from nla.eval.target import Target
from tests.helpers.graph_schema import FIXTURES
from tests.helpers.planted import POINT, planted_pair, planted_target, read_code
from tests.helpers.tiny import WORDS, make_pair, make_tokenizer

TWO_HOP = json.loads((FIXTURES / "two-hop-graph.json").read_text())


def reads_all(graph: Graph) -> Text:
    return Text(graph.prompt, [-1, *range(1, len(graph.tokens))])


@pytest.fixture(scope="module")
def traced() -> list[Graph]:
    """Graphs of the planted plan, without files."""
    target = planted_target()
    measured = measure_sites(target, of_items(target, rhyme_items(8, seed=5)), n_sites=64, n_controls=1)
    judged = judge_sites(measured)
    result = TraceResult("planted", target, measured, judged, connect(target, measured, judged))
    return [graph_of(f"g-{row}", result, row) for row in range(8)]


def answers(read_tokens, cells, kinds) -> list[str]:
    """What a reader says that names the concepts of some kinds and nothing else, one sentence each."""
    return [
        " ".join(f"It is about {cell.concept[0]}." for cell in cells if cell.token == number and cell.kind in kinds)
        for number in range(len(read_tokens))
    ]


def test_a_truthful_reader_scores_1_and_a_lying_one_0(traced: list[Graph]) -> None:
    read_tokens, cells = tokens_and_cells(traced, [reads_all(graph) for graph in traced], layer=1)
    assert {cell.kind for cell in cells} == {HERE, SAME, DONOR, OTHER, UNUSED}
    true = scorer.score("truthful", read_tokens, cells, answers(read_tokens, cells, {HERE}))
    false = scorer.score("lying", read_tokens, cells, answers(read_tokens, cells, {SAME, DONOR, OTHER, UNUSED}))
    assert true.recall.value == true.recall_latent.value == true.recall_visible.value == true.precision.value == 1.0
    assert true.auroc.value == 1.0 and max(rate.value for rate in true.named.values()) == 0.0
    assert false.recall.value == false.precision.value == false.auroc.value == 0.0
    assert min(rate.value for rate in false.named.values()) == 1.0
    silent = scorer.score("silent", read_tokens, cells, [""] * len(read_tokens))
    assert silent.recall.value == 0.0 and silent.precision is None and silent.auroc.value == 0.5


def test_a_reader_of_activations_loses_all_with_shuffled_and_mean_activations(traced: list[Graph]) -> None:
    read_tokens, cells = tokens_and_cells(traced, [reads_all(graph) for graph in traced], layer=1)
    right = answers(read_tokens, cells, {HERE})

    def reader(_read_tokens, vectors) -> list[str]:
        return [right[int(value)] if value == value.round() else "" for value in vectors[:, 0]]

    vectors = torch.arange(len(read_tokens))[:, None].double()
    found = {one.reader: one for one in scorer.score_all(reader, read_tokens, cells, vectors, n_samples=2)}
    assert found[scorer.ENCODER].recall.value == 1.0
    assert found[scorer.SHUFFLED].recall_latent.value < 0.3 and found[scorer.MEAN].recall.value < 0.3
    checks = scorer._checks(list(found.values()))
    assert [check.passed for check in checks] == [True, True]


def test_the_latent_is_asked_about_where_patching_shows_no_effect_and_its_rival_where_it_does(traced) -> None:
    graph = traced[0]
    read_tokens, cells = tokens_and_cells([graph], [reads_all(graph)], layer=1)
    pair = graph.content["metadata"]["minimal_pair"]
    where = {
        kind: {(read_tokens[c.token].position, c.concept[0]) for c in cells if c.kind == kind}
        for kind in (HERE, DONOR, UNUSED)
    }
    newline = len(graph.tokens) - 1
    assert (newline, pair["target"]) in where[HERE]
    assert where[DONOR] == {(newline, pair["donor_target"])}
    assert where[UNUSED] and all(position != newline and word == pair["target"] for position, word in where[UNUSED])
    assert {cell.visible for cell in cells if cell.concept == (pair["target"],)} == {False}
    # Before the planted block the newline does not hold the plan: the latent is not there to be named.
    _, earlier = tokens_and_cells([graph], [reads_all(graph)], layer=0)
    assert not any(cell.kind == HERE and cell.concept == (pair["target"],) for cell in earlier)


def test_supernodes_count_from_their_layer_on_at_their_token() -> None:
    graph = Graph.parse(TWO_HOP)

    def asked(layer: int, position: int, kind: str) -> set[str]:
        read_tokens, cells = tokens_and_cells([graph], [reads_all(graph)], layer)
        return {c.concept[0] for c in cells if c.kind == kind and read_tokens[c.token].position == position}

    assert asked(10, 9, HERE) == {"dallas"} and asked(20, 9, HERE) == {"dallas", "texas"}
    assert asked(20, 10, HERE) == {"texas", "capital", "austin"} and asked(17, 10, HERE) == {"texas"}
    # At a token, what is there at deeper layers only is not asked about; what is at other tokens must not be named.
    assert asked(10, 9, SAME) == {"capital", "austin"} and asked(17, 10, SAME) == {"dallas"}


def test_distractors_of_other_graphs_are_as_frequent_and_not_of_this_graph_or_text() -> None:
    def other(name: str) -> Graph:
        content = copy.deepcopy(TWO_HOP)
        content["qParams"]["supernodes"] = [[name, "14_2268_9"]]
        return Graph.parse(content)

    group = [
        Graph.parse(TWO_HOP),
        *map(other, [*["often"] * 3, *["oft"] * 3, "rare", "seldom", "scarce"]),
    ]
    read_tokens, cells = tokens_and_cells(group, [reads_all(graph) for graph in group], layer=20)
    first = [cell for cell in cells if read_tokens[cell.token].graph == 0 and cell.kind == OTHER]
    assert {cell.concept for cell in first} == {("rare",), ("seldom",), ("scarce",)}
    of_often = [cell.concept for cell in cells if read_tokens[cell.token].graph == 1 and cell.kind == OTHER]
    assert ("oft",) in of_often and len(of_often) == 3 and not {("often",), ("capital",), ("dallas",)} & {*of_often}


def test_a_word_that_the_text_holds_in_several_tokens_or_as_a_plural_is_visible() -> None:
    content = copy.deepcopy(TWO_HOP)
    content["metadata"]["prompt_tokens"][8:10] = [" Dal", "las"]
    content["qParams"]["supernodes"] = [["Dallas", "14_2268_9"], ["facts", "6_4012_9"], ["Texas", "0_7_9"]]
    graph = Graph.parse(content)
    _, cells = tokens_and_cells([graph], [reads_all(graph)], 20)
    assert [(c.concept[0], c.visible) for c in cells] == [("dallas", True), ("facts", True), ("texas", False)]


def test_intervals_resample_documents_and_graphs_of_one_are_one(traced: list[Graph]) -> None:
    def same(graph: Graph) -> Graph:
        content = copy.deepcopy(graph.content)
        content["metadata"]["minimal_pair"]["document"] = 7
        return Graph.parse(content)

    def scored(group: list[Graph]) -> scorer.GraphScore:
        read_tokens, cells = tokens_and_cells(group, [reads_all(graph) for graph in group], layer=1)
        texts = answers(read_tokens, cells, {HERE})
        return scorer.score("half", read_tokens, cells, [text if i % 3 else "" for i, text in enumerate(texts)])

    apart, together = scored(traced), scored([same(graph) for graph in traced])
    assert apart.recall.n == 8 and apart.recall.low < apart.recall.value < apart.recall.high
    assert together.recall.n == 1 and together.recall.low != together.recall.low
    assert together.auroc.low != together.auroc.low
    twice = [Graph.parse(TWO_HOP)] * 2
    read_tokens, _ = tokens_and_cells(twice, [reads_all(graph) for graph in twice], layer=20)
    assert {token.graph for token in read_tokens} == {0, 1} and {token.document for token in read_tokens} == {0}


def test_documents_without_a_checkable_claim_do_not_narrow_the_precision(traced: list[Graph]) -> None:
    read_tokens, cells = tokens_and_cells(traced, [reads_all(graph) for graph in traced], layer=1)
    texts = [
        text if token.graph < 2 else ""
        for text, token in zip(answers(read_tokens, cells, {HERE}), read_tokens, strict=True)
    ]
    found = scorer.score("of two", read_tokens, cells, texts).precision
    assert (found.value, found.n) == (1.0, 2) and found.low < 0.5


def test_a_word_is_named_whole_in_any_case_with_or_without_a_plural() -> None:
    assert names("Rhymes with CATS.", ("cat",)) and names("the Texas rangers", ("austin", "texas"))
    assert not names("a category, concatenated", ("cat",)) and not names("", ("cat",)) and not names("cat", ())


def small_graph(tokens: list[str], prompt: str) -> Graph:
    content = copy.deepcopy(TWO_HOP)
    content["metadata"] |= {"prompt_tokens": tokens, "prompt": prompt}
    node = {**content["nodes"][0], "node_id": "0_5_1", "ctx_idx": 1}
    content |= {"nodes": [node], "links": [], "qParams": {"supernodes": [["cat", "0_5_1"]]}}
    return Graph.parse(content)


def test_tokens_are_matched_with_or_without_a_first_token_and_otherwise_refused() -> None:
    tokenizer, prompt = make_tokenizer(), "the cat sat.\n"
    tokens = ["the", " cat", " sat", ".", "⏎"]
    assert align(small_graph(tokens, prompt), tokenizer, 64).columns == [0, 1, 2, 3, 4]
    assert align(small_graph([*tokens[:4], "\n"], prompt), tokenizer, 64).columns == [0, 1, 2, 3, 4]
    assert align(small_graph(["<bos>", *tokens], prompt), tokenizer, 64).columns == [-1, 0, 1, 2, 3, 4]
    for wrong in (tokens[:4], [*tokens, "x"], ["the", " dog", *tokens[2:]], ["the", *tokens], tokens[1:]):
        with pytest.raises(TokenizerMismatchError, match="two-hop-excerpt"):
            align(small_graph(wrong, prompt), tokenizer, 64)


def test_a_pair_is_scored_on_files_and_other_models_graphs_are_refused(tmp_path) -> None:
    for number, prompt in enumerate(["the cat sat.\n", "a cat ran.\n"]):
        first, *rest = prompt.split()
        tokens = [first, *(f" {word}" for word in rest[:-1]), f" {rest[-1][:-1]}", ".", "⏎"]
        write_graph(small_graph(tokens, prompt), tmp_path / f"{number}.json")
    files, pair = sorted(tmp_path.glob("*.json")), make_pair()
    report = scorer.judge_against_graphs(files, GraphSettings(pair, n_samples=2))
    report.save(tmp_path / "out")
    assert (report.n_graphs, report.n_tokens, report.n_concepts, report.measured) == (2, 2, 2, False)
    assert json.loads((tmp_path / "out" / "graph.json").read_text())["scores"][0]["reader"] == scorer.ENCODER
    assert (tmp_path / "out" / "graph.png").exists() and "according to supernodes" in report.to_markdown()
    with pytest.raises(TokenizerMismatchError):
        scorer.judge_against_graphs(_renamed(tmp_path), GraphSettings(pair))
    with pytest.raises(ArgumentError):
        scorer.judge_against_graphs([files[0], files[0]], GraphSettings(pair))
    with pytest.raises(ArgumentError):
        scorer.judge_against_graphs([], GraphSettings(pair))
    with pytest.raises(ParseError):
        scorer.judge_against_graphs(FIXTURES / "neuronpedia-graph-schema.json", GraphSettings(pair))


def _renamed(folder):
    path = folder / "other.json"
    write_graph(small_graph(["the", " c", "at", " sat", ".", "⏎"], "the cat sat.\n"), path)
    return path


def test_graphs_without_a_concept_in_reach_and_wrong_numbers_of_texts_are_refused(tmp_path, traced) -> None:
    content = small_graph(["the", " cat", " sat", ".", "⏎"], "the cat sat.\n").content
    content["qParams"] = {}
    write_graph(Graph.parse(content), tmp_path / "bare.json")
    with pytest.raises(ArgumentError, match="without a named concept"):
        scorer.judge_against_graphs(tmp_path / "bare.json", GraphSettings(make_pair()))
    read_tokens, cells = tokens_and_cells(traced, [reads_all(graph) for graph in traced], layer=1)
    with pytest.raises(ShapeError):
        scorer.score("x", read_tokens, cells, [])


def test_a_trace_of_any_model_is_scored_end_to_end(tmp_path) -> None:
    pair = make_pair()
    target, prompt = Target.of(pair), "the cat sat on the mat"
    words = [f" {word}" for word in WORDS if word.islower()]
    choices = [(f"the dog ran under the{end}", word) for end in words for word in words]
    batch = patching.encode(target, [prompt] * len(choices), *map(list, zip(*choices, strict=True)))
    gain = patching.scale(target, batch)
    donor, word = choices[int((gain.high - gain.low).argmax())]
    trace(target, TraceSettings(None, prompt, donor, " is", word, n_controls=2, graphs=tmp_path))
    report = scorer.judge_against_graphs(sorted(tmp_path.glob("*.json")), GraphSettings(pair, n_samples=1))
    assert report.measured and report.n_concepts >= 1


# ------------------------------------------------------------------------------------------------- counterfactuals


def follow(traced: list[Graph], monkeypatch, reader) -> counterfactual.GraphCounterfactual | None:
    """What an untrained pair's place in the planted target gives, read by a reader of ours."""
    nla = planted_pair()
    monkeypatch.setattr(counterfactual, "explain", lambda nla, vectors, seed: reader(vectors))
    texts = [align(graph, nla.tokenizer, None) for graph in traced]
    return counterfactual.follow_patches(nla, traced, texts)


def test_a_perfect_reader_follows_a_patched_plan_and_a_reader_of_the_text_does_not(traced, monkeypatch) -> None:
    found = follow(traced, monkeypatch, read_code)
    assert found.n_graphs == 8
    # The only causal site is the pair's own: reading it would repeat the donor, so one block deeper is read.
    assert found.places == {f"{POINT}, read at resid_post.2 at the same token": 8}
    assert found.donor.value == found.unpatched.value == 1.0
    assert found.base.value == found.text.value == 0.0 and found.random.value <= 0.25
    assert found.arrived.value > 0.8 and found.effect.value > 0.95


def test_a_reader_that_says_what_the_text_says_does_not_follow_a_patch(traced, monkeypatch) -> None:
    own = [f"The next line ends with {graph.content['metadata']['minimal_pair']['target']}." for graph in traced]
    found = follow(traced, monkeypatch, lambda vectors: own)
    assert found.unpatched.value == found.base.value == 1.0 and found.donor.value == 0.0
    checks = scorer._checks([scorer.GraphScore("encoder", *[found.donor] * 3, {}, None, None, [])], found)
    assert checks[-1].passed is False and "patched upstream" in checks[-1].name


def test_an_earlier_token_is_patched_before_a_lower_block_and_what_has_no_effect_is_not(traced, monkeypatch) -> None:
    moved = []
    for graph in traced:
        content = copy.deepcopy(graph.content)
        plan = next(
            node for node in content["nodes"] if node["feature_type"] == "causal site" and node["activation"] > 0.9
        )
        early = next(
            node for node in content["nodes"] if node["feature_type"] == "causal site" and node["layer"] == "0"
        )
        early["activation"] = 0.5
        named = next(group for group in content["qParams"]["supernodes"] if plan["node_id"] in group)
        named.append(early["node_id"])
        moved.append(Graph.parse(content))
    found = follow(moved, monkeypatch, read_code)
    assert found.places == {f"resid_post.0, read at {POINT} at a later token": 8} and found.donor.value == 0.0
    for graph in moved:
        for node in graph.content["nodes"]:
            node["activation"] = min(node.get("activation") or 0.0, 0.2)
    assert follow([Graph.parse(graph.content) for graph in moved], monkeypatch, read_code) is None
    assert follow([Graph.parse(TWO_HOP)][:0], monkeypatch, read_code) is None


def test_a_trace_with_a_pair_explains_what_it_found_and_refuses_a_pair_of_another_target(monkeypatch) -> None:
    pair = planted_pair()
    for place in (counterfactual, scorer):
        monkeypatch.setattr(place, "explain", lambda nla, vectors, seed: read_code(vectors))
    pairs = of_items(planted_target(), rhyme_items(4, seed=5))
    report = trace(planted_target(), TraceSettings(pairs, n_controls=2, pair=pair, n_samples=1))
    assert report.explanations.counterfactual.donor.value == 1.0
    readers = {one.reader: one for one in report.explanations.scores}
    assert readers[scorer.ENCODER].recall_latent.value == readers[scorer.TEXT].recall_latent.value == 1.0
    assert [one.name for one in report.checks[-3:]] == [one.name for one in report.explanations.checks]
    assert "text-only LM" in report.to_markdown() and "patched upstream" in report.to_markdown()
    other = planted_target()
    next(other.model.parameters()).data.mul_(2)
    with pytest.raises(ConfigError, match="whose weights differ"):
        trace(other, TraceSettings(pairs, pair=pair))
