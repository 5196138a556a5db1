"""Labelled tasks, the readers on them, and the report: on a planted target with perfect readers, what must come out."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from nla.errors import ArgumentError, ShapeError
from nla.eval.auroc import ranked_auroc
from nla.eval.couplet_items import trained_on
from nla.eval.readers import compare as comparison
from nla.eval.readers import couplets, measures
from nla.eval.readers.compare import ComparisonSettings, Sources, compare_readers, sites_of_other_groups
from nla.eval.readers.couplets_tasks import COLOUR, FAMILY, PLAN, TEMPLATES, WORDS, CoupletTasks, couplet_tasks
from nla.eval.readers.measures import NLA_READER, forced_choice, naming
from nla.eval.readers.organisms import ReadersSettings, compare_on_organism
from nla.eval.readers.probes import LOGISTIC
from nla.eval.readers.tables import random_check
from nla.eval.readers.tasks import RANDOM, TEST, TRAIN, Sites, Task, random_task, read_task_sites
from nla.eval.target import Target
from nla.models.read import read
from nla.organisms.couplets import world
from nla.stats import Interval
from tests.helpers.planted import SCALE, planted_pair, planted_target, read_code, write_code
from tests.helpers.tiny import make_model, make_pair, make_tokenizer

SITES = Sites(("the cat sat.", "the dog ran.", "a cat ran.", "a dog sat.") * 2, (-1,) * 8, tuple(range(8)))
SPLITS = (TRAIN,) * 4 + (TEST,) * 4
LABELS = ("x", "x", "y", "y") * 2


def test_a_task_keeps_groups_in_one_split_and_classes_in_both() -> None:
    task = Task("t", SITES, LABELS, SPLITS)
    assert task.classes == ["x", "y"] and task.rows(TEST) == [4, 5, 6, 7] and task.codes([0, 2]).tolist() == [0, 1]
    assert Sites(list(SITES.texts), list(SITES.tokens), range(8)) == SITES and hash(SITES)
    shared = Sites(SITES.texts, SITES.tokens, (0, 1, 2, 3, 0, 5, 6, 7))
    with pytest.raises(ArgumentError, match="group 0 in train and test"):
        Task("t", shared, LABELS, SPLITS)
    with pytest.raises(ArgumentError, match="two classes or more"):
        Task("t", SITES, ("x",) * 8, SPLITS)
    with pytest.raises(ArgumentError, match="one class or none"):
        Task("t", SITES, ("x", "x", "y", "y", "x", "x", "x", "x"), SPLITS)
    with pytest.raises(ArgumentError, match="one of each"):
        Task("t", SITES, LABELS[:3], SPLITS)
    with pytest.raises(ArgumentError):
        Sites(("a",), (0, 1), (0,))


def test_a_class_that_nothing_was_fitted_on_has_no_part_in_a_transfer_split() -> None:
    sites = Sites((*SITES.texts, "it ran.", "it sat."), (-1,) * 10, tuple(range(10)))
    task = Task("t", sites, (*LABELS, "z", "x"), (*SPLITS, "elsewhere", "elsewhere"))
    assert task.transfers == ["elsewhere"] and task.rows("elsewhere") == [9]


def test_coin_flips_are_of_groups_and_even_within_each_split() -> None:
    sites = Sites(("a", "b", "c", "d") * 10, (-1,) * 40, tuple(number // 2 for number in range(40)))
    splits = (TRAIN,) * 24 + (TEST,) * 16
    task = random_task(sites, splits, seed=3)
    assert task.labels[0::2] == task.labels[1::2]
    for split, n in ((TRAIN, 24), (TEST, 16)):
        assert sum(task.labels[row] == "heads" for row in task.rows(split)) == n // 2
    assert task.labels != random_task(sites, splits, seed=4).labels


def test_couplet_tasks_hold_back_templates_and_words_and_use_no_document_of_training() -> None:
    found = couplet_tasks(n_train=400, n_test=60, n_transfer=20, seed=1)
    plan, family, _colour, season = found.tasks
    rows = {split: family.rows(split) for split in (TRAIN, TEST, TEMPLATES, WORDS)}
    assert [len(each) for each in rows.values()] == [400, 60, 20, 20]
    documents = found.documents
    assert {documents[row].frame for row in rows[TEMPLATES]} == {6, 7}
    assert all(documents[row].frame < 6 for split in (TRAIN, TEST, WORDS) for row in rows[split])
    assert all(
        (documents[row].plan in world.HELD_OUT_PLANS) == (split == WORDS) for split in rows for row in rows[split]
    )
    assert plan.transfers == [TEMPLATES] and plan.words["cat"] == ("cat",)
    assert not {one.line1 for one in documents} & trained_on()
    assert len({text for task in found.tasks for text in task.sites.texts}) == 2 * len(documents)
    for document, text, label in zip(documents, season.sites.texts, season.labels, strict=True):
        assert text.endswith(document.prep) and document.ender not in text.split()
        assert document.season in text and label in (document.season, None)


def test_sites_are_read_as_if_each_text_were_read_alone_and_each_text_runs_once() -> None:
    target = planted_target()
    lines = [couplet.line1 for couplet in couplet_tasks(100, 20, 1, names=()).documents[:3]]
    sites = Sites((lines[0], lines[1], lines[0], lines[2]), (2, -1, 0, 3), (0, 1, 0, 2))
    found = read_task_sites(target, sites)
    for row, (text, token) in enumerate(zip(sites.texts, sites.tokens, strict=True)):
        alone = read(target.model, target.tokenizer, text, target.point, [token]).vectors
        assert torch.allclose(found[row], alone[0], atol=1e-5)
    assert sites.unique_texts == lines
    assert sites.visible(target.tokenizer)[1] == lines[1] and lines[0].startswith(sites.visible(target.tokenizer)[0])


def test_a_site_is_given_another_groups_explanation() -> None:
    groups = (0, 0, 0, 1, 2, 2, 3)
    moved = sites_of_other_groups(Sites(("a",) * 7, (0,) * 7, groups), seed=0)
    assert sorted(moved.tolist()) == list(range(7))
    assert all(groups[row] != groups[other] for row, other in enumerate(moved.tolist()))


def test_the_other_site_is_not_always_of_the_same_class_where_groups_hold_one_of_each() -> None:
    sites = Sites(("a",) * 120, (0,) * 120, tuple(range(20)) * 6)
    moved = sites_of_other_groups(sites, seed=0).tolist()
    assert sorted(moved) == list(range(120)) and all(row % 20 != other % 20 for row, other in enumerate(moved))
    assert sum(row // 20 == other // 20 for row, other in enumerate(moved)) < 40  # of six classes, by chance 20


def test_a_text_names_a_class_only_as_a_whole_word_and_not_if_it_names_them_all() -> None:
    words = {"cat": ("cat", "kitten"), "dog": ("dog",), "none": ()}
    texts = [["a Cat sat", "it ran"], ["a category"], ["the dog, the cat"], [""]]
    found = naming(texts, words, ["cat", "dog"])
    assert found[:, 0].tolist() == [0.5, 0.0, 0.0, 0.0] and torch.equal(found[:, 0], -found[:, 1])
    # A class that alone has no words is named by silence about the others.
    assert naming(texts, words, ["cat", "dog", "none"])[0].tolist() == [0.25, -0.5, 0.25]
    assert naming([["cat"], ["it ran"]], words, ["cat", "none"]).argmax(1).tolist() == [0, 1]
    assert naming([["it ran"]], {"cat": ("cat",)}, ["cat", "a", "b"]).tolist() == [[0.0, 0.0, 0.0]]


def test_forced_choice_is_zero_for_a_guess_and_one_for_the_truth() -> None:
    labels, groups = torch.tensor([0, 1, 2, 0]), torch.arange(4)
    assert forced_choice(torch.zeros(4, 3), labels, groups).value == pytest.approx(0.0)
    assert forced_choice(torch.eye(3)[labels], labels, groups).value == pytest.approx(1.0)
    tied = torch.tensor([[1.0, 1.0, 0.0]] * 4)  # the first two share each choice: 1/2, 1/2, 0, 1/2
    assert forced_choice(tied, labels, groups).value == pytest.approx((1 / 3 - 1 / 3) / (2 / 3))
    half = forced_choice(torch.eye(3)[torch.tensor([0, 1, 1, 1])], labels, groups)  # of the classes 1/2, 1, 0
    assert half.value == pytest.approx((1 / 2 - 1 / 3) / (2 / 3)) and half.low < half.value < half.high


def test_always_choosing_the_commonest_class_earns_nothing() -> None:
    labels = (torch.arange(100) % 10 == 0).long()
    found = forced_choice(torch.eye(2)[:1].repeat(100, 1), labels, torch.arange(100))
    assert found.value == pytest.approx(0.0) and found.high < 0.1


@pytest.fixture(scope="module")
def results() -> dict[str, measures.TaskResult]:
    """All readers on a planted target, whose encoder and decoder are replaced by perfect ones at the line break."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "explain", lambda nla, vectors, seed=0: read_code(vectors))
        patch.setattr(
            comparison, "_reconstruct", lambda nla, explained: write_code([one for (one,) in explained.texts])
        )
        tasks = couplet_tasks(96, 32, 10, names=(FAMILY, COLOUR)).tasks
        pair = planted_pair()
        sources = Sources(Target.of(pair), pair)
        options = ComparisonSettings(n_tries=1, n_continued=6, lens_steps=1, n_boot=60, budgets=(16,))
        return {one.task: one for one in compare_readers(tasks, sources, options)}


