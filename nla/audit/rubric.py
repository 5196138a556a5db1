"""Rubrics in YAML in; out come what to look for in explanations, how, and what would say it in the visible text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from nla.audit.matching import Words, similarity
from nla.errors import ParseError, RubricError, visible
from nla.organisms import RUBRICS
from nla.storage.files import parse_yaml
from nla.storage.schema import first_problem, shown
from nla.text.patterns import compile_pattern
from nla.transcripts.messages import ROLES, role_of
from nla.transcripts.positions import STRUCTURE

MIN_SHARE = 0.5
SIMILAR_MIN = 0.6


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError("a text that is not empty")
    return text


def _word(text: str) -> str:
    if not text.strip("* "):
        raise ValueError("a word with letters before the *: this one is in every text")
    return text


def _pattern(text: str) -> str:
    try:
        compile_pattern(text, "the pattern")
    except ParseError as error:
        raise ValueError(f"{error.expected}, not {error.got}") from error
    return text


def _one_of(known: Sequence[str]) -> AfterValidator:
    def check(text: str) -> str:
        if text not in known:
            raise ValueError(f"one of {', '.join(known)}")
        return text

    return AfterValidator(check)


def _list(value: Any) -> Any:
    """A list may be written as one text, or left empty."""
    return (
        () if value is None else (value,) if isinstance(value, str) else tuple(value) if type(value) is list else value
    )


def _roles(value: Any) -> Any:
    """Roles may go by their other names, such as "developer"."""
    value = _list(value)
    return tuple(role_of(role) if isinstance(role, str) else role for role in value) if type(value) is tuple else value


Text = Annotated[str, AfterValidator(_text)]
Line = Annotated[Text, AfterValidator(str.strip)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_list)]
WordList = Annotated[tuple[Annotated[Text, AfterValidator(_word)], ...], BeforeValidator(_list)]
PatternList = Annotated[tuple[Annotated[Text, AfterValidator(_pattern)], ...], BeforeValidator(_list)]
Share = Annotated[float, Field(gt=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Phrases(_Part):
    """Ways in which a text can say something."""

    words: WordList = ()
    """Whole words and phrases; ``*`` for any ending."""
    lemmas: WordList = ()
    """Words in all their regular English forms."""
    regex: PatternList = ()
    """Regular expressions."""


class Match(Phrases):
    """Ways in which an explanation can show a concept."""

    unless: PatternList = ()
    """Regular expressions that take it back within the same claim."""
    similar: Texts = ()
    """Sentences; a claim that is spelled alike shows the concept."""
    similar_min: Share = SIMILAR_MIN
    judge: bool = False
    """Also ask the judge, which must quote."""


class Value(_Part):
    """One value of a concept that thought and text may disagree in, such as a language."""

    claimed: WordList = ()
    """How an explanation names it."""
    lemmas: WordList = ()
    regex: PatternList = ()
    visible: Annotated[WordList, Field(min_length=1)]
    """What shows it in a text, such as a language's commonest words; each hit counts."""

    @cached_property
    def claimed_words(self) -> Words:
        """``claimed``, ``lemmas`` and ``regex`` as one matcher."""
        return Words.of(self.claimed, self.lemmas, self.regex)

    @cached_property
    def visible_words(self) -> Words:
        """``visible`` as a matcher."""
        return Words.of(self.visible)


