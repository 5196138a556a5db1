"""LoRA adapters: on disk, checked; merged into a target, or fitted to one that is cut or wrapped."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from nla.errors import ConfigError, WeightsError, visible
from nla.models.points import backbone, blocks, device_of, is_transposed, layout, unwrapped
from nla.organisms import PACKAGED, adapter_folder
from nla.storage.files import folder_of, read_json, write_json
from nla.storage.hashes import sha256
from nla.storage.hub import fetch_file, is_hub_id
from nla.storage.schema import Problem, checked, shown
from nla.storage.tensors import headers_once, load_tensors, read_header, save_tensors
from nla.text.patterns import compile_pattern

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

_ADAPTER_SIZES = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
_ADAPTER_PLACES = {"target_modules", "layers_to_transform", "fan_in_fan_out"}
_ADAPTER_NOTES = {"task_type", "inference_mode", "base_model_name_or_path", "revision", "peft_version", "eva_config"}
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Ways to start an adapter that leave the base weights as they are; PEFT's others move a part of them into it."""
_PLAIN_NAME = re.compile(r"[\w.]+")


def _refuse(problem: Problem) -> ConfigError:
    return ConfigError(problem.got, problem.expected, "restore the file from where the adapter came")


Rank = Annotated[int, Field(gt=0)]
Alpha = Annotated[float, Field(ge=0)]


@checked(_refuse, ADAPTER_CONFIG)
class _Sizes:
    """What of an adapter's configuration PEFT makes tensors and numbers of."""

    r: Rank = 8
    lora_alpha: Alpha = 8
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    target_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None


def in_type_of(model: PreTrainedModel) -> contextlib.AbstractContextManager[object]:
    """While active, a model's adapters multiply in the type of its weights, as the weights do; what is trained, its
    gradients and all losses stay float32. Of a model in float32, nothing changes."""
    half = model.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device_of(model).type, dtype=model.dtype) if half else contextlib.nullcontext()


