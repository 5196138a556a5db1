"""What the routes of `nla serve` answer, held against the library called directly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra nla[serve]")

from starlette.testclient import TestClient  # pyright: ignore[reportMissingImports]

from nla.autoencoder import NLA
from nla.serve import schema
from nla.serve.app import make_app
from nla.serve.engine import Engine

LINE = schema.LINE
REQUESTS = {
    "/tokenize": schema.TokenizeRequest,
    "/extract": schema.ExtractRequest,
    "/explain": schema.ExplainRequest,
    "/describe": schema.DescribeRequest,
    "/compare": schema.CompareRequest,
    "/score": schema.ScoreRequest,
    "/completion": schema.CompletionRequest,
}


@pytest.fixture(scope="module")
def couplets() -> NLA:
    return NLA.from_pretrained("couplets")


@pytest.fixture(scope="module")
def client(couplets: NLA) -> Iterator[Any]:
    with TestClient(make_app(Engine({"couplets": couplets})), base_url="http://127.0.0.1") as client:
        yield client


def example(route: str) -> dict[str, Any]:
    extra: Any = REQUESTS[route].model_config["json_schema_extra"]
    return extra["examples"][0]


@pytest.mark.parametrize("route", REQUESTS)
def test_the_example_of_every_route_works(client: Any, route: str) -> None:
    answer = client.post(route, json=example(route))
    assert answer.status_code == 200, answer.text


def test_an_explanation_is_what_the_library_gives(client: Any, couplets: NLA) -> None:
    results = client.post("/explain", json={"text": LINE, "positions": [-1, 2], "seed": 5}).json()["results"]
    direct = couplets.explain(couplets.read(LINE, [-1, 2]), seed=5)
    assert [[sample["text"] for sample in one["samples"]] for one in results] == direct.texts
    assert [one["trust"]["level"] for one in results] == [one.trust.level for one in direct]
