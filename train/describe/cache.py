"""Answers of describers on disk: what has been answered once is never asked again, by any run or process."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nla.errors import StorageError
from nla.storage.hashes import digest

CACHE_FILE = "answers.sqlite"
_BUSY_S = 60.0
_TABLE = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID"
_PUT = (
    "INSERT INTO answers VALUES (?, ?) ON CONFLICT(key) DO UPDATE SET answer = excluded.answer WHERE answers.answer = ?"
)


def cache_key(identity: Mapping[str, Any], prompt: str) -> str:
    """Hash of the describer's identity and of all that it is asked: task, text and limits stand in the prompt."""
    return digest([dict(identity), prompt])


class TextCache:
    """A folder's answers by key, in one SQLite file for its owner alone; several processes may use it at once, on a
    local disk.

    Each answer is committed as it comes, so a killed process loses none; only a machine that loses its power may lose
    the last ones. Keys are hashes: no prompt and no secret is stored.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open or make the folder's file.

        Raises:
            StorageError: the folder cannot be written, or the file is no such cache.
        """
        self.path = Path(folder) / CACHE_FILE
        self._lock = threading.Lock()
        with self._guarded():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch(mode=0o600)  # SQLite gives its other files the same mode
            self.path.chmod(0o600)
            self._file = sqlite3.connect(self.path, _BUSY_S, isolation_level=None, check_same_thread=False)
            try:
                # The write-ahead log is shared by readers and writers, and survives a killed process without fsync.
                self._file.execute("PRAGMA journal_mode=WAL")
                self._file.execute("PRAGMA synchronous=NORMAL")
                self._file.execute(_TABLE)
                self._file.execute("SELECT key, answer FROM answers LIMIT 1")
            except sqlite3.Error:
                self._file.close()
                raise

    def get(self, key: str) -> str | None:
        """The answer under a key; None: there is none.

        Raises:
            StorageError: the file cannot be read.
        """
        with self._guarded(), self._lock:
            row = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, answer: str, instead_of: str | None = None) -> None:
        """Keep an answer; one that is there already stays, so that every process reads the same.

        Args:
            instead_of: an answer that gives way if it is the one that is there.

        Raises:
            StorageError: it could not be written, for example because the disk is full.
        """
        with self._guarded(), self._lock:
            self._file.execute(_PUT, (key, answer, instead_of))

    def __len__(self) -> int:
        with self._guarded(), self._lock:
            return int(self._file.execute("SELECT COUNT(*) FROM answers").fetchone()[0])

    def close(self) -> None:
        """Close the file; the write-ahead log is folded into it when no other process has it open."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> TextCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"{error} at {self.path}",
                "a folder to write to, with room, and a cache of answers that is whole",
                "free space, choose another folder, or move a damaged file aside; answers in it would be asked again",
            ) from error
