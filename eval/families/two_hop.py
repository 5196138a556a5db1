"""`nla eval two-hop`: does an explanation name the hidden step of a two-hop question?

Switchboard is asked "Think of the home town of Anna. What do people eat there?". The town is never written; it is
planted at the full stop after the name, where no relation has been asked yet. An item is **causal** if a donor's vector
there makes the target answer the same relation of the donor's town. Explanations of that token are then judged by
whether they name the town and no other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from nla.autoencoder import NLA
from nla.eval.adversaries import text_lm_claims
from nla.eval.circuits import gate as causal
from nla.eval.circuits import patching
from nla.eval.circuits.minimal_pairs import MinimalPair
from nla.eval.explainers import explain
from nla.eval.report import Check, Rate, Report, bars, checks_table, new_figure, one_line, paragraphs
from nla.eval.settings import EvaluationSettings
from nla.eval.target import Patch, Target, doubts, last_token, open_pair, open_rival, read_last, write
from nla.eval.worlds import SWITCHBOARD, require_world
from nla.organisms.switchboard import claims, content, world
from nla.organisms.switchboard.world import END, Chat, Exchange
from nla.progress import Progress, silent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED_MIN, COUNTERFACTUAL_MIN, BASELINE_MAX = 0.7, 0.7, 0.2
PAIR, WARM, OUTSIDER, TEXT_LM = "the pair", "warm start", "outsider (guesses a town)", "text-only LM (knows the facts)"
SHUFFLED, OTHER_TOKEN, DONOR = "baseline: another item's activation", "baseline: mean activation", "counterfactual"
DONOR_TEXT = "counterfactual, text-only LM"
_UPSTREAM = "resid_post.0"
"""Where the counterfactual exchanges what the name and the full stop after it hold: three blocks below the point."""


@dataclass(frozen=True)
class Hop:
    """One question, and a donor that asks the same of somebody from another town."""

    question: Exchange
    donor: Exchange
    held_out: bool
    """Whether the question was kept from all training."""

    @property
    def prompt(self) -> str:
        """Up to the control token before the answer."""
        return Chat(exchanges=(self.question,)).prompt

    @property
    def donor_prompt(self) -> str:
        """The donor's; as many tokens."""
        return Chat(exchanges=(self.donor,)).prompt

    @property
    def premise(self) -> str:
        """Up to and including the token that is read."""
        return self.prompt[: self.prompt.index(self.question.premise) + len(self.question.premise)]

    @property
    def donor_premise(self) -> str:
        """The same of the donor."""
        return self.donor_prompt[: self.donor_prompt.index(self.donor.premise) + len(self.donor.premise)]

    @property
    def answer(self) -> str:
        """What the target should write."""
        return world.fact(str(self.question.relation), str(self.question.bridge))

    @property
    def donor_answer(self) -> str:
        """What it should write of the donor's town."""
        return world.fact(str(self.question.relation), str(self.donor.bridge))


@dataclass(frozen=True)
class TwoHopReport(Report):
    """What explanations say of the hidden town."""

    name = "two_hop"
    point: str
    n_items: int
    samples: int
    gate: dict[str, int]
    """Items by verdict."""
    readers: dict[str, Rate]
    """Share of texts that name the town and no other, by reader, on the causal items."""
    held_out: Rate | None
    """The pair's, on questions kept from all training."""
    examples: list[str]

    def body(self) -> str:
        """The readable report."""
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in self.gate.items())
        return paragraphs(
            f"## Two hops, read at `{self.point}` at the full stop after the name",
            f"{self.n_items} questions: {verdicts}. {self.samples} sampled explanations each; 95 % intervals by "
            "person.",
            checks_table(self.checks),
            "Examples: " + " · ".join(map(one_line, self.examples)),
        )

    def figure(self) -> Figure:
        """Who names the town."""
        picture = new_figure(7, 3)
        bars(picture.add_subplot(), self.readers, "Names the town", {*self.readers} - {PAIR}, NAMED_MIN)
        return picture


