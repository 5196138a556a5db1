"""Chat templates are programs from files: none takes more time, memory or characters than a template needs."""

from __future__ import annotations

import os
import resource
import threading
import time
from typing import Any

import pytest

from nla.errors import NLAError, TemplateError
from nla.text import templates
from nla.text.templates import render_template
from nla.text.tokens import render_prompt, undated
from nla.transcripts.messages import Message, Transcript
from nla.transcripts.rendering import render
from tests.helpers.tiny import make_tokenizer
from tests.hostile.watch import status_bytes

MESSAGES = [{"role": "user", "content": "the cat"}]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in [] %}{% endfor %}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
HOSTILE = {
    "loops": (LOOPS, "does not end"),
    "text without end": (
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
        "does not|MB",
    ),
    "a long text": ("{{ ('x' * 9000000000)|length }}", "MB"),
    "doubling": (DOUBLING, "MB"),
    "a wide text": ("{{ 'x'.center(9000000000) }}", "MB"),
    "a wide number": ("{{ '%0999999999d' % 1 }}", "MB"),
    "a long list": ("{{ (range(99999)|list * 99999)|length }}", "MB"),
    "a large number": ("{% set x = 99999 %}{{ (x ** x ** x) > 1 }}", "does not end|MB"),
    "characters": ("x" * 200_000, "of 200000 characters"),
    "many characters": ("{{ 'x' * 90000 }}" * 30, "writes 2700000 characters"),
}


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_takes_too_much_is_a_typed_error(name: str, tokenizer: Any) -> None:
    template, says = HOSTILE[name]
    started = time.thread_time()
    with pytest.raises(TemplateError, match=says) as caught:
        render_template(tokenizer, template, MESSAGES)
    assert time.thread_time() - started < 2 and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["a long text", "characters", "many characters"])
def test_prompts_and_transcripts_refuse_a_template_that_takes_too_much(name: str, tokenizer: Any) -> None:
    template, says = HOSTILE[name]
    tokenizer.chat_template = template
    with pytest.raises(TemplateError, match=says):
        render_prompt(tokenizer, "the cat")
    with pytest.raises(TemplateError, match=says):
        render(tokenizer, Transcript("one", (Message("user", "the cat"),)))


def test_a_template_that_is_slow_for_later_messages_alone_is_stopped(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% if messages|length > 1 %}" + LOOPS + "{% endif %}hello"
    assert render_template(tokenizer, template, MESSAGES) == "hello"
    monkeypatch.setattr(templates, "PATIENCE_S", 0.2)
    with pytest.raises(TemplateError, match="does not end"):
        render_template(tokenizer, template, MESSAGES * 2)
    assert render_template(tokenizer, template, MESSAGES) == "hello"


@pytest.mark.parametrize("others_work", [False, True])
def test_a_template_that_is_large_for_later_messages_alone_is_stopped(others_work: bool, tokenizer: Any) -> None:
    large = "{% set x = 'y' * 500000000 %}"
    template = "{% if messages|length > 1 %}" + large + f"{{% endif %}}{'good' if others_work else 'well'}"
    before, done = resource.getrlimit(resource.RLIMIT_AS), threading.Event()
    other = threading.Thread(target=done.wait)
    if others_work:
        other.start()
    try:
        text = render_template(tokenizer, template, MESSAGES)
        with pytest.raises(TemplateError, match="more than 300 MB for messages of"):
            render_template(tokenizer, template, MESSAGES * 2)
        assert render_template(tokenizer, template, MESSAGES) == text == template[-4:]
        assert resource.getrlimit(resource.RLIMIT_AS) == before
    finally:
        done.set()


def test_what_a_template_makes_when_it_is_compiled_counts(tokenizer: Any) -> None:
    template = "{% if messages|length > 9 %}{{ 'y' * 700000000 }}{% endif %}hello"
    before = status_bytes("VmData")
    assert render_template(tokenizer, template, MESSAGES) == "hello"
    assert status_bytes("VmData") - before < 400 << 20


def test_other_threads_may_take_memory_while_a_template_runs(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template, running, taken = "{{ messages[0]['content'] | upper }}", threading.Event(), threading.Event()
    assert render_template(tokenizer, template, MESSAGES) == "THE CAT"
    sizes: list[int] = []

    def take() -> None:
        running.wait(20)
        sizes.append(len(bytearray(500 << 20)))
        taken.set()

    rendered = tokenizer.apply_chat_template

    def slowly(*given: Any, **options: Any) -> str:
        if threading.current_thread() is threading.main_thread() and os.getpid() == here:
            running.set()
            taken.wait(20)
        return rendered(*given, **options)

    here = os.getpid()
    monkeypatch.setattr(tokenizer, "apply_chat_template", slowly)
    other = threading.Thread(target=take)
    other.start()
    assert render_template(tokenizer, template, MESSAGES) == "THE CAT"
    other.join()
    assert sizes == [500 << 20]


def test_a_template_that_takes_too_much_of_one_chat_is_tried_anew_with_the_next(tokenizer: Any) -> None:
    template = "{% if messages|length > 1 %}" + DOUBLING + "{% endif %}good day"
    with pytest.raises(TemplateError, match="MB"):
        render_template(tokenizer, template, MESSAGES * 2)
    assert render_template(tokenizer, template, MESSAGES) == "good day"


def test_what_a_template_may_take_grows_with_its_messages(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MEGABYTES", 20)
    content = "🙂" + "x" * 3_000_000  # four bytes a character
    template = "{% for m in messages %}{{ '<' ~ m['role'] ~ '>' ~ m['content'] | trim ~ '</>' }}{% endfor %}"
    text = render_template(tokenizer, template, [{"role": role, "content": content} for role in ("user", "assistant")])
    assert text == f"<user>{content}</><assistant>{content}</>"
    with pytest.raises(TemplateError, match="more than 20 MB for messages of 48 characters"):
        render_template(tokenizer, template + "{% set x = 'y' * 90000000 %}", MESSAGES)


def test_templates_are_tried_without_what_macos_lacks(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.waitid", raising=False)  # on macOS there from Python 3.13 on
    assert render_template(tokenizer, "{{ 'fine' }}", MESSAGES) == "fine"
    with pytest.raises(TemplateError, match="MB"):
        render_template(tokenizer, DOUBLING, MESSAGES)


@pytest.mark.parametrize(
    "template", ["{% if 1 %}" * 3000, "{{ (" * 3000, "{#" * 9000, "{{ raise_exception('no') }}", "{{"]
)
def test_what_a_template_raises_is_a_typed_error_of_the_prompt(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(NLAError, match="refuses a single user message"):
        render_prompt(tokenizer, "the cat")


def test_a_template_with_a_hundred_thousand_date_marks_is_read_at_once(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d') }}'" + "%a" * 45_000
    started = time.thread_time()
    assert undated(tokenizer).endswith(tokenizer.chat_template)
    assert time.thread_time() - started < 1


def test_the_text_is_that_of_transformers(tokenizer: Any) -> None:
    for options in ({"add_generation_prompt": True}, {}):
        expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **options)
        assert render_template(tokenizer, tokenizer.chat_template, MESSAGES, **options) == expected
