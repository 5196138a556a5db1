"""A disk that is full half-way through a write."""

import contextlib
import resource
import signal


@contextlib.contextmanager
def limited_file_size():
    """No file may grow beyond 4 KiB: a real write that fails half-way, as on a full disk.

    Around the write alone: the limit is the whole process's, and pytest's own output may be a file longer than that.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
