"""Server-sent events: what comes while it is written, in which order, and that a line is a line."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from nla.serve import schema
from tests.helpers.serve import LINE, events


def streamed(client: Any, route: str, **body: Any) -> list[dict[str, Any]]:
    answer = client.post(route, json={**body, "stream": True})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.text)


def test_texts_grow_to_the_samples_of_the_plain_answer(client: Any) -> None:
    asked = {"text": LINE, "positions": [2, -1], "samples": 2, "seed": 77}
    first, *rest = streamed(client, "/explain", **asked)
    assert first["kind"] == "start" and first["total"] == 2 and first["positions"] == [2, 11]
    plain = {one["position"]: one for one in client.post("/explain", json=asked).json()["results"]}
    results = [event for event in rest if event["kind"] == "result"]
    assert {one["position"]: {key: one[key] for key in plain[one["position"]]} for one in results} == plain
    grown = 0
    for position, result in plain.items():
        for number, sample in enumerate(result["samples"]):
            texts = [
                e["text"] for e in rest if e["kind"] == "text" and (e["position"], e["sample"]) == (position, number)
            ]
            assert all(sample["text"].startswith(text) for text in texts) and texts == sorted(set(texts), key=len)
            grown += len(texts)
    assert grown > 4 * len(plain), "without texts on the way this test is void"


@pytest.mark.parametrize(
    "asked, order",
    [
        ({"near": 5, "positions": [0, 4, 5, 9]}, [5, 4, 9, 0]),
        ({"near": -1, "positions": [3, 1, 2]}, [3, 2, 1]),
        ({"reverse": True, "positions": [3, 1, 2]}, [2, 1, 3]),
        ({"positions": [3, 1, 2]}, [3, 1, 2]),
    ],
)
def test_the_nearest_tokens_come_first(client: Any, asked: dict[str, Any], order: list[int]) -> None:
    for _ in range(2):  # written, and from the cache
        found = streamed(client, "/explain", text=LINE, samples=1, seed=9, **asked)
        assert found[0]["positions"] == order
        assert [event["position"] for event in found if event["kind"] == "result"] == order
    plain = client.post("/explain", json={"text": LINE, "samples": 1, "seed": 9, **asked}).json()["results"]
    assert [one["position"] for one in plain] == asked["positions"], "a plain answer keeps the order of the request"


def test_what_was_explained_before_is_not_written_again(client: Any) -> None:
    asked = {"text": LINE, "positions": [4], "samples": 1, "seed": 4321}
    first, again = streamed(client, "/explain", **asked), streamed(client, "/explain", **asked)
    assert any(event["kind"] == "text" for event in first) and not any(event["kind"] == "text" for event in again)
    assert first[-1] == again[-1]


def test_descriptions_and_completions_stream_too(client: Any) -> None:
    vector = client.post("/extract", json={"text": LINE, "positions": [-1]}).json()["tokens"][0]["activation"]
    found = streamed(client, "/describe", activations=[vector], samples=1, seed=8)
    plain = client.post("/describe", json={"activations": [vector], "samples": 1, "seed": 8}).json()["results"][0]
    assert {key: found[-1][key] for key in plain} == plain and found[-1]["position"] == 0
    written = streamed(client, "/completion", text=LINE, completion_tokens=6)
    texts = [event["text"] for event in written if event["kind"] == "text"]
    assert written[-1]["completion"] == texts[-1] and len(texts) > 3
    assert all(long.startswith(short) for short, long in itertools.pairwise(texts))


def test_what_goes_wrong_on_the_way_is_the_last_event(client: Any) -> None:
    (only,) = streamed(client, "/explain", text="xylophones")
    assert only["kind"] == "error" and "xylophones" in only["got"] and only["fix"]


def test_refusals_before_the_stream_have_their_status(client: Any) -> None:
    answer = client.post("/explain", json={"text": LINE, "pair": "none", "stream": True})
    assert answer.status_code == 404


@pytest.mark.parametrize(
    "hostile",
    ["</script><script>alert(1)</script>", "a\n\ndata: [DONE]\n\n", "\u2028\u2029\x85\r\n", "\x1b[31m\x00", "\u202e"],
)
def test_a_text_cannot_leave_its_line(hostile: str) -> None:
    from nla.serve.app import _line

    line = _line(schema.TextEvent(position=0, text=hostile))
    assert line.endswith("\n\n") and "\n" not in line[:-2] and "\r" not in line
    assert json.loads(line.removeprefix("data: "))["text"] == hostile
