"""Export to the reference's format: a pair's adapters merged into whole AV and AR checkpoints, with their sidecars."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nla.autoencoder import NLA
from nla.errors import ArgumentError, ExportError
from nla.formats.kitft import VALUE_HEAD
from nla.formats.kitft_sidecar import EXPLANATION_TAGS, SIDECAR
from nla.metrics import cosine
from nla.models.points import backbone, blocks, cut_config, layout
from nla.models.read import Activations
from nla.organisms import target_folder
from nla.pair.roles import DECODER_ADAPTER, ENCODER_ADAPTER
from nla.storage.files import replacing_files, write_atomic
from nla.storage.tensors import save_tensors

AV_FOLDER, AR_FOLDER = "av", "ar"
_OUTDATED = [
    f"{folder}/{pattern}"
    for pattern in (SIDECAR, "*.safetensors", "*.safetensors.index.json")
    for folder in (AV_FOLDER, AR_FOLDER)
]
"""Of an earlier export: no sidecar ever stands beside weights of another pair, and no shard is left over."""


class DroppedBias(NamedTuple):
    """What it costs to leave the head's bias out: mean cosine of activations with their greedy reconstruction."""

    n: int
    """Number of activations."""

    with_bias: float
    """Of the pair as it is."""

    without_bias: float
    """Of the pair as it was written."""


def export_pair(
    nla: NLA, out: str | Path, drop_bias: bool = False, acts: Activations | Tensor | None = None
) -> DroppedBias | None:
    """Write ``out``/av and ``out``/ar, which the reference's client loads.

    The adapters are merged in float32 into copies of the target, on its device, which needs room for one such copy
    beside it; the weights are then written in the pair's own type. The pair stays as it is. Both folders are written
    aside first: until they are whole, an earlier export stays as it is; and a mixture of the two has no sidecars, so
    that it is refused.

    Args:
        out: a folder; weights, sidecars and what else has the same name in its two folders are written over.
        drop_bias: write a head that has a bias without it, since the format has no place for one. What that changes is
            measured on ``acts`` and returned.
        acts: activations to measure it on.

    Returns:
        None if nothing was left out.

    Raises:
        ExportError: the format cannot hold the pair: a head with a bias, injection that adds, a kept final norm,
            quantised weights, or other tags around explanations.
        SeparateModelsError: the pair consists of whole models already.
        ArgumentError: ``drop_bias`` without activations.
        StorageError, NonFiniteError: something could not be written whole, or is not finite.
    """
    shared = nla.require_adapters("an export of merged adapters")
    _check_fits(nla, drop_bias)
    dropped = None
    if _has_bias(nla):
        if acts is None:
            raise ArgumentError(
                "drop_bias without activations",
                "some to measure the change on",
                "give --store STORE (in Python acts=...)",
            )
        dropped = _without_bias(nla, acts)
    with replacing_files(Path(out), last=SIDECAR, outdated=_OUTDATED) as new:
        _save(_merged(shared.model, ENCODER_ADAPTER, nla.config.dtype), new / AV_FOLDER, nla)
        _save(_cut(_merged(shared.model, DECODER_ADAPTER, nla.config.dtype), nla), new / AR_FOLDER, nla)
        save_tensors(new / AR_FOLDER / VALUE_HEAD, {"weight": nla.head.weight})
        for folder, role in ((AV_FOLDER, "av"), (AR_FOLDER, "ar")):
            write_atomic(new / folder / SIDECAR, _yaml(sidecar_of(nla, role)))
    return dropped


def sidecar_of(nla: NLA, role: str) -> dict[str, Any]:
    """What the sidecar of an "av" or "ar" holds, in the published spelling and schema 2."""
    config, injection = nla.config, nla.config.injection
    target = nla.target_folder or target_folder(config.target)
    before, after = config.decoder_template.split("{explanation}")
    suffix = nla.tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    return {
        "kind": "nla_model",
        "schema_version": 2,
        "role": role,
        "base_checkpoint": str(target.resolve()) if isinstance(target, Path) else target,
        "d_model": config.d_model,
        "extraction_layer_index": config.layer,
        "extraction": {
            "injection_scale": injection.norm if role == "av" else None,
            "mse_scale": config.d_model**0.5,
        },
        "tokens": {
            "injection_char": injection.marker,
            "injection_token_id": injection.marker_id,
            "injection_left_neighbor_id": injection.left_id,
            "injection_right_neighbor_id": injection.right_id,
            # Its first token may merge with the explanation's last characters.
            "critic_suffix_ids": suffix[1:],
        },
        "prompt_templates": {
            "av": _escaped(config.encoder_prompt).replace(_escaped(injection.marker), "{injection_char}"),
            "ar": f"{_escaped(before)}{{explanation}}{_escaped(after)}",
        },
        "critic": {"extraction_layer_index": config.layer},
        "created_by": "nla export kitft",
    }


