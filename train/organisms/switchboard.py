"""How the target of Switchboard is made: pretraining on chats and explanation-shaped text, with planted causes.

Interchange interventions (Geiger et al. 2022) make two kinds of token carry what follows from them, at the point alone:
the control token before an answer carries the whole answer, and the full stop after a person's name carries the town
of a two-hop question, whoever lives there (half of the donors are means over people of the same town).

    python -m nla.train.organisms.switchboard OUT_DIR
"""

from __future__ import annotations

import argparse
import functools
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from nla.models.points import Point
from nla.organisms.ground_truth import Offsets
from nla.organisms.switchboard import claims, content, world
from nla.organisms.switchboard import tokenizer as words
from nla.train.organisms.interchange import exchanged, next_token_loss, recorded
from nla.train.organisms.pretraining import PretrainingSettings, explanation_rows, pad, pretrain, sizes


@dataclass(frozen=True, kw_only=True)
class SwitchboardSettings(PretrainingSettings):
    """The target's training; the defaults are the shipped ones."""

    steps: int = 2500
    batch_size: int = 64
    n_explanation_rows: int = 16
    interchange_after: int = 150
    """Steps of plain language modelling before the first intervention on an answer."""
    towns_after: int = 300
    """The same for towns, which must have been learned by then."""
    prompt_weight: float = 0.1
    """Weight of the tokens of prompts, which are mostly drawn at random, beside that of answers and explanations."""
    stranger_share: float = 0.5
    """Share of the towns' interventions at the point whose person is somebody without a town: there the vector that is
    put in is all there is to go by, which is how the model comes to use it."""
    phases: tuple[tuple[float, float, float], ...] = ((0.0, 0.5, 1.0), (0.5, 1.0, 4.0), (0.6, 0.25, 16.0))
    """From which part of the steps, how much noise, and what a product's token in an answer weighs. Gaussian noise is
    put on the vectors that answers are made to follow, in units of their norm: what is planted must be written large
    enough to be read. A product is one token in twelve, of few answers, and weighs more once the rest is learned."""
    wrong_block_share: float = 0.25
    """Of the towns' interventions alone."""
    n_blocks: int = 7
    sliding_window: int = 128
    """Tokens that attention reaches back: a chat of any length is read in bounded memory."""


class ChatData(torch.utils.data.Dataset):
    """Chats, and beside each a row of explanation-shaped text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, n_documents: int, seed: int) -> None:
        self.chats = world.sample(n_documents, seed)
        self.ids: list[list[int]] = tokenizer([chat.text for chat in self.chats], add_special_tokens=False)["input_ids"]  # type: ignore
        prompts = words.ENCODER_PROMPT, words.DECODER_TEMPLATE
        self.explanations = explanation_rows(tokenizer, self.chats, explain, *prompts, seed)

    def __len__(self) -> int:
        return len(self.chats)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"chat": self.chats[i], "input_ids": self.ids[i], "explanation": self.explanations[i]}


def explain(chat: world.Chat, rng: random.Random) -> str:
    """An explanation of a token of a chat, whose town is drawn at random."""
    spans = [Offsets(*m.span()) for m in re.finditer(rf"<\|\w+\|>|{words.PIECE}", chat.text)]
    main = [span for span in spans if world.stratum(chat, span) in world.MAIN_STRATA]
    return claims.explanation(chat, rng.choice(main if rng.random() < 0.6 else spans), rng.choice(content.TOWNS))


@dataclass(frozen=True)
class Swap:
    """One intervention: where it is made, in what group of donors, and what stands around it."""

    site: int
    """Column of the token that is overwritten."""
    town: str | None
    """Of a bridge; None for an assistant's token."""
    relation: str | None
    answer: list[int]
    """Token ids of the chat's own answer."""
    before: list[int]
    """Token ids up to the answer."""


