"""`nla eval claims`: a pair and a store with known attributes in; how often explanations are true, by claim, out.

A claim is read by its wording (:func:`nla.text.facts.stated`) and held against what the target holds likely next, the
token, and what the corpus knows of the document. On the very same rows stand the commonest value, the claims of other
rows, a reader of the visible text, a linear probe of the vectors, and another pair. FVE says what the decoder makes of
the explanations, of the same facts in other words, and of each kind of claim.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nla.baselines import GLOBAL
from nla.errors import ArgumentError
from nla.eval.explainers import explain
from nla.eval.pair.claim_truth import (
    BEFORE,
    NEXT,
    NEXT_ANY,
    OF_TOKENS,
    TOKEN,
    Said,
    Truth,
    Value,
    attributes_of,
    commonest,
    guessed,
    n_gram_values,
    outcomes,
    probed,
    read_claims,
    somewhere,
    spread,
)
from nla.eval.pair.claims_report import (
    ALL_ROWS,
    HELD_OUT,
    SEEN,
    Ablation,
    ClaimFigures,
    ClaimsReport,
    Shares,
    TextFidelity,
)
from nla.eval.pair.fidelity import Denominators, held_out_part, own_denominators, with_known_strata
from nla.eval.report import Check, Rate
from nla.eval.settings import EvaluationSettings
from nla.eval.target import doubts, open_pair, open_rival
from nla.models.read import Activations
from nla.pair.fidelity import FidelityByStratum, other_document_rows, reconstruction_errors
from nla.pair.score import Score, score
from nla.progress import Progress, silent
from nla.stats import Interval, bootstrap
from nla.store.facts import TokenFacts, TokenNames, answers_of, document_ids, known_attributes, token_facts
from nla.store.reader import Store, open_splits
from nla.text.claims import claims
from nla.text.facts import FORM, INSTRUCTION, Facts, state, stated

if TYPE_CHECKING:
    from nla.autoencoder import NLA

FVE_MIN, BASELINE_MAX, RETAINED_MIN = 0.3, 0.05, 0.6
OF_PROBE_MIN, FALSE_ALARMS_MAX = 0.8, 0.05
N_ABLATED, N_FIT_DOCUMENTS = 200, 400
"""Explanations whose claims are dropped one by one; training documents of which it is computed what comes next."""


@dataclass(frozen=True, kw_only=True)
class ClaimsSettings(EvaluationSettings):
    """What to judge a pair on, and beside what."""

    least: ClassVar[dict[str, int]] = {"n_activations": 2, "n_samples": 1, "n_fit": 2}

    store: str | Path
    """A folder that `nla extract` or a training made, of documents with attributes: its held-out part is judged on."""
    beside: NLA | str | Path | None = None
    """A pair of the same target and point, such as the warm start."""
    n_activations: int = 600
    """Of the held-out part, spread evenly over kinds of token."""
    n_samples: int = 1
    """Explanations of each, at temperature 1."""
    n_fit: int = 4000
    """Training rows that the probe and the readers of the text are fitted on."""


class Rows(NamedTuple):
    """Activations and what is true of each."""

    acts: Activations
    truths: list[Truth]
    visible: list[str]
    """What of its message can be read at each token."""
    groups: Int[Tensor, " n"]
    """What shares an answer is resampled together."""

    def repeated(self, n: int) -> Rows:
        """Every row ``n`` times, one round after the other."""
        rows = torch.arange(len(self.truths)).repeat(n)
        return Rows(self.acts[rows], self.truths * n, self.visible * n, self.groups.repeat(n))


class Guesses(NamedTuple):
    """What readers without texts would claim of each row, by kind of claim."""

    commonest: dict[str, list[Value]]
    text: dict[str, list[Value]]
    probe: dict[str, list[Value]]


def judge_claims(pair: NLA | str | Path, settings: ClaimsSettings, progress: Progress = silent) -> ClaimsReport:
    """Hold the claims of sampled explanations against what is true of held-out activations.

    Raises:
        ArgumentError: the store has no held-out part, or no training part.
        ConfigError: the pair beside reads another point or target.
        StoreError, ShapeError, TokenizerMismatchError: a store of another target or point.
    """
    nla = open_pair(pair, settings.device)
    rival = None if settings.beside is None else open_rival(settings.beside, nla, settings.device)
    held_out_part(nla, settings.store)
    stores = open_splits(settings.store)
    if len(stores["train"]) < 2:
        got = f"the store {settings.store} without training rows"
        raise ArgumentError(got, "some to fit probe and readers on", "read a corpus of which a part is not held out")
    store, seed = stores["eval"], settings.seed
    denominators = own_denominators(nla) or Denominators(store.baselines, f"the training part of {settings.store}")
    rows = rows_of(nla, store, spread(store.strata(), settings.n_activations, seed))
    progress("claims: what is true", 0.2)
    guesses = guesses_of(nla, stores["train"], rows, settings)
    progress("claims: readers", 0.4)
    texts, beside = ([] if one is None else sampled(one, rows, settings) for one in (nla, rival))
    progress("claims: explain", 0.6)
    report = judged_texts(nla, rows, guesses, texts, denominators, rival, beside, seed)
    progress("claims", 1.0)
    return replace(
        report,
        source=f"the held-out part of {settings.store}",
        n_fit=min(settings.n_fit, len(stores["train"])),
        doubts=doubts(nla, beside=rival),
    )


def sampled(nla: NLA, rows: Rows, settings: ClaimsSettings) -> list[str]:
    """``n_samples`` explanations of each row, one round after the other."""
    rounds = range(settings.n_samples)
    return [text for number in rounds for text in explain(nla, rows.acts.vectors, seed=settings.seed + number)]


def rows_of(nla: NLA, store: Store, chosen: Int[Tensor, " n"], following: bool = True) -> Rows:
    """Rows of a store with what is true of them; without ``following``, not of what comes next."""
    acts, known = store.activations(chosen), store.attributes(chosen)
    with nla.role("target"):
        at: list[TokenFacts] = token_facts(acts, nla.base_of("target"), nla.tokenizer, following)
    truths = [
        Truth(
            tuple(name for name, _ in here.following),
            here.token,
            here.before,
            here.place,
            attributes_of(of_document, texts),
            [name for name in of_document.get("held_out") or () if isinstance(name, str)],
        )
        for here, of_document, texts in zip(at, known, known_attributes(known), strict=True)
    ]
    names = answers_of(store, chosen, known)
    codes = {name: code for code, name in enumerate(dict.fromkeys(names))}
    return Rows(acts, truths, [here.visible for here in at], torch.tensor([codes[name] for name in names]))


def kinds_of(rows: Rows) -> list[str]:
    """The kinds of claims that some row decides."""
    return [*OF_TOKENS, *dict.fromkeys(name for truth in rows.truths for name in truth.attributes)]


def guesses_of(nla: NLA, store: Store, rows: Rows, settings: ClaimsSettings) -> Guesses:
    """Readers fitted on training rows: of tokens on rows of few documents, of attributes on rows of many."""
    draw = torch.Generator().manual_seed(settings.seed)
    order, documents = torch.randperm(len(store), generator=draw), store.documents()
    numbers = documents.unique()
    few = numbers[torch.randperm(len(numbers), generator=draw)[:N_FIT_DOCUMENTS]]
    of_tokens = rows_of(nla, store, order[torch.isin(documents[order], few)][: settings.n_fit].sort().values)
    of_documents = rows_of(nla, store, order[: settings.n_fit].sort().values, following=False)
    guesses = Guesses({}, {}, {})
    for kind in kinds_of(rows):
        fit = of_tokens if kind in OF_TOKENS else of_documents
        guesses.commonest[kind] = commonest(kind, fit.truths, fit.acts.strata, rows.acts.strata)
        readers = {"probe": (fit.acts.vectors, rows.acts.vectors)}
        readers |= {} if kind in OF_TOKENS else {"text": (fit.visible, rows.visible)}
        for name, (features, others) in readers.items():
            values = probed(kind, fit.truths, features, others, settings.seed)
            if values is not None:
                getattr(guesses, name)[kind] = values
    tokenizer, spans, acts = nla.tokenizer, rows.acts.spans, rows.acts
    where = acts.document.tolist()
    ids = [document_ids(tokenizer, acts.texts[number], [span]) for number, span in zip(where, spans, strict=True)]
    ends = [acts.texts[number][: span.end] for number, span in zip(where, spans, strict=True)]
    training: Any = tokenizer(of_documents.acts.texts, verbose=False)  # pyright: ignore[reportCallIssue]
    names = TokenNames(nla.base_of("target"), tokenizer)
    guesses.text[NEXT] = guesses.text[NEXT_ANY] = n_gram_values(training["input_ids"], ids, ends, names)
    return guesses


def judged_texts(
    nla: NLA,
    rows: Rows,
    guesses: Guesses,
    texts: Sequence[str],
    denominators: Denominators,
    rival: NLA | None = None,
    beside: Sequence[str] = (),
    seed: int = 0,
) -> ClaimsReport:
    """The report of explanations: one or several rounds of one text for each row.

    Args:
        beside: as many texts of the pair ``rival``.
    """
    n_samples, kinds = len(texts) // len(rows.truths), kinds_of(rows)
    many = rows.repeated(n_samples)
    said = [read_claims(text, kinds) for text in texts]
    theirs = [read_claims(text, kinds) for text in beside]
    many_guesses = Guesses(*({kind: of * n_samples for kind, of in each.items()} for each in guesses))
    figures = truth_figures(many, kinds, said, theirs, many_guesses, seed)
    scored, fidelity, gain, kept = fidelity_figures(nla, many, texts, denominators, rival, beside, seed)
    alarms = _false_alarms(many, said, seed)
    counts = torch.tensor([[one.n_unread, one.n_claims] for one in said]).double()
    return ClaimsReport(
        point=str(nla.point),
        source="",
        denominators=denominators.source,
        n_activations=len(rows.truths),
        n_samples=n_samples,
        n_documents=len(rows.acts.document.unique()),
        n_fit=0,
        unread=Rate.of_counts(counts, many.groups, seed),
        false_alarms=alarms,
        figures=figures,
        score=scored,
        texts=fidelity,
        retention=kept,
        ablations=ablations(nla, rows, texts, denominators, kinds, seed),
        examples=_examples(rows, texts, seed),
        checks=_checks(many, said, many_guesses, figures, scored, gain, kept, alarms, seed),
    )


# Are the claims true?


def truth_figures(
    rows: Rows, kinds: Sequence[str], said: Sequence[Said], beside: Sequence[Said], guesses: Guesses, seed: int = 0
) -> list[ClaimFigures]:
    """Every kind of claim over all rows, in each kind of token, and apart for values that training had not."""
    strata = rows.acts.strata
    others, within = _other_rows(rows, seed), _other_rows(rows, seed, strata)
    out = []
    for kind in kinds:
        decided = torch.tensor([truth.decides(kind) for truth in rows.truths])
        readers = {
            "claims": outcomes(said, rows.truths, kind),
            "shuffled": _exchanged(said, rows.truths, kind, others),
            "shuffled_within": _exchanged(said, rows.truths, kind, within),
            "beside": outcomes(beside, rows.truths, kind) if beside else None,
        }
        readers |= {
            name: guessed(of[kind], rows.truths, kind) if kind in of else None for name, of in guesses._asdict().items()
        }
        parts = {ALL_ROWS: torch.ones(len(strata), dtype=torch.bool)}
        parts |= {name: torch.tensor([stratum == name for stratum in strata]) for name in dict.fromkeys(strata)}
        new = torch.tensor([kind in truth.held_out for truth in rows.truths])
        parts |= {SEEN: ~new, HELD_OUT: new} if bool(new.any()) else {}
        for name, part in parts.items():
            figure = _figure(kind, name, decided & part, somewhere(rows.truths, kind), readers, rows.groups, seed)
            out += [] if figure is None else [figure]
    return out


def _figure(
    kind: str,
    name: str,
    part: Bool[Tensor, " n"],
    something: Bool[Tensor, " n"],
    readers: Mapping[str, Tensor | None],
    groups: Int[Tensor, " n"],
    seed: int,
) -> ClaimFigures | None:
    if not bool(part.any()):
        return None
    ours = readers["claims"]
    assert ours is not None
    made = part & ~ours.isnan()

    def when_said(reader: str, values: Tensor | None) -> Rate | None:
        # Who says something else, or of other rows, is judged on what it says itself.
        own = reader in ("shuffled", "shuffled_within", "beside")
        return None if values is None else _rate(values, (part & ~values.isnan()) if own else made, groups, seed)

    def over_all(values: Tensor | None) -> Rate | None:
        return None if values is None else _rate(values.nan_to_num(0.0), part & something, groups, seed)

    return ClaimFigures(
        claim=kind,
        rows=name,
        n=int(part.sum()),
        said=Rate.clustered((~ours[part].isnan()).double(), groups[part], seed),
        when_said=Shares(**{reader: when_said(reader, values) for reader, values in readers.items()}),
        over_all=Shares(**{reader: over_all(values) for reader, values in readers.items()}),
    )


def _rate(values: Float[Tensor, " n"], part: Bool[Tensor, " n"], groups: Int[Tensor, " n"], seed: int) -> Rate | None:
    return Rate.clustered(values[part], groups[part], seed) if bool(part.any()) else None


def _exchanged(said: Sequence[Said], truths: Sequence[Truth], kind: str, others: Int[Tensor, " n"]) -> Tensor:
    """Outcomes of other rows' claims; NaN for a row that has no other."""
    values = outcomes([said[row] for row in others.tolist()], truths, kind)
    return torch.where(others == torch.arange(len(others)), torch.nan, values)


