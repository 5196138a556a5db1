"""Works of many requests in; explanations, activations and continuations out, from one thread that owns the models.

Works that wait are done together where they can be: texts of one pair in one forward pass, explanations of different
requests in one ``generate``. What nobody waits for any more is left out at the next token.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nla.autoencoder import NLA, seeds_of
from nla.baselines import UNKNOWN_STRATUM
from nla.errors import PositionError, RequestError
from nla.models.generate import ends_of
from nla.models.read import Activations, read
from nla.pair.encoder import draws_of
from nla.pair.explanations import Explanation
from nla.pair.steer import generate_patched
from nla.serve.cache import Cache
from nla.serve.prepare import Direction, Prepared, direction, prepare
from nla.serve.schema import MAX_POSITIONS, Read
from nla.serve.works import Call, Continue, Explain, Ticket, Told, Work
from nla.text.tokens import select_positions

MAX_WAITING = 256
"""Requests that are worked on or wait; the next one is told to come back."""
BATCH_WAIT_S = 0.005
"""How long an idle worker waits for other works after the first."""
MAX_ANSWERS = 256
"""Answers of the encoder that one turn writes."""
MAX_SHORT = 32
"""Turns of calls and readings in a row while something waits to be written."""
MAX_TOGETHER = 64
"""Texts that one turn reads or continues."""
CACHED_BYTES = 256 * 2**20
"""Of each cache."""
_UNFINISHED = "\ufffd"
"""What a tokenizer spells where a character is not whole yet."""


class Engine:
    """Owns pairs, and works for many requests at once."""

    def __init__(
        self,
        pairs: Mapping[str, NLA],
        adapters: Mapping[str, str | Path] | None = None,
        max_waiting: int = MAX_WAITING,
        max_together: int = MAX_TOGETHER,
    ) -> None:
        """An engine that does not work yet; :meth:`start` begins.

        Args:
            pairs: by name; requests that name none mean the first.
            adapters: folders or hub ids of adapters that requests may put on a target, by name.
            max_waiting: requests at a time.
            max_together: works that one turn does together; 1: one by one.
        """
        self.pairs, self.adapters = dict(pairs), dict(adapters or {})
        self.max_waiting, self.max_together = max_waiting, max_together
        self.prepared: Cache[Prepared] = Cache(CACHED_BYTES)
        self.activations: Cache[Float[Tensor, "t d"]] = Cache(CACHED_BYTES)
        self.explanations: Cache[Explanation] = Cache(CACHED_BYTES)
        self.turns: Counter[str] = Counter()
        """Turns by what was done in them."""
        self.works: Counter[str] = Counter()
        """Works that were done in these turns; rows of activations where it was writing."""
        self.n_admitted = 0
        """Requests that are worked on or wait."""
        self.closed = False
        self._mean_s, self._n_short = 1.0, 0
        self._waiting: list[Work] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="nla-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Stop what is written at its next token, and refuse what waits and what comes. Returns at once."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def close(self, timeout_s: float = 1.0) -> None:
        """:meth:`stop`, and wait until it has."""
        self.stop()
        if self.alive:
            self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether works are done."""
        return self._thread.is_alive()

    def admit(self) -> Ticket:
        """A place for one more request.

        Raises:
            RequestError: there are ``max_waiting`` already.
        """
        with self._changed:
            if self.n_admitted >= self.max_waiting:
                fix = f"send it again in {self.retry_after_s} s"
                got = f"a request beside {self.n_admitted} that wait"
                raise RequestError(got, f"at most {self.max_waiting} at a time", fix, status=429)
            self.n_admitted += 1
        began = time.monotonic()

        def leave() -> None:
            with self._changed:
                self.n_admitted -= 1
                self._mean_s += 0.1 * (time.monotonic() - began - self._mean_s)

        return Ticket(leave)

    @property
    def retry_after_s(self) -> int:
        """In how many seconds a place is likely to be free: what the last requests took."""
        return max(1, min(60, round(self._mean_s)))

    def pair_of(self, name: str | None) -> str:
        """The name of the pair that a request means.

        Raises:
            RequestError: there is none of that name.
        """
        chosen = next(iter(self.pairs)) if name is None else name
        if chosen not in self.pairs:
            fix = "name one of these, or start nla serve with it"
            raise RequestError(f"the pair {name!r}", ", ".join(self.pairs), fix, status=404)
        return chosen

    def begin(self, work: Work) -> None:
        """Have something done; what comes of it is the work's future.

        Raises:
            RequestError: the engine is stopped.
        """
        if isinstance(work, Explain) and work.vectors is not None:
            work.planned, work.seeds = list(range(len(work.vectors))), seeds_of(work.seed, None, work.vectors)
            self._write_rest(work)
        else:
            self._add(work)

    def _add(self, work: Work) -> None:
        with self._changed:
            if self.closed:
                raise _ending()
            self._waiting.append(work)
            self._changed.notify_all()

    # The worker's thread: which works are next

    def _work(self) -> None:
        while (turn := self._next()) is not None:
            kind, items = turn
            self._run(kind, items)
        with self._changed:
            waiting, self._waiting = self._waiting, []
        for work in waiting:
            work.fail(_ending())

    def _next(self) -> tuple[Callable[[list[Any]], None], list[Any]] | None:
        """What to do in the next turn, and with what; None: the end."""
        with self._changed:
            while not self.closed:
                if not self._waiting:
                    self._changed.wait_for(lambda: self._waiting or self.closed)
                    if self.max_together > 1:
                        self._changed.wait_for(lambda: self.closed, BATCH_WAIT_S)
                gone = [work for work in self._waiting if work.ticket.cancelled]
                self._waiting = [work for work in self._waiting if not work.ticket.cancelled]
                for work in gone:
                    work.future.cancel()
                if self._waiting and not self.closed:
                    return self._turn()
        return None

    def _turn(self) -> tuple[Callable[[list[Any]], None], list[Any]]:
        """What takes a moment comes first, then what was last served longest ago; with it whatever can join it."""
        short = next((work for work in self._waiting if _is_short(work)), None)
        long = next((work for work in self._waiting if not _is_short(work)), None)
        self._n_short = self._n_short + 1 if short is not None and self._n_short < MAX_SHORT else 0
        head = (short if self._n_short else long) or self._waiting[0]
        joined = [work for work in self._waiting if work is not head and _key(work) == _key(head)]
        works: list[Any] = [head, *joined][: self.max_together]
        self._waiting = [work for work in self._waiting if work not in works]
        if isinstance(head, Explain) and head.vectors is not None:
            rows = _shared_rows(works)
            self._waiting += [work for work in works if work.begun < len(work.order)]
            return self._write, rows
        if isinstance(head, Explain):
            return self._read, works
        return (self._continue if isinstance(head, Continue) else self._call), works

    def _run(self, kind: Callable[[list[Any]], None], items: list[Any]) -> None:
        """One turn. If it fails, each work of it is done alone, so that none fails for another's sake."""
        self.turns[kind.__name__.strip("_")] += 1
        self.works[kind.__name__.strip("_")] += len(items)
        try:
            kind(items)
        except Exception as error:
            own: dict[Work, list[Any]] = {}
            for item in items:
                own.setdefault(item.work if isinstance(item, Row) else item, []).append(item)
            for work, its_items in own.items():
                if len(own) > 1 and not work.future.done():
                    self._run(kind, its_items)
                else:
                    work.fail(error)
                    with self._changed:
                        self._waiting = [other for other in self._waiting if other is not work]

    # What is done in a turn

    def _call(self, works: list[Call]) -> None:
        for work in works:
            work.finish(work.function(self.pairs[work.pair]))

    def prepare(self, pair: str, source: Read) -> Prepared:
        """A text or chat as tokens. Call it in the worker's thread.

        Raises:
            NLAError: see :func:`nla.serve.prepare.prepare`.
        """
        key = pair, source.model_dump_json(include=_WHAT_IS_READ)
        known = self.prepared.get(key)
        if known is None:
            known = prepare(self.pairs[pair], source)
            self.prepared.put(key, known, 1000 + 400 * len(known.encoded.ids))
        return known

    def _adapter_of(self, source: Read) -> str | Path | None:
        """Where the adapter is that a request names.

        Raises:
            RequestError: there is none of that name.
        """
        name = source.target_adapter
        if name is not None and name not in self.adapters:
            known = ", ".join(self.adapters) or "none: the server was started without any"
            fix = "name one of these, or start nla serve with --target-adapter"
            raise RequestError(f"the adapter {name!r}", known, fix, status=404)
        return None if name is None else self.adapters[name]

    def _read(self, works: list[Explain]) -> None:
        """Activations of texts, those that are not known yet in one pass."""
        nla, adapter = self.pairs[works[0].pair], self._adapter_of(_source(works[0]))
        steering: Direction | None = None
        by_key: dict[Hashable, list[Explain]] = {}
        texts: dict[Hashable, Prepared] = {}
        for work in works:
            try:
                work.prepared = self.prepare(work.pair, _source(work))
                spans = work.prepared.encoded.spans
                work.columns = select_positions(spans, list(work.positions) or "all")
                if len(work.columns) > MAX_POSITIONS:
                    got, expected = f"{len(work.columns)} positions", f"at most {MAX_POSITIONS} in one request"
                    raise PositionError(got, expected, "choose positions, or ask for some at a time")
                if work.near is not None:
                    (work.near,) = select_positions(spans, [work.near])
                steering = None if work.steer is None else direction(nla, work.steer, spans)  # alone in its turn
                key = _key_of_text(work, work.prepared)
                by_key.setdefault(key, []).append(work)
                texts[key] = work.prepared
            except Exception as error:
                work.fail(error)
        vectors = {key: known for key in texts if (known := self.activations.get(key)) is not None}
        missing = [key for key in texts if key not in vectors]
        if missing:
            encoded = [texts[key].encoded for key in missing]
            with nla.planted(adapter), nla.role("target"):
                every = [list(range(len(one.ids))) for one in encoded]
                intervene = None if steering is None else steering.intervene(nla)
                acts = read(nla.model, nla.tokenizer, encoded, nla.point, every, intervene=intervene)
            for key, own in zip(missing, acts.vectors.split([len(one.ids) for one in encoded]), strict=True):
                vectors[key] = own.clone()
                if steering is None:
                    self.activations.put(key, vectors[key], own.nbytes)
        for key, same in by_key.items():
            for work in same:
                self._plan(work, vectors[key])

    def _plan(self, work: Explain, vectors: Float[Tensor, "t d"]) -> None:
        """From what was read to what is to be written: which activations, in which order, by which seeds."""
        assert work.prepared is not None
        columns, encoded = work.columns, work.prepared.encoded
        work.vectors, n = vectors[columns], len(columns)
        acts = Activations(
            work.vectors,
            [encoded.spans[column] for column in columns],
            torch.zeros(n, dtype=torch.int64),
            [encoded.text],
            str(self.pairs[work.pair].point),
            [UNKNOWN_STRATUM] * n,
        )
        work.seeds, work.planned = seeds_of(work.seed, acts, work.vectors), list(range(n))
        if work.near is not None:
            near = work.near
            work.planned.sort(key=lambda row: abs(columns[row] - near))
        elif work.reverse:
            work.planned.reverse()
        self._write_rest(work)

    def _write_rest(self, work: Explain) -> None:
        """What is cached is done at once; let the rest wait for its turn."""
        work.say(Told())
        if work.settings is None:
            work.finish(work)
            return
        cached = {row: self.explanations.get(_key_of_row(work, row)) for row in work.planned}
        work.order = [row for row in work.planned if cached[row] is None]
        for row, explanation in cached.items():
            if explanation is not None:
                work.done(row, explanation)
        if work.order:
            self._add(work)

    def _write(self, rows: list[Row]) -> None:
        """Explanations of rows of several works, in one ``generate``."""
        nla, settings = self.pairs[rows[0].work.pair], rows[0].work.settings
        assert settings is not None
        samples = 1 if settings.temperature == 0 else settings.samples
        owners = [Answer(row.work, row.row, sample) for row in rows for sample in range(samples)]
        tags = nla.config.explanation_open, nla.config.explanation_close
        watcher = Watcher(owners, nla, nla.encoder.end_ids, lambda text: inside(text, *tags), lambda: self.closed)
        explanations = nla.explain(
            torch.stack([row.vector for row in rows]),
            samples,
            settings.temperature or 1.0,
            [row.work.seeds[row.row] for row in rows],
            settings.max_new_tokens,
            greedy=settings.temperature == 0,
            watch=watcher,
        )
        for row, explanation, stopped in zip(
            rows, explanations, watcher.stopped.reshape(-1, samples).any(dim=1).tolist(), strict=True
        ):
            if stopped:
                row.work.fail(_ending())
                continue
            size = 1000 + 4 * sum(map(len, explanation.texts))
            self.explanations.put(_key_of_row(row.work, row.row), explanation, size)
            row.work.done(row.row, explanation)

    def _continue(self, works: list[Continue]) -> None:
        """Continuations of several texts, in one ``generate``."""
        nla, head = self.pairs[works[0].pair], works[0]
        adapter = self._adapter_of(head.source)
        ready: list[tuple[Continue, list[int], Direction | None]] = []
        for work in works:
            try:
                work.prepared = self.prepare(work.pair, work.source)
                encoded = work.prepared.encoded
                steering = None if work.steer is None else direction(nla, work.steer, encoded.spans)
                ready.append((work, encoded.ids, steering))
                work.say(Told())
            except Exception as error:
                work.fail(error)
        if not ready:
            return
        steered = [steering for _, _, steering in ready if steering is not None]  # all or none: see _key
        n, seeds = head.max_new_tokens, [work.seed for work, _, _ in ready]
        owners = [Answer(work, 0, 0) for work, _, _ in ready]
        ends = ends_of(nla.base_of("target"), nla.tokenizer)
        watcher = Watcher(owners, nla, ends, lambda text: text, lambda: self.closed)
        with nla.planted(adapter), nla.role("target"):
            texts = generate_patched(
                nla.base,
                nla.tokenizer,
                [ids for _, ids, _ in ready],
                steered[0].point if steered else nla.point,
                [steering.column for steering in steered] or "last",
                torch.stack([steering.vector for steering in steered]) if steered else None,
                n,
                None if head.steer is None else head.steer.strength,
                temperature=head.temperature or None,
                draws=draws_of(seeds, 1, n) if head.temperature else None,
                watch=watcher,
            )
        for (work, _, _), text, stopped in zip(ready, texts, watcher.stopped.tolist(), strict=True):
            if stopped:
                work.fail(_ending())
            else:
                work.finish(text)


