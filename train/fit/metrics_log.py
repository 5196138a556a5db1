"""What training measures: one JSON object a line while it runs, and one PNG of it."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from nla.errors import StorageError
from nla.storage.files import parse_json, write_atomic
from nla.train.fit import processes

PANELS = (
    ("FVE", "fve"),
    ("FVE of rollouts", "rollout_fve"),
    ("decoder on warm-start texts, FVE", "honest"),
    ("FVE over the global variance", "fve_global_variance"),
    ("differences of FVE", "difference"),
    ("loss", "loss"),
    ("held-out loss", "eval_loss"),
    ("held-out FVE", "eval_fve"),
    ("reward", "reward"),
    ("KL to the warm start", "kl"),
    ("entropy, nats a token", "entropy"),
    ("length, tokens", "length"),
    ("shares (clipped: 0 by construction)", "share"),
    ("decoder loss", "decoder_loss"),
    ("truth", "truth"),
    ("share of a step's time", "phase"),
    ("rollouts a second", "rollouts_per_s"),
)
"""A panel's title and the first part of the names it shows: ``fve/newline`` belongs to ``fve``."""

# A rollout is trained on once (num_iterations=1), so its probability ratio is 1 and ``share/clipped`` is 0 by
# construction: anything else tells of a fault. ``share/decoder_clipped`` is of the decoder's gradients.
RENAMED = {
    "completions/mean_length": "length",
    "completions/clipped_ratio": "share/truncated",
    "clip_ratio/region_mean": "share/clipped",
    "frac_reward_zero_std": "share/groups_without_spread",
    "step_time": "step_time_s",
}
DROPPED = ("epoch", "num_tokens", "total_flos", "train_", "rewards/", "completions/", "clip_ratio/", "sampling/")


MOST_DRAWN = 10**12
"""Figures above this are left out of the picture, which could not hold them."""


class MetricsLog:
    """An append-only JSON-lines file of ``{"step": …, "kind": "train" | "eval", name: number}``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Append one row, in the main process; what is not a finite number becomes null.

        Raises:
            StorageError: the row could not be written.
        """
        if not processes.is_main():
            return
        finite = {k: (v if v is not None and math.isfinite(v) else None) for k, v in values.items()}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "kind": kind} | finite) + "\n")
        except OSError as error:
            raise StorageError(f"{error} while writing {self.path}", "room for a line", "free some space") from error

    def rows(self) -> list[dict[str, Any]]:
        """Every whole row; a line that is cut short, by a full disk, or damaged is left out."""
        rows = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError):
                if _is_row(row := parse_json(line.decode())):
                    rows.append(row)
        return rows

    def forget_after(self, step: int) -> None:
        """Drop the rows of steps after ``step``, which a resumed run is about to repeat.

        Raises:
            StorageError: the file could not be written; it is as it was.
        """
        if not processes.is_main():
            return
        kept = [row for row in self.rows() if row["step"] <= step]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))


def _is_row(row: object) -> bool:
    """Whether a value of JSON is what :meth:`MetricsLog.write` writes."""
    if not isinstance(row, dict):
        return False
    numbers = [value for name, value in row.items() if name not in ("step", "kind")]
    steps = isinstance(step := row.get("step"), int) and 0 <= step < MOST_DRAWN
    return steps and all(isinstance(number, float | int | None) for number in numbers)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the panels that have something to show, over steps, into one PNG.

    Raises:
        StorageError: it could not be written; an earlier one is intact.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted({name for row in rows for name in row} - {"step", "kind"})
    panels = [(title, [n for n in names if n == stem or n.startswith(stem + "/")]) for title, stem in PANELS]
    panels = [(title, members) for title, members in panels if members]
    if not panels:
        return
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * lines))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.06, right=0.98, top=0.96, bottom=0.05, hspace=0.35)
    for i, (title, members) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, i + 1)
        for name in members:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            points = [point for point in points if abs(point[1]) < MOST_DRAWN]
            axes.plot([p[0] for p in points], [p[1] for p in points], label=name.partition("/")[2] or name, linewidth=1)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
        if len(members) > 1:
            axes.legend(fontsize=6)
    png = io.BytesIO()
    figure.savefig(png, dpi=110, format="png")
    write_atomic(path, png.getvalue())


class Progress(TrainerCallback):
    """Writes a trainer's logs to a MetricsLog and shows a progress bar."""

    def __init__(self, log: MetricsLog, title: str, shown: tuple[str, ...]) -> None:
        self.log, self.title, self.shown = log, title, shown
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log.forget_after(state.global_step or -1)  # a run that begins evaluates step 0 anew
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.title,
            unit="step",
            mininterval=1,
            disable=not processes.is_main(),
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        values = {RENAMED.get(k, k): v for k, v in (logs or {}).items()}
        kind = "eval" if any(k.startswith("eval_") for k in values) else "train"
        values = {k: v for k, v in values.items() if not k.startswith(DROPPED) and isinstance(v, int | float)}
        if kind == "eval":
            timings = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_num_tokens")
            values = {k: v for k, v in values.items() if k not in timings}
        if values:
            self.log.write(state.global_step, kind, values)
            self.show(values)

    def show(self, values: Mapping[str, float]) -> None:
        """Put the chosen ones of ``values`` beside the bar."""
        chosen = {k: f"{values[k]:.3g}" for k in self.shown if values.get(k) is not None}
        if self.bar is not None and chosen:
            self.bar.set_postfix(chosen, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
