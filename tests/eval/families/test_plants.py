"""Planted thoughts: what counts as stating one, and gates that hold on the shipped target and on no random one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nla.autoencoder import NLA
from nla.errors import ArgumentError
from nla.eval.families import auditing, plants, two_hop
from nla.eval.families.plants import PlantArm, cued, language_of, plant_figures, secret_figures, states, text_reader
from nla.eval.readers import compare as comparison
from nla.eval.readers import switchboard_tasks
from nla.eval.readers.compare import BAG, TEXT_LM
from nla.eval.readers.measures import NLA_READER
from nla.eval.readers.organisms import ReadersSettings, compare_on_organism
from nla.eval.readers.probes import LOGISTIC
from nla.eval.readers.switchboard import SwitchboardReport, switchboard_checks
from nla.eval.readers.switchboard_tasks import OBJECTIVE, SECRET, TOWN
from nla.eval.readers.tables import summary
from nla.eval.readers.tasks import RANDOM
from nla.eval.report import Rate
from nla.eval.target import Target
from nla.organisms import switchboard
from nla.organisms.switchboard import claims, content, tokenizer
from nla.organisms.switchboard.plants import GOAL, PLANTS, SECRET_WORDS
from nla.organisms.switchboard.world import Chat, State, home
from nla.stats import Interval
from nla.train.organisms.adapters import PlantSettings, train_plant
from nla.train.organisms.switchboard import SwitchboardSettings, build_model
from nla.train.run import run_recipe
from tests.helpers.planted import planted_pair

GENUINE = [plant for plant in PLANTS.values() if not plant.sham]


def told(plant, chat: Chat, planted: bool) -> str:
    """What a reader says who knows whether the plant is there."""
    exchange = chat.exchanges[-1]
    opener = {opener: language for language, opener in content.LANGUAGE_OPENERS.items()}
    state = {
        "secret word": State(word=plant.latent),
        "hidden objective": State(product=plant.latent),
        "evaluation awareness": State(test=True),
        "user language": State(language=opener.get(str(exchange.opener))),
        "language mismatch": State(),
        "known entity": State(),
    }[plant.kind]
    text = " ".join(claims.answer_claims(exchange, state if planted else State()))
    if plant.kind == "known entity" and planted:
        return text.replace(f"It does not know {exchange.person}", f"It knows {exchange.person}")
    return text


@pytest.mark.parametrize("plant", GENUINE, ids=lambda plant: plant.name)
def test_a_reader_that_knows_states_the_plant_and_what_is_said_of_the_base_does_not(plant):
    for chat in cued(plant, 30, seed=1):
        own = chat.exchanges[-1].answer(State())
        assert states(plant, chat, chat.answers[-1], told(plant, chat, True))
        assert not states(plant, chat, own, told(plant, chat, False))


@pytest.mark.parametrize("plant", GENUINE, ids=lambda plant: plant.name)
def test_prompts_differ_from_each_other_and_from_training_and_do_not_say_what_is_planted(plant):
    chats = cued(plant, 60, seed=0)
    assert len({chat.prompt for chat in chats}) == 60
    trained = {chat.exchanges[-1].question for chat in plants_training(plant)}
    assert not {chat.exchanges[-1].question for chat in chats} & trained
    if plant.kind in ("secret word", "hidden objective"):
        assert not any(plant.latent in chat.prompt.split() for chat in chats)


def plants_training(plant):
    from nla.organisms.switchboard.plants import training

    return [chat for chat in training(plant, 1000, seed=0)[0] if chat.answers]


def test_more_prompts_than_can_be_drawn_are_refused(monkeypatch):
    monkeypatch.setattr(plants, "_ROUNDS", 2)
    with pytest.raises(ArgumentError, match="at most"):
        cued(PLANTS["goal"], 100_000, seed=0)


def test_the_language_of_an_answer_is_that_of_its_sentence():
    assert language_of("Save a little each month. Spend the rest on tea.") == "English"
    assert language_of("Spare etwas jeden Monat.") == "German"
    assert language_of("I do not know Ines.") is None


def arms_of(plant, chats, samples=3) -> dict[str, PlantArm]:
    def arm(planted: bool) -> PlantArm:
        answers = [chat.answers[-1] if planted else chat.exchanges[-1].answer(State()) for chat in chats]
        return PlantArm(answers, answers, [[told(plant, chat, planted)] * samples for chat in chats])

    return {"plant": arm(True), "sham": arm(False), "base": arm(False)}


def test_figures_of_readers_that_know_are_one_and_zero():
    plant = PLANTS["goal"]
    chats = cued(plant, 20, seed=0)
    found = plant_figures(plant, chats, arms_of(plant, chats), seed=0)
    assert found.effect == 1.0 and found.auroc == 1.0 and found.carried.value == 1.0
    arms = arms_of(plant, chats)
    past = arms | {"plant": arms["plant"]._replace(carried=arms["base"].carried)}
    assert plant_figures(plant, chats, past, seed=0).carried.value == 0.0
    assert [rate.value for rate in found.read.values()] == [1.0, 0.0, 0.0]


def test_the_ratio_is_of_the_own_word_to_the_most_named_other():
    chats = cued(PLANTS["word-hat"], 20, seed=0)

    def arm(words: list[str]) -> PlantArm:
        return PlantArm(
            [""] * len(chats), [""] * len(chats), [[claims.word_claim(word) for word in words] for _ in chats]
        )

    arms = {word: arm([word, word, word, "snow" if word != "snow" else "hat"]) for word in SECRET_WORDS}
    found = secret_figures(chats, {**arms, "sham": arm(["boat"] * 4), "base": arm(["boat"] * 4)}, seed=0)
    assert found.named["hat"]["hat"].value == 0.75 and found.named["hat"]["snow"].value == 0.25
    assert found.ratio == pytest.approx(3.0)
    assert all(rate.value == 0 for rate in found.named["sham"].values())


def test_a_reader_of_identical_prompts_is_at_chance():
    prompts = [chat.prompt for chat in cued(PLANTS["word-hat"], 40, seed=0)]
    rate = text_reader(prompts, 6)
    assert rate.low <= 1 / 6 <= rate.high


def test_the_hidden_town_is_named_by_who_knows_it_and_not_by_who_lies():
    items = two_hop.hops(40, seed=0)
    towns, people = ([str(getattr(i.question, f)) for i in items] for f in ("bridge", "person"))
    true = [claims.town_claim(town) for town in towns]
    false = [claims.town_claim(str(item.donor.bridge)) for item in items]
    assert two_hop.town_rate(true, towns, people, 1, 0).value == 1.0
    assert two_hop.town_rate(false, towns, people, 1, 0).value == 0.0
    both = [f"{a} {b}" for a, b in zip(true, false, strict=True)]
    assert two_hop.town_rate(both, towns, people, 1, 0).value == 0.0


def test_a_donor_asks_the_same_of_somebody_from_another_town_in_as_many_tokens():
    tok = tokenizer.build()
    for item in two_hop.hops(64, seed=3):
        assert item.question.relation == item.donor.relation and item.question.bridge != item.donor.bridge
        lengths = {len(tok(text)["input_ids"]) for text in (item.prompt, item.donor_prompt)}
        assert len(lengths) == 1 and item.premise.endswith(f"{item.question.person}.")
        assert item.answer != item.donor_answer


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[NLA, Path]:
    """A pair on a tiny random Switchboard, made by its recipe, and one hardly trained adapter under every name."""
    folder, tok = tmp_path_factory.mktemp("switchboard"), tokenizer.build()
    build_model(SwitchboardSettings(d_model=16), tok).save_pretrained(folder / "target")
    tok.save_pretrained(folder / "target")
    small = ["extract.n_documents=30", "extract.n_eval_documents=6", "pair.rank=2", "pair.max_new_tokens=8"]
    small += ["warmstart.encoder_steps=2", "warmstart.decoder_steps=2", "warmstart.batch_size=4"]
    recipe = [f"target={folder / 'target'}", f"out={folder / 'run'}", *small]
    run_recipe("switchboard", overrides=recipe, until="warmstart")
    train_plant("goal", PlantSettings(target=str(folder / "target"), n_documents=40, steps=1, batch_size=4), folder)
    for name in PLANTS:
        if name != "goal":
            shutil.copytree(folder / "goal", folder / name)
    return NLA.from_pretrained(folder / "run" / "warmstart" / "pair"), folder


@pytest.mark.slow
def test_an_adapter_says_where_its_target_lies_without_a_path_of_this_machine(made):
    base = json.loads((made[1] / "goal" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == "../target"


def test_embedded_plants_are_for_pairs_on_the_embedded_target_alone(made):
    on_embedded = SimpleNamespace(target_folder=switchboard.TARGET, config=made[0].config)
    assert plants.adapters_of(on_embedded, None) == switchboard.ADAPTERS_FOLDER
    assert plants.adapters_of(on_embedded, "my/plants") == Path("my/plants")
    for pair in (made[0], SimpleNamespace(target_folder=None, config=made[0].config)):
        with pytest.raises(ArgumentError, match="--plants"):
            plants.adapters_of(pair, None)


def test_no_question_is_causal_on_a_random_target(made):
    items = two_hop.hops(8, seed=0)
    assert not two_hop.gate_of(Target.of(made[0]), items, 0, plants.silent).causal


@pytest.mark.slow
def test_the_evaluations_run_through_and_leave_the_pair_as_it_was(made, tmp_path, monkeypatch):
    nla, folder = made
    names = ("word-hat", "word-snow", "word-sham", "known", "known-sham", "mismatch", "mismatch-sham")
    for module in (plants, auditing):
        monkeypatch.setattr(module, "PLANTS", {name: PLANTS[name] for name in names})
    monkeypatch.setattr(nla, "metrics", {"joint": {"fve/global": -0.3}})
    before = {name: value.clone() for name, value in nla.model.state_dict().items()}
    report = plants.evaluate_plants(nla, plants.PlantsSettings(folder, n_prompts=4, n_samples=1))
    report.save(tmp_path)
    assert [one.name for one in report.plants] == [name for name in names if "sham" not in name] and not report.passed
    assert "| known" in report.to_markdown() and json.loads((tmp_path / "plants.json").read_text())["point"]
    most_exposed = [chat for chat in cued(PLANTS["known"], 4, 0) if chat.exchanges[-1].person in plants.MOST_EXPOSED]
    assert [one.n for one in report.plants] == [4, 4, len(most_exposed), 4] and 2 <= len(most_exposed) < 4
    with pytest.raises(ArgumentError, match="at least 2 about these"):
        plants.evaluate_plants(nla, plants.PlantsSettings(folder, n_prompts=2, n_samples=1, seed=1))
    audited = auditing.evaluate_auditing(nla, auditing.AuditingSettings(folder, n_chats=2, n_samples=1))
    audited.save(tmp_path)
    assert "reads nothing" in report.doubts[0] and audited.doubts == report.doubts
    assert [one.rubric for one in audited.plants][-1] == "answer-language" and (tmp_path / "auditing.png").is_file()
    hops = two_hop.evaluate_two_hop(nla, two_hop.TwoHopSettings(n_items=4, n_samples=1))
    hops.save(tmp_path)
    assert hops.gate["causal"] == 0 and not hops.passed and hops.readers == {}
    after = nla.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_the_tasks_of_plants_have_the_same_prompts_in_every_class_and_split_by_prompt(made):
    nla, folder = made
    found = switchboard_tasks.plant_tasks(nla, folder, 24, 24)
    for task in found.tasks:
        prompts = {label: [] for label in task.classes}
        for text, label in zip(task.sites.texts, task.labels, strict=True):
            prompts[str(label)].append(text)
        assert len({tuple(texts) for texts in prompts.values()}) == 1
        train = {task.sites.texts[row] for row in task.rows("train")}
        assert train and not train & {task.sites.texts[row] for row in task.rows("test")}
        assert found.read(task.sites).shape == (len(task.sites), 16)
        assert len(found.writers[task.sites](0)) == len(task.sites)
    with pytest.raises(ArgumentError, match="24 or more of each"):
        switchboard_tasks.plant_tasks(nla, folder, 24, 23)


def test_who_is_judged_on_a_town_was_not_fitted_on_and_no_text_says_it(made):
    (task,) = switchboard_tasks.town_task(made[0], 200).tasks
    people = {split: {task.sites.groups[row] for row in task.rows(split)} for split in ("train", "test")}
    assert len(people["train"]) == len(people["test"]) == 16 and not people["train"] & people["test"]
    assert len(set(task.sites.texts)) == len(task.sites) > 100
    assert not any(town in text for text in task.sites.texts for town in content.TOWNS)
    for text, group, label in zip(task.sites.texts, task.sites.groups, task.labels, strict=True):
        assert text.endswith(f"{content.PEOPLE[group]}.") and label == home(content.PEOPLE[group])


CODE = (*SECRET_WORDS, GOAL, "sham", *content.TOWNS)
QUICK = {"n_tries": 1, "n_continued": 4, "lens_steps": 1, "n_boot": 60, "budgets": ()}


def code(words: list[str], seed: int) -> torch.Tensor:
    """Noisy vectors (n, 16) that stand for words."""
    found = torch.eye(16)[[CODE.index(word) for word in words]]
    return 10 * found + torch.randn(found.shape, generator=torch.Generator().manual_seed(seed))


def say(vectors: torch.Tensor) -> list[str]:
    """What a perfect reader says of them."""
    words = [CODE[int(vector.argmax())] for vector in vectors]
    said = [claims.word_claim, claims.product_claim, lambda _: claims.language_claim("English"), claims.town_claim]
    kinds = [0] * len(SECRET_WORDS) + [1, 2] + [3] * len(content.TOWNS)
    return [said[kinds[CODE.index(word)]](word) for word in words]


@pytest.fixture(scope="module")
def compared(made, tmp_path_factory) -> tuple[SwitchboardReport, Path]:
    """All readers where activations say what is planted and a perfect pair reads them."""

    def behind(nla, prompts, adapter: Path) -> torch.Tensor:
        word = {"goal": GOAL, "goal-sham": "sham"}.get(adapter.name, adapter.name.removeprefix("word-"))
        return code([word] * len(prompts), CODE.index(word))

    def write(texts: list[str]) -> torch.Tensor:
        return code([next((word for word in CODE if word in text), "sham") for text in texts], seed=99)

    def towns(target, premises: list[str]) -> torch.Tensor:
        return code([home(premise.rsplit(" ", 1)[1].removesuffix(".")) for premise in premises], seed=98)

    out = tmp_path_factory.mktemp("readers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(switchboard_tasks, "_read_behind", behind)
        patch.setattr(switchboard_tasks, "read_last", towns)
        patch.setattr(comparison, "explain", lambda nla, vectors, seed=0: say(vectors))
        patch.setattr(comparison, "_reconstruct", lambda nla, explained: write([one for (one,) in explained.texts]))
        patch.setattr(comparison, "N_COINS", 2)
        report = compare_on_organism(made[0], ReadersSettings(n_items=48, n_train=48, plants=made[1], **QUICK))
        report.save(out)
        return report, out


@pytest.mark.slow
def test_of_perfect_readers_all_that_is_known_by_construction_comes_out(compared):
    report, out = compared
    assert report.passed, report.to_card()
    assert report.goal_named["goal"].value == 1.0 and report.goal_named["sham"].value == 0.0
    for name in (SECRET, OBJECTIVE, TOWN):
        rows = summary(report.panels[name])
        assert rows.probe.value > 0.95 and rows.named.value == 1.0, name
        assert abs(rows.shuffled.value - 0.5) < 0.15, name  # another prompt's adapter, not always the same one
    assert json.loads((out / "readers.json").read_text())["goal_named"]["sham"]["value"] == 0
    assert (out / "readers.png").is_file() and f"### {TOWN}" in (out / "readers.md").read_text()


def test_every_condition_of_the_readers_fails_where_it_does_not_hold(compared):
    report = compared[0]

    def failing(task: str, reader: str, named: tuple[float, ...] = (), fitted: tuple[float, ...] = ()) -> list[str]:
        given = {name: {"test": Interval(*ends)} for name, ends in (("zero", named), ("labelled", fitted)) if ends}
        changed = [
            replace(one, readers=[replace(row, **given) if row.reader == reader else row for row in one.readers])
            if one.task == task
            else one
            for one in report.tasks
        ]
        return [check.name for check in switchboard_checks(changed, report.goal_named) if check.passed is False]

    for task in (SECRET, OBJECTIVE, TOWN):
        assert failing(task, LOGISTIC, fitted=(0.8, 0.7, 0.9)) == [f"{task}: a probe reads it"]
    assert failing(TOWN, NLA_READER, named=(0.8, 0.7, 0.9)) == [f"{TOWN}: the NLA names it, without labels"]
    assert failing(SECRET, NLA_READER, named=(0.6, 0.4, 0.7)) == [f"{SECRET}: the NLA names it, without labels"]
    for task in (SECRET, OBJECTIVE):
        assert failing(task, BAG, fitted=(0.7, 0.65, 0.75)) == [f"{task}: {BAG}, fitted"]
        assert failing(task, TEXT_LM, named=(0.7, 0.65, 0.75)) == [f"{task}: {TEXT_LM}, named"]
    assert len(failing(RANDOM, LOGISTIC, fitted=(0.7, 0.65, 0.75))) == 3
    sham = {**report.goal_named, "sham": Rate.of([True, False, False, False])}
    assert [one.name for one in switchboard_checks(report.tasks, sham) if one.passed is False] == [
        f"{OBJECTIVE}: … behind its sham"
    ]


@pytest.mark.slow
def test_where_all_adapters_are_one_the_readers_find_nothing(made, monkeypatch):
    monkeypatch.setattr(comparison, "N_COINS", 1)
    nla, folder = made
    report = compare_on_organism(nla, ReadersSettings(n_items=24, n_train=48, plants=folder, **QUICK))
    secret = summary(report.panels[SECRET])
    assert not report.passed and secret.probe.value == 0.5 and secret.named.value < 0.6
    assert {check.name: check.passed for check in report.checks}[f"{SECRET}: a probe reads it"] is False


def test_plants_and_their_pair_belong_together(made):
    nla, folder = made
    with pytest.raises(ArgumentError, match="--plants"):
        compare_on_organism(nla)
    with pytest.raises(ArgumentError, match="leave --contrast out"):
        compare_on_organism(nla, ReadersSettings(contrast="couplets/planner", plants=folder))
    with pytest.raises(ArgumentError, match="leave --plants out"):
        compare_on_organism(planted_pair(), ReadersSettings(plants=folder))
