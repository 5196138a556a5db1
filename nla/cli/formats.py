"""``nla import``, ``nla export``, ``nla push``: pairs and data of other projects in and out; a pair on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nla.cli.console import about, answer, load, quiet
from nla.cli.options import Device, Json, PairArgument, add, given, group, pair_name, places, text

if TYPE_CHECKING:
    from nla.autoencoder import NLA
    from nla.models.read import Activations

SAMPLED = 10_000
"""Activations of a store that the price of a dropped bias is measured on."""

PairOut = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The pair, as this library has it.")]
Target = Annotated[
    str | None,
    text("--target", "MODEL", "Folder or hub id of the model to read (default: the base that is named)."),
]
Dtype = Annotated[str | None, text("--dtype", "DTYPE", "Of the weights (default: as they are).")]
Denominator = Annotated[Path | None, text("--store", "FOLDER", "Activations that give FVE its denominator.")]

import_app = group("import")
export_app = group("export")


@import_app.callback()
def _import() -> None:
    """Bring in published pairs and data as folders of this library.

    Full weights are referred to, not copied. FVE needs a denominator, which published pairs do not bring: --store takes
    it from the training split of a store of the same target, revision, point and tokenizer, and refuses any other.
    """


@export_app.callback()
def _export() -> None:
    """Write pairs and stores in the reference's formats."""


def import_kitft(
    av: Annotated[str, typer.Argument(metavar="AV", help="Folder or hub id of the encoder.")],
    ar: Annotated[str, typer.Argument(metavar="AR", help="Folder or hub id of the decoder.")],
    *,
    out: PairOut,
    target: Target = None,
    dtype: Dtype = None,
    quantization: Annotated[
        str | None, text("--quantization", "BITS", "8bit or 4bit, of all three models (default: as they are).")
    ] = None,
    store: Denominator = None,
    device: Device = None,
    json: Json = False,
) -> int:
    """Bring in a pair of full weights, AV and AR.

    examples:
      nla import kitft kitft/nla-qwen2.5-7b-L20-av kitft/nla-qwen2.5-7b-L20-ar --out pairs/qwen7b --store runs/acts
    """
    quiet()
    from nla.formats.kitft import load as load_kitft
    from nla.storage.files import try_folder

    try_folder(out)
    options = given(target=target, dtype=dtype, quantization=quantization, device=places(device))
    return _imported(load_kitft(av, ar, **options), "kitft", out, store, json)


def import_easynla(
    av: Annotated[str, typer.Argument(metavar="AV", help="Folder or hub id of the encoder's adapter.")],
    ar: Annotated[
        str | None,
        typer.Argument(metavar="AR", show_default=False, help="Folder of the decoder's weights (default: AV/critic)."),
    ] = None,
    *,
    out: PairOut,
    sidecar: Annotated[Path | None, text("--sidecar", "FILE", "nla_meta.yaml of the data it was trained on.")] = None,
    target: Target = None,
    dtype: Dtype = None,
    store: Denominator = None,
    device: Device = None,
    json: Json = False,
) -> int:
    """Bring in a pair of LoRA adapters.

    examples:
      nla import easynla ckpts/av ckpts/ar --out pairs/qwen8b
    """
    quiet()
    from nla.formats.easynla import load as load_easynla
    from nla.storage.files import try_folder

    try_folder(out)
    options = given(target=target, dtype=dtype, sidecar=sidecar)
    return _imported(load_easynla(av, ar, device=places(device), **options), "easynla", out, store, json)


def import_parquet(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Parquet, its sidecar beside it.")],
    *,
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="TARGET", help="Folder or hub id of the base model.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The store.")],
    json: Json = False,
) -> int:
    """Bring in a data set of activations, as a store.

    examples:
      nla import parquet data/rl_shuf.parquet --tokenizer Qwen/Qwen2.5-7B-Instruct --out runs/acts
    """
    quiet()
    from nla.formats.parquet import import_parquet
    from nla.storage.files import try_folder
    from nla.text.tokens import load_tokenizer

    try_folder(out)
    manifest = import_parquet(file, out, load_tokenizer(tokenizer))
    return answer({"store": str(out), "n": manifest.n, "counts": manifest.counts}, f"{file}: a store", json)


