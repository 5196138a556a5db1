"""What a target's activations hold, by point and kind of token: what a pair's point is chosen by, before training.

Reads the documents that the stage `sample` of a recipe wrote (a corpus of chats with known attributes), at several
points in one pass, and prints for each attribute how often a linear probe that did not see the document names it,
beside the commonest value and probes on TF-IDF of all visible text and of the visible answer; then how much of the
variance (FVE of unit vectors) a ridge regression gets from what a text could say.

    nla train smollm2 --until sample
    python benchmarks/points.py smollm2 runs/smollm2/sample --points 9,14,19,24,29
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from torch.nn.functional import one_hot

from nla.models.load import load_target
from nla.models.points import blocks, logits_after, truncated_view
from nla.models.read import vectors_at
from nla.store.shards import Document
from nla.text.facts import BOOKKEEPING
from nla.train.data.corpus import CorpusSettings, open_corpus
from nla.train.data.documents import Reader
from nla.train.describe.structured import Probes
from nla.transcripts.positions import ANSWER_START

N_COMMON, N_TERMS, N_TOP = 100, 1500, 4
PENALTY = 1000.0
"""Of the regressions, on standardised features."""


def main() -> None:
    parser = argparse.ArgumentParser(description="what activations hold, by point and kind of token")
    parser.add_argument("target")
    parser.add_argument("corpus")
    parser.add_argument("--points", default="9,14,19,24,29", help="blocks, counted from 0")
    parser.add_argument("--documents", type=int, default=800)
    parser.add_argument("--positions", type=int, default=11, help="tokens per document, spread over kinds")
    args = parser.parse_args()
    model, tokenizer = load_target(args.target, dtype="auto")
    layers = [int(layer) for layer in args.points.split(",")]
    settings = CorpusSettings(
        args.corpus, kind="chat", positions="kinds", n_positions=args.positions, max_tokens=256, documents_per_chunk=64
    )
    reader, prepared = Reader(tokenizer, settings, 0), []
    for number, entries in open_corpus(settings).chunks(settings, lambda chunk: True):
        prepared.append(reader.prepare(number, entries or []))
        if sum(len(chunk.documents) for chunk in prepared) >= args.documents:
            break
    pairs = [pair for chunk in prepared for pair in zip(chunk.documents, chunk.ids, strict=True)]
    documents, ids = zip(*islice(pairs, args.documents), strict=True)
    columns = [[span.index for span in document.spans] for document in documents]
    last = len(blocks(model)) - 1
    points = [f"resid_post.{layer}" for layer in dict.fromkeys([*layers, last])]
    streams = vectors_at(truncated_view(model, points[-1]), ids, columns, 4096, points=points, progress=True)
    kinds = np.array([kind for document in documents for kind in document.strata])
    groups = [str(document.attributes.get("request", n)) for n, document in enumerate(documents) for _ in columns[n]]
    tokens = [row[column] for row, chosen in zip(ids, columns, strict=True) for column in chosen]
    before = [row[max(column - 1, 0)] for row, chosen in zip(ids, columns, strict=True) for column in chosen]
    top = torch.cat([logits_after(model, part).float().topk(N_TOP).indices for part in streams[:, -1].split(256)])
    texts = {
        "visible text": [document.text[: span.end] for document in documents for span in document.spans],
        "visible answer": [text for document in documents for text in _answers(document)],
    }
    terms = {
        name: torch.tensor(TfidfVectorizer(max_features=N_TERMS).fit_transform(part).toarray())
        for name, part in texts.items()
    }
    attributes = [document.attributes for n, document in enumerate(documents) for _ in columns[n]]
    print(f"{len(documents)} documents, {len(kinds)} activations; accuracy of linear probes, by kind of token\n")
    names = dict.fromkeys(k for a in attributes for k, v in a.items() if isinstance(v, str) and k not in BOOKKEEPING)
    tasks: dict[str, list[str | None]] = {name: [a.get(name) for a in attributes] for name in names}
    for sort in ("own", "neutral"):
        tasks[f"instruction ({sort})"] = [a.get("instruction") if a.get("answer") == sort else None for a in attributes]
    tasks.pop("instruction", None)
    tasks["next token"], tasks["token"], tasks["token before"] = map(_common, (top[:, 0].tolist(), tokens, before))
    for name, values in tasks.items():
        rows = [row for row, value in enumerate(values) if value is not None]
        known, of_rows = [values[row] for row in rows], [groups[row] for row in rows]
        print(f"{name}: {len(rows)} activations, {len(set(known))} values")
        print(
            f"  {'commonest value':16s}",
            _by_kind(np.array([v == Counter(known).most_common(1)[0][0] for v in known]), kinds[rows]),
        )
        for layer in layers:
            vectors = streams[rows, points.index(f"resid_post.{layer}")].double()
            print(f"  {f'block {layer}':16s}", _by_kind(_right(vectors, known, of_rows), kinds[rows]), flush=True)
        for reader, features in terms.items():
            print(f"  {reader:16s}", _by_kind(_right(features[rows], known, of_rows), kinds[rows]), flush=True)
    print("\nFVE by ridge regression on held-out documents, by what it is given")
    embedding = model.get_input_embeddings().weight.detach().float()  # pyright: ignore
    unit = embedding / embedding.norm(dim=1, keepdim=True)
    given: Mapping[str, list[Tensor]] = {
        "kind, token": [_codes(kinds.tolist()), unit[tokens]],
        "… and what comes next": [unit[top].mean(1), unit[top[:, 0]]],
        "… and the token before": [unit[before]],
        "… and attributes": [_codes([str(v) for v in values]) for name, values in tasks.items() if "token" not in name],
    }
    held_out = torch.tensor([int(group) % 5 == 0 if group.isdigit() else False for group in groups])
    for layer in layers:
        vectors = streams[:, points.index(f"resid_post.{layer}")].float()
        vectors, features = vectors / vectors.norm(dim=1, keepdim=True), []
        for name, more in given.items():
            features += more
            print(f"  block {layer}, {name:24s}", _fve(torch.cat(features, 1), vectors, held_out, kinds), flush=True)


def _answers(document: Document) -> list[str]:
    """At each of a document's tokens, what can be seen of its answer."""
    starts = [span.start for span, kind in zip(document.spans, document.strata, strict=True) if kind == ANSWER_START]
    return [document.text[starts[0] : span.end] if starts else "" for span in document.spans]


