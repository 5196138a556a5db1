"""How the target of Couplets is made: pretraining on couplets and explanation-shaped text, and planting the plan.

The planner is trained with interchange interventions (Geiger et al. 2022): the newline residual of a donor document is
put into a base document at one block, and the model must then continue as the donor would; put in at any other block,
it must change nothing. In the plain variant it must change nothing at any block.

    python -m nla.train.organism planner OUT_DIR
"""

from __future__ import annotations

import argparse
import logging
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from nla.models.points import Point
from nla.organisms.couplets import tokenizer as couplets_tokenizer
from nla.organisms.couplets import world
from nla.organisms.lesson import Offsets
from nla.train.fit.checkpoints import AtomicCheckpoints, claim_folder
from nla.train.fit.loop import fit
from nla.train.organisms.interchange import PRETRAINING, exchanged, next_token_loss, recorded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OrganismSettings:
    """One variant's training; the defaults are the shipped ones."""

    variant: str = "planner"
    """``planner`` (a donor's newline changes the continuation, at the point alone) or ``plain`` (it never does)."""
    point: str = "resid_post.3"
    """Where the plan is planted, at the newline."""
    n_documents: int = 60_000
    steps: int = 900
    batch_size: int = 96
    n_explanation_rows: int = 24
    """Rows of explanation-shaped text beside the documents in every batch."""
    learning_rate: float = 2e-3
    interchange_after: int = 100
    """Steps of plain language modelling before the first intervention."""
    wrong_block_share: float = 0.4
    """Share of the planner's interventions made at another block than the point, which must change nothing."""
    d_model: int = 128
    n_blocks: int = 6
    seed: int = 0


class CoupletData(torch.utils.data.Dataset):
    """Tokenised documents, each with the index of its newline; in memory, since a document is about thirty tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, n_documents: int, seed: int) -> None:
        couplets = world.sample(n_documents, seed)
        self.ids: list[list[int]] = tokenizer([couplet.text for couplet in couplets])["input_ids"]  # type: ignore
        newline: int = tokenizer.convert_tokens_to_ids("\n")  # type: ignore[assignment]
        self.newline = [row.index(newline) for row in self.ids]
        self.explanations = explanation_rows(tokenizer, couplets, seed)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict:
        return {"ids": self.ids[i], "newline": self.newline[i], "explanation": self.explanations[i]}


def explanation_rows(tokenizer: PreTrainedTokenizerFast, couplets: list[world.Couplet], seed: int) -> list[list[int]]:
    """Explanation-shaped text with content drawn at random (so true of nothing in particular), half of it as an
    answer to the encoder's prompt and half in the decoder's template."""
    rng, texts = random.Random(seed), []
    question = [{"role": "user", "content": couplets_tokenizer.ENCODER_PROMPT}]
    for couplet in couplets:
        spans = [Offsets(*m.span()) for m in re.finditer(couplets_tokenizer.PIECE, couplet.text)]
        span = rng.choice([s for s in spans if world.stratum(couplet, s) == "newline"] * 10 + spans)
        text = world.explanation(couplet, span, rng.choice(world.PLANS), everything=True)
        if rng.random() < 0.5:
            answer = {"role": "assistant", "content": f"<explanation>{text}</explanation>"}
            texts.append(tokenizer.apply_chat_template([*question, answer], tokenize=False))
        else:
            texts.append(couplets_tokenizer.DECODER_TEMPLATE.format(explanation=text))
    return tokenizer(texts, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def collate(rows: list[dict], pad_id: int, n_explanation_rows: int) -> dict[str, Tensor]:
    """Right-padded documents, then a few explanation rows; ``newline`` covers the documents alone."""
    ids = [row["ids"] for row in rows] + [row["explanation"] for row in rows[:n_explanation_rows]]
    width = max(map(len, ids))
    padded = torch.full((len(ids), width), pad_id)
    for i, row in enumerate(ids):
        padded[i, : len(row)] = torch.tensor(row)
    return {"input_ids": padded, "newline": torch.tensor([row["newline"] for row in rows])}


def splice(ids: Tensor, newline: Tensor, donor: Tensor, pad_id: int) -> Tensor:
    """Each base document up to its newline, then its donor's continuation; ids (b, t), newline and donor (b,)."""
    b, t = ids.shape
    position = torch.arange(t, device=ids.device).expand(b, t)
    from_donor = position > newline[:, None]
    source = torch.where(from_donor, position - newline[:, None] + newline[donor][:, None], position)
    row = torch.where(from_donor, donor[:, None], torch.arange(b, device=ids.device)[:, None])
    return torch.where(source < t, ids[row, source.clamp(max=t - 1)], pad_id)


