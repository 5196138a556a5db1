"""Explanations: per activation the sampled texts, how well each reconstructs it, and how far to trust them: cosine,
agreement across samples and the margin over the baselines, together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, overload

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from nla.baselines import UNKNOWN_STRATUM
from nla.errors import ArgumentError, ConfigError, NonFiniteError, visible
from nla.models.read import Activations
from nla.storage.files import read_json, write_json
from nla.storage.schema import Problem, first_problem, shown
from nla.text.claims import claims, normalise
from nla.text.tokens import Span
from nla.views import tokens
from nla.views.figures import data_frame, trust_bars
from nla.views.tokens import LEVELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

# (cosine, agreement, margin) that each level needs at least; see Trust.of for why the margin decides.
_MEDIUM = (0.5, 0.3, 0.05)
_HIGH = (0.8, 0.6, 0.15)


class Trust(NamedTuple):
    """A level, "low", "medium" or "high", and the three numbers it comes from."""

    level: str
    cosine: float
    agreement: float | None
    margin: float

    @classmethod
    def of(cls, cosine: float, agreement: float | None, margin: float) -> Trust:
        """The level that all three numbers reach: a chain as strong as its weakest link.

        | level  | cosine | agreement | margin |
        |--------|--------|-----------|--------|
        | high   | ≥ 0.80 | ≥ 0.60    | ≥ 0.15 |
        | medium | ≥ 0.50 | ≥ 0.30    | ≥ 0.05 |
        | low    | anything else |    |        |

        A high cosine alone is no evidence: where activations share a direction, a constant text reaches it too, and
        then the margin is near 0. A sample that no other sample repeats may be a confabulation, so without an agreement
        (one sample) the level is at most "medium". A number that is NaN reaches no level.

        Args:
            cosine: mean over samples of the cosine between activation and reconstruction, in [-1, 1].
            agreement: what :func:`agreement` gives, in [0, 1], or None.
            margin: mean cosine minus that of the best baseline (empty, mean) on the same activation.

        The thresholds are conventions, not calibrated probabilities.
        """
        if _reaches((cosine, agreement, margin), _HIGH) and agreement is not None:
            level = "high"
        elif _reaches((cosine, agreement, margin), _MEDIUM):
            level = "medium"
        else:
            level = "low"
        return cls(level, cosine, agreement, margin)

    def __str__(self) -> str:
        agreement = "–" if self.agreement is None else f"{self.agreement:.2f}"
        return f"{self.level} (cosine {self.cosine:.2f}, agreement {agreement}, margin {self.margin:+.2f})"


def agreement(samples: Sequence[str | Sequence[str]]) -> float | None:
    """Mean overlap of claims between pairs of samples of one activation: 1 all alike, 0 nothing shared.

    The overlap of two samples is the Jaccard index of their sets of normalised claims; a sample without claims (an
    unparsable one) shares nothing with any, not even with another of its kind.

    Args:
        samples: the claims of each sample; a bare string is one claim.

    Returns:
        In [0, 1]; None for a single sample, which cannot agree or disagree.

    Raises:
        ArgumentError: no samples.

    >>> agreement([["It is spring.", "Anna is here."], ["it is spring", "Bob is here."]])
    0.3333333333333333
    """
    if not samples:
        raise ArgumentError("no samples", "at least 1", "explain the activation with samples=2 or more")
    if len(samples) == 1:
        return None
    lists = [[claims] if isinstance(claims, str) else claims for claims in samples]
    sets = [{normalise(claim) for claim in claims} - {""} for claims in lists]
    overlaps = [len(a & b) / len(a | b) if a | b else 0.0 for a, b in combinations(sets, 2)]
    return math.fsum(overlaps) / len(overlaps)


def judge(
    texts: Sequence[str],
    complete: Sequence[bool],
    cosines: Float[Tensor, "n s"],
    baselines: Float[Tensor, " n"],
    acts: Activations | None,
) -> Explanations:
    """The explanations of n activations from s samples of each, activation by activation.

    Args:
        complete: per sample, it is one whole explanation.
        cosines: of each activation with the reconstruction from each of its samples.
        baselines: the highest cosine that a text reaches which knows nothing of the activation.
        acts: the tokens that were read, if known.
    """
    judged, samples = [], cosines.shape[1]
    for row, (of_row, baseline) in enumerate(zip(cosines.tolist(), baselines.tolist(), strict=True)):
        written = list(texts[row * samples : (row + 1) * samples])
        mean = sum(of_row) / samples
        trust = Trust.of(mean, agreement([claims(text) for text in written]), mean - baseline)
        one = Explanation(written, list(complete[row * samples : (row + 1) * samples]), of_row, trust)
        if acts is not None:
            one.span, one.document, one.stratum = acts.spans[row], int(acts.document[row]), acts.strata[row]
        judged.append(one)
    return Explanations(judged) if acts is None else Explanations(judged, acts.texts, acts.point)


def _reaches(numbers: tuple[float | None, ...], thresholds: tuple[float, ...]) -> bool:
    """Whether every number that is known reaches its threshold."""
    return all(number is None or number >= least for number, least in zip(numbers, thresholds, strict=True))


_Count = Annotated[int, Field(ge=0)]

EXPLANATIONS_FILE = "explanations.json"

_OF_SPAN = ("token_id", "index", "start", "end", "added", "fragment", "fragments")
"""What a row says of its token beside its text: its characters, from ``start`` to ``end``, whether the tokenizer added
it, and which part of how many it is, where several tokens share one."""


@dataclass
class Explanation:
    """The explanation of one activation: samples of it, and how far they can be trusted."""

    texts: list[str]
    """One explanation per sample."""

    complete: list[bool]
    """Per sample: it was one whole explanation. What there is of another is kept in ``texts``, and counts."""

    cosine: list[float]
    """Per sample: cosine of the activation with the reconstruction from this text alone."""

    trust: Trust
    """Level from cosine, agreement and margin together; never from cosine alone."""

    span: Span | None = None
    """The token that was read, if known."""

    document: int | None = None
    """The text that it stands in, if known."""

    stratum: str | None = None
    """Kind of position, if known."""

    @property
    def token(self) -> str:
        """Text of the token that was read; empty if unknown."""
        return "" if self.span is None else self.span.text

    @property
    def agreement(self) -> float | None:
        """Mean overlap of claims between samples, in [0, 1]; None for one sample."""
        return self.trust.agreement

    @property
    def margin(self) -> float:
        """Mean cosine minus the best baseline's on this activation."""
        return self.trust.margin

    @property
    def claims(self) -> list[list[str]]:
        """The claims of each sample."""
        return [claims(text) for text in self.texts]

    def to_json(self) -> dict[str, object]:
        """A JSON-ready dict."""
        return {
            "token": self.token,
            **dict.fromkeys(_OF_SPAN),
            **({} if self.span is None else {name: getattr(self.span, name) for name in _OF_SPAN}),
            "document": self.document,
            "stratum": self.stratum,
            "texts": self.texts,
            "complete": self.complete,
            "cosine": self.cosine,
            "agreement": self.agreement,
            "margin": self.margin,
            "trust": self.trust.level,
        }


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Row(_Strict):
    """An explanation as :meth:`Explanation.to_json` writes it."""

    token: str
    token_id: _Count | None
    index: _Count | None
    start: _Count | None
    end: _Count | None
    added: bool | None
    fragment: Annotated[int, Field(ge=1)] | None
    fragments: Annotated[int, Field(ge=1)] | None
    document: _Count | None
    stratum: str | None
    texts: Annotated[list[str], Field(min_length=1)]
    complete: list[bool]
    cosine: list[float]
    agreement: float | None
    margin: float
    trust: Literal["low", "medium", "high"]

    def explanation(self, documents: Sequence[str]) -> Explanation:
        """What was saved.

        Raises:
            ValueError: its values contradict each other, or the texts that were read.
        """
        if not len(self.texts) == len(self.complete) == len(self.cosine):
            raise ValueError(f"{len(self.texts)} texts, {len(self.complete)} complete, {len(self.cosine)} cosine")
        place = (self.token_id, self.index, self.start, self.end, self.added, self.fragment, self.fragments)
        if None in place and place != (None,) * len(place):
            raise ValueError("a token without all of its places")
        if documents and self.document is not None:
            if self.document >= len(documents):
                raise ValueError(f"document {self.document} of {len(documents)}")
            if self.start is not None and documents[self.document][self.start : self.end] != self.token:
                raise ValueError(f"the token {shown(self.token)}, which is not in its document")
        span = None if None in place else Span(place[0], self.token, *place[2:4], place[1], *place[4:])  # type: ignore[arg-type]
        trust = Trust(self.trust, sum(self.cosine) / len(self.cosine), self.agreement, self.margin)
        return Explanation(self.texts, self.complete, self.cosine, trust, span, self.document, self.stratum)


