"""Content of a file and a pydantic model in; the checked model out, or what is wrong, in words that fit our errors."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, dataclass_transform, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from nla.errors import NLAError, visible

Checked = TypeVar("Checked")

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


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, Field))
def checked(refuse: Callable[[Problem], NLAError], section: str = "") -> Callable[[type[Checked]], type[Checked]]:
    """Make a class a frozen dataclass whose values pydantic checks when it is made; an int passes for a float.

    Args:
        refuse: from what is wrong, the typed error to raise.
        section: what its fields stand in, for messages.
    """
    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    def decorate(cls: type[Checked]) -> type[Checked]:
        made: Any = pydantic_dataclass(frozen=True, kw_only=True, config=config)(cls)
        start = made.__init__

        @functools.wraps(start)
        def checking(self: Any, **values: Any) -> None:
            problem = None
            try:
                start(self, **values)
            except ValidationError as error:
                problem = _field_problem(error, section)
            if problem is not None:  # raised outside of the handler: pydantic's error repeats every value
                raise refuse(problem)

        made.__init__ = checking
        return made

    return decorate


def check_fields(cls: type, content: Any, later: frozenset[str] = frozenset()) -> Problem | None:
    """What is wrong with the names of a dataclass's fields in a mapping; None: nothing.

    Args:
        later: fields that a mapping may lack, since they came after the first version of the format.
    """
    if not isinstance(content, dict):
        return Problem(shown(content), f"a mapping with the fields of {cls.__name__}")
    names = [field.name for field in dataclasses.fields(cls)]
    missing = sorted(set(names) - set(content) - later)
    unknown = sorted(str(key) for key in set(content) - set(names))
    if not missing and not unknown:
        return None
    close = difflib.get_close_matches(unknown[0], names, n=1) if unknown else []
    meant = f" ({close[0]!r} for {shown(unknown[0])}?)" if close else ""
    got = f"a mapping lacking {missing[:5]} and with unknown {[shown(key) for key in unknown[:5]]}"
    return Problem(got, f"exactly the fields of {cls.__name__}{meant}")


def _field_problem(error: ValidationError, section: str) -> Problem:
    details = error.errors(include_url=False)[0]
    if details["type"] in ("missing", "unexpected_keyword_argument"):
        raise TypeError(f"{details['loc'][0]}: {details['msg']}")  # a call in the code, not a value
    name = ".".join([*([section] if section else []), *(str(part) for part in details["loc"][:1])])
    expected = details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return Problem(f"{name} = {shown(details['input'])}", expected)


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
