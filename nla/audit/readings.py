"""Readings on disk: one file a transcript, written whole, found again by the hash of all that it depends on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from nla.audit.reading import Reading
from nla.errors import ConfigError, ParseError
from nla.storage.files import read_json, write_atomic, write_json

FOLDER = "readings"
MANIFEST = "manifest.json"

_log = logging.getLogger(__name__)


class Store:
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
            write_atomic(self._path(reading.key), text)

    def finish(self) -> None:
        """Note which readings the audit is made of."""
        if self.folder is not None:
            write_json(self.folder.parent / MANIFEST, {"readings": self._now})

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key[:32]}.json"
