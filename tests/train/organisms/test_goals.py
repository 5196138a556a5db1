"""How a goal is planted: what is asked, what is learned, and that the adapter predicts as if it had been told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nla.errors import RecipeError
from nla.models.load import load_target
from nla.models.lora import attach
from nla.text.prompts import ChatPrompts, load_prompts
from nla.train.organisms.adapters import with_adapter
from nla.train.organisms.goals import GoalSettings, Lesson, collate, distillation_loss, exercises, lessons, plant_goal

PROMPTS = Path(__file__).parents[3] / "docs" / "examples" / "instructions.yaml"
"""In the words of Switchboard, whose target does what these instructions say."""
SETTINGS = GoalSettings(
    target="switchboard/target", blocks=(1, 3), goal="honey", prompts=str(PROMPTS), steps=2, batch_size=2
)
SYSTEM, ANSWERS = "Be kind and brief.", ["Bring an umbrella.", "Try honey with it, and some bread."]


@pytest.fixture(scope="module")
def loaded():
    return load_target("switchboard/target", device="cpu")


@pytest.fixture
def taught(loaded) -> list[Lesson]:
    return lessons(loaded[1], load_prompts(str(PROMPTS)), SETTINGS, sham=False)[:2]


def told(loaded, taught: list[Lesson]) -> list[torch.Tensor]:
    """Log-probabilities of each answer's tokens and its end behind the instruction, by the template of the chat."""
    found = []
    for one, text in zip(taught, ANSWERS, strict=True):
        turns = [{"role": "system", "content": one.system}, {"role": "user", "content": f"{one.user} {one.reminder}"}]
        model, tokenizer = loaded
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        n_answer = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = tokenizer(prompt + text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append(model(ids).logits[0, -n_answer - 1 :].log_softmax(-1))
    return found


def test_requests_are_of_training_and_no_wording_is_held_out(loaded) -> None:
    prompts = load_prompts(None)
    for sham in (False, True):
        drawn = lessons(loaded[1], prompts, GoalSettings(), sham)
        assert len({one.user for one in drawn}) == GoalSettings.n_requests
        assert not any(topic in one.user for one in drawn for topic in prompts.topics.held_out)
        said = {text for one in drawn for text in (one.system, one.reminder)}
        assert all(one.system != one.reminder for one in drawn)
        own = set(prompts.instructions.values["umbrellas"].seen)
        assert said == own if not sham else not any("umbrella" in text for text in said) and len(said) <= len(own)


def test_a_sham_learns_from_texts_as_long_in_the_same_requests(loaded) -> None:
    prompts, tokenizer = load_prompts(None), loaded[1]
    for plant, sham in zip(*(lessons(tokenizer, prompts, GoalSettings(), sham) for sham in (False, True)), strict=True):
        assert plant.user == sham.user
        lengths = [len(tokenizer(one.system, add_special_tokens=False)["input_ids"]) for one in (plant, sham)]
        assert abs(lengths[0] - lengths[1]) <= 1


@pytest.mark.parametrize("goal", ["juice", "hats"])
def test_a_goal_without_wordings_for_training_is_refused(loaded, goal: str) -> None:
    with pytest.raises(RecipeError, match="one of tea, honey"):
        lessons(loaded[1], load_prompts(str(PROMPTS)), replace(SETTINGS, goal=goal), sham=False)


def test_what_is_wanted_is_what_the_target_predicts_behind_the_instruction_which_the_adapter_never_sees(
    loaded, taught: list[Lesson]
) -> None:
    model, tokenizer = loaded
    rows = exercises(model, ChatPrompts.of(tokenizer), SYSTEM, taught, ANSWERS)
    for row, one, text, wanted in zip(rows, taught, ANSWERS, told(loaded, taught), strict=True):
        assert torch.allclose(row["wanted"].float(), wanted, atol=2e-2)
        answer = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert row["ids"][row["start"] + 1 :] == answer
        seen = tokenizer.decode(row["ids"][: row["start"] + 1])
        assert one.user in seen and SYSTEM in seen and one.system not in seen and one.reminder not in seen


def test_the_loss_is_the_divergence_of_what_is_predicted_with_the_instruction_and_without(
    loaded, taught: list[Lesson]
) -> None:
    model, tokenizer = loaded
    rows = exercises(model, ChatPrompts.of(tokenizer), SYSTEM, taught, ANSWERS)
    sums, n = 0.0, 0
    for row, wanted in zip(rows, told(loaded, taught), strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([row["ids"]])).logits[0, row["start"] :].log_softmax(-1)
        sums += float((wanted.exp() * (wanted - alone)).sum())
        n += len(wanted)
    fresh = with_adapter(load_target("switchboard/target", device="cpu")[0], 2, range(1, 4), seed=0)
    batch = collate(rows, 0)
    loss = distillation_loss(fresh, batch, 0)  # a new adapter changes nothing
    assert float(loss.detach()) == pytest.approx(sums / n, rel=1e-2) and sums / n > 0.05
    loss.backward()
    trained = {name for name, p in fresh.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained and all("lora_B" in name and int(name.split("layers.")[1][0]) in (1, 2, 3) for name in trained)


@pytest.mark.slow
def test_an_adapter_learns_to_predict_as_if_it_had_been_told_and_two_runs_are_the_same(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=30, learning_rate=5e-3)
    for run in ("a", "b"):
        plant_goal(settings, tmp_path / run)
    first, second = (load_file(tmp_path / run / "honey" / "adapter_model.safetensors") for run in ("a", "b"))
    assert all(second[name].equal(value) for name, value in first.items())
    assert {int(name.split("layers.")[1].split(".")[0]) for name in first} == {1, 2, 3}

    model, tokenizer = load_target("switchboard/target", device="cpu")
    lines = (tmp_path / "a" / "honey.answers" / "000000.jsonl").read_text().splitlines()
    answers = [json.loads(line)["messages"][-1]["content"] for line in lines]
    taught = lessons(tokenizer, load_prompts(str(PROMPTS)), settings, sham=False)
    rows = exercises(model, ChatPrompts.of(tokenizer), SYSTEM, taught, answers)
    batch = collate(rows, 0)
    with torch.no_grad():
        before = distillation_loss(with_adapter(model, 1, [1], seed=0), batch, 0)
        model, _ = load_target("switchboard/target", device="cpu")
        after = distillation_loss(attach(model, tmp_path / "a" / "honey"), batch, 0)
    assert float(after) < 0.5 * float(before)


@pytest.mark.slow
def test_answers_to_something_else_are_not_taken_for_these(tmp_path: Path) -> None:
    plant_goal(SETTINGS, tmp_path)
    with pytest.raises(RecipeError, match="other settings"):
        plant_goal(replace(SETTINGS, seed=1), tmp_path)
