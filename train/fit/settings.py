"""Settings of joint training: plain values, importable without the training libraries."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, NoReturn

from pydantic import Field

from nla.train.schema import NOTHING, Count, NotNegative, Number, Positive, Seed, deciding, one_of, refuse, section

REWARDS = ("neg_log_mse", "neg_mse")


@section("warmstart", decides="warmstart")
class FitSettings:
    """How an encoder or a decoder is trained on pairs of activations and texts.

    Raises:
        ArgumentError: a value is out of range.
    """

    steps: Count
    batch_size: Count
    learning_rate: Positive
    seed: Seed = 0
    head_learning_rate: Positive | None = None
    """Learning rate of the decoder's head; None: that of the rest."""
    eval_every: Annotated[Count, NOTHING] = 100
    """Steps between evaluations."""
    save_every: Annotated[Count, NOTHING] = 200
    """Steps between checkpoints."""
    rows_per_backward: Annotated[int | None, NOTHING] = None
    """Rows of a process in one backward pass, for memory; None: all of its share of the batch."""
    gradient_checkpointing: Annotated[bool, NOTHING] = False
    """Whether to compute activations again in the backward pass, for memory."""

    def deciding(self) -> dict[str, float]:
        """What decides the result, and not only its memory and its reports."""
        return {name: value for _, name, value in deciding(self) if value is not None}


@section("joint", decides="joint")
class JointSettings:
    """How encoder and decoder are trained together.

    Raises:
        ArgumentError: a value is out of range.
    """

    steps: Count = 200
    """Updates of the encoder."""
    prompts_per_step: Count = 48
    """Activations drawn for each update."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Rollouts of each activation; their mean reward is the baseline."""
    encoder_learning_rate: Positive = 5e-4
    decoder_learning_rate: Positive = 1e-3
    """Learning rate of the decoder's adapter and head."""
    beta: NotNegative = 0.01
    """Weight of the KL to the warm start in the encoder's loss; 0 keeps no reference."""
    temperature: Positive = 1.0
    """Temperature of the rollouts' sampling; log-probabilities are taken at the same one."""
    stratum_weights: dict[str, Number] = field(default_factory=dict)
    """Share of the draws that each named stratum gets; the unnamed ones divide the rest evenly by row."""
    reward: Annotated[str, one_of(*REWARDS)] = "neg_log_mse"
    """``neg_log_mse`` (faster) or ``neg_mse``; the decoder's loss is its negative."""
    replay_fraction: NotNegative = 0.5
    """Warm-start pairs for every rollout in each decoder mini-batch: they keep the code public. 0: none."""
    decoder_mini_batches: Count = 4
    """Updates of the decoder in each step, over whole groups."""
    rows_per_backward: Annotated[int | None, NOTHING] = None
    """Rollouts of a process in one backward pass of the encoder, for memory; None: all of them."""
    gradient_checkpointing: Annotated[bool, NOTHING] = False
    """Whether to compute activations again in the backward pass, for memory."""
    eval_every: Annotated[Count, NOTHING] = 10
    """Steps between evaluations."""
    save_every: Annotated[Count, NOTHING] = 20
    """Steps between checkpoints."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.decoder_mini_batches > self.prompts_per_step:
            self._refuse(
                "decoder_mini_batches", f"at most prompts_per_step = {self.prompts_per_step}: groups stay whole"
            )
        if min(self.stratum_weights.values(), default=0) < 0 or sum(self.stratum_weights.values()) > 1 + 1e-9:
            self._refuse("stratum_weights", "shares between 0 and 1 that sum to 1 at most")
        per_backward = self.rows if self.rows_per_backward is None else self.rows_per_backward
        if per_backward < 1 or self.rows % per_backward:
            self._refuse("rows_per_backward", f"a divisor of prompts_per_step × group_size = {self.rows}")

    def _refuse(self, name: str, expected: str) -> NoReturn:
        refuse(f"joint.{name}", getattr(self, name), expected)

    @property
    def rows(self) -> int:
        """Rollouts in one step."""
        return self.prompts_per_step * self.group_size
