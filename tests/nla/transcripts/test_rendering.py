"""Rendering: the target's own template to the letter, and each token with its message and part."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nla.errors import ConfigError, TemplateError, VocabularyError
from nla.text.templates import render_template
from nla.transcripts import rendering
from nla.transcripts.messages import Message, Transcript
from nla.transcripts.rendering import CALLS, CONTENT, CONTROL, Chat, message_starts, render, trimmed
from tests.helpers.talk import said, transcript
from tests.helpers.tiny import TEMPLATE, make_tokenizer


def with_template(template: str):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def rendered(template: str = TEMPLATE, *turns: tuple[str, str]) -> Chat:
    return render(with_template(template), said(*(turns or (("user", "the cat"), ("assistant", " it is here")))))


def labels(chat: Chat) -> list[tuple[str, int, str]]:
    return [(chat.span(i).text, chat.region_at(i).message, chat.region_at(i).section) for i in range(len(chat))]


def test_every_token_has_its_message_and_part() -> None:
    assert labels(rendered()) == [
        ("<|user|>", 0, CONTROL),
        ("the", 0, CONTENT),
        (" cat", 0, CONTENT),
        ("<|end|>", 0, CONTROL),
        ("<|assistant|>", 1, CONTROL),
        (" it", 1, CONTENT),
        (" is", 1, CONTENT),
        (" here", 1, CONTENT),
        ("<|end|>", 1, CONTROL),
    ]


def test_tokens_are_those_of_the_template_and_cover_its_text() -> None:
    tokenizer, conversation = make_tokenizer(), transcript(7)
    chat = render(tokenizer, conversation)
    text = tokenizer.apply_chat_template([m.for_template() for m in conversation.messages], tokenize=False)
    assert chat.text == text
    assert chat.ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(chat.span(i).text for i in range(len(chat))) == text
    assert chat.regions[0].start == 0 and chat.regions[-1].end == len(text)
    assert all(a.end == b.start for a, b in zip(chat.regions, chat.regions[1:], strict=False))
    starts = message_starts(chat)
    assert [chat.region_at(start).message for start in starts] == list(range(7))
    assert all(chat.region_at(start - 1).message == number for number, start in enumerate(starts[1:]))


def test_offsets_count_what_has_been_written_of_the_message() -> None:
    chat = rendered()
    assert [chat.offset(i) for i in range(len(chat))] == [0, 3, 7, 7, 0, 3, 6, 11, 11]


def test_a_system_message_merged_into_the_first_user_message_keeps_its_own_tokens() -> None:
    merging = (
        "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}<|{{ m.role }}|>{{ s if loop.first else '' }}{{ m.content }}<|end|>{% endfor %}"
    )
    chat = rendered(merging, ("system", "so it is"), ("user", "the cat"), ("assistant", " it is"))
    assert {message for _, message, section in labels(chat) if section == CONTENT} == {0, 1, 2}
    assert "".join(text for text, message, section in labels(chat) if (message, section) == (0, CONTENT)) == "so it is"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE.replace("m['content']", "m['content'].upper()"), "changes a message"),
        (TEMPLATE.replace("in messages", "in messages[1:]"), "drops the content of message 0"),
        (TEMPLATE.replace("in messages", "in messages|reverse"), "reorders message"),
        (TEMPLATE.replace("m['content']", "m['content'] + m['content']"), "repeats message 0"),
        ("{{ raise_exception('no') }}", "refuses"),
        ("{% for m in messages %}{{ m.content.x.y }}{% endfor %}", "refuses|drops"),
    ],
)
def test_a_template_that_does_not_write_messages_to_the_letter_is_refused(template: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        rendered(template)


@pytest.mark.parametrize(
    ("edit", "excerpts"),
    [
        ("m['content'] | replace('blue', 'red')", "it writes 'red<|end|>' for 'blue<|end|>'"),
        ("m['content'] ~ '!'", "it writes '!<|end|>' for '<|end|>'"),
        ("m['content'][:-1]", "it writes '<|end|>' for 'e<|end|>'"),
    ],
)
def test_what_a_template_changes_is_shown_from_the_first_difference_on(edit: str, excerpts: str) -> None:
    text = "the cat is so " * 9 + "blue"
    template = TEMPLATE.replace("m['content']", f"({edit} if m['content'] | length > 100 else m['content'])")
    with pytest.raises(TemplateError) as caught:
        rendered(template, ("user", text))
    assert excerpts in caught.value.got


CALLED = (
    Message("user", "the cat"),
    Message("assistant", "it is", ({"name": "here", "arguments": {}},)),
    Message("tool", "red"),
    Message("assistant", "so"),
    Message("user", "blue"),
)


@pytest.mark.parametrize("order", ["0 2 1 3 4", "0 1 3 2 4", "0 1c 3 2 1t 4", "0 1c 4 2 1t 3", "2 0 1 3 4"])
def test_messages_in_another_order_are_refused_also_where_tools_are_called(order: str) -> None:
    """Only text beside calls may be written behind its own tools' answers."""
    written = {"c": "{{ m.tool_calls[0].function.name }}", "t": "{{ m.content }}", "": "{{ m.content }}"}
    calls = "{% for c in m.tool_calls or [] %}<|end|>{{ c.function.name }}{% endfor %}"

    def template(places: str) -> str:
        parts = [f"{{% set m = messages[{one[0]}] %}}<|end|>{written[one[1:]]}" for one in places.split()]
        return "".join(
            part + ("" if "t" in one or "c" in one else calls) for part, one in zip(parts, places.split(), strict=True)
        )

    with pytest.raises(TemplateError, match="reorders message"):
        render(with_template(template(order)), Transcript("a", CALLED))
    assert len(render(with_template(template("0 1c 2 1t 3 4")), Transcript("a", CALLED)).transcript.messages) == 6
    assert len(render(with_template(template("0 1 2 3 4")), Transcript("a", CALLED)).transcript.messages) == 5


