"""Long rows: one pass through a cache equals reading the whole, and windows equal their slices."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from nla.errors import ArgumentError, ContextLengthError
from nla.models import long_text
from nla.models.long_text import plan_windows, read_ids, read_windows
from nla.models.points import truncated_view
from nla.models.read import read
from nla.organisms.switchboard import tokenizer as switchboard
from nla.train.organisms.switchboard import SwitchboardSettings, build_model
from nla.transcripts.prepared import Prepared, Preparer
from nla.transcripts.rendering import render
from tests.helpers.talk import transcript
from tests.helpers.tiny import ARCHITECTURES, CONTEXT, D_MODEL, MARKER, make_model, make_tokenizer

POINT = "resid_post.1"


def prepared(n_messages: int, window: int | None, tokenizer: PreTrainedTokenizerBase | None = None) -> Prepared:
    """A transcript with every token to be read."""
    preparer = Preparer(
        tokenizer=tokenizer or make_tokenizer(),
        context=CONTEXT,
        target="t",
        positions="all",
        budget=None,
        window=window,
    )
    return preparer.prepare(transcript(n_messages))


def long_model(context: int = 4096):
    model = make_model()
    model.config.max_position_embeddings = context
    model.model.config.max_position_embeddings = context
    return model


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_chunks_through_a_cache_equal_reading_the_whole(architecture: str, chunk: int) -> None:
    model, tokenizer = make_model(architecture), make_tokenizer()
    chat = render(tokenizer, transcript(6))
    assert 7 < len(chat) <= CONTEXT
    whole = read(model, tokenizer, chat.text, POINT).vectors
    found = read_ids(model, chat.ids, POINT, range(len(chat)), chunk)
    assert torch.allclose(found, whole, atol=1e-5)
    chosen = read_ids(model, chat.ids, POINT, [11, 2, 30], chunk)
    assert torch.allclose(chosen, whole[[11, 2, 30]], atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_a_sliding_window_of_the_model_is_kept(chunk: int) -> None:
    config = Qwen2Config(
        vocab_size=54, hidden_size=D_MODEL, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=1, initializer_range=0.25,
    )  # fmt: skip
    torch.manual_seed(0)
    model, tokenizer = Qwen2ForCausalLM(config).eval(), make_tokenizer()
    assert "sliding_attention" in config.layer_types[:3]
    chat = render(tokenizer, transcript(6))
    whole = read(model, tokenizer, chat.text, "resid_post.2").vectors
    found = read_ids(model, chat.ids, "resid_post.2", range(len(chat)), chunk)
    assert (found - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("chunk", [1, 100, 127, 128, 129])
def test_switchboards_target_reads_the_same_in_chunks_and_keeps_its_window_only(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(SwitchboardSettings(d_model=32), switchboard.build()).eval()
    ids = torch.randint(10, 800, (290,), generator=torch.Generator().manual_seed(0))[: 140 if chunk == 1 else 290]
    with torch.inference_mode():
        whole = truncated_view(model, "resid_post.3")(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    caches = []
    monkeypatch.setattr(
        "transformers.DynamicCache", lambda **options: caches.append(DynamicCache(**options)) or caches[0]
    )
    found = read_ids(model, ids, "resid_post.3", range(len(ids)), chunk)
    assert (found - whole).abs().max() <= 1e-5 * whole.abs().max()
    assert {layer.keys.shape[-2] for layer in caches[0].layers[:4]} == {model.config.sliding_window - 1}


def test_no_pass_is_longer_than_a_chunk_and_nothing_above_the_point_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, chat = long_model(), render(make_tokenizer(), transcript(120))
    lengths: list[int] = []
    model.model.layers[0].register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    for module in (*model.model.layers[2:], model.model.norm, model.lm_head):
        module.register_forward_hook(lambda *args: pytest.fail("a module above the point ran"))
    last = len(chat) - 1
    read_ids(model, chat.ids, POINT, [3, last], chunk=100)
    assert max(lengths) == 100 and sum(lengths) == len(chat)
    lengths.clear()
    monkeypatch.setattr(long_text, "MASK_ELEMENTS", 40_000)
    read_ids(model, chat.ids, POINT, [3, last], chunk=100)
    seen = 0
    for length in lengths:
        seen += length
        assert length * seen <= 40_000
    assert sum(lengths) == len(chat)


def test_reading_stops_at_the_last_chosen_token() -> None:
    model, chat, lengths = long_model(), render(make_tokenizer(), transcript(60)), []
    model.model.layers[0].register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    read_ids(model, chat.ids, POINT, [4, 20], chunk=8)
    assert sum(lengths) == 21


def test_beyond_the_context_windows_are_named() -> None:
    with pytest.raises(ContextLengthError, match=f"{CONTEXT}.*--window {CONTEXT}"):
        prepared(40, None)
    for window in (1, CONTEXT + 1):
        with pytest.raises(ArgumentError):
            prepared(40, window)
    model, ids = make_model(), prepared(40, CONTEXT).chat.ids
    with pytest.raises(ContextLengthError):
        read_ids(model, ids, POINT, [0])
    with pytest.raises(ArgumentError):
        read_ids(model, ids[:5], POINT, [0], chunk=0)


def test_windows_cover_every_token_once_with_half_a_window_before_it() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        n, window, *starts = torch.randint(2, 60, (6,), generator=generator).tolist()
        plan = plan_windows(n, window, sorted({0, *starts}))
        assert [token for part in plan for token in range(part.fresh, part.end)] == list(range(n))
        for part in plan:
            assert part.end - part.start <= window
            assert part.start == 0 or part.fresh - part.start >= window // 2


def test_a_window_reads_what_its_slice_alone_gives() -> None:
    model, ready = make_model(), prepared(40, 48)
    ids, columns = ready.chat.ids, list(reversed(ready.columns))
    vectors = read_windows(model, ids, POINT, columns, ready.windows).flip(0)
    part = ready.windows[2]
    alone = read_ids(model, ids[part.start : part.end], POINT, range(part.end - part.start))
    assert torch.allclose(vectors[part.fresh : part.end], alone[part.fresh - part.start :], atol=1e-5)
    assert len(ready.windows) > 3 and part.start in _starts(ready.chat)


def _starts(chat) -> list[int]:
    return [0] + [i for i in range(1, len(chat)) if chat.region_at(i).message != chat.region_at(i - 1).message]


def test_bos_is_at_the_start_of_every_window() -> None:
    tokenizer, model = make_tokenizer(), make_model()
    tokenizer.bos_token = MARKER
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    ready = prepared(40, 48, tokenizer)
    ids, last = ready.chat.ids, len(ready.chat) - 1
    assert ready.chat.has_bos and ready.chat.region_at(0).message == 0 and ready.n_opening == 1
    (vector,) = read_windows(model, ids, POINT, [last], ready.windows, ready.n_opening)
    part = plan_windows(len(ids), 47, _starts(ready.chat))[-1]
    alone = torch.cat([ids[:1], ids[part.start :]])
    assert torch.allclose(vector, read_ids(model, alone, POINT, [len(alone) - 1])[0], atol=1e-5)
    assert 0 not in ready.columns
