"""Tensors in safetensors files: written atomically with a checksum, refused when they are not whole."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nla.errors import NonFiniteError, WeightsError
from nla.storage.files import open_regular, parse_json, replacing
from nla.storage.schema import shown

MAX_HEADER_BYTES = 100_000_000
"""Of one safetensors file: the limit of safetensors itself."""
MAX_TENSORS = 95_000
"""Of one file: an adapter on the three matrices of 256 experts in 58 blocks has 89,088. Empty ones take time, too."""
_CHECKSUM, _METADATA = "sha256", "__metadata__"
_BITS = {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64, "U16": 16}
_BITS |= {"U32": 32, "U64": 64, "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8}
_BITS |= {"U8": 8, "BOOL": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
_READ = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}


class Entry(NamedTuple):
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Its first byte, from the beginning of the file."""
    end: int


class Header(NamedTuple):
    """The checked header of a safetensors file."""

    tensors: dict[str, Entry]
    checksum: str | None
    """Ours, over all tensors, if it was saved with one."""


_known_headers: ContextVar[dict[Path, Header] | None] = ContextVar("known_headers", default=None)
"""What :func:`headers_once` keeps."""


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file, whose tensors fill the rest of the file side by side.

    No tensor is read, and nothing is made in the sizes that the header states before they are held against the file's.

    Raises:
        WeightsError: the file is missing, no regular file, truncated, corrupt, or its header contradicts it or itself.
    """
    path, known = Path(path), _known_headers.get()
    if known is not None and path in known:
        return known[path]
    restore = f"restore {path.name} from where the folder came, or train the pair again"
    try:
        with open_regular(path) as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            text = file.read(length).decode()
            if text.count('"data_offsets"') > MAX_TENSORS:
                raise ValueError(f"a header of more than {MAX_TENSORS:,} tensors")
            header = _checked(parse_json(text), 8 + length, size)
    except OSError as error:
        raise WeightsError(f"no readable {path} ({error.strerror})", "a safetensors file there", restore) from error
    except ValueError as error:
        got = f"{path}, which is truncated or corrupt ({error})"
        raise WeightsError(got, "a whole safetensors file", restore) from error
    if known is not None:
        known[path] = header
    return header


@contextlib.contextmanager
def headers_once() -> Iterator[None]:
    """While active, the header of each file is read once: what loads a model hashes, judges and then reads its files.

    No file may be written meanwhile. It nests, and decorates functions.
    """
    if _known_headers.get() is not None:
        yield
        return
    token = _known_headers.set({})
    try:
        yield
    finally:
        _known_headers.reset(token)


def _checked(content: Any, offset: int, size: int) -> Header:
    """A header whose tensors fill the bytes from ``offset`` to ``size``.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(content, dict):
        raise ValueError("a header that is no mapping")
    metadata = content.pop(_METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that is not all texts")
    tensors = {name: _entry(name, stated, offset) for name, stated in content.items()}
    end = offset
    for name, entry in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            raise ValueError(f"{shown(name)}, which does not begin where the tensor before it ends")
        end = entry.end
    if end != size:
        raise ValueError(f"tensors up to byte {end:,} in a file of {size:,}")
    return Header(tensors, metadata.get(_CHECKSUM))


def _entry(name: str, stated: Any, offset: int) -> Entry:
    if not isinstance(stated, dict) or set(stated) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)} without dtype, shape and data_offsets alone")
    dtype, shape, offsets = stated["dtype"], stated["shape"], stated["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{shown(name)} of {shown(shape)} at {shown(offsets)}")
    if not isinstance(dtype, str) or dtype not in _BITS or len(shape) > 16 or len(offsets) != 2:
        raise ValueError(f"{shown(name)} of {shown(dtype)}, {shown(shape)}, at {shown(offsets)}")
    if math.prod(shape) * _BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise ValueError(f"{shown(name)} of {dtype}, {shown(shape)}, in {offsets[1] - offsets[0]} bytes")
    return Entry(dtype, tuple(shape), offset + offsets[0], offset + offsets[1])


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
            got=f"NaN or infinity in {', '.join(map(shown, bad[:3]))} ({len(bad)} of {len(tensors)} tensors) of {path}",
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
    header = read_header(path)
    _check_names(path, header, expected_keys, restore)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in header.tensors}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            got=f"{path}, which is truncated or corrupt ({error})", expected="a whole safetensors file", fix=restore
        ) from error
    if header.checksum is not None and header.checksum != hash_tensors(tensors):
        raise WeightsError(
            got=f"{path}, whose tensors do not match its checksum",
            expected="the tensors as they were saved",
            fix=restore,
        )
    _check_finite(path, tensors, fix=restore)
    return tensors


def _check_names(path: Path, header: Header, expected_keys: Iterable[str] | None, restore: str) -> None:
    """Refuse other names than are expected, and types that nothing here is made of, before a tensor is read."""
    strange = [f"{shown(name)} of {entry.dtype}" for name, entry in header.tensors.items() if entry.dtype not in _READ]
    if strange:
        raise WeightsError(f"{path} with {strange[0]}", f"one of {', '.join(sorted(_READ))}", restore)
    if expected_keys is None:
        return
    expected = set(expected_keys)
    missing, unknown = (sorted(names) for names in (expected - set(header.tensors), set(header.tensors) - expected))
    if missing or unknown:
        counts = f"{len(missing)} names missing {shown(missing)} and {len(unknown)} unknown {shown(unknown)}"
        raise WeightsError(
            got=f"{path} with {counts}",
            expected=f"exactly the {len(expected)} names of this model",
            fix=f"load it with the target it was made for, or {restore}",
        )
