"""A chat template and messages in, a text out: the template is a program from a file, and runs in a process of its own.

Each process of ours has one such process, from its first template on; one that ended is replaced. It holds neither
PyTorch nor a tokenizer, gets and gives texts alone, and is held to the time and memory that a template needs. This
process is never limited, whatever its threads do.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jinja2

from nla.errors import TemplateError

if TYPE_CHECKING:  # the process that renders does without
    from transformers import PreTrainedTokenizerBase

MAX_CHARACTERS = 100_000
"""Of a template."""
MAX_ADDED = 1_000_000
"""Characters that a template may write beside four times those of the messages and tools."""
SECONDS, MEGABYTES = 1, 300
"""Of a run, on the processor, and beyond what its process has; and beside what its messages need."""
CHARACTERS_PER_S, BYTES_PER_CHARACTER = 500_000, 64
"""What messages and tools need of both: of four bytes a character, sixteen copies."""
PATIENCE_S, START_S = 20.0, 120.0
"""Of any run, and of the start of its process, on a clock."""
_SPARE_MB = 100
"""What a process may keep of its runs (compiled templates, and what they hold) before another takes its place."""


def render_template(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[dict[str, Any]], **options: Any
) -> str:
    """What a template makes of messages, as ``tokenizer.apply_chat_template`` would.

    Args:
        options: ``tools``, ``add_generation_prompt``, and what else the template is given by name.

    Raises:
        TemplateError: it takes more time, memory or characters than any template needs.
        jinja2.TemplateError: whatever the template raises.
    """
    if len(template) > MAX_CHARACTERS:
        raise _too_much(f"of {len(template)} characters")
    tools = options.pop("tools", None)
    written = [{key: value for key, value in one.items() if value is not None} for one in messages]
    chat = json.dumps([written, tools], ensure_ascii=False, default=str)
    given = len(chat)
    seconds, megabytes = SECONDS + given // CHARACTERS_PER_S, MEGABYTES + (given * BYTES_PER_CHARACTER >> 20)
    limits = {"seconds": seconds, "megabytes": megabytes, "characters": 4 * given + MAX_ADDED}
    names = {**tokenizer.special_tokens_map, **options}
    head = json.dumps([template, limits, names], ensure_ascii=False, default=str)
    outcome, text = _renderer.ask(f"[{head}, {chat}]")
    if outcome == "text":
        return text
    if outcome == "raised":
        raise jinja2.TemplateError(text)
    what = {
        "time": f"that does not end in {seconds} s for messages of {given} characters",
        "clock": f"that does not end in {PATIENCE_S:.0f} s",
        "memory": f"that takes more than {megabytes} MB for messages of {given} characters",
        "length": f"that writes {text} characters for messages of {given}",
        "died": f"that ends the process it runs in ({text})",
    }
    raise _too_much(what[outcome])


def _too_much(what: str) -> TemplateError:
    return TemplateError(
        f"a chat template {what}",
        f"one of at most {MAX_CHARACTERS} characters, which runs in {SECONDS} s and {MEGABYTES} MB beside its messages",
        "use the tokenizer as its makers published it, or another target",
    )


class _Renderer:
    """The process that renders, and this one's end of the way to it; for one thread at a time."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Have no process: in a fork of this one, the other's is not ours."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def ask(self, request: str) -> tuple[str, str]:
        """What became of a template's run, and its text or what else is to be said."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.stop()
                self._start()
            assert self._pipe is not None and self._process is not None
            is_last = True  # whatever comes: an answer that is not fetched would be taken for the next one's
            try:
                self._pipe.send_bytes(request.encode("utf-8", "surrogatepass"))
                if not self._pipe.poll(PATIENCE_S):
                    return "clock", ""
                outcome, more = self._pipe.recv_bytes().decode("utf-8", "surrogatepass").split("\n", 1)
                is_last = outcome.endswith("!")
                return outcome.removesuffix("!"), more
            except (EOFError, OSError):
                code = self._process.wait()
                return ("time", "") if code == -signal.SIGPROF else ("died", _ending(code))
            finally:
                if is_last:
                    self.stop()

    def _start(self) -> None:
        code = "import sys; sys.path[:] = sys.argv[2:]; from nla.text import templates; templates.serve(sys.argv[1])"
        try:
            self._pipe, theirs = Pipe()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", code, str(theirs.fileno()), *map(str, sys.path)],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for this process
                )
            if not self._pipe.poll(START_S):
                raise OSError(f"not in {START_S:.0f} s")
            self._pipe.recv_bytes()
        except (OSError, EOFError) as error:
            why = _ending(self._process.wait()) if isinstance(error, EOFError) and self._process else str(error)[:200]
            self.stop()
            raise TemplateError(
                f"a process for chat templates that does not start ({why})",
                "a chat template is rendered in a process of its own",
                "check that this machine has memory and processes left, and that transformers can be imported",
            ) from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._pipe = self._process = None

    def leave(self) -> None:
        """In a fork: close this end of the other's way."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.returncode = 0  # it is not ours to wait for
        self.forget()


def _ending(code: int) -> str:
    return f"code {code}" if code >= 0 else f"signal {-code}"


_renderer = _Renderer()
atexit.register(_renderer.stop)
os.register_at_fork(after_in_child=_renderer.leave)


def serve(descriptor: str) -> None:
    """In the process that renders: answer requests until the other end is closed."""
    pipe = Connection(int(descriptor))
    render = _render_jinja_template()
    most = (_address_space() or 0) + (_SPARE_MB << 20)
    pipe.send_bytes(b"ready")
    with contextlib.suppress(EOFError):
        while True:
            outcome, text = _run(render, pipe.recv_bytes().decode("utf-8", "surrogatepass"))
            last = "!" if (_address_space() or 0) > most else ""
            pipe.send_bytes(f"{outcome}{last}\n{text}".encode("utf-8", "surrogatepass"))


def _render_jinja_template() -> Callable[..., Any]:
    """transformers' function, without PyTorch and, if possible, without its list of models: in a third of the time."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None
    home = Path(spec.origin).parent
    for name, folder in (("transformers", home), ("transformers.utils", home / "utils")):
        sys.modules[name] = package = ModuleType(name)
        package.__path__ = [str(folder)]
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except (ImportError, AttributeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        from transformers.utils.chat_template_utils import render_jinja_template
    return render_jinja_template


def _run(render: Callable[..., Any], request: str) -> tuple[str, str]:
    """Render under limits: too much time ends the process, too much memory is an outcome."""
    (template, limits, names), (messages, tools) = json.loads(request)
    del request
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    used = _address_space()
    if used is not None:
        limit = used + (limits["megabytes"] << 20)
        hard = unlimited[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, limits["seconds"])
    try:
        text = render(conversations=[messages], tools=tools, chat_template=template, **names)[0][0]
        outcome = ("text", text) if len(text) <= limits["characters"] else ("length", str(len(text)))
    except MemoryError:
        outcome = "memory", ""
    except Exception as error:  # a template is a program: it may raise anything
        outcome = "raised", str(error)[:1000]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
    return outcome


def _address_space() -> int | None:
    """Bytes that this process has mapped; None where the system does not say (Linux does)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return None
