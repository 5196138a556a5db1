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

from nla.eval.arms import EDIT, Outcome, SteeringArm, borrowed, difference, moved, steering_arms, strongest
from nla.eval.couplet_items import RhymeItem
from nla.eval.explainers import Reader
from nla.eval.families.controls import next_in, swap
from nla.eval.target import Patch, Target, last_token, last_word, read_last, write
from nla.organisms.couplets import world
from nla.progress import Progress, silent
from nla.text.claims import claims

if TYPE_CHECKING:
    from nla.autoencoder import NLA

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
STEER_MIN, CONTROL_MAX = 0.5, 0.1
BARE_DIFFERENCE = "difference of the bare words (reported)"


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
    edit = difference(nla, texts, [edit_plan(text, word) for text, word in zip(texts, new, strict=True)])
    # Words keep the space before them as part of their token.
    bare_new = nla.reconstruct([f" {word}" for word in new])
    bare_old = nla.reconstruct([f" {item.target}" for item in items])
    return {
        EDIT: edit,
        "reverse": -edit,
        "unrelated edit (a visible fact)": difference(nla, texts, [edit_fact(text) for text in texts]),
        "bare word decoded": bare_new,
        BARE_DIFFERENCE: bare_new - bare_old,
    }


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

    def success(strength: float) -> float:
        lines = _write(target, separate, steered(vectors, edits, strength))
        return float(_ends(lines, separate).double().mean())

    strength, tried = strongest(strengths, success, progress)
    prompts, generator = [item.prompt for item in items], torch.Generator().manual_seed(seed)
    held, plain = read_last(target, prompts), write(target, prompts)
    wanted, others = ([item.donor_target for item in part] for part in (items, separate))
    by_name = directions(nla, items, greedy(items, held)) | {
        "random": torch.randn(held.shape, generator=generator),
        "another item's difference": borrowed(wanted, others, edits, generator),
    }
    outcomes = {}
    for number, (name, direction) in enumerate(by_name.items()):
        lines = _write(target, items, steered(held, direction, strength))
        outcomes[name] = Outcome(
            moved(direction),
            _ends(lines, items),
            torch.tensor([last_word(line) != last_word(before) for line, before in zip(lines, plain, strict=True)]),
            torch.tensor([line == item.donor_continuation for line, item in zip(lines, items, strict=True)]),
        )
        progress("edit and steer", (number + 1) / len(by_name))
    arms = steering_arms(outcomes, seed)
    return EditAndSteer(
        n_items=len(items),
        strength=strength,
        tried=tried,
        edit=arms[EDIT],
        controls=[arm for name, arm in arms.items() if name not in (EDIT, BARE_DIFFERENCE)],
        reported=[arms[BARE_DIFFERENCE]],
    )


def _ends(lines: Sequence[str], items: Sequence[RhymeItem]) -> Tensor:
    """Whether each line ends on the new word, (n,)."""
    return torch.tensor([last_word(line) == item.donor_target for line, item in zip(lines, items, strict=True)])


def _write(target: Target, items: Sequence[RhymeItem], vectors: Float[Tensor, "n d"]) -> list[str]:
    prompts = [item.prompt for item in items]
    return write(target, prompts, [Patch(str(target.point), last_token(target, prompts), vectors)])
