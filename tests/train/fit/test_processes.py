"""Several processes of one run, on two gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nla.errors import ArgumentError
from nla.train.fit import processes
from tests.helpers import two_processes, writer
from tests.helpers.shell import in_two_processes
from tests.helpers.two_processes import decoder_update, warm_start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ended(tmp_path_factory, shell) -> Path:
    """The folder in which both processes left what they ended with."""
    out = tmp_path_factory.mktemp("processes")
    save_file(writer.warm_start(), out / two_processes.WRITER)
    done = shell.run(in_two_processes(f"{two_processes.__file__} {out}"), out)
    assert done.code == 0, done.stderr[-3000:]
    return out


def results(out: Path, name: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(out / str(rank) / f"{name}.safetensors") for rank in range(2)]


@pytest.mark.parametrize("name", ["warm", "update", "empty", "whole", "resumed"])
def test_the_processes_end_with_the_same_weights(ended, name):
    first, second = results(ended, name)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_two_processes_warm_start_as_one_does(ended, tmp_path):
    alone = warm_start(tmp_path)
    for key, tensor in results(ended, "warm")[0].items():
        torch.testing.assert_close(tensor, alone[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "rows"), [("update", list(range(8))), ("empty", [0, 1, 2])])
def test_the_decoder_learns_from_the_texts_of_all_processes(ended, name, rows):
    alone = decoder_update(rows)
    for key, tensor in results(ended, name)[0].items():
        torch.testing.assert_close(tensor, alone[key], rtol=1e-3, atol=1e-5)


def test_an_interrupt_of_one_process_stops_both_and_the_resumed_run_equals_an_uninterrupted_one(ended):
    assert all((ended / str(rank) / "stopped").exists() for rank in range(2))
    whole, resumed = results(ended, "whole")[0], results(ended, "resumed")[0]
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_joint_training_moved_the_weights(ended):
    whole, start = results(ended, "whole")[0], two_processes.trained(two_processes.make_writer())
    assert any(not torch.equal(whole[key], start[key]) for key in whole)


def test_a_step_is_shared_evenly_or_refused(monkeypatch):
    assert processes.share(12, "batch_size") == (12, 1)
    monkeypatch.setattr(processes, "count", lambda: 3)
    assert processes.share(12, "batch_size", 2) == (2, 2)
    for rows, per_backward in ((10, None), (12, 3), (12, 0), (12, 8)):
        with pytest.raises(ArgumentError, match="batch_size"):
            processes.share(rows, "batch_size", per_backward)
