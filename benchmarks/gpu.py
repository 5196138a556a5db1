"""What `benchmarks/gpu.sh` measures, a part in each process; every figure goes into a table as soon as it is there.

The script calls it so:

    python benchmarks/gpu.py wheels                   what must travel to a machine with torch, for pip
    python benchmarks/gpu.py PART OUT --seconds 60    machine, train, or a shape; OUT gets table.json and table.md
    python benchmarks/gpu.py failed OUT PART REASON   a line that says what became of a part
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any, NamedTuple

AT_HAND = {"torch", "numpy", "scipy", "scikit-learn", "matplotlib", "pandas", "pyarrow", "tqdm", "pyyaml"}
"""What a machine with torch has, in a version that will do, and what would be too large to travel."""
TIMES = 10.0
"""The budget to train with, in those of the recipe, if the minutes allow."""
WIDER = {"warmstart": 4, "joint": 8}
"""Times the recipe's batch: a GPU takes hardly longer for it."""
ROWS_PER_BACKWARD = 384
TOKENS_PER_BATCH, N_DOCUMENTS, N_POSITIONS, N_TOKENS, GROUP = 16_384, 512, 512, 45, 8


class Out(NamedTuple):
    """Where a part's lines go."""

    folder: Path
    part: str

    def line(self, measure: str, value: float | str | None, unit: str = "", note: str = "") -> None:
        """Add a line to the table, whole at any moment; a value of None is a failure, and ``note`` says why."""
        rows = read_rows(self.folder)
        rows.append({"part": self.part, "measure": measure, "value": value, "unit": unit, "note": note})
        for name, text in (("table.json", json.dumps(rows, indent=1)), ("table.md", markdown(rows))):
            aside = self.folder / f".{name}"
            aside.write_text(text + "\n")
            aside.replace(self.folder / name)

    @contextlib.contextmanager
    def or_failed(self, measure: str) -> Iterator[None]:
        """An error in the block becomes a line; what comes after it is measured all the same."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            said = " ".join(str(error).split())[:200]
            self.line(measure, None, note=f"{type(error).__name__}: {said}")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "table.json"
    return json.loads(path.read_text()) if path.exists() else []


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for a document."""
    lines = ["| part | measure | value | | note |", "|---|---|---|---|---|"]
    for row in rows:
        value = "**failed**" if row["value"] is None else row["value"]
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        cells = (row["part"], row["measure"], shown, row["unit"], row["note"])
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def wheels() -> list[str]:
    """nla's requirements and theirs, in the versions installed here, but for what is at hand there."""
    from packaging.requirements import Requirement

    there = {"python_version": "3.12", "python_full_version": "3.12.3"}
    found: dict[str, str] = {}

    def add(name: str, extras: set[str]) -> None:
        for requirement in map(Requirement, requires(name) or []):
            marker = requirement.marker
            if marker and not any(marker.evaluate({**there, "extra": extra}) for extra in ("", *extras)):
                continue
            needed = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if needed not in AT_HAND and needed not in found:
                found[needed] = version(needed)
                add(needed, requirement.extras)

    add("nla", {"gguf"})
    return [f"{name}=={found[name]}" for name in sorted(found)]


def machine(out: Out) -> None:
    """What the figures were measured on."""
    import torch
    import transformers
    import trl

    on = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, trl))
    out.line("device", on, note=versions)


# Training


