"""Do we compute what other projects' own code computes? Tiny random pairs in their formats, both run beside each other.

    python benchmarks/parity.py                                        ours against what was recorded
    python benchmarks/parity.py --reference CLONE --easynla CLONE      ours against their code, run now
    python benchmarks/parity.py --reference CLONE --easynla CLONE --record tests/fixtures/parity

CLONE is a checkout of kitft/natural_language_autoencoders or of asherps/EasyNLA. Their code runs in a process of its
own (parity_reference.py; their client needs httpx and orjson) and is not changed. The exit status is 1 if a row is
beyond its tolerance.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.append(str(Path(__file__).parent))
import parity_pairs as pairs

from nla import NLA
from nla.config import InjectionConfig, NLAConfig, tokenizer_hash
from nla.formats import easynla, kitft, kitft_export
from nla.metrics import cosine, mse, rescale
from nla.models.hooks import inject
from nla.models.points import blocks
from nla.text.tokens import render_prompt

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures" / "parity"
FULL = tuple(f"kitft {name}" for name in pairs.ARCHITECTURES)
EXPORTED = tuple(f"kitft export {name}" for name in ("qwen2", "llama", "gemma3"))
LORA = ("easynla qwen2", "easynla llama", "easynla qwen2 final norm")
CASES = (*FULL, *EXPORTED, *LORA)
TOLERANCES = {"ids": 0.0, "entered": 1e-5, "decoded": 1e-5, "scores": 1e-5, "logits": 1e-5}
"""Largest absolute difference of two values; float32 throughout."""

MEANINGS = {
    "ids": "prompt ids",
    "entered": "what enters the model, injected row and all",
    "decoded": "decoder's vector",
    "scores": "MSE and cosine",
    "logits": "encoder's logits",
}


class Row(NamedTuple):
    """One comparison."""

    case: str
    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """The difference is within the tolerance."""
        return self.difference <= self.tolerance


class Made(NamedTuple):
    """A pair in another project's format, and how that project's code is called on it."""

    project: str
    folders: tuple[Path, ...]
    nla: NLA


def make(case: str, root: Path) -> Made:
    """Write a case's pair below ``root`` and load it here."""
    if case in LORA:
        name = case.removeprefix("easynla ").removesuffix(" final norm")
        folders = pairs.lora_pair(root, name, final_norm=case.endswith("final norm"))
        ours = easynla.load(folders.av, target=folders.target, dtype="float32", device="cpu")
        return Made("easynla", (folders.av, folders.ar, folders.target), ours)
    if case in EXPORTED:
        ours = adapter_pair(case.removeprefix("kitft export "), root / "target")
        kitft_export.export_pair(ours, root)
        return Made("kitft", (root / kitft_export.AV_FOLDER, root / kitft_export.AR_FOLDER), ours)
    folders = pairs.full_pair(root, case.removeprefix("kitft "))
    return Made("kitft", (folders.av, folders.ar), kitft.load(folders.av, folders.ar, folders.target, device="cpu"))


def adapter_pair(architecture: str, target: Path) -> NLA:
    """A pair of random adapters as this library makes them, with a head that has no bias."""
    model, tokenizer = pairs.make_model(architecture, 0), pairs.make_tokenizer(bos=architecture != "qwen2")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    prompt = pairs.ENCODER_TEMPLATE.format(injection_char=pairs.MARKER)
    ids, marker_id = render_prompt(tokenizer, prompt), tokenizer.convert_tokens_to_ids(pairs.MARKER)
    where = ids.index(marker_id)
    config = NLAConfig(
        target=str(target),
        tokenizer_hash=tokenizer_hash(tokenizer),
        d_model=pairs.D_MODEL,
        dtype="float32",
        point=f"resid_post.{pairs.LAYER}",
        injection=InjectionConfig(
            marker=pairs.MARKER, marker_id=marker_id, left_id=ids[where - 1], right_id=ids[where + 1], norm=pairs.NORM
        ),
        encoder_prompt=prompt,
        decoder_template=pairs.DECODER_TEMPLATE,
        max_new_tokens=8,
        activation_norm=1.0,
    )
    nla = NLA.create(model, tokenizer, config, rank=4)
    pairs.fill(nla.model, 0, "lora_", 0.15)
    pairs.fill(nla.head, 0, "weight", 0.1)
    nla.head.weight.data += torch.eye(pairs.D_MODEL)
    return nla


