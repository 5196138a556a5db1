"""A checkpoint in; its model out, whole or only the blocks up to a point: from safetensors alone, and checked."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from torch import nn

from nla.config import DTYPES, QUANTIZATIONS
from nla.errors import ArgumentError, MissingExtraError, NonFiniteError, WeightsError, visible
from nla.models.checkpoint import CONFIG_ERRORS, RESTORE, Checkpoint, locate
from nla.models.lora import merge_adapter
from nla.models.points import Point, backbone, cut_config, truncated_view
from nla.models.selfcheck import check_stream
from nla.organisms import PACKAGED
from nla.storage.files import temporary_folder, write_json
from nla.storage.hashes import INDEX_FILE
from nla.storage.tensors import headers_once, read_header
from nla.text.tokens import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

AUTO = "auto"
"""In the place of a type: the fastest one here."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_OF_SCHEMES = re.compile(r"(scales?|scale_inv|zeros?|zero_point|qweight|weight_packed|absmax|quant_state\S*|g_idx)$")
"""Names of tensors that mean nothing without the scheme that made them."""


class LoadSettings(TypedDict, total=False):
    """How a target is loaded; every function that loads one takes these keywords."""

    revision: str | None
    """Branch, tag or commit on the hub; None: main."""

    dtype: str | None
    """One of :data:`nla.config.DTYPES`, for all weights: "float32" if it is not given; None: the checkpoint's own, or
    float32 if its configuration names none of these. "auto", which a real model with a name, such as "smollm2", takes
    for both of these: :func:`fastest_dtype`."""

    device: str | torch.device | None
    """Where to put it; None: the first GPU if there is one, else the CPU."""

    quantization: str | None
    """By bitsandbytes, "8bit", or "4bit" (NF4, its constants quantised too); None: as stored."""

    adapter: str | Path | None
    """A plain LoRA adapter, which is merged into the weights: an embedded one, a PEFT folder or a hub id."""


