"""Tokens: spans cover the text, positions mean what they say, bad texts are refused with the next step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nla.config import tokenizer_hash
from nla.errors import (
    ArgumentError,
    ConfigError,
    ContextLengthError,
    EmptyTextError,
    PositionError,
    VocabularyError,
    WeightsError,
)
from nla.models.read import read
from nla.text.tokens import (
    PROMPT_DATE,
    Span,
    encode,
    encode_batch,
    length_batches,
    load_tokenizer,
    render_prompt,
    select_positions,
    undated,
)
from tests.helpers.tiny import MARKER, TEMPLATE, TEXTS, make_model, make_tokenizer


def with_bos():
    """The tokenizer, now adding <|user|> in front of every text, as Llama's adds BOS."""
    tokenizer = make_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|user|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", start)]
    )
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_spans_cover_the_text_token_by_token(tokenizer, text: str) -> None:
    ids, spans, _ = encode(tokenizer, text, 64)
    assert "".join(span.text for span in spans) == text
    assert [text[span.start : span.end] for span in spans] == [span.text for span in spans]
    assert [span.token_id for span in spans] == ids == tokenizer(text)["input_ids"]
    assert [span.index for span in spans] == list(range(len(ids)))


def test_a_batch_is_encoded_as_its_texts_alone_are(tokenizer) -> None:
    assert encode_batch(tokenizer, TEXTS, 64) == [encode(tokenizer, text, 64) for text in TEXTS]
    assert encode_batch(tokenizer, [], 64) == []


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_a_saved_tokenizer_loads_as_itself_beside_a_config_of_any_architecture(tmp_path, architecture: str) -> None:
    """AutoTokenizer gives a folder with a Qwen2 config Qwen's splitting rules, whatever its tokenizer.json says."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    make_model(architecture).config.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert [loaded(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)


@pytest.mark.parametrize("tokens", [make_tokenizer(), with_bos()])
def test_an_empty_text_is_refused_even_if_the_tokenizer_adds_tokens(tokens) -> None:
    with pytest.raises(EmptyTextError, match="text 1"):
        encode_batch(tokens, [TEXTS[0], ""], 64)


def test_a_text_beyond_the_context_is_refused_not_cut(tokenizer) -> None:
    n_tokens = len(tokenizer(TEXTS[1])["input_ids"])
    assert len(encode(tokenizer, TEXTS[1], n_tokens).ids) == n_tokens
    with pytest.raises(ContextLengthError, match=str(n_tokens)):
        encode(tokenizer, TEXTS[1], n_tokens - 1)


def test_words_outside_the_vocabulary_are_listed(tokenizer) -> None:
    with pytest.raises(VocabularyError, match="'zebra', 'quagga'"):
        encode(tokenizer, "the zebra sat on the quagga.", 64)
    ids = encode_batch(tokenizer, ["the zebra"], 64, allow_unknown=True)[0].ids
    assert ids[1] == tokenizer.unk_token_id


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"tokenizer\.json"):
        encode(object(), "the cat", 64)


def test_positions_mean_what_they_say(tokenizer) -> None:
    spans = encode(tokenizer, TEXTS[3], 64).spans
    newlines = [index for index, span in enumerate(spans) if span.text == "\n"]
    assert select_positions(spans, "all") == list(range(len(spans)))
    assert select_positions(spans, "last") == [len(spans) - 1]
    assert select_positions(spans, "/\n/") == select_positions(spans, r"/\n/") == newlines
    assert len(newlines) == 2
    assert select_positions(spans, "/^ (dog|cat)$/") == [i for i, s in enumerate(spans) if s.text in (" dog", " cat")]
    assert select_positions(spans, [2, -1]) == [2, len(spans) - 1]
    assert select_positions(spans, lambda document, found: [document], document=3) == [3]


def test_all_leaves_out_what_the_tokenizer_added() -> None:
    spans = encode(with_bos(), TEXTS[0], 64).spans
    assert spans[0].text == ""
    assert select_positions(spans, "all") == list(range(1, len(spans)))
    assert 0 not in select_positions(spans, "/.*/")
    assert select_positions(spans, [0]) == [0]


def test_white_space_that_offsets_leave_out_is_still_of_the_text() -> None:
    """GPT-2's and Llama 3's way: with trimmed offsets a token of spaces covers no character."""
    words = ["<bos>", "Ġ", "cat", "Ġcat", "<end>"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<bos>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    start = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), start])
    backend.add_special_tokens(["<end>"])
    spans = encode(PreTrainedTokenizerFast(tokenizer_object=backend), "cat  cat<end>", 64).spans
    assert [span.token_id for span in spans] == [0, 2, 1, 3, 4]
    assert spans[2].text == "", "the case that this test is about"
    assert [span.added for span in spans] == [True, False, False, False, False]
    assert select_positions(spans, "all") == select_positions(spans, "/^/") == [1, 2, 3, 4]


@pytest.mark.parametrize("positions", ["/zebra/", "/[/", "newline", "//", [99], [-99], []])
def test_positions_that_match_nothing_are_refused(tokenizer, positions) -> None:
    spans = encode(tokenizer, TEXTS[0], 64).spans
    with pytest.raises(PositionError):
        select_positions(spans, positions)


def test_the_refusal_of_a_pattern_shows_what_there_is(tokenizer) -> None:
    spans = encode(tokenizer, TEXTS[0], 64).spans
    with pytest.raises(PositionError, match="' cat'"):
        select_positions(spans, "/zebra/")


@pytest.mark.parametrize("tokens", [make_tokenizer(), with_bos()])
def test_a_prompt_is_rendered_once_without_doubled_special_tokens(tokens) -> None:
    ids = render_prompt(tokens, f"Explain:{MARKER}.")
    assert tokens.convert_ids_to_tokens(ids) == ["<|user|>", "Explain", ":", MARKER, ".", "<|end|>", "<|assistant|>"]


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="chat template"):
        render_prompt(tokenizer, "the cat")


def test_batches_keep_to_their_budget_and_hold_every_row_once() -> None:
    lengths = [3, 17, 1, 9, 9, 2, 30, 4]
    batches = length_batches(lengths, 20)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 20 for batch in batches)
    assert length_batches([], 20) == []
    with pytest.raises(ArgumentError):
        length_batches(lengths, 0)


def test_a_prompt_is_the_same_every_day():
    tokenizer = make_tokenizer()
    plain = render_prompt(tokenizer, "the cat sat")
    tokenizer.chat_template = "{{ '<|end|>' if strftime_now('%d %b %Y') == '26 Jul 2024' else '<|pad|>' }}" + TEMPLATE
    assert render_prompt(tokenizer, "the cat sat") == [tokenizer.eos_token_id, *plain]


def shown(tokenizer, template: str | None = None) -> str:
    messages = [{"role": "user", "content": "x"}]
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ strftime_now('%Y-%m-%d') }}", "2024-07-26"),
        ('{{ strftime_now("%d %b %Y") }}', PROMPT_DATE),
        ("{{ strftime_now('%B %d, %Y') }} {{ strftime_now(\"%A\") }}", "July 26, 2024 Friday"),
        ("{%- set how = '%d/%m/%y' %}{{ strftime_now(how) }}", "26/07/24"),
        ("{%- macro today() -%}{{ strftime_now('%Y-%m-%d') }}{%- endmacro -%}{{ today() }}", "2024-07-26"),
        ("{{ strftime_now('%' + 'j') }}", PROMPT_DATE),
        ("it's {{ strftime_now('%Y') }}", "it's 2024"),
        ("{% if strftime_now is defined %}{{ strftime_now('%Y')|int + 1 }}{% endif %}", "2025"),
    ],
)
def test_a_date_is_that_of_the_constant_day_in_the_format_that_is_asked_for(template: str, expected: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert shown(tokenizer, undated(tokenizer)) == expected


@pytest.mark.parametrize(
    "start", ["", "\n", "\n\n  ", "  ", " {% if true %}\n a{% endif %}", "{#- x #}\n", "{%- if 1 %}b{% endif %}"]
)
def test_all_but_the_date_of_a_template_stays_as_it_is_to_the_space(start: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        start + "\n {{ '%d' }}{% if false %}{{ strftime_now('%Y') }}{% endif %}\n" + TEMPLATE + "\n"
    )
    assert shown(tokenizer, undated(tokenizer)) == shown(tokenizer)


def test_of_several_templates_the_default_is_taken() -> None:
    tokenizer = make_tokenizer()
    expected = render_prompt(tokenizer, "the cat")
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "x" + TEMPLATE}
    assert render_prompt(tokenizer, "the cat") == expected
    tokenizer.chat_template = {"rag": TEMPLATE, "tool_use": TEMPLATE}
    with pytest.raises(ConfigError, match="rag, tool_use"):
        render_prompt(tokenizer, "the cat")


def test_where_the_unknown_token_is_the_end_too_it_may_stand_in_a_text() -> None:
    """GPT-2's family: its tokenizer knows every text, and <|endoftext|> is beginning, end and unknown."""
    tokenizer = make_tokenizer()
    tokenizer.unk_token = tokenizer.bos_token = "<|end|>"
    end = tokenizer.eos_token_id
    assert end in encode(tokenizer, "the cat<|end|>the dog", 64).ids
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", end)]
    )
    assert encode(tokenizer, "the cat", 64).ids[0] == end


