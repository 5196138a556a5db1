from __future__ import annotations

import json
import re

import pytest
import torch

from nla.errors import ConfigError
from nla.eval.items import documents
from nla.eval.pair import fidelity, truth
from nla.eval.report import Rate, bars, cell, new_figure, save, table, to_json
from nla.metrics import Baseline
from nla.models.read import Activations
from nla.organisms.couplets import world
from nla.pair.fidelity import FidelityByStratum
from nla.stats import Interval
from nla.text.tokens import Span
from tests.helpers.planted import planted_pair


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[fidelity.FidelityReport, object]:
    folder = tmp_path_factory.mktemp("fidelity")
    found = fidelity.run(planted_pair(), warm_start=planted_pair(), n_documents=6, out_dir=folder)
    return found, folder


def test_every_stratum_is_scored_beside_its_rock_and_its_warm_start(report) -> None:
    found, folder = report
    assert set(found.score.by_stratum) == {"line 1", "newline", "line 2", "line 3"}
    assert {"empty", "mean", "shuffled", "shuffled_within"} <= set(found.score.baselines)
    assert [part.stratum for part in found.public][-1] == "global" and len(found.gains) == 5
    content = json.loads((folder / "fidelity.json").read_text())
    assert content["n_activations"] == found.score.n and content["passed"] is found.passed
    assert (folder / "fidelity.png").exists() and "## Fidelity" in (folder / "fidelity.md").read_text()


def test_equal_pairs_differ_by_nothing(report) -> None:
    for part in report[0].public:
        difference = part.joint_minus_warm_decoder
        assert abs(difference.value) < 1e-6 and abs(difference.low) < 1e-6
    for gain in report[0].gains:
        assert abs(gain.change.value) < 1e-6 and abs(gain.error_removed.value) < 1e-6


def test_the_differences_are_those_of_the_fves(report) -> None:
    for part in report[0].public:
        assert part.truthful_minus_encoder.value == pytest.approx(part.truthful.value - part.encoder.value, abs=1e-6)
    fve = {part.stratum: part.encoder.value for part in report[0].public}
    for name, scored in report[0].score.by_stratum.items():
        assert fve[name] == pytest.approx(scored.fve.value, abs=1e-5)


def newlines(couplets: list[world.Couplet]) -> Activations:
    """Random vectors at the newlines of documents."""
    n, breaks = len(couplets), [couplet.text.index("\n") for couplet in couplets]
    return Activations(
        vectors=torch.randn(n, 4),
        spans=[Span(0, "\n", start, start + 1, 0) for start in breaks],
        document=torch.arange(n),
        texts=[couplet.text for couplet in couplets],
        point="resid_post.1",
        strata=["newline"] * n,
    )


def test_gains_and_differences_have_the_sign_and_size_that_their_names_say() -> None:
    """Hand-made errors over a variance of 2: the joint decoder is better on its encoder's texts alone."""
    acts = newlines(documents(8, seed=3))
    baselines = {name: Baseline(torch.zeros(4), 2.0, 8) for name in ("newline", "global")}
    judged = FidelityByStratum(acts.strata, acts.document, baselines)
    own, warm = fidelity.ENCODER, fidelity.WARM
    sizes = {own: 0.4, warm: 1.6, fidelity.TRUTHFUL: 0.2, f"{warm}, {own}": 1.0, f"{warm}, {fidelity.TRUTHFUL}": 0.6}
    errors = {name: torch.full((8,), size) for name, size in sizes.items()}
    gain, public = fidelity._gain(judged, errors, "newline"), fidelity._public(judged, errors, "newline")
    assert gain.warm.value == pytest.approx(0.2) and gain.change.value == pytest.approx(0.6)
    assert gain.error_removed.value == pytest.approx(0.75)
    assert public.encoder.value == pytest.approx(0.8) and public.truthful.value == pytest.approx(0.9)
    assert public.truthful_minus_encoder.value == pytest.approx(0.1)
    assert public.joint_minus_warm_decoder is not None and public.beyond_truthful is not None
    assert public.joint_minus_warm_decoder.value == pytest.approx(0.3)
    assert public.beyond_truthful.value == pytest.approx(0.3 - 0.2)
    assert public.honest is None  # nothing says how often the describer is right


def test_claims_are_held_against_their_own_token_and_against_another() -> None:
    couplets = documents(40, seed=3)
    acts = newlines(couplets)
    rows = list(zip(couplets, acts.spans, strict=True))
    right = [world.truthful(couplet, span) for couplet, span in rows]
    wrong = [world.lying(couplet, span) for couplet, span in rows]
    found = {one.claim: one for one in truth.truths(acts, couplets, right, wrong)}
    plan, visible = found[truth.PLAN], found[truth.VISIBLE]
    assert plan.n == 40 and plan.true.value == 1.0 and plan.warm_start is not None and plan.warm_start.value == 0.0
    assert plan.shuffled is not None and plan.shuffled.value < 0.2
    assert visible.true.value == 1.0 and visible.warm_start is not None and visible.warm_start.value == 0.0


def test_a_warm_start_at_another_point_is_refused() -> None:
    other = planted_pair()
    other.point = other.point._replace(layer=0)
    with pytest.raises(ConfigError):
        fidelity.run(planted_pair(), warm_start=other, n_documents=2)


def test_numbers_that_are_not_finite_become_null_in_json() -> None:
    content = to_json({"a": float("nan"), "b": Interval(0.5, 0.1, 0.9), "c": torch.tensor([1.0]), "d": (1, None)})
    assert content == {"a": None, "b": {"value": 0.5, "low": 0.1, "high": 0.9}, "c": [1.0], "d": [1, None]}


def test_shares_of_exactly_zero_or_one_still_have_an_interval() -> None:
    all_right = Rate.clustered(torch.ones(40), list(range(20)) * 2)
    assert all_right.value == 1.0 and all_right.low == pytest.approx(Rate.of([True] * 20).low)
    assert Rate.of([True] * 50).above(Rate.of([False] * 50)) and not Rate.of([True, False]).above(Rate.of([False]))


def test_no_cell_of_a_table_can_end_itself_or_its_row() -> None:
    hostile = ["a|b", "a\\|b", "a\nb", "\x1b[2J"]
    header, _, *rows = table(("one|two", "n"), [(text, 1) for text in hostile]).splitlines()
    assert len(rows) == len(hostile)
    for line in (header, *rows):
        assert "\x1b" not in line and len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3, line


def test_tables_align_and_reports_are_written_whole(tmp_path) -> None:
    text = table(("a", "b"), [("x", 0.5), ("longer", None)])
    assert len({len(line) for line in text.splitlines()}) == 1 and cell(True) == "yes"
    figure = new_figure(3, 2)
    bars(figure.add_subplot(), {"one": Rate.of([True]), "two": 0.25}, "title")
    paths = save(tmp_path / "new", "name", {"a": 1}, text, figure)
    assert [path.name for path in paths] == ["name.json", "name.md", "name.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["name.json", "name.md", "name.png"]