def test_a_perfect_reader_names_every_plan_and_its_reconstruction_keeps_all_of_it(results) -> None:
    family = results[FAMILY]
    row, probe = family.row(NLA_READER), family.row(LOGISTIC)
    assert row.zero[TEST].value == 1.0 and row.labelled[TEST].value > 0.9 < probe.labelled[TEST].value
    assert row.choice.value == 1.0 and row.zero[TEMPLATES].value == row.zero[WORDS].value == 1.0
    assert family.retention.retained == pytest.approx(1.0) and family.retention.residual.value == 0.5
    assert family.retention.shuffled.value < 0.65
    assert family.complement.both.value >= family.complement.probe.value


def test_readers_that_know_nothing_are_at_chance_and_coin_flips_are_for_all(results) -> None:
    family = results[FAMILY]
    for name in (comparison.SHUFFLED, comparison.SELFIE, comparison.LOGIT_LENS):
        assert abs(family.row(name).zero[TEST].value - 0.5) < 0.15, name
    assert family.row(comparison.BAG).zero[TEST].value == 0.5  # the plan word is not in the visible text
    seen, continued = (family.row(name).examples for name in (comparison.BAG, comparison.TEXT_LM))
    assert all(text.startswith(visible) and text != visible for visible, text in zip(seen, continued, strict=True))
    assert all(row.random is not None and abs(row.random.value - 0.5) < 0.2 for row in family.readers)
    assert results[RANDOM].shares_sites == [FAMILY, COLOUR]


