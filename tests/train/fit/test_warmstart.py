"""The warm start: what it trains, and that nothing is lost when it stops."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nla.errors import (
    ArgumentError,
    ConfigError,
    InterruptedTraining,
    NLAError,
    NonFiniteError,
    RecipeError,
    ShapeError,
    StorageError,
    VocabularyError,
    WeightsError,
)
from nla.train.fit import checkpoints
from nla.train.fit.checkpoints import (
    base_parameters,
    decoder_parameters,
    encoder_parameters,
    latest_checkpoint,
    snapshot,
)
from nla.train.fit.log_probs import answer_log_probs
from nla.train.fit.metrics_log import MetricsLog, plot
from nla.train.fit.settings import FitSettings
from nla.train.fit.warmstart import (
    IGNORED,
    EncoderCollator,
    EncoderTrainer,
    epoch_rows,
    warmstart,
    write_ids,
)
from tests.helpers.tiny import D_MODEL, make_pair
from tests.helpers.training import assert_same, at_step, base_weights, largest_file

TEXTS = ["the cat sat.", "a red dog ran.", "it is here.", "so the tree is blue."] * 6
ENCODER = dict(steps=6, batch_size=8, learning_rate=1e-2, seed=0, save_every=2)
DECODER = ENCODER | dict(head_learning_rate=1e-2)


@pytest.fixture
def vectors() -> torch.Tensor:
    """One direction for each of the four texts, with a little noise."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(4, D_MODEL, generator=generator).repeat(6, 1)
    return directions + 0.1 * torch.randn(24, D_MODEL, generator=generator)


STAGES = {
    "encoder": (functools.partial(warmstart, "encoder"), ENCODER, encoder_parameters, decoder_parameters),
    "decoder": (functools.partial(warmstart, "decoder"), DECODER, decoder_parameters, encoder_parameters),
}
each_stage = pytest.mark.parametrize("stage", list(STAGES))


@pytest.mark.slow
def test_encoder_learns_to_tell_activations_apart(vectors, tmp_path):
    pair = make_pair()
    settings = ENCODER | dict(steps=60, learning_rate=3e-2, save_every=100)
    figures = warmstart("encoder", pair, vectors, TEXTS, tmp_path, FitSettings(**settings), (vectors[:4], TEXTS[:4]))
    assert figures["eval_loss"] < 0.3
    pair.config = pair.config.__class__(**(vars(pair.config) | {"max_new_tokens": 12}))
    told = pair.encoder.generate(vectors[:4], samples=1, greedy=True).texts
    assert told == [f"<explanation>{text}</explanation>" for text in TEXTS[:4]]


