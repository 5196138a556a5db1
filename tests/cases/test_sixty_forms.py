"""Transcript files as their formats' public documentation has them: each is read rightly, or refused truly.

The files and what they must be read as (forms/expected.yaml) were written by hand, before and without a look at the
code that reads them.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from nla.errors import NLAError, TranscriptError
from nla.transcripts.files import load_transcripts, read_file
from nla.transcripts.messages import Message, Transcript
from nla.transcripts.rendering import render
from tests.helpers.chat_templates import tokenizer_in_shape

FORMS = Path(__file__).with_name("forms")
EXPECTED: dict[str, Any] = yaml.safe_load((FORMS / "expected.yaml").read_text(encoding="utf-8"))


def put(name: str, folder: Path) -> Path:
    """The file of a form; tables that are no text are made of their rows."""
    if not name.endswith(".parquet.json"):
        return FORMS / name
    from pyarrow import Table
    from pyarrow.parquet import write_table

    path = folder / name.removesuffix(".json")
    write_table(Table.from_pylist(json.loads((FORMS / name).read_text(encoding="utf-8"))), path)
    return path


def check_message(message: Message, wanted: dict[str, Any]) -> None:
    assert message.role == wanted["role"]
    if isinstance(wanted["text"], list):
        positions = [message.content.find(text) for text in wanted["text"]]
        assert positions == sorted(positions) and positions[0] == 0, "the parts in order, and nothing before them"
        assert len(message.content) <= sum(map(len, wanted["text"])) + 2 * len(positions)
    else:
        assert message.content == wanted["text"]
    assert [[call["name"], call["arguments"]] for call in message.calls] == wanted.get("calls", [])
    assert message.reasoning == wanted.get("reasoning", "")
    assert [kind.removeprefix("encrypted ") for kind in message.unseen] == wanted.get("left_out", [])


def check(found: Transcript, wanted: dict[str, Any]) -> None:
    assert len(found.messages) == len(wanted["messages"])
    for message, expected in zip(found.messages, wanted["messages"], strict=True):
        check_message(message, expected)
    assert [tool["function"]["name"] for tool in found.tools] == wanted.get("tools", [])
    assert found.prefill == wanted["messages"][-1].get("prefill", False)
    for key in ("id", "model"):
        assert key not in wanted or getattr(found, key) == wanted[key]
    if "unused" in wanted:
        assert list(found.unused) == wanted["unused"]
    if "never" in wanted:  # what is locked is neither given to a target nor searched
        given = json.dumps([message.for_template() for message in found.messages])
        assert wanted["never"] not in given and all(wanted["never"] not in one.visible for one in found.messages)


@pytest.mark.parametrize("name", EXPECTED)
def test_each_form_is_read_rightly_or_refused_truly(name: str, tmp_path: Path) -> None:
    found, wanted = list(read_file(put(name, tmp_path))), EXPECTED[name]
    errors = [str(one) for one in found if isinstance(one, TranscriptError)]
    if isinstance(wanted, dict):
        assert errors and len(errors) == len(found), "nothing of it is read as something else"
        assert all(re.search(wanted["refused"], error) for error in errors)
        assert all(" Next: " in error and name.split(".")[0] in error for error in errors)
    else:
        assert not errors and len(found) == len(wanted)
        for one, expected in zip(found, wanted, strict=True):
            assert isinstance(one, Transcript)
            check(one, expected)


def test_there_are_sixty_forms_and_more_and_every_file_is_tested() -> None:
    assert len(EXPECTED) >= 60
    assert {path.name for path in FORMS.iterdir()} == {*EXPECTED, "expected.yaml"}


@pytest.mark.parametrize("name", ["openai_tools.json", "think_inline.jsonl", "hh_dialogue.txt", "sharegpt.json"])
def test_standard_input_is_read_as_a_file_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (FORMS / name).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    read, whole = list(load_transcripts("-")), list(load_transcripts(FORMS / name))
    assert [one.messages for one in read] == [one.messages for one in whole]


ODD: list[Any] = [
    None,
    0,
    -1.5,
    True,
    "",
    "x",
    "\ue000",
    [],
    {},
    [[]],
    [None],
    {"role": 3},
    [{"type": "text"}],
    "[" * 5000,
]


def mutated(value: Any, draw: random.Random, share: float) -> Any:
    """A JSON value with some of its parts replaced, dropped or repeated."""
    if draw.random() < share:
        return draw.choice(ODD)
    if isinstance(value, dict):
        kept = {key: mutated(inner, draw, share) for key, inner in value.items() if draw.random() > share / 2}
        return kept | ({draw.choice(["role", "type", "messages", "content"]): value} if draw.random() < share else {})
    if isinstance(value, list):
        return [mutated(inner, draw, share) for inner in value for _ in range(1 + (draw.random() < share))]
    return value


@pytest.mark.slow
def test_two_thousand_damaged_forms_are_read_or_refused_and_rendered_or_refused(tmp_path: Path) -> None:
    """Never anything but a typed error that names the file, whatever of a form's structure is something else."""
    draw, tokenizer, counts = random.Random(0), tokenizer_in_shape("calling"), Counter()
    values = []
    for name in EXPECTED:
        text = (FORMS / name).read_text(encoding="utf-8-sig")
        with contextlib.suppress(ValueError):
            values.append(json.loads(text.splitlines()[0] if name.endswith(".jsonl") else text))
    for _ in range(2000):
        path = tmp_path / draw.choice(["a.json", "a.jsonl", "a.log", "a"])
        path.write_text(json.dumps(mutated(draw.choice(values), draw, draw.choice([0.02, 0.1, 0.3]))), encoding="utf-8")
        for found in read_file(path):
            if isinstance(found, TranscriptError):
                counts["refused"] += 1
                assert str(path) in found.got
                continue
            try:
                render(tokenizer, found, allow_dropped=True)
                counts["rendered"] += 1
            except NLAError:
                counts["refused by the template"] += 1
    assert counts["refused"] > 400 and counts["rendered"] > 400, counts
