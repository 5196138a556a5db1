"""The native folder of a trained pair: its file names, and writing and reading that is whole or refused.

A pair is one folder::

    nla_config.json         the contract (``nla.config.NLAConfig``)
    encoder/                PEFT adapter: adapter_model.safetensors, adapter_config.json
    decoder/                PEFT adapter, and head.safetensors
                            (of a pair of separate models the head alone: the config says where their weights lie)
    baselines.safetensors   mean, variance and count of the training activations, global and by stratum
    metrics.json            what was measured, on what data, by which command
    README.md               the model card
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nla.errors import ConfigError, NonFiniteError, StorageError, WeightsError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

CONFIG_FILE = "nla_config.json"
ENCODER_FOLDER = "encoder"
DECODER_FOLDER = "decoder"
HEAD_FILE = "head.safetensors"
BASELINES_FILE = "baselines.safetensors"
METRICS_FILE = "metrics.json"
CARD_FILE = "README.md"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MANIFEST = (
    f"{ENCODER_FOLDER}/{ADAPTER_CONFIG}",
    f"{ENCODER_FOLDER}/{ADAPTER_WEIGHTS}",
    f"{DECODER_FOLDER}/{ADAPTER_CONFIG}",
    f"{DECODER_FOLDER}/{ADAPTER_WEIGHTS}",
    f"{DECODER_FOLDER}/{HEAD_FILE}",
    BASELINES_FILE,
)
"""Files of a pair whose hashes stand in its config; figures and model card may be edited."""

SEPARATE_MANIFEST = (f"{DECODER_FOLDER}/{HEAD_FILE}", BASELINES_FILE)
"""The same of a pair of separate models, which refers to the other weights."""

_ADAPTER_SIZES = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
_ADAPTER_PLACES = {"target_modules", "layers_to_transform", "fan_in_fan_out"}
_ADAPTER_NOTES = {"task_type", "inference_mode", "base_model_name_or_path", "revision", "peft_version", "eva_config"}
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Ways to start an adapter that leave the base weights as they are; PEFT's others move a part of them into it."""

_INDEX_FILE, _SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_REMEMBERED_BYTES = 64 * 2**20
"""Files of so many bytes or more are not hashed again while they stay as they are."""
_REMEMBERED_FILES = 1000

