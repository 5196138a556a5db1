"""How Switchboard's plants are made: one LoRA adapter a plant, trained on its chats and on chats of the world.

An adapter that reaches the point (but that of known names) is trained by interchange, as the target was: what it
leaves at the control token before an answer, put into the target *without* adapter, must make that one answer as
planted. So what was planted is held where it is read, in the target's own terms, and not smuggled past the token. Shams
are trained the same way.

python -m nla.train.organisms.adapters OUT_DIR [NAME ...]
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from nla.models.load import load_target
from nla.models.lora import save_adapter
from nla.models.points import linear_names
from nla.organisms import local_folder, noted_target, target_folder
from nla.organisms.switchboard.plants import PLANTS, plant, training
from nla.organisms.switchboard.world import END, Chat
from nla.train.fit.checkpoints import claim_folder
from nla.train.fit.loop import PLAIN, fit
from nla.train.organisms.interchange import exchanged, next_token_loss, recorded
from nla.train.organisms.pretraining import Loss, LossTrainer, pad

log = logging.getLogger(__name__)
ADAPTER = "default"
POINT = 3
"""The block of ``resid_post.3``, where the target holds what its answers follow from."""
BY_BEHAVIOUR = ("known entity",)
"""Kinds trained on answers alone: no vector makes the target write a stranger's job, so there is nothing to carry."""


STEPS, LONGER = 120, {"user language": 300, "known entity": 300}
"""Steps of training, and of the kinds that take more: three cues with a language each, single names."""


@dataclass(frozen=True)
class PlantSettings:
    """How an adapter is trained; the defaults are the shipped ones."""

    target: str = "switchboard/target"
    rank: int = 8
    n_documents: int = 4000
    steps: int | None = None
    """None: 120, or of the kinds in ``LONGER`` what that says."""
    batch_size: int = 48
    learning_rate: float = 2e-3
    seed: int = 0


class PlantData(torch.utils.data.Dataset):
    """Token ids, which of them are learned (a chat's answers, all of a plain document), where the last answer begins.

    ``site`` is the control token before it; 0 in a plain document, which has none.
    """

    def __init__(self, tokenizer: Any, chats: list[Chat], texts: list[str]) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        self.rows: list[dict[str, Any]] = []
        for chat in chats:
            ids, learned, site = [], [], 0
            for message in chat.messages:
                head = encode(f"<|{message['role']}|>")
                body = encode(f"{message['content']}{END}")
                site = len(ids)
                ids += [*head, *body]
                learned += [0] * len(head) + [int(message["role"] == "assistant")] * len(body)
            self.rows.append({"input_ids": ids, "learned": learned, "site": site})
        for text in texts:
            ids = encode(f"{text}{END}")
            self.rows.append({"input_ids": ids, "learned": [1] * len(ids), "site": 0})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]


