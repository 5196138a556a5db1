"""Checks JSON against the published graph schema, by the keywords that it uses; any other keyword is an error."""

from __future__ import annotations

import json
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"
PUBLISHED = json.loads((FIXTURES / "neuronpedia-graph-schema.json").read_text())
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
NOTES = {"$id", "$schema", "title", "version", "description", "examples"}


def complaints(value, schema=PUBLISHED, place="graph"):
    """What does not fit, as texts."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    fits = [isinstance(value, TYPES[kind]) and not (isinstance(value, bool)) for kind in kinds]
    if kinds and not any(fits):
        return [f"{place}: {value!r} is no {kinds}"]
    found = []
    for keyword, rule in schema.items():
        if keyword == "required" and isinstance(value, dict):
            found += [f"{place}: no {name}" for name in rule if name not in value]
        elif keyword == "properties" and isinstance(value, dict):
            for name, part in rule.items():
                found += complaints(value[name], part, f"{place}.{name}") if name in value else []
        elif keyword == "items" and isinstance(value, list):
            for number, part in enumerate(value):
                found += complaints(part, rule, f"{place}[{number}]")
        elif keyword == "additionalProperties" and isinstance(value, dict):
            for name in value.keys() - schema.get("properties", {}).keys():
                found += complaints(value[name], rule, f"{place}.{name}")
        elif keyword in ("minItems", "maxItems") and isinstance(value, list):
            short = len(value) < rule if keyword == "minItems" else len(value) > rule
            found += [f"{place}: {len(value)} items"] if short else []
        elif keyword not in {*NOTES, "type", "required", "properties", "items", "prefixItems", "additionalProperties"}:
            assert keyword in ("minItems", "maxItems"), f"the checker does not know {keyword!r}"
    return found
