"""What was computed before, by what it was computed from: the least recently used is dropped when memory runs out."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """Values by key, of at most ``max_bytes`` together. Threads may share it."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.n_bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._entries: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Value | None:
        """The value, which counts as used now; None if there is none."""
        with self._lock:
            if key not in self._entries:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, value: Value, n_bytes: int) -> None:
        """Keep a value that takes ``n_bytes``; one that is larger than the whole cache is not kept."""
        if n_bytes > self.max_bytes:
            return
        with self._lock:
            if key in self._entries:
                self.n_bytes -= self._entries.pop(key)[1]
            self._entries[key] = value, n_bytes
            self.n_bytes += n_bytes
            while self.n_bytes > self.max_bytes:
                self.n_bytes -= self._entries.popitem(last=False)[1][1]

    def __len__(self) -> int:
        return len(self._entries)
