"""Tool calls and lists of tools of decoded JSON in, in the form of OpenAI's chat API out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nla.errors import TranscriptError
from nla.transcripts.messages import bad

_SHOWN = 60
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_ARGUMENTS = ("arguments", "args", "parameters", "input")
"""What a call's arguments are called: by OpenAI, LangChain, Llama, Anthropic."""


def read_tools(tools: Any, source: str) -> tuple[tuple[Mapping[str, Any], ...], list[str]]:
    """Tools as OpenAI's chat API has them, from its several forms, Anthropic's, Bedrock's, MCP's, and JSON in a string.

    Returns:
        The tools, and the names of those that are the provider's own, which no chat template can write.

    Raises:
        TranscriptError: no list of tools.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except (ValueError, RecursionError) as error:
            raise bad(source, "tools that are a string and no JSON", "a list of tools", "check the file") from error
    if not isinstance(tools, Sequence) and tools is not None:
        raise bad(source, f"tools that are a {type(tools).__name__}", "a list of tools", "check the file")
    ours, unknown = [], []
    for tool in tools or ():
        inner = [tool.get(key) for key in ("function", "toolSpec")] if isinstance(tool, Mapping) else []
        function = next((one for one in inner if one is not None), tool)
        if not isinstance(function, Mapping):
            raise bad(source, "a tool that is no object", "a function with a name", "check the file")
        if not isinstance(function.get("name"), str) or (tool.get("type") or "function") not in ("function", "custom"):
            unknown.append(f"tool {tool.get('type') or function.get('name') or ', '.join(map(str, tool))}")
            continue
        schemas = [function.get(key) for key in ("parameters", "input_schema", "inputSchema")]
        parameters = next((one for one in schemas if one is not None), {"type": "object", "properties": {}})
        if isinstance(parameters, Mapping) and set(parameters) == {"json"}:  # Bedrock's
            parameters = parameters["json"]
        known = {"name": function["name"], "description": str(function.get("description") or "")}
        ours.append({"type": "function", "function": {**known, "parameters": parameters}})
    return tuple(ours), unknown


def split_calls(content: str, source: str) -> tuple[tuple[Mapping[str, Any], ...], str, str]:
    """Calls in Hermes' tags, the content with them, and the content before them.

    Content that goes on after a call is kept as it is: templates write calls last.
    """
    written = list(_CALL.finditer(content))
    before = content[: written[0].start()] if written else ""
    if not written or _CALL.sub("", content[len(before) :]).strip():
        return (), "", content
    try:
        calls, _ = parse_calls([[json.loads(match[1]) for match in written]], source)
    except (ValueError, RecursionError, TranscriptError):  # what looks like a call and is none is text
        return (), "", content
    return calls, content, before.rstrip()


def parse_calls(lists: Sequence[Any], source: str) -> tuple[tuple[Mapping[str, Any], ...], tuple[str, ...]]:
    """Tool calls as name and arguments, with their ids; OpenAI nests them in ``function``, Inspect names it there.

    Raises:
        TranscriptError: not lists of calls, or a call without a name or arguments.
    """
    calls, ids = [], []
    for entries in lists:
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise bad(source, f"tool calls that are a {type(entries).__name__}", "a list of calls", "check the file")
        for entry in entries:
            own = entry if isinstance(entry, Mapping) else {}
            inner = next((own[key] for key in ("function", "custom") if own.get(key) is not None), own)
            inner = {**own, "name": inner} if isinstance(inner, str) else inner
            name = inner.get("name") if isinstance(inner, Mapping) else None
            if not isinstance(inner, Mapping) or not isinstance(name, str):
                raise bad(source, "a tool call without a name", "a function with name and arguments", "check the file")
            keys = [key for key in _ARGUMENTS if key in inner]
            if not keys:
                got = f"a call of {name[:_SHOWN]!r} without arguments"
                raise bad(source, got, f"one of {', '.join(_ARGUMENTS)}", "write {} where there were none")
            value = next((inner[key] for key in keys if inner[key] is not None), None)
            calls.append({"name": name, "arguments": _arguments(value)})
            ids.append(own["id"] if isinstance(own.get("id"), str) else None)
    return tuple(calls), tuple(ids) if ids and all(ids) else ()


def _arguments(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value else {}
        except (ValueError, RecursionError):  # a model's own malformed arguments are kept as it wrote them
            value = {"arguments": value}
    return {} if value is None else value if isinstance(value, Mapping) else {"value": value}