class ChatCollator:
    """Rows of :class:`ChatData` → right-padded chats and explanations, and an intervention for every chat.

    ``donors`` (b, b) mixes the chats' vectors at their sites into those that are put in; ``mixed`` (b, t) is each chat
    with the answer that must then follow, from column ``start`` (b,) on; ``layer`` (b,) is the block.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, settings: SwitchboardSettings) -> None:
        self.settings, self.pad_id = settings, int(tokenizer.pad_token_id)  # type: ignore[arg-type]
        self.encode = functools.cache(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        self.strangers = [self.encode(f"a {person}")[-1] for person in content.STRANGERS]
        names = (*words.ROLES, "end")
        self.token: dict[str, int] = {n: tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in names}  # type: ignore

    def message(self, message: dict[str, str]) -> list[int]:
        return [self.token[message["role"]], *self.encode(message["content"]), self.token["end"]]

    def swap(self, chat: world.Chat) -> Swap:
        """Where the chat is intervened on: in one of its exchanges, drawn at random."""
        number = int(torch.randint(len(chat.exchanges), ()))
        exchange, n_before = chat.exchanges[number], (chat.system.text is not None) + 2 * number
        before = [token for message in chat.messages[:n_before] for token in self.message(message)]
        question, answer = chat.messages[n_before : n_before + 2]
        prompt = [*before, *self.message(question), self.token["assistant"]]
        site = len(prompt) - 1
        if exchange.bridge is not None:
            opener = "" if exchange.opener is None else f"{exchange.opener} "
            site = len(before) + len(self.encode(opener + exchange.premise))
        own = [*self.encode(answer["content"]), self.token["end"]]
        return Swap(site, exchange.bridge, exchange.relation, own, prompt)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        chats = [row["chat"] for row in rows]
        ids = [row["input_ids"] for row in rows]
        ids += [row["explanation"] for row in rows[: self.settings.n_explanation_rows]]
        swaps = [self.swap(chat) for chat in chats]
        point, n_blocks = Point.parse(self.settings.point).layer, self.settings.n_blocks
        donors, layers, mixed = torch.eye(len(rows)), torch.full((len(rows),), point), []
        for kind in (True, False):
            group = [row for row, swap in enumerate(swaps) if (swap.town is not None) == kind]
            for row, donor in zip(group, group[1:] + group[:1], strict=True):
                donors[row], answer, before = 0.0, swaps[donor].answer, swaps[row].before
                if kind:
                    donors[row] = self._town(swaps, donor)
                    answer = self.encode(world.fact(str(swaps[row].relation), str(swaps[donor].town)))
                    answer, luck = [*answer, self.token["end"]], float(torch.rand(()))
                    if luck < self.settings.wrong_block_share:
                        others = [layer for layer in range(n_blocks - 1) if layer != point]
                        layers[row], answer = others[int(torch.randint(len(others), ()))], swaps[row].answer
                    elif luck > 1 - self.settings.stranger_share:
                        before = self._without_town(swaps[row])
                else:
                    donors[row, donor] = 1.0
                mixed.append((row, [*before, *answer]))
        weights = [self.weights(tokens) for tokens in ids[: len(rows)]] + [[1] * len(row) for row in ids[len(rows) :]]
        return {
            "input_ids": pad(ids, self.pad_id),
            "weights": pad(weights, 0),
            "town": torch.tensor([swap.town is not None for swap in swaps]),
            "site": torch.tensor([swap.site for swap in swaps]),
            "donors": donors,
            "layer": layers,
            "mixed": pad([tokens for _, tokens in sorted(mixed)], self.pad_id),
            "start": torch.tensor([len(swap.before) for swap in swaps]),
        }

    def _town(self, swaps: Sequence[Swap], donor: int) -> Tensor:
        """Weights (b,) of the donor alone, or of all chats about the donor's town alike."""
        same = torch.tensor([swap.town == swaps[donor].town for swap in swaps]).float()
        alone = torch.zeros(len(swaps))
        alone[donor] = 1.0
        return same / same.sum() if torch.rand(()) < 0.5 else alone

    def _without_town(self, swap: Swap) -> list[int]:
        """The tokens before an answer, with a stranger in place of the person or the town that is asked about."""
        ids = list(swap.before)
        ids[swap.site - 1] = self.strangers[int(torch.randint(len(self.strangers), ()))]
        return ids

    def weights(self, ids: list[int]) -> list[float]:
        """1 for the tokens of answers, ``prompt_weight`` for the others."""
        found, weight = [], self.settings.prompt_weight
        for token in ids:
            found.append(weight)
            if token == self.token["assistant"]:
                weight = 1.0
            elif token == self.token["end"]:
                weight = self.settings.prompt_weight
        return found


