"""Import of the reference's checkpoints: full-weight AV and AR folders with an ``nla_meta.yaml`` each.

The AV (also "actor") is an encoder: a causal LM. The AR (also "critic") is a decoder: the LM cut after block K, without
its final norm, and a linear head in ``value_head.safetensors``. Both spellings and schemas of the sidecar are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla.config import DecoderConfig, InjectionConfig, NLAConfig, WeightsConfig, tokenizer_hash
from nla.errors import SidecarError, TokenizerMismatchError
from nla.formats import hub
from nla.formats.native import load_tensors
from nla.formats.separate import Devices, Sources, assemble, check_same_ids
from nla.tokens import load_tokenizer, render_prompt

if TYPE_CHECKING:
    from nla.autoencoder import NLA
    from nla.decoder import Head

SIDECAR = "nla_meta.yaml"
VALUE_HEAD = "value_head.safetensors"
EXPLANATION_TAGS = ("<explanation>", "</explanation>")
"""Not in the sidecar: they are the same in all of the reference's checkpoints."""

SCHEMAS = (1, 2)
MAX_NEW_TOKENS = 200
"""What the reference's own client samples at most; the sidecar does not say it."""

_ROLES = {"actor": "AV", "av": "AV", "critic": "AR", "ar": "AR"}
_SMALL_FILES = ["*.json", "*.yaml", "*.txt", "*.jinja", "*.model", VALUE_HEAD]
_FIX = "take the folder as it was published; a sidecar belongs to its own weights"


@dataclass(frozen=True)
class Sidecar:
    """What an ``nla_meta.yaml`` says, in this library's words."""

    path: str
    """The file, for messages."""

    role: str | None
    """"AV", "AR", or None for a data set's."""

    base: str | None
    """The model that was trained from."""

    d_model: int
    """Width of the residual stream."""

    layer: int | None
    """Block whose output is read, if it says so."""

    injection_norm: float | None
    """L2 norm of injected activations; None: as they are, or none for a decoder."""

    normalised: bool
    """The loss was over directions, as everything here is."""

    marker: str
    """Token where the activation enters."""

    ids: tuple[int, int, int]
    """Of the marker, and of the tokens to its left and right."""

    encoder_template: str | None
    """Content of the encoder's user message, for ``str.format``."""

    decoder_template: str | None
    """The decoder's text, for ``str.format``."""


def read_sidecar(path: Path) -> Sidecar:
    """Read a sidecar of a model or of a data set.

    Raises:
        SidecarError: it is missing, not YAML, of another schema, or lacks a key; the message names key and file.
    """
    import yaml

    try:
        meta = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SidecarError(f"no readable {path} ({error})", "the sidecar of a checkpoint", _FIX) from error
    if not isinstance(meta, dict):
        raise SidecarError(f"{path} holding a {type(meta).__name__}", "keys and values", _FIX)
    kind = _get(meta, path, str, "kind")
    if kind not in ("nla_model", "nla_dataset"):
        raise SidecarError(f"{path} with kind: {kind!r}", "nla_model or nla_dataset", _FIX)
    schema = meta.get("schema_version", 1)
    if schema not in SCHEMAS:
        got = f"{path} with schema_version: {schema!r}"
        raise SidecarError(got, f"one of {', '.join(map(str, SCHEMAS))}", "install a newer version of nla")
    role = meta.get("role")
    if kind == "nla_model" and role not in _ROLES:
        raise SidecarError(f"{path} with role: {role!r}", f"one of {', '.join(_ROLES)}", _FIX)
    extraction, templates = meta.get("extraction") or {}, meta.get("prompt_templates") or {}
    d_model = _get(meta, path, int, *(("d_model",) if kind == "nla_model" else ("extraction", "d_model")))
    ids = ("injection_token_id", "injection_left_neighbor_id", "injection_right_neighbor_id")
    own = meta.get("critic") or meta.get("ar") or {}
    # Schema 1 wrote the layer under the name that config.json has for the number of blocks.
    layers = (own.get("extraction_layer_index"), own.get("num_hidden_layers"))
    found = (meta.get("extraction_layer_index"), extraction.get("layer_index"), *layers)
    return Sidecar(
        path=str(path),
        role=_ROLES.get(str(role)),
        base=meta.get("base_checkpoint") or extraction.get("base_model"),
        d_model=d_model,
        layer=next((layer for layer in found if layer is not None), None),
        injection_norm=_norm(extraction.get("injection_scale"), d_model, path),
        normalised=_norm(extraction.get("mse_scale", "sqrt_d_model"), d_model, path) is not None,
        marker=_get(meta, path, str, "tokens", "injection_char"),
        ids=tuple(_get(meta, path, int, "tokens", name) for name in ids),  # type: ignore[arg-type]
        encoder_template=templates.get("av") or templates.get("actor"),
        decoder_template=templates.get("ar") or templates.get("critic"),
    )


