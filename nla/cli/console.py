"""What the commands share: what they read, and how they answer. The only place, with the commands, that prints."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nla.errors import ArgumentError

if TYPE_CHECKING:
    from nla.autoencoder import NLA

LINE_WIDTH = 112


def given_text(args: argparse.Namespace) -> str:
    """The text to read: an argument, a file, or standard input; never changed."""
    if (args.text is None) == (args.file is None):
        raise ArgumentError(
            "no text" if args.text is None else "TEXT and --file", "one of them", "give TEXT, --file or -"
        )
    if args.text not in (None, "-"):
        return args.text
    try:  # bytes: reading as text would turn CR LF into LF
        return sys.stdin.buffer.read().decode() if args.file is None else args.file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        source = "standard input" if args.file is None else str(args.file)
        raise ArgumentError(f"{source}, not readable as text ({error})", "a UTF-8 text", "check the path") from error


def positions(which: str) -> str | list[int]:
    """ "3,5" as indexes; "all", "last" and "/PATTERN/" as they are."""
    return [int(part) for part in which.split(",")] if re.fullmatch(r"-?\d+(,-?\d+)*", which) else which


def load(pair: str, device: Sequence[str] | None = None) -> NLA:
    """A pair, without the chatter of the libraries underneath. ``device`` is what --device was given."""
    place = places(device)
    quiet()
    from nla.autoencoder import NLA

    return NLA.from_pretrained(pair, device=place)


def places(given: Sequence[str] | None) -> str | dict[str, str] | None:
    """What --device means: one place for all, or a place by role.

    Raises:
        ArgumentError: one place and others, or a role twice.
    """
    if not given:
        return None
    pairs = [tuple(part.strip() for part in each.split("=", 1)) for each in given]
    if len(given) == 1 and len(pairs[0]) == 1:
        return pairs[0][0]
    roles = [pair[0] for pair in pairs]
    if not all(len(pair) == 2 and all(pair) for pair in pairs) or len(set(roles)) != len(roles):
        shown = " ".join(f"--device {each}" for each in given)
        raise ArgumentError(shown, "one PLACE, or ROLE=PLACE once a role", "such as --device encoder=cuda:1")
    return {pair[0]: pair[1] for pair in pairs}


def quiet() -> None:
    """Keep notices of the libraries underneath, which a user can do nothing about, off the screen."""
    from transformers.utils import logging as chatter

    chatter.disable_progress_bar()
    chatter.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")


def emit(content: Any) -> None:
    """JSON on standard output; a number that is not finite is null."""
    content = importlib.import_module("nla.eval.report").to_json(content)
    print(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def show(*parts: Any) -> None:
    """Tables and rich text on standard output, at the terminal's width."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else LINE_WIDTH, highlight=False, markup=False, emoji=False)
    for part in parts:
        console.print(part)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """A progress bar on standard error, one line a stage."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, fraction: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=1.0)
            bar.update(tasks[stage], completed=fraction)

        yield report


def peak_memory_gb() -> float:
    """Most memory that this process held at once."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def about(nla: NLA, name: str) -> dict[str, Any]:
    """Which pair this is."""
    return {"pair": name, "target": nla.config.target, "point": str(nla.point)}
