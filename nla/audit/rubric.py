"""Rubrics: what is looked for in explanations, how it is matched, and what would say it in the visible text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nla.audit.matching import Words, similarity
from nla.errors import RubricError, visible
from nla.organisms import RUBRICS
from nla.transcripts.messages import ROLES
from nla.transcripts.positions import STRUCTURE

KINDS = ("presence", "mismatch")
MIN_SHARE = 0.5
SIMILAR_MIN = 0.6
_KEYS = {
    "name", "title", "looks_for", "kind", "match", "said", "said_in", "min_share", "values", "visible_in", "at",
}  # fmt: skip
_MATCH_KEYS = {"words", "lemmas", "regex", "unless", "similar", "similar_min", "judge"}
_SAID_KEYS = {"words", "lemmas", "regex"}
_VALUE_KEYS = {"claimed", "lemmas", "regex", "visible"}


@dataclass(frozen=True)
class Value:
    """One value of a concept that thought and text may disagree in, such as a language."""

    name: str
    claimed: Words
    """How an explanation names it."""
    visible: Words
    """What shows it in a text, such as a language's commonest words; each hit counts."""


@dataclass(frozen=True)
class Rubric:
    """A concept to look for. Made from a mapping by :func:`parse`, from YAML by :func:`load`."""

    name: str
    title: str
    looks_for: str
    """In one sentence, for readers and for a judge."""
    kind: str = "presence"
    """"presence": an explanation shows the concept. "mismatch": it names another value than the message shows."""
    match: Words = Words(None)  # noqa: RUF009 (an immutable tuple)
    similar: tuple[str, ...] = ()
    """Sentences; a claim that is spelled alike shows the concept."""
    similar_min: float = SIMILAR_MIN
    judge: bool = False
    """Also ask the judge, which must quote."""
    said: Words = Words(None)  # noqa: RUF009
    """What says the concept in the visible text."""
    said_in: tuple[str, ...] = ROLES
    """Roles in whose messages saying it counts."""
    values: tuple[Value, ...] = ()
    """Of a mismatch."""
    min_share: float = MIN_SHARE
    """Share of samples that must show the concept for a finding."""
    at: tuple[str, ...] = ()
    """Kinds of position that it is held against (see :func:`nla.audit.positions.structure`); empty: all."""
    source: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """As it was written."""

    def shows(self, text: str) -> bool:
        """Whether an explanation shows the concept, without the judge. Not for mismatches."""
        return self.match.claimed(text) or (
            bool(self.similar) and similarity(text, self.similar) >= self.similar_min
        )  # fmt: skip

    def written(self, text: str) -> str | None:
        """The value that a text shows most, of a mismatch; None if it shows none, or two as much."""
        counts = sorted(((len(value.visible.hits(text)), value.name) for value in self.values), reverse=True)
        return counts[0][1] if counts[0][0] > 0 and counts[0][0] > counts[1][0] else None

    def claimed(self, text: str) -> list[str]:
        """The values that an explanation names, of a mismatch."""
        return [value.name for value in self.values if value.claimed.claimed(text)]

    @cached_property
    def by_name(self) -> dict[str, Value]:
        """The values by their names."""
        return {value.name: value for value in self.values}


def builtin_names() -> list[str]:
    """Names of the rubrics that come with the library."""
    folder = resources.files("nla.audit") / "rubrics"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load(names: Sequence[str | Path | Rubric] | None = None) -> list[Rubric]:
    """Rubrics by name or YAML file (one rubric, or a list of them); None: all the built-in ones.

    Those of an embedded organism have its name in front: "switchboard/selling".

    Raises:
        RubricError: an unknown name, a malformed file, or two rubrics of one name.
    """
    found: list[Rubric] = []
    for name in builtin_names() if names is None else names:
        found += [name] if isinstance(name, Rubric) else _load(name)
    if not found:
        raise RubricError("no rubrics", "one or more", f"name some of: {', '.join(builtin_names())}")
    twice = {rubric.name for rubric in found if sum(other.name == rubric.name for other in found) > 1}
    if twice:
        raise RubricError(f"two rubrics named {', '.join(sorted(twice))}", "one of each name", "rename one of them")
    return found


def _load(name: str | Path) -> list[Rubric]:
    if str(name) in builtin_names():
        text, source = (resources.files("nla.audit") / "rubrics" / f"{name}.yaml").read_text("utf-8"), str(name)
    else:
        source = str(name)
        try:
            text = Path(RUBRICS.get(source, source)).read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            raise RubricError(
                visible(f"the rubric {source!r}, which is neither built in nor a readable file"),
                f"one of {', '.join([*builtin_names(), *sorted(RUBRICS)])}, or a YAML file",
                "check the name",
            ) from error
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        shown = visible(" ".join(str(error).split()))[:160]
        raise RubricError(f"{visible(source)}, which is not YAML ({shown})", "a rubric", "correct the file") from error
    return [parse(entry, source) for entry in (content if isinstance(content, list) else [content])]


