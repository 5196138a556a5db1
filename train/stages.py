"""What each stage of a recipe does, between the folder of the stage before it and its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla.autoencoder import NLA
from nla.baselines import load_baselines
from nla.config import NLAConfig
from nla.errors import AccessError, ContextLengthError, ParseError, RecipeError, TargetError
from nla.models import load as target
from nla.models.checkpoint import read_config
from nla.models.points import NO_LIMIT, Point, d_model
from nla.organisms import PACKAGED, TARGETS, ground_truth, noted_target, target_folder
from nla.pair.encoder import parse, strip_tags
from nla.storage.files import read_json
from nla.store.manifest import MANIFEST_FILE as STORE_MANIFEST
from nla.store.reader import Store, open_splits
from nla.text.prompts import load_prompts
from nla.text.tokens import load_tokenizer, render_prompt
from nla.train.data import world
from nla.train.data.corpus import written_by_target
from nla.train.data.extract import ExtractionSettings, extract_corpus
from nla.train.data.requests import draw_requests
from nla.train.data.sample import count_documents, sample_corpus
from nla.train.describe.describer import AT_HOME
from nla.train.describe.prompt import allowed, pair_marks, quote
from nla.train.describe.structured import Rows, describe_rows
from nla.train.describe.texts import Summary, describe_texts, open_describer
from nla.train.fit import processes
from nla.train.fit.joint import share_step, train_joint
from nla.train.fit.settings import FitSettings
from nla.train.fit.warmstart import HALVES, warmstart
from nla.train.pair_config import SLOT, pair_config, place_marker
from nla.train.recipe import N_WATCHED, Recipe
from nla.train.training_data import (
    CORPUS_SPLITS,
    DONE,
    PAIR,
    TrainingData,
    activation_norm,
    draw_rows,
    load_documents,
    load_training_data,
    prompts_of,
    save_described,
)

ANSWERS = "answers"
"""Folder of a run with every answer of a describer: kept when the stage is made anew, since answers may have cost."""


def run_stage(stage: str, recipe: Recipe) -> dict[str, Any]:
    """Do one stage's work in ``<out>/<stage>`` and return its figures."""
    return {
        "sample": run_sample,
        "extract": run_extract,
        "describe": run_describe,
        "warmstart": run_warmstart,
        "joint": run_joint,
        "control": run_control,
    }[stage](recipe, Path(recipe.out))


def revision_of(recipe: Recipe, out: Path) -> str | None:
    """The revision of the target that later stages load: the very commit that the corpus was read with."""
    if recipe.corpus is not None and (out / "extract" / STORE_MANIFEST).is_file():
        return Store.open(out / "extract").manifest.revision
    return recipe.revision


