"""What the makers of both targets share: from a random model, its documents and a loss to a saved model folder."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

from nla.train.fit.checkpoints import AtomicCheckpoints, claim_folder
from nla.train.fit.loop import PLAIN, fit

log = logging.getLogger(__name__)

PRETRAINING: dict[str, Any] = dict(
    lr_scheduler_type="cosine",
    warmup_steps=100,
    weight_decay=0.01,
    adam_beta2=0.98,
    logging_steps=50,
    save_steps=250,
    **PLAIN,
)
"""Arguments of the trainers that make a target from nothing."""

Loss = Callable[[Any, dict[str, Tensor], int], Tensor]
"""From the model, a batch and the number of steps done, the loss of the batch."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PretrainingSettings:
    """How a target is made; what an organism adds, and its own defaults, are in its own settings."""

    point: str = "resid_post.3"
    """Where it is planted what the model is to use."""
    n_documents: int = 60_000
    steps: int = 900
    batch_size: int = 96
    n_explanation_rows: int = 24
    """Rows of explanation-shaped text beside the documents in every batch."""
    learning_rate: float = 2e-3
    interchange_after: int = 100
    """Steps of plain language modelling before the first intervention."""
    wrong_block_share: float = 0.4
    """Share of interventions made at another block than the point, which must change nothing."""
    d_model: int = 128
    n_blocks: int = 6
    seed: int = 0


class LossTrainer(AtomicCheckpoints, Trainer):
    """A trainer of a model, or of an adapter in it, by a loss that an organism gives."""

    def __init__(self, model: Any, loss: Loss, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.loss = loss
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ):
        loss = self.loss(model, inputs, self.state.global_step)
        return (loss, {}) if return_outputs else loss


def sizes(settings: PretrainingSettings, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What the configurations of both targets have in common, whatever their architecture."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.d_model,
        "intermediate_size": 3 * settings.d_model,
        "num_hidden_layers": settings.n_blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }


def explanation_rows(
    tokenizer: PreTrainedTokenizerFast,
    documents: Iterable[T],
    explain: Callable[[T, random.Random], str],
    encoder_prompt: str,
    decoder_template: str,
    seed: int,
) -> list[list[int]]:
    """Token ids of explanation-shaped text, one row for each document and true of nothing in it.

    Half of the rows, drawn at random, are an answer to the encoder's prompt, half stand in the decoder's template.
    """
    rng, texts = random.Random(seed), []
    question = {"role": "user", "content": encoder_prompt}
    for document in documents:
        text = explain(document, rng)
        if rng.random() < 0.5:
            answer = {"role": "assistant", "content": f"<explanation>{text}</explanation>"}
            texts.append(tokenizer.apply_chat_template([question, answer], tokenize=False))
        else:
            texts.append(decoder_template.format(explanation=text))
    return tokenizer(texts, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def pad(rows: Sequence[Sequence[float]], value: float) -> Tensor:
    """Rows of numbers as one tensor (b, t), filled up on the right."""
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def pretrain(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: Dataset,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    loss: Loss,
    settings: PretrainingSettings,
    identity: Iterable[str],
    out_dir: Path,
    **arguments: Any,
) -> None:
    """Train a target and save it, with its tokenizer, as a standard model folder; resumes in OUT_DIR.checkpoints.

    Args:
        settings: a run with others does not resume.
        identity: what the data are; a run on others does not resume.
        arguments: of the trainer, beside :data:`PRETRAINING`.

    Raises:
        RecipeError: the checkpoints are of a run with other settings or data.
        InterruptedTraining, StorageError, WeightsError: see :func:`nla.train.fit.loop.fit`.
    """
    log.info("%s: %s, %d parameters", name, asdict(settings), model.num_parameters())
    checkpoints = out_dir.with_name(out_dir.name + ".checkpoints")
    chosen = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        **PRETRAINING,
        **arguments,
    )
    trainer = LossTrainer(model, loss, args=chosen, train_dataset=data, data_collator=collate)
    claim_folder(checkpoints, asdict(settings), trainer.trained, identity)
    fit(trainer, checkpoints, settings.steps, name, ("loss",))
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
