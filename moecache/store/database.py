"""One SQLite file: how it is opened, checked, healed and locked, and its transactions."""

import errno
import fcntl
import os
import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from moecache.forks import Lock
from moecache.schemas.errors import InvalidInput, StoreError, printable
from moecache.store import locks
from moecache.store.schema import APPLICATION_ID, FORMAT, OLDEST, TABLES, age, migrate, strange

Mode = Literal["write", "read", "shipped"]  # shipped: nobody writes it any more, so it is opened immutable

MAKING_S = 2.0  # a process that makes, heals or migrates a file needs half a second
MOST_BYTES = 256 << 20  # of a file: a million timings
MOST_STEPS, PER_STEP = 2000, 1_000_000  # instructions of SQLite's in a transaction; ten thousand timings take a step
LONGEST = 4 << 20  # bytes of a value or row: what the cost model learnt of a layer takes 0.2 MB
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_inherited: list[sqlite3.Connection | None] = []  # the parent process's: kept, so that nothing closes them here
_calm = Lock(awaited=True)  # one thread at a time is within SQLite, whose own locks a forked child would find taken


class Damaged(Exception):
    """A cache file whose content is not sound."""


class NoFile(StoreError):
    """Nothing is there."""


class Outdated(Damaged):
    """A cache file from before OLDEST."""


class Database:
    """One connection for all threads of a process, made anew after a fork."""

    def __init__(self, path: Path | None, mode: Mode = "write") -> None:
        self.path, self.mode = path, mode
        self._pid = os.getpid()
        self._connection: sqlite3.Connection | None = None
        self._file = path  # resolved when it is opened
        with _calm, self._translated():
            self._connection = self._open()

    @property
    def readonly(self) -> bool:
        return self.mode != "write"

    def reading(self) -> AbstractContextManager[sqlite3.Connection]:
        """A snapshot: every SELECT inside sees the same state."""
        return self._transaction("BEGIN")

    def writing(self) -> AbstractContextManager[sqlite3.Connection]:
        """All or nothing. IMMEDIATE, because a transaction that reads and then writes is refused at once,
        whatever the timeout, when another process wrote in between: 1775 of 3200 failed so, none this way.

        Raises:
            StoreError: the file is open for reading only, locked for 30 s, not writable, or the disk is full.
        """
        if self.readonly:
            raise StoreError(f"{self.path} is open for reading only; nothing was written")
        return self._transaction("BEGIN IMMEDIATE")

    def facts(self) -> dict[str, object]:
        """Path, bytes, whether it may be written, format and journal mode of the file; version of SQLite."""
        with self.using() as connection:
            pages, size, version, journal = (
                connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_count", "page_size", "user_version", "journal_mode")
            )
            return {
                "path": str(self.path or ":memory:"),
                "bytes": pages * size,
                "readonly": self.readonly,
                "format": version,
                "journal": journal,
                "sqlite": sqlite3.sqlite_version,
            }

    def close(self) -> None:
        """Close the file. The next use opens it again."""
        if self._connection is not None and self._pid == os.getpid():
            self._connection.close()
        else:
            _inherited.append(self._connection)
        self._connection = None

    def _translated(self) -> AbstractContextManager[None]:
        return translated(self.path, READABLE if self.readonly else WRITABLE)

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self.using() as connection:
            connection.execute(begin)
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    @contextmanager
    def using(self) -> Iterator[sqlite3.Connection]:
        """The connection, outside of any transaction."""
        if self._pid != os.getpid():  # SQLite forbids a connection to cross a fork, even to be closed there
            _inherited.append(self._connection)
            self._pid, self._connection = os.getpid(), None
        with _calm, self._translated():
            if self._connection is None:
                self._connection = self._open()
            if self.path is not None:
                _bounded(self._connection)
            with locks.waited(self._connection, self._file, writable=not self.readonly):
                yield self._connection

    def _open(self) -> sqlite3.Connection:
        if self.path is None:
            connection = _connect(":memory:", "")
            migrate(connection)
            return connection
        path = self._file = resolved(self.path)
        if self.mode != "write":
            return _open_readonly(path, shipped=self.mode == "shipped")
        connection, version = _open_writable(path)
        if version <= FORMAT:
            return connection
        connection.close()  # a later moecache added something: read what is known, write nothing
        self.mode = "read"
        return _open_readonly(path, shipped=False)


WRITABLE = "set MOECACHE_DB to a file in a folder that you can write"
EXPORTED = "name a file in a folder that you can write"
READABLE = "make it readable, or name another file"
OTHER = "name another file (MOECACHE_DB, MOECACHE_PATH, --db)"


