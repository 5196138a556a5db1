"""``nla trace`` and ``nla probe``: your own model or labelled texts in; where a latent is used, what reads it, out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nla.cli.evaluate import Evaluation, Oracle, Question, Samples, reported
from nla.cli.options import Device, Out, count, given, pair_name, places, text


@reported
def trace(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Embedded name, folder or hub id.")] = "couplets",
    pairs: Annotated[Path | None, text("--pairs", "FILE", "Minimal pairs, one JSON object a line.")] = None,
    prompt: Annotated[str | None, text("--prompt", "TEXT", "Of one pair instead; all four.")] = None,
    donor_prompt: Annotated[str | None, text("--donor-prompt", "TEXT", "Of one pair instead; all four.")] = None,
    continuation: Annotated[str | None, text("--continuation", "TEXT", "Of one pair instead; all four.")] = None,
    donor_continuation: Annotated[
        str | None, text("--donor-continuation", "TEXT", "Of one pair instead; all four.")
    ] = None,
    items: Annotated[int | None, count("--items", "Pairs of an embedded world.")] = None,
    all_tokens: Annotated[bool, typer.Option("--all-tokens", help="Every token, whatever roles are named.")] = False,
    sites: Annotated[int | None, count("--sites", "Patch at most so many (default 64).")] = None,
    controls: Annotated[int | None, count("--controls", "Controls a site.")] = None,
    pair: Annotated[str | None, text("--pair", "PAIR", "A pair on this model, to explain it.", pair_name)] = None,
    samples: Samples = None,
    device: Device = None,
    out: Out = None,
) -> Evaluation:
    """Find where a model uses a latent, and write attribution graphs.

    Where does a model use what a minimal pair exchanges? Attribution shortlists tokens and points, patches measure them
    beside random directions of equal length and unrelated pairs. Writes attribution graphs, which `nla eval graph` and
    viewers read. With --pair, also: does a pair name the latent where it is causal?

    examples:
      nla trace couplets --out runs/trace
      nla trace couplets/plain --check
      nla trace couplets --pair couplets --items 20
      nla trace couplets/planner --pairs pairs.jsonl --out runs/mine
    """
    from nla.eval.circuits.trace import TraceSettings
    from nla.eval.circuits.trace import trace as trace_target

    options = {"pairs": pairs, "prompt": prompt, "donor_prompt": donor_prompt, "continuation": continuation}
    options |= {"donor_continuation": donor_continuation, "n_pairs": items, "all_tokens": all_tokens}
    options |= {"n_sites": sites, "n_controls": controls, "pair": pair, "n_samples": samples}
    options |= {"device": places(device), "graphs": out}
    return Evaluation(trace_target, model, TraceSettings(**given(**options)))


@reported
def probe(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="CSV, TSV, JSON, JSON lines or Parquet.")],
    *,
    text_column: Annotated[str, typer.Option("--text", metavar="COLUMN", help="The column of the texts.")],
    label: Annotated[str, typer.Option("--label", metavar="COLUMN", help="The column of the labels.")],
    group: Annotated[str | None, text("--group", "COLUMN", "The document that a row belongs to.")] = None,
    pair: Annotated[
        str | None, text("--pair", "PAIR", "Name, folder or hub id (default: couplets).", pair_name)
    ] = None,
    target: Annotated[str | None, text("--target", "MODEL", "A model without a pair, instead; needs --point.")] = None,
    point: Annotated[
        list[str] | None, text("--point", "POINT", "Where probes read, too; of a target, all at the first.")
    ] = None,
    positions: Annotated[str | None, text("--positions", "WHICH", "last (the default), all, or /PATTERN/.")] = None,
    words: Annotated[
        list[str] | None, text("--words", "LABEL=WORD,WORD", "Words that name a class; once a class.")
    ] = None,
    samples: Samples = None,
    max_rows: Annotated[int | None, count("--max-rows", "A random sample of a larger file (default 2000).")] = None,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out texts that cannot be read.")] = False,
    oracle: Oracle = None,
    question: Question = None,
    device: Device = None,
) -> Evaluation:
    r"""Compare readers on your own labelled texts.

    Probes, lenses, SelfIE, readers of the text and the pair on your own labelled texts: CSV, JSON, JSON lines or
    Parquet. Of a target without a pair, all that need none.

    examples:
      nla probe poems.csv --text line --label season
      nla probe poems.csv --text line --label season --target couplets/plain --point resid_post.3 --point resid_post.1
      nla probe poems.jsonl --text line --label season --positions '/ near/' --words 'winter=winter,snow' \
          --words 'summer=summer,sun'
    """
    from nla.eval.readers.labelled_texts import ProbeSettings, compare_on_labelled_texts

    options = {"text": text_column, "label": label, "group": group, "pair": pair, "positions": positions}
    options |= {
        "target": target,
        "points": point,
        "words": words,
        "n_samples": samples,
        "max_rows": max_rows,
        "skip": skip,
    }
    options |= {"oracle": oracle, "question": question, "device": places(device)}
    return Evaluation(compare_on_labelled_texts, data, ProbeSettings(**given(**options)))
