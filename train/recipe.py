"""A recipe: one YAML file that says how a pair is made."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from nla.errors import NLAError, RecipeError
from nla.models.load import DTYPES, QUANTIZATIONS
from nla.models.points import Point
from nla.organisms import lesson
from nla.train.data.corpus import CorpusSettings
from nla.train.data.world import ExtractSettings
from nla.train.describe.lesson import DescribeSettings
from nla.train.describe.settings import DescriberSettings
from nla.train.fit.settings import JointSettings, refuse, require_least, require_positive, require_seed
from nla.train.plan import HardwareSettings, ShapeSettings

SHIPPED = Path(__file__).parent / "recipes"
SECRET = "key_variable"
"""A setting whose value is not shown: a key may have been typed where its variable's name belongs."""
KINDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", dict: "a mapping"}


@dataclass(frozen=True)
class PairSettings:
    """The shape of the pair."""

    rank: int = 32
    """LoRA rank of encoder and decoder."""
    max_new_tokens: int = 32
    """Longest answer of the encoder, tags included."""
    injection_norm: float | None = None
    """L2 norm of an injected activation; None: the mean norm of the training activations."""
    alpha: float | None = None
    """LoRA's scale numerator; None: the rank, so that the scale is 1."""
    head_bias: bool = True
    """Whether the decoder's head is affine; the reference's format holds linear heads only."""
    marker: str | None = None
    """Of a corpus's pair: the token that the activation takes the place of; None: the first that will do."""
    encoder_prompt: str | None = None
    """Of a corpus's pair: the encoder's user message, with ``{marker}`` once; None: the usual one."""
    decoder_template: str | None = None
    """Of a corpus's pair: the decoder's text, with ``{explanation}`` once; None: the usual one."""

    def __post_init__(self) -> None:
        require_least("pair", self, rank=1, max_new_tokens=1)
        for name in ("injection_norm", "alpha"):
            if getattr(self, name) is not None:
                require_positive("pair", self, name)
        for name, slot in (("encoder_prompt", "{marker}"), ("decoder_template", "{explanation}")):
            text = getattr(self, name)
            if text is not None and text.count(slot) != 1:
                refuse(f"pair.{name}", text, f"a text with {slot} once")


@dataclass(frozen=True)
class TextSettings:
    """How many activations of a corpus are described, and scored at the end."""

    n_train: int = 100_000
    """Training activations with a warm-start text; each costs one question to the describer."""
    n_scored: int = 2000
    """Held-out activations that the finished pair is scored on, for its card."""

    def __post_init__(self) -> None:
        require_least("texts", self, n_train=1, n_scored=2)


