"""``python -m tests.hostile.table [N] [KIND …]``: N hostile artefacts of each kind; how many were tried and failed."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from huggingface_hub import constants

from tests.hostile.kinds import KINDS, break_one
from tests.hostile.watch import GOOD, watched


def main(words: list[str]) -> None:
    """Print a line for each failure, then the table."""
    n, names = int(words[0]) if words else 200, words[1:] or list(KINDS)
    torch.set_num_threads(1)
    constants.HF_HUB_OFFLINE = True
    rows = []
    for name in names:
        kind, words_of = KINDS[name], Counter[str]()
        with tempfile.TemporaryDirectory() as root:
            original = Path(root) / "original"
            original.mkdir()
            kind.make(original)
            shutil.copytree(original, Path(root) / "whole")
            kind.use(Path(root) / "whole")  # what is whole works; and the imports are done before the clock runs
            for number in range(n):
                folder = Path(root) / str(number)
                shutil.copytree(original, folder)
                broken = break_one(kind, folder, f"{name} {number}")
                outcome = watched(kind.use, folder)
                words_of[outcome.word] += 1
                if outcome.word not in GOOD:
                    print(f"{name} {number}\t{broken}\t{outcome.word}\t{outcome.detail}", flush=True)
                shutil.rmtree(folder, ignore_errors=True)
        rows.append(f"{name}\t{n} tried\t{n - sum(words_of[word] for word in GOOD)} failed\t{dict(words_of)}")
    print("\n".join(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
