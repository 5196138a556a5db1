"""Works of many requests in; explanations, activations and continuations out, from one thread that owns the models.

Works that wait are done together where they can be: texts of one pair in one forward pass, explanations of different
requests in one ``generate``. A request that nobody waits for any more is left out at the next token.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nla.autoencoder import NLA, seeds_of
from nla.baselines import UNKNOWN_STRATUM
from nla.errors import ArgumentError, RequestError, ShapeError
from nla.models.hooks import add
from nla.models.points import context_length
from nla.models.read import Activations, read
from nla.pair.encoder import draws_of
from nla.pair.explanations import Explanation
from nla.pair.steer import edit_direction, generate_patched
from nla.serve.cache import Cache
from nla.serve.schema import Source, Steer
from nla.text.templates import render_template
from nla.text.tokens import Encoded, Span, encode_batch, select_positions, undated
from nla.transcripts.prepared import chats_of

MAX_WAITING = 256
"""Requests that are worked on or wait; the next one is told to come back."""
BATCH_WAIT_S = 0.005
"""How long an idle worker waits for others after the first work."""
MAX_ANSWERS = 256
"""Explanations, samples counted, that one turn writes."""
MAX_TOGETHER = 64
"""Texts that one turn reads or continues."""
CACHED_BYTES = 256 * 2**20
"""Of activations, and as much of explanations."""
_CUT = "\ufffd"
"""What a tokenizer spells where a character is not whole yet."""

log = logging.getLogger(__name__)


class Settings(NamedTuple):
    """How explanations are sampled."""

    samples: int
    temperature: float
    """0: the likeliest text."""
    max_new_tokens: int | None


class Place(NamedTuple):
    """Where a token of a chat is."""

    role: str
    message: int
    section: str


class Prepared(NamedTuple):
    """A text or chat as the target reads it."""

    encoded: Encoded
    places: list[Place | None]
    """Of each token of a chat; of a text None."""


class Told(NamedTuple):
    """Something of a work that its request may hear of before all is done."""

    row: int | None = None
    """The activation; None: the work has been read and begins to write."""
    sample: int = 0
    text: str = ""
    done: Explanation | None = None
    """The finished explanation; None: ``text`` is what there is so far."""


class Ticket:
    """One request that was admitted. Set ``cancelled`` when nobody waits for it any more."""

    def __init__(self, leave: Callable[[], None]) -> None:
        self.cancelled = False
        self._leave: Callable[[], None] | None = leave

    def release(self) -> None:
        """The request is over, however it ended."""
        self.cancelled = True
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


@dataclass(eq=False, kw_only=True)
class Work:
    """Something that a request wants done."""

    ticket: Ticket
    pair: str
    tell: Callable[[Told], None] | None = None
    """Hears of what is done so far, in the worker's thread; None: only the result is wanted."""
    future: Future[Any] = field(default_factory=Future)

    def say(self, told: Told) -> None:
        """Pass it on to who listens."""
        if self.tell is not None:
            self.tell(told)

    def fail(self, error: BaseException) -> None:
        """End without a result."""
        if not self.future.done():
            self.future.set_exception(error)

    def finish(self, result: Any) -> None:
        """End with a result."""
        if not self.future.done():
            self.future.set_result(result)


@dataclass(eq=False, kw_only=True)
class Call(Work):
    """A function that needs the models or tokenizers, such as decoding one text."""

    function: Callable[[NLA], Any]


