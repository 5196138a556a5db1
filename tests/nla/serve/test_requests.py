"""Many requests, few places, and clients that go: none is lost, none is mixed up, no place is."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from nla.autoencoder import NLA
from nla.serve.engine import Engine
from tests.helpers.serve import LINE, PLANS, events

N_EACH = 2
LONGEST_S = 60


def test_a_crowd_gets_its_own_answers_from_shared_batches(couplets: NLA) -> None:
    import httpx  # pyright: ignore[reportMissingImports]

    from nla.serve.app import make_app

    engine = Engine({"couplets": couplets})
    asked = [(text, seed) for text in PLANS[:8] for seed in range(N_EACH)]

    async def crowd() -> list[list[str]]:
        transport = httpx.ASGITransport(make_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=LONGEST_S) as client:

            async def one(number: int, text: str, seed: int) -> list[str]:
                body = {"text": text, "seed": seed, "positions": [-1], "samples": 2, "stream": number % 3 == 0}
                answer = await client.post("/explain", json=body)
                result = events(answer.text)[-1] if number % 3 == 0 else answer.json()["results"][0]
                return [sample["text"] for sample in result["samples"]]

            tasks = [asyncio.create_task(one(number, *each)) for number, each in enumerate(asked)]
            while engine.n_admitted < len(asked):
                await asyncio.sleep(0.01)
            engine.start()  # all of them wait by now
            return await asyncio.gather(*tasks)

    answers = asyncio.run(crowd())
    engine.close(LONGEST_S)
    direct = [couplets.explain(couplets.read(text, "last"), 2, seed=seed)[0].texts for text, seed in asked]
    assert answers == direct
    assert engine.turns["write"] == 1 and engine.n_admitted == 0
    assert engine.turns["read"] == 1 and engine.works["read"] == len(asked)


@pytest.fixture
def busy(couplets: NLA) -> Any:
    """A client of a server with one place, which is taken, and its engine."""
    from starlette.testclient import TestClient  # pyright: ignore[reportMissingImports]

    from nla.serve.app import make_app

    engine = Engine({"couplets": couplets}, max_waiting=1)
    with TestClient(make_app(engine), base_url="http://localhost") as client:
        yield client, engine, engine.admit()


@pytest.mark.parametrize("stream", [False, True])
def test_one_too_many_is_told_when_to_come_back(busy: Any, stream: bool) -> None:
    client, engine, place = busy
    body = {"text": LINE, "positions": [-1], "samples": 1, "stream": stream}
    refused = client.post("/explain", json=body)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1 and refused.json()["fix"]
    assert client.get("/health").json()["waiting"] == 1
    place.release()
    assert client.post("/explain", json=body).status_code == 200 and engine.n_admitted == 0


@pytest.mark.parametrize("stream", [False, True])
def test_what_takes_too_long_is_given_up_and_its_place_is_free(couplets: NLA, stream: bool) -> None:
    from starlette.testclient import TestClient  # pyright: ignore[reportMissingImports]

    from nla.serve.app import make_app

    engine = Engine({"couplets": couplets})
    with TestClient(make_app(engine, timeout_s=0.0), base_url="http://localhost") as client:
        answer = client.post("/explain", json={"text": LINE, "stream": stream, "seed": 31})
        if stream:
            assert events(answer.text)[-1]["kind"] == "error"
        else:
            assert answer.status_code == 504 and answer.json()["fix"]
        assert engine.n_admitted == 0


@pytest.mark.parametrize("version", ["2.3", "2.4"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_takes_its_work_with_it(couplets: NLA, stream: bool, version: str) -> None:
    """The engine never begins: only the client's going can end the request."""
    from nla.serve.app import make_app

    engine = Engine({"couplets": couplets})
    body = json.dumps({"text": LINE, "stream": stream}).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/explain", "raw_path": b"/explain", "root_path": ""}
    scope |= {"query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http"}
    scope |= {
        "asgi": {"version": "3.0", "spec_version": version},
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }

    async def come_and_go() -> None:
        gone = asyncio.Event()
        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if first:
                return first.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_message: Any) -> None:
            return None

        asking = asyncio.create_task(make_app(engine)(scope, receive, send))
        while not engine._waiting:
            await asyncio.sleep(0.01)
        gone.set()
        await asyncio.wait_for(asking, LONGEST_S)

    asyncio.run(come_and_go())
    (work,) = engine._waiting
    assert work.ticket.cancelled and engine.n_admitted == 0
