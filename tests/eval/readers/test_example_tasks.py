"""The labelled tasks for real models: what is true of them by construction, and what smollm2 holds of one."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from nla.errors import ArgumentError, ParseError
from nla.eval.auroc import macro_auroc
from nla.eval.readers import example_tasks
from nla.eval.readers.compare import SELFIE
from nla.eval.readers.example_tasks import Row
from nla.eval.readers.labelled_file import LabelledRow
from nla.eval.readers.labelled_texts import ProbeSettings, compare_on_labelled_texts, make_task
from nla.eval.readers.measures import NLA_READER
from nla.eval.readers.probes import LOGISTIC, fit_probe
from nla.eval.readers.tasks import TEST, TRAIN

TASKS = {"number": example_tasks.number(), "sentiment": example_tasks.sentiment(), "language": example_tasks.language()}


def by_words(rows: list[Row]) -> float:
    """AUROC of a bag of words, fitted and judged as `nla probe` does."""
    task = make_task("label", [LabelledRow(n, *row) for n, row in enumerate(rows)], [-1] * len(rows), {})
    train, test = task.rows(TRAIN), task.rows(TEST)
    fitted = fit_probe([rows[row].text for row in train], task.codes(train), len(task.classes))
    return float(macro_auroc(fitted([rows[row].text for row in test]), task.codes(test)))


@pytest.mark.parametrize("name", TASKS)
def test_classes_are_of_equal_size_within_each_group_and_texts_differ(name: str) -> None:
    rows, counts = TASKS[name], defaultdict(Counter)
    for row in rows:
        counts[row.group][row.label] += 1
    assert len(rows) > 768 and len(counts) >= 14  # two thirds are more than 512
    assert all(len(set(labels.values())) == 1 for labels in counts.values())
    assert len({row.text for row in rows}) > 0.95 * len(rows)


def test_number_is_that_of_the_third_noun_and_half_of_the_nouns_are_plural() -> None:
    known = {word: family for family in example_tasks.NOUNS for word in family.split()}
    assert len(known) == 4 * len(example_tasks.NOUNS)  # no noun is in two groups
    last = Counter()
    for row in TASKS["number"]:
        nouns = [word for word in re.findall(r"[a-z]+", row.text) if word in known or word.removesuffix("s") in known]
        plural = [noun not in known for noun in nouns]
        assert len(nouns) == 4 and sum(plural) == 2
        assert {known[noun.removesuffix("s") if many else noun] for noun, many in zip(nouns, plural, strict=True)} == {
            row.group
        }
        assert row.label == ("plural" if plural[2] else "singular")
        last[row.label, plural[3]] += 1
    assert len(set(last.values())) == 1  # the noun before the verb says nothing
    assert example_tasks.number() == TASKS["number"] != example_tasks.number(seed=1)


def test_neither_an_adjective_nor_a_frame_says_the_sentiment() -> None:
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for row in TASKS["sentiment"]:
        for word in row.text.split():
            labels[word.strip(",.")][row.label] += 1
    assert all(len(counts) == 2 and len(set(counts.values())) == 1 for counts in labels.values())
    meant = {row.text: row.label for row in TASKS["sentiment"]}
    assert meant["I did not find the soup bland at all."] == "positive"
    assert meant["In the end the film was anything but clever."] == "negative"
    assert meant["Everybody told us that the hotel was dirty, and they were right."] == "negative"


def test_counting_words_helps_with_languages_alone() -> None:
    found = {name: by_words(rows) for name, rows in TASKS.items()}
    assert 0.4 < found["number"] < 0.6 and 0.4 < found["sentiment"] < 0.6 and found["language"] > 0.99


def sampled(folder: Path, *documents: dict) -> Path:
    folder.mkdir()
    (folder / "000000.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return folder


def document(answer: str, **attributes: str | None) -> dict:
    return {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": answer}],
            "attributes": {"topic": "bees", **attributes}}  # fmt: skip


def test_what_a_model_wrote_is_cut_and_labelled_by_what_it_was_asked_for(tmp_path: Path) -> None:
    long, king = " ".join(f"w{number}" for number in range(40)), {"form": "poem", "instruction": "king"}
    documents = [document(long, **king), document("too short", **king),
                 document(long, form="story", instruction=None)]  # fmt: skip
    folder = sampled(tmp_path / "sample", *documents)
    rows = example_tasks.written(folder, "form")
    assert [(row.label, row.group) for row in rows] == [("poem", "bees"), ("story", "bees")]
    for row in rows:
        assert long.startswith(row.text) and 12 <= len(row.text.split()) <= 30
    assert [row.label for row in example_tasks.written(folder, "instruction")] == ["king"]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"without \.jsonl"):
        example_tasks.written(tmp_path, "form")
    with pytest.raises(ParseError, match=r"000000.jsonl:1 without 'tone'"):
        example_tasks.written(sampled(tmp_path / "a", document("x")), "tone")
    (tmp_path / "a" / "000000.jsonl").write_text("{")
    with pytest.raises(ParseError, match=r"000000.jsonl:1, which is no JSON"):
        example_tasks.written(tmp_path / "a", "form")


@pytest.mark.slow
def test_a_real_model_knows_in_which_language_a_sentence_is(smollm2: str, tmp_path: Path) -> None:
    path = tmp_path / "language.jsonl"
    of_one_person = (row for number, row in enumerate(TASKS["language"]) if number // 5 % 12 == 1)
    path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in of_one_person))
    settings = ProbeSettings(
        text="text", label="label", group="group", target=smollm2, points=["resid_post.19", "resid_post.0"],
        n_samples=1, n_continued=2, lens_steps=0, n_boot=50, budgets=(8,), device="cpu",
    )  # fmt: skip
    report = compare_on_labelled_texts(path, settings)
    task = report.tasks[0]
    assert list(report.by_point) == ["resid_post.0", "resid_post.19"] and report.point == "resid_post.19"
    deep, shallow = (report.by_point[point].row(LOGISTIC).labelled[TEST].value for point in reversed(report.by_point))
    assert deep > 0.9 and deep > shallow  # at the full stop: what it holds of the words before came by attention
    assert task.row(SELFIE).examples[0] and task.row(NLA_READER) is None and not report.notes[1:]


def test_a_line_separator_in_what_a_model_wrote_ends_no_document(tmp_path: Path) -> None:
    answer = "\u2028".join(f"w{number}" for number in range(3)) + " w" * 20
    folder = tmp_path / "sample"
    folder.mkdir()
    line = json.dumps(document(answer, form="poem"), ensure_ascii=False)  # as the stage `sample` writes it
    (folder / "000000.jsonl").write_text(f"{line}\n{{\n", encoding="utf-8")
    with pytest.raises(ParseError, match=r"000000.jsonl:2, which is no JSON"):
        example_tasks.written(folder, "form")
    (folder / "000000.jsonl").write_text(f"{line}\n", encoding="utf-8")
    assert [row.label for row in example_tasks.written(folder, "form")] == ["poem"]
