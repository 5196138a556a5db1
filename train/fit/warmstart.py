"""Warm start: the encoder learns to write the describer's texts, the decoder to read them, before they meet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from nla.errors import ArgumentError, ConfigError, ShapeError
from nla.metrics import mse, rescale
from nla.models.hooks import inject
from nla.models.lora import in_type_of
from nla.text.tokens import plain_ids
from nla.train.fit import processes
from nla.train.fit.checkpoints import (
    AtomicCheckpoints,
    claim_run,
    decoder_parameters,
    encoder_parameters,
    head_parameters,
    keep_float32,
)
from nla.train.fit.log_probs import SharedPrompt, answer_log_probs, shares_prompt, take_prompts
from nla.train.fit.loop import PLAIN, checkpointed, fit, on_cpu, own_forward
from nla.train.fit.settings import FitSettings
from nla.train.fit.vectors import Joined, Vectors, check_directions

if TYPE_CHECKING:
    from nla.autoencoder import NLA

IGNORED = -100
Pairs = tuple[Vectors, list[str]]
"""Activations (n, d) with a text for each."""
Half = Literal["encoder", "decoder"]
HALVES: tuple[Half, ...] = ("encoder", "decoder")


def epoch_rows(n: int, total: int, seed: int) -> Int[Tensor, " total"]:
    """``total`` row numbers below ``n``: whole shuffled passes; a longer draw begins with a shorter one."""
    passes = [
        torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + i)) for i in range(-(-total // n))
    ]
    return torch.cat(passes)[:total]


def write_ids(nla: NLA, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of whole answers: the opening tag, the explanation, the closing tag, the end of turn.

    Raises:
        ConfigError: neither tokenizer nor target has a token that ends a turn.
    """
    config, tokenizer, ends = nla.config, nla.tokenizer, nla.encoder.end_ids
    if not ends:
        raise ConfigError(
            "a tokenizer and a target without an end token",
            "a token that ends an answer: training writes it, and sampling stops at it",
            "set the tokenizer's eos_token, or eos_token_id in the target's generation_config.json",
        )
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    whole = [f"{config.explanation_open}{text}{config.explanation_close}" for text in texts]
    return [[*ids, end] for ids in plain_ids(tokenizer, whole)]


def check_pairs(nla: NLA, vectors: Vectors, texts: list[str]) -> None:
    """Refuse pairs that cannot be trained on.

    Raises:
        ShapeError: the vectors are not (n, d_model), or there is not one text for each.
        NonFiniteError: a vector holds NaN, infinity, or only zeros.
        EmptyTextError, ContextLengthError, VocabularyError: the decoder cannot read a text.
    """
    if len(vectors.shape) != 2 or vectors.shape[1] != nla.config.d_model or len(vectors) != len(texts) or not texts:
        raise ShapeError(
            f"vectors of {tuple(vectors.shape)} and {len(texts)} texts",
            f"(n, {nla.config.d_model}) and n texts, n > 0",
            "pair every activation with one text, from this pair's own target",
        )
    check_directions(vectors)
    nla.decoder.prompt_rows(list(dict.fromkeys(texts)))


def check_memory(nla: NLA, gradient_checkpointing: bool) -> None:
    """Refuse to compute blocks again in the backward pass, where an injection after a block would be left out.

    Raises:
        ArgumentError: both are asked for.
    """
    if gradient_checkpointing and nla.config.injection.layer is not None:
        raise ArgumentError(
            f"gradient_checkpointing with activations that are added after block {nla.config.injection.layer}",
            "one of them: only an injection in place of an embedding outlives the forward pass",
            "set gradient_checkpointing to false",
        )


class EncoderCollator:
    """Rows of ``{"row": i}`` → input_ids (b, t), labels (b, t) over the answer only, vectors (b, d) for the marker.

    The prompt has a constant length and answers are padded on the right, so the attention mask is all ones: causality
    keeps real positions exact, and the fast attention kernel stays.
    """

    def __init__(self, nla: NLA, vectors: Vectors, texts: list[str]) -> None:
        self.prompt = nla.prompt_ids.cpu().reshape(-1)
        self.answers = [torch.tensor(ids) for ids in write_ids(nla, texts)]
        self.vectors, self.norm = vectors, nla.config.injection.norm
        self.pad_id = nla.pad_id

    def __call__(self, features: list[dict[str, int]]) -> dict[str, Tensor]:
        rows = [feature["row"] for feature in features]
        answers = [self.answers[row] for row in rows]
        padded = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=self.pad_id)
        labels = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORED)
        prompt = self.prompt.expand(len(rows), -1)
        input_ids = torch.cat([prompt, padded], dim=1)
        return {
            "input_ids": input_ids,
            "labels": torch.cat([torch.full_like(prompt, IGNORED), labels], dim=1),
            "attention_mask": torch.ones_like(input_ids),
            "vectors": rescale(self.vectors[torch.tensor(rows)], self.norm),
        }