def _other_rows(rows: Rows, seed: int, strata: Sequence[str] | None = None) -> Int[Tensor, " n"]:
    """For each row one of another document, and of the same stratum if there are any; the row itself where none is."""
    out = torch.arange(len(rows.truths))
    names = strata if strata is not None else [""] * len(out)
    for name in dict.fromkeys(names):
        members = torch.tensor([row for row, stratum in enumerate(names) if stratum == name])
        order = other_document_rows(rows.groups[members], seed)
        out[members] = members if order is None else members[order]
    return out


def _false_alarms(rows: Rows, said: Sequence[Said], seed: int) -> Rate | None:
    none = torch.tensor([truth.attributes.get(INSTRUCTION) == "" for truth in rows.truths])
    made = torch.tensor([INSTRUCTION in one.values for one in said]).double()
    return _rate(made, none, rows.groups, seed)


# What does the decoder make of them?


def fidelity_figures(
    nla: NLA,
    rows: Rows,
    texts: Sequence[str],
    denominators: Denominators,
    rival: NLA | None,
    beside: Sequence[str],
    seed: int,
) -> tuple[Score, list[TextFidelity], Interval | None, Interval | None]:
    """Score, FVE by whose texts, gain over the rival, and the share of FVE that other words keep."""
    acts = with_known_strata(rows.acts, denominators)
    judged = FidelityByStratum(acts.strata, rows.groups, denominators.baselines, seed=seed)
    predicted = _reconstructed(nla, texts)
    scored = score(
        acts.vectors, predicted, acts.strata, rows.groups, denominators.baselines, _reconstructed(nla, [""])[0],
        seed=seed,
    )  # fmt: skip
    sets = {
        "in other words": [reworded(text, seed, row) for row, text in enumerate(texts)],
        "true facts": [state(_true(truth), random.Random(f"{seed}/{row}")) for row, truth in enumerate(rows.truths)],
        "one text for all": [_constant(rows, seed)] * len(texts),
    }
    errors = {"explanations": reconstruction_errors(acts.vectors, predicted)}
    errors |= {name: reconstruction_errors(acts.vectors, _reconstructed(nla, of)) for name, of in sets.items()}
    if rival is not None:
        errors["of the pair beside"] = reconstruction_errors(acts.vectors, _reconstructed(rival, beside))
    table = [
        TextFidelity(name, {stratum: judged.fve(stratum, of) for stratum in (GLOBAL, *judged.strata)})
        for name, of in errors.items()
    ]
    ours = errors["explanations"]
    gain = None if rival is None else judged.fve_gain(GLOBAL, ours, errors["of the pair beside"])
    kept, variance = None, judged.baselines[GLOBAL].variance
    if judged.fve(GLOBAL, ours).low > 0:  # a share of what may be nothing says nothing
        kept = judged.statistic(
            GLOBAL, [errors["in other words"], ours], lambda mean: (variance - mean[..., 0]) / (variance - mean[..., 1])
        )
    return scored, table, gain, kept


