"""What a request names, as the models take it: a text or chat as tokens, a steering as a direction at a column."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nla.autoencoder import NLA
from nla.errors import ArgumentError, ContextLengthError, PointError, ShapeError
from nla.models.hooks import Intervene, add
from nla.models.points import Point, block, context_length
from nla.pair.steer import edit_direction
from nla.serve.schema import Read, Steer
from nla.text.templates import render_template
from nla.text.tokens import Encoded, Span, encode_batch, select_positions, undated
from nla.transcripts.prepared import chats_of


class Place(NamedTuple):
    """Where a token of a chat is."""

    role: str
    message: int
    section: str
    """See :class:`nla.transcripts.rendering.Region`; "opening" of what opens an answer."""


class Prepared(NamedTuple):
    """A text or chat as the target reads it."""

    encoded: Encoded
    places: list[Place] | None
    """Of each token of a chat; None: it is no chat."""


def prepare(nla: NLA, source: Read) -> Prepared:
    """A text or chat as tokens.

    Raises:
        EmptyTextError, VocabularyError, ContextLengthError: see :func:`nla.text.tokens.encode_batch`.
        ConfigError, TemplateError, TranscriptError: see :func:`nla.transcripts.prepared.chats_of`.
    """
    context = context_length(nla.base_of("target"))
    if source.text is not None:
        (encoded,) = encode_batch(nla.tokenizer, [source.text], context)
        return Prepared(encoded, None)
    messages = [{"role": message.role, "content": message.content} for message in source.messages or ()]
    (chat,) = chats_of(nla.tokenizer, {"messages": messages, "continue_final_message": source.continue_final_message})
    encoded, roles = chat.encoded, [message.role for message in chat.transcript.messages]
    regions = [chat.region_at(index) for index in range(len(chat))]
    places = [Place(roles[one.message], one.message, one.section) for one in regions]
    if source.add_generation_prompt and roles[-1] != "assistant":
        encoded = _with_opening(nla.tokenizer, encoded, messages)
        places += [Place("assistant", len(roles), "opening")] * (len(encoded.ids) - len(places))
    if len(encoded.ids) > context:
        raise ContextLengthError(
            f"a chat of {len(encoded.ids)} tokens", f"at most {context}, the model's context", "shorten the chat"
        )
    return Prepared(encoded, places)


def _with_opening(tokenizer: Any, encoded: Encoded, messages: list[dict[str, Any]]) -> Encoded:
    """A rendered chat with what opens the assistant's answer."""
    text = render_template(tokenizer, undated(tokenizer), messages, add_generation_prompt=True)
    shift, n = len(encoded.text), len(encoded.ids)
    opening = text[shift:]
    if not text.startswith(encoded.text) or not opening:  # the template writes none
        return encoded
    added = tokenizer(opening, add_special_tokens=False, return_offsets_mapping=True)
    spans = [
        Span(token, opening[start:end], shift + start, shift + end, n + index)
        for index, (token, (start, end)) in enumerate(zip(added["input_ids"], added["offset_mapping"], strict=True))
    ]
    return Encoded([*encoded.ids, *added["input_ids"]], [*encoded.spans, *spans], text)


class Direction(NamedTuple):
    """What is added to the target's stream, where, at which token, in lengths of the activation there."""

    vector: Float[Tensor, " d"]
    point: Point
    column: int
    strength: float

    def intervene(self, nla: NLA) -> Intervene:
        """The context in which one text is read. Enter it in the role "target".

        Raises:
            PointError: it is beyond the point where activations are read, where it changes nothing.
        """
        if self.point.layer > nla.point.layer:
            fix = "steer at the pair's point or before it"
            raise PointError(f"{self.point} for activations of {nla.point}", f"{nla.point} or before it", fix)

        def added(_rows: Int[Tensor, " b"], padding: Int[Tensor, " b"]) -> AbstractContextManager[None]:
            return add(nla.base, self.point, padding + self.column, self.vector[None], self.strength)

        return added


def direction(nla: NLA, steer: Steer, spans: list[Span]) -> Direction:
    """The direction that a request asks for: a vector, that of an edit, or a random one in their place.

    Raises:
        PositionError, PointError: the text has no such token, or the target no such point.
        ShapeError: a vector of another width.
        ArgumentError: an edit that changes nothing, or a vector of length zero.
        EmptyTextError, VocabularyError, ContextLengthError: see :meth:`nla.pair.decoder.Decoder.prompt_rows`.
    """
    (column,) = select_positions(spans, [steer.position])
    if steer.vector is not None:
        width, vector = nla.config.d_model, torch.tensor(steer.vector)
        if len(vector) != width:
            raise ShapeError(f"a vector of width {len(vector)}", f"{width}, the target's", "take one of this target")
    elif steer.edit is not None and steer.edit.before:
        vector = edit_direction(nla.decoder, steer.edit.before, steer.edit.after)
    elif steer.edit is not None:  # from no explanation at all
        vector = (nla.decoder.decode([steer.edit.after]) - nla.decoder.decode([""], strict=False))[0]
    else:
        raise ArgumentError("a steering without a direction", "a vector or an edit", "give one of them")
    if steer.control is not None:
        vector = torch.randn(vector.shape, generator=torch.Generator().manual_seed(steer.control))
    point = nla.point if steer.point is None else Point.parse(steer.point)
    block(nla.base_of("target"), point)
    return Direction(vector, point, column, steer.strength)