@dataclass(eq=False, kw_only=True)
class Explain(Work):
    """Activations of a text, or vectors; and their explanations if ``settings`` are given.

    Its result is itself.
    """

    source: Source | None = None
    """What is read; None: ``vectors`` are given."""
    positions: Sequence[int] = ()
    """Token indexes; none: all."""
    near: int | None = None
    reverse: bool = False
    steer: Steer | None = None
    settings: Settings | None = None
    seed: int = 0
    vectors: Float[Tensor, "n d"] | None = None
    prepared: Prepared | None = None
    columns: list[int] = field(default_factory=list)
    """The tokens that were read, in the order of the positions."""
    seeds: list[int] = field(default_factory=list)
    planned: list[int] = field(default_factory=list)
    """Rows of ``vectors`` in the order in which they are explained."""
    order: list[int] = field(default_factory=list)
    """Of these, those that were not explained before."""
    begun: int = 0
    """How many of ``order`` are written or being written."""
    explanations: dict[int, Explanation] = field(default_factory=dict)
    """By row."""

    def done(self, row: int, explanation: Explanation) -> None:
        """One activation is explained."""
        self.explanations[row] = explanation
        self.say(Told(row, done=explanation))
        if self.vectors is not None and len(self.explanations) == len(self.vectors):
            self.finish(self)


@dataclass(eq=False, kw_only=True)
class Continue(Work):
    """A text that the target continues; its result is what the target wrote."""

    source: Source
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    steer: Steer | None = None
    prepared: Prepared | None = None


