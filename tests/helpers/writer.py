"""A pair that has learned to write explanations a little, shared by the tests of joint training."""

from __future__ import annotations

import functools
import tempfile

import torch

from nla.train.fit.checkpoints import encoder_parameters, restore, snapshot
from nla.train.fit.joint import JointSettings
from nla.train.fit.settings import FitSettings
from nla.train.fit.warmstart import warmstart
from tests.helpers.tiny import D_MODEL, make_pair

TEXTS = ["the cat sat.", "a red dog ran.", "it is here.", "so the tree is blue."] * 6
STRATA = ["newline", "line 1", "line 1"] * 8
SETTINGS = JointSettings(
    steps=4, prompts_per_step=4, group_size=4, decoder_mini_batches=2, eval_every=2, save_every=2, beta=0.05
)


@functools.cache
def warm_start() -> dict[str, torch.Tensor]:
    """Weights of an encoder that often, not always, writes a readable explanation."""
    pair = make_pair()
    vectors = torch.randn(24, D_MODEL, generator=torch.Generator().manual_seed(2))
    with tempfile.TemporaryDirectory() as folder:
        warmstart("encoder", pair, vectors, TEXTS, folder, FitSettings(steps=40, batch_size=8, learning_rate=2e-2))
    return snapshot(encoder_parameters(pair))


def make_writer():
    """A pair whose encoder has had a short warm start, and whose strata have baselines."""
    pair = make_pair()
    restore(encoder_parameters(pair), warm_start())
    pair.baselines |= {name: pair.baselines["global"] for name in ("newline", "line 1")}
    return pair
