"""Threads on one pair, or on two, get what they would get alone; after an exception a pair is as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from nla import NLA
from nla.errors import ArgumentError
from tests.helpers.adapters import lora_folder
from tests.helpers.tiny import D_MODEL, TEXTS, make_pair

VECTORS = torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(3))


def jobs(pair: NLA) -> dict[str, Callable[[int], Any]]:
    """What a thread may ask of a pair, each a function of a seed whose result can be compared."""
    return {
        "read": lambda seed: pair.read(TEXTS).vectors.tolist(),
        "explain": lambda seed: pair.explain(VECTORS, samples=2, seed=seed).texts,
        "reconstruct": lambda seed: pair.reconstruct(["the cat sat.", "a red dog."]).tolist(),
    }


def state(pair: NLA) -> tuple[Any, ...]:
    """What a role changes: the adapter that is on, what is trainable, generation settings, hooks, the role in force."""
    model: Any = pair.model
    return (
        model.active_adapter,
        [module.disable_adapters for module in model.modules() if hasattr(module, "disable_adapters")],
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        id(pair.base.generation_config),
        sum(len(module._forward_hooks) for module in model.modules()),
        pair.roles.playing,
    )


def test_threads_on_one_pair_get_what_each_would_get_alone() -> None:
    pair = make_pair()
    asked = [(name, seed) for seed in range(8) for name in jobs(pair)]
    alone = {(name, seed): jobs(pair)[name](seed) for name, seed in asked}
    with ThreadPoolExecutor(4) as pool:
        together = dict(zip(asked, pool.map(lambda job: jobs(pair)[job[0]](job[1]), asked), strict=True))
    assert together == alone


def test_two_pairs_in_two_threads_do_not_share_a_random_source() -> None:
    pairs = [make_pair(seed=seed) for seed in (0, 1)]
    alone = [pair.explain(VECTORS, samples=4, seed=5).texts for pair in pairs]
    start = threading.Barrier(2)

    def explain(pair: NLA) -> list[list[list[str]]]:
        start.wait()
        return [pair.explain(VECTORS, samples=4, seed=5).texts for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(explain, pairs))
    assert together == [[texts] * 5 for texts in alone]


def test_sampling_with_a_seed_leaves_the_global_random_state_alone() -> None:
    pair = make_pair()
    before = torch.get_rng_state()
    pair.explain(VECTORS, samples=2, seed=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_thread_that_reads_the_target_waits_for_another_ones_adapter(tmp_path: Path) -> None:
    pair, folder = make_pair(), lora_folder(tmp_path / "adapter")
    plain = pair.read(TEXTS).vectors
    with ThreadPoolExecutor(1) as pool:
        with pair.planted(folder):
            waiting = pool.submit(lambda: pair.read(TEXTS).vectors)
            assert not torch.allclose(pair.read(TEXTS).vectors, plain)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
        assert torch.equal(waiting.result(timeout=60), plain)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("job", ["read", "explain", "reconstruct"])
def test_after_an_exception_or_ctrl_c_the_pair_is_as_it_was(job: str, error: type[BaseException]) -> None:
    pair = make_pair()
    before, expected = state(pair), jobs(pair)[job](0)
    calls = 0

    def fail(module: Any, args: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 or job != "explain":
            raise error("in the middle")

    handle = pair.base.model.layers[1].register_forward_hook(fail)
    with pytest.raises(error):
        jobs(pair)[job](0)
    handle.remove()
    assert calls and state(pair) == before
    assert jobs(pair)[job](0) == expected


def test_an_adapter_is_planted_before_a_role_begins_not_within_it(tmp_path: Path) -> None:
    pair, folder = make_pair(), lora_folder(tmp_path / "adapter")
    with pair.role("target"), pytest.raises(ArgumentError, match="within the role"), pair.planted(folder):
        pass
    assert pair.roles.playing is None and pair.roles.target_adapter is None


def test_another_threads_role_is_none_of_this_one() -> None:
    pair = make_pair()
    ids, mask = pair.encode_explanations(["the cat sat."])
    with pair.role("decoder"), ThreadPoolExecutor(1) as pool, pytest.raises(ArgumentError, match="decode_ids"):
        pool.submit(lambda: pair.decode_ids(ids, mask)).result(timeout=60)
