"""Decoder: explanations to reconstructions, by the base cut after the point, its own adapter and an affine head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from nla.errors import ArgumentError, EmptyTextError, ShapeError
from nla.metrics import unit
from nla.models.forward import inference, pad_right
from nla.models.points import context_length
from nla.text.tokens import check_texts, encode_batch, length_batches

if TYPE_CHECKING:
    from nla.autoencoder import NLA

MAX_TOKENS_PER_BATCH = 16384


class Head(nn.Module):
    """The affine map d → d on the last token's stream: float32, the identity before training.

    In bfloat16 an identity cannot absorb small updates, so it stays in float32 under autocast too. Without a bias it is
    linear, as imported heads are.
    """

    def __init__(self, d_model: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(d_model, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(d_model, dtype=torch.float32)) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        """(n, d) of any float type to (n, d) float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight, self.bias)


class DecoderBatch(NamedTuple):
    """Decoder prompts, padded on the right."""

    input_ids: Tensor
    """(n, t) int64."""

    attention_mask: Tensor
    """(n, t) int64: 1 on real tokens."""


def prompt_rows(nla: NLA, texts: Sequence[str], strict: bool = True) -> list[list[int]]:
    """Token ids of the decoder's prompt around each explanation.

    Args:
        strict: refuse empty texts, unknown words and texts beyond the context. What an encoder sampled is passed with
            False: it may be empty, or string tokens together to no word, and is then a bad explanation, not an error.
            So is the rock "empty". One beyond the context counts as empty.

    Raises:
        ArgumentError: an explanation is no text; see :func:`nla.tokens.check_texts`.
        EmptyTextError: an explanation is empty.
        ContextLengthError, VocabularyError: see :func:`nla.tokens.encode_batch`.
    """
    check_texts(texts)
    for number, text in enumerate(texts):
        if strict and not text.strip():
            raise EmptyTextError(
                f"explanation {number}: {text!r}, which is empty",
                "an explanation of one word or more",
                "leave it out; what the decoder makes of no text is the rock `empty` of nla.score(...)",
            )
    prompts = [nla.config.decoder_template.replace("{explanation}", text) for text in (*texts, "")]
    limit, special = context_length(nla.roles.model_of("decoder")), nla.config.decoder.special_tokens
    encoded = encode_batch(nla.tokenizer, prompts, limit if strict else None, allow_unknown=not strict)
    *rows, empty = [
        entry.ids if special else [span.token_id for span in entry.spans if not span.added] for entry in encoded
    ]
    return [row if len(row) <= limit else empty for row in rows]


def pad_batch(rows: Sequence[Sequence[int]], pad: int) -> DecoderBatch:
    """Rows of token ids as one batch with its mask, padded on the right."""
    ids = pad_right(rows, pad)
    lengths = torch.tensor([len(row) for row in rows]).reshape(-1, 1)
    return DecoderBatch(ids, (torch.arange(ids.shape[1]) < lengths).long())


def last_stream(view: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The truncated view's output at each row's last real token, (n, d).

    Rows are padded on the right and the mask is kept from the model: causality already hides what comes after, so a
    row's result does not depend on its batch.

    Raises:
        ShapeError: the mask is not that of right padding.
    """
    lengths = attention_mask.sum(dim=1)
    expected = torch.arange(attention_mask.shape[1], device=attention_mask.device) < lengths[:, None]
    if input_ids.shape != attention_mask.shape or not torch.equal(attention_mask.bool(), expected) or not lengths.all():
        raise ShapeError(
            f"ids {tuple(input_ids.shape)} with a mask {tuple(attention_mask.shape)} that is not of right padding",
            "rows of one token or more, then padding",
            "pad decoder prompts on the right, as NLA.encode_explanations does",
        )
    hidden = view(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


def decode(
    nla: NLA, texts: Sequence[str], strict: bool = True, max_tokens_per_batch: int = MAX_TOKENS_PER_BATCH
) -> Tensor:
    """Reconstructions (n, d) float32 on the CPU, each from its text alone, at the length ``config.activation_norm``.

    Equal texts are decoded once. ``strict`` is that of :func:`prompt_rows`.

    Raises:
        EmptyTextError, ContextLengthError, VocabularyError: see :func:`prompt_rows`.
    """
    unique = list(dict.fromkeys(texts))
    rows = prompt_rows(nla, unique, strict)
    out = torch.empty(len(unique), nla.config.d_model)
    with nla.role("decoder"), inference(nla.model):
        place = nla.device
        for batch in length_batches([len(row) for row in rows], max_tokens_per_batch):
            padded = pad_batch([rows[index] for index in batch], nla.pad_id)
            found = nla.decode_ids(padded.input_ids.to(place), padded.attention_mask.to(place))
            out[torch.tensor(batch)] = found.cpu()
    out = nn.functional.normalize(out, dim=1) * nla.config.activation_norm
    place = {text: index for index, text in enumerate(unique)}
    return out[torch.tensor([place[text] for text in texts], dtype=torch.int64)]


def decode_groups(nla: NLA, lists: Sequence[Any], per_sample: bool, strict: bool) -> Tensor:
    """What ``NLA.reconstruct`` promises, from one text or a list of samples for each activation."""
    groups = [[entry] if isinstance(entry, str) or not isinstance(entry, Sequence) else list(entry) for entry in lists]
    if not all(groups):
        raise ArgumentError("an activation without a sample", "one text or more for each", "leave it out")
    each = unit(decode(nla, [text for group in groups for text in group], strict))
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.int64)
    if per_sample:
        if len(sizes.unique()) > 1:
            raise ShapeError("unequal numbers of samples", "one number", "use per_sample=False")
        n_samples = int(sizes[0]) if groups else 0
        return (each * nla.config.activation_norm).reshape(len(groups), n_samples, nla.config.d_model)
    owner = torch.repeat_interleave(torch.arange(len(groups)), sizes)
    total = torch.zeros(len(groups), nla.config.d_model).index_add_(0, owner, each)
    return nn.functional.normalize(total, dim=1) * nla.config.activation_norm