def save_adapter(folder: str | Path, model: PeftModel, adapter: str, dtype: torch.dtype | None = None) -> None:
    """Write one adapter of ``model`` as a folder that plain PEFT loads; each file atomically, the weights last.

    Args:
        dtype: to round the weights to; None: as they are.

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
    save_tensors(folder / ADAPTER_WEIGHTS, {name: weight.to(dtype=dtype) for name, weight in state.items()})


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
    if not isinstance(start, str | bool) or (start.lower() if isinstance(start, str) else start) not in _PLAIN_STARTS:
        raise ConfigError(
            got=f"{path} with init_lora_weights={shown(start)}, whose training began by changing the base weights",
            expected="a plain LoRA adapter, which leaves the base weights as they are",
            fix="convert it first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)",
        )
    plain, free = LoraConfig().to_dict(), _ADAPTER_SIZES | _ADAPTER_PLACES | _ADAPTER_NOTES
    # PEFT writes "none of them" as null or as an empty list, by the model's architecture.
    content = {key: value for key, value in content.items() if key in free or value not in (None, [], {})}
    content["init_lora_weights"] = True
    try:
        with warnings.catch_warnings():  # PEFT names on the screen what it does not know, as the file has it
            warnings.simplefilter("ignore")
            config = PeftConfig.from_peft_type(**content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            got=f"{path}, which PEFT refuses ({shown(str(error))})",
            expected="an adapter configuration of the installed PEFT",
            fix="install the PEFT version that pyproject.toml pins, or restore the file from where the pair came",
        ) from error
    settings = config.to_dict()
    other = sorted(key for key in {*settings, *plain} - free if settings.get(key) != plain.get(key))
    if other:
        raise ConfigError(
            got=f"{path} with {', '.join(f'{shown(key)[1:-1]}={shown(settings.get(key))}' for key in other[:3])}",
            expected="a plain LoRA adapter, which leaves the base weights as they are",
            fix="use plain LoRA adapters, as `nla train` makes them: no DoRA, no biases, no modules_to_save",
        )
    sizes = _Sizes(**{key: content[key] for key in (_ADAPTER_SIZES | _ADAPTER_PLACES) & set(content)})
    _check_ranks(config, sizes, path)
    return config


def _check_ranks(config: Any, sizes: _Sizes, path: Path) -> None:
    """Refuse ranks that the tensors beside the configuration do not have, before PEFT makes matrices of them.

    What ``config`` says of modules without tensors there is cut to the highest rank of the others.

    Raises:
        ConfigError: a module's rank is above its tensors', or a pattern is none.
        WeightsError: see :func:`read_header`.
    """
    tensors = read_header(path.with_name(ADAPTER_WEIGHTS)).tensors
    ranks = {
        name.split(".lora_A.")[0].removeprefix("base_model.model."): entry.shape[0]
        for name, entry in tensors.items()
        if ".lora_A." in name and len(entry.shape) == 2
    }
    patterns = sizes.rank_pattern or {}
    stated = _by_name(patterns, list(ranks), path)
    for name, rank in ranks.items() or [("every module", 0)]:
        if stated.get(name, sizes.r) > rank:
            raise ConfigError(
                f"{path} of rank {stated.get(name, sizes.r)} for {shown(name)}",
                f"at most {rank}, its rank in {ADAPTER_WEIGHTS}",
                "restore both files",
            )
    highest = max(ranks.values())
    config.r = min(sizes.r, highest)
    config.rank_pattern = {pattern: min(rank, highest) for pattern, rank in patterns.items()}


def resolve_patterns(config: PeftConfig, names: Iterable[str], path: Path) -> None:
    """Write out which of a model's modules the patterns of a configuration mean, so that PEFT runs none from a file.

    Plain names stay as they are.

    Raises:
        ConfigError: a pattern is none, or takes too long.
    """
    settings: Any = config
    known = list(names)
    modules = settings.target_modules
    if isinstance(modules, str) and modules != "all-linear":
        settings.target_modules = set(_matching(modules, known, path)) or {modules}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns: Mapping[str, Any] = getattr(settings, name) or {}
        if not all(map(_PLAIN_NAME.fullmatch, patterns)):
            values = _by_name(patterns, known, path)
            setattr(settings, name, {f"^{re.escape(module)}": value for module, value in values.items()})


def _by_name(patterns: Mapping[str, Any], names: list[str], path: Path) -> dict[str, Any]:
    """What the first pattern that means a name says of it, by name; PEFT lets a pattern begin at any dot."""
    values: dict[str, Any] = {}
    for pattern, value in patterns.items():
        if _PLAIN_NAME.fullmatch(pattern):
            pattern = re.escape(pattern).replace("\\.", ".")
        values = {name: value for name in _matching(rf"(.*\.)?({pattern})", names, path)} | values
    return values


def _matching(pattern: str, names: list[str], path: Path) -> list[str]:
    """The names that a pattern from a file matches, searched under a limit of time."""
    compiled = compile_pattern(pattern, f"{path} with the pattern", error=ConfigError)
    return [name for name in names if compiled.fullmatch(name)]


@contextlib.contextmanager
def peft_errors(folder: Path) -> Iterator[None]:
    """What PEFT raises of an adapter that does not fit a model, as a typed error.

    Raises:
        ConfigError: it does not fit.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"{folder}, which PEFT does not fit to the target ({type(error).__name__}: {shown(str(error))})",
            "an adapter of this target",
            "use the target that the adapter was trained on",
        ) from error


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


TARGET_ADAPTER = "target"


