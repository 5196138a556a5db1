"""Import of the reference's checkpoints: full-weight AV and AR folders with an ``nla_meta.yaml`` each.

The AV (also "actor") is an encoder: a causal LM. The AR (also "critic") is a decoder: the LM cut after block K, without
its final norm, and a linear head in ``value_head.safetensors``. Both spellings and schemas of the sidecar are read.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nla.autoencoder import NLA
from nla.config import DecoderConfig, NLAConfig, WeightsConfig, tokenizer_hash
from nla.errors import SidecarError, TokenizerMismatchError
from nla.formats.kitft_sidecar import (
    EXPLANATION_TAGS,
    FIX,
    SIDECAR,
    Sidecar,
    decoder_template,
    encoder_prompt,
    injection_of,
    read_sidecar,
    required,
)
from nla.models.checkpoint import read_config
from nla.pair.folder import load_head
from nla.pair.separate import Devices, Sources, assemble, check_same_ids, expand
from nla.storage import hub
from nla.storage.files import folder_of
from nla.text.tokens import load_tokenizer, render_prompt

VALUE_HEAD = "value_head.safetensors"
MAX_NEW_TOKENS = 200
"""What the reference's own client samples at most; the sidecar does not say it."""

_SMALL_FILES = ["*.json", "*.yaml", "*.txt", "*.jinja", "*.model", VALUE_HEAD]


def load(
    av: str | Path,
    ar: str | Path,
    target: str | Path | None = None,
    *,
    av_revision: str | None = None,
    ar_revision: str | None = None,
    target_revision: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    device: Devices = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    trust_remote_code: bool = False,
) -> NLA:
    """A pair in the reference's format as an NLA. Its models are loaded at first use, each to its own device.

    Args:
        av: folder or hub id of the encoder.
        ar: folder or hub id of the decoder.
        target: folder or hub id of the model to read; None: the base that the sidecars name.
        target_revision: of a target on the hub; None: main as it is now. Either is pinned to its commit if the hub can
            be reached; if not, it is kept as it is given.
        dtype: type of all weights; None: as the AV's config.json says.
        quantization: of all three models as they are loaded, "8bit" or "4bit"; None: as they are stored.
        device: see :meth:`nla.NLA.from_pretrained`.
        max_new_tokens: longest answer of the encoder; the sidecar does not say it.

    The pair has no baselines: FVE needs :meth:`nla.NLA.fit_baselines` on activations of the target first. Until then
    reconstructions are as long as injected activations: a round number a little above the mean of the training ones.

    Raises:
        SidecarError: a sidecar is missing, lacks a key, or is of other weights; or AV and AR do not belong together.
        TokenizerMismatchError, MarkerError: the tokenizer is not that of the sidecar.
        WeightsError, NonFiniteError: the head is missing or broken. Of other weights these come at first use.
        ArchitectureError: an AV or AR of a type whose blocks are not known.
        TargetError: one without a config.json.
        HubError, AccessError: the hub lacks a repository, does not open it, or cannot be reached.
    """
    av, ar, target = expand(av), expand(ar), None if target is None else expand(target)
    encoder, decoder = _fetch(av, av_revision), _fetch(ar, ar_revision)
    ours, theirs = read_sidecar(encoder / SIDECAR), read_sidecar(decoder / SIDECAR)
    configs = _check_together(ours, theirs, encoder, decoder, compare_bases=target is None)
    tokenizer = load_tokenizer(encoder, None, trust_remote_code)
    check_same_ids(tokenizer, load_tokenizer(decoder, None, trust_remote_code), av, ar)
    target = target or str(ours.base)
    config = NLAConfig(
        target=target,
        target_revision=None if folder_of(target) else hub.commit_of(target, target_revision) or target_revision,
        dtype=dtype or _dtype(configs[0], encoder),
        quantization=quantization,
        point=f"resid_post.{configs[1].num_hidden_layers - 1}",
        encoder_weights=_weights(av, encoder),
        decoder_weights=_weights(ar, decoder),
        max_new_tokens=max_new_tokens,
        **_contract(ours, theirs, tokenizer),
    )
    config.check_model(configs[0])
    _check_bos(config, tokenizer)
    sources = Sources(*(hub.place_of(source) for source in (config.target, av, ar)))
    head = partial(load_head, config, decoder / VALUE_HEAD)
    return NLA.from_parts(assemble(config, sources, head, device, trust_remote_code=trust_remote_code, verify=False))


