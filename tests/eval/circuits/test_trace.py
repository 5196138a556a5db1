"""The patching engine against independent oracles, and traces of targets in which the causal place is planted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import scipy.stats
import torch

from nla.errors import ArgumentError, ContextLengthError, ParseError, PositionError, ShapeError
from nla.eval.circuits import patching, sites
from nla.eval.circuits import trace as trace_command
from nla.eval.circuits.graph_format import read_graph
from nla.eval.circuits.minimal_pairs import MinimalPair, encode_pairs, of_items, read_pairs, role_columns
from nla.eval.circuits.organism_pairs import PlantedSite
from nla.eval.circuits.trace import TraceSettings, trace
from nla.eval.couplet_items import rhyme_items
from nla.eval.target import Patch, Target
from nla.models.points import Point
from nla.organisms import target_folder
from nla.text.tokens import encode_batch, load_tokenizer
from tests.helpers.graph_schema import complaints
from tests.helpers.planted import POINT, planted_target
from tests.helpers.tiny import ARCHITECTURES, make_model, make_tokenizer

PROMPTS = ["the cat sat on the mat", "the dog sat on the mat", "so a red cat ran under the tree and sat"]
DONORS = ["the dog sat on the mat", "the cat ran on the mat", "so a red dog ran under the mat and sat"]
TAILS = [" here.", " there", " on the tree."]
POINTS = [f"resid_post.{layer}" for layer in range(4)]


def tiny(architecture: str = "qwen2") -> Target:
    return Target(make_model(architecture), make_tokenizer(), Point.parse("resid_post.1"))


def by_hand(target: Target, head: list[int], tail: list[int], layer: int = -1, column: int = 0, vector=None) -> float:
    """log m of one row alone, from all logits, with a patch by a hook of its own."""

    def put(module, args, output):
        output = (output[0] if isinstance(output, tuple) else output).clone()
        output[0, column] = vector
        return output

    handle = target.model.model.layers[layer].register_forward_hook(put) if vector is not None else None
    with torch.no_grad():
        logits = target.model(torch.tensor([head + tail])).logits[0].double().log_softmax(-1)
    if handle is not None:
        handle.remove()
    return sum(float(logits[len(head) - 1 + i, token]) for i, token in enumerate(tail))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probabilities_of_a_ragged_batch_are_those_of_each_row_alone(architecture: str) -> None:
    target = tiny(architecture)
    batch = patching.encode(target, PROMPTS, DONORS, TAILS)
    found = patching.log_probabilities(target, batch.base, batch.wanted)
    expected = [by_hand(target, head, tail) for head, tail in zip(batch.base, batch.wanted, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sweep_patches_any_token_as_a_hook_of_ones_own_does(architecture: str) -> None:
    target = tiny(architecture)
    batch = patching.encode(target, PROMPTS, DONORS, TAILS)
    columns = torch.tensor([[1, 3], [2, -1], [3, 9]])
    base, donor = (patching.read_sites(target, ids, POINTS, columns) for ids in (batch.base, batch.donor))
    with torch.no_grad():
        states = target.model(torch.tensor([batch.donor[2]]), output_hidden_states=True).hidden_states
    assert torch.allclose(donor[2, 1, 0], states[2][0, 3], atol=1e-4)
    sweep = patching.sweep(target, batch, POINTS, columns, (base, donor), n_controls=2)
    for row, point, role in ((0, 0, 1), (1, 3, 0), (2, 2, 1), (2, 1, 0)):
        args = (batch.base[row], batch.wanted[row], point, int(columns[row, role]), donor[row, point, role])
        assert float(sweep.log_probability[row, point, role]) == pytest.approx(by_hand(target, *args), abs=1e-4)
    assert sweep.effect[1, :, 1].isnan().all() and sweep.controls[1, :, 1].isnan().all()
    assert not sweep.controls[:, :, 0].isnan().any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attribution_is_the_slope_of_a_small_step_towards_the_donor(architecture: str) -> None:
    target, step = tiny(architecture), 1e-2
    target.model.requires_grad_(False)
    batch = patching.encode(target, PROMPTS, DONORS, TAILS)
    columns = torch.tensor([[1, 5], [2, -1], [3, 9]])
    base, donor = (patching.read_sites(target, ids, POINTS, columns) for ids in (batch.base, batch.donor))
    found = patching.attribution(target, batch, POINTS, columns, donor - base)
    for row, point, role in ((0, 0, 0), (0, 2, 1), (1, 1, 0), (2, 3, 1), (2, 0, 0)):
        here, difference = base[row, point, role], (donor - base)[row, point, role]
        args = (batch.base[row], batch.wanted[row], point, int(columns[row, role]))
        up, down = (by_hand(target, *args, here + sign * step * difference) for sign in (1, -1))
        assert float(found[row, point, role]) == pytest.approx((up - down) / (2 * step), abs=0.02, rel=0.02)
    assert (found[1, :, 1] == 0).all() and (found[0, 3, 0] == 0)


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_unrelated_pairs_and_all_points_at_once_are_patched_as_hooks_of_ones_own_do(architecture: str) -> None:
    target = tiny(architecture)
    batch = patching.encode(target, PROMPTS, DONORS, TAILS)
    columns = torch.tensor([[1, 3], [2, -1], [3, 9]])
    base, donor = (patching.read_sites(target, ids, POINTS, columns) for ids in (batch.base, batch.donor))
    bounds, others = patching.scale(target, batch), torch.tensor([[2], [0], [0]])
    sweep = patching.sweep(target, batch, POINTS, columns, (base, donor), n_controls=1, measured=bounds, others=others)
    assert sweep.controls.shape[-1] == 2
    expected = by_hand(target, batch.base[1], batch.wanted[1], 2, 2, base[0, 2, 0])
    found = bounds.effect(torch.full((3,), expected).double().exp())[1]
    assert float(sweep.controls[1, 2, 0, 1]) == pytest.approx(float(found), abs=1e-4)
    everywhere = patching.everywhere(target, batch, POINTS, columns, donor, bounds)
    handles = [
        block.register_forward_hook(
            lambda module, args, output, layer=layer: output.index_put(
                (torch.tensor(0), torch.tensor(3)), donor[2, layer, 0]
            )
        )
        for layer, block in enumerate(target.model.model.layers)
    ]
    m = by_hand(target, batch.base[2], batch.wanted[2])
    for handle in handles:
        handle.remove()
    expected = bounds.effect(torch.full((3,), m).double().exp())[2]
    assert float(everywhere[2, 0]) == pytest.approx(float(expected), abs=1e-4) and everywhere[1, 1].isnan()


def test_a_continuation_is_written_where_greedy_decoding_writes_it() -> None:
    target = tiny()
    heads = patching.encode(target, PROMPTS, DONORS, TAILS).base
    tails = [
        target.model.generate(torch.tensor([head]), max_new_tokens=3, do_sample=False)[0, len(head) :] for head in heads
    ]
    greedy = [tail.tolist() for tail in tails]
    assert patching.writes(target, heads, greedy).all()
    other = [[*tail[:-1], (tail[-1] + 1) % 50] for tail in greedy]
    assert patching.writes(target, heads, [greedy[0], other[1], greedy[2]]).tolist() == [True, False, True]


def test_unrelated_pairs_have_other_words_and_all_the_roles() -> None:
    words = [("cat", "dog"), ("dog", "cat"), ("tree", "cat"), ("mat", "dog"), ("mat", "lamp")]
    pairs = [MinimalPair("a", "b", f" {one}", f" {two}") for one, two in words]
    columns = torch.tensor([[0, 1], [0, -1], [0, 1], [0, 1], [0, 1]])
    others = sites.unrelated_pairs(pairs, columns, 3)
    assert others.shape == (5, 2)  # the third has two, the fourth and the fifth, and the others no fewer
    for row, drawn in enumerate(others.tolist()):
        assert len(set(drawn)) == 2
        assert all(words[j][0] not in words[row] for j in drawn)
        assert row == 1 or 1 not in drawn
    assert sites.unrelated_pairs(pairs[:2], columns[:2], 3).shape == (2, 0)


def test_sites_are_read_under_patches_where_and_downstream_of_where_they_are_put() -> None:
    target = tiny()
    ids, columns = patching.encode(target, PROMPTS, DONORS, TAILS).base, torch.tensor([[1, 4], [2, 4], [3, 9]])
    vectors = 3 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    plain = patching.read_sites(target, ids, POINTS, columns)
    found = patching.read_sites(target, ids, POINTS, columns, [Patch(POINT, columns[:, 0], vectors)])
    assert torch.allclose(found[:, 1, 0], vectors, atol=1e-5) and torch.allclose(found[:, 0], plain[:, 0], atol=1e-4)
    block = target.model.model.layers[1]
    handle = block.register_forward_hook(
        lambda module, args, output: output.index_put((torch.tensor(0), columns[2, 0]), vectors[2])
    )
    with torch.no_grad():
        states = target.model(torch.tensor([ids[2]]), output_hidden_states=True).hidden_states
    handle.remove()
    assert torch.allclose(found[2, 2, 1], states[3][0, 9], atol=1e-4)
    assert not torch.allclose(found[2, 2, 1], plain[2, 2, 1], atol=1e-2)


def test_a_model_whose_weights_can_be_trained_is_left_without_gradients() -> None:
    target = tiny()
    batch, columns = patching.encode(target, PROMPTS, DONORS, TAILS), torch.tensor([[1], [2], [3]])
    patching.attribution(target, batch, POINTS, columns, torch.ones(3, 4, 1, 32))
    assert all(parameter.grad is None for parameter in target.model.parameters())


def test_random_controls_are_as_far_from_the_base_as_the_donor() -> None:
    base, donor = torch.randn(50, 8), torch.randn(50, 8)
    moved = patching.random_difference(base, donor, torch.Generator().manual_seed(0))
    assert torch.allclose((moved - base).norm(dim=1), (donor - base).norm(dim=1), rtol=1e-5)


def test_pairs_that_do_not_correspond_are_refused() -> None:
    target = tiny()
    with pytest.raises(ShapeError, match="pair 1"):
        patching.encode(target, PROMPTS[:2], [DONORS[0], "the cat"], TAILS[:2])
    with pytest.raises(ShapeError, match="0 of the continuation"):
        patching.encode(target, PROMPTS[:1], DONORS[:1], [""])
    with pytest.raises(ContextLengthError):
        patching.encode(target, [" the" * 60], [" a" * 60], [" cat" * 10])
    batch = patching.encode(target, PROMPTS, DONORS, TAILS)
    with pytest.raises(ShapeError):
        patching.log_probabilities(target, batch.base, batch.wanted, [Patch(POINT, torch.zeros(2), torch.zeros(2, 32))])


@pytest.mark.parametrize(
    ("effects", "controls", "p_value"),
    [
        (torch.ones(4), torch.zeros(4, 1), 2**-4),
        (torch.ones(2), torch.zeros(2, 4), 5**-2),
        (torch.ones(30), torch.zeros(30, 4), 0.0),
        (torch.zeros(4), torch.zeros(4, 3), 1.0),
        (-torch.ones(4), torch.zeros(4, 1), 1.0),
    ],
)
def test_the_randomisation_test_gives_the_exact_probability(effects, controls, p_value: float) -> None:
    found = sites.above_controls(effects, controls)
    assert found == pytest.approx(p_value, abs=0.006) and found > 0


def test_the_randomisation_test_is_level_where_the_donor_is_like_any_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(200, 6, 5, generator=generator)
    found = torch.tensor([sites.above_controls(one[:, 0], one[:, 1:], n_draws=2000) for one in draws])
    assert 0.02 < (found <= 0.1).double().mean() < 0.18 and 0.4 < found.mean() < 0.6


def test_pairs_of_one_document_are_one_trial_of_the_randomisation_test() -> None:
    effects, controls = torch.ones(12), torch.zeros(12, 4)
    assert sites.above_controls(effects, controls, torch.full((12,), 3)) == pytest.approx(1 / 5, abs=0.006)
    assert sites.above_controls(effects, controls, torch.arange(12) // 6) == pytest.approx(1 / 25, abs=0.006)
    assert sites.above_controls(effects, controls, torch.arange(12)) < 1e-3


# ------------------------------------------------------------------------------------------------------------ traces


@pytest.fixture(scope="module")
def used() -> Target:
    return planted_target(used=True)


def couplet_pairs(target: Target, n_pairs: int = 8) -> list[MinimalPair]:
    return of_items(target, rhyme_items(n_pairs, seed=5))


@pytest.fixture(scope="module")
def traced(used: Target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    report = trace(used, TraceSettings(couplet_pairs(used), n_controls=2, graphs=folder))
    report.save(folder)
    return report, folder


def test_the_trace_of_a_planted_plan_finds_its_block_and_token_and_no_other(traced) -> None:
    report, _ = traced
    assert [(site.point, site.role) for site in report.of_verdict(sites.CAUSAL)] == [(POINT, "newline")]
    planted = report.site(POINT, "newline")
    assert (
        planted.share == 1.0
        and planted.effect.value > 0.95
        and planted.p_value < 0.01
        and abs(planted.control_bar) < 0.05
        and report.tested
    )
    assert report.behaviour.value == 1.0 and report.everywhere[-1].value > 0.95 and report.n_unrelated == 1
    assert report.of_verdict(sites.WEAK) == []
    assert all(abs(site.effect.value) < 0.05 for site in report.sites if site is not planted)


def test_a_headline_joins_neighbouring_points_of_a_role(traced) -> None:
    report, _ = traced
    causal = {("resid_post.0", "newline"), ("resid_post.1", "newline"), ("resid_post.2", "name")}
    judged = [
        dataclasses.replace(site, verdict=sites.CAUSAL if (site.point, site.role) in causal else sites.NONE)
        for site in report.sites
    ]
    found = dataclasses.replace(report, sites=judged).headline()
    assert found == "causal at resid_post.2 at name, resid_post.0 to 1 at newline"


def test_the_trace_of_a_plan_that_is_decodable_and_unused_finds_nothing() -> None:
    target = planted_target(used=False)
    report = trace(target, TraceSettings(couplet_pairs(target, 4), n_controls=1))
    assert report.of_verdict(sites.CAUSAL) == [] and report.headline() == "no causal site"


def test_a_large_effect_that_random_directions_have_too_is_none(used: Target) -> None:
    found = sites.measure_sites(used, couplet_pairs(used, 4), n_sites=64, n_controls=3)
    assert sites.CAUSAL in [site.verdict for site in sites.judge_sites(found)]
    found.sweep.controls[:] = found.sweep.effect[..., None]
    assert {site.verdict for site in sites.judge_sites(found)} == {sites.NONE}


def test_every_token_is_looked_at_where_no_role_is_named(used: Target) -> None:
    report = trace(used, TraceSettings(couplet_pairs(used, 2), all_tokens=True, n_sites=200, n_controls=2))
    assert len(report.roles) > 7 and report.roles[-2:] == ["-2 ,", "-1 ⏎"] and not report.tested
    assert [(site.point, site.role) for site in report.of_verdict(sites.CAUSAL)] == [(POINT, "-1 ⏎")]


def test_only_the_shortlist_is_patched_and_the_rest_is_called_not_measured(used: Target) -> None:
    found = sites.measure_sites(used, couplet_pairs(used, 4), n_sites=3, n_controls=1)
    measured = ~found.sweep.effect.isnan().all(0)
    assert int(measured.sum()) == 3 and not (measured & ~found.live).any()
    verdicts = [site.verdict for site in sites.judge_sites(found)]
    assert verdicts.count(sites.UNMEASURED) == int(found.live.sum()) - 3


def test_holm_counts_the_sites_that_the_shortlist_left_out(used: Target) -> None:
    pairs = [dataclasses.replace(pair, document=row // 2) for row, pair in enumerate(couplet_pairs(used))]
    found = sites.measure_sites(used, pairs, n_sites=12, n_controls=5)
    (planted,) = [site for site in sites.judge_sites(found) if site.verdict == sites.CAUSAL]
    place = (found.points.index(planted.point), found.roles.index(planted.role))
    n_draws = found.n_draws
    raw = sites.above_controls(*found.effects(*place), torch.arange(8) // 2)
    assert planted.p_value == pytest.approx(raw * int(found.live.sum())) and n_draws == 20_000
    many = dataclasses.replace(found, live=torch.ones(2000, dtype=torch.bool))
    assert 2000 / (many.n_draws + 1) < sites.ALPHA and not many.testable


def test_pairs_of_one_document_are_not_tested_however_many(used: Target) -> None:
    pairs = [dataclasses.replace(pair, document=1) for pair in couplet_pairs(used, 8)]
    report = trace(used, TraceSettings(pairs, n_sites=2))
    assert not report.tested and report.n_controls == sites.N_CONTROLS_FEW


def test_rank_agreement_is_scipys_with_ties_and_does_without_the_probability_before_a_patch(used: Target) -> None:
    found = sites.measure_sites(used, couplet_pairs(used, 3), n_sites=5, n_controls=1)
    assert sites.agreement(found) is None  # the plan is read by its largest entry: no gradient, and nothing to rank
    shape, generator = found.attribution.shape, torch.Generator().manual_seed(0)
    first, second = (torch.randint(4, shape, generator=generator).double() for _ in range(2))
    change = torch.where(found.sweep.effect.isnan(), torch.nan, first + second)
    found = dataclasses.replace(found, attribution=first, sweep=found.sweep._replace(log_probability=change))
    before, patched = sites.agreement(found), ~change.isnan().any(0)
    means = [values.mean(0)[patched] for values in (first, change)]
    assert before.value == pytest.approx(scipy.stats.spearmanr(*means).statistic, abs=1e-12)
    assert any(len(values.unique()) < len(values) for values in means)  # there are ties
    found.bounds.low[:] = 0.0  # a long continuation underflows
    assert sites.agreement(found) == before and -1 <= before.low <= before.high <= 1


def test_an_embedded_target_is_held_to_its_plant_on_its_own_pairs_only(used: Target, monkeypatch) -> None:
    monkeypatch.setattr(trace_command, "open_named", lambda model, device: ("couplets/planner", used))
    monkeypatch.setattr(trace_command, "PLANTED_SITES", {"couplets/planner": PlantedSite(POINT)})
    report = trace("couplets", TraceSettings(n_pairs=1, all_tokens=True, n_sites=200, n_controls=1))
    assert [check.passed for check in report.checks] == [True, True] and POINT in report.checks[0].name
    own = [dataclasses.replace(pair, roles={"end": -1}) for pair in couplet_pairs(used, 1)]
    report = trace("couplets", TraceSettings(own, n_controls=1))
    assert [check.passed for check in report.checks] == [None] and report.headline() == f"causal at {POINT} at end"


def test_graphs_of_a_trace_fit_the_published_schema_and_name_what_causal_places_hold(traced) -> None:
    _, folder = traced
    items, paths = rhyme_items(8, seed=5), sorted(folder.glob("*.json"))
    assert len(paths) == 8
    for item, path in zip(items, paths, strict=True):
        content = json.loads(path.read_text())
        assert complaints(content) == []
        graph = read_graph(path)
        plan = next(one for one in graph.supernodes if one.name == item.target)
        newline = len(graph.tokens) - 1
        assert [(node.layer, node.position) for node in plan.members] == [(1, newline)] and graph.tokens[-1] == "⏎"
        (changed,) = [one for one in graph.supernodes if one.name != item.target]
        effects = sorted((-node.activation, node.influence) for node in graph.nodes if node.kind != "logit")
        assert [influence for _, influence in effects] == sorted(
            node.influence for node in graph.nodes if node.kind != "logit"
        )
        assert effects[0][1] == pytest.approx(0.5, abs=0.05) and effects[-1][1] == 1.0
        assert changed.name in (item.couplet.colour, item.couplet.thing) and changed.members[0].kind == "embedding"


def test_links_carry_effects_to_the_output_and_what_arrives_to_later_sites(traced) -> None:
    _, folder = traced
    graph = read_graph(sorted(folder.glob("*.json"))[0])
    plan, token = (
        next(n for n in graph.nodes if n.kind == kind and n.activation > 0.5) for kind in ("causal site", "embedding")
    )
    (output,) = [node for node in graph.nodes if node.kind == "logit"]
    weights = {(link.source, link.target): link.weight for link in graph.links}
    assert weights[plan.id, output.id] == pytest.approx(1.0, abs=0.05)
    # The prompts differ in one token: exchanging it is the donor prompt itself.
    assert weights[token.id, output.id] == pytest.approx(1.0, abs=1e-4)
    assert weights[token.id, plan.id] == pytest.approx(1.0, abs=1e-4)
    # What a viewer reads: the probability out of the label, ids for all that is pinned.
    assert output.label.split("(p=")[1].split(")")[0] == "0.000"
    assert set(graph.content["qParams"]["pinnedIds"]) <= {node.id for node in graph.nodes}


def test_the_report_is_written_beside_the_graphs(traced) -> None:
    report, folder = traced
    assert json.loads((folder / "report" / "trace.json").read_text())["n_pairs"] == 8
    assert (folder / "report" / "trace.png").read_bytes().startswith(b"\x89PNG")
    assert (
        f"causal at {POINT} at newline" in (folder / "report" / "trace.md").read_text() == report.to_markdown() + "\n"
    )


def test_graphs_of_an_earlier_larger_trace_are_not_mixed_with_new_ones(
    traced, used: Target, tmp_path, monkeypatch
) -> None:
    trace(used, TraceSettings(couplet_pairs(used, 3), n_controls=1, graphs=tmp_path))
    with pytest.raises(ArgumentError, match="earlier trace"):
        trace(used, TraceSettings(couplet_pairs(used, 2), n_controls=1, graphs=tmp_path))
    monkeypatch.setattr(trace_command, "measure_sites", lambda *_: pytest.fail("found only after the work"))
    with pytest.raises(ArgumentError, match="earlier trace"):
        trace(used, TraceSettings(couplet_pairs(used, 2), n_controls=1, graphs=tmp_path))


def test_one_pair_for_any_model_with_named_tokens_in_the_middle(tmp_path) -> None:
    target = tiny("llama")
    words = ["here", "there", "cat", "tree", "on", "mat", "the", "so", "red", "under"]
    batch = patching.encode(target, PROMPTS[:1] * 10, DONORS[:1] * 10, [f" {word}" for word in words])
    gain = patching.scale(target, batch)
    best = int((gain.high - gain.low).argmax())
    texts = (PROMPTS[0], DONORS[0], " on", f" {words[best]}")
    report = trace(target, TraceSettings(None, *texts, n_controls=2))
    assert (
        report.n_pairs == 1
        and report.roles == ["0 the", "1 cat", "2 sat", "3 on", "4 the", "5 mat"]
        and not report.tested
    )
    # Of one prompt that differs in one token, that token before block 0 has all the effect, and none has the first.
    assert report.site("resid_post.0", "0 the").effect.value == 0.0
    pair = MinimalPair(*texts, roles={"animal": "cat", "verb": 2, "end": -1})
    named = trace(target, TraceSettings([pair], n_controls=2, graphs=tmp_path))
    assert named.roles == ["animal", "verb", "end"]
    for role, whole in (("animal", "1 cat"), ("verb", "2 sat"), ("end", "5 mat")):
        assert named.site("resid_post.2", role).effect.value == pytest.approx(
            report.site("resid_post.2", whole).effect.value, abs=1e-4
        )
    assert complaints(json.loads(next(tmp_path.glob("*.json")).read_text())) == []


def test_pairs_that_the_target_does_not_tell_apart_are_left_out_or_refused(used: Target) -> None:
    pairs = couplet_pairs(used, 4)
    same = [dataclasses.replace(pair, donor_continuation=pair.continuation) for pair in pairs]
    assert trace(used, TraceSettings([*pairs, same[0]], n_controls=1)).n_dropped == 1
    with pytest.raises(ArgumentError, match="none of which"):
        trace(used, TraceSettings(same))


def test_a_file_of_pairs_is_read_and_its_faults_are_named_by_line(tmp_path) -> None:
    path = tmp_path / "pairs.jsonl"
    good = dict(
        zip(
            ("prompt", "donor_prompt", "continuation", "donor_continuation"),
            ("a", "b", " c d.", " e\u2028 f!\n"),
            strict=True,
        )
    )
    path.write_text(json.dumps({**good, "roles": {"x": 0}}, ensure_ascii=False) + "\n\n" + json.dumps(good))
    first, second = read_pairs(path)
    assert (first.target, first.donor_target, first.roles) == ("d", "f", {"x": 0})
    assert (first.document, second.document) == (0, 2)
    bad = [{**good, "prompt": 3}, {**good, "more": 1}, {**good, "roles": [1]}, {**good, "roles": {"x": 1.5}}, []]
    bad += [
        {**good, "document": True},
        {**good, "document": 10**30},
        {**good, "target": None},
        {"prompt": "a"},
        {**good, "prompt": ""},
    ]
    for content in bad:
        path.write_text(json.dumps(good) + "\n" + json.dumps(content))
        with pytest.raises(ParseError, match=r"pairs\.jsonl:2"):
            read_pairs(path)
    for text in ("", "{", '{"prompt": "a"', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ParseError):
            read_pairs(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ParseError):
        read_pairs(path)


@pytest.mark.parametrize("role", ["zebra", "the", "", 6, -7])
def test_a_role_that_is_no_one_token_is_refused(role) -> None:
    target = tiny()
    pair = MinimalPair(PROMPTS[0], DONORS[0], " on", " on", roles={"r": role})
    with pytest.raises(PositionError, match="pair 0"):
        role_columns(target, [pair], encode_pairs(target, [pair]))


def test_options_out_of_range_and_models_without_pairs_are_refused(used: Target) -> None:
    for options in ({"n_sites": 0}, {"n_controls": 0}, {"n_pairs": 0}, {"prompt": "a"}):
        with pytest.raises(ArgumentError):
            trace(used, TraceSettings(**options))
    with pytest.raises(ArgumentError, match=r"no embedded world.*--pairs"):
        trace(tiny(), TraceSettings())


LATENTS = Path(__file__).parents[3] / "docs" / "examples" / "latents"


def test_smollm2_uses_the_country_whose_capital_it_is_asked_for(smollm2: str) -> None:
    pairs = read_pairs(LATENTS / "capital.jsonl")[:4]
    report = trace(smollm2, TraceSettings(pairs, n_sites=12, n_controls=4))
    assert report.n_pairs == 4 and report.behaviour.value >= 0.8
    causal = [site for site in report.of_verdict(sites.CAUSAL) if site.control_bar < 0.1]
    blocks = {role: [Point.parse(site.point).layer for site in causal if site.role == role] for role in report.roles}
    # It is held at the country's own token, and moves to the last one in the upper third.
    assert blocks["country"] and max(blocks["country"]) < 25 and not blocks["next"]
    assert all(block >= 20 for block in blocks["end"])
    assert max(site.strength for site in causal if site.role == "country") >= 0.8


@pytest.mark.parametrize("path", sorted(LATENTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_pairs_of_a_latent_are_templates_of_smollm2s_tokens(smollm2: str, path: Path) -> None:
    tokenizer = load_tokenizer(target_folder(smollm2))
    pairs = read_pairs(path)
    assert len(pairs) >= 12 and len({pair.document for pair in pairs}) == len(pairs)
    for pair in pairs:
        base, donor = (tokenizer(text).input_ids for text in (pair.prompt, pair.donor_prompt))
        differing = [i for i, (one, two) in enumerate(zip(base, donor, strict=True)) if one != two]
        spans = encode_batch(tokenizer, [pair.prompt], None)[0].spans
        first = next(iter(pair.roles.values()))  # what is exchanged comes first
        where = (
            first
            if isinstance(first, int)
            else next(s.index for s in spans if s.end == pair.prompt.index(first) + len(first))
        )
        assert where % len(base) == differing[0]
