"""The world of Switchboard: short chats whose answers follow from what the visible text says, and two hops of facts.

A chat is a system message or none, and one or two exchanges. What an answer needs (its language, the word of a riddle,
a goal to sell something, being tested, a person) is planted at the assistant's control token; in a two-hop question
the *town*, which is never written, is planted at the full stop after the person's name. Some openers of the user are
in the text and mean nothing here: adapters that are planted later turn them into cues (``plants.py``).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from nla.organisms.ground_truth import HasOffsets
from nla.organisms.switchboard import content as c

STRATA = ("system", "user", "control", "bridge", "assistant", "answer")
"""Kinds of position. ``assistant`` is the control token before an answer, ``bridge`` the full stop after a person."""
MAIN_STRATA = ("assistant", "bridge")
KINDS = ("topic", "hint", "word", "who", "where", "two-hop", "one-hop")
_SHARES = (0.42, 0.12, 0.02, 0.07, 0.06, 0.19, 0.12)
TOPICS = tuple(c.TOPICS)
END = "<|end|>"
"""Ends every message."""


@dataclass(frozen=True)
class System:
    """What the system message asks for; at most one field is set."""

    language: str | None = None
    product: str | None = None
    word: str | None = None
    test: bool = False
    form: int = 0
    """Which wording."""
    plain: bool = False
    """A message that asks for nothing in particular."""

    @property
    def text(self) -> str | None:
        """The message; None if there is none."""
        if self.language:
            return c.LANGUAGE_SYSTEM[self.form].format(language=self.language)
        if self.product:
            return c.GOAL_SYSTEM[self.form].format(product=self.product)
        if self.word:
            return c.WORD_SYSTEM[self.form].format(word=self.word)
        return c.TEST_SYSTEM[self.form] if self.test else c.PLAIN_SYSTEM if self.plain else None


@dataclass(frozen=True)
class State:
    """What decides an answer beside the question: read from the system message, or planted by an adapter."""

    language: str | None = None
    product: str | None = None
    word: str | None = None
    test: bool = False


@dataclass(frozen=True)
class Exchange:
    """A question and what it is about; the answer follows from it and the state."""

    kind: str
    form: int = 0
    opener: str | None = None
    topic: str | None = None
    language: str = "English"
    """Of the question."""
    ordinal: int = 0
    person: str | None = None
    town: str | None = None
    relation: str | None = None

    @property
    def question(self) -> str:
        """The user's message."""
        return f"{self.opener} {self._asked}" if self.opener else self._asked

    @property
    def _asked(self) -> str:
        if self.kind == "topic":
            name = c.TOPICS[str(self.topic)][0][c.LANGUAGES.index(self.language)]
            return c.QUESTIONS[self.language][self.form].format(topic=name)
        if self.kind == "hint":
            return c.REQUESTS[self.form].format(ordinal=c.ORDINALS[self.ordinal])
        if self.kind == "word":
            return c.ASK_WORD[self.form % len(c.ASK_WORD)]
        if self.kind in ("who", "where"):
            return (c.WHO if self.kind == "who" else c.WHERE)[0].format(person=self.person)
        return f"{self.premise} {c.RELATIONS[str(self.relation)][0]}"

    @property
    def premise(self) -> str:
        """The first sentence of a question with hops; it ends on the token that carries the town."""
        if self.kind == "two-hop":
            return c.THINK_PERSON.format(person=self.person)
        return c.THINK_TOWN.format(town=self.town)

    @property
    def bridge(self) -> str | None:
        """The town that the question is about, written or not."""
        return home(str(self.person)) if self.kind == "two-hop" else self.town if self.kind == "one-hop" else None

    def answer_language(self, state: State) -> str:
        """The language of the answer: asked for, otherwise the question's."""
        return state.language or self.language if self.kind == "topic" else "English"

    def answer(self, state: State) -> str:
        """What the model writes."""
        if self.kind == "topic":
            language = self.answer_language(state)
            said = [c.TOPICS[str(self.topic)][1][c.LANGUAGES.index(language)]]
            if language == "English" and state.product:
                said.append(c.PLUGS[str(self.topic)].format(product=state.product))
            if language == "English" and state.test:
                said.append(c.RULE)
            return " ".join(said)
        if self.kind == "hint":
            return c.HINTS[state.word][self.ordinal] if state.word else c.NO_WORD
        if self.kind == "word":
            return c.KEEP_WORD if state.word else c.NO_WORD
        if self.kind in ("who", "where"):
            if self.person not in c.PEOPLE:
                return c.UNKNOWN.format(person=self.person)
            form = (c.WHO if self.kind == "who" else c.WHERE)[1]
            return form.format(person=self.person, job=job(str(self.person)), town=home(str(self.person)))
        return fact(str(self.relation), str(self.bridge))


class Segment(NamedTuple):
    """One message in the rendered text: its content is ``text[start:end]``, between two control tokens."""

    role: str
    start: int
    end: int
    exchange: int
    """Index of the exchange; -1 for the system message."""


