"""`nla eval fidelity`: a pair and texts, chats or a store in; how well explanations reconstruct the activations out.

A single sampled explanation stands for an activation (the mean of several would flatter). Reconstruction alone is
content with a private code, so beside FVE stand: joint minus warm-start decoder on the encoder's texts, and, in the
world Couplets, where the truth is known, a truthful reader's texts minus the encoder's under the joint decoder, and the
share of claims that are true of the text.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nla.baselines import GLOBAL, UNKNOWN_STRATUM, fit_baselines
from nla.errors import ArgumentError, BaselineError
from nla.eval.couplet_items import SHOWN_PLANS, documents
from nla.eval.explainers import explain, hit_rate
from nla.eval.pair.fidelity_report import (
    DESCRIBER,
    ENCODER,
    PLANTED,
    TRUTHFUL,
    WARM,
    FidelityReport,
    Gain,
    Public,
)
from nla.eval.pair.texts import load_documents, sample_tokens, world_documents
from nla.eval.pair.truth import VISIBLE, Truth, measure_truth, owners
from nla.eval.report import Check
from nla.eval.settings import EvaluationSettings
from nla.eval.target import doubts, open_pair, open_rival
from nla.eval.worlds import COUPLETS, world_of
from nla.metrics import Baseline
from nla.models.read import Activations
from nla.organisms.couplets import world
from nla.pair.fidelity import FidelityByStratum, reconstruction_errors
from nla.pair.score import Score, score
from nla.progress import Progress, silent
from nla.store.reader import Store
from nla.text.tokens import Positions

if TYPE_CHECKING:
    from nla.autoencoder import NLA

ERROR_REMOVED_MIN, FALL_MAX, BASELINE_MAX, PRIVATE_MAX = 0.5, 0.05, 0.05, 0.1
MIN_ROWS = 20
"""Rows that a kind of position needs for denominators of its own, where they are fitted here."""
_BATCHES = 4


@dataclass(frozen=True)
class FidelitySettings(EvaluationSettings):
    """What to judge a pair on, and beside what."""

    least: ClassVar[dict[str, int]] = {"n_documents": 1, "n_activations": 2}

    texts: str | Path | None = None
    """A file of texts; see :func:`nla.eval.pair.texts.load_documents`. None, and no store: held-out documents of the
    embedded world whose language the target speaks."""
    chats: bool = False
    """``texts`` holds transcripts, as `nla audit` takes them."""
    store: str | Path | None = None
    """A folder that `nla extract` made: its held-out part is read."""
    positions: Positions = "all"
    """Which tokens of the texts; a store holds those that it was made with."""
    n_documents: int = 120
    """Texts to read, the first of a file; of a store, all."""
    n_activations: int = 2000
    """A sample of so many of their activations; of held-out Couplets every token is read."""
    warm_start: NLA | str | Path | None = None
    """The pair before joint training: the gain over it, and how much better the joint decoder reads its encoder."""
    notice: float | None = None
    """How often the warm start's describer saw the rule of Couplets; None: as the pair's metrics say."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.store is not None and self.texts is not None:
            raise ArgumentError("texts as well as a store", "one of them", "give --texts or --store")
        if self.chats and self.texts is None:
            raise ArgumentError("chats without a file", "the file that holds them", "give --texts FILE")


class Denominators(NamedTuple):
    """What FVE is over."""

    baselines: Mapping[str, Baseline]
    source: str
    """Whose they are, in words."""


class Material(NamedTuple):
    """What a pair is judged on."""

    acts: Activations
    couplets: list[world.Couplet] | None
    """The documents, where what is true of them is known."""
    source: str
    denominators: Denominators
    remarks: Sequence[str] = ()
    """What of the chats the target does not read."""


