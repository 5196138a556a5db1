"""`nla eval steering`: a pair and a store with attributes in; whether the target follows edited explanations, out.

One claim of an explanation gets another value, both texts are decoded, and the difference is added to the activation
that was explained and to all after it. Whether what the target then writes has the new value is judged without the
pair: by the token itself, or by a reader of texts that was fitted on answers of the training part.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nla.errors import ArgumentError, ContextLengthError
from nla.eval.arms import EDIT, Outcome, borrowed, difference, moved, steering_arms, strongest
from nla.eval.circuits.patching import log_probabilities
from nla.eval.explainers import explain
from nla.eval.pair.claim_truth import NEXT
from nla.eval.pair.fidelity import held_out_part
from nla.eval.pair.steering_report import (
    ANOTHER,
    BARE,
    RANDOM,
    UNRELATED,
    UNSTEERED,
    JudgeFigures,
    KindSteering,
    SteeringReport,
    steering_checks,
)
from nla.eval.readers.probes import fit_probe
from nla.eval.report import Rate
from nla.eval.settings import EvaluationSettings
from nla.eval.target import Shift, Target, continued, doubts, open_pair
from nla.models.points import context_length
from nla.progress import Progress, silent
from nla.store.facts import TokenNames, answers_of, document_ids, known_attributes, next_tokens
from nla.store.reader import Store, open_splits
from nla.text.facts import INSTRUCTION, edited, stated
from nla.text.prompts import NEUTRAL
from nla.text.tokens import plain_ids
from nla.transcripts.positions import BEFORE_ANSWER, PROMPT_KINDS, STRUCTURE, TEMPLATE

if TYPE_CHECKING:
    from nla.autoencoder import NLA

STRENGTHS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0)
FOLLOWING = "following"
"""What :func:`nla.text.facts.edited` calls what comes next."""
LEAST_ANSWERS, N_NEXT_ROWS = 5, 4000
"""Training answers of a value, or it is not steered to; training rows whose next tokens are steered to."""
N_EXAMPLES = 2
_NO_ANSWER = {TEMPLATE, *PROMPT_KINDS, *STRUCTURE[3:]}
"""Kinds of tokens outside answers."""


@dataclass(frozen=True, kw_only=True)
class SteeringSettings(EvaluationSettings):
    """What to steer, and how far to read on."""

    least: ClassVar[dict[str, int]] = {"n_items": 2, "max_new_tokens": 1}

    store: str | Path
    """A folder that `nla extract` or a training made, of documents with attributes: its held-out part is steered."""
    n_items: int = 100
    """For each kind of claim, of as many answers; half as many others choose the strength."""
    max_new_tokens: int = 24
    """What a judge reads of a continuation."""


class Item(NamedTuple):
    """A held-out activation with its explanation."""

    ids: list[int]
    """Tokens up to the one that is explained and steered."""
    text: str
    known: dict[str, str]
    """What is true of the document."""
    likely: list[str]
    """Names of what the target holds likeliest next."""
    inside: bool
    """A letter or digit stands before what comes next."""


class Kind(NamedTuple):
    """A kind of claim that is edited."""

    name: str
    fact: str
    """Its name in :func:`nla.text.facts.edited`."""
    values: list[str]
    """Known in training, as often as they are to be drawn."""
    n_tokens: int
    """To be written before it is judged."""
    judge: Callable[[Sequence[Item], Sequence[Sequence[int]]], list[str]]
    """From items and the tokens written after each to the values that these have."""

    def claimed(self, text: str) -> str:
        """The value that an explanation claims first; empty if none."""
        facts = stated(text)
        return next(iter(facts.following), "") if self.fact == FOLLOWING else facts.attributes.get(self.fact, "")

    def others(self, item: Item) -> list[str]:
        """The values that are neither true of an item nor claimed by its explanation."""
        true = item.likely if self.fact == FOLLOWING else [item.known.get(self.fact, "")]
        here = {value.casefold() for value in (self.claimed(item.text), *true)}
        return [value for value in self.values if value.casefold() not in here]


def evaluate_steering(
    pair: NLA | str | Path, settings: SteeringSettings, progress: Progress = silent
) -> SteeringReport:
    """Steer the target of held-out activations by edits of their explanations, and by controls of equal norm.

    Raises:
        ArgumentError: the store has no held-out part, no attributes, no training part, or fewer than three answers.
        StoreError, ShapeError, TokenizerMismatchError: a store of another target or point.
        ContextLengthError: see :func:`items_of`.
    """
    nla = open_pair(pair, settings.device)
    store = held_out_part(nla, settings.store)
    training, target, seed = open_splits(settings.store)["train"], Target.of(nla), settings.seed
    names = TokenNames(target.model, target.tokenizer)
    fit, held_out = (answers_in(one, names, settings.max_new_tokens, seed) for one in (training, store))
    judges = [
        judge_of(name, fit, held_out, names, settings) for name in dict.fromkeys(n for one in fit.known for n in one)
    ]
    if not judges:
        raise ArgumentError(
            f"the store {settings.store}, whose training documents have no attributes",
            "documents of which something is known, such as their form or language",
            "read a corpus of documents with attributes, such as one that the target writes itself",
        )
    kinds = [next_kind(training, names, seed), *(kind for kind, _ in judges)]
    progress("steering: judges", 0.05)
    strata = set(store.strata())
    sites = {"": _chosen(store, strata - {TEMPLATE}, settings)}
    sites |= {BEFORE_ANSWER: _chosen(store, {BEFORE_ANSWER}, settings)} if BEFORE_ANSWER in strata else {}
    items = {}
    for number, (site, parts) in enumerate(sites.items()):
        n_tokens = settings.max_new_tokens if site == BEFORE_ANSWER else 1
        items[site] = [items_of(nla, target, names, store, part, n_tokens, seed) for part in parts]
        progress("steering: explain", 0.05 + 0.15 * (number + 1) / len(sites))
    steered = [kinds[0], *(kind for kind, figures in judges if figures.reads and BEFORE_ANSWER in sites)]
    found = []
    for number, kind in enumerate(steered):

        def share(_stage: str, fraction: float, kind: Kind = kind, number: int = number) -> None:
            progress(f"steering: {kind.name}", 0.2 + 0.8 * (number + fraction) / len(steered))

        separate, judged = items["" if kind.fact == FOLLOWING else BEFORE_ANSWER]
        one = steer_kind(nla, target, kind, kinds, separate, judged, seed, share)
        found += [] if one is None else [one]
    return SteeringReport(
        checks=steering_checks(found),
        point=str(nla.point),
        source=f"the held-out part of {settings.store}",
        max_new_tokens=settings.max_new_tokens,
        kinds=found,
        judges=[figures for _, figures in judges],
        doubts=doubts(nla),
    )


def steer_kind(
    nla: NLA,
    target: Target,
    kind: Kind,
    kinds: Sequence[Kind],
    separate: Sequence[Item],
    items: Sequence[Item],
    seed: int = 0,
    progress: Progress = silent,
) -> KindSteering | None:
    """Choose the strength on ``separate`` items, then steer ``items`` by the edit and by every control.

    Args:
        kinds: all of them, of which the unrelated edits are.

    Returns:
        None where no item of a part can be given another value.
    """
    separate, items = parts = [[item for item in part if kind.others(item)] for part in (separate, items)]
    if not all(parts):
        return None
    draws = [random.Random(f"{seed}/{kind.name}/{part}") for part in ("separate", "judged")]
    wanted = [[draw.choice(kind.others(item)) for item in part] for part, draw in zip(parts, draws, strict=True)]
    edits = directions(nla, kind, kinds, separate, wanted[0], draws[0])[EDIT]
    unsteered = [write(target, part, kind.n_tokens) for part in parts]

    def success(strength: float) -> float:
        written = write(target, separate, kind.n_tokens, edits, strength, unsteered[0])
        return float(_hits(kind, separate, written, wanted[0]).double().mean())

    strength, tried = strongest(STRENGTHS, success, lambda stage, fraction: progress(stage, fraction / 2))
    generator = torch.Generator().manual_seed(seed)
    by_name = directions(nla, kind, kinds, items, wanted[1], draws[1])
    by_name |= {
        RANDOM: torch.randn(by_name[EDIT].shape, generator=generator),
        ANOTHER: borrowed(wanted[1], wanted[0], edits, generator),
        UNSTEERED: torch.zeros_like(by_name[EDIT]),
    }
    outcomes, written = {}, {}
    for number, (name, direction) in enumerate(by_name.items()):
        written[name] = write(target, items, kind.n_tokens, direction, strength, unsteered[1])
        changed = [new != old for new, old in zip(written[name], unsteered[1], strict=True)]
        hits = _hits(kind, items, written[name], wanted[1])
        surprise = -log_probabilities(target, [item.ids for item in items], written[name])
        nats = surprise / torch.tensor([len(tokens) for tokens in written[name]])
        outcomes[name] = Outcome(moved(direction), hits, torch.tensor(changed), nats=nats)
        progress("arms", 0.5 + (number + 1) / len(by_name) / 2)
    arms = steering_arms(outcomes, seed)
    texts = {name: _texts(target.tokenizer, written[name][:N_EXAMPLES]) for name in (UNSTEERED, EDIT)}
    return KindSteering(
        kind=kind.name,
        n_items=len(items),
        n_separate=len(separate),
        n_values=len(set(kind.values)),
        strength=strength,
        tried=tried,
        edit=arms[EDIT],
        controls=[arms[name] for name in (RANDOM, UNRELATED, ANOTHER)],
        unsteered=arms[UNSTEERED],
        reported=[arms[BARE]],
        examples=[
            {"explanation": item.text, "new": value, "unsteered": before, "steered": after}
            for item, value, before, after in zip(items, wanted[1], texts[UNSTEERED], texts[EDIT], strict=False)
        ],
    )


def directions(
    nla: NLA, kind: Kind, kinds: Sequence[Kind], items: Sequence[Item], wanted: Sequence[str], draw: random.Random
) -> dict[str, Float[Tensor, "n d"]]:
    """Directions that follow from each item's own explanation: its edit, an edit of another kind, and bare claims."""
    changed, unrelated, bare, bare_old = [], [], [], []
    for number, (item, value) in enumerate(zip(items, wanted, strict=True)):
        changed.append(edited(item.text, kind.fact, value, draw))
        able = [(other, values) for other in kinds if other.fact != kind.fact and (values := other.others(item))]
        other, values = draw.choice(able) if able else (kind, [])
        unrelated.append(edited(item.text, other.fact, draw.choice(values), draw) if values else None)
        old = kind.claimed(item.text)
        bare.append(edited("", kind.fact, value, random.Random(number)))
        bare_old.append(edited("", kind.fact, old, random.Random(number)) if old else "")
    texts = [item.text for item in items]
    return {
        EDIT: difference(nla, texts, changed),
        UNRELATED: difference(nla, texts, unrelated),
        BARE: difference(nla, bare_old, bare),
    }


