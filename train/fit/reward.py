"""The reward of a rollout: how well the live decoder reconstructs from it. The decoder learns in the same call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nla.errors import ArgumentError
from nla.metrics import fve_from_errors, mse
from nla.pair.encoder import parse
from nla.pair.fidelity import ORTHOGONAL, rows_by_stratum
from nla.text.tokens import plain_ids
from nla.train.fit import processes
from nla.train.fit.checkpoints import decoder_parameters
from nla.train.fit.settings import JointSettings
from nla.train.fit.vectors import Vectors, draw_by_weight
from nla.train.pair_config import template_marks

if TYPE_CHECKING:
    from nla.autoencoder import NLA

LEAST_ERROR = 1e-4
"""Errors below this count as this, so that the logarithm has a floor."""
TOKENS_TOGETHER = 4096
"""Decoder prompts of like length that one pass takes, in tokens: little of it is padding."""
MAX_GRAD_NORM = 1.0
"""The decoder's gradients are clipped to this norm."""


def explanations(nla: NLA, answers: Sequence[str]) -> list[str | None]:
    """The explanation in each answer; None where there is none, or the decoder's vocabulary cannot spell it.

    Words without a space between them, which a policy may write, read as an unknown word; control tokens are no words.
    Nor is what the decoder's template is made of: a code in its tags would be private.
    """
    texts = [parse(answer, nla.config) for answer in answers]
    private = template_marks(nla.config.decoder_template)
    with_text = [i for i, text in enumerate(texts) if text is not None]
    if with_text:
        added = nla.tokenizer.added_tokens_decoder.items()
        refused = {token_id for token_id, token in added if token.special} | set(nla.tokenizer.all_special_ids)
        all_ids = plain_ids(nla.tokenizer, [texts[i] or "" for i in with_text])
        for i, ids in zip(with_text, all_ids, strict=True):
            if not ids or not refused.isdisjoint(ids) or any(mark in (texts[i] or "") for mark in private):
                texts[i] = None
    return texts


def reward_of(error: Float[Tensor, " n"], kind: str) -> Float[Tensor, " n"]:
    """Reward of mean squared errors in [0, 4]: −log or −, higher is better."""
    return -error.clamp(min=LEAST_ERROR).log() if kind == "neg_log_mse" else -error