def load(
    av: str | Path,
    ar: str | Path,
    target: str | Path | None = None,
    *,
    av_revision: str | None = None,
    ar_revision: str | None = None,
    target_revision: str | None = None,
    dtype: str | None = None,
    devices: Devices = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    trust_remote_code: bool = False,
) -> NLA:
    """A pair in the reference's format as an NLA. Its models are loaded at first use, each to its own device.

    Args:
        av: folder or hub id of the encoder.
        ar: folder or hub id of the decoder.
        target: folder or hub id of the model to read; None: the base that the sidecars name.
        target_revision: of a target on the hub; None: main as it is when the target is first used.
        dtype: type of all weights; None: as the AV's config.json says.
        devices: see :meth:`nla.NLA.from_pretrained`.
        max_new_tokens: longest answer of the encoder; the sidecar does not say it.

    The pair has no baselines: FVE needs :meth:`nla.NLA.fit_baselines` on activations of the target first. Until then
    reconstructions are as long as injected activations: a round number a little above the mean of the training ones.

    Raises:
        SidecarError: a sidecar is missing, lacks a key, or is of other weights; or AV and AR do not belong together.
        TokenizerMismatchError, MarkerError: the tokenizer is not that of the sidecar.
        WeightsError, NonFiniteError: the head is missing or broken. Of other weights these come at first use.
        HubError: the hub lacks a repository, does not open it, or cannot be reached.
    """
    encoder, decoder = _fetch(av, av_revision), _fetch(ar, ar_revision)
    ours, theirs = read_sidecar(encoder / SIDECAR), read_sidecar(decoder / SIDECAR)
    configs = _check_together(ours, theirs, encoder, decoder, compare_bases=target is None)
    tokenizer = load_tokenizer(encoder, None, trust_remote_code)
    check_same_ids(tokenizer, load_tokenizer(decoder, None, trust_remote_code), str(av), str(ar))
    config = NLAConfig(
        target=str(target or ours.base),
        target_revision=target_revision,
        dtype=dtype or _dtype(configs[0], encoder),
        point=f"resid_post.{configs[1].num_hidden_layers - 1}",
        encoder_weights=_weights(av, encoder),
        decoder_weights=_weights(ar, decoder),
        max_new_tokens=max_new_tokens,
        **_contract(ours, theirs, tokenizer),
    )
    config.check_model(configs[0])
    _check_bos(config, tokenizer)
    places = (Path(source) for source in (config.target, av, ar))
    sources = Sources(*(str(place.resolve() if place.is_dir() else place) for place in places))
    head = partial(_head, config, decoder / VALUE_HEAD)
    return assemble(_nla(), config, sources, head, devices, None, None, trust_remote_code, verify=False)


def _contract(ours: Sidecar, theirs: Sidecar, tokenizer: Any) -> dict[str, Any]:
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
        "activation_norm": _required(ours.injection_norm, "extraction.injection_scale", ours),
    }


def import_pair(
    av: str | Path, ar: str | Path, out: str | Path, target: str | Path | None = None, **options: Any
) -> NLA:
    """Write a native folder that refers to the AV's and AR's weights where they lie, and hash them if they are local.

    Only the head is copied. ``options`` are those of :func:`load`, whose errors this raises too.

    Raises:
        StorageError: the folder could not be written whole.
    """
    pair = load(av, ar, target, **options)
    pair.save_pretrained(out)
    return pair


def injection_of(sidecar: Sidecar, tokenizer: Any, layer: int | None = None) -> InjectionConfig:
    """The injection that a sidecar describes: in the marker's place, or added after block ``layer``.

    Raises:
        TokenizerMismatchError: the marker is not the one token that the sidecar says.
        SidecarError: no norm for the first of the two.
    """
    found = tokenizer.encode(sidecar.marker, add_special_tokens=False)
    if found != [sidecar.ids[0]]:
        raise TokenizerMismatchError(
            f"a tokenizer that makes {found} of the marker {sidecar.marker!r}",
            f"[{sidecar.ids[0]}], as {sidecar.path} says",
            "use the tokenizer that was published with the weights",
        )
    norm = None if layer is not None else _required(sidecar.injection_norm, "extraction.injection_scale", sidecar)
    marker, left, right = sidecar.ids
    return InjectionConfig(
        marker=sidecar.marker,
        marker_id=marker,
        left_id=left,
        right_id=right,
        norm=norm,
        mode="replace" if layer is None else "add",
        layer=layer,
    )


def encoder_prompt(sidecar: Sidecar) -> str:
    """Content of the encoder's user message, with the marker in it."""
    template = _required(sidecar.encoder_template, "prompt_templates.av (or .actor)", sidecar)
    return _filled(template, sidecar, injection_char=sidecar.marker)


