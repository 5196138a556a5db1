"""Targets from disk or hub: whole, or only the blocks up to a point; from safetensors alone, and checked."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from torch import nn

from nla.config import DTYPES, QUANTIZATIONS
from nla.errors import ArchitectureError, ArgumentError, MissingExtraError, NonFiniteError, TargetError, WeightsError
from nla.models.lora import merge_adapter
from nla.models.points import TESTED, Layout, Point, backbone, blocks, cut_config, layout, truncated_view
from nla.models.selfcheck import check_stream
from nla.storage.files import folder_of, read_json, temporary_folder, write_json
from nla.storage.hashes import INDEX_FILE, SINGLE_FILE
from nla.storage.hub import fetch_file
from nla.storage.schema import shown
from nla.storage.tensors import read_header
from nla.text.tokens import load_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_OF_CONFIGS = (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
"""What transformers lets through of values in a configuration that it does not expect."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_OF_SCHEMES = re.compile(r"(scales?|scale_inv|zeros?|zero_point|qweight|weight_packed|absmax|quant_state\S*|g_idx)$")
"""Names of tensors that mean nothing without the scheme that made them."""
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.")
_TEXT_SIDE, _MOST_BLOCKS = "language_model", 256
_RESTORE = "restore the target's folder, or download it again"


class LoadSettings(TypedDict, total=False):
    """How a target is loaded; every function that loads one takes these keywords."""

    revision: str | None
    """Branch, tag or commit on the hub; None: main."""

    dtype: str | None
    """One of :data:`nla.config.DTYPES`, for all weights: "float32" if it is not given; None: the checkpoint's own, or
    float32 if its configuration names none of these."""

    device: str | torch.device | None
    """Where to put it; None: the first GPU if there is one, else the CPU."""

    quantization: str | None
    """By bitsandbytes, "8bit", or "4bit" (NF4, its constants quantised too); None: as stored."""

    adapter: str | Path | None
    """A PEFT folder, or a hub id, with a plain LoRA adapter, which is merged into the weights."""


