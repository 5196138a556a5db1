"""Import of EasyNLA's LoRA pairs: an rsLoRA adapter for the AV, and the AR's LoRA and head in one file of their own.

Their encoder adds the activation after block 1, at the length that the stream has there. Their decoder is the base cut
after block K with a linear head; before the head they scale the stream to a fixed length, which leaves the direction of
a linear head's output as it is. Old checkpoints keep the base's final norm before it, new ones do not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla.autoencoder import NLA
from nla.config import DecoderConfig, NLAConfig, tokenizer_hash
from nla.errors import ArgumentError, SidecarError, WeightsError
from nla.formats.kitft import MAX_NEW_TOKENS
from nla.formats.kitft_sidecar import (
    EXPLANATION_TAGS,
    SIDECAR,
    Sidecar,
    decoder_template,
    encoder_prompt,
    injection_of,
    read_sidecar,
)
from nla.models.load import load_target
from nla.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from nla.models.points import blocks, device_of
from nla.pair.folder import DECODER_FOLDER, ENCODER_FOLDER, load_shared
from nla.pair.roles import Head
from nla.pair.separate import Devices, expand
from nla.storage import hub
from nla.storage.files import folder_of, read_json, temporary_folder, write_json
from nla.storage.hashes import hash_weights
from nla.storage.schema import shown
from nla.storage.tensors import load_tensors, save_tensors

AR_WEIGHTS, AR_META, AR_FOLDER = "ar_lora_value_head.safetensors", "ar_meta.json", "critic"
INJECTION_LAYER = 1
"""A constant of their code: the activation is added to the output of block 1."""

_NAME = re.compile(r"backbone\.(?P<place>.+?)\.(?P<block>\d+)\.(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight")
_HEAD_NAME = "value_head.weight"
_FIX = "take the folder as EasyNLA saved it"


def load(
    av: str | Path,
    ar: str | Path | None = None,
    target: str | Path | None = None,
    *,
    sidecar: str | Path | None = None,
    revision: str | None = None,
    target_revision: str | None = None,
    dtype: str = "bfloat16",
    device: Devices = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> NLA:
    """An EasyNLA pair as an NLA of two adapters on its base, ready for ``save_pretrained``.

    Args:
        av: folder or hub id of the AV's adapter.
        ar: folder of the AR's weights; None: the folder "critic" in ``av``, where joint training puts them.
        target: folder or hub id of the base; None: the one that the AV's adapter and the sidecar name.
        sidecar: ``nla_meta.yaml`` of the data it was trained on; None: the one in ``av``, or else in ``ar``.
        dtype: type of the base's weights; they are bfloat16 in EasyNLA.
        device: where to put it; one place, since both adapters share the base.
        max_new_tokens: longest answer of the encoder; the sidecar does not say it.

    The pair has no baselines, and reconstructions have the length √d: see :meth:`nla.NLA.fit_baselines`.

    Raises:
        SidecarError: a description is missing, lacks a key, or is of other weights.
        WeightsError, NonFiniteError: weights are missing, broken, or not of this base.
        ConfigError: the AV's adapter is not plain LoRA, or its base is another.
        ArgumentError: several devices.
        TokenizerMismatchError, MarkerError: the base's tokenizer is not that of the sidecar.
        HubError, TargetError, AccessError: the hub lacks something, does not open it, or cannot be reached.
    """

    if isinstance(device, Mapping):
        raise ArgumentError(f"device {dict(device)} for a pair whose roles share one base", "one place", "name one")
    av, (ar, target, sidecar) = expand(av), (each and expand(each) for each in (ar, target, sidecar))
    av_folder = folder_of(av) or hub.download(av, revision)
    ar_folder = av_folder / AR_FOLDER if ar is None else Path(ar)
    meta = _read_meta(ar_folder / AR_META)
    about = read_sidecar(_find_sidecar(sidecar, av_folder, ar_folder))
    source = str(target or _base(av_folder, about))
    model, tokenizer = load_target(
        source, revision=target_revision, dtype=dtype, device=device, quantization=meta["quant"]
    )
    config = _config(about, meta, source, model, tokenizer, dtype, max_new_tokens, target_revision)
    config.check(tokenizer, model)
    with temporary_folder() as folder:
        head = _convert(model, meta, av_folder, ar_folder / AR_WEIGHTS, folder, config)
        pair = NLA(load_shared(model, config, folder, head), tokenizer, config)
    pair.target_folder = folder.resolve() if (folder := folder_of(source)) else None
    return pair


def _config(
    about: Sidecar,
    meta: dict[str, Any],
    source: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    max_new_tokens: int,
    revision: str | None,
) -> NLAConfig:
    layer = meta["ar_num_layers"] - 1
    if about.layer is not None and about.layer != layer:
        got = f"{about.path} of activations after block {about.layer}, and an AR of {layer + 1} blocks"
        raise SidecarError(
            got,
            "the sidecar of the data that the pair was trained on",
            "give it: --sidecar FILE (in Python sidecar=...)",
        )
    return NLAConfig(
        target=source,
        target_revision=revision or getattr(model.config, "_commit_hash", None),
        target_weights=hash_weights(source),
        tokenizer_hash=tokenizer_hash(tokenizer),
        d_model=about.d_model,
        dtype=dtype,
        quantization=meta["quant"],
        point=f"resid_post.{layer}",
        injection=injection_of(about, tokenizer, INJECTION_LAYER),
        encoder_prompt=encoder_prompt(about),
        explanation_open=EXPLANATION_TAGS[0],
        explanation_close=EXPLANATION_TAGS[1],
        decoder_template=decoder_template(about),
        # Their decoder's text is encoded without special tokens, whatever the tokenizer would add.
        decoder=DecoderConfig(final_norm=not meta["final_norm_stripped"], head_bias=False, special_tokens=False),
        max_new_tokens=max_new_tokens,
        activation_norm=about.d_model**0.5,
    )


def _convert(
    model: PreTrainedModel, meta: dict[str, Any], av: Path, weights: Path, folder: Path, config: NLAConfig
) -> Head:
    """Write both adapters into ``folder`` in the native form, and give the head."""

    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (av / name).is_file():
            raise WeightsError(f"{av} without {name}", "the AV's PEFT adapter", _FIX)
        (folder / ENCODER_FOLDER).mkdir(exist_ok=True)
        (folder / ENCODER_FOLDER / name).symlink_to((av / name).resolve())
    tensors, n_blocks = load_tensors(weights), meta["ar_num_layers"]
    head = Head(config.d_model, bias=False)
    weight = tensors.pop(_HEAD_NAME, None)
    if weight is None or weight.shape != head.weight.shape:
        got = f"{weights} with {_HEAD_NAME} of {None if weight is None else tuple(weight.shape)}"
        raise WeightsError(got, f"{tuple(head.weight.shape)}, the base's width", _FIX)
    head.load_state_dict({"weight": weight.float()})
    adapter, leaves = _renamed(tensors, model, n_blocks, weights)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": meta["lora_r"],
        "lora_alpha": meta["lora_alpha"],
        "lora_dropout": 0.0,
        "use_rslora": True,
        "target_modules": leaves,
        "layers_to_transform": list(range(n_blocks)),
        "bias": "none",
    }
    write_json(folder / DECODER_FOLDER / ADAPTER_CONFIG, settings)
    save_tensors(folder / DECODER_FOLDER / ADAPTER_WEIGHTS, adapter)
    return head.to(device_of(model))


def _renamed(
    tensors: dict[str, Tensor], model: PreTrainedModel, n_blocks: int, path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under PEFT's names for this base, and the last parts of the adapted modules' names."""
    layers = blocks(model)
    where = next(name for name, module in model.named_modules() if module is layers)
    renamed, leaves = {}, set()
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or int(match["block"]) >= n_blocks:
            got = f"{path} with {shown(name)}"
            raise WeightsError(got, f"LoRA of blocks 0 to {n_blocks - 1}, and {_HEAD_NAME}", _FIX)
        renamed[f"base_model.model.{where}.{match['block']}.{match['module']}.lora_{match['half']}.weight"] = tensor
        leaves.add(match["module"].rsplit(".", 1)[-1])
    return renamed, sorted(leaves)


