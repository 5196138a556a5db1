"""GGUF files: from a file of a quantised model to a folder of safetensors, as transformers reads it, made once."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nla.errors import MissingExtraError, NLAError, TargetError, WeightsError, visible
from nla.storage.files import open_regular, replacing_files
from nla.storage.hashes import cache_folder, remembered_sha256
from nla.storage.schema import shown

_log = logging.getLogger(__name__)

_MAGIC = b"GGUF"
_ROPE_TENSORS = re.compile(r"rope_(freqs|factors_\w+)\.weight")
_DOWNLOAD = "download the file again, or give the target's folder of safetensors"


def safetensors_of(path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a GGUF file's weights (no longer quantised), configuration and tokenizer.

    It lies in nla/gguf of the user's cache folder under the hash of the file, and is made at the first call. In float32
    weights have the values that the file's quantisation gives them; in another type, these rounded.

    Raises:
        TargetError: there is no such file.
        MissingExtraError: the package ``gguf`` is not installed.
        WeightsError: the file is damaged, lacks weights, is of a type that transformers does not read from GGUF, or
            scales its positions, which transformers does not read from GGUF either.
        StorageError: there is no room for the folder.
    """
    file = Path(path).expanduser()
    try:
        with open_regular(file) as content:
            magic = content.read(len(_MAGIC))
    except OSError as error:
        raise TargetError(
            f"no readable {visible(str(file))} ({error.strerror})", "a GGUF file", "check the name"
        ) from error
    if magic != _MAGIC:
        raise WeightsError(f"{visible(str(file))}, which is no GGUF file by its first bytes", "GGUF", _DOWNLOAD)
    kind = "" if dtype == torch.float32 else f"-{dtype}".replace("torch.", "")
    folder = cache_folder() / "gguf" / f"{remembered_sha256(file)}{kind}"
    if (folder / "config.json").is_file():  # it comes last
        return folder
    if find_spec("gguf") is None:
        raise MissingExtraError(
            f"{visible(str(file))} without the package gguf", "gguf, which reads it", "pip install 'nla[gguf]'"
        )
    with _typed(file):
        n_stored = _check_tensors(file)
        size = dtype.itemsize * n_stored / 1e9
        _log.warning("%s is converted to safetensors in %s, once (%.1f GB)", file, folder, size)
        model = _model_of(file, n_stored).to(dtype)
        tokenizer = _tokenizer_of(file, model.config.vocab_size)
    with replacing_files(folder, "config.json") as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    return folder


@contextlib.contextmanager
def _typed(file: Path) -> Iterator[None]:
    """Whatever transformers and gguf raise of a file, as a typed error."""
    try:
        yield
    except NLAError:
        raise
    except Exception as error:  # values that they do not expect raise anything
        got = f"{visible(str(file))}, which does not load ({type(error).__name__}: {shown(str(error))})"
        raise WeightsError(got, "a whole GGUF file of a type that transformers reads", _DOWNLOAD) from error


def _model_of(file: Path, n_stored: int) -> Any:
    """The model in a GGUF file, with every weight from the file, in float32 and marked as not quantised."""
    from transformers import AutoConfig, AutoModelForCausalLM

    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**place)
    with torch.device("meta"):
        n_stated = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if n_stated > n_stored:
        got = f"{visible(str(file))}, a model of {n_stated:,} weights by its settings"
        raise WeightsError(got, f"at most {n_stored:,}, as it holds", _DOWNLOAD)
    kind: Any = AutoModelForCausalLM
    model, info = kind.from_pretrained(**place, dtype=torch.float32, output_loading_info=True)
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing:
        got = f"{visible(str(file))} without {', '.join(missing[:3])} ({len(missing)} in all)"
        raise WeightsError(got, "all weights", _DOWNLOAD)
    # What it was read from is no property of what is saved; save_pretrained refuses a quantised GGUF otherwise.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    return model


def _check_tensors(file: Path) -> int:
    """How many numbers a GGUF file holds; what transformers would leave out, or make too much of, is refused."""
    reader = importlib.import_module("gguf").GGUFReader(file)  # an extra, which a type checker need not have
    name = reader.fields["general.architecture"].contents()
    n_blocks = int(reader.fields[f"{name}.block_count"].contents())
    stored = {int(match[1]) for tensor in reader.tensors if (match := re.match(r"blk\.(\d+)\.", tensor.name))}
    if n_blocks != len(stored):
        raise WeightsError(f"{visible(str(file))} of {n_blocks} blocks", f"{len(stored)}, as it holds", _DOWNLOAD)
    scaling = reader.fields.get(f"{name}.rope.scaling.type")
    scaled = [tensor.name for tensor in reader.tensors if _ROPE_TENSORS.fullmatch(tensor.name)]
    if scaling is not None and scaling.contents() != "none":
        scaled.append(scaling.name)
    if scaled and name != "gpt-oss":
        raise WeightsError(
            f"{visible(str(file))}, whose positions are scaled ({scaled[0]})",
            "a model without: transformers does not read this from GGUF",
            "give the target's folder of safetensors, or its hub id",
        )
    return sum(math.prod(map(int, tensor.shape)) for tensor in reader.tensors)


def _tokenizer_of(file: Path, n_tokens: int) -> Any:
    """The tokenizer in a GGUF file, without what transformers adds to it beyond the model's ``n_tokens``."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    beyond = {token["content"] for token in content["added_tokens"] if token["id"] >= n_tokens}
    if not beyond:
        return tokenizer
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in beyond]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        chat_template=tokenizer.chat_template,
        **{name: token for name, token in special.items() if token not in beyond},
    )