def test_each_reader_is_held_against_the_best_adversary_but_the_confabulator(results) -> None:
    for result in (results[FAMILY], results[COLOUR]):
        rivals = [row for row in result.readers if row.kind == measures.ADVERSARY]
        assert all(row.zero_versus is None for row in rivals)
        best = max((row for row in rivals if row.reader != measures.CONFABULATOR), key=lambda row: row.zero[TEST].value)
        versus = result.row(NLA_READER).zero_versus
        assert versus.adversary == best.reader and versus.p_holm >= versus.p_value
        own = result.row(NLA_READER).zero[TEST].value
        assert versus.difference.value == pytest.approx(own - best.zero[TEST].value)


def test_the_confabulator_is_no_adversary_since_the_activation_picks_its_texts() -> None:
    labels, groups = torch.tensor([0, 1] * 20), torch.arange(40)
    perfect, chance = (
        ranked_auroc(scores, labels, groups, 50) for scores in (torch.eye(2)[labels], torch.zeros(40, 2))
    )
    known = ((measures.CONFABULATOR, measures.ADVERSARY), ("bag", measures.ADVERSARY), ("NLA", measures.ACTIVATION))
    measured = [
        measures._Measured(measures.ReaderRow(name, kind, {}), None, chance if name == "bag" else perfect)
        for name, kind in known
    ]
    versus = measures._versus(measured)[2].labelled_versus
    assert versus is not None and versus.adversary == "bag" and versus.difference.value == 0.5


def test_few_labels_end_with_all_of_them(results) -> None:
    for row in results[FAMILY].readers:
        assert [one.n_labels for one in row.budgets] == [16, 96]
        assert row.budgets[-1].auroc == row.labelled[TEST].value