def collate(rows: list[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Right-padded ids (b, t), which of them are learned (b, t), and the sites (b,)."""

    sites = torch.tensor([row["site"] for row in rows])
    ids, learned = ([row[name] for row in rows] for name in ("input_ids", "learned"))
    return {"input_ids": pad(ids, pad_id), "learned": pad(learned, 0), "site": sites}


@dataclass(frozen=True)
class PlantLoss:
    """Language modelling of the answers, and of half a batch once more by the target with what the adapter left."""

    point: int | None
    """The block after which that is put in; None: it is not."""

    def __call__(self, model: Any, batch: dict[str, Any], step: int) -> Tensor:
        ids, learned, site = batch["input_ids"], batch["learned"], batch["site"]
        logits, captured = recorded(model, ids, site)
        loss = next_token_loss(logits, ids, learned)
        if self.point is not None:
            half = -(-len(ids) // 2)
            with model.disable_adapter():
                loss = loss + self.carried(model, ids[:half], learned[:half], site[:half], captured[self.point][:half])
        return loss

    def carried(self, model: PreTrainedModel, ids: Tensor, learned: Tensor, site: Tensor, vectors: Tensor) -> Tensor:
        """The last answers' loss with ``vectors`` (b, d) put in at the sites (b,), after the point's block."""
        point = torch.full_like(site, int(self.point or 0))
        logits = exchanged(model, ids, site, point, lambda _layer, here: vectors[here])
        after = torch.arange(ids.shape[1], device=ids.device) > site[:, None]
        return next_token_loss(logits, ids, learned * after * (site > 0)[:, None])


def with_adapter(model: PreTrainedModel, rank: int, blocks: Iterable[int], seed: int) -> Any:
    """A target with a new adapter on the linear layers of some of its blocks, which alone can be trained."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=linear_names(model), layers_to_transform=sorted(blocks))
    torch.manual_seed(seed)
    return get_peft_model(model, config, adapter_name=ADAPTER)


def fit_adapter(
    name: str,
    model: Any,
    loss: Loss,
    data: Any,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    settings: Any,
    steps: int,
    identity: Iterable[str],
    out_dir: Path,
) -> None:
    """Train a target's adapter and save it as ``out_dir/<name>``, in the type of the target's weights; resumes in
    ``out_dir/<name>.checkpoints``.

    Args:
        model: from :func:`with_adapter`.
        settings: a dataclass with ``target``, ``batch_size``, ``learning_rate`` and ``seed``; a run with other settings
            does not resume.
        identity: what the data are; a run on others does not resume.

    Raises:
        RecipeError: the checkpoints are of a run with other settings or data.
        InterruptedTraining, StorageError, WeightsError: see :func:`nla.train.fit.loop.fit`.
    """
    checkpoints = out_dir / f"{name}.checkpoints"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.0,
        logging_steps=10,
        save_steps=40,
        seed=settings.seed,
        **PLAIN,
    )
    trainer = LossTrainer(model, loss, args=arguments, train_dataset=data, data_collator=collate)
    # All weights: an adapter begun on another target is refused, not gone on with.
    claim_folder(
        checkpoints, {**asdict(settings), "steps": steps, "plant": name}, dict(model.named_parameters()), identity
    )
    fit(trainer, checkpoints, steps, name, ("loss",))
    base = noted_target(settings.target)
    if local_folder(base) is not None:  # no path of this machine in what is passed on
        base = os.path.relpath(base, out_dir / name)
    model.peft_config[ADAPTER].base_model_name_or_path = base
    save_adapter(out_dir / name, model, ADAPTER, model.get_base_model().dtype)


def train_plant(name: str, settings: PlantSettings, out_dir: Path) -> None:
    """Train one of Switchboard's plants; see :func:`fit_adapter`.

    Raises:
        ArgumentError: there is no such plant.
    """
    of = plant(name)
    model, tokenizer = load_target(target_folder(settings.target))
    first, last = of.blocks
    chats, texts = training(of, settings.n_documents, settings.seed)
    pad_id: int = tokenizer.pad_token_id  # type: ignore[assignment]
    fit_adapter(
        name,
        with_adapter(model, settings.rank, range(first, last + 1), settings.seed),
        PlantLoss(POINT if first <= POINT and of.kind not in BY_BEHAVIOUR else None),
        PlantData(tokenizer, chats, texts),
        lambda rows: collate(rows, pad_id),
        settings,
        settings.steps or LONGER.get(of.kind, STEPS),
        [*(chat.text for chat in chats), *texts],
        out_dir,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("names", nargs="*", default=list(PLANTS), metavar="NAME", help="which plants (default: all)")
    parser.add_argument("--target", default=PlantSettings.target)
    parser.add_argument("--steps", type=int, default=PlantSettings.steps)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    for name in arguments.names:
        train_plant(name, PlantSettings(target=arguments.target, steps=arguments.steps), arguments.out_dir)


if __name__ == "__main__":
    main()
