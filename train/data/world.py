"""A world with known truth → its documents, their activations with baselines, and texts of each: stages 1 and 2."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla.baselines import save_baselines
from nla.errors import ParseError, visible
from nla.metrics import Baseline
from nla.models.read import Activations, read
from nla.organisms.ground_truth import Document, GroundTruth
from nla.storage.files import read_json_lines, write_atomic, write_json
from nla.text.tokens import Span
from nla.train.schema import Count, Number, section

SPLITS = ("train", "eval", "held_out")
MANIFEST = "manifest.json"
BASELINES = "baselines.safetensors"


@section("extract", decides="extract")
class ExtractSettings:
    """How many documents, and which of their tokens."""

    n_documents: Count = 20_000
    """Documents to train on; none has a held-out latent."""
    n_eval_documents: Count = 400
    """Documents of each held-out split: ``eval`` and ``held_out`` (whose latents were never trained on)."""
    n_other_positions: Count = 2
    """Tokens drawn at random from each document beside those of its main strata."""


@section("describe", decides="describe")
class DescribeSettings:
    """What the describer knows."""

    notice: Annotated[Number, Field(ge=0, le=1)] = 0.25
    """Probability that it sees the latent; otherwise it guesses, as an outsider to the world would."""


class Texts(NamedTuple):
    """One text an activation: what the describer says, and what a reader that knows the rule would say."""

    described: list[str]
    truthful: list[str]


def documents(world: GroundTruth, settings: ExtractSettings, seed: int) -> dict[str, list[Document]]:
    """The documents of every split. A text stands in one split only; the seed decides all of them."""
    return world.splits(settings.n_documents, settings.n_eval_documents, seed)


def choose_positions(
    world: GroundTruth, document: Document, spans: Sequence[Span], n_other: int, key: str
) -> list[int]:
    """Every token of a main stratum and ``n_other`` more, drawn by a generator keyed to the document."""
    kinds = world.strata(document, spans)
    main = [span.index for span, kind in zip(spans, kinds, strict=True) if kind in world.MAIN]
    others = [span.index for span, kind in zip(spans, kinds, strict=True) if kind not in world.MAIN]
    return sorted([*main, *random.Random(key).sample(others, min(n_other, len(others)))])


def extract(
    world: GroundTruth,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    point: str,
    settings: ExtractSettings,
    seed: int,
    out_dir: Path,
) -> dict[str, Activations]:
    """Read every split and save it under ``out_dir/<split>``, with baselines of the training vectors and a manifest."""
    stores: dict[str, Activations] = {}
    for split, drawn in documents(world, settings, seed).items():

        def positions(i: int, spans: list[Span], drawn=drawn, split=split) -> list[int]:
            return choose_positions(world, drawn[i], spans, settings.n_other_positions, f"{seed}/{split}/{i}")

        def strata(i: int, spans: list[Span], drawn=drawn) -> list[str]:
            return world.strata(drawn[i], spans)

        texts = [document.text for document in drawn]
        stores[split] = read(target, tokenizer, texts, point, positions=positions, strata=strata, progress=True)
        stores[split].save(out_dir / split)
    baselines = fit_baselines(stores["train"])
    save_baselines(out_dir / BASELINES, baselines)
    write_json(
        out_dir / MANIFEST,
        {
            "point": point,
            "n": {split: len(store) for split, store in stores.items()},
            "n_by_stratum": {kind: baseline.n for kind, baseline in baselines.items()},
            "variance": {kind: baseline.variance for kind, baseline in baselines.items()},
            "activation_norm": float(stores["train"].vectors.norm(dim=1).mean()),
        },
    )
    return stores


def fit_baselines(store: Activations) -> dict[str, Baseline]:
    """Baselines of the training vectors: ``global`` and one a stratum."""
    kinds = sorted(set(store.strata))
    masks = {kind: torch.tensor([k == kind for k in store.strata]) for kind in kinds}
    return {"global": Baseline.fit(store.vectors)} | {k: Baseline.fit(store.vectors[m]) for k, m in masks.items()}


def load_stores(out_dir: Path) -> dict[str, Activations]:
    """The splits that :func:`extract` saved."""
    return {split: Activations.load(out_dir / split) for split in SPLITS}


def describe(
    world: GroundTruth, store: Activations, documents: Sequence[Document], settings: DescribeSettings, key: str
) -> Texts:
    """For every activation of a store, what an outsider could write from the visible words alone; each row has a
    generator of its own, keyed by ``key``."""
    rows = list(zip(store.document.tolist(), store.spans, strict=True))
    described = [
        world.describe(documents[number], span, random.Random(f"{key}/{number}/{span.index}"), settings.notice)
        for number, span in rows
    ]
    return Texts(described, [world.truthful(documents[number], span) for number, span in rows])


def save_texts(path: Path, texts: Texts) -> None:
    """One JSON object a line."""
    lines = (json.dumps({"described": d, "truthful": t}) for d, t in zip(*texts, strict=True))
    write_atomic(path, "\n".join(lines) + "\n")


def load_texts(path: Path) -> Texts:
    """What :func:`save_texts` wrote.

    Raises:
        ParseError: a line is not such an object.
    """
    try:
        rows = list(read_json_lines(path))
        return Texts([plain(row["described"]) for row in rows], [plain(row["truthful"]) for row in rows])
    except (OSError, ValueError, LookupError, TypeError) as error:
        got = f"{path} ({visible(str(error))[:200]})"
        raise ParseError(got, "described and truthful text a line", f"delete {path.parent}") from error


def plain(value: object) -> str:
    """A text as it is; a TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} for a text")
    return value