def test_an_nla_is_not_needed_and_activations_may_come_from_elsewhere() -> None:
    target, task = planted_target(), couplet_tasks(60, 40, 10, names=(COLOUR,)).tasks[0]
    noise = torch.randn(len(task.sites), 96, generator=torch.Generator().manual_seed(0))
    options = ComparisonSettings(n_continued=1, lens_steps=1, n_boot=50, budgets=())
    (result, _coin) = compare_readers([task], Sources(target, read=lambda sites: noise), options)
    assert result.row(NLA_READER) is None and result.retention is None
    assert abs(result.row(LOGISTIC).labelled[TEST].value - 0.5) < 0.25
    with pytest.raises(ShapeError, match="one a site"):
        compare_readers([task], Sources(target, read=lambda sites: noise[:5]), options)


def _family_alone(*sizes: int) -> CoupletTasks:
    """The rhyme family in the place of the plan: fewer classes, so fewer documents."""
    found = couplet_tasks(*sizes, names=(FAMILY,))
    return CoupletTasks([dataclasses.replace(found.tasks[0], name=PLAN)], found.documents)


@pytest.mark.slow
def test_the_report_tells_the_two_targets_apart_and_is_written(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_its_own(nla, vectors, seed=0):
        """A pair that can read its own target's code, and makes things up about the other's, which is longer."""
        return read_code(vectors if vectors.norm(dim=1).max() < 1.005 * SCALE * 3**0.5 else vectors.roll(7, 0))

    monkeypatch.setattr(comparison, "explain", read_its_own)
    monkeypatch.setattr(
        comparison, "_reconstruct", lambda nla, explained: write_code([one for (one,) in explained.texts])
    )
    monkeypatch.setattr(comparison, "N_COINS", 2)
    monkeypatch.setattr(couplets, "couplet_tasks", _family_alone)
    monkeypatch.setattr(couplets, "N_PATCHED", 12)
    quick = {"n_tries": 1, "n_continued": 6, "lens_steps": 1, "n_boot": 60, "budgets": ()}
    contrast = planted_target(used=False)
    contrast.model.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.01)
    settings = ReadersSettings(contrast=contrast, n_items=32, n_train=96, **quick)
    pair = planted_pair()
    pair.metrics = {"joint": {"fve/global": -0.3}}
    report = compare_on_organism(pair, settings)
    report.save(tmp_path)
    checks = {check.name: check.passed for check in report.checks}
    assert all(passed for name, passed in checks.items() if "≥ 0.95" not in name and "moves" not in name), checks
    planner, plain = report.targets
    assert planner.used.value == 1.0 and plain.used.value == 0.0
    content = json.loads((tmp_path / "readers.json").read_text())
    assert content["targets"][0]["tasks"][0]["readers"][0]["reader"] == LOGISTIC
    assert (tmp_path / "readers.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "readers.md").read_text()
    assert "reads nothing" in text.split("\n\n")[1]
    assert "text-only LM" in text and "### plan" in text and "What reconstructions keep" in text


def test_a_pair_of_no_world_and_a_contrast_of_another_world_or_width_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"no embedded world.*world couplets or switchboard.*nla probe"):
        compare_on_organism(make_pair(), ReadersSettings())
    pair, point = planted_pair(), Target.of(planted_pair()).point
    with pytest.raises(ArgumentError, match=r"world couplets.*--contrast"):
        compare_on_organism(pair, ReadersSettings(contrast=Target(make_model(), make_tokenizer(), point)))
    with pytest.raises(ShapeError, match="32 wide"):
        compare_on_organism(pair, ReadersSettings(contrast=Target(make_model(), pair.tokenizer, point)))


def test_the_coin_check_can_fail_and_says_nothing_without_an_interval() -> None:
    def check(*ends: float) -> bool | None:
        row = measures.ReaderRow(LOGISTIC, measures.PROBE, {TEST: Interval(*ends)})
        return random_check(measures.TaskResult(RANDOM, ["heads", "tails"], {}, [row]), "here").passed

    assert check(0.52, 0.45, 0.59) and check(0.7, 0.6, 0.8) is False
    assert check(0.7, float("nan"), float("nan")) is None


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ArgumentError, match="both or neither"):
        ReadersSettings(question="what is it?")
    with pytest.raises(ArgumentError, match="n_items 20"):
        ReadersSettings(n_items=3)
    with pytest.raises(ArgumentError):
        couplet_tasks(n_train=0)
