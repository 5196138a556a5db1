"""The protocol as a whole: with perfect readers what it must find is known; with an untrained pair, that it runs."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from nla.errors import ConfigError
from nla.eval import explainers
from nla.eval.couplet_items import rhyme_items
from nla.eval.families import controls, counterfactual, editing, naming, rhymes
from nla.eval.families.mention import MentionScore
from nla.eval.families.rhymes import RhymeSettings, evaluate_rhymes
from nla.eval.report import Rate
from nla.eval.target import Target, open_model, open_rival, read_last
from tests.helpers.planted import planted_pair, planted_target, read_code, write_code

ITEMS = rhyme_items(30, seed=6)


CODE_DECODER = SimpleNamespace(reconstruct=lambda texts, strict=True: write_code(texts))
"""A pair as far as editing uses it, whose decoder knows the code."""


def by_code(items, vectors):
    return read_code(vectors)


@pytest.fixture(scope="module")
def used() -> Target:
    return planted_target()


@pytest.fixture(scope="module")
def swapped(used: Target) -> counterfactual.Counterfactual:
    return counterfactual.swap_plans(used, by_code, by_code, explainers.truthful, ITEMS, n_samples=2, n_fit=800)


def test_a_reader_of_activations_passes_the_counterfactual(swapped: counterfactual.Counterfactual) -> None:
    assert swapped.naming.value >= 0.95 and swapped.behaviour.value >= 0.95 and swapped.all_three.value >= 0.95
    assert swapped.readings[0].base_named.value <= 0.05
    deeper = swapped.readings[2]
    assert "resid_post.2" in deeper.where and deeper.donor.named.value >= 0.95


def test_a_reader_of_the_text_fails_the_counterfactual(used: Target, swapped: counterfactual.Counterfactual) -> None:
    assert swapped.text_only.value <= 0.05
    found = counterfactual.swap_plans(
        used, explainers.truthful, explainers.truthful, explainers.truthful, ITEMS, 1, n_fit=800
    )
    assert found.naming.value <= 0.05 and found.all_three.value <= 0.05
    assert found.readings[0].unpatched.value >= 0.95  # on unmodified items it is perfect all the same


def test_reading_the_overwritten_site_is_labelled_a_control(swapped: counterfactual.Counterfactual) -> None:
    assert [one.control for one in swapped.readings] == [False] * (len(swapped.readings) - 1) + [True]


def test_the_swap_moves_the_plan_and_keeps_season_and_person(used: Target) -> None:
    means = counterfactual.plan_means(used, 800, seed=0)
    base = read_last(used, [item.prompt for item in ITEMS])
    moved = read_code(counterfactual.with_donor_plan(ITEMS, base, means))
    for item, before, after in zip(ITEMS, read_code(base), moved, strict=True):
        assert after == before.replace(f"with {item.target}.", f"with {item.donor_target}.")


def test_an_edit_steers_and_its_controls_do_not(used: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    found = editing.edit_and_steer(CODE_DECODER, used, by_code, ITEMS, rhyme_items(20, seed=7))  # type: ignore[arg-type]
    assert found.edit.success.value >= 0.95 and found.edit.whole_line.value >= 0.95
    assert found.edit.n_moved == len(ITEMS) and found.tried[str(found.strength)] == max(found.tried.values())
    arms = {arm.name: arm for arm in found.controls}
    for name in ("random", "reverse", "unrelated edit (a visible fact)", "another item's difference"):
        assert arms[name].n_moved == len(ITEMS), name
        assert arms[name].success.value <= 0.05 and arms[name].p_value < 0.01, name


def test_the_strength_comes_from_the_separate_items_alone(used: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, lengths = [], []

    def write(target: Target, items, vectors):
        steps.append(len(items))
        base = read_last(used, [item.prompt for item in items])
        lengths.append(float(((vectors - base).norm(dim=1) / base.norm(dim=1)).mean()))
        best = len(items) == 7 and abs(lengths[-1] - 0.5) < 0.01
        return [f"it ends on {item.donor_target if best else item.target}.\n" for item in items]

    monkeypatch.setattr(editing, "_write", write)
    found = editing.edit_and_steer(CODE_DECODER, used, by_code, ITEMS[:12], rhyme_items(7, seed=7))  # type: ignore[arg-type]
    assert found.strength == 0.5 and found.tried["0.5"] == 1.0
    assert steps[: len(editing.STRENGTHS)] == [7] * len(editing.STRENGTHS) and set(steps[7:]) == {12}
    assert all(abs(length - 0.5) < 0.01 for length in lengths[7:])


def test_one_item_can_be_steered_and_a_control_that_moves_nothing_does_not_count(
    used: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = editing.edit_and_steer(CODE_DECODER, used, by_code, ITEMS[:1], ITEMS[:1])  # type: ignore[arg-type]
    arms = {arm.name: arm for arm in found.controls}
    assert found.edit.success.value == 1.0 and arms["another item's difference"].n_moved == 0
    checks = {check.name: check for check in rhymes._steering_checks(found)}
    assert checks["steering control: random"].passed
    assert not checks["steering control: another item's difference (moves only 0 items)"].passed


@pytest.mark.parametrize(
    ("named", "control", "visible", "before", "q", "expected"),
    [
        (0.9, 0.5, 1.0, 1.0, 0.4, [True, True, True, True]),
        (0.7, 0.5, 0.96, 1.0, 0.4, [False, True, True, True]),
        (0.9, 0.85, 0.94, 1.0, 0.95, [True, False, False, False]),
        (0.9, None, 0.94, None, None, [True, None, None, None]),
    ],
)
def test_naming_is_held_against_q_the_control_and_the_warm_start(
    named: float, control: float | None, visible: float, before: float | None, q: float | None, expected: list
) -> None:
    def score(value: float | None, true: float | None = None) -> MentionScore | None:
        if value is None:
            return None
        rate, seen = Rate(value, value - 0.03, value + 0.03, 9), None if true is None else Rate(true, true, true, 9)
        return MentionScore("reader", 9, 1, rate, 0.0, seen, rate, [value] * 9, [])

    ours = score(named, visible)
    assert ours is not None
    warm = None if before is None else score(0.4, before)
    figures = naming.Naming(ours, ours, warm, score(control), None, [ours], [], [ours], [])
    found = rhymes._naming_checks(figures, q)
    assert [check.passed for check in found] == [*expected, None]
    assert [check.value is None for check in found[1:4]] == [q is None, control is None, before is None]


def test_the_encoder_is_compared_with_each_other_reader_one_sidedly() -> None:
    rate = Rate(0.5, 0.4, 0.6, 30)
    better, worse = (
        MentionScore(name, 30, 1, rate, 0.0, None, rate, [value] * 30, [])
        for name, value in (("better", 1.0), ("worse", 0.0))
    )
    (against_worse,) = naming.compare(better, [worse], seed=0)
    (against_better,) = naming.compare(worse, [better], seed=0)
    assert against_worse.p_value < 0.01 and against_better.p_value > 0.5


def test_every_direction_moves_by_the_same_length() -> None:
    vectors, direction = torch.randn(5, 8), torch.randn(5, 8)
    moved = editing.steered(vectors, direction, 1.5) - vectors
    assert torch.allclose(moved.norm(dim=1), 1.5 * vectors.norm(dim=1), atol=1e-4)
    assert torch.equal(editing.steered(vectors, torch.zeros(5, 8), 1.5), vectors)


def test_edits_of_explanations() -> None:
    text = "It is spring. Anna is here. The next line ends with cat."
    assert editing.edit_plan(text, "hat") == "It is spring. Anna is here. The next line ends with hat."
    assert editing.edit_plan("It is spring.", "hat") is None
    assert editing.edit_fact(text) == "It is summer. Anna is here. The next line ends with cat."
    newline = "The next line ends with cat. The last mark is a line break."
    assert editing.edit_fact(newline) == "The next line ends with cat. The last mark is a comma."
    assert editing.edit_fact("The next line ends with cat.") is None


def test_the_adversaries_on_a_target_that_knows_the_rule(used: Target) -> None:
    vectors = read_last(used, [item.prompt for item in ITEMS])
    scores = {one.reader: one for one in controls.adversaries(used, None, ITEMS, vectors, 4, 2000, 0)}
    assert scores[controls.TEXT_LM].named.value >= 0.95
    assert scores[controls.OUTSIDER].named.value <= 0.45
    assert scores[controls.BAG].named.value >= 0.8  # the rule is additive in the words: a fitted reader finds it
    assert controls.best(list(scores.values())).reader == controls.TEXT_LM


@pytest.mark.slow
def test_a_bare_target_gets_gates_and_probe_and_a_verdict(tmp_path) -> None:
    report = evaluate_rhymes(planted_target(used=False), RhymeSettings(n_items=24, n_fit=1200))
    report.save(tmp_path)
    assert report.verdict == "decodable, unused" and report.naming is None and report.steering is None
    assert not report.passed  # a target that no variant's gates are held against has passed nothing
    assert "decodable, unused" in (tmp_path / "rhymes.md").read_text().splitlines()[0]
    assert (
        evaluate_rhymes(planted_target(used=True), RhymeSettings(n_items=12, n_fit=800)).verdict == "planned and used"
    )


@pytest.mark.slow
def test_the_whole_protocol_runs_on_a_pair_and_writes_its_report(tmp_path) -> None:
    stages: set[str] = set()
    settings = RhymeSettings(planted_pair(), planted_pair(), n_items=16, n_samples=2, n_fit=800, hit_rate=0.4375)
    pair = planted_pair()
    pair.metrics = {"joint": {"fve/global": -0.3}}
    report = evaluate_rhymes(pair, settings, lambda stage, fraction: stages.add(stage))
    report.save(tmp_path)
    assert report.verdict == "planned and used" and report.naming is not None
    assert len(report.doubts) == 1 and "reads nothing" in report.doubts[0]
    assert report.naming.sampled.named.value <= 0.2 and not report.passed  # nothing was trained
    assert report.naming.margin < -0.5  # the target itself knows the plan
    assert {"gate", "naming", "counterfactual", "edit and steer"} <= stages
    content = json.loads((tmp_path / "rhymes.json").read_text())
    assert content["naming"]["best_adversary"] == controls.TEXT_LM
    assert {"empty", "constant", "mean activation", "Gaussian", "shuffled activation", "other document"} == {
        score["reader"] for score in content["naming"]["baselines"]
    }
    assert (tmp_path / "rhymes.png").read_bytes().startswith(b"\x89PNG")
    for heading in ("Mention", "Counterfactual", "Edit and steer", "Gates"):
        assert f"## {heading}" in (tmp_path / "rhymes.md").read_text()


def test_the_protocol_goes_through_at_most_twelve_files_and_through_none_twice() -> None:
    """Functions of other files that it calls, in the order of its lines; one file's in a row are one step."""
    tree = ast.parse(inspect.getsource(rhymes))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    origin = {name.name: node.module for node in imports for name in node.names if name.name.islower()}
    origin |= {f"controls.{name}": "nla.eval.families.controls" for name in vars(controls)}
    (protocol,) = [node for node in tree.body if getattr(node, "name", "") == "evaluate_rhymes"]
    calls = sorted((node.lineno, ast.unparse(node.func)) for node in ast.walk(protocol) if isinstance(node, ast.Call))
    files = [origin[name] for _, name in calls if str(origin.get(name)).startswith("nla.eval")]
    steps = [file for file, _ in itertools.groupby(files)]
    assert 6 <= len(steps) <= 12 and len(set(steps)) == len(steps), steps


def test_the_pair_reads_the_bare_target_and_leaves_its_adapters_on() -> None:
    pair = planted_pair()
    before = pair.model.active_adapter
    open_model(pair, "resid_post.0")[1]
    read_last(Target.of(pair), [ITEMS[0].prompt])
    assert pair.model.active_adapter == before
    assert str(Target.of(pair).point) == "resid_post.1"  # a pair knows its own point


def test_a_control_pair_at_another_point_is_refused() -> None:
    import dataclasses

    pair, other = planted_pair(), planted_pair()
    other.config = dataclasses.replace(other.config, point="resid_post.0")
    with pytest.raises(ConfigError, match="resid_post"):
        open_rival(other, pair)
    retrained = planted_pair()
    with torch.no_grad():
        next(p for name, p in retrained.model.named_parameters() if "lora_" not in name).add_(1.0)
    with pytest.raises(ConfigError, match="weights differ"):
        evaluate_rhymes(pair, RhymeSettings(continued=retrained, n_items=4))
