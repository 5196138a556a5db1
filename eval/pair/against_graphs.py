"""`nla eval graph`: does an NLA name what attribution graphs, or patches, show to be at a token?

Every token where a graph has a concept within the NLA's reach is read; explanations are searched for the concepts that
are there and for those that are not (see :mod:`nla.eval.pair.graph_concepts`). The same is asked of the baselines:
another token's activation, and the mean; and of adversaries who see the text alone: the target, which goes on writing
it, and the confabulator. Where a trace made the graphs, the latent is also patched upstream (see
:mod:`nla.eval.pair.graph_counterfactual`), which no reader of the text can notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from nla.errors import ArgumentError, ShapeError
from nla.eval.adversaries import closest_texts, continuations
from nla.eval.auroc import ranked_auroc
from nla.eval.circuits.graph_format import read_graph
from nla.eval.explainers import explain
from nla.eval.pair.graph_concepts import (
    DONOR,
    HERE,
    OTHER,
    SAME,
    UNUSED,
    ConceptCell,
    ReadToken,
    Text,
    align,
    names,
    tokens_and_cells,
)
from nla.eval.pair.graph_counterfactual import GraphCounterfactual, follow_patches
from nla.eval.report import Check, Figures, Rate, Report, bars, checks_table, new_figure, paragraphs, table
from nla.eval.settings import EvaluationSettings
from nla.eval.target import Target, doubts, open_pair, token_ids
from nla.models.points import Point, context_length
from nla.progress import Progress, silent
from nla.stats import Interval, derangement
from nla.text.claims import claims

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nla.autoencoder import NLA

ENCODER, SHUFFLED, MEAN = "encoder", "shuffled activation", "mean activation"
TEXT, CONFABULATOR = "text-only LM", "confabulator"
KINDS = (SAME, DONOR, OTHER, UNUSED)
N_TRIES = 8
"""Texts that the confabulator chooses from for each token."""

TokenReader = Callable[[Sequence[ReadToken], Tensor], list[str]]
"""One explanation for each token's vector (n, d)."""


@dataclass(frozen=True)
class GraphScore(Figures):
    """What one reader's explanations are worth, on the cells of some graphs. Intervals resample documents."""

    reader: str
    recall: Rate
    """Share of explanations that name a concept that is there."""
    recall_latent: Rate | None
    """The same for concepts that the text up to the token does not hold; None: there are none."""
    recall_visible: Rate | None
    named: dict[str, Rate]
    """Share that names a concept that is not there, by kind of distractor."""
    precision: Rate | None
    """Of claims that name a concept asked about at the token: share that names one that is there, and no other."""
    auroc: Interval | None
    """That a concept that is there is named by more of the samples than one that is not."""
    examples: list[str]


@dataclass(frozen=True)
class GraphReport(Report):
    """What `nla eval graph` measures."""

    name = "graph"
    files: list[str]
    point: str
    n_graphs: int
    n_tokens: int
    n_concepts: int
    """Concepts at tokens: how often something was there to be named."""
    measured: bool
    """Whether patching shows what is there; otherwise names alone say it."""
    labelled: bool
    """Whether these are labels of features in all graphs, since nobody named supernodes."""
    scores: list[GraphScore]
    """The encoder, then the baselines, then the adversaries who see the text alone."""
    counterfactual: GraphCounterfactual | None = None
    """None: no trace found a site that can be patched upstream of what the pair reads."""

    def body(self) -> str:
        """The readable report."""
        kinds = [kind for kind in KINDS if any(kind in one.named for one in self.scores)]
        rows = [
            (
                one.reader,
                one.recall,
                one.recall_latent,
                one.recall_visible,
                *(one.named.get(kind) for kind in kinds),
                one.precision,
                one.auroc,
            )
            for one in self.scores
        ]
        header = ("reader", "named, of what is there", "… not in the text", "… in the text")
        source = "patching" if self.measured else "labels of features" if self.labelled else "supernodes"
        return paragraphs(
            f"## Explanations against {self.n_graphs} graphs",
            f"Read at `{self.point}`: {self.n_tokens} tokens, {self.n_concepts} concepts that are there, "
            f"according to {source}. 95 % intervals by document.",
            checks_table(self.checks),
            table((*header, *(f"named: {kind}" for kind in kinds), "precision", "AUROC"), rows),
            *([] if self.counterfactual is None else _counterfactual_lines(self.counterfactual)),
        )

    def figure(self) -> Figure:
        """What is named of what is there, of what is not, and from the baselines."""
        picture, (ours, *others) = new_figure(7, 3), self.scores
        there = {"named: what is there": ours.recall}
        grey = {f"named: {kind}": rate for kind, rate in ours.named.items()}
        grey |= {f"what is there: {one.reader}": one.recall for one in others}
        title = f"Explanations against {self.n_graphs} graphs at {self.point}"
        bars(picture.add_subplot(), there | grey, title, grey)
        return picture


@dataclass(frozen=True)
class GraphSettings(EvaluationSettings):
    """Which pair is scored, and how often it is asked."""

    least: ClassVar[dict[str, int]] = {"n_samples": 1}

    pair: NLA | str | Path = "couplets"
    """Name, folder or hub id, or a loaded pair."""
    n_samples: int = 4
    """Explanations of each activation at temperature 1."""