def load_target(recipe: Recipe, revision: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The recipe's target and its tokenizer, where this process works.

    Raises:
        RecipeError: there is no such target.
        The rest is as for :func:`nla.models.load.load_target`.
    """
    try:
        return target.load_target(
            recipe.target,
            revision=revision,
            dtype=recipe.dtype,
            quantization=recipe.quantization,
            device=processes.own_device(),
        )
    except AccessError:
        raise
    except TargetError as error:
        known = ", ".join((*TARGETS, *PACKAGED))
        raise RecipeError(
            f"target {recipe.target!r} ({error})", f"{known}, a folder, or a hub id", "correct the recipe"
        ) from error


def preflight(recipe: Recipe, describing: bool, reachable: bool) -> None:
    """Refuse what can be known before anything runs: marker, describer's key, context, shares of a step.

    Args:
        describing: the describer is still to be asked.
        reachable: the target is here, or there is a network; a plan is made without it too.

    Raises:
        ConfigError, TemplateError: no token can be the marker, or there is no chat template.
        EndpointError, MissingExtraError: the describer's address, key or client is missing.
        PointError, ContextLengthError: the target is not deep, or not long, enough.
        ArgumentError: the rows of a step do not divide over the processes.
    """
    share_step(recipe.joint)
    processes.share(recipe.warmstart.batch_size, "batch_size", recipe.warmstart.rows_per_backward)
    if describing and recipe.describer.describer not in AT_HOME:
        open_describer(recipe.describer)
    if not reachable:
        return
    source = target_folder(recipe.target)
    config = read_config(source, recipe.revision)
    Point.parse(recipe.point).within(config.num_hidden_layers)
    tokenizer, prompts = load_tokenizer(source, recipe.revision), prompts_of(recipe)
    marker, *_ = place_marker(tokenizer, prompts)
    longest = len(render_prompt(tokenizer, prompts.encoder.replace(SLOT, marker))) + recipe.pair.max_new_tokens
    context = getattr(config, "max_position_embeddings", None) or NO_LIMIT
    if longest > context:
        raise ContextLengthError(
            f"pair.max_new_tokens={recipe.pair.max_new_tokens} after the encoder's prompt: {longest} tokens",
            f"at most {context}, the target's context",
            "lower pair.max_new_tokens",
        )


def run_sample(recipe: Recipe, out: Path) -> dict[str, Any]:
    """The target's own documents; each process writes its share of the chunks."""
    corpus = recipe.corpus
    assert corpus is not None and corpus.n_documents is not None
    requests = draw_requests(
        load_prompts(corpus.prompts), corpus.n_documents, recipe.seed, corpus.eval_share, corpus.split_key
    )
    model, tokenizer = load_target(recipe, recipe.revision)
    mine = sample_corpus(
        model,
        tokenizer,
        requests,
        recipe.sample,
        recipe.seed,
        out / "sample",
        corpus.documents_per_chunk,
        processes.rank(),
        processes.count(),
    )
    processes.wait()
    n_answers, n_tokens = int(processes.total(mine.answers)), int(processes.total(mine.tokens))
    rate = processes.total(mine.tokens / max(mine.seconds, 1e-9))
    written = {"answers": n_answers, "tokens": n_tokens, "tokens_per_s": round(rate, 1)}
    return {**count_documents(out / "sample"), "last_run": written}


def run_extract(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Activations of the world's or the corpus's documents."""
    if recipe.corpus is not None:
        return extract_store(recipe, out)
    if processes.is_main():
        model, tokenizer = load_target(recipe, recipe.revision)
        planted = ground_truth.load(str(recipe.world))
        world.extract(planted, model, tokenizer, recipe.point, recipe.extract, recipe.seed, out / "extract")
    processes.wait()
    return {f"n_{split}": len(store) for split, store in world.load_stores(out / "extract").items()}


def extract_store(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Read the corpus; each process does its share of the chunks."""
    assert recipe.corpus is not None
    device = processes.own_device()
    settings = ExtractionSettings(
        written_by_target(recipe.corpus, out / "sample") if recipe.writes_corpus else recipe.corpus,
        noted_target(recipe.target),
        recipe.point,
        revision=recipe.revision,
        dtype=recipe.dtype,
        device=None if device is None else str(device),
        quantization=recipe.quantization,
        seed=recipe.seed,
        process=processes.rank(),
        processes=processes.count(),
    )
    extract_corpus(settings, out / "extract", progress=processes.is_main())
    processes.wait()  # the last process writes the manifest
    manifest = Store.open(out / "extract").manifest
    return {**manifest.counts, **{f"n_{split}": n for split, n in manifest.n.items()}}


def run_describe(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Warm-start texts."""
    if recipe.corpus is not None:
        return describe_store(recipe, out)
    planted = ground_truth.load(str(recipe.world))
    if processes.is_main():
        stores, drawn = load_documents(recipe, out)
        for split, store in stores.items():
            texts = world.describe(planted, store, drawn[split], recipe.describe, f"{recipe.seed}/{split}")
            world.save_texts(out / "describe" / f"{split}.jsonl", texts)
    return {"hit_rate": planted.hit_rate(recipe.describe.notice)}


def describe_store(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Ask the describer about some rows of each split. Of a local one each process asks its share."""
    stores = open_splits(out / "extract", CORPUS_SPLITS)
    wanted = {"train": recipe.texts.n_train, "eval": N_WATCHED}
    rows = {split: draw_rows(len(stores[split]), wanted[split], f"{recipe.seed}/{split}") for split in CORPUS_SPLITS}
    refused = pair_marks(new_config(recipe, out))
    if recipe.describer.describer == "structured":
        if not processes.is_main():
            return {}
        chosen = {split: Rows(stores[split], rows[split]) for split in CORPUS_SPLITS}
        described, summary = describe_rows(chosen, *load_target(recipe, revision_of(recipe, out)), seed=recipe.seed)
        parts = {split: [allowed(text, refused) for text in texts] for split, texts in described.items()}
    else:
        prefixes = [text for split in CORPUS_SPLITS for text in stores[split].prefixes(rows[split])]
        texts, summary = ask(recipe, out, prefixes, refused)
        if not processes.is_main():
            return {}
        n_train = len(rows["train"])
        parts = {"train": texts[:n_train], "eval": texts[n_train:]}
    counts = {split: save_described(out / "describe" / f"{split}.jsonl", rows[split], parts[split]) for split in parts}
    return {f"n_{split}": n for split, n in counts.items()} | summary


def ask(
    recipe: Recipe, out: Path, prefixes: list[str], refused: Sequence[str]
) -> tuple[Sequence[str | None], dict[str, Any]]:
    """The describer's text of each prefix, where it has one, and what the asking took; in the main process.

    Of a local describer each process asks its share; an endpoint is asked by the main process alone.
    """
    if recipe.describer.describer == "quote":
        return [quote(prefix, refused) for prefix in prefixes], {}
    local = recipe.describer.describer == "local"
    is_target = local and recipe.describer.model is None
    model, tokenizer = load_target(recipe, revision_of(recipe, out)) if is_target else (None, None)
    if not local and not processes.is_main():
        return [], {}
    describer = open_describer(recipe.describer, model, tokenizer, dtype=recipe.dtype, device=processes.own_device())
    if not local:
        described = describe_texts(prefixes, describer, out / ANSWERS, refused=refused)
        return described.texts, described.summary.to_json()
    mine = processes.share_of(prefixes)
    described = describe_texts(mine, describer, out / ANSWERS, refused=refused, n_all=len(prefixes))
    summary = Summary.merged(processes.gathered([described.summary]))
    summary.check(recipe.describer.failing_share)
    return processes.gathered(described.texts), summary.to_json()


def new_config(
    recipe: Recipe,
    out: Path,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> NLAConfig:
    """The config that the recipe's pair will be trained under; ``model`` and ``tokenizer`` where they are loaded.

    Raises:
        ConfigError: no token of the tokenizer can be the marker, or the one asked for cannot.
    """
    revision = revision_of(recipe, out)
    tokenizer = tokenizer or load_tokenizer(target_folder(recipe.target), revision)
    if model is not None:
        revision = getattr(model.config, "_commit_hash", None) or revision
    width = Store.open(out / "extract").d_model if model is None else d_model(model)
    return pair_config(
        noted_target(recipe.target),
        revision,
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
    model, tokenizer = load_target(recipe, revision_of(recipe, out))
    config = new_config(recipe, out, model, tokenizer)
    torch.manual_seed(recipe.seed)
    baselines = load_baselines(out / "extract" / world.BASELINES, d_model(model))
    return NLA.create(model, tokenizer, config, rank=recipe.pair.rank, alpha=recipe.pair.alpha, baselines=baselines)


def fit_apart(nla: NLA, recipe: Recipe, data: TrainingData, folder: Path, scale: float, seed: int) -> dict[str, Any]:
    """Supervised training of both halves on the described texts, for ``scale`` times the recipe's steps."""
    w, (vectors, texts) = recipe.warmstart, data.described()
    held_out = (data.watched.vectors, list(data.watched.warm_texts or ()))
    reports = ("eval_every", "save_every", "rows_per_backward", "gradient_checkpointing")
    figures = {}
    for half in HALVES:
        settings = FitSettings(
            math.ceil(getattr(w, f"{half}_steps") * scale),
            w.batch_size,
            getattr(w, f"{half}_learning_rate"),
            seed,
            w.head_learning_rate if half == "decoder" else None,
            **{name: getattr(w, name) for name in reports},
        )
        figures[half] = warmstart(half, nla, vectors, texts, folder / half, settings, held_out)
    save(nla, folder / PAIR)
    return figures


def save(nla: NLA, folder: Path) -> None:
    """Save a pair, once for all processes."""
    if processes.is_main():
        nla.save_pretrained(folder)
    processes.wait()


def load(folder: Path) -> NLA:
    """A pair, where this process works."""
    return NLA.from_pretrained(folder, device=processes.own_device())


def run_warmstart(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Encoder and decoder apart."""
    nla = new_pair(recipe, out)
    figures = fit_apart(nla, recipe, load_training_data(recipe, out), out / "warmstart", 1.0, recipe.seed)
    return {**figures, "parameters": nla.n_parameters}


def run_joint(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Encoder and decoder together; of a corpus's pair, its score on held-out documents goes into its card."""
    nla, data = load(out / "warmstart" / PAIR), load_training_data(recipe, out)
    figures = train_joint(
        nla,
        data.vectors,
        data.strata,
        data.texts,
        out / "joint" / "run",
        settings=recipe.joint,
        held_out=data.watched,
    )
    nla.metrics = {"recipe": recipe.name, "joint": figures}
    if recipe.world is not None:
        nla.metrics["hit_rate"] = ground_truth.load(recipe.world).hit_rate(recipe.describe.notice)
    else:
        nla.metrics |= measure(nla, recipe, out)
    save(nla, out / "joint" / PAIR)
    return figures


def measure(nla: NLA, recipe: Recipe, out: Path) -> dict[str, Any]:
    """Score and data of a corpus's pair, for metrics.json: one sampled explanation an activation, temperature 1."""
    assert recipe.corpus is not None
    store = Store.open(out / "extract", "eval")
    acts = store.activations(draw_rows(len(store), recipe.texts.n_scored, f"{recipe.seed}/score"))
    at_once = recipe.joint.rows // processes.count()
    mine = processes.share_of(acts.vectors)
    answers = processes.gathered(nla.encoder.generate(mine, samples=1, seed=recipe.seed, batch_size=at_once).texts)
    texts = [parse(answer, nla.config) or strip_tags(answer, nla.config) for answer in answers]
    score = nla.score(acts, nla.reconstruct(texts, strict=False), seed=recipe.seed)
    counts = store.manifest.n_documents
    data = f"{recipe.corpus.source}: {counts['train']:,} documents; scored on {counts['eval']:,} others"
    return {"score": score.to_json(), "data": data}


def run_control(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Continue the warm start alone for as long as joint training took, on the same texts.

    AdamW and the cosine restart at the full rate; encoder and decoder share the time in the recipe's proportions.
    """
    seconds = {stage: seconds_of(out / stage / DONE) for stage in ("warmstart", "joint")}
    scale = seconds["joint"] / max(seconds["warmstart"], 1e-9)
    nla = load(out / "warmstart" / PAIR)
    figures = fit_apart(nla, recipe, load_training_data(recipe, out), out / "control", scale, recipe.seed + 1)
    return {**figures, "times_the_warm_start": scale, "joint_seconds": seconds["joint"]}


def seconds_of(done: Path) -> float:
    """How long a finished stage took.

    Raises:
        ParseError: its mark does not say it.
    """
    summary = read_json(done).get("summary")
    seconds = summary.get("seconds") if isinstance(summary, dict) else None
    if not isinstance(seconds, float | int) or not 0 <= seconds < 1e12:
        raise ParseError(f"{done} without the stage's seconds", "the mark as it was written", f"delete {done.parent}")
    return float(seconds)