def write(
    target: Target,
    items: Sequence[Item],
    n_tokens: int,
    direction: Float[Tensor, "n d"] | None = None,
    strength: float = 0.0,
    unsteered: Sequence[list[int]] = (),
) -> list[list[int]]:
    """The target's greedy continuation of each item under a direction, with its end token if there is one.

    Args:
        unsteered: what it writes without; this stands where the direction moves nothing.
    """
    rows = torch.arange(len(items)) if direction is None else moved(direction).nonzero().flatten()
    out = [list(row) for row in unsteered] or [[] for _ in items]
    if not len(rows):
        return out
    prompts, shifts = [items[row].ids for row in rows.tolist()], []
    if direction is not None:
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        shifts = [Shift(str(target.point), last, direction[rows], strength)]
    written = continued(target, prompts, n_tokens, patches=shifts)
    lengths = (written.lengths + written.ended).tolist()
    for row, tokens, length in zip(rows.tolist(), written.ids.tolist(), lengths, strict=True):
        out[row] = tokens[:length]
    return out


def _hits(kind: Kind, items: Sequence[Item], written: Sequence[Sequence[int]], wanted: Sequence[str]) -> Tensor:
    return torch.tensor([value == new for value, new in zip(kind.judge(items, written), wanted, strict=True)])