def judge_against_graphs(
    files: str | Path | Sequence[str | Path], settings: GraphSettings | None = None, progress: Progress = silent
) -> GraphReport:
    """Score a pair on attribution graphs of its target, from circuit-tracer, Neuronpedia or `nla trace`.

    Args:
        files: one file or several; concepts of the others are distractors.

    Raises:
        ArgumentError: no files, the same one twice, or no concept within the pair's reach.
        ParseError: a file is no graph; see :func:`nla.eval.circuits.graph_format.read_graph`.
        TokenizerMismatchError: a graph's tokens are not those of the pair's tokenizer.
    """
    settings = settings or GraphSettings()
    seed, paths = settings.seed, [files] if isinstance(files, str | Path) else list(files)
    if not paths or len({str(Path(path).resolve()) for path in paths}) < len(paths):
        raise ArgumentError(f"{len(paths)} files, some twice", "one file or more, each once", "correct them")
    loaded = [read_graph(path) for path in paths]
    nla = open_pair(settings.pair, settings.device)
    texts = [align(graph, nla.tokenizer, context_length(nla.model)) for graph in loaded]
    read_tokens, cells = tokens_and_cells(loaded, texts, Point.parse(nla.point).layer, seed)
    if not any(cell.kind == HERE for cell in cells):
        raise ArgumentError(
            f"{len(loaded)} graphs without a named concept at {nla.point} or before",
            "supernodes (qParams.supernodes), or features with labels (clerp), at layers that the pair reads",
            "name nodes in the viewer and save the graph, download it with labels, or score a pair of a deeper point",
        )
    columns = [
        [texts[i].columns[token.position] for token in read_tokens if token.graph == i] for i in range(len(texts))
    ]
    kept = [i for i, chosen in enumerate(columns) if chosen]
    acts = nla.read([texts[i].prompt for i in kept], positions=lambda document, spans: columns[kept[document]])
    progress("read", 1.0)

    def reader(_read_tokens: Sequence[ReadToken], vectors: Float[Tensor, "n d"]) -> list[str]:
        return explain(nla, vectors, seed=seed)

    scores = score_all(reader, read_tokens, cells, acts.vectors, settings.n_samples, seed, progress)
    scores += _text_readers(nla, texts, read_tokens, cells, acts.vectors, settings.n_samples, seed)
    progress("explain", 1.0)
    counterfactual = follow_patches(nla, loaded, texts, settings.n_samples, seed)
    return GraphReport(
        checks=_checks(scores, counterfactual),
        doubts=doubts(nla),
        files=[str(path) for path in paths],
        point=str(nla.point),
        n_graphs=len(loaded),
        n_tokens=len(read_tokens),
        n_concepts=sum(cell.kind == HERE for cell in cells),
        measured=any(graph.is_measured for graph in loaded),
        labelled=all(graph.labelled for graph in loaded),
        scores=scores,
        counterfactual=counterfactual,
    )


def _text_readers(
    nla: NLA,
    texts: Sequence[Text],
    read_tokens: Sequence[ReadToken],
    cells: Sequence[ConceptCell],
    vectors: Float[Tensor, "n d"],
    n_samples: int,
    seed: int,
) -> list[GraphScore]:
    """The adversaries that see the text up to the token alone: what the target writes next, and the closest of that."""
    target = Target.of(nla)
    ids = token_ids(target, [text.prompt for text in texts])
    prefixes = [ids[token.graph][: texts[token.graph].columns[token.position] + 1] for token in read_tokens]
    write = continuations(target, prefixes)
    tries = [write(seed + number) for number in range(max(N_TRIES, n_samples))]
    said = {
        TEXT: [texts[:n_samples] for texts in zip(*tries, strict=True)],
        CONFABULATOR: closest_texts(nla, list(zip(*tries, strict=True)), vectors, n_samples),
    }
    return [
        score(name, read_tokens, cells, [text for samples in by_token for text in samples], n_samples, seed)
        for name, by_token in said.items()
    ]


def _counterfactual_lines(found: GraphCounterfactual) -> list[str]:
    many = f"{found.n_graphs} graphs" if found.n_graphs > 1 else "1 graph"
    places = ", ".join(f"{place} ({n})" for place, n in found.places.items())
    rows = [
        ("patched: names the donor's word", found.donor),
        ("patched: still names the prompt's own word", found.base),
        ("nothing patched: names the prompt's own word", found.unpatched),
        ("a random direction of equal norm: names the donor's word", found.random),
        ("text-only LM, the text being the same: names the donor's word", found.text),
        ("the donor's difference that arrives where is read", found.arrived),
        ("effect of the patch on what the target writes", found.effect),
    ]
    return [
        f"The latent patched upstream, the text unchanged, in {many}: {places}.",
        table(("counterfactual", "share"), rows),
    ]