def load_target(
    source: str | Path, *, trust_remote_code: bool = False, **settings: Unpack[LoadSettings]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in evaluation mode, and its tokenizer. Of a multimodal model, the text side alone.

    Args:
        source: a folder or a hub id.
        trust_remote_code: let a tokenizer bring its own code; a model never does, since only known types are loaded.
        settings: see :class:`LoadSettings`.

    Raises:
        TargetError: there is no such target, it cannot be reached, or it has no safetensors.
        AccessError: it is gated or private, and no token opens it.
        ArchitectureError: no causal LM of transformers, or one whose residual stream is not found between its blocks.
        WeightsError: weights or tokenizer are missing, truncated or corrupt, or do not cover the model.
        NonFiniteError: a weight is NaN or infinite.
        ArgumentError, MissingExtraError: a keyword is of no known value, there is no such device, or bitsandbytes is
            not installed.
        ConfigError: the adapter does not fit.
    """
    on = _checked_device(settings.get("device"))
    _check_keywords(settings)
    checkpoint = _locate(str(source), settings.get("revision"))
    _check_scheme(checkpoint, settings)
    tokenizer = load_tokenizer(checkpoint.source, checkpoint.commit or checkpoint.revision, trust_remote_code)
    return _load(checkpoint, None, settings, on), tokenizer


def load_truncated(source: str | Path, point: str | Point, **settings: Unpack[LoadSettings]) -> PreTrainedModel:
    """The backbone up to a point, without final norm and head: its ``last_hidden_state`` is the activation.

    Blocks above the point and the head are never read; files that hold nothing else, of the final norm at most, are
    neither opened nor, from the hub, downloaded. :func:`nla.models.read.read` takes the view for the whole model.
    Otherwise as :func:`load_target`, whose errors this raises too.

    Raises:
        PointError: the model has no such block.
    """
    on = _checked_device(settings.get("device"))
    _check_keywords(settings)
    checkpoint = _locate(str(source), settings.get("revision"))
    n_blocks = Point.parse(point).within(checkpoint.config.num_hidden_layers).layer + 1
    _check_scheme(checkpoint, settings)
    _check_depth(checkpoint.files, checkpoint.config.num_hidden_layers, checkpoint)
    if not _cuts_cleanly(checkpoint.config, n_blocks):
        return truncated_view(_load(checkpoint, checkpoint.config.num_hidden_layers, settings, on), point)
    return _load(checkpoint, n_blocks, settings, on)


@dataclass(frozen=True)
class _Checkpoint:
    """A target's files, none of which need be here yet but its configuration."""

    source: str
    """Its folder or hub id."""

    revision: str | None
    """What was asked for on the hub."""

    commit: str | None
    """The commit that this is, on the hub."""

    config: PretrainedConfig
    """Of its text side."""

    dtype: str
    """What its configuration says of its weights, one of ``DTYPES``."""

    generation: GenerationConfig
    """How it generates, by its whole configuration; a file of its own comes before this."""

    parts: Layout
    """Where its backbone keeps its parts."""

    text: str
    """What a multimodal model calls its text side; empty where there is nothing else."""

    files: dict[str, str]
    """The file of each tensor of the checkpoint, by name."""

    @property
    def scheme(self) -> str | None:
        """How its weights are stored quantised, by transformers' name of the method; None: they are not."""
        stored = getattr(self.config, "quantization_config", None)
        return None if stored is None else str(dict(stored).get("quant_method", "bitsandbytes"))


def read_config(source: str, revision: str | None) -> PretrainedConfig:
    """The configuration of a target's text side; nothing else of it is read.

    Raises:
        TargetError, AccessError, ArchitectureError, WeightsError: as for :func:`load_target`.
    """
    _, whole = _config(source, revision)
    text = whole.get_text_config()
    text.dtype = whole.dtype if text.dtype is None else text.dtype
    return text


def _config(source: str, revision: str | None) -> tuple[Path, PretrainedConfig]:
    """Where a target's config.json lies, and the configuration, a wrapper's included."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    path = fetch_file(source, revision, "config.json")
    if path is None:
        raise TargetError(f"{source} without config.json", "a model in the form of transformers", _RESTORE)
    kind = read_json(path).get("model_type")
    try:
        whole = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
        text = whole.get_text_config()
    except Exception as error:  # what transformers makes of a value that it does not expect may raise anything
        if isinstance(kind, str) and kind not in CONFIG_MAPPING:
            raise _not_causal(source, kind) from error
        got = f"{source} with a config.json that does not load ({type(error).__name__}: {shown(str(error))})"
        raise WeightsError(got, "one that does", _RESTORE) from error
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _not_causal(source, str(kind))
    return path, whole


def _not_causal(source: str, kind: str) -> ArchitectureError:
    return ArchitectureError(
        f"{source}, a model of type {kind!r}",
        "a causal LM of transformers, or a model with one inside",
        f"use a target of another type, such as {', '.join(sorted(TESTED))}",
    )


def _locate(source: str, revision: str | None) -> _Checkpoint:
    from transformers import GenerationConfig

    folder = folder_of(source)
    source = str(folder or source)
    path, whole = _config(source, revision)
    commit = path.parent.name if folder is None else None
    config = whole.get_text_config()
    if getattr(whole, "quantization_config", None) is not None:
        config.quantization_config = whole.quantization_config
    dtype = str(whole.dtype or config.dtype).removeprefix("torch.")
    files = _weight_files(source, commit or revision)
    return _Checkpoint(
        source=source,
        revision=revision,
        commit=commit,
        config=config,
        dtype=dtype if dtype in DTYPES else "float32",
        generation=GenerationConfig.from_model_config(whole),
        parts=_layout_of(config, source),
        text=_text_side(whole, files, source) if config is not whole else "",
        files=files,
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


def _weight_files(source: str, revision: str | None) -> dict[str, str]:
    """The safetensors file of each tensor."""
    index = fetch_file(source, revision, INDEX_FILE, optional=True)
    if index is not None:
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(
            re.fullmatch(r"[\w.-]+\.safetensors", str(f)) for f in files.values()
        ):
            raise WeightsError(f"{index} that names no safetensors files", "a map of tensors to files", _RESTORE)
        return files
    path = fetch_file(source, revision, SINGLE_FILE)
    if path is None:
        raise TargetError(
            f"{source!r} without safetensors",
            f"{SINGLE_FILE} or {INDEX_FILE}: other formats can run code when they are read",
            "convert it where you trust it: load it with transformers and call save_pretrained",
        )
    return dict.fromkeys(read_header(path).tensors, SINGLE_FILE)


def _load(checkpoint: _Checkpoint, n_blocks: int | None, settings: LoadSettings, on: torch.device) -> PreTrainedModel:
    """The model, or its backbone of ``n_blocks``, on a device, checked.

    transformers sees a folder of nothing but the files that are needed, so it can neither read the others nor follow
    an adapter or code that lies beside them.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoModelForCausalLM

    config = cut_config(checkpoint.config, n_blocks or checkpoint.config.num_hidden_layers)
    for name, value in vars(config).items():
        if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)  # training runs through a target, and never trains it
    needed = {name: file for name, file in checkpoint.files.items() if _needed(name, checkpoint, n_blocks)}
    _check_depth(needed, config.num_hidden_layers, checkpoint)
    renamed = _renamed(checkpoint.text) if checkpoint.text else None
    odd: list[str] = []
    with temporary_folder() as folder:
        for file in sorted(set(needed.values())):
            path = fetch_file(checkpoint.source, checkpoint.commit or checkpoint.revision, file)
            if path is None:
                raise WeightsError(f"{checkpoint.source} without {file}", "every file that its index names", _RESTORE)
            tensors = read_header(path).tensors
            odd += [n for n, e in tensors.items() if n in needed and n.endswith("weight") and e.dtype not in _FLOATS]
            (folder / file).symlink_to(path.resolve())
        write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": needed})
        generation = fetch_file(
            checkpoint.source, checkpoint.commit or checkpoint.revision, "generation_config.json", optional=True
        )
        arguments = _arguments(settings, checkpoint, on)
        arguments["generation_config"] = _generation(generation) if generation else checkpoint.generation
        kind: Any = AutoModelForCausalLM if n_blocks is None else AutoModel
        try:
            with _quiet():
                model, info = kind.from_pretrained(
                    folder,
                    config=config,
                    key_mapping=renamed,
                    use_safetensors=True,
                    output_loading_info=True,
                    **arguments,
                )
        except ImportError as error:
            raise MissingExtraError(
                f"{checkpoint.source}, whose weights are stored quantised ({checkpoint.scheme}), without a package "
                f"({error})",
                "the package that reads them",
                "install it, or use a copy of the target that is not quantised",
            ) from error
        except (OSError, SafetensorError, ValueError, RuntimeError, *_OF_CONFIGS) as error:
            what = f"{type(error).__name__}: {error}"
            raise WeightsError(
                f"a target in {checkpoint.source} that does not load ({what})", "a whole model", _RESTORE
            ) from error
    norms = [] if n_blocks is None else [f"{checkpoint.parts.norm}.{part}" for part in ("weight", "bias")]
    missing = sorted(set(info["missing_keys"]) - set(norms)) + sorted(map(str, info["mismatched_keys"]))
    if missing:
        raise WeightsError(
            f"a target in {checkpoint.source} without {missing[:3]} ({len(missing)} in all)", "all weights", _RESTORE
        )
    unread = sorted(
        name
        for name in info["unexpected_keys"]
        if _OF_SCHEMES.search(name)
        and (n_blocks is None or (_block_of(name, checkpoint) or 0) < n_blocks)  # others of a file are not read
    )
    unread = unread or (odd if checkpoint.scheme is None else [])
    if unread:
        raise WeightsError(
            f"a target in {checkpoint.source} with {unread[0]} and others ({len(unread)} in all) that "
            f"{checkpoint.scheme or 'a config.json without quantization_config'} does not read",
            "weights that are not quantised, or the quantization_config that they were stored with",
            _RESTORE,
        )
    if n_blocks is not None:
        setattr(backbone(model), checkpoint.parts.norm, nn.Identity())
    return _finish(model, checkpoint, settings, on)


