"""Chat templates are programs from files: none takes more time, memory or characters than a template needs."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import pytest

from nla.errors import NLAError, TemplateError
from nla.text import templates
from nla.text.templates import render_template
from nla.text.tokens import render_prompt, undated
from nla.transcripts.messages import Message, Transcript
from nla.transcripts.rendering import render
from tests.helpers.tiny import make_tokenizer

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


@pytest.mark.parametrize("large", [LOOPS, "{% set x = 'y' * 500000000 %}"], ids=["slow", "large"])
@pytest.mark.parametrize("others_work", [False, True])
def test_a_template_that_takes_too_much_for_later_messages_alone_is_stopped(
    large: str, others_work: bool, tokenizer: Any
) -> None:
    template, done = "{% if messages|length > 1 %}" + large + "{% endif %}hello", threading.Event()
    other = threading.Thread(target=done.wait)
    if others_work:
        other.start()
    try:
        assert render_template(tokenizer, template, MESSAGES) == "hello"
        with pytest.raises(TemplateError, match=r"does not end in 1 s for|more than 300 MB for messages of"):
            render_template(tokenizer, template, MESSAGES * 2)
        assert render_template(tokenizer, template, MESSAGES) == "hello"
    finally:
        done.set()


@pytest.mark.parametrize("where", ["in the main thread", "in a worker", "beside a daemon"])
def test_this_process_is_neither_limited_nor_copied(
    where: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError

    for name in ("resource.setrlimit", "signal.setitimer", "os.fork"):
        monkeypatch.setattr(name, refuse)
    done = threading.Event()
    if where == "beside a daemon":
        threading.Thread(target=done.wait, daemon=True).start()
    template = "{{ messages[0].content | upper }}" + where
    with ThreadPoolExecutor(1) as pool:
        run = (lambda task: pool.submit(task).result()) if where == "in a worker" else (lambda task: task())
        assert run(lambda: render_template(tokenizer, template, MESSAGES)) == f"THE CAT{where}"
        with pytest.raises(TemplateError, match="MB"):
            run(lambda: render_template(tokenizer, DOUBLING + where, MESSAGES))
    done.set()


def renderer() -> int:
    """The number of the process that renders."""
    process = templates._renderer._process
    assert process is not None
    return process.pid


def test_all_threads_share_one_process_and_each_gets_its_own_text(tokenizer: Any) -> None:
    template = "{{ messages[0].content }}"

    def one(number: int) -> tuple[str, int]:
        return render_template(tokenizer, template, [{"role": "user", "content": f"{number}"}]), renderer()

    before = one(0)[1]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(60))) == [(str(number), before) for number in range(60)]


def test_a_fork_of_this_process_renders_by_itself(tokenizer: Any) -> None:
    template, here = "{{ messages[0].content }}", []
    assert render_template(tokenizer, template, MESSAGES) == "the cat"
    ours = renderer()
    with templates._renderer._lock, warnings.catch_warnings():  # as if another thread were at it
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if child == 0:
            try:
                texts = [render_template(tokenizer, template, [{"role": "user", "content": f"c{n}"}]) for n in range(9)]
                os._exit(0 if texts == [f"c{n}" for n in range(9)] and renderer() != ours else 1)
            finally:
                os._exit(2)
    for number in range(9):
        here.append(render_template(tokenizer, template, [{"role": "user", "content": f"p{number}"}]))
    assert os.waitpid(child, 0)[1] == 0
    assert here == [f"p{n}" for n in range(9)] and renderer() == ours


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_has_ended_or_hangs_is_replaced(
    how: signal.Signals, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ messages[0].content }}"
    assert render_template(tokenizer, template, MESSAGES) == "the cat"
    os.kill(before := renderer(), how)
    if how == signal.SIGSTOP:
        with monkeypatch.context() as patch, pytest.raises(TemplateError, match="does not end in 0 s"):
            patch.setattr(templates, "PATIENCE_S", 0.1)
            render_template(tokenizer, template, MESSAGES)
    else:
        os.waitid(os.P_PID, before, os.WEXITED | os.WNOWAIT)
    assert render_template(tokenizer, template, MESSAGES) == "the cat"
    assert renderer() != before


def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ messages[0].content }}"
    assert render_template(tokenizer, template, MESSAGES) == "the cat"

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Connection, "poll", interrupt)
        render_template(tokenizer, template, [{"role": "user", "content": "a dog"}])
    assert render_template(tokenizer, template, MESSAGES) == "the cat"


def test_a_process_that_keeps_much_of_what_templates_made_is_replaced(tokenizer: Any) -> None:
    assert render_template(tokenizer, "hello", MESSAGES) == "hello"
    before = renderer()
    for letter in "xyz":  # the texts are worked out, and kept, when the templates are compiled
        template = f"{{% if messages|length > 9 %}}{{{{ '{letter}' * 50000000 }}}}{{% endif %}}hello"
        assert render_template(tokenizer, template, MESSAGES) == "hello"
    assert render_template(tokenizer, "hello", MESSAGES) == "hello" and renderer() != before


def test_without_a_process_no_template_is_rendered(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    templates._renderer.stop()
    for python in ("/bin/false", "/nowhere/python"):
        monkeypatch.setattr("sys.executable", python)
        with pytest.raises(TemplateError, match=r"does not start \((code 1|.*No such file)"):
            render_template(tokenizer, "hello", MESSAGES)
    monkeypatch.undo()
    assert render_template(tokenizer, "hello", MESSAGES) == "hello"


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


ODD = [
    {"role": "system", "content": None, "name": 'a "quote"'},
    {"role": "user", "content": "line\u2028 separator, half a character \ud800, 🙂, \x00\r\n", "n": 1e-7, "big": 2**70},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, None, 0.1]}}}],
    },
]
WHOLE = (
    "{{ bos_token }}{{ messages }}{{ messages[1] | tojson }}{{ tools }}{{ enable_thinking is defined }}{{ pad_token }}"
)


def test_the_text_is_that_of_transformers(tokenizer: Any) -> None:
    for options in ({"add_generation_prompt": True}, {}):
        expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **options)
        assert render_template(tokenizer, tokenizer.chat_template, MESSAGES, **options) == expected
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for options in ({"tools": tools, "enable_thinking": False}, {"add_generation_prompt": True}, {"tools": None}):
        expected = tokenizer.apply_chat_template(ODD, chat_template=WHOLE, tokenize=False, **options)
        assert render_template(tokenizer, WHOLE, ODD, **options) == expected