def merge_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Add a plain LoRA adapter to the weights of a model, or of a backbone that holds its first blocks, for good.

    Raises:
        ConfigError, WeightsError, NonFiniteError: see :func:`nla.pair.roles.planted`.
    """
    tuned: Any = attach(model, located(folder))
    tuned.merge_and_unload()
    model.requires_grad_(True)


def attach(model: PreTrainedModel, folder: Path) -> PeftModel:
    """A model with an adapter in its layers, which it keeps until it is unloaded."""
    from peft import get_peft_model

    config, state = fitted(folder, model)
    config.task_type = None  # a backbone cannot generate, which PEFT's classes for tasks ask of it
    with torch.random.fork_rng(devices=[]), peft_errors(folder):  # PEFT draws initial values, then overwritten
        tuned: Any = get_peft_model(model, config, adapter_name=TARGET_ADAPTER)
    try:
        fill(folder, tuned, state)
    except WeightsError:
        tuned.unload()
        raise
    return tuned


@contextlib.contextmanager
def attached(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """While active, a model has an adapter in its layers; see :func:`attach`."""
    with same_gradients(model):
        tuned: Any = attach(model, folder)
        try:
            yield
        finally:
            tuned.unload()


@contextlib.contextmanager
def same_gradients(model: nn.Module) -> Iterator[None]:
    """At the end of the block every parameter that was there before it requires a gradient, or none, as it did then."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@headers_once()
def fitted(folder: Path, model: nn.Module) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter's configuration and tensors under the names that ``model`` gives its layers.

    Layers are found by what follows the list of blocks, so an adapter of a multimodal wrapper fits the text side alone,
    and one of a whole model a backbone. What lies above the blocks that ``model`` has is left out; so is the vision.
    A base of another name than the target's is warned of; see :func:`other_base`.

    Raises:
        ConfigError, WeightsError, NonFiniteError: see :func:`nla.pair.roles.planted`.
    """
    config: Any = read_adapter_config(folder)
    base = unwrapped(model)
    stack, n_blocks = backbone(base), len(blocks(base))
    layer_path = re.compile(rf"^(?!.*vision).*?\b({layout(stack).blocks}\.(\d+)\..+)$")
    known = {match[1]: name for name, _ in base.named_modules() if (match := layer_path.match(name))}
    layers: dict[str, str] = {}
    renamed: dict[str, str] = {}
    strange = []
    for name, entry in read_header(folder / ADAPTER_WEIGHTS).tensors.items():
        path, _, part = name.rpartition(".lora_")
        match = layer_path.match(path)
        if match is not None and match[1] in known:
            _check_shape(base.get_submodule(known[match[1]]), path, part, entry.shape, folder)
            layers[known[match[1]]] = path.removeprefix("base_model.model.")
            renamed[name] = f"base_model.model.{known[match[1]]}.lora_{part}"
        elif not _beyond(name, match, base is stack, n_blocks):
            strange.append(name)
    if strange or not layers:
        raise ConfigError(
            f"{folder}, which does not fit the target ({shown((strange or ['it reaches none of its layers'])[0])})",
            "an adapter of the pair's target",
            "train the adapter on this target, or use the pair of the other one",
        )
    for name, default in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
        setattr(config, name, _by_layer(getattr(config, name) or {}, layers, default, folder / ADAPTER_CONFIG))
    config.target_modules, config.layers_to_transform = set(layers), None
    config.fan_in_fan_out = is_transposed(base)
    stored = load_tensors(folder / ADAPTER_WEIGHTS)
    remark = other_base(folder, str(getattr(base, "name_or_path", "")))
    if remark is not None:
        _log.warning("%s", remark)
    return config, {now: stored[before] for before, now in renamed.items()}


def _check_shape(module: nn.Module, name: str, part: str, shape: Sequence[int], folder: Path) -> None:
    """Hold an adapter's matrix, ``A`` (rank × in) or ``B`` (out × rank), against the layer it is added to.

    Raises:
        WeightsError: the layer takes or gives another number of features.
    """
    weight = getattr(module, "weight", None)
    sizes = [getattr(module, key, None) for key in ("in_features", "out_features")]
    if None in sizes and isinstance(weight, Tensor) and weight.ndim == 2:
        sizes = list(weight.shape)  # Conv1D of GPT-2, which is transposed
    if None in sizes or len(shape) != 2:  # PEFT says of others what it makes
        return
    expected = (shape[0], sizes[0]) if part.startswith("A") else (sizes[1], shape[1])
    if tuple(shape) != expected:
        raise WeightsError(
            f"{folder / ADAPTER_WEIGHTS}, where lora_{part[0]} of {shown(name.removeprefix('base_model.model.'))} has "
            f"the shape {tuple(shape)}",
            f"{expected}, as the target's layer of {sizes[0]} inputs and {sizes[1]} outputs takes it",
            "use the target that the adapter was trained on",
        )


def other_base(folder: str | Path | None, target: str | Path) -> str | None:
    """A warning that an adapter names another base than ``target``; None where it does not, or names none.

    The last parts of the names are compared, since the same model has many places.

    Raises:
        ConfigError: the adapter's configuration is missing or malformed.
        TargetError, AccessError: the hub does not give it.
    """
    if folder is None:
        return None
    base = read_json(located(folder) / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or _last_part(base) in ("", _last_part(str(target))):
        return None
    if base in PACKAGED and Path(target).name.startswith(PACKAGED[base].SHA256):
        return None  # a packaged target lies where its file was converted to, which is named by the file's hash
    return (
        f"the adapter {visible(str(folder))} names the base {shown(base)}, and the target is {visible(str(target))}: "
        "if these are not the same model, what is read means nothing"
    )


def _last_part(name: str) -> str:
    """The name of a model in a path, a hub id or the hub's cache."""
    cached = re.search(r"models--(?:.*--)?([^/]+)/snapshots/", name)
    return (cached[1] if cached else Path(name.replace("\\", "/")).name).casefold()


