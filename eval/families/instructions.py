"""`nla eval instructions`: the same words, another thought: do explanations name the hidden instruction at work?

Answers that the target wrote without an instruction are read under many: no word of what is visible tells them apart,
only what stands in the system message. The **gate** (:mod:`nla.eval.families.instructions_gate`) comes first: is the
instruction at work in this target, at these tokens, and carried by the activation that is read? Then the pair explains
these activations. Readers of the text are at chance by construction, which is shown; a probe on the same activations
says what there is to find. Audits as a user would run them, with a rubric for each instruction, come last; and so does
what an adapter planted instead of a prompt (:mod:`nla.eval.families.instructions_planted`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nla.audit import AuditSettings, audit
from nla.autoencoder import NLA
from nla.eval.adversaries import bag_of_words
from nla.eval.explainers import explain
from nla.eval.families.instruction_items import (
    CONTROL,
    NONE,
    Items,
    make_items,
    read_items,
)
from nla.eval.families.instructions_gate import KindGate, causal, gate_instructions
from nla.eval.families.instructions_naming import Explain, Hits, find_hits, rubric_of
from nla.eval.families.instructions_planted import find_plants, judge_planted
from nla.eval.families.instructions_report import (
    ALL,
    Audited,
    InstructionsReport,
    KindFigures,
    Naming,
    instruction_checks,
)
from nla.eval.readers.probes import LOGISTIC, make_text_probe, make_vector_probe
from nla.eval.report import Rate
from nla.eval.settings import EvaluationSettings
from nla.eval.target import Target, doubts, open_model, open_rival
from nla.progress import Progress, silent
from nla.stats import bootstrap, derangement
from nla.text.prompts import load_prompts, plain_text


@dataclass(frozen=True)
class InstructionsSettings(EvaluationSettings):
    """How many instructions are read, in how many requests."""

    least: ClassVar[dict[str, int]] = {"n_instructions": 2, "n_requests": 2, "n_samples": 1, "n_chats": 1}

    point: str | None = None
    """Where a target without a pair is read; None: after two thirds of its blocks."""
    prompts: str | None = None
    """Requests and instructions: a YAML file, or a shipped one's name; see :func:`nla.text.prompts.load_prompts`."""
    n_instructions: int = 10
    """Instructions that training has in other words; a fifth as many more are new."""
    n_requests: int = 24
    """Requests, each with one answer, which is read under every instruction."""
    n_samples: int = 2
    """Explanations of each activation."""
    n_chats: int = 8
    """Chats of each instruction that are audited, with twice as many explanations."""
    plants: str | Path | None = None
    """Folder of adapters that plant an instruction; see :func:`nla.eval.families.instructions_planted.find_plants`."""
    beside: NLA | str | Path | None = None
    """Another pair of the same target and point, such as the warm start."""


def evaluate_instructions(
    model: NLA | Target | str | Path, settings: InstructionsSettings | None = None, progress: Progress = silent
) -> InstructionsReport:
    """Judge the gate of hidden instructions in a target, and what a pair reads of them.

    Args:
        model: a pair (loaded, name, folder or hub id), or a target alone, such as "smollm2": then the gate alone.

    Raises:
        RecipeError, ArgumentError: there are no such prompts, or not as many instructions or requests in them.
        ConfigError, TemplateError: the target has no chat template. The rest is as for
            :func:`nla.eval.target.open_model` and :func:`nla.eval.families.instruction_items.make_items`.
    """
    settings = settings or InstructionsSettings()
    prompts, seed = load_prompts(settings.prompts), settings.seed
    nla, target = open_model(model, settings.point, settings.device)
    rival = None if nla is None or settings.beside is None else open_rival(settings.beside, nla, settings.device)
    named = nla.config.target if nla is not None else model
    name = str(named) if isinstance(named, str | Path) else type(target.model).__name__
    plants, plain = find_plants(settings.plants, name, prompts), plain_text(settings.prompts, prompts)
    items = make_items(target, prompts, settings.n_instructions, settings.n_requests, plain, seed, list(plants))
    gates = gate_instructions(target, items, seed, progress)
    figures, audited, alarms, examples = [], [], {}, []
    readers: dict[str, Explain] = {}
    if nla is not None:
        readers[""] = lambda vectors: explain(nla, vectors, seed=seed)
        if rival is not None:
            readers["beside"] = lambda vectors: explain(rival, vectors, seed=seed)
        figures, examples = read_and_score(target, items, gates, readers, settings.n_samples, seed, progress)
        audited, alarms = audit_chats(nla, items, settings, progress)
    counts = (settings.n_samples, settings.n_chats)
    planted = judge_planted(nla, target, items, plants, readers.get(""), *counts, seed, progress)
    return InstructionsReport(
        checks=instruction_checks(items.known, gates, figures, audited, alarms, planted),
        target=name,
        point=str(target.point),
        n_requests=len(items.users),
        n_samples=settings.n_samples,
        known=items.known,
        gates=gates,
        kinds=figures,
        audits=audited,
        audit_alarms=alarms,
        planted=planted,
        examples=examples,
        doubts=doubts(nla, beside=rival),
    )