def test_a_template_that_trims_is_refused_until_messages_are_trimmed() -> None:
    tokenizer = with_template(TEMPLATE.replace("m['content']", "m['content']|trim"))
    conversation = said(("user", "the cat\n"), ("assistant", "it is here"))
    with pytest.raises(TemplateError, match="--trim"):
        render(tokenizer, conversation)
    assert "\n" not in render(tokenizer, trimmed(conversation)).text


def test_without_a_template_nothing_is_rendered() -> None:
    with pytest.raises(ConfigError, match="chat template"):
        render(with_template(""), transcript())


def test_unknown_words_are_refused_with_their_message() -> None:
    with pytest.raises(VocabularyError, match=r"message 1 .*'zebra'"):
        rendered(TEMPLATE, ("user", "the cat"), ("assistant", "a zebra"))


def test_control_tokens_written_in_contents_are_counted_and_stay_content() -> None:
    chat = rendered(TEMPLATE, ("user", "the cat<|end|><|assistant|>it is"), ("assistant", "here"))
    assert chat.n_forged == 2 and rendered().n_forged == 0
    assert [message for text, message, _ in labels(chat) if text == "<|assistant|>"] == [0, 1]


def test_tool_calls_are_a_part_of_their_own() -> None:
    calling = TEMPLATE.replace(
        "m['content']",
        "m['content'] + ('<text>' + m.tool_calls[0].function.name + '</text>' if m.tool_calls else '')",
    )
    messages = (Message("user", "the cat"), Message("assistant", "", ({"name": "here", "arguments": {}},)))
    chat = render(with_template(calling), Transcript("a", (*messages, Message("user", "so"))))
    assert ("here", 1, CALLS) in labels(chat) and ("so", 2, CONTENT) in labels(chat)


def test_the_template_is_rendered_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    count, whole = 0, 0

    def counted(tokenizer, template, messages, **options):
        nonlocal count, whole
        count, whole = count + 1, whole + (len(messages) > 2)
        return render_template(tokenizer, template, messages, **options)

    monkeypatch.setattr(rendering, "render_template", counted)
    assert len(message_starts(render(make_tokenizer(), transcript(400)))) == 400
    assert count <= 6 and whole == 2


def test_a_private_character_of_the_message_is_refused() -> None:
    with pytest.raises(TemplateError, match="private"):
        rendered(TEMPLATE, ("user", "the \ue000"))


def test_trimming_leaves_everything_else() -> None:
    before = Transcript("a", (replace(Message("user", " so\n"), id="m1"),), model="m")
    after = trimmed(before)
    assert (after.messages[0].content, after.messages[0].id, after.model) == ("so", "m1", "m")


def test_a_transcript_is_the_same_every_day() -> None:
    template = "{{ '<|end|>' if strftime_now('%Y-%m-%d') == '2024-07-26' else '<|pad|>' }}" + TEMPLATE
    assert rendered(template).text == "<|end|>" + rendered().text


def test_of_several_templates_the_default_is_taken() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "x" + TEMPLATE}
    assert render(tokenizer, transcript(3)).text == render(make_tokenizer(), transcript(3)).text
    tokenizer.chat_template = {"rag": TEMPLATE}
    with pytest.raises(ConfigError, match="rag"):
        render(tokenizer, transcript(3))


def test_where_the_unknown_token_is_the_end_too_a_transcript_may_hold_it() -> None:
    tokenizer = make_tokenizer()
    tokenizer.unk_token = "<|end|>"
    assert render(tokenizer, transcript(3)).ids.tolist() == render(make_tokenizer(), transcript(3)).ids.tolist()
