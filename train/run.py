"""Running a recipe: its stages in order, what to skip, what to resume.

``extract → describe → warmstart → joint``; before them ``sample``, where the target writes its corpus itself, and after
them ``control``, where it is asked for: the warm start simply continued for joint training's wall-clock. Each stage has
a folder; one whose inputs have not changed is skipped, one that was interrupted resumes, and what an older version of
the recipe made is moved aside, never deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nla import config
from nla.errors import ConfigError, OutOfMemoryError, RecipeError
from nla.models.load import AUTO, fastest_dtype
from nla.models.read import ACTIVATIONS_FILE
from nla.organisms import noted_target
from nla.pair import folder as pair_folder
from nla.storage.files import read_json, try_folder, write_json
from nla.train.data.sample import chunk_file
from nla.train.data.world import BASELINES, MANIFEST, SPLITS
from nla.train.estimate import estimate, find_shape
from nla.train.fingerprints import fingerprints, former_fingerprints, target_print
from nla.train.fit import processes
from nla.train.recipe import Recipe, load_recipe
from nla.train.stages import preflight, run_stage
from nla.train.training_data import DONE, PAIR

log = logging.getLogger(__name__)

STARTED, LOCK = "started.json", ".lock"
PAIR_FILES = tuple(f"{PAIR}/{name}" for name in (config.CONFIG_FILE, *pair_folder.MANIFEST))
PAIRS = {"warmstart": PAIR_FILES, "joint": PAIR_FILES, "control": PAIR_FILES}
OF_WORLD = PAIRS | {
    "extract": (MANIFEST, BASELINES, *(f"{split}/{ACTIVATIONS_FILE}" for split in SPLITS)),
    "describe": tuple(f"{split}.jsonl" for split in SPLITS),
}
OF_CORPUS = PAIRS | {
    "sample": (chunk_file(Path(), 0).name,),
    "extract": (MANIFEST, BASELINES),
    "describe": ("train.jsonl", "eval.jsonl"),
}
"""What each finished stage holds, relative to its folder; "sample" besides as many chunks as its mark says."""


def run_recipe(
    path: str | Path, *, overrides: str | Sequence[str] = (), until: str | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Run a recipe's stages in order and return a summary of each.

    Args:
        until: the last stage to run; None runs all that the recipe asks for.
        dry_run: only say which stages would run; for a corpus, with what each will take (see train/estimate.py).

    Raises:
        RecipeError: see :func:`load_recipe`; also an unknown ``until``, or another process is at work in ``out``.
        InterruptedTraining: stopped; the same command resumes.
    """
    processes.join(on_cpu=not torch.cuda.is_available())
    recipe = load_recipe(path, overrides)
    target = target_print(noted_target(recipe.target), recipe.revision)
    recipe = with_dtype(recipe, target)
    stages = recipe.stages
    if until is not None and until not in stages:
        raise RecipeError(f"until={until!r}", f"one of {', '.join(stages)}", "name a stage of this recipe")
    stages = stages[: stages.index(until) + 1] if until else stages
    prints = fingerprints(recipe, target)
    former = prints | former_fingerprints(recipe, target)
    whole = OF_WORLD if recipe.corpus is None else OF_CORPUS
    summary: dict[str, Any] = {}
    done = [is_done(Path(recipe.out) / stage, (prints[stage], former[stage]), whole[stage]) for stage in stages]
    done = processes.agreed(done)
    shape = find_shape(recipe) if dry_run and recipe.corpus is not None else None
    expected = {} if shape is None else estimate(recipe, shape)
    if recipe.corpus is not None and not all(done):
        describing = "describe" in stages and not done[stages.index("describe")]
        preflight(recipe, describing, reachable=shape is None or shape.source == "counted")
    with contextlib.nullcontext() if dry_run or not processes.is_main() else locked(Path(recipe.out)):
        for stage, finished in zip(stages, done, strict=True):
            folder = Path(recipe.out) / stage
            if not dry_run and processes.is_main():
                renew_marks(folder, former[stage], prints[stage])
            if finished:
                summary[stage] = {"skipped": True, **read_mark(folder / DONE).get("summary", {})}
                log.info("%s: inputs unchanged, skipped", stage)
            elif dry_run:
                summary[stage] = {"would_run": True, **expected.get(stage, {})}
            else:
                summary[stage] = perform(stage, folder, prints[stage], lambda stage=stage: run_stage(stage, recipe))
    return summary