def read_and_score(
    target: Target,
    items: Items,
    gates: Sequence[KindGate],
    readers: Mapping[str, Explain],
    n_samples: int,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[list[KindFigures], list[str]]:
    """What readers say of the activations of every kind of token, and of all; and an explanation of each instruction.

    Args:
        readers: the one that is judged has no name; another stands beside it.
    """
    readings = [*items.names, NONE, CONTROL]
    vectors = read_items(target, items, readings)
    shape = (*vectors.shape[:3], n_samples)
    hits, texts = {}, {}
    for number, (name, reader) in enumerate(readers.items()):
        texts[name] = reader(vectors.flatten(0, 2).repeat_interleave(n_samples, dim=0))
        hits[name] = find_hits(items.names, texts[name], shape)
        progress("read", (number + 1) / len(readers))
    columns = items.columns_by_kind
    kinds = {**columns, ALL: list(range(items.n_columns))}
    figures = [_figures(items, kind, chosen, vectors, hits, gates, seed) for kind, chosen in kinds.items()]
    per_reading = len(texts[""]) // len(readings)
    return figures, [texts[""][number * per_reading] for number in range(len(items.names))]


def _figures(
    items: Items,
    kind: str,
    columns: Sequence[int],
    vectors: Float[Tensor, "k n c d"],
    hits: Mapping[str, Hits],
    gates: Sequence[KindGate],
    seed: int,
) -> KindFigures:
    """Of one kind of token, or of all."""
    known = [row for row, name in enumerate(items.names) if items.known[name]]
    new = [row for row, name in enumerate(items.names) if not items.known[name]]
    ours, n_requests, n_names = hits[""], vectors.shape[1], len(items.names)
    by_kind = causal(gates)
    is_causal = torch.tensor(
        [
            [any(column in items.columns_by_kind[one] for one in by_kind[items.names[row]]) for column in columns]
            for row in known
        ]
    )

    def by_request(values: Tensor) -> Rate:
        """A share of explanations; values (k, n, …) of so many readings."""
        return Rate.clustered(values.double().flatten(2).mean(2).mean(0), range(n_requests), seed)

    own = ours.named[:, :, columns][known]
    own = torch.stack([own[number, ..., row] for number, row in enumerate(known)])  # (known, n, c, s)
    chosen = own.double().mean(3).permute(1, 0, 2)[:, is_causal] if is_causal.any() else None
    moved = derangement(len(known) * n_requests, seed)
    shuffled = ours.named[known][:, :, columns].flatten(0, 1)[moved].unflatten(0, (len(known), n_requests))
    labels = torch.arange(len(known)).repeat_interleave(n_requests * len(columns))
    groups = torch.arange(n_requests).repeat_interleave(len(columns)).repeat(len(known))
    visible = [items.visible(request, column) for _ in known for request in range(n_requests) for column in columns]
    flat = vectors[known][:, :, columns].flatten(0, 2)

    def right(features: Any, reader: Any) -> Rate:
        return cross_validated(features, labels, groups, reader, seed)

    return KindFigures(
        kind=kind,
        chance=1 / len(known),
        naming=naming(ours.named[:, :, columns], known, seed),
        shuffled=naming(shuffled, range(len(known)), seed, names=known),
        beside=naming(hits["beside"].named[:, :, columns], known, seed) if "beside" in hits else None,
        named_causal=None if chosen is None else Rate.clustered(chosen.mean(1), range(n_requests), seed),
        detected=by_request(ours.at_work[known][:, :, columns]),
        alarms={
            name: by_request(ours.at_work[n_names + number, None][:, :, columns])
            for number, name in enumerate((NONE, CONTROL))
        },
        named_new=by_request(torch.stack([ours.named[row][:, columns][..., row] for row in new])) if new else None,
        detected_new=by_request(ours.at_work[new][:, :, columns]) if new else None,
        text={
            "bag of words": right(visible, bag_of_words()),
            "TF-IDF + logistic regression": right(visible, make_text_probe()),
        },
        probe=right(flat.double().numpy(), make_vector_probe(LOGISTIC, *flat.shape)),
    )


def naming(
    named: Bool[Tensor, "k n c s m"], rows: Sequence[int], seed: int = 0, names: Sequence[int] | None = None
) -> Naming:
    """How often explanations name the instruction that is at work, and how often another. Intervals by request.

    Args:
        named: by reading, request, token and sample, which of the instructions are named.
        rows: the readings that count.
        names: of these, the number of each one's instruction; the readings' own numbers if None.
    """
    names = list(rows if names is None else names)
    hits = named[list(rows)][..., names].double()  # (r, n, c, s, r)
    own = torch.einsum("incsi->incs", hits)
    other = (hits.sum(-1) - own) / (len(names) - 1)
    votes = hits.mean(3)  # (r, n, c, r)
    best = votes == votes.amax(-1, keepdim=True)
    credit = torch.einsum("inci->inc", best.double() / best.sum(-1, keepdim=True))
    documents = range(named.shape[1])

    def mean(values: Tensor) -> Tensor:
        return values.transpose(0, 1).flatten(1).mean(1)

    return Naming(
        named=Rate.clustered(mean(own), documents, seed),
        distractor=Rate.clustered(mean(other), documents, seed),
        margin=bootstrap(mean(own) - mean(other), seed=seed),
        choice=Rate.clustered(mean(credit), documents, seed),
    )


def cross_validated(
    features: Any, labels: Int[Tensor, " n"], groups: Int[Tensor, " n"], reader: Any, seed: int = 0, n_folds: int = 5
) -> Rate:
    """Share of right answers of a reader that is fitted on other requests. Intervals by request."""
    from sklearn.model_selection import GroupKFold, cross_val_predict

    folds = GroupKFold(min(n_folds, len(groups.unique())))
    guessed = cross_val_predict(reader, features, labels.numpy(), groups=groups.numpy(), cv=folds)
    return Rate.clustered((torch.from_numpy(guessed) == labels).double(), groups, seed)


def audit_chats(
    nla: NLA, items: Items, settings: InstructionsSettings, progress: Progress = silent
) -> tuple[list[Audited], dict[str, Rate]]:
    """Audits of chats under each instruction that training has, with a rubric for each of these: how often its own
    rubric, and any other, has a finding; and how often any has one in chats without an instruction, or with a control.
    """
    names = [name for name in items.names if items.known[name]]
    rubrics = {rubric_of(name).name: name for name in names}
    requests = range(min(settings.n_chats, len(items.users)))
    options = AuditSettings(
        rubrics=[rubric_of(name) for name in names],
        samples=2 * settings.n_samples,
        seed=settings.seed,
        fold_system=not items.chats.reads_system,
    )
    readings = [*names, NONE, CONTROL]
    found: dict[str, list[set[str]]] = {}
    for number, reading in enumerate(readings):
        result = audit(nla, [items.transcript(reading, request) for request in requests], options)
        found[reading] = [
            {rubrics[score.rubric] for score in result.scores if score.transcript == chat.id and score.n_findings}
            for chat in result.transcripts
        ]
        progress("audits", (number + 1) / len(readings))
    audited = [
        Audited(
            name, Rate.of(name in each for each in found[name]), Rate.of(bool(each - {name}) for each in found[name])
        )
        for name in names
    ]
    return audited, {name: Rate.of(bool(each) for each in found[name]) for name in (NONE, CONTROL)}