@contextmanager
def translated(path: Path | None, advised: str = WRITABLE) -> Iterator[None]:
    """Errors of SQLite and the system as StoreError that names the file and says what to do."""
    try:
        yield
    except StoreError:
        raise
    except OverflowError as error:
        raise InvalidInput(f"{error}: numbers must fit 64 bits") from error
    except (sqlite3.Error, Damaged, OSError) as error:
        advice = {
            sqlite3.SQLITE_FULL: f"the disk is full: free some space, or {advised}",
            sqlite3.SQLITE_BUSY: f"another process held it for {locks.most:g} s: see which one has it open",
            sqlite3.SQLITE_CORRUPT: "it is damaged: the next open for writing puts it aside",
            sqlite3.SQLITE_NOTADB: "it is damaged or no cache file",
            sqlite3.SQLITE_INTERRUPT: "it takes more work than a file that moecache made: see who did",
        }.get(sqlite3.SQLITE_CORRUPT if isinstance(error, Damaged) else _code(error), advised)
        if isinstance(error, sqlite3.DataError):
            advice = "no moecache makes such a file: see who did"
        told = getattr(error, "strerror", None) or error
        raise StoreError(f"cache file {path or 'in memory'}: {told}; {advice}") from error


def resolved(path: Path) -> Path:
    """The file itself, as journals lie beside it and not beside a link to it.

    Raises:
        StoreError: a home that nobody knows, a loop of links, a NUL in the name.
    """
    if path.parts[:1] and path.parts[0].startswith("~"):
        raise StoreError(f"cache file {path}: there is no such home here; set MOECACHE_DB to the whole path of a file")
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # `resolve` says nothing of a loop from Python 3.13 on
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ELOOP:
            raise StoreError(f"cache file {str(path)!r}: {error}; set MOECACHE_DB to another path") from error
    return path.resolve()


def _code(error: Exception) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _connect(path: Path | str, options: str) -> sqlite3.Connection:
    """A connection that leaves transactions to us; `options` are those of SQLite's file URIs."""
    uri = f"{path.absolute().as_uri()}?{options}" if isinstance(path, Path) else path
    connection = sqlite3.connect(
        uri, uri=True, timeout=locks.seconds(path), isolation_level=None, check_same_thread=False
    )
    connection.create_function("age", 1, age)
    if isinstance(path, Path):
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST)
        _bounded(connection)
    connection.execute("PRAGMA trusted_schema = OFF")  # a file's schema may call nothing that has effects
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _bounded(connection: sqlite3.Connection) -> None:
    """From here on SQLite may do so much work, then what it does is broken off. By its own count, not by a clock: a
    machine may be slow, and a lock may be waited for."""
    left = iter(range(MOST_STEPS))
    connection.set_progress_handler(lambda: next(left, None) is None, PER_STEP)


def _inspected(path: Path, options: str) -> tuple[sqlite3.Connection, int]:
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise StoreError(f"{path} has {path.stat().st_size >> 20} MiB; a cache file has {MOST_BYTES >> 20} at most")
    connection = _connect(path, options)
    try:
        with locks.waited(connection, path, writable=options.startswith("mode=rw")):
            return connection, _inspect(connection, path)
    except BaseException:
        connection.close()
        raise


def _inspect(connection: sqlite3.Connection, path: Path) -> int:
    """The format of a file, 0 if it is empty. Every open affords quick_check: 0.6 ms for 5 000 rows.

    Raises:
        StoreError: another program's file, or one that a later moecache wrote and this one cannot read.
        Damaged: one of ours, but not sound.
    """
    owner = connection.execute("PRAGMA application_id").fetchone()[0]
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    entries = connection.execute("SELECT name, sql FROM sqlite_schema").fetchall()
    if owner == 0 and not entries:
        return 0
    if owner != APPLICATION_ID:
        raise StoreError(f"{path} belongs to another program (application_id {owner:#x}); left as it is: {OTHER}")
    if version // 1000 > FORMAT // 1000:
        raise StoreError(
            f"{path} has format {version} of a later moecache, this one reads up to {FORMAT // 1000}999;"
            f" it was left as it is: upgrade moecache, or {OTHER}"
        )
    if version < OLDEST:
        raise Outdated(f"it has format {version} of an early moecache, this one reads {OLDEST} and later")
    kinds = {name: str(sql)[:13].upper() for name, sql in entries}
    if any(kinds.get(table) != "CREATE TABLE " for table in TABLES):  # a view here would run a stranger's SQL
        raise Damaged(f"the tables {', '.join(TABLES)} are not all there")
    if odd := strange(entries):  # before quick_check, which would evaluate it
        raise StoreError(
            f"{path} holds {odd}, which no moecache makes and which could run its writer's SQL; left as it is: drop"
            f" it, or {OTHER}"
        )
    verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        raise Damaged(" ".join(verdict.split()))
    return version


