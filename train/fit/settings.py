"""Settings of joint training: plain values, importable without the training libraries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

from nla.errors import ArgumentError

FRUGAL = ("rows_per_backward", "gradient_checkpointing", "eval_every", "save_every")
"""Settings of training that decide its memory and its reports, and its result only within rounding."""
REWARDS = ("neg_log_mse", "neg_mse")


def refuse(name: str, value: Any, expected: str) -> NoReturn:
    """Raise the ArgumentError of a recipe's value ``name`` that is not as ``expected``."""
    raise ArgumentError(f"{name} = {value!r}", expected, "change it in the recipe")


def require_least(section: str, settings: Any, **least: float) -> None:
    """Refuse fields of ``settings`` that are below the bound given for them, or NaN."""
    for name, bound in least.items():
        if not getattr(settings, name) >= bound:
            refuse(f"{section}.{name}", getattr(settings, name), f"at least {bound}")


def require_positive(section: str, settings: Any, *names: str) -> None:
    """Refuse the named fields of ``settings`` where they are not above 0."""
    for name in names:
        if not getattr(settings, name) > 0:
            refuse(f"{section}.{name}", getattr(settings, name), "above 0")


def require_seed(name: str, seed: int) -> None:
    """Refuse a seed that one of the random generators would not take."""
    if not 0 <= seed < 2**32 - 1:
        refuse(name, seed, "between 0 and 2 ** 32 - 2")


@dataclass(frozen=True)
class JointSettings:
    """How encoder and decoder are trained together.

    Raises:
        ArgumentError: a value is out of range.
    """

    steps: int = 200
    """Updates of the encoder."""
    prompts_per_step: int = 48
    """Activations drawn for each update."""
    group_size: int = 8
    """Rollouts of each activation; their mean reward is the baseline."""
    encoder_learning_rate: float = 5e-4
    decoder_learning_rate: float = 1e-3
    """Of the decoder's adapter and head alike."""
    beta: float = 0.01
    """Weight of the KL to the warm start in the encoder's loss; 0 keeps no reference."""
    temperature: float = 1.0
    """Of the rollouts' sampling; log-probabilities are taken at the same."""
    stratum_weights: dict[str, float] = field(default_factory=dict)
    """Share of the draws that each named stratum gets; the unnamed ones divide the rest evenly by row."""
    reward: str = "neg_log_mse"
    """``neg_log_mse`` (faster) or ``neg_mse``; the decoder's loss is its negative."""
    replay_fraction: float = 0.5
    """Warm-start pairs for every rollout in each decoder mini-batch: they keep the code public. 0: none."""
    decoder_mini_batches: int = 4
    """Updates of the decoder in each step, over whole groups."""
    rows_per_backward: int | None = None
    """Rollouts of a process in one backward pass of the encoder, for memory; None: all of them."""
    gradient_checkpointing: bool = False
    """Whether to compute activations again in the backward pass, for memory."""
    eval_every: int = 10
    """Steps between evaluations."""
    save_every: int = 20
    """Steps between checkpoints."""
    seed: int = 0

    def __post_init__(self) -> None:
        least = dict(steps=1, prompts_per_step=1, group_size=2, decoder_mini_batches=1, eval_every=1, save_every=1)
        require_least("joint", self, **least, beta=0, replay_fraction=0)
        require_positive("joint", self, "encoder_learning_rate", "decoder_learning_rate", "temperature")
        require_seed("joint.seed", self.seed)
        if self.reward not in REWARDS:
            self._refuse("reward", " or ".join(REWARDS))
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
