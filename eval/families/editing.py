"""Rhyme items and a pair in; whether the target follows an edit of its explanation, out.

One word of the explanation is changed, both texts are decoded, and the difference is added to the activation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from nla.eval.couplet_items import RhymeItem
from nla.eval.explainers import Reader
from nla.eval.families.controls import next_in, swap
from nla.eval.report import Rate
from nla.eval.target import Patch, Target, last_token, last_word, read_last, write
from nla.organisms.couplets import world
from nla.progress import Progress, silent
from nla.stats import holm, paired_permutation
from nla.text.claims import claims

if TYPE_CHECKING:
    from nla.autoencoder import NLA

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
STEER_MIN, CONTROL_MAX = 0.5, 0.1
_STILL = 1e-6
EDIT, BARE_DIFFERENCE = "edit", "difference of the bare words (reported)"


@dataclass(frozen=True)
class SteeringArm:
    """What one kind of direction does to line 2, all at the same norm."""

    name: str
    n_moved: int
    """Items that the direction moves at all; a control that moves none shows nothing."""
    success: Rate
    """Line 2 ends on the new word."""
    changed: Rate
    """Line 2 ends on another word than without steering."""
    whole_line: Rate
    """Line 2 is, word for word, the one that belongs to the new word."""
    p_value: float | None
    """That the edit does no better (one-sided paired permutation, Holm over the arms); None for the edit itself."""


@dataclass(frozen=True)
class EditAndSteer:
    """The edit beside its controls, at one strength that was chosen on other items."""

    n_items: int
    strength: float
    """α in h + α‖h‖Δ/‖Δ‖."""
    tried: dict[str, float]
    """Success on the separate items, by strength."""
    edit: SteeringArm
    controls: list[SteeringArm]
    reported: list[SteeringArm]


def edit_plan(text: str, new: str) -> str | None:
    """The explanation with another word at the end of its claims about the plan; None if it has none.

    >>> edit_plan("It is spring. The next line ends with cat.", "hat")
    'It is spring. The next line ends with hat.'
    """
    parts = claims(text)
    if not any(world.is_plan_claim(part) for part in parts):
        return None
    edited = [re.sub(r"\w+(?=\W*\Z)", new, part) if world.is_plan_claim(part) else part for part in parts]
    return " ".join(edited)


def edit_fact(text: str) -> str | None:
    """The explanation with one visible fact changed (season, else person, else mark); None if it names none."""
    for pool in (world.SEASONS, world.NAMES, tuple(world.MARKS.values())):
        for word in pool:
            if re.search(rf"\b{word}\b", text):
                return swap(text, word, next_in(pool, word))
    return None


def directions(nla: NLA, items: Sequence[RhymeItem], texts: Sequence[str]) -> dict[str, Tensor]:
    """Directions (n, d) that follow from each item's own explanation; zero where it has nothing to edit."""
    new = [item.donor_target for item in items]
    edit = _difference(nla, texts, [edit_plan(text, word) for text, word in zip(texts, new, strict=True)])
    # Words keep the space before them as part of their token.
    bare_new = nla.reconstruct([f" {word}" for word in new])
    bare_old = nla.reconstruct([f" {item.target}" for item in items])
    return {
        EDIT: edit,
        "reverse": -edit,
        "unrelated edit (a visible fact)": _difference(nla, texts, [edit_fact(text) for text in texts]),
        "bare word decoded": bare_new,
        BARE_DIFFERENCE: bare_new - bare_old,
    }


def borrowed(
    items: Sequence[RhymeItem], others: Sequence[RhymeItem], edits: Float[Tensor, "n d"], generator: torch.Generator
) -> Tensor:
    """For each item the edit (m, d) of one of ``others`` that wants another word; zero where all want the same."""
    allowed = torch.tensor([[item.donor_target != other.donor_target for other in others] for item in items]).float()
    able = allowed.any(1)
    chosen = torch.zeros(len(items), edits.shape[1])
    if able.any():
        chosen[able] = edits[torch.multinomial(allowed[able], 1, generator=generator)[:, 0]]
    return chosen