def train(out: Out, seconds: float, work: Path, tiny: bool) -> None:
    """The pair of train/recipes/smollm2.yaml, with ten times its budget or what the seconds allow.

    A small run first gives the rates; then documents, warm start and joint training each get what their share of the
    time that is left will pay for. A finished stage has its lines, whatever becomes of the next.
    """
    from nla.models.load import load_target
    from nla.train.recipe import load_recipe
    from nla.train.run import run_recipe

    end = time.monotonic() + seconds
    changes = tiny_recipe(work) if tiny else ["sample.batch_size=1024", "corpus.documents_per_chunk=1024"]
    recipe = load_recipe("smollm2", changes)
    assert recipe.corpus is not None and recipe.corpus.n_documents is not None
    n_documents, w, joint = recipe.corpus.n_documents, recipe.warmstart, recipe.joint

    def ordered(times: dict[str, float], folder: str) -> list[str]:
        """The changes that make a run so many times the recipe's budget."""
        prompts = joint.prompts_per_step * WIDER["joint"]
        rows = prompts * joint.group_size
        values = {
            "out": work / folder,
            "control": "false",
            "corpus.n_documents": math.ceil(times["documents"] * n_documents),
            "texts.n_train": math.ceil(times["documents"] * recipe.texts.n_train),
            "warmstart.batch_size": w.batch_size * WIDER["warmstart"],
            "warmstart.rows_per_backward": "null",
            **{
                f"warmstart.{half}_steps": math.ceil(times["warmstart"] * steps / WIDER["warmstart"])
                for half, steps in (("encoder", w.encoder_steps), ("decoder", w.decoder_steps))
            },
            "joint.steps": math.ceil(times["joint"] * joint.steps / WIDER["joint"]),
            "joint.prompts_per_step": prompts,
            "joint.rows_per_backward": math.gcd(rows, ROWS_PER_BACKWARD),
            **{f"{stage}.{every}": 10**6 for stage in WIDER for every in ("eval_every", "save_every")},
        }
        return [*changes, *(f"{name}={value}" for name, value in values.items())]

    started = time.monotonic()
    load_target(recipe.target, dtype=recipe.dtype)
    loading = time.monotonic() - started
    small = {
        "documents": min(1.0, 1024 / n_documents),
        "warmstart": 20 * WIDER["warmstart"] / w.encoder_steps,
        "joint": 3 * WIDER["joint"] / joint.steps,
    }
    if tiny:
        small |= {"documents": 1.0, "warmstart": 1.0, "joint": 1.0}
    rates = run_recipe("smollm2", overrides=[*ordered(small, "rates"), f"texts.n_scored={recipe.texts.n_scored // 10}"])
    asked = small["joint"] * joint.steps * joint.rows / rates["joint"]["rollouts_per_s"]
    fixed = dict.fromkeys(rates, loading) | {"joint": max(0.0, rates["joint"]["seconds"] - asked)}
    out.line("rates: seconds", time.monotonic() - started, "s", "a small run, which says what the time will pay for")

    times = dict(small)
    for quantity, stages, share in (
        ("documents", ("sample", "extract", "describe"), 0.35),
        ("warmstart", ("warmstart",), 0.5),
        ("joint", ("joint",), 0.8),
    ):
        once = sum(max(rates[stage]["seconds"] - fixed[stage], 0.1) for stage in stages) / small[quantity]
        room = (end - time.monotonic()) * share - sum(fixed[stage] for stage in stages)
        times[quantity] = small[quantity] if tiny else min(TIMES, max(small[quantity], room / once))
        for stage in stages:
            summary = run_recipe("smollm2", overrides=ordered(times, "pair"), until=stage)[stage]
            note = f"{times[quantity]:.1f} times the recipe's {quantity}"
            out.line(f"{stage}: seconds", summary["seconds"], "s", note)
            if stage == "sample":
                written = f"{summary['documents']} documents"
                out.line("sample: rate", summary["last_run"]["tokens_per_s"], "tokens/s", written)
            if stage == "joint":
                trained = f"{summary['steps']:.0f} steps of {joint.rows * WIDER['joint']}"
                out.line("joint: rate", summary["rollouts_per_s"], "rollouts/s", trained)
    metrics = json.loads((work / "pair" / "joint" / "pair" / "metrics.json").read_text())
    score = metrics["score"]
    ends = [score["fve"][side] for side in ("low", "high")]
    between = "" if None in ends else f", {ends[0]:.3f} to {ends[1]:.3f}"
    scored = f"{score['n']} activations{between}; {metrics['data']}"
    out.line("sampled FVE, held out", score["fve"]["value"], note=scored)


