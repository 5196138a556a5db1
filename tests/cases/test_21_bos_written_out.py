"""Case 21: a rendered chat that is given as text has BOS once, and its vectors are those of the chat's own tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import processors

from nla.autoencoder import NLA
from nla.errors import EmptyTextError
from nla.text.tokens import encode
from tests.helpers.tiny import TEMPLATE, make_config, make_model, make_tokenizer

BOS = "<|user|>"
"""A control token of the tiny tokenizer, in the part of BOS."""
MESSAGES = [{"role": "assistant", "content": "the cat"}, {"role": "assistant", "content": " sat."}]


@pytest.fixture(scope="module")
def pair() -> NLA:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = BOS
    template = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    model = make_model()
    pair = NLA.create(model, tokenizer, make_config(tokenizer, model), rank=2)
    assert tokenizer("the cat")["input_ids"][0] == tokenizer.bos_token_id
    return pair


@torch.no_grad()
def test_a_rendered_chat_is_read_as_the_target_saw_it(pair: NLA) -> None:
    text = pair.tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    own = pair.tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    assert encode(pair.tokenizer, text, 64).ids == own and own.count(pair.tokenizer.bos_token_id) == 1
    acts = pair.read(text)
    with pair.role("target"):
        stream = pair.model(torch.tensor([own]), output_hidden_states=True).hidden_states[2][0]
    assert torch.allclose(acts.vectors, stream[1:], atol=1e-5)  # BOS counts as added: its activation is an outlier
    assert [span.index for span in acts.spans] == list(range(1, len(own)))
    assert "".join(span.text for span in acts.spans) == text.removeprefix(BOS)


def test_messages_and_files_of_them_are_read_as_their_rendered_text(pair: NLA, tmp_path: Path) -> None:
    import json

    text = pair.tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    (tmp_path / "chat.json").write_text(json.dumps(MESSAGES), encoding="utf-8")
    expected = pair.read(text)
    for given in (MESSAGES, {"messages": MESSAGES}, tmp_path / "chat.json"):
        acts = pair.read(given)
        assert torch.equal(acts.vectors, expected.vectors) and acts.texts == [text]
        assert [span[:5] for span in acts.spans] == [span[:5] for span in expected.spans]


def test_a_text_that_does_not_begin_with_bos_is_given_one(pair: NLA) -> None:
    bos = pair.tokenizer.bos_token_id
    for text in ("the cat", f"the cat{BOS}", "a"):
        assert encode(pair.tokenizer, text, 64).ids[0] == bos
        assert encode(pair.tokenizer, text, 64).ids == pair.tokenizer(text)["input_ids"]
    with pytest.raises(EmptyTextError):
        encode(pair.tokenizer, BOS, 64)
