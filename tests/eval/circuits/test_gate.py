"""Interventions, the gate and the organism's gates, on targets whose plan is planted by hand."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Qwen2ForCausalLM

from nla.errors import ArgumentError, ShapeError, TargetError
from nla.eval.circuits import gate as causal
from nla.eval.circuits import patching
from nla.eval.couplet_items import rhyme_items
from nla.eval.families import gates
from nla.eval.report import write_card
from nla.eval.target import Patch, Target, last_token, last_word, read_last, token_ids, write
from nla.models.points import Point
from nla.organisms.couplets import tokenizer as couplets_tokenizer
from nla.pair.steer import generate_patched
from nla.text.tokens import plain_ids
from tests.helpers.planted import POINT, planted_target

ITEMS = rhyme_items(24, seed=5)
PROMPTS = [item.prompt for item in ITEMS]


@pytest.fixture(scope="module")
def random_target() -> Target:
    """Random weights, so that every logit counts."""
    torch.manual_seed(0)
    config = planted_target().model.config
    config.initializer_range = 0.3
    return Target(Qwen2ForCausalLM(config).eval(), couplets_tokenizer.build(), Point.parse(POINT))


@pytest.fixture(scope="module")
def used() -> Target:
    return planted_target(used=True)


@pytest.fixture(scope="module")
def unused() -> Target:
    return planted_target(used=False)


def test_log_probabilities_in_a_batch_are_those_of_each_row_alone(random_target: Target) -> None:
    heads = token_ids(random_target, PROMPTS)
    tails = plain_ids(random_target.tokenizer, [item.donor_continuation for item in ITEMS])
    found = patching.log_probabilities(random_target, heads, tails)
    for row in range(0, len(ITEMS), 7):
        head, tail = heads[row], tails[row]
        with torch.no_grad():
            logits = random_target.model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        expected = sum(float(logits[len(head) - 1 + i, token]) for i, token in enumerate(tail))
        assert abs(float(found[row]) - expected) < 1e-3


def test_writing_under_a_patch_agrees_with_generate_patched(random_target: Target) -> None:
    column, vectors = last_token(random_target, PROMPTS), 5 * torch.randn(len(ITEMS), 96)
    found = write(random_target, PROMPTS, [Patch(POINT, column, vectors)], max_new_tokens=6)
    expected = generate_patched(
        random_target.model, random_target.tokenizer, PROMPTS, POINT, column, vectors, max_new_tokens=6
    )
    stopped = [text[: text.index("\n") + 1] if "\n" in text else text for text in expected]
    assert found == stopped
    assert found != write(random_target, PROMPTS, max_new_tokens=6)


def test_padding_does_not_change_what_is_written(random_target: Target) -> None:
    column, vectors = last_token(random_target, PROMPTS), 5 * torch.randn(len(ITEMS), 96)
    together = write(random_target, PROMPTS, [Patch(POINT, column, vectors)], max_new_tokens=5)
    for row in range(0, len(ITEMS), 5):
        one = Patch(POINT, column, vectors).rows(torch.tensor([row]))
        assert write(random_target, [PROMPTS[row]], [one], max_new_tokens=5) == [together[row]]


def test_a_patch_with_the_own_vectors_changes_nothing_and_is_read_downstream(random_target: Target) -> None:
    column, own = last_token(random_target, PROMPTS), read_last(random_target, PROMPTS)
    assert torch.allclose(read_last(random_target, PROMPTS, POINT, [Patch(POINT, column, own)]), own, atol=1e-4)
    moved = read_last(random_target, PROMPTS, "resid_post.2", [Patch(POINT, column, own + 1)])
    assert not torch.allclose(moved, read_last(random_target, PROMPTS, "resid_post.2"), atol=1e-2)


def test_a_patch_of_another_length_is_refused(random_target: Target) -> None:
    with pytest.raises(ShapeError):
        write(random_target, PROMPTS, [Patch(POINT, torch.zeros(3, dtype=torch.long), torch.zeros(3, 96))])


def test_only_a_finished_line_has_a_last_word() -> None:
    assert last_word("Soon they found a tiny cat.\n") == "cat"
    assert last_word("Soon they found a tiny cat.") == "" == last_word("") == last_word("\n")


def test_the_gate_calls_a_used_plan_causal_and_an_unused_one_present(used: Target, unused: Target) -> None:
    causal_gate, idle = causal.gate_items(used, ITEMS), causal.gate_items(unused, ITEMS, n_controls=4)
    assert causal_gate.counts()[causal.CAUSAL] == len(ITEMS)
    assert min(item.effect for item in causal_gate.items) > 0.95
    assert max(item.control for item in causal_gate.items) < 0.05
    assert idle.counts()[causal.UNUSED] == len(ITEMS) and idle.causal == []


def test_the_gate_calls_wrong_behaviour_wrong(random_target: Target) -> None:
    gate = causal.gate_items(random_target, ITEMS[:6], n_controls=4)
    assert gate.counts()[causal.WRONG] == 6
    json.dumps(gate.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("behaviour", "everywhere", "effect", "control", "control_everywhere", "verdict"),
    [
        (True, 0.0, 0.9, 0.1, 0.95, causal.CAUSAL),
        (True, 0.0, 0.3, 0.1, 0.1, causal.CAUSAL),
        (True, 0.29, 0.29, 0.1, 0.1, causal.UNUSED),
        (True, 0.9, 0.9, 0.95, 0.95, causal.UNUSED),
        (True, 0.9, 0.1, 0.2, 0.2, causal.ELSEWHERE),
        (True, 0.9, 0.9, 0.95, 0.1, causal.ELSEWHERE),
        (True, 0.9, 0.1, 0.2, 0.95, causal.UNUSED),
        (False, 0.9, 0.9, 0.1, 0.1, causal.WRONG),
    ],
)
def test_the_verdict_of_an_item(
    behaviour: bool, everywhere: float, effect: float, control: float, control_everywhere: float, verdict: str
) -> None:
    assert causal.verdict_of(behaviour, everywhere, effect, control, control_everywhere) == verdict


def test_every_rung_has_controls_where_it_puts_the_donor(used: Target, monkeypatch) -> None:
    shallow = Target(used.model, used.tokenizer, Point.parse("resid_post.0"))
    elsewhere = causal.gate_items(shallow, ITEMS, n_controls=4)
    assert elsewhere.counts()[causal.ELSEWHERE] == len(ITEMS)
    assert max(item.control_all_points for item in elsewhere.items) < 0.05
    monkeypatch.setattr(causal, "random_difference", lambda base, donor, generator: donor)
    same = causal.gate_items(shallow, ITEMS, n_controls=1)
    assert all((item.control, item.control_all_points) == (item.effect, item.effect_all_points) for item in same.items)
    assert same.counts()[causal.UNUSED] == len(ITEMS)
    largest = same.to_json()["largest"]
    assert largest["control"] < 0.05 < 0.95 < largest["control_all_points"]


def test_the_patch_map_shows_the_planted_place_alone(used: Target) -> None:
    grid = causal.patch_map(used, ITEMS[:12])
    for point, line in zip(grid.points, grid.values, strict=True):
        for token, value in zip(grid.tokens, line, strict=True):
            assert value > 0.95 if (point, token) == (POINT, "newline") else abs(value) < 0.05, (point, token)


@pytest.mark.slow
def test_gates_of_a_planner_pass_on_a_used_plan_and_fail_on_an_unused_one(
    used: Target, unused: Target, tmp_path
) -> None:
    report = gates.evaluate_gates(used, gates.GateSettings(variant="planner", n_documents=40, n_probe=1200))
    report.save(tmp_path)
    assert report.passed and report.verdict == gates.USED
    assert not gates.evaluate_gates(unused, gates.GateSettings(variant="planner", n_documents=30, n_probe=100)).passed
    assert json.loads((tmp_path / "gates.json").read_text())["passed"] is True
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_a_card_keeps_one_section_of_each_report_and_what_others_wrote(tmp_path) -> None:
    (tmp_path / "README.md").write_text("# My pair\n\nMine.\n")
    write_card(tmp_path, "gates", "## Gates: 1", "nla eval gates")
    write_card(tmp_path, "rhymes", "## Rhymes", "nla eval rhymes")
    write_card(tmp_path, "gates", "## Gates: 2", "nla eval gates --items 3")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# My pair\n\nMine.\n") and "Gates: 1" not in card
    assert card.index("## Gates: 2") < card.index("`nla eval gates --items 3`") < card.index("## Rhymes")


def test_gates_of_the_plain_variant_pass_on_a_decodable_unused_plan(used: Target, unused: Target) -> None:
    report = gates.evaluate_gates(unused, gates.GateSettings(variant="plain", n_documents=40, n_probe=1200))
    assert report.passed and report.verdict == gates.DECODABLE
    assert not gates.evaluate_gates(used, gates.GateSettings(variant="plain", n_documents=30, n_probe=100)).passed


def test_the_verdict_in_words() -> None:
    quiet = (0.0, 0.0)
    assert gates.verdict(1.0, [1.0, 0.96], [quiet], 0.0) == gates.USED
    assert gates.verdict(1.0, [0.02, 0.01], [quiet], 0.9) == gates.DECODABLE
    assert gates.verdict(1.0, [0.02, 0.01], [quiet], 0.2) == gates.ABSENT
    assert gates.verdict(1.0, [0.5, 0.5], [quiet], 0.9) == gates.PARTLY
    assert gates.verdict(1.0, [0.02, 0.4], [], 0.9) == gates.verdict(1.0, [0.4, 1.0], [], 0.9) == gates.PARTLY
    assert gates.verdict(1.0, [0.02, 0.01], [quiet, (0.9, 0.1)], 0.9) == gates.ELSEWHERE
    assert gates.verdict(1.0, [0.02, 0.01], [quiet, (0.9, 0.9)], 0.9) == gates.DECODABLE
    assert gates.verdict(0.5, [1.0, 1.0], [quiet], 0.9) == gates.WRONG


def test_a_plan_used_at_another_point_is_found_there_above_its_random_control(used: Target) -> None:
    shallow = Target(used.model, used.tokenizer, Point.parse("resid_post.0"))
    report = gates.evaluate_gates(shallow, gates.GateSettings(n_documents=20, n_probe=100))
    assert report.verdict == gates.ELSEWHERE
    control = next(check for check in report.checks if check.name.startswith("random difference at every other point"))
    assert control.share <= gates.PATCH_MAX


def test_a_missing_model_and_an_unknown_variant_are_refused(used: Target, tmp_path) -> None:
    with pytest.raises(TargetError):
        Target.load(tmp_path, POINT)
    with pytest.raises(ArgumentError):
        gates.evaluate_gates(used, gates.GateSettings(variant="plane"))