def _generation(path: Path) -> GenerationConfig:
    """How a target generates, by the file beside its configuration."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_dict(read_json(path))
    except (ValueError, *_OF_CONFIGS) as error:
        got = f"{path}, which does not load ({type(error).__name__}: {shown(str(error))})"
        raise WeightsError(got, "settings of generation", _RESTORE) from error


def _check_depth(names: Iterable[str], n_blocks: int, checkpoint: _Checkpoint) -> None:
    """Refuse a configuration of more blocks than the files hold, before modules are made for them."""
    names = list(names)
    stored = max((block + 1 for name in names if (block := _block_of(name, checkpoint)) is not None), default=0)
    if not stored:
        where = f"{checkpoint.text or 'the model'}: …{checkpoint.parts.blocks}.0.…"
        raise WeightsError(
            f"{checkpoint.source} without weights of blocks ({len(names)} names, such as {shown(names[:1])})",
            f"those of {n_blocks} blocks of {where}",
            "use a checkpoint that transformers saved, or convert it to its names",
        )
    if n_blocks > stored:
        raise WeightsError(
            f"{checkpoint.source} with a config.json of {n_blocks} blocks", f"{stored}, as its weights have", _RESTORE
        )


def _block_of(name: str, checkpoint: _Checkpoint) -> int | None:
    """The number of the block that a tensor belongs to; None: to none."""
    match = re.search(rf"(?:^|\.){checkpoint.parts.blocks}\.(\d{{1,9}})\.", name)
    return None if match is None else int(match[1])


def _needed(name: str, checkpoint: _Checkpoint, n_blocks: int | None) -> bool:
    """Whether a tensor of the checkpoint belongs to the text side, and to what ``n_blocks`` leave of it."""
    text, parts = checkpoint.text, checkpoint.parts
    if text and re.match(rf"(model\.{text}\.|{text}\.|lm_head\.)", name) is None:
        return False
    if n_blocks is None:
        return True
    block = _block_of(name, checkpoint)
    if block is not None:
        return block < n_blocks
    return _HEAD.search(name) is None and re.search(rf"(^|\.){parts.norm}\.(weight|bias)$", name) is None


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
        except (ValueError, RuntimeError, *_OF_CONFIGS) as error:  # some types need blocks of each kind
            problem = f"{type(error).__name__}: {shown(str(error))}"
    got = f"{source} with a config.json of which no model can be made ({problem})"
    raise WeightsError(got, "one of a whole model", _RESTORE)


def _cuts_cleanly(config: PretrainedConfig, n_blocks: int) -> bool:
    """Whether a model that is made with fewer blocks has the same ones: in some, blocks share keys and values with
    others by how many there are, or parts beside them are as wide as there are blocks."""
    if config.model_type in TESTED or n_blocks == config.num_hidden_layers:
        return True
    try:
        whole, cut = _skeleton(config), _skeleton(cut_config(config, n_blocks))
    except (ValueError, RuntimeError, *_OF_CONFIGS):
        return False
    name = layout(backbone(whole)).blocks
    rest = [{n: p.shape for n, p in m.named_parameters() if f"{name}." not in n} for m in (whole, cut)]
    pairs = zip(list(blocks(whole))[:n_blocks], blocks(cut), strict=True)
    return rest[0] == rest[1] and all(_made_of(one) == _made_of(other) for one, other in pairs)


def _made_of(block: nn.Module) -> list[Any]:
    """What a block was made with: the shapes of its parameters, and the plain values that its parts keep."""
    kept = (bool, int, float, str, tuple, type(None))
    values = [
        {key: value for key, value in vars(module).items() if isinstance(value, kept)} for module in block.modules()
    ]
    return [{name: parameter.shape for name, parameter in block.named_parameters()}, *values]


def _renamed(text: str) -> dict[str, str]:
    """Names in a wrapper's checkpoint, as transformers 5 and 4 write them, to those of the text model alone."""
    return {rf"^model\.{text}\.": "model.", rf"^{text}\.model\.": "model.", rf"^{text}\.lm_head\.": "lm_head."}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports parts that are left out on purpose as if they were lost; what is lost is raised here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _checked_device(device: str | torch.device | None) -> torch.device:
    """Where to put a target.

    Raises:
        ArgumentError: there is no such device here.
    """
    try:
        on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=on)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ArgumentError(
            f"device={str(device)!r}, which is not here ({str(error).splitlines()[0][:120]})",
            "'cpu', or a device that torch reaches: 'cuda', 'cuda:1', 'mps'",
            f"use another; torch sees {torch.cuda.device_count()} GPU(s)",
        ) from error
    if on.type == "meta":
        raise ArgumentError("device='meta', which holds no weights", "'cpu' or 'cuda'", "use one of these")
    return on