def judge_fidelity(
    pair: NLA | str | Path, settings: FidelitySettings | None = None, progress: Progress = silent
) -> FidelityReport:
    """Score a pair on activations that it was not trained on, beside baselines and, if given, its warm start.

    Raises:
        ArgumentError: no texts for a pair whose target is of no embedded world.
        ConfigError: the warm start reads another point or target.
        BaselineError: the pair has no denominators, and there are too few texts to fit some on a part of them.
        StoreError, ShapeError, TokenizerMismatchError: a store of another target or point.
        ParseError, TranscriptError, VocabularyError: the texts cannot be read.
    """
    settings = settings or FidelitySettings()
    nla = open_pair(pair, settings.device)
    warm = None if settings.warm_start is None else open_rival(settings.warm_start, nla, settings.device)
    acts, couplets, source, denominators, remarks = material(nla, settings)
    texts = {ENCODER: _explain(nla, acts.vectors, settings.seed, "explain", progress)}
    if couplets is not None:
        texts |= _known_texts(acts, couplets, _notice(nla, settings.notice), settings.seed)
    if warm is not None:
        texts[WARM] = _explain(warm, acts.vectors, settings.seed, "explain (warm start)", progress)
    predicted = nla.reconstruct(texts[ENCODER], strict=False)
    errors = _errors(nla, warm, acts.vectors, predicted, texts)
    progress("fidelity", 0.5)
    judged = FidelityByStratum(acts.strata, acts.document, denominators.baselines, seed=settings.seed)
    empty = nla.reconstruct([""], strict=False)[0]
    scored = score(
        acts.vectors, predicted, acts.strata, acts.document, denominators.baselines, empty, seed=settings.seed
    )
    public = [_public(judged, errors, stratum) for stratum in judged.rows] if couplets is not None or warm else []
    gains = [_gain(judged, errors, stratum) for stratum in judged.rows] if warm is not None else []
    claims = [] if couplets is None else measure_truth(acts, couplets, texts[ENCODER], texts.get(WARM), settings.seed)
    report = FidelityReport(
        point=str(nla.point),
        source=source,
        denominators=denominators.source,
        n_documents=settings.n_documents if couplets is not None else len(acts.document.unique()),
        n_activations=len(acts),
        score=scored,
        public=public,
        gains=gains,
        truths=claims,
        checks=_checks(scored, public, gains, claims, couplets is not None),
        doubts=doubts(nla, warm_start=warm),
        examples=_examples(acts, texts[ENCODER]),
        remarks=remarks,
    )
    progress("fidelity", 1.0)
    return report


def _refuse_positions(settings: FidelitySettings, beside: str) -> None:
    """Refuse positions that would be ignored."""
    if settings.positions != "all":
        raise ArgumentError(f"positions {settings.positions!r} beside {beside}", "all of them", "leave positions out")


def material(nla: NLA, settings: FidelitySettings) -> Material:
    """Activations to judge a pair on, with what FVE is over; see :class:`FidelitySettings`.

    Raises:
        ArgumentError, BaselineError, StoreError: see :func:`judge_fidelity`.
    """
    if settings.store is not None:
        _refuse_positions(settings, "a store, whose tokens were chosen when it was made")
        return _store_material(nla, settings.store, settings)
    couplets, remarks = None, ()
    if settings.texts is None and world_of(nla.tokenizer) == COUPLETS:
        _refuse_positions(settings, f"the documents of {COUPLETS}, of which every token is read")
        known = couplets = documents(settings.n_documents, settings.seed + 3, SHOWN_PLANS)
        source = f"held-out documents of the world {COUPLETS}"
        acts = nla.read(
            [couplet.text for couplet in known], strata=lambda number, spans: world.strata(known[number], spans)
        )
    else:
        if settings.texts is None:
            chosen = world_documents(nla, settings.n_documents, settings.seed)
        else:
            chosen = load_documents(nla, settings.texts, settings.chats, settings.n_documents)
        source, remarks = chosen.source, chosen.remarks
        acts = sample_tokens(nla, chosen, settings.positions, settings.n_activations, settings.seed).read(nla)
    if len(acts) == 0:
        raise ArgumentError(f"no activations of {source}", "1 or more", "give texts with a position to read")
    denominators = own_denominators(nla)
    if denominators is None:
        fit, acts = _parted(acts, source)
        denominators = _fitted(fit)
    return Material(with_known_strata(acts, denominators), couplets, source, denominators, remarks)


def _store_material(nla: NLA, folder: str | Path, settings: FidelitySettings) -> Material:
    """A sample of a store's held-out part."""
    store = held_out_part(nla, folder)
    drawn = torch.randperm(len(store), generator=torch.Generator().manual_seed(settings.seed))
    acts = store.activations(drawn[: settings.n_activations].sort().values)
    denominators = own_denominators(nla) or Denominators(store.baselines, f"the training activations of {folder}")
    return Material(with_known_strata(acts, denominators), None, f"the held-out part of {folder}", denominators)


