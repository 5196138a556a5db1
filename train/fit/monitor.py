"""Evaluation during joint training: FVE, and the two differences that tell a public code from a private one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from nla.errors import ShapeError
from nla.metrics import fve_from_errors, mse
from nla.pair.encoder import strip_tags
from nla.train.fit import processes
from nla.train.fit.checkpoints import decoder_parameters, swapped
from nla.train.fit.metrics_log import MetricsLog
from nla.train.fit.reward import ORTHOGONAL, explanations

if TYPE_CHECKING:
    from nla.autoencoder import NLA


@dataclass(frozen=True)
class EvalSet:
    """Held-out activations to watch joint training on.

    Raises:
        ShapeError: the lengths differ.
    """

    vectors: Tensor
    """Activations (n, d)."""
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
    answers = processes.gathered(nla.encoder.generate(mine, samples=1, seed=seed, batch_size=batch_size).texts)
    texts = explanations(nla, answers)
    joint = errors_of(nla, held_out.vectors, texts)
    with swapped(decoder_parameters(nla), warm_decoder):
        warm = errors_of(nla, held_out.vectors, texts)
    found = {"share/eval_extracted": sum(text is not None for text in texts) / len(texts)}
    found |= by_stratum(nla, joint, held_out.strata, "fve")
    variance = nla.baselines["global"]
    for stratum in dict.fromkeys(held_out.strata):
        here = joint[torch.tensor([s == stratum for s in held_out.strata])]
        found[f"fve_global_variance/{stratum}"] = fve_from_errors(here, variance)
    found |= difference(nla, joint, warm, held_out.strata, "joint_minus_warm")
    if held_out.warm_texts is not None:
        honest = errors_of(nla, held_out.vectors, held_out.warm_texts)
        found |= by_stratum(nla, honest, held_out.strata, "honest")
    if held_out.truthful_texts is not None:
        truthful = errors_of(nla, held_out.vectors, held_out.truthful_texts)
        found |= difference(nla, truthful, joint, held_out.strata, "truthful_minus_encoder")
    if held_out.truth is not None:
        said = [strip_tags(answer, nla.config) for answer in answers]
        found |= {f"truth/{name}": float(value) for name, value in held_out.truth(said).items()}
    return found


def errors_of(nla: NLA, vectors: Tensor, texts: Sequence[str | None]) -> Tensor:
    """Error (n,) of the decoder's reconstructions from ``texts``, as it now is."""
    errors = torch.full((len(texts),), ORTHOGONAL)
    readable = [i for i, text in enumerate(texts) if text is not None]
    if readable:
        errors[readable] = mse(vectors[readable].float().cpu(), nla.decoder.decode([texts[i] or "" for i in readable]))
    return errors


def by_stratum(nla: NLA, errors: Tensor, strata: Sequence[str], name: str) -> dict[str, float]:
    """FVE of ``errors`` (n,) over the global baseline, and within each stratum that has a baseline of its own."""
    found = {f"{name}/global": fve_from_errors(errors, nla.baselines["global"])}
    for stratum in dict.fromkeys(strata):
        if stratum in nla.baselines and stratum != "global":
            here = errors[torch.tensor([s == stratum for s in strata])]
            found[f"{name}/{stratum}"] = fve_from_errors(here, nla.baselines[stratum])
    return found


def difference(nla: NLA, a: Tensor, b: Tensor, strata: Sequence[str], name: str) -> dict[str, float]:
    """FVE of errors ``a`` minus FVE of errors ``b``, globally and by stratum: a ratio would pass through zero."""
    first, second = by_stratum(nla, a, strata, "x"), by_stratum(nla, b, strata, "x")
    return {f"difference/{name}/{key.removeprefix('x/')}": first[key] - second[key] for key in first}


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
        found = evaluate(self.nla, self.held_out, self.warm_decoder, self.seed, self.batch_size)
        self.log.write(step, "eval", found)
