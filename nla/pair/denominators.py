"""FVE's denominators from activations that lie elsewhere, and whether a store's are of a pair's own target."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from nla.baselines import fit_baselines
from nla.config import NLAConfig
from nla.errors import ShapeError, StoreError
from nla.metrics import Baseline
from nla.models.read import Activations
from nla.storage.hub import place_of
from nla.store.reader import Store


class Denominators(NamedTuple):
    """What FVE is measured against, and how long reconstructions are."""

    baselines: dict[str, Baseline]
    """By stratum, and "global"."""

    norm: float
    """Mean L2 norm of the raw activations."""


def denominators(acts: Activations | Store, config: NLAConfig) -> Denominators:
    """What :meth:`nla.NLA.fit_baselines` takes from activations, or from all training rows of a store.

    Of a store, whichever split is open, no vector is read.
    """
    if isinstance(acts, Store):
        return Denominators(dict(acts.baselines), acts.manifest.norms["mean"])
    vectors = config.check_vectors(acts.vectors)
    return Denominators(fit_baselines(vectors, acts.strata), float(vectors.norm(dim=1).mean()))


def check_store(
    store: Store, config: NLAConfig, tokenizer: PreTrainedTokenizerBase, target_folder: Path | None = None
) -> None:
    """Refuse a store whose activations are not of the pair's own target at the pair's point.

    Targets are compared by their folder or hub id, by revision where both are known, by quantisation, and by the
    adapter that was on the target, since a pair's own target has none.

    Raises:
        StoreError: another target, revision, quantisation or point, or a target with an adapter.
        ShapeError: vectors of another width.
        TokenizerMismatchError: another tokenizer.
    """
    manifest = store.manifest
    revisions = (manifest.revision, config.target_revision)
    pairs: dict[str, tuple[Any, Any]] = {
        "target": (place_of(manifest.target), place_of(target_folder or config.target)),
        "revision": revisions if None not in revisions else (None, None),
        "point": (manifest.point, config.point),
        "quantization": (manifest.settings.get("quantization"), config.quantization),
        "adapter on the target": (manifest.settings.get("adapter"), None),
    }
    other = [f"{name} {got}, not {wanted}" for name, (got, wanted) in pairs.items() if got != wanted]
    if other:
        raise StoreError(
            f"activations in {store.folder} of another target or point ({'; '.join(other)})",
            f"those of {config.target} at {config.point}",
            "read a corpus with this pair's target: nla extract TARGET CORPUS --point POINT",
        )
    if manifest.d_model != config.d_model:
        got = f"vectors of width {manifest.d_model} in {store.folder}"
        raise ShapeError(got, f"{config.d_model}, the width of {config.target}", "read them with this pair's target")
    store.check_tokenizer(tokenizer)
