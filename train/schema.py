"""Typed settings: what a recipe or a command line says goes in, a checked and frozen dataclass comes out.

Pydantic checks types and ranges. Each setting also says which stage's result it decides, so that a change runs that
stage and those after it again, and no other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar, dataclass_transform

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from nla.errors import ArgumentError, ParseError, RecipeError
from nla.storage import schema
from nla.storage.files import parse_yaml
from nla.storage.schema import Problem, dataclass_in, shown

STAGES = ("sample", "extract", "describe", "warmstart", "joint", "control")
"""In their order. A recipe's ``stages`` are some of them."""
Settings = TypeVar("Settings")


class Decides(NamedTuple):
    """The first stage whose result a setting decides; None: it decides no result."""

    stage: str | None
    but_for_default: bool = False
    """The default counts for nothing: stages that were finished before the setting counted stay finished."""


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
Count = Annotated[int, Field(ge=1, le=10**12)]
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
    check = schema.checked(lambda problem: ArgumentError(*problem), name, kw_only=False)

    def decorate(cls: type[Settings]) -> type[Settings]:
        made: Any = check(cls)
        made.DECIDES = decides
        return made

    return decorate


def refuse(name: str, value: Any, expected: str) -> NoReturn:
    """Raise the ArgumentError of a recipe's value ``name`` that is not as ``expected``."""
    raise ArgumentError(*Problem(f"{name} = {shown(value)}", expected))


def build(cls: type[Settings], content: Any, source: str) -> Settings:
    """Settings from a mapping of their names, where None is an empty one.

    Raises:
        RecipeError: it is no mapping, a key is unknown or missing, or a value is not as it must be.
    """
    return schema.build(cls, content, source, lambda problem: RecipeError(*problem))


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
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        value = getattr(made, name)
        stated = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Decides)]
        stage, but_for_default = stated[0] if stated else Decides(cls.DECIDES)
        if dataclass_in(hint) is not None and dataclasses.is_dataclass(value):
            yield from ((stage, f"{name}.{inner}", one) for stage, inner, one in deciding(value))
        elif stage is not None and not (but_for_default and value == defaults[name]):
            yield stage, name, value
