"""``nla``: a command line in, an exit code out. The commands, in the order of the help.

Every heavy import stands inside the command that needs it, so that ``nla --help`` answers at once.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from nla.cli import audit, demo, evaluate, explain, formats, readers, serve, train
from nla.cli.console import INTERNAL, INTERRUPTED, OK, USAGE
from nla.cli.options import CONTEXT, Group, add
from nla.errors import InterruptedTraining, NLAError, visible

_SHOWN, _SHOWN_OWNERS = 80, 3
"""Of a name that is no path, so many characters; of an option that a command lacks, so many that have it."""


class Commands(Group):
    """All commands, and what becomes of the errors that they raise."""

    def invoke(self, ctx: Any) -> int:
        """Run the command; the exit code."""
        try:
            return super().invoke(ctx) or OK
        except KeyboardInterrupt:
            print("nla: stopped", file=sys.stderr)
            return INTERRUPTED
        except NLAError as error:
            said = str(error) + _whose_options(error.fix, ctx.find_root().obj or "")
            print("nla: " + visible(" ".join(said.split())), file=sys.stderr)
            return INTERRUPTED if isinstance(error, InterruptedTraining) else USAGE
        except (TyperException, typer.Exit, BrokenPipeError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.filename is not None:  # a name that no file can have, no permission
                name = visible(str(error.filename))
                said = f"Got {name if len(name) <= _SHOWN else name[:_SHOWN] + '…'} ({error.strerror}); expected a path"
                print(f"nla: {said} that can be opened. Next: check the name and its permissions", file=sys.stderr)
                return USAGE
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise  # of standard output: what writes files has errors of its own
            print("\n".join(map(visible, traceback.format_exc().splitlines())), file=sys.stderr)
            print("nla: a fault of nla itself. Next: report it with the lines above and the command", file=sys.stderr)
            return INTERNAL


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except (OSError, SystemExit) as error:  # Typer and rich turn a closed pipe into an exit
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # leave nothing to flush
        if isinstance(cause, BrokenPipeError):  # the reader, such as `head`, has seen enough
            return OK
        print(f"nla: Got a standard output that takes no more ({cause.strerror}). Next: free space", file=sys.stderr)
        return USAGE


def _run(words: list[str]) -> int:
    try:
        command_line = shlex.join(["nla", *words])  # for the cards that say what made their figures
        return commands().main(words, prog_name="nla", standalone_mode=False, obj=command_line) or OK
    except TyperException as error:
        path = getattr(getattr(error, "ctx", None), "command_path", "nla")
        said = visible(" ".join(error.format_message().split())).removesuffix(".")
        print(f"{path}: {said}. Next: `{path} --help` shows how it is used", file=sys.stderr)
        return USAGE


@functools.cache
def commands() -> Any:
    """All commands, made once from the signatures of their functions."""
    return typer.main.get_command(app)


def _whose_options(fix: str, command_line: str) -> str:
    """Of the options that a remedy names and the command lacks: the commands that have them, if any of ours does."""
    every: dict[str, set[str]] = {}
    pending = [("nla", commands())]
    while pending:
        name, command = pending.pop()
        inner = getattr(command, "commands", None)
        pending += [(f"{name} {word}", one) for word, one in (inner or {}).items()]
        if inner is None:
            every[name] = {option for parameter in command.params for option in parameter.opts}
    here = next((every[name] for name in every if f"{command_line} ".startswith(f"{name} ")), None)
    named = dict.fromkeys(re.findall(r"(?<![\w/-])--[a-z][a-z-]*", re.sub(r"nla [a-z][^;,`]*", "", fix)))
    said = ""
    for option in named if here is not None else ():
        owners = sorted(f"`{name}`" for name in every if option in every[name])
        said += "" if option in here or not owners else f" ({option}: of {', '.join(owners[:_SHOWN_OWNERS])})"
    return said


def _version(asked: bool) -> None:
    if asked:
        import importlib.metadata

        print(f"nla {importlib.metadata.version('nla')}")
        raise typer.Exit


app = typer.Typer(cls=Commands, rich_markup_mode=None, context_settings=CONTEXT)


@app.callback()
def nla(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    r"""Read a language model's activations as text, rebuild them from it alone, and check the text against causes.

    Without a download everything runs on Couplets, a small embedded model that plans a rhyme before it writes it.

    start here:
      nla demo                                    the whole way once, in under two minutes
      printf 'In spring Anna left a red ribbon near the rat,\n' | nla explain -
      nla COMMAND --help                          what a command does, with examples

    exit codes:
      0    done; with --check, every threshold holds
      1    --check was given and a threshold does not hold
      2    the command or its input is wrong; one line on stderr says what to do next
      3    --check was given and there is nothing to hold against anything, such as too few controls
      70   an error of the program itself, with its traceback on stderr
      130  stopped by Ctrl-C; the same command resumes a training
    """


add(app, demo.demo, explain.explain, explain.steer, serve.serve)
app.add_typer(evaluate.app)
add(app, audit.audit, readers.trace, readers.probe, train.train, train.recipe, train.extract)
app.add_typer(formats.import_app)
app.add_typer(formats.export_app)
add(app, formats.push, explain.info)
