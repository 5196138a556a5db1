"""Attribution patching beside patching every site, in one run: seconds, and what the shortlist would have missed.

python benchmarks/trace.py [TARGET] [N_PAIRS]
"""

from __future__ import annotations

import sys
import time

import torch

from nla.eval.circuits import patching
from nla.eval.circuits.minimal_pairs import encode_pairs, of_items, role_columns
from nla.eval.couplet_items import rhyme_items
from nla.eval.target import Target


def main(name: str = "couplets/planner", n_pairs: int = 40) -> None:
    """Print one line for each way."""
    torch.set_num_threads(1)
    target = Target.load(name, "resid_post.0")
    pairs = of_items(target, rhyme_items(n_pairs))
    batch = encode_pairs(target, pairs)
    _, columns = role_columns(target, pairs, batch)
    vectors = tuple(patching.read_sites(target, ids, target.points, columns) for ids in (batch.base, batch.donor))
    started = time.perf_counter()
    score = patching.attribution(target, batch, target.points, columns, vectors[1] - vectors[0])
    ranked = time.perf_counter() - started
    started = time.perf_counter()
    sweep = patching.sweep(target, batch, target.points, columns, (vectors[0], vectors[1]))
    patched = time.perf_counter() - started
    strongest = int(sweep.effect.mean(0).flatten().argmax())
    rank = int((score.mean(0).abs().flatten() > score.mean(0).abs().flatten()[strongest]).sum()) + 1
    n_sites = score[0].numel()
    print(f"attribution of {n_sites} sites, {n_pairs} pairs: {ranked:.2f} s")
    print(f"patches at all of them: {patched:.2f} s ({patched / ranked:.1f} times as long)")
    print(f"the strongest site (effect {float(sweep.effect.mean(0).max()):.3f}) is number {rank} by attribution")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
