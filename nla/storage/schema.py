"""Content of a file and a pydantic model in; the checked model out, or what is wrong, in words that fit our errors."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast, dataclass_transform, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from nla.errors import NLAError, visible

Checked = TypeVar("Checked")
_KINDS = {
    "int": "a whole number",
    "float": "a finite number",
    "finite": "a finite number",
    "string": "a text",
    "bool": "true or false",
    "dict": "a mapping",
}
"""What is expected, by the first word of pydantic's type of error."""

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 2, 3, 3, 3
_REPR.maxstring = _REPR.maxother = 60


class Problem(NamedTuple):
    """The first thing that is wrong with what a file or a caller holds."""

    got: str
    """The key and its value, cut to a line."""
    expected: str
    fix: str = "correct it where it is given"


Refuse = Callable[[Problem], NLAError]
"""From what is wrong, the typed error to raise."""


def shown(value: object) -> str:
    """A value for a message: one line, a few dozen characters, however large it is or pretends to be.

    >>> shown("x" * 1000)[:4], len(shown([["x"] * 1000] * 1000)) < 200
    ("'xxx", True)
    """
    return visible(_REPR.repr(value))[:200]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, Field))
def checked(refuse: Refuse, section: str = "", kw_only: bool = True) -> Callable[[type[Checked]], type[Checked]]:
    """Make a class a frozen dataclass whose values pydantic checks when it is made; an int passes for a float.

    Args:
        refuse: from what is wrong, the typed error to raise. A typed error of the class's own is raised as it is.
        section: what its fields stand in, for messages.
    """
    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    def decorate(cls: type[Checked]) -> type[Checked]:
        made: Any = pydantic_dataclass(frozen=True, kw_only=kw_only, config=config)(cls)
        start = made.__init__

        @functools.wraps(start)
        def checking(self: Any, *values: Any, **named: Any) -> None:
            wrong = None
            try:
                start(self, *values, **named)
            except ValidationError as error:
                wrong = _stated(error) or refuse(_field_problem(error, made, section))
            if wrong is not None:  # raised outside of the handler: pydantic's error repeats every value
                raise wrong

        made.__init__ = checking
        return made

    return decorate


def build(
    cls: type[Checked], content: object, source: str, refuse: Refuse, optional: frozenset[str] | None = None
) -> Checked:
    """A dataclass of :func:`checked`, and those inside of it, from the mapping that a file holds; None is an empty one.

    Args:
        source: what the mapping is, for messages.
        refuse: from what is wrong, the typed error to raise.
        optional: fields that the mapping may lack; None: those with a default.
    """
    if not isinstance(content, dict | None):
        raise refuse(
            Problem(f"{source} holding {shown(content)}", "a mapping", "write it as `name: value`, one a line")
        )
    values, hints = dict(content or {}), get_type_hints(cls)
    unknown = [str(key) for key in values if key not in hints]
    if unknown:
        near = difflib.get_close_matches(unknown[0], hints, 1)
        fix = f"write {near[0]} for {shown(unknown[0])}" if near else "remove or rename them"
        got = f"{source} with {', '.join(map(shown, unknown[:5]))}"
        raise refuse(Problem(got, f"among {', '.join(hints)}", fix))
    fields = dataclasses.fields(cast(Any, cls))
    may_lack = {field.name for field in fields if _has_default(field)} if optional is None else optional
    missing = [name for name in hints if name not in values and name not in may_lack]
    if missing:
        got = f"{source} without {', '.join(missing)}"
        raise refuse(Problem(got, f"all that a {cls.__name__} must have", "add them"))
    for name, hint in hints.items():
        inner, may_be_none = dataclass_in(hint), type(None) in get_args(hint)
        if inner is not None and name in values and not (values[name] is None and may_be_none):
            values[name] = build(inner, values[name], f"{source}: {name}", refuse, optional)
    wrong = None
    try:
        return cls(**values)
    except NLAError as error:
        wrong = refuse(Problem(f"{source}: {error.got}", error.expected))
    raise wrong


def dataclass_in(hint: object) -> type | None:
    """The dataclass that a field's type names; None: it names none."""
    kinds = (hint, *get_args(hint))
    return next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _stated(error: ValidationError) -> NLAError | None:
    """The typed error that a class's own check raised, if it was one."""
    cause = error.errors(include_url=False)[0].get("ctx", {}).get("error")
    return cause if isinstance(cause, NLAError) else None


def _field_problem(error: ValidationError, cls: Any, section: str) -> Problem:
    """The first thing that is wrong with a dataclass's values, in our words."""
    first = error.errors(include_url=False)[0]
    inside, *deeper = first["loc"]
    fields = dataclasses.fields(cls)
    if isinstance(inside, int):  # given by its place
        inside = fields[inside].name
    name = ".".join([*([section] if section else []), *map(str, (inside, *deeper))])
    if first["type"] in ("missing", "unexpected_keyword_argument", "unexpected_positional_argument"):
        raise TypeError(f"{name}: {first['msg']}")  # a call in the code, not a value
    secret = any(field.name == inside and not field.repr for field in fields)
    value = f"a {type(first['input']).__name__}" if secret else shown(first["input"])
    return Problem(f"{visible(name)[:120]} = {value}", _expected(first))


def _expected(details: Any) -> str:
    """What pydantic expected, in our words."""
    bounds = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    context = details.get("ctx", {})
    said = [f"{words} {context[bound]}" for bound, words in bounds.items() if bound in context]
    if said:
        return said[0]
    if details["type"] == "string_too_short":
        return "a text that is not empty"
    kind = None if details["type"] == "string_pattern_mismatch" else _KINDS.get(details["type"].split("_")[0])
    return kind or details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")


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
    expected = _expected(details)
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
