"""Readings on disk: one file for each transcript, written whole, found again by a hash of all that it depends on."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla.audit.reading import Reading
from nla.audit.settings import AuditSettings
from nla.baselines import GLOBAL
from nla.config import NLAConfig, WeightsConfig
from nla.errors import ConfigError, ParseError
from nla.models.lora import TARGET_ADAPTER, adapter_hash
from nla.storage.files import read_json, write_atomic, write_json
from nla.storage.hashes import digest
from nla.storage.tensors import hash_tensors
from nla.transcripts.prepared import Prepared

if TYPE_CHECKING:
    from nla.autoencoder import NLA

FORMAT = 3
"""Raised when the same models, transcript and settings give another reading than before."""

FOLDER = "readings"
MANIFEST = "manifest.json"

_log = logging.getLogger(__name__)


class ReadingCache:
    """What an audit has read so far; without a folder it keeps nothing."""

    def __init__(self, out_dir: str | Path | None) -> None:
        self.folder = None if out_dir is None else Path(out_dir) / FOLDER
        self.n_reused = 0
        self.n_read = 0
        self.n_changed = 0
        """Transcripts that were read before, but of which something has changed since."""
        self._known: dict[str, str] = {}
        if self.folder is not None and (self.folder.parent / MANIFEST).is_file():
            try:
                content = read_json(self.folder.parent / MANIFEST).get("readings")
                self._known = {str(k): str(v) for k, v in content.items()} if isinstance(content, dict) else {}
            except ConfigError:  # only a note of what was there: readings carry their own hashes
                _log.warning("%s is not readable and is written anew", self.folder.parent / MANIFEST)
        self._now: dict[str, str] = {}

    def note(self, name: str, key: str) -> None:
        """Note that a transcript has the reading of this key, which is at hand."""
        self._now[name] = key
        self.n_reused += self.folder is not None

    def get(self, name: str, key: str) -> Reading | None:
        """The reading of this key, if it is there and whole.

        Args:
            name: of the transcript (and target), to notice that it has changed.
        """
        self._now[name] = key
        if self.folder is None:
            return None
        path = self._path(key)
        if path.is_file():
            try:
                reading = Reading.from_json(read_json(path))
                if reading.key == key:
                    self.n_reused += 1
                    return reading
                problem = "is of something else"
            except (ConfigError, ParseError) as error:
                problem = f"is broken ({error.got})"
            _log.warning("%s %s; the transcript is read again", path, problem)
        elif self._known.get(name, key) != key:
            self.n_changed += 1
        return None

    def put(self, reading: Reading) -> None:
        """Keep a reading, whole or not at all.

        Raises:
            StorageError: it could not be written.
        """
        self.n_read += 1
        if self.folder is not None:
            text = json.dumps(reading.to_json(), ensure_ascii=False, separators=(",", ":"))
            write_atomic(self._path(reading.key), text, private=True)

    def finish(self) -> None:
        """Note which readings the audit is made of."""
        if self.folder is not None:
            write_json(self.folder.parent / MANIFEST, {"readings": self._now})

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key[:32]}.json"


def reading_key(prepared: Prepared, settings: AuditSettings, models: str) -> str:
    """A hash of all that a reading depends on, by content.

    Of the settings only what changes the tokens, the positions, the passes or the samples counts; all but the last are
    in ``prepared``.

    Args:
        models: what :func:`models_key` gives.
    """
    chat, positions, windows = prepared
    content = {
        "format": FORMAT,
        "models": models,
        "transcript": chat.transcript.digest,
        "text": chat.text,
        "regions": chat.regions,
        "ids": hash_tensors({"ids": chat.ids}),
        "positions": positions,
        "windows": windows,
        "samples": settings.samples,
        "seed": settings.seed,
    }
    return digest(content)


def models_key(nla: NLA, target_adapter: str | Path | None) -> str:
    """A hash of everything in a pair and its target that a reading depends on.

    Adapters, head and the mean training activation count as they are in memory. So does the target of a pair that was
    made here, about a second for each GB; that of a loaded pair is known by its hash or revision. Where it was loaded
    from, and onto which device, does not count.

    Args:
        target_adapter: the adapter that the target is read with; None: none.
    """
    config = nla.config
    target = nla.roles.model_of("target")
    lora = {name: tensor for name, tensor in target.named_parameters() if "lora_" in name}
    lora = {name: tensor for name, tensor in lora.items() if f".{TARGET_ADAPTER}." not in name}
    known = None if nla.origin is None else config.target_weights or _revision(config)
    content = {
        "config": _prescribed(config),
        "target": known or hash_tensors(_weights(target)),
        "target types": sorted({str(tensor.dtype) for tensor in target.parameters()}),
        "target adapter": adapter_hash(target_adapter),
        "adapters": hash_tensors(lora),
        "scalings": _scalings(target),
        "encoder": _source(config.encoder_weights),
        "decoder": _source(config.decoder_weights),
        "head": hash_tensors(nla.roles.head_tensors()),
        "baseline": hash_tensors({GLOBAL: nla.baselines[GLOBAL].mean} if GLOBAL in nla.baselines else {}),
    }
    return digest(content)


_NOT_READ = {"target", "target_revision", "target_weights", "encoder_weights", "decoder_weights", "files"}
_NOT_READ |= {"activation_norm"}
"""Fields of a config that change no reading, or that :func:`models_key` takes by content."""


def _prescribed(config: NLAConfig) -> dict[str, Any]:
    """What a config prescribes: prompts, templates, injection, tokenizer, point, types, lengths."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_READ}


def _revision(config: NLAConfig) -> list[str] | None:
    """A hub target at a commit; None if it is not pinned."""
    return None if config.target_revision is None else [config.target, config.target_revision]


def _source(weights: WeightsConfig | None) -> list[str | None] | str | None:
    """Where the whole weights of an encoder or decoder are from: their hash, or the hub's repository and revision."""
    return None if weights is None else weights.sha256 or [weights.source, weights.revision]


def _weights(model: Any) -> dict[str, Any]:
    """Parameters and buffers of a model, without those of adapters."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor for name, tensor in tensors.items() if "lora_" not in name}


def _scalings(model: Any) -> list[Any]:
    """How strongly each adapter acts in each layer."""
    layers = [(name, module.scaling) for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return [
        [name, sorted((adapter, float(scale)) for adapter, scale in scaling.items() if adapter != TARGET_ADAPTER)]
        for name, scaling in layers
    ]