def decoder_template(sidecar: Sidecar) -> str:
    """The decoder's text with a slot for the explanation."""
    template = _required(sidecar.decoder_template, "prompt_templates.ar (or .critic)", sidecar)
    return _filled(template, sidecar, explanation="{explanation}")


def _filled(template: str, sidecar: Sidecar, **values: str) -> str:
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        got = f"{sidecar.path} with a template that cannot be filled ({type(error).__name__}: {error})"
        raise SidecarError(got, f"one slot, {{{next(iter(values))}}}, and no other braces", _FIX) from error


def _fetch(source: str | Path, revision: str | None) -> Path:
    """A folder with all but the large weights: the source itself, or what is downloaded of it."""
    folder = Path(source).expanduser()
    return folder if folder.is_dir() else hub.download(str(source), revision, _SMALL_FILES)


def _weights(source: str | Path, folder: Path) -> WeightsConfig:
    """A hub's snapshot folder is named after its commit, which pins it."""
    local = Path(source).is_dir()
    return WeightsConfig(source=str(source), revision=None if local else folder.name)


def _check_together(ours: Sidecar, theirs: Sidecar, av: Path, ar: Path, compare_bases: bool) -> tuple[Any, Any]:
    """The text configs of AV and AR, if each fits its sidecar and both are of one pair."""
    configs = (_text_config(av), _text_config(ar))
    for sidecar, config, role in zip((ours, theirs), configs, ("AV", "AR"), strict=True):
        if sidecar.role != role:
            fix = "give the AV first and the AR second"
            raise SidecarError(f"{sidecar.path} of an {sidecar.role or 'unknown part'}", f"that of an {role}", fix)
        if sidecar.d_model != config.hidden_size:
            got = f"{sidecar.path} with d_model: {sidecar.d_model}, beside weights of width {config.hidden_size}"
            raise SidecarError(got, "the sidecar of these weights", _FIX)
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
        facts["base_checkpoint (give target=... if both are of one model)"] = (
            _required(ours.base, "base_checkpoint", ours),
            _required(theirs.base, "base_checkpoint", theirs),
        )
    for name, (first, second) in facts.items():
        if first != second:
            got = f"{av} and {ar}, which differ in {name}: {first!r} and {second!r}"
            raise SidecarError(got, "the AV and AR of one pair", "use the two that were published together")
    return configs


def _text_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        whole = AutoConfig.from_pretrained(folder)
        text = whole.get_text_config()
        text.dtype = whole.dtype if text.dtype is None else text.dtype
        return text
    except (OSError, ValueError, KeyError) as error:
        raise SidecarError(f"{folder} without a usable config.json ({error})", "a model's folder", _FIX) from error


def _dtype(config: Any, folder: Path) -> str:
    if config.dtype is None:
        raise SidecarError(f"{folder}/config.json without a dtype", "the type of its weights", "give dtype=...")
    return str(config.dtype).removeprefix("torch.")


def _check_bos(config: NLAConfig, tokenizer: Any) -> None:
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


def _head(config: NLAConfig, path: Path) -> Head:
    from nla.decoder import Head
    from nla.errors import WeightsError

    head, found = Head(config.d_model, bias=False), load_tensors(path, expected_keys=["weight"])["weight"]
    if found.shape != head.weight.shape:
        fix = "use the head that was published with the AR"
        raise WeightsError(f"{path} of {tuple(found.shape)}", f"{tuple(head.weight.shape)}, the width of the AR", fix)
    head.load_state_dict({"weight": found.float()})
    return head


def _get(meta: dict, path: Path, kind: type, *keys: str) -> Any:
    """A value by its path of keys."""
    value: Any = meta
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        got = f"{path} without {'.'.join(keys)}" if value is None else f"{path} with {'.'.join(keys)}: {value!r}"
        raise SidecarError(got, f"a {kind.__name__} there", _FIX)
    return value


def _required(value: Any, name: str, sidecar: Sidecar) -> Any:
    if value is None:
        raise SidecarError(f"{sidecar.path} without {name}", "a value there", _FIX)
    return value


def _norm(value: Any, d_model: int, path: Path) -> float | None:
    """A length in a sidecar: a number, "sqrt_d_model", or none."""
    if value is None or value in ("raw", "none"):
        return None
    try:
        return math.sqrt(d_model) if value == "sqrt_d_model" else float(value)
    except (TypeError, ValueError) as error:
        raise SidecarError(f"{path} with a scale of {value!r}", 'a number, "sqrt_d_model" or null', _FIX) from error


def _nla() -> type[NLA]:
    from nla.autoencoder import NLA

    return NLA
