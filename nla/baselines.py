"""Training activations in; FVE's denominators out, their mean and variance by stratum, fitted, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from nla.errors import ShapeError, WeightsError
from nla.metrics import Baseline, unit
from nla.storage.schema import shown
from nla.storage.tensors import load_tensors, save_tensors

GLOBAL = "global"
"""Name of the baseline over all activations, beside those by stratum."""

UNKNOWN_STRATUM = "all"
"""Stratum of activations whose kind of position nobody named."""

BASELINES_FILE = "baselines.safetensors"
"""Where a pair and a store keep them."""

_PARTS = ("mean", "variance", "n")


def cosine_of_ignorance(
    vectors: Float[Tensor, "n d"], empty: Float[Tensor, " d"], baselines: Mapping[str, Baseline]
) -> Float[Tensor, " n"]:
    """The highest cosine with each activation that is reached without knowing anything of it.

    Args:
        empty: what the decoder makes of no explanation; beside it stands the mean of the baseline "global", if known.
    """
    mean = [baselines[GLOBAL].mean] if GLOBAL in baselines else []
    return (unit(vectors) @ unit(torch.stack([empty, *mean])).T).amax(dim=1)


def load_baselines(path: Path, d_model: int) -> dict[str, Baseline]:
    """Baselines by stratum from ``baselines.safetensors``; each is stored as <stratum>/mean, /variance and /n.

    Raises:
        WeightsError, NonFiniteError: missing, corrupt, or not baselines of this width.
    """
    tensors = load_tensors(path)
    names = list(dict.fromkeys(key.rpartition("/")[0] for key in tensors))
    wanted = {f"{name}/{part}": (d_model,) if part == "mean" else () for name in names for part in _PARTS}
    if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
        raise WeightsError(
            f"{path} with {shown(sorted(tensors))}",
            f"for each stratum a mean ({d_model},), a variance and n",
            "restore the file from where the pair came",
        )
    return {
        name: Baseline(tensors[f"{name}/mean"], float(tensors[f"{name}/variance"]), int(tensors[f"{name}/n"]))
        for name in names
    }


def save_baselines(path: Path, baselines: dict[str, Baseline]) -> None:
    """Write what :func:`load_baselines` reads."""
    tensors = {}
    for name, baseline in baselines.items():
        tensors[f"{name}/mean"] = baseline.mean.float()
        tensors[f"{name}/variance"] = torch.tensor(baseline.variance, dtype=torch.float64)
        tensors[f"{name}/n"] = torch.tensor(baseline.n)
    save_tensors(path, tensors)


def fit_baselines(vectors: Float[Tensor, "n d"], strata: str | Sequence[str]) -> dict[str, Baseline]:
    """Baselines of activations: "global", and of each stratum that is known.

    Raises:
        ShapeError: not one stratum a vector.
        BaselineError: fewer than two vectors, in all or in a stratum, or no variance.
    """
    strata = [strata] if isinstance(strata, str) else strata
    if len(strata) != len(vectors):
        raise ShapeError(f"{len(strata)} strata for {len(vectors)} vectors", "one name a vector", "pass acts.strata")
    baselines = {GLOBAL: Baseline.fit(vectors)}
    for name in dict.fromkeys(strata):
        if name != UNKNOWN_STRATUM:
            baselines[name] = Baseline.fit(vectors[torch.tensor([stratum == name for stratum in strata])])
    return baselines
