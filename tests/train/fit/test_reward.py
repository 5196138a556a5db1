"""What the decoder's reward and the monitor of joint training must hold, on tiny random models."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from nla.metrics import Baseline
from nla.train.fit import monitor
from nla.train.fit.checkpoints import decoder_parameters, encoder_parameters, snapshot
from nla.train.fit.joint import EvalSet, JointSettings, draw_weights
from nla.train.fit.reward import DecoderReward, explanations
from tests.helpers.tiny import D_MODEL
from tests.helpers.training import assert_same
from tests.helpers.writer import SETTINGS, STRATA, TEXTS, make_writer


@pytest.fixture
def vectors() -> torch.Tensor:
    return torch.randn(24, D_MODEL, generator=torch.Generator().manual_seed(1))


def test_decoder_update_is_that_of_an_isolated_run_and_leaves_the_encoder_alone(vectors):
    pair, alone = make_writer(), make_writer()
    settings = JointSettings(**(vars(SETTINGS) | dict(replay_fraction=0.0)))
    reward = DecoderReward(pair, vectors, STRATA, TEXTS, draw_weights(STRATA, {}), settings)
    encoder = snapshot(encoder_parameters(pair))
    with pair.role("encoder"):
        with pair.role("decoder"):
            errors, loss, _ = reward.update(torch.tensor([0, 1, 2]), TEXTS[:3], 3)
        assert pair.model.active_adapter == "default"
    assert_same(snapshot(encoder_parameters(pair)), encoder)
    assert all(p.grad is None for p in encoder_parameters(pair).values())
    parameters = list(decoder_parameters(alone).values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.decoder_learning_rate, weight_decay=0.0)
    with alone.role("decoder"):
        cosine = torch.cosine_similarity(vectors[:3], alone.decode_ids(*alone.encode_explanations(TEXTS[:3])))
        expected = (2 - 2 * cosine).log().mean()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert loss == pytest.approx(float(expected.detach()), abs=1e-5)
    assert torch.allclose(errors, (2 - 2 * cosine).detach(), atol=1e-5)
    for name, parameter in decoder_parameters(pair).items():
        torch.testing.assert_close(parameter, decoder_parameters(alone)[name], rtol=1e-3, atol=1e-5)


def test_replay_teaches_the_decoder_warm_start_pairs(vectors):
    losses = {}
    for fraction in (0.0, 2.0):
        pair = make_writer()
        settings = JointSettings(**(vars(SETTINGS) | dict(replay_fraction=fraction, decoder_learning_rate=1e-2)))
        reward = DecoderReward(pair, vectors[:4], STRATA, TEXTS[:4], draw_weights(STRATA[:4], {}), settings)
        with pair.role("decoder"):
            for _ in range(20):
                reward.update(torch.empty(0, dtype=torch.int64), [], 8)
        losses[fraction] = 2 - 2 * torch.cosine_similarity(pair.reconstruct(TEXTS[:4]), vectors[:4]).mean()
    assert losses[2.0] < 0.5 * losses[0.0]


def test_gradients_that_are_not_finite_are_left_out(vectors, monkeypatch):
    pair = make_writer()
    reward = DecoderReward(pair, vectors, STRATA, TEXTS, draw_weights(STRATA, {}), SETTINGS)
    before = snapshot(decoder_parameters(pair))
    decode = pair.decoder.decode_ids
    monkeypatch.setattr(pair.decoder, "decode_ids", lambda ids, mask: decode(ids, mask) * torch.nan)
    with pair.role("decoder"):
        errors, _, norm = reward.update(torch.tensor([0, 1]), TEXTS[:2], 2)
    assert errors.tolist() == [2.0, 2.0] and norm != norm
    assert_same(snapshot(decoder_parameters(pair)), before)


def test_an_update_whose_gradient_is_not_finite_is_left_out_and_counted(vectors):
    pair = make_writer()
    reward = DecoderReward(pair, vectors, STRATA, TEXTS, draw_weights(STRATA, {}), SETTINGS)
    before, figures = snapshot(decoder_parameters(pair)), {}
    pair.head.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pair.role("decoder"):
        errors, loss, norm = reward.update(torch.tensor([0, 1]), TEXTS[:2], 2)
    assert torch.isfinite(errors).all() and math.isfinite(loss) and not math.isfinite(norm)
    reward(completion_ids=[[]] * 16, row=[0] * 16, log_metric=figures.__setitem__)
    assert_same(snapshot(decoder_parameters(pair)), before)
    assert figures["decoder_skipped_updates"] == SETTINGS.decoder_mini_batches


def test_the_share_of_clipped_updates_is_that_of_gradients_above_the_greatest_norm(vectors, monkeypatch):
    reward = DecoderReward(make_writer(), vectors, STRATA, TEXTS, draw_weights(STRATA, {}), SETTINGS)
    norms, figures = iter([0.5, 2.0]), {}
    monkeypatch.setattr(reward, "update", lambda rows, texts, n: (torch.empty(0), 0.0, next(norms)))
    reward(completion_ids=[[]] * 16, row=[0] * 16, log_metric=figures.__setitem__)
    assert figures["share/decoder_clipped"] == 0.5


def test_answers_without_a_readable_explanation_are_worth_an_orthogonal_vector(vectors):
    pair = make_writer()
    settings = JointSettings(**(vars(SETTINGS) | dict(prompts_per_step=2, decoder_mini_batches=1, reward="neg_mse")))
    reward = DecoderReward(pair, vectors, STRATA, TEXTS, draw_weights(STRATA, {}), settings)
    answers = [
        "<explanation>the cat sat.</explanation><|end|>",
        "<explanation>the cat sat.</explanation>",
        "<explanation>the cat sat.<|end|>",
        "<explanation></explanation><|end|>",
        "the cat sat.<|end|>",
        "<explanation>the<|user|> cat</explanation><|end|>",
        "<explanation>the <|unk|></explanation><|end|>",
        "<|end|>",
    ]
    ids = pair.tokenizer(answers, add_special_tokens=False)["input_ids"]
    with pair.role("decoder"):
        live = pair.decode_ids(*pair.encode_explanations(TEXTS[:1]))
        expected = -float(2 - 2 * torch.cosine_similarity(live, vectors[:1]).detach())
    figures = {}
    rewards = reward(completion_ids=ids, row=[0] * 8, log_metric=figures.__setitem__)
    assert rewards[1:] == [-2.0] * 7
    assert figures["share/extracted"] == 1 / 8
    assert rewards[0] == pytest.approx(expected, abs=1e-5)


def test_words_run_together_are_unreadable(pair):
    assert explanations(pair, ["<explanation>the catdog</explanation>", "<explanation> the cat</explanation>"]) == [
        None,
        "the cat",
    ]


def test_a_code_in_the_tags_of_the_decoders_template_is_unreadable(pair):
    inner = ["the cat", "the</text> cat", "the <summary>", "<text>the", "the</text><summary> cat"]
    assert explanations(pair, [f"<explanation>{text}</explanation>" for text in inner]) == ["the cat", *[None] * 4]


def test_rollouts_are_read_as_they_were_written(vectors):
    pair = make_writer()
    reward = DecoderReward(pair, vectors, STRATA, TEXTS, draw_weights(STRATA, {}), SETTINGS)
    pair.tokenizer.clean_up_tokenization_spaces = True
    pair.tokenizer.add_tokens([" ."])
    ids = pair.tokenizer("<explanation>the cat .</explanation><|end|>", add_special_tokens=False)["input_ids"]
    assert reward.read([ids]) == ["the cat ."]


def test_differences_are_of_fve_over_each_stratums_own_variance(vectors, monkeypatch):
    pair, strata = make_writer(), ["newline", "newline", "line 1", "line 1"]
    warm, mean = snapshot(decoder_parameters(pair)), pair.baselines["global"].mean
    pair.baselines = {
        name: Baseline(mean, variance, 9) for name, variance in (("global", 0.5), ("newline", 0.2), ("line 1", 0.8))
    }
    pair.head.bias.data += 1
    errors = {
        ("joint", "said"): [0.1, 0.3, 0.2, 0.6],
        ("warm", "said"): [0.4, 0.8, 0.2, 0.8],
        ("joint", "described"): [0.2, 0.2, 0.4, 0.8],
        ("joint", "truthful"): [0.0, 0.1, 0.5, 0.7],
    }

    def errors_of(nla, _vectors, texts):
        return torch.tensor(errors["warm" if torch.equal(nla.head.bias, warm["head.bias"]) else "joint", texts[0]])

    monkeypatch.setattr(monitor, "errors_of", errors_of)
    monkeypatch.setattr(pair.encoder, "generate", lambda *_args, **_kwargs: SimpleNamespace(texts=["-"] * 4))
    monkeypatch.setattr(monitor, "explanations", lambda _nla, answers: ["said"] * len(answers))
    found = monitor.evaluate(pair, EvalSet(vectors[:4], strata, ["described"] * 4, ["truthful"] * 4), warm, seed=0)
    expected = {
        "fve/global": 1 - 0.3 / 0.5,
        "fve/newline": 1 - 0.2 / 0.2,
        "fve/line 1": 1 - 0.4 / 0.8,
        "fve_global_variance/newline": 1 - 0.2 / 0.5,
        "fve_global_variance/line 1": 1 - 0.4 / 0.5,
        "honest/newline": 1 - 0.2 / 0.2,
        "honest/line 1": 1 - 0.6 / 0.8,
        "difference/joint_minus_warm/global": (0.55 - 0.3) / 0.5,
        "difference/joint_minus_warm/newline": (0.6 - 0.2) / 0.2,
        "difference/joint_minus_warm/line 1": (0.5 - 0.4) / 0.8,
        "difference/truthful_minus_encoder/global": (0.3 - 0.325) / 0.5,
        "difference/truthful_minus_encoder/newline": (0.2 - 0.05) / 0.2,
        "difference/truthful_minus_encoder/line 1": (0.4 - 0.6) / 0.8,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_truth_is_of_what_there_is_of_an_unreadable_answer_too(vectors, monkeypatch):
    answers, heard = ["<explanation>the cat sat.</explanation>", "<explanation>a red dog"], []
    pair = make_writer()
    monkeypatch.setattr(pair.encoder, "generate", lambda *_args, **_kwargs: SimpleNamespace(texts=answers))
    held_out = EvalSet(vectors[:2], STRATA[:2], truth=lambda texts: heard.extend(texts) or {})
    found = monitor.evaluate(pair, held_out, snapshot(decoder_parameters(pair)), seed=0)
    assert found["share/eval_extracted"] == 0.5
    assert heard == ["the cat sat.", "a red dog"]
