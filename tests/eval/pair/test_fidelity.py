from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nla import NLA
from nla.errors import ArgumentError, BaselineError, ConfigError, StoreError
from nla.eval.couplet_items import documents
from nla.eval.pair import fidelity, truth
from nla.eval.pair.fidelity import FidelitySettings
from nla.eval.pair.fidelity_report import FidelityReport
from nla.eval.report import Rate, Report, bars, cell, new_figure, paragraphs, table, to_json
from nla.metrics import Baseline, cosine, fve
from nla.models.read import Activations
from nla.organisms.couplets import world
from nla.pair.fidelity import FidelityByStratum
from nla.stats import Interval
from nla.store.reader import Store
from nla.text.tokens import Span
from nla.train.data.corpus import CorpusSettings
from nla.train.data.extract import ExtractionSettings, extract_corpus
from tests.helpers.planted import planted_pair
from tests.helpers.shell import Shell
from tests.helpers.tiny import TEXTS, make_model, make_pair, make_tokenizer


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[FidelityReport, object]:
    folder = tmp_path_factory.mktemp("fidelity")
    found = fidelity.judge_fidelity(planted_pair(), FidelitySettings(warm_start=planted_pair(), n_documents=6))
    found.save(folder)
    return found, folder


def test_every_stratum_is_scored_beside_its_rock_and_its_warm_start(report) -> None:
    found, folder = report
    assert found.source == "held-out documents of the world couplets"
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
    found = {one.claim: one for one in truth.measure_truth(acts, couplets, right, wrong)}
    plan, visible = found[truth.PLAN], found[truth.VISIBLE]
    assert plan.n == 40 and plan.true.value == 1.0 and plan.warm_start is not None and plan.warm_start.value == 0.0
    assert plan.shuffled is not None and plan.shuffled.value < 0.2
    assert visible.true.value == 1.0 and visible.warm_start is not None and visible.warm_start.value == 0.0


def test_a_warm_start_at_another_point_is_refused() -> None:
    other = planted_pair()
    other.config = replace(other.config, point="resid_post.0")
    with pytest.raises(ConfigError):
        fidelity.judge_fidelity(planted_pair(), FidelitySettings(warm_start=other, n_documents=2))


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
    class Tried(Report):
        name = "name"

        def body(self):
            return paragraphs("# A", "", table(("a", "b"), [("x", 0.5), ("longer", None)]))

        def figure(self):
            figure = new_figure(3, 2)
            bars(figure.add_subplot(), {"one": Rate.of([True]), "two": 0.25}, "title")
            return figure

    title, text = Tried([]).to_markdown().split("\n\n")
    assert title == "# A" and len({len(line) for line in text.splitlines()}) == 1 and cell(True) == "yes"
    paths = Tried([]).save(tmp_path / "new")
    with pytest.raises(TypeError, match="abstract"):
        Report([])  # type: ignore[abstract]
    assert [path.name for path in paths] == ["name.json", "name.md", "name.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["name.json", "name.md", "name.png"]


# ------------------------------------------------------------------------------ any pair, on any texts or a store


@pytest.fixture
def own_pair() -> NLA:
    """A pair of no embedded world, with denominators."""
    pair = make_pair()
    pair.fit_baselines(pair.read(TEXTS))
    return pair


@pytest.fixture
def lines(tmp_path) -> str:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(text.strip() for text in TEXTS * 2 if "\n" not in text.strip()))
    return str(path)


