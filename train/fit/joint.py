"""Joint training: the encoder by GRPO on the decoder's reward, the decoder by supervision on the same rollouts."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from nla.errors import ArgumentError, ShapeError
from nla.metrics import rescale
from nla.models.generate import generate
from nla.models.hooks import inject
from nla.models.lora import in_type_of
from nla.models.merged import MergedCopy, can_merge
from nla.pair.roles import ENCODER_ADAPTER
from nla.train.fit import processes
from nla.train.fit.checkpoints import (
    AtomicCheckpoints,
    claim_run,
    decoder_parameters,
    encoder_parameters,
    keep_float32,
    snapshot,
)
from nla.train.fit.log_probs import LogProbs, SharedPrompt, answer_log_probs, shares_prompt, take_prompts
from nla.train.fit.loop import PLAIN, OptimizerTime, Phases, checkpointed, fit, on_cpu, own_forward
from nla.train.fit.metrics_log import MetricsLog
from nla.train.fit.monitor import EvalSet, Monitor
from nla.train.fit.reward import DecoderReward
from nla.train.fit.settings import JointSettings
from nla.train.fit.vectors import Chosen, Vectors, check_directions, draw_by_weight
from nla.train.fit.warmstart import check_memory, check_pairs
from nla.train.schema import deciding

if TYPE_CHECKING:
    from nla.autoencoder import NLA

__all__ = ["EvalSet", "JointSettings", "JointTrainer", "train_joint"]

ROLLOUTS_ON_CPU = 256
"""Rollouts that are sampled together on a CPU: from here on more of them are hardly faster."""
REFERENCE = "ref"
"""The adapter that TRL copies the encoder to, for the KL."""


def draw_weights(strata: Sequence[str], shares: dict[str, float]) -> Float[Tensor, " n"]:
    """Weight of each row in a draw: named strata get their shares, the other rows divide the rest evenly.

    Raises:
        ArgumentError: a share names a stratum that no row has.
    """
    unknown = sorted(set(shares) - set(strata))
    if unknown:
        known = ", ".join(sorted(set(strata)))
        raise ArgumentError(f"stratum_weights for {', '.join(unknown)}", f"among {known}", "rename or remove them")
    sizes = Counter(strata)
    n_rest = sum(size for stratum, size in sizes.items() if stratum not in shares)
    rest = (1 - sum(shares.values())) / max(n_rest, 1)
    weight_of = {stratum: shares[stratum] / size if stratum in shares else rest for stratum, size in sizes.items()}
    return torch.tensor([weight_of[stratum] for stratum in strata], dtype=torch.float64)


def draw_prompts(weights: Float[Tensor, " n"], steps: int, per_step: int, seed: int) -> Int[Tensor, "steps per_step"]:
    """Rows of each step, distinct within a step where there are enough; steps draw independently.

    A longer run begins with the draws of a shorter one.
    """
    replacement = int((weights > 0).sum()) < per_step
    drawn = [
        draw_by_weight(weights, per_step, replacement, torch.Generator().manual_seed(seed * 1_000_003 + i))
        for i in range(steps)
    ]
    return torch.stack(drawn)


@contextlib.contextmanager
def marker_forbidden(model: PreTrainedModel, marker_id: int) -> Iterator[None]:
    """While active, the language-model head gives the marker no probability.

    It acts through the head's bias, so that sampling and the log-probabilities of policy and reference, which TRL takes
    from the head's weight and bias directly, all see the same distribution. Where logits are soft-capped at ±c, as in
    Gemma 2 (c = 30), the marker gets −c: at most e^(−2c) of what the likeliest token has when that is at the cap.
    """
    head: Any = model.get_output_embeddings()
    before = head.bias
    lowest = torch.finfo(head.weight.dtype).min / 16
    bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype, device=head.weight.device)
    if before is not None:
        bias.copy_(before.detach())
    bias[marker_id] = lowest
    head.bias = nn.Parameter(bias, requires_grad=False)
    try:
        yield
    finally:
        head.bias = before


class JointTrainer(AtomicCheckpoints, GRPOTrainer):
    """TRL's GRPOTrainer with activations injected in rollouts and log-probabilities, on a constant-length prompt.

    Rows carry the number of their activation; the vectors follow them through TRL's shuffles and chunks.
    """

    def __init__(self, nla: NLA, vectors: Vectors, reward: DecoderReward, **kwargs: Any) -> None:
        self.trained = encoder_parameters(nla) | decoder_parameters(nla)
        self.marker_id, self.marker_position = nla.config.injection.marker_id, nla.marker_position
        self.layer = nla.config.injection.layer
        self.prompt: list[int] = nla.prompt_ids.reshape(-1).tolist()
        self.vectors, self.norm, self.at_device = vectors, nla.config.injection.norm, nla.device
        self.reward = reward
        self.rows_in_use: Tensor = torch.empty(0, nla.config.d_model)
        self.phases, self.n_rollouts = Phases(nla.device), 0
        self.base, self.pad_id = nla.base_of("encoder"), nla.pad_id
        super().__init__(model=nla.model, reward_funcs=[reward], processing_class=nla.tokenizer, **kwargs)  # pyright: ignore
        keep_float32(self.trained)
        self.eos_token_ids = nla.encoder.end_ids  # the pair's; TRL takes the model's
        self.merged = MergedCopy(nla.model, ENCODER_ADAPTER) if can_merge(nla.model, ENCODER_ADAPTER) else None
        self.shares_prompt = shares_prompt(self.base, self.args.gradient_checkpointing)

        def of_answers(
            prompt: SharedPrompt, owners: Tensor, input_ids: Tensor, attention_mask: Tensor, **_: Any
        ) -> LogProbs:
            return answer_log_probs(self.base, prompt, owners, input_ids, attention_mask.bool(), self.temperature)

        take_prompts(self.base, of_answers)

    def injected(self, rows: Sequence[int]) -> Float[Tensor, "b d"]:
        """The vectors of ``rows`` at the injection norm, where the model is."""
        return rescale(self.vectors[torch.tensor(rows)], self.norm).to(self.at_device)

    @contextlib.contextmanager
    def using(self, vectors: Float[Tensor, "b d"]) -> Iterator[None]:
        """Forward passes in the block are over batches whose rows belong to ``vectors``."""
        before, self.rows_in_use = self.rows_in_use, vectors
        try:
            yield
        finally:
            self.rows_in_use = before

    def injecting(
        self, vectors: Float[Tensor, "b d"], padding: Int[Tensor, " b"] | int = 0, model: Any = None
    ) -> contextlib.AbstractContextManager[None]:
        """Inject ``vectors`` (b, d) at the prompt's marker, in the policy or a copy of it."""
        positions = torch.full((len(vectors),), self.marker_position) + padding
        policy: Any = self.model if model is None else model
        return inject(policy, vectors, positions.to(vectors.device), self.layer)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        policy: Any = self.model
        with marker_forbidden(policy, self.marker_id), self.phases.timed("backward"):
            return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if seconds := self.phases.take():  # of a step's end; the run's own summary has none
            whole = sum(seconds.values())
            logs["rollouts_per_s"] = self.n_rollouts * processes.count() / whole
            logs |= {f"phase/{name}": spent / whole for name, spent in seconds.items()}
            self.n_rollouts = 0
        super().log(logs, start_time)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.phases.timed("decoder"):
            return super()._calculate_rewards(*args, **kwargs)

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        return [self.prompt] * len(prompts), None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple[list, None]:
        with self.phases.timed("sampling"):
            return self._rollouts(len(prompt_ids)), None

    def _rollouts(self, n: int) -> list[list[int]]:
        """Token ids of ``n`` answers to the activations in use, with their end tokens."""
        size: Any = self.num_generations
        most: Any = self.max_completion_length
        vectors = self.rows_in_use[::size]
        if not torch.equal(vectors.repeat_interleave(size, dim=0), self.rows_in_use):
            raise AssertionError("rollouts of one activation stand side by side")
        model: Any = self.model
        if self.merged is not None:
            self.merged.refresh()
            model = self.merged.model
        at_once = max(1, (min(n, ROLLOUTS_ON_CPU) if self.at_device.type == "cpu" else n) // size)
        written = generate(
            model,
            [self.prompt] * len(vectors),
            ends=self.eos_token_ids,
            pad=self.pad_id,
            max_new_tokens=most,
            temperature=self.temperature,
            draws=torch.rand(n, most, dtype=torch.float64),  # of the global source, which a checkpoint keeps
            forbidden=[self.marker_id],
            intervene=lambda rows, padding: self.injecting(vectors[rows], padding, model),
            batches=list(range(len(vectors))[i : i + at_once] for i in range(0, len(vectors), at_once)),
            copies=size,
            common=self.marker_position,
        )
        self.n_rollouts += n
        return [
            row[:length] for row, length in zip(written.ids.tolist(), written.mask.sum(dim=1).tolist(), strict=True)
        ]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        vectors = self.injected([row["row"] for row in inputs])
        with self.using(vectors):
            return super()._generate_and_score_completions(inputs) | {"vectors": vectors}

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        parts = []
        for part in torch.arange(len(input_ids)).split(batch_size or len(input_ids)):
            args, rows = (model, input_ids[part], attention_mask[part], logits_to_keep), self.rows_in_use[part]
            with in_type_of(self.base), self.phases.timed("log_probs" if torch.is_grad_enabled() else "reference"):
                if self.shares_prompt:
                    parts.append(self._with_shared_prompt(*args, rows)[:2])
                else:
                    with self.injecting(rows):
                        whole = super()._get_per_token_logps_and_entropies(*args, compute_entropy=True)
                    parts.append(whole[:2])
        logps, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
        return logps, entropies if compute_entropy else None, None

    def _with_shared_prompt(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, width: int, rows: Float[Tensor, "b d"]
    ) -> LogProbs:
        vectors, owners = torch.unique(rows, dim=0, return_inverse=True)
        prompt = SharedPrompt(input_ids[0, :-width], self.marker_position, vectors, self.layer)
        answers, mask = input_ids[:, -width:], attention_mask[:, -width:]
        return model(input_ids=answers, attention_mask=mask, prompt=prompt, owners=owners)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        with self.using(inputs["vectors"]):
            return super()._compute_loss(model, inputs)

    def extra_state(self) -> dict[str, Any]:
        return self.reward.state()

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.reward.load_state(state)


def share_step(settings: JointSettings) -> tuple[int, int]:
    """Rollouts of a process in one backward pass, and the passes of a step: groups stay whole in one process.

    Raises:
        ArgumentError: the prompts or rollouts do not divide evenly, or a process has fewer groups than mini-batches.
    """
    groups, _ = processes.share(settings.prompts_per_step, "prompts_per_step")
    if groups < settings.decoder_mini_batches:
        raise ArgumentError(
            f"decoder_mini_batches={settings.decoder_mini_batches} with {groups} prompts a process",
            f"at most {groups}: groups stay whole",
            "lower decoder_mini_batches, raise prompts_per_step, or use fewer processes",
        )
    return processes.share(settings.rows, "rows", settings.rows_per_backward)


def grpo_arguments(nla: NLA, settings: JointSettings, out_dir: Path) -> GRPOConfig:
    """TRL's arguments; its defaults for precision, checkpointing, the KL and the learning rate do not fit here."""
    per_backward, passes = share_step(settings)
    return GRPOConfig(
        output_dir=str(out_dir),
        max_steps=settings.steps,
        per_device_train_batch_size=per_backward,
        gradient_accumulation_steps=passes,
        steps_per_generation=passes,
        num_iterations=1,
        num_generations=settings.group_size,
        max_completion_length=nla.config.max_new_tokens,
        temperature=settings.temperature,
        beta=settings.beta,
        loss_type="grpo",
        scale_rewards="group",
        learning_rate=settings.encoder_learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        disable_dropout=True,
        shuffle_dataset=False,
        seed=settings.seed,
        router_aux_loss_coef=0.0,  # a mixture's router is frozen, and its load is not what is trained
        gradient_checkpointing=settings.gradient_checkpointing,
        logging_steps=1,
        save_strategy="steps",
        save_steps=settings.save_every,
        use_cpu=on_cpu(nla),
        **PLAIN,
    )


def build_trainer(
    nla: NLA,
    vectors: Vectors,
    strata: Sequence[str],
    warm_texts: Sequence[str | None],
    out_dir: Path,
    settings: JointSettings,
) -> JointTrainer:
    """The trainer, with its draws, reward and both optimizers; ``nla`` gets a copy of its encoder as the reference."""
    weights = draw_weights(strata, settings.stratum_weights)
    rows = draw_prompts(weights, settings.steps, settings.prompts_per_step, settings.seed).reshape(-1).tolist()
    encoder = encoder_parameters(nla)
    return JointTrainer(
        nla,
        vectors,
        DecoderReward(nla, vectors, strata, warm_texts, weights, settings),
        args=grpo_arguments(nla, settings, out_dir),
        train_dataset=Dataset.from_dict({"prompt": [""] * len(rows), "row": rows}),
        optimizers=(
            torch.optim.AdamW(encoder.values(), lr=settings.encoder_learning_rate, weight_decay=0.0),
            None,
        ),
    )


def train_joint(
    nla: NLA,
    vectors: Vectors,
    strata: Sequence[str],
    warm_texts: Sequence[str | None],
    out_dir: str | Path,
    *,
    settings: JointSettings,
    held_out: EvalSet | None = None,
) -> dict[str, float]:
    """Train encoder and decoder of a warm-started pair together, in place; the last figures that were logged.

    Args:
        vectors: activations (n, d) to draw from; ``strata`` and ``warm_texts`` (the describer's) have one entry each.
            A text may be None: that activation is drawn for rollouts, and not replayed.
        out_dir: folder of checkpoints, ``metrics.jsonl`` and ``metrics.png``. Calling again with the same inputs
            resumes there; with more ``steps`` it goes on (``nla train`` instead begins a changed stage anew). The
            inputs include the warm start, of which the KL's reference and the warm decoder are copies.
        held_out: what to evaluate on every ``settings.eval_every`` steps.

    Raises:
        ArgumentError, ShapeError: bad inputs; also what :func:`nla.train.fit.warmstart.check_pairs` raises.
        RecipeError: ``out_dir`` holds a run that started from something else.
        WeightsError: its checkpoint is damaged.
        InterruptedTraining, StorageError: stopped; the last checkpoint is intact and ``nla`` is as before the call.
    """
    nla.require_adapters("joint training")
    check_memory(nla, settings.gradient_checkpointing)
    for name, values in (("strata", strata), ("warm_texts", warm_texts)):
        if len(values) != len(vectors):
            raise ShapeError(f"{len(values)} {name}", f"{len(vectors)}, one a vector", "pair them up")
    described = [row for row, text in enumerate(warm_texts) if text is not None]
    if described:
        check_pairs(nla, Chosen(vectors, torch.tensor(described)), [warm_texts[row] or "" for row in described])
    check_directions(vectors)
    folder, trained = Path(out_dir), encoder_parameters(nla) | decoder_parameters(nla)
    identity = {name: value for _, name, value in deciding(settings) if name != "steps"}
    with nla.role("encoder"), own_forward(nla), checkpointed(nla, settings.gradient_checkpointing):
        try:
            trainer = build_trainer(nla, vectors, strata, warm_texts, folder, settings)
            log = MetricsLog(folder / "metrics.jsonl")
            watch: list[Any] = [OptimizerTime(trainer.phases)]
            if held_out is not None:
                warm_decoder = snapshot(decoder_parameters(nla))
                at_once = settings.rows // processes.count()  # what a rollout holds at once: it fits the memory
                watch.append(Monitor(nla, held_out, warm_decoder, log, settings.eval_every, settings.seed, at_once))
            claim_run(folder, nla, identity, vectors, trained, [*(text or "" for text in warm_texts), *strata])
            return fit(
                trainer,
                folder,
                settings.steps,
                "joint training",
                ("reward", "kl", "length", "rollouts_per_s"),
                tuple(watch),
            )
        finally:
            if REFERENCE in nla.model.peft_config:
                nla.model.delete_adapter(REFERENCE)