def held_out_part(nla: NLA, folder: str | Path) -> Store:
    """The held-out part of a store of the pair's own target and point.

    Raises:
        ArgumentError: it is empty.
        StoreError, ShapeError, TokenizerMismatchError: a store of another target or point.
    """
    store = Store.open(folder, "eval")
    nla.check_store(store)
    if len(store) == 0:
        raise ArgumentError(
            f"the store {folder} without held-out documents",
            "some that the pair was not trained on",
            "read a corpus with eval_fraction above 0, or give --texts FILE",
        )
    return store


def own_denominators(nla: NLA) -> Denominators | None:
    """Those of the pair's training activations, if it has them."""
    return Denominators(nla.baselines, "the pair's training activations") if GLOBAL in nla.baselines else None


def _parted(acts: Activations, source: str) -> tuple[Activations, Activations]:
    """Activations of every second document, to fit denominators on, and those of the others, to be scored.

    Raises:
        BaselineError: fewer than two documents, or activations, in a part.
    """
    odd = acts.document % 2 == 1
    parts = acts[odd], acts[~odd]
    if any(len(part) < 2 for part in parts):
        raise BaselineError(
            f"a pair without denominators, and {len(acts)} activations of {source} to fit some on",
            "two documents or more, one to fit on and one to score",
            "give more texts; or the training activations: nla.fit_baselines(acts), or --store STORE",
        )
    return parts


def _fitted(fit: Activations) -> Denominators:
    """Denominators of the activations ``fit``, by strata that have enough of them."""
    enough = {name for name in fit.strata if fit.strata.count(name) >= MIN_ROWS}
    strata = [name if name in enough else UNKNOWN_STRATUM for name in fit.strata]
    n_documents = len(fit.document.unique())
    where = f"{len(fit)} activations of {n_documents} other documents of the same source, since the pair has none"
    return Denominators(fit_baselines(fit.vectors, strata), where)


def with_known_strata(acts: Activations, denominators: Denominators) -> Activations:
    """The activations with the strata that have denominators; the others are judged among all alone."""
    names = [name if name in denominators.baselines else UNKNOWN_STRATUM for name in acts.strata]
    return acts.replace(strata=names)


def _notice(nla: NLA, notice: float | None) -> float | None:
    """How often the describer saw the rule: its hit rate beyond chance; None if the pair does not say."""
    rate = hit_rate(nla)
    return notice if notice is not None or rate is None else world.notice_of(rate)


def _explain(nla: NLA, vectors: Float[Tensor, "n d"], seed: int, stage: str, progress: Progress) -> list[str]:
    texts: list[str] = []
    for number, part in enumerate(vectors.chunk(_BATCHES)):
        texts += explain(nla, part, seed=seed + number)
        progress(stage, (number + 1) / _BATCHES)
    return texts


def _known_texts(
    acts: Activations, couplets: Sequence[world.Couplet], notice: float | None, seed: int
) -> dict[str, list[str]]:
    """What a truthful reader and, if it is known how often it is right, the describer write of each token."""
    rng, rows = random.Random(seed), owners(acts, couplets)
    texts = {TRUTHFUL: [world.truthful(couplet, span) for couplet, span in rows]}
    if notice is not None:
        texts[DESCRIBER] = [world.describe(couplet, span, rng, notice) for couplet, span in rows]
    return texts


def _errors(
    nla: NLA,
    warm: NLA | None,
    vectors: Float[Tensor, "n d"],
    predicted: Float[Tensor, "n d"],
    texts: Mapping[str, Sequence[str]],
) -> dict[str, Tensor]:
    """Errors (n,) of the pair's decoder on each kind of text, and of the warm start's ("warm start, …") on some."""

    def errors(pair: NLA, name: str) -> Tensor:
        return reconstruction_errors(vectors, pair.reconstruct(texts[name], strict=False))

    by_text = {ENCODER: reconstruction_errors(vectors, predicted)}
    by_text |= {name: errors(nla, name) for name in texts if name not in (ENCODER, WARM)}
    if warm is not None:
        by_text[WARM] = errors(warm, WARM)
        by_text |= {f"{WARM}, {name}": errors(warm, name) for name in (ENCODER, TRUTHFUL) if name in texts}
    return by_text


