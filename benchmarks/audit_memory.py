"""Peak memory and time of auditing one transcript of 50, 500 and 2,000 turns, each in a process of its own.

    python benchmarks/audit_memory.py

The target is a tiny random model with a long context: what is measured is what an audit itself holds.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

TURNS = (50, 500, 2000)
CONTEXT = 131_072
SAYINGS = ("the cat sat on the mat.\n", "a red dog ran under the blue tree and sat there.\n", "it is here.\n")


def audit_once(turns: int, window: int | None) -> None:
    """Audit one transcript and print its tokens, seconds and peak memory, above that of the loaded pair."""
    import torch

    from nla.audit import AuditSettings, audit
    from nla.transcripts.messages import Message, Transcript

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.helpers.tiny import make_pair

    torch.set_num_threads(1)
    pair = make_pair()
    pair.model.get_base_model().config.max_position_embeddings = CONTEXT
    pair.model.get_base_model().model.config.max_position_embeddings = CONTEXT
    roles = ("user", "assistant")
    messages = tuple(Message(roles[n % 2], SAYINGS[n % 3] * 3) for n in range(turns))
    audit(pair, [Transcript("warm", messages[:4])], AuditSettings(samples=1, window=window))
    before, started = _peak_mb(), time.monotonic()
    result = audit(pair, [Transcript("long", messages)], AuditSettings(samples=2, window=window))
    seconds, peak = time.monotonic() - started, _peak_mb()
    figures = f"{seconds:>8.1f} {peak:>8.0f} {peak - before:>7.0f}"
    print(f"{turns:>6} {result.readings[0].n_tokens:>8} {window or '-':>7} {figures}")


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int)
    parser.add_argument("--window", type=int)
    args = parser.parse_args()
    if args.turns:
        audit_once(args.turns, args.window)
        return
    print(f"{'turns':>6} {'tokens':>8} {'window':>7} {'seconds':>8} {'peak MB':>8} {'grown':>7}", flush=True)
    for window in (None, 2048):
        for turns in TURNS:
            extra = [] if window is None else ["--window", str(window)]
            subprocess.run([sys.executable, __file__, "--turns", str(turns), *extra], check=True)


if __name__ == "__main__":
    main()
