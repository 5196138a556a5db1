"""What training works on: vectors, warm-start texts and what is watched, from an organism's world or from a corpus."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from nla.errors import DescriberError, ParseError, RecipeError, visible
from nla.models.read import Activations
from nla.organisms import ground_truth
from nla.organisms.ground_truth import Document, GroundTruth
from nla.storage.files import read_json, read_json_lines, write_atomic
from nla.store.reader import Store, open_splits
from nla.train.data.world import MANIFEST, documents, load_stores, load_texts, plain
from nla.train.fit.monitor import EvalSet
from nla.train.fit.vectors import Chosen, Vectors
from nla.train.pair_config import DECODER_TEMPLATE, ENCODER_PROMPT, SLOT, Prompts
from nla.train.recipe import N_WATCHED, Recipe

CORPUS_SPLITS = ("train", "eval")
DONE, PAIR = "stage.json", "pair"
"""In a stage's folder: the mark of a finished stage, and the pair that it trained."""


@dataclass(frozen=True)
class TrainingData:
    """All that training needs of the stages before it."""

    vectors: Vectors
    """Activations (n, d) to train on."""
    strata: Sequence[str]
    """Kind of position of each."""
    texts: Sequence[str | None]
    """The describer's text of each; None: it was not asked, or failed."""
    watched: EvalSet
    """Held-out activations that training is watched on."""

    def described(self) -> tuple[Vectors, list[str]]:
        """The activations that have a text, and these texts."""
        rows = [row for row, text in enumerate(self.texts) if text is not None]
        return Chosen(self.vectors, torch.tensor(rows)), [self.texts[row] or "" for row in rows]


def load_training_data(recipe: Recipe, out: Path) -> TrainingData:
    """What the stages extract and describe left in ``out``.

    Raises:
        RecipeError: it was made from other documents.
        StoreError, ParseError: it is damaged.
    """
    return of_corpus(recipe, out) if recipe.corpus is not None else of_world(recipe, out)


def prompts_of(recipe: Recipe) -> Prompts:
    """What encoder and decoder of the recipe's pair are asked with."""
    if recipe.world is not None:
        world = ground_truth.load(recipe.world)
        return Prompts(world.ENCODER_PROMPT.replace(world.MARKER, SLOT), world.DECODER_TEMPLATE, world.MARKER)
    pair = recipe.pair
    return Prompts(pair.encoder_prompt or ENCODER_PROMPT, pair.decoder_template or DECODER_TEMPLATE, pair.marker)


def activation_norm(recipe: Recipe, out: Path) -> float:
    """Mean L2 norm of the training activations."""
    if recipe.corpus is not None:
        return Store.open(out / "extract").manifest.norms["mean"]
    norm = read_json(path := out / "extract" / MANIFEST).get("activation_norm")
    if not isinstance(norm, float | int) or not 0 < norm < math.inf:
        raise ParseError(f"{path} without the activations' norm", "a number above 0", f"delete {path.parent}")
    return float(norm)


# Worlds


def load_documents(recipe: Recipe, out: Path) -> tuple[dict[str, Activations], dict[str, list[Document]]]:
    """The stored activations of each split of a world, and the documents that they were read from, drawn again.

    Raises:
        RecipeError: they were read from other documents.
    """
    stores = load_stores(out / "extract")
    drawn = documents(ground_truth.load(str(recipe.world)), recipe.extract, recipe.seed)
    for split, store in stores.items():
        if store.texts != [document.text for document in drawn[split]]:
            raise RecipeError(
                f"{out / 'extract' / split}, read from other documents than this version of nla draws",
                "the documents of the recipe's seed",
                f"delete {out}, since all of it follows from them, or set another `out`",
            )
    return stores, drawn


