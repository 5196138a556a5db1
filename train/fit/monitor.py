"""Evaluation during joint training: FVE, and the two differences that tell a public code from a private one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback

from nla.errors import ShapeError
from nla.metrics import fve_from_errors
from nla.pair.encoder import strip_tags
from nla.pair.fidelity import fve_by_stratum, fve_gain_by_stratum, reconstruction_errors, rows_by_stratum
from nla.train.fit import processes
from nla.train.fit.checkpoints import decoder_parameters, swapped
from nla.train.fit.metrics_log import MetricsLog
from nla.train.fit.reward import explanations

if TYPE_CHECKING:
    from nla.autoencoder import NLA


@dataclass(frozen=True)
class EvalSet:
    """Held-out activations to watch joint training on.

    Raises:
        ShapeError: the lengths differ.
    """

    vectors: Float[Tensor, "n d"]
    """Activations."""
    strata: Sequence[str]
    """Kind of position of each."""
    warm_texts: Sequence[str] | None = None
    """The describer's text of each: the joint decoder's FVE on them is ``honest/…``."""
    truthful_texts: Sequence[str] | None = None
    """A truthful reader's text of each, where there is one."""
    truth: Callable[[list[str]], Mapping[str, float]] | None = None
    """From the sampled explanations, in order, of an unreadable one what there is of it, to figures: ``truth/…``."""

    def __post_init__(self) -> None:
        for name in ("strata", "warm_texts", "truthful_texts"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.vectors):
                raise ShapeError(f"{len(values)} {name}", f"{len(self.vectors)}, one a vector", "pair them up")


def evaluate(
    nla: NLA, held_out: EvalSet, warm_decoder: dict[str, Tensor], seed: int, batch_size: int = 512
) -> dict[str, float]:
    """Figures of the encoder's sampled explanations (one each, temperature 1) and of the decoder.

    ``fve/…`` has each stratum over its own baseline and ``global`` over the global one; ``fve_global_variance/…`` has
    the strata over the global one. ``difference/joint_minus_warm``: FVE of the joint minus the warm-start decoder on
    the encoder's texts; ``difference/truthful_minus_encoder``: FVE of a truthful reader's minus the encoder's texts
    under the joint decoder; ``honest/…``: FVE of the joint decoder on warm-start texts. An answer without an
    explanation counts as a vector at right angles.
    """
    mine = processes.share_of(held_out.vectors)
    seeds = processes.share_of([seed * 1_000_003 + number for number in range(len(held_out.vectors))])
    answers = processes.gathered(nla.encoder.generate(mine, samples=1, seed=seeds, batch_size=batch_size).texts)
    texts = explanations(nla, answers)
    joint = errors_of(nla, held_out.vectors, texts)
    with swapped(decoder_parameters(nla), warm_decoder):
        warm = errors_of(nla, held_out.vectors, texts)
    strata, baselines = held_out.strata, nla.baselines
    figures = {"share/eval_extracted": sum(text is not None for text in texts) / len(texts)}
    figures |= _under("fve", fve_by_stratum(joint, strata, baselines))
    for stratum, rows in rows_by_stratum(strata).items():
        figures[f"fve_global_variance/{stratum}"] = fve_from_errors(joint[rows], baselines["global"])
    figures |= _under("difference/joint_minus_warm", fve_gain_by_stratum(joint, warm, strata, baselines))
    if held_out.warm_texts is not None:
        honest = errors_of(nla, held_out.vectors, held_out.warm_texts)
        figures |= _under("honest", fve_by_stratum(honest, strata, baselines))
    if held_out.truthful_texts is not None:
        truthful = errors_of(nla, held_out.vectors, held_out.truthful_texts)
        gain = fve_gain_by_stratum(truthful, joint, strata, baselines)
        figures |= _under("difference/truthful_minus_encoder", gain)
    if held_out.truth is not None:
        said = [strip_tags(answer, nla.config) for answer in answers]
        figures |= {f"truth/{name}": float(value) for name, value in held_out.truth(said).items()}
    return figures


def errors_of(nla: NLA, vectors: Float[Tensor, "n d"], texts: Sequence[str | None]) -> Float[Tensor, " n"]:
    """Error of the decoder's reconstructions from ``texts``, as it now is."""
    readable = [text for text in texts if text is not None]
    predicted = nla.decoder.decode(readable) if readable else torch.empty(0, vectors.shape[1])
    return reconstruction_errors(vectors, predicted, [text is not None for text in texts])


def _under(name: str, by_stratum: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}/{stratum}": value for stratum, value in by_stratum.items()}


class Monitor(TrainerCallback):
    """Evaluates before the first step, every ``every`` steps, and after the last."""

    def __init__(
        self,
        nla: NLA,
        held_out: EvalSet,
        warm_decoder: dict[str, Tensor],
        log: MetricsLog,
        every: int,
        seed: int,
        batch_size: int = 512,
    ) -> None:
        self.nla, self.held_out, self.warm_decoder = nla, held_out, warm_decoder
        self.log, self.every, self.seed, self.batch_size = log, every, seed, batch_size

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._evaluate(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._evaluate(state.global_step)

    def _evaluate(self, step: int) -> None:
        figures = evaluate(self.nla, self.held_out, self.warm_decoder, self.seed, self.batch_size)
        self.log.write(step, "eval", figures)
