"""One use of a file in a forked child under limits of time and memory: what came of it, in a word and a line."""

from __future__ import annotations

import json
import os
import resource
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nla.errors import NLAError

CPU_S, WALL_S = 2.0, 20.0
"""CPU time is what is judged: a busy machine makes no case fail. The wall clock ends what waits for ever."""
MOST_BYTES = 200 * 2**20
LONGEST_MESSAGE = 2_000
GOOD = ("refused", "loaded")


class Outcome(NamedTuple):
    """What came of one case."""

    word: str
    """One of ``GOOD``, or: crashed, wrong, wordy, hung, memory, killed."""

    detail: str
    """The error, and the line of ours that it went through last."""


def watched(use: Callable[[Path], None], path: Path, cpu_s: float = CPU_S) -> Outcome:
    """Run ``use(path)`` in a child. It is to raise an NLAError, or to return after its own checks (by ``assert``)."""
    allowed = MOST_BYTES + sum(file.lstat().st_blocks * 512 for file in path.rglob("*"))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        start = status_bytes("RssAnon")
        outcome = _limited(use, path, cpu_s)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start - status_bytes("RssFile")
        if grown > allowed:
            outcome = Outcome("memory", f"{grown / 2**20:.0f} MB; {outcome}")
        os.write(writer, json.dumps(outcome).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        hung = number in (signal.SIGPROF, signal.SIGALRM)
        return Outcome("hung" if hung else "killed", signal.Signals(number).name)
    return Outcome(*json.loads(said))


def _limited(use: Callable[[Path], None], path: Path, cpu_s: float) -> Outcome:
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, WALL_S)
    limit = status_bytes("VmData") + 8 * MOST_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    try:
        use(path)
    except NLAError as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        if any(isinstance(cause, MemoryError) for cause in causes):
            return Outcome("memory", f"MemoryError, then {type(error).__name__}: {str(error)[:200]}")
        word = "refused" if len(str(error)) <= LONGEST_MESSAGE else "wordy"
        return Outcome(word, f"{type(error).__name__}: {str(error)[:500]}")
    except AssertionError as error:
        if "/nla/" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            return Outcome("wrong", f"{error} {_last_line(error)}")
        return Outcome("crashed", f"AssertionError {_last_line(error)}")
    except BaseException as error:
        return Outcome("crashed", f"{type(error).__name__}: {str(error)[:200]} {_last_line(error)}")
    return Outcome("loaded", "")


def _last_line(error: BaseException) -> str:
    """The last line of the library that an error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/nla/" in frame.filename and "site-packages" not in frame.filename]
    frame = (ours or frames)[-1]
    return f"at {Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno} {frame.line}"


def status_bytes(name: str) -> int:
    """What the kernel says of this process's memory under a name such as "RssAnon"."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
