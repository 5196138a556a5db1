"""How the commands take options and write help: text as it stands in their docstrings, and the options that many share.

Imports nothing heavy: ``nla --help`` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from nla.errors import ArgumentError

LARGEST_SEED = 2**63 - 1
CONTEXT = {"max_content_width": 112, "help_option_names": ["-h", "--help"]}


class _AsWritten:
    """Help kept as it is written: the docstring's first line on top, the rest, with the examples, at the end."""

    help: str | None

    def summary(self) -> str:
        """The first line."""
        return (self.help or "").partition("\n")[0]

    def get_short_help_str(self, limit: int = 45) -> str:
        """What the list of commands says of it: the whole first line."""
        return self.summary().removesuffix(".")

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """The first line."""
        formatter.write(f"\n{self.summary()}\n")

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Everything below it."""
        rest = (self.help or "").partition("\n")[2].strip("\n")
        if rest:
            formatter.write(f"\n{rest}\n")


class Command(_AsWritten, TyperCommand):
    """A command; its function returns the exit code. What begins with a dash and holds white space is a text."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ends = args.index("--") if "--" in args else len(args)
        texts = [i for i, word in enumerate(args[:ends]) if word.startswith("-") and any(map(str.isspace, word))]
        valued = {name for option in self.params for name in option.opts if not getattr(option, "is_flag", True)}
        options = [i for i in texts if i and args[i - 1] in valued]  # the value of the option before it
        moved = [i for i in texts if i not in options]
        if not moved:
            return super().parse_args(ctx, args)
        kept = [word for i, word in enumerate(args[:ends]) if i not in moved]
        return super().parse_args(ctx, [*kept, "--", *(args[i] for i in moved), *args[ends + 1 :]])


class Group(_AsWritten, TyperGroup):
    """A group of commands."""


def group(name: str | None = None) -> typer.Typer:
    """An empty group of commands."""
    return typer.Typer(name=name, cls=Group, rich_markup_mode=None, context_settings=CONTEXT, add_completion=False)


def add(app: typer.Typer, *functions: Callable[..., int], **named: Callable[..., int]) -> None:
    """Put commands into a group, named as their functions are (``two_hop`` is ``two-hop``), or as they are given."""
    for name, function in [(function.__name__.replace("_", "-"), function) for function in functions] + [
        *named.items()
    ]:
        app.command(name, cls=Command, context_settings=CONTEXT)(function)


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Device = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        metavar="PLACE",
        show_default=False,
        help="Where to put it (default: the first GPU, or the CPU); of whole models ROLE=PLACE, as encoder=cuda:1.",
    ),
]


def pair_name(name: str | None) -> str | None:
    """A pair's name as it was given; what can be none is refused before anything heavy is imported."""
    from nla.organisms import pair_folder

    if name is not None:
        pair_folder(name)
    return name


Pair = Annotated[
    str, typer.Option("--pair", metavar="PAIR", help="Name, folder or hub id of a pair.", callback=pair_name)
]
PairArgument = Annotated[
    str, typer.Argument(metavar="PAIR", help="Name, folder or hub id of a pair.", callback=pair_name)
]
Text = Annotated[
    str | None,
    typer.Argument(metavar="TEXT", show_default=False, help="The text; - reads it from standard input."),
]
File = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", show_default=False, help="Read the text from a file.")
]
Chat = Annotated[
    Path | None,
    typer.Option("--chat", metavar="FILE", show_default=False, help="Read a chat as the target's own tokens."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", show_default=False, help="Write JSON, table and picture here."),
]
Card = Annotated[
    Path | None,
    typer.Option("--card", metavar="FOLDER", show_default=False, help="Put the figures into this folder's README.md."),
]
Check = Annotated[bool, typer.Option("--check", help="Exit with 1 if a threshold does not hold.")]
TargetAdapter = Annotated[
    str | None,
    typer.Option(
        "--target-adapter",
        metavar="FOLDER",
        show_default=False,
        help="A LoRA adapter on the target while it is read, or an embedded one such as switchboard/goal.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", show_default=False, help="Set one value; may be given again."),
]


def count(flag: str, help: str, default: bool = False) -> Any:
    """An option that takes a whole number from 1."""
    return typer.Option(flag, metavar="N", min=1, show_default=default, help=help)


def text(flag: str, metavar: str, help: str, callback: Callable[[str | None], str | None] | None = None) -> Any:
    """An option that takes a text, which ``callback`` may refuse, and has no default to show."""
    return typer.Option(flag, metavar=metavar, show_default=False, help=help, callback=callback)


def seed(help: str) -> Any:
    """An option that takes a seed of a random generator."""
    return typer.Option("--seed", metavar="N", min=0, max=LARGEST_SEED, show_default=False, help=help)


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: the others keep the default of what takes them."""
    return {name: value for name, value in options.items() if value is not None and value is not False and value != []}


def positions(which: str) -> str | list[int]:
    """ "3,5" as indexes; "all", "last" and "/PATTERN/" as they are.

    Raises:
        ArgumentError: an index of more digits than any text has tokens.
    """
    if re.fullmatch(r"-?\d+(,-?\d+)*", which) is None:
        return which
    if re.search(r"\d{10}", which):
        raise ArgumentError(f"--positions {which[:40]}", "indexes of tokens", "count tokens from 0")
    return [int(part) for part in which.split(",")]


def one_place(given: list[str] | None) -> str | None:
    """What --device means to a command that loads one model.

    Raises:
        ArgumentError: see :func:`places`; or places by role.
    """
    device = places(given)
    if isinstance(device, dict):
        raise ArgumentError(
            f"--device {(given or [''])[0]}", "one PLACE: one model is loaded", "such as --device cuda:0"
        )
    return device


def places(given: list[str] | None) -> str | dict[str, str] | None:
    """What --device means: one place for all, or a place by role.

    Raises:
        ArgumentError: one place and others, or a role twice.
    """
    if not given:
        return None
    pairs = [tuple(part.strip() for part in device.split("=", 1)) for device in given]
    if len(given) == 1 and len(pairs[0]) == 1 and pairs[0][0]:
        return pairs[0][0]
    roles = [pair[0] for pair in pairs]
    if not all(len(pair) == 2 and all(pair) for pair in pairs) or len(set(roles)) != len(roles):
        shown = " ".join(f"--device {device}" for device in given)
        raise ArgumentError(shown, "one PLACE, or ROLE=PLACE once a role", "such as --device encoder=cuda:1")
    return {pair[0]: pair[1] for pair in pairs}


def replacement(written: str) -> tuple[str, str]:
    """ "OLD=NEW" as the two words.

    Raises:
        ArgumentError: one of them is missing.
    """
    old, _, new = (part.strip() for part in written.partition("="))
    if not (old and new):
        raise ArgumentError(f"--replace {written}", "OLD=NEW", "write it like --replace cat=bat")
    return old, new


def share(written: str) -> tuple[int, int]:
    """ "I/N" as the process and how many there are.

    Raises:
        ArgumentError: not such numbers.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", written)
    if match is None or not int(match[1]) < int(match[2]):
        raise ArgumentError(f"--process {written[:40]}", "I/N, such as 0/4, with I below N", "count processes from 0")
    return int(match[1]), int(match[2])
