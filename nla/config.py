"""NLAConfig: the whole contract of a trained pair, checked against a live tokenizer and target."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nla.errors import ConfigError, ShapeError, TokenizerMismatchError
from nla.metrics import check_finite
from nla.storage.files import folder_of, read_json, write_json
from nla.storage.hashes import digest
from nla.storage.schema import Problem, build, checked, shown
from nla.text.fingerprint import hash_parts
from nla.text.fingerprint import tokenizer_hash as tokenizer_hash

CONFIG_FILE = "nla_config.json"
FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("8bit", "4bit")

_CHECKSUM = "checksum"
_EXPLANATION_SLOT = "{explanation}"
_LATER = frozenset({"layer", "quantization", "decoder", "encoder_weights", "decoder_weights", "end_ids"})
"""Fields that files of this format may lack: they came later, and their defaults are what was always done."""


def _refuse(problem: Problem) -> ConfigError:
    return ConfigError(problem.got, problem.expected, "correct this value where the config is made")


Id = Annotated[int, Field(ge=0)]
Length = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]


@checked(_refuse, "injection")
class InjectionConfig:
    """How an activation enters the encoder at the marker: in its embedding's place, or added to a block's output."""

    marker: Text
    """The single token in the encoder prompt where the activation enters."""

    marker_id: Id
    """Token id of the marker."""

    left_id: Id
    """Token id just before the marker in the rendered prompt."""

    right_id: Id
    """Token id just after the marker in the rendered prompt."""

    norm: Length | None
    """L2 norm that the activation is scaled to before it is injected; None for "add", where the stream gives it."""

    mode: Literal["replace", "add"] = "replace"
    """With "replace" the embedding row is overwritten; with "add" the activation is added to a block's output, at the
    length that the output has there: h + |h| v/|v|."""

    layer: Id | None = None
    """For "add": the block whose output it is added to."""

    def __post_init__(self) -> None:
        adds = self.mode == "add"
        _require((self.norm is None) == adds, "injection.norm", self.norm, "a norm to replace with, and none to add")
        _require((self.layer is not None) == adds, "injection.layer", self.layer, "a block to add at, and none else")
        beside = self.marker_id in (self.left_id, self.right_id)
        _require(not beside, "injection.marker_id", self.marker_id, "another id than its neighbours")


@checked(_refuse, "decoder")
class DecoderConfig:
    """What differs between decoders beside their weights and text."""

    final_norm: bool = False
    """The target's final norm stands between the cut and the head."""

    head_bias: bool = True
    """The head has a bias: it is affine, not only linear."""

    special_tokens: bool = True
    """The tokenizer adds its special tokens, such as BOS, to the decoder's text."""


@checked(_refuse, "weights")
class WeightsConfig:
    """Where the full weights of an encoder or decoder lie that is no adapter."""

    source: Text
    """A hub id, a folder relative to the pair's folder, or an absolute folder."""

    revision: str | None = None
    """Commit on the hub, if they come from there."""

    sha256: str | None = None
    """SHA-256 of a folder's config.json and weights; None for the hub."""


