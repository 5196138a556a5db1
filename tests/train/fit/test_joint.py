"""Joint training: what the engine must hold, on tiny random models."""

from __future__ import annotations

import contextlib
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nla.errors import ArgumentError, InterruptedTraining, RecipeError, ShapeError, StorageError
from nla.models.generate import _Chooser
from nla.pair.encoder import mask_marker
from nla.train.fit import processes
from nla.train.fit.checkpoints import decoder_parameters, encoder_parameters, latest_checkpoint, snapshot
from nla.train.fit.joint import (
    EvalSet,
    JointSettings,
    build_trainer,
    draw_prompts,
    draw_weights,
    marker_forbidden,
    share_step,
    train_joint,
)
from nla.train.fit.loop import own_forward
from nla.train.fit.metrics_log import MetricsLog
from tests.helpers.tiny import D_MODEL, make_pair
from tests.helpers.training import assert_same, base_weights, largest_file
from tests.helpers.writer import SETTINGS, STRATA, TEXTS, make_writer


@pytest.fixture
def vectors() -> torch.Tensor:
    return torch.randn(24, D_MODEL, generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def trainer_of(pair, vectors, tmp_path, settings=SETTINGS):
    with pair.role("encoder"), own_forward(pair):
        trainer = build_trainer(pair, vectors, STRATA, TEXTS, tmp_path, settings)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = settings.rows // (settings.rows_per_backward or settings.rows)
        yield trainer


def rollouts_of(trainer, settings=SETTINGS):
    """One step's prompts through the trainer's own rollouts."""
    rows = [trainer.train_dataset[i] for i in range(settings.prompts_per_step)]
    return trainer._generate_and_score_completions([row for row in rows for _ in range(settings.group_size)])


def log_probs_of(trainer, batch, **kwargs):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad(), trainer.using(batch["vectors"]):
        width = batch["completion_ids"].shape[1]
        return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width, **kwargs)[0]


def likely_marker(pair) -> None:
    """Make the marker by far the likeliest token wherever the encoder writes."""
    states = []
    head = pair.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: states.append(args[0].reshape(-1, D_MODEL)))
    with torch.no_grad():
        pair.model(torch.randint(11, 50, (8, 12), generator=torch.Generator().manual_seed(0)))
    handle.remove()
    mean = torch.cat(states).mean(0)
    head.weight.data[pair.config.injection.marker_id] = 40 * mean / mean.square().sum()


@pytest.mark.slow
def test_rollout_and_training_log_probs_agree_with_the_marker_forbidden(vectors, tmp_path, monkeypatch):
    pair = make_writer()
    likely_marker(pair)
    marker, width = pair.config.injection.marker_id, pair.config.max_new_tokens
    sampled, choose = torch.zeros(SETTINGS.rows, width), _Chooser.__call__

    def recorded(self, logits, rows, step):
        tokens = choose(self, logits, rows, step)
        sampled[rows, step] = mask_marker(logits, marker).log_softmax(-1)[torch.arange(len(rows)), tokens]
        return tokens

    with trainer_of(pair, vectors, tmp_path) as trainer:
        monkeypatch.setattr(_Chooser, "__call__", recorded)
        with marker_forbidden(trainer.model, marker):
            batch = rollouts_of(trainer)
            trained = log_probs_of(trainer, batch)
        with trainer.injecting(batch["vectors"]), torch.no_grad():
            raw = trainer.model(batch["prompt_ids"]).logits[:, -1].softmax(-1)[:, marker]
    assert raw.mean() > 0.5, "the marker should be likely where nothing forbids it"
    mask, ids = batch["completion_mask"].bool(), batch["completion_ids"]
    assert (ids != marker).all()
    assert (sampled[:, : mask.shape[1]] - trained)[mask].abs().max() < 1e-5
    assert torch.equal(batch["ref_per_token_logps"], trained)
    assert pair.model.get_output_embeddings().bias is None