@dataclass(frozen=True)
class TwoHopSettings(EvaluationSettings):
    """How many questions are judged, and beside what."""

    least: ClassVar[dict[str, int]] = {"n_items": 2, "n_samples": 1}

    warm_start: NLA | str | Path | None = None
    """The pair before joint training."""
    n_items: int = 128
    """Questions."""
    n_samples: int = 4
    """Explanations of each."""


def hops(n_items: int, seed: int) -> list[Hop]:
    """Questions about every person in turn, of every relation, known and kept from training alike."""
    rng, items = random.Random(seed), []
    while len(items) < n_items:
        person = content.PEOPLE[len(items) % len(content.PEOPLE)]
        relation, opener = rng.choice(list(content.RELATIONS)), rng.choice([*content.NEUTRAL_OPENERS, None])
        other = rng.choice([p for p in content.PEOPLE if world.home(p) != world.home(person)])
        base, donor = (Exchange("two-hop", 0, opener, person=p, relation=relation) for p in (person, other))
        items.append(Hop(base, donor, world.held_out(person, relation)))
    return items


def pairs_of(items: Sequence[Hop]) -> list[MinimalPair]:
    """The questions as minimal pairs for a trace, with the name, the full stop and the control token as roles."""
    return [
        MinimalPair(
            prompt=item.prompt,
            donor_prompt=item.donor_prompt,
            continuation=item.answer + END,
            donor_continuation=item.donor_answer + END,
            target=str(item.question.bridge),
            donor_target=str(item.donor.bridge),
            roles={"name": f" {item.question.person}", "full stop": f" {item.question.person}.", "control": -1},
            document=content.PEOPLE.index(str(item.question.person)),
        )
        for item in items
    ]


def town_rate(texts: Sequence[str], towns: Sequence[str], people: Sequence[str], samples: int, seed: int) -> Rate:
    """Share of texts, ``samples`` in a row for each town, that name the town and no other; intervals by person."""
    rows = [town for town in towns for _ in range(samples)]
    hits = [claims.named(text, town, content.TOWNS, "The town in mind") for text, town in zip(texts, rows, strict=True)]
    clusters = [content.PEOPLE.index(person) for person in people for _ in range(samples)]
    return Rate.clustered(torch.tensor(hits).double(), clusters, seed)


def text_lm(target: Target, items: Sequence[Hop]) -> list[str]:
    """The target itself, asked in words where the person lives: a reader of the text that knows the facts."""
    asked = [Chat(exchanges=(Exchange("where", person=item.question.person),)).prompt for item in items]

    def claim(_row: int, answer: str) -> str:
        return claims.town_claim(next((town for town in content.TOWNS if town in answer), ""))

    return text_lm_claims(target, asked, claim, max_new_tokens=12, stop=END)


def evaluate_two_hop(
    model: NLA | str | Path, settings: TwoHopSettings | None = None, progress: Progress = silent
) -> TwoHopReport:
    """Gate two-hop questions by patching, and judge whether the pair names the town.

    Args:
        model: a pair on Switchboard's target.

    Raises:
        ArgumentError: a pair of another world.
        ConfigError: a warm start of another point or target.
    """
    settings = settings or TwoHopSettings()
    n_items, samples, seed = settings.n_items, settings.n_samples, settings.seed
    nla = open_pair(model, settings.device)
    require_world(nla.tokenizer, [SWITCHBOARD], model, "nla eval two-hop")
    warm = None if settings.warm_start is None else open_rival(settings.warm_start, nla, settings.device)
    target, items = Target.of(nla), hops(n_items, seed)
    gate = gate_of(target, items, seed, progress)
    kept = [items[row] for row in gate.causal]
    readers = {} if len(kept) < 2 else name_towns(nla, target, kept, warm, samples, seed)
    unseen = [item for item in kept if item.held_out]
    held_out = None
    if len(unseen) > 1:
        unseen_vectors = read_last(target, [item.premise for item in unseen])
        held_out = _rate(nla, unseen_vectors, unseen, [str(item.question.bridge) for item in unseen], samples, seed)
    examples = explain(nla, read_last(target, [item.premise for item in kept[:4]]), seed=seed) if kept else []
    return TwoHopReport(
        checks=two_hop_checks(readers),
        doubts=doubts(nla, warm_start=warm),
        point=str(nla.point),
        n_items=n_items,
        samples=samples,
        gate=gate.counts(),
        readers=readers,
        held_out=held_out,
        examples=[f"{item.question.person}: {text}" for item, text in zip(kept, examples, strict=False)],
    )


