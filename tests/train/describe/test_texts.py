"""Texts are asked for once, kept through every end of a run, and paid for within the budget."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nla.errors import BudgetError, DescriberError, InterruptedTraining, StorageError
from nla.train.describe.cache import CACHE_FILE, TextCache
from nla.train.describe.client import EndpointDescriber
from nla.train.describe.describer import DescriberSettings
from nla.train.describe.prompt import Question, ask_about
from nla.train.describe.texts import Described, Summary, _Work, describe_texts
from tests.helpers.endpoint_server import (
    CLAIMS,
    Act,
    Server,
    described,
    describer,
    first_time,
    prefixes,
    text_of,
)


def test_nothing_on_disk_is_asked_again_and_equal_texts_are_asked_once(form: str, tmp_path: Path) -> None:
    with Server(form) as server:
        many = prefixes(5) * 4
        first = describe_texts(many, describer(server), tmp_path)
        assert server.n_requests == 5 and first.texts == [text_of(i) for i in range(5)] * 4
        again = describe_texts(prefixes(7), describer(server), tmp_path)
        assert server.n_requests == 7 and again.summary.n_cached == 5 and again.summary.estimate.n_texts == 2
        described(server, tmp_path, 7, concurrency=2, tries=9, max_tokens=300, price_in=1.0)
        assert server.n_requests == 7
        for change in ({"model": "n"}, {"temperature": 0.5}, {"seed": 1}, {"max_chars": 40}):
            before = server.n_requests
            described(server, tmp_path, 7, **change)
            assert server.n_requests == before + (7 if change != {"max_chars": 40} else 0)


def test_an_answer_of_the_wrong_form_is_on_disk_too(form: str, tmp_path: Path) -> None:
    act = Act("bad", body=Server(form).body_of("I cannot."))
    with Server(form, lambda item, _: act if item == "1" else None) as server:
        assert described(server, tmp_path, tries=2).texts[1] is None
        n = server.n_requests
        again = described(server, tmp_path, tries=2)
        assert again.texts[1] is None and server.n_requests == n
        assert again.summary.failed == {"no tags around the claims": 1}


@pytest.mark.parametrize("kept_by", ["now", "0.4"])
def test_with_more_tries_a_failed_text_is_asked_again_and_no_other(kept_by: str, form: str, tmp_path: Path) -> None:
    act = Act("bad", body=Server(form).body_of("I cannot."))
    with Server(form, lambda item, before: act if item == "1" and before < 3 else None) as server:
        assert described(server, tmp_path, tries=2).texts[1] is None
        if kept_by == "0.4":  # under the key that explanations have
            with TextCache(tmp_path) as cache:
                cache._file.execute("UPDATE answers SET key = substr(key, 1, 64)")
        n = server.n_requests
        assert described(server, tmp_path, tries=3).texts == [text_of(i) for i in range(3)]
        assert server.n_requests == n + 2
        for tries in (1, 3, 9):
            assert described(server, tmp_path, tries=tries).texts[1] == text_of(1)
        assert server.n_requests == n + 2


def test_answers_are_for_their_owner_alone(tmp_path: Path) -> None:
    with TextCache(tmp_path) as cache:
        cache.put("key", "answer")
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 3 and set(modes.values()) == {0o600}


def test_two_runs_at_once_share_what_they_find(tmp_path: Path) -> None:
    found: list[Described] = []

    def overtake(summary: Any) -> None:
        if not found:
            found.append(described(server, tmp_path, 60, concurrency=16))

    with Server(plan=lambda *_: Act("good", wait_s=0.05)) as server:
        slow = describe_texts(prefixes(60), describer(server, concurrency=1), tmp_path, progress=overtake)
        assert slow.texts == found[0].texts == [text_of(i) for i in range(60)]
        # The slow run goes on asking while it is overtaken, and asks for nothing that it then finds on disk.
        assert server.n_requests < 110 and slow.summary.n_cached > 10
        assert slow.summary.n_cached + slow.summary.n_answered == 60 and slow.summary.n_open == 0


def describe_in_child(pipe: Any, folder: Path) -> None:
    settings = DescriberSettings("openai", "m", pipe.recv(), concurrency=4)
    try:
        describe_texts(prefixes(400), EndpointDescriber(settings), folder)
    except InterruptedTraining:
        os._exit(3)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_has_kept_its_answers_and_goes_on(how: signal.Signals, tmp_path: Path) -> None:
    here, there = multiprocessing.Pipe()
    # Forked before the server's thread starts, so that the child holds no lock of a thread that it has not.
    child = multiprocessing.get_context("fork").Process(target=describe_in_child, args=(there, tmp_path))
    child.start()
    with Server(plan=lambda *_: Act("good", wait_s=0.01)) as server:
        here.send(server.url)
        deadline = time.monotonic() + 60
        while server.n_requests < 100 and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(child.pid or 0, how)
        child.join()
        sent = server.n_requests
        assert 100 <= sent < 400 and child.exitcode == (3 if how == signal.SIGINT else -how)
        with TextCache(tmp_path) as cache:
            kept = len(cache)
        # On Ctrl-C what is under way is finished; SIGKILL can lose no more than that.
        assert kept == sent if how == signal.SIGINT else sent - 8 <= kept <= sent
        found = described(server, tmp_path, 400)
        assert found.texts == [text_of(i) for i in range(400)] and found.summary.n_cached == kept
        assert server.n_requests == sent + 400 - kept


def test_an_error_of_the_caller_ends_the_requests_and_keeps_the_answers(tmp_path: Path) -> None:
    def progress(summary: Any) -> None:
        if summary.n_answered == 5:
            raise ValueError("mine")

    with Server(plan=lambda *_: Act("good", wait_s=0.02)) as server:
        with pytest.raises(ValueError, match="mine"):
            describe_texts(prefixes(100), describer(server), tmp_path, progress=progress)
        n = server.n_requests
        assert n < 40 and not [t for t in threading.enumerate() if t.name == "nla-describer"]
        time.sleep(0.1)
        assert server.n_requests == n
    with TextCache(tmp_path) as cache:
        assert len(cache) >= 5


def test_progress_sees_the_totals_grow(tmp_path: Path) -> None:
    seen: list[tuple[int, int, float | None]] = []
    with Server() as server:
        asked = describer(server, price_in=1.0, price_out=10.0)
        found = describe_texts(
            prefixes(9), asked, tmp_path, progress=lambda s: seen.append((s.n_answered, s.n_open, s.cost))
        )
    assert seen == [(i, 9 - i, pytest.approx(i * (120 * 1.0 + 30 * 10.0) / 1e6)) for i in range(1, 10)]
    assert found.summary.estimate.cost_most > 0 and "at most" in str(found.summary.estimate)


class Counting(EndpointDescriber):
    """Remembers how many prompts were counted."""

    def count(self, text: str) -> int:
        self.n_counted = getattr(self, "n_counted", 0) + 1
        return super().count(text)


def test_the_estimate_counts_a_sample_and_says_so(tmp_path: Path) -> None:
    with Server() as server:
        whole, part = (
            _Work(prefixes(n), asked, TextCache(tmp_path), (), None)
            for n, asked in ((1000, Counting(describer(server).settings)), (2500, Counting(describer(server).settings)))
        )
        for work in (whole, part):
            work.look_up()
        counted, sampled = whole.summary.estimate, part.summary.estimate
    assert whole.describer.n_counted == 1000 and counted.counted_by == "characters / 4"
    assert part.describer.n_counted == 834 and sampled.counted_by == "characters / 4, from 834 of them"
    exact = sum(part.describer.count(part.question(row).prompt) for row in range(2500))
    assert sampled.n_texts == 2500 and sampled.tokens_in == pytest.approx(exact, rel=1e-3)


def test_shares_of_several_processes_add_up_to_what_one_does(tmp_path: Path) -> None:
    bad = Act("bad", body=Server().body_of("I cannot."))

    def plan(item: str, before: int) -> Act | None:
        return bad if int(item) < 4 else None if before else Act("slow", 500)

    changes = dict(price_in=10.0, price_out=100.0, tries=2)
    with Server(plan=plan) as server:
        one = describe_texts(prefixes(40), describer(server, **changes), tmp_path / "one").summary
    with Server(plan=plan) as server:
        asked = describer(server, **changes, failing_share=0.1)
        shares = [describe_texts(prefixes(40)[n::2], asked, tmp_path / "two", n_all=40).summary for n in (0, 1)]
    both = Summary.merged(shares)
    for share in shares:  # each alone has 2 of 20
        share.check(0.1)
    assert both.cost == pytest.approx(one.cost) and both.estimate[:3] == one.estimate[:3]
    both.cost, both.estimate, both.describer = one.cost, one.estimate, one.describer
    assert both == one and both.n_requests == 80 and both.failed.total() == 4
    with pytest.raises(DescriberError, match="4 of 40 texts"):
        both.check(0.09)
    assert Summary.merged([*shares, Summary()]).cost is None and Summary.merged([]).n_texts == 0


def test_a_share_is_not_stopped_by_failures_that_are_few_among_all(tmp_path: Path) -> None:
    act = Act("bad", body=Server().body_of("I cannot."))
    with Server(plan=lambda item, _: act if int(item) < 4 else None) as server:
        asked = describer(server, tries=1, failing_share=0.1)
        with pytest.raises(DescriberError, match="of 8 texts"):
            describe_texts(prefixes(8), asked, tmp_path)
        assert describe_texts(prefixes(8), asked, tmp_path, n_all=40).summary.failed.total() == 4
        with pytest.raises(DescriberError):
            describe_texts(prefixes(8), asked, tmp_path, n_all=39)


def test_it_works_inside_a_running_event_loop(tmp_path: Path) -> None:
    async def main(server: Server) -> Described:
        return described(server, tmp_path)

    with Server() as server:
        assert asyncio.run(main(server)).texts == [text_of(i) for i in range(3)]


def test_a_budget_is_never_exceeded_and_what_it_bought_is_kept(form: str, tmp_path: Path) -> None:
    cost = (120 * 10 + 30 * 100) / 1e6
    with Server(form) as server:
        changes = dict(price_in=10.0, price_out=100.0, budget_usd=0.2, max_tokens=100)
        with pytest.raises(BudgetError, match=r"raise describer\.budget_usd"):
            described(server, tmp_path, 200, **changes)
        spent = server.n_requests * cost
        most_of_one = (2500 * 10 + 100 * 100) / 1e6
        assert 0.2 - most_of_one - cost < spent <= 0.2
        with TextCache(tmp_path) as cache:
            assert len(cache) == server.n_requests
        found = described(server, tmp_path, 200, **{**changes, "budget_usd": 2.0})
        assert None not in found.texts and server.n_requests == 200
        assert found.summary.cost == pytest.approx(200 * cost - spent)


def test_requests_that_may_have_been_charged_count_against_the_budget(tmp_path: Path) -> None:
    with Server(plan=lambda *_: Act("bad", body=b"{")) as server:
        with pytest.raises(BudgetError):
            described(server, tmp_path, 50, price_in=10.0, price_out=100.0, budget_usd=0.2, max_tokens=100)
        assert server.n_requests <= 0.2 / (100 * 100 / 1e6)


def test_tokens_that_the_endpoint_does_not_say_are_estimated_and_counted_as_such(form: str, tmp_path: Path) -> None:
    for usage in (None, 3, (True, 2), (-1, 5), ("1", "2")):
        act = Act("good", body=Server(form).body_of(CLAIMS.format(tag="claims", item=1), usage=usage))
        with Server(form, first_time(act)) as server:
            found = described(server, tmp_path / str(usage))
            assert found.summary.n_estimated == 1 and found.summary.tokens_out > 60


def test_a_cache_that_cannot_be_used_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / CACHE_FILE).write_bytes(b"something else entirely" * 100)
    with pytest.raises(StorageError, match="not a database"):
        TextCache(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        TextCache(tmp_path / "file")


def test_a_full_disk_stops_the_run_with_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server() as server:
        put = TextCache.put

        def full(self: TextCache, key: str, answer: str, instead_of: str | None = None) -> None:
            self._file.execute("PRAGMA max_page_count=2")
            put(self, key, answer * 5000)

        with monkeypatch.context() as patch, pytest.raises(StorageError, match="full"):
            patch.setattr(TextCache, "put", full)
            described(server, tmp_path, 50)
        assert described(server, tmp_path, 50).texts[49] == text_of(49)


def test_questions_are_made_as_they_are_needed() -> None:
    with Server() as server:
        taken = 0

        def questions() -> Iterator[Question]:
            nonlocal taken
            for i in range(200):
                taken += 1
                yield ask_about(i, f"A list, item {i}", 100)

        replies = describer(server).ask(questions(), lambda: False)
        next(replies)
        assert taken < 60  # as many as are in flight or done, never all
        replies.close()


def test_it_works_in_another_thread(tmp_path: Path) -> None:
    with Server() as server:
        found: list[Described] = []
        thread = threading.Thread(target=lambda: found.append(described(server, tmp_path)))
        thread.start()
        thread.join()
    assert None not in found[0].texts
