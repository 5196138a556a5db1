"""Rhyme items and a reader in; whether its explanations follow a plan that is put in, while the text stays, out.

Only the plan's component of the newline's activation is replaced (the difference of mean activations of two plans, the
means taken over other documents). A reader of the text cannot notice; the patched model acts on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nla.errors import ArgumentError
from nla.eval.couplet_items import RhymeItem, documents
from nla.eval.explainers import Reader
from nla.eval.families.mention import MentionScore, keeps_facts, named, score, score_texts
from nla.eval.items import repeat, retarget
from nla.eval.report import Figures, Rate
from nla.eval.target import Patch, Target, last_token, last_word, read_last, write
from nla.metrics import cosine
from nla.models.points import Point
from nla.organisms.couplets import world
from nla.progress import Progress, silent
from nla.text.tokens import plain_ids

COUNTERFACTUAL_MIN = 0.7
N_FIT = 4096
READABLE_MIN = 0.5


@dataclass(frozen=True)
class PatchedReading(Figures):
    """Explanations of one kind of activation after an intervention, judged for the donor's word."""

    derived = ("readable",)
    where: str
    donor: MentionScore
    """Naming of the donor's word, with the base's visible facts."""
    base_named: Rate
    """Share that still names the base's word."""
    unpatched: Rate | None
    """Naming of the base's word where nothing was changed: how well this kind of activation is read at all."""
    likeness: float
    """Mean cosine between what is read and what was put in: near 1, reading it repeats what was put in."""
    control: bool = False
    """Merely repeats the donor: not a result."""

    @property
    def readable(self) -> bool:
        """Whether the encoder reads this kind of activation at all; where it does not, the reading shows nothing."""
        return self.unpatched is None or self.unpatched.value >= READABLE_MIN


@dataclass(frozen=True)
class Counterfactual(Figures):
    """The plan's component swapped at the newline, in all three respects, and what is read elsewhere."""

    derived = ("naming",)
    n_items: int
    n_fit: int
    readings: list[PatchedReading]
    """First the swapped newline itself, sampled and greedy; then elsewhere; controls last."""
    behaviour: Rate
    """The patched model's line 2 ends on the donor's word."""
    all_three: Rate
    """Names the donor's word AND keeps the base's visible facts AND the model writes the donor's word."""
    text_only: Rate
    """Naming of the donor's word by the target reading the (unchanged) text."""

    @property
    def naming(self) -> Rate:
        """The headline: the donor's word named in samples at temperature 1."""
        return self.readings[0].donor.named


def plan_means(target: Target, n_fit: int, seed: int) -> dict[str, Tensor]:
    """Mean newline activation (d,) of each plan, over documents of their own.

    Raises:
        ArgumentError: too few documents for every plan to occur.
    """
    couplets = documents(n_fit, seed + 2)
    vectors = read_last(target, [couplet.line1 for couplet in couplets])
    rows: dict[str, list[int]] = {plan: [] for plan in world.PLANS}
    for row, couplet in enumerate(couplets):
        rows[couplet.plan].append(row)
    if missing := [plan for plan, of_plan in rows.items() if not of_plan]:
        raise ArgumentError(
            f"{n_fit} documents without the plans {missing[:5]}", "documents of every plan", "use more of them"
        )
    return {plan: vectors[of_plan].mean(0) for plan, of_plan in rows.items()}


def with_donor_plan(items: Sequence[RhymeItem], vectors: Float[Tensor, "n d"], means: dict[str, Tensor]) -> Tensor:
    """The items' vectors (n, d) with the plan's component of the donor instead of their own."""
    return vectors + torch.stack([means[item.donor_target] - means[item.target] for item in items])


def as_donor(item: RhymeItem) -> RhymeItem:
    """The item with the donor's word as its target; the text is unchanged."""
    return retarget(item, item.donor_target)


