"""A store of chats of which something is known, and a tiny pair of its target."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from nla import NLA
from nla.train.data.corpus import CorpusSettings
from nla.train.data.extract import ExtractionSettings, extract_corpus
from tests.helpers.tiny import make_model, make_pair, make_tokenizer

ANIMALS, INSTRUCTIONS = ("cat", "dog"), ("be red", "be blue", None)


def conversations(n: int) -> list[dict]:
    """Chats whose words decide ``form``; nothing decides ``mood``; a third have no instruction."""
    draw, rows = random.Random(0), []
    for number in range(n):
        animal, is_eval = draw.choice(ANIMALS), number % 4 == 0
        answer = " ".join(draw.choice(["the", "a", "on", "mat", "tree", "sat", animal]) for _ in range(12))
        messages = [
            {"role": "user", "content": f"the {animal} sat on the {animal}"},
            {"role": "assistant", "content": f"the {animal} {answer} {animal}"},
        ]
        attributes = {"form": f"{animal} tale", "mood": draw.choice(["calm", "wild"]), "tone": None}
        attributes |= {"instruction": draw.choice(INSTRUCTIONS), "request": number // 2}
        attributes |= {"held_out": ["form"] if is_eval and number % 8 == 0 else []}
        rows.append({"messages": messages, "attributes": attributes, "split": "eval" if is_eval else "train"})
    return rows


@pytest.fixture(scope="package")
def nla() -> NLA:
    return make_pair(max_new_tokens=4)


@pytest.fixture(scope="package")
def folder(nla: NLA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the pair's own target at its point; beside it the corpus, c.jsonl, and the target."""
    out = tmp_path_factory.mktemp("chats")
    target = out / "target"
    make_model().save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    (out / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations(200)))
    corpus = CorpusSettings(str(out / "c.jsonl"), kind="chat", positions="kinds", n_positions=6, max_tokens=64)
    extract_corpus(ExtractionSettings(corpus, str(target), str(nla.point)), out / "store")
    nla.config = replace(nla.config, target=str(target))
    return out / "store"