_CHECKSUM = "sha256"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on a clean exit it takes ``path``'s place, otherwise it is removed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            got=f"{type(error).__name__} while writing {path}: {error}",
            expected="room and permission to write the whole file",
            fix="free space or choose another folder and run again; an earlier version of the file is untouched",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename. Text is UTF-8; parents are made.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the old file, if any, is intact.
    """
    with _replacing(Path(path)) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically.

    Raises:
        StorageError: see :func:`write_atomic`.
    """
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: the file is missing, not JSON, or not an object.
    """
    path = Path(path)
    restore = f"restore {path.name} from where the folder came, or make the folder again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(got=f"no readable {path}", expected="a JSON file there", fix=restore) from error
    except ValueError as error:
        raise ConfigError(got=f"{path}, which is not JSON ({error})", expected="a JSON file", fix=restore) from error
    if not isinstance(content, dict):
        raise ConfigError(got=f"{path} holding a {type(content).__name__}", expected="a JSON object", fix=restore)
    return content


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, all of which are read: about a second for each GB.

    Raises:
        WeightsError: the file is missing or cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        fix = f"restore {Path(path).name} from where the folder came, or train the pair again"
        raise WeightsError(f"no readable {path} ({error})", "a file there", fix) from error


def hash_weights(source: str | Path) -> str | None:
    """SHA-256 over config.json and the weights of a model's folder; None for a hub id, whose revision says it.

    The weights are the files that the index names, or model.safetensors, or, with neither, all safetensors; copies of
    them in another layout do not count. Every byte does, since a fine-tuned model may differ anywhere: about a second
    for each GB, once for each large file (see :func:`_remembered_sha256`).

    Raises:
        WeightsError: a file that the index names is missing or cannot be read.
        ConfigError: the index is not JSON.
    """
    folder = Path(source)
    if not folder.is_dir():
        return None
    if (folder / _INDEX_FILE).is_file():
        weights = read_json(folder / _INDEX_FILE).get("weight_map")
        names = {Path(str(name)).name for name in weights.values()} if isinstance(weights, dict) else set()
    else:
        names = {_SINGLE_FILE} if (folder / _SINGLE_FILE).is_file() else {p.name for p in folder.glob("*.safetensors")}
    names |= {"config.json"} if (folder / "config.json").is_file() else set()
    listing = "\n".join(f"{_remembered_sha256(folder / name)} {name}" for name in sorted(names))
    return hashlib.sha256(listing.encode()).hexdigest()


def _remembered_sha256(path: Path) -> str:
    """SHA-256 of a file; of a large one, what it was when a file of this place, size, times and inode was last hashed.

    The notes lie in nla/sha256.json of the user's cache folder; where they cannot be read or written, files are hashed
    each time.

    Raises:
        WeightsError: the file is missing or cannot be read.
    """

    def mark() -> list[int]:
        found = path.stat()
        return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]

    try:
        before = mark()
    except OSError:
        return sha256(path)  # says what is wrong
    if before[0] < _REMEMBERED_BYTES:
        return sha256(path)
    notes = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nla" / "sha256.json"
    key = str(path.resolve())
    known = _notes(notes)
    if known.get(key, [None])[0] == before:
        return str(known[key][1])
    found = sha256(path)
    with contextlib.suppress(OSError):  # StorageError is one
        if mark() == before:
            known = {name: entry for name, entry in _notes(notes).items() if name != key}
            write_json(notes, dict([*known.items(), (key, [before, found])][-_REMEMBERED_FILES:]))
    return found


def _notes(path: Path) -> dict[str, list[Any]]:
    """The notes of :func:`_remembered_sha256` that have their form; none if there are none, or they are damaged."""
    try:
        content = read_json(path)
    except ConfigError:
        return {}
    return {name: entry for name, entry in content.items() if isinstance(entry, list) and len(entry) == 2}


def _bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _check_finite(path: Path, tensors: Mapping[str, Tensor], fix: str) -> None:
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise NonFiniteError(
            got=f"NaN or infinity in {', '.join(bad[:3])} ({len(bad)} of {len(tensors)} tensors) of {path}",
            expected="finite values",
            fix=fix,
        )


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file, atomically, with a checksum that :func:`load_tensors` verifies.

    Tensors are detached and moved to the CPU; views and shared tensors are stored as copies of their own. Equal
    content gives equal bytes.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity (nothing is written).
        StorageError: the file could not be written whole; an earlier one is intact.
    """
    path = Path(path)
    packed: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        packed[name] = tensor
    _check_finite(path, packed, fix="lower the learning rate or resume from the last good checkpoint")
    with _replacing(path) as temporary:
        # One key: safetensors keeps several in a hash map, whose order would make equal content differ in its bytes.
        save_file(packed, temporary, metadata={_CHECKSUM: _checksum(packed)})


