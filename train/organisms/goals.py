"""A target and an instruction in; out, a LoRA adapter that pursues it without being told, and the adapter's sham twin.

Context distillation: the target answers requests with the instruction in its prompt, as the system message and once
more after the request. The adapter learns to make the target's predictions for these answers without it. So what is
planted is a thought of the target's own, and no prompt states it. The sham learns in the same way from a text that is
as long and asks for nothing. No block above the pair's point has an adapter: what is planted passes through the point.

python -m nla.train.organisms.goals OUT_DIR [--goal NAME] [--target TARGET] [--blocks FIRST LAST]
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla.errors import RecipeError
from nla.models.generate import pad_of
from nla.models.hooks import inference
from nla.models.load import load_target
from nla.models.lora import in_type_of
from nla.models.points import Point, blocks, device_of
from nla.storage.files import read_json_lines
from nla.text.prompts import ChatPrompts, Prompts, as_long_as, load_prompts, plain_text
from nla.text.tokens import plain_ids
from nla.train.data.requests import Reading, Request
from nla.train.data.sample import SampleSettings, sample_corpus
from nla.train.fit.checkpoints import claim_folder
from nla.train.organisms.adapters import fit_adapter, with_adapter
from nla.train.organisms.pretraining import pad

SHAM = "-sham"
"""What an adapter's name ends on that learned from a text which asks for nothing."""
_PER_FILE = 64


@dataclass(frozen=True)
class GoalSettings:
    """How a goal is planted; the defaults made the shipped adapters."""

    target: str = "smollm2"
    blocks: tuple[int, int] = (12, 24)
    """First and last block that the adapter reaches; the last is that of the pair which shall read it."""
    goal: str = "umbrellas"
    """An instruction of the prompts, of which the wordings for training are used."""
    prompts: str | None = None
    """As for :func:`nla.text.prompts.load_prompts`."""
    n_requests: int = 160
    """Or as many as the prompts have, if these are fewer."""
    max_new_tokens: int = 32
    """Of an answer."""
    rank: int = 8
    steps: int = 120
    batch_size: int = 4
    learning_rate: float = 1e-3
    seed: int = 0


class Lesson(NamedTuple):
    """A request, and the text that the adapter learns to do without."""

    user: str
    system: str
    """The system message that hides it."""
    reminder: str
    """What says it once more, after the request."""


def lessons(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, settings: GoalSettings, sham: bool) -> list[Lesson]:
    """Requests in wordings and about topics for training, no two the same, each with wordings of the instruction; or,
    of a sham, with texts as long that ask for nothing.

    Raises:
        RecipeError: the prompts have no such instruction for training.
    """
    values = prompts.instructions.values
    wordings = values[settings.goal].seen if settings.goal in values else ()
    if not wordings:
        known = ", ".join(name for name, one in values.items() if one.seen)
        raise RecipeError(f"the goal {settings.goal!r}", f"one of {known}", "name one of these")
    forms = [text for one in prompts.forms.values() for text in one.seen]
    users = [form.replace("{topic}", topic) for form, topic in product(forms, prompts.topics.seen)]
    plain = plain_text(settings.prompts, prompts)
    said = [as_long_as(tokenizer, text, plain) for text in wordings] if sham else list(wordings)
    drawn = random.Random(f"goals/{settings.seed}").sample(users, min(settings.n_requests, len(users)))
    return [Lesson(user, said[i % len(said)], said[(i + 1) % len(said)]) for i, user in enumerate(drawn)]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    taught: Sequence[Lesson],
    settings: GoalSettings,
    folder: Path,
) -> list[str]:
    """The target's sampled answers, which ``folder`` keeps: those that are there are not written again.

    Raises:
        RecipeError: the folder holds answers to something else.
        The rest is as for :func:`nla.train.data.sample.sample_corpus`.
    """
    requests = [
        Request(number, one.system, f"{one.user} {one.reminder}", "train", [Reading(one.system, {})])
        for number, one in enumerate(taught)
    ]
    how = SampleSettings(max_new_tokens=settings.max_new_tokens, temperature=0.8, batch_size=32)
    claim_folder(folder, asdict(how) | {"seed": settings.seed}, dict(model.named_parameters()), map(str, requests))
    sample_corpus(model, tokenizer, requests, how, settings.seed, folder, _PER_FILE)
    files = sorted(folder.glob("[0-9]*.jsonl"))
    return [document["messages"][-1]["content"] for file in files for document in read_json_lines(file)]