class DecoderReward:
    """Scores rollouts with the live decoder and takes its supervised steps on them; a TRL reward function.

    One forward pass serves both: the loss of a decoder mini-batch is minus the reward of its rollouts, together with
    warm-start pairs replayed so that the decoder goes on reading what the describer writes. No gradient reaches the
    encoder. Mini-batches hold whole groups, so the rollouts of one activation are scored by the same decoder.
    """

    __name__ = "reconstruction"

    def __init__(
        self,
        nla: NLA,
        vectors: Vectors,
        strata: Sequence[str],
        warm_texts: Sequence[str | None],
        draw: Float[Tensor, " n"],
        s: JointSettings,
    ) -> None:
        """``vectors`` (n, d) with their ``strata`` and ``warm_texts``; ``draw`` (n,) weighs the rows for replay.

        Raises:
            ArgumentError: pairs are to be replayed, and no row that can be drawn has a text.
        """
        self.nla, self.vectors, self.strata, self.warm_texts = nla, vectors, strata, warm_texts
        self.draw, self.settings = draw * torch.tensor([text is not None for text in warm_texts]), s
        if s.replay_fraction and not self.draw.any():
            got = f"joint.replay_fraction = {s.replay_fraction} without warm-start texts"
            raise ArgumentError(got, "texts of some of the rows that are drawn", "describe them, or set it to 0")
        self.parameters = list(decoder_parameters(nla).values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=s.decoder_learning_rate, weight_decay=0.0)
        self.n_calls = 0
        self.generator = torch.Generator().manual_seed(s.seed)
        self.ends = set(nla.encoder.end_ids)

    def __call__(
        self, completion_ids: list[list[int]], row: list[int], log_metric: Callable[[str, float], None], **_: Any
    ) -> list[float]:
        """Rewards of rollouts ``completion_ids``, group by group, of the activations ``row``."""
        s, rows = self.settings, torch.tensor(row)
        self.generator = self.next_generator()
        texts = self.read(completion_ids)
        errors = torch.full((len(texts),), ORTHOGONAL)
        groups = torch.randperm(len(texts) // s.group_size, generator=self.generator)
        losses, norms, skipped = [], [], 0
        with self.nla.role("decoder"), torch.enable_grad():
            for part in groups.tensor_split(s.decoder_mini_batches):
                members = (part[:, None] * s.group_size + torch.arange(s.group_size)).reshape(-1)
                readable = torch.tensor([i for i in members.tolist() if texts[i] is not None], dtype=torch.int64)
                before, loss, norm = self.update(
                    rows[readable], [texts[i] or "" for i in readable.tolist()], len(members)
                )
                errors[readable] = before
                losses.append(loss)
                norms.append(norm)
                skipped += not math.isfinite(norm)
        log_metric("decoder_loss", sum(losses) / len(losses))
        log_metric("decoder_grad_norm", sum(norms) / len(norms))
        log_metric("decoder_skipped_updates", float(skipped))
        log_metric("share/decoder_clipped", sum(norm > MAX_GRAD_NORM for norm in norms) / len(norms))
        log_metric("share/extracted", sum(text is not None for text in texts) / len(texts))
        self._log_fve(rows, errors, log_metric)
        return reward_of(errors, s.reward).tolist()

    def read(self, completion_ids: list[list[int]]) -> list[str | None]:
        """The explanation in each rollout, or None; a rollout cut off before its end has none."""
        answers = [ids[:-1] if ids and ids[-1] in self.ends else [] for ids in completion_ids]
        texts = self.nla.tokenizer.batch_decode(answers, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return explanations(self.nla, texts)

    def update(
        self, rows: Int[Tensor, " m"], texts: list[str], n_rollouts: int
    ) -> tuple[Float[Tensor, " m"], float, float]:
        """One step of the decoder on readable rollouts ``texts`` of activations ``rows`` and on replayed pairs.

        To be called in the role "decoder".

        Returns:
            Errors (m,) of the rollouts before the step, the loss, and the gradient's norm. A step whose gradient is not
            finite is left out; the norm then says so.
        """
        n_replayed = round(self.settings.replay_fraction * n_rollouts)
        if n_replayed:
            replayed = draw_by_weight(self.draw, n_replayed, True, self.generator)
            rows, texts = torch.cat([rows, replayed]), texts + [self.warm_texts[int(i)] or "" for i in replayed]
        n_scored, n_texts = len(texts) - n_replayed, processes.total(len(texts))
        if not n_texts:
            return torch.empty(0), 0.0, 0.0
        errors = self.errors_of(rows, texts)
        if not processes.every(bool(torch.isfinite(errors).all())):
            return torch.full((n_scored,), ORTHOGONAL), math.nan, math.nan
        # Each process holds its share of the sum over all texts; the sum of their gradients is that of the mean.
        loss = -reward_of(errors, self.settings.reward).sum() / n_texts
        self.optimizer.zero_grad(set_to_none=True)
        if texts:
            loss.backward()
        processes.sum_gradients(self.parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return errors[:n_scored].detach().cpu(), processes.total(float(loss.detach())), norm

    def errors_of(self, rows: Int[Tensor, " m"], texts: list[str]) -> Float[Tensor, " m"]:
        """Errors of the live decoder on ``texts`` of activations ``rows``; NaN where it gives no vector."""
        if not texts:
            return torch.empty(0)
        predicted = self.nla.decoder.predict(texts, max_tokens_per_batch=TOKENS_TOGETHER)
        if not torch.isfinite(predicted).all():
            return torch.full((len(texts),), math.nan)
        return mse(self.vectors[rows].float().to(predicted.device), predicted)

    def _log_fve(self, rows: Tensor, errors: Tensor, log_metric: Callable[[str, float], None]) -> None:
        for stratum, members in sorted(rows_by_stratum([self.strata[int(i)] for i in rows]).items()):
            if stratum in self.nla.baselines:
                log_metric(f"rollout_fve/{stratum}", fve_from_errors(errors[members], self.nla.baselines[stratum]))

    def next_generator(self) -> torch.Generator:
        """The random numbers of one call: others in each process and call, so that a resumed run draws the same."""
        self.n_calls += 1
        key = (self.settings.seed * 1_000_003 + self.n_calls) * 4099 + processes.rank()
        return torch.Generator().manual_seed(key)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights."""
        return {"optimizer": self.optimizer.state_dict(), "n_calls": self.n_calls}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.n_calls = state["n_calls"]