def _check_keywords(settings: LoadSettings) -> None:
    """Refuse before anything is downloaded what cannot be loaded."""
    dtype, quantization = settings.get("dtype"), settings.get("quantization")
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"dtype={dtype!r}", f"one of {', '.join(DTYPES)}", "use one of these")
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        raise ArgumentError(f"quantization={quantization!r}", f"one of {', '.join(QUANTIZATIONS)}", "use one of these")
    if settings.get("adapter") is not None:
        raise ArgumentError(
            f"an adapter to merge into {quantization} weights",
            "weights that a merge does not round again",
            "leave quantization out",
        )
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            f"quantization={quantization!r} without bitsandbytes",
            "bitsandbytes, which does the arithmetic",
            "pip install bitsandbytes, or use dtype='bfloat16'",
        )


def _check_scheme(checkpoint: _Checkpoint, settings: LoadSettings) -> None:
    """Refuse before weights are downloaded what is stored quantised in a way that cannot be read, or not as asked."""
    scheme = checkpoint.scheme
    if scheme is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if scheme not in {*AUTO_QUANTIZER_MAPPING, "bitsandbytes"}:
        raise WeightsError(
            f"{checkpoint.source}, whose weights are stored quantised by {scheme!r}",
            f"a scheme of transformers ({', '.join(sorted(AUTO_QUANTIZER_MAPPING))})",
            "use a copy of the target that is not quantised",
        )
    asked = {name: settings.get(name) for name in ("quantization", "adapter") if settings.get(name) is not None}
    if asked:
        raise ArgumentError(
            f"{' and '.join(f'{name}={value}' for name, value in asked.items())} on {checkpoint.source}, whose weights "
            f"are stored quantised ({scheme})",
            "weights that are not quantised yet",
            "leave it out, or use a copy of the target that is not quantised",
        )


