"""What tests of `nla serve` share."""

from __future__ import annotations

import json
from typing import Any

from nla.serve import schema

LINE = schema.LINE
PLANS = [
    f"In {season} {name} left a {colour} ribbon near the {word},\n"
    for season, name in (("spring", "Anna"), ("winter", "Clara"), ("summer", "Clara"))
    for colour in ("red", "blue", "green")
    for word in ("rat", "hat")
]
"""Texts that Couplets knows, each with its own plan or words."""
REQUESTS: dict[str, type[schema.Wire]] = {
    "/tokenize": schema.TokenizeRequest,
    "/extract": schema.ExtractRequest,
    "/explain": schema.ExplainRequest,
    "/describe": schema.DescribeRequest,
    "/compare": schema.CompareRequest,
    "/score": schema.ScoreRequest,
    "/completion": schema.CompletionRequest,
}


def example(route: str) -> dict[str, Any]:
    """The request that the schema shows."""
    extra: Any = REQUESTS[route].model_config["json_schema_extra"]
    return extra["examples"][0]


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, which must end as it should."""
    *blocks, last, rest = text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks), text
    return [json.loads(block.removeprefix("data: ")) for block in blocks]
