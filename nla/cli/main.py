"""The commands. Thin, and the only place that prints.

Every heavy import stands inside the command that needs it, so that ``nla --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from nla.cli.console import LINE_WIDTH, about, emit, given_text, load, places, positions, progress_bar, quiet, show
from nla.cli.usage import FAILED, INTERNAL, INTERRUPTED, OK, USAGE, build_parser
from nla.errors import ArgumentError, InterruptedTraining, NLAError, visible

STEER_SAMPLES, STEER_TOKENS = 8, 12
SAMPLED = 10_000
"""Activations of a store that the price of a dropped bias is measured on."""
_PACKAGES = ("nla", "torch", "transformers", "peft", "trl")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = build_parser().parse_args(argv)
    args.words = list(sys.argv[1:] if argv is None else argv)
    try:
        return COMMANDS[args.command](args)
    except KeyboardInterrupt:
        print("nla: stopped", file=sys.stderr)
        return INTERRUPTED
    except NLAError as error:
        print("nla: " + visible(" ".join(str(error).split())), file=sys.stderr)
        return INTERRUPTED if isinstance(error, InterruptedTraining) else USAGE
    except BrokenPipeError:  # the reader, such as `head`, has seen enough: leave nothing to flush to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception:
        print("\n".join(map(visible, traceback.format_exc().splitlines())), file=sys.stderr)
        print("nla: a fault of nla itself. Next: report it with the lines above and the command", file=sys.stderr)
        return INTERNAL


def explain(args: argparse.Namespace) -> int:
    """``nla explain``: the token view of one text."""
    text, chosen = given_text(args), positions(args.positions)
    nla = load(args.pair, args.device)
    from nla.organisms import adapter_folder

    with nla.planted(adapter_folder(args.target_adapter)):
        acts = nla.read(text, chosen)
    notes = nla.explain(acts, samples=args.samples)
    if args.json:
        emit({**about(nla, args.pair), "text": text, "notes": notes.to_json()})
    if args.json and args.svg is None:
        return OK
    from nla import view

    title = f"{args.pair} at {nla.point}: what each activation holds, in words"
    if args.svg is not None:
        from nla.storage.files import write_atomic

        write_atomic(args.svg, view.svg(view.token_view(notes, ""), title, LINE_WIDTH))
    if not args.json:
        show(view.token_view(notes, title))
    return OK


def steer(args: argparse.Namespace) -> int:
    """``nla steer``: edit the explanation of a text's last token, and add the decoded difference to its activation."""
    old, separator, new = (part.strip() for part in args.replace.partition("="))
    if not (old and separator and new):
        raise ArgumentError(f"--replace {args.replace}", "OLD=NEW", "write it like --replace cat=bat")
    text = given_text(args)
    nla = load(args.pair, args.device)
    import torch

    from nla import view
    from nla.pair import steer

    note = nla.explain(nla.read(text, "last"), samples=STEER_SAMPLES)[0]
    word = re.compile(rf"\b{re.escape(old)}\b")
    before = view.leading(note.texts, lambda sample: word.search(sample) is not None)
    if before is None:
        raise ArgumentError(
            f"--replace {args.replace}: no explanation of {visible(note.token)!r} says {old!r}",
            f"a word of its explanation: {view.leading(note.texts)}",
            "name one of its words, or end TEXT with the token that holds the plan (often a line break)",
        )
    after = word.sub(lambda _match: new, before)
    direction = steer.edit_direction(nla.decoder, before, after)
    random = torch.randn(direction.shape, generator=torch.Generator().manual_seed(0))

    def written(directions: Any, strength: float | None) -> list[str]:
        texts = [text] * (1 if directions is None else len(directions))
        with nla.role("target"):
            return steer.generate_patched(
                nla.base, nla.tokenizer, texts, nla.point, "last", directions, STEER_TOKENS, strength=strength
            )

    (plain,), (steered, control) = written(None, None), written(torch.stack([direction, random]), args.strength)
    content = {
        "explanation": before,
        "edited": after,
        "strength": args.strength,
        "continuation": plain,
        "steered": steered,
        "random direction of equal norm": control,
    }
    if args.json:
        emit({**about(nla, args.pair), "text": text, **content})
    else:
        show(view.facts(content, f"steering {args.pair} at {nla.point}, at {visible(note.token)}"))
    return OK


