"""Shell commands as a user types them: a folder and a command go in, what it printed and its exit code come out.

`nla` and `python` are the installed ones, each in a process of its own. Those processes are forks of one server that
has imported PyTorch, transformers and PEFT already: a command takes its own time and not the seconds of those imports.
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

SCRIPTS = Path(sys.executable).parent
IMPORTED = (
    *("nla.train.run", "nla.train.fit.joint", "nla.cli.view", "nla.audit.from_files"),
    *("nla.eval.families.rhymes", "nla.eval.families.plants", "nla.eval.families.two_hop"),
    "nla.eval.families.instructions",
    *("nla.eval.readers.labelled_texts", "nla.eval.circuits.trace", "nla.eval.pair.fidelity"),
    *("sklearn.linear_model", "sklearn.model_selection", "sklearn.feature_extraction.text", "scipy.stats"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "pyarrow.parquet"),
)
"""What takes long to import, and is the same for all commands."""
CLIENT = """#!{python} -IS
import os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    words = "\\0".join([{name!r}, *sys.argv[1:]])
    variables = "\\0".join(f"{{key}}={{value}}" for key, value in os.environ.items())
    message = "\\1".join([os.getcwd(), words, variables]).encode("utf-8", "surrogateescape")
    socket.send_fds(server, [len(message).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(message)
    server.recv(4)
    answer = server.recv(1)
sys.exit(answer[0] if answer else 137)
"""


class Result(NamedTuple):
    """What a command left: its exit code, and what it printed."""

    code: int
    stdout: str
    stderr: str


class Started(NamedTuple):
    """A command that was started: its process, and the connection on which its exit code comes."""

    pid: int
    server: socket.socket

    def ended(self) -> int | None:
        """The exit code; -9 if it was killed, None while it runs."""
        try:
            answer = self.server.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        return answer[0] if answer else -signal.SIGKILL

    def kill(self) -> int:
        """End it at once, without a chance to tidy up; the exit code."""
        os.kill(self.pid, signal.SIGKILL)
        answer = self.server.recv(1)
        return answer[0] if answer else -signal.SIGKILL


class Shell:
    """Runs commands with bash, in a folder. Close it when done."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="shell")
        address = str(Path(self._folder.name) / "server")
        for name in ("nla", "python"):
            client = Path(self._folder.name) / name
            client.write_text(CLIENT.format(python=sys.executable, address=address, name=name))
            client.chmod(0o755)
        root = str(Path(__file__).parents[2])
        log = Path(self._folder.name) / "log"
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.shell", address],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n", log.read_text()

    def run(self, command: str, folder: Path, timeout_s: float = 280) -> Result:
        """Run a command, which may be anything that bash understands."""
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([self._folder.name, str(SCRIPTS), os.environ["PATH"]]),
            "COLUMNS": "200",
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout_s,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def start(self, words: list[str], folder: Path, log: Path) -> Started:
        """Start ``nla …`` or ``python …`` by itself, without bash; what it prints goes to ``log``."""
        server = socket.socket(socket.AF_UNIX)
        server.connect(str(Path(self._folder.name) / "server"))
        variables = "\0".join(f"{key}={value}" for key, value in os.environ.items())
        message = "\1".join([str(folder), "\0".join(words), variables]).encode("utf-8", "surrogateescape")
        with log.open("w") as file:
            files = [file.fileno()] * 3
            socket.send_fds(server, [len(message).to_bytes(8, "big")], files)
        server.sendall(message)
        return Started(int.from_bytes(server.recv(4), "big"), server)

    def close(self) -> None:
        """End the server and remove its folder."""
        self._server.kill()
        self._server.wait()
        if self._server.stdout is not None:
            self._server.stdout.close()
        self._folder.cleanup()


def in_two_processes(words: str) -> str:
    """The command that runs ``python WORDS`` as two processes of one run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = f"WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={port} CUDA_VISIBLE_DEVICES="
    first, second = (f"RANK={rank} LOCAL_RANK={rank} {common} python {words}" for rank in range(2))
    return f"{second} & {first}; wait $!"


def serve(address: str) -> None:
    """Do once what each process does first: heavy imports, some by loading a pair, and the list of trained documents.
    Then fork for each client.
    """
    import torch

    from nla import NLA
    from nla.cli import view
    from nla.eval import couplet_items

    for module in IMPORTED:
        importlib.import_module(module)
    torch.set_num_threads(1)
    pair = NLA.from_pretrained("couplets")
    view.token_view(pair.explain(pair.read("In spring\n", "last"), samples=1), "")
    couplet_items.trained_on()
    del pair
    gc.collect()
    gc.freeze()  # forks then share the memory, and do not look through it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for: their clients get the exit codes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        server.settimeout(5)
        print("ready", flush=True)
        parent = os.getppid()
        while os.getppid() == parent:  # it ends with the tests that started it, however they end
            try:
                client, _ = server.accept()
            except TimeoutError:
                continue
            client.settimeout(None)
            if os.fork() == 0:
                server.close()
                _answer(client)
            client.close()


def _answer(client: socket.socket) -> None:
    """In the child: become the command that the client asks for, and send its exit code."""
    import torch

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # A fork's first use of PyTorch's thread pool makes a new one, which several threads at once cannot.
    torch.set_num_threads(1)
    length, files, _, _ = socket.recv_fds(client, 8, 3)
    message = bytearray()
    while len(message) < int.from_bytes(length, "big"):
        message += client.recv(1 << 16)
    folder, words, variables = message.decode("utf-8", "surrogateescape").split("\1")
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, "r", encoding="utf-8")
    sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8") for n in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variable.split("=", 1) for variable in variables.split("\0"))
    client.sendall(os.getpid().to_bytes(4, "big"))
    code = _execute(words.split("\0"))
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            code = code or 141
    client.sendall(bytes([code % 256]))
    os._exit(0)


def _execute(words: list[str]) -> int:
    """Run ``nla …``, ``python FILE …`` or ``python -m MODULE …`` in this process; the exit code."""
    try:
        if words[0] == "nla":
            sys.argv = words
            runpy.run_path(str(SCRIPTS / "nla"), run_name="__main__")
        elif words[1] == "-m":
            sys.argv = words[2:]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words[1:]
            sys.path.insert(0, str(Path(words[1]).resolve().parent))
            runpy.run_path(words[1], run_name="__main__")
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