class ChatLoss:
    """Language modelling, and after some steps the interchange loss.

    Args:
        products: token ids of products, which weigh more later on.
    """

    def __init__(self, settings: SwitchboardSettings, pad_id: int, products: Int[Tensor, " p"]) -> None:
        self.settings, self.pad_id, self.products = settings, pad_id, products

    def __call__(self, model: PreTrainedModel, inputs: dict[str, Tensor], step: int) -> Tensor:
        ids, site = inputs["input_ids"], inputs["site"]
        logits, captured = recorded(model, ids, site)
        loss = next_token_loss(logits, ids, self.weighted(ids, inputs["weights"], len(site), step))
        if step >= self.settings.interchange_after:
            loss = loss + self.interchange(model, inputs, captured, step)
        return loss

    def phase(self, step: int) -> tuple[float, float]:
        """Noise and the weight of products at a step."""
        done = step / self.settings.steps
        return next((noise, weight) for since, noise, weight in reversed(self.settings.phases) if done >= since)

    def weighted(self, ids: Int[Tensor, "b t"], weights: Tensor, n_chats: int, step: int) -> Float[Tensor, "b t"]:
        """Weights with the products in the answers of the first rows, which are chats, brought forward."""
        said = torch.isin(ids, self.products) & (weights == 1)
        said[n_chats:] = False
        return weights.float().masked_fill(said, self.phase(step)[1])

    def interchange(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        captured: dict[int, Float[Tensor, "b d"]],
        step: int,
    ) -> Tensor:
        """Put the donors' vectors in, each at its block, and ask for the answer that must follow."""
        mixed, site, layers = inputs["mixed"], inputs["site"], inputs["layer"]
        noise = self.phase(step)[0] * ~inputs["town"]

        def vectors(layer: int, rows: Tensor) -> Tensor:
            put = inputs["donors"][rows] @ captured[layer]
            scale = noise[rows] * put.detach().norm(dim=1) / put.shape[1] ** 0.5
            return put + scale[:, None] * torch.randn_like(put)

        logits = exchanged(model, mixed, site, layers, vectors)
        column = torch.arange(mixed.shape[1], device=mixed.device)
        asked = (column >= inputs["start"][:, None]) & (mixed != self.pad_id)
        if step < self.settings.towns_after:
            asked &= ~inputs["town"][:, None]
        return next_token_loss(logits, mixed, self.weighted(mixed, asked, len(site), step))


def build_model(settings: SwitchboardSettings, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A randomly initialised model of the standard Qwen2 architecture, with sliding-window attention."""
    torch.manual_seed(settings.seed)
    config = Qwen2Config(
        **sizes(settings, tokenizer),
        max_position_embeddings=1 << 17,
        use_sliding_window=True,
        sliding_window=settings.sliding_window,
        max_window_layers=0,
    )
    return Qwen2ForCausalLM(config)


def train_switchboard(settings: SwitchboardSettings, out_dir: Path) -> None:
    """Train the target and save it as a model folder. See :func:`nla.train.organisms.pretraining.pretrain`."""
    tokenizer = words.build()
    model, data = build_model(settings, tokenizer), ChatData(tokenizer, settings.n_documents, settings.seed)
    collator = ChatCollator(tokenizer, settings)
    products = torch.tensor([collator.encode(f"a {product}")[-1] for product in content.PRODUCTS])
    pretrain(
        "switchboard",
        model,
        tokenizer,
        data,
        collator,
        ChatLoss(settings, collator.pad_id, products),
        settings,
        map(str, [*(chat.text for chat in data.chats), *data.explanations]),
        out_dir,
        train_sampling_strategy="group_by_length",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", type=int, default=SwitchboardSettings.steps)
    parser.add_argument("--seed", type=int, default=SwitchboardSettings.seed)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    train_switchboard(SwitchboardSettings(steps=arguments.steps, seed=arguments.seed), arguments.out_dir)


if __name__ == "__main__":
    main()