def score_all(
    reader: TokenReader,
    read_tokens: Sequence[ReadToken],
    cells: Sequence[ConceptCell],
    vectors: Float[Tensor, "n d"],
    n_samples: int = 1,
    seed: int = 0,
    progress: Progress = silent,
) -> list[GraphScore]:
    """The reader on the tokens' vectors (n, d), and on those of the baselines."""
    given = {ENCODER: vectors, MEAN: vectors.mean(0).expand_as(vectors)}
    if len(read_tokens) > 1:
        given[SHUFFLED] = vectors[derangement(len(read_tokens), seed)]
    scores = []
    for number, (name, used) in enumerate(given.items()):
        rows = [token for token in read_tokens for _ in range(n_samples)]
        texts = reader(rows, used.repeat_interleave(n_samples, dim=0))
        scores.append(score(name, read_tokens, cells, texts, n_samples, seed))
        progress("explain", (number + 1) / len(given))
    return scores


def score(
    name: str,
    read_tokens: Sequence[ReadToken],
    cells: Sequence[ConceptCell],
    texts: Sequence[str],
    n_samples: int = 1,
    seed: int = 0,
) -> GraphScore:
    """Score explanations, ``n_samples`` in a row for each token.

    Raises:
        ShapeError: not that many texts.
    """
    if len(texts) != len(read_tokens) * n_samples:
        raise ShapeError(f"{len(texts)} texts", f"{n_samples} for each of {len(read_tokens)} tokens", "read them all")
    by_token = [texts[i * n_samples : (i + 1) * n_samples] for i in range(len(read_tokens))]
    share = torch.tensor(
        [sum(names(text, cell.concept) for text in by_token[cell.token]) / n_samples for cell in cells],
        dtype=torch.float64,
    )
    owner = torch.tensor([read_tokens[cell.token].document for cell in cells])

    def rate(chosen: Sequence[bool]) -> Rate | None:
        mask = torch.tensor(chosen)
        return Rate.clustered(share[mask], owner[mask], seed) if mask.any() else None

    recall = rate([cell.kind == HERE for cell in cells])
    if recall is None:
        raise ArgumentError("no concept that is there", "at least one", "give graphs with supernodes")
    by_kind = {kind: rate([cell.kind == kind for cell in cells]) for kind in KINDS}
    return GraphScore(
        reader=name,
        recall=recall,
        recall_latent=rate([cell.kind == HERE and not cell.visible for cell in cells]),
        recall_visible=rate([cell.kind == HERE and cell.visible for cell in cells]),
        named={kind: value for kind, value in by_kind.items() if value is not None},
        precision=_precision(read_tokens, cells, by_token, seed),
        auroc=_auroc(cells, share, owner, seed),
        examples=[samples[0] for samples in by_token[:5]],
    )


def _precision(
    read_tokens: Sequence[ReadToken], cells: Sequence[ConceptCell], by_token: Sequence[Sequence[str]], seed: int
) -> Rate | None:
    """Share of the checkable claims that are right; None if no claim names a concept."""
    asked: list[list[ConceptCell]] = [[] for _ in read_tokens]
    for cell in cells:
        asked[cell.token].append(cell)
    counts = []
    for samples, here in zip(by_token, asked, strict=True):
        said = [
            {cell.kind for cell in here if names(claim, cell.concept)} for text in samples for claim in claims(text)
        ]
        counts.append((sum(kinds == {HERE} for kinds in said), sum(bool(kinds) for kinds in said)))
    totals = torch.tensor(counts, dtype=torch.float64)
    spoke = totals[:, 1] > 0  # documents without a checkable claim have no say
    return Rate.of_counts(totals[spoke], torch.tensor([token.document for token in read_tokens])[spoke], seed)


def _auroc(cells: Sequence[ConceptCell], share: Tensor, owner: Tensor, seed: int) -> Interval | None:
    """AUROC of the share of samples that name a concept, for concepts that are there; None without both kinds."""
    there = torch.tensor([cell.kind == HERE for cell in cells])
    if there.all() or not there.any():
        return None
    return ranked_auroc(torch.stack([1 - share, share], 1), there.long(), owner, seed=seed).auroc


def _checks(scores: Sequence[GraphScore], counterfactual: GraphCounterfactual | None = None) -> list[Check]:
    """More is named than of another activation, what is there before what is not, and what is put in upstream."""
    ours, others = scores[0], {one.reader: one for one in scores[1:]}
    shuffled = others.get(SHUFFLED)
    name = "concepts that are there are named, above a shuffled activation's"
    checks = [
        Check(name, ours.recall, "–", None)
        if shuffled is None
        else Check(name, ours.recall, f"interval > {shuffled.recall}", ours.recall.above(shuffled.recall))
    ]
    if ours.auroc is not None:
        known = ours.auroc.low == ours.auroc.low
        checks.append(
            Check(
                "AUROC of mention, there against not there",
                ours.auroc,
                "interval > 0.5",
                ours.auroc.low > 0.5 if known else None,
            )
        )
    if counterfactual is not None:
        name, bar = "patched upstream: the donor's word is named, above a random patch's", counterfactual.random
        checks.append(Check(name, counterfactual.donor, f"interval > {bar}", counterfactual.donor.above(bar)))
    return checks
