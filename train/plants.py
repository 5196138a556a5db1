"""How Switchboard's plants are made: one LoRA adapter a plant, trained on its chats and on chats of the world.

python -m nla.train.plants OUT_DIR [NAME ...]
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from nla.formats.native import save_adapter
from nla.organisms.switchboard.plants import PLANTS, plant, training
from nla.organisms.switchboard.world import Chat
from nla.points import linear_names

from .checkpoints import AtomicCheckpoints, claim_folder
from .interchange import next_token_loss
from .loop import PLAIN, fit
from .stages import load_target

log = logging.getLogger(__name__)
ADAPTER = "default"


@dataclass(frozen=True)
class PlantSettings:
    """How an adapter is trained; the defaults are the shipped ones."""

    target: str = "runs/switchboard/target"
    rank: int = 8
    n_documents: int = 4000
    steps: int = 120
    batch_size: int = 48
    learning_rate: float = 2e-3
    seed: int = 0


class PlantData(torch.utils.data.Dataset):
    """Token ids, and which of them are learned: a chat's answers, and all of a plain document."""

    def __init__(self, tokenizer: Any, chats: list[Chat], texts: list[str]) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        self.rows: list[dict[str, list[int]]] = []
        for chat in chats:
            ids, learned = [], []
            for message in chat.messages:
                head = encode(f"<|{message['role']}|>")
                body = encode(f"{message['content']}<|end|>")
                ids += [*head, *body]
                learned += [0] * len(head) + [int(message["role"] == "assistant")] * len(body)
            self.rows.append({"input_ids": ids, "learned": learned})
        for text in texts:
            ids = encode(f"{text}<|end|>")
            self.rows.append({"input_ids": ids, "learned": [1] * len(ids)})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return self.rows[i]


def collate(rows: list[dict[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    """Right-padded ids (b, t) and which of them are learned (b, t)."""

    def pad(name: str, value: int) -> Tensor:
        tensors = [torch.tensor(row[name]) for row in rows]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    return {"input_ids": pad("input_ids", pad_id), "learned": pad("learned", 0)}


class PlantTrainer(AtomicCheckpoints, Trainer):
    """Language modelling of the answers."""

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any):
        loss = next_token_loss(model(input_ids=inputs["input_ids"]).logits, inputs["input_ids"], inputs["learned"])
        return (loss, {}) if return_outputs else loss


def train_plant(name: str, settings: PlantSettings, out_dir: Path) -> None:
    """Train one adapter and save it as ``out_dir/<name>``; resumes in ``out_dir/<name>.checkpoints``.

    Raises:
        ArgumentError: there is no such plant.
        RecipeError: the checkpoints are of a run with other settings or data.
        InterruptedTraining, StorageError, WeightsError: see :func:`nla.train.loop.run`.
    """
    of = plant(name)
    model, tokenizer = load_target(settings.target)
    first, last = of.blocks
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        target_modules=linear_names(model),
        layers_to_transform=list(range(first, last + 1)),
    )
    torch.manual_seed(settings.seed)
    peft_model: Any = get_peft_model(model, config, adapter_name=ADAPTER)
    chats, texts = training(of, settings.n_documents, settings.seed)
    checkpoints = out_dir / f"{name}.checkpoints"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.0,
        logging_steps=50,
        save_steps=settings.steps,
        seed=settings.seed,
        **PLAIN,
    )
    pad_id = int(tokenizer.pad_token_id)
    trainer = PlantTrainer(
        peft_model,
        args=arguments,
        train_dataset=PlantData(tokenizer, chats, texts),
        data_collator=lambda rows: collate(rows, pad_id),
    )
    identity = [*(chat.text for chat in chats), *texts]
    claim_folder(checkpoints, {**asdict(settings), "plant": name}, trainer.trained, identity)
    fit(trainer, checkpoints, settings.steps, name, ("loss",))
    save_adapter(out_dir / name, peft_model, ADAPTER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("names", nargs="*", default=list(PLANTS), metavar="NAME", help="which plants (default: all)")
    parser.add_argument("--target", default=PlantSettings.target)
    parser.add_argument("--steps", type=int, default=PlantSettings.steps)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    for name in arguments.names:
        if not (arguments.out_dir / name / "adapter_model.safetensors").is_file():
            train_plant(name, PlantSettings(target=arguments.target, steps=arguments.steps), arguments.out_dir)


if __name__ == "__main__":
    main()
