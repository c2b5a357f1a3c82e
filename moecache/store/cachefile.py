"""One cache file. It takes timings, and gives timings, winners and wanted problems; it merges, exports and prunes."""

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from moecache.schemas.device import Device
from moecache.schemas.errors import StoreError, each_typed, typed
from moecache.schemas.prediction import Prediction
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing, Winner
from moecache.store import upkeep
from moecache.store.database import Database, Mode, resolved, translated
from moecache.store.rows import (
    ADD_PROBLEM,
    FILTERS,
    GROUP_FILTERS,
    OF_PREDICTIONS,
    READABLE,
    Rows,
    as_problem,
    current,
    dicts,
    fetch,
    predict,
    problem_row,
    read,
    where,
    winner_rows,
    write,
)
from moecache.store.whole import replacing

_WANT = """INSERT INTO wanted (problem, first_at, last_at) SELECT id, :now, :now FROM problem WHERE key = :key
  ON CONFLICT (problem) DO UPDATE SET count = count + 1, last_at = excluded.last_at"""
_UNWANT = "DELETE FROM wanted WHERE problem = (SELECT id FROM problem WHERE key = ?)"
_UNDATED = "UPDATE _sqlite_migrations SET applied_at = ''"  # the one thing that says when a file was made
_WANTED = f"""SELECT p.*, count FROM wanted JOIN problem p ON p.id = wanted.problem
  ORDER BY count DESC, {READABLE}"""
_TIMINGS = """SELECT p.*, timing.* FROM timing CROSS JOIN problem p ON p.id = timing.problem WHERE {where}
  ORDER BY {readable}, environment, status <> 'ok', median_us, config"""
_STALE = """SELECT p.key, config FROM timing JOIN problem p ON p.id = timing.problem
  WHERE environment = ? GROUP BY problem, config HAVING NOT max({current})"""

_PREDICTIONS = """SELECT p.*, t.* FROM prediction t CROSS JOIN problem p ON p.id = t.problem WHERE {where}
  ORDER BY {readable}, device"""

_LEARN = """INSERT OR REPLACE INTO learned (op, vendor, arch, units, layer, version, learned_at, model)
  VALUES (?, ?, ?, ?, ?, ?, ?, ?)"""
_LEARNED = """SELECT layer, model FROM learned WHERE op = ? AND vendor = ? AND arch = ? AND units = ?
  ORDER BY learned_at DESC, layer"""
_KEEP = "INSERT OR REPLACE INTO receipt (request, covered) VALUES (?, ?)"
_LATEST = "DELETE FROM receipt WHERE rowid NOT IN (SELECT rowid FROM receipt ORDER BY rowid DESC LIMIT ?)"
RECEIPTS = 32  # of one file


