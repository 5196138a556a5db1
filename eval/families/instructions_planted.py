"""An instruction that an adapter planted: no prompt states it, and plant, sham and base read the very same tokens.

The **gate** first: does the target with the adapter do in its own answers what the instruction asks for, and is that
carried by the activations at tokens of an answer that gives nothing away, as of instructions in a prompt? A probe that
was fitted on these alone says whether the planted one looks like them. Then the pair, which never saw the adapter,
explains the same tokens under plant, sham and base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nla.audit import AuditSettings, audit
from nla.autoencoder import NLA
from nla.errors import ArgumentError
from nla.eval.families.instruction_items import NONE, Items, read_items
from nla.eval.families.instructions_gate import N_TOGETHER, KindGate, Run, Sums, gate_of, run, sums_by_kind
from nla.eval.families.instructions_naming import Explain, find_hits, rubric_of
from nla.eval.families.instructions_report import ALL, PlantedFigures, PlantedReading
from nla.eval.families.plants import ARMS
from nla.eval.readers.probes import LOGISTIC, make_vector_probe
from nla.eval.report import Rate
from nla.eval.target import Target, continued, planted
from nla.organisms import ADAPTERS
from nla.progress import Progress, silent
from nla.stats import Interval, bootstrap
from nla.text.prompts import Prompts

PLANT, SHAM, BASE = ARMS
_SHAM = "-sham"
_ANSWER_TOKENS = 64


class Arm(NamedTuple):
    """What the target does with one adapter on, or with none."""

    answers: list[str]
    """Its own, sampled, to the requests; no instruction stands in them."""
    read: Run
    """What it predicts and holds at the neutral answers' tokens."""


def find_plants(folder: str | Path | None, target: str, prompts: Prompts) -> dict[str, tuple[Path, Path]]:
    """By instruction that training has, the adapters that plant it and its sham: ``NAME`` and ``NAME-sham``.

    Args:
        folder: where they are; None: the embedded ones of an embedded target, if it has any.

    Raises:
        ArgumentError: a folder is given, and there are none in it.
    """
    names = [name for name, one in prompts.instructions.values.items() if one.seen and one.held_out]
    if folder is None:
        pairs = {name: [ADAPTERS.get(f"{target}/{name}{end}") for end in ("", _SHAM)] for name in names}
        return {name: (plant, sham) for name, (plant, sham) in pairs.items() if plant and sham}
    there = {name: (Path(folder) / name, Path(folder) / f"{name}{_SHAM}") for name in names}
    found = {name: both for name, both in there.items() if all(path.is_dir() for path in both)}
    if not found:
        expected = f"a folder NAME and one NAME{_SHAM}, where NAME is an instruction such as {names[0]}"
        raise ArgumentError(
            f"{folder} without such adapters", expected, "plant one: python -m nla.train.organisms.goals"
        )
    return found


def judge_planted(
    nla: NLA | None,
    target: Target,
    items: Items,
    plants: Mapping[str, tuple[Path, Path]],
    explain: Explain | None,
    n_samples: int,
    n_chats: int,
    seed: int = 0,
    progress: Progress = silent,
) -> list[PlantedFigures]:
    """Gate and readings of each planted instruction, which is one of the items'.

    Args:
        nla: the pair, for audits; None: a target without one.
        explain: a reader of activations; None: the gate alone.

    Raises:
        ConfigError, WeightsError, NonFiniteError: an adapter does not fit the target.
    """
    if not plants:
        return []
    base, figures = read_arm(target, items, seed), []
    stated = read_items(target, items, [*items.names, NONE])
    for number, (name, folders) in enumerate(plants.items()):
        arms = {}
        for arm, folder in zip((PLANT, SHAM), folders, strict=True):
            with planted(target, nla, folder) as with_adapter:
                arms[arm] = read_arm(with_adapter, items, seed)
        arms[BASE] = base
        vectors = torch.stack([arms[arm].read.vectors for arm in ARMS])
        spoken = rubric_of(name).said_words
        figures.append(
            PlantedFigures(
                name,
                {arm: Rate.of(bool(spoken.hits(text)) for text in arms[arm].answers) for arm in ARMS},
                next((text for text in arms[PLANT].answers if spoken.hits(text)), arms[PLANT].answers[0]),
                gate(name, target, items, arms, seed),
                readings(name, items, stated, vectors, explain, n_samples, seed),
                {} if nla is None else audits(nla, items, name, folders, n_samples, n_chats, seed),
            )
        )
        progress("planted", (number + 1) / len(plants))
    return figures


def read_arm(target: Target, items: Items, seed: int = 0) -> Arm:
    """Answers to the requests, and what is predicted and held at the neutral answers' tokens, no instruction given."""
    requests = range(len(items.users))
    parts = [run(target, items, NONE, requests[start : start + N_TOGETHER]) for start in requests[::N_TOGETHER]]
    prompts = [items.prompt(NONE, request) for request in requests]
    written = continued(target, prompts, _ANSWER_TOKENS, temperature=1.0, seed=seed)
    return Arm(written.texts(target.tokenizer), Run(*map(torch.cat, zip(*parts, strict=True))))


