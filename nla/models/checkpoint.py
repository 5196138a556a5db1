"""A target's name in; its configuration, and where its weights lie, out: judged before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nla.config import DTYPES
from nla.errors import ArchitectureError, TargetError, WeightsError
from nla.models.points import TESTED, Layout, backbone, blocks, cut_config, layout
from nla.organisms import target_folder
from nla.storage.files import folder_of, read_json
from nla.storage.hashes import INDEX_FILE, SINGLE_FILE
from nla.storage.hub import fetch_file
from nla.storage.schema import shown
from nla.storage.tensors import read_header

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

CONFIG_ERRORS = (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
"""What transformers lets through of values in a configuration that it does not expect."""
RESTORE = "restore the target's folder, or download it again"
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.")
_TEXT_SIDE, _MOST_BLOCKS = "language_model", 256


@dataclass(frozen=True)
class Checkpoint:
    """A target's files, none of which need be here yet but its configuration."""

    source: str
    """Its folder or hub id."""

    revision: str | None
    """The commit that this is, on the hub; what was asked for where the hub did not say."""

    commit: str | None
    """The commit that this is, on the hub."""

    config: PretrainedConfig
    """Of its text side."""

    dtype: str
    """What its configuration says of its weights, one of ``DTYPES``."""

    scheme: str | None
    """How its weights are stored quantised, by transformers' name of the method; None: they are not."""

    generation: GenerationConfig
    """How it generates, by a file of its own, or else by its whole configuration."""

    parts: Layout
    """Where its backbone keeps its parts."""

    text: str
    """What a multimodal model calls its text side; empty where there is nothing else."""

    files: dict[str, str]
    """The file of each tensor of the checkpoint, by name."""

    def fetch(self, name: str, optional: bool = False) -> Path | None:
        """One of its files, downloaded if need be; see :func:`nla.storage.hub.fetch_file`."""
        return fetch_file(self.source, self.revision, name, optional)

    def block_of(self, name: str) -> int | None:
        """The number of the block that a tensor belongs to; None: to none."""
        match = re.search(rf"(?:^|\.){self.parts.blocks}\.(\d{{1,9}})\.", name)
        return None if match is None else int(match[1])

    def needed(self, n_blocks: int | None) -> dict[str, str]:
        """The file of each tensor of the text side, or of its first ``n_blocks`` without final norm and head.

        Raises:
            WeightsError: the configuration states more blocks than the files hold.
        """
        names = {name: file for name, file in self.files.items() if self._is_needed(name, n_blocks)}
        self.check_depth(n_blocks or self.config.num_hidden_layers, names)
        return names

    def _is_needed(self, name: str, n_blocks: int | None) -> bool:
        if self.text and re.match(rf"(model\.{self.text}\.|{self.text}\.|lm_head\.)", name) is None:
            return False
        if n_blocks is None:
            return True
        block = self.block_of(name)
        if block is not None:
            return block < n_blocks
        return _HEAD.search(name) is None and re.search(rf"(^|\.){self.parts.norm}\.(weight|bias)$", name) is None

    def check_depth(self, n_blocks: int, names: Iterable[str]) -> None:
        """Refuse a configuration of more blocks than the files hold, before modules are made for them.

        Raises:
            WeightsError: it is one.
        """
        names = list(names)
        stored = max((block + 1 for name in names if (block := self.block_of(name)) is not None), default=0)
        if not stored:
            where = f"{self.text or 'the model'}: …{self.parts.blocks}.0.…"
            raise WeightsError(
                f"{self.source} without weights of blocks ({len(names)} names, such as {shown(names[:1])})",
                f"those of {n_blocks} blocks of {where}",
                "use a checkpoint that transformers saved, or convert it to its names",
            )
        if n_blocks > stored:
            raise WeightsError(
                f"{self.source} with a config.json of {n_blocks} blocks", f"{stored}, as its weights have", RESTORE
            )

    def cuts_cleanly(self, n_blocks: int) -> bool:
        """Whether a model that is made with fewer blocks has the same ones: in some, blocks share keys and values with
        others by how many there are, or parts beside them are as wide as there are blocks."""
        config = self.config
        if config.model_type in TESTED or n_blocks == config.num_hidden_layers:
            return True
        try:
            whole, cut = _skeleton(config), _skeleton(cut_config(config, n_blocks))
        except (ValueError, RuntimeError, *CONFIG_ERRORS):
            return False
        name = layout(backbone(whole)).blocks
        rest = [{n: p.shape for n, p in m.named_parameters() if f"{name}." not in n} for m in (whole, cut)]
        pairs = zip(list(blocks(whole))[:n_blocks], blocks(cut), strict=True)
        return rest[0] == rest[1] and all(_made_of(one) == _made_of(other) for one, other in pairs)