def evaluate(args: argparse.Namespace) -> int:
    """``nla eval``: one evaluation of the suite."""
    name = args.command.removeprefix("eval ").replace("-", "_")
    options = {key: value for key in args.options if (value := getattr(args, key)) is not None}
    if name == "gates" and args.model.startswith("couplets/"):
        options.setdefault("variant", args.model.removeprefix("couplets/"))
    if name == "gates" and args.check and "variant" not in options:
        raise ArgumentError("--check without --variant", "planner or plain", "say whose bounds should hold")
    quiet()
    where, _, names = EVALUATIONS[name].partition(":")
    function, _, settings = names.partition(":")
    module = importlib.import_module(where)
    if settings:
        options = {"settings": getattr(module, settings)(**options)}
    with progress_bar() as progress:
        report = getattr(module, function or "run")(args.model, out_dir=args.out, progress=progress, **options)
    if args.card is not None:
        command = shlex.join(["nla", *args.words])
        importlib.import_module("nla.eval.report").write_card(args.card, name, report.to_card(), command)
    if args.json:
        emit(report)
    else:
        print("\n".join(map(visible, report.to_markdown().splitlines())))
    return FAILED if args.check and not report.passed else OK


def audit(args: argparse.Namespace) -> int:
    """``nla audit``: transcripts held against rubrics."""
    options = {key: value for key in args.options if (value := getattr(args, key)) is not None}
    of_files = {key: options.pop(key) for key in ("controls", "max_mb", "skip_bad") if key in options}
    quiet()
    settings = importlib.import_module("nla.audit.settings").AuditSettings(**options)
    with progress_bar() as progress:
        report = importlib.import_module("nla.audit.from_files").audit_files(
            args.pair, args.paths, settings, out_dir=args.out, progress=progress, **of_files
        )
    if args.json:
        emit(report)
    else:
        show(*report.summary(args.out))
    return FAILED if args.check and not report.passed else OK


def info(args: argparse.Namespace) -> int:
    """``nla info``: load a pair, which checks it, and say what it is."""
    nla = load(args.pair, args.device)
    from nla.models import points

    content = {
        **about(nla, args.pair),
        "architecture": points.backbone(nla.model).config.model_type,
        "blocks": len(points.blocks(nla.model)),
        "d_model": nla.config.d_model,
        "context": points.context_length(nla.model),
        "vocabulary": len(nla.tokenizer),
        "parameters": nla.n_parameters,
        "strata": sorted(nla.baselines),
        "device": str(nla.device),
        "metrics": nla.metrics,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES} | {"python": sys.version.split()[0]},
    }
    if args.json:
        emit(content)
        return OK
    from nla import view

    kind = "target, encoder and decoder, each a whole model" if nla.config.separate else "two adapters on one target"
    show(view.facts(view.flat(content), f"A pair: {kind}"))
    return OK