def _reconstructed(nla: NLA, texts: Sequence[str]) -> Float[Tensor, "n d"]:
    """Reconstructions of texts, of equal ones once."""
    codes = {text: code for code, text in enumerate(dict.fromkeys(texts))}
    return nla.reconstruct(list(codes), strict=False)[torch.tensor([codes[text] for text in texts])]


def reworded(text: str, seed: int, row: int) -> str:
    """The facts of an explanation in other words and another order."""
    draw = random.Random(f"{seed}/{row}")
    sentences = claims(state(stated(text), draw))
    return " ".join(draw.sample(sentences, len(sentences)))


def _true(truth: Truth) -> Facts:
    known = {name: value for name, value in truth.attributes.items() if value}
    return Facts(truth.following, False, truth.token, truth.before, truth.place, known)


def _constant(rows: Rows, seed: int) -> str:
    """The commonest value of every kind as one explanation."""
    anywhere = [""] * len(rows.truths)
    values = {kind: commonest(kind, rows.truths, anywhere, [""])[0] for kind in kinds_of(rows)}
    known = {kind: value[0] for kind, value in values.items() if kind not in OF_TOKENS and value}
    token, before = (next(iter(values[kind]), "") for kind in (TOKEN, BEFORE))
    return state(Facts(values[NEXT_ANY], False, token, before, "", known), random.Random(seed))


