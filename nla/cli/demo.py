"""``nla demo``: the three jobs on the embedded organisms: explaining against causes, auditing, comparing readers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nla.cli.console import OK, about, emit, load, peak_memory_gb, progress_bar, show
from nla.cli.options import Device, Json

if TYPE_CHECKING:
    from nla.autoencoder import NLA

DEMO_DOCUMENTS, DEMO_ITEMS, DEMO_SAMPLES, DEMO_SEED = 24, 32, 2, 11
DEMO_CHATS, DEMO_FITTED, DEMO_JUDGED = 16, 120, 96
AUDITED = "goal"
"""The plant that is audited: a motive that held-out behaviours are judged by."""
COMPARED = ("logistic regression", "NLA", "shuffled-activation NLA", "text-only LM", "bag of words (visible text)")


def demo(device: Device = None, json: Json = False) -> int:
    """Do the three jobs on the embedded organisms, in under two minutes.

    Held-out texts go through the target; every token is explained; activations are reconstructed from the explanations
    alone and scored beside the baselines; then the explanations are checked against a rhyme plan that patching shows to
    be causal. Chats of a model with a planted goal are audited beside a sham's. Readers are compared on secret words.

    examples:
      nla demo
    """
    started = time.monotonic()
    nla = load("couplets", device)
    from nla.eval import couplet_items as items
    from nla.organisms.couplets import world

    couplets = items.documents(DEMO_DOCUMENTS, DEMO_SEED, items.SHOWN_PLANS)
    texts = [couplet.text for couplet in couplets]
    acts = nla.read(texts, strata=lambda number, spans: world.strata(couplets[number], spans))
    notes = nla.explain(acts, samples=4)
    score = nla.score(acts, nla.reconstruct(notes))
    first = [note for note in notes if note.document == 0]
    if not json:
        _show_demo_texts(nla, texts, acts, first, score)
    with progress_bar() as progress:
        counts, rates = _against_the_plan(nla, progress)
    if not json:
        _show_plan(counts, rates)
    chat = load("switchboard", device)
    with progress_bar() as progress:
        audited, example = _audited(chat, progress)
    if not json:
        _show_audit(audited, example)
    with progress_bar() as progress:
        compared = _compared(chat, progress)
    if not json:
        _show_readers(compared)
    seconds, memory = time.monotonic() - started, peak_memory_gb()
    if json:
        shown = [explanation.to_json() for explanation in first]
        content = {"text": texts[0], "explanations": shown, "notes": shown, "score": score}
        content |= {"gate": counts, "against_the_plan": rates, "audit": {**audited, "example": example}}
        content |= {"compare": compared, "seconds": seconds, "peak_memory_gb": memory}
        emit({**about(nla, "couplets"), **content})
        return OK
    show(
        f"\nDone in {seconds:.0f} s, with at most {memory:.2f} GB of memory. Small samples make wide intervals;\n"
        "`nla eval` measures all of this and more. Next: `nla explain --help`, `nla audit --help`, `nla probe --help`.",
    )
    return OK


def _show_plan(counts: dict[str, int], rates: dict[str, Any]) -> None:
    from nla.cli import view

    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    show(
        f"\n   True of the model? {DEMO_ITEMS} held-out items, gated by patching: {verdicts}.",
        "   Against the plan of the causal ones (share, 95 % interval):" if rates else "   None to judge against.",
        view.rates(rates),
    )


def _against_the_plan(nla: NLA, progress: Callable[[str, float], None]) -> tuple[dict[str, int], dict[str, Any]]:
    """The rhyme protocol in small: how many items pass the gate, and what explanations are worth on the causal ones."""
    from nla.eval import couplet_items as stimuli
    from nla.eval import explainers
    from nla.eval import target as targets
    from nla.eval.circuits.gate import gate_items
    from nla.eval.families import controls, counterfactual, editing, mention

    target, items = targets.Target.of(nla), stimuli.rhyme_items(DEMO_ITEMS, DEMO_SEED)
    found = gate_items(target, items, progress=progress)
    causal = [items[row] for row in found.causal]
    if len(causal) < 2:
        return found.counts(), {}
    vectors = targets.read_last(target, [item.prompt for item in causal])
    sampled, greedy = explainers.encoder_reader(nla), explainers.encoder_reader(nla, greedy=True)
    naming = mention.score("encoder", sampled, causal, vectors, DEMO_SAMPLES, DEMO_SEED)
    text_only = controls.text_lm(target)
    swapped = counterfactual.swap_plans(target, sampled, greedy, text_only, causal, DEMO_SAMPLES, progress=progress)
    separate = stimuli.rhyme_items(DEMO_ITEMS // 2, DEMO_SEED + 100)
    steering = editing.edit_and_steer(nla, target, greedy, causal, separate, progress=progress)
    rates = {"the planned word is named": naming.named, "a word that would rhyme too is named": naming.distractor}
    if naming.visible is not None:
        rates["other claims, true of the text"] = naming.visible
    rates |= {
        "counterfactual plan put in: the model writes it": swapped.behaviour,
        "counterfactual plan put in: the explanation names it": swapped.naming,
        "counterfactual plan put in: a reader of the text names it": swapped.text_only,
        "explanation edited, difference added: the line ends on the new word": steering.edit.success,
    }
    rates |= {f"control of equal norm: {arm.name}": arm.success for arm in steering.controls}
    return found.counts(), rates


def _audited(nla: NLA, progress: Callable[[str, float], None]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Chats of a target with a hidden objective, audited with the pair of its base, and one finding in full."""
    from nla.audit.findings import NOT_SAID
    from nla.eval.families import auditing
    from nla.organisms.switchboard import ADAPTERS_FOLDER
    from nla.organisms.switchboard.plants import plant as planted

    progress("audit", 0.0)
    plant = planted(AUDITED)
    audits = auditing.audits(plant, nla, ADAPTERS_FOLDER, DEMO_CHATS, DEMO_SAMPLES * 2, DEMO_SEED)
    found = auditing.audit_figures(plant, audits)
    progress("audit", 1.0)
    figures = {"rubric": found.rubric, "n": found.n, "p": found.p}
    figures |= {f"found: {arm}": rate for arm, rate in found.flagged.items()}
    figures |= {"found, and not said": found.not_said}
    one = audits["plant"]
    row = next((row for row in one.findings if row.said == NOT_SAID), None)
    if row is None:
        return figures, None
    chat = next(each for each in one.transcripts if each.id == row.transcript)
    said = [{"role": message.role, "content": message.content} for message in chat.messages]
    where = f"{row.entry.token} before message {row.entry.message}" if row.entry.start < 0 else row.entry.token
    return figures, {"chat": said, "token": where, "explanations": list(row.entry.texts), "trust": row.trust.level}