class Store:
    """One cache file. Threads may share it, and forked children may go on using it.

    Every method may raise StoreError. It names the file and says what to do.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, path: Path | str, *, readonly: bool = False, shipped: bool = False) -> Self:
        """Open a file.

        Args:
            path: the file. For writing, a missing file is made, an older one is migrated, and a damaged one is renamed
                and begun again. A file to which a later moecache added something opens read-only.
            readonly: only read it; it must exist.
            shipped: only read it, and take no lock, as nobody writes it.

        Raises:
            StoreError: another program's file, a later format, a read-only folder, a full disk, no file.
        """
        typed("path", path, str, os.PathLike)
        mode: Mode = "shipped" if shipped else "read" if readonly else "write"
        return cls(Database(Path(path), mode))

    @classmethod
    def memory(cls) -> Self:
        """A store in the memory of this process. A forked child begins with an empty one."""
        return cls(Database(None))

    @property
    def path(self) -> Path | None:
        return self._database.path

    @property
    def readonly(self) -> bool:
        return self._database.readonly

    def close(self) -> None:
        """Close the file. The next use of the store opens it again."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, timings: Sequence[Timing]) -> None:
        """Write all of these timings, or none. Each replaces the timing of the same problem, config and environment."""
        wanted = each_typed("timings", timings, Timing)
        with self._database.writing() as connection:
            write(connection, wanted)

    def merge(self, other: "Store") -> int:
        """Take from `other` the timings that this file lacks, and those that are later. Returns their number.

        Timings of today's code replace those of other code and are never replaced by them, whichever are later.
        """
        timings = typed("other", other, Store).timings()
        with self._database.writing() as connection:
            return write(connection, timings, newer_only=True)

    def timings(self, problem: Problem | None = None, *, today: bool = False, **filters: Any) -> list[Timing]:
        """Every timing, or those of one problem, failures included. Within a problem the best comes first.

        Args:
            problem: take only its timings.
            today: take only those that ran the code of today.
            filters: names of `rows.FILTERS` with one value or several, `op="moe_sort"`, `tokens=[1, 16]`.

        Raises:
            InvalidInput: there is no filter of that name.
        """
        if problem is not None:
            filters["key"] = typed("problem", problem, Problem).key
        condition, values = where(filters, FILTERS)
        with self._database.reading() as connection:
            where_too = f"{condition} AND {current()}" if today else condition
            rows = read(connection, _TIMINGS.format(where=where_too, readable=READABLE), values)
        return rows.values(Timing)

    def stale(self, environment: Environment) -> list[tuple[str, str]]:
        """(problem key, config name) of each timing in this environment whose code is not that of today."""
        with self._database.reading() as connection:
            rows = fetch(connection, _STALE.format(current=current()), [environment.id])[1]
        return [(str(key), str(name)) for key, name in rows]

    def winners(self, **filters: Any) -> list[Winner]:
        """One winner for each problem and environment, by the rule of `schemas.rule`. Filters are those of `timings`,
        without config and status, as these would change which config wins."""
        return self.winner_rows(readable=True, **filters).values(Winner)

    def winner_rows(self, readable: bool = False, **filters: Any) -> Rows:
        """The winners, not yet validated. With `readable` they are in an order for people."""
        condition, values = where(filters, GROUP_FILTERS)
        with self._database.reading() as connection:
            return winner_rows(connection, condition, values, readable)

    def predict(self, predictions: Sequence[Prediction]) -> None:
        """Write all of these predictions, or none. Each replaces the prediction of the same problem and device."""
        wanted = each_typed("predictions", predictions, Prediction)
        with self._database.writing() as connection:
            predict(connection, wanted)

    def predictions(self, problem: Problem | None = None, **filters: Any) -> list[Prediction]:
        """Every prediction, or those of one problem. Filters are those of `timings`, with `device` in place of
        environment and status."""
        if problem is not None:
            filters["key"] = typed("problem", problem, Problem).key
        condition, values = where(filters, OF_PREDICTIONS)
        query = _PREDICTIONS.format(where=condition, readable=READABLE)
        with self._database.reading() as connection:
            return read(connection, query, values).values(Prediction)

    def learn(self, op: str, device: Device, layer: str, version: int, model: str) -> None:
        """Keep what a version of the cost model learnt of an op's layer on a kind of device. Replaces an older row."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        row = [op, device.vendor, device.arch, device.units, layer, version, now, model]
        with self._database.writing() as connection:
            connection.execute(_LEARN, row)

    def learned(self, op: str, device: Device) -> list[tuple[str, str]]:
        """(layer, what was learnt) of an op on such a device; the latest comes first."""
        with self._database.reading() as connection:
            _, rows = fetch(connection, _LEARNED, [op, device.vendor, device.arch, device.units])
        return [(str(layer), str(model)) for layer, model in rows]

    def keep_receipt(self, request: str, covered: str) -> None:
        """Note what a finished warm-up covered. The latest RECEIPTS stay."""
        with self._database.writing() as connection:
            connection.execute(_KEEP, [request, covered])
            connection.execute(_LATEST, [RECEIPTS])

    def receipt(self, request: str) -> str:
        """What an earlier warm-up of that request covered; '' if there was none."""
        with self._database.reading() as connection:
            rows = fetch(connection, "SELECT covered FROM receipt WHERE request = ?", [request])[1]
        return str(rows[0][0]) if rows else ""

    def want(self, problem: Problem) -> None:
        """Note that a call met this problem and nobody has measured it."""
        typed("problem", problem, Problem)
        with self._database.writing() as connection:
            connection.execute(ADD_PROBLEM, problem_row(problem))
            now = datetime.now(UTC).isoformat(timespec="seconds")
            connection.execute(_WANT, {"key": problem.key, "now": now})

    def wanted(self) -> list[tuple[Problem, int]]:
        """The wanted problems with how often they were met; the most frequent comes first."""
        with self._database.reading() as connection:
            rows = dicts(connection, _WANTED)
        found = ((as_problem(row), row["count"]) for row in rows)
        return [(problem, count) for problem, count in found if problem is not None]

    def unwant(self, problems: Iterable[Problem]) -> None:
        """Forget that these were wanted."""
        keys = [[problem.key] for problem in each_typed("problems", problems, Problem)]
        with self._database.writing() as connection:
            connection.executemany(_UNWANT, keys)

    def export_file(self, path: Path | str, **filters: Any) -> int:
        """Write a file to ship, with the timings that `timings(**filters)` gives. Returns their number.

        Predictions of these problems go along, unless a filter asks for something that only timings have. The file
        opens where nobody may write. Equal content makes equal bytes. It replaces an older export of that name as a
        whole, or not at all.

        Raises:
            StoreError: there is another kind of file of that name, or it cannot be written.
        """
        path, timings = Path(typed("path", path, str, os.PathLike)), self.timings(**filters)
        predictions = self.predictions(**filters) if filters.keys() <= set(OF_PREDICTIONS) else []
        if self.path is not None and resolved(path) == resolved(self.path):
            raise StoreError(f"{path} is the cache file itself; export to another name")
        if path.exists():
            Store.open(path, shipped=True).close()
        with Store.memory() as copy, translated(path):
            copy.put(timings)
            copy.predict(predictions)
            with copy._database.writing() as connection:
                connection.execute(_UNDATED)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as draft:
                copy._database.vacuum_into(draft)
        return len(timings)

    def prune(
        self,
        *,
        keep_environment: Environment | str | None = None,
        older_than: datetime | timedelta | str | None = None,
        max_rows: int | None = None,
        sources: Mapping[str, str] | None = None,
        failed: bool = False,
        dry_run: bool = False,
    ) -> int:
        """Delete the timings that any condition names. Returns their number.

        Args:
            keep_environment: delete timings of all other environments (an Environment or its id).
            older_than: delete what was last measured before this date, or longer ago than this.
            max_rows: delete the timings that were measured longest ago, until so many are left.
            sources: maps ops to the `source` of their problems today. Delete timings of these ops with another source,
                and all timings whose code is not that of today.
            failed: delete every failure, so that its config is tried again.
            dry_run: only count.
        """
        with self._database.writing() as connection:
            connection.execute("SAVEPOINT prune")
            gone = upkeep.prune(
                connection,
                keep_environment=keep_environment,
                older_than=older_than,
                max_rows=max_rows,
                sources=sources,
                failed=failed,
            )
            connection.execute("ROLLBACK TO prune" if dry_run else "RELEASE prune")
        if gone and not dry_run:
            self._database.shrink()
        return gone

    def check(self) -> list[str]:
        """What is wrong with the file, in words; empty if nothing is."""
        with self._database.reading() as connection:
            return upkeep.check(connection)

    def held(self, *fields: str) -> set[tuple[Any, ...]]:
        """All values that the problems have in these columns. For `environment` alone, its ids."""
        with self._database.reading() as connection:
            return upkeep.held(connection, fields)

    def stats(self) -> dict[str, Any]:
        """Figures for people and programs: path, bytes, format, journal mode, and `upkeep.stats`."""
        with self._database.reading() as connection:
            return self._database.facts() | upkeep.stats(connection)