def _texts(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# What is steered


def _chosen(store: Store, kinds: Collection[str], settings: SteeringSettings) -> list[Tensor]:
    """Rows that choose the strength, and rows that are judged: of some kinds of token, each of another answer."""
    rows = _one_of_each(store, kinds, settings.seed)
    n_separate = min(-(-settings.n_items // 2), len(rows) // 3)
    if n_separate == 0:
        raise ArgumentError(
            f"{len(rows)} held-out answers to steer in {settings.store}",
            "3 or more: some choose the strength, the others are judged",
            "read a corpus with more held-out documents",
        )
    return [rows[:n_separate], rows[n_separate : n_separate + settings.n_items]]


def _one_of_each(store: Store, kinds: Collection[str], seed: int) -> Int[Tensor, " n"]:
    """One row of each answer that has some of these kinds of token, in an order drawn by the seed."""
    strata, answers = store.strata(), answers_of(store, torch.arange(len(store)), store.attributes())
    firsts: dict[str, int] = {}
    for row in torch.randperm(len(store), generator=torch.Generator().manual_seed(seed)).tolist():
        if strata[row] in kinds:
            firsts.setdefault(answers[row], row)
    return torch.tensor([*firsts.values()], dtype=torch.int64)


def items_of(
    nla: NLA, target: Target, names: TokenNames, store: Store, rows: Tensor, n_tokens: int, seed: int
) -> list[Item]:
    """Rows of a store with one explanation each, sampled at temperature 1.

    Raises:
        ContextLengthError: one leaves no room for ``n_tokens`` more.
    """
    acts = store.activations(rows)
    texts = [acts.texts[number] for number in acts.document.tolist()]
    ids = [document_ids(target.tokenizer, text, [span]) for text, span in zip(texts, acts.spans, strict=True)]
    context, longest = context_length(target.model), max(map(len, ids))
    if longest + n_tokens - 1 > context:  # nothing reads the last one
        raise ContextLengthError(
            f"a text of {longest} tokens to go on with by {n_tokens}",
            f"at most {context + 1} together, in the target's context of {context}",
            "judge fewer tokens: lower --tokens",
        )
    with target.role():
        likely = next_tokens(target.model, ids, [[len(row) - 1] for row in ids])
    read = [text[: span.end] for text, span in zip(texts, acts.spans, strict=True)]
    return [
        Item(*row)
        for row in zip(
            ids,
            explain(nla, acts.vectors, seed=seed),
            known_attributes(store.attributes(rows)),
            [[name for name, _ in names.shares(one, text)] for one, text in zip(likely, read, strict=True)],
            [text[-1:].isalnum() for text in read],
            strict=True,
        )
    ]


# Who judges


class Answers(NamedTuple):
    """The first tokens of answers, each once, and what is known of them."""

    texts: list[str]
    known: list[dict[str, str]]


def _within_answers(store: Store) -> set[str]:
    return set(store.strata()) - _NO_ANSWER


def answers_in(store: Store, names: TokenNames, n_tokens: int, seed: int = 0) -> Answers:
    """The beginning of every answer that a row of a store stands in or before; of texts without marks, of the text.

    An instruction under which an answer is read but was not written is not known of it.
    """
    rows = _one_of_each(store, _within_answers(store), seed)
    acts, attributes = store.activations(rows), store.attributes(rows)
    known = known_attributes(attributes)
    marks = re.compile("|".join(map(re.escape, sorted(names.special, key=len, reverse=True))) or r"(?!)")
    texts = []
    for number, span in zip(acts.document.tolist(), acts.spans, strict=True):
        text = acts.texts[number]
        begins = span.end - len(names.after_marks(text[: span.end]))
        texts.append(marks.split(text[begins:], maxsplit=1)[0])
    for whole, here in zip(attributes, known, strict=True):
        if whole.get("answer") == NEUTRAL:
            here.pop(INSTRUCTION, None)
    return Answers(_texts(names.tokenizer, [ids[:n_tokens] for ids in plain_ids(names.tokenizer, texts)]), known)


def judge_of(
    name: str, fit: Answers, held_out: Answers, names: TokenNames, settings: SteeringSettings
) -> tuple[Kind, JudgeFigures]:
    """An attribute, judged by a reader of texts that is fitted on training answers; and what the reader is worth."""
    counts = Counter(one[name] for one in fit.known if name in one)
    values = [value for value, count in counts.items() if count >= LEAST_ANSWERS]
    codes = {value: code for code, value in enumerate(values)}

    def labelled(answers: Answers) -> tuple[list[str], Tensor]:
        rows = [row for row, one in enumerate(answers.known) if one.get(name) in codes]
        labels = [codes[answers.known[row][name]] for row in rows]
        return [answers.texts[row] for row in rows], torch.tensor(labels, dtype=torch.int64)

    texts, labels = labelled(fit)
    read = fit_probe(texts, labels, len(values), seed=settings.seed) if texts else None
    others, true = labelled(held_out)
    accuracy, commonest = None, None
    if read is not None and others:
        accuracy = Rate.of((read(others).argmax(1) == true).tolist())
        commonest = float((true == labels.bincount().argmax()).double().mean())

    def judge(_items: Sequence[Item], written: Sequence[Sequence[int]]) -> list[str]:
        assert read is not None
        return [values[code] for code in read(_texts(names.tokenizer, written)).argmax(1).tolist()]

    return Kind(name, name, values, settings.max_new_tokens, judge), JudgeFigures(
        name, len(texts), len(values), accuracy, commonest
    )


def next_kind(training: Store, names: TokenNames, seed: int) -> Kind:
    """What comes next, judged by the token itself; values are tokens of training answers."""
    within = _within_answers(training) - {BEFORE_ANSWER}
    rows = [row for row, stratum in enumerate(training.strata()) if stratum in within]
    acts = training.activations(sorted(random.Random(seed).sample(rows, min(N_NEXT_ROWS, len(rows)))))
    befores = [acts.texts[n][: span.start] for n, span in zip(acts.document.tolist(), acts.spans, strict=True)]
    values = [
        names.name(span.token_id, before[-1:].isalnum()) for span, before in zip(acts.spans, befores, strict=True)
    ]

    def judge(items: Sequence[Item], written: Sequence[Sequence[int]]) -> list[str]:
        return [names.name(row[0], item.inside) for row, item in zip(written, items, strict=True)]

    # What only goes on with a word cannot come everywhere.
    return Kind(NEXT, FOLLOWING, [value for value in values if not value.startswith("-")], 1, judge)
