"""FVE's denominators from activations that lie elsewhere, and whether a store's are of a pair's own target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nla.baselines import fit_baselines
from nla.errors import ShapeError, StoreError
from nla.metrics import Baseline
from nla.models.read import Activations
from nla.storage.hub import place_of
from nla.store.reader import Store

if TYPE_CHECKING:
    from nla.autoencoder import NLA


def denominators(nla: NLA, acts: Activations | Store) -> tuple[dict[str, Baseline], float]:
    """What :meth:`nla.NLA.fit_baselines` takes: baselines by stratum, and the mean L2 norm of the raw activations.

    Of a store they are those of all its training rows, whichever split is open; no vector is read.
    """
    if isinstance(acts, Store):
        check_store(nla, acts)
        return dict(acts.baselines), acts.manifest.norms["mean"]
    return fit_baselines(nla.check_width(acts.vectors), acts.strata), float(acts.vectors.norm(dim=1).mean())


def check_store(nla: NLA, store: Store) -> None:
    """Refuse a store whose activations are not of the pair's own target at the pair's point.

    Targets are compared by their folder or hub id, by revision where both are known, by quantisation, and by the
    adapter that was on the target, since a pair's own target has none.

    Raises:
        StoreError: another target, revision, quantisation or point, or a target with an adapter.
        ShapeError: vectors of another width.
        TokenizerMismatchError: another tokenizer.
    """
    manifest, config = store.manifest, nla.config
    revisions = (manifest.revision, config.target_revision)
    pairs: dict[str, tuple[Any, Any]] = {
        "target": (place_of(manifest.target), place_of(nla.target_folder or config.target)),
        "revision": revisions if None not in revisions else (None, None),
        "point": (manifest.point, str(nla.point)),
        "quantization": (manifest.settings.get("quantization"), config.quantization),
        "adapter on the target": (manifest.settings.get("adapter"), None),
    }
    other = [f"{name} {found}, not {wanted}" for name, (found, wanted) in pairs.items() if found != wanted]
    if other:
        raise StoreError(
            f"activations in {store.folder} of another target or point ({'; '.join(other)})",
            f"those of {config.target} at {nla.point}",
            "read a corpus with this pair's target: nla extract TARGET CORPUS --point POINT",
        )
    if manifest.d_model != config.d_model:
        got = f"vectors of width {manifest.d_model} in {store.folder}"
        raise ShapeError(got, f"{config.d_model}, the width of {config.target}", "read them with this pair's target")
    store.check_tokenizer(nla.tokenizer)