def tiny_recipe(work: Path) -> list[str]:
    """Changes that make the recipe one of a random model of four blocks, seconds long."""
    import recipe as tiny

    from nla.text.prompts import load_prompts
    from nla.train.data.requests import draw_requests

    requests = draw_requests(load_prompts(None), 300, 0, 0.1, "")
    tiny.make_target(work / "target", [json.dumps(request) for request in requests])
    values = {
        "target": work / "target",
        "point": "resid_post.2",
        "dtype": "float32",
        "corpus.n_documents": 40,
        "corpus.eval_fraction": 0.3,
        "sample.max_new_tokens": 12,
        "texts.n_train": 60,
        "texts.n_scored": 20,
        "pair.rank": 2,
        "pair.max_new_tokens": 6,
        "warmstart.encoder_steps": 4,
        "warmstart.decoder_steps": 4,
        "warmstart.batch_size": 2,
        "warmstart.rows_per_backward": "null",
        "joint.steps": 8,
        "joint.prompts_per_step": 1,
        "joint.group_size": 2,
        "joint.decoder_mini_batches": 1,
        "joint.rows_per_backward": "null",
    }
    return [f"{name}={value}" for name, value in values.items()]


# Shapes


def configs(tiny: bool) -> dict[str, tuple[Any, int]]:
    """Each shape's configuration, and the prompts of its joint step."""
    from joint_step import SMOLLM2
    from transformers import Qwen2Config, Qwen3Config

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 512}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    found = {
        "smollm2": (SMOLLM2, 32),
        "qwen2-1.5b": (
            Qwen2Config(
                vocab_size=151_936,
                hidden_size=1536,
                intermediate_size=8960,
                num_hidden_layers=28,
                num_attention_heads=12,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            ),
            16,
        ),
        "qwen3-8b": (
            Qwen3Config(
                vocab_size=151_936,
                hidden_size=4096,
                intermediate_size=12_288,
                num_hidden_layers=36,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
                tie_word_embeddings=False,
            ),
            4,
        ),
    }
    if tiny:
        found = {name: (type(config)(**small), 4) for name, (config, _) in found.items()}
    return found


def measure(out: Out, seconds: float, tiny: bool) -> None:
    """Extraction, explanation and joint training on random weights of a shape, in bfloat16."""
    import joint_step
    import torch

    on = "cuda" if torch.cuda.is_available() else "cpu"
    end = time.monotonic() + seconds
    config, n_prompts = configs(tiny)[out.part]
    target = joint_step.random_target(config, "bfloat16", on)
    n_blocks = config.num_hidden_layers
    n_parameters = sum(p.numel() for p in target.parameters())
    point = f"resid_post.{max(1, 2 * n_blocks // 3) - 1}"
    out.line("parameters", n_parameters / 1e9, "10⁹", f"random, bfloat16, {point} of {n_blocks}")

    def share(parts_left: int) -> float:
        return max(0.0, (end - time.monotonic()) / parts_left)

    with out.or_failed("extraction"):
        extraction(out, target, point, share(3), 16 if tiny else N_DOCUMENTS)
    nla = joint_step.pair_on(target, None, f"random/{out.part}", "bfloat16", 4 if tiny else N_TOKENS, point)
    with out.or_failed("explanation"):
        explanation(out, nla, share(2), 4 if tiny else N_POSITIONS)
    with out.or_failed("joint step"):
        joint(out, nla, share(1), n_prompts, 2 if tiny else GROUP)


def repeated(work: Callable[[], Any], seconds: float) -> float:
    """Mean seconds of a call, after a first one; calls until the time is up, and one at least."""
    import torch

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    begun = now()
    work()  # builds kernels and caches
    started, calls = now(), 0
    while calls == 0 or (now() - begun) * (calls + 2) / (calls + 1) < seconds:
        work()
        calls += 1
    return (now() - started) / calls


@contextlib.contextmanager
def peak(found: list[float]) -> Iterator[None]:
    """Adds to ``found`` the GB that were held at most: on a GPU in all, on a CPU above what was held before."""
    import joint_step
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield
        found.append(torch.cuda.max_memory_allocated() / 1e9)
    else:
        held: list[float] = []
        with joint_step.peak_memory(held):
            yield
        found.append(held[0] / 1e3)


