"""Attribution graphs as circuit-tracer writes and Neuronpedia serves them: read, checked, mapped to tokens, written.

One JSON object with ``metadata``, ``qParams``, ``nodes`` and ``links``. What is known to mislead:

- ``influence`` is cumulative: the share of all influence that this node and the stronger ones hold. LOWER matters more.
- Ids are not unique: a reconstruction error is ``0_{layer}_{token}``, which a feature of layer 0 may be called too.
  What a node is, ``feature_type`` alone says.
- An embedding is ``E_{vocabulary id}_{token}``; its ``feature`` is the token's index, not the vocabulary's.
- ``feature`` holds layer and index mixed, in a way that depends on the model. The id has them apart.
- Labels are the names of supernodes; ``clerp`` is mostly empty.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nla.errors import NLAError, ParseError, visible
from nla.storage.files import write_atomic

MAX_BYTES = 256 << 20
CAUSAL_SITE = "causal site"
EMBEDDING, LOGIT = "embedding", "logit"
EMBEDDING_LAYER = -1
_METADATA = {"slug": str, "scan": str, "prompt": str, "prompt_tokens": list}
_NODE = {"node_id": str, "feature_type": str, "ctx_idx": int, "jsNodeId": str, "clerp": str}
_SHOWN = 60
# Words of a supernode's name that say what it does ("say Austin"), not what it is about.
_NOT_CONCEPTS = re.compile(
    r"an?|and|before|after|for|in|of|on|or|outputs?|predicts?|says?|saying|the|then|to|tokens?|upweights?|with"
)


class Node(NamedTuple):
    """One node: at which token and layer, and how much it matters."""

    id: str
    kind: str
    """``feature_type``, such as "cross layer transcoder" or "causal site"."""
    layer: int
    """Block whose output it is part of; −1 for an embedding."""
    position: int
    """Index of its token in the prompt."""
    feature: int | None
    """Index within its layer, or vocabulary id; None where the id does not say."""
    label: str
    influence: float | None
    """Cumulative, 0 to 1: lower matters more."""
    activation: float | None

    @property
    def is_error(self) -> bool:
        """Whether it is what the transcoders miss."""
        return "error" in self.kind


class Supernode(NamedTuple):
    """Nodes that someone gave one name, and the words of that name."""

    name: str
    members: tuple[Node, ...]
    words: tuple[str, ...]

    def at(self, position: int, layer: int) -> list[Node]:
        """The members at a token, up to a layer: what an NLA that reads there can know of."""
        return [node for node in self.members if node.position == position and node.layer <= layer]


class Link(NamedTuple):
    """An edge between two node ids."""

    source: str
    target: str
    weight: float


@dataclass(frozen=True)
class Graph:
    """A checked graph; ``content`` is the whole JSON object, with every key that is not known here."""

    content: dict[str, Any]
    nodes: list[Node]
    links: list[Link]
    supernodes: list[Supernode]

    @property
    def slug(self) -> str:
        """Its name."""
        return self.content["metadata"]["slug"]

    @property
    def prompt(self) -> str:
        """The text."""
        return self.content["metadata"]["prompt"]

    @property
    def tokens(self) -> list[str]:
        """The text's tokens, as written in the file (line breaks as ⏎, and perhaps a first token that is not text)."""
        return self.content["metadata"]["prompt_tokens"]

    @functools.cached_property
    def is_measured(self) -> bool:
        """Whether it comes from patching, so that activations are effects."""
        return any(node.kind == CAUSAL_SITE for node in self.nodes)

    @classmethod
    def parse(cls, content: Any, place: str = "graph") -> Graph:
        """Check a JSON object.

        Args:
            place: what errors call it, such as its path.

        Raises:
            ParseError: what is missing, of the wrong type, or names what is not there; says where.
        """
        _expect(content, dict, place)
        for name, kind in (("metadata", dict), ("qParams", dict), ("nodes", list), ("links", list)):
            _expect(_at(content, name, place), kind, f"{place}: {name}")
        metadata = content["metadata"]
        for name, kind in _METADATA.items():
            _expect(_at(metadata, name, f"{place}: metadata"), kind, f"{place}: metadata.{name}")
        for number, token in enumerate(metadata["prompt_tokens"]):
            _expect(token, str, f"{place}: metadata.prompt_tokens[{number}]")
        n_tokens = len(metadata["prompt_tokens"])
        nodes = [_node(node, n_tokens, f"{place}: nodes[{i}]") for i, node in enumerate(content["nodes"])]
        known = _by_id(nodes, place)
        links = [_link(link, known, f"{place}: links[{i}]") for i, link in enumerate(content["links"])]
        return cls(content, nodes, links, list(_supernodes(content, nodes, known, f"{place}: qParams")))


