"""Tensors in safetensors files: written atomically with a checksum, refused when they are not whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nla.errors import NonFiniteError, WeightsError
from nla.storage.files import replacing

_CHECKSUM = "sha256"


def _bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names; one tensor at a time is on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
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
    with replacing(path) as temporary:
        # One key: safetensors keeps several in a hash map, whose order would make equal content differ in its bytes.
        save_file(packed, temporary, metadata={_CHECKSUM: hash_tensors(packed)})


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
    if checksum is not None and checksum != hash_tensors(tensors):
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