def export_kitft(
    pair: PairArgument,
    *,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="For the folders av and ar.")],
    drop_bias: Annotated[
        bool, typer.Option("--drop-bias", help="Leave out the head's bias, and measure what it did.")
    ] = False,
    store: Annotated[Path | None, text("--store", "FOLDER", "Activations to measure that on.")] = None,
    device: Device = None,
    json: Json = False,
) -> int:
    """Write a pair of adapters as the two full-weight folders that the reference's client loads.

    examples:
      nla export kitft runs/qwen2.5-7b/joint/pair --out exported
      nla export kitft my/pair --out exported --drop-bias --store runs/acts
    """
    from nla.formats.kitft_export import export_pair
    from nla.storage.files import try_folder

    try_folder(out)
    nla = load(pair, device)
    dropped = export_pair(nla, out, drop_bias, None if store is None else store_sample(nla, store))
    content: dict[str, Any] = {"av": str(out / "av"), "ar": str(out / "ar")}
    content |= {} if dropped is None else {"without the bias": dropped._asdict()}
    return answer(content, f"{pair}: exported", json)


def export_parquet(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A folder that `nla extract` made.")],
    *,
    split: Annotated[str, typer.Option("--split", metavar="SPLIT", help="train or eval.")] = "train",
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The parquet file.")],
    json: Json = False,
) -> int:
    """Write a store as the reference's parquet, with a sidecar.

    examples:
      nla export parquet runs/acts --out data/acts.parquet
    """
    quiet()
    from nla.formats.parquet import export_parquet
    from nla.storage.files import try_file
    from nla.store.reader import Store

    try_file(out)
    opened = Store.open(store, split)
    export_parquet(opened, out)
    return answer({"file": str(out), "n": len(opened)}, f"{store}: as parquet", json)


def push(
    pair: Annotated[str, typer.Argument(metavar="PAIR", help="Name or folder.", callback=pair_name)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Hub id, such as someone/nla-qwen2.5-7b.")],
    private: Annotated[bool, typer.Option("--private", help="For you alone, if the repository is new.")] = False,
    revision: Annotated[str | None, text("--revision", "BRANCH", "A branch, made if there is none.")] = None,
    message: Annotated[str | None, text("--message", "TEXT", "Of the commit.")] = None,
    json: Json = False,
) -> int:
    """Publish a pair on the hub.

    The token is that of `hf auth login` or HF_TOKEN. The folder is checked and published as it lies there; no model is
    loaded. Of its card the header and the part between <!-- card --> and <!-- /card -->, which comes from metrics.json,
    are made anew; what you wrote and what `nla eval ... --card` put there stays.

    examples:
      nla push runs/qwen2.5-7b/joint/pair someone/nla-qwen2.5-7b --private
    """
    quiet()
    from nla.pair import publish
    from nla.pair.folder import find_folder

    folder, _ = find_folder(pair)
    address = publish.push_folder(folder, repo, private, revision, message)
    return answer({"commit": address}, f"{pair}: published", json)


def _imported(nla: NLA, kind: str, out: Path, store: Path | None, json: bool) -> int:
    """Save an imported pair, with FVE's denominator if there is a store; the exit code."""
    if store is not None:
        from nla.store.reader import Store

        nla.fit_baselines(Store.open(store))
    nla.save_pretrained(out)
    content = {**about(nla, str(out)), "injection": nla.config.injection.mode, "baselines": sorted(nla.baselines)}
    return answer(content, f"{out}: imported from {kind}", json)


def store_sample(nla: NLA, folder: Path) -> Activations:
    """Some training activations of a store, which must be of the pair's target and point.

    Raises:
        StoreError: it is of another target, point or tokenizer.
    """
    from nla.store.reader import Store

    store = Store.open(folder)
    nla.check_store(store)
    return store.activations(list(range(0, len(store), max(1, len(store) // SAMPLED))))


add(import_app, kitft=import_kitft, easynla=import_easynla, parquet=import_parquet)
add(export_app, kitft=export_kitft, parquet=export_parquet)
