"""YAML from anywhere is read as plain values, or refused with a typed error."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nla.errors import ParseError
from nla.storage.files import parse_yaml, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{name}: &{name}\n  <<: [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghij", "bcdefghijk", strict=True)
)


def test_plain_values_come_as_they_are_written_and_aliases_as_what_they_stand_for(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &b {x: 1}\nc:\n  <<: *b\n  y: [1.5, true, null]\n'1': *b\n")
    assert read_yaml(tmp_path / "a.yaml") == {"base": {"x": 1}, "c": {"x": 1, "y": [1.5, True, None]}, "1": {"x": 1}}
    assert parse_yaml("", "nothing") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "more than 100,000 values"),
        (MERGES, "more than 100,000 values"),
        ("a: &a [*a]", "inside of what it stands for"),
        ("[" * 5000, "nested too deep"),
        ("a: [", "line 1"),
        ("a: 1\nyes: 1", "line 2.*key that is no text"),
        ("1: 2", "key that is no text"),
        ("? [a]\n: b", "key that is no text"),
        ("a: !!binary aGk=", "binary"),
        ("a: !!set {x}", "set"),
        ("a: 1\na: 2", "line 2.*'a' twice"),
        ("a: " + "x" * 300_000, "more than 200,000 characters"),
        ("!!python/object/apply:os.system ['x']", "python/object"),
        ("a\0: b", "not YAML"),
        ("a: *x", "undefined alias"),
        ("--- 1\n--- 2", "another document"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_with_its_place(text: str, says: str) -> None:
    with pytest.raises(ParseError, match=f"the source.*{says}"):
        parse_yaml(text, "the source")


def test_a_date_without_quotes_is_a_text() -> None:
    assert parse_yaml("a: 2001-09-09\nb: 2001-99-99", "x") == {
        "a": "2001-09-09",
        "b": "2001-99-99",
    }


def test_a_file_that_cannot_be_read_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("a: \xe4".encode("latin-1"))
    for name in ("latin.yaml", "none.yaml", "."):
        with pytest.raises(ParseError, match="no readable"):
            read_yaml(tmp_path / name)


@pytest.mark.parametrize(
    "value",
    ['!!int ""', '!!float "_"', '!!float ""', f"!!float {'1:' * 200}1.5", "!!bool x", "!!timestamp x"],
)
def test_a_tag_whose_value_does_not_fit_is_refused(value: str) -> None:
    with pytest.raises(ParseError, match="not YAML"):
        parse_yaml(f"a: {value}", "a recipe")


def test_foreign_yaml_is_what_the_safe_loader_makes_of_it() -> None:
    text = "2024: x\nyes: 1\nwhen: 2001-09-09\nodd: [010, 1:30, !!binary aGk=, !!set {x}]\na: 1\na: 2"
    assert parse_yaml(text, "a card", foreign=True) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        MERGES,
        f"? [{', '.join(['*h'] * 10)}]\n: x".join([BOMB, ""]),
        "a: &a [*a]",
        "[" * 5000,
        "a: " + "x" * 300_000,
        "a: " + "9" * 200_000,
        f"a: {'1:' * 90_000}1",
        "!!python/object/apply:os.system ['x']",
        "a: 2001-99-99",
    ],
)
def test_foreign_yaml_is_limited_too(text: str) -> None:
    with pytest.raises(ParseError, match="the source"):
        parse_yaml(text, "the source", foreign=True)
