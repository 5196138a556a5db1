"""The reference's sidecars, ``nla_meta.yaml``: what they say, in this library's words. Both spellings and schemas."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from nla.config import InjectionConfig
from nla.errors import ParseError, SidecarError, TokenizerMismatchError
from nla.storage.files import read_yaml
from nla.storage.schema import shown

T = TypeVar("T")
SIDECAR = "nla_meta.yaml"
EXPLANATION_TAGS = ("<explanation>", "</explanation>")
"""Not in the sidecar: they are the same in all of the reference's checkpoints."""

SCHEMAS = (1, 2)
FIX = "take the folder as it was published; a sidecar belongs to its own weights"

_KINDS = {str: "a text", int: "a whole number", dict: "keys and values"}
_ROLES = {"actor": "AV", "av": "AV", "critic": "AR", "ar": "AR"}


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


def read_meta(path: Path, *kinds: str) -> dict[str, Any]:
    """The keys and values of a sidecar that is of one of these kinds, in a schema that is known.

    Raises:
        SidecarError: it is missing, not YAML, or of another kind or schema.
    """
    try:
        meta = read_yaml(path, foreign=True)
    except ParseError as error:
        raise SidecarError(error.got, f"a sidecar, {path.name}", FIX) from error
    if not isinstance(meta, dict):
        raise SidecarError(f"{path} holding {shown(meta)}", "keys and values", FIX)
    if meta.get("kind") not in kinds:
        raise SidecarError(f"{path} with kind: {shown(meta.get('kind'))}", " or ".join(kinds), FIX)
    schema = meta.get("schema_version", 1)
    if schema not in SCHEMAS or isinstance(schema, bool):
        got = f"{path} with schema_version: {shown(schema)}"
        raise SidecarError(got, f"one of {', '.join(map(str, SCHEMAS))}", "install a newer version of nla")
    return meta


def read_sidecar(path: Path) -> Sidecar:
    """Read a sidecar of a model or of a data set.

    Raises:
        SidecarError: see :func:`read_meta`; or it lacks a key, or has a value of another type; the message names key
            and file.
    """
    meta = read_meta(path, "nla_model", "nla_dataset")
    kind = meta["kind"]
    role = maybe(meta, path, str, "role")
    if kind == "nla_model" and role not in _ROLES:
        raise SidecarError(f"{path} with role: {shown(role)}", f"one of {', '.join(_ROLES)}", FIX)
    extraction = maybe(meta, path, dict, "extraction") or {}
    d_model = get(meta, path, int, *(("d_model",) if kind == "nla_model" else ("extraction", "d_model")))
    ids = ("injection_token_id", "injection_left_neighbor_id", "injection_right_neighbor_id")
    critic = next((name for name in ("critic", "ar") if maybe(meta, path, dict, name)), "critic")
    # Schema 1 wrote the layer under the name that config.json has for the number of blocks.
    paths = (("extraction_layer_index",), ("extraction", "layer_index"), (critic, "extraction_layer_index"))
    layers = [maybe(meta, path, int, *keys) for keys in (*paths, (critic, "num_hidden_layers"))]
    bases = [maybe(meta, path, str, *keys) for keys in (("base_checkpoint",), ("extraction", "base_model"))]
    return Sidecar(
        path=str(path),
        role=_ROLES.get(str(role)),
        base=next(filter(None, bases), None),
        d_model=d_model,
        layer=next((layer for layer in layers if layer is not None), None),
        injection_norm=_norm(extraction.get("injection_scale"), d_model, path),
        normalised=_norm(extraction.get("mse_scale", "sqrt_d_model"), d_model, path) is not None,
        marker=get(meta, path, str, "tokens", "injection_char"),
        ids=tuple(get(meta, path, int, "tokens", name) for name in ids),  # type: ignore[arg-type]
        encoder_template=_template(meta, path, "av", "actor"),
        decoder_template=_template(meta, path, "ar", "critic"),
    )