def locate(name: str | Path, revision: str | None) -> Checkpoint:
    """The checkpoint of an embedded target, a GGUF file, a folder or a hub id.

    Raises:
        TargetError, AccessError, ArchitectureError, WeightsError: see :func:`nla.models.load.load_target`.
    """
    source = target_folder(name)
    folder = folder_of(source)
    source = str(folder or source)
    path, whole = _config(source, revision)
    commit = path.parent.name if folder is None else None
    config = whole.get_text_config()
    if getattr(whole, "quantization_config", None) is not None:
        config.quantization_config = whole.quantization_config
    dtype = str(whole.dtype or config.dtype).removeprefix("torch.")
    files = _weight_files(source, commit or revision)
    return Checkpoint(
        source=source,
        revision=commit or revision,
        commit=commit,
        config=config,
        dtype=dtype if dtype in DTYPES else "float32",
        scheme=_scheme(config, source),
        generation=_generation(whole, source, commit or revision),
        parts=_layout_of(config, source),
        text=_text_side(whole, files, source) if config is not whole else "",
        files=files,
    )


def read_config(name: str | Path, revision: str | None) -> PretrainedConfig:
    """The configuration of a target's text side; nothing else of it is read.

    Args:
        name: an embedded target, a GGUF file, a folder or a hub id.

    Raises:
        TargetError, AccessError, ArchitectureError, WeightsError: as for :func:`nla.models.load.load_target`.
    """
    _, whole = _config(target_folder(name), revision)
    text = whole.get_text_config()
    text.dtype = whole.dtype if text.dtype is None else text.dtype
    return text