def ablations(
    nla: NLA, rows: Rows, texts: Sequence[str], denominators: Denominators, kinds: Sequence[str], seed: int
) -> list[Ablation]:
    """Of the first round's explanations, some: FVE without each kind of claim, and from it alone."""
    part = torch.arange(0, len(rows.truths), _step(rows))
    acts = with_known_strata(rows.acts[part], denominators)
    judged = FidelityByStratum(["all"] * len(part), rows.groups[part], denominators.baselines, seed=seed)
    facts = [stated(text) for text in list(texts)[: len(rows.truths) : _step(rows)]]

    def errors(of: Sequence[Facts]) -> Tensor:
        worded = [state(one, random.Random(f"{seed}/{row}")) for row, one in zip(part.tolist(), of, strict=True)]
        return reconstruction_errors(acts.vectors, _reconstructed(nla, worded))

    whole, out = errors(facts), []
    for kind in kinds:
        n_said = sum(_only(one, kind) != Facts() for one in facts)
        if kind != NEXT_ANY and n_said:
            dropped = judged.fve_gain(GLOBAL, errors([_without(one, kind) for one in facts]), whole)
            alone = None if kind == BEFORE else judged.fve(GLOBAL, errors([_only(one, kind) for one in facts]))
            out.append(Ablation(kind, n_said, dropped, alone))
    return out