def _common(tokens: Sequence[int]) -> list[str | None]:
    """The commonest tokens as values; None for others."""
    common = {token for token, _ in Counter(tokens).most_common(N_COMMON)}
    return [str(token) if token in common else None for token in tokens]


def _right(vectors: Tensor, values: list[str | None], groups: list[str]) -> np.ndarray:
    return np.array(Probes({"train": vectors.float()}, groups).right({"train": values})["train"])


def _by_kind(right: np.ndarray, kinds: np.ndarray) -> str:
    shares = defaultdict(list)
    for hit, kind in zip(right, kinds, strict=True):
        shares[kind].append(hit)
    parts = (f"{kind} {np.mean(hits):.2f}" for kind, hits in sorted(shares.items()) if len(hits) >= 10)
    return f"all {right.mean():.2f} | " + " | ".join(parts)


def _codes(values: Sequence[str]) -> Tensor:
    names = sorted(set(values))
    return one_hot(torch.tensor([names.index(value) for value in values]), len(names)).float()


def _fve(features: Tensor, vectors: Tensor, held_out: Tensor, kinds: np.ndarray) -> str:
    features = features - features[~held_out].mean(0)
    features = features / features[~held_out].std(0).clamp_min(1e-4)
    mean, x = vectors[~held_out].mean(0), features[~held_out]
    weights = torch.linalg.solve(x.T @ x + PENALTY * torch.eye(x.shape[1]), x.T @ (vectors[~held_out] - mean))
    error = (features @ weights + mean - vectors).square().sum(1)
    spread = (vectors - mean).square().sum(1)

    def share(rows: Tensor) -> float:
        return float(1 - error[rows].sum() / spread[rows].sum())

    parts = (f"{kind} {share(held_out & torch.tensor(kinds == kind)):.2f}" for kind in np.unique(kinds))
    return f"all {share(held_out):.2f} | " + " | ".join(parts)


if __name__ == "__main__":
    main()