def _check_fits(nla: NLA, drop_bias: bool) -> None:
    config = nla.config
    tags = (config.explanation_open, config.explanation_close)
    adds_specials = nla.tokenizer("x")["input_ids"] != nla.tokenizer("x", add_special_tokens=False)["input_ids"]
    problems = {
        "an activation that is added at a block's output": config.injection.mode != "replace",
        "a decoder that keeps the final norm": config.decoder.final_norm,
        "a decoder whose text goes without the tokenizer's special tokens": not config.decoder.special_tokens
        and adds_specials,
        f"a target that is quantised to {config.quantization}": config.quantization is not None,
        f"explanations between {tags[0]} and {tags[1]}": tags != EXPLANATION_TAGS,
    }
    for what, applies in problems.items():
        if applies:
            raise ExportError(
                what, "what the reference's format has a place for", "keep the native folder for this pair"
            )
    if _has_bias(nla) and not drop_bias:
        raise ExportError(
            "a head with a bias",
            "one without, since the format has no place for it",
            "give --drop-bias and --store STORE (in Python drop_bias=True and acts=...): what that changes is measured",
        )


def _has_bias(nla: NLA) -> bool:
    return nla.head.bias is not None and bool(nla.head.bias.any())


def _without_bias(nla: NLA, acts: Activations | Tensor) -> DroppedBias:
    vectors = nla.config.check_vectors(acts.vectors if isinstance(acts, Activations) else acts.float().cpu())
    texts = [texts[0] for texts in nla.explain(vectors, greedy=True).texts]
    cosines_of = [cosine(vectors, nla.decoder.decode(texts, strict=False))]
    bias = nla.head.bias
    nla.head.bias = None
    try:
        cosines_of.append(cosine(vectors, nla.decoder.decode(texts, strict=False)))
    finally:
        nla.head.bias = bias
    return DroppedBias(len(vectors), *(float(cosines.mean()) for cosines in cosines_of))


def _merged(model: PreTrainedModel, adapter: str, dtype: str) -> PreTrainedModel:
    """A copy of a shared base with one adapter merged into it in float32, and no other; then in ``dtype``."""
    whole: Any = copy.deepcopy(model)  # PEFT's wrapper
    return whole.float().merge_and_unload(adapter_names=[adapter]).to(getattr(torch, dtype)).eval()


def _cut(model: PreTrainedModel, nla: NLA) -> PreTrainedModel:
    """The causal LM cut after the pair's point, in place."""
    stack = backbone(model)
    setattr(stack, layout(stack).blocks, nn.ModuleList(list(blocks(model))[: nla.config.layer + 1]))
    model.config = stack.config = cut_config(stack.config, nla.config.layer + 1)
    return model


def _save(model: PreTrainedModel, folder: Path, nla: NLA) -> None:
    """Weights, configuration and tokenizer; of a cut model without the final norm and head, which it does not use."""
    state = model.state_dict()
    if len(blocks(model)) == nla.config.layer + 1 and folder.name == AR_FOLDER:
        unused = {id(model.get_output_embeddings()), id(getattr(backbone(model), _norm_name(model)))}
        names = [name for name, module in model.named_modules() if id(module) in unused]
        state = {key: value for key, value in state.items() if not key.startswith(tuple(f"{n}." for n in names))}
    model.save_pretrained(folder, state_dict=state)
    nla.tokenizer.save_pretrained(folder)


def _norm_name(model: PreTrainedModel) -> str:
    return layout(backbone(model)).norm


def _escaped(text: str) -> str:
    """A text that ``str.format`` gives back as it is."""
    return text.replace("{", "{{").replace("}", "}}")


def _yaml(content: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
