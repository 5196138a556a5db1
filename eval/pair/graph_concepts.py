"""What an NLA is asked about attribution graphs: at which tokens it reads, and which concepts are there or are not.

An NLA at a token and a layer answers for the supernodes that have a node at this token and no deeper; in graphs without
supernodes, for the labels of such nodes. Beside them stand concepts that it must not name: the same graph's others, the
donor's word, concepts of other graphs that are as frequent, and the latent's own word at tokens where patching shows no
effect.
"""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from collections.abc import Sequence, Set
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from nla.errors import TokenizerMismatchError, visible
from nla.eval.circuits.gate import MIN_EFFECT
from nla.eval.circuits.graph_format import CAUSAL_SITE, Graph, Node, concept_words, shown_token
from nla.text.tokens import encode_batch

HERE, SAME, DONOR, OTHER, UNUSED = "here", "same graph", "donor's word", "other graph", "no effect here"
N_OTHER = 3
MAX_ASKED = 256
"""Concepts of a kind that are asked about at one token, drawn at random where there are more."""

Concept = tuple[str, ...]
"""Words, any of which names it."""


class Text(NamedTuple):
    """A graph's prompt as the pair reads it: the text, and the pair's token for each of the graph's (−1: none)."""

    prompt: str
    columns: list[int]


class ReadToken(NamedTuple):
    """Where the NLA reads: a graph, by number, and a token of it."""

    graph: int
    position: int
    document: int
    """Number of the graph's document: the cluster in every bootstrap."""


class ConceptCell(NamedTuple):
    """One concept at one token, and whether it is there."""

    token: int
    """Number of the token that is read."""
    concept: Concept
    kind: str
    """"here", or the kind of distractor."""
    visible: bool
    """Whether a word of it stands in the text up to this token."""


