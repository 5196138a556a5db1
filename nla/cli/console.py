"""What the commands share besides options: what they read, and how they answer. With the commands, all that prints."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla.cli.options import places
from nla.errors import ArgumentError, visible

if TYPE_CHECKING:
    from nla.autoencoder import NLA
    from nla.transcripts.messages import Transcript

OK, FAILED, USAGE, UNDECIDED, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 70, 130
"""Exit codes: done; a threshold does not hold; wrong command or input; --check has nothing to hold against anything, or
too few controls; a fault of the program; Ctrl-C."""
MAX_TEXT_BYTES = 64 * 2**20
"""Of a text that is read from a file or from standard input."""
LINE_WIDTH = 112
LINE_EVERY_S = 30.0
"""Seconds between two lines of progress where there is no terminal to draw a bar on."""


def given_text(text: str | None, file: Path | None) -> str:
    """The text to read: an argument, a file, or standard input; never changed.

    Raises:
        ArgumentError: neither, both, or not readable as UTF-8.
    """
    if (text is None) == (file is None):
        raise ArgumentError("no text" if text is None else "TEXT and --file", "one of them", "give TEXT, --file or -")
    if text is not None and text != "-":
        return text
    try:  # bytes: reading as text would turn CR LF into LF
        with contextlib.nullcontext(sys.stdin.buffer) if file is None else file.open("rb") as stream:
            data = stream.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise ValueError(f"more than {MAX_TEXT_BYTES:,} bytes")
        return data.decode("utf-8" if file is None else "utf-8-sig")
    except (OSError, ValueError) as error:
        source = "standard input" if file is None else str(file)
        raise ArgumentError(f"{source}, not readable as text ({error})", "a UTF-8 text", "check the path") from error


def one_chat(file: Path | None) -> Transcript:
    """The chat in a file that holds one.

    Raises:
        TranscriptError: it cannot be read.
        ArgumentError: it holds several.
    """
    from nla.transcripts.files import load_transcripts

    chats = list(islice(load_transcripts(file or "-"), 2))
    if len(chats) != 1:
        raise ArgumentError(f"--chat {file} with several chats", "one", "give it alone, or audit them all: nla audit")
    return chats[0]


def load(pair: str, device: list[str] | None = None) -> NLA:
    """A pair, without the chatter of the libraries underneath. ``device`` is what --device was given."""
    device_or_roles = places(device)
    quiet()
    from nla.autoencoder import NLA

    nla = NLA.from_pretrained(pair, device=device_or_roles)
    say_doubts(nla.doubts)
    return nla


def say_doubts(doubts: Sequence[str]) -> None:
    """Say on standard error, above the output, what pairs' own measurements say against them."""
    for doubt in doubts:
        print(f"nla: {doubt}", file=sys.stderr)


def quiet() -> None:
    """Keep notices of the libraries underneath, which a user can do nothing about, off the screen."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as chatter

    hub.set_verbosity_error()
    chatter.disable_progress_bar()
    chatter.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")


def emit(content: Any) -> None:
    """JSON on standard output; a number that is not finite is null, what could act on a terminal is an escape."""
    from nla.eval.report import to_json

    written = json.dumps(to_json(content), indent=2, ensure_ascii=False, allow_nan=False)
    print("".join(map(_escaped, written)))


def _escaped(character: str) -> str:
    """A character of JSON as it is, or as an escape if it has no shape: controls, C1 too, and marks of direction."""
    return character if character.isprintable() or character == "\n" else json.dumps(character)[1:-1]


def show(*parts: Any) -> None:
    """Tables and rich text on standard output, at the terminal's width."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else LINE_WIDTH, highlight=False, markup=False, emoji=False)
    for part in parts:
        console.print(part)


def show_lines(text: str) -> None:
    """A text on standard output, line by line, its control characters spelled out."""
    print("\n".join(map(visible, text.splitlines())))


def answer(content: Mapping[str, Any], title: str, as_json: bool) -> int:
    """Facts as JSON or as a table; the exit code."""
    if as_json:
        emit(content)
        return OK
    from nla.cli import view

    show(view.facts(view.flat(content), title))
    return OK


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """Progress on standard error: on a terminal a bar for each stage, elsewhere a line every ``LINE_EVERY_S``."""
    if not sys.stderr.isatty():
        yield progress_lines()
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, fraction: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=1.0)
            bar.update(tasks[stage], completed=fraction)

        yield report


def progress_lines() -> Callable[[str, float], None]:
    """A reporter that prints a line on standard error when the last one is long enough ago."""
    said = time.monotonic()

    def report(stage: str, fraction: float) -> None:
        nonlocal said
        if time.monotonic() - said >= LINE_EVERY_S:
            said = time.monotonic()
            print(f"nla: {visible(stage)}, {fraction:.0%}", file=sys.stderr, flush=True)

    return report


def peak_memory_gb() -> float:
    """Most memory that this process held at once."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def about(nla: NLA, name: str) -> dict[str, Any]:
    """Which pair this is."""
    return {"pair": name, "target": nla.config.target, "point": str(nla.point), "doubts": nla.doubts}