@headers_once()
def load_target(
    source: str | Path, *, trust_remote_code: bool = False, **settings: Unpack[LoadSettings]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in evaluation mode, and its tokenizer. Of a multimodal model, the text side alone.

    Args:
        source: an embedded target, such as "couplets", a GGUF file, a folder or a hub id.
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
        ConfigError: the adapter does not fit, or there is no such embedded target.
    """
    on = _checked_device(settings.get("device"))
    _check_keywords(settings)
    settings = _settled(source, settings, on)
    checkpoint = locate(source, settings.get("revision"))
    _check_stored(checkpoint, settings)
    tokenizer = load_tokenizer(checkpoint.source, checkpoint.revision, trust_remote_code)
    return _load(checkpoint, None, settings, on), tokenizer


@headers_once()
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
    settings = _settled(source, settings, on)
    checkpoint = locate(source, settings.get("revision"))
    n_blocks = Point.parse(point).within(checkpoint.config.num_hidden_layers).layer + 1
    _check_stored(checkpoint, settings)
    checkpoint.check_depth(checkpoint.config.num_hidden_layers, checkpoint.files)
    if not checkpoint.cuts_cleanly(n_blocks):
        return truncated_view(_load(checkpoint, checkpoint.config.num_hidden_layers, settings, on), point)
    return _load(checkpoint, n_blocks, settings, on)


def _load(checkpoint: Checkpoint, n_blocks: int | None, settings: LoadSettings, on: torch.device) -> PreTrainedModel:
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
    needed = checkpoint.needed(n_blocks)
    renamed = _renamed(checkpoint.text) if checkpoint.text else None
    odd: list[str] = []
    with temporary_folder() as folder:
        for file in sorted(set(needed.values())):
            path = checkpoint.fetch(file)
            if path is None:
                raise WeightsError(f"{checkpoint.source} without {file}", "every file that its index names", RESTORE)
            tensors = read_header(path).tensors
            odd += [n for n, e in tensors.items() if n in needed and n.endswith("weight") and e.dtype not in _FLOATS]
            (folder / file).symlink_to(path.resolve())
        write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": needed})
        arguments = _arguments(settings, checkpoint, on)
        kind: Any = AutoModelForCausalLM if n_blocks is None else AutoModel
        try:
            with _quiet():
                model, info = kind.from_pretrained(
                    folder,
                    config=config,
                    key_mapping=renamed,
                    use_safetensors=True,
                    output_loading_info=True,
                    generation_config=checkpoint.generation,
                    **arguments,
                )
        except ImportError as error:
            raise MissingExtraError(
                f"{checkpoint.source}, whose weights are stored quantised ({checkpoint.scheme}), without a package "
                f"({error})",
                "the package that reads them",
                "install it, or use a copy of the target that is not quantised",
            ) from error
        except (OSError, SafetensorError, ValueError, RuntimeError, *CONFIG_ERRORS) as error:
            what = f"{type(error).__name__}: {error}"
            raise WeightsError(
                f"a target in {checkpoint.source} that does not load ({what})", "a whole model", RESTORE
            ) from error
    norms = [] if n_blocks is None else [f"{checkpoint.parts.norm}.{part}" for part in ("weight", "bias")]
    missing = sorted(set(info["missing_keys"]) - set(norms)) + sorted(map(str, info["mismatched_keys"]))
    if missing:
        raise WeightsError(
            f"a target in {checkpoint.source} without {missing[:3]} ({len(missing)} in all)", "all weights", RESTORE
        )
    unread = sorted(
        name
        for name in info["unexpected_keys"]
        if _OF_SCHEMES.search(name)
        and (n_blocks is None or (checkpoint.block_of(name) or 0) < n_blocks)  # others of a file are not read
    )
    unread = unread or (odd if checkpoint.scheme is None else [])
    if unread:
        raise WeightsError(
            f"a target in {checkpoint.source} with {unread[0]} and others ({len(unread)} in all) that "
            f"{checkpoint.scheme or 'a config.json without quantization_config'} does not read",
            "weights that are not quantised, or the quantization_config that they were stored with",
            RESTORE,
        )
    if n_blocks is not None:
        setattr(backbone(model), checkpoint.parts.norm, nn.Identity())
    return _finish(model, checkpoint, settings, on)


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


def fastest_dtype(source: str | Path, device: str | torch.device | None = None) -> str:
    """What "auto" means for a target on a device (None: the first GPU if there is one, else the CPU).

    It is bfloat16, but float32 on a CPU that has neither avx512_bf16 nor AMX and would emulate it: ``python
    benchmarks/dtype.py`` measures both. On a CPU the choice is said once, as a warning.
    """
    if _checked_device(device).type != "cpu":
        return "bfloat16"
    by = _cpu_bfloat16()
    dtype, reason = "float32", "has neither avx512_bf16 nor AMX, and would emulate bfloat16"
    if by is not None:
        dtype, reason = "bfloat16", f"computes it ({by})"
    _say(f"{visible(str(source))} in {dtype}: this CPU {reason}")
    return dtype


def _cpu_bfloat16() -> str | None:
    """The instructions by which this CPU computes bfloat16; None: it has none."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else None


def _settled(source: str | Path, settings: LoadSettings, on: torch.device) -> LoadSettings:
    """The settings with a type in the place of "auto", also where it is what a name takes."""
    asked = settings.get("dtype", None if str(source) in PACKAGED else "float32")
    if asked == AUTO or (asked is None and str(source) in PACKAGED):
        return {**settings, "dtype": fastest_dtype(source, on)}
    return settings


@cache
def _say(remark: str) -> None:
    """Warn, of the same thing once."""
    _log.warning("%s", remark)


def _check_keywords(settings: LoadSettings) -> None:
    """Refuse before anything is downloaded what cannot be loaded."""
    dtype, quantization = settings.get("dtype"), settings.get("quantization")
    if dtype is not None and dtype not in (*DTYPES, AUTO):
        raise ArgumentError(f"dtype={dtype!r}", f"one of {', '.join(DTYPES)}, {AUTO}", "use one of these")
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


def _check_stored(checkpoint: Checkpoint, settings: LoadSettings) -> None:
    """Refuse before weights are downloaded what is asked of weights that are stored quantised."""
    asked = {name: settings.get(name) for name in ("quantization", "adapter") if settings.get(name) is not None}
    if asked and checkpoint.scheme is not None:
        raise ArgumentError(
            f"{' and '.join(f'{name}={value}' for name, value in asked.items())} on {checkpoint.source}, whose weights "
            f"are stored quantised ({checkpoint.scheme})",
            "weights that are not quantised yet",
            "leave it out, or use a copy of the target that is not quantised",
        )


def _arguments(settings: LoadSettings, checkpoint: Checkpoint, on: torch.device) -> dict[str, Any]:
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
    model: PreTrainedModel, checkpoint: Checkpoint, settings: LoadSettings, on: torch.device
) -> PreTrainedModel:
    """The model on a device, checked, with its adapter, and named after where it came from."""
    if settings.get("quantization") is None and checkpoint.scheme is None:  # else it is there
        whole: Any = model  # the class's own method, which refuses what cannot be moved
        whole.to(on)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not _is_finite(parameter.detach()):
            raise NonFiniteError(
                f"NaN or infinity in {name} of the target in {checkpoint.source}", "finite weights", RESTORE
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
