"""A transcript made ready to read: its tokens and the chosen positions, after all checks that need no forward pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from nla.transcripts.messages import Transcript
from nla.transcripts.positions import BUDGET, Position, select
from nla.transcripts.rendering import Chat, render, trimmed
from nla.transcripts.stream import check_length


class Prepared(NamedTuple):
    """A rendered transcript and the positions to read in it."""

    chat: Chat
    positions: list[Position]

    @property
    def transcript(self) -> Transcript:
        """What was rendered."""
        return self.chat.transcript


def prepare(
    transcript: Transcript,
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module,
    positions: str = "structure",
    budget: int | None = BUDGET,
    seed: int = 0,
    window: int | None = None,
    trim: bool = False,
) -> Prepared:
    """Render a transcript for a target and choose its positions: whatever can be refused before the costly part.

    Args:
        tokenizer, model: the target's; the model gives its context length.
        positions, budget, seed: see :func:`nla.transcripts.positions.select`.
        window: tokens of a window that it will be read in; None: one pass.
        trim: take white space off the ends of messages, for templates that do.

    Raises:
        ConfigError, TemplateError, VocabularyError: see :func:`nla.transcripts.rendering.render`.
        PositionError: no such position.
        ContextLengthError, ArgumentError: too long for the context, or a window that is out of range.
    """
    chat = render(tokenizer, trimmed(transcript) if trim else transcript)
    check_length(model, chat, window)
    return Prepared(chat, select(chat, positions, budget, seed))