def _public(judged: FidelityByStratum, errors: Mapping[str, Tensor], stratum: str) -> Public:
    encoder, truthful, describer = errors[ENCODER], errors.get(TRUTHFUL), errors.get(DESCRIBER)
    warm_encoder, warm_truthful = errors.get(f"{WARM}, {ENCODER}"), errors.get(f"{WARM}, {TRUTHFUL}")
    beyond = None
    if truthful is not None and warm_encoder is not None and warm_truthful is not None:
        beyond = judged.fve_gain(stratum, encoder - warm_encoder, truthful - warm_truthful)
    return Public(
        stratum=stratum,
        n=judged.n(stratum),
        encoder=judged.fve(stratum, encoder),
        truthful=None if truthful is None else judged.fve(stratum, truthful),
        honest=None if describer is None else judged.fve(stratum, describer),
        truthful_minus_encoder=None if truthful is None else judged.fve_gain(stratum, truthful, encoder),
        joint_minus_warm_decoder=None if warm_encoder is None else judged.fve_gain(stratum, encoder, warm_encoder),
        beyond_truthful=beyond,
    )


def _gain(judged: FidelityByStratum, errors: Mapping[str, Tensor], stratum: str) -> Gain:
    return Gain(
        stratum=stratum,
        warm=judged.fve(stratum, errors[WARM]),
        change=judged.fve_gain(stratum, errors[ENCODER], errors[WARM]),
        error_removed=judged.error_removed(stratum, errors[ENCODER], errors[WARM]),
    )


def _checks(
    score: Score, public: Sequence[Public], gains: Sequence[Gain], truths: Sequence[Truth], known: bool
) -> list[Check]:
    """
    Args:
        known: the documents are Couplets, whose planted stratum must gain most.
    """
    checks = [] if known else [_above_baselines(score)]
    for gain in gains:
        if gain.stratum == PLANTED and known:
            name = f"{PLANTED}: share of the warm start's error removed"
            checks.append(Check.at_least(name, gain.error_removed, ERROR_REMOVED_MIN))
        elif gain.stratum != GLOBAL or not known:
            passed = gain.change.value >= -FALL_MAX
            checks.append(Check(f"{gain.stratum}: change of FVE", gain.change, f"≥ −{FALL_MAX}", passed))
    if not gains:
        checks.append(Check("gain over the warm start", None, f"≥ {ERROR_REMOVED_MIN}, ≥ −{FALL_MAX}"))
    shuffles = {name: part.shuffled for name, part in score.by_stratum.items()}
    shuffles |= {
        "all positions": score.baselines.get("shuffled"),
        "within strata": score.baselines.get("shuffled_within"),
    }
    for name, fve in shuffles.items():
        if fve is not None:
            checks.append(Check.at_most(f"{name}: shuffled", fve, BASELINE_MAX))
    for part in public:
        value = part.truthful_minus_encoder
        if value is not None:
            name, held = f"{part.stratum}: truthful minus encoder's", part.stratum == PLANTED
            checks.append(Check.at_most(name, value, PRIVATE_MAX, held))
    for claim in truths:
        if claim.claim == VISIBLE and claim.warm_start is not None:
            before = claim.warm_start.value
            passed = claim.true.value >= before - FALL_MAX if claim.stratum == PLANTED else None
            name = f"{claim.stratum}: visible claims as true as the warm start's"
            checks.append(Check(name, claim.true, f"≥ {before:.3f} − {FALL_MAX}", passed))
    return checks


def _above_baselines(score: Score) -> Check:
    """Whether the explanations reconstruct better than whatever never saw the activation; one document cannot say."""
    name, best = max(score.baselines.items(), key=lambda item: item[1].value)
    known = score.fve.low == score.fve.low and best.high == best.high
    bound = f"interval > {best} ({name.replace('_', ' ')})"
    return Check("FVE above the best baseline", score.fve, bound, score.fve.low > best.high if known else None)


def _examples(acts: Activations, texts: Sequence[str], n_documents: int = 2) -> list[dict[str, str]]:
    """Every token of the first documents with its explanation."""
    return [
        {"token": span.text, "stratum": stratum, "explanation": text}
        for span, stratum, number, text in zip(acts.spans, acts.strata, acts.document.tolist(), texts, strict=True)
        if number < n_documents
    ]