_WHAT_IS_READ = {"text", "messages", "add_generation_prompt", "continue_final_message"}
"""Fields of a request that its tokens depend on."""


class Row(NamedTuple):
    """One activation of a work that is written in a turn."""

    work: Explain
    row: int

    @property
    def vector(self) -> Float[Tensor, " d"]:
        """The activation."""
        assert self.work.vectors is not None
        return self.work.vectors[self.row]


class Answer(NamedTuple):
    """Whose an answer is that is being written."""

    work: Work
    row: int
    sample: int


class Watcher:
    """Sees answers grow: passes what is written on to those who listen, and stops what nobody waits for."""

    def __init__(
        self,
        answers: Sequence[Answer],
        nla: NLA,
        ends: Sequence[int],
        shown: Callable[[str], str],
        closed: Callable[[], bool],
    ) -> None:
        """
        Args:
            ends: tokens that end an answer.
            shown: what is passed on of an answer so far.
            closed: whether everything is to stop.
        """
        self.answers, self.tokenizer, self.ends, self.shown, self.closed = answers, nla.tokenizer, ends, shown, closed
        self.stopped: Bool[Tensor, " a"] = torch.zeros(len(answers), dtype=torch.bool)
        self._listens = [answer.work.tell is not None for answer in answers]
        self._said = [""] * len(answers)

    def __call__(self, numbers: Int[Tensor, " b"], answers: Int[Tensor, "b t"]) -> Bool[Tensor, " b"]:
        """See :data:`nla.models.generate.Watch`."""
        closed, chosen = self.closed(), numbers.tolist()
        stops = torch.tensor([closed or self.answers[number].work.ticket.cancelled for number in chosen])
        self.stopped[numbers] |= stops
        listening = [index for index, number in enumerate(chosen) if self._listens[number]]
        for number, ids in zip(numbers[listening].tolist(), answers[listening].tolist(), strict=True):
            work, row, sample = self.answers[number]
            if ids[-1] in self.ends:
                self._listens[number] = False
                continue
            spelled = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            text = self.shown(str(spelled).rstrip(_UNFINISHED))
            if text != self._said[number]:
                self._said[number] = text
                work.say(Told(row, sample, text))
        return stops


