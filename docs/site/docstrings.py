"""An extension of Griffe: references in docstrings become links of the site, and doctests blocks of code.

These are ``:func:`nla.read``` and its like, and the names of errors under "Raises". What a reference names must exist,
or the build warns, which ``--strict`` makes an error. A name that has no entry in the site is shown without a link.
"""

from __future__ import annotations

import builtins
import contextlib
import logging
import re
from collections.abc import Iterator

import griffe

log = logging.getLogger("mkdocs.plugins.docstrings")

ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`(?P<name>[\w.]+)`")
ARGS, RAISES = (
    re.compile(rf"^{title}:\n(?P<items>(?:[ ]{{4}}.*\n?|\n(?=[ ]{{4}}))+)", re.MULTILINE)
    for title in ("Args", "Raises")
)
DOCTEST = re.compile(r"^>>> (?:.*\n?)(?:.+\n?)*", re.MULTILINE)
ERRORS = re.compile(r"^(?P<names>[\w., ]+): (?P<when>.*)", re.DOTALL)


class References(griffe.Extension):
    """Turns the references in every docstring of a package into links."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: object) -> None:
        """Once the whole package is loaded, go through its docstrings."""
        for owner in _objects(pkg):
            if owner.docstring is not None:
                text = ROLE.sub(lambda found, owner=owner: _link(found["name"], owner, loader), owner.docstring.value)
                text = ARGS.sub(lambda found: _args(found["items"]), text)
                text = RAISES.sub(lambda found, owner=owner: _raises(found["items"], owner, loader), text)
                owner.docstring.value = DOCTEST.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)


def _objects(owner: griffe.Object) -> Iterator[griffe.Object]:
    yield owner
    for member in owner.members.values():
        if isinstance(member, griffe.Object):
            yield from _objects(member)


def _items(section: str) -> list[str]:
    """The items of a section, each with its further lines."""
    return re.split(r"^ {4}(?! )", section, flags=re.MULTILINE)[1:]


def _args(section: str) -> str:
    """The section "Args" with an item for each parameter: what is said of several at once is said of each."""
    listed = []
    for item in _items(section):
        names, colon, text = item.partition(":")
        several = names.split(", ") if re.fullmatch(r"[\w*]+(, [\w*]+)+", names) else [names]
        listed += [f"    {name}{colon}{text.rstrip()}\n" for name in several]
    return f"Args:\n{''.join(listed)}\n"


def _raises(section: str, owner: griffe.Object, loader: griffe.GriffeLoader) -> str:
    """The section "Raises" as a list in which each error has a link; Griffe takes several errors for one tuple."""
    listed = []
    for item in _items(section):
        text = " ".join(item.split())
        found = ERRORS.match(text)
        names = [_error(name.strip(), owner, loader) for name in found["names"].split(",")] if found else []
        listed.append(f"- {', '.join(names)}: {found['when']}\n" if found else f"- {text}\n")
    return f"**Raises:**\n\n{''.join(listed)}\n"


def _error(name: str, owner: griffe.Object, loader: griffe.GriffeLoader) -> str:
    if hasattr(builtins, name) or ("." in name and not name.startswith("nla.")):
        return f"`{name}`"  # Python's own, or another package's
    return _link(name, owner, loader)


def _link(name: str, owner: griffe.Object, loader: griffe.GriffeLoader) -> str:
    path = _path(name, owner, loader)
    if path is None:
        log.warning("%s: its docstring refers to %s, which does not exist", owner.path, name)
        return f"`{name}`"
    return f'<autoref identifier="{path}" optional><code>{name.removeprefix("nla.")}</code></autoref>'


def _path(name: str, owner: griffe.Object, loader: griffe.GriffeLoader) -> str | None:
    """The full path of what a name means in the place where it is written; None: nothing."""
    first, _, rest = name.partition(".")
    paths = [name, f"nla.errors.{name}"]
    with contextlib.suppress(griffe.NameResolutionError):
        paths.insert(0, ".".join(filter(None, (owner.resolve(first), rest))))
    for path in paths:
        with contextlib.suppress(KeyError, griffe.AliasResolutionError):
            return loader.modules_collection[path].canonical_path
    return None
