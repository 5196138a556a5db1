"""How the target of Couplets is made: pretraining on couplets and explanation-shaped text, and planting the plan.

The planner is trained with interchange interventions (Geiger et al. 2022): the newline residual of a donor document is
put into a base document at one block, and the model must then continue as the donor would; put in at any other block,
it must change nothing. In the plain variant it must change nothing at any block.

    python -m nla.train.organisms.couplets planner OUT_DIR
"""

from __future__ import annotations

import argparse
import logging
import random
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from nla.models.points import Point
from nla.organisms.couplets import tokenizer as couplets_tokenizer
from nla.organisms.couplets import world
from nla.organisms.ground_truth import Offsets
from nla.train.organisms.interchange import exchanged, next_token_loss, recorded
from nla.train.organisms.pretraining import PretrainingSettings, explanation_rows, pad, pretrain, sizes


@dataclass(frozen=True, kw_only=True)
class OrganismSettings(PretrainingSettings):
    """One variant's training; the defaults are the shipped ones."""

    variant: str = "planner"
    """``planner`` (a donor's newline changes the continuation, at the point alone) or ``plain`` (it never does)."""


class CoupletData(torch.utils.data.Dataset):
    """Tokenised documents, each with the index of its newline; in memory, since a document is about thirty tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, n_documents: int, seed: int) -> None:
        couplets = world.sample(n_documents, seed)
        self.ids: list[list[int]] = tokenizer([couplet.text for couplet in couplets])["input_ids"]  # type: ignore
        newline: int = tokenizer.convert_tokens_to_ids("\n")  # type: ignore[assignment]
        self.newline = [row.index(newline) for row in self.ids]
        prompts = couplets_tokenizer.ENCODER_PROMPT, couplets_tokenizer.DECODER_TEMPLATE
        self.explanations = explanation_rows(tokenizer, couplets, explain, *prompts, seed)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict:
        return {"ids": self.ids[i], "newline": self.newline[i], "explanation": self.explanations[i]}


def explain(couplet: world.Couplet, rng: random.Random) -> str:
    """An explanation of a token of a couplet, a newline mostly, whose plan is drawn at random."""
    spans = [Offsets(*m.span()) for m in re.finditer(couplets_tokenizer.PIECE, couplet.text)]
    span = rng.choice([s for s in spans if world.stratum(couplet, s) == "newline"] * 10 + spans)
    return world.explanation(couplet, span, rng.choice(world.PLANS), everything=True)


def collate(rows: list[dict], pad_id: int, n_explanation_rows: int) -> dict[str, Tensor]:
    """Right-padded documents, then a few explanation rows; ``newline`` covers the documents alone."""
    ids = [row["ids"] for row in rows] + [row["explanation"] for row in rows[:n_explanation_rows]]
    return {"input_ids": pad(ids, pad_id), "newline": torch.tensor([row["newline"] for row in rows])}


def splice(ids: Tensor, newline: Tensor, donor: Tensor, pad_id: int) -> Tensor:
    """Each base document up to its newline, then its donor's continuation; ids (b, t), newline and donor (b,)."""
    b, t = ids.shape
    position = torch.arange(t, device=ids.device).expand(b, t)
    from_donor = position > newline[:, None]
    source = torch.where(from_donor, position - newline[:, None] + newline[donor][:, None], position)
    row = torch.where(from_donor, donor[:, None], torch.arange(b, device=ids.device)[:, None])
    return torch.where(source < t, ids[row, source.clamp(max=t - 1)], pad_id)


def loss(
    model: PreTrainedModel, inputs: dict[str, Tensor], step: int, settings: OrganismSettings, pad_id: int
) -> Tensor:
    """Language modelling, and after some steps the interchange loss."""
    ids, newline = inputs["input_ids"], inputs["newline"]
    logits, captured = recorded(model, ids, newline)
    total = next_token_loss(logits, ids, ids != pad_id)
    if step >= settings.interchange_after:
        total = total + interchange_loss(model, ids[: len(newline)], newline, captured, settings, pad_id)
    return total


def interchange_loss(
    model: PreTrainedModel,
    ids: Int[Tensor, "b t"],
    newline: Int[Tensor, " b"],
    captured: dict[int, Float[Tensor, "b d"]],
    settings: OrganismSettings,
    pad_id: int,
) -> Tensor:
    """Put each donor's newline vector into its base at one block: at the planner's point the continuation must become
    the donor's, at any other block, and anywhere in the plain variant, it must stay the base's own.

    Args:
        captured: each block's output at the newline.
    """
    rows, plain = torch.arange(len(newline), device=ids.device), settings.variant == "plain"
    point = -1 if plain else Point.parse(settings.point).layer
    donor, others = rows.roll(1), [layer for layer in range(len(captured) - 1) if layer != point]
    wrong = torch.rand(len(rows), device=ids.device) < (1.0 if plain else settings.wrong_block_share)
    layers = torch.where(wrong, torch.tensor(others, device=ids.device)[rows % len(others)], point)
    mixed = splice(ids, newline, torch.where(wrong, rows, donor), pad_id)
    # After a later block the newline's own next word can only be the donor's: it stands there, is not asked for,
    # and what follows is the base's all the same. So too everywhere in the plain variant.
    late = rows[layers > point]
    mixed[late, newline[late] + 1] = ids[donor[late], newline[donor[late]] + 1]
    logits = exchanged(model, mixed, newline, layers, lambda layer, here: captured[layer][donor][here])
    first = newline + (layers > point)
    after = (torch.arange(mixed.shape[1], device=ids.device) > first[:, None]) & (mixed != pad_id)
    return next_token_loss(logits, mixed, after)


def build_model(settings: OrganismSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised model of the standard Llama architecture, 1.3 M parameters by default."""
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(LlamaConfig(**sizes(settings, tokenizer), max_position_embeddings=96))


def train_organism(settings: OrganismSettings, out_dir: Path) -> None:
    """Train one variant and save it as a model folder. See :func:`nla.train.organisms.pretraining.pretrain`."""
    tokenizer = couplets_tokenizer.build()
    pad_id: int = tokenizer.pad_token_id  # type: ignore[assignment]
    model, data = build_model(settings, tokenizer), CoupletData(tokenizer, settings.n_documents, settings.seed)
    pretrain(
        settings.variant,
        model,
        tokenizer,
        data,
        partial(collate, pad_id=pad_id, n_explanation_rows=settings.n_explanation_rows),
        partial(loss, settings=settings, pad_id=pad_id),
        settings,
        map(str, [*data.ids, *data.explanations]),
        out_dir,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=["planner", "plain"])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", type=int, default=OrganismSettings.steps)
    parser.add_argument("--n-documents", type=int, default=OrganismSettings.n_documents)
    parser.add_argument("--seed", type=int, default=OrganismSettings.seed)
    parser.add_argument("--point", default=OrganismSettings.point)
    given = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO)
    out_dir = given.pop("out_dir")
    train_organism(OrganismSettings(**given), out_dir)


if __name__ == "__main__":
    main()
