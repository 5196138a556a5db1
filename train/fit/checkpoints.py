"""Checkpoints that survive a full disk and a Ctrl-C, for every trainer of a pair."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nla.errors import ConfigError, NonFiniteError, RecipeError, StorageError, WeightsError
from nla.storage.files import read_json, write_json
from nla.storage.hashes import sha256
from nla.train.fit import processes
from nla.train.fit.vectors import Vectors, identity

if TYPE_CHECKING:
    from nla.autoencoder import NLA

WEIGHTS, EXTRA, MANIFEST, RUN = "weights.safetensors", "extra.pt", "manifest.json", "run.json"
TORCH_WRITER = "inline_container"
"""In what ``torch.save`` says of a file that it could not write: its error is a bare RuntimeError."""


def encoder_parameters(nla: NLA) -> dict[str, torch.nn.Parameter]:
    """The encoder's LoRA parameters by name."""
    return adapter_parameters(nla, "default")


def decoder_parameters(nla: NLA) -> dict[str, torch.nn.Parameter]:
    """The decoder's LoRA parameters and its head, by name."""
    return adapter_parameters(nla, "decoder") | head_parameters(nla)


def adapter_parameters(nla: NLA, adapter: str) -> dict[str, torch.nn.Parameter]:
    """The LoRA parameters of one adapter by name; a base may call its own blocks ``decoder``."""
    return {n: p for n, p in nla.model.named_parameters() if "lora_" in n and f".{adapter}." in n}


def base_parameters(nla: NLA) -> dict[str, torch.nn.Parameter]:
    """The target's own parameters by name."""
    return {name: p for name, p in nla.model.named_parameters() if "lora_" not in name}


def head_parameters(nla: NLA) -> dict[str, torch.nn.Parameter]:
    """The decoder's head alone, by name."""
    return {f"head.{name}": p for name, p in nla.head.named_parameters()}