def _read_meta(path: Path) -> dict[str, Any]:
    """``ar_meta.json``, with what old versions of EasyNLA left out."""
    meta = {"quant": None, "final_norm_stripped": False, **read_json(path)}
    for key, kind in {"ar_num_layers": int, "lora_r": int, "lora_alpha": (int, float)}.items():
        value: Any = meta.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 2**31:
            raise SidecarError(f"{path} with {key}: {shown(value)}", "a number above 0", _FIX)
    if not isinstance(meta["final_norm_stripped"], bool):
        raise SidecarError(
            f"{path} with final_norm_stripped: {shown(meta['final_norm_stripped'])}", "true or false", _FIX
        )
    if meta["quant"] not in [None, "none", "4bit", "8bit"]:
        raise SidecarError(f"{path} with quant: {shown(meta['quant'])}", 'null, "none", "8bit" or "4bit"', _FIX)
    return {**meta, "quant": None if meta["quant"] == "none" else meta["quant"]}


def _find_sidecar(given: str | Path | None, av: Path, ar: Path) -> Path:
    if given is not None:
        return folder / SIDECAR if (folder := folder_of(given)) else Path(given)
    sidecars = [folder / SIDECAR for folder in (av, ar) if (folder / SIDECAR).is_file()]
    if not sidecars:
        raise SidecarError(
            f"no {SIDECAR} in {av} or {ar}",
            "the description of the data that the pair was trained on",
            "give --sidecar FILE (in Python sidecar=...), the .nla_meta.yaml beside its parquet file",
        )
    return sidecars[0]


def _base(av: Path, about: Sidecar) -> str:
    """The model that activations were read from and the AV's adapter sits on, if both descriptions name the same.

    They differ where an adapter was trained on merged weights: those are not the target.
    """
    names = [read_json(av / ADAPTER_CONFIG).get("base_model_name_or_path"), about.base]
    bases = list(dict.fromkeys(str(name) for name in names if name))
    if len(bases) != 1:
        raise SidecarError(
            f"{av / ADAPTER_CONFIG} on {shown(names[0])}, and {about.path} of activations of {names[1]!r}",
            "one model under one name",
            "if they are the same model give --target (in Python target=...); a pair on a merged checkpoint cannot be "
            "imported",
        )
    return bases[0]
