"""``nla eval``: a pair, an organism or graphs in; a report with intervals, bounds and an exit code out."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from nla.cli.console import FAILED, OK, UNDECIDED, emit, progress_bar, quiet, say_doubts, show_lines
from nla.cli.options import (
    Card,
    Check,
    Device,
    Json,
    Out,
    PairArgument,
    add,
    count,
    given,
    group,
    pair_name,
    places,
    text,
)
from nla.errors import ArgumentError

if TYPE_CHECKING:
    from nla.eval.report import Report


def _model_name(name: str) -> str:
    """What :func:`nla.cli.options.pair_name` does, where an embedded target will do, too."""
    from nla.organisms import is_target

    if not is_target(name):
        pair_name(name)
    return name


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Name, folder or hub id.", callback=_model_name)]
Items = Annotated[int | None, count("--items", "Held-out documents to judge it on.")]
Samples = Annotated[int | None, count("--samples", "Explanations of each activation.")]
WarmStart = Annotated[
    str | None, text("--warm-start", "PAIR", "The pair before joint training, to compare with.", pair_name)
]
Plants = Annotated[
    Path | None,
    text("--plants", "FOLDER", "Of a pair on Switchboard: the adapters, one folder each (default: the embedded ones)."),
]
Oracle = Annotated[Path | None, text("--oracle", "FOLDER", "An activation oracle: PEFT adapter on the target.")]
Question = Annotated[str | None, text("--question", "TEXT", "What the oracle is asked; holds the pair's marker once.")]
Texts = Annotated[
    Path | None,
    text(
        "--texts",
        "FILE",
        "Texts to read: .txt, a line each, or a table or JSON lines with a column `text` (default: an embedded "
        "target's own).",
    ),
]
Chats = Annotated[bool, typer.Option("--chats", help="The file holds transcripts.")]
Positions = Annotated[str | None, text("--positions", "WHICH", "all (the default), last, or /PATTERN/.")]
NActivations = Annotated[int | None, count("--activations", "Activations in the sample (default 2000).")]

app = group("eval")


@app.callback()
def _eval() -> None:
    """Judge a pair or an organism.

    exit codes:
      0    done; with --check, every threshold holds
      1    --check was given and a threshold does not hold
      3    --check was given and no threshold could be held against anything
    """


class Evaluation(NamedTuple):
    """What a command evaluates."""

    run: Callable[[Any, Any, Callable[[str, float], None]], Report]
    """From a subject, settings and a callback of progress to a report."""
    subject: object
    settings: object


def reported(command: Callable[..., Evaluation]) -> Callable[..., int]:
    """The command with --out, --card, --check and --json: what it names is run, and the report goes where they say.

    A command that needs --out or --check itself takes them too.
    """

    def run(
        context: typer.Context, out: Out = None, card: Card = None, check: Check = False, json: Json = False, **own: Any
    ) -> int:
        quiet()
        from nla.eval.report import read_card, write_card
        from nla.storage.files import try_folder

        both = {name: value for name, value in (("out", out), ("check", check)) if name in parameters}
        evaluation = command(**own, **both)
        try_folder(out)
        try_folder(card)
        if card is not None:
            read_card(card)
        with progress_bar() as progress:
            report = evaluation.run(evaluation.subject, evaluation.settings, progress)
        if out is not None:
            report.save(out)
        if card is not None:
            write_card(card, report.name, report.to_card(), context.find_root().obj)
        say_doubts(report.doubts)
        if json:
            emit(report)
        else:
            show_lines(report.to_markdown())
        if check and not report.held:
            print("nla: nothing was held against a threshold. Next: give what it is compared with", file=sys.stderr)
            return UNDECIDED
        return FAILED if check and not report.passed else OK

    parameters = dict(inspect.signature(command, eval_str=True).parameters)
    shared = inspect.signature(run, eval_str=True).parameters
    every = parameters | {name: one for name, one in shared.items() if one.kind is not one.VAR_KEYWORD}
    functools.update_wrapper(run, command)
    run.__signature__ = inspect.Signature([one.replace(kind=one.KEYWORD_ONLY) for one in every.values()])  # type: ignore[attr-defined]
    return run


@reported
def fidelity(
    model: Model = "couplets",
    items: Items = None,
    warm_start: WarmStart = None,
    texts: Texts = None,
    chats: Chats = False,
    store: Annotated[
        Path | None, text("--store", "FOLDER", "A store that `nla extract` made: its held-out part.")
    ] = None,
    positions: Positions = None,
    activations: NActivations = None,
    device: Device = None,
) -> Evaluation:
    """Judge reconstruction, by kind of position.

    How well are activations reconstructed from their explanations, by kind of position, beside baselines: no
    explanation, the mean, and reconstructions of another activation, of the same kind, and of another document? Of any
    pair, on texts, chats or a store that it was not trained on; in the world Couplets also: is it true what
    explanations claim?

    examples:
      nla eval fidelity
      nla eval fidelity someone/nla-qwen2.5-7b --texts held_out.txt --out runs/report
      nla eval fidelity runs/mine/joint/pair --store runs/mine/extract --warm-start runs/mine/warmstart/pair
      nla eval fidelity couplets --warm-start runs/couplets/warmstart/pair --check
    """
    from nla.eval.pair.fidelity import FidelitySettings, judge_fidelity

    options = {"n_documents": items, "warm_start": warm_start, "texts": texts, "chats": chats, "store": store}
    options |= {"positions": positions, "n_activations": activations, "device": places(device)}
    settings = FidelitySettings(**given(**options))
    return Evaluation(judge_fidelity, model, settings)


@reported
def claims(
    pair: PairArgument,
    *,
    store: Annotated[
        Path, text("--store", "FOLDER", "A store of documents with attributes: its held-out part is judged on.")
    ],
    beside: Annotated[
        str | None, text("--beside", "PAIR", "Another pair of the target, such as the warm start.", pair_name)
    ] = None,
    activations: Annotated[int | None, count("--activations", "Over all kinds of token (default 600).")] = None,
    samples: Samples = None,
    fit: Annotated[
        int | None, count("--fit", "Training activations that probe and readers are fitted on (default 4000).")
    ] = None,
    device: Device = None,
) -> Evaluation:
    r"""Judge whether explanations are true, by kind of claim.

    Are the claims true: what comes next, the token, the word before, and what is known of the document (its form,
    topic, tone, hidden instruction)? Beside the commonest value, claims of other activations, a reader of the visible
    text, n-grams, a linear probe of the same vectors and another pair; with what the decoder makes of the same facts in
    other words, and of each kind of claim. Reads claims in the wordings of the describer `structured`.

    examples:
      nla eval claims runs/mine/joint/pair --store runs/mine/extract --out runs/report
      nla eval claims runs/mine/joint/pair --store runs/mine/extract --beside runs/mine/warmstart/pair --check
    """
    from nla.eval.pair.claims import ClaimsSettings, judge_claims

    options = {"beside": beside, "n_activations": activations, "n_samples": samples, "n_fit": fit}
    settings = ClaimsSettings(store=store, **given(**options, device=places(device)))
    return Evaluation(judge_claims, pair, settings)


@reported
def steering(
    pair: PairArgument,
    *,
    store: Annotated[Path, text("--store", "FOLDER", "A store of documents with attributes: its held-out part.")],
    items: Annotated[
        int | None,
        count("--items", "Answers to steer, for each kind of claim (default 100; half as many more choose)."),
    ] = None,
    tokens: Annotated[
        int | None, count("--tokens", "Tokens of a continuation that are judged for an attribute (default 24).")
    ] = None,
    device: Device = None,
) -> Evaluation:
    r"""Judge whether the target follows edited explanations.

    One claim of an explanation gets another value (another next token, language, tone, form, ...), both texts are
    decoded, and the difference is added to the activation and to all after it. Does what is written then have the new
    value? Beside a random direction, an unrelated edit and another item's edit of equal norm; judged by the token
    itself, or by a reader of texts that knows the store's training answers. Edits claims in the wordings of the
    describer `structured`.

    examples:
      nla eval steering runs/mine/joint/pair --store runs/mine/extract --out runs/report
      nla eval steering runs/mine/joint/pair --store runs/mine/extract --items 200 --check
    """
    from nla.eval.pair.steering import SteeringSettings, evaluate_steering

    options = {"n_items": items, "max_new_tokens": tokens, "device": places(device)}
    return Evaluation(evaluate_steering, pair, SteeringSettings(store=store, **given(**options)))


@reported
def rhymes(
    model: Model = "couplets",
    items: Items = None,
    warm_start: WarmStart = None,
    continued: Annotated[
        str | None, text("--continued", "PAIR", "The control: the warm start simply trained on.", pair_name)
    ] = None,
    device: Device = None,
) -> Evaluation:
    r"""Judge explanations against the causally verified rhyme plan.

    Do explanations name the word that the target verifiably plans? Gate by patching, naming, adversaries,
    counterfactuals, edit-and-steer with controls.

    examples:
      nla eval rhymes couplets --out runs/report
      nla eval rhymes couplets/plain              a target without a pair: is the plan used, or only decodable?
      nla eval rhymes couplets --warm-start runs/couplets/warmstart/pair \
          --continued runs/couplets/control/pair --check
    """
    from nla.eval.families.rhymes import RhymeSettings, evaluate_rhymes

    options = {"n_items": items, "warm_start": warm_start, "continued": continued, "device": places(device)}
    return Evaluation(evaluate_rhymes, model, RhymeSettings(**given(**options)))


@reported
def gates(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name, folder or hub id.")] = "couplets/planner",
    items: Items = None,
    variant: Annotated[
        Literal["planner", "plain"] | None,
        typer.Option("--variant", show_default=False, help="Whose bounds to hold it against."),
    ] = None,
    device: Device = None,
    check: Check = False,
) -> Evaluation:
    """Judge what the organism itself does and uses.

    Is the organism what it claims to be? Behaviour, patches at every point, controls of equal norm, a linear probe.

    examples:
      nla eval gates couplets/planner --check
      nla eval gates couplets/plain --out runs/report --check
    """
    bounds: str | None = variant
    if variant is None and model.startswith("couplets/"):
        bounds = model.removeprefix("couplets/")
    if check and bounds is None:
        raise ArgumentError("--check without --variant", "planner or plain", "say whose bounds should hold")
    from nla.eval.families.gates import GateSettings, evaluate_gates

    settings = GateSettings(**given(n_documents=items, variant=bounds, device=places(device)))
    return Evaluation(evaluate_gates, model, settings)


@reported
def two_hop(
    model: Model = "switchboard",
    items: Items = None,
    warm_start: WarmStart = None,
    device: Device = None,
) -> Evaluation:
    r"""Judge explanations against the hidden step of two-hop questions, causally verified.

    Switchboard answers questions with a step that is never written. Gate by patching, naming, adversaries,
    counterfactual.

    examples:
      nla eval two-hop --items 60
      nla eval two-hop runs/switchboard/joint/pair --warm-start runs/switchboard/warmstart/pair \
          --out runs/report --check
    """
    from nla.eval.families.two_hop import TwoHopSettings, evaluate_two_hop

    settings = TwoHopSettings(**given(n_items=items, warm_start=warm_start, device=places(device)))
    return Evaluation(evaluate_two_hop, model, settings)


@reported
def auditing(
    model: Model = "switchboard",
    items: Items = None,
    plants: Plants = None,
    device: Device = None,
) -> Evaluation:
    """Judge audits of chats in which a plant shows, beside shams.

    Does `nla audit` find what was planted in Switchboard, and stay silent on sham and base? A reader of the text beside
    it.

    examples:
      nla eval auditing --items 20
      nla eval auditing my/pair --plants my/plants --out runs/report --check
    """
    from nla.eval.families.auditing import AuditingSettings, evaluate_auditing

    settings = AuditingSettings(**given(n_chats=items, plants=plants, device=places(device)))
    return Evaluation(evaluate_auditing, model, settings)


@reported
def plants(
    model: Model = "switchboard",
    items: Items = None,
    plants: Plants = None,
    device: Device = None,
) -> Evaluation:
    """Judge what a pair reads of thoughts that adapters planted, beside sham twins.

    Adapters on Switchboard's target plant secret words, a hidden objective, awareness of a test, expected languages and
    familiar names; each has a sham twin. First the gates of behaviour; then what the pair, which never saw them, reads.

    examples:
      nla eval plants --out runs/report --check
      nla eval plants runs/switchboard/joint/pair --plants runs/switchboard/plants
    """
    from nla.eval.families.plants import PlantsSettings, evaluate_plants

    settings = PlantsSettings(**given(n_prompts=items, plants=plants, device=places(device)))
    return Evaluation(evaluate_plants, model, settings)


@reported
def transfer(
    model: Model = "switchboard",
    items: Items = None,
    target_adapter: Annotated[
        str | None, text("--target-adapter", "FOLDER", "The fine-tune: a LoRA adapter on the target.")
    ] = None,
    texts: Texts = None,
    chats: Chats = False,
    positions: Positions = None,
    activations: NActivations = None,
    device: Device = None,
) -> Evaluation:
    """Judge fidelity on a fine-tuned target, beside the target.

    How far does a pair's fidelity fall when its target is fine-tuned? The same tokens are read on the target and on the
    fine-tune, before anyone trusts the text on it.

    examples:
      nla eval transfer switchboard --target-adapter switchboard/goal
      nla eval transfer my/pair --target-adapter my/adapter --texts held_out.txt --out runs/transfer --check
    """
    from nla.eval.pair.transfer import TransferSettings, judge_transfer

    options = {"n_documents": items, "target_adapter": target_adapter, "texts": texts, "chats": chats}
    options |= {"positions": positions, "n_activations": activations, "device": places(device)}
    return Evaluation(judge_transfer, model, TransferSettings(**given(**options)))


@reported
def instructions(
    model: Model = "smollm2",
    items: Annotated[int | None, count("--items", "Requests, each answered once (default 24).")] = None,
    instructions: Annotated[
        int | None, count("--instructions", "Instructions to read them under (default 10, and a fifth as many new).")
    ] = None,
    samples: Samples = None,
    chats: Annotated[int | None, count("--audited", "Chats of each instruction to audit (default 8).")] = None,
    prompts: Annotated[
        str | None, text("--prompts", "FILE", "Requests and instructions, YAML (default: the shipped ones).")
    ] = None,
    plants: Annotated[
        Path | None,
        text(
            "--plants", "FOLDER", "Adapters NAME and NAME-sham that plant an instruction (default: the target's own)."
        ),
    ] = None,
    beside: Annotated[
        str | None, text("--beside", "PAIR", "Another pair on the target, such as the warm start.", pair_name)
    ] = None,
    point: Annotated[
        str | None, text("--point", "POINT", "Where to read a target without a pair (default: two thirds of it).")
    ] = None,
    device: Device = None,
) -> Evaluation:
    """Judge what is read of hidden instructions, on answers that give nothing away.

    The same neutral answers under many instructions: the words are the same, the context is not. Gate by divergence and
    patching, naming beside readers of the text and a probe, false alarms, audits. Of a target without a pair, the gate.
    The same of instructions that an adapter planted, beside its sham and the base.

    examples:
      nla eval instructions smollm2 --out runs/report
      nla eval instructions my/pair --prompts prompts.yaml --beside runs/switchboard/warmstart/pair --check
    """
    from nla.eval.families.instructions import InstructionsSettings, evaluate_instructions

    options = {"n_requests": items, "n_instructions": instructions, "n_samples": samples, "n_chats": chats}
    options |= {"prompts": prompts, "plants": plants, "beside": beside, "point": point, "device": places(device)}
    return Evaluation(evaluate_instructions, model, InstructionsSettings(**given(**options)))


@reported
def readers(
    model: Model = "couplets",
    items: Items = None,
    train: Annotated[int | None, count("--train", "Documents, or activations, to fit on (default 1000).")] = None,
    samples: Samples = None,
    contrast: Annotated[
        str | None, text("--contrast", "MODEL", "Another target of the same width, read by the same pair.")
    ] = None,
    plants: Plants = None,
    oracle: Oracle = None,
    question: Question = None,
    device: Device = None,
) -> Evaluation:
    """Judge the pair beside probes and other readers, on the same activations.

    The same activations, splits and items for probes, lenses, SelfIE, readers of the visible text, and the pair; with
    label budgets, retention in the reconstruction, random labels, transfer to held-out words, paired tests.

    examples:
      nla eval readers couplets --out runs/report --check
      nla eval readers switchboard --out runs/report --check
    """
    from nla.eval.readers.organisms import ReadersSettings, compare_on_organism

    options = {"n_items": items, "n_train": train, "n_samples": samples, "contrast": contrast, "plants": plants}
    options |= {"oracle": oracle, "question": question, "device": places(device)}
    return Evaluation(compare_on_organism, model, ReadersSettings(**given(**options)))


@reported
def graph(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Graphs; the others' concepts are distractors.")],
    pair: Annotated[
        str | None, text("--pair", "PAIR", "Name, folder or hub id (default: couplets).", pair_name)
    ] = None,
    samples: Samples = None,
    device: Device = None,
) -> Evaluation:
    """Judge explanations against attribution graphs.

    Does a pair name what an attribution graph says is there? Reads the JSON of circuit-tracer, Neuronpedia and
    nla trace.

    examples:
      nla trace couplets --out runs/trace
      nla eval graph runs/trace/*.json --check
    """
    from nla.eval.pair.against_graphs import GraphSettings, judge_against_graphs

    settings = GraphSettings(**given(pair=pair, n_samples=samples, device=places(device)))
    return Evaluation(judge_against_graphs, files, settings)


add(app, fidelity, claims, steering, rhymes, gates, two_hop, auditing, plants, instructions, transfer, readers, graph)
