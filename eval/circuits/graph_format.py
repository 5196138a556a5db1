"""Attribution graphs as circuit-tracer writes and Neuronpedia serves them: read, checked, mapped to tokens, written.

One JSON object with ``metadata``, ``qParams``, ``nodes`` and ``links``. What is known to mislead:

- ``influence`` is cumulative: the share of all influence that this node and the stronger ones hold. LOWER matters more.
- Ids are not unique: a reconstruction error is ``0_{layer}_{token}``, which a feature of layer 0 may be called too.
  What a node is, ``feature_type`` alone says.
- An embedding is ``E_{vocabulary id}_{token}``; its ``feature`` is the token's index, not the vocabulary's.
- ``feature`` holds layer and index mixed, in a way that depends on the model. The id has them apart.
- A name that somebody gave is that of a supernode. Where there are none, a feature's label, custom or automatic, is in
  ``clerp``, which describes other nodes too: embeddings, outputs, sites of `nla trace`.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, FiniteFloat, ValidationError

from nla.errors import NLAError, ParseError, visible
from nla.storage.files import write_atomic
from nla.storage.schema import shown

MAX_BYTES = 256 << 20
CAUSAL_SITE = "causal site"
EMBEDDING, LOGIT = "embedding", "logit"
EMBEDDING_LAYER = -1
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_FIX = "correct this place, or write the graph again with the tool that made it (schema: docs/graphs.md)"
# Words of a supernode's name that say what it does ("say Austin"), not what it is about.
_NOT_CONCEPTS = re.compile(
    r"an?|and|before|after|for|in|of|on|or|outputs?|predicts?|says?|saying|the|then|to|tokens?|upweights?|with"
)
# Beside these, words of an automatic label that speak of texts or stand in any sentence.
_NOT_IN_LABELS = re.compile(
    r"about|are|as|at|be|by|concepts?|contexts?|descriptions?|etc|expressions?|first|from|instances?|into|is|its?|last|"
    r"like|mentions?|names?|next|not|occurrences?|others?|over|phrases?|previous|references?|related|sentences?|such|"
    r"terms?|texts?|that|their|these|things?|this|those|under|variations?|various|where|which|words?"
)


def _encodable(text: str) -> str:
    if _HALF_CHARACTER.search(text):
        raise ValueError("whole characters")
    return text


_Text = Annotated[str, AfterValidator(_encodable)]


class _Part(BaseModel):
    """A part of the file: types as they are; keys that are not known here are kept in the content."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _NodePart(_Part):
    node_id: _Text
    feature_type: _Text
    ctx_idx: int
    jsNodeId: _Text
    clerp: _Text
    feature: int | None
    layer: Any
    influence: FiniteFloat | None = None
    activation: FiniteFloat | None = None


class _LinkPart(_Part):
    source: _Text
    target: _Text
    weight: FiniteFloat


class _MetadataPart(_Part):
    slug: _Text
    scan: _Text
    prompt: _Text
    prompt_tokens: list[_Text]


class _ViewPart(_Part):
    supernodes: list[list[_Text]] | None = None


class _GraphPart(_Part):
    metadata: _MetadataPart
    qParams: _ViewPart
    nodes: list[_NodePart]
    links: list[_LinkPart]


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
    """Nodes of one name, and the words of that name."""

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
    """Those that somebody named; of a graph without any, the features of each label."""
    labelled: bool = False
    """Whether they are the features' labels."""

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
    def parse(cls, content: Any, where: str = "graph") -> Graph:
        """Check a JSON object.

        Args:
            where: what errors call it, such as its path.

        Raises:
            ParseError: what is missing, of the wrong type, or names what is not there; says where.
        """
        try:
            parts = _GraphPart.model_validate(content)
        except ValidationError as error:
            raise _first_wrong(error, where) from error
        n_tokens = len(parts.metadata.prompt_tokens)
        nodes = [_node(node, n_tokens, f"{where}: nodes[{i}]") for i, node in enumerate(parts.nodes)]
        known = _by_id(nodes, where)
        links = [_link(link, known, f"{where}: links[{i}]") for i, link in enumerate(parts.links)]
        named = list(_supernodes(parts, nodes, known, f"{where}: qParams.supernodes"))
        return cls(content, nodes, links, named or _by_label(nodes), labelled=not named)


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


def label_words(label: str) -> tuple[str, ...]:
    """The words of a feature's label that say what it is about, in lower case; none if it only says where it is.

    >>> label_words("references to cats and other felines"), label_words("previous token")
    (('cats', 'felines'), ())
    """
    words = (word for word in concept_words(label) if not _NOT_CONCEPTS.fullmatch(word))
    return tuple(word for word in words if not _NOT_IN_LABELS.fullmatch(word))


