"""A whole recipe on a random model and a local corpus: how long it takes, and that a killed run ends as a whole one.

    python benchmarks/recipe.py                 make model and corpus, run the recipe once
    python benchmarks/recipe.py --kills 5       also: kill it (SIGKILL) at 5 random moments, resume, compare the pairs

Everything is made in a folder of its own: a Qwen2 of four blocks in the hub's format, a BPE tokenizer trained on the
corpus, and JSON lines of documents. The model is random, so only the way is tried; figures of the pair mean nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from nla.pair.folder import MANIFEST
from nla.storage.hashes import sha256

SPECIAL = ["<|end|>", "<|start|>", "<|reserved_0|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def documents(n: int, seed: int = 0) -> list[str]:
    """Texts of a few lines each: sentences of made-up people, places and numbers, in natural spread of length."""
    rng = random.Random(seed)
    people, things = ["Anna", "Omar", "Lena", "Ivo"], ["lamp", "river", "letter", "garden", "engine", "song"]
    verbs, places = ["found", "lost", "drew", "sold", "heard"], ["the harbour", "a hill", "the market", "school"]
    out = []
    for number in range(n):
        sentences = [
            f"{rng.choice(people)} {rng.choice(verbs)} a {rng.choice(things)} near {rng.choice(places)} "
            f"in {rng.randint(1900, 2000)}."
            for _ in range(max(2, int(rng.lognormvariate(2.0, 0.5))))
        ]
        out.append(f"Note {number}. " + " ".join(sentences))
    return out


def make_corpus(path: Path, n: int) -> list[str]:
    """JSON lines with a text column; one document in five is there twice."""
    texts = documents(n - n // 6)
    texts += texts[: n // 6]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def make_target(folder: Path, texts: list[str]) -> None:
    """A random Qwen2 of four blocks, in the hub's format."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1000, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[0], chat_template=TEMPLATE
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    torch.nn.init.constant_(model.model.norm.weight, 10.0)  # logits far enough apart to be learned: the head is frozen
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe(work: Path, out: str) -> dict[str, Any]:
    """Small settings of every stage."""
    return {
        "name": "tiny",
        "target": str(work / "target"),
        "point": "resid_post.2",
        "out": str(work / out),
        "corpus": {
            "source": str(work / "corpus.jsonl"),
            "n_positions": 4,
            "first_position": 10,
            "max_tokens": 200,
            "eval_fraction": 0.1,
            "documents_per_chunk": 128,
        },
        "describer": {"describer": "quote"},
        "texts": {"n_train": 1000, "n_scored": 100},
        "pair": {"rank": 16, "max_new_tokens": 64},
        "warmstart": {
            "encoder_steps": 80,
            "decoder_steps": 60,
            "batch_size": 16,
            "encoder_learning_rate": 1e-2,
            "decoder_learning_rate": 3e-3,
            "eval_every": 30,
            "save_every": 10,
        },
        "joint": {
            "steps": 12,
            "prompts_per_step": 8,
            "group_size": 4,
            "eval_every": 6,
            "save_every": 3,
            "replay_fraction": 0.5,
        },
    }


def run(work: Path, out: str, after_s: float | None = None) -> float | None:
    """``nla train`` on the recipe; its seconds, or None if it was killed ``after_s`` seconds."""
    path = work / f"{out}.yaml"
    path.write_text(yaml.safe_dump(recipe(work, out)))
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "nla.train", str(path), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        _, error = process.communicate(timeout=after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return None
    if process.returncode:
        raise SystemExit(f"nla train ended with {process.returncode}:\n{error.decode()[-2000:]}")
    return time.monotonic() - started


def fingerprint(work: Path, out: str) -> dict[str, str]:
    """SHA-256 of every trained file of the run's pair."""
    return {name: sha256(work / out / "joint" / "pair" / name) for name in MANIFEST}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1200)
    parser.add_argument("--kills", type=int, default=0, help="kills of one run before it is let through")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", type=Path, help="work in this folder, and keep it")
    args = parser.parse_args()
    work = args.keep or Path(tempfile.mkdtemp())
    if (work / "whole").exists():
        parser.error(f"{work} holds a run already: its finished stages would be skipped")
    work.mkdir(parents=True, exist_ok=True)
    make_target(work / "target", make_corpus(work / "corpus.jsonl", args.documents))
    seconds = run(work, "whole")
    assert seconds is not None
    print(f"{args.documents} documents, one process, from nothing to a scored pair: {seconds:.0f} s")
    rng, killed = random.Random(args.seed), 0
    while killed < args.kills:
        moment = rng.uniform(0.08, 0.4) * seconds
        if run(work, "killed", moment) is not None:
            print("the run ended before the kill: the rest of the moments would meet a finished run")
            break
        killed += 1
        done = [path.parent.name for path in sorted((work / "killed").glob("*/stage.json"))]
        print(f"killed after {moment:.0f} s; stages done so far: {', '.join(done) or 'none'}")
    if killed:
        run(work, "killed")
        same = fingerprint(work, "whole") == fingerprint(work, "killed")
        print(f"after {killed} kills the pair is, byte for byte, that of the whole run: {same}")
        if not same:
            raise SystemExit(1)
    if args.keep is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
