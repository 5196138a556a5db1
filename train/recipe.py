"""A recipe: one YAML file that says how a pair is made."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from nla.config import DTYPES, QUANTIZATIONS
from nla.errors import ParseError, RecipeError
from nla.models.load import AUTO
from nla.models.points import Point
from nla.organisms import ground_truth
from nla.storage.files import read_yaml
from nla.storage.schema import shown
from nla.train.data.corpus import SELF, CorpusSettings
from nla.train.data.sample import SampleSettings
from nla.train.data.world import DescribeSettings, ExtractSettings
from nla.train.describe.describer import DescriberSettings
from nla.train.fit.settings import JointSettings
from nla.train.schema import (
    NOTHING,
    STAGES,
    Count,
    Decides,
    Positive,
    Seed,
    build,
    one_of,
    override,
    refuse,
    section,
)

SHIPPED = Path(__file__).parent / "recipes"
N_WATCHED = 600
"""Held-out activations that training is watched on."""
_READ, _DESCRIBED = Decides("extract"), Decides("describe")


@section("pair", decides="warmstart")
class PairSettings:
    """The shape of the pair."""

    rank: Count = 32
    """LoRA rank of encoder and decoder."""
    max_new_tokens: Count = 32
    """Longest answer of the encoder, tags included."""
    injection_norm: Positive | None = None
    """L2 norm of an injected activation; None: the mean norm of the training activations."""
    alpha: Positive | None = None
    """LoRA's scale numerator; None: the rank, so that the scale is 1."""
    head_bias: bool = True
    """Whether the decoder's head is affine; the reference's format holds linear heads only."""
    # What prompts and tags are made of stands in no warm-start text, so these decide the texts already.
    marker: Annotated[str | None, _DESCRIBED] = None
    """For a pair on a corpus: the token whose place the activation takes; None: the first that will do."""
    encoder_prompt: Annotated[str | None, _DESCRIBED] = None
    """For a pair on a corpus: the encoder's user message, with ``{marker}`` once; None: the usual one."""
    decoder_template: Annotated[str | None, _DESCRIBED] = None
    """For a pair on a corpus: the decoder's text, with ``{explanation}`` once; None: the usual one."""

    def __post_init__(self) -> None:
        for name, slot in (("encoder_prompt", "{marker}"), ("decoder_template", "{explanation}")):
            text = getattr(self, name)
            if text is not None and text.count(slot) != 1:
                refuse(f"pair.{name}", text, f"a text with {slot} once")


@section("texts")
class TextSettings:
    """How many activations of a corpus are described, and scored at the end."""

    n_train: Annotated[Count, _DESCRIBED] = 100_000
    """Training activations with a warm-start text; each costs one question to the describer."""
    n_scored: Annotated[int, Field(ge=2), Decides("joint")] = 2000
    """Held-out activations that the finished pair is scored on, for its card."""


@section("warmstart", decides="warmstart")
class WarmstartSettings:
    """Supervised training of encoder and decoder on the described texts."""

    encoder_steps: Count = 2500
    decoder_steps: Count = 2500
    batch_size: Count = 64
    encoder_learning_rate: Positive = 1e-3
    decoder_learning_rate: Positive = 1e-3
    head_learning_rate: Positive = 1e-3
    eval_every: Annotated[Count, NOTHING] = 250
    """Steps between evaluations."""
    save_every: Annotated[Count, NOTHING] = 200
    """Steps between checkpoints."""
    rows_per_backward: Annotated[int | None, NOTHING] = None
    """Rows of a process in one backward pass, for memory; None: all of its share of the batch."""
    gradient_checkpointing: Annotated[bool, NOTHING] = False
    """Whether to compute activations again in the backward pass, for memory."""


@section("hardware")
class HardwareSettings:
    """What ``--dry-run`` calculates with: one device, and how many there are."""

    name: str = "unnamed"
    devices: Count = 1
    tflops: Positive = 100.0
    """10¹² operations per second of a device, dense, in the target's type."""
    memory_gb: Positive = 80.0
    bandwidth_gbs: Positive = 2000.0
    """Bandwidth of its memory, in GB per second."""
    utilisation: Positive = 0.35
    """Share of both that is reached."""


@section("shape")
class ShapeSettings:
    """A target's sizes, for a plan before it has been downloaded."""

    n_blocks: Count
    d_model: Count
    d_mlp: Count
    n_heads: Count
    n_kv_heads: Count
    head_dim: Count
    vocabulary: Count
    tied: bool = False
    """Whether embeddings and head are one matrix."""


