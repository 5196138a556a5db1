"""Decoder: explanations to reconstructions, by the base cut after the point, its own adapter and an affine head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla.config import NLAConfig
from nla.errors import ArgumentError, EmptyTextError, ShapeError
from nla.metrics import check_ids, unit
from nla.models.generate import pad_of
from nla.models.hooks import inference
from nla.models.points import context_length, device_of, n_embeddings
from nla.pair.roles import Roles, adapters_in_type
from nla.text.tokens import check_texts, encode_batch, length_batches, unknown_id

MAX_TOKENS_PER_BATCH = 16384


class DecoderBatch(NamedTuple):
    """Decoder prompts, padded on the right."""

    input_ids: Int[Tensor, "n t"]

    attention_mask: Int[Tensor, "n t"]
    """1 on real tokens."""


class Decoder:
    """The decoder of a pair: its prompt around each explanation, and the reconstruction from it."""

    def __init__(self, roles: Roles, tokenizer: PreTrainedTokenizerBase, config: NLAConfig) -> None:
        self.roles, self.tokenizer, self.config = roles, tokenizer, config
        self.pad_id = pad_of(tokenizer)

    def decode(
        self, texts: str | Sequence[str], strict: bool = True, max_tokens_per_batch: int = MAX_TOKENS_PER_BATCH
    ) -> Float[Tensor, "n d"]:
        """Reconstructions in float32 on the CPU, each from its text alone, at the length ``config.activation_norm``.

        Equal texts are decoded once. ``strict`` is that of :meth:`prompt_rows`.

        Raises:
            EmptyTextError, ContextLengthError, VocabularyError: see :meth:`prompt_rows`.
        """
        texts = [texts] if isinstance(texts, str) else texts
        unique = list(dict.fromkeys(texts))
        with self.roles.play("decoder"), inference(self.roles.model):
            out = self.predict(unique, strict, max_tokens_per_batch).cpu()
        out = nn.functional.normalize(out, dim=1) * self.config.activation_norm
        row_of = {text: index for index, text in enumerate(unique)}
        return out[torch.tensor([row_of[text] for text in texts], dtype=torch.int64)]

    def predict(
        self, texts: Sequence[str], strict: bool = True, max_tokens_per_batch: int = MAX_TOKENS_PER_BATCH
    ) -> Float[Tensor, "n d"]:
        """Reconstructions in float32 as the head gives them, on its device; texts of like length share a pass.

        Call it in the role "decoder". Gradients flow if they are enabled.

        Raises:
            ArgumentError: another role is in force.
            EmptyTextError, ContextLengthError, VocabularyError: see :meth:`prompt_rows`.
        """
        rows, device = self.prompt_rows(texts, strict), device_of(self.roles.model)
        batches = length_batches([len(row) for row in rows], max_tokens_per_batch)
        prompts = (pad_batch([rows[index] for index in batch], self.pad_id) for batch in batches)
        parts = [self.decode_ids(ids.to(device), mask.to(device)) for ids, mask in prompts]
        order = torch.tensor([index for batch in batches for index in batch], dtype=torch.int64, device=device)
        return torch.cat([*parts, torch.empty(0, self.config.d_model, device=device)])[order.argsort()]

    def decode_groups(
        self, lists: str | Sequence[str] | Sequence[Sequence[str]], per_sample: bool, strict: bool
    ) -> Float[Tensor, "n d"] | Float[Tensor, "n s d"]:
        """What ``NLA.reconstruct`` promises, from one text or a list of samples for each activation."""
        entries = [lists] if isinstance(lists, str) else lists
        groups = [[one] if isinstance(one, str) or not isinstance(one, Sequence) else [*one] for one in entries]
        texts = [text for group in groups for text in group]
        check_texts(texts)
        if not all(groups):
            raise ArgumentError("an activation without a sample", "one text or more for each", "leave it out")
        predicted = unit(self.decode(texts, strict))
        sizes = torch.tensor([len(group) for group in groups], dtype=torch.int64)
        if per_sample:
            if len(sizes.unique()) > 1:
                raise ShapeError("unequal numbers of samples", "one number", "use per_sample=False")
            n_samples = int(sizes[0]) if groups else 0
            return (predicted * self.config.activation_norm).reshape(len(groups), n_samples, self.config.d_model)
        owner = torch.repeat_interleave(torch.arange(len(groups)), sizes)
        total = torch.zeros(len(groups), self.config.d_model).index_add_(0, owner, predicted)
        return nn.functional.normalize(total, dim=1) * self.config.activation_norm

    def encode_explanations(self, texts: str | Sequence[str], strict: bool = True) -> DecoderBatch:
        """The decoder's prompts around explanations, as one batch on the decoder's device.

        Raises:
            EmptyTextError, ContextLengthError, VocabularyError, ArgumentError: see :meth:`prompt_rows`.
        """
        ids, mask = pad_batch(self.prompt_rows(texts, strict), self.pad_id)
        device = device_of(self.roles.model_of("decoder"))
        return DecoderBatch(ids.to(device), mask.to(device))

    def decode_ids(self, input_ids: Int[Tensor, "n t"], attention_mask: Int[Tensor, "n t"]) -> Float[Tensor, "n d"]:
        """Reconstructions in float32 from a batch of :meth:`encode_explanations`, as the head gives them.

        Call it in the role "decoder". Gradients flow if they are enabled; the length of a reconstruction is the
        head's own.

        Raises:
            ArgumentError: another role is in force.
            ShapeError: the mask is not that of right padding.
        """
        if self.roles.playing != "decoder":
            raise ArgumentError(
                f"decode_ids in the role {self.roles.playing}",
                'the role "decoder"',
                'write `with nla.role("decoder"):` around forward and backward, or call reconstruct for inference',
            )
        with adapters_in_type(self.roles):
            stream = last_stream(self.roles.view, input_ids, attention_mask)
        return self.roles.head(stream)

    def prompt_rows(self, texts: str | Sequence[str], strict: bool = True) -> list[list[int]]:
        """Token ids of the decoder's prompt around each explanation.

        Args:
            strict: refuse empty texts, unknown words and texts beyond the context. What an encoder sampled is passed
                with False: it may be empty, or string tokens together to no word, and is then a bad explanation, not
                an error. So is the baseline "empty". One beyond the context counts as empty, and so does one with a
                token that the decoder has no embedding for.

        Raises:
            ArgumentError: an explanation is no text; see :func:`nla.text.tokens.check_texts`.
            EmptyTextError: an explanation is empty.
            ContextLengthError: see :func:`nla.text.tokens.encode_batch`.
            VocabularyError: see there, and :func:`nla.metrics.check_ids`.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if strict:
            check_texts(texts)
            for number, text in enumerate(texts):
                if not text.strip():
                    raise EmptyTextError(
                        f"explanation {number}: {text!r}, which is empty",
                        "an explanation of one word or more",
                        "leave it out; what the decoder makes of no text is the baseline `empty` of nla.score(...)",
                    )
        template, special = self.config.decoder_template, self.config.decoder.special_tokens
        prompts = [template.replace("{explanation}", text) for text in (*texts, "")]
        tokens: Any = self.tokenizer(prompts, add_special_tokens=special, verbose=False)
        *rows, empty = tokens["input_ids"]
        model = self.roles.model_of("decoder")
        limit, n_tokens, unknown = context_length(model), n_embeddings(model), unknown_id(self.tokenizer)
        if strict and any(len(row) > limit or unknown in row for row in rows):
            encode_batch(self.tokenizer, prompts[:-1], limit)  # says which text, and which words
        if strict:
            check_ids(torch.tensor([max(row, default=0) for row in rows]), n_tokens)
        return [row if len(row) <= limit and max(row, default=0) < n_tokens else empty for row in rows]


def pad_batch(rows: Sequence[Sequence[int]], pad: int) -> DecoderBatch:
    """Rows of token ids as one batch with its mask, padded on the right."""
    tokens = [torch.tensor(row, dtype=torch.int64) for row in rows]
    ids = pad_sequence(tokens, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows]).reshape(-1, 1)
    return DecoderBatch(ids, (torch.arange(ids.shape[1]) < lengths).long())


def last_stream(
    view: PreTrainedModel, input_ids: Int[Tensor, "n t"], attention_mask: Int[Tensor, "n t"]
) -> Float[Tensor, "n d"]:
    """The truncated view's output at each row's last real token.

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
            "pad decoder prompts on the right, as Decoder.encode_explanations does",
        )
    hidden = view(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
