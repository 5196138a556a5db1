"""`nla eval gates`: a target of Couplets in; whether it plans the rhyme, and uses the plan at the newline, out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nla.errors import ArgumentError
from nla.eval.circuits.gate import PatchMap, patch_map
from nla.eval.circuits.patching import random_difference, random_vector, read_sites, unrelated
from nla.eval.couplet_items import RhymeItem, documents, rhyme_items, variant_of
from nla.eval.report import Check, Rate, Report, checks_table, heat, new_figure, paragraphs, table
from nla.eval.settings import EvaluationSettings
from nla.eval.target import (
    Patch,
    Target,
    last_token,
    last_word,
    open_target,
    read_last,
    token_ids,
    write,
)
from nla.eval.worlds import COUPLETS, require_world
from nla.organisms.couplets import world
from nla.progress import Progress, silent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nla.autoencoder import NLA

VARIANTS = ("planner", "plain")
USED, DECODABLE, ABSENT = "planned and used", "decodable, unused", "not decodable, unused"
PARTLY, ELSEWHERE, WRONG = "partly used", "used, not at this point", "behaviour wrong"
BEHAVIOUR_MIN = 0.98
PATCH_MIN, PATCH_MAX = 0.95, 0.05
PROBE_MIN = 0.85


@dataclass(frozen=True)
class GateReport(Report):
    """All gates of one target."""

    name = "gates"
    target: str
    point: str
    variant: str | None
    patch_map: PatchMap
    verdict: str
    n_documents: int

    def body(self) -> str:
        """The readable table."""
        kind = f", gates of the {self.variant}" if self.variant else ""
        grid = [(point, *line) for point, line in zip(self.patch_map.points, self.patch_map.values, strict=True)]
        return paragraphs(
            f"## Gates: {self.verdict}",
            f"Point `{self.point}`{kind}; {self.n_documents} held-out documents; 95 % Wilson intervals.",
            checks_table(self.checks),
            "Where the plan is used: effect of a minimal donor's residual (0 none, 1 the donor's own behaviour), "
            "by point and token of line 1.",
            table(("point", *self.patch_map.tokens), grid),
        )

    def figure(self) -> Figure:
        """The patch map."""
        picture, grid = new_figure(6, 3), self.patch_map
        heat(picture.add_subplot(), grid.points, grid.tokens, grid.values, "Effect of the donor's residual")
        return picture


def verdict(behaviour: float, patched: Sequence[float], elsewhere: Sequence[tuple[float, float]], probed: float) -> str:
    """In words: is the plan used at the point, and can it be read there?

    Args:
        behaviour: share of lines that are right.
        patched: share that follows the donor patched at the point, for every kind of donor.
        elsewhere: the same at every other point, each with that of its random control.
        probed: share of plans that a linear probe reads.
    """
    if behaviour < BEHAVIOUR_MIN:
        return WRONG
    if min(patched) >= PATCH_MIN:
        return USED
    if max(patched) > PATCH_MAX:
        return PARTLY
    if any(share > max(PATCH_MAX, control) for share, control in elsewhere):
        return ELSEWHERE
    return DECODABLE if probed >= PROBE_MIN else ABSENT


@dataclass(frozen=True)
class GateSettings(EvaluationSettings):
    """Where a target's gates are measured, on what, and which bounds they are held against."""

    least: ClassVar[dict[str, int]] = {"n_documents": 2, "n_probe": 1}

    point: str = "resid_post.3"
    """Where the plan of a target without a pair is read."""
    variant: str | None = None
    """"planner" or "plain" decides which bounds are gates; None: as the embedded name says, else all are reported and
    none is a gate."""
    n_documents: int = 400
    """Documents for behaviour and patches."""
    n_probe: int = 4000
    """Documents that the probe is fitted on; it is tested on ``n_documents`` others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant is not None and self.variant not in VARIANTS:
            raise ArgumentError(f"variant={self.variant!r}", "planner, plain or None", "correct it")


def evaluate_gates(
    model: NLA | Target | str | Path,
    settings: GateSettings | None = None,
    progress: Progress = silent,
) -> GateReport:
    """Measure a target's gates on held-out documents; behaviour is judged on whole lines, patches on the last word.

    Args:
        model: "couplets/planner", "couplets/plain", a model folder or hub id, a loaded target, or a pair, whose target
            it is (both with their own point).

    Raises:
        ArgumentError: a target of another world than Couplets.
        TargetError, PointError: see :meth:`Target.load`.
    """
    settings = settings or GateSettings()
    n_documents, seed = settings.n_documents, settings.seed
    variant = settings.variant or variant_of(model)
    target = open_target(model, settings.point, settings.device)
    name = str(getattr(target.model, "name_or_path", "")) or type(target.model).__name__
    require_world(target.tokenizer, [COUPLETS], model, "nla eval gates")
    items = rhyme_items(n_documents, seed, plans=world.PLANS)
    prompts = [item.prompt for item in items]
    right = [text == item.continuation for text, item in zip(write(target, prompts), items, strict=True)]
    progress("behaviour", 1.0)
    held = variant is not None
    behaviour = Check.at_least("line 2 is right, word for word (greedy)", Rate.of(right), BEHAVIOUR_MIN, held)
    patched = _patches(target, items, variant, seed, progress)
    probed = probe_rate(target, settings.n_probe, n_documents, seed)
    progress("probe", 1.0)
    probe = Check.at_least("a linear probe reads the plan", probed, PROBE_MIN, held=variant == "plain")
    in_words = verdict(behaviour.share, patched.at_point, patched.elsewhere, probe.share)
    return GateReport(
        target=name,
        point=str(target.point),
        variant=variant,
        checks=[behaviour, *patched.checks, probe],
        patch_map=patch_map(target, items[: min(len(items), 100)], progress),
        verdict=in_words,
        n_documents=n_documents,
    )


class _Patched(NamedTuple):
    """What patches of the newline do, as :func:`verdict` takes it."""

    checks: list[Check]
    at_point: list[float]
    elsewhere: list[tuple[float, float]]


def _patches(target: Target, items: list[RhymeItem], variant: str | None, seed: int, progress: Progress) -> _Patched:
    """The newline of two kinds of donor at the point, the donor at other points, and at each controls of its norm."""
    generator = torch.Generator().manual_seed(seed)
    words, prompts = [item.target for item in items], [item.prompt for item in items]
    column = last_token(target, prompts)
    at = read_sites(target, token_ids(target, prompts), target.points, column[:, None])[:, :, 0]
    base = at[:, target.points.index(str(target.point))]
    other = unrelated(words, [(word,) for word in words], generator)
    wanted = [words[row] for row in other.tolist()]
    sibling = [item.donor_target for item in items]
    pairs = read_last(target, [item.donor_prompt for item in items])

    def reached(vectors: Float[Tensor, "n d"], goals: Sequence[str], point: str | None = None) -> Rate:
        lines = write(target, prompts, [Patch(point or str(target.point), column, vectors)])
        return Rate.of(last_word(line) == goal for line, goal in zip(lines, goals, strict=True))

    def check(name: str, rate: Rate, used: bool) -> Check:
        """``used``: where a planner must follow; anywhere else, and throughout the plain variant, it must not."""
        if used and variant != "plain":
            return Check.at_least(name, rate, PATCH_MIN, held=variant is not None)
        return Check.at_most(name, rate, PATCH_MAX, held=variant is not None)

    donors = {"another document": (base[other], wanted), "a minimal pair": (pairs, sibling)}
    at_point = [
        check(f"newline of {name} patched at {target.point}: ends on its word", reached(vectors, goals), used=True)
        for name, (vectors, goals) in donors.items()
    ]
    random = {
        "random difference of the donor's norm": random_difference(base, base[other], generator),
        "random vector of the donor's norm": random_vector(base[other], generator),
    }
    noise = [
        check(f"{name}: ends on the donor's word", reached(vectors, wanted), used=False)
        for name, vectors in random.items()
    ]
    elsewhere, moved, controls = [], [], {}
    for number, point in enumerate(target.points):
        if point != str(target.point):
            here, there = at[:, number], at[other, number]
            rate = reached(there, wanted, point)
            controls[point] = reached(random_difference(here, there, generator), wanted, point)
            elsewhere.append(check(f"the donor's newline at {point} instead", rate, used=False))
            moved.append((rate.value, controls[point].value))
        progress("patches", (number + 1) / len(target.points))
    if controls:
        most = max(controls, key=lambda point: controls[point].value)
        name = f"random difference at every other point, most (at {most}): ends on the donor's word"
        elsewhere.append(check(name, controls[most], used=False))
    return _Patched([*at_point, *noise, *elsewhere], [check.share for check in at_point], moved)


def probe_rate(target: Target, n_fit: int, n_test: int, seed: int) -> Rate:
    """Share of held-out newlines whose plan a linear probe (logistic regression, 64 ways) reads right."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    couplets = documents(n_fit + n_test, seed + 1)
    vectors = read_last(target, [couplet.line1 for couplet in couplets]).numpy()
    plans = [couplet.plan for couplet in couplets]
    seen = {couplet.line1 for couplet in couplets[:n_fit]}
    test = [row for row in range(n_fit, n_fit + n_test) if couplets[row].line1 not in seen]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, tol=1e-3))
    probe.fit(vectors[:n_fit], plans[:n_fit])
    guessed = probe.predict(vectors[test])
    return Rate.of(word == plans[row] for word, row in zip(guessed, test, strict=True))
