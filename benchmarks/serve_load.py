"""How `nla serve` holds a crowd: throughput and waiting times with batches and without, and memory over many requests.

    python benchmarks/serve_load.py [--clients 100] [--requests 10] [--long 10000]

A server of Couplets runs in a process of its own; clients ask for the explanation of one token, each time with another
seed, so that no cache answers. Every answer is held against a direct call. It needs the extra `serve` and httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import httpx  # pyright: ignore[reportMissingImports]
import psutil

PLACES, WAIT_S, SAMPLES = 256, 600.0, 4
TEXTS = [
    f"In {season} {name} left a {colour} ribbon near the {word},\n"
    for season in ("spring", "winter")
    for name in ("Anna", "Clara")
    for colour in ("red", "blue", "green")
    for word in ("rat", "hat")
]


def serve(max_together: int) -> None:
    """Serve until it is ended; the port is the first line that is printed."""
    import torch

    from nla import NLA
    from nla.serve import app
    from nla.serve.engine import Engine

    listener = socket.create_server(("127.0.0.1", 0))
    engine = Engine({"couplets": NLA.from_pretrained("couplets", device="cpu")}, None, PLACES, max_together)
    print(listener.getsockname()[1], torch.get_num_threads(), flush=True)
    app.serve(engine, listener)


@dataclass
class Measured:
    """What a crowd saw."""

    seconds: list[float]
    """Of each request."""
    total_s: float
    answers: dict[tuple[str, int], list[str]]
    """By text and seed."""

    def line(self, name: str) -> str:
        ordered = sorted(self.seconds)
        p50, p95 = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95))
        rate = len(ordered) / self.total_s
        return f"{name:<20}{rate:>8.1f} requests/s   p50 {p50:.3f} s   p95 {p95:.3f} s   n {len(ordered)}"


async def crowd(port: int, n_clients: int, n_requests: int, first_seed: int) -> Measured:
    """Clients that each ask one thing after the other."""
    measured = Measured([], 0.0, {})
    limits = httpx.Limits(max_connections=n_clients)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S, limits=limits) as http:

        async def client(number: int) -> None:
            for i in range(n_requests):
                text, seed = TEXTS[(number + i) % len(TEXTS)], first_seed + number * n_requests + i
                began = time.perf_counter()
                body = {"text": text, "positions": [-1], "samples": SAMPLES, "seed": seed}
                answer = await http.post("/explain", json=body)
                answer.raise_for_status()
                measured.seconds.append(time.perf_counter() - began)
                (result,) = answer.json()["results"]
                measured.answers[text, seed] = [sample["text"] for sample in result["samples"]]

        began = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(n_clients)))
        measured.total_s = time.perf_counter() - began
    return measured


@functools.cache
def directly() -> tuple[Any, dict[str, Any]]:
    """The pair, to be called directly, and what it reads of the texts."""
    from nla import NLA

    pair = NLA.from_pretrained("couplets", device="cpu")
    return pair, {text: pair.read(text, "last") for text in TEXTS}


def check(answers: dict[tuple[str, int], list[str]]) -> int:
    """How many answers are not those of direct calls."""
    pair, acts = directly()
    return sum(
        pair.explain(acts[text], SAMPLES, seed=seed)[0].texts != texts for (text, seed), texts in answers.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--requests", type=int, default=10, help="of each client")
    parser.add_argument("--long", type=int, default=10_000, help="requests over which memory is watched; 0: none")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        serve(given.serve)
        return
    rates: dict[str, float] = {}
    for name, max_together in (("with batches", 64), ("one by one", 1)):
        command = [sys.executable, __file__, "--serve", str(max_together)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port, threads = map(int, server.stdout.readline().split())
            asyncio.run(crowd(port, 4, 2, 10**9))  # warm
            measured = asyncio.run(crowd(port, given.clients, given.requests, 0))
            rates[name] = len(measured.seconds) / measured.total_s
            print(measured.line(name), f"  threads {threads}   wrong {check(measured.answers)}", flush=True)
            if max_together > 1 and given.long:
                process, sizes = psutil.Process(server.pid), []
                for part in range(5):
                    asyncio.run(crowd(port, given.clients, given.long // 5 // given.clients, 10**6 * (part + 1)))
                    sizes.append(process.memory_info().rss / 2**20)
                print("memory, MiB, after each fifth:", *(f"{size:.0f}" for size in sizes), flush=True)
            server.terminate()
    print(f"batches are {rates['with batches'] / rates['one by one']:.1f} times as fast")


if __name__ == "__main__":
    main()
