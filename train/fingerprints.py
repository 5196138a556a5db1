"""What decides each stage's result: a recipe and its target go in, one hash a stage comes out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from nla.errors import RecipeError
from nla.organisms import hash_target, is_target, local_folder
from nla.storage import hashes
from nla.text.prompts import load_prompts
from nla.train.data.corpus import describe_files, local_files, mixed_files
from nla.train.recipe import Recipe
from nla.train.schema import STAGES, deciding


def fingerprints(recipe: Recipe, target: str) -> dict[str, str]:
    """A hash for each stage of the settings that it is the first to be decided by, and of all that came before.

    Args:
        target: identity of the target, see :func:`target_print`.
    """
    decided: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES}
    for stage, name, value in deciding(recipe):
        decided[stage][name] = value
    decided["extract"] |= {"target": target, "files": _corpus_files(recipe)}
    mixed = [] if recipe.corpus is None else mixed_files(recipe.corpus)
    if mixed:
        decided["extract"]["mixed"] = describe_files(mixed)
    if not recipe.writes_corpus:
        del decided["sample"]
        return _chain(decided, "")
    corpus = recipe.corpus
    assert corpus is not None
    decided["sample"] |= {
        "target": target,
        **{name: decided["extract"][name] for name in ("dtype", "quantization", "seed")},
        "prompts": load_prompts(corpus.prompts).model_dump(),
        "documents": [corpus.n_documents, corpus.eval_share, corpus.split_key, corpus.documents_per_chunk],
    }
    return _chain(decided, "")


def former_fingerprints(recipe: Recipe, target: str) -> dict[str, str]:
    """The hashes that versions before 0.4 wrote: stages that they finished are still taken for done."""
    settings = dataclasses.asdict(recipe)
    shared = {name: settings[name] for name in ("world", "point", "seed", "dtype", "quantization")} | {"target": target}
    frugal = ("rows_per_backward", "gradient_checkpointing", "eval_every", "save_every")
    asking = (
        "concurrency",
        "timeout_s",
        "tries",
        "price_in",
        "price_out",
        "budget_usd",
        "failing_share",
        "parameters_b",
    )
    sources = settings["extract"], settings["describe"]
    if recipe.corpus is not None:
        sources = (
            {"corpus": _without(settings["corpus"], ("prompts", "mix")), "files": _corpus_files(recipe)},
            _without(settings["describer"], asking) | settings["texts"],
        )
        prompts = {name: settings["pair"][name] for name in ("marker", "encoder_prompt", "decoder_template")}
        if any(prompts.values()):  # those hashes did not tell them apart: texts may have been checked against others
            sources = (sources[0], sources[1] | prompts)
    decided = {
        "extract": sources[0],
        "describe": sources[1],
        "warmstart": {"pair": settings["pair"], "warmstart": _without(settings["warmstart"], frugal)},
        "joint": _without(settings["joint"], frugal),
        "control": "",
    }
    return _chain(decided, json.dumps(shared, sort_keys=True))


def _chain(decided: Mapping[str, Any], before: str) -> dict[str, str]:
    prints = {}
    for stage in decided:
        before = hashlib.sha256((before + json.dumps(decided[stage], sort_keys=True)).encode()).hexdigest()
        prints[stage] = before
    return prints


def _corpus_files(recipe: Recipe) -> Any:
    files = None if recipe.corpus is None else local_files(recipe.corpus)
    return files and describe_files(files)


def _without(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def target_print(target: str, revision: str | None = None) -> str:
    """Identity of the target: a folder's hash, but for its README and git's files; a packaged one's name and hash; or a
    hub id and its revision.

    Raises:
        RecipeError: a revision of what is not on the hub.
    """
    folder = local_folder(target)
    if folder is None and not is_target(target):
        return f"{target}@{revision}"
    if revision is not None:
        raise RecipeError(f"revision {revision!r} of {target}", "a revision of a hub id", "remove it")
    if folder is None:
        return f"{target}@{hash_target(target)}"
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder)
        if not name.parts[0].startswith((".git", "README")):
            digest.update(f"{name}\0{hashes.sha256(file)}\0".encode())
    return digest.hexdigest()
