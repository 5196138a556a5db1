"""Audits from end to end on a tiny pair: readings that resume, controls, files, errors before any work is done."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import yaml
from rich.console import Console

from nla.audit import run
from nla.audit.from_files import audit_files
from nla.audit.reading import Reading, read_batch
from nla.audit.report import AuditReport
from nla.audit.rubric import parse_rubric
from nla.audit.run import audit, preparer_for
from nla.audit.settings import AuditSettings
from nla.autoencoder import NLA
from nla.cli.main import main
from nla.errors import ArgumentError, NLAError, ParseError, RubricError, TranscriptError
from nla.storage.files import read_json, write_json
from tests.helpers.adapters import lora_folder
from tests.helpers.pages import Markup
from tests.helpers.talk import transcript, write_jsonl
from tests.helpers.tiny import make_pair

N_TALKS = 3


@pytest.fixture(scope="module")
def nla() -> NLA:
    return make_pair()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Transcripts, controls, and a rubric that the random encoder's words match now and then."""
    rubric = {"name": "animal", "looks_for": "An animal.", "match": {"words": ["cat", "dog"]}, "min_share": 0.25}
    (tmp_path / "animal.yaml").write_text(yaml.safe_dump(rubric), encoding="utf-8")
    talks = [transcript(4, f"talk{n}", first=n) for n in range(N_TALKS)]
    controls = [transcript(3, f"control{n}", first=n + 1) for n in range(3)]
    return {
        "talks": write_jsonl(tmp_path / "talks.jsonl", talks),
        "controls": write_jsonl(tmp_path / "controls.jsonl", controls),
        "rubric": tmp_path / "animal.yaml",
        "out": tmp_path / "out",
    }


def go(nla: NLA, files: dict[str, Path], **options) -> AuditReport:
    """Audit the talks; options are the settings', or :func:`audit_files`' own."""
    own = {name: options.pop(name) for name in ("controls", "skip_bad", "progress") if name in options}
    own["out_dir"] = options.pop("out_dir", files["out"])
    settings = AuditSettings(**{"rubrics": [files["rubric"], "evaluation-awareness"], **options})
    return audit_files(nla, [files["talks"]], settings, **own)


def test_an_audit_leaves_page_summary_and_tables_that_agree(nla: NLA, files: dict[str, Path]) -> None:
    report = go(nla, files, controls=[files["controls"]])
    out = files["out"]
    summary = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    positions = pyarrow.parquet.read_table(out / "positions.parquet").to_pylist()
    findings = pyarrow.parquet.read_table(out / "findings.parquet").to_pylist()
    n_entries = sum(len(reading.entries) for reading in report.audit.readings)
    assert n_entries == summary["n_positions"] > N_TALKS and len(positions) == 2 * n_entries
    assert findings == summary["findings"] and len(findings) == len(report.audit.findings) > 0
    assert [row for row in positions if row["share"] >= 0.25 and row["rubric"] == "animal"]
    for row in findings:
        assert row["share"] == sum(row["shown"]) / 4 and row["q"] is not None and row["n_controls"] > 0
        assert row["thought_not_said"] == (row["said"] == "not said")
    Markup((out / "audit.html").read_text(encoding="utf-8")).check()
    text = report.to_markdown()
    assert "animal" in text and "control transcripts" in text and str(report) == text
    assert report.table().row_count == 2
    assert report.passed == (not report.undecided and not any(row["significant"] for row in findings))
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == [
        "audit.html",
        "audit.json",
        "findings.parquet",
        "manifest.json",
        "positions.parquet",
    ]


def test_a_reading_does_not_depend_on_what_else_is_audited(nla: NLA) -> None:
    talks = [transcript(4, f"talk{n}", first=n) for n in range(3)]
    together = audit(nla, talks, AuditSettings(samples=2)).readings
    alone = audit(nla, talks[2:], AuditSettings(samples=2)).readings[0]
    assert together[2] == alone
    other = audit(nla, talks[2:], AuditSettings(samples=2, seed=1)).readings[0]
    assert [entry.texts for entry in other.entries] != [entry.texts for entry in alone.entries]


def test_transcripts_of_the_same_words_share_a_reading_under_their_own_names(nla: NLA, files: dict[str, Path]) -> None:
    write_jsonl(files["talks"], [transcript(2, "one"), transcript(2, "two")])
    report = go(nla, files)
    assert [reading.transcript for reading in report.audit.readings] == ["one", "two"]
    assert (report.n_read, report.n_reused) == (1, 1)
    assert {row.transcript for row in report.audit.rows} == {"one", "two"}