def ours(made: Made) -> dict[str, Tensor]:
    """What this library computes, under the names of parity_reference.py."""
    nla, vectors, texts = made.nla, pairs.probe_vectors(), pairs.TEXTS
    model, layer = nla.base_of("encoder"), nla.config.injection.layer
    prompt = nla.prompt_ids.expand(len(vectors), -1)
    where = torch.full((len(vectors),), nla.marker_position)
    entered: list[Tensor] = []
    with torch.no_grad(), nla.role("encoder"), inject(model, rescale(vectors, nla.config.injection.norm), where, layer):
        place = blocks(model)[0 if layer is None else layer + 1]
        hook = place.register_forward_pre_hook(lambda _, args: entered.append(args[0].clone()))
        logits = model(prompt).logits
        hook.remove()
    with torch.no_grad(), nla.role("decoder"):
        decoded = torch.cat([nla.decode_ids(*nla.encode_explanations([text])) for text in texts])
    if made.project == "easynla":  # they scale the stream to √d first, which leaves directions as they are
        unit = torch.nn.functional.normalize(decoded, dim=1)
        return {"ids": nla.prompt_ids[0], "entered": entered[0], "logits": logits, "decoded": unit}
    found = nla.decoder.decode(texts)
    scores = torch.stack([mse(vectors, found), cosine(vectors, found)], dim=1)
    return {"ids": nla.prompt_ids[0], "entered": entered[0], "decoded": decoded, "scores": scores}


def theirs(project: str, made: dict[str, Made], clone: Path, root: Path) -> dict[str, dict[str, Tensor]]:
    """What a project's code computes on each case, run now in a process of its own below ``root``."""
    inputs, jobs = root / "inputs.safetensors", root / f"{project}.json"
    save_file({"vectors": pairs.probe_vectors()}, inputs, metadata={"texts": json.dumps(pairs.TEXTS)})
    outs = {case: root / f"{number}_{project}.safetensors" for number, case in enumerate(made)}
    work = [
        {"folders": [str(folder) for folder in made[case].folders], "inputs": str(inputs), "out": str(out)}
        for case, out in outs.items()
    ]
    jobs.write_text(json.dumps(work))
    driver = Path(__file__).with_name("parity_reference.py")
    command = [sys.executable, str(driver), project, str(clone.resolve()), str(jobs)]
    # Their folder on the path, and not this repository's: both call their package "nla".
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the code in {clone} failed:\n{done.stderr[-3000:]}")
    return {case: directions(project, load_file(out)) for case, out in outs.items()}


def directions(project: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """EasyNLA's decoder gives a direction: its length is that of the scaling before the head."""
    if project != "easynla":
        return found
    return {**found, "decoded": torch.nn.functional.normalize(found["decoded"], dim=1)}


def compare(case: str, mine: dict[str, Tensor], other: dict[str, Tensor]) -> list[Row]:
    """One row for each thing that both computed."""
    rows = []
    for name, expected in other.items():
        if mine[name].shape != expected.shape:
            rows.append(Row(case, name, float("inf"), TOLERANCES[name]))
            continue
        difference = (mine[name].double() - expected.double()).abs().max()
        rows.append(Row(case, name, float(difference), TOLERANCES[name]))
    return rows


def recorded(case: str, folder: Path = FIXTURES) -> dict[str, Tensor]:
    """What was recorded of a case."""
    return load_file(folder / f"{case.replace(' ', '_')}.safetensors")


def run(clones: dict[str, Path | None], record: Path | None = None) -> list[Row]:
    """Compare every case with a clone's code where there is one, and else with what was recorded of it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made = {case: make(case, root / case.replace(" ", "_")) for case in CASES}
        found: dict[str, dict[str, Tensor]] = {}
        for project, clone in clones.items():
            own = {case: pair for case, pair in made.items() if pair.project == project}
            found |= {case: recorded(case) for case in own} if clone is None else theirs(project, own, clone, root)
            if record is not None and clone is not None:
                record.mkdir(parents=True, exist_ok=True)
                for case in own:
                    save_file(found[case], record / f"{case.replace(' ', '_')}.safetensors")
        return [row for case, pair in made.items() for row in compare(case, ours(pair), found[case])]


def table(rows: list[Row], clones: dict[str, Path | None]) -> str:
    """The parity table."""
    lines = [f"{'pair':26} {'compared':44} {'difference':>11} {'tolerance':>10}  against"]
    for row in rows:
        live = clones[row.case.split()[0]] is not None
        verdict = "" if row.passed else "  BEYOND TOLERANCE"
        about = "their code" if live else "recorded"
        lines.append(
            f"{row.case:26} {MEANINGS[row.name]:44} {row.difference:11.2e} {row.tolerance:10.0e}  {about}{verdict}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 0 if all rows are within their tolerances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, metavar="CLONE", help="of kitft/natural_language_autoencoders")
    parser.add_argument("--easynla", type=Path, metavar="CLONE", help="of asherps/EasyNLA")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write down what their code computed")
    args: Any = parser.parse_args(arguments)
    torch.set_num_threads(1)
    clones = {"kitft": args.reference, "easynla": args.easynla}
    logging.disable(logging.WARNING)
    try:
        rows = run(clones, args.record)
    finally:
        logging.disable(logging.NOTSET)
    print(table(rows, clones))
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
