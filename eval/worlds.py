"""A tokenizer in; the embedded world whose language it has out, or a refusal where a family's items need another."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    COUPLETS: "`nla eval rhymes`, `nla eval gates`",
    SWITCHBOARD: "`nla eval two-hop`, `nla eval plants`, `nla eval auditing`",
}
_GENERAL = "`nla eval fidelity PAIR --texts FILE` judges any pair"


def world_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The embedded world whose tokenizer this is; None for any other model's."""
    fingerprint = tokenizer_hash(tokenizer)
    return next((world for world in _TOKENIZERS if fingerprint == _fingerprint(world)), None)


def require_world(tokenizer: PreTrainedTokenizerBase, world: str, model: object, command: str) -> None:
    """Refuse a pair or a target that does not speak the language of a family's items.

    Args:
        model: its name, or itself.
        command: the family's, such as "nla eval rhymes".

    Raises:
        ArgumentError: it is of another world, or of none.
    """
    actual = world_of(tokenizer)
    if actual != world:
        raise ArgumentError(
            f"{_shown(model)}, {'of no embedded world' if actual is None else f'of the world {actual}'}",
            f"one of the world {world}, whose items `{command}` makes",
            f"run `{command} {world}`; {_GENERAL if actual is None else f'for this one there are {_FAMILIES[actual]}'}",
        )


@functools.cache
def _fingerprint(world: str) -> str:
    return tokenizer_hash(_TOKENIZERS[world]())


def _shown(model: object) -> str:
    if isinstance(model, str | Path):
        return str(model)
    return f"a pair on {model.config.target}" if isinstance(model, NLA) else "a target"
