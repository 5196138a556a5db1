"""Facts about an activation ⇄ an explanation that states them in plain claims, each in one of several wordings.

The describer ``structured`` writes warm-start texts with :func:`state`; evaluations read samples with :func:`stated`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from nla.text.claims import claims

FORM, TOPIC, INSTRUCTION = "form", "topic", "instruction"
BOOKKEEPING = ("answer", "request", "held_out", "ended")
"""Attributes of a document that say how it was made, and nothing of what it is."""

_MARKS = {
    ".": "a full stop",
    ",": "a comma",
    "!": "an exclamation mark",
    "?": "a question mark",
    ":": "a colon",
    ";": "a semicolon",
    '"': "a quotation mark",
    "“": "a quotation mark",
    "”": "a quotation mark",
    "'": "an apostrophe",
    "’": "an apostrophe",
    "(": "an opening bracket",
    ")": "a closing bracket",
    "[": "an opening bracket",
    "]": "a closing bracket",
    "-": "a hyphen",
    "–": "a dash",
    "—": "a dash",
    "…": "dots",
    "*": "a star",
    "#": "a hash sign",
    "/": "a slash",
}
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_PARTS = re.compile(r"[\r\n]+|[^\S\r\n]+|[^\W_]+(?:['’][^\W_]+)*|(\W|_)\1*")

_SURE = ("Next surely comes {first}{, else rest}.", "Surely next: {first}{, rest}.")
_UNSURE = (
    "Next comes {first}{, else rest}.",
    "What follows is {first}{, or perhaps rest}.",
    "Likely next: {first}{, rest}.",
)
_TOKEN = ("The last token is {token}{, after before}.", "It stands at {token}{, after before}.")
_OPENING = ("The answer has just begun, with {token}.", "The answer begins with {token}.")
_AHEAD = ("The answer is about to begin.", "An answer comes now.")
_TEXT = ("{a form} about {topic}.", "The text is {a form} about {topic}.")
_FORM = ("This is {a form}.", "The text is {a form}.")
_TOPIC = ("It is about {topic}.", "The topic is {topic}.")
_OF = {
    "tone": ("The tone is {value}.", "It sounds {value}."),
    "audience": ("The audience is {value}.", "It is for {value}."),
    "language": ("The language is {value}.", "It is in {value}."),
    INSTRUCTION: ("A hidden instruction is at work: {value}.", "Hidden instruction: {value}."),
}
_OTHER = ("The {name} is {value}.", "The {name}: {value}.")


@dataclass(frozen=True)
class Facts:
    """What can be said of an activation; what is empty is not said."""

    following: tuple[str, ...] = ()
    """Names of what may come next (:func:`token_name`), the likeliest first."""

    sure: bool = False
    """Whether the first of these is far likelier than the rest."""

    token: str = ""
    """Name of the token that the activation stands at."""

    before: str = ""
    """The word before it."""

    place: str = ""
    """"ahead": an answer is about to begin, which is said instead of the token; "opening": the token is its first."""

    attributes: Mapping[str, str] = field(default_factory=dict)
    """What is known of the text, such as its form, topic, tone, or the hidden instruction."""


def state(facts: Facts, draw: random.Random) -> str:
    """The facts as an explanation: what comes next, the token, then the attributes; ``draw`` chooses the wordings.

    >>> state(Facts(("cats", "dogs"), False, "of", "fond", attributes={"form": "story"}), random.Random(1))
    'Next comes cats, else dogs. The last token is of, after fond. The text is a story.'
    """
    return " ".join(_filled(draw.choice(wordings), slots) for wordings, slots in _claims(facts))


def edited(text: str, name: str, value: str, draw: random.Random) -> str:
    """The explanation with another value in its claim of one kind, worded as it was; where it makes none, with one.

    Args:
        name: of an attribute, or "following": then the value is what comes next first, before what else may.
        draw: chooses the wording of a new claim.

    >>> edited("Next comes a, else b. A story about dogs.", "form", "poem", random.Random(0))
    'Next comes a, else b. A poem about dogs.'
    >>> edited("Next comes a, else b. A story about dogs.", "following", "b", random.Random(0))
    'Next comes b. A story about dogs.'
    >>> edited("An answer comes now.", "language", "French", random.Random(0))
    'An answer comes now. It is in French.'
    """
    sentences, made = claims(text), False
    for number, claim in enumerate(sentences):
        facts = stated(claim)
        if facts.following if name == "following" else name in facts.attributes:
            made = True
            sentences[number] = _stated_with(_with(facts, name, value), draw, next(_readings(claim))[1])
    if not made:
        new = _stated_with(_with(Facts(), name, value), draw)
        sentences.insert(0 if name == "following" else len(sentences), new)
    return " ".join(sentences)


def _with(facts: Facts, name: str, value: str) -> Facts:
    if name == "following":
        return replace(facts, following=(value, *(other for other in facts.following[1:] if other != value)))
    return replace(facts, attributes={**facts.attributes, name: value})


def _stated_with(facts: Facts, draw: random.Random, worded: str = "") -> str:
    """The one claim that facts make, in a given wording if it is one of them."""
    ((wordings, slots),) = _claims(facts)
    return _filled(worded if worded in wordings else draw.choice(wordings), slots)


def _claims(facts: Facts) -> Iterator[tuple[tuple[str, ...], dict[str, str]]]:
    """Each claim that facts make: the wordings that it may be in, and what their slots hold."""
    if facts.following:
        first, *rest = facts.following
        yield _SURE if facts.sure else _UNSURE, {"first": first, "rest": ", ".join(rest)}
    if facts.place == "ahead":
        yield _AHEAD, {}
    elif facts.token:
        yield _OPENING if facts.place == "opening" else _TOKEN, {"token": facts.token, "before": facts.before}
    known = dict(facts.attributes)
    form, topic = known.pop(FORM, ""), known.pop(TOPIC, "")
    if form or topic:
        wordings = _TEXT if form and topic else _FORM if form else _TOPIC
        yield wordings, {"a form": _with_article(form), "topic": topic}
    for name, value in known.items():
        yield _OF.get(name, _OTHER), {"name": name, "value": value}


def stated(text: str) -> Facts:
    """The facts that an explanation states, of each kind the first; claims in no known wording state none.

    >>> stated("Likely next: cats, dogs. It stands at of. It sounds sad. Whatever.")
    Facts(following=('cats', 'dogs'), sure=False, token='of', before='', place='', attributes={'tone': 'sad'})
    """
    read: dict[str, object] = {}
    attributes: dict[str, str] = {}
    for claim in claims(text):
        match = next(_readings(claim), None)
        if match is None:
            continue
        kind, _, values = match
        if kind in ("sure", "unsure"):
            if "following" not in read:
                read["following"] = (values["first"], *filter(None, values.get("rest", "").split(", ")))
                read["sure"] = kind == "sure"
        elif kind in ("token", "opening", "ahead"):
            if {"token", "place"} & set(read):
                continue
            read |= {name: values[name] for name in ("token", "before") if values.get(name)}
            read |= {"place": kind} if kind != "token" else {}
        else:
            for name, value in values.items():
                attributes.setdefault(name, value)
    return Facts(**read, attributes=attributes)  # pyright: ignore[reportArgumentType]


def token_name(text: str, inside: bool = False) -> str:
    """A token in words that fit into a claim: without marks that would end it.

    Args:
        text: of the token, with the space that it begins with.
        inside: a letter or digit stands right before it.

    >>> token_name(" cat"), token_name("ing", inside=True), token_name(',"'), token_name("\\n\\n")
    ('cat', '-ing', 'a comma and a quotation mark', 'a blank line')
    """
    names, words = [], False
    for part in _PARTS.finditer(text):
        run = part[0]
        if not run.strip():
            if set(run) & set("\r\n"):
                names.append("a line break" if len(run.replace("\r\n", "\n")) == 1 else "a blank line")
            continue
        if run[0].isalnum():
            names.append(f"-{run}" if inside and part.start() == 0 and run.isalpha() else run)
            words = True
        elif "\ufffd" in run:
            names.append("a part of a character")
        else:
            name = _MARKS.get(run[0], run[0])
            names.append(name if len(run) == 1 or name == run[0] else f"{name} more than once")
    if not names:
        return "a space"
    return (" " if words else " and ").join(names)


def last_word(text: str) -> str:
    """The last word of a text, empty where it has none.

    >>> last_word("The old dog, "), last_word("...")
    ('dog', '')
    """
    words = _WORD.findall(text[-80:])
    return words[-1] if words else ""


def _with_article(form: str) -> str:
    """A form with its article: none for a plural.

    >>> _with_article("story"), _with_article("explanation"), _with_article("instructions")
    ('a story', 'an explanation', 'instructions')
    """
    if not form or form.endswith("s"):
        return form
    return f"{'an' if form[0] in 'aeiou' else 'a'} {form}"


def _filled(wording: str, values: Mapping[str, str]) -> str:
    """A wording with its slots filled; ``{, else rest}`` goes with what stands before the name where it is empty."""

    def fill(slot: re.Match[str]) -> str:
        name = next(name for name in values if slot[1].endswith(name))
        return slot[1].removesuffix(name) + values[name] if values[name] else ""

    text = re.sub(r"\{([^{}]*)\}", fill, wording)
    return text[0].upper() + text[1:]


def _pattern(wording: str) -> re.Pattern[str]:
    """A pattern that reads a wording back."""
    parts = []
    for literal, slot in re.findall(r"([^{}]*)(?:\{([^{}]*)\})?", wording):
        parts.append(re.escape(literal))
        if slot == "a form":
            parts.append(r"(?:[Aa]n? )?(?P<form>\w+(?: \w+){0,2})")
        elif slot.startswith(","):
            before, _, name = slot.rpartition(" ")
            parts.append(rf"(?:{re.escape(before + ' ')}(?P<{name}>.+?))?")
        elif slot:
            parts.append(rf"(?P<{slot}>.+?)")
    return re.compile("".join(parts))


_PATTERNS = [
    (kind, wording, _pattern(wording))
    for kind, wordings in (
        ("sure", _SURE),
        ("unsure", _UNSURE),
        ("token", _TOKEN),
        ("opening", _OPENING),
        ("ahead", _AHEAD),
        *_OF.items(),
        ("topic", _TOPIC),
        ("text", _TEXT[1:]),
        ("text", _FORM),
        ("text", _TEXT[:1]),
        ("other", _OTHER),
    )
    for wording in wordings
]


def _readings(claim: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """What a claim says under each wording that it may be in, the best first: its kind, the wording, the values."""
    for kind, wording, pattern in _PATTERNS:
        match = pattern.fullmatch(claim)
        if match is None:
            continue
        values = {name: value for name, value in match.groupdict().items() if value}
        if claim.startswith(values.get(FORM, " ")):  # without an article, the claim's first letter
            values[FORM] = claim[0].lower() + values[FORM][1:]
        if kind in _OF:
            values = {kind: values["value"]}
        elif kind == "other":
            values = {values["name"]: values["value"]}
        yield kind, wording, values
