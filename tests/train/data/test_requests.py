"""Requests have the attributes that they state, in their file's shares; what is held out is in evaluation alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from nla.errors import RecipeError
from nla.text.prompts import PROMPTS, load_prompts
from nla.train.data.requests import Request, draw_requests

N = 6000
ENGLISH: dict[str, Any] = yaml.safe_load((PROMPTS / "english.yaml").read_text())


@pytest.fixture(scope="module")
def drawn() -> list[Request]:
    return draw_requests(load_prompts(None), N, 0, 0.1, "nla")


def documents(requests: list[Request]) -> list[tuple[Request, Any]]:
    return [(request, reading) for request in requests for reading in request.readings]


def test_the_shipped_prompts_have_what_the_corpus_is_to_know() -> None:
    instructions = ENGLISH["instructions"]["values"]
    seen = [name for name, wordings in instructions.items() if "seen" in wordings]
    assert len(ENGLISH["topics"]["seen"]) >= 60 and len(ENGLISH["forms"]) == 8 and len(seen) >= 16
    assert len(instructions) - len(seen) >= 4 and all(" " not in name for name in instructions)
    assert all(2 <= len(instructions[name]["seen"]) + len(instructions[name]["held_out"]) <= 3 for name in seen)


def test_documents_have_the_shares_that_the_file_states(drawn: list[Request]) -> None:
    attributes = [reading.attributes for _, reading in documents(drawn)]
    assert len(attributes) == N
    answers = Counter(one["answer"] for one in attributes)
    assert abs(answers["own"] / N - 0.2) < 0.02 and abs(answers["neutral"] / N - 0.2) < 0.02
    assert abs(sum(request.split == "eval" for request in drawn) / len(drawn) - 0.1) < 0.03
    plain = [request.readings[0].attributes for request in drawn if request.readings[0].attributes["answer"] != "own"]
    shares = Counter(one["language"] for one in plain)
    assert abs(1 - shares["English"] / len(plain) - 0.1) < 0.02 and {"French", "Spanish", "German"} < set(shares)
    assert abs(sum(one["tone"] is not None for one in plain) / len(plain) - 0.2) < 0.02


def said(values: dict[str, Any], split: str) -> list[str]:
    """The wordings of values that may stand in a split; read from the file, not through the code."""
    kinds = ("seen",) if split == "train" else ("seen", "held_out")
    return [text for wordings in values.values() for kind in kinds for text in wordings.get(kind, ())]


def test_what_is_held_out_stands_in_evaluation_alone(drawn: list[Request]) -> None:
    held_out = Counter[str]()
    for request, reading in documents(drawn):
        new, attributes = [], reading.attributes
        topics = ENGLISH["topics"]["seen"] + (ENGLISH["topics"]["held_out"] if request.split == "eval" else [])
        assert attributes["topic"] in topics
        new += ["topic"] if attributes["topic"] in ENGLISH["topics"]["held_out"] else []
        sentences = {"form": {attributes["form"]: ENGLISH["forms"][attributes["form"]]}}
        for name, modifier in ENGLISH["modifiers"].items():
            value = attributes[name]
            if value != modifier.get("otherwise"):
                sentences[name] = {value: modifier["values"][value]}
        for name, values in sentences.items():
            wordings = [text.replace("{topic}", attributes["topic"]) for text in said(values, request.split)]
            used = [text for text in wordings if text in request.user]
            assert used, request
            seen = [text.replace("{topic}", attributes["topic"]) for text in said(values, "train")]
            new += [] if set(used) & set(seen) else [name]
        if attributes["instruction"] is not None:
            values = {"": ENGLISH["instructions"]["values"][attributes["instruction"]]}
            assert reading.system in said(values, request.split)
            new += [] if reading.system in said(values, "train") else ["instruction"]
        else:
            assert reading.system == "You are a helpful assistant."
        assert sorted(attributes["held_out"]) == sorted(new)
        held_out.update(new or [f"none in {request.split}"])
    assert min(held_out[name] for name in ("topic", "form", "tone", "instruction", "none in eval")) > 5
    users = {split: {request.user for request in drawn if request.split == split} for split in ("train", "eval")}
    assert not users["train"] & users["eval"], "no request is in both splits"


def test_a_neutral_answer_is_written_without_its_instructions_and_read_under_two_and_under_none(drawn) -> None:
    for request in drawn[:-1]:
        kinds = [reading.attributes["answer"] for reading in request.readings]
        names = [reading.attributes["instruction"] for reading in request.readings]
        assert kinds in ([None], ["own"], [None, "neutral", "neutral"]) and len(set(names)) == len(names)
        assert request.system == request.readings[0].system
        assert {reading.attributes["request"] for reading in request.readings} == {request.number}


def test_the_seed_decides_and_more_documents_begin_with_the_same(drawn: list[Request]) -> None:
    few = draw_requests(load_prompts("english"), 50, 0, 0.1, "nla")
    assert few[:-1] == drawn[: len(few) - 1] and sum(len(request.readings) for request in few) == 50
    assert draw_requests(load_prompts(None), 50, 1, 0.1, "nla") != few


def changed(**changes: Any) -> dict[str, Any]:
    return {**ENGLISH, **changes}


WRONG: list[tuple[Any, str]] = [
    ("topics: [", "YAML"),
    ([1], "mapping|valid dictionary"),
    ({}, "topics"),
    (changed(topic=["cats"]), "'topics'"),
    (changed(topics={"seen": []}), "a wording"),
    (changed(topics={"held_out": ["cats"]}), "not held out"),
    (changed(forms={"poem": {"seen": ["A poem."]}}), "topic"),
    (changed(forms={"poem": {"seen": [7]}}), "forms.poem.seen"),
    (changed(forms={"poem": {"held_out": ["On {topic}."]}}), "not held out"),
    (changed(modifiers={"topic": {"share": 0.1, "values": {"a": {"seen": ["b"]}}}}), "another name"),
    (changed(modifiers={"mood": {"share": 0.1, "values": {"a": {"held_out": ["b"]}}}}), "not held out"),
    (changed(modifiers={"mood": {"share": 1.5, "values": {"a": {"seen": ["b"]}}}}), "at most 1"),
    (changed(instructions=ENGLISH["instructions"] | {"share": 0.9}), "neutral"),
    (changed(instructions=ENGLISH["instructions"] | {"values": {"a": {"seen": ["b"]}}}), "2 instructions"),
    (changed(instructions=ENGLISH["instructions"] | {"otherwise": []}), "otherwise"),
]


def twice() -> list[tuple[Any, str]]:
    """The shipped file with a text of each part twice: as seen and as held out, of the same value or another."""
    found = []
    for kind in ("seen", "held_out"):
        topics = {**ENGLISH["topics"], kind: [*ENGLISH["topics"][kind], "Penguins "]}
        found.append((changed(topics=topics), "(?i)penguins"))
        for part in ("poem", "a new form"):
            forms = {part: {}, **ENGLISH["forms"]}
            forms[part] = {**forms[part], kind: [*forms[part].get(kind, ()), "Tell me a  story about {topic}."]}
            found.append((changed(forms=forms), "story about"))
        tone = {"share": 0.1, "values": {"plain": {"seen": ["Be plain."]}, "sad": {kind: ["It is for experts."]}}}
        found.append((changed(modifiers={**ENGLISH["modifiers"], "tone": tone}), "for experts"))
        values = ENGLISH["instructions"]["values"] | {"nothing": {kind: ["You are a helpful assistant."]}}
        found.append((changed(instructions=ENGLISH["instructions"] | {"values": values}), "helpful assistant"))
    return found


@pytest.mark.parametrize(("content", "says"), WRONG + twice())
def test_a_file_that_does_not_say_what_it_must_is_refused(tmp_path: Path, content: Any, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=says):
        load_prompts(str(path))


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(RecipeError, match="english"):
        load_prompts("klingon")