def _arguments(settings: LoadSettings, checkpoint: _Checkpoint, on: torch.device) -> dict[str, Any]:
    """What transformers is told of types."""
    kind = getattr(torch, settings.get("dtype", "float32") or checkpoint.dtype)
    if checkpoint.scheme is not None:
        return {"dtype": kind, "device_map": {"": on}}
    quantization = settings.get("quantization")
    if quantization is None:
        return {"dtype": kind}
    from transformers import BitsAndBytesConfig

    bits: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "4bit":  # as QLoRA's authors have it; bitsandbytes' own default, FP4, loses more
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        bits["bnb_4bit_compute_dtype"] = kind
    return {"dtype": kind, "quantization_config": BitsAndBytesConfig(**bits), "device_map": {"": on}}


def _finish(
    model: PreTrainedModel, checkpoint: _Checkpoint, settings: LoadSettings, on: torch.device
) -> PreTrainedModel:
    """The model on a device, checked, with its adapter, and named after where it came from."""
    if settings.get("quantization") is None and checkpoint.scheme is None:  # else it is there
        whole: Any = model  # the class's own method, which refuses what cannot be moved
        whole.to(on)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not _is_finite(parameter.detach()):
            raise NonFiniteError(
                f"NaN or infinity in {name} of the target in {checkpoint.source}", "finite weights", _RESTORE
            )
    check_stream(model)
    model.name_or_path = model.config._name_or_path = checkpoint.source
    model.config._commit_hash = checkpoint.commit
    adapter = settings.get("adapter")
    if adapter is not None:
        merge_adapter(model, adapter)
    return model.eval()


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: a finite sum says so in one pass, and only another needs a second look."""
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # of 8 bits no sum is known
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())
