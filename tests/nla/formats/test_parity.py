"""Parity: what we compute on pairs in other projects' formats is what their own code computes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import parity  # type: ignore[import-not-found]
import parity_pairs as pairs  # type: ignore[import-not-found]


@pytest.mark.parametrize("case", parity.CASES)
def test_we_compute_what_their_own_code_computed(case: str, tmp_path: Path) -> None:
    mine, recorded = parity.ours(parity.make(case, tmp_path)), parity.recorded(case)
    rows = parity.compare(case, mine, recorded)
    assert {row.name for row in rows} == set(recorded) >= {"ids", "entered", "decoded"}
    assert [row for row in rows if not row.passed] == []


def test_an_activation_that_enters_elsewhere_or_a_lost_bos_is_beyond_tolerance(tmp_path: Path) -> None:
    recorded = parity.recorded("kitft gemma3")
    nla = parity.make("kitft gemma3", tmp_path).nla
    scaled = dict(recorded, entered=recorded["entered"] * pairs.D_MODEL**0.5)
    moved = dict(recorded, entered=recorded["entered"].roll(1, dims=1))
    for wrong in (scaled, moved, dict(recorded, ids=recorded["ids"][1:])):
        assert any(not row.passed for row in parity.compare("kitft gemma3", wrong, recorded))
    assert int(recorded["ids"][0]) == nla.tokenizer.bos_token_id
    with torch.no_grad(), nla.role("decoder"):
        ids, mask = nla.encode_explanations(pairs.TEXTS[:1])
        without = nla.decode_ids(ids[:, 1:], mask[:, 1:])
    assert (without - recorded["decoded"][:1]).abs().max() > 0.01


def test_the_command_prints_a_table_of_what_was_recorded(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(parity, "CASES", ("kitft qwen2",))
    assert parity.main([]) == 0
    shown = capsys.readouterr().out
    assert shown.count("recorded") == 4
    assert "BEYOND" not in shown
    monkeypatch.setattr(parity, "TOLERANCES", dict.fromkeys(parity.TOLERANCES, -1.0))
    assert parity.main([]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("project", ["kitft", "easynla"])
def test_we_compute_what_their_own_code_computes_now(
    project: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Needs ``--reference FOLDER``: a folder that holds clones whose names contain "kitft" and "EasyNLA"."""
    folder = request.config.getoption("--reference", default=None)
    clones = [path for path in Path(folder or "/nowhere").glob("*") if project in path.name.lower()]
    if not clones:
        pytest.skip("no clone of their code: pass --reference FOLDER")
    cases = [case for case in parity.CASES if case.startswith(project)]
    made = {case: parity.make(case, tmp_path / case.replace(" ", "_")) for case in cases}
    found = parity.theirs(project, made, clones[0], tmp_path)
    rows = [row for case in cases for row in parity.compare(case, parity.ours(made[case]), found[case])]
    assert len(rows) == 4 * len(cases)
    assert [row for row in rows if not row.passed] == []