@pytest.mark.slow
def test_decoder_learns_to_reconstruct(vectors, tmp_path):
    pair = make_pair()
    settings = DECODER | dict(steps=60, save_every=100)
    figures = warmstart("decoder", pair, vectors, TEXTS, tmp_path, FitSettings(**settings), (vectors[:4], TEXTS[:4]))
    cosine = torch.cosine_similarity(pair.reconstruct(TEXTS[:4]), vectors[:4])
    assert cosine.min() > 0.8
    expected = 1 - float((2 - 2 * cosine).mean()) / pair.baselines["global"].variance
    assert figures["eval_fve"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@each_stage
def test_only_its_own_half_is_trained(stage, vectors, tmp_path):
    train, settings, own, other = STAGES[stage]
    pair = make_pair()
    base, before_own, before_other = base_weights(pair), snapshot(own(pair)), snapshot(other(pair))
    forward = pair.model.get_base_model().forward
    train(pair, vectors, TEXTS, tmp_path, FitSettings(**settings))
    assert_same(base_weights(pair), base)
    assert_same(snapshot(other(pair)), before_other)
    assert all(not torch.equal(p, before_own[name]) for name, p in own(pair).items())
    assert pair.model.get_base_model().forward == forward


@pytest.mark.slow
@each_stage
def test_ctrl_c_saves_and_a_resumed_run_equals_an_uninterrupted_one(stage, vectors, tmp_path, monkeypatch):
    train, settings, own, _ = STAGES[stage]
    whole, stopped = make_pair(), make_pair()
    train(whole, vectors, TEXTS, tmp_path / "whole", FitSettings(**settings))
    before = snapshot(own(stopped))
    with monkeypatch.context() as patched:
        at_step(patched, 3, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(InterruptedTraining):
            train(stopped, vectors, TEXTS, tmp_path / "stopped", FitSettings(**settings))
    assert_same(snapshot(own(stopped)), before)
    assert latest_checkpoint(tmp_path / "stopped") == tmp_path / "stopped" / "checkpoint-3"
    train(stopped, vectors, TEXTS, tmp_path / "stopped", FitSettings(**settings))
    assert_same(snapshot(own(stopped)), snapshot(own(whole)))
    again = make_pair()
    train(again, vectors, TEXTS, tmp_path / "stopped", FitSettings(**settings))
    assert_same(snapshot(own(again)), snapshot(own(whole)))


@pytest.mark.slow
@each_stage
def test_full_disk_keeps_the_checkpoint_before_it(stage, vectors, tmp_path, monkeypatch):
    train, settings, own, _ = STAGES[stage]
    whole, stopped = make_pair(), make_pair()
    train(whole, vectors, TEXTS, tmp_path / "whole", FitSettings(**settings))
    with monkeypatch.context() as patched, contextlib.ExitStack() as disk:
        at_step(patched, 4, lambda: disk.enter_context(largest_file(8_000)))
        with pytest.raises(StorageError):
            train(stopped, vectors, TEXTS, tmp_path / "stopped", FitSettings(**settings))
    assert sorted(p.name for p in (tmp_path / "stopped").iterdir()) == ["checkpoint-2", "metrics.jsonl", "run.json"]
    train(stopped, vectors, TEXTS, tmp_path / "stopped", FitSettings(**settings))
    assert_same(snapshot(own(stopped)), snapshot(own(whole)))


@pytest.mark.slow
@each_stage
def test_ctrl_c_in_the_last_step_is_an_interrupt_too(stage, vectors, tmp_path, monkeypatch):
    train, settings, own, _ = STAGES[stage]
    pair = make_pair()
    before = snapshot(own(pair))
    with monkeypatch.context() as patched:
        at_step(patched, settings["steps"], lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(InterruptedTraining):
            train(pair, vectors, TEXTS, tmp_path, FitSettings(**settings))
    assert_same(snapshot(own(pair)), before)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    train(pair, vectors, TEXTS, tmp_path, FitSettings(**settings))
    assert all(not torch.equal(p, before[name]) for name, p in own(pair).items())


@pytest.mark.slow
def test_skipped_steps_before_a_resume_are_counted(vectors, tmp_path, monkeypatch):
    loss = EncoderTrainer.compute_loss

    def nan_in_step_2(self, *args, **kwargs):
        return loss(self, *args, **kwargs) * (torch.nan if self.state.global_step == 1 else 1)

    monkeypatch.setattr(EncoderTrainer, "compute_loss", nan_in_step_2)
    with monkeypatch.context() as patched:
        at_step(patched, 3, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(InterruptedTraining):
            warmstart("encoder", make_pair(), vectors, TEXTS, tmp_path, FitSettings(**ENCODER))
    figures = warmstart("encoder", make_pair(), vectors, TEXTS, tmp_path, FitSettings(**ENCODER))
    assert figures["skipped_steps"] == 1
    assert figures["steps"] == 6


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that was stopped after its third step."""
    folder, vectors = tmp_path_factory.mktemp("interrupted"), torch.eye(24, D_MODEL)
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 3, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(InterruptedTraining):
            warmstart("encoder", make_pair(), vectors, TEXTS, folder, FitSettings(**ENCODER))
    return folder, vectors


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["weights.safetensors", "optimizer.pt", "scheduler.pt", "extra.pt", "rng_state.pth", "trainer_state.json"],
)
def test_damaged_checkpoint_is_refused(name, interrupted, tmp_path):
    whole, vectors = interrupted
    shutil.copytree(whole, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-3" / name
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-20]), file.unlink):
        damage()
        with pytest.raises(WeightsError, match="begins anew"):
            warmstart("encoder", make_pair(), vectors, TEXTS, tmp_path / "run", FitSettings(**ENCODER))


@pytest.mark.slow
def test_a_fault_while_saving_is_not_taken_for_a_full_disk(vectors, tmp_path, monkeypatch):
    def fault(self):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(EncoderTrainer, "extra_state", fault)
    with pytest.raises(RuntimeError, match="shapes differ"):
        warmstart("encoder", make_pair(), vectors, TEXTS, tmp_path, FitSettings(**ENCODER))


@pytest.mark.slow
def test_a_checkpoint_is_on_the_disk_before_the_one_before_it_is_deleted(vectors, tmp_path, monkeypatch):
    seen = []

    def sync(path):
        seen.append((path.name, sorted(p.name for p in tmp_path.glob("checkpoint-*"))))

    monkeypatch.setattr(checkpoints, "sync", sync)
    warmstart("encoder", make_pair(), vectors, TEXTS, tmp_path, FitSettings(**ENCODER))
    second = seen[len(seen) // 3 : 2 * len(seen) // 3]
    names = {"weights.safetensors", "optimizer.pt", "extra.pt", "rng_state.pth", "manifest.json", ".checkpoint-partial"}
    assert names <= {name for name, found in second if found == ["checkpoint-2"]}
    assert second[-1] == (tmp_path.name, ["checkpoint-2", "checkpoint-4"])


def test_full_disk_under_the_metrics_is_a_storage_error_and_leaves_them_as_they_were(tmp_path):
    log, picture = MetricsLog(tmp_path / "metrics.jsonl"), tmp_path / "metrics.png"
    for step in range(4):
        log.write(step, "train", {"loss": 1.0})
    plot(log.rows(), picture)
    before = [path.read_bytes() for path in (log.path, picture)]
    with largest_file(20):
        for write in (lambda: log.forget_after(2), lambda: plot(log.rows(), picture)):
            with pytest.raises(StorageError):
                write()
    assert [path.read_bytes() for path in (log.path, picture)] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.png"]


@pytest.mark.slow
def test_folder_of_another_run_is_refused(vectors, tmp_path):
    warmstart("encoder", make_pair(), vectors, TEXTS, tmp_path, FitSettings(**ENCODER))
    other_base = make_pair()
    base_parameters(other_base)["base_model.model.lm_head.weight"].data += 1
    others = [
        (make_pair(), vectors, TEXTS, ENCODER | dict(learning_rate=1e-3)),
        (make_pair(), vectors + 1, TEXTS, ENCODER),
        (make_pair(), vectors, TEXTS[::-1], ENCODER),
        (make_pair(seed=1), vectors, TEXTS, ENCODER),
        (make_pair(max_new_tokens=9), vectors, TEXTS, ENCODER),
        (other_base, vectors, TEXTS, ENCODER),
    ]
    for pair, other_vectors, texts, settings in others:
        with pytest.raises(RecipeError):
            warmstart("encoder", pair, other_vectors, texts, tmp_path, FitSettings(**settings))


def test_loss_is_over_the_answer_alone(vectors):
    pair = make_pair()
    batch = EncoderCollator(pair, vectors, TEXTS)([{"row": 0}, {"row": 3}])
    n_prompt = pair.prompt_ids.shape[1]
    assert (batch["input_ids"][:, :n_prompt] == pair.prompt_ids).all()
    assert (batch["labels"][:, :n_prompt] == IGNORED).all()
    for row, text in zip(range(2), (TEXTS[0], TEXTS[3]), strict=True):
        labels = batch["labels"][row, n_prompt:]
        assert pair.tokenizer.decode(labels[labels != IGNORED]) == f"<explanation>{text}</explanation><|end|>"
    assert torch.allclose(batch["vectors"].norm(dim=1), torch.tensor(pair.config.injection.norm))


@each_stage
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (dict(vectors=torch.ones(24, D_MODEL + 1)), ShapeError),
        (dict(vectors=torch.full((24, D_MODEL), torch.nan)), NonFiniteError),
        (dict(texts=TEXTS[:5]), ShapeError),
        (dict(texts=["a zebra sat."] * 24), VocabularyError),
        (dict(held_out=(torch.ones(1, D_MODEL), ["a zebra sat."])), VocabularyError),
        (dict(steps=0), ArgumentError),
        (dict(learning_rate=float("nan")), ArgumentError),
    ],
)
def test_bad_input_is_a_typed_error(stage, change, error, vectors, tmp_path):
    train, settings, _, _ = STAGES[stage]
    given = dict(vectors=vectors, texts=TEXTS, held_out=None) | settings | change
    with pytest.raises(error) as caught:
        vectors, texts, held_out = (given.pop(name) for name in ("vectors", "texts", "held_out"))
        train(make_pair(), vectors, texts, tmp_path / "run", FitSettings(**given), held_out)
    assert isinstance(caught.value, NLAError) and caught.value.fix
    assert not (tmp_path / "run").exists()


def test_answers_are_padded_where_the_tokenizer_names_no_padding(vectors):
    pair = make_pair()
    pair.tokenizer.pad_token = None
    batch = EncoderCollator(pair, vectors, TEXTS)([{"row": 0}, {"row": 3}])
    assert batch["input_ids"][0, -1] == pair.pad_id


def test_answers_end_with_a_token_that_sampling_stops_at_or_are_refused():
    pair = make_pair()
    end = pair.tokenizer.eos_token_id
    assert [ids[-1] for ids in write_ids(pair, TEXTS[:2])] == [end, end]
    pair.tokenizer.eos_token = None
    assert [ids[-1] for ids in write_ids(pair, TEXTS[:2])] == [end, end]  # the pair names it itself
    pair.config = replace(pair.config, end_ids=None)
    base = pair.base_of("encoder")
    base.generation_config.eos_token_id = [end + 1, end + 2]  # the target's own settings name it
    assert [ids[-1] for ids in write_ids(pair, TEXTS[:2])] == [end + 1] * 2
    base.generation_config.eos_token_id = None
    with pytest.raises(ConfigError, match="without an end token"):
        write_ids(pair, TEXTS[:2])


def test_a_base_that_calls_its_blocks_decoder_is_left_alone():
    names = ["decoder.layers.0.fc.weight", "default.fc.weight", "fc.lora_A.decoder.weight", "fc.lora_A.default.weight"]
    weights = {f"model.{name}": torch.nn.Parameter(torch.zeros(1)) for name in names}
    pair = SimpleNamespace(
        model=SimpleNamespace(named_parameters=weights.items), head=SimpleNamespace(named_parameters=dict)
    )
    assert list(decoder_parameters(pair)) == ["model.fc.lora_A.decoder.weight"]
    assert list(encoder_parameters(pair)) == ["model.fc.lora_A.default.weight"]


def test_rows_come_in_whole_passes_and_a_longer_draw_begins_with_a_shorter():
    long = epoch_rows(5, 23, seed=3)
    assert long[:5].sort().values.tolist() == long[5:10].sort().values.tolist() == list(range(5))
    assert torch.equal(long[:7], epoch_rows(5, 7, seed=3))


def test_metrics_survive_a_line_cut_short(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, "train", {"loss": 1.0})
    log.write(2, "train", {"loss": float("nan")})
    with log.path.open("a") as file:
        file.write('{"step": 3, "ki')
    log.forget_after(1)
    assert [json.loads(line) for line in Path(log.path).read_text().splitlines()] == [
        {"step": 1, "kind": "train", "loss": 1.0}
    ]


@pytest.mark.slow
def test_a_prompt_computed_once_gives_the_losses_and_weights_of_whole_rows(vectors, tmp_path, monkeypatch):
    shared, whole = make_pair(scale=0.3), make_pair(scale=0.3)
    read = []
    monkeypatch.setattr(
        "nla.train.fit.warmstart.answer_log_probs", lambda *args: read.append(1) or answer_log_probs(*args)
    )
    settings = FitSettings(**ENCODER | dict(steps=10, eval_every=5, rows_per_backward=4))
    held_out = vectors[:5], TEXTS[:5]
    figures = [warmstart("encoder", shared, vectors, TEXTS, tmp_path / "shared", settings, held_out)]
    assert read
    read.clear()
    monkeypatch.setattr("nla.train.fit.log_probs.attends_plainly", lambda model: False)
    figures.append(warmstart("encoder", whole, vectors, TEXTS, tmp_path / "whole", settings, held_out))
    assert not read
    names = ("loss", "eval_loss", "mean_token_accuracy", "eval_mean_token_accuracy", "entropy", "steps")
    assert [figures[0][name] for name in names] == pytest.approx([figures[1][name] for name in names], rel=1e-4)
    for name, parameter in encoder_parameters(shared).items():
        torch.testing.assert_close(parameter, encoder_parameters(whole)[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@each_stage
def test_less_memory_gives_the_same_weights(stage, vectors, tmp_path):
    train, settings, trained, _ = STAGES[stage]
    plain, frugal = make_pair(), make_pair()
    train(plain, vectors, TEXTS, tmp_path / "plain", FitSettings(**settings))
    train(
        frugal,
        vectors,
        TEXTS,
        tmp_path / "frugal",
        FitSettings(**settings, rows_per_backward=2, gradient_checkpointing=True),
    )
    blocks = [module for module in frugal.model.modules() if hasattr(module, "gradient_checkpointing")]
    assert blocks and not any(module.gradient_checkpointing for module in blocks)
    for name, parameter in trained(frugal).items():
        torch.testing.assert_close(parameter, trained(plain)[name], rtol=1e-3, atol=1e-5)