def _step(rows: Rows) -> int:
    return -(-len(rows.truths) // N_ABLATED)


def _without(facts: Facts, kind: str) -> Facts:
    if kind in OF_TOKENS:
        empty: dict[str, dict[str, Any]] = {
            NEXT: {"following": (), "sure": False},
            TOKEN: {"token": "", "before": "", "place": ""},
            BEFORE: {"before": ""},
        }
        return replace(facts, **empty[kind])
    return replace(facts, attributes={name: value for name, value in facts.attributes.items() if name != kind})


def _only(facts: Facts, kind: str) -> Facts:
    if kind in (NEXT, NEXT_ANY):
        return Facts(facts.following, facts.sure)
    if kind == TOKEN:
        return Facts(token=facts.token, place=facts.place)
    if kind == BEFORE:
        return Facts(before=facts.before)
    return Facts(attributes={name: value for name, value in facts.attributes.items() if name == kind})


# What holds


def _checks(
    rows: Rows,
    said: Sequence[Said],
    guesses: Guesses,
    figures: Sequence[ClaimFigures],
    scored: Score,
    gain: Interval | None,
    kept: Interval | None,
    alarms: Rate | None,
    seed: int,
) -> list[Check]:
    checks = [Check.at_least("FVE of sampled explanations", scored.fve, FVE_MIN)]
    checks += [
        Check.at_most(f"baseline {name.replace('_', ' ')}: FVE", fve, BASELINE_MAX)
        for name, fve in scored.baselines.items()
    ]
    retained = f"≥ {RETAINED_MIN}"
    checks.append(Check("share of FVE kept in other words", kept, retained, kept and kept.value >= RETAINED_MIN))
    checks.append(
        Check("FVE above that of the pair beside", gain, "interval > 0", _ends(gain, lambda found: found.low > 0))
    )
    for one in (figure for figure in figures if figure.rows == ALL_ROWS):
        ours = outcomes(said, rows.truths, one.claim)
        made = ~ours.isnan()
        beyond = _beyond(ours, guesses.commonest, one.claim, rows, made, seed)
        if beyond is not None:
            name = f"{one.claim}: true beyond the commonest value"
            held = _ends(beyond, lambda found: found.high >= 0)
            checks.append(Check(name, beyond, "interval not below 0", held))
        if one.claim in (NEXT, NEXT_ANY):
            beyond = _beyond(ours, guesses.text, one.claim, rows, made, seed)
            name = f"{one.claim}: true beyond n-grams"
            checks.append(Check(name, beyond, "interval > 0", _ends(beyond, lambda found: found.low > 0)))
        probe = guesses.probe.get(one.claim)
        if one.claim not in OF_TOKENS and probe is not None and bool(made.any()):
            pairs = torch.stack([ours, guessed(probe, rows.truths, one.claim)], dim=1)[made]
            if float(pairs[:, 1].sum()):
                share = bootstrap(
                    pairs, rows.groups[made], lambda mean: mean[..., 0] / mean[..., 1].clamp(min=1e-9), seed=seed
                )
                name = f"{one.claim}: true claims per right probe"
                checks.append(Check.at_least(name, share, OF_PROBE_MIN, held=one.claim == FORM))
    if alarms is not None:
        checks.append(Check.at_most("instructions claimed where there is none", alarms, FALSE_ALARMS_MAX))
    return checks


def _ends(interval: Interval | None, hold: Callable[[Interval], bool]) -> bool | None:
    """What the ends of an interval decide: nothing where it has none, as of a single document."""
    return None if interval is None or math.isnan(interval.low) else hold(interval)


def _beyond(
    ours: Tensor, readers: Mapping[str, Sequence[Value]], kind: str, rows: Rows, made: Tensor, seed: int
) -> Interval | None:
    """How much more often claims are true than a reader's, on the same rows."""
    if kind not in readers or not bool(made.any()):
        return None
    return bootstrap((ours - guessed(readers[kind], rows.truths, kind))[made], rows.groups[made], seed=seed)


def _examples(rows: Rows, texts: Sequence[str], seed: int, n: int = 8) -> list[dict[str, Any]]:
    chosen = sorted(random.Random(seed).sample(range(len(rows.truths)), min(n, len(rows.truths))))
    return [
        {
            "token": rows.acts.spans[row].text,
            "stratum": rows.acts.strata[row],
            "explanation": texts[row],
            "true": state(_true(rows.truths[row]), random.Random(f"{seed}/{row}")),
        }
        for row in chosen
    ]