def align(graph: Graph, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Text:
    """Match a graph's tokens with those of a pair's tokenizer, which may add a first token or not.

    Raises:
        TokenizerMismatchError: they differ; says where.
        VocabularyError, EmptyTextError, ContextLengthError: see :func:`nla.text.tokens.encode_batch`.
    """
    prompt = graph.prompt
    first = getattr(tokenizer, "bos_token", None)
    if first and prompt.startswith(first):  # the tokenizer adds it again
        prompt = prompt[len(first) :]
    spans = encode_batch(tokenizer, [prompt], context)[0].spans
    ours = [shown_token(str(tokenizer.decode([span.token_id]))) for span in spans]
    theirs = [shown_token(token) for token in graph.tokens]
    # A first token that is no text, such as BOS, may stand on either side alone.
    added_here, added_there = int(spans[0].added), int(bool(theirs) and not prompt.startswith(graph.tokens[0]))
    for here, there in ((0, 0), (added_here, 0), (0, added_there)):
        if ours[here:] == theirs[there:]:
            columns = [column - there + here for column in range(len(theirs))]
            return Text(prompt, [column if column >= 0 and not spans[column].added else -1 for column in columns])
    where = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    shown = [visible(repr(side[where : where + 3])) for side in (theirs, ours)]
    raise TokenizerMismatchError(
        f"graph {visible(graph.slug)!r}: {len(theirs)} tokens, from token {where} on {shown[0]}",
        f"the {len(ours)} tokens of the pair's tokenizer, there {shown[1]}",
        "score a pair of the model that the graph is of",
    )


def tokens_and_cells(
    graphs: Sequence[Graph], texts: Sequence[Text], layer: int, seed: int = 0
) -> tuple[list[ReadToken], list[ConceptCell]]:
    """Every token at which a pair at ``layer`` has something to answer for, and every concept asked about there."""
    rng, read_tokens, cells = random.Random(seed), [], []
    frequency = Counter(concept for graph in graphs for concept in {node.words for node in graph.supernodes})
    documents: dict[tuple, int] = {}
    for number, (graph, text) in enumerate(zip(graphs, texts, strict=True)):
        document = documents.setdefault(document_of(graph), len(documents))
        members = (node.position for one in graph.supernodes for node in one.members)
        sites = (node.position for node in graph.nodes if node.kind == CAUSAL_SITE)
        for position in sorted({*members, *sites}):
            readable = text.columns[position] >= 0
            asked = _cells(graph, len(read_tokens), position, layer, frequency, rng) if readable else []
            if asked:
                read_tokens.append(ReadToken(number, position, document))
                cells += asked
    return read_tokens, cells


def _cells(
    graph: Graph, token: int, position: int, layer: int, frequency: Counter[Concept], rng: random.Random
) -> list[ConceptCell]:
    def some(concepts: Sequence[Concept]) -> Sequence[Concept]:
        return concepts if len(concepts) <= MAX_ASKED else rng.sample(concepts, MAX_ASKED)

    def cell(concept: Concept, kind: str) -> ConceptCell:
        return ConceptCell(token, concept, kind, _any_of(concept, seen))

    here = [(one.words, one.at(position, layer)) for one in graph.supernodes if one.words]
    present = dict.fromkeys(some(list(dict.fromkeys(words for words, members in here if members))))
    # A concept of this token at deeper layers may or may not be there already: nothing is asked about it.
    taken = {word for one in graph.supernodes if _is_at(one.members, position) for word in one.words}
    latent, donor = (pair_word(graph, name) for name in ("target", "donor_target"))
    sites = [node for node in graph.nodes if node.kind == CAUSAL_SITE and node.position == position]
    strongest = max((node.activation or 0.0 for node in sites if node.layer <= layer), default=0.0)
    if not present and not (latent and sites):
        return []
    before = graph.tokens[: position + 1]
    # A word may be one token, or several: joined without a space they are the text.
    seen = _words(" ".join(before)) | _words("".join(before))
    cells = [cell(words, HERE) for words in present]
    others = dict.fromkeys(words for words, members in here if not members and not taken.intersection(words))
    cells += [cell(words, SAME) for words in some(list(others)) if words != latent or not sites]
    if latent and sites and latent not in present and strongest < MIN_EFFECT:
        cells.append(cell(latent, UNUSED))
    known = {word for one in graph.supernodes for word in one.words}
    if donor and latent in present and not taken.intersection(donor):
        cells.append(cell(donor, DONOR))
        known.update(donor)
    absent = some(sorted(one for one in frequency if one and not known.intersection(one) and not _any_of(one, seen)))
    for words in present:
        near = list(absent)
        rng.shuffle(near)
        near.sort(key=lambda one: abs(frequency[one] - frequency[words]))
        cells += [cell(one, OTHER) for one in near[:N_OTHER]]
    return cells


def names(text: str, concept: Concept) -> bool:
    """Whether a text says one of a concept's words, as it is or with a plural s.

    >>> names("The next line ends with cats.", ("cat",))
    True
    """
    return _any_of(concept, _words(text))


@functools.lru_cache(maxsize=1 << 14)  # each explanation is searched for every concept that is asked about
def _words(text: str) -> frozenset[str]:
    return frozenset(word.casefold() for word in re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text))


def _any_of(concept: Concept, words: Set[str]) -> bool:
    return any(word in words or f"{word}s" in words or (word.endswith("s") and word[:-1] in words) for word in concept)


def _is_at(members: Sequence[Node], position: int) -> bool:
    return any(node.position == position for node in members)


def document_of(graph: Graph) -> tuple:
    """What makes graphs dependent: in a trace of several pairs its document, otherwise the prompt."""
    metadata = graph.content["metadata"]
    pair, settings = metadata.get("minimal_pair"), metadata.get("generation_settings")
    if isinstance(pair, dict) and isinstance(settings, dict) and settings.get("n_pairs") != 1:
        number = pair.get("document")
        if isinstance(number, int):
            return metadata["scan"], number
    return metadata["scan"], graph.prompt


def pair_word(graph: Graph, name: str) -> Concept:
    """A word of the minimal pair that a graph of `nla trace` was made from; empty for other graphs."""
    pair = graph.content["metadata"].get("minimal_pair")
    word = pair.get(name) if isinstance(pair, dict) else None
    return concept_words(word) if isinstance(word, str) else ()