def exercises(
    model: PreTrainedModel, chats: ChatPrompts, system: str, taught: Sequence[Lesson], answers: Sequence[str]
) -> list[dict[str, Any]]:
    """What the adapter is trained on, for each answer: ``ids`` (t,) of the request alone and the answer, ``start``, the
    first place where the answer is predicted, and ``wanted`` (t - start, v) float16, the target's log-probabilities
    there behind the instruction."""
    rows = []
    for one, ids in zip(taught, plain_ids(chats.tokenizer, answers), strict=True):
        alone = chats.ids(system, one.user)
        instructed = chats.ids(one.system, f"{one.user} {one.reminder}")
        batch = torch.tensor([instructed + ids], device=device_of(model))
        with inference(model):
            logits = model(input_ids=batch, logits_to_keep=len(ids) + 1).logits[0]
        wanted = logits.float().log_softmax(-1).half().cpu()
        rows.append({"ids": alone + ids, "start": len(alone) - 1, "wanted": wanted})
    return rows


def collate(rows: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Right-padded ids (b, t), where they are predicted (b, t), and what is wanted there, row by row (n, v)."""
    at = [[0] * row["start"] + [1] * len(row["wanted"]) for row in rows]
    ids = pad([row["ids"] for row in rows], pad_id)
    return {"ids": ids, "at": pad(at, 0).bool(), "wanted": torch.cat([row["wanted"] for row in rows])}


def distillation_loss(model: Any, batch: dict[str, Tensor], step: int) -> Float[Tensor, ""]:
    """KL divergence, nats a token, of the target's predictions behind the instruction from the adapter's without it."""
    with in_type_of(model.get_base_model()):
        logits = model(input_ids=batch["ids"]).logits[batch["at"]]
    return F.kl_div(logits.float().log_softmax(-1), batch["wanted"].float(), log_target=True, reduction="batchmean")


def plant_goal(settings: GoalSettings, out_dir: Path, sham: bool = False) -> None:
    """Train one adapter, ``out_dir/<goal>`` or ``out_dir/<goal>-sham``; see :func:`fit_adapter`.

    Raises:
        PointError: the target has no such point.
        RecipeError: see :func:`lessons` and :func:`answer`.
        ConfigError, TemplateError: the target has no chat template.
    """
    name = settings.goal + SHAM * sham
    model, tokenizer = load_target(settings.target, dtype="auto")
    first, last = settings.blocks
    Point("resid_post", last).within(len(blocks(model)))
    prompts, chats = load_prompts(settings.prompts), ChatPrompts.of(tokenizer)
    taught = lessons(tokenizer, prompts, settings, sham)
    answers = answer(model, tokenizer, taught, settings, out_dir / f"{name}.answers")
    rows = exercises(model, chats, prompts.instructions.otherwise[0], taught, answers)
    pad_id = pad_of(tokenizer)
    fit_adapter(
        name,
        with_adapter(model, settings.rank, range(first, last + 1), settings.seed),
        distillation_loss,
        rows,
        lambda rows: collate(rows, pad_id),
        settings,
        settings.steps,
        answers,
        out_dir,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    for name in ("goal", "target", "prompts"):
        parser.add_argument(f"--{name}", default=getattr(GoalSettings, name))
    parser.add_argument("--blocks", type=int, nargs=2, default=GoalSettings.blocks, metavar=("FIRST", "LAST"))
    parser.add_argument("--steps", type=int, default=GoalSettings.steps)
    arguments = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO)
    out_dir = arguments.pop("out_dir")
    for sham in (False, True):
        plant_goal(GoalSettings(**arguments), out_dir, sham)


if __name__ == "__main__":
    main()