def with_dtype(recipe: Recipe, target: str) -> Recipe:
    """A recipe with a type in the place of "auto": the one that its run began with, or else the fastest here."""
    if recipe.dtype != AUTO:
        return recipe
    first = recipe.stages[0]
    marks = [mark(Path(recipe.out) / first / name) for name in (STARTED, DONE)]
    of_types = {dtype: fingerprints(dataclasses.replace(recipe, dtype=dtype), target)[first] for dtype in config.DTYPES}
    began = processes.agreed(next((dtype for dtype, print_ in of_types.items() if print_ in marks), None))
    if began is not None and processes.is_main():
        log.warning("The run in %s began in %s, and goes on in it.", recipe.out, began)
    return dataclasses.replace(recipe, dtype=began or fastest_dtype(recipe.target, processes.own_device()))


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep every other process out of a run's folder, until the block or this process ends.

    Raises:
        RecipeError: another process is at work there.
        StorageError: the folder cannot be written.
    """
    try_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    file = (out / LOCK).open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            got = f"{out}, where another `nla train` is at work"
            raise RecipeError(got, "one process a folder", "wait for it to end, or set another `out`") from error
        yield


def perform(stage: str, folder: Path, fingerprint: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run one stage's work between its start mark and its done mark.

    The start mark carries the seconds that earlier, interrupted runs of the stage took; the summary has them all, but
    for those that a SIGKILL cut off.

    Raises:
        OutOfMemoryError: the device is too small for the stage's settings.
    """
    spent = processes.agreed(begin(folder, fingerprint) if processes.is_main() else None)
    started = time.monotonic()
    try:
        summary = work()
        processes.wait()
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"a device that is full in the stage {stage} ({str(error).splitlines()[0]})",
            "room for its weights and rows: `--dry-run` says how much",
            "lower rows_per_backward, describer.concurrency or prompts_per_step, or set gradient_checkpointing",
        ) from error
    finally:
        release()
        spent = round(spent + time.monotonic() - started, 1)
        if processes.is_main():
            write_json(folder / STARTED, {"fingerprint": fingerprint, "seconds": spent})
    summary["seconds"] = spent
    if processes.is_main():
        write_json(folder / DONE, {"fingerprint": fingerprint, "summary": summary})
    processes.wait()
    log.info("%s: done in %.0f s", stage, summary["seconds"])
    return summary


def release() -> None:
    """Give back the memory of a stage's models: trainers hold them in cycles, which would outlive the stage."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def begin(folder: Path, fingerprint: str) -> float:
    """Set the start mark of a stage, and return the seconds that it has taken so far."""
    if folder.exists() and mark(folder / STARTED) != fingerprint:
        set_aside(folder)
    spent = read_mark(folder / STARTED).get("seconds", 0.0)
    write_json(folder / STARTED, {"fingerprint": fingerprint, "seconds": spent})
    return spent


def read_mark(path: Path) -> dict[str, Any]:
    """What a mark file holds; empty if it is missing or damaged, so that its stage is done again."""
    try:
        content = read_json(path)
    except ConfigError:
        return {}
    seconds, summary = content.get("seconds", 0.0), content.get("summary", {})
    whole = isinstance(content.get("fingerprint"), str) and isinstance(summary, dict)
    return content if whole and isinstance(seconds, float | int) and 0 <= seconds < 1e12 else {}


def mark(path: Path) -> str | None:
    """The fingerprint in a mark file; None if it is not one."""
    return read_mark(path).get("fingerprint")


def renew_marks(folder: Path, former: str, fingerprint: str) -> None:
    """Write a stage's fingerprint in the place of the one that an earlier version of nla gave to the same inputs."""
    for path in (folder / STARTED, folder / DONE):
        if mark(path) == former:
            write_json(path, read_mark(path) | {"fingerprint": fingerprint})


def is_done(folder: Path, fingerprints: Sequence[str], made: Sequence[str]) -> bool:
    """Whether a stage was finished on these very inputs, and what it ``made`` is still there."""
    if mark(folder / DONE) not in fingerprints or not all((folder / name).is_file() for name in made):
        return False
    n_chunks = read_mark(folder / DONE).get("summary", {}).get("chunks", 0)
    return isinstance(n_chunks, int) and all(chunk_file(folder, number).is_file() for number in range(n_chunks))


def set_aside(folder: Path) -> None:
    """Move a folder made from other inputs out of the way, as ``<name>.old-1``, ``.old-2``, …"""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    log.warning("%s was made from other inputs: moved to %s", folder, aside.name)
    folder.rename(aside)
