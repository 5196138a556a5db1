"""Items of `nla eval instructions`: requests and neutral answers, each to be read under hidden instructions.

An answer is written by the target without any instruction, to a request that training never had, and is then read under
every instruction, under none, and under control texts that are as long and ask for nothing: the same tokens each time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nla.errors import ArgumentError, ContextLengthError
from nla.eval.circuits.patching import read_sites
from nla.eval.target import Target, continued
from nla.models.points import context_length
from nla.text.prompts import ChatPrompts, Prompts, as_long_as
from nla.text.tokens import plain_ids
from nla.transcripts.messages import Message, Transcript
from nla.transcripts.positions import ANSWER_START, BEFORE_ANSWER

FIRST_TOKENS = "first tokens"
KINDS = (BEFORE_ANSWER, ANSWER_START, FIRST_TOKENS)
"""Kinds of token that are read: the last of the prompt, the first of the answer, and those after it."""
N_FIRST = 3
"""Tokens of an answer that are read after its first."""
NONE = "none"
"""The reading without an instruction."""
CONTROL = "control"
"""The reading under texts that ask for nothing, each as long as one of the instructions in turn."""
_ANSWER_TOKENS = 24
_SPARE = 4


class Wording(NamedTuple):
    """A hidden instruction as the target is given it."""

    texts: tuple[str, ...]
    """Wordings that no training document has."""
    known: bool
    """Whether training has the instruction in other words."""


@dataclass(frozen=True)
class Items:
    """Requests, their neutral answers, and the system texts that these are read under."""

    chats: ChatPrompts
    users: list[str]
    """What is asked, n texts."""
    answers: list[list[int]]
    """Token ids of the answers, each of ``N_FIRST`` + 1 or more."""
    systems: dict[str, list[str]]
    """By reading (an instruction's name, ``NONE``, a control), the system text of each request."""
    known: dict[str, bool]
    """By instruction, whether training has it in other words."""
    n_columns: int = field(default=2 + N_FIRST, init=False)
    """Tokens that are read of each request."""

    @property
    def names(self) -> list[str]:
        """The instructions."""
        return list(self.known)

    @property
    def columns_by_kind(self) -> dict[str, list[int]]:
        """Which of the tokens that are read are of which kind."""
        return {BEFORE_ANSWER: [0], ANSWER_START: [1], FIRST_TOKENS: list(range(2, self.n_columns))}

    @cached_property
    def _prompts(self) -> dict[str, list[list[int]]]:
        return {
            reading: [self.chats.ids(system, user) for system, user in zip(texts, self.users, strict=True)]
            for reading, texts in self.systems.items()
        }

    def ids(self, reading: str, request: int) -> list[int]:
        """Token ids of a request under a reading, up to the last token of the answer that is read."""
        return self._prompts[reading][request] + self.answers[request][: N_FIRST + 1]

    def prompt(self, reading: str, request: int) -> list[int]:
        """Token ids of a request under a reading, up to where the answer begins."""
        return self._prompts[reading][request]

    def prompt_lengths(self, reading: str, requests: Sequence[int]) -> Int[Tensor, " n"]:
        """Tokens of the prompts, which end before the answers."""
        return torch.tensor([len(self._prompts[reading][request]) for request in requests])

    def visible(self, request: int, column: int) -> str:
        """What a reader of the text sees at a token that is read: the request, and the answer so far."""
        return f"{self.users[request]}\n{self.chats.tokenizer.decode(self.answers[request][:column])}"

    def transcript(self, reading: str, request: int) -> Transcript:
        """The chat, with the whole of the answer that was written."""
        messages = self.chats.messages(self.systems[reading][request], self.users[request])
        turns = [Message(message["role"], message["content"]) for message in messages]
        text = self.chats.tokenizer.decode(self.answers[request], clean_up_tokenization_spaces=False)
        return Transcript(f"{reading}-{request}", (*turns, Message("assistant", text)))


def control_of(instruction: str) -> str:
    """The name of the control reading that is as long as an instruction."""
    return f"control of {instruction}"


def make_items(
    target: Target,
    prompts: Prompts,
    n_instructions: int,
    n_requests: int,
    plain: str,
    seed: int = 0,
    always: Sequence[str] = (),
) -> Items:
    """Held-out requests, answered by the target without an instruction.

    Args:
        n_instructions: that training has in other words; a fifth as many more that it has not at all, if there are.
        plain: what control texts are made of; see :func:`nla.text.prompts.plain_text`.
        always: instructions that are among them.

    Raises:
        ArgumentError: the prompts have fewer instructions or requests, or the target's answers are too short.
        ConfigError, TemplateError: see :meth:`nla.text.prompts.ChatPrompts.of`.
        ContextLengthError: a request and the answer do not fit the target's context.
    """
    draw, chats = random.Random(f"instructions/{seed}"), ChatPrompts.of(target.tokenizer)
    wordings = drawn_instructions(prompts, n_instructions, draw, always)
    users = drawn_requests(prompts, n_requests + _SPARE, draw)
    users, answers = _answered(target, chats, users, prompts.instructions.otherwise[0], seed)
    if len(users) < n_requests:
        got = f"{len(users)} of {n_requests} requests that the target answers with more than {N_FIRST} tokens"
        raise ArgumentError(got, "as many as are asked for", "ask for fewer (--items), or give other prompts")
    users, answers = users[:n_requests], answers[:n_requests]
    systems = {NONE: [prompts.instructions.otherwise[0]] * n_requests}
    for name, wording in wordings.items():
        systems[name] = [wording.texts[request % len(wording.texts)] for request in range(n_requests)]
        as_long = {text: as_long_as(target.tokenizer, text, plain) for text in wording.texts}
        systems[control_of(name)] = [as_long[text] for text in systems[name]]
    controls = [systems[control_of(name)] for name in wordings]
    systems[CONTROL] = [controls[request % len(controls)][request] for request in range(n_requests)]
    items = Items(chats, users, answers, systems, {name: wording.known for name, wording in wordings.items()})
    longest = max(len(items.ids(reading, request)) for reading, request in product(systems, range(n_requests)))
    if longest > context_length(target.model):
        raise ContextLengthError(
            f"{longest} tokens with the longest instruction", f"at most {context_length(target.model)}", "shorten it"
        )
    return items


def drawn_instructions(prompts: Prompts, n: int, draw: random.Random, always: Sequence[str] = ()) -> dict[str, Wording]:
    """``n`` instructions that training has in other words, ``always`` among them, and up to a fifth as many that it has
    not at all.

    Raises:
        ArgumentError: there are fewer than ``n``, or fewer than 2 are asked for.
    """
    values = prompts.instructions.values
    partly = [name for name, one in values.items() if one.seen and one.held_out]
    wholly = [name for name, one in values.items() if not one.seen]
    least = max(2, len(always))
    if not least <= n <= len(partly):
        expected = f"{least} to {len(partly)}, those of the prompts with wordings under seen and held_out"
        raise ArgumentError(f"{n} instructions", expected, "ask for another number, or give other prompts")
    drawn = draw.sample(partly, n)
    missing = [name for name in always if name not in drawn]
    spare = [name for name in drawn if name not in always]
    chosen = [name for name in drawn if name not in spare[len(spare) - len(missing) :]] + missing
    chosen += draw.sample(wholly, min(len(wholly), max(1, n // 5)))
    return {name: Wording(values[name].held_out, name in partly) for name in chosen}


def drawn_requests(prompts: Prompts, n: int, draw: random.Random) -> list[str]:
    """``n`` requests in a wording, and about a topic, that training never has; if these are too few, either of them.

    Raises:
        ArgumentError: there are fewer.
    """
    new_forms = [text for one in prompts.forms.values() for text in one.held_out]
    old_forms = [text for one in prompts.forms.values() for text in one.seen]
    pools = [
        (new_forms, prompts.topics.held_out),
        (new_forms, prompts.topics.seen),
        (old_forms, prompts.topics.held_out),
    ]
    requests: list[str] = []
    for forms, topics in pools:
        pool = [form.replace("{topic}", topic) for form, topic in product(forms, topics)]
        requests += draw.sample(pool, min(len(pool), n - len(requests)))
    if len(requests) < n:
        got, expected = (
            f"{n} requests of which training has none",
            f"at most {len(requests)}, as many as the prompts have",
        )
        raise ArgumentError(got, expected, "ask for fewer (--items), or give other prompts (--prompts)")
    return requests


def read_items(target: Target, items: Items, readings: Sequence[str]) -> Float[Tensor, "k n c d"]:
    """Activations float32 at the point, of each reading, request and token of interest."""
    requests, ids, columns = range(len(items.users)), [], []
    for reading in readings:
        ids += [items.ids(reading, request) for request in requests]
        columns.append(items.prompt_lengths(reading, requests)[:, None] - 1 + torch.arange(items.n_columns))
    vectors = read_sites(target, ids, [str(target.point)], torch.cat(columns))[:, 0]
    return vectors.reshape(len(readings), len(requests), items.n_columns, -1)


def _answered(
    target: Target, chats: ChatPrompts, users: Sequence[str], system: str, seed: int
) -> tuple[list[str], list[list[int]]]:
    """The requests whose answers are long enough, and these: as the tokenizer splits their text, which a reader of the
    chat would have, too."""
    prompts = [chats.ids(system, user) for user in users]
    written = continued(target, prompts, _ANSWER_TOKENS, temperature=1.0, seed=seed)
    kept: list[str] = []
    answers: list[list[int]] = []
    for user, ids in zip(users, written.rows(), strict=True):
        text = str(target.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        (again,) = plain_ids(target.tokenizer, [text.rstrip("\N{REPLACEMENT CHARACTER}")])
        if len(again) > N_FIRST:
            kept.append(user)
            answers.append(again)
    return kept, answers