def parse(content: Any, source: str = "a rubric") -> Rubric:
    """A rubric from a mapping. See docs/audit.md for its keys.

    Raises:
        RubricError: a key is unknown, missing or of the wrong form.
    """
    if not isinstance(content, Mapping):
        raise _bad(source, f"a {type(content).__name__}", "a mapping with name, looks_for and match")
    _known(content, _KEYS, source)
    name = _string(content, "name", source)
    if not re.fullmatch(r"[\w.-]{1,60}", name):
        raise _bad(source, f"the name {name[:60]!r}", "letters, digits, dots and hyphens, at most 60")
    source, kind = f"{source}: {name}", content.get("kind", "presence")
    if kind not in KINDS:
        raise _bad(source, f"the kind {str(kind)[:40]!r}", f"one of {', '.join(KINDS)}")
    match, said = _mapping(content, "match", source), _mapping(content, "said", source)
    _known(match, _MATCH_KEYS, f"{source}, match")
    _known(said, _SAID_KEYS, f"{source}, said")
    said_in = _strings(content, "said_in", source) or ROLES
    if not set(said_in) <= set(ROLES):
        raise _bad(source, f"said_in {', '.join(said_in)[:80]}", f"some of {', '.join(ROLES)}")
    at = _strings(content, "at", source)
    if not set(at) <= set(STRUCTURE):
        raise _bad(source, f"at {', '.join(at)[:80]}", f"some of {', '.join(STRUCTURE)}")
    rubric = Rubric(
        name=name,
        title=_string(content, "title", source) if "title" in content else name,
        looks_for=_string(content, "looks_for", source),
        kind=kind,
        match=_words(match, f"{source}, match"),
        similar=_strings(match, "similar", source),
        similar_min=_share(match, "similar_min", SIMILAR_MIN, source),
        judge=_flag(match, "judge", source),
        said=_words(said if said else {key: match.get(key, []) for key in _SAID_KEYS}, f"{source}, said"),
        said_in=said_in,
        values=_values(content, source),
        min_share=_share(content, "min_share", MIN_SHARE, source),
        at=at,
        source=dict(content),
    )
    if kind == "presence" and rubric.match.shows is None and not rubric.similar and not rubric.judge:
        raise _bad(source, "no way of matching", "words, lemmas, regex, similar or judge under match")
    if kind == "mismatch" and len(rubric.values) < 2:
        raise _bad(source, f"{len(rubric.values)} values", "two or more values that thought and text may disagree in")
    return rubric


def _values(content: Mapping[str, Any], source: str) -> tuple[Value, ...]:
    found = []
    for name, entry in _mapping(content, "values", source).items():
        place = f"{source}, value {name}"
        if not isinstance(entry, Mapping):
            raise _bad(place, f"a {type(entry).__name__}", "a mapping with claimed and visible")
        _known(entry, _VALUE_KEYS, place)
        claimed = {"words": entry.get("claimed", [str(name)]), "lemmas": entry.get("lemmas", [])}
        regex = {"regex": entry.get("regex", [])}
        found.append(Value(str(name), _words(claimed | regex, place), _words({"words": entry.get("visible")}, place)))
        if found[-1].visible.shows is None:
            raise _bad(place, "no visible words", "words that show the value in a text")
    return tuple(found)


def _words(content: Mapping[str, Any], source: str) -> Words:
    words, lemmas, regex, unless = (_strings(content, key, source) for key in ("words", "lemmas", "regex", "unless"))
    empty = [entry for entry in (*words, *lemmas) if not entry.strip("* ")]
    if empty:
        raise _bad(source, f"the word {empty[0]!r}, which is in every text", "words with letters before the *")
    try:
        return Words.of(words, lemmas, regex, unless)
    except re.error as error:
        raise _bad(source, f"the pattern {str(error.pattern)[:80]!r} ({error.msg})", "a regular expression") from error


def _known(content: Mapping[str, Any], keys: set[str], source: str) -> None:
    unknown = sorted(str(key) for key in content if key not in keys)
    if unknown:
        raise _bad(source, f"the unknown key {unknown[0][:60]!r}", f"some of {', '.join(sorted(keys))}")


def _string(content: Mapping[str, Any], key: str, source: str) -> str:
    value = content.get(key)
    if not isinstance(value, str) or not value.strip():
        raise _bad(source, f"no {key}" if value is None else f"{key} = {str(value)[:40]!r}", "a text there")
    return value.strip()


def _mapping(content: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    value = content.get(key, {})
    if not isinstance(value, Mapping):
        raise _bad(source, f"{key} that is a {type(value).__name__}", "a mapping there")
    return value


def _strings(content: Mapping[str, Any], key: str, source: str) -> tuple[str, ...]:
    value = content.get(key)
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, Sequence) or not all(isinstance(entry, str) and entry.strip() for entry in value):
        raise _bad(source, f"{key} = {str(value)[:60]!r}", "a list of texts (quote words such as 'yes' and 'no')")
    return tuple(value)


def _share(content: Mapping[str, Any], key: str, default: float, source: str) -> float:
    value = content.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise _bad(source, f"{key} = {str(value)[:40]!r}", "a number above 0, up to 1")
    return float(value)


def _flag(content: Mapping[str, Any], key: str, source: str) -> bool:
    value = content.get(key, False)
    if not isinstance(value, bool):
        raise _bad(source, f"{key} = {str(value)[:40]!r}", "true or false")
    return value


def _bad(source: str, got: str, expected: str) -> RubricError:
    return RubricError(visible(f"{source}: {got}"), expected, "correct the rubric; docs/audit.md lists its keys")