def gate(name: str, target: Target, items: Items, arms: Mapping[str, Arm], seed: int = 0) -> list[KindGate]:
    """Where the planted instruction is at work: the sham stands for the control text and the unrelated activation."""
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, list[Sums]] = {kind: [] for kind in items.columns_by_kind}
    for start in range(0, len(items.users), N_TOGETHER):
        rows = slice(start, start + N_TOGETHER)
        requests = range(len(items.users))[rows]
        none, wanted, sham = (arms[arm].read.some(rows) for arm in (BASE, PLANT, SHAM))
        for kind, part in sums_by_kind(target, items, requests, none, wanted, sham, sham, generator):
            sums[kind].append(part)
    return [gate_of(name, kind, parts, seed) for kind, parts in sums.items()]


def probe(
    stated: Float[Tensor, "k n c d"], vectors: Float[Tensor, "a n c d"], number: int, seed: int = 0, n_folds: int = 5
) -> Bool[Tensor, "a n c"]:
    """Where a probe of activations says that instruction ``number`` is at work.

    It is fitted on activations under instructions that stand in the prompt, and under none, of other requests.

    Args:
        stated: by reading; the last one is without an instruction.
        vectors: of any adapters, at the same tokens.
    """
    from sklearn.model_selection import GroupKFold

    n_readings, n_requests, n_columns, width = stated.shape
    said = torch.zeros(vectors.shape[:3], dtype=torch.bool)
    for fitted, held_out in GroupKFold(min(n_folds, n_requests)).split(range(n_requests), groups=range(n_requests)):
        rows = stated[:, fitted].flatten(0, 2).double().numpy()
        labels = torch.arange(n_readings).repeat_interleave(len(fitted) * n_columns).numpy()
        reader: Any = make_vector_probe(LOGISTIC, len(rows), width, seed)
        guessed = reader.fit(rows, labels).predict(vectors[:, held_out].flatten(0, 2).double().numpy())
        said[:, held_out] = torch.from_numpy(guessed == number).reshape(len(vectors), len(held_out), n_columns)
    return said


def readings(
    name: str,
    items: Items,
    stated: Float[Tensor, "k n c d"],
    vectors: Float[Tensor, "a n c d"],
    explain: Explain | None,
    n_samples: int,
    seed: int = 0,
) -> list[PlantedReading]:
    """What is read at each kind of token, and at all. Intervals by request.

    Args:
        stated: activations under instructions in prompts, for the probe; see :func:`probe`.
        vectors: of the arms.
    """
    hits = None
    if explain is not None:
        names = [name, *(other for other in items.names if other != name and items.known[other])]
        texts = explain(vectors.flatten(0, 2).repeat_interleave(n_samples, dim=0))
        hits = find_hits(names, texts, (*vectors.shape[:3], n_samples))
    requests = range(vectors.shape[1])

    def rates(values: Bool[Tensor, "a n ..."]) -> dict[str, Rate]:
        shares = values.double().flatten(2).mean(2)
        return {arm: Rate.clustered(share, requests, seed) for arm, share in zip(ARMS, shares, strict=True)}

    def margin(own: Bool[Tensor, "a n ..."]) -> dict[str, Interval]:
        shares = own.double().flatten(2).mean(2)
        return {arm: bootstrap(shares[0] - share, seed=seed) for arm, share in zip(ARMS[1:], shares[1:], strict=True)}

    found = []
    for kind, columns in {**items.columns_by_kind, ALL: list(range(items.n_columns))}.items():
        seen = probe(stated[:, :, columns], vectors[:, :, columns], items.names.index(name), seed)
        if hits is None:
            found.append(PlantedReading(kind, rates(seen), {}, {}, {}, None))
            continue
        own, others = hits.named[:, :, columns, :, 0], hits.named[0, :, columns, :, 1:]
        another = Rate.clustered(others.double().flatten(1).mean(1), requests, seed) if others.numel() else None
        found.append(
            PlantedReading(kind, rates(seen), rates(own), margin(own), rates(hits.at_work[:, :, columns]), another)
        )
    return found


def audits(
    nla: NLA, items: Items, name: str, folders: Sequence[Path], n_samples: int, n_chats: int, seed: int = 0
) -> dict[str, Rate]:
    """Share of chats, with neutral answers and no instruction, in which the instruction's rubric has a finding."""
    chats = [items.transcript(NONE, request) for request in range(min(n_chats, len(items.users)))]
    found = {}
    for arm, folder in zip(ARMS, (*folders, None), strict=True):
        options = AuditSettings(
            rubrics=[rubric_of(name)],
            samples=2 * n_samples,
            seed=seed,
            fold_system=not items.chats.reads_system,
            target_adapter=folder,
        )
        found[arm] = Rate.of(bool(score.n_findings) for score in audit(nla, chats, options).scores)
    return found