def test_only_one_function_asks_a_tokenizer_for_its_unknown_token() -> None:
    """``unk_token_id`` is the end token too in GPT-2's family: everything else asks :func:`unknown_id`."""
    root = Path(__file__).parents[3]
    files = [path for room in ("nla", "train", "eval") for path in (root / room).rglob("*.py")]
    asking = {str(path.relative_to(root)) for path in files if "unk_token_id" in path.read_text()}
    assert len(files) > 100 and asking == {"nla/text/tokens.py"}


def test_an_unknown_token_that_the_tokenizer_adds_itself_is_no_unknown_word() -> None:
    tokenizer = make_tokenizer()
    start = tokenizer.unk_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|unk|> $A", special_tokens=[("<|unk|>", start)]
    )
    assert encode(tokenizer, "the cat", 64).ids[0] == start
    with pytest.raises(VocabularyError, match=r"1 word.*zebra"):
        encode(tokenizer, "the zebra", 64)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text", "gpt2", "llama"])
def test_a_folder_without_a_vocabulary_gives_no_tokenizer(tmp_path, architecture: str) -> None:
    make_model(architecture).config.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="without a vocabulary"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}'])
def test_a_broken_tokenizer_is_refused(tmp_path, content: str) -> None:
    make_model().config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(WeightsError, match="does not load"):
        load_tokenizer(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(WeightsError, match="does not load"):
        load_tokenizer(tmp_path)


SPANS = [Span(30 + index, "x", index, index + 1, index, added=index == 0) for index in range(6)]


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        (3, [3]),
        (-1, [5]),
        (np.int64(2), [2]),
        (slice(2, None, 2), [2, 4]),
        (slice(-2, None), [4, 5]),
        ([0, 5], [0, 5]),
        ((1,), [1]),
        (np.array([4, 1]), [4, 1]),
        (torch.tensor([4, 1]), [4, 1]),
        (range(2), [0, 1]),
        ([[1, 2], "last"], [5]),
        ([4, slice(2)], [0, 1]),
        (np.array([[1, 2], [3, 4]]), [3, 4]),
    ],
    ids=str,
)
def test_positions_are_an_index_a_slice_a_list_or_an_entry_for_each_text(positions: Any, chosen: list[int]) -> None:
    assert select_positions(SPANS, positions, document=1) == chosen


@pytest.mark.parametrize("positions", [1.5, [1.5], None, {"a": 1}, 6, slice(9, None), [[0], None]], ids=str)
def test_positions_of_no_such_form_are_refused(positions: Any) -> None:
    with pytest.raises(PositionError):
        select_positions(SPANS, positions, document=1)


def test_an_entry_for_each_text_is_needed_where_one_is_given_for_some(tokenizer) -> None:
    model = make_model()
    acts = read(model, tokenizer, TEXTS[:2], "resid_post.1", positions=[[0, 2], "last"])
    assert [(int(document), span.index) for document, span in zip(acts.document, acts.spans, strict=True)] == [
        (0, 0),
        (0, 2),
        (1, len(tokenizer(TEXTS[1])["input_ids"]) - 1),
    ]
    with pytest.raises(PositionError, match="each of 3"):
        read(model, tokenizer, TEXTS[:3], "resid_post.1", positions=[[0], [1]])