def _by_layer(patterns: dict[str, Any], layers: dict[str, str], default: Any, path: Path) -> dict[str, Any]:
    """Patterns over the names that layers had in training, ``layers``' values, as values by their names now, its keys.

    A name that is written out in full, as PEFT's data-driven starts write them, would match no layer of a cut target.
    """
    by_name = _by_name(patterns, list(layers.values()), path)
    values = {now: by_name.get(before, default) for now, before in layers.items()}
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


def _beyond(name: str, match: re.Match[str] | None, is_cut: bool, n_blocks: int) -> bool:
    """Whether a tensor is of a part that a backbone or a text side is rightly without."""
    if match is None:
        return "vision" in name or (is_cut and ".lm_head." in name)
    return is_cut and int(match[2]) >= n_blocks


def fill(folder: Path, model: PeftModel, state: dict[str, Tensor]) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    current = get_peft_model_state_dict(model, adapter_name=TARGET_ADAPTER, save_embedding_layers=False)
    wrong = sorted(set(current) ^ set(state)) or [n for n, t in state.items() if t.shape != current[n].shape]
    if wrong:
        raise WeightsError(
            f"{folder / ADAPTER_WEIGHTS}, whose {wrong[0]} is missing, unknown or of another rank",
            "the tensors of this adapter's configuration, in the target's shapes",
            "load it with the target and the rank it was made for",
        )
    set_peft_model_state_dict(model, state, adapter_name=TARGET_ADAPTER)


def located(folder: str | Path) -> Path:
    """A folder as it stands, an embedded adapter's, or where a hub id's files are, which are downloaded if need be.

    Raises:
        ConfigError: an embedded name that is none of an adapter.
        TargetError, AccessError: the hub does not give them.
    """
    folder = adapter_folder(folder) or folder
    if folder_of(folder) is not None or not is_hub_id(str(folder)):
        return Path(folder)
    files = [fetch_file(str(folder), None, name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    return Path(folder) if files[0] is None else files[0].parent


def adapter_hash(folder: str | Path | None) -> str | None:
    """What identifies an adapter: a hash of its configuration and weights; None for none.

    Raises:
        WeightsError: a file is missing.
        TargetError, AccessError: the hub does not give it.
    """
    if folder is None:
        return None
    folder = located(folder)
    parts = "".join(sha256(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    return hashlib.sha256(parts.encode()).hexdigest()
