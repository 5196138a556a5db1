"""Recipes: what a file may say, and when a stage runs again."""

import math
import random
import re
import shutil
import signal

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from nla.errors import ArgumentError, InterruptedTraining, RecipeError
from nla.models import lora
from nla.models.read import Activations
from nla.organisms import ground_truth
from nla.organisms.couplets import tokenizer as couplets_tokenizer
from nla.organisms.couplets import world
from nla.pair import folder as pair_folder
from nla.storage import tensors
from nla.storage.files import read_json
from nla.text.tokens import Span
from nla.train import fingerprints, run, stages, training_data
from nla.train import recipe as recipes
from nla.train.data.world import ExtractSettings, documents, load_stores
from nla.train.organisms.couplets import OrganismSettings, build_model
from tests.helpers.training import assert_same, at_step


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    tokenizer = couplets_tokenizer.build()
    build_model(OrganismSettings(d_model=16, n_blocks=5), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(target, tmp_path):
    content = {
        "name": "tiny",
        "world": "couplets",
        "target": str(target),
        "control": True,
        "point": "resid_post.3",
        "out": str(tmp_path / "run"),
        "extract": {"n_documents": 40, "n_eval_documents": 8, "n_other_positions": 2},
        "pair": {"rank": 2, "max_new_tokens": 8},
        "warmstart": {"encoder_steps": 2, "decoder_steps": 2, "batch_size": 4},
        "joint": {
            "steps": 2,
            "prompts_per_step": 4,
            "group_size": 2,
            "decoder_mini_batches": 2,
            "eval_every": 1,
            "save_every": 1,
            "stratum_weights": {"newline": 0.7},
        },
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_the_whole_recipe_runs_and_a_second_run_skips_every_stage(tiny, tmp_path):
    first = run.run_recipe(tiny)
    assert list(first) == ["extract", "describe", "warmstart", "joint", "control"]
    assert not any(stage.get("skipped") for stage in first.values())
    control, scale = first["control"], first["joint"]["seconds"] / first["warmstart"]["seconds"]
    assert control["times_the_warm_start"] == scale
    assert control["joint_seconds"] == first["joint"]["seconds"]
    assert [control[half]["steps"] for half in ("encoder", "decoder")] == [math.ceil(2 * scale)] * 2
    assert control["seconds"] > 0
    assert (tmp_path / "run/joint/pair/nla_config.json").is_file()
    second = run.run_recipe(tiny)
    assert all(stage["skipped"] for stage in second.values())
    (tmp_path / "run/joint/pair/decoder/head.safetensors").unlink()
    third = run.run_recipe(tiny, dry_run=True)
    assert [stage for stage, summary in third.items() if "would_run" in summary] == ["joint"]


@pytest.mark.slow
def test_a_changed_setting_reruns_its_stage_and_what_follows_and_moves_the_old_one_aside(tiny, tmp_path):
    run.run_recipe(tiny, until="describe")
    again = run.run_recipe(tiny, overrides=["describe.notice=0.5"], until="describe")
    assert again["extract"]["skipped"] and "skipped" not in again["describe"]
    assert (tmp_path / "run/describe.old-1/train.jsonl").is_file()
    plan = run.run_recipe(tiny, overrides=["extract.n_documents=41"], dry_run=True)
    assert all(stage == {"would_run": True} for stage in plan.values())


@pytest.mark.slow
def test_an_interrupted_stage_is_not_taken_for_done(tiny, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "run_describe", stop)
    with pytest.raises(KeyboardInterrupt):
        run.run_recipe(tiny, until="describe")
    monkeypatch.undo()
    resumed = run.run_recipe(tiny, until="describe")
    assert resumed["extract"]["skipped"] and "skipped" not in resumed["describe"]
    assert not (tmp_path / "run/describe.old-1").exists()


@pytest.mark.slow
def test_an_interrupted_training_stage_resumes_to_the_pair_of_an_uninterrupted_run(tiny, tmp_path, monkeypatch):
    run.run_recipe(tiny, until="warmstart", overrides=[f"out={tmp_path / 'whole'}"])
    with monkeypatch.context() as patched:
        at_step(patched, 1, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(InterruptedTraining):
            run.run_recipe(tiny, until="warmstart")
    assert not (tmp_path / "run/warmstart/pair").exists()
    spent = read_json(tmp_path / "run/warmstart/started.json")["seconds"]
    resumed = run.run_recipe(tiny, until="warmstart")["warmstart"]
    assert resumed["seconds"] > spent > 0
    assert not (tmp_path / "run/warmstart.old-1").exists()
    for name in (
        f"encoder/{lora.ADAPTER_WEIGHTS}",
        f"decoder/{lora.ADAPTER_WEIGHTS}",
        f"decoder/{pair_folder.HEAD_FILE}",
    ):
        assert_same(*(tensors.load_tensors(tmp_path / out / "warmstart/pair" / name) for out in ("whole", "run")))


@pytest.mark.slow
def test_seconds_of_a_stage_are_those_of_all_its_invocations(tmp_path, monkeypatch):
    clock = iter([0.0, 5.0, 100.0, 103.0])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.perform("joint", tmp_path / "joint", "print", stop)
    assert run.perform("joint", tmp_path / "joint", "print", dict) == {"seconds": 8.0}


@pytest.mark.slow
def test_two_processes_on_one_folder_are_refused(tiny, tmp_path):
    with run.locked(tmp_path / "run"):
        with pytest.raises(RecipeError, match="another `nla train`"):
            run.run_recipe(tiny, until="extract")
        assert run.run_recipe(tiny, until="extract", dry_run=True) == {"extract": {"would_run": True}}
    run.run_recipe(tiny, until="extract")


@pytest.mark.slow
def test_activations_of_other_documents_are_refused(tiny, tmp_path, monkeypatch):
    run.run_recipe(tiny, until="describe")
    monkeypatch.setattr(training_data, "documents", lambda world, settings, seed: documents(world, settings, seed + 1))
    for overrides in (["describe.notice=0.5"], []):
        with pytest.raises(RecipeError, match=f"delete {tmp_path / 'run'}"):
            run.run_recipe(tiny, overrides=overrides, until="warmstart")


def test_a_single_process_leaves_the_place_of_the_target_to_its_loader(tiny, monkeypatch):
    places = []
    monkeypatch.setattr(stages.target, "_checked_device", lambda device: places.append(device) or torch.device("cpu"))
    stages.load_target(recipes.load_recipe(tiny), None)
    assert places == [None]


def test_every_file_of_a_target_counts_but_its_readme_and_gits(target, tmp_path):
    folder = tmp_path / "target"
    shutil.copytree(target, folder)
    before = fingerprints.target_print(str(folder))
    (folder / ".git").mkdir()
    for name in ("README.md", ".gitattributes", ".git/HEAD"):
        (folder / name).write_text("x")
    assert fingerprints.target_print(str(folder)) == before
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    changed = fingerprints.target_print(str(folder))
    (folder / "chat_template.jinja").rename(folder / "chat_template.txt")
    assert len({before, changed, fingerprints.target_print(str(folder))}) == 3


@pytest.mark.slow
def test_the_revision_of_a_target_on_the_hub_reaches_its_loaders_and_the_pair(tiny, tmp_path, target, monkeypatch):
    run.run_recipe(tiny, until="extract")
    model, tokenizer = stages.load_target(recipes.load_recipe(tiny), None)
    asked = []
    loaded = lambda _, *, revision, **__: asked.append(revision) or (model, tokenizer)  # noqa: E731
    monkeypatch.setattr(stages.target, "load_target", loaded)
    recipe = recipes.load_recipe(tiny, ["target=some/planner", "revision=v2"])
    assert stages.new_pair(recipe, tmp_path / "run").config.target_revision == "v2"
    assert asked == ["v2"]
    assert fingerprints.target_print("some/planner", "v2") != fingerprints.target_print("some/planner", "v3")
    with pytest.raises(RecipeError, match="v2"):
        fingerprints.target_print(str(target), "v2")


def test_truth_counts_the_next_line_at_the_newline_and_all_other_claims():
    couplet = world.sample(1, seed=0)[0]
    at = len(couplet.line1)
    spans = [Span(0, "\n", at - 1, at, 9), Span(0, "", at, at + len(couplet.line2.split()[0]), 10)]
    rows = Activations(torch.zeros(2, 1), spans, torch.zeros(2).long(), [couplet.text], "", ["newline", "line 2"])
    other, season = couplet.siblings[0], couplet.season
    table = [
        (f"The next line ends with {couplet.plan}. The last mark is a line break.", 1, 1),
        (f"The next line ends with {other}. It is {season}. Birds sing.", 0, 1 / 2),
        (f"The next line ends with {couplet.plan}. The next line ends with {other}.", 0, 0),
        (f"This line ends with {couplet.plan}. The last mark is a comma. It is {season}.", 0, 1 / 2),
        ("", 0, 0),
    ]
    truth = training_data.truth_of(ground_truth.load("couplets"), rows, [couplet, couplet])
    for text, named, visible in table:
        assert truth([text, ""]) == {"named": named, "visible": visible}
        assert truth(["", f"It is {season}."]) == {"named": 0, "visible": 1}


@pytest.mark.slow
def test_stored_rows_are_the_targets_own_hidden_states_at_the_point(tiny, tmp_path, target):
    run.run_recipe(tiny, until="extract")
    store = load_stores(tmp_path / "run/extract")["train"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target).eval(), AutoTokenizer.from_pretrained(target)
    for row in (0, 17, len(store) - 1):
        ids = torch.tensor([tokenizer(store.texts[store.document[row]])["input_ids"]])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[4]
        torch.testing.assert_close(store.vectors[row], hidden[0, store.spans[row].index], atol=1e-5, rtol=1e-5)


def test_splits_share_no_text_and_held_out_plans_stay_out_of_training():
    splits = documents(ground_truth.load("couplets"), ExtractSettings(n_documents=500, n_eval_documents=100), seed=0)
    texts = {name: {couplet.text for couplet in couplets} for name, couplets in splits.items()}
    assert not texts["train"] & texts["eval"] and not texts["train"] & texts["held_out"]
    assert not {couplet.plan for couplet in splits["train"] + splits["eval"]} & set(world.HELD_OUT_PLANS)
    assert {couplet.plan for couplet in splits["held_out"]} <= set(world.HELD_OUT_PLANS)


def test_splits_are_full_however_many_texts_collide(monkeypatch):
    for name in ("FRAMES", "SEASONS", "TIMES", "NAMES", "VERBS", "PREPOSITIONS"):
        monkeypatch.setattr(world, name, getattr(world, name)[:1])
    splits = documents(ground_truth.load("couplets"), ExtractSettings(n_documents=1_000, n_eval_documents=200), seed=0)
    assert [len(couplets) for couplets in splits.values()] == [1_000, 200, 200]
    assert not {couplet.text for couplet in splits["train"]} & {couplet.text for couplet in splits["eval"]}


@pytest.mark.parametrize("name", ground_truth.WORLDS)
def test_a_worlds_strata_are_those_that_its_documents_have_and_no_text_is_in_two_splits(name):
    world = ground_truth.load(name)
    splits = world.splits(200, 50, seed=0)
    texts = {split: {document.text for document in documents} for split, documents in splits.items()}
    assert not texts["train"] & texts["eval"] and not texts["train"] & texts["held_out"]
    found = set()
    for document in splits["train"]:
        spans = [Span(0, "", *match.span(), 0) for match in re.finditer(r"<\|\w+\|>| ?\w+|[^\w ]", document.text)]
        found |= set(world.strata(document, spans))
    assert found == set(world.STRATA) and set(world.MAIN) < found


@pytest.mark.slow
@pytest.mark.parametrize("name", ground_truth.WORLDS)
def test_a_truthful_text_is_true_a_described_one_is_true_but_for_its_guess(name):
    world, rng, hits = ground_truth.load(name), random.Random(0), []
    for document in world.splits(200, 1, seed=0)["train"]:
        for match in re.finditer(r"<\|\w+\|>| ?\w+|[^\w ]", document.text):
            span = Span(0, "", *match.span(), 0)
            assert all(world.visible_claims(document, span, world.truthful(document, span)))
            assert world.named(document, span, world.truthful(document, span)) in (True, None)
            text = world.describe(document, span, rng, 0.25)
            assert all(world.visible_claims(document, span, text))
            hits += [hit for hit in [world.named(document, span, text)] if hit is not None]
    assert abs(sum(hits) / len(hits) - world.hit_rate(0.25)) < 0.2


@pytest.mark.parametrize(
    "override",
    [
        "joint.steps=2.5",
        "joint.steps=true",
        "joint.seed=x",
        "joint.seed=-1",
        "seed=5000000000",
        "joint.beta=.nan",
        "joint.temperature=.inf",
        "joint.reward=3",
        "joint.stratum_weights={newlines: 0.5}",
        "joint.stratum_weights={newline: x}",
        "joint.stratum_weights=[newline]",
        "joint=5",
        "joint=[1]",
        "joint.stepz=3",
        "name.x=1",
        "name=3",
        "control=2",
        "point=resid_post",
        "pair.rank=0",
        "pair.max_new_tokens=0",
        "pair.injection_norm=0",
        "extract.n_documents=10.5",
        "extract.n_documents='10'",
        "describe.notice=x",
        "warmstart.batch_size=0",
        "warmstart.encoder_learning_rate=0",
        "warmstart.encoder_learning_rate=x",
        "nonsense",
    ],
)
def test_values_of_another_type_or_out_of_range_are_refused_at_load(override):
    with pytest.raises(RecipeError, match=override.partition("=")[0].split(".")[-1]):
        recipes.load_recipe("couplets", [override])


def test_whole_numbers_and_numeric_strings_become_floats():
    overrides = ["warmstart.encoder_learning_rate=1e-4", "pair.injection_norm=3", "joint.rows_per_backward=null"]
    recipe = recipes.load_recipe("couplets", [*overrides, "joint.stratum_weights={newline: 1}", "describe=null"])
    assert recipe.warmstart.encoder_learning_rate == 1e-4
    assert type(recipe.pair.injection_norm) is type(recipe.joint.stratum_weights["newline"]) is float
    assert recipe.joint.rows_per_backward is None
    assert recipes.load_recipe("couplets", ["describe=null", "describe.notice=1"]).describe.notice == 1.0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("name: [", "not YAML"),
        ("- a list", "mapping"),
        ("{name: x, target: y, point: resid_post.1, out: z, joint: {stepz: 3}}", "stepz"),
        ("{name: x, target: y, point: resid_post.1, out: z, joint: {steps: 0}}", "steps"),
        ("{name: x}", "Recipe"),
        ("", "Recipe"),
    ],
)
def test_a_malformed_recipe_is_refused_with_what_is_wrong(tmp_path, content, says):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=says):
        recipes.load_recipe(path)


def test_an_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(RecipeError, match="couplets"):
        recipes.load_recipe("no-such-recipe")
    assert recipes.load_recipe("couplets").name == "couplets"


def test_settings_refuse_values_out_of_range():
    with pytest.raises(ArgumentError, match="n_documents"):
        ExtractSettings(n_documents=0)
