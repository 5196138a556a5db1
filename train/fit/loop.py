"""The training loop around any trainer of a pair: interrupts, non-finite steps, progress, metrics, the checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from nla.errors import InterruptedTraining, RecipeError
from nla.train.fit import processes
from nla.train.fit.checkpoints import checkpoint_step, latest_checkpoint, load_weights, restore, snapshot, verify
from nla.train.fit.metrics_log import MetricsLog, Progress, plot

if TYPE_CHECKING:
    from nla.autoencoder import NLA

SKIPPED = "skipped_steps"
PLAIN: dict[str, Any] = dict(
    bf16=False,
    report_to="none",
    disable_tqdm=True,
    remove_unused_columns=False,
    dataloader_pin_memory=False,
    ddp_find_unused_parameters=False,
)
"""Arguments of every trainer here, where transformers' and TRL's own defaults would be wrong."""


def on_cpu(nla: NLA) -> bool:
    """Whether the pair lives on the CPU, where its trainer must then stay."""
    return next(nla.model.parameters()).device.type == "cpu"


class Phases:
    """Where the time of a step goes: seconds by phase since they were last taken."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()

    def now(self) -> float:
        """Seconds of a clock, once all that was asked of a GPU is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the block's time, but for what is counted within it, towards a phase."""
        inner, started = sum(self.seconds.values()), self.now()
        try:
            yield
        finally:
            counted = sum(self.seconds.values()) - inner
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - started - counted

    def take(self) -> dict[str, float]:
        """The seconds, which begin again from zero."""
        seconds, self.seconds = self.seconds, {}
        return seconds


class OptimizerTime(TrainerCallback):
    """Counts what a trainer's optimizer takes, the clipping before it not included."""

    def __init__(self, phases: Phases) -> None:
        self.phases, self.started = phases, 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = self.phases.now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = self.phases.seconds
        seconds["optimizer"] = seconds.get("optimizer", 0.0) + self.phases.now() - self.started


@contextlib.contextmanager
def own_forward(nla: NLA) -> Iterator[None]:
    """Take back, at the end of the block, the fused language-model head that TRL puts in the base's ``forward``."""
    base = nla.base
    before = base.__dict__.get("forward")
    try:
        yield
    finally:
        base.__dict__.pop("forward", None)
        if before is not None:
            base.forward = before


@contextlib.contextmanager
def checkpointed(nla: NLA, on: bool) -> Iterator[None]:
    """In the block, blocks compute their activations again in the backward pass, if ``on``."""
    base: Any = nla.base
    if on:
        base.gradient_checkpointing_enable()
    try:
        yield
    finally:
        if on:
            base.gradient_checkpointing_disable()


class SkipNonFinite(TrainerCallback):
    """Leaves the weights alone in a step whose gradients are not finite, and logs it."""

    def __init__(self, parameters: dict[str, nn.Parameter], log: MetricsLog) -> None:
        self.parameters, self.log = list(parameters.values()), log

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]  # after the reduction: alike everywhere
        if gradients and not torch.isfinite(torch.stack([g.float().norm() for g in gradients])).all():
            self.log.write(state.global_step + 1, "train", {SKIPPED: 1.0})
            for parameter in self.parameters:
                parameter.grad = None


class StopOnInterrupt(TrainerCallback):
    """Turn Ctrl-C into a save at the end of the step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """Catch SIGINT in the block; elsewhere than in the main thread, leave it as it is."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A signal reaches the processes at different moments; they stop after the same step.
        self.asked = not processes.every(not self.asked)
        if self.asked:
            control.should_save = control.should_training_stop = True


def run(trainer: Any, stop: StopOnInterrupt, steps: int) -> None:
    """Train to ``steps``, from the latest checkpoint where there is one; on any error the weights are as before.

    Raises:
        InterruptedTraining: stopped by Ctrl-C, be it in the last step; the checkpoint is written.
        StorageError: a checkpoint could not be written; the one before it is intact.
        WeightsError: the checkpoint is damaged.
        RecipeError: the folder's run is longer than ``steps``.
    """
    out_dir = Path(trainer.args.output_dir)
    before = snapshot(trainer.trained)
    checkpoint = latest_checkpoint(out_dir)
    try:
        if checkpoint is not None:
            verify(checkpoint)
        if checkpoint is not None and checkpoint_step(checkpoint) > steps:
            got = f"{checkpoint}, beyond the {steps} steps asked for"
            raise RecipeError(got, "a run of as many steps or fewer", f"choose another folder, or delete {out_dir}")
        if checkpoint is not None and checkpoint_step(checkpoint) == steps:
            load_weights(checkpoint, trainer.trained)
            return
        with stop.catching():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.asked or trainer.state.global_step < steps:
            raise KeyboardInterrupt
    except KeyboardInterrupt as interrupt:
        restore(trainer.trained, before)
        saved = latest_checkpoint(out_dir)
        raise InterruptedTraining(
            f"an interrupt; {saved or 'no checkpoint yet'} is what is saved", f"{steps} steps", "run the same command"
        ) from interrupt
    except BaseException:
        restore(trainer.trained, before)
        raise


def fit(
    trainer: Any, out_dir: Path, steps: int, title: str, shown: tuple[str, ...], extra: tuple[TrainerCallback, ...] = ()
) -> dict[str, float]:
    """Run ``trainer`` to ``steps``, with progress, metrics and checkpoints in ``out_dir``; its last figures."""
    log, stop = MetricsLog(out_dir / "metrics.jsonl"), StopOnInterrupt()
    # Progress comes first: it drops the rows that a resumed run repeats, before any other callback writes them anew.
    for callback in (Progress(log, title, shown), *extra, SkipNonFinite(trainer.trained, log), stop):
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    run(trainer, stop, steps)
    rows = processes.agreed(log.rows())
    if processes.is_main():
        plot(rows, out_dir / "metrics.png")
    last = {k: v for row in rows for k, v in row.items() if k not in ("step", "kind") and v is not None}
    return last | {"steps": float(steps), SKIPPED: float(sum(SKIPPED in row for row in rows))}