def injection_of(sidecar: Sidecar, tokenizer: PreTrainedTokenizerBase, layer: int | None = None) -> InjectionConfig:
    """The injection that a sidecar describes: in the marker's place, or added after block ``layer``.

    Raises:
        TokenizerMismatchError: the marker is not the one token that the sidecar says.
        SidecarError: no norm for the first of the two.
    """
    ids = tokenizer.encode(sidecar.marker, add_special_tokens=False)
    if ids != [sidecar.ids[0]]:
        raise TokenizerMismatchError(
            f"a tokenizer that makes {shown(ids)} of the marker {shown(sidecar.marker)}",
            f"[{sidecar.ids[0]}], as {sidecar.path} says",
            "use the tokenizer that was published with the weights",
        )
    norm = None if layer is not None else required(sidecar.injection_norm, "extraction.injection_scale", sidecar)
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
    template = required(sidecar.encoder_template, "prompt_templates.av (or .actor)", sidecar)
    return _filled(template, sidecar, injection_char=sidecar.marker)


def decoder_template(sidecar: Sidecar) -> str:
    """The decoder's text with a slot for the explanation."""
    template = required(sidecar.decoder_template, "prompt_templates.ar (or .critic)", sidecar)
    return _filled(template, sidecar, explanation="{explanation}")


def required(value: T | None, name: str, sidecar: Sidecar) -> T:
    """A value of a sidecar that must not be None."""
    if value is None:
        raise SidecarError(f"{sidecar.path} without {name}", "a value there", FIX)
    return value


def _filled(template: str, sidecar: Sidecar, **values: str) -> str:
    """A template whose slots are plain names: it neither looks inside a value nor widens one."""
    try:
        parts = list(string.Formatter().parse(template))
        strange = [name for _, name, spec, conversion in parts if name is not None and (spec or conversion)]
        strange += [name for _, name, _, _ in parts if name is not None and name not in values]
        if strange:
            raise ValueError(f"the slot {shown(strange[0])}")
        return template.format(**values)
    except ValueError as error:
        got = f"{sidecar.path} with a template that cannot be filled ({error})"
        raise SidecarError(got, f"one slot, {{{next(iter(values))}}}, and no other braces", FIX) from error


def get(meta: Mapping[str, Any], path: Path, kind: type[T], *keys: str) -> T:
    """A value by its path of keys, which must be there."""
    value = maybe(meta, path, kind, *keys)
    if value is None:
        raise SidecarError(f"{path} without {'.'.join(keys)}", f"{_KINDS[kind]} there", FIX)
    return value


def maybe(meta: Mapping[str, Any], path: Path, kind: type[T], *keys: str) -> T | None:
    """A value by its path of keys; None where there is none."""
    value: Any = meta
    for n, key in enumerate(keys, start=1):
        wanted: type = kind if n == len(keys) else dict
        value = value.get(key)
        if value is None:
            return None
        if not isinstance(value, wanted) or isinstance(value, bool):
            got = f"{path} with {'.'.join(keys[:n])}: {shown(value)}"
            raise SidecarError(got, f"{_KINDS[wanted]} there", FIX)
    return value


def _template(meta: Mapping[str, Any], path: Path, *names: str) -> str | None:
    """A template under either of its names."""
    templates = (maybe(meta, path, str, "prompt_templates", name) for name in names)
    return next(filter(None, templates), None)


def _norm(value: Any, d_model: int, path: Path) -> float | None:
    """A length in a sidecar: a number, "sqrt_d_model", or none."""
    if value is None or value in ("raw", "none"):
        return None
    try:
        length = math.sqrt(d_model) if value == "sqrt_d_model" else float(value)
    except (TypeError, ValueError, OverflowError):
        length = math.nan
    if not (math.isfinite(length) and length > 0):
        raise SidecarError(f"{path} with a scale of {shown(value)}", 'a number above 0, "sqrt_d_model" or null', FIX)
    return length