class OfTokens(NamedTuple):
    """What TRL's loss takes of a forward pass with its fused language-model head, of each token."""

    log_probs: Float[Tensor, "b t"]
    entropy: Float[Tensor, "b t"]
    is_top1: Float[Tensor, "b t"]
    label_mask: Bool[Tensor, "b t"]
    """Where there is a label; the other values are 0 elsewhere."""


class EncoderTrainer(AtomicCheckpoints, SFTTrainer):
    """TRL's SFTTrainer with the activations injected at the marker.

    The prompt up to the marker is the same for all rows, and computed once where the target's blocks allow it.
    """

    def __init__(self, nla: NLA, **kwargs: Any) -> None:
        self.trained, self.marker_position = encoder_parameters(nla), nla.marker_position
        self.prompt = nla.prompt_ids.reshape(-1)
        self.pair_model, self.base, self.layer = nla.model, nla.base_of("encoder"), nla.config.injection.layer
        super().__init__(model=nla.model, processing_class=nla.tokenizer, **kwargs)  # pyright: ignore
        keep_float32(self.trained)
        self.shares_prompt = shares_prompt(self.base, self.args.gradient_checkpointing)

        def of_answers(prompt: SharedPrompt, input_ids: Tensor, labels: Tensor, **_: Any) -> OfTokens:
            answers, labels = (ids[:, len(prompt.ids) :] for ids in (input_ids, labels))
            mask, owners = labels != IGNORED, torch.arange(len(labels), device=labels.device)
            return OfTokens(*answer_log_probs(self.base, prompt, owners, answers, mask, 1.0), mask)

        take_prompts(self.base, of_answers)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        vectors = inputs.pop("vectors")
        positions = torch.full((len(vectors),), self.marker_position, device=vectors.device)
        with in_type_of(self.base):  # ``model`` may be wrapped, for several processes
            if self.shares_prompt:
                prompt = SharedPrompt(self.prompt.to(vectors.device), self.marker_position, vectors, self.layer)
                return super().compute_loss(model, inputs | {"prompt": prompt}, *args, **kwargs)
            with inject(self.pair_model, vectors, positions, self.layer):
                return super().compute_loss(model, inputs, *args, **kwargs)


class DecoderModule(nn.Module):
    """The decoder as the module that a plain Trainer wants: token ids and vectors in, a loss out."""

    def __init__(self, nla: NLA) -> None:
        super().__init__()
        self.model, self.head, self._decode = nla.model, nla.head, nla.decode_ids

    def forward(
        self, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"], vectors: Float[Tensor, "b d"]
    ) -> dict[str, Tensor]:
        """``loss``: mean squared error of the directions, 2(1 − cosine)."""
        return {"loss": mse(vectors, self._decode(input_ids, attention_mask)).mean()}


