"""The config of a new pair: the prompts, the marker, and where they meet the target's tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from nla.config import DecoderConfig, InjectionConfig, NLAConfig, tokenizer_hash
from nla.errors import ConfigError
from nla.text.tokens import plain_ids, render_prompt, unknown_id

SLOT = "{marker}"
"""In an encoder prompt: where the marker stands."""
ENCODER_PROMPT = (
    "One activation of a language model, at one token of a text, stands between these tags: "
    f"<activation>{SLOT}</activation>\n"
    "Say what it holds that bears on what comes next: two to four short sentences, the most important first, "
    "the last about the token itself. Write them between <explanation> and </explanation>."
)
DECODER_TEMPLATE = "Summary of the following text: <text>{explanation}</text> <summary>"

_RESERVED = re.compile(r"reserved|unused|placeholder|extra|control|pad|repo_name|file_sep", re.IGNORECASE)
"""Names of tokens that tokenizers keep free, or that chats do not hold."""
_RARE = "㈎㈏㈐㈑㈒㊗㊙㊟㋀㋿꙰ꙮ◬◭⟁⧉"
"""Characters that texts hardly hold; many tokenizers have some of them as one token."""


class Prompts(NamedTuple):
    """What encoder and decoder are asked with."""

    encoder: str
    """The encoder's user message, with ``{marker}`` once."""
    decoder: str
    """The decoder's text, with ``{explanation}`` once."""
    marker: str | None = None
    """The marker; None: the first token that will do."""


def candidates(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Tokens that may serve as the marker, best first: reserved ones, then rare characters."""
    special = {*tokenizer.all_special_tokens}
    added = [(index, token.content) for index, token in tokenizer.added_tokens_decoder.items()]
    reserved = [text for _, text in sorted(added) if _RESERVED.search(text) and text not in special]
    spare = [text for _, text in sorted(added) if _RESERVED.search(text) and text in special]
    in_use = (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    yield from (text for text in (*reserved, *spare, *_RARE) if text not in in_use)


def place_marker(tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> tuple[str, int, int, int]:
    """The marker, its id, and the ids left and right of it in the rendered prompt.

    Raises:
        ConfigError: no token will do, or the one asked for is not one token that stands once in the prompt.
    """
    choices = [prompts.marker] if prompts.marker is not None else list(candidates(tokenizer))
    for marker in choices:
        marker_ids = plain_ids(tokenizer, [marker])[0]
        if len(marker_ids) != 1 or marker_ids[0] == unknown_id(tokenizer):
            continue
        ids = render_prompt(tokenizer, prompts.encoder.replace(SLOT, marker))
        if ids.count(marker_ids[0]) == 1 and 0 < (at := ids.index(marker_ids[0])) < len(ids) - 1:
            return marker, marker_ids[0], ids[at - 1], ids[at + 1]
    raise ConfigError(
        f"the marker {prompts.marker!r}" if prompts.marker is not None else "no token that can serve as the marker",
        "one token of the tokenizer's that stands once in the rendered encoder prompt, and in texts hardly ever",
        "set pair.marker to such a token of this tokenizer",
    )


def pair_config(
    target: str,
    revision: str | None,
    tokenizer: PreTrainedTokenizerBase,
    point: str,
    prompts: Prompts,
    *,
    d_model: int,
    dtype: str,
    quantization: str | None,
    max_new_tokens: int,
    activation_norm: float,
    injection_norm: float | None,
    head_bias: bool,
) -> NLAConfig:
    """The config of a new pair on a target; ``injection_norm`` None is the activations' mean norm.

    Raises:
        ConfigError: see :func:`place_marker`; also a target without a chat template.
    """
    marker, marker_id, left, right = place_marker(tokenizer, prompts)
    return NLAConfig(
        target=target,
        target_revision=revision,
        tokenizer_hash=tokenizer_hash(tokenizer),
        d_model=d_model,
        dtype=dtype,
        quantization=quantization,
        point=point,
        injection=InjectionConfig(
            marker=marker,
            marker_id=marker_id,
            left_id=left,
            right_id=right,
            norm=injection_norm or activation_norm,
        ),
        encoder_prompt=prompts.encoder.replace(SLOT, marker),
        decoder_template=prompts.decoder,
        decoder=DecoderConfig(head_bias=head_bias),
        max_new_tokens=max_new_tokens,
        activation_norm=activation_norm,
    )


def template_marks(template: str) -> set[str]:
    """What an explanation may not hold: the tags of the decoder's template, and all that follows its slot.

    >>> sorted(template_marks("Summary:<text>{explanation}</text> <summary>"))
    ['</text>', '</text> <summary>', '<summary>', '<text>']
    """
    return {*re.findall(r"<[^<>]*>", template), template.partition("{explanation}")[2].strip()} - {""}
