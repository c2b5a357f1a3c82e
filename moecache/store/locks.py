"""How long a lock of SQLite's is waited for: at full length once, where a stranger keeps it."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONG_S, SHORT_S = 30.0, 0.1  # the second where the lock of a file was waited for in vain
SERVING_S = 0.5  # in a server, whose requests all wait then
most = LONG_S  # seconds that this process waits
_in_vain: set[Path | str | None] = set()


def seconds(path: Path | str | None) -> float:
    """Seconds that a new connection to a file waits."""
    return SHORT_S if path in _in_vain else most


@contextmanager
def waited(connection: sqlite3.Connection, path: Path | None, writable: bool) -> Iterator[None]:
    """Remembers whether the lock of a file was waited for in vain, and has who asks next wait accordingly. What is only
    read may have been read without a lock, so that this says nothing."""
    if most < LONG_S:
        connection.execute(f"PRAGMA busy_timeout = {seconds(path) * 1000:.0f}")
    try:
        yield
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            _in_vain.add(path)
            connection.execute(f"PRAGMA busy_timeout = {SHORT_S * 1000:.0f}")
        raise
    if writable and path in _in_vain:
        _in_vain.discard(path)
        connection.execute(f"PRAGMA busy_timeout = {most * 1000:.0f}")