@dataclass(frozen=True)
class WarmstartSettings:
    """Supervised training of encoder and decoder on the described texts."""

    encoder_steps: int = 2500
    decoder_steps: int = 2500
    batch_size: int = 64
    encoder_learning_rate: float = 1e-3
    decoder_learning_rate: float = 1e-3
    head_learning_rate: float = 1e-3
    eval_every: int = 250
    """Steps between evaluations."""
    save_every: int = 200
    """Steps between checkpoints."""
    rows_per_backward: int | None = None
    """Rows of a process in one backward pass, for memory; None: all of its share of the batch."""
    gradient_checkpointing: bool = False
    """Whether to compute activations again in the backward pass, for memory."""

    def __post_init__(self) -> None:
        least = dict(encoder_steps=1, decoder_steps=1, batch_size=1, eval_every=1, save_every=1)
        require_least("warmstart", self, **least)
        require_positive("warmstart", self, "encoder_learning_rate", "decoder_learning_rate", "head_learning_rate")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a pair. Paths are relative to the working directory."""

    name: str
    target: str
    """An embedded organism such as ``couplets/planner``, a model folder, or a hub id."""
    point: str
    out: str
    """Folder of the run: one sub-folder a stage."""
    corpus: CorpusSettings | None = None
    """Where documents come from, for a real target."""
    world: str | None = None
    """Where documents and warm-start texts come from, for an organism: an embedded world, couplets or switchboard."""
    revision: str | None = None
    """Commit, tag or branch of a target on the hub; None: its main branch."""
    dtype: str = "float32"
    """Of the target's weights and of the stored activations: float32, bfloat16 or float16."""
    quantization: str | None = None
    """8bit or 4bit, by bitsandbytes; None: the weights as they are."""
    seed: int = 0
    extract: ExtractSettings = field(default_factory=ExtractSettings)
    """Of a world's documents."""
    describe: DescribeSettings = field(default_factory=DescribeSettings)
    """What a world's describer knows."""
    describer: DescriberSettings = field(default_factory=DescriberSettings)
    """Who writes the texts of a corpus's activations."""
    texts: TextSettings = field(default_factory=TextSettings)
    """How many of these there are."""
    pair: PairSettings = field(default_factory=PairSettings)
    warmstart: WarmstartSettings = field(default_factory=WarmstartSettings)
    joint: JointSettings = field(default_factory=JointSettings)
    control: bool = False
    """Whether to train the control pair too."""
    hardware: HardwareSettings = field(default_factory=HardwareSettings)
    """What ``--dry-run`` reckons with."""
    shape: ShapeSettings | None = None
    """The target's sizes, for ``--dry-run`` before it has been downloaded."""

    def __post_init__(self) -> None:
        Point.parse(self.point)
        require_seed("seed", self.seed)
        if self.dtype not in DTYPES:
            refuse("dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        if self.quantization not in (None, *QUANTIZATIONS):
            refuse("quantization", self.quantization, f"one of {', '.join(QUANTIZATIONS)}, or nothing")
        if (self.world is None) == (self.corpus is None):
            refuse("world", self.world, "a world, or else a section `corpus`: documents come from one of them")
        others = ("describer", "texts") if self.corpus is None else ("extract", "describe")
        for name in others:
            if getattr(self, name) != Recipe.__dataclass_fields__[name].default_factory():  # type: ignore[misc]
                refuse(name, getattr(self, name), f"no such section beside `{'world' if self.world else 'corpus'}`")
        if self.world is not None:
            strata = lesson.load(self.world).STRATA
            if not set(self.joint.stratum_weights) <= set(strata):
                refuse("joint.stratum_weights", self.joint.stratum_weights, f"shares of {', '.join(strata)}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: a YAML file, or the name of a shipped one such as ``couplets``.

    Args:
        overrides: ``section.key=value`` or ``key=value``, values in YAML.

    Raises:
        RecipeError: no such recipe, not YAML, or unknown, missing or invalid keys.
    """
    file = Path(path) if Path(path).is_file() else SHIPPED / f"{path}.yaml"
    if not file.is_file():
        shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
        raise RecipeError(
            f"no recipe {str(path)!r}", f"a YAML file, or one of the shipped: {shipped}", "name one of them"
        )
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        for override in overrides:
            apply_override(content, override)
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}, which is not YAML ({error})", "a YAML mapping", "correct the file") from error
    return build(Recipe, content, str(file))


def apply_override(content: Any, override: str) -> None:
    """Set ``section.key=value`` in a recipe's mapping."""
    key, separator, value = override.partition("=")
    *sections, name = key.split(".")
    if not separator or not isinstance(content, dict):
        raise RecipeError(f"the override {override!r}", "section.key=value", "write it like joint.steps=100")
    for section in sections:
        content[section] = {} if content.get(section) is None else content[section]
        content = content[section]
        if not isinstance(content, dict):
            raise RecipeError(f"the override {override!r}", f"a section, which {section} is not", "name another key")
    content[name] = yaml.safe_load(value)


def build(cls: Any, content: Any, source: str) -> Any:
    """A settings dataclass from a mapping of its fields, where None is an empty one; keys and values are checked."""
    if not isinstance(content, dict | None):
        raise RecipeError(f"{source} holding {content!r}", "a mapping", "see train/recipes/couplets.yaml")
    content, hints = content or {}, typing.get_type_hints(cls)
    unknown = [str(key) for key in content if key not in hints]
    if unknown:
        raise RecipeError(f"{source} with {', '.join(unknown)}", f"among {', '.join(hints)}", "remove or rename them")
    values = {name: typed(hints[name], value, f"{source}: {name}") for name, value in content.items()}
    try:
        return cls(**values)
    except (TypeError, NLAError) as error:
        raise RecipeError(f"{source}: {error}", f"valid values for {cls.__name__}", "correct the recipe") from error


def typed(expected: Any, value: Any, source: str) -> Any:
    """``value``, if it has the annotated type ``expected``; whole numbers and numeric strings become floats."""
    if dataclasses.is_dataclass(expected):
        return build(expected, value, source)
    kind, parts = typing.get_origin(expected) or expected, typing.get_args(expected)
    if NoneType in parts:
        return None if value is None else typed(parts[0], value, source)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-4 as a string
            value = float(value)
    if kind is dict and isinstance(value, dict):
        return {typed(parts[0], k, source): typed(parts[1], v, f"{source}.{k}") for k, v in value.items()}
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        shown = f"a {type(value).__name__}" if source.endswith(SECRET) else repr(value)
        raise RecipeError(f"{source} = {shown}", KINDS[kind], "correct the recipe")
    return value
