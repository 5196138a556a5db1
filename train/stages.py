"""What each stage of a recipe does, between the folder of the stage before it and its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nla import target
from nla.autoencoder import NLA
from nla.encoder import generate, parse, strip_tags
from nla.errors import RecipeError, TargetError
from nla.formats.native import read_json
from nla.formats.pair import load_baselines
from nla.organisms import TARGETS, lesson
from nla.points import d_model
from nla.store import Store, open_splits
from nla.tokens import load_tokenizer

from . import processes, world
from .contract import contract
from .describe import describe, save_texts
from .describe_texts import describe_texts
from .describers import open_describer
from .description import pair_marks
from .extract import extract_corpus
from .joint import train_joint
from .material import (
    CORPUS_SPLITS,
    Material,
    activation_norm,
    draw_rows,
    load_documents,
    load_material,
    prompts_of,
    save_told,
)
from .quote import quote_all
from .recipe import Recipe
from .run import DONE, PAIR
from .warmstart import warmstart_decoder, warmstart_encoder

ANSWERS = "answers"
"""Folder of a run with every answer of a describer: kept when the stage is made anew, since answers may have cost."""
N_WATCHED_TEXTS = 600
"""Held-out activations that are described: the ones that training is watched on."""


def target_folder(name: str) -> str:
    """Where a recipe's target lies: an embedded organism's folder, a folder, or a hub id as it stands."""
    return str(TARGETS.get(name, name))


def run_stage(stage: str, recipe: Recipe) -> dict[str, Any]:
    """Do one stage's work in ``<out>/<stage>`` and return its figures."""
    return {
        "extract": run_extract,
        "describe": run_describe,
        "warmstart": run_warmstart,
        "joint": run_joint,
        "control": run_control,
    }[stage](recipe, Path(recipe.out))


def load_target(recipe: Recipe) -> tuple[Any, Any]:
    """The recipe's target and its tokenizer, where this process works.

    Raises:
        RecipeError: there is no such target.
        The rest is as for :func:`nla.target.load_target`.
    """
    try:
        return target.load_target(
            target_folder(recipe.target),
            revision=recipe.revision,
            dtype=recipe.dtype,
            quantization=recipe.quantization,
            device=processes.place(),
        )
    except TargetError as error:
        known = ", ".join(TARGETS)
        raise RecipeError(
            f"target {recipe.target!r} ({error})", f"{known}, a folder, or a hub id", "correct the recipe"
        ) from error