def test_any_pair_is_judged_on_any_texts_with_intervals_beside_the_baselines(
    own_pair: NLA, lines: str, tmp_path
) -> None:
    settings = FidelitySettings(texts=lines, n_activations=30, seed=3)
    found = fidelity.judge_fidelity(own_pair, settings)
    found.save(tmp_path / "out")
    assert found.n_activations == 30 and found.denominators == "the pair's training activations"
    assert set(found.score.baselines) == {"empty", "mean", "shuffled", "other_document"}
    assert found.score.fve.low < found.score.fve.value < found.score.fve.high and not found.truths
    content = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert content["source"] == f"texts of {lines}" and (tmp_path / "out" / "fidelity.png").exists()
    # The same figure by the formulas, from the pair's public methods alone.
    acts = fidelity.material(own_pair, settings).acts
    texts = fidelity._explain(own_pair, acts.vectors, 3, "", lambda *_: None)
    predicted = own_pair.reconstruct(texts, strict=False)
    assert found.score.fve.value == pytest.approx(fve(acts.vectors, predicted, own_pair.baselines["global"]), abs=1e-5)
    assert found.score.cosine.value == pytest.approx(float(cosine(acts.vectors, predicted).mean()), abs=1e-5)


def test_an_untrained_pair_is_not_above_the_baselines_and_one_that_reconstructs_is(
    own_pair: NLA, lines: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = FidelitySettings(texts=lines)
    (check,) = [c for c in fidelity.judge_fidelity(own_pair, settings).checks if c.name.startswith("FVE above")]
    assert check.passed is False
    vectors = fidelity.material(own_pair, settings).acts.vectors
    original = own_pair.reconstruct
    monkeypatch.setattr(
        own_pair, "reconstruct", lambda texts, **k: vectors if len(texts) == len(vectors) else original(texts, **k)
    )
    report = fidelity.judge_fidelity(own_pair, settings)
    assert report.score.fve.value == pytest.approx(1, abs=1e-5)
    assert next(c for c in report.checks if c.name.startswith("FVE above")).passed


def test_a_pair_without_denominators_fits_them_on_documents_that_are_not_scored(lines: str) -> None:
    pair = make_pair()
    everything = fidelity.material(pair, FidelitySettings(texts=lines)).acts
    pair.baselines = {}
    found = fidelity.material(pair, FidelitySettings(texts=lines))
    odd = everything.document % 2 == 1
    assert torch.equal(found.acts.vectors, everything.vectors[~odd])
    expected = Baseline.fit(everything.vectors[odd])
    assert found.denominators.baselines["global"].variance == pytest.approx(expected.variance)
    assert f"{int(odd.sum())} activations" in found.denominators.source
    assert f"{int(odd.sum())} activations of" in fidelity.judge_fidelity(pair, FidelitySettings(texts=lines)).to_card()


def test_too_few_texts_to_fit_denominators_on_are_refused_with_the_next_step(tmp_path) -> None:
    (tmp_path / "one.txt").write_text("the cat sat on the mat.")
    pair = make_pair()
    pair.baselines = {}
    with pytest.raises(BaselineError, match=r"fit_baselines.*--store"):
        fidelity.judge_fidelity(pair, FidelitySettings(texts=tmp_path / "one.txt"))


def test_one_document_gives_figures_without_intervals_and_passes_nothing(own_pair: NLA, tmp_path) -> None:
    (tmp_path / "one.txt").write_text("the cat sat on the mat.")
    found = fidelity.judge_fidelity(own_pair, FidelitySettings(texts=tmp_path / "one.txt"))
    assert found.score.fve.low != found.score.fve.low and "no interval" in found.to_markdown()
    assert found.checks[0].passed is None and "other_document" not in found.score.baselines


def test_a_warm_start_is_compared_on_the_same_activations_of_any_texts(own_pair: NLA, lines: str) -> None:
    found = fidelity.judge_fidelity(own_pair, FidelitySettings(texts=lines, warm_start=own_pair))
    (public,), (gain,) = found.public, found.gains
    assert public.truthful is None and public.joint_minus_warm_decoder is not None
    assert abs(public.joint_minus_warm_decoder.value) < 1e-6 and abs(gain.change.value) < 1e-6


def test_a_kind_of_position_is_judged_apart_only_where_it_has_denominators(own_pair: NLA, tmp_path) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = ["the cat sat", "the dog ran", "the mat", "the cat ran"]
    content = [{"id": str(n), "messages": [{"role": "user", "content": turn}]} for n, turn in enumerate(turns)]
    chats.write_text("\n".join(json.dumps(chat) for chat in content))
    settings = FidelitySettings(texts=chats, chats=True)
    assert fidelity.judge_fidelity(own_pair, settings).score.by_stratum == {}
    own_pair.baselines["user"] = own_pair.baselines["global"]
    found = fidelity.judge_fidelity(own_pair, settings)
    assert set(found.score.by_stratum) == {"user"} and 0 < found.score.by_stratum["user"].n < found.score.n


def test_a_pair_of_no_world_and_no_texts_is_told_what_to_give(own_pair: NLA) -> None:
    with pytest.raises(ArgumentError, match="--texts FILE"):
        fidelity.judge_fidelity(own_pair)
    for wrong in ({"n_activations": 1}, {"texts": "a", "store": "b"}, {"chats": True}):
        with pytest.raises(ArgumentError):
            FidelitySettings(**wrong)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target, a pair on it, a corpus, and the corpus' store."""
    folder = tmp_path_factory.mktemp("work")
    make_model().save_pretrained(folder / "target")
    make_tokenizer().save_pretrained(folder / "target")
    make_pair(target=str(folder / "target")).save_pretrained(folder / "pair")
    draw = random.Random(0)
    words = ["the", "a", "cat", "dog", "red", "blue", "sat", "ran", "on", "under", "mat", "tree"]
    documents = [" ".join(draw.choices(words, k=draw.randint(8, 40))) for _ in range(60)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    settings = CorpusSettings(
        str(folder / "corpus.jsonl"), n_positions=3, first_position=2, max_tokens=64, eval_fraction=0.25
    )
    extract_corpus(ExtractionSettings(settings, str(folder / "target"), "resid_post.1"), folder / "store")
    return folder


def test_a_stores_held_out_part_is_judged_and_its_training_part_gives_the_denominators(on_disk: Path) -> None:
    pair = NLA.from_pretrained(on_disk / "pair", device="cpu")
    pair.baselines = {}
    store = Store.open(on_disk / "store", "eval")
    found = fidelity.judge_fidelity(pair, FidelitySettings(store=on_disk / "store", n_activations=10**6))
    assert found.n_activations == len(store) and found.n_documents == store.manifest.n_documents["eval"]
    assert str(on_disk / "store") in found.denominators
    texts = fidelity._explain(pair, store.vectors[:], 0, "", lambda *_: None)
    expected = fve(store.vectors[:], pair.reconstruct(texts, strict=False), store.baselines["global"])
    assert found.score.fve.value == pytest.approx(expected, abs=1e-5)
    some = fidelity.material(pair, FidelitySettings(store=on_disk / "store", n_activations=5)).acts
    assert len(some) == 5


def test_a_store_of_another_target_is_refused(on_disk: Path) -> None:
    with pytest.raises(StoreError, match="another target"):
        fidelity.judge_fidelity(make_pair(), FidelitySettings(store=on_disk / "store"))


@pytest.mark.slow
def test_the_installed_command_judges_a_pair_on_a_file_of_texts(shell: Shell, on_disk: Path) -> None:
    (on_disk / "texts.txt").write_text("the cat sat on the mat.\nthe dog ran.\nthe red dog sat.\na cat ran.\n")
    done = shell.run("nla eval fidelity pair --texts texts.txt --items 4 --device cpu --json", on_disk)
    assert done.code == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["n_documents"] == 4 and content["source"] == "texts of texts.txt"
    assert set(content["score"]["baselines"]) == {"empty", "mean", "shuffled", "other_document"}
    done = shell.run("nla eval fidelity pair", on_disk)
    assert done.code == 2 and "--texts FILE" in done.stderr
