"""Over a base in bfloat16 everything that is trained, and everything that training is judged by, is float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nla.autoencoder import NLA
from nla.metrics import Baseline
from nla.train.fit import joint, warmstart
from nla.train.fit.checkpoints import decoder_parameters, encoder_parameters
from nla.train.fit.settings import FitSettings
from tests.helpers.tiny import D_MODEL, make_config, make_model, make_tokenizer
from tests.helpers.training import base_weights
from tests.helpers.writer import SETTINGS, STRATA, TEXTS

FLOAT32 = {torch.float32}


@pytest.fixture
def pair() -> NLA:
    tokenizer, model = make_tokenizer(), make_model().bfloat16()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        baselines = {name: Baseline.fit(torch.randn(50, D_MODEL)) for name in ("global", "newline", "line 1")}
        config = make_config(tokenizer, model, dtype="bfloat16")
        return NLA.create(model, tokenizer, config, rank=4, baselines=baselines)


@pytest.fixture
def vectors() -> torch.Tensor:
    return torch.randn(24, D_MODEL, generator=torch.Generator().manual_seed(1))


def dtypes(optimizer: torch.optim.Optimizer) -> set[torch.dtype]:
    """Of an optimizer's parameters, their gradients and their moments."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert parameters and set(optimizer.state) == set(parameters), "no step was made"
    moments = {state[name].dtype for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")}
    return {p.dtype for p in parameters} | moments | {p.grad.dtype for p in parameters if p.grad is not None}


@pytest.mark.parametrize("half", warmstart.HALVES)
def test_a_warm_start_trains_in_float32(
    pair: NLA, vectors: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: warmstart.Half
) -> None:
    trainers, losses = [], []
    kind = {"encoder": warmstart.EncoderTrainer, "decoder": warmstart.DecoderTrainer}[half]
    built, computed = kind.__init__, kind.compute_loss

    def compute_loss(self, *args, **kwargs):
        losses.append(computed(self, *args, **kwargs))
        return losses[-1]

    monkeypatch.setattr(kind, "__init__", lambda self, *a, **k: (trainers.append(self), built(self, *a, **k))[1])
    monkeypatch.setattr(kind, "compute_loss", compute_loss)
    before = base_weights(pair)
    warmstart.warmstart(half, pair, vectors, TEXTS, tmp_path, FitSettings(steps=2, batch_size=4, learning_rate=1e-2))
    assert dtypes(trainers[0].optimizer.optimizer) == FLOAT32
    assert {loss.dtype for loss in losses} == FLOAT32
    check_whole(pair, before)


def test_joint_training_trains_in_float32_and_takes_log_probabilities_in_it(
    pair: NLA, vectors: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers, log_probs, logits = [], [], []
    build, per_token = joint.build_trainer, joint.JointTrainer._get_per_token_logps_and_entropies

    def measured(self, model, ids, mask, kept, *args, **kwargs):
        out = per_token(self, model, ids, mask, kept, *args, **kwargs)
        log_probs.append(out[0])
        if not logits:  # of the policy as it is: its own logits, which are bfloat16
            with torch.no_grad(), self.injecting(self.rows_in_use):
                logits.append(model(input_ids=ids, attention_mask=mask).logits[:, -kept - 1 : -1])
            chosen = ids[:, -kept:, None]
            exact = (logits[0].double() / self.temperature).log_softmax(-1).gather(-1, chosen)[..., 0]
            answered = mask[:, -kept:].bool()
            assert torch.allclose(out[0].double()[answered], exact[answered], atol=1e-5)
        return out

    monkeypatch.setattr(joint, "build_trainer", lambda *a, **k: trainers.append(build(*a, **k)) or trainers[-1])
    monkeypatch.setattr(joint.JointTrainer, "_get_per_token_logps_and_entropies", measured)
    before = base_weights(pair)
    settings = SETTINGS.__class__(**{**vars(SETTINGS), "steps": 2})
    joint.train_joint(pair, vectors, STRATA, TEXTS, tmp_path, settings=settings)
    (trainer,) = trainers
    assert {row.dtype for row in log_probs} == FLOAT32 and {row.dtype for row in logits} == {torch.bfloat16}
    assert dtypes(trainer.optimizer.optimizer) == FLOAT32
    assert dtypes(trainer.reward.optimizer) == FLOAT32
    check_whole(pair, before)


def check_whole(pair: NLA, before: dict[str, torch.Tensor]) -> None:
    """The pair's own parameters are float32, and its base as it was."""
    assert {p.dtype for p in (encoder_parameters(pair) | decoder_parameters(pair)).values()} == FLOAT32
    after = base_weights(pair)
    assert {p.dtype for p in after.values()} == {torch.bfloat16}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_adapters_multiply_in_the_bases_type_when_the_pair_is_used_as_when_it_is_trained(
    pair: NLA, vectors: torch.Tensor
) -> None:
    seen = {}
    for name, module in pair.model.named_modules():
        if ".lora_" in name and isinstance(module, torch.nn.Linear):
            module.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(seen)))
            seen[name] = []
            module.register_forward_hook(lambda _m, _i, out, name=name: seen[name].append(out.dtype))
    pair.encoder.generate(vectors[:2], samples=1, max_new_tokens=3)
    used = pair.decoder.decode(TEXTS[:3])
    assert all(seen.values()) and {dtype for found in seen.values() for dtype in found} == {torch.bfloat16}
    with pair.role("decoder"):
        trained = pair.decode_ids(*pair.encode_explanations(TEXTS[:3]))
    trained = torch.nn.functional.normalize(trained.detach(), dim=1) * pair.config.activation_norm
    assert trained.requires_grad is False and torch.allclose(used, trained, atol=1e-4)