def test_vectors_follow_rows_through_chunks_and_shuffles(vectors, tmp_path):
    settings = JointSettings(**(vars(SETTINGS) | dict(rows_per_backward=4)))
    pair = make_writer()
    with trainer_of(pair, vectors, tmp_path, settings) as trainer:
        rows = [trainer.train_dataset[i] for i in range(4) for _ in range(4)]
        parts = []
        for step in range(4):
            trainer._step = step
            part = trainer._prepare_inputs(rows)
            parts.append(part["vectors"])
            mask = part["completion_mask"].bool()
            whole = log_probs_of(trainer, part)
            assert (whole - part["ref_per_token_logps"])[mask].abs().max() < 1e-4
            assert (log_probs_of(trainer, part, batch_size=3) - whole)[mask].abs().max() < 1e-4
            shifted = part | {"vectors": part["vectors"].roll(1, 0)}
            if len(part["vectors"].unique(dim=0)) > 1:
                assert (log_probs_of(trainer, shifted) - whole)[mask].abs().max() > 1e-3
    given = trainer.injected([row["row"] for row in rows])
    assert torch.equal(torch.cat(parts).sort(dim=0).values, given.sort(dim=0).values)
    assert not torch.equal(torch.cat(parts), given), "TRL shuffles rows; this test is void if it does not"


def test_encoder_gradient_is_that_of_an_isolated_run(vectors, tmp_path):
    pair, alone = make_writer(), make_writer()
    with trainer_of(pair, vectors, tmp_path) as trainer:
        rows = [trainer.train_dataset[i] for i in range(4) for _ in range(4)]
        kept = {}
        original = trainer._compute_loss

        def compute_loss(model, inputs):
            kept.update(inputs)
            return original(model, inputs)

        trainer._compute_loss = compute_loss
        trainer.training_step(trainer.model, rows, None)
        assert all(p.grad is None for p in decoder_parameters(pair).values())
    with alone.role("encoder"):
        ids, mask = torch.cat([kept["prompt_ids"], kept["completion_ids"]], 1), kept["completion_mask"]
        embedded = alone.model.get_input_embeddings()(ids)
        embedded[:, alone.marker_position] = kept["vectors"]
        logits = alone.model(inputs_embeds=embedded).logits[:, kept["prompt_ids"].shape[1] - 1 : -1]
        logits[..., alone.config.injection.marker_id] = -torch.inf
        chosen = logits.log_softmax(-1).gather(-1, kept["completion_ids"][..., None])[..., 0]
        loss = -((chosen * mask).sum(1) / mask.sum(1) * kept["advantages"]).mean()
        loss.backward()
    assert kept["advantages"].abs().max() > 0.1, "without a spread of rewards this test is void"
    for name, parameter in encoder_parameters(pair).items():
        torch.testing.assert_close(parameter.grad, encoder_parameters(alone)[name].grad, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_training_moves_both_halves_and_never_the_base(vectors, tmp_path):
    pair = make_writer()
    base, encoder, decoder = base_weights(pair), snapshot(encoder_parameters(pair)), snapshot(decoder_parameters(pair))
    forward = pair.model.get_base_model().forward
    held_out = EvalSet(vectors, STRATA, TEXTS, TEXTS, lambda texts: {"texts": len(texts)})
    figures = train_joint(pair, vectors, STRATA, TEXTS, tmp_path, settings=SETTINGS, held_out=held_out)
    assert_same(base_weights(pair), base)
    assert any(not torch.equal(p, encoder[name]) for name, p in encoder_parameters(pair).items())
    assert any(not torch.equal(p, decoder[name]) for name, p in decoder_parameters(pair).items())
    assert set(pair.model.peft_config) == {"default", "decoder"}
    assert pair.model.get_base_model().forward == forward
    wanted = {"reward", "kl", "entropy", "length", "share/extracted", "share/truncated", "share/clipped", "fve/newline"}
    wanted |= {"difference/joint_minus_warm/newline", "difference/truthful_minus_encoder/newline", "truth/texts"}
    wanted |= {"honest/newline", "fve_global_variance/newline", "decoder_loss", "share/decoder_clipped"}
    assert wanted <= set(figures)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    phases = {f"phase/{name}" for name in ("sampling", "log_probs", "reference", "backward", "decoder", "optimizer")}
    for row in [row for row in rows if row["kind"] == "train" and "reward" in row]:
        assert {name for name in row if name.startswith("phase/")} == phases
        assert sum(row[name] for name in phases) == pytest.approx(1) and row["rollouts_per_s"] > 0
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 2, 4]
    assert rows[0]["difference/joint_minus_warm/global"] == 0
    assert figures["difference/joint_minus_warm/global"] != 0
    assert (tmp_path / "metrics.png").stat().st_size > 10_000


