"""``nla audit``: transcripts and a pair in; what the model thought, said and did not say, out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nla.cli.console import FAILED, OK, UNDECIDED, emit, progress_bar, quiet, say_doubts, show
from nla.cli.options import Device, Json, Pair, TargetAdapter, count, given, places, seed, text
from nla.errors import visible


def audit(
    paths: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="JSON, tables, chat text, Inspect, Petri; - for stdin.")
    ],
    pair: Pair = "switchboard",
    rubric: Annotated[list[str] | None, text("--rubric", "NAME", "Built in, or a YAML file.")] = None,
    positions: Annotated[
        str | None, text("--positions", "WHICH", "structure (the default), all, random or /PATTERN/.")
    ] = None,
    budget: Annotated[int | None, count("--budget", "Positions of each transcript at most (default 64).")] = None,
    samples: Annotated[int | None, count("--samples", "Explanations of each position (default 4).")] = None,
    controls: Annotated[list[Path] | None, text("--controls", "FILE", "Control transcripts.")] = None,
    target_adapter: TargetAdapter = None,
    control_target: Annotated[
        str | None, text("--control-target", "FOLDER", "Read the controls with this adapter; base: with none.")
    ] = None,
    model_of: Annotated[str | None, text("--model-of", "NAME", "Accept transcripts of this model, or of any.")] = None,
    window: Annotated[int | None, count("--window", "Read in overlapping windows of N tokens.")] = None,
    trim: Annotated[bool, typer.Option("--trim", help="Take white space off the ends of messages.")] = False,
    allow_dropped: Annotated[
        bool, typer.Option("--allow-dropped", help="Read on where the chat template leaves fields out, and list them.")
    ] = False,
    fold_system: Annotated[
        bool, typer.Option("--fold-system", help="Put a system text that the template refuses into the user's message.")
    ] = False,
    max_mb: Annotated[float | None, text("--max-mb", "MB", "Largest file, or line of JSON lines (default 64).")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be read, and list it.")] = False,
    judge_url: Annotated[
        str | None, text("--judge-url", "URL", "OpenAI-compatible endpoint; its key in NLA_JUDGE_KEY.")
    ] = None,
    judge_model: Annotated[str | None, text("--judge-model", "NAME", "The judge's model.")] = None,
    random_seed: Annotated[int | None, seed("Of samples and random positions.")] = None,
    out: Annotated[Path | None, text("--out", "FOLDER", "Write page and tables here; resumes from it.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if a finding is significant, with 3 if none can be.")
    ] = False,
    device: Device = None,
    json: Json = False,
) -> int:
    """Find what a model thought, and did not say, in transcripts.

    Transcripts are rendered with the target's own chat template, read where turns are decided, explained, and held
    against rubrics: what the target thought and said, and what it thought and did not say, beside control transcripts.

    examples:
      nla audit chats.jsonl --pair switchboard --controls ordinary.jsonl --out runs/audit
      nla audit chats.jsonl --pair switchboard --rubric evaluation-awareness --rubric my_rubric.yaml
      nla audit chats.jsonl --pair switchboard --target-adapter switchboard/goal --control-target base --out runs/goal
    """
    quiet()
    from nla.audit.from_files import audit_files
    from nla.audit.settings import AuditSettings
    from nla.storage.files import try_folder

    try_folder(out)
    settings = given(
        rubrics=rubric,
        positions=positions,
        budget=budget,
        samples=samples,
        seed=random_seed,
        window=window,
        trim=trim,
        allow_dropped=allow_dropped,
        fold_system=fold_system,
        target_adapter=target_adapter,
        control_target=control_target,
        model_of=model_of,
        judge_url=judge_url,
        judge_model=judge_model,
    )
    reading = given(controls=controls, max_mb=max_mb, skip_bad=skip_bad, device=places(device))
    with progress_bar() as progress:
        report = audit_files(pair, paths, AuditSettings(**settings), out_dir=out, progress=progress, **reading)
    say_doubts(report.audit.doubts)
    if json:
        emit(report)
    else:
        show(*report.summary(out))
    if not check or report.passed:
        return OK
    if report.undecided:
        rubrics = visible(", ".join(report.undecidable))
        print(f"nla: not decided: no finding of {rubrics} can be significant with so few controls", file=sys.stderr)
        return UNDECIDED
    return FAILED