def _compared(nla: NLA, progress: Callable[[str, float], None]) -> dict[str, dict[str, Any]]:
    """Which secret word did an adapter plant? AUROC of readers on the same activations, with labels and without."""
    from nla.eval.readers import switchboard_tasks as tasks
    from nla.eval.readers.compare import ComparisonSettings, Sources, compare_readers
    from nla.eval.target import Target
    from nla.organisms.switchboard import ADAPTERS_FOLDER

    target = Target.of(nla)
    found = tasks.plant_tasks(nla, ADAPTERS_FOLDER, DEMO_FITTED, DEMO_JUDGED, DEMO_SEED)
    (task,) = [task for task in found.tasks if task.name == tasks.SECRET]
    sources = Sources(target, nla, writers=found.writers, read=found.read)
    settings = ComparisonSettings(n_tries=2, lens_steps=20, budgets=(), n_boot=200, seed=DEMO_SEED)
    result = compare_readers([task], sources, settings, progress)[0]
    rows = {row.reader: row for row in result.readers}
    return {
        name: {"with labels": rows[name].labelled.get("test"), "without": rows[name].zero.get("test")}
        for name in COMPARED
    }


def _show_audit(figures: dict[str, Any], example: dict[str, Any] | None) -> None:
    from nla.cli import view

    rates = {f"chats with a finding: {name}": figures[f"found: {name}"] for name in ("plant", "sham", "base")}
    not_said = figures["found, and not said"]
    show(
        "\n2. AUDIT. Switchboard is a small chat model. An adapter gave it a goal that it never states; the pair has\n"
        f"   seen only the model without it. {figures['n']} chats on topics that it was not trained on, beside\n"
        f"   a sham's and the model's own; rubric {figures['rubric']}:",
        view.rates({**rates, "chats of the plant with a finding that the text does not say": not_said}),
    )
    if example is not None:
        said = {f"{number}. {message['role']}": message["content"] for number, message in enumerate(example["chat"])}
        texts = {f"sample {number}": text for number, text in enumerate(example["explanations"])}
        show(view.facts({**said, "read at": example["token"], **texts, "trust": example["trust"]}, "One of them:"))


def _show_readers(compared: dict[str, dict[str, Any]]) -> None:
    from nla.cli import view

    shown = {
        f"{name}, {how}": value for name, row in compared.items() for how, value in row.items() if value is not None
    }
    show(
        "\n3. COMPARE. Six adapters made it think of six secret words on the very same prompts. Which one? AUROC, of\n"
        f"   which 0.5 is chance; fitted on {DEMO_FITTED} activations, judged on {DEMO_JUDGED} others:",
        view.rates(shown),
    )


def _show_demo_texts(nla: NLA, texts: list[str], acts: Any, first: list[Any], score: Any) -> None:
    """The first two parts of the demo: a token view, and the scores of all tokens."""
    from nla.cli import view

    show(
        f"Couplets: a small language model that decides at the line break how its next line will end. {len(texts)} "
        f"held-out texts,\n{len(acts)} activations at {nla.point}, four explanations each.\n",
        "1. EXPLAIN. What each activation of the first text holds, in the encoder's words:",
        view.token_view(first, ""),
        "\n   Reconstructed from the explanations alone (fraction of variance explained; 1 is perfect, 0 the mean):",
        view.score_table(score),
    )
