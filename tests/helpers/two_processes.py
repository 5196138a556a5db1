"""What each of two gloo processes does for test_processes.py, which launches this file."""

from __future__ import annotations

import dataclasses
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nla.errors import InterruptedTraining
from nla.train.fit import processes
from nla.train.fit.checkpoints import decoder_parameters, encoder_parameters, snapshot
from nla.train.fit.joint import EvalSet, draw_weights, train_joint
from nla.train.fit.reward import DecoderReward
from nla.train.fit.settings import FitSettings, JointSettings
from nla.train.fit.warmstart import warmstart
from tests.helpers import writer
from tests.helpers.tiny import D_MODEL, make_pair
from tests.helpers.writer import SETTINGS, STRATA, TEXTS, make_writer

WRITER = "writer.safetensors"
"""Weights of the writing encoder, made before the processes begin."""
VECTORS = torch.randn(24, D_MODEL, generator=torch.Generator().manual_seed(1))
WARM = FitSettings(steps=6, batch_size=8, learning_rate=1e-2, save_every=2)
HELD_OUT = VECTORS[:4], TEXTS[:4]


def trained(pair) -> dict[str, torch.Tensor]:
    """What training may change."""
    return snapshot(encoder_parameters(pair) | decoder_parameters(pair))


def warm_start(out: Path) -> dict[str, torch.Tensor]:
    """A pair after both warm starts."""
    pair = make_pair()
    warmstart("encoder", pair, VECTORS, TEXTS, out / "encoder", WARM, HELD_OUT)
    settings = dataclasses.replace(WARM, head_learning_rate=1e-2, rows_per_backward=4)
    warmstart("decoder", pair, VECTORS, TEXTS, out / "decoder", settings, HELD_OUT)
    return trained(pair)


def decoder_update(rows: list[int]) -> dict[str, torch.Tensor]:
    """A pair after one update of its decoder on texts of ``rows``; the processes may have different numbers of them."""
    pair = make_writer()
    settings = JointSettings(**(vars(SETTINGS) | dict(replay_fraction=0.0)))
    reward = DecoderReward(pair, VECTORS, STRATA, TEXTS, draw_weights(STRATA, {}), settings)
    with pair.role("decoder"):
        reward.update(torch.tensor(rows), [TEXTS[row] for row in rows], len(rows))
    return trained(pair)


def joint(out: Path, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    """A pair after joint training; the second process alone is interrupted in the evaluation after ``stop_at``."""
    pair, calls = make_writer(), []

    def truth(texts: list[str]) -> dict[str, float]:
        calls.append(len(texts))
        if processes.rank() == 1 and stop_at is not None and (len(calls) - 1) * SETTINGS.eval_every == stop_at:
            signal.raise_signal(signal.SIGINT)
        return {}

    train_joint(pair, VECTORS, STRATA, TEXTS, out, settings=SETTINGS, held_out=EvalSet(VECTORS, STRATA, truth=truth))
    return trained(pair)


def main(out: Path) -> None:
    """Write what this process ended with, under its number."""
    torch.set_num_threads(1)
    writer.warm_start = lambda: load_file(out / WRITER)
    processes.join(on_cpu=True)
    mine = out / str(processes.rank())
    mine.mkdir(parents=True)
    save_file(warm_start(out / "warm"), mine / "warm.safetensors")
    save_file(decoder_update([0, 1, 2] if processes.is_main() else [3, 4, 5, 6, 7]), mine / "update.safetensors")
    save_file(decoder_update([0, 1, 2] if processes.is_main() else []), mine / "empty.safetensors")
    save_file(joint(out / "whole"), mine / "whole.safetensors")
    try:
        joint(out / "stopped", stop_at=2)
    except InterruptedTraining:
        (mine / "stopped").touch()
    save_file(joint(out / "stopped"), mine / "resumed.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
