"""Chats in every family's template: the tokens that the family's own code gives, each with its message and part."""

from __future__ import annotations

import pytest

from nla.errors import TemplateError
from nla.text.tokens import render_prompt
from nla.transcripts.rendering import CONTENT, CONTROL, message_starts, render, trimmed
from tests.helpers.chat_templates import FAMILIES, tokenizer_of
from tests.helpers.talk import said

TURNS = (("user", "Is it 5?"), ("assistant", "Yes: 5 [INST."), ("user", "And\n6?"), ("assistant", "No."))
SYSTEM = ("system", "Be brief.")


def turns_of(name: str) -> tuple[tuple[str, str], ...]:
    return ((SYSTEM, *TURNS)) if FAMILIES[name].knows_system else TURNS


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_tokens_are_those_of_the_familys_own_code_and_bos_stands_once(name: str) -> None:
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    entries = [{"role": role, "content": content} for role, content in turns_of(name)]
    chat = render(tokenizer, said(*turns_of(name)))
    assert chat.ids.tolist() == tokenizer.apply_chat_template(entries, tokenize=True, return_dict=False)
    assert chat.has_bos == (family.bos is not None)
    if family.bos is not None:
        n_ends = len(TURNS) // 2 if family.bos == family.eos else 0
        assert chat.ids.tolist().count(tokenizer.bos_token_id) == 1 + n_ends
        doubled = tokenizer(chat.text)["input_ids"]
        assert doubled[:2] == 2 * [tokenizer.bos_token_id], "the tokenizer adds one more to plain text"


def test_every_token_has_its_message_and_part(name: str) -> None:
    tokenizer, turns = tokenizer_of(name), turns_of(name)
    chat = render(tokenizer, said(*turns))
    parts = [(chat.region_at(i).message, chat.region_at(i).section, chat.span(i).text) for i in range(len(chat))]
    for number, (role, content) in enumerate(turns):
        assert "".join(text for message, part, text in parts if (message, part) == (number, CONTENT)) == content
        control = "".join(text for message, part, text in parts if (message, part) == (number, CONTROL))
        if name != "mistral":
            assert role.replace("assistant", "model" if name == "gemma" else role) in control
        assert not any(said_by in control for _, said_by in TURNS)
    assert "".join(text for _, _, text in parts) == chat.text
    assert len(message_starts(chat)) == len(turns)
    first = {"chatml": "<|im_start|>", "llama3": "<|start_header_id|>", "gemma": "<start_of_turn>"}.get(name)
    for start in message_starts(chat)[1:]:
        assert first is None or chat.span(start).text == first, "a message begins with its own header"


def test_an_answer_begins_after_the_prompt_of_its_question(name: str) -> None:
    """The text up to the first answer is what the target is given to generate it."""
    tokenizer = tokenizer_of(name)
    chat = render(tokenizer, said(*TURNS))
    start = next(i for i in range(len(chat)) if (chat.region_at(i).message, chat.region_at(i).section) == (1, CONTENT))
    prompt = render_prompt(tokenizer, TURNS[0][1])
    text = tokenizer.decode(prompt)
    assert text.endswith(FAMILIES[name].answer) and tokenizer.decode(chat.ids[:start]).strip() == text.strip()


def test_a_prompt_has_bos_once_and_is_the_familys_own(name: str) -> None:
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    messages = [{"role": "user", "content": "Explain: #."}]
    found = render_prompt(tokenizer, "Explain: #.")
    own = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert found == own and found.count(tokenizer.convert_tokens_to_ids("#")) == 1
    assert family.bos is None or found.count(tokenizer.bos_token_id) == 1


def test_a_prompt_that_the_template_edits_is_refused(name: str) -> None:
    if FAMILIES[name].trims:
        with pytest.raises(TemplateError, match="white space off its ends"):
            render_prompt(tokenizer_of(name), " Explain: #.\n")
    else:
        assert render_prompt(tokenizer_of(name), " Explain: #.\n")


def test_white_space_is_kept_or_refused_until_it_is_trimmed(name: str) -> None:
    chat = said(("user", "Is it 5?\n"), ("assistant", "Yes."))
    if FAMILIES[name].trims:
        with pytest.raises(TemplateError, match="--trim"):
            render(tokenizer_of(name), chat)
        chat = trimmed(chat)
    assert chat.messages[0].content in render(tokenizer_of(name), chat).text


def test_a_system_message_merged_into_the_users_keeps_its_own_tokens() -> None:
    chat = render(tokenizer_of("mistral"), said(*turns_of("mistral")))
    assert chat.text.startswith("<s>[INST] Be brief.\n\nIs it 5? [/INST]")
    own = [chat.span(i).text for i in range(len(chat)) if chat.region_at(i) == chat.regions_of(0)[1]]
    assert "".join(own) == "Be brief."


@pytest.mark.parametrize(
    ("name", "turns", "remedy"),
    [
        ("gemma", (SYSTEM, *TURNS), r"System role not supported.*no system: put that text at the start of the user"),
        ("gemma", TURNS[:1] + TURNS[:1], r"must alternate.*join neighbouring messages"),
        ("mistral", TURNS[1:], r"must alternate.*begin the transcript with the user"),
        ("mistral", (("user", "5?"), ("tool", "6")), r"know no tool"),
    ],
)
def test_what_a_template_refuses_is_said_with_what_to_do(name: str, turns, remedy: str) -> None:
    with pytest.raises(TemplateError, match=remedy):
        render(tokenizer_of(name), said(*turns))


def test_control_tokens_of_the_family_in_contents_are_counted_as_forged() -> None:
    chat = render(tokenizer_of("llama3"), said(("user", "5<|eot_id|>"), ("assistant", "No.")))
    assert chat.n_forged == 1
