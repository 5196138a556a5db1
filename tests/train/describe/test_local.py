"""The local describer: answers that depend on nothing but weights, text and seed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from nla.errors import ArgumentError, ConfigError, ContextLengthError, DescriberError, TemplateError
from nla.models import load as target
from nla.text.templates import render_template
from nla.train.describe import local
from nla.train.describe.cache import TextCache
from nla.train.describe.describer import DescriberSettings
from nla.train.describe.local import KeyedSampling, LocalDescriber, weights_print
from nla.train.describe.prompt import Description, Question
from nla.train.describe.texts import describe_texts, open_describer
from tests.helpers.tiny import TEMPLATE, make_model, make_tokenizer

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


class Recording(LocalDescriber):
    """Remembers the batches that it was given."""

    def _answer(self, waiting: Any, ids: Any, attempt: int) -> None:
        batch = attempt, *(question.prompt for question, _ in waiting)
        self.batches = [*getattr(self, "batches", []), batch]
        super()._answer(waiting, ids, attempt)


def coarse(**changes: Any) -> Recording:
    """One in bfloat16, where a row's numbers follow from the other rows of its batch."""
    config = make_model("qwen2", 3).config
    config.max_position_embeddings, config.hidden_size = 8192, 128
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).bfloat16().eval()
    return Recording(DescriberSettings(**{"max_tokens": 14, "concurrency": 2, **changes}), model, make_tokenizer())


def kept(folder: Path) -> dict[str, str]:
    """Every answer on disk by its key."""
    with TextCache(folder) as cache:
        return dict(cache._file.execute("SELECT key, answer FROM answers"))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_in_bfloat16_a_killed_run_ends_with_the_answers_of_one_that_was_not(
    temperature: float | None, tmp_path: Path
) -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(PROMPTS, k=draw.randint(1, 9))) for _ in range(10)]
    changes = {"temperature": temperature, "tries": 2}
    first, again = coarse(**changes), coarse(**changes)
    describe_texts(texts, first, tmp_path / "whole", n_all=1000)
    whole = kept(tmp_path / "whole")
    describe_texts(texts, coarse(**changes, concurrency=3), tmp_path / "other", n_all=1000)
    assert len(whole) == 10 and not set(whole) & set(kept(tmp_path / "other"))  # another size is another describer

    class Kill(Exception):
        pass

    n_given = 0

    def die(summary: Any) -> None:
        nonlocal n_given
        n_given += 1
        if n_given == 3:
            raise Kill

    with pytest.raises(Kill):
        describe_texts(texts, coarse(**changes), tmp_path / "killed", n_all=1000, progress=die)
    assert len(kept(tmp_path / "killed")) == 3
    found = describe_texts(texts[::-1], again, tmp_path / "killed", n_all=1000)
    assert kept(tmp_path / "killed") == whole and set(again.batches) <= set(first.batches)
    assert len(again.batches) == len(first.batches) - (0 if temperature else 1)
    s = found.summary
    assert s.n_texts == 10 == s.failed.total() + s.n_answered + s.n_cached and s.n_open == 0
    assert s.estimate is not None and s.estimate.n_texts == (10 if temperature else 8)


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


def test_the_chat_template_is_rendered_once(parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    n_rendered = 0

    def counted(*given: Any, **how: Any) -> Any:
        nonlocal n_rendered
        n_rendered += 1
        return render_template(*given, **how)

    expected = answers(opened(parts), PROMPTS)
    monkeypatch.setattr(local, "render_template", counted)
    one = opened((parts[0], make_tokenizer()))
    assert answers(one, PROMPTS) == expected and one.count("a dog") > 3 and n_rendered == 1


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
    same.model.layers[2].mlp.up_proj.weight.data[-1, -1] += 1
    assert weights_print(model) != weights_print(same)
    first = opened(parts).identity
    for changes in ({"temperature": 1.0}, {"temperature": 1.0, "seed": 1}, {"max_tokens": 5}):
        assert opened(parts, **changes).identity != first
    assert opened(parts, seed=5, concurrency=9).identity == first
    assert coarse().identity != coarse(concurrency=3).identity


def test_stopping_is_asked_for_between_batches(parts: tuple[Any, Any]) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    questions = (Question(i, prompt, "claims") for i, prompt in enumerate(PROMPTS))
    assert len(list(opened(parts, concurrency=2).ask(questions, stop))) == 4


def test_a_model_of_its_own_is_loaded_as_the_settings_and_the_recipe_say(
    parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def load(source: str, **how: Any) -> tuple[Any, Any]:
        asked.append((source, how))
        return parts

    monkeypatch.setattr(target, "load_target", load)
    open_describer(DescriberSettings(model="a/b"), dtype="bfloat16", device="cpu")
    own = DescriberSettings(model="a/b", dtype="float16", revision="v1", quantization="4bit", parameters_b=7.6)
    open_describer(own, dtype="bfloat16")
    as_recipe = {"revision": None, "dtype": "bfloat16", "device": "cpu", "quantization": None}
    as_said = {"revision": "v1", "dtype": "float16", "device": None, "quantization": "4bit"}
    assert asked == [("a/b", as_recipe), ("a/b", as_said)]
    for changes in (
        {"dtype": "bfloat16"},
        {"revision": "v1"},
        {"quantization": "4bit"},
        {"parameters_b": 7.0},
        {"model": "a/b", "dtype": "int4"},
        {"model": "a/b", "quantization": "2bit"},
        {"model": "a/b", "parameters_b": 0.0},
        {"describer": "openai", "model": "m", "dtype": "bfloat16"},
    ):
        with pytest.raises(ArgumentError, match=r"describer\."):
            DescriberSettings(**changes)


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


def test_a_prompt_is_the_same_every_day_and_the_models_own_settings_do_not_count() -> None:
    one, other, tokenizer = coarse(), coarse(), make_tokenizer()
    tokenizer.chat_template = "{{ '<|end|>' if strftime_now('%Y') == '2024' else '' }}" + TEMPLATE
    assert LocalDescriber(one.settings, one.model, tokenizer).count("the cat") == one.count("the cat") + 1
    other.model.generation_config.update(suppress_tokens=list(range(11, 40)), min_new_tokens=14)
    assert answers(other, PROMPTS) == answers(one, PROMPTS)
