"""Which stages a changed key of a recipe makes run again: exactly those whose result it decides, and what follows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from nla.storage.files import read_json, write_json
from nla.train import run
from nla.train.fingerprints import fingerprints, former_fingerprints, target_print
from nla.train.recipe import Recipe, load_recipe
from nla.train.schema import STAGES

FIRST = {
    "sample": "corpus.prompts sample.max_new_tokens sample.temperature sample.top_p sample.batch_size",
    "extract": """target revision point world dtype quantization seed
        corpus.source corpus.kind corpus.config corpus.split corpus.revision corpus.streaming corpus.text_column
        corpus.n_documents corpus.max_tokens corpus.positions corpus.n_positions corpus.first_position
        corpus.eval_fraction corpus.n_eval corpus.split_key corpus.documents_per_chunk corpus.mix
        extract.n_documents extract.n_eval_documents extract.n_other_positions""",
    "describe": """describe.notice describer.describer describer.model describer.url describer.temperature
        describer.tries describer.max_tokens describer.max_chars describer.seed describer.dtype describer.revision
        describer.quantization texts.n_train pair.marker pair.encoder_prompt pair.decoder_template""",
    "warmstart": """pair.rank pair.max_new_tokens pair.injection_norm pair.alpha pair.head_bias
        warmstart.encoder_steps warmstart.decoder_steps warmstart.batch_size warmstart.encoder_learning_rate
        warmstart.decoder_learning_rate warmstart.head_learning_rate""",
    "joint": """joint.steps joint.prompts_per_step joint.group_size joint.encoder_learning_rate
        joint.decoder_learning_rate joint.beta joint.temperature joint.stratum_weights joint.reward
        joint.replay_fraction joint.decoder_mini_batches joint.seed texts.n_scored""",
    "none": """name out control hardware.name hardware.devices hardware.tflops hardware.memory_gb hardware.bandwidth_gbs
        hardware.utilisation shape.n_blocks shape.d_model shape.d_mlp shape.n_heads shape.n_kv_heads shape.head_dim
        shape.vocabulary shape.tied describer.key_variable describer.concurrency describer.timeout_s
        describer.price_in describer.price_out describer.budget_usd describer.failing_share describer.parameters_b
        warmstart.eval_every warmstart.save_every warmstart.rows_per_backward warmstart.gradient_checkpointing
        joint.eval_every joint.save_every joint.rows_per_backward joint.gradient_checkpointing""",
}
"""Of each key, the first stage that it decides: written down from what the stages read, not from the code."""
WRITTEN = """target revision seed dtype quantization corpus.source corpus.n_documents corpus.eval_fraction
    corpus.n_eval corpus.split_key corpus.documents_per_chunk"""
"""Keys that decide what the stage "sample" writes, in a recipe that has it."""
ENGLISH = Path(__file__).parents[2] / "nla" / "text" / "prompt_files" / "english.yaml"
OTHER = {
    "target": "some/other",
    "seed": 7,
    "describer.seed": 7,
    "joint.seed": 7,
    "revision": "v2",
    "point": "resid_post.2",
    "world": "switchboard",
    "dtype": "float16",
    "quantization": "4bit",
    "corpus.kind": "lines",
    "corpus.revision": "v2",
    "corpus.text_column": "body",
    "corpus.positions": "last",
    "corpus.n_eval": 7,
    "describer.describer": "openai",
    "describer.url": "http://localhost:1/v1",
    "describer.key_variable": "ANOTHER_KEY",
    "describer.temperature": 0.5,
    "describer.dtype": "float16",
    "describer.revision": "v2",
    "describer.quantization": "4bit",
    "describer.price_in": 1.0,
    "describer.price_out": 1.0,
    "describer.budget_usd": 1.0,
    "describer.parameters_b": 3.0,
    "pair.marker": "#",
    "pair.injection_norm": 2.0,
    "pair.alpha": 2.0,
    "pair.encoder_prompt": "Say {marker}.",
    "pair.decoder_template": "Of {explanation}:",
    "joint.stratum_weights": {"newline": 0.5},
    "joint.reward": "neg_mse",
    "joint.group_size": 4,
    "warmstart.rows_per_backward": 2,
    "joint.rows_per_backward": 2,
}
"""Values for keys whose default is no number, or to which not every number can be added."""


def recipes() -> tuple[Recipe, Recipe, Recipe, Recipe]:
    """One of a world; two of a corpus, whose describers are a local model and an endpoint; one that writes its own."""
    local = load_recipe("qwen2.5-0.5b", ["describer.parameters_b=null"])
    asked = ["describer.describer=anthropic", "describer.model=m", "describer.price_in=2", "describer.price_out=2"]
    return (
        load_recipe("couplets", ["target=some/hub", "joint.stratum_weights={}"]),
        local,
        load_recipe("qwen2.5-0.5b", ["describer={}", *asked]),
        load_recipe("qwen2.5-0.5b", ["corpus={source: self, n_documents: 50, n_positions: 3}"]),
    )


def keys() -> list[str]:
    """Every key of a recipe, from its classes."""
    world, local, *_ = recipes()
    found = []
    for recipe, field in [(r, f) for r in (world, local) for f in dataclasses.fields(Recipe)]:
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            found += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(value)]
        elif field.name not in ("corpus", "shape"):
            found.append(field.name)
    return list(dict.fromkeys(found))


def changed(recipe: Recipe, key: str) -> Recipe:
    """The recipe with another value at a key; TypeError or ArgumentError: it cannot have one."""
    section, _, name = key.rpartition(".")
    part: Any = getattr(recipe, section) if section else recipe
    before = getattr(part, name)
    value = OTHER.get(key)
    if value is None:
        value = (
            (not before) if isinstance(before, bool) else before * 2 if not isinstance(before, str) else before + "x"
        )
        value = (
            value if name not in ("failing_share", "eval_fraction", "notice", "utilisation", "top_p") else before / 2
        )
    assert value != before
    part = dataclasses.replace(part, **{name: value})
    return dataclasses.replace(recipe, **{section: part}) if section else part


def prints(recipe: Recipe) -> dict[str, str]:
    return fingerprints(recipe, target_print(recipe.target, recipe.revision))


def test_every_key_of_a_recipe_is_in_the_table_once() -> None:
    listed = [key for names in FIRST.values() for key in names.split()]
    assert sorted(listed) == sorted(keys())


@pytest.mark.parametrize("key", keys())
def test_a_changed_key_runs_the_stages_again_that_it_decides_and_no_other(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "more.txt").write_text("More.")
    monkeypatch.setitem(OTHER, "corpus.mix", [str(tmp_path / "more.txt")])
    (tmp_path / "own.yaml").write_text(ENGLISH.read_text().replace("football, ", ""))
    monkeypatch.setitem(OTHER, "corpus.prompts", str(tmp_path / "own.yaml"))
    listed = next(stage for stage, names in FIRST.items() if key in names.split())
    n_tried = 0
    for recipe in recipes():
        try:
            other = changed(recipe, key)
        except (ValueError, TypeError, AttributeError):  # not a key of this kind of recipe
            continue
        n_tried += 1
        before, after = prints(recipe), prints(other)
        first = "sample" if recipe.writes_corpus and key in WRITTEN.split() else listed
        expected = list(STAGES[STAGES.index(first) :]) if first != "none" else []
        assert [stage for stage in before if before[stage] != after.get(stage)] == expected
    assert n_tried, "the key was changed in no recipe"


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("couplets", "f4a32c69422c 842edf8110ac bf5a03faabdb 49621499f0b4 d9c88eb7dc4f"),
        ("switchboard", "3e01a66d9b6f 130a11f15e0a e46338339825 260849dc5337 dbe7a969d359"),
        ("qwen2.5-7b", "592d112348e8 46256e300d37 93c2adb1d64e ba3fe5a51cd9 bfe8c38857aa"),
    ],
)
def test_stages_that_0_4_finished_stay_finished(name: str, starts: str) -> None:
    """What `fingerprints` of version 0.4 gives for the shipped recipes."""
    assert [print_[:12] for print_ in fingerprints(load_recipe(name), "T").values()] == starts.split()


def test_a_comment_in_the_prompts_and_their_place_decide_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# mine\n" + ENGLISH.read_text())
    *_, recipe = recipes()
    assert prints(changed_to(recipe, str(tmp_path / "mine.yaml"))) == prints(recipe)
    (tmp_path / "mine.yaml").write_text(ENGLISH.read_text().replace("share: 0.4 ", "share: 0.3 "))
    assert prints(changed_to(recipe, str(tmp_path / "mine.yaml"))) != prints(recipe)


def changed_to(recipe: Recipe, prompts: str) -> Recipe:
    assert recipe.corpus is not None
    return dataclasses.replace(recipe, corpus=dataclasses.replace(recipe.corpus, prompts=prompts))


def test_the_fingerprints_of_0_3_are_still_known() -> None:
    """What `fingerprints` of version 0.3 gives for these recipes."""
    corpus = load_recipe("qwen2.5-0.5b", ["texts.n_scored=99", "describer.concurrency=3"])
    world = load_recipe("couplets", ["target=some/hub"])
    for recipe, starts in (
        (corpus, "d924ea5649f2639a 8f856ce396601046 4a0118af9d8051a8 dc688a7c798b7981 64b63365642eabbf"),
        (world, "bdb3528b83bd2ddb bc0ab1a62179d62e d1fb97d76342fb9f e574c76fcb5c06ea a1bdbc917335c59b"),
    ):
        former = former_fingerprints(recipe, target_print(recipe.target, recipe.revision))
        assert [print_[:16] for print_ in former.values()] == starts.split()


def test_stages_that_0_3_finished_are_skipped_and_get_todays_fingerprint(tmp_path: Path) -> None:
    out, path = tmp_path / "run", tmp_path / "recipe.yaml"
    content = {"name": "x", "target": "some/hub", "point": "resid_post.2", "world": "couplets", "out": str(out)}
    path.write_text(json.dumps(content))
    recipe = load_recipe(path)
    former = former_fingerprints(recipe, target_print(recipe.target, None))
    for stage in ("extract", "describe"):
        for name in (run.STARTED, run.DONE):
            write_json(out / stage / name, {"fingerprint": former[stage], "seconds": 1.0, "summary": {"n": 3}})
        for name in run.OF_WORLD[stage]:
            (out / stage / name).parent.mkdir(parents=True, exist_ok=True)
            (out / stage / name).write_text("{}")
    dry = run.run_recipe(path, until="describe", dry_run=True)
    assert dry["extract"]["skipped"] and read_json(out / "extract" / run.DONE)["fingerprint"] == former["extract"]
    assert all(stage == {"skipped": True, "n": 3} for stage in run.run_recipe(path, until="describe").values())
    assert read_json(out / "describe" / run.DONE)["fingerprint"] == prints(recipe)["describe"]
    assert all(stage["skipped"] for stage in run.run_recipe(path, until="describe").values())