def keep_float32(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Train in float32: TRL casts the adapters of quantised targets to bfloat16, which cannot hold small updates."""
    for parameter in parameters.values():
        parameter.data = parameter.data.float()


def snapshot(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Copies of ``parameters`` on the CPU, where they take no room that training needs."""
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


def restore(parameters: dict[str, torch.nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Copy ``tensors`` into ``parameters`` in place.

    Raises:
        WeightsError: the names or shapes differ.
    """
    if set(parameters) != set(tensors):
        differing = sorted(set(parameters) ^ set(tensors))[:3]
        raise WeightsError(f"tensors that differ at {differing}", "the tensors of this pair", "use another folder")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                got = f"{name} of {tuple(tensors[name].shape)}"
                raise WeightsError(got, str(tuple(parameter.shape)), "use another folder")
            parameter.copy_(tensors[name])


@contextlib.contextmanager
def swapped(parameters: dict[str, torch.nn.Parameter], tensors: dict[str, Tensor]) -> Iterator[None]:
    """Run a block with ``tensors`` in the place of ``parameters``, then put the parameters back, bit for bit."""
    held = {name: p.data for name, p in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = tensors[name].to(parameter.device)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = held[name]


def claim_folder(
    out_dir: Path,
    settings: dict[str, Any],
    tensors: Mapping[str, Tensor],
    texts: Iterable[str],
    vectors: Iterable[Tensor | str] = (),
) -> None:
    """Write down in ``out_dir/run.json`` what this run starts from, or check that a resumed run starts from the same.

    ``settings`` must be JSON-able. The identity covers them, the number of processes, the data (``vectors`` in
    pieces) and the starting weights.

    Raises:
        RecipeError: the folder holds a run that started from something else.
        ConfigError: its ``run.json`` is damaged.
        StorageError: the folder cannot be written.
    """
    settings = settings | {"processes": processes.count()}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    named = ((name, tensors[name]) for name in sorted(tensors))
    for name, part in itertools.chain(named, (("vectors", part) for part in vectors)):
        digest.update(name.encode())
        digest.update(part.encode() if isinstance(part, str) else _bytes(part))
    for text in texts:
        digest.update(text.encode() + b"\0")
    path, identity = out_dir / RUN, digest.hexdigest()
    if processes.is_main() and not path.exists():
        write_json(path, {"identity": identity, "settings": settings})
    processes.wait()
    if read_json(path).get("identity") != identity:
        raise RecipeError(
            f"{out_dir}, which holds a run with other settings, processes, data or starting weights",
            "an empty folder, or the one this very run began in",
            f"choose another folder, or delete {out_dir}",
        )


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().float().contiguous().numpy().data


def claim_run(
    out_dir: Path,
    nla: NLA,
    settings: dict[str, Any],
    vectors: Vectors,
    trained: Mapping[str, Tensor],
    texts: Iterable[str],
) -> None:
    """Claim ``out_dir`` for a training run of a pair; call it once everything else about the run is found valid.

    The identity covers ``settings``, the pair's contract (but for where its target lies), the target's weights (by the
    contract's hash or commit of them, where it has one), the ``vectors`` (n, d) and ``texts`` to train on, and the
    starting weights ``trained``, of which the KL's reference is a copy. It raises what :func:`claim_folder` does.
    """
    contract = {name: value for name, value in dataclasses.asdict(nla.config).items() if name != "target"}
    known = nla.config.target_weights is not None or nla.config.target_revision is not None
    tensors = dict(trained) if known else base_parameters(nla) | dict(trained)
    claim_folder(out_dir, settings | {"pair": contract}, tensors, texts, identity(vectors))


def latest_checkpoint(out_dir: Path) -> Path | None:
    """The checkpoint with the highest step, or None."""
    checkpoints = [p for p in out_dir.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return max(checkpoints, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """The step that ``checkpoint`` was written after."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def verify(checkpoint: Path) -> None:
    """Refuse a checkpoint of which a file is not as it was written.

    Raises:
        WeightsError: a file is missing or damaged.
    """
    try:
        whole = hashes(checkpoint) == read_json(checkpoint / MANIFEST)
    except (ConfigError, WeightsError):
        whole = False
    if not whole:
        raise WeightsError(f"{checkpoint}, which is damaged", "its files as they were written", _anew(checkpoint))


def hashes(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every file in a checkpoint but its manifest, by name."""
    files = sorted(path for path in checkpoint.iterdir() if path.name != MANIFEST)
    return {path.name: sha256(path) for path in files}


def _anew(checkpoint: Path) -> str:
    return f"delete {checkpoint} and run it again: this training then begins anew"


def load_weights(checkpoint: Path, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Copy a verified checkpoint's weights into ``parameters``.

    Raises:
        WeightsError: they are other tensors.
        NonFiniteError: they hold NaN or infinity.
    """
    tensors = load_file(checkpoint / WEIGHTS)
    if not all(torch.isfinite(t).all() for t in tensors.values()):
        raise NonFiniteError(f"NaN or infinity in {checkpoint / WEIGHTS}", "finite weights", _anew(checkpoint))
    restore(parameters, tensors)


def sync(path: Path) -> None:
    """Have a file or a folder really on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _written(write: Callable[[], None]) -> Exception | None:
    """What kept ``write`` from writing; None if it wrote."""
    try:
        write()
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and TORCH_WRITER not in str(error):
            raise
        return error
    return None


class AtomicCheckpoints:
    """Mixin for a transformers Trainer: a checkpoint appears whole or not at all, and holds only what is trained.

    ``trained`` maps names to the parameters to store; ``extra_state``/``load_extra_state`` carry what else the run
    needs, such as a second optimizer.
    """

    trained: dict[str, torch.nn.Parameter]
    args: Any
    state: Any

    def extra_state(self) -> dict[str, Any]:
        """What to store beside the weights, the optimizer, the scheduler and the random state."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what ``extra_state`` returned."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint: the main process all but the random states, of which each process has its own."""
        out_dir = Path(self.args.output_dir)
        staged, final = out_dir / ".checkpoint-partial", out_dir / f"checkpoint-{self.state.global_step}"
        steps = (
            (processes.is_main(), lambda: self._stage(staged)),
            (True, lambda: self._save_rng_state(str(staged))),  # pyright: ignore[reportAttributeAccessIssue]
            (processes.is_main(), lambda: self._put_in_place(staged, final)),
        )
        for mine, write in steps:
            error = _written(write) if mine else None
            if not processes.every(error is None):
                shutil.rmtree(staged, ignore_errors=True)
                raise StorageError(
                    f"{error or 'an error in another process'} while writing {final}",
                    "room for a checkpoint",
                    "free some space; the same command resumes",
                ) from error

    def _stage(self, staged: Path) -> None:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        save_file({name: p.detach().contiguous() for name, p in self.trained.items()}, staged / WEIGHTS)
        torch.save(self.extra_state(), staged / EXTRA)
        self._save_optimizer_and_scheduler(str(staged))  # pyright: ignore[reportAttributeAccessIssue]
        self.state.save_to_json(str(staged / "trainer_state.json"))

    def _put_in_place(self, staged: Path, final: Path) -> None:
        write_json(staged / MANIFEST, hashes(staged))
        for path in (*staged.iterdir(), staged):
            sync(path)
        os.replace(staged, final)
        sync(final.parent)
        for old in final.parent.glob("checkpoint-*"):
            if old != final:
                shutil.rmtree(old, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(Path(resume_from_checkpoint), self.trained)
        self.load_extra_state(torch.load(Path(resume_from_checkpoint) / EXTRA, weights_only=True))

    def _send_telemetry(self) -> None:
        """TRL reports each trainer to a server; this project does not."""