def extraction(out: Out, target: Any, point: str, seconds: float, n: int) -> None:
    """Reading rows of log-normal length up to the point."""
    import torch

    from nla.models.points import truncated_view
    from nla.models.read import vectors_at

    source, found = torch.Generator().manual_seed(0), list[float]()
    lengths = (5.2 + 0.6 * torch.randn(n, generator=source)).exp().clamp(16, 1024).int().tolist()
    rows = [torch.randint(target.config.vocab_size, (length,), generator=source).tolist() for length in lengths]
    columns = [[*range(7, length - 1, 32), length - 1] for length in lengths]
    view = truncated_view(target, point)
    with peak(found):
        spent = repeated(lambda: vectors_at(view, rows, columns, TOKENS_PER_BATCH), seconds)
    out.line(
        "extraction", sum(lengths) / spent, "tokens/s", f"{n} rows, {sum(lengths)} tokens, {found[0]:.1f} GB at most"
    )


def explanation(out: Out, nla: Any, seconds: float, n: int) -> None:
    """Explanations sampled and read back; random weights write no words, so the decoder reads a text as long."""
    import joint_step
    import torch

    n_tokens, found = nla.config.max_new_tokens, list[float]()
    vectors = torch.randn(n, nla.config.d_model, generator=torch.Generator().manual_seed(4))
    texts = [joint_step.text_of(nla, n_tokens)] * n

    def explain() -> None:
        nla.encoder.generate(vectors, samples=1, seed=0, batch_size=n)
        nla.decoder.decode(texts, strict=False)

    with peak(found):
        spent = repeated(explain, seconds)
    out.line(
        "explanation",
        n / spent,
        "positions/s",
        f"{n} at once, one sample of {n_tokens} tokens, {found[0]:.1f} GB at most",
    )


def joint(out: Out, nla: Any, seconds: float, n_prompts: int, group: int) -> None:
    """Our side of benchmarks/joint_step.py."""
    import joint_step
    import torch

    from nla.train.fit.joint import JointSettings
    from nla.train.fit.loop import own_forward

    settings = JointSettings(steps=100, prompts_per_step=n_prompts, group_size=group, beta=0.02)
    vectors = torch.randn(joint_step.N_VECTORS, nla.config.d_model, generator=torch.Generator().manual_seed(3))
    texts, found = [joint_step.text_of(nla, nla.config.max_new_tokens)] * len(vectors), list[float]()
    phases: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, nla.role("encoder"), own_forward(nla):
        trainer = joint_step.our_trainer(nla, vectors, texts, settings, Path(folder))
        trainer.model.train()  # pyright: ignore
        trainer.current_gradient_accumulation_steps = 1

        def step() -> None:
            joint_step.step(trainer, trainer.phases, list(range(n_prompts)), group)
            phases.append(trainer.phases.take())

        with peak(found):
            spent = repeated(step, seconds)
    sums = {name: sum(taken.get(name, 0.0) for taken in phases[1:]) for name in joint_step.PHASES}
    whole = sum(sums.values())
    shares = ", ".join(f"{name} {value / whole:.0%}" for name, value in sums.items())
    note = f"{settings.rows} a step, {nla.config.max_new_tokens} tokens, {found[0]:.1f} GB at most"
    out.line("joint step", settings.rows / spent, "rollouts/s", note)
    out.line("joint step: phases", shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part")
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("of", nargs="*", help="of a failure: the part, and what became of it")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--work", type=Path, help="where the pair is trained")
    parser.add_argument("--tiny", action="store_true", help="random models of a few blocks: whether the way is open")
    options = parser.parse_args()
    if options.part == "wheels":
        print("\n".join(wheels()))
        return
    if options.part == "failed":
        part, reason = options.of
        Out(options.out, part).line("whole", None, note=reason)
        return
    out, seconds = Out(options.out, options.part), 0.0 if options.tiny else options.seconds
    n_before = len(read_rows(out.folder))
    with out.or_failed("whole"):
        if out.part == "machine":
            machine(out)
        elif out.part == "train":
            train(out, seconds, options.work, options.tiny)
        else:
            measure(out, seconds, options.tiny)
    print("\n".join(markdown(read_rows(out.folder)[n_before:]).splitlines()[2:]), file=sys.stderr)


if __name__ == "__main__":
    main()
