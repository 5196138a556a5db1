"""`nla probe`: a user's files, good and bad, and the whole table on a tiny pair."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nla.errors import (
    ArgumentError,
    ContextLengthError,
    EmptyTextError,
    ParseError,
    PointError,
    PositionError,
    VocabularyError,
)
from nla.eval.readers import labelled_file, labelled_texts, patchscopes
from nla.eval.readers.compare import BAG, LOGIT_LENS, SELFIE, SHUFFLED
from nla.eval.readers.labelled_file import LabelledRow, read_labelled_file
from nla.eval.readers.labelled_texts import ProbeSettings, compare_on_labelled_texts
from nla.eval.readers.measures import NLA_READER
from nla.eval.readers.probes import LOGISTIC, MASS_MEAN, PCA
from nla.eval.readers.tasks import TEST, TRAIN, Sites, read_task_sites, read_task_sites_at
from nla.eval.report import one_line
from nla.eval.target import Target, continued
from nla.models.points import Point
from tests.helpers.tiny import MARKER, make_pair

PAIRS = [(f"{a} {b} {c} {d}.", "cat" if b == "cat" else "dog") for a in ("the", "a") for b in ("cat", "dog")
         for c in ("sat", "ran") for d in ("here", "there", "so", "on")]  # fmt: skip


def write_csv(path: Path, pairs=PAIRS, header=("text", "label"), encoding: str = "utf-8") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([header, *pairs])
    return path


@pytest.mark.parametrize(
    "kind", ["csv", "bom.csv", "utf16.csv", "tsv", "jsonl", "utf16.jsonl", "json", "utf16.json", "parquet"]
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    objects = [{"text": text, "label": label, "other": None} for text, label in PAIRS]
    if kind == "tsv":
        path.write_text("\n".join(["text\tlabel", *["\t".join(pair) for pair in PAIRS], ""]))
    elif kind.endswith("jsonl"):
        text = "\n\n".join(json.dumps(one) for one in objects)
        path.write_bytes(text.encode("utf-16") if "utf16" in kind else text.encode("utf-8-sig"))
    elif kind.endswith("json"):
        path.write_text(json.dumps(objects), encoding="utf-16" if "utf16" in kind else "utf-8")
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(objects), path)
    else:
        write_csv(path, encoding={"bom.csv": "utf-8-sig", "utf16.csv": "utf-16"}.get(kind, "utf-8"))
    found = read_labelled_file(path, "text", "label")
    assert [(row.text, row.label) for row in found.rows] == PAIRS
    assert [row.number for row in found.rows] == list(range(1, len(PAIRS) + 1)) and found.n_read == len(PAIRS)


def test_a_text_may_hold_delimiters_quotes_and_line_breaks(tmp_path: Path) -> None:
    texts = [(f'the cat, "{number}"\r\nsat', label) for number, (_text, label) in enumerate(PAIRS)]
    assert (
        read_labelled_file(write_csv(tmp_path / "d.csv", texts), "text", "label").rows[3].text == 'the cat, "3"\r\nsat'
    )


BAD = {
    "missing column": ("a.csv", "words,label\nx,y\n", ArgumentError, "without a column 'text'"),
    "twice": ("a.csv", "text,text,label\nx,y,z\n", ArgumentError, "two columns 'text'"),
    "empty file": ("a.csv", "", ArgumentError, "empty"),
    "header only": ("a.csv", "text,label\n", ArgumentError, "no rows"),
    "one class": ("a.csv", "text,label\n" + "".join(f"t{i},x\n" for i in range(20)), ArgumentError, "alone"),
    "rare": (
        "a.csv",
        "text,label\n" + "".join(f"t{i},{'x' if i else 'y'}\n" for i in range(20)),
        ArgumentError,
        "'y' 1",
    ),
    "empty text": ("a.csv", "text,label\nx,y\n  ,y\n", EmptyTextError, "row 2"),
    "no label": ("a.csv", "text,label\nx,y\nx,\n", ArgumentError, "row 2"),
    "nan label": ("a.jsonl", '{"text": "x", "label": NaN}\n', ArgumentError, "row 1"),
    "nan text": ("a.csv", "text,label\nx,NaN\n", ArgumentError, "row 1"),
    "ragged": ("a.csv", "text,label\nx,y\nx, y, z\n", ParseError, "row 2 .* 3 cells"),
    "quote": ("a.csv", 'text,label\n"x,y\n', ParseError, "a.csv: no CSV"),
    "latin": ("a.csv", b"text,label\n\xe9t\xe9,y\n", ParseError, "UTF-8"),
    "cut json": ("a.json", '[{"text": "x"', ParseError, "a.json: JSON that is cut"),
    "no list": ("a.json", '{"text": "x"}', ParseError, "holding a dict"),
    "no object": ("a.jsonl", "[1]\n", ParseError, "a row that is a list"),
    "missing key": ("a.jsonl", '{"text": "x", "label": "y"}\n{"text": "x"}\n', ArgumentError, "row 2 .*'label'"),
    "half a character": ("a.jsonl", '{"text": "x", "label": "\\ud800"}\n', ParseError, "row 1 .*'label'"),
    "half a character of text": ("a.jsonl", '{"text": "\\ud800", "label": "y"}\n', ParseError, "row 1 .*'text'"),
    "deep": ("a.jsonl", "[" * 100_000, ParseError, "jsonl"),
    "number as text": ("a.jsonl", '{"text": 3, "label": "x"}\n', ParseError, "a int as 'text'"),
    "list as label": ("a.jsonl", '{"text": "x", "label": []}\n', ArgumentError, "row 1"),
    "no parquet": ("a.parquet", "PAR1 nothing", ParseError, "a.parquet: no whole Parquet file"),
    "kind": ("a.xlsx", "x", ArgumentError, ".parquet"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_files_give_typed_errors_that_say_where(tmp_path: Path, name: str) -> None:
    file, content, kind, message = BAD[name]
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(kind, match=message):
        read_labelled_file(path, "text", "label")


def test_a_missing_file_and_too_few_rows_allowed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no file"):
        read_labelled_file(tmp_path / "none.csv", "text", "label")
    with pytest.raises(ArgumentError, match="max_rows"):
        read_labelled_file(write_csv(tmp_path / "d.csv"), "text", "label", max_rows=3)


def test_labels_are_names_whatever_their_type(tmp_path: Path) -> None:
    values = [1, 1.0, "1", " 1 ", True, "true", 0.5]
    assert [labelled_file._name(value) for value in values] == ["1", "1", "1", "1", "true", "true", "0.5"]


def test_repeated_rows_are_left_out_and_conflicting_labels_counted(tmp_path: Path) -> None:
    found = read_labelled_file(
        write_csv(tmp_path / "d.csv", [*PAIRS, *PAIRS[:5], (PAIRS[0][0], "dog")]), "text", "label"
    )
    assert (len(found), found.n_read, found.n_duplicates, found.n_conflicts) == (33, 38, 5, 1)


def test_of_a_large_file_a_random_sample_is_kept_and_never_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps({"t": f"w{i}", "y": i % 2}) + "\n" for i in range(5000))
    found = read_labelled_file(path, "t", "y", max_rows=200)
    assert len(found) == 200 and found.n_read == 5000
    numbers = [row.number for row in found.rows]
    assert numbers == sorted(numbers) and 1800 < sum(numbers) / 200 < 3200  # from all over the file
    assert numbers != [row.number for row in read_labelled_file(path, "t", "y", max_rows=200, seed=1).rows]


def test_equal_texts_and_rows_of_a_group_never_stand_on_both_sides() -> None:
    texts = ["a", "b", "a", "c", "d", "e"]
    groups = ["1", "2", "3", "3", None, None]
    chained = [LabelledRow(i, text, "x", group) for i, (text, group) in enumerate(zip(texts, groups, strict=True))]
    assert labelled_texts.group_numbers(chained) == [0, 1, 0, 0, 2, 3]  # a joins the groups 1 and 3
    many = [LabelledRow(i, f"text {i // 3}", "xy"[i % 2], None) for i in range(60)]
    task = labelled_texts.make_task("t", many, [-1] * 60, {})
    sides = {split: {many[row].text for row in task.rows(split)} for split in (TRAIN, TEST)}
    assert not sides[TRAIN] & sides[TEST] and 15 <= len(task.rows(TEST)) <= 25


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(ArgumentError, match="groups"):
        labelled_texts.make_task("t", [LabelledRow(i, "same", "xy"[i % 2], None) for i in range(40)], [-1] * 40, {})
    lonely = [LabelledRow(i, f"t{i}" if i % 2 else "same", "xy"[i % 2], None) for i in range(40)]
    with pytest.raises(ArgumentError, match="'x'"):
        labelled_texts.make_task("t", lonely, [-1] * 40, {})


def test_positions_and_texts_that_cannot_be_read() -> None:
    target = Target.of(make_pair())
    good = [LabelledRow(1, "the cat sat on a cat.", "x", None), LabelledRow(2, "it is here.", "y", None)]
    assert labelled_texts.find_sites(target, good, "last", False).tokens == [6, 3]
    cats = labelled_texts.find_sites(target, good, "/cat/", False)
    assert cats.tokens == [1, 5] and cats.n_unmatched == 1 and [row.number for row in cats.rows] == [1, 1]
    with pytest.raises(PositionError, match="matches no token"):
        labelled_texts.find_sites(target, good, "/tree/", False)
    for text, kind in (("the zebra", VocabularyError), ("the" + " cat" * 80, ContextLengthError)):
        bad = [*good, LabelledRow(7, text, "x", None)]
        with pytest.raises(kind, match=r"row 7.*--skip"):
            labelled_texts.find_sites(target, bad, "last", False)
        assert labelled_texts.find_sites(target, bad, "last", True).n_unreadable == 1


def test_words_stand_for_a_class() -> None:
    found = labelled_texts.class_words(["pos", "neg", "1"], ["pos=good, great", "1=one"])
    assert found == {"pos": ("good", "great"), "neg": ("neg",), "1": ("one",)}
    assert labelled_texts.class_words(["0", "1"], []) == {"0": (), "1": ()}
    for entry in ("pos", "pos=", "other=x"):
        with pytest.raises(ArgumentError, match="LABEL=WORD"):
            labelled_texts.class_words(["pos"], [entry])


def test_the_table_of_a_users_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patchscopes, "load_oracle", lambda base, adapter, target: target)
    asked = {"oracle": tmp_path, "question": f"it is {MARKER} here"}
    hostile = ("text", "la|bel <script> $x^{ \x1b[31m")
    data, stages = write_csv(tmp_path / "d.csv", [*PAIRS, PAIRS[0]], hostile), set()
    out = tmp_path / "out"
    quick = {"n_tries": 1, "n_continued": 2, "lens_steps": 2, "n_boot": 50, "budgets": (8,)}
    settings = ProbeSettings(text=hostile[0], label=hostile[1], pair=make_pair(), **asked, **quick)
    report = compare_on_labelled_texts(data, settings, lambda stage, _: stages.add(stage))
    report.save(out)
    task = report.tasks[0]
    assert task.row(LOGISTIC).labelled[TEST].value > 0.9  # the animal is two tokens before the last
    assert task.row("bag of words (visible text)").zero[TEST].value == 1.0
    assert len(task.row("activation oracle").examples) == 3
    assert report.n_rows == 33 and report.n_texts == 32 and "1 rows that repeat" in report.notes[0]
    assert {"read", "NLA", "judge"} <= stages
    content = json.loads((out / "probe.json").read_text())
    assert content["tasks"][0]["readers"][0]["reader"] == LOGISTIC and content["tasks"][0]["retention"] is not None
    text = (out / "probe.md").read_text()
    assert "<script>" not in text and "\x1b" not in text and "la¦bel" in text
    assert (out / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert one_line("a\nb|c") == "a⏎b¦c"
    assert "](" not in one_line("![x](http://tracker/)")


WORDS = ("ribbon", "basket", "candle", "letter")
POEMS = [(f"In {season} {name} left a {colour} {word} near the rat,", season) for season in ("winter", "summer")
         for name in ("Anna", "Henry") for colour in ("red", "blue") for word in WORDS]  # fmt: skip


def test_a_target_without_a_pair_is_read_by_what_needs_none_at_every_point(tmp_path: Path) -> None:
    quick = {"n_continued": 2, "lens_steps": 0, "n_boot": 50, "budgets": (8,), "device": "cpu"}
    points = ["resid_post.3", "resid_post.1"]
    settings = ProbeSettings(text="text", label="label", target="couplets/plain", points=points, **quick)
    report = compare_on_labelled_texts(write_csv(tmp_path / "d.csv", POEMS), settings)
    task = report.tasks[0]
    assert report.point == "resid_post.3" and report.target == "plain" and task.retention is None
    assert [task.row(reader) for reader in (NLA_READER, SHUFFLED, SELFIE)] == [None] * 3
    assert "SelfIE was left out" in report.notes[-1]  # it has no words for the question
    assert task.row(BAG).labelled[TEST].value == 1.0
    assert list(report.by_point) == ["resid_post.1", "resid_post.3"]  # first block to last
    for reader in (LOGISTIC, MASS_MEAN, PCA, LOGIT_LENS):
        assert report.by_point["resid_post.3"].row(reader).budgets == task.row(reader).budgets
        assert report.by_point["resid_post.3"].row(reader).zero == task.row(reader).zero
    assert "### By point" in report.to_markdown()


def test_a_pair_is_read_at_other_points_too(tmp_path: Path) -> None:
    quick = {"n_tries": 1, "n_samples": 1, "n_continued": 1, "lens_steps": 0, "n_boot": 20, "budgets": ()}
    settings = ProbeSettings(text="text", label="label", pair=make_pair(), points="resid_post.0", **quick)
    report = compare_on_labelled_texts(write_csv(tmp_path / "d.csv"), settings)
    assert list(report.by_point) == ["resid_post.0", "resid_post.1"] and report.tasks[0].row(NLA_READER)
    with pytest.raises(PointError, match=r"resid_post\.9"):
        compare_on_labelled_texts(
            tmp_path / "d.csv", ProbeSettings(text="text", label="label", pair=make_pair(), points="resid_post.9")
        )


def test_a_target_and_a_pair_exclude_each_other_and_a_target_needs_a_point(tmp_path: Path) -> None:
    columns = {"text": "text", "label": "label", "target": "couplets/plain"}
    data, point = write_csv(tmp_path / "d.csv", POEMS), {"points": "resid_post.3"}
    for given, message in (
        ({**point, "pair": "couplets"}, "one of them"),
        ({}, "--point"),
        ({**point, "oracle": tmp_path, "question": "what?"}, "--pair"),
    ):
        with pytest.raises(ArgumentError, match=message):
            compare_on_labelled_texts(data, ProbeSettings(**columns, **given))
    with pytest.raises(PointError, match="layer 3"):
        ProbeSettings(**columns, points=["resid_post.3", "layer 3"])


def test_selfie_without_a_pair_says_of_a_words_embedding_what_the_target_says_of_the_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The question's other words stay as they are, and the activation stands where the word stood."""
    target = Target.of(make_pair())
    vectors = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert patchscopes.Prompt.without_pair(target, vectors) is None  # no word of the question is known
    monkeypatch.setattr(patchscopes, "QUESTION", "the {} sat here")
    monkeypatch.setattr(patchscopes, "_SLOTS", ("cat", "dog"))
    prompt = patchscopes.Prompt.without_pair(target, vectors)
    assert prompt is not None and prompt.norm == pytest.approx(float(vectors.norm(dim=1).mean()))
    embeddings = target.model.get_input_embeddings().weight.detach()
    (dog,) = target.tokenizer("dog", add_special_tokens=False)["input_ids"]
    said = {}
    for word, token in (("cat", prompt.marker_id), ("dog", dog)):
        whole = prompt.ids.clone()
        whole[prompt.position] = token
        with target.role():
            written = continued(target, [whole.tolist()], prompt.max_new_tokens)
        own = prompt._replace(norm=float(embeddings[token].norm()), marker_id=prompt.ids[0].item())
        (said[word],) = patchscopes.answers(target, own, embeddings[token][None].float(), temperature=None)
        assert said[word] == written.texts(target.tokenizer)[0].strip()
    assert said["cat"] != said["dog"]


def test_several_points_are_read_in_one_pass_as_each_alone() -> None:
    target = Target.of(make_pair())
    sites = Sites(("the cat sat here.", "a dog ran", "the cat sat here."), (1, -1, 4), (0, 1, 0))
    points = [Point("resid_post", 0), Point("resid_post", 2)]
    found = read_task_sites_at(target, sites, points)
    for column, point in enumerate(points):
        assert torch.equal(found[:, column], read_task_sites(replace(target, point=point), sites))


def test_an_oracle_needs_its_question_and_numbers_are_in_range(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="both or neither"):
        ProbeSettings(text="text", label="label", oracle=tmp_path)
    with pytest.raises(ArgumentError, match="n_samples"):
        ProbeSettings(text="text", label="label", n_samples=0)
