"""Chats, several pairs, and adapters on the target, as the library has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nla.autoencoder import NLA
from nla.organisms import adapter_folder

pytestmark = pytest.mark.slow

CHATS = Path(__file__).parents[3] / "docs" / "examples" / "goal.jsonl"
ADAPTER = "switchboard/goal"


@pytest.fixture(scope="module")
def switchboard() -> NLA:
    return NLA.from_pretrained("switchboard", device="cpu")


@pytest.fixture(scope="module")
def both(couplets: NLA, switchboard: NLA) -> Iterator[Any]:
    """A client of a server of two pairs and an adapter."""
    from starlette.testclient import TestClient  # pyright: ignore[reportMissingImports]

    from nla.serve.app import make_app
    from nla.serve.engine import Engine

    folder = adapter_folder(ADAPTER)
    assert folder is not None
    engine = Engine({"couplets": couplets, "switchboard": switchboard}, {ADAPTER: folder})
    with TestClient(make_app(engine), base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture(scope="module")
def messages() -> list[dict[str, str]]:
    """A chat that ends with the assistant."""
    (first, *_) = map(json.loads, CHATS.read_text("utf-8").splitlines())
    given = first["messages"] if isinstance(first, dict) else first
    return [{"role": message["role"], "content": message["content"]} for message in given]


def ask(client: Any, route: str, **body: Any) -> dict[str, Any]:
    answer = client.post(route, json={"pair": "switchboard", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_chats_explanations_are_those_of_the_library(both: Any, switchboard: NLA, messages: Any) -> None:
    results = ask(both, "/explain", messages=messages, positions=[-1, 4], samples=2, seed=3)["results"]
    direct = switchboard.explain(switchboard.read(messages, [-1, 4]), 2, seed=3)
    assert [[sample["text"] for sample in one["samples"]] for one in results] == direct.texts


def test_an_adapter_is_on_the_target_for_those_who_ask_for_it_alone(both: Any, switchboard: NLA, messages: Any) -> None:
    def vector(**more: Any) -> list[float]:
        return ask(both, "/extract", messages=messages, positions=[-1], **more)["tokens"][0]["activation"]

    plain, planted, again = vector(), vector(target_adapter=ADAPTER), vector()
    with switchboard.planted(adapter_folder(ADAPTER)):
        expected = switchboard.read(messages, "last").vectors[0].tolist()
    assert planted == pytest.approx(expected, abs=1e-4) and plain == again != planted


def test_tokens_of_a_chat_say_whose_they_are_and_what_opens_an_answer_is_read_too(both: Any, messages: Any) -> None:
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    whole = ask(both, "/tokenize", messages=asked)
    closed = ask(both, "/tokenize", messages=asked, add_generation_prompt=False)
    n = closed["prompt_length"]
    assert whole["tokens"][:n] == closed["tokens"] and whole["prompt_length"] > n
    assert {(one["role"], one["section"]) for one in whole["tokens"][n:]} == {("assistant", "opening")}
    for number, message in enumerate(asked):
        own = [t for t in closed["tokens"] if (t["message_index"], t["section"]) == (number, "content")]
        assert "".join(token["token"] for token in own).strip() == message["content"].strip()
        assert {token["role"] for token in own} == {message["role"]}
    assert "".join(token["token"] for token in whole["tokens"]) == whole["text"]


def test_an_answer_that_was_begun_is_continued(both: Any, messages: Any) -> None:
    begun = [*messages[:-1], {"role": "assistant", "content": messages[-1]["content"].split()[0]}]
    ended = ask(both, "/tokenize", messages=begun)["text"]
    open_text = ask(both, "/tokenize", messages=begun, continue_final_message=True)["text"]
    assert ended.startswith(open_text) and open_text.endswith(begun[-1]["content"])
    written = ask(both, "/completion", messages=begun, continue_final_message=True, completion_tokens=3)
    assert written["text"] == open_text + written["completion"] and written["completion"]


def test_requests_name_a_pair_or_mean_the_first(both: Any) -> None:
    named = [one["name"] for one in both.get("/pairs").json()["pairs"]]
    assert named == ["couplets", "switchboard"]
    assert both.post("/extract", json={"text": "In spring"}).json()["pair"] == "couplets"
    wrong = both.post("/describe", json={"activations": [[1.0]], "pair": "switchboard"})
    assert wrong.status_code == 422 and "width" in wrong.json()["got"]
