"""Writing: how answers end."""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, StoppingCriteria

from nla.models.generate import CPU_BYTES, CPU_SHARE, generate, rows_at_a_time
from tests.helpers.tiny import make_model

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
