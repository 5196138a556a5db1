"""`nla eval rhymes`: a pair on Couplets, or a bare target, in; whether explanations name the planned rhyme out.

Items, gate by patching, naming beside adversaries and baselines, counterfactual, edit-and-steer, with intervals and
tests, in one report. A target without a pair gets the gates and a probe.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nla.autoencoder import NLA
from nla.eval.circuits.gate import CAUSAL, Gate, gate_items
from nla.eval.couplet_items import rhyme_items, variant_of
from nla.eval.explainers import encoder_reader, hit_rate
from nla.eval.families import controls, gates
from nla.eval.families.counterfactual import COUNTERFACTUAL_MIN, Counterfactual, swap_plans
from nla.eval.families.editing import CONTROL_MAX, STEER_MIN, EditAndSteer, edit_and_steer
from nla.eval.families.gates import GateReport, GateSettings, evaluate_gates
from nla.eval.families.mention import NAMING_MIN, VISIBLE_MARGIN
from nla.eval.families.naming import CONTINUED, WARM, Naming, NamingSettings, measure_naming
from nla.eval.families.rhymes_report import RhymesReport
from nla.eval.report import Check, Rate
from nla.eval.settings import EvaluationSettings
from nla.eval.target import Target, doubts, open_model, open_rival
from nla.eval.worlds import COUPLETS, require_world
from nla.progress import Progress, silent

CAUSAL_MIN = 0.5
_NO_CLAIMS = Rate(0.0, 0.0, 0.0, 0)


@dataclass(frozen=True)
class RhymeSettings(EvaluationSettings):
    """What the rhyme protocol is run on, and beside what."""

    least: ClassVar[dict[str, int]] = {"n_items": 2, "n_samples": 1, "n_fit": 1}

    warm_start: NLA | str | Path | None = None
    """The pair before joint training."""
    continued: NLA | str | Path | None = None
    """The control: the warm start continued for as long as joint training took."""
    n_items: int = 200
    """Items; a quarter as many, separate ones choose the steering strength, and so many have held-out plans."""
    n_samples: int = 4
    """Explanations of each activation at temperature 1."""
    hit_rate: float | None = None
    """Share of true plans in the warm-start texts, q; None: as the pair's metrics say."""
    n_fit: int = 4000
    """Other documents, on which the probe, the plans' means and the bag of words are fitted."""
    point: str = "resid_post.3"
    """Where a bare target is read; a pair knows its own."""


def evaluate_rhymes(
    model: NLA | Target | str | Path,
    settings: RhymeSettings | None = None,
    progress: Progress = silent,
) -> RhymesReport:
    """The rhyme protocol on held-out items.

    Args:
        model: a pair (loaded, name, folder or hub id), or a bare target (loaded, "couplets/plain", a model folder):
            then the gates and the probe alone say whether the plan is used, decodable, or neither.

    Raises:
        ArgumentError: a pair or a target of another world than Couplets.
        ConfigError: a warm start of another point or target. The rest is as for :func:`nla.eval.target.open_pair`.
    """
    settings = settings or RhymeSettings()
    n_items, n_fit, seed = settings.n_items, settings.n_fit, settings.seed
    nla, target = open_model(model, settings.point, settings.device)
    before = {WARM: settings.warm_start, CONTINUED: settings.continued}
    pairs = {
        name: None if nla is None or pair is None else open_rival(pair, nla, settings.device)
        for name, pair in before.items()
    }
    against = doubts(nla, warm_start=pairs[WARM], continued=pairs[CONTINUED])
    require_world(target.tokenizer, [COUPLETS], model, "nla eval rhymes")
    n_separate = max(2, n_items // 4)

    items, separate = rhyme_items(n_items, seed), rhyme_items(n_separate, seed + 100)
    variant = variant_of(model) if nla is None else None
    gate_settings = GateSettings(variant=variant, n_documents=n_items, n_probe=n_fit, seed=seed)
    measured = evaluate_gates(target, gate_settings, progress=progress)
    gate = gate_items(target, items, seed=seed, progress=progress)
    causal = [items[row] for row in gate.causal]

    naming = counterfactual = steering = q = None
    if nla is not None and causal:
        q = hit_rate(nla) if settings.hit_rate is None else settings.hit_rate
        sampled, greedy = encoder_reader(nla, seed=seed), encoder_reader(nla, greedy=True)
        naming_settings = NamingSettings(settings.n_samples, q, n_fit, n_separate, seed)
        naming = measure_naming(nla, target, causal, pairs, naming_settings, progress)
        text_only = controls.text_lm(target)
        counterfactual = swap_plans(
            target, sampled, greedy, text_only, causal, settings.n_samples, n_fit, seed, progress
        )
        steering = edit_and_steer(nla, target, greedy, causal, separate, seed=seed, progress=progress)

    return RhymesReport(
        target=measured.target,
        verdict=_verdict(measured, gate),
        n_items=n_items,
        gates=measured,
        gate=gate,
        naming=naming,
        counterfactual=counterfactual,
        steering=steering,
        doubts=against,
        checks=[
            _causal_share(gate, None if nla is None else CAUSAL_MIN),
            *(measured.checks if variant else []),
            *([] if naming is None else _naming_checks(naming, q)),
            *([] if counterfactual is None else _counterfactual_checks(counterfactual)),
            *([] if steering is None else _steering_checks(steering)),
        ],
    )


def _verdict(measured: GateReport, gate: Gate) -> str:
    """Of the gates; but a plan is called used, or unused, only where the items agree."""
    share = len(gate.causal) / len(gate.items)
    if (measured.verdict == gates.USED and share < CAUSAL_MIN) or (
        measured.verdict in (gates.DECODABLE, gates.ABSENT) and share > gates.PATCH_MAX
    ):
        return gates.PARTLY
    return measured.verdict


def _causal_share(gate: Gate, bound: float | None) -> Check:
    rate = Rate.of(item.verdict == CAUSAL for item in gate.items)
    name = "items whose plan is causal at the point"
    return Check(name, rate) if bound is None else Check.at_least(name, rate, bound)


def _naming_checks(naming: Naming, q: float | None) -> list[Check]:
    ours, control, warm = naming.sampled.named, naming.continued, naming.warm_start
    visible, before = naming.sampled.visible, None if warm is None else warm.visible
    checks = [Check.at_least("naming on causal items, sampled", ours, NAMING_MIN)]
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
    checks.append(Check("naming of held-out plans, sampled", naming.held_out[0].named))
    return checks


def _counterfactual_checks(counterfactual: Counterfactual) -> list[Check]:
    return [
        Check.at_least("counterfactual: the donor's word named", counterfactual.naming, COUNTERFACTUAL_MIN),
        Check("counterfactual: named, facts kept, and written", counterfactual.all_three),
    ]


def _steering_checks(steering: EditAndSteer) -> list[Check]:
    checks = [Check.at_least("edit and steer: ends on the new word", steering.edit.success, STEER_MIN)]
    for arm in steering.controls:
        name = f"steering control: {arm.name}" + ("" if arm.moves else f" (moves only {arm.n_moved} items)")
        checks.append(Check(name, arm.success, f"≤ {CONTROL_MAX}", arm.moves and arm.success.value <= CONTROL_MAX))
    return checks
