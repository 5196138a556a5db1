"""Mention: does an explanation name the latent, and are its claims about the visible text true?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nla.errors import ArgumentError, ShapeError
from nla.eval.couplet_items import RhymeItem
from nla.eval.explainers import Reader
from nla.eval.items import repeat, retarget
from nla.eval.report import Rate, to_json
from nla.organisms.couplets import world
from nla.text.claims import claims

N_EXAMPLES = 5
NAMING_MIN, VISIBLE_MARGIN = 0.8, 0.05


@dataclass(frozen=True)
class MentionScore:
    """What one reader's explanations of some items are worth. Intervals resample documents."""

    reader: str
    n_items: int
    n_samples: int
    named: Rate
    """Share of explanations that name the target word and none of its distractors, in the claim about the plan."""
    distractor: float
    """The same share for one distractor, on average over all."""
    visible: Rate | None
    """Share of the other claims that are true of the visible text (what cannot be checked is not); None: no claims."""
    facts_kept: Rate
    """Share of explanations with all the visible facts that a truthful reader gives, and no false claim beside them."""
    per_item: list[float]
    """Share of an item's samples that name its target."""
    examples: list[str]

    @property
    def margin(self) -> float:
        """Naming the target minus naming a matched distractor."""
        return self.named.value - self.distractor

    def to_json(self) -> dict[str, Any]:
        """All figures, the margin too."""
        names = ("reader", "n_items", "n_samples", "named", "distractor", "margin", "visible", "facts_kept")
        return {name: to_json(getattr(self, name)) for name in (*names, "per_item", "examples")}


def named(text: str, item: RhymeItem) -> bool:
    """Whether the claim about the end of line 2 holds the item's target word and none of its distractors."""
    return world.named(text, item.target, item.distractors, world.stratum(item.couplet, item.span))


def visible_claims(text: str, item: RhymeItem) -> list[bool]:
    """For every claim that is not about the plan, whether it is true of the visible text; an uncheckable one is not."""
    return world.visible_claims(item.couplet, item.span, text)


def keeps_facts(text: str, item: RhymeItem) -> bool:
    """Whether the text holds every visible fact that a truthful reader gives, and nothing false beside them."""
    said = {claim.rstrip(".") for claim in claims(text)}
    facts = [claim for claim in claims(world.truthful(item.couplet, item.span)) if not world.is_plan_claim(claim)]
    return all(visible_claims(text, item)) and all(fact.rstrip(".") in said for fact in facts)


def score_texts(
    name: str, items: Sequence[RhymeItem], texts: Sequence[str], n_samples: int = 1, seed: int = 0
) -> MentionScore:
    """Score explanations, ``n_samples`` in a row for each item.

    Raises:
        ArgumentError: no items.
        ShapeError: not that many texts.
    """
    if not items:
        raise ArgumentError("no items", "at least 1", "check which items passed the gate, or draw more of them")
    if len(texts) != len(items) * n_samples:
        raise ShapeError(f"{len(texts)} texts", f"{n_samples} for each of {len(items)} items", "read them all")
    rows = repeat(items, n_samples)
    documents = torch.tensor([item.document for item in rows])
    hits = [named(text, item) for text, item in zip(texts, rows, strict=True)]
    wrong = [
        sum(named(text, other) for other in others) / len(others)
        for text, item in zip(texts, rows, strict=True)
        if (others := [retarget(item, word) for word in item.distractors])
    ]
    kept = [keeps_facts(text, item) for text, item in zip(texts, rows, strict=True)]
    held = [visible_claims(text, item) for text, item in zip(texts, rows, strict=True)]
    claimed = [(sum(of_text), len(of_text)) for of_text in held]
    return MentionScore(
        reader=name,
        n_items=len(items),
        n_samples=n_samples,
        named=Rate.clustered(torch.tensor(hits).double(), documents, seed),
        distractor=sum(wrong) / len(wrong) if wrong else 0.0,
        visible=Rate.of_counts(torch.tensor(claimed, dtype=torch.float64), documents, seed),
        facts_kept=Rate.clustered(torch.tensor(kept).double(), documents, seed),
        per_item=torch.tensor(hits).double().reshape(len(items), n_samples).mean(1).tolist(),
        examples=list(texts[: N_EXAMPLES * n_samples : n_samples]),
    )


def score(
    name: str,
    reader: Reader,
    items: Sequence[RhymeItem],
    vectors: Float[Tensor, "n d"],
    n_samples: int = 1,
    seed: int = 0,
) -> MentionScore:
    """Let a reader explain each item's vector (n, d) ``n_samples`` times, and score what it says."""
    texts = reader(repeat(items, n_samples), vectors.repeat_interleave(n_samples, dim=0))
    return score_texts(name, items, texts, n_samples, seed)
