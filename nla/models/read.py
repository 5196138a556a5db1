"""Texts, or rows of token ids, in; the target's activations at a point out, and their file on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla.baselines import UNKNOWN_STRATUM
from nla.errors import PositionError, ShapeError, WeightsError
from nla.metrics import check_finite, check_ids
from nla.models.hooks import Intervene, inference, record
from nla.models.points import Point, context_length, d_model, device_of, n_embeddings, truncated_view, unwrapped
from nla.models.selfcheck import check_stream
from nla.storage.files import parse_json
from nla.storage.tensors import load_tensors, save_tensors
from nla.text.markdown import number
from nla.text.tokens import (
    Encoded,
    Positions,
    Span,
    check_lengths,
    check_positions,
    encode_batch,
    length_batches,
    select_positions,
)
from nla.views.figures import data_frame, group_bars
from nla.views.tokens import fragment, note_of, span_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

ACTIVATIONS_FILE = "activations.safetensors"

Strata = Callable[[int, list[Span]], Sequence[str]]
"""From a document's index and all its spans, the kind of position of each token."""


@dataclass(repr=False)
class Activations:
    """Vectors read at a point, and the tokens that they belong to. A notebook shows them as their texts, tokens marked.

    Indexing with an int, a slice, a mask or a tensor of indexes gives Activations again; so does iteration, one by one.
    """

    vectors: Tensor
    """(n, d) float32 on the CPU, raw (never normalised)."""

    spans: list[Span]
    """The token of each vector."""

    document: Tensor
    """(n,) int64: the text that each vector comes from, an index into ``texts``."""

    texts: list[str]
    """All texts that were read."""

    point: str
    """Where they were read, such as "resid_post.3"."""

    strata: list[str]
    """Kind of position of each vector; "all" where unknown."""

    def __post_init__(self) -> None:
        lengths = {len(self.vectors), len(self.spans), len(self.document), len(self.strata)}
        if self.vectors.ndim != 2 or len(lengths) != 1:
            raise ShapeError(
                f"vectors {tuple(self.vectors.shape)}, {len(self.spans)} spans, {len(self.document)} documents and "
                f"{len(self.strata)} strata",
                "vectors (n, d) and n of each",
                "index Activations as a whole, or use .replace(vectors=…) with as many rows",
            )

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> Activations:
        if not isinstance(index, slice):
            index = torch.as_tensor(index)
            index = index if index.numel() else index.long()  # an empty list becomes a tensor of floats
        rows = torch.arange(len(self))[index].reshape(-1)
        chosen = rows.tolist()
        return replace(
            self,
            vectors=self.vectors[rows],
            spans=[self.spans[row] for row in chosen],
            document=self.document[rows],
            strata=[self.strata[row] for row in chosen],
        )

    def __iter__(self) -> Iterator[Activations]:
        return (self[row] for row in range(len(self)))

    def replace(self, **changes: object) -> Activations:
        """A copy with other fields, such as ``vectors`` of the same number."""
        return replace(self, **changes)

    def __repr__(self) -> str:
        n, width = self.vectors.shape
        n_texts = len(self.document.unique())
        return f"Activations({n} × {width} at {self.point}, of {n_texts} text{'' if n_texts == 1 else 's'})"

    def _repr_html_(self) -> str:
        norms = self.vectors.norm(dim=1).tolist()
        notes = [
            note_of(span, document, {"norm": number(norm), "kind": stratum})
            for span, document, norm, stratum in zip(
                self.spans, self.document.tolist(), norms, self.strata, strict=True
            )
        ]
        return fragment(self.texts, notes, repr(self))

    def to_dataframe(self) -> DataFrame:
        """A row of pandas for each vector, in their order: its token, its kind of position and its norm.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        columns: dict[str, Sequence[Any]] = {"document": self.document.tolist(), **span_columns(self.spans)}
        return data_frame({**columns, "stratum": self.strata, "norm": self.vectors.norm(dim=1).tolist()})

    def plot(self, axes: Axes | None = None) -> Axes:
        """The norm of each vector, a bar for each token, coloured by kind of position.

        Args:
            axes: of matplotlib, to draw in; None: new ones of pyplot.
        """
        norms = self.vectors.norm(dim=1).tolist()
        return group_bars([span.text for span in self.spans], self.strata, norms, f"norm at {self.point}", axes)

    def save(self, folder: str | Path) -> None:
        """Write ``activations.safetensors`` into a folder, atomically.

        Raises:
            StorageError: it could not be written whole.
            NonFiniteError: a vector holds NaN or infinity.
        """
        names = list(dict.fromkeys(self.strata))
        code = {name: number for number, name in enumerate(names)}
        # Texts travel as bytes in the same file: one file is replaced whole or not at all.
        words = json.dumps({"texts": self.texts, "point": self.point, "strata": names}, ensure_ascii=False)
        tensors = {
            "vectors": self.vectors,
            "document": self.document,
            "span": torch.tensor([(s.token_id, *s[2:]) for s in self.spans]).reshape(-1, 7),
            "stratum": torch.tensor([code[name] for name in self.strata], dtype=torch.int64),
            "words": torch.frombuffer(bytearray(words.encode()), dtype=torch.uint8),
        }
        save_tensors(Path(folder) / ACTIVATIONS_FILE, tensors)

    @classmethod
    def load(cls, folder: str | Path) -> Activations:
        """Read what :meth:`save` wrote.

        Raises:
            WeightsError: missing, truncated, corrupt, or not a store of activations.
            NonFiniteError: a vector holds NaN or infinity.
        """
        path = Path(folder) / ACTIVATIONS_FILE
        tensors = load_tensors(path, expected_keys=("vectors", "document", "span", "stratum", "words"))
        try:
            words = parse_json(tensors["words"].numpy().tobytes().decode())
            texts, names, point = words["texts"], words["strata"], words["point"]
            document, n = tensors["document"], len(tensors["vectors"])
            if not all(isinstance(text, str) for text in [*texts, *names, point]) or tensors["vectors"].ndim != 2:
                raise ValueError("texts that are none, or vectors that are no rows")
            width = len(tensors["span"].T) if tensors["span"].ndim == 2 else 0
            span = (n, width if width in (5, 7) else 7)  # the two of fragments came later
            forms = {"document": ((n,), len(texts)), "stratum": ((n,), len(names)), "span": (span, 2**31)}
            for name, (shape, most) in forms.items():
                numbers = tensors[name]
                if numbers.dtype != torch.int64 or numbers.shape != shape or not _within(numbers, most):
                    raise ValueError(f"{name} of {numbers.dtype} {tuple(numbers.shape)} that points outside")
            spans = [
                Span(token, texts[number][start:end], start, end, index, bool(added), *fragment)
                for number, (token, start, end, index, added, *fragment) in zip(
                    document.tolist(), tensors["span"].tolist(), strict=True
                )
            ]
            strata = [names[code] for code in tensors["stratum"].tolist()]
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(
                f"{path}, whose tokens do not fit its texts ({error})", "a store of activations", "read the texts again"
            ) from error
        return cls(tensors["vectors"], spans, document, texts, point, strata)


def _within(numbers: Tensor, most: int) -> bool:
    return bool(((numbers >= 0) & (numbers < most)).all())


def read(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Iterable[str | Encoded],
    point: str | Point,
    positions: Positions = "all",
    strata: Strata | None = None,
    intervene: Intervene | None = None,
    max_tokens_per_batch: int = 8192,
    progress: bool = False,
) -> Activations:
    """Activations of texts at a point, in the order of texts and, within a text, of ``positions``.

    Runs the blocks up to the point only (see :func:`vectors_at`). A model with adapters is read as
    it stands; ``NLA.read`` reads its target.

    Args:
        texts: one or several; what is encoded already is read as it is.
        positions: see :data:`nla.text.tokens.Positions`.
        strata: names the kind of position of every token of a text; None: "all".
        intervene: a context for the forward pass of a batch of documents, such as
            ``lambda rows, padding: hooks.replace(model, "resid_post.2", columns[rows], vectors[rows])``.

    Raises:
        PointError, PositionError, EmptyTextError, ContextLengthError, VocabularyError: see the functions used.
        NonFiniteError: the target gave NaN or infinity.
    """
    given = list(texts) if isinstance(texts, Iterable) and not isinstance(texts, str) else [texts]
    check_stream(unwrapped(model))
    view = truncated_view(model, point)
    written = iter(
        encode_batch(tokenizer, [one for one in given if not isinstance(one, Encoded)], context_length(model))
    )
    encoded = [one if isinstance(one, Encoded) else next(written) for one in given]
    check_lengths(encoded, context_length(model))
    check_positions(positions, len(encoded))
    columns = [select_positions(entry.spans, positions, number) for number, entry in enumerate(encoded)]
    kinds = [_strata_of(number, entry, columns[number], strata) for number, entry in enumerate(encoded)]
    counts = torch.tensor([len(chosen) for chosen in columns], dtype=torch.int64)
    rows = [entry.ids for entry in encoded]
    vectors = vectors_at(view, rows, columns, max_tokens_per_batch, intervene, progress=progress).float()
    check_finite(vectors)
    return Activations(
        vectors=vectors,
        spans=[encoded[number].spans[column] for number, chosen in enumerate(columns) for column in chosen],
        document=torch.repeat_interleave(torch.arange(len(encoded)), counts),
        texts=[entry.text for entry in encoded],
        point=str(point),
        strata=[kind for document in kinds for kind in document],
    )


def padded(rows: Sequence[Sequence[int]], value: int = 0) -> Int[Tensor, "b t"]:
    """Rows of token ids as one tensor, filled up on the right."""
    return pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=value)


def vectors_at(
    view: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    columns: Sequence[Sequence[int]],
    max_tokens_per_batch: int,
    intervene: Intervene | None = None,
    points: Sequence[str | Point] = (),
    progress: bool = False,
) -> Float[Tensor, "n *p d"]:
    """What a truncated view gives at the chosen columns of rows of token ids, row after row, on the CPU in its type.

    Batches by length, the longest first: a budget that is too large fails at once. Padding is on the right and without
    a mask: causality keeps real tokens exact, and the fast attention kernel stays.

    Args:
        view: from :func:`nla.models.points.truncated_view` or :func:`nla.models.load.load_truncated`.
        columns: of each row, in the order in which its vectors are wanted; a row without any is not run.
        intervene: a context for each batch, such as patches of its rows.
        points: on the way to the view's own: then the result has the streams at these instead, (n, p, d), in one pass.
        progress: show a bar.

    Raises:
        VocabularyError: an id that the model has no embedding for.
    """
    ends = torch.tensor([len(chosen) for chosen in columns], dtype=torch.int64).cumsum(0).tolist()
    numbers = [number for number, chosen in enumerate(columns) if chosen]
    batches = length_batches([len(rows[number]) for number in numbers], max_tokens_per_batch)
    device = device_of(view)
    vectors: Tensor | None = None
    waiting: tuple[Tensor, Tensor] | None = None
    with inference(view):
        for part in _bar(batches[::-1], progress):
            batch = [numbers[index] for index in part]
            row = torch.tensor([index for index, number in enumerate(batch) for _ in columns[number]], device=device)
            column = torch.tensor([column for number in batch for column in columns[number]], device=device)
            out = torch.tensor([i for n in batch for i in range(ends[n] - len(columns[n]), ends[n])])
            ids = padded([rows[number] for number in batch])
            check_ids(ids, n_embeddings(view))
            # Interventions first: hooks run in the order of their making, and what is recorded is what flows on.
            none = torch.zeros(len(batch), dtype=torch.int64)
            with intervene(torch.tensor(batch), none) if intervene else nullcontext(), record(view, points) as at:
                last = view(input_ids=ids.to(device), use_cache=False).last_hidden_state
            chosen = last[row, column]
            if points:
                chosen = torch.stack([at[str(point)][row, column] for point in points], dim=1)
            if vectors is None:
                vectors = torch.empty(ends[-1], *chosen.shape[1:], dtype=chosen.dtype)
            # One batch behind: the copy waits for the device only once the next batch is queued there.
            if waiting is not None:
                vectors[waiting[0]] = waiting[1].cpu()
            waiting = out, chosen
    if vectors is None or waiting is None:
        return torch.empty(0, *([len(points)] if points else []), d_model(view))
    vectors[waiting[0]] = waiting[1].cpu()
    return vectors


def _bar(batches: list[list[int]], shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(batches, desc="read", unit="batch", disable=not shown)


def _strata_of(number: int, entry: Encoded, columns: list[int], strata: Strata | None) -> list[str]:
    if strata is None:
        return [UNKNOWN_STRATUM] * len(columns)
    names = list(strata(number, entry.spans))
    if len(names) != len(entry.spans):
        raise PositionError(
            f"{len(names)} strata for the {len(entry.spans)} tokens of text {number}",
            "one name for each token of the text, chosen or not",
            "name every span that the function is given",
        )
    return [names[column] for column in columns]