def _config(source: str, revision: str | None) -> tuple[Path, PretrainedConfig]:
    """Where a target's config.json lies, and the configuration, a wrapper's included."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    path = fetch_file(source, revision, "config.json")
    if path is None:
        raise TargetError(f"{source} without config.json", "a model in the form of transformers", RESTORE)
    kind = read_json(path).get("model_type")
    try:
        whole = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
        text = whole.get_text_config()
    except Exception as error:  # what transformers makes of a value that it does not expect may raise anything
        if isinstance(kind, str) and kind not in CONFIG_MAPPING:
            raise _not_causal(source, kind) from error
        got = f"{source} with a config.json that does not load ({type(error).__name__}: {shown(str(error))})"
        raise WeightsError(got, "one that does", RESTORE) from error
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _not_causal(source, str(kind))
    return path, whole


def _not_causal(source: str, kind: str) -> ArchitectureError:
    return ArchitectureError(
        f"{source}, a model of type {kind!r}",
        "a causal LM of transformers, or a model with one inside",
        f"use a target of another type, such as {', '.join(sorted(TESTED))}",
    )


def _text_side(whole: PretrainedConfig, names: Iterable[str], source: str) -> str:
    """What a wrapper calls the part of it that writes: nearly always the same, or as transformers has it (SmolVLM).

    Raises:
        ArchitectureError: no part of it does.
    """
    if any(re.match(rf"(model\.)?{_TEXT_SIDE}\.", name) for name in names):
        return _TEXT_SIDE
    try:
        wrapper: Any = _skeleton(whole)
        return next(name for name, part in wrapper.named_modules() if name and part is wrapper.get_decoder())
    except Exception as error:  # many need packages, or have no such part
        raise ArchitectureError(
            f"{source}, a model of type {whole.model_type!r} whose text side is not found "
            f"({type(error).__name__}: {shown(str(error))})",
            f"weights named {_TEXT_SIDE}.…, or a wrapper of which transformers says what writes",
            "use a target that is a text model alone",
        ) from error


def _generation(whole: PretrainedConfig, source: str, revision: str | None) -> GenerationConfig:
    from transformers import GenerationConfig

    path = fetch_file(source, revision, "generation_config.json", optional=True)
    if path is None:
        return GenerationConfig.from_model_config(whole)
    try:
        return GenerationConfig.from_dict(read_json(path))
    except (ValueError, *CONFIG_ERRORS) as error:
        got = f"{path}, which does not load ({type(error).__name__}: {shown(str(error))})"
        raise WeightsError(got, "settings of generation", RESTORE) from error


def _scheme(config: PretrainedConfig, source: str) -> str | None:
    """transformers' name of the method by which weights are stored quantised; None: they are not.

    Raises:
        WeightsError: transformers knows no such method.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    scheme = str(dict(stored).get("quant_method", "bitsandbytes"))
    if scheme not in {*AUTO_QUANTIZER_MAPPING, "bitsandbytes"}:
        raise WeightsError(
            f"{source}, whose weights are stored quantised by {scheme!r}",
            f"a scheme of transformers ({', '.join(sorted(AUTO_QUANTIZER_MAPPING))})",
            "use a copy of the target that is not quantised",
        )
    return scheme


def _weight_files(source: str, revision: str | None) -> dict[str, str]:
    """The safetensors file of each tensor."""
    index = fetch_file(source, revision, INDEX_FILE, optional=True)
    if index is not None:
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(
            re.fullmatch(r"[\w.-]+\.safetensors", str(f)) for f in files.values()
        ):
            raise WeightsError(f"{index} that names no safetensors files", "a map of tensors to files", RESTORE)
        return files
    path = fetch_file(source, revision, SINGLE_FILE)
    if path is None:
        raise TargetError(
            f"{source!r} without safetensors",
            f"{SINGLE_FILE} or {INDEX_FILE}: other formats can run code when they are read",
            "convert it where you trust it: load it with transformers and call save_pretrained",
        )
    return dict.fromkeys(read_header(path).tensors, SINGLE_FILE)


def _skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """A backbone without weights."""
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config)


def _layout_of(config: PretrainedConfig, source: str) -> Layout:
    """Where a backbone of this configuration keeps its parts.

    Raises:
        ArchitectureError: it is no stack of blocks with a norm after it.
        WeightsError: no model can be made of the configuration.
    """
    for n_blocks in (1, min(config.num_hidden_layers, _MOST_BLOCKS)):
        try:
            return layout(backbone(_skeleton(cut_config(config, n_blocks))))
        except (ValueError, RuntimeError, *CONFIG_ERRORS) as error:  # some types need blocks of each kind
            problem = f"{type(error).__name__}: {shown(str(error))}"
    got = f"{source} with a config.json of which no model can be made ({problem})"
    raise WeightsError(got, "one of a whole model", RESTORE)


def _made_of(block: nn.Module) -> list[Any]:
    """What a block was made with: the shapes of its parameters, and the plain values that its parts keep."""
    kept = (bool, int, float, str, tuple, type(None))
    values = [
        {key: value for key, value in vars(module).items() if isinstance(value, kept)} for module in block.modules()
    ]
    return [{name: parameter.shape for name, parameter in block.named_parameters()}, *values]
