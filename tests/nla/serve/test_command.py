"""`nla serve` as it is typed: it says where it is, answers there, and ends at Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra nla[serve]")

from tests.helpers.shell import Shell, Started

ROOT = Path(__file__).parents[3]
LONGEST_S = 120


def address(log: Path, server: Started) -> str:
    """Where a server says that it is."""
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:
        if match := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text()):
            return match[0]
        assert server.ended() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def test_it_prints_its_address_answers_and_ends_at_ctrl_c(shell: Shell, tmp_path: Path) -> None:
    log = tmp_path / "log"
    typed = "nla serve --pair couplets --host 127.0.0.1 --port 0 --token a-long-secret --device cpu"
    server = shell.start(typed.split(), tmp_path, log)
    try:
        (body,) = re.findall(r"-d '(.*?)'", (ROOT / "docs/serve.md").read_text("utf-8"))
        request = urllib.request.Request(
            address(log, server) + "explain",
            body.encode(),
            {"content-type": "application/json", "x-secret-key": "a-long-secret"},
        )
        with urllib.request.urlopen(request) as answer:
            (result,) = json.load(answer)["results"]
        assert "ends with" in result["description"]
        os.kill(server.pid, signal.SIGINT)
        deadline = time.monotonic() + LONGEST_S
        while (code := server.ended()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert code == 0 and "Traceback" not in log.read_text(), log.read_text()
    finally:
        if server.ended() is None:
            server.kill()
