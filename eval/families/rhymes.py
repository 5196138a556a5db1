"""Planned rhymes: the whole protocol on a pair, or the gates and a probe on a target that has no pair.

Gate, mention, adversaries and rocks, counterfactual, edit-and-steer, with intervals and tests, in one report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nla.config import CONFIG_FILE
from nla.errors import ConfigError
from nla.eval.circuits.gate import CAUSAL, Gate, gate_items
from nla.eval.explainers import EncoderReader, hit_rate
from nla.eval.families import controls, counterfactual, editing, gates, rhymes_report
from nla.eval.families.counterfactual import COUNTERFACTUAL_MIN, Counterfactual
from nla.eval.families.editing import CONTROL_MAX, STEER_MIN, EditAndSteer
from nla.eval.families.gates import GateReport
from nla.eval.families.mention import NAMING_MIN, VISIBLE_MARGIN, MentionScore, score
from nla.eval.items import Item, rhyme_items, variant_of
from nla.eval.report import Check, Figures, Rate, Report, at_least, at_most, save
from nla.eval.target import Progress, Target, open_pair, open_target, read_last, silent
from nla.organisms import TARGETS
from nla.organisms.couplets import world
from nla.stats import holm, paired_permutation

if TYPE_CHECKING:
    from nla.autoencoder import NLA

CAUSAL_MIN, MOVED_MIN = 0.5, 0.9
_NO_CLAIMS = Rate(0.0, 0.0, 0.0, 0)
SAMPLED, GREEDY, WARM, CONTINUED = "encoder (sampled)", "encoder (greedy)", "warm start", "warm start, continued"


@dataclass(frozen=True)
class Comparison:
    """The encoder's sampled naming against another reader's, on the same items."""

    other: str
    difference: float
    p_value: float
    """That the encoder names no more: one-sided paired permutation over items, Holm over all comparisons."""


@dataclass(frozen=True)
class Naming(Figures):
    """Who names the planned word, on the causal items."""

    derived = ("margin", "best_adversary")
    sampled: MentionScore
    greedy: MentionScore
    warm_start: MentionScore | None
    continued: MentionScore | None
    describer: MentionScore | None
    """Warm-start texts as the describer writes them: the hit rate q, on these items."""
    adversaries: list[MentionScore]
    rocks: list[MentionScore]
    held_out: list[MentionScore]
    """On items whose plan word the pair never saw: the encoder, and an outsider who knows the rhymes."""
    comparisons: list[Comparison]

    @property
    def margin(self) -> float:
        """Sampled naming minus the best adversary's: the headline."""
        return self.sampled.named.value - controls.best(self.adversaries).named.value

    @property
    def others(self) -> list[MentionScore]:
        """Every score on the causal items but the encoder's own."""
        optional = [one for one in (self.warm_start, self.continued, self.describer) if one is not None]
        return [*optional, *self.adversaries, *self.rocks]

    @property
    def best_adversary(self) -> str:
        """Which one that was."""
        return controls.best(self.adversaries).reader


@dataclass(frozen=True)
class RhymesReport(Report):
    """Everything `nla eval rhymes` measures; the parts that need a pair are None for a bare target."""

    target: str
    verdict: str
    n_items: int
    gates: GateReport
    gate: Gate
    naming: Naming | None
    counterfactual: Counterfactual | None
    steering: EditAndSteer | None

    def to_markdown(self) -> str:
        """The readable report."""
        return rhymes_report.markdown(self)

    def to_card(self) -> str:
        """The section of the model card."""
        return rhymes_report.card(self)