def _contract(ours: Sidecar, theirs: Sidecar, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the sidecars of AV and AR say of a config."""
    return {
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "d_model": ours.d_model,
        "injection": injection_of(ours, tokenizer),
        "encoder_prompt": encoder_prompt(ours),
        "explanation_open": EXPLANATION_TAGS[0],
        "explanation_close": EXPLANATION_TAGS[1],
        "decoder_template": decoder_template(theirs),
        "decoder": DecoderConfig(head_bias=False),
        "activation_norm": required(ours.injection_norm, "extraction.injection_scale", ours),
    }


def _fetch(source: str, revision: str | None) -> Path:
    """A folder with all but the large weights: the source itself, or what is downloaded of it."""
    return folder_of(source) or hub.download(source, revision, _SMALL_FILES)


def _weights(source: str, folder: Path) -> WeightsConfig:
    """A hub's snapshot folder is named after its commit, which pins it."""
    return WeightsConfig(source=source, revision=None if folder_of(source) else folder.name)


def _check_together(
    ours: Sidecar, theirs: Sidecar, av: Path, ar: Path, compare_bases: bool
) -> tuple[PretrainedConfig, PretrainedConfig]:
    """The text configs of AV and AR, if each fits its sidecar and both are of one pair."""
    configs = (read_config(str(av), None), read_config(str(ar), None))
    for sidecar, config, role in zip((ours, theirs), configs, ("AV", "AR"), strict=True):
        if sidecar.role != role:
            fix = "give the AV first and the AR second"
            raise SidecarError(f"{sidecar.path} of an {sidecar.role or 'unknown part'}", f"that of an {role}", fix)
        if sidecar.d_model != config.hidden_size:
            got = f"{sidecar.path} with d_model: {sidecar.d_model}, beside weights of width {config.hidden_size}"
            raise SidecarError(got, "the sidecar of these weights", FIX)
        if not sidecar.normalised and role == "AR":
            got = f"{sidecar.path} with mse_scale: null: a decoder that was trained on raw lengths"
            raise SidecarError(
                got, "one trained on directions", "use another checkpoint; the reference's client cannot either"
            )
    layer = configs[1].num_hidden_layers - 1
    facts = {
        "d_model": (ours.d_model, theirs.d_model),
        "tokens": ((ours.marker, *ours.ids), (theirs.marker, *theirs.ids)),
        "layer of the AR, and of its weights": (theirs.layer if theirs.layer is not None else layer, layer),
        "layer of the AV, and of the AR's weights": (ours.layer if ours.layer is not None else layer, layer),
    }
    if compare_bases:
        facts["base_checkpoint (give --target if both are of one model)"] = (
            required(ours.base, "base_checkpoint", ours),
            required(theirs.base, "base_checkpoint", theirs),
        )
    for name, (first, second) in facts.items():
        if first != second:
            got = f"{av} and {ar}, which differ in {name}: {first!r} and {second!r}"
            raise SidecarError(got, "the AV and AR of one pair", "use the two that were published together")
    return configs


def _dtype(config: PretrainedConfig, folder: Path) -> str:
    if config.dtype is None:
        raise SidecarError(
            f"{folder}/config.json without a dtype", "the type of its weights", "give --dtype (in Python dtype=...)"
        )
    return str(config.dtype).removeprefix("torch.")


def _check_bos(config: NLAConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """BOS exactly once where there is one: from the chat template for the AV, from the tokenizer for the AR."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    sides = {
        "chat prompt": render_prompt(tokenizer, config.encoder_prompt),
        "decoder's text": tokenizer(config.decoder_template)["input_ids"],
    }
    for side, ids in sides.items():
        if ids.count(bos) != 1 or ids[0] != bos:
            raise TokenizerMismatchError(
                f"{ids.count(bos)} BOS tokens in the {side}, which begins with id {ids[0]}",
                f"one, id {bos}, at its beginning",
                "use the tokenizer and chat template that were published with the weights",
            )
