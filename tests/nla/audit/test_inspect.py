"""Inspect's logs: read, scored in a copy, scanned by Scout; without the extra, a typed error that names it."""

from __future__ import annotations

import asyncio
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from nla.audit.findings import Judged, PositionScore
from nla.audit.from_files import audit_files
from nla.audit.inspect_scores import explain
from nla.audit.settings import AuditSettings
from nla.errors import MissingExtraError, TranscriptError
from nla.transcripts.files import load_transcripts, read_file
from tests.helpers.talk import entry
from tests.helpers.tiny import TEMPLATE, make_pair

WORD = {"name": "word", "looks_for": "Any word.", "match": {"regex": ["[a-z]"]}, "min_share": 0.25}


def make_log(path: Path, sample_ids: bool = True) -> Path:
    """A log of two samples in the words of the tests' tokenizer, and one that says nothing."""
    log = pytest.importorskip("inspect_ai.log")
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser

    talks = [("the cat sat on the mat.\n", "it is here.\n"), ("so the dog is under a tree.\n", "the cat is here.\n")]
    samples = [
        log.EvalSample(
            id=number,
            epoch=1,
            input=user,
            target="x",
            messages=[ChatMessageUser(content=user), ChatMessageAssistant(content=answer)],
        )
        for number, (user, answer) in enumerate([*talks, ("so", "")])
    ]
    spec = log.EvalSpec(
        created="2026-01-01T00:00:00+00:00",
        task="talk",
        dataset=log.EvalDataset(name="talk", samples=3, sample_ids=[0, 1, 2] if sample_ids else None),
        model="mockllm/target",
        config=log.EvalConfig(),
    )
    log.write_eval_log(log.EvalLog(status="success", eval=spec, samples=samples), str(path))
    return path


@pytest.mark.parametrize("sample_ids", [True, False])
def test_samples_are_transcripts_and_an_empty_message_is_an_error_in_its_place(
    tmp_path: Path, sample_ids: bool
) -> None:
    found = list(read_file(make_log(tmp_path / "a.eval", sample_ids)))
    assert [isinstance(each, TranscriptError) for each in found] == [False, False, True]
    assert [message.role for message in found[0].messages] == ["user", "assistant"]
    assert (found[1].id, found[1].model) == ("1", "mockllm/target")
    (tmp_path / "cut.eval").write_bytes((tmp_path / "a.eval").read_bytes()[:300])
    (tmp_path / "text.eval").write_text("no log", encoding="utf-8")
    for name in ("cut", "text"):
        with pytest.raises(TranscriptError, match=f"{name}.eval"):
            list(load_transcripts(tmp_path / f"{name}.eval"))


def test_scores_are_written_into_a_copy_with_references_to_messages(tmp_path: Path) -> None:
    log = pytest.importorskip("inspect_ai.log")
    path, rubric = make_log(tmp_path / "a.eval"), tmp_path / "word.yaml"
    rubric.write_text(yaml.safe_dump(WORD), encoding="utf-8")
    before = path.read_bytes()
    settings = AuditSettings(rubrics=[rubric], model_of="any")
    report = audit_files(make_pair(), [path], settings, out_dir=tmp_path / "out", skip_bad=True)
    assert len(report.refused) == 1 and path.read_bytes() == before
    scored = log.read_eval_log(str(tmp_path / "out" / "a.eval"))
    assert "nla_audit/word" in [score.name for score in scored.results.scores]
    assert scored.samples[2].scores is None
    for sample, score in zip(scored.samples[:2], report.audit.scores, strict=True):
        found = sample.scores["nla_audit/word"]
        assert found.value == score.highest and found.metadata["n_findings"] == score.n_findings
        ids = {message.id for message in sample.messages}
        cites = found.metadata["scanner_references"]
        assert {cite["id"] for cite in cites} <= ids and all(cite["cite"] in found.explanation for cite in cites)
        assert bool(cites) == bool(score.n_findings)


def test_the_scanner_gives_a_result_for_each_rubric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scout = pytest.importorskip("inspect_scout")
    module = importlib.import_module("nla.audit.scanner")
    make_log(tmp_path / "a.eval")
    rubric = tmp_path / "word.yaml"
    rubric.write_text(yaml.safe_dump(WORD), encoding="utf-8")
    pair = make_pair()
    monkeypatch.setattr(module, "_pair", lambda name: pair)
    messages = importlib.import_module("inspect_ai.log").read_eval_log(str(tmp_path / "a.eval")).samples[0].messages
    talk = scout.Transcript(transcript_id="t", model="target", messages=messages)
    scan = module.nla_audit(rubrics=[str(rubric), "hidden-objective"], samples=4, model_of="any")
    results = asyncio.run(scan(talk))
    assert [result.label for result in results] == ["word", "hidden-objective"]
    assert results[0].value == 1.0 and results[0].references and results[1].value == 0
    assert all((result.metadata["unread"], result.metadata["remarks"]) == ([], []) for result in results)
    pair.tokenizer.chat_template = TEMPLATE.replace("in messages", "in messages[1:]")
    scan = module.nla_audit(rubrics=str(rubric), samples=1, model_of="any", allow_dropped=True)
    (result,) = asyncio.run(scan(talk))
    (remark,) = result.metadata["remarks"]
    assert result.metadata["unread"] == ["content of message 0"] and "Dropped by the chat template" in remark


def test_without_the_extra_a_typed_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.eval"
    path.write_bytes(b"PK")
    for name in ("inspect_ai", "inspect_ai.log"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"nla\[audit\]"):
        list(load_transcripts(path))


def test_the_entry_point_is_silent_and_offers_nothing_without_inspect_scout() -> None:
    """What inspect-ai does at its start: it loads every entry point of its group, with Scout installed or not."""
    program = """
import sys
from importlib.metadata import entry_points
for name in ("inspect_ai", "inspect_scout"):
    sys.modules[name] = None
(point,) = [point for point in entry_points(group="inspect_ai") if point.value.startswith("nla.")]
module = point.load()
assert module.__name__ == "nla.audit.scout" and not hasattr(module, "nla_audit")
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_models_write_is_no_markdown_where_inspect_shows_it() -> None:
    text = "[click](http://x) ![i](y) <b>*so*</b> `c` # h"
    judged = Judged((True,), "not said")
    row = PositionScore("r", "t", entry(texts=[text], token="*x*"), judged, None, 0, None, None)
    shown = explain([row])
    assert shown.startswith("[M1] at ") and text in re.sub(r"\\(.)", r"\1", shown)
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(shown)
    assert set(re.findall(r"<\w+", page)) == {"<p"}, "an independent reader of Markdown finds text alone"