class Rubric(_Part):
    """A concept to look for."""

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,60}$")]
    title: Line
    """Its name in reports; None: ``name``."""
    looks_for: Line
    """What it looks for, in one sentence, for readers and for a judge."""
    kind: Literal["presence", "mismatch"] = "presence"
    """"presence": an explanation shows the concept. "mismatch": it names another value than the message shows."""
    match: Match = Match()
    said: Phrases | None = None
    """What says the concept in the visible text; without it, words, lemmas and regex of ``match``."""
    said_in: Annotated[tuple[Annotated[str, _one_of(ROLES)], ...], BeforeValidator(_roles)] = ROLES
    """Roles in whose messages saying it counts."""
    values: dict[str, Value] = {}
    """The values of a mismatch, such as languages."""
    min_share: Share = MIN_SHARE
    """Share of samples that must show the concept for a finding."""
    at: Annotated[tuple[Annotated[str, _one_of(STRUCTURE)], ...], BeforeValidator(_list)] = ()
    """Kinds of position that it is held against (see :func:`nla.transcripts.positions.structure`); empty: all."""

    @model_validator(mode="before")
    @classmethod
    def _titled(cls, content: Any) -> Any:
        return {"title": content.get("name"), **content} if isinstance(content, Mapping) else content

    @field_validator("values", mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """Without ``claimed`` an explanation names a value by its name."""
        if not isinstance(values, Mapping):
            return values
        return {
            name: {"claimed": [name], **value} if isinstance(value, Mapping) else value
            for name, value in values.items()
        }

    @field_validator("said_in")
    @classmethod
    def _someone(cls, roles: tuple[str, ...]) -> tuple[str, ...]:
        return roles or ROLES

    @model_validator(mode="after")
    def _whole(self) -> Rubric:
        ways = (self.match.words, self.match.lemmas, self.match.regex, self.match.similar)
        if self.kind == "presence" and not any(ways) and not self.match.judge:
            raise ValueError("a way of matching: words, lemmas, regex, similar or judge under match")
        if self.kind == "mismatch" and len(self.values) < 2:
            raise ValueError("two or more values that thought and text may disagree in")
        return self

    @cached_property
    def match_words(self) -> Words:
        """What of ``match`` is words and patterns, as one matcher."""
        return Words.of(self.match.words, self.match.lemmas, self.match.regex, self.match.unless)

    @cached_property
    def said_words(self) -> Words:
        """What says the concept in the visible text, as one matcher."""
        said = self.match if self.said is None or self.said == Phrases() else self.said
        return Words.of(said.words, said.lemmas, said.regex)

    def shows(self, text: str) -> bool:
        """Whether an explanation shows the concept, without the judge. Not for mismatches."""
        similar, least = self.match.similar, self.match.similar_min
        return self.match_words.claimed(text) or (bool(similar) and similarity(text, similar) >= least)

    def written(self, text: str) -> str | None:
        """For a mismatch: the value that a text shows most; None if it shows none, or two equally often."""
        hits = sorted(
            ((len(value.visible_words.hits(text)), name) for name, value in self.values.items()), reverse=True
        )
        return hits[0][1] if hits[0][0] > 0 and hits[0][0] > hits[1][0] else None

    def claimed(self, text: str) -> list[str]:
        """For a mismatch: the values that an explanation names."""
        return [name for name, value in self.values.items() if value.claimed_words.claimed(text)]


BUILTIN = {path.stem: path for path in sorted(Path(__file__).with_name("rubrics").glob("*.yaml"))}
"""The rubrics that come with the library, by name."""


def load_rubrics(names: str | Path | Rubric | Sequence[str | Path | Rubric] | None = None) -> list[Rubric]:
    """Rubrics by name or YAML file (one rubric, or a list of them); None: all the built-in ones.

    Those of an embedded organism have its name in front: "switchboard/selling".

    Raises:
        RubricError: an unknown name, a malformed file, or two rubrics of one name.
    """
    rubrics: list[Rubric] = []
    names = [names] if isinstance(names, str | Path | Rubric) else names
    for name in BUILTIN if names is None else names:
        rubrics += [name] if isinstance(name, Rubric) else _read(name)
    if not rubrics:
        raise RubricError("no rubrics", "one or more", f"name some of: {', '.join(BUILTIN)}")
    twice = {rubric.name for rubric in rubrics if sum(other.name == rubric.name for other in rubrics) > 1}
    if twice:
        raise RubricError(f"two rubrics named {', '.join(sorted(twice))}", "one of each name", "rename one of them")
    return rubrics


def _read(name: str | Path) -> list[Rubric]:
    source = str(name)
    try:
        text = Path(BUILTIN.get(source) or RUBRICS.get(source, source)).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise RubricError(
            visible(f"the rubric {source!r}, which is neither built in nor a readable file"),
            f"one of {', '.join([*BUILTIN, *sorted(RUBRICS)])}, or a YAML file",
            "check the name",
        ) from error
    try:
        content = parse_yaml(text, source)
    except ParseError as error:
        raise RubricError(error.got, error.expected, error.fix) from error
    return [parse_rubric(entry, source) for entry in (content if isinstance(content, list) else [content])]


def parse_rubric(content: Any, source: str = "a rubric") -> Rubric:
    """A rubric from a mapping. See docs/audit.md for its keys.

    Raises:
        RubricError: a key is unknown, missing or of the wrong form.
    """
    try:
        return Rubric.model_validate(content)
    except ValidationError as error:
        problem = first_problem(error, Rubric)
        name = content.get("name") if isinstance(content, Mapping) else None
        place = f"{source}: {shown(name)}" if isinstance(name, str) else source
        raise RubricError(
            visible(f"{place}: {problem.got}"), problem.expected, "correct the rubric; docs/audit.md lists its keys"
        ) from error
