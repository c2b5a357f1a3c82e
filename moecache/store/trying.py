"""What a process is trying, noted beside the cache file before it is tried: a note that nobody holds tells what ended
its process. A file rather than a row: a write takes microseconds, and outlives the process as surely."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from moecache.schemas.timing import Timing

LARGEST = 1 << 16  # bytes of a note; what is longer is none of ours


class Note:
    """The note of one tuning; no more than a hint, so where none can be written there is none."""

    def __init__(self, handle: int | None) -> None:
        self._handle = handle

    def write(self, timing: Timing | None) -> None:
        """Say that this is tried now, and what would have become of it if nothing else were said; None: nothing is."""
        if self._handle is None:
            return
        with suppress(OSError):
            os.ftruncate(self._handle, 0)
            if timing is not None:
                os.pwrite(self._handle, timing.model_dump_json().encode(), 0)


@contextmanager
def note(cache: Path | None) -> Iterator[Note]:
    """A note beside this cache file, held as long as the process lives and gone at the end of the block."""
    path = None if cache is None else cache.with_name(f"{cache.name}.trying-{os.getpid()}")
    handle = None
    if path is not None:
        with suppress(OSError):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield Note(handle)
    finally:
        if path is not None and handle is not None:
            with suppress(OSError):
                path.unlink()
            os.close(handle)


def broken_off(cache: Path | None) -> list[Timing]:
    """What processes that are no more were trying with this cache file; told once."""
    found = []
    for path in () if cache is None else sorted(cache.parent.glob(f"{escape(cache.name)}.trying-*")):
        with suppress(OSError, ValueError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # it may be a stranger's pipe
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                text = os.read(handle, LARGEST)
                path.unlink()
                if text:
                    found.append(Timing.model_validate_json(text))
            finally:
                os.close(handle)
    return found
