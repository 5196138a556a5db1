"""Transfer to a fine-tune: nothing falls where nothing changed, what moved is seen, and bad input is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from nla.autoencoder import NLA
from nla.baselines import fit_baselines
from nla.errors import ArgumentError, BaselineError, ConfigError
from nla.eval.pair import transfer
from nla.eval.pair.texts import load_documents, sample_tokens
from nla.eval.pair.transfer import CARE, NOT, TRUST, Part, TransferSettings, judge_transfer
from nla.metrics import Baseline, fve
from nla.models.lora import save_adapter
from nla.models.read import Activations
from nla.stats import Interval
from nla.text.tokens import Span
from tests.helpers.tiny import TEXTS, make_model, make_pair

STRATA = ["noun", "verb"]


def adapter(folder: Path, scale: float) -> Path:
    """A LoRA adapter on the first blocks of the target; of scale 0 it changes nothing."""
    tuned = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=scale) if scale else torch.nn.init.zeros_(parameter)
    save_adapter(folder, tuned, "default")
    return folder


@pytest.fixture
def nla() -> NLA:
    pair = make_pair()
    pair.baselines = fit_baselines(pair.read(TEXTS).vectors, ["all"] * len(pair.read(TEXTS)))
    return pair


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(text.strip() for text in TEXTS * 2 if "\n" not in text.strip()) + "\n")
    return path


def test_an_adapter_that_changes_nothing_lets_nothing_fall(nla: NLA, texts: Path, tmp_path: Path) -> None:
    found = judge_transfer(nla, TransferSettings(adapter(tmp_path / "none", 0.0), texts))
    found.save(tmp_path / "out")
    (part,) = found.parts
    assert part.moved.value == pytest.approx(1) and part.fall == Interval(0, 0, 0) == part.new_text
    assert part.base == part.tuned and part.base_own == part.tuned_own and part.base_cosine == part.tuned_cosine
    content = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert content["verdict"] == found.verdict and content["parts"][0]["n"] == part.n
    assert (tmp_path / "out" / "transfer.png").exists() and "## Transfer" in (tmp_path / "out/transfer.md").read_text()


def test_an_adapter_that_changes_much_is_seen_and_the_pair_is_left_as_it_was(
    nla: NLA, texts: Path, tmp_path: Path
) -> None:
    before = nla.read(TEXTS).vectors
    folder = adapter(tmp_path / "much", 0.3)
    found = judge_transfer(nla, TransferSettings(folder, texts))
    assert found.parts[-1].moved.high < 0.95 and not found.passed
    assert found.examples[0]["cosine"] <= found.examples[-1]["cosine"] < 1
    assert torch.equal(nla.read(TEXTS).vectors, before)
    assert judge_transfer(nla, TransferSettings(folder, texts)).to_json() == found.to_json()


def test_the_activations_are_those_of_the_target_and_of_the_tuned_target(
    nla: NLA, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, folder = [], adapter(tmp_path / "much", 0.3)
    original = transfer.compare_transfer
    monkeypatch.setattr(transfer, "compare_transfer", lambda *args: kept.extend(args[1:3]) or original(*args))
    judge_transfer(nla, TransferSettings(folder, texts, n_activations=7))
    tuned = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    tuned.load_adapter(folder, "default")
    for acts, model in zip(kept, (make_model(), tuned), strict=True):
        assert len(acts) == 7
        for one in acts:
            ids = torch.tensor([nla.tokenizer(one.texts[int(one.document)])["input_ids"]])
            hidden = model(ids, output_hidden_states=True).hidden_states[nla.point.layer + 1]
            assert torch.allclose(hidden[0, one.spans[0].index], one.vectors[0], atol=1e-4)


def test_no_more_is_read_than_is_scored(nla: NLA, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, n_read, original = adapter(tmp_path / "some", 0.1), [], NLA.read
    everything = sample_tokens(nla, load_documents(nla, texts, False, 9), "all", 10**6, 0).columns

    def spy(self: NLA, *args, **keywords) -> Activations:
        found = original(self, *args, **keywords)
        n_read.append(len(found))
        return found

    monkeypatch.setattr(NLA, "read", spy)
    judge_transfer(nla, TransferSettings(folder, texts, n_activations=9))
    assert n_read == [9, 9] and sum(map(len, everything)) > 20


def test_what_cannot_be_judged_is_refused_before_anything_is_read(
    nla: NLA, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter(tmp_path / "some", 0.1)
    monkeypatch.setattr(NLA, "read", lambda *_, **__: pytest.fail("read"))
    (tmp_path / "one.txt").write_text("the cat sat on the mat.")
    with pytest.raises(ArgumentError, match=r"one document.*one on each line"):
        judge_transfer(nla, TransferSettings(folder, tmp_path / "one.txt"))
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(ArgumentError, match="no document"):
        judge_transfer(nla, TransferSettings(folder, tmp_path / "none.txt"))
    nla.baselines = {}
    with pytest.raises(BaselineError, match=r"no baselines.*fit_baselines"):
        judge_transfer(nla, TransferSettings(folder, texts))


def test_figures_are_those_of_the_formulas(nla: NLA, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    base, tuned, *predicted = (torch.randn(80, 32, generator=generator) + 1 for _ in range(4))
    spans = [Span(1, "the", 0, 3, 0)] * 80
    acts = Activations(base, spans, torch.arange(80) // 4, ["the"] * 20, "resid_post.1", STRATA * 40)
    nla.baselines = fit_baselines(base, STRATA * 40)
    answers = iter(predicted)
    monkeypatch.setattr(nla, "reconstruct", lambda *args, **kwargs: next(answers))
    found = transfer.compare_transfer(nla, acts, acts.replace(vectors=tuned), [["a"] * 80, ["b"] * 80], "x", 0)
    assert [part.stratum for part in found.parts] == [*STRATA, "global"] and found.n_documents == 20
    rows = [torch.arange(80) % 2 == 0, torch.arange(80) % 2 == 1, torch.ones(80, dtype=torch.bool)]
    for part, mask in zip(found.parts, rows, strict=True):
        baseline = nla.baselines[part.stratum]
        assert part.base.value == pytest.approx(fve(base[mask], predicted[0][mask], baseline), abs=1e-5)
        assert part.tuned.value == pytest.approx(fve(tuned[mask], predicted[1][mask], baseline), abs=1e-5)
        own = fve(tuned[mask], predicted[1][mask], Baseline.fit(tuned[mask]))
        assert part.tuned_own.value == pytest.approx(own, abs=1e-5)
        assert part.fall.value == pytest.approx(part.base.value - part.tuned.value, abs=1e-6)
        other = fve(tuned[mask], predicted[0][mask], baseline)
        assert part.new_text.value == pytest.approx(part.tuned.value - other, abs=1e-5)
        assert part.moved.value == pytest.approx(
            torch.cosine_similarity(base[mask], tuned[mask]).mean().item(), abs=1e-6
        )


@pytest.mark.parametrize(
    ("fall", "kept", "verdict"),
    [
        ((0.02, 0.01, 0.03), (0.95, 0.92, 0.98), TRUST),
        ((0.04, 0.01, 0.07), (0.95, 0.92, 0.98), CARE),
        ((0.02, 0.01, 0.03), (0.92, 0.85, 0.98), CARE),
        ((0.15, 0.05, 0.25), (0.95, 0.92, 0.98), NOT),
        ((0.02, 0.01, 0.03), (0.6, 0.4, 0.8), NOT),
        ((0.02, 0.01, 0.03), None, NOT),
        ((0.02, float("nan"), float("nan")), (0.95, float("nan"), float("nan")), NOT),
    ],
)
def test_the_verdict_follows_the_ends_that_speak_against_trust(fall, kept, verdict: str) -> None:
    any_ = Interval(0.5, 0.4, 0.6)
    part = Part("global", 9, any_, any_, Interval(*fall), any_, any_, kept and Interval(*kept), *[any_] * 4)
    assert part.verdict == verdict
    report = transfer.TransferReport(transfer._checks(part), "x", "resid_post.1", 2, [part], [])
    assert report.passed == (verdict == TRUST) and report.verdict == verdict in report.to_markdown()


def test_bad_input_is_refused(nla: NLA, texts: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "some", 0.1)
    for keywords, message in (
        ({"target_adapter": None, "texts": texts}, "--target-adapter"),
        ({"n_documents": 1, "texts": texts}, "n_documents 2"),
        ({}, "--texts"),
        ({"texts": tmp_path / "none.txt"}, "check the path"),
        ({"texts": tmp_path / "some"}, "check the path"),
    ):
        with pytest.raises(ArgumentError, match=message):
            judge_transfer(nla, TransferSettings(**{"target_adapter": folder, **keywords}))
    (tmp_path / "one.txt").write_text("the cat sat on the mat.")
    with pytest.raises(ArgumentError, match="one document"):
        judge_transfer(nla, TransferSettings(folder, tmp_path / "one.txt"))
    with pytest.raises(ConfigError):
        judge_transfer(nla, TransferSettings(tmp_path / "nothing", texts))
