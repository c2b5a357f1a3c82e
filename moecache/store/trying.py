"""What a process is trying, noted beside the cache file before it is tried: a note that nobody holds tells what ended
its process. A file rather than a row: a write takes microseconds, and outlives the process as surely."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from moecache.schemas.timing import Timing

LARGEST = 1 << 16  # bytes of a note; what is longer is none of ours


@contextmanager
def note(cache: Path | None) -> Iterator[Callable[[Timing | None], None]]:
    """A function that notes what is tried now, as the timing that stands if nothing else is said; None: nothing is.

    The note lies beside this cache file, held as long as the process lives and gone at the end of the block. It is no
    more than a hint: where none can be written there is none.
    """
    handle, path = None, cache and cache.with_name(f"{cache.name}.trying-{os.getpid()}")
    if path is not None:
        with suppress(OSError):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(timing: Timing | None) -> None:
        if handle is not None:
            with suppress(OSError):
                os.ftruncate(handle, 0)
                os.pwrite(handle, timing.model_dump_json().encode() if timing else b"", 0)

    try:
        yield write
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