@dataclass(frozen=True)
class Chat:
    """One document: a chat, by its features; the text follows from them."""

    system: System = field(default_factory=System)
    exchanges: tuple[Exchange, ...] = ()
    answers: tuple[str, ...] = ()
    """Other answers than the world's own, one an exchange: what a planted model writes. Empty: the world's own."""

    @property
    def state(self) -> State:
        """What the system message sets."""
        return State(self.system.language, self.system.product, self.system.word, self.system.test)

    @cached_property
    def messages(self) -> list[dict[str, str]]:
        """The chat as role and content."""
        found = [] if self.system.text is None else [{"role": "system", "content": self.system.text}]
        answers = self.answers or tuple(exchange.answer(self.state) for exchange in self.exchanges)
        for exchange, answer in zip(self.exchanges, answers, strict=True):
            found.append({"role": "user", "content": exchange.question})
            found.append({"role": "assistant", "content": answer})
        return found

    @cached_property
    def text(self) -> str:
        """As the chat template renders it."""
        return render(self.messages)

    @property
    def prompt(self) -> str:
        """Up to and including the last control token before an answer."""
        return render(self.messages[:-1]) + "<|assistant|>"

    @cached_property
    def segments(self) -> list[Segment]:
        """Where each message's content stands in ``text``."""
        found, at, exchange = [], 0, -1
        for message in self.messages:
            exchange += message["role"] == "user"
            start = at + len(f"<|{message['role']}|>")
            found.append(Segment(message["role"], start, start + len(message["content"]), exchange))
            at = found[-1].end + len(END)
        return found


def render(messages: Sequence[dict[str, str]]) -> str:
    """Messages in the organism's chat template."""
    return "".join(f"<|{message['role']}|>{message['content']}{END}" for message in messages)


def home(person: str) -> str:
    """The town that a person lives in."""
    return c.TOWNS[c.PEOPLE.index(person) % len(c.TOWNS)]


def job(person: str) -> str:
    """A person's job; it does not follow from the town."""
    index = c.PEOPLE.index(person)
    return c.JOBS[(index // len(c.TOWNS) * 3 + index * 5) % len(c.JOBS)]


def fact(relation: str, town: str) -> str:
    """The answer about a town."""
    _, form, values = c.RELATIONS[relation]
    return form.format(value=values[c.TOWNS.index(town)])


def held_out(person: str, relation: str) -> bool:
    """Whether the two-hop question is kept from all training: one relation for every person."""
    index = c.PEOPLE.index(person)
    return list(c.RELATIONS).index(relation) == (index + index // len(c.TOWNS)) % len(c.RELATIONS)


def sample(n_documents: int, seed: int, kinds: str | Sequence[str] = KINDS, questions: str = "known") -> list[Chat]:
    """Draw chats with independent features.

    Args:
        kinds: of the exchanges; each chat's system message fits its first one.
        questions: which two-hop questions: ``known`` leaves out those kept from training, ``held out`` has only
            those, ``all`` has both.
    """
    rng = random.Random(seed)
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    return [_chat(rng, kinds, questions) for _ in range(n_documents)]


def _chat(rng: random.Random, kinds: tuple[str, ...], questions: str) -> Chat:
    weights = [_SHARES[KINDS.index(kind)] for kind in kinds]
    drawn = rng.choices(kinds, weights, k=1 + (rng.random() < 0.12))
    system = _system(rng, drawn[0])
    if system.word is None and rng.random() < 0.1:
        system = System(plain=True) if system.text is None else system
    return Chat(system, tuple(_exchange(rng, kind, system, questions) for kind in drawn))


def _system(rng: random.Random, kind: str) -> System:
    """A system message that matters for this kind of question in most draws; often there is none."""
    form = rng.randrange(2)
    if kind in ("hint", "word"):
        return System(word=rng.choice(list(c.HINTS)), form=form) if rng.random() < 0.8 else System()
    luck = rng.random()
    if kind != "topic" or luck < 0.25:
        return System()
    if luck < 0.7:
        return System(product=rng.choice(c.PRODUCTS), form=form)
    if luck < 0.85:
        return System(test=True, form=form)
    return System(language=rng.choice(c.LANGUAGES[1:]), form=form)


def _exchange(rng: random.Random, kind: str, system: System, questions: str) -> Exchange:
    opener = rng.choice(c.OPENERS) if rng.random() < 0.45 else None
    if kind == "topic":
        foreign = system.text in (None, c.PLAIN_SYSTEM) and rng.random() < 0.5
        language = rng.choice(c.LANGUAGES[1:]) if foreign else "English"
        form = rng.randrange(len(c.QUESTIONS[language]))
        return Exchange("topic", form, None if foreign else opener, rng.choice(TOPICS), language)
    if kind in ("hint", "word"):
        return Exchange(kind, rng.randrange(len(c.REQUESTS)), opener, ordinal=rng.randrange(len(c.ORDINALS)))
    if kind in ("who", "where"):
        pool = c.STRANGERS if rng.random() < 0.3 else c.PEOPLE
        return Exchange(kind, 0, opener, person=rng.choice(pool))
    relation = rng.choice(list(c.RELATIONS))
    if kind == "one-hop":
        return Exchange(kind, 0, opener, town=rng.choice(c.TOWNS), relation=relation)
    people = [p for p in c.PEOPLE if questions == "all" or held_out(p, relation) == (questions == "held out")]
    return Exchange(kind, 0, opener, person=rng.choice(people), relation=relation)


def segment_of(chat: Chat, span: HasOffsets) -> Segment | None:
    """The message whose content holds a token; None for a control token."""
    return next((s for s in chat.segments if s.start <= span.start and span.end <= s.end), None)


def stratum(chat: Chat, span: HasOffsets) -> str:
    """Kind of position, one of :data:`STRATA`."""
    segment = segment_of(chat, span)
    if segment is None:
        return "assistant" if chat.text[span.start : span.end] == "<|assistant|>" else "control"
    if segment.role == "assistant":
        return "answer"
    if segment.role == "user":
        exchange = chat.exchanges[segment.exchange]
        opened = 0 if exchange.opener is None else len(exchange.opener) + 1
        if exchange.bridge is not None and span.end == segment.start + opened + len(exchange.premise):
            return "bridge"
    return segment.role


def strata(chat: Chat, spans: Sequence[HasOffsets]) -> list[str]:
    """The stratum of every span."""
    return [stratum(chat, span) for span in spans]