@section("")
class Recipe:
    """Everything that decides a pair. Paths are relative to the working directory."""

    name: str
    target: str
    """An embedded organism such as ``couplets/planner``, a model folder, or a hub id."""
    point: Annotated[str, _READ]
    out: str
    """Folder of the run: one sub-folder a stage."""
    corpus: CorpusSettings | None = None
    """Where documents come from, for a real target."""
    sample: SampleSettings = dataclasses.field(default_factory=SampleSettings)
    """How the target writes them, where ``corpus.source`` is "self"."""
    world: Annotated[str | None, _READ] = None
    """Where documents and warm-start texts come from, for an organism: an embedded world, couplets or switchboard."""
    revision: str | None = None
    """Commit, tag or branch of a target on the hub; None: its main branch."""
    dtype: Annotated[str, one_of(*DTYPES, AUTO), _READ] = "float32"
    """Type of the target's weights and of the stored activations: float32, bfloat16 or float16; auto: bfloat16, but
    float32 on a CPU that would emulate it."""
    quantization: Annotated[Annotated[str, one_of(*QUANTIZATIONS)] | None, _READ] = None
    """8bit or 4bit, by bitsandbytes; None: the weights as they are."""
    seed: Annotated[Seed, _READ] = 0
    extract: ExtractSettings = dataclasses.field(default_factory=ExtractSettings)
    """How a world's documents are read."""
    describe: DescribeSettings = dataclasses.field(default_factory=DescribeSettings)
    """What a world's describer knows."""
    describer: DescriberSettings = dataclasses.field(default_factory=DescriberSettings)
    """Who writes the texts of a corpus's activations."""
    texts: TextSettings = dataclasses.field(default_factory=TextSettings)
    """How many of these texts there are."""
    pair: PairSettings = dataclasses.field(default_factory=PairSettings)
    warmstart: WarmstartSettings = dataclasses.field(default_factory=WarmstartSettings)
    joint: JointSettings = dataclasses.field(default_factory=JointSettings)
    control: bool = False
    """Whether to train the control pair too."""
    hardware: HardwareSettings = dataclasses.field(default_factory=HardwareSettings)
    """What ``--dry-run`` calculates with."""
    shape: ShapeSettings | None = None
    """The target's sizes, for ``--dry-run`` before it has been downloaded."""

    def __post_init__(self) -> None:
        Point.parse(self.point)
        if (self.world is None) == (self.corpus is None):
            refuse("world", self.world, "a world, or else a section `corpus`: documents come from one of them")
        kind, others = ("corpus", ("extract", "describe")) if self.world is None else ("world", ("describer", "texts"))
        for field in dataclasses.fields(self):
            stated = getattr(self, field.name)
            if field.name in others and stated != type(stated)():
                refuse(field.name, stated, f"no such section beside `{kind}`")
        if not self.writes_corpus and self.sample != SampleSettings():
            refuse("sample", self.sample, 'no such section where corpus.source is not "self"')
        if self.world is not None:
            for name in ("marker", "encoder_prompt", "decoder_template"):
                if getattr(self.pair, name) is not None:
                    refuse(f"pair.{name}", getattr(self.pair, name), "none beside `world`, which has its own")
            strata = ground_truth.load(self.world).STRATA
            if not set(self.joint.stratum_weights) <= set(strata):
                refuse("joint.stratum_weights", self.joint.stratum_weights, f"shares of {', '.join(strata)}")

    @property
    def writes_corpus(self) -> bool:
        """Whether the target writes the corpus."""
        return self.corpus is not None and self.corpus.source == SELF

    @property
    def stages(self) -> list[str]:
        """Those of ``STAGES`` that it asks for, in order."""
        asked = {"sample": self.writes_corpus, "control": self.control}
        return [stage for stage in STAGES if asked.get(stage, True)]


def load_recipe(path: str | Path, overrides: str | Sequence[str] = ()) -> Recipe:
    """Read a recipe: a YAML file, or the name of a shipped one such as ``couplets``.

    Args:
        overrides: ``section.key=value`` or ``key=value``, values in YAML.

    Raises:
        RecipeError: no such recipe, not YAML, or unknown, missing or invalid keys.
    """
    file = Path(path) if os.path.isfile(path) else SHIPPED / f"{path}.yaml"
    if not os.path.isfile(file):
        shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
        got, expected = f"no recipe {shown(str(path))}", f"a YAML file, or one of the shipped: {shipped}"
        raise RecipeError(got, expected, "name one of them")
    try:
        content = read_yaml(file)
    except ParseError as error:
        raise RecipeError(error.got, error.expected, error.fix) from error
    for assignment in [overrides] if isinstance(overrides, str) else overrides:
        override(content, assignment)
    return build(Recipe, content, str(file))
