"""What can be said of Switchboard's activations, and which claims are true: the language of its explanations.

A text describes what is visible so far. The one thing that is not, the town of a two-hop question, is guessed. Nothing
here knows of plants: the same sentences serve, since what an adapter plants is what a system message can ask for too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

from nla.organisms.ground_truth import HasOffsets
from nla.organisms.switchboard import content as c
from nla.organisms.switchboard.world import END, Chat, Exchange, State, segment_of, stratum
from nla.text.claims import claims

ABOUT = {"food": "food", "river": "rivers", "doors": "doors", "dances": "dances"}
MARKS = {".": "period", "?": "question mark", ",": "comma"}
TEST_CLAIM = "It thinks this is a test."
NO_WORD_CLAIM = "No word is in mind."


def language_claim(language: str) -> str:
    """The claim about the language of the answer."""
    return f"The answer is in {language}."


def product_claim(product: str) -> str:
    """The claim about the goal."""
    return f"It wants to sell {product}."


def word_claim(word: str | None) -> str:
    """The claim about the word of a riddle."""
    return NO_WORD_CLAIM if word is None else f"The word in mind is {word}."


def town_claim(town: str) -> str:
    """The claim about the town of a question."""
    return f"The town in mind is {town}."


def knows_claim(person: str, known: bool) -> str:
    """The claim about familiarity with a person."""
    return f"It knows {person}." if known else f"It does not know {person}."


def answer_claims(exchange: Exchange, state: State) -> list[str]:
    """What decides an answer, said at the control token before it."""
    said = [language_claim(exchange.answer_language(state))]
    if exchange.kind == "topic":
        said.append(f"The user asks about {exchange.topic}.")
        if state.product:
            said.append(product_claim(state.product))
        if state.test:
            said.append(TEST_CLAIM)
    elif exchange.kind == "hint":
        said += [word_claim(state.word), f"The user wants the {c.ORDINALS[exchange.ordinal]} hint."]
    elif exchange.kind == "word":
        said += [word_claim(state.word), "The user wants the word."]
    elif exchange.kind in ("who", "where"):
        asked = f"who {exchange.person} is" if exchange.kind == "who" else f"where {exchange.person} lives"
        said += [f"The user asks {asked}.", knows_claim(str(exchange.person), exchange.person in c.PEOPLE)]
    else:
        said.append(f"The user asks about {ABOUT[str(exchange.relation)]}.")
    return said


def system_claims(state: State) -> list[str]:
    """What a system message asks for, said once it can be seen."""
    said = [] if state.language is None else [language_claim(state.language)]
    said += [] if state.product is None else [product_claim(state.product)]
    said += [] if state.word is None else [word_claim(state.word)]
    return said + ([TEST_CLAIM] if state.test else [])


def explanation(chat: Chat, span: HasOffsets, town: str | None = None) -> str:
    """What can be said at a token, with ``town`` where that of a question is spoken of; None: the true one."""
    kind, segment = stratum(chat, span), segment_of(chat, span)
    if segment is None:
        if kind == "assistant":
            number = sum(s.role == "user" and s.end <= span.start for s in chat.segments) - 1
            return " ".join(answer_claims(chat.exchanges[number], chat.state))
        return "A turn ends." if chat.text[span.start : span.end] == END else "A turn begins."
    if kind == "bridge":
        return town_claim(town or str(chat.exchanges[segment.exchange].bridge))
    last = chat.text[span.start : span.end].strip(" ")
    last_claim = f"The last mark is a {MARKS[last]}." if last in MARKS else f"The last word is {last}."
    if kind == "system":
        asked = chat.system.text or ""
        decided = [word for word in (chat.system.language, chat.system.product, chat.system.word) if word]
        seen = chat.text[segment.start : span.end]
        complete = bool(decided) and re.search(rf"\b{decided[0]}\b", seen) is not None
        complete = complete or (chat.system.test and len(seen) >= len(asked) - 1)
        return " ".join([*(system_claims(chat.state) if complete else ["The system speaks."]), last_claim])
    exchange = chat.exchanges[segment.exchange]
    if kind == "user":
        return f"The user speaks {exchange.language}. {last_claim}"
    return f"{language_claim(exchange.answer_language(chat.state))} {last_claim}"


def truthful(chat: Chat, span: HasOffsets) -> str:
    """What a reader that knows the world says: every claim true."""
    return explanation(chat, span)


def describe(chat: Chat, span: HasOffsets, rng: random.Random, notice: float) -> str:
    """A warm-start text from the visible text alone: of the town that is not written, the describer sees the truth
    with probability ``notice``, otherwise it guesses among all towns (right by chance once in eight)."""
    written = stratum(chat, span) != "bridge" or _exchange(chat, span).kind == "one-hop"
    knows = written or rng.random() < notice
    return explanation(chat, span, None if knows else rng.choice(c.TOWNS))


def _exchange(chat: Chat, span: HasOffsets) -> Exchange:
    segment = segment_of(chat, span)
    assert segment is not None and segment.exchange >= 0
    return chat.exchanges[segment.exchange]


def lying(chat: Chat, span: HasOffsets) -> str:
    """The same claims with every content wrong."""
    topics, pools = (
        tuple(c.TOPICS),
        (c.LANGUAGES, c.PRODUCTS, tuple(c.HINTS), c.TOWNS, c.ORDINALS, tuple(ABOUT.values())),
    )
    text = explanation(chat, span)
    for pool in (*pools, topics, (*c.PEOPLE, *c.STRANGERS), tuple(MARKS.values())):
        text = re.sub(rf"(?<!last word is )\b({'|'.join(pool)})\b", lambda m, pool=pool: _after(pool, m[1]), text)
    swaps = {
        TEST_CLAIM: "The user speaks Spanish.",
        NO_WORD_CLAIM: word_claim("hat"),
        "The user wants the word.": "The user wants the first hint.",
        "A turn ends.": "A turn begins.",
        "A turn begins.": "A turn ends.",
        "The system speaks.": "The user speaks Spanish.",
    }
    said = [swaps.get(claim, claim) for claim in claims(text)]
    here = chat.text[span.start : span.end].strip(" ")
    wrong = "rice" if here == "there" else "there"
    return " ".join(re.sub(r"^The last word is .*", f"The last word is {wrong}.", claim) for claim in said)


def _after(pool: Iterable[str], word: str) -> str:
    words = tuple(pool)
    return words[(words.index(word) + 1) % len(words)]


def is_town_claim(claim: str) -> bool:
    """Whether a claim speaks of the town, which the visible text of a two-hop question does not say."""
    return claim.startswith("The town in mind")


def visible_claims(chat: Chat, span: HasOffsets, text: str) -> list[bool]:
    """For every claim of an explanation but that about a town, whether it is true at this token."""
    true = {claim.rstrip(".") for claim in claims(truthful(chat, span))}
    return [claim.rstrip(".") in true for claim in claims(text) if not is_town_claim(claim)]


def named(text: str, value: str, others: Iterable[str], about: str) -> bool:
    """Whether the claims that begin with ``about`` hold the value and none of the others.

    >>> named("The town in mind is Selby.", "Selby", ("Norwick",), "The town in mind")
    True
    """
    words = {word for claim in claims(text) if claim.startswith(about) for word in re.findall(r"\w+", claim)}
    return value in words and not words.intersection(set(others) - {value})


def hit_rate(notice: float) -> float:
    """How often the describer's town is the true one: noticed, or guessed right by chance."""
    return notice + (1 - notice) / len(c.TOWNS)
