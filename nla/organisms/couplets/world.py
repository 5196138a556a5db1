"""The world of Couplets: three-line poems whose second line is decided before it is written.

Line 1 shows a season, a person, a coloured thing and, at its end, a noun. The noun fixes a rhyme family of four *plan
words*; colour and thing together fix which of the four ends line 2 (each alone leaves two). Every word of line 2
follows from its plan word. Line 3 repeats the season and the person. So what comes after line 1 needs three latents
(plan, season, person), and an outsider who knows the rhymes but not the rule can only guess the plan among four.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nla.organisms.ground_truth import HasOffsets
from nla.text.claims import claims

SEASONS = ("spring", "summer", "autumn", "winter")
TIMES = ("morning", "evening", "day")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack", "Kate", "Leo")
VERBS = ("left", "kept", "lost", "found", "put", "held", "bought", "brought")
COLOURS = ("red", "blue", "green", "white")
THINGS = ("ribbon", "basket", "candle", "letter")
PREPOSITIONS = ("near", "behind", "under", "beside", "past", "before")

# Each family: four plan words (which may end line 2), then three nouns that may end line 1.
FAMILIES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("cat", "hat", "bat", "mat"), ("rat", "flat", "vat")),
    (("moon", "spoon", "balloon", "raccoon"), ("lagoon", "cocoon", "harpoon")),
    (("knight", "kite", "light", "sprite"), ("night", "site", "height")),
    (("train", "chain", "crane", "rain"), ("plain", "lane", "drain")),
    (("bee", "tree", "key", "sea"), ("knee", "tea", "pea")),
    (("star", "car", "jar", "guitar"), ("bar", "tar", "scar")),
    (("cake", "snake", "lake", "rake"), ("stake", "brake", "flake")),
    (("rose", "nose", "hose", "crows"), ("toes", "rows", "foes")),
    (("king", "ring", "wing", "string"), ("swing", "sling", "sting")),
    (("boat", "goat", "coat", "note"), ("moat", "throat", "float")),
    (("clock", "rock", "sock", "lock"), ("dock", "flock", "block")),
    (("bell", "shell", "well", "gazelle"), ("cell", "dell", "spell")),
    (("bear", "chair", "pear", "mare"), ("stair", "fair", "lair")),
    (("dog", "frog", "log", "hog"), ("bog", "fog", "cog")),
    (("mouse", "house", "blouse", "grouse"), ("spouse", "louse", "farmhouse")),
    (("bed", "bread", "sled", "thread"), ("shed", "head", "spread")),
)
PLANS_PER_FAMILY = 4
PLANS: tuple[str, ...] = tuple(word for plans, _ in FAMILIES for word in plans)
FAMILY_OF: dict[str, int] = {word: f for f, (plans, enders) in enumerate(FAMILIES) for word in plans + enders}
# No document that ends on one of these is shown to the NLA in training (the target itself knows them all).
HELD_OUT_PLANS: tuple[str, ...] = ("hat", "balloon", "crane", "guitar", "string", "frog")

FRAMES = (
    "One {season} {time} {name} {verb} a {colour} {thing} {prep} the {ender},",
    "In {season} {name} {verb} a {colour} {thing} {prep} the {ender},",
    "It was {season} and {name} {verb} a {colour} {thing} {prep} the {ender},",
    "One {time} in {season} {name} {verb} a {colour} {thing} {prep} the {ender},",
    "They say that in {season} {name} {verb} a {colour} {thing} {prep} the {ender},",
    "A {colour} {thing} was {verb} by {name} one {season} {time} {prep} the {ender},",
    "All {season} {name} {verb} a {colour} {thing} {prep} the {ender},",
    "When {season} came {name} {verb} a {colour} {thing} {prep} the {ender},",
)
OPENERS = ("Soon", "Then", "Later", "Next", "Today", "Once", "Again", "Now")
DEEDS = ("followed", "painted", "carried", "wanted", "dropped", "chased", "admired", "borrowed")
ADJECTIVES = ("tiny", "quiet", "silver", "broken", "gentle", "hungry", "clever", "wooden")
MARKS = {",": "comma", ".": "period", "\n": "line break"}


@dataclass(frozen=True)
class Couplet:
    """One document, by its features; the text follows from them."""

    frame: int
    season: str
    time: str
    name: str
    verb: str
    colour: str
    thing: str
    prep: str
    ender: str

    @property
    def family(self) -> int:
        return FAMILY_OF[self.ender]

    @property
    def plan(self) -> str:
        """The word that line 2 ends on: decided by the rhyme family, and by colour and thing together."""
        return plan_word(self.family, self.colour, self.thing)

    @property
    def siblings(self) -> tuple[str, ...]:
        """The other plan words of the family: what an outsider cannot rule out."""
        return tuple(word for word in FAMILIES[self.family][0] if word != self.plan)

    @property
    def line1(self) -> str:
        return FRAMES[self.frame].format(**self.__dict__) + "\n"

    @property
    def line2(self) -> str:
        return second_line(self.plan)

    @property
    def line3(self) -> str:
        return f"So ends the {self.season} song of {self.name}.\n"

    @property
    def text(self) -> str:
        return self.line1 + self.line2 + self.line3


def plan_word(family: int, colour: str, thing: str) -> str:
    """The plan word: colour picks a half of the family's four, thing picks one of that half."""
    return FAMILIES[family][0][2 * (COLOURS.index(colour) // 2) + THINGS.index(thing) // 2]


def second_line(plan: str) -> str:
    """Line 2 for a plan word. Siblings always open differently; verb and adjective are shared across families."""
    family, k = FAMILY_OF[plan], FAMILIES[FAMILY_OF[plan]][0].index(plan)
    opener = OPENERS[(2 * k + family) % len(OPENERS)]
    deed = DEEDS[(3 * family + k) % len(DEEDS)]
    adjective = ADJECTIVES[(5 * family + 3 * k + family // 8) % len(ADJECTIVES)]
    return f"{opener} they {deed} a {adjective} {plan}.\n"


def sample(n_documents: int, seed: int, plans: str | Iterable[str] | None = None) -> list[Couplet]:
    """Draw documents with independent features; ``plans`` keeps only those that end on these words."""
    rng, plans = random.Random(seed), [plans] if isinstance(plans, str) else plans
    kept = None if plans is None else frozenset(plans)
    drawn: list[Couplet] = []
    while len(drawn) < n_documents:
        couplet = Couplet(
            frame=rng.randrange(len(FRAMES)),
            season=rng.choice(SEASONS),
            time=rng.choice(TIMES),
            name=rng.choice(NAMES),
            verb=rng.choice(VERBS),
            colour=rng.choice(COLOURS),
            thing=rng.choice(THINGS),
            prep=rng.choice(PREPOSITIONS),
            ender=rng.choice(FAMILIES[rng.randrange(len(FAMILIES))][1]),
        )
        if kept is None or couplet.plan in kept:
            drawn.append(couplet)
    return drawn


def stratum(couplet: Couplet, span: HasOffsets) -> str:
    """Kind of position: ``line 1``, ``newline`` (the break that ends line 1), ``line 2`` or ``line 3``."""
    line = couplet.text.count("\n", 0, span.start) + 1
    if line == 1 and couplet.text[span.start : span.end] == "\n":
        return "newline"
    return f"line {line}"


def strata(couplet: Couplet, spans: Sequence[HasOffsets]) -> list[str]:
    """The stratum of every span."""
    return [stratum(couplet, span) for span in spans]


# ------------------------------------------------------------------------------------------------ explanations


def plan_claim(kind: str, word: str) -> str:
    """The claim about the plan, as it stands in an explanation of a newline or of a token in line 2."""
    return f"The next line ends with {word}." if kind == "newline" else f"This line ends with {word}."


def explanation(couplet: Couplet, span: HasOffsets, plan: str, everything: bool = False) -> str:
    """What can be said at a token, with ``plan`` where the end of line 2 is spoken of. Only seen words are used.

    At the newline the features that fix the plan (colour, thing, end noun) are not restated. Season, person and thing
    are spoken of as long as the planner keeps them, which is until the end noun of line 1.

    Args:
        everything: speak of them after that too. Not an explanation then, but a sentence in the language of
            explanations, as the targets are pretrained on.
    """
    kind, seen = stratum(couplet, span), set(re.findall(r"\w+", couplet.text[: span.end]))
    kept = couplet.ender not in seen or (everything and kind != "newline")
    said = []
    if kept and couplet.season in seen:
        said.append(f"It is {couplet.season}.")
    if kept and couplet.name in seen:
        said.append(f"{couplet.name} is here.")
    if kept and kind == "line 1" and couplet.thing in seen:
        said.append(f"There is a {couplet.colour} {couplet.thing}.")
    last = couplet.text[span.start : span.end].strip(" ")
    said.append(f"The last mark is a {MARKS[last]}." if last in MARKS else f"The last word is {last}.")
    if kind in ("newline", "line 2"):
        said.insert(0 if kind == "newline" else len(said), plan_claim(kind, plan))
    return " ".join(said)


def truthful(couplet: Couplet, span: HasOffsets) -> str:
    """What a reader that knows the rule says: every claim true."""
    return explanation(couplet, span, couplet.plan)


def describe(couplet: Couplet, span: HasOffsets, rng: random.Random, notice: float) -> str:
    """A warm-start text from the visible text alone: with probability ``notice`` the describer sees what decides
    the last word, otherwise it guesses uniformly in the rhyme family (right by chance once in four)."""
    written = couplet.plan in re.findall(r"\w+", couplet.text[: span.end])
    knows = written or rng.random() < notice
    return explanation(couplet, span, couplet.plan if knows else rng.choice(FAMILIES[couplet.family][0]))


def lying(couplet: Couplet, span: HasOffsets) -> str:
    """The same claims with every content wrong: a sibling for the plan, another season, person, colour and word."""

    def after(pool: Sequence[str], word: str) -> str:
        return pool[(pool.index(word) + 1) % len(pool)]

    text = explanation(couplet, span, couplet.siblings[0])
    for pool in (SEASONS, NAMES, COLOURS, THINGS):
        text = re.sub(r"\b(" + "|".join(pool) + r")\b", lambda m, pool=pool: after(pool, m.group()), text)
    wrong_word = "the" if couplet.text[span.start : span.end].strip() == "song" else "song"
    text = re.sub(r"The last word is \w+", f"The last word is {wrong_word}", text)
    return re.sub(
        r"The last mark is a ([\w ]+)", lambda m: f"The last mark is a {after(list(MARKS.values()), m[1])}", text
    )


def claim_is_true(couplet: Couplet, span: HasOffsets, claim: str) -> bool | None:
    """Whether a visible claim holds of the text up to this token; None for the plan claim and for other sentences."""
    seen = couplet.text[: span.end]
    last = couplet.text[span.start : span.end].strip(" ")
    checks = (
        (r"It is (\w+)\.?", lambda m: m[1] == couplet.season and m[1] in seen),
        (r"(\w+) is here\.?", lambda m: m[1] == couplet.name and m[1] in seen),
        (r"There is a (\w+) (\w+)\.?", lambda m: (m[1], m[2]) == (couplet.colour, couplet.thing) and m[2] in seen),
        (r"The last word is (\w+)\.?", lambda m: m[1] == last),
        (r"The last mark is a ([\w ]+)\.?", lambda m: m[1] == MARKS.get(last)),
    )
    for pattern, holds in checks:
        if match := re.fullmatch(pattern, claim.strip()):
            return bool(holds(match))
    return None


def is_plan_claim(claim: str) -> bool:
    """Whether a claim speaks about how line 2 ends."""
    return re.search(r"\b(next|This) line\b", claim) is not None


def visible_claims(couplet: Couplet, span: HasOffsets, text: str) -> list[bool]:
    """For every claim of an explanation that is not about the plan, whether it is true of the text up to this token.

    A claim that cannot be checked is not true.
    """
    return [bool(claim_is_true(couplet, span, claim)) for claim in claims(text) if not is_plan_claim(claim)]


def named(text: str, plan: str, siblings: Iterable[str], kind: str = "newline") -> bool:
    """Whether the claim about how line 2 ends holds the plan word and none of its siblings.

    Args:
        kind: the stratum of the token: line 2 is the next line at the newline, and this line in line 2.

    >>> named("It is spring. The next line ends with cat.", "cat", ("hat", "bat", "mat"))
    True
    >>> named("The next line ends with cat. The next line ends with hat.", "cat", ("hat", "bat", "mat"))
    False
    """
    about = plan_claim(kind, "").rstrip(" .")
    words = {word for claim in claims(text) if claim.startswith(about) for word in re.findall(r"\w+", claim)}
    return plan in words and not words.intersection(siblings)


def hit_rate(notice: float) -> float:
    """How often the describer's plan is the true one: noticed, or guessed right by chance."""
    return notice + (1 - notice) / PLANS_PER_FAMILY


def notice_of(rate: float) -> float:
    """The inverse of :func:`hit_rate`, for rates from chance to 1."""
    return min(1.0, max(0.0, (rate - 1 / PLANS_PER_FAMILY) / (1 - 1 / PLANS_PER_FAMILY)))