def read_graph(path: str | Path) -> Graph:
    """The graph in a file.

    Raises:
        ParseError: not readable, larger than 256 MiB, not JSON (cut, NaN, nested too deep), or see :meth:`Graph.parse`.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ParseError(f"{path} of {size >> 20} MiB", f"at most {MAX_BYTES >> 20} MiB", "prune the graph")
        content = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse, parse_float=_finite)
    except NLAError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        got = f"{path}, not readable as JSON ({error})"
        raise ParseError(
            got, "an attribution graph in JSON, whole", "check the path, or download the file again"
        ) from error
    return Graph.parse(content, str(path))


def write_graph(graph: Graph, path: str | Path) -> None:
    """Write a graph, atomically, with every key it was read with.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
        ParseError: its content is nested too deep, or not JSON.
    """
    try:
        text = json.dumps(graph.content, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ParseError(
            f"a graph that JSON cannot hold ({error})", "texts, numbers, lists and objects", _FIX
        ) from error
    write_atomic(path, text + "\n")


def concept_words(name: str) -> tuple[str, ...]:
    """The words of a supernode's name that say what it is about, in lower case.

    >>> concept_words('say "Austin"')
    ('austin',)
    >>> concept_words("before acronym / upweights G*")
    ('acronym', 'g')
    """
    words = dict.fromkeys(word.casefold() for word in re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", name))
    return tuple(word for word in words if not _NOT_CONCEPTS.fullmatch(word)) or tuple(words)


def shown_token(text: str) -> str:
    """A token as these files show it: line breaks and tabs as signs."""
    return text.replace("\n", "⏎").replace("\t", "→").replace("\r", "↵")


def _node(node: Any, n_tokens: int, place: str) -> Node:
    _expect(node, dict, place)
    for name, kind in _NODE.items():
        _expect(_at(node, name, place), kind, f"{place}.{name}")
    if not isinstance(_at(node, "feature", place), int | None) or isinstance(node["feature"], bool):
        raise _wrong(node["feature"], "an integer or null", f"{place}.feature")
    for name in ("influence", "activation"):
        if node.get(name) is not None:
            _number(node[name], f"{place}.{name}")
    identity, kind, position = node["node_id"], node["feature_type"], node["ctx_idx"]
    if not 0 <= position < n_tokens:
        raise _wrong(position, f"the index of one of {n_tokens} tokens", f"{place}.ctx_idx")
    numbers = re.fullmatch(r"(?:E|\d+)_(?:\D+_)?(\d{1,18})_(\d{1,9})", identity)
    if kind == EMBEDDING and numbers is None:
        raise _wrong(identity, "E_{vocabulary id}_{token}", f"{place}.node_id")
    if numbers is not None and int(numbers[2]) != position and kind != LOGIT:
        raise _wrong(identity, f"an id that ends in the token, {position}, as ctx_idx says", f"{place}.node_id")
    layer = EMBEDDING_LAYER if kind == EMBEDDING else _layer(_at(node, "layer", place), f"{place}.layer")
    feature = None if numbers is None or "error" in kind else int(numbers[1])
    return Node(identity, kind, layer, position, feature, node["clerp"], node.get("influence"), node.get("activation"))


def _layer(value: Any, place: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,6}", value):
        return int(value)
    raise _wrong(value, 'a block\'s index, as a number or text ("E" for embeddings only)', place)


def _by_id(nodes: list[Node], place: str) -> dict[str, Node]:
    """Nodes by id; where an error shares its id with a feature of layer 0, the feature is meant."""
    known: dict[str, Node] = {}
    for number, node in enumerate(nodes):
        other = known.get(node.id)
        if other is not None and other.is_error == node.is_error:
            raise _wrong(node.id, "an id of its own", f"{place}: nodes[{number}].node_id")
        if other is None or other.is_error:
            known[node.id] = node
    return known


def _link(link: Any, known: dict[str, Node], place: str) -> Link:
    _expect(link, dict, place)
    for name in ("source", "target"):
        _expect(_at(link, name, place), str, f"{place}.{name}")
        if link[name] not in known:
            raise _wrong(link[name], "the id of a node", f"{place}.{name}")
    return Link(link["source"], link["target"], _number(_at(link, "weight", place), f"{place}.weight"))


def _supernodes(content: dict[str, Any], nodes: list[Node], known: dict[str, Node], place: str) -> Iterator[Supernode]:
    groups = content["qParams"].get("supernodes")
    if groups is None:
        return
    _expect(groups, list, f"{place}.supernodes")
    # Some viewers save a supernode's members by jsNodeId, which circuit-tracer gives to a feature at every token alike.
    shown: dict[str, Node] = {}
    shared: set[str] = set()
    for raw, node in zip(content["nodes"], nodes, strict=True):
        if shown.setdefault(raw["jsNodeId"], node) is not node:
            shared.add(raw["jsNodeId"])
    for number, group in enumerate(groups):
        here = f"{place}.supernodes[{number}]"
        _expect(group, list, here)
        for i, part in enumerate(group):
            _expect(part, str, f"{here}[{i}]")
            if i and part not in known and part not in shown:
                raise _wrong(part, "the id of a node", f"{here}[{i}]")
            if i and part not in known and part in shared:
                raise _wrong(part, "a node_id, since several nodes have this jsNodeId", f"{here}[{i}]")
        if not group:
            raise _wrong(group, "a name and the ids of its nodes", here)
        members = tuple(known.get(part) or shown[part] for part in group[1:])
        yield Supernode(group[0], members, concept_words(group[0]))


def _at(content: dict[str, Any], name: str, place: str) -> Any:
    if name not in content:
        raise ParseError(f"{place} without {name!r}", f"the key {name!r}", _FIX)
    return content[name]


def _expect(value: Any, kind: type, place: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _wrong(value, _NAMES[kind], place)
    if kind is str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _wrong(value, "whole characters", place) from error


def _number(value: Any, place: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            if math.isfinite(number := float(value)):
                return number
    raise _wrong(value, "a finite number", place)


def _wrong(value: Any, expected: str, place: str) -> ParseError:
    shown = visible(repr(value)[:_SHOWN])
    return ParseError(f"{shown} in {visible(place)}", expected, _FIX)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse(digits[:_SHOWN])


_NAMES = {dict: "an object", list: "a list", str: "a text", int: "an integer"}
_FIX = "correct this place, or write the graph again with the tool that made it (schema: docs/graphs.md)"
