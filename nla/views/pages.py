"""A template and its values in, one self-contained HTML page out.

A page (templates/layout.html) holds no script and fetches nothing, and its policy forbids both. All that comes from
files or models is escaped by the template engine, with control and direction marks spelled out before that.
"""

from __future__ import annotations

import base64
import hashlib
import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nla.text.markdown import number

TEMPLATES = Path(__file__).with_name("templates")
_JOINER = "\u200d"
_UNUSUAL = re.compile(r"[^ -~\n\t]")


def page(template: str, *styles: str, folder: Path = TEMPLATES, **values: Any) -> str:
    """A whole page, from a template that extends layout.html.

    Args:
        styles: CSS of our own: what a file or a model wrote must never enter it. base.css stands before it.
        folder: where ``template`` lies.
        values: what the template shows.
    """
    style = css("base.css") + "".join(styles)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return _environment(folder).get_template(template).render(style=Markup(style), style_hash=digest, **values)


def fragment(template: str, style: str, **values: Any) -> str:
    """A part of a page with its own style, for a notebook. See :func:`page`."""
    return _environment(TEMPLATES).get_template(template).render(style=Markup(style), **values)


def css(name: str, folder: Path = TEMPLATES) -> str:
    """One of our style sheets."""
    return (folder / name).read_text("utf-8")


@cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]), autoescape=True, finalize=_final, undefined=StrictUndefined
    )
    environment.filters |= {"number": number, "one_line": lambda text: text.replace("\n", "⏎")}
    return environment


def _final(value: Any) -> Any:
    """What a template does with each value before it escapes it."""
    return spelled_out(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def spelled_out(text: str) -> str:
    """A text in which what could hide or turn text around is written in letters.

    >>> spelled_out("a\\u202eb")
    'a\\\\u202eb'
    """
    return _UNUSUAL.sub(lambda match: match[0] if _is_shown(match[0]) else repr(match[0])[1:-1], text)


def _is_shown(letter: str) -> bool:
    return letter.isprintable() or letter == _JOINER or unicodedata.category(letter) == "Zs"