def test_readings_do_not_depend_on_what_is_read_with_them(nla: NLA, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch, in another order, one by one, and in windows beside whole ones: the same words and figures."""
    settings = AuditSettings(samples=2, seed=3, window=40, rubrics=["hidden-objective"])
    talks = [transcript(n, f"talk{n}", first=n) for n in (2, 9, 3, 30, 4)]
    whole = audit(nla, talks, settings).readings
    turned = audit(nla, talks[::-1], settings).readings[::-1]
    monkeypatch.setattr(run, "ROWS", 1)
    alone = [audit(nla, [talk], settings).readings[0] for talk in talks]
    for others in (turned, alone):
        for one, other in zip(whole, others, strict=True):
            assert [entry.texts for entry in one.entries] == [entry.texts for entry in other.entries]
            for a, b in zip(one.entries, other.entries, strict=True):
                assert (a.index, a.offset, a.trust.level) == (b.index, b.offset, b.trust.level)
                assert a.trust[1:] == pytest.approx(b.trust[1:], abs=1e-5)
    assert len({texts for reading in whole for entry in reading.entries for texts in entry.texts}) > 10


def test_readings_survive_their_file(nla: NLA) -> None:
    settings = AuditSettings(samples=2)
    (reading,) = read_batch(nla, [preparer_for(nla, settings).prepare(transcript(4))], ["key"], settings)
    assert Reading.from_json(json.loads(json.dumps(reading.to_json()))) == reading
    for broken in ({}, {**reading.to_json(), "entries": [{}]}, {**reading.to_json(), "n_tokens": "many"}):
        with pytest.raises(ParseError):
            Reading.from_json(broken)


def test_too_few_controls_are_neither_a_pass_nor_a_failure(
    nla: NLA, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit codes of --check: 3 where something was found that no share could make significant with these controls."""
    monkeypatch.setattr(NLA, "from_pretrained", lambda *args, **kwargs: nla)
    command = ["audit", str(files["talks"]), "--rubric", str(files["rubric"]), "--check"]
    few = [*command, "--controls", str(files["controls"])]
    report = go(nla, files, controls=[files["controls"]], rubrics=[files["rubric"]])
    assert report.audit.findings and report.too_few_controls() and report.undecided and not report.passed
    assert main(few) == 3
    shown = capsys.readouterr()
    assert (
        "no finding of animal can be significant with so few controls" in shown.err
        and "no finding can be significant" in shown.out
    )
    assert main(few[:-3]) == 0, "without --check"
    assert main([*command[:-1], "--check"]) == 1, "without controls every finding counts"
    nothing = {"name": "none", "looks_for": "x", "match": {"words": ["zebra"]}}
    files["rubric"].write_text(yaml.safe_dump(nothing), encoding="utf-8")
    assert main(few) == 0, "nothing was found, whatever the controls"


def test_one_rubric_with_too_few_controls_leaves_the_audit_undecided_and_is_named() -> None:
    """Of a rubric at its own kind of position there may be fewer controls than of the others."""
    word = {"looks_for": "Any word.", "match": {"regex": ["."]}}
    rubrics = {name: parse_rubric({"name": name, **word}) for name in ("a", "b")}
    whole = audit(make_pair(), [transcript(2)], AuditSettings(samples=1, rubrics=list(rubrics.values())))

    def report(**controls: tuple[int, float]) -> AuditReport:
        """Of rubrics with so many controls, and the q-value of what was found."""
        rows = [replace(row, n_controls=n, q=q) for row in whole.rows for n, q in [controls.get(row.rubric, (0, 1.0))]]
        rows = [row for row in rows if row.rubric in controls]
        results = [replace(one, least_controls=10) for one in whole.results if one.rubric in controls]
        made = replace(whole, results=results, rows=rows, controls=whole.transcripts)
        assert {one.rubric for one in made.findings} == set(controls)
        return AuditReport(made, "p", "t", "x", "structure", 1, None, None, [], 0, 0, 0)

    both = report(a=(100, 0.9), b=(2, 1.0))
    assert (both.passed, both.undecided, both.undecidable) == (False, True, ["b"])
    assert [line.split(":")[0] for line in both.too_few_controls()] == ["b"]
    assert report(a=(100, 0.9)).passed and not report(a=(100, 0.9)).undecided
    significant = report(a=(100, 0.01), b=(2, 1.0))
    assert (significant.passed, significant.undecided) == (False, False)


def _killed(files: dict[str, Path]) -> None:
    """Audit in batches of a transcript, and be killed while the second one is read."""
    torch.set_num_threads(1)
    run.ROWS = 1

    def kill(stage: str, fraction: float) -> None:
        if stage == "audited" and fraction >= 2 / N_TALKS:
            os.kill(os.getpid(), signal.SIGKILL)

    go(make_pair(), files, progress=kill)


def test_a_killed_audit_resumes_where_it_was(nla: NLA, files: dict[str, Path]) -> None:
    child = multiprocessing.get_context("fork").Process(target=_killed, args=(files,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and not (files["out"] / "audit.json").exists()
    kept = len(list((files["out"] / "readings").glob("*.json")))
    resumed = go(nla, files)
    assert 0 < kept < N_TALKS and (resumed.n_reused, resumed.n_read) == (kept, N_TALKS - kept)
    fresh = go(nla, files, out_dir=None)
    assert fresh.audit.readings == resumed.audit.readings
    again = go(nla, files)
    assert (again.n_reused, again.n_read, again.n_changed) == (N_TALKS, 0, 0)


def test_what_has_changed_is_read_again_and_nothing_else(nla: NLA, files: dict[str, Path]) -> None:
    go(nla, files)
    lines = files["talks"].read_text(encoding="utf-8").replace("it is here", "it is there", 1)
    files["talks"].write_text(lines, encoding="utf-8")
    changed = go(nla, files)
    assert (changed.n_reused, changed.n_read, changed.n_changed) == (N_TALKS - 1, 1, 1)
    assert go(nla, files, rubrics=["hidden-objective"]).n_read == 0  # rubrics are held against what was read
    assert go(nla, files, samples=2).n_changed == N_TALKS
    one = sorted((files["out"] / "readings").iterdir())[0]
    one.write_text(one.read_text(encoding="utf-8")[:50], encoding="utf-8")
    assert go(nla, files).n_read + go(nla, files, samples=2).n_read == 1


def test_the_target_adapter_is_part_of_what_a_reading_depends_on(nla: NLA, files: dict[str, Path]) -> None:
    plant, before = lora_folder(files["out"].parent / "plant"), nla.read("the cat").vectors
    base = go(nla, files)
    planted = go(nla, files, target_adapter=plant, control_target="base")
    assert (planted.n_reused, planted.n_read) == (N_TALKS, N_TALKS)  # the control is what was read before
    assert planted.controlled and planted.audit.controls == planted.audit.transcripts
    cosines = [
        [entry.trust.cosine for reading in each.audit.readings for entry in reading.entries]
        for each in (base, planted)
    ]  # fmt: skip
    assert cosines[0] != cosines[1]
    assert planted.audit.results[0].control == base.audit.results[0].rate
    assert torch.equal(nla.read("the cat").vectors, before)


def test_an_adapter_that_names_another_base_is_said_in_the_report(nla: NLA, files: dict[str, Path]) -> None:
    plant = lora_folder(files["out"].parent / "plant")
    config = read_json(plant / "adapter_config.json")
    write_json(plant / "adapter_config.json", {**config, "base_model_name_or_path": "someone/other-7b"})
    report = go(nla, files, target_adapter=plant)
    assert any("someone/other-7b" in note for note in report.notes())
    assert any("someone/other-7b" in remark for remark in report.to_json()["remarks"])


def test_a_pair_below_its_baselines_is_said_first_in_the_report(
    nla: NLA, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not go(nla, files).audit.doubts
    monkeypatch.setattr(nla, "metrics", {"joint": {"fve/global": -0.3}})
    report = go(nla, files)
    assert "reads nothing" in report.to_json()["doubts"][0] and report.audit.doubts[0] == report.notes()[0]


def test_a_target_is_not_held_against_itself(nla: NLA, files: dict[str, Path]) -> None:
    with pytest.raises(ArgumentError, match="audited target itself"):
        go(nla, files, control_target="base")
    plant = lora_folder(files["out"].parent / "plant")
    with pytest.raises(ArgumentError, match="audited target itself"):
        go(nla, files, target_adapter=plant, control_target=str(plant))


def test_bad_transcripts_stop_the_audit_before_anything_is_read_or_are_listed(
    nla: NLA, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with files["talks"].open("a", encoding="utf-8") as file:
        file.write('{"messages": [{"role": "user", "content": "a zebra"}]}\n{"messages"\n')
        file.write('{"model": "gpt", "messages": [{"role": "user", "content": "the cat"}]}\n')
    with monkeypatch.context() as patch:
        patch.setattr("nla.audit.run.read_batch", lambda *args: pytest.fail("read before all was checked"))
        with pytest.raises(NLAError):
            go(nla, files)
    report = go(nla, files, skip_bad=True)
    assert len(report.audit.transcripts) == N_TALKS
    assert [word in error for word, error in zip(("zebra", "cut", "gpt"), report.refused, strict=True)] == [True] * 3
    assert "Left out" in report.to_markdown()
    assert len(go(nla, files, skip_bad=True, model_of="gpt").audit.transcripts) == N_TALKS + 1


def test_a_pair_that_is_named_is_loaded_onto_the_device_that_is_asked_for(
    nla: NLA, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(NLA, "from_pretrained", lambda name, device: asked.append((name, device)) or nla)
    audit_files("some/pair", [files["talks"]], AuditSettings(samples=1), device="cuda:1")
    assert asked == [("some/pair", "cuda:1")]


def test_nothing_to_audit_is_refused(nla: NLA, files: dict[str, Path]) -> None:
    with pytest.raises(ArgumentError, match="no transcripts"):
        audit(nla, [])
    with pytest.raises(ArgumentError, match="one id"):
        audit(nla, [transcript(), transcript()])
    with pytest.raises(ArgumentError, match="samples=0"):
        AuditSettings(samples=0)
    with pytest.raises(TranscriptError, match="no such file"):
        audit_files(nla, [files["out"] / "none.json"])
    with pytest.raises(RubricError):
        audit_files("no-such-pair", [files["talks"]], AuditSettings(rubrics=["no-such-rubric"]))


def test_a_long_transcript_is_read_in_windows(nla: NLA) -> None:
    talk = transcript(60)
    with pytest.raises(NLAError, match="--window 64"):
        audit(nla, [talk])
    found = audit(nla, [talk], AuditSettings(samples=1, budget=30, window=64))
    assert len(found.readings[0].entries) == 30 and found.readings[0].n_tokens > 400


def test_controls_that_are_audited_too_or_of_another_model_or_of_no_use_are_refused(
    nla: NLA, files: dict[str, Path]
) -> None:
    with pytest.raises(ArgumentError, match="audited too"):
        go(nla, files, controls=[files["talks"]])
    with pytest.raises(ArgumentError, match="without any transcript"):
        audit(nla, [transcript(4)], controls=[])
    files["controls"].write_text('{"messages": [{"role": "user", "content": "a zebra"}]}\n', encoding="utf-8")
    with pytest.raises(TranscriptError, match=r"1 control transcripts.*zebra"):
        go(nla, files, controls=[files["controls"]], skip_bad=True)
    other = '{"model": "gpt", "messages": [{"role": "user", "content": "the cat"}]}\n'
    files["controls"].write_text(other, encoding="utf-8")
    with pytest.raises(TranscriptError, match="--model-of gpt"):
        go(nla, files, controls=[files["controls"]])
    assert go(nla, files, controls=[files["controls"]], model_of="gpt", out_dir=None).controlled


def test_positions_and_lengths_are_checked_before_anything_is_read(nla: NLA, files: dict[str, Path]) -> None:
    write_jsonl(files["talks"], [transcript(4), transcript(60, "long")])
    report = go(nla, files, skip_bad=True)
    assert len(report.audit.transcripts) == 1 and "--window" in report.refused[0]
    write_jsonl(files["talks"], [transcript(2), transcript(1, "no match", first=2)])
    report = go(nla, files, skip_bad=True, positions="/ cat/")
    assert len(report.audit.transcripts) == 1 and "matches no token of no match" in report.refused[0]


def terminal(report: AuditReport, out_dir: Path | None = None) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(*report.summary(out_dir), sep="\n")
    return console.export_text()


def test_the_terminal_shows_findings_what_the_columns_mean_and_where_the_page_is(
    nla: NLA, files: dict[str, Path]
) -> None:
    report = go(nla, files)
    text = terminal(report, files["out"])
    first = report.audit.findings[0]
    assert "No controls" in text and "A finding is a position" in text and "Significant:" not in text
    assert first.transcript in text and first.trust.level in text and "audit.html" in text
    assert "not found" not in text and "Significant:" in terminal(go(nla, files, controls=[files["controls"]]))
    assert "Nothing was found" in terminal(go(nla, files, out_dir=None, rubrics=["hidden-objective"]))


def test_without_controls_the_summary_says_that_nothing_is_tested(nla: NLA, files: dict[str, Path]) -> None:
    report = go(nla, files, out_dir=None)
    assert "No controls" in report.to_markdown() and not report.passed
    assert go(nla, files, out_dir=None, rubrics=["hidden-objective"]).passed