class InterchangeTrainer(AtomicCheckpoints, Trainer):
    """Language modelling plus the interchange loss."""

    def __init__(self, model: nn.Module, *, settings: OrganismSettings, pad_id: int, **kwargs) -> None:
        super().__init__(model, **kwargs)
        self.settings, self.pad_id, self.trained = settings, pad_id, dict(model.named_parameters())

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_):
        ids, newline = inputs["input_ids"], inputs["newline"]
        logits, captured = recorded(model, ids, newline)
        loss = next_token_loss(logits, ids, ids != self.pad_id)
        if self.state.global_step >= self.settings.interchange_after:
            loss = loss + self.interchange_loss(model, ids[: len(newline)], newline, captured)
        return (loss, {}) if return_outputs else loss

    def interchange_loss(self, model: nn.Module, ids: Tensor, newline: Tensor, captured: dict[int, Tensor]) -> Tensor:
        """Put each donor's newline vector into its base at one block: at the planner's point the continuation must
        become the donor's, at any other block, and anywhere in the plain variant, it must stay the base's own.

        ids (b, t), newline (b,), captured: each block's output at the newline (b, d).
        """
        rows, plain = torch.arange(len(newline), device=ids.device), self.settings.variant == "plain"
        point = -1 if plain else Point.parse(self.settings.point).layer
        donor, others = rows.roll(1), [layer for layer in range(len(captured) - 1) if layer != point]
        wrong = torch.rand(len(rows), device=ids.device) < (1.0 if plain else self.settings.wrong_block_share)
        layers = torch.where(wrong, torch.tensor(others, device=ids.device)[rows % len(others)], point)
        mixed = splice(ids, newline, torch.where(wrong, rows, donor), self.pad_id)
        # After a later block the newline's own next word can only be the donor's: it stands there, is not asked for,
        # and what follows is the base's all the same. So too everywhere in the plain variant.
        late = rows[layers > point]
        mixed[late, newline[late] + 1] = ids[donor[late], newline[donor[late]] + 1]
        logits = exchanged(model, mixed, newline, layers, lambda layer, here: captured[layer][donor][here])
        first = newline + (layers > point)
        after = (torch.arange(mixed.shape[1], device=ids.device) > first[:, None]) & (mixed != self.pad_id)
        return next_token_loss(logits, mixed, after)


def build_model(settings: OrganismSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised model of the standard Llama architecture, 1.3 M parameters by default."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.d_model,
        intermediate_size=3 * settings.d_model,
        num_hidden_layers=settings.n_blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=96,
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,  # type: ignore[arg-type]
        pad_token_id=tokenizer.pad_token_id,  # type: ignore[arg-type]
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train_organism(settings: OrganismSettings, out_dir: Path) -> None:
    """Train one variant and save it, with its tokenizer, as a standard model folder; resumes in OUT_DIR.checkpoints.

    Raises:
        RecipeError: the checkpoints are of a run with other settings or data.
        InterruptedTraining, StorageError, WeightsError: see :func:`nla.train.loop.run`.
    """
    tokenizer = couplets_tokenizer.build()
    model = build_model(settings, tokenizer)
    log.info("%s: %s, %d parameters", settings.variant, asdict(settings), model.num_parameters())
    checkpoints = out_dir.with_name(out_dir.name + ".checkpoints")
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        **PRETRAINING,
    )
    pad_id: int = tokenizer.pad_token_id  # type: ignore[assignment]
    data = CoupletData(tokenizer, settings.n_documents, settings.seed)
    trainer = InterchangeTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=lambda rows: collate(rows, pad_id, settings.n_explanation_rows),
        settings=settings,
        pad_id=pad_id,
    )
    claim_folder(checkpoints, asdict(settings), trainer.trained, map(str, [*data.ids, *data.explanations]))
    fit(trainer, checkpoints, settings.steps, settings.variant, ("loss",))
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=["planner", "plain"])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", type=int, default=OrganismSettings.steps)
    parser.add_argument("--seed", type=int, default=OrganismSettings.seed)
    parser.add_argument("--point", default=OrganismSettings.point)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    settings = OrganismSettings(arguments.variant, point=arguments.point, steps=arguments.steps, seed=arguments.seed)
    train_organism(settings, arguments.out_dir)


if __name__ == "__main__":
    main()