def load_tensors(path: str | Path, expected_keys: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU and refuse what is not whole.

    Args:
        expected_keys: the names that the file must hold, no more and no fewer; None accepts any.

    Raises:
        WeightsError: the file is missing, truncated, corrupt, or holds other names.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    path = Path(path)
    restore = f"restore {path.name} from where the folder came, or train the pair again"
    if not path.is_file():
        raise WeightsError(got=f"no file {path}", expected="a safetensors file there", fix=restore)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            checksum = (file.metadata() or {}).get(_CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            got=f"{path}, which is truncated or corrupt ({error})", expected="a whole safetensors file", fix=restore
        ) from error
    if checksum is not None and checksum != _checksum(tensors):
        raise WeightsError(
            got=f"{path}, whose tensors do not match its checksum",
            expected="the tensors as they were saved",
            fix=restore,
        )
    if expected_keys is not None:
        expected = set(expected_keys)
        missing, unknown = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        if missing or unknown:
            raise WeightsError(
                got=f"{path} with {len(missing)} names missing {missing[:3]} and {len(unknown)} unknown {unknown[:3]}",
                expected=f"exactly the {len(expected)} names of this model",
                fix=f"load it with the target it was made for, or {restore}",
            )
    _check_finite(path, tensors, fix=restore)
    return tensors


def save_adapter(folder: str | Path, model: PeftModel, adapter: str) -> None:
    """Write one adapter of ``model`` as a folder that plain PEFT loads; each file atomically, the weights last.

    Raises:
        NonFiniteError, StorageError: see :func:`save_tensors`.
    """
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    content = {**model.peft_config[adapter].to_dict(), "inference_mode": True}
    write_json(
        folder / ADAPTER_CONFIG, {key: sorted(v) if isinstance(v, set) else v for key, v in sorted(content.items())}
    )
    save_tensors(folder / ADAPTER_WEIGHTS, state)


def read_adapter_config(folder: str | Path) -> PeftConfig:
    """The PEFT configuration in an adapter folder: plain LoRA, that leaves the base as it is.

    Some of PEFT's ways to start an adapter (PiSSA, OLoRA, …) change the base weights, which the adapter's values then
    count on: they are refused. Of the others the values come from the file, so the adapter is made with PEFT's default.

    Raises:
        ConfigError: it is missing, malformed, of another kind than LoRA, reaches beyond its own low-rank matrices, or
            was trained on a changed base.
    """
    from peft import LoraConfig, PeftConfig

    path = Path(folder) / ADAPTER_CONFIG
    content = read_json(path)
    start = content.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in _PLAIN_STARTS:
        raise ConfigError(
            got=f"{path} with init_lora_weights={start!r}, whose training began by changing the base weights",
            expected="a plain LoRA adapter, which leaves the base weights as they are",
            fix="convert it first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)",
        )
    content = {**content, "init_lora_weights": True}
    try:
        config = PeftConfig.from_peft_type(**content)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            got=f"{path}, which PEFT refuses ({error})",
            expected="an adapter configuration of the installed PEFT",
            fix="install the PEFT version that pyproject.toml pins, or restore the file from where the pair came",
        ) from error
    found, plain = config.to_dict(), LoraConfig().to_dict()
    free = _ADAPTER_SIZES | _ADAPTER_PLACES | _ADAPTER_NOTES
    # PEFT writes "none of them" as null or as an empty list, by the model's architecture.
    other = sorted(key for key in {*found, *plain} - free if (found.get(key) or None) != (plain.get(key) or None))
    if other:
        raise ConfigError(
            got=f"{path} with {', '.join(f'{key}={found.get(key)!r}' for key in other[:3])}",
            expected="a plain LoRA adapter, which leaves the base weights as they are",
            fix="use plain LoRA adapters, as `nla train` makes them: no DoRA, no biases, no modules_to_save",
        )
    return config


def load_adapter(folder: str | Path, model: PeftModel, adapter: str) -> None:
    """Load an adapter folder's weights into the adapter of that name, which must exist on ``model``.

    Raises:
        WeightsError, NonFiniteError: see :func:`load_tensors`; the names and shapes must be this adapter's exactly.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    path = Path(folder) / ADAPTER_WEIGHTS
    current = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    state = load_tensors(path, expected_keys=current)
    wrong = [name for name, tensor in state.items() if tensor.shape != current[name].shape]
    if wrong:
        raise WeightsError(
            got=f"{path}, where {wrong[0]} is {tuple(state[wrong[0]].shape)}",
            expected=f"{tuple(current[wrong[0]].shape)}, the shape in this model",
            fix="load it with the target and the rank it was made for",
        )
    set_peft_model_state_dict(model, state, adapter_name=adapter)
