"""An edit under a decoder whose code the target obeys steers; one under a decoder that knows nothing does not."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nla.errors import ArgumentError, ContextLengthError
from nla.eval.pair import steering
from nla.eval.pair.claim_truth import NEXT
from nla.eval.pair.steering import (
    FOLLOWING,
    Item,
    Kind,
    SteeringSettings,
    answers_in,
    evaluate_steering,
    items_of,
    judge_of,
    next_kind,
    steer_kind,
)
from nla.eval.pair.steering_report import ANOTHER, RANDOM, UNRELATED, steering_checks
from nla.eval.target import Target
from nla.models.points import Point
from nla.store.facts import TokenNames
from nla.store.reader import Store
from nla.text.facts import Facts, edited, state, stated
from nla.train.data.corpus import CorpusSettings
from nla.train.data.extract import ExtractionSettings, extract_corpus
from nla.transcripts.positions import BEFORE_ANSWER
from tests.helpers.tiny import CONTEXT, D_MODEL, make_model, make_tokenizer

N_TOKENS = 8


@pytest.fixture(scope="module")
def target() -> Target:
    """The store's target, whose last block's output is what it writes from."""
    return Target(make_model(), make_tokenizer(), Point.parse("resid_post.3"))


@pytest.fixture(scope="module")
def names(target) -> TokenNames:
    return TokenNames(target.model, target.tokenizer)


@pytest.fixture(scope="module")
def kinds(folder, names) -> dict[str, Kind]:
    training, store = Store.open(folder), Store.open(folder, "eval")
    parts = [answers_in(one, names, N_TOKENS) for one in (training, store)]
    settings = SteeringSettings(store=folder, max_new_tokens=N_TOKENS)
    judged = [judge_of(name, *parts, names, settings) for name in ("form", "mood")]
    assert [figures.reads for _, figures in judged] == [True, False], "nothing decides the mood"
    return {NEXT: next_kind(training, names, 0), **{kind.name: kind for kind, _ in judged}}


@pytest.fixture(scope="module")
def items(nla, target, names, folder) -> dict[str, list[Item]]:
    """Items of each kind, with explanations that say what is true."""
    store, out = Store.open(folder, "eval"), {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(steering, "explain", lambda _nla, vectors, seed: [""] * len(vectors))
        for kind, strata in ((NEXT, set(store.strata())), ("form", {BEFORE_ANSWER})):
            rows = steering._one_of_each(store, strata, 0)
            found = items_of(nla, target, names, store, rows, 1, 0)
            facts = [Facts(tuple(item.likely), attributes=item.known) for item in found]
            out[kind] = [
                item._replace(text=state(one, random.Random(row)))
                for row, (item, one) in enumerate(zip(found, facts, strict=True))
            ]
    return out


def hashed(text: str) -> torch.Tensor:
    """A vector that stands for a text and for nothing else."""
    seed = int.from_bytes(text.encode()[-7:], "big")
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


def obeyed(target: Target) -> Any:
    """A decoder whose code the target obeys: what comes next, and the animal of the form, push their tokens."""
    logits = (target.model.lm_head.weight * target.model.model.norm.weight).detach()
    pushes = torch.nn.functional.normalize(torch.linalg.pinv(logits), dim=0)
    vocabulary = target.tokenizer.get_vocab()

    def word(name: str) -> torch.Tensor:
        return pushes[:, vocabulary[f" {name}"]] if f" {name}" in vocabulary else torch.zeros(D_MODEL)

    def decode(text: str) -> torch.Tensor:
        facts = stated(text)
        out = sum((word(name) for name in facts.following[:1]), torch.zeros(D_MODEL))
        out = out + sum(word(value.split()[0]) for name, value in facts.attributes.items() if name == "form")
        return out + sum(hashed(value) / 6 for name, value in facts.attributes.items() if name != "form")

    return SimpleNamespace(reconstruct=lambda texts, strict=True: torch.stack([decode(text) for text in texts]))


IGNORANT: Any = SimpleNamespace(reconstruct=lambda texts, strict=True: torch.stack([hashed(text) for text in texts]))
SILENT: Any = SimpleNamespace(reconstruct=lambda texts, strict=True: torch.ones(len(texts), D_MODEL))


def steered(decoder: Any, name: str, target, kinds, items):
    mine = items[name]
    found = steer_kind(decoder, target, kinds[name], list(kinds.values()), mine[:15], mine[15:])
    assert found is not None
    return found


@pytest.mark.parametrize("name", [NEXT, "form"])
def test_an_edit_that_the_target_obeys_steers_and_its_controls_do_not(name, target, kinds, items) -> None:
    found = steered(obeyed(target), name, target, kinds, items)
    assert found.edit.success.value >= 0.8 and found.edit.n_moved == found.n_items == len(items[name]) - 15
    assert found.tried[str(found.strength)] == max(found.tried.values())
    arms = {arm.name: arm for arm in found.controls}
    assert set(arms) == {RANDOM, UNRELATED, ANOTHER}
    if name == NEXT:  # of two forms, another item's edit is the opposite one, and chance is a half
        assert all(arm.success.value <= 0.2 and arm.p_value < 0.01 for arm in arms.values())
    assert found.unsteered.success.value <= 0.7 and found.above_controls
    assert found.edit.nats > found.unsteered.nats > 0
    assert [check.passed for check in steering_checks([found])] == [True, None]


@pytest.mark.parametrize("decoder", [IGNORANT, SILENT])
def test_an_edit_that_means_nothing_does_not_steer(decoder, target, kinds, items) -> None:
    for name in (NEXT, "form"):
        found = steered(decoder, name, target, kinds, items)
        assert not found.above_controls and not steering_checks([found])[0].passed
        if decoder is SILENT:
            assert found.edit.n_moved == 0 and found.edit.changed.value == 0
            assert (found.edit.success, found.edit.nats) == (found.unsteered.success, found.unsteered.nats)
            assert found.controls[0].n_moved == found.n_items


def test_the_strength_comes_from_the_separate_items_alone(target, kinds, items, monkeypatch) -> None:
    kind, calls = kinds[NEXT], []

    def write(_target, some, _n_tokens, direction=None, strength=0.0, unsteered=()):
        calls.append((len(some), strength))
        return [[number] for number in range(len(some))]

    def judge(some, _written):
        best = calls[-1] == (15, 0.5)
        return [random.Random(0).choice(kind.others(item)) if best else "" for item in some]

    monkeypatch.setattr(steering, "write", write)
    monkeypatch.setattr(steering, "log_probabilities", lambda _target, heads, _tails: torch.zeros(len(heads)))
    monkeypatch.setattr(steering.random.Random, "choice", lambda _self, values: values[0])
    mine = items[NEXT]
    found = steer_kind(IGNORANT, target, kind._replace(judge=judge), list(kinds.values()), mine[:15], mine[15:])
    assert found is not None and found.strength == 0.5 and found.tried["0.5"] == 1.0
    n_tried = len(steering.STRENGTHS)
    assert calls[2 : 2 + n_tried] == [(15, strength) for strength in steering.STRENGTHS]
    assert {*calls[2 + n_tried :]} == {(len(mine) - 15, 0.5)}
    assert found.edit.success.value == 0


def test_no_value_is_steered_to_that_is_true_or_claimed(kinds, items) -> None:
    form, following = kinds["form"], kinds[NEXT]
    item = items["form"][0]
    other = next(value for value in form.values if value != item.known["form"])
    assert form.others(item) == [other] and form.others(item._replace(text=f"This is a {other.upper()}.")) == []
    assert not {*item.likely} & {*following.others(item)}
    assert "sat" not in following.others(item._replace(text="Next comes sat."))
    assert steer_kind(IGNORANT, None, form, [form], [item._replace(text=f"This is a {other}.")], [item]) is None  # pyright: ignore


def test_answers_are_what_the_target_would_write_from_where_it_begins(folder, names) -> None:
    chats = [json.loads(line) for line in (folder.parent / "c.jsonl").read_text().splitlines()]
    first = {" ".join(chat["messages"][1]["content"].split()[:5]) for chat in chats}
    answers = answers_in(Store.open(folder), names, 5)
    assert len(answers.texts) == len({chat["attributes"]["request"] for chat in chats if chat["split"] == "train"})
    assert {text.strip() for text in answers.texts} <= first
    whole = answers_in(Store.open(folder), names, 100)
    assert {*whole.texts} <= {chat["messages"][1]["content"] for chat in chats}, "and no mark after it"


def test_an_instruction_that_an_answer_was_not_written_under_is_not_learned_from_it(nla, folder, names, tmp_path):
    chats = [json.loads(line) for line in (folder.parent / "c.jsonl").read_text().splitlines()[:40]]
    for number, chat in enumerate(chats):
        chat["attributes"] |= {"instruction": "be red", "answer": "neutral" if number % 2 else "own", "request": number}
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    corpus = CorpusSettings(str(tmp_path / "c.jsonl"), kind="chat", positions="kinds", n_positions=4, max_tokens=64)
    extract_corpus(ExtractionSettings(corpus, str(folder.parent / "target"), str(nla.point)), tmp_path / "store")
    known = answers_in(Store.open(tmp_path / "store"), names, 5).known
    assert len(known) == 30 and sum("instruction" in one for one in known) == 10, "of the training part"
    assert all("form" in one for one in known)


@pytest.mark.parametrize("seed", range(20))
def test_an_edit_changes_one_claim_and_what_it_says_alone(seed: int) -> None:
    draw = random.Random(seed)
    attributes = {"form": "story", "topic": "the moon", "tone": "sad", "mood": "odd", "instruction": "be kind"}
    attributes = {name: value for name, value in attributes.items() if draw.random() < 0.6}
    following = ("the", "a", "on")[: draw.randrange(4)]
    text = state(Facts(following, draw.random() < 0.5, "of", "fond", "", attributes), draw)
    for name, value in (("form", "explanation"), ("topic", "tea"), ("tone", "calm"), ("instruction", "be rude")):
        before, after = stated(text), stated(edited(text, name, value, random.Random(seed)))
        assert after.attributes == {**before.attributes, name: value}
        assert (after.following, after.sure, after.token) == (before.following, before.sure, before.token)
    new = edited(text, FOLLOWING, "a", random.Random(seed))
    assert stated(new).following == ("a", *(name for name in following[1:] if name != "a"))
    assert stated(new).attributes == attributes
    kept = set(text.split(". ")) & set(new.split(". "))
    assert len(kept) >= len(text.split(". ")) - 1, "the other claims stand as they were"


def test_a_continuation_for_which_there_is_no_room_is_refused(nla, target, names, folder, items) -> None:
    store, longest = Store.open(folder, "eval"), max(len(item.ids) for item in items["form"])
    rows = steering._one_of_each(store, {BEFORE_ANSWER}, 0)
    room = CONTEXT + 1 - longest
    assert len(items_of(nla, target, names, store, rows[:2], room, 0)) == 2
    with pytest.raises(ContextLengthError, match="--tokens"):
        items_of(nla, target, names, store, rows, room + 1, 0)


def test_the_command_steers_what_judges_can_read(nla, folder, tmp_path) -> None:
    report = evaluate_steering(nla, SteeringSettings(store=folder, n_items=6, max_new_tokens=6))
    assert [one.kind for one in report.kinds] == [NEXT, "form"] and report.held and not report.passed
    assert {one.kind: one.reads for one in report.judges} == {"form": True, "mood": False, "instruction": False}
    report.save(tmp_path)
    content = json.loads((tmp_path / "steering.json").read_text())
    assert content["kinds"][0]["edit"]["name"] == "edit" and (tmp_path / "steering.png").exists()
    assert "unrelated edit" in (tmp_path / "steering.md").read_text() and "## Steering" in report.to_card()


def test_a_store_without_attributes_or_with_too_few_answers_is_refused(nla, folder, tmp_path) -> None:
    chats = [json.loads(line) for line in (folder.parent / "c.jsonl").read_text().splitlines()[:12]]
    for name, known, message in (("bare", False, "no attributes"), ("few", True, "held-out answers to steer")):
        rows = [chat if known else {**chat, "attributes": {}} for chat in chats]
        rows = [{**row, "split": "eval" if number < 2 else "train"} for number, row in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        corpus = CorpusSettings(
            str(tmp_path / f"{name}.jsonl"), kind="chat", positions="kinds", n_positions=4, max_tokens=64
        )
        extract_corpus(ExtractionSettings(corpus, str(folder.parent / "target"), str(nla.point)), tmp_path / name)
        with pytest.raises(ArgumentError, match=message):
            evaluate_steering(nla, SteeringSettings(store=tmp_path / name))
    with pytest.raises(ArgumentError):
        SteeringSettings(store=folder, n_items=1)