def inside(text: str, opening: str, closing: str) -> str:
    """What there is between two tags in a text that is still being written; nothing of a tag shows.

    >>> inside("<e>It is spr", "<e>", "</e>"), inside("<e>It is spring.</", "<e>", "</e>"), inside("<", "<e>", "</e>")
    ('It is spr', 'It is spring.', '')
    """
    text = text.lstrip()
    if opening.startswith(text):
        return ""
    text = text.removeprefix(opening).split(closing)[0]
    begun = next((n for n in range(min(len(closing), len(text)), 0, -1) if text.endswith(closing[:n])), 0)
    return text[: len(text) - begun].strip()


def _source(work: Explain) -> Read:
    assert work.source is not None
    return work.source


def _is_short(work: Work) -> bool:
    """A call or a reading: one forward pass at most."""
    return isinstance(work, Call) or (isinstance(work, Explain) and work.vectors is None)


def _key(work: Work) -> Hashable:
    """Works with equal keys can be done together."""
    if isinstance(work, Explain) and work.vectors is not None:
        return "write", work.pair, work.settings
    if isinstance(work, Explain) and work.steer is None:
        return "read", work.pair, _source(work).target_adapter
    if isinstance(work, Continue):
        how = None if work.steer is None else (work.steer.strength, work.steer.point)
        return "continue", work.pair, work.source.target_adapter, work.max_new_tokens, work.temperature, how
    return id(work)


def _shared_rows(works: Sequence[Explain]) -> list[Row]:
    """Rows of the works by turns, so that a short one does not wait for a long one."""
    assert works[0].settings is not None
    most = max(1, MAX_ANSWERS // works[0].settings.samples)
    rows: list[Row] = []
    pending = list(works)
    while pending and len(rows) < most:
        for work in pending[: most - len(rows)]:
            rows.append(Row(work, work.order[work.begun]))
            work.begun += 1
        pending = [work for work in pending if work.begun < len(work.order)]
    return rows


def _key_of_text(work: Explain, prepared: Prepared) -> Hashable:
    """What activations depend on; steered ones are kept by nobody."""
    if work.steer is not None:
        return id(work)
    ids = torch.tensor(prepared.encoded.ids).numpy().tobytes()
    return work.pair, _source(work).target_adapter, hashlib.sha256(ids).digest()


def _key_of_row(work: Explain, row: int) -> Hashable:
    """What an explanation depends on."""
    digest = hashlib.sha256(Row(work, row).vector.numpy().tobytes()).digest()
    return work.pair, work.settings, work.seeds[row], digest


def _ending() -> RequestError:
    got, expected = "a request to a server that is ending", "one that works"
    return RequestError(got, expected, "start nla serve again", status=503)