@checked(_refuse)
class NLAConfig:
    """Everything a trained pair depends on. No value that the weights were trained with is a constant in code.

    Raises:
        ConfigError: a value has the wrong type, is out of range, or contradicts another.
    """

    target: Text
    """The target: a hub id, a folder relative to the pair's folder, or an absolute folder."""

    target_revision: str | None = None
    """Commit of the target on the hub, if it came from there."""

    tokenizer_hash: Text
    """What :func:`tokenizer_hash` gives for the tokenizer used in training."""

    d_model: Count
    """Width of the target's residual stream."""

    dtype: str
    """Type the target ran in, one of ``DTYPES``."""

    quantization: str | None = None
    """How the target's weights were quantised while the pair was trained: "8bit", "4bit" or not at all."""

    point: Annotated[str, Field(pattern=r"^[a-z_]+\.\d+$")]
    """Where activations are read, such as "resid_post.3": the output of block 3."""

    injection: InjectionConfig
    """How activations enter the encoder."""

    encoder_prompt: str
    """Content of the encoder's user message; it holds the marker once."""

    explanation_open: Text = "<explanation>"
    """What opens an explanation in the encoder's answer."""

    explanation_close: Text = "</explanation>"
    """What closes it."""

    decoder_template: str = "Summary of the following text: <text>{explanation}</text> <summary>"
    """The decoder's text; ``{explanation}`` stands for the explanation, and the last token is read."""

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """What else the decoder is made of."""

    encoder_weights: WeightsConfig | None = None
    """Of an encoder that is a whole model; None: an adapter on the target."""

    decoder_weights: WeightsConfig | None = None
    """Of a decoder that is a whole model; None: an adapter on the target."""

    max_new_tokens: Count
    """Longest answer of the encoder, in tokens."""

    end_ids: Annotated[list[Id], Field(min_length=1)] | None = None
    """Token ids that end an answer; None: those of the tokenizer and the target's generation settings."""

    activation_norm: Length
    """Mean L2 norm of the raw training activations: the length given to reconstructions. An imported pair has a
    stand-in until :meth:`nla.NLA.fit_baselines`."""

    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the adapters, head and baselines by their path in the pair's folder, as last saved."""

    target_weights: str | None = None
    """SHA-256 of a local target's config.json and weights; None for a target on the hub."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""

    def __post_init__(self) -> None:
        _require(
            self.format_version == FORMAT_VERSION,
            "format_version",
            self.format_version,
            f"format {FORMAT_VERSION}",
            fix="install the version of nla that wrote this file, or make the pair again with this one",
        )
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        known = self.quantization in (None, *QUANTIZATIONS)
        _require(known, "quantization", self.quantization, f"none, or one of {', '.join(QUANTIZATIONS)}")
        alike = (self.encoder_weights is None) == (self.decoder_weights is None)
        _require(alike, "decoder_weights", self.decoder_weights, "two adapters, or two whole models")
        kept = self.decoder.final_norm and self.separate
        _require(not kept, "decoder.final_norm", True, "none in a decoder that is a whole model: it is cut without it")
        count = self.encoder_prompt.count(self.injection.marker)
        _require(
            count == 1, "encoder_prompt", self.encoder_prompt, f"the marker {self.injection.marker!r} exactly once"
        )
        count = self.decoder_template.count(_EXPLANATION_SLOT)
        _require(count == 1, "decoder_template", self.decoder_template, f"{_EXPLANATION_SLOT} exactly once")
        different = self.explanation_open != self.explanation_close
        _require(different, "explanation_close", self.explanation_close, "another text than explanation_open")

    @property
    def layer(self) -> int:
        """Index of the block that the point belongs to."""
        return int(self.point.rsplit(".", 1)[1])

    @property
    def separate(self) -> bool:
        """Encoder and decoder are whole models of their own, and no adapters on the target."""
        return self.encoder_weights is not None

    def to_json(self) -> dict[str, object]:
        """A JSON-ready dict of all fields and a checksum over them."""
        content = dataclasses.asdict(self)
        return {**content, _CHECKSUM: _content_checksum(content)}

    @classmethod
    def from_json(cls, content: Mapping[str, object], source: str = "the config") -> NLAConfig:
        """The config in a dict that :meth:`to_json` made. ``source`` names it in errors.

        Raises:
            ConfigError: fields are missing or unknown, a value is invalid, or the content was edited.
        """
        content = dict(content)
        checksum = content.pop(_CHECKSUM, None)
        if checksum != _content_checksum(content):
            raise ConfigError(
                got=f"{source} with content that does not match its checksum: it was edited by hand or damaged",
                expected="the values that the weights were trained with",
                fix="restore the file from where the pair came; to change a value on purpose, load the original, use "
                "dataclasses.replace(config, ...) and save the result",
            )
        fix = "install the version of nla that wrote this file, or make the pair again"
        return build(cls, content, source, lambda problem: ConfigError(problem.got, problem.expected, fix), _LATER)

    def save(self, folder: str | Path) -> None:
        """Write ``nla_config.json`` into a pair's folder, atomically.

        Raises:
            StorageError: the file could not be written whole.
        """
        write_json(Path(folder) / CONFIG_FILE, self.to_json())

    @classmethod
    def load(cls, folder: str | Path) -> NLAConfig:
        """Read ``nla_config.json`` from a pair's folder.

        Raises:
            ConfigError: it is missing, malformed, edited, or of another format.
        """
        path = Path(folder) / CONFIG_FILE
        return cls.from_json(read_json(path), source=str(path))

    def resolve_target(self, folder: str | Path) -> str:
        """What to load the target from, for a pair in ``folder``: a path beside it, or else the hub id."""
        return resolve(self.target, folder)

    def check_vectors(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The vectors, if they are of the target's width and finite.

        Raises:
            ShapeError, NonFiniteError: otherwise.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.d_model:
            raise ShapeError(
                f"vectors of shape {tuple(vectors.shape)}",
                f"(n, {self.d_model}), the width of {self.target}",
                f"read them with this pair, at {self.point}",
            )
        check_finite(vectors)
        return vectors

    def check(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        """Refuse a tokenizer or target that the pair was not trained with.

        Args:
            tokenizer: a transformers tokenizer.
            model: a transformers model (or one wrapped by PEFT); only its ``config`` is read.

        Raises:
            TokenizerMismatchError: the tokenizer differs; the message names the parts that do.
            ConfigError: width, depth, vocabulary or revision of the target contradict the config.
        """
        self.check_tokenizer(tokenizer)
        self.check_model(model.config)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The half of :meth:`check` that needs no model."""
        hash_now = tokenizer_hash(tokenizer)
        if hash_now == self.tokenizer_hash:
            return
        ours, theirs = hash_parts(self.tokenizer_hash), hash_parts(hash_now)
        parts = [part for part in theirs if ours.get(part) != theirs[part]] or ["format of the hash"]
        raise TokenizerMismatchError(
            got=f"a tokenizer that differs in its {', '.join(parts)}",
            expected=f"the tokenizer of {self.target}, as it was in training ({self.tokenizer_hash})",
            fix=f"load the tokenizer from {self.target}"
            + (f" at revision {self.target_revision}" if self.target_revision else "")
            + " and do not add tokens or change its chat template",
        )

    def check_model(self, model_config: PretrainedConfig) -> None:
        """The half of :meth:`check` that needs a model's config alone."""
        text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
        fix = f"load the target {self.target} that this pair was trained on"
        if text_config.hidden_size != self.d_model:
            raise ConfigError(f"a target of width {text_config.hidden_size}", f"d_model {self.d_model}", fix)
        n_layers = text_config.num_hidden_layers
        if self.layer >= n_layers:
            raise ConfigError(f"a target of {n_layers} blocks", f"at least {self.layer + 1} for {self.point}", fix)
        ids = (self.injection.marker_id, self.injection.left_id, self.injection.right_id)
        if max(ids) >= text_config.vocab_size:
            raise ConfigError(f"a target with {text_config.vocab_size} tokens", f"more than id {max(ids)}", fix)
        commit = getattr(model_config, "_commit_hash", None)
        pinned = self.target_revision is not None and re.fullmatch(r"[0-9a-f]{40}", self.target_revision)
        if pinned and commit is not None and commit != self.target_revision:
            raise ConfigError(f"a target at revision {commit}", f"revision {self.target_revision}", fix)


def is_local(source: str) -> bool:
    """A source is written as a path and not as a hub id."""
    return source.startswith((".", "/", "~")) or Path(source).is_absolute()


def resolve(source: str, folder: str | Path) -> str:
    """What a source in the config of the pair in ``folder`` means: a path beside it, or else the hub id.

    A path stays one where nothing lies there: it must not be taken for one beside the working directory.
    """
    beside = Path(folder) / os.path.expanduser(source)
    local = folder_of(beside)
    if local is not None:
        return str(local.resolve())
    return os.path.normpath(beside.absolute()) if is_local(source) else source


def _content_checksum(content: dict[str, Any]) -> str:
    return f"sha256:{digest(content)}"


def _require(
    condition: bool, name: str, value: Any, expected: str, fix: str = "correct this value where the config is made"
) -> None:
    if not condition:
        raise ConfigError(got=f"{name} = {shown(value)}", expected=expected, fix=fix)
