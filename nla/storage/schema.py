"""Content of a file and a pydantic model in; the checked model out, or what is wrong, in words that fit our errors."""

from __future__ import annotations

import difflib
import reprlib
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError

from nla.errors import visible

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 2, 3, 3, 3
_REPR.maxstring = _REPR.maxother = 60


class Problem(NamedTuple):
    """The first thing that is wrong with what a file holds."""

    got: str
    """The key and its value, cut to a line."""
    expected: str


def shown(value: Any) -> str:
    """A value for a message: one line, a few dozen characters, however large it is or pretends to be.

    >>> shown("x" * 1000)[:4], len(shown([["x"] * 1000] * 1000)) < 200
    ("'xxx", True)
    """
    return visible(_REPR.repr(value))[:200]


def first_problem(error: ValidationError, model: type[BaseModel]) -> Problem:
    """What a validation error says first.

    Args:
        model: what was validated; it knows the keys that an unknown one may have been meant for.
    """
    details = error.errors(include_url=False)[0]
    location, kind = details["loc"], details["type"]
    key = visible(".".join(str(part) for part in location if not str(part).startswith("function-")))[:120]
    if kind == "missing":
        return Problem(f"no {key}", "a value there")
    if kind == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        meant = f"{close[0]!r}? Known keys: " if close else "one of "
        return Problem(f"the unknown key {shown(str(location[-1]))} in {key}", f"{meant}{', '.join(known)}")
    expected = details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if isinstance(details["input"], bool) and "string" in kind:
        expected = "a text: YAML takes words such as yes, no, on and off for true and false unless they are in quotes"
    if not location:
        return Problem(shown(details["input"]) if kind == "model_type" else "keys that contradict each other", expected)
    return Problem(f"{key} = {shown(details['input'])}", expected)


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the model at a place in ``model``."""
    for part in location:
        field = model.model_fields.get(str(part))
        inner = None if field is None else _model_in(field.annotation)
        model = inner or model  # a key of a mapping, or an index of a list: the model is that of the value
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model in an annotation such as ``dict[str, Model] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part)) is not None), None)
