"""The worker: what it does together, whom it serves first, what it stops, and that nobody gets another's answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from nla.autoencoder import NLA
from nla.errors import NLAError, RequestError
from nla.serve import engine as engine_module
from nla.serve.cache import Cache
from nla.serve.engine import Engine, inside
from nla.serve.schema import Source
from nla.serve.works import Call, Continue, Explain, Settings, Told, Work
from tests.helpers.serve import LINE, PLANS

LONGEST_S = 60
PLAIN = Settings(2, 1.0, None)


@pytest.fixture
def engine(couplets: NLA) -> Iterator[Engine]:
    """An engine that has not begun to work: what is handed to it waits together."""
    engine = Engine({"couplets": couplets})
    yield engine
    engine.close(LONGEST_S)
    assert not engine.alive


def explaining(engine: Engine, text: str, **fields: Any) -> Explain:
    fields = {"positions": [-1], "settings": PLAIN, **fields}
    return Explain(ticket=engine.admit(), pair="couplets", source=Source(text=text), **fields)


def texts_of(work: Work) -> list[list[str]]:
    done = work.future.result(LONGEST_S)
    return [done.explanations[row].texts for row in range(len(done.columns))]


def test_works_that_wait_are_written_in_one_turn_and_each_gets_its_own(engine: Engine, couplets: NLA) -> None:
    works = [explaining(engine, text, seed=seed) for seed, text in enumerate(PLANS)]
    direct = [couplets.explain(couplets.read(text, "last"), 2, seed=seed).texts for seed, text in enumerate(PLANS)]
    for work in works:
        engine.begin(work)
    engine.start()
    assert [texts_of(work) for work in works] == direct
    assert engine.turns == {"read": 1, "write": 1} and engine.works["write"] == len(PLANS)
    assert len({str(texts) for texts in direct}) > len(PLANS) / 2, "without varied texts this test is void"


def test_one_by_one_has_the_same_answers(couplets: NLA) -> None:
    together, alone = Engine({"couplets": couplets}), Engine({"couplets": couplets}, max_together=1)
    answers = []
    for engine in (together, alone):
        works = [explaining(engine, text) for text in PLANS[:3]]
        for work in works:
            engine.begin(work)
        engine.start()
        answers.append([texts_of(work) for work in works])
        engine.close(LONGEST_S)
    assert answers[0] == answers[1]
    assert together.turns["write"] == 1 and alone.turns["write"] == 3


def test_completions_of_several_requests_share_a_turn(engine: Engine, couplets: NLA) -> None:
    def continuing(text: str) -> Continue:
        return Continue(ticket=engine.admit(), pair="couplets", source=Source(text=text), max_new_tokens=8)

    works = [continuing(text) for text in ("In spring Anna left", LINE, "In")]
    for work in works:
        engine.begin(work)
    engine.start()
    together = [work.future.result(LONGEST_S) for work in works]
    assert engine.turns["continue"] == 1
    for work, written in zip(works, together, strict=True):
        again = continuing(work.source.text or "")
        engine.begin(again)
        assert again.future.result(LONGEST_S) == written


def test_a_work_that_fails_takes_no_other_with_it(engine: Engine) -> None:
    good, unknown = explaining(engine, LINE), explaining(engine, "xylophones")
    beyond = Explain(ticket=engine.admit(), pair="couplets", vectors=torch.full((1, 128), torch.nan), settings=PLAIN)
    other = explaining(engine, PLANS[0])
    for work in (good, unknown, beyond, other):
        engine.begin(work)
    engine.start()
    for work in (unknown, beyond):
        with pytest.raises(NLAError):
            work.future.result(LONGEST_S)
    assert texts_of(good) and texts_of(other)


def test_a_short_work_does_not_wait_for_a_long_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_ANSWERS", 8)
    ended: list[str] = []
    long = explaining(engine, LINE, positions=[], settings=Settings(1, 1.0, None), seed=6)
    short = explaining(engine, PLANS[1], settings=Settings(1, 1.0, None), seed=6)
    for name, work in (("long", long), ("short", short)):
        work.future.add_done_callback(lambda _future, name=name: ended.append(name))
        engine.begin(work)
    engine.start()
    assert len(texts_of(long)) == 12 and texts_of(short)
    assert ended == ["short", "long"] and engine.turns["write"] == 2


def test_many_short_works_do_not_keep_a_long_one_waiting(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_SHORT", 2)
    ended: list[str] = []
    vectors = torch.ones(1, 128)
    long = Explain(ticket=engine.admit(), pair="couplets", vectors=vectors, settings=Settings(1, 1.0, None))
    calls = [Call(ticket=engine.admit(), pair="couplets", function=lambda nla: None) for _ in range(6)]
    for name, work in [("long", long), *(("call", call) for call in calls)]:
        work.future.add_done_callback(lambda _future, name=name: ended.append(name))
        engine.begin(work)
    engine.start()
    assert long.future.result(LONGEST_S) and all(call.future.result(LONGEST_S) is None for call in calls)
    assert ended == ["call", "call", "long", *["call"] * 4]


class Watched(NamedTuple):
    """A work that is being written, and stands still at its first token until ``go_on`` is set."""

    work: Explain
    wanted: list[bool]
    """Of each token that was written since, whether anybody wanted it."""
    go_on: threading.Event


@pytest.fixture
def watched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Watched:
    begun, go_on, wanted = threading.Event(), threading.Event(), []
    call = engine_module.Watcher.__call__

    def counting(watcher: Any, numbers: Any, answers: Any) -> Any:
        wanted.append(not (engine.closed or all(answer.work.ticket.cancelled for answer in watcher.answers)))
        begun.set()
        assert go_on.wait(LONGEST_S)
        return call(watcher, numbers, answers)

    monkeypatch.setattr(engine_module.Watcher, "__call__", counting)
    work = explaining(engine, LINE, seed=99)
    engine.begin(work)
    engine.start()
    assert begun.wait(LONGEST_S)
    return Watched(work, wanted, go_on)


def test_what_nobody_waits_for_is_stopped_at_the_next_token(engine: Engine, watched: Watched) -> None:
    watched.work.ticket.release()
    watched.go_on.set()
    with pytest.raises(RequestError):
        watched.work.future.result(LONGEST_S)
    assert watched.wanted == [True], "not one token more is written"
    assert texts_of_next(engine), "the worker goes on"
    assert len(engine.explanations) == 1, "what was cut short is not kept"


def texts_of_next(engine: Engine) -> list[list[str]]:
    work = explaining(engine, PLANS[2])
    engine.begin(work)
    return texts_of(work)


def test_stopping_ends_what_is_written_and_refuses_what_waits_and_comes(engine: Engine, watched: Watched) -> None:
    waiting = explaining(engine, PLANS[0])
    engine.begin(waiting)
    engine.stop()
    watched.go_on.set()
    for work in (watched.work, waiting):
        with pytest.raises(RequestError) as refused:
            work.future.result(LONGEST_S)
        assert refused.value.status == 503
    assert watched.wanted == [True]
    with pytest.raises(RequestError):
        engine.begin(explaining(engine, PLANS[1]))


def test_what_is_cancelled_before_its_turn_is_never_done(engine: Engine) -> None:
    work = explaining(engine, LINE)
    engine.begin(work)
    work.ticket.release()
    engine.start()
    assert texts_of_next(engine)
    assert work.future.cancelled() and engine.works["read"] == 1


def test_places_are_bounded_and_given_back_once(couplets: NLA) -> None:
    engine = Engine({"couplets": couplets}, max_waiting=2)
    first, _ = engine.admit(), engine.admit()
    with pytest.raises(RequestError) as refused:
        engine.admit()
    assert refused.value.status == 429 and engine.retry_after_s >= 1
    first.release()
    first.release()
    assert engine.n_admitted == 1
    engine.admit()


def test_a_listener_hears_what_begins_what_is_written_and_what_is_done(engine: Engine) -> None:
    heard: list[Told] = []
    work = explaining(engine, LINE, tell=heard.append, settings=Settings(1, 1.0, None))
    engine.begin(work)
    engine.start()
    (written,) = texts_of(work)[0]
    assert heard[0] == Told() and heard[-1].done is work.explanations[0]
    assert all(written.startswith(told.text) for told in heard[1:-1]) and len(heard) > 4


@pytest.mark.parametrize("n_bytes, kept", [(10, [2, 3, 4]), (3, [4]), (100, [0, 1, 2, 3, 4])])
def test_a_cache_keeps_what_was_used_last_within_its_bytes(n_bytes: int, kept: list[int]) -> None:
    cache: Cache[int] = Cache(n_bytes)
    for key in range(5):
        cache.put(key, key, 3)
    assert [key for key in range(5) if cache.get(key) is not None] == kept
    assert cache.n_bytes == 3 * len(kept) <= n_bytes
    cache.put("large", 1, n_bytes + 1)
    assert cache.get("large") is None and len(cache) == len(kept)


def test_using_an_entry_keeps_it() -> None:
    cache: Cache[str] = Cache(2)
    cache.put("a", "a", 1)
    cache.put("b", "b", 1)
    assert cache.get("a") == "a"
    cache.put("c", "c", 1)
    cache.put("c", "d", 1)
    assert (cache.get("a"), cache.get("b"), cache.get("c"), cache.n_bytes) == ("a", None, "d", 2)


def test_no_part_of_a_tag_shows_at_any_length() -> None:
    answer = "<explanation>It is spring. a < b </i></explanation>"
    shown = [inside(answer[:n], "<explanation>", "</explanation>") for n in range(len(answer) + 1)]
    assert shown[-1] == "It is spring. a < b </i>" and all(shown[-1].startswith(text) for text in shown)
    assert [len(text) for text in shown] == sorted(len(text) for text in shown)