def run_extract(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Activations of the world's or the corpus's documents."""
    if recipe.corpus is not None:
        return extract_store(recipe, out)
    if processes.is_main():
        model, tokenizer = load_target(recipe)
        told = lesson.load(str(recipe.world))
        world.extract(told, model, tokenizer, recipe.point, recipe.extract, recipe.seed, out / "extract")
    processes.wait()
    return {f"n_{split}": len(store) for split, store in world.load_stores(out / "extract").items()}


def extract_store(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Read the corpus; each process does its share of the chunks."""
    assert recipe.corpus is not None
    extract_corpus(
        recipe.corpus,
        target_folder(recipe.target),
        recipe.point,
        out / "extract",
        revision=recipe.revision,
        dtype=recipe.dtype,
        device=processes.place(),
        quantization=recipe.quantization,
        seed=recipe.seed,
        process=processes.rank(),
        processes=processes.count(),
        progress=processes.is_main(),
    )
    processes.wait()  # the last process writes the manifest
    manifest = Store.open(out / "extract").manifest
    return {**manifest.counts, **{f"n_{split}": n for split, n in manifest.n.items()}}


def run_describe(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Warm-start texts."""
    if recipe.corpus is not None:
        return describe_store(recipe, out)
    told = lesson.load(str(recipe.world))
    if processes.is_main():
        stores, drawn = load_documents(recipe, out)
        for split, store in stores.items():
            texts = describe(told, store, drawn[split], recipe.describe, f"{recipe.seed}/{split}")
            save_texts(out / "describe" / f"{split}.jsonl", texts)
    return {"hit_rate": told.hit_rate(recipe.describe.notice)}


def describe_store(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Ask the describer about some rows of each split. Of a local one each process asks its share."""
    stores = open_splits(out / "extract", CORPUS_SPLITS)
    wanted = {"train": recipe.texts.n_train, "eval": N_WATCHED_TEXTS}
    rows = {split: draw_rows(len(stores[split]), wanted[split], f"{recipe.seed}/{split}") for split in CORPUS_SPLITS}
    prefixes = [text for split in CORPUS_SPLITS for text in stores[split].prefixes(rows[split])]
    texts, summary = ask(recipe, out, prefixes, pair_marks(new_config(recipe, out)))
    if not processes.is_main():
        return {}
    n_train = len(rows["train"])
    parts = {"train": texts[:n_train], "eval": texts[n_train:]}
    counts = {split: save_told(out / "describe" / f"{split}.jsonl", rows[split], parts[split]) for split in parts}
    return {f"n_{split}": n for split, n in counts.items()} | summary


def ask(
    recipe: Recipe, out: Path, prefixes: list[str], refused: Sequence[str]
) -> tuple[Sequence[str | None], dict[str, Any]]:
    """The describer's text of each prefix, where it has one, and what the asking took; in the main process."""
    if recipe.describer.describer == "quote":
        return quote_all(prefixes, refused), {}
    local = recipe.describer.describer == "local"
    model, tokenizer = (None, None) if not local or recipe.describer.model else load_target(recipe)
    describer = open_describer(recipe.describer, model, tokenizer)
    if local and processes.count() > 1:
        describe_texts(prefixes[processes.rank() :: processes.count()], describer, out / ANSWERS, refused=refused)
        processes.wait()
    if not processes.is_main():
        return [], {}
    found = describe_texts(prefixes, describer, out / ANSWERS, refused=refused)
    return found.texts, found.summary.to_json()


def new_config(recipe: Recipe, out: Path, model: Any = None, tokenizer: Any = None) -> Any:
    """The contract that the recipe's pair will be trained under; ``model`` and ``tokenizer`` where they are loaded.

    Raises:
        ConfigError: no token of the tokenizer can be the marker, or the one asked for cannot.
    """
    tokenizer = tokenizer or load_tokenizer(target_folder(recipe.target), recipe.revision)
    width = Store.open(out / "extract").d_model if model is None else d_model(model)
    return contract(
        target_folder(recipe.target),
        recipe.revision,
        tokenizer,
        recipe.point,
        prompts_of(recipe),
        d_model=width,
        dtype=recipe.dtype,
        quantization=recipe.quantization,
        max_new_tokens=recipe.pair.max_new_tokens,
        activation_norm=activation_norm(recipe, out),
        injection_norm=recipe.pair.injection_norm,
        head_bias=recipe.pair.head_bias,
    )


def new_pair(recipe: Recipe, out: Path) -> NLA:
    """An untrained pair for the recipe's target."""
    model, tokenizer = load_target(recipe)
    config = new_config(recipe, out, model, tokenizer)
    torch.manual_seed(recipe.seed)
    baselines = load_baselines(out / "extract" / world.BASELINES, d_model(model))
    return NLA.create(model, tokenizer, config, rank=recipe.pair.rank, alpha=recipe.pair.alpha, baselines=baselines)


def fit_apart(nla: NLA, recipe: Recipe, material: Material, folder: Path, scale: float, seed: int) -> dict[str, Any]:
    """Supervised training of both halves on the described texts, for ``scale`` times the recipe's steps."""
    settings, (vectors, texts) = recipe.warmstart, material.told()
    held_texts = list(material.watched.warm_texts or ())
    shared: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "seed": seed,
        "held_out": (material.watched.vectors, held_texts),
        "eval_every": settings.eval_every,
        "save_every": settings.save_every,
        "rows_per_backward": settings.rows_per_backward,
        "gradient_checkpointing": settings.gradient_checkpointing,
    }
    encoder = warmstart_encoder(
        nla,
        vectors,
        texts,
        folder / "encoder",
        steps=math.ceil(settings.encoder_steps * scale),
        learning_rate=settings.encoder_learning_rate,
        **shared,
    )
    decoder = warmstart_decoder(
        nla,
        vectors,
        texts,
        folder / "decoder",
        steps=math.ceil(settings.decoder_steps * scale),
        learning_rate=settings.decoder_learning_rate,
        head_learning_rate=settings.head_learning_rate,
        **shared,
    )
    save(nla, folder / PAIR)
    return {"encoder": encoder, "decoder": decoder}


def save(nla: NLA, folder: Path) -> None:
    """Save a pair, once for all processes."""
    if processes.is_main():
        nla.save_pretrained(folder)
    processes.wait()


def load(folder: Path) -> NLA:
    """A pair, where this process works."""
    return NLA.from_pretrained(folder, device=processes.place())


def run_warmstart(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Encoder and decoder apart."""
    nla = new_pair(recipe, out)
    figures = fit_apart(nla, recipe, load_material(recipe, out), out / "warmstart", 1.0, recipe.seed)
    return {**figures, "parameters": nla.n_parameters}


def run_joint(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Encoder and decoder together; of a corpus's pair, its score on held-out documents goes into its card."""
    nla, material = load(out / "warmstart" / PAIR), load_material(recipe, out)
    figures = train_joint(
        nla,
        material.vectors,
        material.strata,
        material.texts,
        out / "joint" / "run",
        settings=recipe.joint,
        held_out=material.watched,
    )
    nla.metrics = {"recipe": recipe.name, "joint": figures}
    if recipe.world is not None:
        nla.metrics["hit_rate"] = lesson.load(recipe.world).hit_rate(recipe.describe.notice)
    else:
        nla.metrics |= measure(nla, recipe, out)
    save(nla, out / "joint" / PAIR)
    return figures


def measure(nla: NLA, recipe: Recipe, out: Path) -> dict[str, Any]:
    """Score and data of a corpus's pair, for metrics.json: one sampled explanation an activation, temperature 1."""
    assert recipe.corpus is not None
    store = Store.open(out / "extract", "eval")
    acts = store.activations(draw_rows(len(store), recipe.texts.n_scored, f"{recipe.seed}/score"))
    answers = generate(nla, acts.vectors, samples=1, seed=recipe.seed).texts
    texts = [parse(answer, nla.config) or strip_tags(answer, nla.config) for answer in answers]
    score = nla.score(acts, nla.reconstruct(texts, strict=False), seed=recipe.seed)
    counts = store.manifest.n_documents
    data = f"{recipe.corpus.source}: {counts['train']:,} documents; scored on {counts['eval']:,} others"
    return {"score": score.to_json(), "data": data}


def run_control(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Continue the warm start alone for as long as joint training took, on the same texts.

    AdamW and the cosine restart at the full rate; encoder and decoder share the time in the recipe's proportions.
    """
    seconds = {stage: read_json(out / stage / DONE)["summary"]["seconds"] for stage in ("warmstart", "joint")}
    scale = seconds["joint"] / max(seconds["warmstart"], 1e-9)
    nla = load(out / "warmstart" / PAIR)
    figures = fit_apart(nla, recipe, load_material(recipe, out), out / "control", scale, recipe.seed + 1)
    return {**figures, "times_the_warm_start": scale, "joint_seconds": seconds["joint"]}
