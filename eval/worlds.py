"""A tokenizer in; the embedded world whose language it has out, or a refusal where a family's items need another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from nla.autoencoder import NLA
from nla.config import tokenizer_hash
from nla.errors import ArgumentError
from nla.organisms.couplets import tokenizer as couplets_tokenizer
from nla.organisms.switchboard import tokenizer as switchboard_tokenizer

COUPLETS, SWITCHBOARD = "couplets", "switchboard"
_TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    COUPLETS: couplets_tokenizer.build,
    SWITCHBOARD: switchboard_tokenizer.build,
}
_FAMILIES = {
    COUPLETS: "`nla eval rhymes`, `nla eval gates`, `nla eval readers`",
    SWITCHBOARD: "`nla eval two-hop`, `nla eval plants`, `nla eval auditing`, `nla eval readers`",
}
_GENERAL = "`nla eval fidelity PAIR --texts FILE` judges any pair, and `nla probe` compares readers on any texts"


def world_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The embedded world whose tokenizer this is; None for any other model's."""
    fingerprint = tokenizer_hash(tokenizer)
    return next((world for world in _TOKENIZERS if fingerprint == _fingerprint(world)), None)


def require_world(tokenizer: PreTrainedTokenizerBase, worlds: Sequence[str], model: object, command: str) -> str:
    """The world of a pair or a target; it is refused if it does not speak the language of a family's items.

    Args:
        worlds: those that the family makes items of.
        model: its name, or itself.
        command: the family's, such as "nla eval rhymes".

    Raises:
        ArgumentError: it is of another world, or of none.
    """
    actual = world_of(tokenizer)
    if actual is None or actual not in worlds:
        raise ArgumentError(
            f"{_shown(model)}, {'of no embedded world' if actual is None else f'of the world {actual}'}",
            f"one of the world {' or '.join(worlds)}, whose items `{command}` makes",
            f"run `{command} {worlds[0]}`; "
            + (_GENERAL if actual is None else f"for this one there are {_FAMILIES[actual]}"),
        )
    return actual


@functools.cache
def _fingerprint(world: str) -> str:
    return tokenizer_hash(_TOKENIZERS[world]())


def _shown(model: object) -> str:
    if isinstance(model, str | Path):
        return str(model)
    return f"a pair on {model.config.target}" if isinstance(model, NLA) else "a target"
