"""``nla train``, ``nla recipe``, ``nla extract``: a recipe, a model or a corpus in; a pair, a recipe or a store out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from nla.cli.console import OK, answer, emit, quiet, show
from nla.cli.options import Device, Json, Settings, TargetAdapter, one_place, seed, share, text


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")],
    until: Annotated[str | None, text("--until", "STAGE", "The last stage to run.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say which stages would run, and what they take.")
    ] = False,
    settings: Settings = None,
    json: Json = False,
) -> int:
    """Make a pair from a recipe.

    A recipe's stages run in order: sample (where the target writes its corpus), extract, describe, warmstart, joint,
    control (where it is asked for). A stage whose inputs have not changed is skipped; one that was stopped, by Ctrl-C
    or a full disk, resumes when the same command is given again.

    examples:
      nla train qwen2.5-7b --dry-run              which stages would run; tokens, steps, memory and time of each
      nla train couplets                          the shipped pair, from nothing
      accelerate launch --num_processes 4 -m nla.train gemma-3-12b
      nla train couplets --until warmstart --set warmstart.encoder_steps=100 --set out=runs/try
      nla train my_recipe.yaml
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from nla.train.fit.processes import is_main
    from nla.train.run import run_recipe

    summary = run_recipe(recipe, overrides=settings or [], until=until, dry_run=dry_run)
    if not is_main():
        return OK
    if json or not dry_run:
        return answer(summary, f"{recipe}: stages", json)
    from nla.cli import view

    show(view.stages(summary, f"{recipe}: stages"))
    return OK


def recipe(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name, folder or hub id of the model to read.")],
    revision: Annotated[str | None, text("--revision", "NAME", "Of the model on the hub.")] = None,
    json: Json = False,
) -> int:
    """Print a ready recipe for a model.

    Only the model's configuration and tokenizer are read. The point is about two thirds up, the marker is a token of
    the tokenizer that stands alone in the prompt, and sizes are the model's own. Everything in it can be changed.

    examples:
      nla recipe Qwen/Qwen2.5-0.5B-Instruct > my.yaml
      nla train my.yaml --dry-run
    """
    quiet()
    from nla.train.recipe_for import as_yaml, recipe_for

    content = recipe_for(model, revision)
    if json:
        emit(content)
    else:
        print(as_yaml(content), end="")
    return OK


def extract(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Embedded name, folder or hub id.")],
    source: Annotated[
        str, typer.Argument(metavar="CORPUS", help="A datasets name, or files: parquet, JSON lines, text, chats.")
    ],
    *,
    point: Annotated[
        str, typer.Option("--point", metavar="POINT", help="Such as resid_post.20, the output of block 20.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The store; continues what is there.")],
    dtype: Annotated[
        str | None, text("--dtype", "DTYPE", "float32, bfloat16, float16 or auto (default: the target's own).")
    ] = None,
    quantization: Annotated[str | None, text("--quantization", "BITS", "8bit or 4bit.")] = None,
    revision: Annotated[str | None, text("--revision", "NAME", "Of the target on the hub.")] = None,
    target_adapter: TargetAdapter = None,
    random_seed: Annotated[int, seed("Of the positions.")] = 0,
    process: Annotated[
        str, typer.Option("--process", metavar="I/N", help="Do the share of process I of N, from 0.")
    ] = "0/1",
    settings: Settings = None,
    device: Device = None,
    json: Json = False,
) -> int:
    r"""Store a target's activations of a corpus.

    A corpus goes through the target, up to the point and no further; the chosen activations are stored in shards, with
    their texts, in splits that share no text. Killed, the same command continues to the same bytes.

    examples:
      nla extract Qwen/Qwen2.5-7B-Instruct HuggingFaceFW/fineweb --point resid_post.20 --out runs/acts \
          --dtype bfloat16 --set config=sample-10BT --set streaming=true --set n_documents=10000
      nla extract my/model 'texts/*.parquet' --point resid_post.12 --set positions=every:8 --out runs/acts
      nla extract my/model chats.jsonl --point resid_post.12 --set kind=chat --set positions=turns --out runs/acts

    KEY of --set is a field of nla.train.data.corpus.CorpusSettings: positions, n_positions, first_position, max_tokens,
    n_documents, eval_fraction, text_column, streaming, config, split, revision, kind, ...
    """
    number, processes = share(process)
    where = one_place(device)
    quiet()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from nla.organisms import adapter_folder, noted_target
    from nla.train.data.corpus import CorpusSettings
    from nla.train.data.extract import ExtractionSettings, extract_corpus
    from nla.train.schema import build, override

    corpus: dict = {}
    for setting in settings or []:
        override(corpus, setting)
    reading = ExtractionSettings(
        build(CorpusSettings, {**corpus, "source": source}, "--set"),
        noted_target(target),
        point,
        revision=revision,
        dtype=dtype,
        device=where,
        quantization=quantization,
        adapter=adapter_folder(target_adapter),
        seed=random_seed,
        process=number,
        processes=processes,
    )
    manifest = extract_corpus(reading, out, progress=True)
    content = {"store": str(out), "finished": manifest is not None}
    if manifest is not None:
        about = ("target", "point", "dtype", "d_model", "counts", "n", "n_documents", "norms", "variance")
        content |= {name: getattr(manifest, name) for name in about}
    return answer(content, f"{out}: activations of {target} at {point}", json)