def run(
    model: NLA | Target | str | Path,
    warm_start: NLA | str | Path | None = None,
    continued: NLA | str | Path | None = None,
    n_items: int = 200,
    n_samples: int = 4,
    q: float | None = None,
    n_fit: int = 4000,
    point: str = "resid_post.3",
    seed: int = 0,
    out_dir: str | Path | None = None,
    progress: Progress = silent,
) -> RhymesReport:
    """The rhyme protocol on held-out items.

    Args:
        model: a pair (loaded, name, folder or hub id), or a bare target (loaded, "couplets/plain", a model folder):
            then the gates and the probe alone say whether the plan is used, decodable, or neither.
        warm_start: the pair before joint training.
        continued: the control: the warm start continued for as long as joint training took.
        n_items: items; a quarter as many, separate ones choose the steering strength, and so many have held-out plans.
        n_samples: explanations of each activation at temperature 1.
        q: share of true plans in the warm-start texts; None: as the pair's metrics say.
        n_fit: other documents, on which the probe, the plans' means and the bag of words are fitted.
        point: where a bare target is read; a pair knows its own.
        out_dir: where ``rhymes.json``, ``.md`` and ``.png`` go; None: nowhere.

    Raises:
        ConfigError: no such model.
        ArgumentError: ``n_items`` or ``seed`` is out of range.
    """
    nla, target = open_model(model, point)
    pairs = {
        name: None if nla is None or other is None else _same_target(other, nla)
        for name, other in {WARM: warm_start, CONTINUED: continued}.items()
    }
    items = rhyme_items(n_items, seed)
    variant = variant_of(model) if nla is None else None
    measured = gates.run(target, variant=variant, n_documents=n_items, n_probe=n_fit, seed=seed, progress=progress)
    found = gate_items(target, items, seed=seed, progress=progress)
    causal = [items[row] for row in found.causal]
    naming = cf = steering = None
    if nla is not None and causal:
        naming = _naming(nla, target, causal, pairs, n_samples, q, n_fit, max(2, n_items // 4), seed, progress)
        readers = EncoderReader(nla, seed=seed), EncoderReader(nla, greedy=True)
        cf = counterfactual.run(target, *readers, controls.text_lm(target), causal, n_samples, n_fit, seed, progress)
        separate = rhyme_items(max(2, n_items // 4), seed + 100)
        steering = editing.run(nla, target, readers[1], causal, separate, seed=seed, progress=progress)
    result = RhymesReport(
        target=measured.target,
        verdict=_verdict(measured, found),
        n_items=n_items,
        gates=measured,
        gate=found,
        naming=naming,
        counterfactual=cf,
        steering=steering,
        checks=[
            _causal_share(found, None if nla is None else CAUSAL_MIN),
            *(measured.checks if variant else []),
            *_checks(naming, cf, steering, q if nla is None or q is not None else hit_rate(nla)),
        ],
    )
    if out_dir is not None:
        save(out_dir, "rhymes", result, result.to_markdown(), rhymes_report.figure(result))
    return result


def open_model(model: NLA | Target | str | Path, point: str) -> tuple[NLA | None, Target]:
    """The pair, if there is one, and its target.

    Raises:
        ConfigError, PointError: see :meth:`Target.load` and ``NLA.from_pretrained``.
    """
    if isinstance(model, Target):
        return None, model
    bare = isinstance(model, str | Path) and (
        str(model) in TARGETS or ((Path(model) / "config.json").is_file() and not (Path(model) / CONFIG_FILE).is_file())
    )
    if bare:
        return None, open_target(model, point)
    nla = open_pair(model)
    return nla, Target.of(nla)


def _verdict(measured: GateReport, found: Gate) -> str:
    """Of the gates; but a plan is called used, or unused, only where the items agree."""
    share = len(found.causal) / len(found.items)
    if (measured.verdict == gates.USED and share < CAUSAL_MIN) or (
        measured.verdict in (gates.DECODABLE, gates.ABSENT) and share > gates.PATCH_MAX
    ):
        return gates.PARTLY
    return measured.verdict


def _causal_share(found: Gate, bound: float | None) -> Check:
    rate = Rate.of(item.verdict == CAUSAL for item in found.items)
    name = "items whose plan is causal at the point"
    return Check(name, rate, "reported" if bound is None else f"≥ {bound}", at_least(rate, bound))


def _naming(
    nla: NLA,
    target: Target,
    items: Sequence[Item],
    pairs: dict[str, NLA | None],
    n_samples: int,
    q: float | None,
    n_fit: int,
    n_held_out: int,
    seed: int,
    progress: Progress,
) -> Naming:
    vectors = read_last(target, [item.prompt for item in items])
    sampled = score(SAMPLED, EncoderReader(nla, seed=seed), items, vectors, n_samples, seed)
    greedy = score(GREEDY, EncoderReader(nla, greedy=True), items, vectors, 1, seed)
    progress("naming", 0.3)
    others = {
        name: None if pair is None else score(name, EncoderReader(pair, seed=seed), items, vectors, n_samples, seed)
        for name, pair in pairs.items()
    }
    rate, describer = hit_rate(nla) if q is None else q, None
    if rate is not None:
        name, reader = f"describer of the warm start (q = {rate:.2f})", controls.describer(world.notice_of(rate), seed)
        describer = score(name, reader, items, vectors, n_samples, seed)
    adversaries = controls.adversaries(target, nla, items, vectors, n_samples, n_fit, seed)
    progress("naming", 0.7)
    rocks = controls.rocks(nla, items, vectors, n_samples, seed)
    unseen = rhyme_items(n_held_out, seed, world.HELD_OUT_PLANS)
    unseen_vectors = read_last(target, [item.prompt for item in unseen])
    held_out = [
        score(name, reader, unseen, unseen_vectors, n_samples, seed)
        for name, reader in (
            ("held-out plans: encoder (sampled)", EncoderReader(nla, seed=seed)),
            (f"held-out plans: {controls.OUTSIDER}", controls.describer(0.0, seed)),
        )
    ]
    progress("naming", 1.0)
    rivals = [one for one in (*others.values(), describer, *adversaries, *rocks) if one is not None]
    return Naming(
        sampled=sampled,
        greedy=greedy,
        warm_start=others[WARM],
        continued=others[CONTINUED],
        describer=describer,
        adversaries=adversaries,
        rocks=rocks,
        held_out=held_out,
        comparisons=_compare(sampled, rivals, seed),
    )


def _same_target(pair: NLA | str | Path, nla: NLA) -> NLA:
    """The other pair, refused if it reads another point or another target."""
    other = open_pair(pair)
    if str(other.point) != str(nla.point):
        raise ConfigError(f"a pair at {other.point}", f"{nla.point}, as the pair that is judged", "give pairs of it")
    weights, expected = (
        {name: p for name, p in one.model.named_parameters() if "lora_" not in name} for one in (other, nla)
    )
    if weights.keys() != expected.keys() or not all(torch.equal(expected[name], p) for name, p in weights.items()):
        raise ConfigError(
            f"a pair of the target {other.config.target}, whose weights differ",
            f"the target of the pair that is judged, {nla.config.target}",
            "give pairs that were trained on the same target",
        )
    return other


def _compare(sampled: MentionScore, others: Sequence[MentionScore], seed: int) -> list[Comparison]:
    ours = torch.tensor(sampled.per_item)
    raw = [paired_permutation(ours, torch.tensor(one.per_item), None, "greater", seed=seed) for one in others]
    return [
        Comparison(one.reader, sampled.named.value - one.named.value, p_value)
        for one, p_value in zip(others, holm(raw), strict=True)
    ]


def _checks(
    naming: Naming | None, cf: Counterfactual | None, steering: EditAndSteer | None, q: float | None
) -> list[Check]:
    checks = [] if naming is None else _naming_checks(naming, q)
    if cf is not None:
        bound = f"≥ {COUNTERFACTUAL_MIN}"
        passed = at_least(cf.naming, COUNTERFACTUAL_MIN)
        checks.append(Check("counterfactual: the donor's word named", cf.naming, bound, passed))
        checks.append(Check("counterfactual: named, facts kept, and written", cf.all_three, "reported"))
    if steering is not None:
        edit = steering.edit.success
        checks.append(Check("edit and steer: ends on the new word", edit, f"≥ {STEER_MIN}", at_least(edit, STEER_MIN)))
        for arm in steering.controls:
            moved = arm.n_moved >= MOVED_MIN * steering.n_items
            name = f"steering control: {arm.name}" + ("" if moved else f" (moves only {arm.n_moved} items)")
            passed = bool(at_most(arm.success, CONTROL_MAX)) and moved
            checks.append(Check(name, arm.success, f"≤ {CONTROL_MAX}", passed))
    return checks


def _naming_checks(naming: Naming, q: float | None) -> list[Check]:
    ours, control, warm = naming.sampled.named, naming.continued, naming.warm_start
    visible, before = naming.sampled.visible, None if warm is None else warm.visible
    checks = [Check("naming on causal items, sampled", ours, f"≥ {NAMING_MIN}", at_least(ours, NAMING_MIN))]
    name = "naming above the hit rate q of warm-start texts"
    checks.append(Check(name, None, "q") if q is None else Check(name, ours, f"interval > {q:.3f}", ours.low > q))
    name = "naming above the warm start, continued"
    if control is None:
        checks.append(Check(name, None, "the control's interval"))
    else:
        checks.append(Check(name, ours, f"interval > {control.named}", ours.above(control.named)))
    name = "visible claims as true as the warm start's"
    if before is None:
        checks.append(Check(name, None, f"the warm start's − {VISIBLE_MARGIN}"))
    else:
        passed = visible is not None and visible.value >= before.value - VISIBLE_MARGIN
        checks.append(Check(name, visible or _NO_CLAIMS, f"≥ {before.value:.3f} − {VISIBLE_MARGIN}", passed))
    checks.append(Check("naming of held-out plans, sampled", naming.held_out[0].named, "reported"))
    return checks