class Engine:
    """Owns pairs, and works for many requests at once."""

    def __init__(
        self,
        pairs: Mapping[str, NLA],
        adapters: Mapping[str, Path] | None = None,
        max_waiting: int = MAX_WAITING,
        batching: bool = True,
    ) -> None:
        """
        Args:
            pairs: by name; the first is the one that requests mean which name none.
            adapters: folders of the adapters that requests may put on a target, by name.
            max_waiting: requests at a time.
            batching: do works together; False: one by one, to measure what batching gains.
        """
        self.pairs, self.adapters, self.max_waiting = dict(pairs), dict(adapters or {}), max_waiting
        self.batching = batching
        self.activations: Cache[Tensor] = Cache(CACHED_BYTES)
        self.explanations: Cache[Explanation] = Cache(CACHED_BYTES)
        self.turns: Counter[str] = Counter()
        """Turns by kind of work, and the works in them by kind + " works"."""
        self.n_admitted = 0
        self.mean_s = 1.0
        """About how long a request takes, of the last ones."""
        self._waiting: list[Work] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="nla-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """End: whatever is being written is stopped at its next token, and what waits is refused."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def admit(self) -> Ticket:
        """A place for one more request.

        Raises:
            RequestError: there are ``max_waiting`` already.
        """
        with self._changed:
            if self.n_admitted >= self.max_waiting:
                raise RequestError(
                    f"a request beside {self.n_admitted} that wait",
                    f"at most {self.max_waiting} at a time",
                    f"send it again in {self.retry_after_s} s",
                    status=429,
                )
            self.n_admitted += 1
        began = time.monotonic()

        def leave() -> None:
            with self._changed:
                self.n_admitted -= 1
                self.mean_s += 0.1 * (time.monotonic() - began - self.mean_s)

        return Ticket(leave)

    @property
    def retry_after_s(self) -> int:
        """In how many seconds a place is likely to be free."""
        return max(1, min(60, round(self.mean_s)))

    def pair_of(self, name: str | None) -> str:
        """The name of the pair that a request means.

        Raises:
            RequestError: there is none of that name.
        """
        chosen = next(iter(self.pairs)) if name is None else name
        if chosen not in self.pairs:
            known = ", ".join(self.pairs)
            raise RequestError(f"the pair {name!r}", known, "name one of these, or start nla serve with it", status=404)
        return chosen

    def begin(self, work: Work) -> None:
        """Have something done; what comes of it is the work's future.

        Raises:
            RequestError: the engine is closed.
        """
        if isinstance(work, Explain) and work.vectors is not None:
            work.planned, work.seeds = list(range(len(work.vectors))), seeds_of(work.seed, None, work.vectors)
            self._go_on(work)
        else:
            self._add(work)

    def _add(self, work: Work) -> None:
        with self._changed:
            if self._closed:
                got, expected = "a request to a server that is ending", "one that works"
                raise RequestError(got, expected, "start nla serve again", status=503)
            self._waiting.append(work)
            self._changed.notify_all()

    # The worker's thread

    def _work(self) -> None:
        while (turn := self._next()) is not None:
            kind, items = turn
            self.turns[kind.__name__.strip("_")] += 1
            self.turns[f"{kind.__name__.strip('_')} works"] += len(items)
            self._run(kind, items)
        with self._changed:
            for work in self._waiting:
                work.fail(RequestError("a server that is ending", "one that works", "start it again", status=503))
            self._waiting.clear()

    def _run(self, kind: Callable[[list[Any]], None], items: list[Any]) -> None:
        """One turn. If it fails, each work of it is done alone, so that none fails for another's sake."""
        by_work: dict[Work, list[Any]] = {}
        for item in items:
            by_work.setdefault(item[0] if isinstance(item, tuple) else item, []).append(item)
        try:
            kind(items)
        except Exception as error:
            if len(by_work) > 1:
                for own in by_work.values():
                    self._run(kind, own)
                return
            (work,) = by_work
            self._drop(work)
            work.fail(error)

    def _drop(self, work: Work) -> None:
        with self._changed:
            if work in self._waiting:
                self._waiting.remove(work)

    def _next(self) -> tuple[Callable[[list[Any]], None], list[Any]] | None:
        """What to do in the next turn; None: nothing any more."""
        with self._changed:
            if not self._waiting and not self._closed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self.batching and not self._closed:
                    self._changed.wait_for(lambda: self._closed, BATCH_WAIT_S)
            while not self._closed:
                for work in [work for work in self._waiting if work.ticket.cancelled]:
                    self._waiting.remove(work)
                    work.future.cancel()
                if self._waiting:
                    return self._turn()
                self._changed.wait_for(lambda: self._waiting or self._closed)
            return None

    def _turn(self) -> tuple[Callable[[list[Any]], None], list[Any]]:
        """Calls and reading first, since they are short; then the oldest writing, and whatever can join it."""
        head = next((work for work in self._waiting if self._is_short(work)), self._waiting[0])
        together = [work for work in self._waiting if work is head or self._key(work) == self._key(head)]
        together = together if self.batching else [head]
        if isinstance(head, Explain) and head.vectors is not None:
            return self._write, self._shared_rows(together)
        chosen = together[:MAX_TOGETHER]
        for work in chosen:
            self._waiting.remove(work)
        kinds: dict[type, Callable[[list[Any]], None]] = {
            Call: self._call,
            Explain: self._read,
            Continue: self._continue,
        }
        return kinds[type(head)], chosen

    def _is_short(self, work: Work) -> bool:
        return isinstance(work, Call) or (isinstance(work, Explain) and work.vectors is None)

    def _key(self, work: Work) -> Hashable:
        """Works with equal keys can be done together."""
        if isinstance(work, Explain) and work.vectors is not None:
            return "write", work.pair, work.settings
        if isinstance(work, Explain) and work.steer is None and work.source is not None:
            return "read", work.pair, work.source.target_adapter
        if isinstance(work, Continue):
            strength = None if work.steer is None else work.steer.strength
            sampling = (work.max_new_tokens, work.temperature)
            return "continue", work.pair, work.source.target_adapter, *sampling, strength
        return id(work)

    def _shared_rows(self, works: list[Any]) -> list[tuple[Explain, int]]:
        """Rows of works in turn, so that a short one does not wait for a long one; those not yet done stay."""
        most = max(1, MAX_ANSWERS // works[0].settings.samples)
        rows: list[tuple[Explain, int]] = []
        pending = works
        while pending and len(rows) < most:
            for work in pending[: most - len(rows)]:
                rows.append((work, work.order[work.begun]))
                work.begun += 1
            pending = [work for work in pending if work.begun < len(work.order)]
        for work in {id(work): work for work, _ in rows}.values():
            self._waiting.remove(work)
            if work.begun < len(work.order):
                self._waiting.append(work)
        return rows

    def _call(self, works: list[Call]) -> None:
        for work in works:
            work.finish(work.function(self.pairs[work.pair]))

    # Reading

    def prepare(self, pair: str, source: Source) -> Prepared:
        """A text or chat as tokens. Call it in the worker's thread.

        Raises:
            NLAError: see :func:`nla.text.tokens.encode_batch` and :func:`nla.transcripts.rendering.render`.
        """
        nla = self.pairs[pair]
        if source.text is not None:
            (encoded,) = encode_batch(nla.tokenizer, [source.text], self._context(nla))
            return Prepared(encoded, [None] * len(encoded.ids))
        messages = [message.model_dump() for message in source.messages or ()]
        (chat,) = chats_of(nla.tokenizer, messages)
        encoded = chat.encoded
        regions = [chat.region_at(index) for index in range(len(chat))]
        roles = [message.role for message in chat.transcript.messages]
        places: list[Place | None] = [Place(roles[one.message], one.message, one.section) for one in regions]
        if source.add_generation_prompt and roles[-1] != "assistant":
            encoded = _with_opening(nla.tokenizer, encoded, messages)
            opening = Place("assistant", len(roles), "template")
            places += [opening] * (len(encoded.ids) - len(places))
        check = self._context(nla)
        if len(encoded.ids) > check:
            raise ArgumentError(f"a chat of {len(encoded.ids)} tokens", f"at most {check}", "shorten the chat")
        return Prepared(encoded, places)

    def _context(self, nla: NLA) -> int:
        return context_length(nla.base_of("target"))

    def adapter_of(self, source: Source) -> Path | None:
        """The folder of the adapter that a request names.

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
        nla, source = self.pairs[works[0].pair], works[0].source
        assert source is not None
        adapter, direction = self.adapter_of(source), None
        ready: list[Explain] = []
        for work in works:
            assert work.source is not None
            try:
                work.prepared = self.prepare(work.pair, work.source)
                spans = work.prepared.encoded.spans
                work.columns = select_positions(spans, list(work.positions) or "all")
                direction = None if work.steer is None else self._direction(nla, work.steer, len(spans))
                ready.append(work)
            except Exception as error:
                work.fail(error)
        keys = [self._key_of_activations(work) for work in ready]
        known = {key: self.activations.get(key) for key in dict.fromkeys(keys)}
        missing = {key: work for key, work in zip(keys, ready, strict=True) if known[key] is None}
        if missing:
            encoded = [work.prepared.encoded for work in missing.values() if work.prepared is not None]
            with nla.planted(adapter), nla.role("target"):
                acts = read(
                    nla.model,
                    nla.tokenizer,
                    encoded,
                    nla.point,
                    [list(range(len(one.ids))) for one in encoded],
                    intervene=None if direction is None else direction.added(nla),
                )
            for key, vectors in zip(missing, acts.vectors.split([len(one.ids) for one in encoded]), strict=True):
                known[key] = vectors
                self.activations.put(key, vectors.clone(), vectors.nbytes)
        for key, work in zip(keys, ready, strict=True):
            vectors = known[key]
            assert vectors is not None
            self._begin(work, vectors)

    def _key_of_activations(self, work: Explain) -> Hashable:
        assert work.prepared is not None and work.source is not None
        if work.steer is not None:
            return id(work)
        ids = torch.tensor(work.prepared.encoded.ids).numpy().tobytes()
        return work.pair, work.source.target_adapter, hashlib.sha256(ids).digest()

    def _begin(self, work: Explain, vectors: Float[Tensor, "t d"]) -> None:
        """Go on from reading to writing."""
        assert work.prepared is not None
        columns, spans, text = work.columns, work.prepared.encoded.spans, work.prepared.encoded.text
        work.vectors = vectors[columns]
        chosen = [spans[column] for column in columns]
        n, point = len(columns), str(self.pairs[work.pair].point)
        document, strata = torch.zeros(n, dtype=torch.int64), [UNKNOWN_STRATUM] * n
        acts = Activations(work.vectors, chosen, document, [text], point, strata)
        work.seeds = seeds_of(work.seed, acts, work.vectors)
        work.planned = list(range(n))
        if work.near is not None:
            near = work.near % len(spans)
            work.planned.sort(key=lambda row: abs(columns[row] - near))
        elif work.reverse:
            work.planned.reverse()
        self._go_on(work)

    def _go_on(self, work: Explain) -> None:
        """Let a work whose vectors are known be written: what is cached at once, the rest in its turn."""
        work.say(Told())
        if work.settings is None:
            work.finish(work)
            return
        cached = {row: self.explanations.get(self._key_of_explanation(work, row)) for row in work.planned}
        work.order = [row for row in work.planned if cached[row] is None]
        for row, explanation in cached.items():
            if explanation is not None:
                work.done(row, explanation)
        if work.order:
            self._add(work)

    def _key_of_explanation(self, work: Explain, row: int) -> Hashable:
        assert work.vectors is not None
        digest = hashlib.sha256(work.vectors[row].numpy().tobytes()).digest()
        return work.pair, work.settings, work.seeds[row], digest

    # Writing

    def _write(self, rows: list[tuple[Explain, int]]) -> None:
        """Explanations of rows of several works, in one ``generate``."""
        head = rows[0][0]
        nla, settings = self.pairs[head.pair], head.settings
        assert settings is not None
        vectors = torch.stack([work.vectors[row] for work, row in rows if work.vectors is not None])
        samples = 1 if settings.temperature == 0 else settings.samples
        owners = [Owner(work, row, sample) for work, row in rows for sample in range(samples)]
        tags = nla.config.explanation_open, nla.config.explanation_close
        watch = Watcher(owners, nla, set(nla.encoder.end_ids), lambda text: inside(text, *tags), self)
        explanations = nla.explain(
            vectors,
            samples,
            settings.temperature or 1.0,
            [work.seeds[row] for work, row in rows],
            settings.max_new_tokens,
            greedy=settings.temperature == 0,
            watch=watch,
        )
        for number, ((work, row), explanation) in enumerate(zip(rows, explanations, strict=True)):
            if not watch.stopped[number * samples : (number + 1) * samples].any():
                n_bytes = 1000 + sum(map(len, explanation.texts))
                self.explanations.put(self._key_of_explanation(work, row), explanation, n_bytes)
                work.done(row, explanation)

    def _continue(self, works: list[Continue]) -> None:
        """Continuations of several texts, in one ``generate``."""
        nla, head = self.pairs[works[0].pair], works[0]
        adapter = self.adapter_of(head.source)
        ready: list[tuple[Continue, list[int], Direction | None]] = []
        for work in works:
            try:
                work.prepared = self.prepare(work.pair, work.source)
                ids = work.prepared.encoded.ids
                direction = None if work.steer is None else self._direction(nla, work.steer, len(ids))
                ready.append((work, ids, direction))
                work.say(Told())
            except Exception as error:
                work.fail(error)
        if not ready:
            return
        directions = [direction for _, _, direction in ready if direction is not None]
        owners = [Owner(work, 0, 0) for work, _, _ in ready]
        seeds = [work.seed for work, _, _ in ready]
        with nla.planted(adapter), nla.role("target"):
            texts = generate_patched(
                nla.base,
                nla.tokenizer,
                [ids for _, ids, _ in ready],
                nla.point,
                [direction.column for direction in directions] or "last",
                torch.stack([direction.vector for direction in directions]) if directions else None,
                head.max_new_tokens,
                None if head.steer is None else head.steer.strength,
                temperature=head.temperature or None,
                draws=draws_of(seeds, 1, head.max_new_tokens) if head.temperature else None,
                watch=Watcher(owners, nla, set(), lambda text: text, self),
            )
        for (work, _, _), text in zip(ready, texts, strict=True):
            work.finish(text)

    def _direction(self, nla: NLA, steer: Steer, n_tokens: int) -> Direction:
        """Which way a request steers, and where."""
        spans = [Span(0, "", 0, 0, index) for index in range(n_tokens)]
        (column,) = select_positions(spans, [steer.position])
        vector = direction_of(nla, steer)
        return Direction(vector, column, steer.strength)

    @property
    def closed(self) -> bool:
        """Whether everything is to stop."""
        return self._closed


class Direction(NamedTuple):
    """What is added, at which token, how strongly."""

    vector: Float[Tensor, " d"]
    column: int
    strength: float

    def added(self, nla: NLA) -> Callable[[Tensor, Tensor], contextlib.AbstractContextManager[None]]:
        """The context in which a batch of one text is read."""
        return lambda rows, padding: add(
            nla.base, nla.point, torch.tensor([self.column]) + padding, self.vector[None], self.strength
        )


def direction_of(nla: NLA, steer: Steer) -> Float[Tensor, " d"]:
    """The direction that a request asks for: a vector, an edit's, or a random one in their place.

    Raises:
        ShapeError: a vector of another width.
        ArgumentError: an edit that changes nothing.
    """
    width = nla.config.d_model
    if steer.vector is not None:
        vector = torch.tensor(steer.vector)
        if len(vector) != width:
            raise ShapeError(f"a vector of width {len(vector)}", f"{width}, the target's", "take one of this target")
    elif steer.edit is not None:
        before, after = steer.edit.before, steer.edit.after
        if before:
            vector = edit_direction(nla.decoder, before, after)
        else:
            vector = (nla.decoder.decode([after]) - nla.decoder.decode([""], strict=False))[0]
    else:
        raise ArgumentError("a steering without a direction", "a vector or an edit", "give one of them")
    if steer.control is None:
        return vector
    return torch.randn(width, generator=torch.Generator().manual_seed(steer.control))


class Owner(NamedTuple):
    """Whose an answer is."""

    work: Work
    row: int
    sample: int


class Watcher:
    """Sees answers grow: passes on what is written to those who listen, and stops what nobody waits for."""

    def __init__(
        self, owners: list[Owner], nla: NLA, ends: set[int], shown: Callable[[str], str], engine: Engine
    ) -> None:
        self.owners, self.tokenizer, self.ends, self.shown, self.engine = owners, nla.tokenizer, ends, shown, engine
        self.stopped: Bool[Tensor, " a"] = torch.zeros(len(owners), dtype=torch.bool)
        self._over = [owner.work.tell is None for owner in owners]
        self._said = [""] * len(owners)

    def __call__(self, numbers: Int[Tensor, " b"], answers: Int[Tensor, "b t"]) -> Bool[Tensor, " b"]:
        """See :data:`nla.models.generate.Watch`."""
        closed = self.engine.closed
        stops = torch.tensor([closed or self.owners[number].work.ticket.cancelled for number in numbers.tolist()])
        self.stopped[numbers] |= stops
        rows = [row for row, number in enumerate(numbers.tolist()) if not self._over[number]]
        for number, ids in zip(numbers[rows].tolist(), answers[rows].tolist(), strict=True):
            if ids[-1] in self.ends:
                self._over[number] = True
                continue
            owner = self.owners[number]
            text = self.shown(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False).rstrip(_CUT))
            if text != self._said[number]:
                self._said[number] = text
                owner.work.say(Told(owner.row, owner.sample, text))
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


def _with_opening(tokenizer: Any, encoded: Encoded, messages: list[dict[str, Any]]) -> Encoded:
    """A rendered chat with what opens the assistant's answer."""
    text = render_template(tokenizer, undated(tokenizer), messages, add_generation_prompt=True)
    if not text.startswith(encoded.text):
        return encoded
    opening = text[len(encoded.text) :]
    added = tokenizer(opening, add_special_tokens=False, return_offsets_mapping=True)
    shift, n = len(encoded.text), len(encoded.ids)
    spans = [
        Span(token, opening[start:end], shift + start, shift + end, n + index)
        for index, (token, (start, end)) in enumerate(zip(added["input_ids"], added["offset_mapping"], strict=True))
    ]
    return Encoded([*encoded.ids, *added["input_ids"]], [*encoded.spans, *spans], text)


def leading(texts: Sequence[str]) -> str:
    """The text that most samples gave, the first of equals."""
    return Counter(texts).most_common(1)[0][0]
