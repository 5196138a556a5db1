"""The schema of the API: what is stored is what the server has, and it alone is enough to write a client.

`python tests/nla/serve/test_schema.py` writes what is stored anew.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.serve import events

STORED = Path(__file__).parents[3] / "docs" / "openapi.json"


def served() -> dict[str, Any]:
    """The schema of the code, without the version, which changes with every release."""
    from nla.serve.app import make_app
    from nla.serve.engine import Engine

    schema = make_app(Engine({})).app.app.openapi()
    return {**schema, "info": {key: value for key, value in schema["info"].items() if key != "version"}}


def written(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def test_the_stored_schema_is_that_of_the_code() -> None:
    assert STORED.read_text("utf-8") == written(served()), "write it anew: python tests/nla/serve/test_schema.py"


def faults(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "") -> list[str]:
    """Where a value is not as a JSON schema says: the words of it that ours uses, and no others."""
    if "$ref" in schema:
        return faults(value, root["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], root, where)
    for word in ("anyOf", "oneOf"):
        if word in schema:
            tried = [faults(value, one, root, where) for one in schema[word]]
            return [] if [] in tried else [f"{where}: none of {len(tried)}: {tried}"]
    found: list[str] = []
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        found.append(f"{where}: {value!r}")
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}
    kind = schema.get("type")
    if kind == "null":
        return found if value is None else [f"{where}: not null"]
    if kind is not None and (not isinstance(value, kinds[kind]) or (kind != "boolean" and isinstance(value, bool))):
        return [f"{where}: {type(value).__name__}, not {kind}"]
    if kind == "array":
        for number, one in enumerate(value):
            found += faults(one, schema.get("items", {}), root, f"{where}[{number}]")
    if kind == "object":
        known = schema.get("properties", {})
        found += [f"{where}: lacks {name}" for name in schema.get("required", ()) if name not in value]
        for name, one in value.items():
            if name in known:
                found += faults(one, known[name], root, f"{where}.{name}")
            elif schema.get("additionalProperties") is False:
                found.append(f"{where}: {name} is not known")
    return found


class Client:
    """A client that knows the schema and an address, and nothing else."""

    def __init__(self, schema: dict[str, Any], http: Any) -> None:
        self.schema, self.http = schema, http
        self.operations = {
            operation["operationId"]: (method, path, operation)
            for path, methods in schema["paths"].items()
            for method, operation in methods.items()
        }

    def example(self, name: str) -> dict[str, Any] | None:
        """The request that the schema shows."""
        body = self.operations[name][2].get("requestBody")
        if body is None:
            return None
        shown = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        return self.schema["components"]["schemas"][shown]["examples"][0]

    def call(self, name: str, body: dict[str, Any] | None) -> Any:
        """The answer, held against what the schema says of its status and kind."""
        method, path, operation = self.operations[name]
        answer = self.http.request(method, path, json=body)
        kind = answer.headers["content-type"].split(";")[0]
        content = operation["responses"][str(answer.status_code)]["content"]
        if kind == "text/plain":
            assert kind in content
            return answer.text
        given = events(answer.text) if kind == "text/event-stream" else [answer.json()]
        for one in given:
            assert not (found := faults(one, content[kind]["schema"], self.schema)), found
        return given if kind == "text/event-stream" else given[0]

    def streams(self, name: str) -> bool:
        return "text/event-stream" in self.operations[name][2]["responses"]["200"]["content"]


@pytest.fixture(scope="module")
def api(client: Any) -> Client:
    return Client(client.get("/openapi.json").json(), client)


def test_a_client_from_the_schema_alone_calls_every_operation(api: Client) -> None:
    assert len(api.operations) == 10
    for name in api.operations:
        assert api.call(name, api.example(name))
        if api.streams(name):
            first, *_, last = api.call(name, {**(api.example(name) or {}), "stream": True})
            assert (first["kind"], last["kind"]) == ("start", "result")
    assert [name for name in api.operations if api.streams(name)] == ["explain", "describe", "completion"]


def test_refusals_are_in_the_schema_too(api: Client) -> None:
    for name, (method, _, _) in api.operations.items():
        if method == "post":
            assert api.call(name, {"no": "request"}).keys() == {"got", "expected", "fix"}
    assert api.call("explain", {**(api.example("explain") or {}), "pair": "none"})["got"]


def test_the_client_sees_when_an_answer_is_not_as_the_schema_says(api: Client) -> None:
    good = api.call("explain", api.example("explain"))
    schema = {"$ref": "#/components/schemas/ExplainResponse"}
    assert faults(good, schema, api.schema) == []
    changes: list[tuple[tuple[str | int, ...], Any]] = [
        (("layer_index",), "3"),
        (("results", 0, "trust", "level"), "very high"),
        (("results", 0, "samples", 0, "claims"), "one"),
        (("results", 0, "mse"), None),
        (("results", 0, "more"), 1),
    ]
    for path, value in changes:
        bad = copy.deepcopy(good)
        place: Any = bad
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        assert faults(bad, schema, api.schema), path
    assert faults({}, schema, api.schema)


def test_the_schema_speaks_of_every_operation_and_refers_to_nothing_that_is_not_there(api: Client) -> None:
    text = json.dumps(api.schema)
    named = set(re.findall(r"#/components/schemas/(\w+)", text))
    assert named <= set(api.schema["components"]["schemas"])
    assert "HTTPValidationError" not in json.dumps(api.schema["paths"])
    for name, (method, path, operation) in api.operations.items():
        assert operation["description"] and path == f"/{name}" and (method == "get") == ("requestBody" not in operation)


def test_neuronpedias_requests_are_taken_as_they_are(client: Any) -> None:
    """As its server's published schema has them (apps/nla/openapi.json), with every field."""
    chat = {"add_generation_prompt": True, "continue_final_message": False, "enable_thinking": None, "messages": None}
    text = {**chat, "text": "In spring Anna left a red ribbon near the rat,\n"}
    sampling = {"temperature": 0.7, "max_new_tokens": 32, "stream": False}
    vector = [0.1, -0.2] * 64
    asked: dict[str, tuple[dict[str, Any], str]] = {
        "/explain": ({**text, **sampling, "positions": [-1], "reverse": True}, "results"),
        "/extract": (text, "tokens"),
        "/tokenize": (text, "tokens"),
        "/describe": ({**sampling, "activations": [vector]}, "results"),
        "/compare": (
            {"activation_a": vector, "activation_b": vector[::-1], "temperature": 0.7, "max_new_tokens": 32},
            "",
        ),
        "/score": ({"description": "The next line ends with cat.", "activation": vector}, ""),
        "/completion": ({**text, "completion_tokens": 4, "temperature": 0.7, "stream": False}, ""),
    }
    theirs = {
        "/explain": "token token_id position l2_norm description mse cosine_similarity generated fragment_index "
        "fragment_count role section message_index",
        "/extract": "token token_id position activation l2_norm",
        "/tokenize": "token token_id position fragment_index fragment_count role section message_index",
        "/describe": "description mse cosine_similarity",
        "/compare": "description diff_norm mse cosine_similarity",
        "/score": "mse cosine_similarity",
        "/completion": "",
    }
    for route, (body, listed) in asked.items():
        answer = client.post(route, json=body)
        assert answer.status_code == 200, answer.text
        given = answer.json()[listed][0] if listed else answer.json()
        assert set(theirs[route].split()) <= given.keys(), route


if __name__ == "__main__":
    STORED.write_text(written(served()), "utf-8")