class _File(_Strict):
    """What explanations.json holds."""

    format_version: Literal[1]
    point: str | None
    documents: list[str]
    explanations: list[_Row]


@dataclass(repr=False)
class Explanations(Sequence[Explanation]):
    """One explanation per activation, in their order. A notebook shows the texts, tokens coloured by trust."""

    items: list[Explanation] = field(default_factory=list)

    documents: list[str] = field(default_factory=list)
    """The texts that were read, to which :attr:`Explanation.document` points; empty if unknown."""

    point: str | None = None
    """Where the activations were read, if known."""

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Explanation: ...

    @overload
    def __getitem__(self, index: slice) -> Explanations: ...

    def __getitem__(self, index: int | slice) -> Explanation | Explanations:
        """An explanation by int; Explanations by slice."""
        if isinstance(index, slice):
            return Explanations(self.items[index], self.documents, self.point)
        return self.items[index]

    @property
    def texts(self) -> list[list[str]]:
        """Explanations by activation and sample."""
        return [one.texts for one in self.items]

    @property
    def agreement(self) -> list[float | None]:
        """Agreement by activation."""
        return [one.agreement for one in self.items]

    @property
    def cosine(self) -> list[list[float]]:
        """Cosine by activation and sample."""
        return [one.cosine for one in self.items]

    @property
    def strata(self) -> list[str | None]:
        """Kind of position by activation."""
        return [one.stratum for one in self.items]

    @property
    def trust(self) -> list[Trust]:
        """Trust by activation."""
        return [one.trust for one in self.items]

    def to_json(self) -> list[dict[str, object]]:
        """A JSON-ready list."""
        return [one.to_json() for one in self.items]

    def save(self, folder: str | Path) -> None:
        """Write ``explanations.json`` into a folder, atomically.

        Raises:
            StorageError: it could not be written whole.
            NonFiniteError: a figure is NaN or infinite.
        """
        for place, one in enumerate(self.items):
            if not all(map(math.isfinite, (*one.cosine, one.margin, one.agreement or 0.0))):
                got = f"explanation {place} with {one.trust}"
                raise NonFiniteError(got, "finite figures", "leave it out: its activation is zero or not finite")
        content = {"format_version": 1, "point": self.point, "documents": self.documents}
        write_json(Path(folder) / EXPLANATIONS_FILE, {**content, "explanations": self.to_json()})

    @classmethod
    def load(cls, folder: str | Path) -> Explanations:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: the file is missing, malformed, or contradicts itself.
        """
        path = Path(folder) / EXPLANATIONS_FILE
        try:
            saved = _File.model_validate(read_json(path))
            items = [row.explanation(saved.documents) for row in saved.explanations]
            return cls(items, saved.documents, saved.point)
        except ValidationError as error:
            wrong = first_problem(error, _File)
        except ValueError as error:
            wrong = Problem(str(error), "explanations that fit their texts")
        raise ConfigError(f"{path} with {wrong.got}", wrong.expected, "explain the activations again")

    def to_dataframe(self) -> DataFrame:
        """A row of pandas for each sample: its token, its text and cosine, and what its activation's samples share.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        rows = [(one, sample) for one in self.items for sample in range(len(one.texts))]
        columns: dict[str, Sequence[Any]] = {
            "document": [one.document for one, _ in rows],
            **tokens.span_columns([one.span for one, _ in rows]),
            "stratum": [one.stratum for one, _ in rows],
            "sample": [sample for _, sample in rows],
            "text": [one.texts[sample] for one, sample in rows],
            "complete": [one.complete[sample] for one, sample in rows],
            "cosine": [one.cosine[sample] for one, sample in rows],
            "agreement": [one.agreement for one, _ in rows],
            "margin": [one.margin for one, _ in rows],
            "trust": [one.trust.level for one, _ in rows],
        }
        return data_frame(columns)

    def plot(self, axes: Axes | None = None) -> Axes:
        """The cosine of each activation, a bar for each token in the colour of its trust, beside its best baseline.

        Args:
            axes: of matplotlib, to draw in; None: new ones of pyplot.
        """
        baselines = [one.trust.cosine - one.margin for one in self.items]
        levels = [one.trust.level for one in self.items]
        return trust_bars([one.token for one in self.items], levels, self.cosine, baselines, axes)

    def to_html(self, title: str = "", remarks: Sequence[str] = ()) -> str:
        """The token view as one HTML page that needs nothing else: no script, no network.

        Args:
            title: of the page, such as the pair's name.
            remarks: what its readers should be warned of, such as :attr:`nla.autoencoder.NLA.doubts`.
        """
        title = title or "What activations hold, in words"
        return tokens.page(self.documents, self._notes(), title, self._about(), remarks)

    def _repr_html_(self) -> str:
        return tokens.fragment(self.documents, self._notes(), self._about())

    def _notes(self) -> list[tokens.Note]:
        return [
            tokens.note_of(one.span, one.document, _figures(one), one.trust.level, _samples(one)) for one in self.items
        ]

    def _about(self) -> str:
        n_samples = sorted({len(one.texts) for one in self.items})
        where = "" if self.point is None else f" at {self.point}"
        about = f"{len(self)} activation{'' if len(self) == 1 else 's'}{where}"
        if n_samples:
            most = f" to {n_samples[-1]}" if len(n_samples) > 1 else ""
            about += f", {n_samples[0]}{most} sample{'' if n_samples[-1] == 1 else 's'} of each"
        return about

    def __repr__(self) -> str:
        counts = Counter(trust.level for trust in self.trust)
        by_level = ", ".join(f"{counts[level]} {level}" for level in reversed(LEVELS) if counts[level])
        return f"Explanations({self._about()}{'; trust: ' if counts else ''}{by_level})"

    def __str__(self) -> str:
        return "\n".join(f"{visible(one.token)}  {one.trust.level}  {visible(one.texts[0])}" for one in self.items)


def _samples(one: Explanation) -> list[tokens.Sample]:
    return list(map(tokens.Sample, one.texts, one.cosine, one.complete))


def _figures(one: Explanation) -> dict[str, str]:
    """What the token view says of an explanation beside its texts."""
    figures = tokens.trust_figures(*one.trust[1:])
    return figures if one.stratum in (None, UNKNOWN_STRATUM) else {**figures, "kind": one.stratum}
