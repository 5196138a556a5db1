"""Decoder: a reconstruction is the cut base's stream at the last token through the head, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nla.config import DecoderConfig
from nla.errors import ArgumentError, ContextLengthError, EmptyTextError, ShapeError, VocabularyError
from nla.pair.decoder import last_stream, pad_batch
from nla.pair.roles import Head
from nla.pair.steer import generate_patched
from nla.text.tokens import check_texts, encode_batch, plain_ids, prompt_ids
from tests.helpers.tiny import CONTEXT, D_MODEL, make_pair

TEXTS = ["the cat is here.", "a dog.", "it is so. the red tree is under the blue mat and the cat sat there.", "a dog."]


def oracle(pair, text: str) -> torch.Tensor:
    """The reconstruction of one text alone, from the whole adapted model's recorded hidden states."""
    prompt = pair.config.decoder_template.replace("{explanation}", text)
    ids = torch.tensor([pair.tokenizer(prompt)["input_ids"]])
    with torch.no_grad(), pair.role("decoder"):
        hidden = pair.model(ids, output_hidden_states=True).hidden_states[pair.config.layer + 1]
        raw = hidden[0, -1] @ pair.head.weight.T + pair.head.bias
    return raw / raw.norm() * pair.config.activation_norm


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_padding_and_batch_composition_do_not_change_a_reconstruction(architecture: str, budget: int) -> None:
    pair = make_pair(architecture, scale=0.3)
    found = pair.decoder.decode(TEXTS, max_tokens_per_batch=budget)
    assert torch.allclose(found, torch.stack([oracle(pair, text) for text in TEXTS]), atol=1e-5)
    assert torch.equal(found[1], found[3])
    assert torch.allclose(pair.decoder.decode(TEXTS[::-1]).flip(0), found, atol=1e-5)


