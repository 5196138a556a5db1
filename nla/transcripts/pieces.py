"""A text, however long, and a fast tokenizer in; its token ids with their characters out, in bounded memory.

A tokenizer takes about a hundred times the size of a text. Beyond ``WHOLE`` characters the text is cut into pieces that
overlap, and neighbours are joined in the overlap, at a token where both give the same tokens before and after.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

WHOLE = 1 << 19
"""Characters of a text that is tokenised in one piece."""
PIECE, OVERLAP = 1 << 17, 1 << 12
"""Characters of a piece of a longer one, and of its overlap with the one before."""
AGREE = 24
"""Tokens on each side of a joint that both pieces must agree in."""


class Tokenised(NamedTuple):
    """Tokens of a text."""

    ids: Int[Tensor, " t"]
    starts: Int[Tensor, " t"]
    """Character of the text where each token starts."""
    ends: Int[Tensor, " t"]


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokenised:
    """The tokens of a text as it stands: none are added, and special tokens that it spells out are tokens."""
    if len(text) <= WHOLE:
        return _piece(tokenizer, text, 0, len(text))
    parts, end = [_piece(tokenizer, text, 0, PIECE)], PIECE
    while end < len(text):
        start = end - OVERLAP
        end = min(start + PIECE, len(text))
        before, after = parts[-1], _piece(tokenizer, text, start, end)
        joint = _joint(before, after) if len(after.ids) else None
        if joint is None:
            return _piece(tokenizer, text, 0, len(text))
        parts[-1] = Tokenised(*(column[: joint[0]] for column in before))
        parts.append(Tokenised(*(column[joint[1] :] for column in after)))
    return Tokenised(*map(torch.cat, zip(*parts, strict=True)))


def _piece(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> Tokenised:
    batch = tokenizer(
        text[start:end],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        verbose=False,
    )
    offsets = torch.tensor(batch["offset_mapping"], dtype=torch.int32).reshape(-1, 2) + start
    return Tokenised(torch.tensor(batch["input_ids"], dtype=torch.int64), offsets[:, 0].clone(), offsets[:, 1].clone())


def _joint(before: Tokenised, after: Tokenised) -> tuple[int, int] | None:
    """Tokens of two pieces from which on the second is taken: in the middle of a stretch where both are alike."""
    shared = before.starts >= after.starts[0]
    first = int(shared.int().argmax()) if bool(shared.any()) else len(before.ids)
    tokens = [
        list(zip(*(column.tolist() for column in part), strict=True))
        for part in (Tokenised(*(column[first:] for column in before)), after)
    ]
    places = {token: index for index, token in enumerate(tokens[1][: len(tokens[0]) + OVERLAP])}
    run, last = 0, -1
    for index, token in enumerate(tokens[0]):
        at = places.get(token, -1)
        run = 0 if at < 0 else run + 1 if run and at == last + 1 else 1
        if run == 2 * AGREE:
            return first + index - AGREE + 1, at - AGREE + 1
        last = at
    return None