class DecoderCollator:
    """Rows of ``{"row": i}`` → input_ids (b, t) and attention_mask (b, t) of decoder prompts, vectors (b, d)."""

    def __init__(self, nla: NLA, vectors: Vectors, texts: list[str]) -> None:
        self.nla, self.vectors, self.texts = nla, vectors, texts

    def __call__(self, features: list[dict[str, int]]) -> dict[str, Tensor]:
        rows = [feature["row"] for feature in features]
        ids, mask = self.nla.encode_explanations([self.texts[row] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "vectors": self.vectors[torch.tensor(rows)].float()}


class DecoderTrainer(AtomicCheckpoints, Trainer):
    """A plain Trainer over DecoderModule."""

    def __init__(self, nla: NLA, **kwargs: Any) -> None:
        self.trained, self.variance = decoder_parameters(nla), nla.baselines["global"].variance
        super().__init__(model=DecoderModule(nla), **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        with torch.no_grad():
            return model(**self._prepare_inputs(inputs))["loss"], None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs:
            logs["eval_fve"] = 1 - logs["eval_loss"] / self.variance
        super().log(logs, start_time)


class _Prepared(NamedTuple):
    """What both warm starts train on, and the trainer arguments that they share."""

    vectors: Vectors
    """Training rows, then held-out ones."""

    texts: list[str]
    datasets: dict[str, Any]
    """Rows of every step, and held-out rows."""
    arguments: dict[str, Any]


def _prepare(
    nla: NLA, vectors: Vectors, texts: list[str], folder: Path, settings: FitSettings, held_out: Pairs | None
) -> _Prepared:
    """Check the pairs, and lay out the rows of every step."""
    nla.require_adapters("a warm start")
    check_memory(nla, settings.gradient_checkpointing)
    check_pairs(nla, vectors, texts)
    if held_out is not None:
        check_pairs(nla, *held_out)
    held_texts = held_out[1] if held_out else []
    n, n_drawn = len(texts), settings.steps * settings.batch_size
    per_backward, passes = processes.share(settings.batch_size, "batch_size", settings.rows_per_backward)
    train = Dataset.from_dict({"row": epoch_rows(n, n_drawn, settings.seed).tolist()})
    held = Dataset.from_dict({"row": list(range(n, n + len(held_texts)))}) if held_texts else None
    arguments = dict(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=per_backward,
        per_device_eval_batch_size=per_backward,
        gradient_accumulation_steps=passes,
        learning_rate=settings.learning_rate,
        warmup_steps=min(20, settings.steps // 10),
        seed=settings.seed,
        save_steps=settings.save_every,
        save_strategy="steps",
        eval_strategy="steps" if held else "no",
        eval_steps=settings.eval_every,
        logging_steps=10,
        lr_scheduler_type="cosine",
        gradient_checkpointing=settings.gradient_checkpointing,
        train_sampling_strategy="sequential",
        use_cpu=on_cpu(nla),
        **PLAIN,
    )
    joined = Joined(vectors, held_out[0]) if held_out else vectors
    datasets = {"train_dataset": train, "eval_dataset": held}
    return _Prepared(joined, [*texts, *held_texts], datasets, arguments)


def warmstart(
    half: Half,
    nla: NLA,
    vectors: Vectors,
    texts: list[str],
    out_dir: str | Path,
    settings: FitSettings,
    held_out: Pairs | None = None,
) -> dict[str, float]:
    """Teach one half of a pair, in place, with AdamW and a cosine to zero; the last figures it logged.

    The encoder learns to write ``texts`` (n) for ``vectors`` (n, d): cross-entropy over the answer. The decoder and
    its head learn to give the vectors for the texts: mean squared error of the directions. Held-out pairs give
    ``eval_loss`` (the encoder's in nats a token), and of the decoder ``eval_fve`` over the global baseline. Calling it
    again with the same inputs resumes in ``out_dir``, or returns at once when done.

    Raises:
        ArgumentError: the rows do not divide evenly; also what :func:`check_pairs` and :func:`write_ids` raise.
        RecipeError: ``out_dir`` holds another run.
        WeightsError: its checkpoint is damaged.
        InterruptedTraining, StorageError: stopped; the last checkpoint is intact and ``nla`` is as before the call.
    """
    folder, rows = Path(out_dir), _prepare(nla, vectors, texts, Path(out_dir), settings, held_out)
    make, shown = {
        "encoder": (_encoder_trainer, ("loss", "eval_loss", "mean_token_accuracy")),
        "decoder": (_decoder_trainer, ("loss", "eval_loss", "eval_fve")),
    }[half]
    with nla.role(half), own_forward(nla), checkpointed(nla, settings.gradient_checkpointing):
        trainer = make(nla, rows, settings)
        claim_run(folder, nla, {"stage": half} | settings.deciding(), vectors, trainer.trained, texts)
        return fit(trainer, folder, settings.steps, f"{half} warm start", shown)


def _encoder_trainer(nla: NLA, rows: _Prepared, settings: FitSettings) -> EncoderTrainer:
    adamw = torch.optim.AdamW(encoder_parameters(nla).values(), lr=settings.learning_rate, weight_decay=0.0)
    return EncoderTrainer(
        nla,
        args=SFTConfig(
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            router_aux_loss_coef=0.0,  # a mixture's router is frozen, and its load is not what is trained
            **rows.arguments,
        ),
        **rows.datasets,
        data_collator=EncoderCollator(nla, rows.vectors, rows.texts),
        optimizers=(adamw, None),
    )


def _decoder_trainer(nla: NLA, rows: _Prepared, settings: FitSettings) -> DecoderTrainer:
    head = head_parameters(nla)
    head_rate = settings.learning_rate if settings.head_learning_rate is None else settings.head_learning_rate
    adapter = [p for name, p in decoder_parameters(nla).items() if name not in head]
    groups = [{"params": adapter, "lr": settings.learning_rate}, {"params": list(head.values()), "lr": head_rate}]
    # The Trainer would ask its module to compute activations again, which this one cannot.
    arguments: dict[str, Any] = {**rows.arguments, "gradient_checkpointing": False}
    return DecoderTrainer(
        nla,
        args=TrainingArguments(**arguments),
        **rows.datasets,
        data_collator=DecoderCollator(nla, rows.vectors, rows.texts),
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
    )
