"""A chat template and messages in, a text out: the template is a program from a file, and runs under limits.

Each template is tried in a process of its own first, which the system ends when it takes too much time or memory. After
that it runs here, and is stopped when it takes too long or too much. The limit of memory holds for all threads of a
process, so where others are at work each later run is tried apart first instead.

The process is a fork of this one, whatever its threads do: it renders in Python alone, without torch or the tokenizer's
own code, whose locks other threads could hold; no template is rendered here meanwhile, and it ends without clean-up.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nla.errors import TemplateError

MAX_CHARACTERS = 100_000
"""Of a template."""
MAX_ADDED = 1_000_000
"""Characters that a template may write beside four times those of the messages and tools."""
SECONDS, MEGABYTES = 1, 300
"""Of a template's first run, on the processor, and beyond what this process has; and beside what its messages need."""
CHARACTERS_PER_S, BYTES_PER_CHARACTER = 5_000_000, 64
"""What messages and tools need of both: of four bytes a character, sixteen copies."""
PATIENCE_S = 20.0
"""Of any run, on a clock."""
_passed: set[str] = set()
"""Templates whose first run took no more."""
_one_at_a_time = threading.Lock()


def render_template(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[dict[str, Any]], **options: Any
) -> str:
    """What a template makes of messages.

    Args:
        options: of transformers' ``apply_chat_template``.

    Raises:
        TemplateError: it takes more time, memory or characters than any template needs.
        Exception: whatever the template raises.
    """

    def render() -> str:
        text = tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False, **options)
        assert isinstance(text, str)  # tokenize=False
        return text

    if len(template) > MAX_CHARACTERS:
        raise _too_much(f"of {len(template)} characters")
    given = len(json.dumps([list(messages), options.get("tools")], ensure_ascii=False, default=str))
    with _one_at_a_time:
        alone = not any(not one.daemon for one in threading.enumerate() if one is not threading.current_thread())
        first = template not in _passed
        if first or not alone:
            _try_apart(render, given)
        # The first run here is held to it in any case: Jinja works constants out when it compiles, such as 'x' * 9**9.
        _passed.add(template)
        try:
            with _deadline(), _in_memory(given) if alone or first else contextlib.nullcontext():
                text = render()
        except TemplateError:
            _passed.discard(template)
            raise
    if len(text) > 4 * given + MAX_ADDED:
        raise _too_much(f"that writes {len(text)} characters for messages of {given}")
    return text


def _too_much(what: str) -> TemplateError:
    return TemplateError(
        f"a chat template {what}",
        f"one of at most {MAX_CHARACTERS} characters, which runs in {SECONDS} s and {MEGABYTES} MB beside its messages",
        "use the tokenizer as its makers published it, or another target",
    )


def _try_apart(render: Callable[[], str], given: int) -> None:
    """Refuse what a run in a copy of this process takes too much of, for messages of so many characters.

    Whether it raises is no matter: its own errors are those of the run that follows.
    """
    seconds = SECONDS + given // CHARACTERS_PER_S
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the threads, which are not copied
        pid = os.fork()
    if pid == 0:
        code = 0
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            with _in_memory(given):
                render()
        except TemplateError:
            code = 1
        except BaseException:
            pass
        finally:
            os._exit(code)
    ends = time.monotonic() + PATIENCE_S
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > ends:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    if os.WIFSIGNALED(ended[1]):
        raise _too_much(f"that does not end in {seconds} s for messages of {given} characters")
    if os.WEXITSTATUS(ended[1]):
        raise _too_large(given)


@contextlib.contextmanager
def _in_memory(given: int) -> Iterator[None]:
    """Hold this process to what it has and what a template needs for so many characters.

    Raises:
        TemplateError: the block takes more.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError, ValueError):  # only Linux says how much address space is in use
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + (_megabytes(given) << 20)
        if before[0] == resource.RLIM_INFINITY or limit < before[0]:
            resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    except MemoryError:
        raise _too_large(given) from None  # its frames hold what was made
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _megabytes(given: int) -> int:
    return MEGABYTES + (given * BYTES_PER_CHARACTER >> 20)


def _too_large(given: int) -> TemplateError:
    return _too_much(f"that takes more than {_megabytes(given)} MB for messages of {given} characters")


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    """Raise a TemplateError from the block's first call of a function after ``PATIENCE_S``."""
    if sys.getprofile() is not None:  # somebody measures this program
        yield
        return
    end = time.monotonic() + PATIENCE_S

    def check(*_: Any) -> None:
        if time.monotonic() > end:
            raise _too_much(f"that does not end in {PATIENCE_S:.0f} s")

    sys.setprofile(check)
    try:
        yield
    finally:
        sys.setprofile(None)