def untimed(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("step_time_s", "rollouts_per_s", "phase/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def stop_at(step: int, act, settings: JointSettings = SETTINGS):
    """A truth callback that acts in the evaluation after ``step``."""
    calls = []

    def truth(texts):
        calls.append(len(texts))
        if (len(calls) - 1) * settings.eval_every == step:
            act()
        return {}

    return truth


@pytest.mark.slow
def test_ctrl_c_saves_and_a_resumed_run_equals_an_uninterrupted_one(vectors, tmp_path):
    settings = JointSettings(**(vars(SETTINGS) | dict(save_every=100)))
    whole, stopped = make_writer(), make_writer()
    quiet = EvalSet(vectors, STRATA, truth=lambda texts: {})
    train_joint(whole, vectors, STRATA, TEXTS, tmp_path / "whole", settings=settings, held_out=quiet)
    parameters = encoder_parameters(stopped) | decoder_parameters(stopped)
    before = snapshot(parameters)
    loud = EvalSet(vectors, STRATA, truth=stop_at(2, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(InterruptedTraining):
        train_joint(stopped, vectors, STRATA, TEXTS, tmp_path / "stopped", settings=settings, held_out=loud)
    assert latest_checkpoint(tmp_path / "stopped") == tmp_path / "stopped" / "checkpoint-2"
    assert_same(snapshot(parameters), before)
    assert set(stopped.model.peft_config) == {"default", "decoder"}
    train_joint(stopped, vectors, STRATA, TEXTS, tmp_path / "stopped", settings=settings, held_out=quiet)
    assert_same(snapshot(parameters), snapshot(encoder_parameters(whole) | decoder_parameters(whole)))
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "whole")


@pytest.mark.slow
def test_full_disk_keeps_the_checkpoint_before_it(vectors, tmp_path):
    whole, stopped = make_writer(), make_writer()
    quiet = EvalSet(vectors, STRATA, truth=lambda texts: {})
    train_joint(whole, vectors, STRATA, TEXTS, tmp_path / "whole", settings=SETTINGS, held_out=quiet)
    with contextlib.ExitStack() as disk:
        full = EvalSet(vectors, STRATA, truth=stop_at(4, lambda: disk.enter_context(largest_file(20_000))))
        with pytest.raises(StorageError):
            train_joint(stopped, vectors, STRATA, TEXTS, tmp_path / "stopped", settings=SETTINGS, held_out=full)
    assert [p.name for p in (tmp_path / "stopped").glob("*check*")] == ["checkpoint-2"]
    train_joint(stopped, vectors, STRATA, TEXTS, tmp_path / "stopped", settings=SETTINGS, held_out=quiet)
    assert_same(
        snapshot(encoder_parameters(stopped) | decoder_parameters(stopped)),
        snapshot(encoder_parameters(whole) | decoder_parameters(whole)),
    )


@pytest.mark.slow
def test_a_run_stopped_before_its_first_step_leaves_no_second_evaluation_of_step_0(vectors, tmp_path):
    settings, log = JointSettings(**(vars(SETTINGS) | dict(steps=1))), MetricsLog(tmp_path / "metrics.jsonl")
    log.write(0, "eval", {"fve/global": 0.5})
    train_joint(make_writer(), vectors, STRATA, TEXTS, tmp_path, settings=settings, held_out=EvalSet(vectors, STRATA))
    assert [row["step"] for row in log.rows() if row["kind"] == "eval"] == [0, 1]


def test_a_run_that_is_refused_claims_nothing(vectors, tmp_path):
    settings = JointSettings(**(vars(SETTINGS) | dict(stratum_weights={"newlines": 0.5})))
    with pytest.raises(ArgumentError):
        train_joint(make_writer(), vectors, STRATA, TEXTS, tmp_path, settings=settings)
    assert not (tmp_path / "run.json").exists()


@pytest.mark.slow
def test_resuming_from_another_warm_start_is_refused(vectors, tmp_path):
    settings = JointSettings(**(vars(SETTINGS) | dict(steps=1)))
    train_joint(make_writer(), vectors, STRATA, TEXTS, tmp_path, settings=settings)
    other = make_writer()
    other.head.bias.data += 0.01
    with pytest.raises(RecipeError):
        train_joint(other, vectors, STRATA, TEXTS, tmp_path, settings=settings)


def test_shares_of_strata_are_those_drawn():
    weights = draw_weights(STRATA, {"newline": 0.7})
    assert weights.sum() == pytest.approx(1)
    drawn = draw_prompts(weights, 500, 4, seed=0)
    newline = torch.tensor([stratum == "newline" for stratum in STRATA])
    assert newline[drawn].float().mean() == pytest.approx(0.7, abs=0.05)
    assert torch.equal(drawn[:20], draw_prompts(weights, 20, 4, seed=0))
    assert all(len(set(step)) == 4 for step in drawn.tolist())


def test_unknown_stratum_is_refused():
    with pytest.raises(ArgumentError, match="newlines"):
        draw_weights(STRATA, {"newlines": 0.7})


@pytest.mark.parametrize(
    "change",
    [
        dict(steps=0),
        dict(group_size=1),
        dict(temperature=0),
        dict(reward="mse"),
        dict(stratum_weights={"newline": 1.2}),
        dict(decoder_mini_batches=5, prompts_per_step=4),
        dict(rows_per_backward=7),
        dict(rows_per_backward=0),
        dict(seed=-1),
        dict(beta=float("nan")),
    ],
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ArgumentError):
        JointSettings(**change)


@pytest.mark.slow
def test_less_memory_gives_the_same_encoder(vectors, tmp_path):
    pairs = {}
    for name, change in {"plain": {}, "frugal": dict(gradient_checkpointing=True, rows_per_backward=4)}.items():
        settings = JointSettings(**(vars(SETTINGS) | dict(steps=1, encoder_learning_rate=1e-2) | change))
        pairs[name] = make_writer()
        train_joint(pairs[name], vectors, STRATA, TEXTS, tmp_path / name, settings=settings)
    for name, parameter in encoder_parameters(pairs["frugal"]).items():
        torch.testing.assert_close(parameter, encoder_parameters(pairs["plain"])[name], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_activations_without_a_text_are_drawn_and_not_replayed(vectors, tmp_path):
    some = [text if row % 2 else None for row, text in enumerate(TEXTS)]
    settings = JointSettings(**(vars(SETTINGS) | dict(steps=1)))
    figures = train_joint(make_writer(), vectors, STRATA, some, tmp_path / "some", settings=settings)
    assert figures["steps"] == 1
    with pytest.raises(ArgumentError, match="replay"):
        train_joint(make_writer(), vectors, STRATA, [None] * len(TEXTS), tmp_path / "none", settings=settings)


def test_eval_set_of_unequal_lengths_is_refused(vectors):
    with pytest.raises(ShapeError):
        EvalSet(vectors, STRATA[:3])


def test_marker_is_forbidden_where_the_head_has_a_bias_and_the_bias_comes_back():
    head = torch.nn.Linear(4, 6)
    before = head.bias.detach().clone()
    model = type("Model", (), {"get_output_embeddings": lambda self: head})()
    with marker_forbidden(model, 2):
        probabilities = head(torch.randn(3, 4)).softmax(-1)
        assert (probabilities[:, 2] == 0).all()
    assert torch.equal(head.bias, before) and head.bias.requires_grad


def test_activations_that_are_added_after_a_block_are_added_in_rollouts_and_log_probs(vectors, tmp_path):
    plain = make_pair().config.injection
    pair = make_pair(injection=replace(plain, mode="add", layer=1, norm=None))
    with trainer_of(pair, vectors, tmp_path) as trainer:
        batch = rollouts_of(trainer)
        mask = batch["completion_mask"].bool()
        trained = log_probs_of(trainer, batch)
        assert (batch["ref_per_token_logps"] - trained)[mask].abs().max() < 1e-4
        trainer.layer = None
        replaced = log_probs_of(trainer, batch | {"vectors": batch["vectors"] * 4})
        assert (replaced - trained)[mask].abs().max() > 1e-3
    settings = JointSettings(**(vars(SETTINGS) | dict(gradient_checkpointing=True)))
    with pytest.raises(ArgumentError, match="gradient_checkpointing"):
        train_joint(pair, vectors, STRATA, TEXTS, tmp_path / "frugal", settings=settings)


@pytest.mark.parametrize(("n", "says"), [(4, "prompts_per_step"), (3, "decoder_mini_batches")])
def test_groups_stay_whole_in_one_process_or_the_step_is_refused(monkeypatch, n, says):
    settings = JointSettings(prompts_per_step=6, group_size=8, decoder_mini_batches=4)
    monkeypatch.setattr(processes, "count", lambda: n)
    with pytest.raises(ArgumentError, match=says):
        share_step(settings)


@pytest.mark.parametrize("flag", ["is_loaded_in_4bit", "is_loaded_in_8bit"])
def test_adapters_of_quantised_targets_are_trained_in_float32(vectors, tmp_path, flag):
    pair = make_writer()
    setattr(pair.base, flag, True)
    with trainer_of(pair, vectors, tmp_path) as trainer:
        assert {p.dtype for p in trainer.trained.values()} == {torch.float32}
        assert {p.dtype for group in trainer.optimizer.param_groups for p in group["params"]} == {torch.float32}
