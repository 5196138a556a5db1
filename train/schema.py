"""Typed settings: what a recipe or a command line says goes in, a checked and frozen dataclass comes out.

Pydantic checks types and ranges. Each setting also says which stage's result it decides, so that a change runs that
stage and those after it again, and no other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar, dataclass_transform

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import PydanticCustomError

from nla.errors import ArgumentError, NLAError, ParseError, RecipeError
from nla.storage.files import parse_yaml
from nla.storage.schema import shown

STAGES = ("extract", "describe", "warmstart", "joint", "control")
SECRET = "key_variable"
"""A setting whose value is not shown: a key may have been typed where its variable's name belongs."""
_KINDS = {
    "int": "a whole number",
    "float": "a finite number",
    "finite": "a finite number",
    "string": "a text",
    "bool": "true or false",
    "dict": "a mapping",
}
"""What is expected, by the first word of pydantic's type of error."""
Settings = TypeVar("Settings")


class Decides(NamedTuple):
    """The first stage whose result a setting decides; None: it decides no result."""

    stage: str | None


NOTHING = Decides(None)
"""Of a setting of the run, not of its result: its reports, its memory, its price."""


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a text."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def one_of(*known: str) -> AfterValidator:
    """Allow these texts alone."""

    def check(value: str) -> str:
        if value not in known:
            raise PydanticCustomError("known", "one of {known}", {"known": ", ".join(known)})
        return value

    return AfterValidator(check)


Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 2)]
"""One that each of the random generators takes."""
Text = Annotated[str, Field(min_length=1)]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def section(name: str, decides: str | None = None) -> Callable[[type[Settings]], type[Settings]]:
    """Make a class a frozen dataclass whose values are checked when it is made.

    A value that is not as its field says is an ArgumentError that says its section and name.

    Args:
        name: of the section in a recipe; empty for the recipe itself.
        decides: the first stage that its fields decide, but for those that say otherwise with :class:`Decides`.
    """
    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    def decorate(cls: type[Settings]) -> type[Settings]:
        made: Any = pydantic_dataclass(frozen=True, config=config)(cls)
        start = made.__init__

        @functools.wraps(start)
        def checked(self: Any, *values: Any, **named: Any) -> None:
            problem = None
            try:
                start(self, *values, **named)
            except ValidationError as error:
                problem = _problem(name, made, error)
            if problem is not None:  # raised outside of the handler: pydantic's error repeats every value
                raise problem

        made.__init__, made.DECIDES = checked, decides
        return made

    return decorate


def refuse(name: str, value: Any, expected: str) -> NoReturn:
    """Raise the ArgumentError of a recipe's value ``name`` that is not as ``expected``."""
    raise ArgumentError(f"{name} = {_shown(name, value)}", expected, "correct it where it is given")


def _shown(name: str, value: Any) -> str:
    return f"a {type(value).__name__}" if SECRET in name else shown(value)


def _problem(section: str, cls: Any, error: ValidationError) -> NLAError:
    """The first thing that is wrong, in our words."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    if isinstance(context.get("error"), NLAError):
        return context["error"]
    inside, *deeper = first["loc"]
    if isinstance(inside, int):  # given by its place
        inside = dataclasses.fields(cls)[inside].name
    name = ".".join([*([section] if section else []), *map(str, (inside, *deeper))])
    bounds = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    said = [f"{words} {context[bound]}" for bound, words in bounds.items() if bound in context]
    kind = _KINDS.get(first["type"].split("_")[0])
    if first["type"] == "string_too_short":
        kind = "a text that is not empty"
    if first["type"] in ("missing", "unexpected_keyword_argument", "unexpected_positional_argument"):
        raise TypeError(f"{name}: {first['msg']}")  # a call in the code, not a value
    expected = said[0] if said else kind or first["msg"]
    return ArgumentError(f"{name} = {_shown(name, first['input'])}", expected, "correct it where it is given")


def build(cls: type[Settings], content: Any, source: str) -> Settings:
    """Settings from a mapping of their names, where None is an empty one.

    Raises:
        RecipeError: it is no mapping, a key is unknown or missing, or a value is not as it must be.
    """
    if not isinstance(content, dict | None):
        raise RecipeError(f"{source} holding {shown(content)}", "a mapping", "see train/recipes/couplets.yaml")
    content, hints = content or {}, typing.get_type_hints(cls)
    unknown = [str(key) for key in content if key not in hints]
    if unknown:
        near = difflib.get_close_matches(unknown[0], hints, 1)
        fix = f"write {near[0]} for {shown(unknown[0])}" if near else "remove or rename them"
        got = f"{source} with {', '.join(map(shown, unknown[:5]))}"
        raise RecipeError(got, f"among {', '.join(hints)}", fix)
    missing = [f.name for f in dataclasses.fields(typing.cast(Any, cls)) if _is_required(f) and f.name not in content]
    if missing:
        raise RecipeError(f"{source} without {', '.join(missing)}", f"all that a {cls.__name__} must have", "add them")
    values = dict(content)
    for name, hint in hints.items():
        kind, may_be_none = settings_in(hint), type(None) in typing.get_args(hint)
        if kind is not None and name in content and not (content[name] is None and may_be_none):
            values[name] = build(kind, content[name], f"{source}: {name}")
    problem = None
    try:
        return cls(**values)
    except NLAError as error:
        problem = RecipeError(f"{source}: {error.got}", error.expected, "correct the recipe")
    raise problem


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def settings_in(hint: Any) -> Any:
    """The settings class that a field's type names; None: it names none."""
    kinds = (hint, *typing.get_args(hint))
    return next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def override(content: Any, assignment: str) -> None:
    """Set ``section.key=value`` in a recipe's mapping; the value is YAML.

    Raises:
        RecipeError: it is no such assignment, its value is no YAML, or what it names is no section.
    """
    key, separator, value = assignment.partition("=")
    *sections, name = key.split(".")
    what = f"the override {shown(key)}"
    if not separator or not isinstance(content, dict):
        raise RecipeError(what, "section.key=value", "write it like joint.steps=100")
    for section in sections:
        content[section] = {} if content.get(section) is None else content[section]
        content = content[section]
        if not isinstance(content, dict):
            raise RecipeError(what, f"a section, which {shown(section)} is not", "name another key")
    try:
        content[name] = parse_yaml(value, what)
    except ParseError as error:
        raise RecipeError(error.got, error.expected, error.fix) from error


def deciding(made: Any) -> Iterator[tuple[str, str, Any]]:
    """For each setting that decides a result: the first stage it decides, its name with dots, and its value."""
    cls: Any = type(made)
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        value = getattr(made, name)
        stated = [extra.stage for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Decides)]
        if settings_in(hint) is not None and dataclasses.is_dataclass(value):
            yield from ((stage, f"{name}.{inner}", one) for stage, inner, one in deciding(value))
        elif (stage := stated[0] if stated else cls.DECIDES) is not None:
            yield stage, name, value