def test_reconstructions_depend_on_the_text_and_have_the_trained_length(pair) -> None:
    found = pair.decoder.decode(TEXTS)
    assert torch.allclose(found.norm(dim=1), torch.full((4,), pair.config.activation_norm), atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_no_texts_give_no_reconstructions(pair) -> None:
    assert pair.decoder.decode([]).shape == (0, D_MODEL)


def test_pad_tokens_of_any_id_do_not_matter(pair) -> None:
    rows = pair.decoder.prompt_rows(TEXTS)
    with torch.no_grad(), pair.role("decoder"):
        found = [pair.decode_ids(*pad_batch(rows, pad)) for pad in (0, 17)]
    assert torch.equal(found[0], found[1])


def test_a_mask_that_is_not_of_right_padding_is_refused(pair) -> None:
    ids, mask = pad_batch(pair.decoder.prompt_rows(TEXTS), 0)
    for bad in (mask.flip(1), torch.zeros_like(mask), mask[:, 1:]):
        with pytest.raises(ShapeError, match="right"):
            last_stream(pair.roles.view, ids, bad)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_explanation_is_refused_unless_the_rock_is_meant(pair, text: str) -> None:
    with pytest.raises(EmptyTextError, match="explanation 1"):
        pair.decoder.decode(["the cat.", text])
    assert torch.allclose(pair.decoder.decode([""], strict=False)[0], oracle(pair, ""), atol=1e-5)


def test_unknown_words_are_refused_unless_an_encoder_wrote_them(pair) -> None:
    with pytest.raises(VocabularyError, match="zebra"):
        pair.decoder.decode(["the zebra."])
    assert torch.isfinite(pair.decoder.decode(["the zebra."], strict=False)).all()


def test_an_explanation_beyond_the_context_is_refused(pair) -> None:
    with pytest.raises(ContextLengthError, match=str(CONTEXT)):
        pair.decoder.decode(["the cat " * CONTEXT])


@pytest.mark.parametrize("text", ["{explanation}", "{0}", "}", "{", "a {{cat}} {}"])
def test_braces_in_an_explanation_are_text(pair, text: str) -> None:
    before, after = pair.config.decoder_template.split("{explanation}")
    assert pair.decoder.prompt_rows([text], strict=False) == [pair.tokenizer(before + text + after)["input_ids"]]


def test_the_head_starts_as_the_identity_in_float32_and_stays_so_under_autocast() -> None:
    head, hidden = Head(8), torch.randn(3, 8).bfloat16()
    assert torch.equal(head(hidden), hidden.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(hidden)
    assert out.dtype == torch.float32
    with torch.no_grad():
        head.weight += 1e-4
    assert not torch.equal(head(hidden), out), "bfloat16 would lose this update"


def test_a_head_without_a_bias_is_linear() -> None:
    head, hidden = Head(8, bias=False), torch.randn(3, 8)
    torch.nn.init.normal_(head.weight)
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    assert torch.allclose(head(hidden), hidden @ head.weight.T, atol=1e-6)
    assert torch.allclose(head(5 * hidden), 5 * head(hidden), atol=1e-5)


def test_a_kept_final_norm_stands_between_the_cut_and_the_head() -> None:
    pair = make_pair(decoder=DecoderConfig(final_norm=True))
    batch = pair.encode_explanations(TEXTS[:1])
    with torch.no_grad(), pair.role("decoder"):
        stream = pair.model(batch.input_ids, output_hidden_states=True).hidden_states[pair.config.layer + 1][:, -1]
        expected = pair.head(pair.base.model.norm(stream))
        assert torch.allclose(pair.decode_ids(*batch), expected, atol=1e-5)
        assert not torch.allclose(pair.head(stream), expected, atol=1e-2)


def test_decode_ids_is_refused_outside_its_role(pair) -> None:
    ids, mask = pad_batch(pair.decoder.prompt_rows(TEXTS), 0)
    with pytest.raises(ArgumentError, match="role"):
        pair.decode_ids(ids, mask)
    with pair.role("decoder"), pair.role("encoder"), pytest.raises(ArgumentError, match="encoder"):
        pair.decode_ids(ids, mask)


def test_training_reaches_the_decoders_parameters_and_no_others(pair) -> None:
    ids, mask = pair.encode_explanations(TEXTS)
    with pair.role("decoder"):
        pair.decode_ids(ids, mask).square().mean().backward()
    assert all(parameter.grad is not None for parameter in pair.head.parameters())
    reached = {name for name, parameter in pair.model.named_parameters() if parameter.grad is not None}
    expected = {name for name, _ in pair.model.named_parameters() if ".decoder." in name}
    assert reached == expected
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in expected}
    assert layers == set(range(pair.config.layer + 1)), "the decoder's adapter ends at the point"


def test_a_bare_string_is_one_text_to_every_function_that_takes_several(pair) -> None:
    one, tokenizer = "a dog.", pair.tokenizer
    calls: list[Callable[[Any], Any]] = [
        pair.reconstruct,
        lambda texts: pair.reconstruct(texts, per_sample=True),
        pair.decoder.decode,
        lambda texts: pair.encode_explanations(texts).input_ids,
        lambda texts: torch.tensor(pair.decoder.prompt_rows(texts)),
        lambda texts: pair.read(texts).vectors,
        lambda texts: torch.tensor(plain_ids(tokenizer, texts)),
        lambda texts: torch.tensor(prompt_ids(tokenizer, texts, None)),
        lambda texts: torch.tensor(encode_batch(tokenizer, texts, None)[0].ids),
    ]
    for number, call in enumerate(calls):
        assert torch.equal(call(one), call([one])), number
    with pair.role("target"):
        patched = [generate_patched(pair.base, tokenizer, texts, pair.point, "last", None, 2) for texts in (one, [one])]
    assert patched[0] == patched[1] and len(patched[0]) == 1
    with pytest.raises(ArgumentError, match="text 0 "):
        check_texts("ab\ud800")