def _open_readonly(path: Path, *, shipped: bool) -> sqlite3.Connection:
    """`mode=ro` first; `rw` rolls back what a killed writer left; immutable needs neither a lock nor a
    writable folder, but is blind to journals and to whoever writes the file meanwhile."""
    if not path.is_file():
        raise (StoreError if path.exists() else NoFile)(_no_file(path, shipped))
    journals = [path.with_name(path.name + suffix) for suffix in ("-wal", "-journal")]
    quiet = not any(file.exists() and file.stat().st_size for file in journals)
    attempts = ["mode=ro&immutable=1"] if shipped and quiet else ["mode=ro", "mode=rw"]
    if quiet and not shipped:
        attempts.append("mode=ro&immutable=1")
    for options in attempts:
        try:
            connection, version = _inspected(path, options)
            break
        except sqlite3.OperationalError:
            if options == attempts[-1]:
                raise
    if version == 0:
        connection.close()
        raise StoreError(f"cache file {path} is empty; `moecache warm` fills it")
    connection.execute("PRAGMA query_only = ON")
    return connection


def _no_file(path: Path, shipped: bool) -> str:
    if path.is_dir():
        return f"{path} is a folder; name a cache file in it, like {path / 'moecache.sqlite'}"
    if path.exists():
        return f"{path} is no file, so no cache file: name another"
    named = "MOECACHE_PATH names it: take it off, or put the file there"
    return f"there is no cache file at {path}; {named if shipped else '`moecache warm` makes one'}"


def _open_writable(path: Path) -> tuple[sqlite3.Connection, int]:
    """The connection to a sound file, made or healed where needed, and its format."""
    if path.is_dir():
        raise StoreError(_no_file(path, shipped=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise StoreError(f"cache file {path} is read-only: set MOECACHE_DB to a file in a writable folder")
    return _sound(path) or _made(path)


def _sound(path: Path) -> tuple[sqlite3.Connection, int] | None:
    """A file that needs neither making nor healing, hence no lock on its folder, which a stranger may hold."""
    try:
        connection, version = _inspected(path, "mode=rw")
    except (Damaged, sqlite3.DatabaseError) as error:
        if isinstance(error, sqlite3.Error) and _code(error) == sqlite3.SQLITE_BUSY:
            raise
        return None
    if version >= FORMAT:
        return connection, version
    connection.close()
    return None


def _made(path: Path) -> tuple[sqlite3.Connection, int]:
    """A file made, healed or migrated."""
    with _init_lock(path.parent) as alone:
        try:
            connection, version = _inspected(path, "mode=rwc")
        except (Damaged, sqlite3.DatabaseError) as error:
            if not alone:
                raise StoreError(f"cache file {path}: {error}, and a process that locks its folder keeps it") from error
            _set_aside(path, error)
            connection, version = _inspected(path, "mode=rwc")
        if version < FORMAT:
            migrate(connection)
    return connection, version


@contextmanager
def _init_lock(folder: Path) -> Iterator[bool]:
    """One process at a time makes, heals or migrates files here. The folder is locked: no lock file stays.

    False where a stranger keeps the lock: BEGIN IMMEDIATE still keeps those apart that make or migrate.
    """
    alone, deadline = True, time.monotonic() + MAKING_S
    handle = os.open(folder, os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    alone = False
                    break
                time.sleep(0.005)
            except OSError:  # a file system without flock
                break
        yield alone
    finally:
        os.close(handle)


def _set_aside(path: Path, error: Exception) -> None:
    """Rename a damaged or outdated file and its journals, which may hold what it lost and must not meet the new one."""
    if isinstance(error, sqlite3.Error) and _code(error) not in _DAMAGE:
        raise error
    with path.open("rb") as file:  # only now: closing a handle drops every lock of this process on the file
        header = file.read(100)
    if not header.startswith(b"SQLite format 3\0") or header[68:72] != APPLICATION_ID.to_bytes(4, "big"):
        raise StoreError(
            f"{path} is no cache file ({error}); it was left as it is: move it away, or set MOECACHE_DB to another file"
        ) from error
    what, mark = ("is outdated", "outdated") if isinstance(error, Outdated) else ("was damaged", "corrupt")
    aside = f"{path.name}.{mark}-{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}"
    for suffix in ("-wal", "-shm", "-journal", ""):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(path.with_name(aside + suffix))
    told = printable(f"cache file {path} {what} ({error}): kept as {aside}, started afresh")
    warnings.warn(told, RuntimeWarning, 2)
