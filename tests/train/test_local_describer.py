"""The local describer: answers that depend on nothing but weights, text and seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer

from nla.errors import ConfigError, ContextLengthError, DescriberError, TemplateError
from nla.train.describe_texts import describe_texts
from nla.train.describers import DescriberSettings, open_describer
from nla.train.description import Description, Question
from nla.train.local_describer import KeyedSampling, LocalDescriber, weights_print

PROMPTS = ["the cat sat", "a dog", "it is here and the red dog ran under the blue tree", "so", "the mat is blue"]


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    return make_model("qwen2", 3), make_tokenizer()


def opened(parts: tuple[Any, Any], **changes: Any) -> LocalDescriber:
    changes = {"max_tokens": 12, "concurrency": 4, **changes}
    found = open_describer(DescriberSettings(**changes), *parts)
    assert isinstance(found, LocalDescriber)
    return found


def never() -> bool:
    return False


def answers(one: LocalDescriber, prompts: list[str]) -> dict[str, str | None]:
    questions = (Question(i, prompt, "claims") for i, prompt in enumerate(prompts))
    return {prompts[reply.number]: reply.answer for reply in one.ask(questions, never)}


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_neither_batch_nor_order_changes_an_answer(parts: tuple[Any, Any], temperature: float | None) -> None:
    alone = answers(opened(parts, temperature=temperature, concurrency=1, tries=1), PROMPTS)
    assert len(set(alone.values())) > 2
    for size in (2, 5):
        together = answers(opened(parts, temperature=temperature, concurrency=size, tries=1), PROMPTS[::-1])
        assert together == alone


def test_greedy_answers_are_those_of_a_plain_loop(parts: tuple[Any, Any]) -> None:
    model, tokenizer = parts
    found = answers(opened(parts), PROMPTS)
    for prompt in PROMPTS:
        ids = tokenizer(f"<|user|>{prompt}<|end|><|assistant|><claims>", add_special_tokens=False)["input_ids"]
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 12:
                token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
                if token == tokenizer.eos_token_id:
                    break
                ids.append(token)
        assert found[prompt] == "<claims>" + tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_seeds_change_samples_and_leave_the_global_random_state(parts: tuple[Any, Any]) -> None:
    before = torch.get_rng_state()
    first, again, other = (answers(opened(parts, temperature=1.0, tries=1, seed=seed), PROMPTS) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


def test_keyed_sampling_draws_from_the_models_distribution() -> None:
    scores = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(4000, 4)
    processor = KeyedSampling([f"row {i}" for i in range(4000)], 0.7, torch.device("cpu"))
    drawn = processor(torch.zeros(4000, 1, dtype=torch.long), scores).argmax(dim=1)
    expected = torch.softmax(scores[0] / 0.7, dim=0)
    assert torch.allclose(drawn.bincount(minlength=4) / 4000, expected, atol=0.03)


def test_control_tokens_in_a_text_stay_text(parts: tuple[Any, Any]) -> None:
    _, tokenizer = parts
    ids = opened(parts)._ids("the cat<|end|><|assistant|> sat", "claims")
    control = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>", "<|assistant|>"])
    assert [token for token in ids if token in control] == control


class Scripted(LocalDescriber):
    """Whose answers have the form that a random model's never have, but for some."""

    def _answer(self, waiting: Any, ids: Any, attempt: int) -> None:
        super()._answer(waiting, ids, attempt)
        self.sizes.append(len(waiting))
        for question, reply in waiting:
            if attempt or "cat" not in question.prompt:
                reply.answer = f"<claims>It is about {len(question.prompt)}. The final token is a word.</claims>"
                reply.text, reply.problem = question.read(reply.answer)


def scripted(**changes: Any) -> Scripted:
    model = make_model("qwen2", 3)
    model.config.max_position_embeddings = 8192
    settings = DescriberSettings(**{"max_tokens": 4, "concurrency": 2, "failing_share": 0.5, **changes})
    one = Scripted(settings, model, make_tokenizer())
    one.sizes = []
    return one


def test_texts_are_described_from_end_to_end_free_of_charge(tmp_path: Path) -> None:
    one = scripted()
    found = describe_texts(["the dog", "a cat", "the dog", "it is"], one, tmp_path)
    assert found.texts[0] == found.texts[2] and found.texts[1] is None and found.texts[3]
    s = found.summary
    assert s.n_texts == 3 and s.cost == 0.0 and s.failed.total() == 1 and s.n_requests == 3 and one.sizes == [2, 1]
    assert s.estimate is not None and s.estimate.tokens_in + 3 * 9 >= s.tokens_in > 0
    again = scripted()
    assert describe_texts(["a cat", "the dog", "it is"], again, tmp_path).texts == [None, *found.texts[2:]]
    assert again.sizes == []


def test_a_sampled_answer_without_the_form_is_drawn_again(tmp_path: Path) -> None:
    one = scripted(temperature=1.0)
    found = describe_texts(["the dog", "a cat"], one, tmp_path)
    assert None not in found.texts and found.summary.retried.total() == 1 and found.summary.n_requests == 3


def test_an_answer_ends_at_its_closing_tag() -> None:
    model, tokenizer = make_model("qwen2", 3), make_tokenizer()
    script = tokenizer(" cat</text> dog dog dog dog", add_special_tokens=False)["input_ids"]
    steps = 0

    def write(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return torch.nn.functional.one_hot(torch.full(logits.shape[:-1], script[steps - 1]), logits.shape[-1]).float()

    model.lm_head.register_forward_hook(write)
    one = LocalDescriber(DescriberSettings(max_tokens=6), model, tokenizer)
    (reply,) = one.ask(iter([Question(0, "the cat", "text")]), never)
    assert reply.answer == "<text> cat</text>" and reply.tokens_out == steps == 2


def test_the_identity_tells_weights_and_sampling_apart(parts: tuple[Any, Any]) -> None:
    model = parts[0]
    same = make_model("qwen2", 3)
    assert weights_print(model) == weights_print(same) != weights_print(make_model("qwen2", 4))
    same.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
    assert weights_print(model) != weights_print(same)
    first = opened(parts).identity
    for changes in ({"temperature": 1.0}, {"temperature": 1.0, "seed": 1}, {"max_tokens": 5}):
        assert opened(parts, **changes).identity != first
    assert opened(parts, seed=5, concurrency=9).identity == first


def test_stopping_is_asked_for_between_batches(parts: tuple[Any, Any]) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    questions = (Question(i, prompt, "claims") for i, prompt in enumerate(PROMPTS))
    assert len(list(opened(parts, concurrency=2).ask(questions, stop))) == 4


def test_what_cannot_describe_is_refused(parts: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = make_model("qwen2", 3), make_tokenizer()
    with pytest.raises(DescriberError, match="pass model and tokenizer"):
        open_describer(DescriberSettings())
    with pytest.raises(ContextLengthError, match=r"describer\.max_chars"):
        describe_texts(["the cat sat on the mat"], opened(parts), tmp_path)
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(TemplateError):
        opened((model, tokenizer)).count("the cat")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="instruction-tuned"):
        opened((model, tokenizer))
    assert Description(None).problem == ""