def train(args: argparse.Namespace) -> int:
    """``nla train``: run a recipe's stages."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    summary = importlib.import_module("nla.train.run").run_recipe(
        args.recipe, overrides=args.set, until=args.until, dry_run=args.dry_run
    )
    if not importlib.import_module("nla.train.fit.processes").is_main():
        return OK
    if args.json:
        emit(summary)
        return OK
    from nla import view

    title = f"{args.recipe}: stages"
    show(view.stages(summary, title) if args.dry_run else view.facts(view.flat(summary), title))
    return OK


def extract(args: argparse.Namespace) -> int:
    """``nla extract``: a corpus to a store."""
    schema = importlib.import_module("nla.train.schema")
    content: dict[str, Any] = {}
    for override in args.set:
        schema.override(content, override)
    settings = importlib.import_module("nla.train.data.corpus").CorpusSettings
    corpus = schema.build(settings, {**content, "source": args.source}, "--set")
    share = re.fullmatch(r"(\d+)/(\d+)", args.process)
    if share is None:
        raise ArgumentError(f"--process {args.process}", "I/N, such as 0/4", "count processes from 0")
    quiet()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    manifest = importlib.import_module("nla.train.data.extract").extract_corpus(
        corpus,
        importlib.import_module("nla.organisms").target_folder(args.target),
        args.point,
        args.out,
        revision=args.revision,
        dtype=args.dtype,
        quantization=args.quantization,
        adapter=importlib.import_module("nla.organisms").adapter_folder(args.target_adapter),
        seed=args.seed,
        process=int(share[1]),
        processes=int(share[2]),
        progress=True,
    )
    content = {"store": str(args.out), "finished": manifest is not None}
    if manifest is not None:
        about = ("target", "point", "dtype", "d_model", "counts", "n", "n_documents", "norms", "variance")
        content |= {name: getattr(manifest, name) for name in about}
    return tell(args, content, f"{args.out}: activations of {args.target} at {args.point}")


def bring_in(args: argparse.Namespace) -> int:
    """``nla import``: a pair or data in another format."""
    quiet()
    kind = args.command.removeprefix("import ")
    if kind == "parquet":
        tokenizer = importlib.import_module("nla.text.tokens").load_tokenizer(args.tokenizer)
        manifest = importlib.import_module("nla.formats.parquet").import_parquet(args.file, args.out, tokenizer)
        return tell(args, {"store": str(args.out), "n": manifest.n, "counts": manifest.counts}, f"{args.file}: a store")
    names = ("target", "dtype", "sidecar", "quantization")
    options: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name, None)}
    if kind == "easynla":
        options["device"] = places(args.device)
    nla = importlib.import_module(f"nla.formats.{kind}").load(args.av, args.ar, **options)
    if args.store is not None:
        nla.fit_baselines(importlib.import_module("nla.store.reader").Store.open(args.store))
    nla.save_pretrained(args.out)
    content = {**about(nla, str(args.out)), "injection": nla.config.injection.mode, "baselines": sorted(nla.baselines)}
    return tell(args, content, f"{args.out}: imported from {kind}")


def send_out(args: argparse.Namespace) -> int:
    """``nla export``: a pair or a store in the reference's format."""
    quiet()
    if args.command == "export parquet":
        store = importlib.import_module("nla.store.reader").Store.open(args.store, args.split)
        importlib.import_module("nla.formats.parquet").export_parquet(store, args.out)
        return tell(args, {"file": str(args.out), "n": len(store)}, f"{args.store}: as parquet")
    nla = load(args.pair, args.device)
    acts = None if args.store is None else store_sample(nla, args.store)
    export = importlib.import_module("nla.formats.kitft_export").export_pair
    dropped = export(nla, args.out, args.drop_bias, acts)
    content = {"av": str(args.out / "av"), "ar": str(args.out / "ar")}
    content |= {} if dropped is None else {"without the bias": dropped._asdict()}
    return tell(args, content, f"{args.pair}: exported")


def push(args: argparse.Namespace) -> int:
    """``nla push``: a pair on the hub."""
    quiet()
    folder, _ = importlib.import_module("nla.pair.folder").find_folder(args.pair)
    hub = importlib.import_module("nla.pair.publish")
    address = hub.push_folder(folder, args.repo, args.private, args.revision, args.message)
    return tell(args, {"commit": address}, f"{args.pair}: published")


def store_sample(nla: Any, folder: Any) -> Any:
    """Some training activations of a store, which must be of the pair's target and point."""
    store = importlib.import_module("nla.store.reader").Store.open(folder)
    nla.check_store(store)
    rows = range(0, len(store), max(1, len(store) // SAMPLED))
    return store.activations(list(rows))


def tell(args: argparse.Namespace, content: dict[str, Any], title: str) -> int:
    """Facts as JSON or as a table."""
    if args.json:
        emit(content)
        return OK
    from nla import view

    show(view.facts(view.flat(content), title))
    return OK


EVALUATIONS = {
    "fidelity": "nla.eval.pair.fidelity:judge_fidelity:FidelitySettings",
    "rhymes": "nla.eval.families.rhymes",
    "gates": "nla.eval.families.gates",
    "auditing": "nla.eval.families.auditing",
    "graph": "nla.eval.pair.against_graphs",
    "plants": "nla.eval.families.plants",
    "readers": "nla.eval.readers.organisms:compare_on_organism:ReadersSettings",
    "transfer": "nla.eval.pair.transfer:judge_transfer:TransferSettings",
    "two_hop": "nla.eval.families.two_hop",
    "probe": "nla.eval.readers.labelled_texts:compare_on_labelled_texts:ProbeSettings",
    "trace": "nla.eval.circuits.trace:trace:TraceSettings",
}
COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": lambda args: importlib.import_module("nla.cli.demo").run(args),
    "audit": audit,
    "explain": explain,
    "steer": steer,
    "eval fidelity": evaluate,
    "eval rhymes": evaluate,
    "eval gates": evaluate,
    "eval auditing": evaluate,
    "eval graph": evaluate,
    "eval plants": evaluate,
    "eval readers": evaluate,
    "eval transfer": evaluate,
    "eval two-hop": evaluate,
    "probe": evaluate,
    "trace": evaluate,
    "train": train,
    "extract": extract,
    "import kitft": bring_in,
    "import easynla": bring_in,
    "import parquet": bring_in,
    "export kitft": send_out,
    "export parquet": send_out,
    "push": push,
    "info": info,
}