def gate_of(target: Target, items: Sequence[Hop], seed: int, progress: Progress) -> causal.Gate:
    """The three rungs for every question, at the full stop after the name."""
    batch = patching.encode(
        target,
        [item.prompt for item in items],
        [item.donor_prompt for item in items],
        [item.donor_answer + END for item in items],
    )
    columns = last_token(target, [item.premise for item in items])
    answers = write(target, [item.prompt for item in items], max_new_tokens=12, stop=END)
    right = [answer == item.answer + END for answer, item in zip(answers, items, strict=True)]
    towns = [str(item.question.bridge) for item in items]
    related = [(town, str(item.donor.bridge)) for town, item in zip(towns, items, strict=True)]
    numbers = range(len(items))
    pairs = causal.GatedPairs(batch, columns, right, towns, related, numbers)
    return causal.gate_pairs(target, pairs, seed=seed, progress=progress)


def _rate(
    nla: NLA, vectors: Float[Tensor, "n d"], items: Sequence[Hop], towns: Sequence[str], samples: int, seed: int
) -> Rate:
    texts = explain(nla, vectors.repeat_interleave(samples, dim=0), seed=seed)
    return town_rate(texts, towns, [str(item.question.person) for item in items], samples, seed)


def name_towns(
    nla: NLA, target: Target, items: Sequence[Hop], warm: NLA | None, samples: int, seed: int
) -> dict[str, Rate]:
    """Every reader on the causal items. In the counterfactual what the name left in the model is exchanged,
    upstream of the point: the text stays, and the town of the donor is what should be named."""

    people = [str(item.question.person) for item in items]
    towns, others = [str(item.question.bridge) for item in items], [str(item.donor.bridge) for item in items]
    premises = [item.premise for item in items]
    vectors, rng = read_last(target, premises), random.Random(seed)
    stop, donors = last_token(target, premises), [item.donor_premise for item in items]
    names = [text.removesuffix(".") for text in donors]
    patches = [
        Patch(_UPSTREAM, stop - 1, read_last(target, names, _UPSTREAM)),
        Patch(_UPSTREAM, stop, read_last(target, donors, _UPSTREAM)),
    ]
    moved = read_last(target, premises, patches=patches)
    guesses = [claims.town_claim(rng.choice(content.TOWNS)) for _ in items for _ in range(samples)]
    known = text_lm(target, items)
    rates = {PAIR: _rate(nla, vectors, items, towns, samples, seed)}
    if warm is not None:
        rates[WARM] = _rate(warm, vectors, items, towns, samples, seed)
    return rates | {
        DONOR: _rate(nla, moved, items, others, samples, seed),
        DONOR_TEXT: town_rate(known, others, people, 1, seed),
        OUTSIDER: town_rate(guesses, towns, people, samples, seed),
        TEXT_LM: town_rate(known, towns, people, 1, seed),
        SHUFFLED: _rate(nla, vectors.roll(1, 0), items, towns, samples, seed),
        OTHER_TOKEN: _rate(nla, vectors.mean(0).expand_as(vectors), items, towns, samples, seed),
    }


def two_hop_checks(readers: dict[str, Rate]) -> list[Check]:
    """The conditions on the causal items."""
    rows = []
    for name, rate in readers.items():
        if name == PAIR:
            rows.append(Check.at_least("the pair names the town", rate, NAMED_MIN))
        elif name == DONOR:
            what = "the name's traces exchanged upstream, text unchanged: the pair names the donor's town"
            rows.append(Check.at_least(what, rate, COUNTERFACTUAL_MIN))
        elif name in (SHUFFLED, OTHER_TOKEN):
            rows.append(Check.at_most(name, rate, BASELINE_MAX))
        else:
            rows.append(Check(name, rate))
    return rows