def swap_plans(
    target: Target,
    reader: Reader,
    greedy: Reader,
    text_only: Reader,
    items: Sequence[RhymeItem],
    n_samples: int = 4,
    n_fit: int = N_FIT,
    seed: int = 0,
    progress: Progress = silent,
) -> Counterfactual:
    """Swap the plan at the newline and read: there, one block deeper, and one token later.

    Args:
        reader: sampled at temperature 1, ``n_samples`` times an activation.
        greedy: the same reader at its likeliest text.
        text_only: reads the prompts alone.
    """
    prompts, changed = [item.prompt for item in items], [as_donor(item) for item in items]
    column, base = last_token(target, prompts), read_last(target, prompts)
    means = plan_means(target, n_fit, seed)
    progress("counterfactual", 0.3)
    swapped = with_donor_plan(items, base, means)
    patch = Patch(str(target.point), column, swapped)
    lines = write(target, prompts, [patch])
    follows = [last_word(line) == item.donor_target for line, item in zip(lines, items, strict=True)]
    texts = reader(repeat(items, n_samples), swapped.repeat_interleave(n_samples, dim=0))
    joint = [
        named(text, item) and keeps_facts(text, item) and acts
        for text, item, acts in zip(
            texts, repeat(changed, n_samples), [f for f in follows for _ in range(n_samples)], strict=True
        )
    ]
    clusters = torch.tensor([item.document for item in repeat(items, n_samples)])
    at_site = PatchedReading(
        where=f"newline at {target.point}, plan component swapped (sampled)",
        donor=score_texts("sampled", changed, texts, n_samples, seed),
        base_named=score_texts("sampled", items, texts, n_samples, seed).named,
        unpatched=score("sampled", reader, items, base, n_samples, seed).named,
        likeness=1.0,
    )
    where = f"newline at {target.point}, plan component swapped (greedy)"
    readings = [at_site, _reading(where, greedy, items, swapped, base, swapped, 1, seed)]
    progress("counterfactual", 0.6)
    readings += _elsewhere(target, reader, items, patch, n_samples, seed)
    donors = read_last(target, [item.donor_prompt for item in items])
    where = f"newline at {target.point}, overwritten by the donor's (repeats the donor)"
    readings.append(_reading(where, reader, items, donors, None, donors, n_samples, seed, control=True))
    progress("counterfactual", 1.0)
    return Counterfactual(
        n_items=len(items),
        n_fit=n_fit,
        readings=readings,
        behaviour=Rate.of(follows),
        all_three=Rate.clustered(torch.tensor(joint).double(), clusters, seed),
        text_only=score("text only", text_only, changed, swapped, 1, seed).named,
    )


def _reading(
    where: str,
    reader: Reader,
    items: Sequence[RhymeItem],
    vectors: Float[Tensor, "n d"],
    unpatched: Float[Tensor, "n d"] | None,
    put_in: Float[Tensor, "n d"],
    n_samples: int,
    seed: int,
    control: bool = False,
) -> PatchedReading:
    texts = reader(repeat(items, n_samples), vectors.repeat_interleave(n_samples, dim=0))
    return PatchedReading(
        where=where,
        donor=score_texts(where, [as_donor(item) for item in items], texts, n_samples, seed),
        base_named=score_texts(where, items, texts, n_samples, seed).named,
        unpatched=None if unpatched is None else score(where, reader, items, unpatched, n_samples, seed).named,
        likeness=float(cosine(vectors, put_in).mean()),
        control=control,
    )


def _elsewhere(
    target: Target, reader: Reader, items: Sequence[RhymeItem], patch: Patch, n_samples: int, seed: int
) -> list[PatchedReading]:
    """One block deeper at the newline, and there at the first token of line 2, both downstream of the patch.

    The first token of line 2 is the base's own, so that the text is the same with and without the patch.
    """
    if target.point.layer + 1 >= len(target.points):
        return []
    deeper, readings = str(Point(target.point.kind, target.point.layer + 1)), []
    later = [dataclasses.replace(item, prompt=item.prompt + _first_word(target, item)) for item in items]
    for where, rows in ((f"newline at {deeper}", list(items)), (f"first token of line 2 at {deeper}", later)):
        prompts = [item.prompt for item in rows]
        after, before = read_last(target, prompts, deeper, [patch]), read_last(target, prompts, deeper)
        name = f"{where}, newline patched at {target.point}"
        readings.append(_reading(name, reader, rows, after, before, patch.vectors, n_samples, seed))
    return readings


def _first_word(target: Target, item: RhymeItem) -> str:
    """Text of the first token of the item's continuation."""
    return str(target.tokenizer.decode(plain_ids(target.tokenizer, [item.continuation])[0][:1]))