def shown_token(text: str) -> str:
    """A token as these files show it: line breaks and tabs as signs."""
    return text.replace("\n", "⏎").replace("\t", "→").replace("\r", "↵")


def _node(part: _NodePart, n_tokens: int, where: str) -> Node:
    identity, kind, position = part.node_id, part.feature_type, part.ctx_idx
    if not 0 <= position < n_tokens:
        raise _wrong(position, f"the index of one of {n_tokens} tokens", f"{where}.ctx_idx")
    numbers = re.fullmatch(r"(?:E|\d+)_(?:\D+_)?(\d{1,18})_(\d{1,9})", identity)
    if kind == EMBEDDING and numbers is None:
        raise _wrong(identity, "E_{vocabulary id}_{token}", f"{where}.node_id")
    if numbers is not None and int(numbers[2]) != position and kind != LOGIT:
        raise _wrong(identity, f"an id that ends in the token, {position}, as ctx_idx says", f"{where}.node_id")
    layer = EMBEDDING_LAYER if kind == EMBEDDING else _layer(part.layer, f"{where}.layer")
    feature = None if numbers is None or "error" in kind else int(numbers[1])
    return Node(identity, kind, layer, position, feature, part.clerp, part.influence, part.activation)


def _layer(value: Any, where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,6}", value):
        return int(value)
    raise _wrong(value, 'a block\'s index, as a number or text ("E" for embeddings only)', where)


def _by_id(nodes: list[Node], where: str) -> dict[str, Node]:
    """Nodes by id; where an error shares its id with a feature of layer 0, the feature is meant."""
    known: dict[str, Node] = {}
    for number, node in enumerate(nodes):
        other = known.get(node.id)
        if other is not None and other.is_error == node.is_error:
            raise _wrong(node.id, "an id of its own", f"{where}: nodes[{number}].node_id")
        if other is None or other.is_error:
            known[node.id] = node
    return known


def _link(part: _LinkPart, known: dict[str, Node], where: str) -> Link:
    for name, end in (("source", part.source), ("target", part.target)):
        if end not in known:
            raise _wrong(end, "the id of a node", f"{where}.{name}")
    return Link(part.source, part.target, part.weight)


def _supernodes(parts: _GraphPart, nodes: list[Node], known: dict[str, Node], where: str) -> Iterator[Supernode]:
    # Some viewers save a supernode's members by jsNodeId, which circuit-tracer gives to a feature at every token alike.
    by_viewer: dict[str, Node] = {}
    shared: set[str] = set()
    for part, node in zip(parts.nodes, nodes, strict=True):
        if by_viewer.setdefault(part.jsNodeId, node) is not node:
            shared.add(part.jsNodeId)
    for number, group in enumerate(parts.qParams.supernodes or ()):
        here = f"{where}[{number}]"
        if not group:
            raise _wrong(group, "a name and the ids of its nodes", here)
        name, *ids = group
        for i, identity in enumerate(ids, start=1):
            if identity not in known and identity not in by_viewer:
                raise _wrong(identity, "the id of a node", f"{here}[{i}]")
            if identity not in known and identity in shared:
                raise _wrong(identity, "a node_id, since several nodes have this jsNodeId", f"{here}[{i}]")
        members = tuple(known.get(identity) or by_viewer[identity] for identity in ids)
        yield Supernode(name, members, concept_words(name))


def _by_label(nodes: list[Node]) -> list[Supernode]:
    """The features of each label; what embeddings, outputs, errors and sites are called is no label."""
    members: dict[str, list[Node]] = {}
    for node in nodes:
        if node.label and node.kind not in (EMBEDDING, LOGIT, CAUSAL_SITE) and not node.is_error:
            members.setdefault(node.label, []).append(node)
    return [Supernode(label, tuple(labelled), label_words(label)) for label, labelled in members.items()]


def _first_wrong(error: ValidationError, where: str) -> ParseError:
    """The first of what is missing or of the wrong type."""
    details = error.errors(include_url=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in details["loc"]).lstrip(".")
    if details["type"] == "missing":
        return ParseError(f"{visible(where)} without {visible(path)}", "a value there", _FIX)
    expected = details["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return _wrong(details["input"], expected, f"{where}: {path}")


def _wrong(value: Any, expected: str, where: str) -> ParseError:
    return ParseError(f"{shown(value)} in {visible(where)}", expected, _FIX)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse(shown(digits))
