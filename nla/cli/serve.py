"""``nla serve``: pairs and an address in; a local page and an API until Ctrl-C."""

from __future__ import annotations

import importlib.util
import re
import socket
from typing import Annotated

import typer

from nla.cli.console import OK, load
from nla.cli.options import Device, pair_name, text
from nla.errors import ArgumentError, MissingExtraError

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    pair: Annotated[
        list[str] | None,
        typer.Option(
            "--pair", metavar="PAIR", show_default=False, help="Name, folder or hub id (default: couplets); repeatable."
        ),
    ] = None,
    target_adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--target-adapter", metavar="FOLDER", show_default=False, help="Requests may ask for it; repeatable."
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0: any that is free.")] = 8017,
    token: Annotated[
        str | None,
        text("--token", "TOKEN", "What requests must bring; needed for other addresses than this machine's."),
    ] = None,
    device: Device = None,
) -> int:
    r"""Open a local page on pairs, and an API to build on, until Ctrl-C.

    examples:
      nla serve                                   the embedded pair at http://127.0.0.1:8017
      nla serve --pair switchboard --target-adapter switchboard/goal
      nla serve --pair runs/mine/joint/pair --pair couplets --port 0
      nla serve --host 0.0.0.0 --token "$(openssl rand -hex 16)"

    Needs the extra: pip install 'nla[serve]'. The routes are in docs/serve.md, their schema is at /openapi.json.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        got = f"nla serve without the package {' and '.join(missing)}"
        raise MissingExtraError(got, "the extra 'serve'", "pip install 'nla[serve]'")
    from nla.serve.security import is_loopback

    if token is not None and re.fullmatch(r"[\w-]{8,256}", token, re.ASCII) is None:
        raise ArgumentError("this --token", "8 or more letters, digits, - and _", "make one: openssl rand -hex 16")
    if not is_loopback(host) and token is None:
        raise ArgumentError(
            f"--host {host} without --token",
            "a token, since other machines can reach this address",
            "add --token TOKEN, or leave --host out",
        )
    listener = _listen(host, port)
    names = [name for given in pair or ["couplets"] if (name := pair_name(given)) is not None]
    from nla.organisms import adapter_folder

    adapters = {name: folder for name in target_adapter or () if (folder := adapter_folder(name)) is not None}
    pairs = {name: load(name, device) for name in dict.fromkeys(names)}
    from nla.serve import app
    from nla.serve.engine import Engine

    engine = Engine(pairs, adapters)
    shown = f"[{host}]" if ":" in host else host
    ending = "" if token is None else f"?token={token}"
    print(f"nla: {', '.join(pairs)} at http://{shown}:{listener.getsockname()[1]}/{ending} until Ctrl-C", flush=True)
    app.serve(engine, listener, token)
    return OK


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens; made before anything heavy is loaded.

    Raises:
        ArgumentError: the address is not this machine's, or taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        got = f"--host {host} --port {port} ({error.strerror})"
        raise ArgumentError(got, "an address of this machine that is free", "give another --port, or 0") from error
    return listener