def steered(vectors: Float[Tensor, "n d"], direction: Float[Tensor, "n d"], strength: float) -> Tensor:
    """h + α‖h‖Δ/‖Δ‖ for rows (n, d); h itself where Δ is zero."""
    length = direction.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return vectors + strength * vectors.norm(dim=1, keepdim=True) * direction / length


def edit_and_steer(
    nla: NLA,
    target: Target,
    greedy: Reader,
    items: Sequence[RhymeItem],
    separate: Sequence[RhymeItem],
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    progress: Progress = silent,
) -> EditAndSteer:
    """Choose the strength on ``separate`` items, then steer ``items`` by the edit and by every control.

    Args:
        greedy: explains the unmodified newline; its texts are what is edited.
    """
    vectors = read_last(target, [item.prompt for item in separate])
    edits = directions(nla, separate, greedy(separate, vectors))[EDIT]
    tried = {}
    for number, strength in enumerate(strengths):
        lines = _write(target, separate, steered(vectors, edits, strength))
        hits = [last_word(line) == item.donor_target for line, item in zip(lines, separate, strict=True)]
        tried[strength] = sum(hits) / len(hits)
        progress("strength", (number + 1) / len(strengths))
    strength = max(tried, key=lambda alpha: (tried[alpha], -alpha))
    prompts, generator = [item.prompt for item in items], torch.Generator().manual_seed(seed)
    vectors, plain = read_last(target, prompts), write(target, prompts)
    by_name = directions(nla, items, greedy(items, vectors)) | {
        "random": torch.randn(vectors.shape, generator=generator),
        "another item's difference": borrowed(items, separate, edits, generator),
    }
    lines = {}
    for number, (name, direction) in enumerate(by_name.items()):
        lines[name] = _write(target, items, steered(vectors, direction, strength))
        progress("edit and steer", (number + 1) / len(by_name))
    moved = {name: int((direction.norm(dim=1) > _STILL).sum()) for name, direction in by_name.items()}
    arms = _arms(items, plain, lines, moved, seed)
    return EditAndSteer(
        n_items=len(items),
        strength=strength,
        tried={str(alpha): share for alpha, share in tried.items()},
        edit=arms[EDIT],
        controls=[arm for name, arm in arms.items() if name not in (EDIT, BARE_DIFFERENCE)],
        reported=[arms[BARE_DIFFERENCE]],
    )


def _arms(
    items: Sequence[RhymeItem], plain: Sequence[str], lines: dict[str, list[str]], moved: dict[str, int], seed: int
) -> dict[str, SteeringArm]:
    success = {
        name: torch.tensor([last_word(line) == item.donor_target for line, item in zip(written, items, strict=True)])
        for name, written in lines.items()
    }
    names = [name for name in lines if name != EDIT]
    raw = [
        paired_permutation(success[EDIT].double(), success[name].double(), None, "greater", seed=seed) for name in names
    ]
    p_values: dict[str, float] = dict(zip(names, holm(raw), strict=True))
    return {
        name: SteeringArm(
            name=name,
            n_moved=moved[name],
            success=Rate.of(success[name].tolist()),
            changed=Rate.of(last_word(line) != last_word(before) for line, before in zip(written, plain, strict=True)),
            whole_line=Rate.of(line == item.donor_continuation for line, item in zip(written, items, strict=True)),
            p_value=p_values.get(name),
        )
        for name, written in lines.items()
    }


def _difference(nla: NLA, texts: Sequence[str], edited: Sequence[str | None]) -> Tensor:
    """Decoded edited texts minus decoded texts, (n, d); zero where there is no edited text."""
    new = [before if after is None else after for before, after in zip(texts, edited, strict=True)]
    return nla.reconstruct(new, strict=False) - nla.reconstruct(texts, strict=False)


def _write(target: Target, items: Sequence[RhymeItem], vectors: Float[Tensor, "n d"]) -> list[str]:
    prompts = [item.prompt for item in items]
    return write(target, prompts, [Patch(str(target.point), last_token(target, prompts), vectors)])
