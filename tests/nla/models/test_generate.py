"""Writing: how answers end."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, StoppingCriteria

from nla.errors import NonFiniteError
from nla.models.generate import CPU_BYTES, CPU_SHARE, generate, rows_at_a_time, sampled
from nla.models.hooks import inject
from nla.models.points import attends_plainly
from tests.helpers.tiny import D_MODEL, make_model

PROMPTS = [[14, 15, 16], [17, 18], [20, 21, 22, 23], [14, 18]]
SETTINGS = {"ends": [], "pad": 0, "max_new_tokens": 12}


class AfterTokens(StoppingCriteria):
    """Ends row i once it has written ``lengths[i]`` tokens."""

    def __init__(self, lengths: list[int], prompt_length: int) -> None:
        self.lengths, self.prompt_length = torch.tensor(lengths), prompt_length

    def __call__(self, input_ids, scores, **kwargs):  # type: ignore[override]
        return input_ids.shape[1] - self.prompt_length >= self.lengths


def test_a_row_that_a_criterion_ends_has_what_it_wrote_and_no_padding() -> None:
    model, lengths = make_model(), [5, 1, 12, 3]
    whole = generate(model, PROMPTS, **SETTINGS).rows()
    stop = AfterTokens(lengths, prompt_length=4)
    stopped = generate(model, PROMPTS, **SETTINGS, stopping=[stop], batches=[range(4)])
    assert stopped.rows() == [row[:length] for row, length in zip(whole, lengths, strict=True)]
    assert stopped.mask.sum(dim=1).tolist() == lengths and not stopped.ended.any()
    assert (stopped.ids[1, 1:] == 0).all()


def test_an_end_token_before_the_criterion_still_ends_a_row() -> None:
    model = make_model()
    whole = generate(model, PROMPTS[:1], **SETTINGS).rows()[0]
    end = whole[2]
    first = whole.index(end)
    written = generate(model, PROMPTS[:1], **{**SETTINGS, "ends": [end]}, stopping=[AfterTokens([9], 3)])
    assert written.rows() == [whole[:first]] and bool(written.ended)


def test_what_is_written_together_on_a_cpu_keeps_its_cache_within_bounds(any_model) -> None:
    n_tokens = 12
    cache = any_model(torch.arange(3, 3 + n_tokens)[None], use_cache=True).past_key_values
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    rows = rows_at_a_time(any_model, n_tokens, 10**12)
    assert rows > 1 and rows * held <= CPU_BYTES
    assert rows_at_a_time(any_model, n_tokens, 7) == 7 and rows_at_a_time(any_model, 10**12, 7) == 1


def test_on_a_cpu_a_large_model_writes_more_rows_together_than_a_small_one() -> None:
    config = Qwen2Config(vocab_size=151_936, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28)
    config.num_attention_heads, config.num_key_value_heads = 28, 4
    with torch.device("meta"):
        large = Qwen2ForCausalLM(config)
    large.get_input_embeddings().weight = torch.nn.Parameter(torch.empty(1))  # whose device is a CPU
    rows, weights = rows_at_a_time(large, 190, 512), sum(parameter.nbytes for parameter in large.parameters())
    assert 100 < rows < 512 and rows * 190 * 28 * 2 * 512 * 4 < CPU_SHARE * weights


MARKED, AT, COPIES, N_TOKENS = [14, 15, 16, 5, 17, 18], 3, 4, 12


def answers_to_vectors(model, common, layer=None, prompt=MARKED, ends=(20, 25, 30), **changes):
    """Answers to three vectors at the marker of one prompt, some of which end early."""
    vectors = 4 * torch.nn.functional.normalize(torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(3)))
    draws = torch.rand(3 * COPIES, N_TOKENS, generator=torch.Generator().manual_seed(4))

    def injected(rows, padding):
        return inject(model, vectors[rows], padding + AT, layer)

    settings = dict(ends=list(ends), pad=0, max_new_tokens=N_TOKENS, temperature=1.0, draws=draws, copies=COPIES)
    settings |= dict(intervene=injected, batches=[[1, 2], [0]], common=common) | changes
    return generate(model, [prompt] * 3, **settings)


@pytest.mark.parametrize("layer", [None, 1])
def test_a_prompt_read_once_has_the_answers_that_transformers_writes(any_model, layer) -> None:
    whole, once = (answers_to_vectors(any_model, common, layer) for common in (None, AT))
    assert whole.ended.any() and len(set(map(tuple, whole.rows()))) > 3, "without varied endings this test is void"
    assert once.rows() == whole.rows() and torch.equal(once.ended, whole.ended)
    greedy = [answers_to_vectors(any_model, common, layer, temperature=None).rows() for common in (None, AT)]
    assert greedy[0] == greedy[1]


def test_a_marker_that_ends_the_prompt_is_still_injected_when_the_prompt_is_read_once() -> None:
    model = make_model()
    whole, once = (answers_to_vectors(model, common, prompt=MARKED[: AT + 1]) for common in (None, AT))
    assert once.rows() == whole.rows()


def test_one_random_source_gives_the_answers_that_it_gives_with_transformers() -> None:
    model = make_model()
    whole, once = (
        answers_to_vectors(model, common, draws=None, generator=torch.Generator().manual_seed(7)).rows()
        for common in (None, AT)
    )
    assert once == whole


def test_tokens_of_a_shared_prompt_are_computed_once_and_those_after_an_end_not_at_all(monkeypatch) -> None:
    model, computed = make_model(), []
    assert attends_plainly(model)
    handle = model.model.layers[0].register_forward_hook(lambda module, args, out: computed.append(args[0].shape[:2]))
    written = answers_to_vectors(model, AT)
    handle.remove()
    first = [n * t for n, t in computed[:2]]
    assert first == [AT, 2 * (len(MARKED) - AT)], "the part before the marker once, the rest once for each vector"
    n_answers = sum(n for n, t in computed if t == 1)
    written_tokens = int(written.mask.sum())
    assert written_tokens - len(written.ids) <= n_answers < 1.3 * written_tokens
    assert model.config._attn_implementation == "sdpa"


def test_a_token_is_where_its_draw_lies_among_the_probabilities() -> None:
    logits = 3 * torch.randn(40, 1000, generator=torch.Generator().manual_seed(0))
    drawn = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    heights = logits.softmax(-1).double().cumsum(-1)
    expected = torch.searchsorted(heights, drawn[:, None] * heights[:, -1:], right=True)[:, 0]
    assert torch.equal(sampled(logits, None, drawn), expected)
    least, most = torch.zeros(40), torch.ones(40, dtype=torch.float64)
    assert (sampled(logits, None, least) == 0).all() and (sampled(logits, None, most) < 1000).all()
    with pytest.raises(NonFiniteError):
        sampled(logits.index_fill(1, torch.tensor([3]), torch.nan), None, drawn)


@pytest.mark.parametrize("common", [None, AT])
def test_a_watch_sees_every_token_of_each_answer_and_ends_those_that_it_names(common) -> None:
    model, whole = make_model(), answers_to_vectors(make_model(), common, ends=())
    seen: dict[int, list[list[int]]] = {number: [] for number in range(3 * COPIES)}

    def watch(numbers, answers):
        for number, ids in zip(numbers.tolist(), answers.tolist(), strict=True):
            seen[number].append(ids)
        return (numbers % 3 == 1) & torch.tensor([answers.shape[1] == 4])

    watched = answers_to_vectors(model, common, ends=(), watch=watch)
    cut = [row[:4] if number % 3 == 1 else row for number, row in enumerate(whole.rows())]
    assert watched.rows() == cut and not watched.ended.any()
    for number, row in enumerate(cut):
        assert [ids[: len(row)] for ids in seen[number]][: len(row)] == [row[:n] for n in range(1, len(row) + 1)]


@pytest.mark.parametrize("common", [None, AT])
def test_nothing_more_is_written_once_a_watch_has_ended_all(common) -> None:
    steps: list[int] = []

    def watch(numbers, answers):
        steps.append(answers.shape[1])
        return torch.full((len(numbers),), answers.shape[1] == 2)

    answers_to_vectors(make_model(), common, ends=(), watch=watch)
    assert steps == [1, 2, 1, 2]  # two batches
