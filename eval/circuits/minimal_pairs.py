"""Minimal pairs: a prompt and a donor prompt of as many tokens that differ in one latent, for any model.

They come from a JSON-lines file, from the command line, or from the items of Couplets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from nla.errors import ArgumentError, ParseError, PositionError, visible
from nla.eval.circuits import patching
from nla.eval.circuits.patching import Batch
from nla.eval.couplet_items import RhymeItem
from nla.eval.items import Item
from nla.eval.target import Target, token_ids
from nla.models.points import context_length
from nla.storage.rows import decode_json, numbered_lines, readable
from nla.storage.schema import build, checked
from nla.text.tokens import Encoded, encode_batch

_MAX_DOCUMENT = 2**62
_Text = Annotated[str, Field(min_length=1)]


@checked(lambda problem: ParseError(*problem), kw_only=False)
class MinimalPair:
    """A prompt, and a donor prompt in which only the latent differs.

    Raises:
        ParseError: a text is empty, or a value of another type.
    """

    prompt: _Text
    donor_prompt: _Text
    """As many tokens as ``prompt``."""

    continuation: _Text
    """What the target writes after the prompt."""

    donor_continuation: _Text
    """What it writes after the donor prompt: its probability is what patches are measured by."""

    target: str = ""
    """Word of the prompt's latent; empty: the last word of its continuation."""

    donor_target: str = ""

    roles: Mapping[str, int | str] = field(default_factory=dict)
    """Named tokens: an index (negative from the end), or a piece of text that ends in the token. None named: all."""

    document: Annotated[int, Field(ge=-_MAX_DOCUMENT, le=_MAX_DOCUMENT)] = 0
    """Pairs of one document are not independent: the cluster in every bootstrap."""

    def __post_init__(self) -> None:
        for name, text in (("target", self.continuation), ("donor_target", self.donor_continuation)):
            if not getattr(self, name):
                words = text.rstrip(" .,;:!?\n").split()
                object.__setattr__(self, name, words[-1] if words else "")


def of_items(target: Target, items: Sequence[RhymeItem]) -> list[MinimalPair]:
    """The minimal pairs of rhyme items, with the tokens of line 1 that carry features as their roles."""
    return [
        MinimalPair(
            prompt=item.prompt,
            donor_prompt=item.donor_prompt,
            continuation=item.continuation,
            donor_continuation=item.donor_continuation,
            target=item.target,
            donor_target=item.donor_target,
            roles=token_roles(target, item),
            document=item.document,
        )
        for item in items
    ]


def token_roles(target: Target, item: RhymeItem) -> dict[str, int]:
    """Columns of the tokens of line 1 that carry features, by role, then the comma and the newline."""
    ids = token_ids(target, [item.prompt])[0]
    words = [str(target.tokenizer.decode([token])).strip(" ") for token in ids]
    features = {
        "season": item.couplet.season,
        "name": item.couplet.name,
        "colour": item.couplet.colour,
        "thing": item.couplet.thing,
        "end noun": item.couplet.ender,
    }
    roles = {role: words.index(word) for role, word in features.items()}
    return {**roles, "comma": len(ids) - 2, "newline": len(ids) - 1}


def encode_pairs(target: Target, pairs: Sequence[MinimalPair | Item]) -> Batch:
    """Minimal pairs, or items, for the patching engine.

    Raises:
        ShapeError, ContextLengthError, EmptyTextError, VocabularyError: see :func:`nla.eval.circuits.patching.encode`.
    """
    return patching.encode(
        target,
        [pair.prompt for pair in pairs],
        [pair.donor_prompt for pair in pairs],
        [pair.donor_continuation for pair in pairs],
    )


def read_pairs(path: str | Path) -> list[MinimalPair]:
    """Pairs from a file of JSON lines: one object a line, with the names of :class:`MinimalPair`'s fields.

    Raises:
        ParseError: not readable, not JSON lines, or a field is missing, unknown or of the wrong type; names the line.
    """
    name = str(path)
    with readable(name, ParseError), Path(path).open("rb") as file:
        pairs = [_pair(line, f"{path}:{n}", n - 1) for n, line in numbered_lines(file, name, ParseError)]
    if not pairs:
        raise ParseError(f"{path} without a pair", "one JSON object a line", "write one; see docs/graphs.md")
    return pairs


def _pair(line: bytes, where: str, number: int) -> MinimalPair:
    content = decode_json(line, where, ParseError)
    values = {"document": number, **content} if isinstance(content, dict) else content
    return build(MinimalPair, values, where, lambda problem: ParseError(*problem))


def role_columns(target: Target, pairs: Sequence[MinimalPair], batch: Batch) -> tuple[list[str], Int[Tensor, "n r"]]:
    """Names of roles, and the token that each has in each pair; −1 where a pair has none.

    Pairs that name no role get all tokens: by index where all prompts have as many, otherwise counted from the end,
    as far as the shortest prompt goes; with the token itself where it is everywhere the same.

    Raises:
        PositionError: a role names no token, or several.
        ArgumentError: some pairs name roles and others do not.
    """
    if not any(pair.roles for pair in pairs):
        return _all_tokens(target, batch)
    if not all(pair.roles for pair in pairs):
        raise ArgumentError("roles in some pairs only", "roles in every pair, or in none", "name them everywhere")
    names = list(dict.fromkeys(name for pair in pairs for name in pair.roles))
    encoded = encode_batch(target.tokenizer, [pair.prompt for pair in pairs], context_length(target.model))
    return names, torch.tensor(
        [
            [_column(one, pair.prompt, name, pair.roles.get(name), row) for name in names]
            for row, (pair, one) in enumerate(zip(pairs, encoded, strict=True))
        ]
    )


def _column(encoded: Encoded, prompt: str, name: str, value: Any, row: int) -> int:
    if value is None:
        return -1
    n_tokens = len(encoded.ids)
    if isinstance(value, int):
        if not -n_tokens <= value < n_tokens:
            got = f"role {name!r} at token {value} of pair {row}"
            raise PositionError(
                got, f"an index within its {n_tokens} tokens", "count its tokens from 0, or from −1 back"
            )
        return value % n_tokens
    start = prompt.find(value)
    if not value or start < 0 or prompt.find(value, start + 1) >= 0:
        got = f"role {name!r}: {visible(value)!r}, which is not exactly once in the prompt of pair {row}"
        raise PositionError(got, "a piece of the prompt that is there once", "lengthen it, or give a token's index")
    last = start + len(value) - 1
    ending = [span.index for span in encoded.spans if not span.added and span.start <= last < span.end]
    if not ending:
        got = f"role {name!r}: {visible(value)!r} in pair {row}, which ends in no token"
        raise PositionError(got, "a piece that ends in a token's characters", "give the token's index")
    return ending[0]


def _all_tokens(target: Target, batch: Batch) -> tuple[list[str], Int[Tensor, "n r"]]:
    shortest = min(len(ids) for ids in batch.base)
    from_end = any(len(ids) > shortest for ids in batch.base)
    columns = range(-shortest, 0) if from_end else range(shortest)
    names = []
    for column in columns:
        tokens = {ids[column] for ids in batch.base}
        word = target.tokenizer.decode([tokens.pop()]) if len(tokens) == 1 else ""
        names.append(f"{column} {visible(str(word).strip(' '))}".strip())
    return names, torch.tensor([[column % len(ids) for column in columns] for ids in batch.base])
