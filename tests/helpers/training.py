"""What tests of training compare."""

from __future__ import annotations

import contextlib
import resource

import pytest
import torch

from nla.train.fit import loop
from nla.train.fit.checkpoints import (
    snapshot,
)


@contextlib.contextmanager
def largest_file(n_bytes: int):
    """A disk on which no file grows beyond ``n_bytes``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act) -> None:
    """Call ``act`` at the end of ``step``, before anything is saved."""
    original = loop.StopOnInterrupt.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            act()
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(loop.StopOnInterrupt, "on_step_end", on_step_end)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def base_weights(pair) -> dict[str, torch.Tensor]:
    return snapshot({name: p for name, p in pair.model.named_parameters() if "lora_" not in name})