def of_world(recipe: Recipe, out: Path) -> TrainingData:
    """Activations, texts and known truth of an organism's world."""
    stores, drawn = load_documents(recipe, out)
    texts = {split: load_texts(out / "describe" / f"{split}.jsonl") for split in ("train", "eval")}
    n = min(N_WATCHED, len(stores["eval"]))
    rows = stores["eval"][torch.arange(n)]
    documents_of_rows = [drawn["eval"][number] for number in rows.document.tolist()]
    truth = truth_of(ground_truth.load(str(recipe.world)), rows, documents_of_rows)
    described, truthful = texts["eval"].described[:n], texts["eval"].truthful[:n]
    watched = EvalSet(rows.vectors, rows.strata, described, truthful, truth)
    return TrainingData(stores["train"].vectors, stores["train"].strata, texts["train"].described, watched)


def truth_of(
    world: GroundTruth, rows: Activations, documents_of_rows: list[Document]
) -> Callable[[list[str]], dict[str, float]]:
    """Figures of sampled explanations, one a row: ``named``, the share that names the latent where there is one, and
    ``visible``, the share of the other claims that are true, both as the suite counts them."""

    def truth(texts: list[str]) -> dict[str, float]:
        named, visible = [], []
        for text, span, document in zip(texts, rows.spans, documents_of_rows, strict=True):
            visible += world.visible_claims(document, span, text)
            named.append(world.named(document, span, text))
        judged = [hit for hit in named if hit is not None]
        return {"named": sum(judged) / max(len(judged), 1), "visible": sum(visible) / max(len(visible), 1)}

    return truth


# Corpora


class DescribedRows(NamedTuple):
    """Rows of a split that have a text."""

    rows: Int[Tensor, " m"]
    """Rising."""
    texts: list[str]


def of_corpus(recipe: Recipe, out: Path) -> TrainingData:
    """Activations of a store, of which some have a text."""
    stores = open_splits(out / "extract", CORPUS_SPLITS)
    folder = out / "describe"
    described = {split: load_described(folder / f"{split}.jsonl", len(store)) for split, store in stores.items()}
    texts: list[str | None] = [None] * len(stores["train"])
    for row, text in zip(described["train"].rows.tolist(), described["train"].texts, strict=True):
        texts[row] = text
    rows = described["eval"].rows[:N_WATCHED]
    watched = EvalSet(stores["eval"].vectors[rows], stores["eval"].strata(rows), described["eval"].texts[: len(rows)])
    return TrainingData(stores["train"].vectors, stores["train"].strata(), texts, watched)


def draw_rows(n: int, wanted: int, key: str) -> Int[Tensor, " m"]:
    """``wanted`` of ``n`` rows (or all), drawn by ``key``, rising: each document has its share of them."""
    return torch.tensor(sorted(random.Random(key).sample(range(n), min(wanted, n))), dtype=torch.int64)


def save_described(path: Path, rows: Int[Tensor, " m"], texts: Sequence[str | None]) -> int:
    """Write what was described, one JSON object a line, and return how many texts there are.

    Raises:
        DescriberError: there is no text at all.
    """
    described = [(row, text) for row, text in zip(rows.tolist(), texts, strict=True) if text is not None]
    if not described:
        raise DescriberError(
            f"no text for any of {len(texts)} activations of {path.stem}", "some", "see why above, then run again"
        )
    write_atomic(path, "".join(json.dumps({"row": row, "text": text}) + "\n" for row, text in described))
    return len(described)


def load_described(path: Path, n: int) -> DescribedRows:
    """What :func:`save_described` wrote of a split of ``n`` rows.

    Raises:
        ParseError: a line is not such an object.
    """
    try:
        lines = list(read_json_lines(path))
        rows, texts = torch.tensor([int(line["row"]) for line in lines]), [plain(line["text"]) for line in lines]
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        got = f"{path} ({visible(str(error))[:200]})"
        raise ParseError(got, "a row and a text a line", f"delete {path.parent}") from error
    if not len(rows) or int(rows.max()) >= n or bool((rows.diff() <= 0).any()):
        raise ParseError(f"{path} with rows that are none of the store's", f"rising rows below {n}", f"delete {path}")
    return DescribedRows(rows, texts)
