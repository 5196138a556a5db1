"""Every architecture in training: log-probabilities are those of sampling, and each stage moves its own weights."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import pytest
import torch

from nla.models import generate as writing
from nla.models.generate import sampled
from nla.pair.encoder import mask_marker
from nla.train.fit import loop
from nla.train.fit.joint import JointSettings, build_trainer, marker_forbidden, train_joint
from nla.train.fit.settings import FitSettings
from nla.train.fit.warmstart import warmstart
from tests.helpers.tiny import D_MODEL, MARKER, MODELS, make_pair

WARM_TEXTS = ["the cat sat.", "a red dog ran."] * 4
STRATA = ["newline", "line 1"] * 4
SETTINGS = JointSettings(
    steps=1, prompts_per_step=2, group_size=2, decoder_mini_batches=1, eval_every=9, save_every=9, beta=0.05
)


def vectors_of(n: int) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def trainer_of(pair, folder: Path):
    pair.baselines |= dict.fromkeys(("newline", "line 1"), pair.baselines["global"])
    with pair.role("encoder"), loop.own_forward(pair):
        trainer = build_trainer(pair, vectors_of(8), STRATA, WARM_TEXTS, folder, SETTINGS)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        yield trainer


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MODELS)
def test_log_probs_of_training_are_those_of_sampling_with_the_marker_forbidden(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the distribution that :func:`nla.encoder.generate` samples from, at every token of the rollouts."""
    pair = make_pair(architecture, scale=0.3)
    marker, scores = pair.config.injection.marker_id, []
    with trainer_of(pair, tmp_path) as trainer:

        def recorded(logits, *args):
            scores.append(logits)
            return sampled(logits, *args)

        monkeypatch.setattr(writing, "sampled", recorded)
        monkeypatch.setattr(writing, "_FEWER", 0)  # ended rows stay, so that rows are those of the batch
        with marker_forbidden(trainer.model, marker):
            rows = [trainer.train_dataset[i] for i in (0, 0, 1, 1)]
            batch = trainer._generate_and_score_completions(rows)
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            with torch.no_grad(), trainer.using(batch["vectors"]):
                width = batch["completion_ids"].shape[1]
                trained = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), width)[0]
        with torch.no_grad(), trainer.injecting(batch["vectors"]):
            logits = trainer.model(ids).logits[:, -width - 1 : -1]
    mask, answers = batch["completion_mask"].bool(), batch["completion_ids"]
    of_sampling = torch.stack(scores, dim=1).log_softmax(-1)
    masked = mask_marker(logits, marker).log_softmax(-1)
    assert logits.softmax(-1)[..., marker].max() > 1e-3, "nothing to forbid: this test is void"
    assert of_sampling[..., marker][mask].exp().max() < 1e-9
    for other in (of_sampling, masked):
        assert (other.gather(-1, answers[..., None])[..., 0] - trained)[mask].abs().max() < 1e-4
    assert (batch["ref_per_token_logps"] - trained)[mask].abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MODELS)
def test_a_step_of_each_training_moves_its_own_weights_alone(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "plot", lambda *_: None)  # this and gc take longer than the training
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    pair = make_pair(architecture)
    pair.baselines |= dict.fromkeys(("newline", "line 1"), pair.baselines["global"])
    vectors, settings = vectors_of(8), FitSettings(steps=1, batch_size=4, learning_rate=1e-2, head_learning_rate=1e-2)

    def moved(train) -> set[str]:
        before = {name: parameter.detach().clone() for name, parameter in pair.model.named_parameters()}
        train()
        changed = [n for n, parameter in pair.model.named_parameters() if not torch.equal(parameter, before[n])]
        return {"encoder" if ".default." in name else "decoder" if ".decoder." in name else name for name in changed}

    assert moved(lambda: warmstart("encoder", pair, vectors, WARM_TEXTS, tmp_path / "e", settings)) == {"encoder"}
    assert moved(lambda: warmstart("decoder", pair, vectors, WARM_TEXTS, tmp_path / "d", settings)) == {"decoder"}
    train = lambda: train_joint(pair, vectors, STRATA, WARM_TEXTS, tmp_path / "j", settings=SETTINGS)  # noqa: E731
    assert moved(train) <= {"encoder", "decoder"}
    assert (pair.encoder.generate(vectors, samples=1).ids != pair.tokenizer.convert_tokens_to_ids(MARKER)).all()
