"""One cache file. It takes timings, and gives timings, winners and wanted problems; it merges, exports and prunes."""

import os
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from moecache.schemas.device import Device
from moecache.schemas.errors import StoreError, each_typed, typed
from moecache.schemas.problem import Problem
from moecache.schemas.timing import FROM, Environment, Prediction, Timing, Winner, now
from moecache.store import rows as stored
from moecache.store.atomic import replacing
from moecache.store.database import EXPORTED, Database, Mode, resolved, translated
from moecache.store.schema import NOTES, USABLE

_WANT = """INSERT INTO wanted (problem, first_at, last_at) SELECT id, :now, :now FROM problem WHERE key = :key
  ON CONFLICT (problem) DO UPDATE SET count = count + 1, last_at = excluded.last_at"""
_UNWANT = "DELETE FROM wanted WHERE problem = (SELECT id FROM problem WHERE key = ?)"
_UNDATED = "UPDATE _sqlite_migrations SET applied_at = ''"  # the one thing that says when a file was made
_WANTED = f"""SELECT p.*, count FROM wanted JOIN problem p ON p.id = wanted.problem
  ORDER BY count DESC, {stored.READABLE}"""
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

_ORPHANS = (
    """DELETE FROM problem WHERE id NOT IN (
  SELECT problem FROM timing UNION SELECT problem FROM wanted UNION SELECT problem FROM prediction)""",
    "DELETE FROM environment WHERE id NOT IN (SELECT environment FROM timing)",
    "DELETE FROM config WHERE name NOT IN (SELECT config FROM timing UNION SELECT config FROM prediction)",
)
_DANGLING = "SELECT * FROM pragma_foreign_key_check"
_FIGURES = """SELECT (SELECT count(*) FROM problem) AS problems, (SELECT count(*) FROM config) AS configs,
  (SELECT count(*) FROM environment) AS environments, (SELECT count(*) FROM wanted) AS wanted,
  (SELECT count(*) FROM prediction) AS predictions,
  (SELECT count(*) FROM (SELECT DISTINCT problem, environment FROM timing WHERE {usable} AND {current})) AS winners,
  (SELECT count(*) FROM timing WHERE NOT {current}) AS other_code,
  count(*) AS timings, min(CASE WHEN age(measured_at) THEN measured_at END) AS oldest,
  max(CASE WHEN age(measured_at) THEN measured_at END) AS newest FROM timing"""


_STATUS = f"""SELECT CASE WHEN flags LIKE '{FROM}%' THEN 'named by tables' ELSE status END AS told, count(*)
  FROM timing LEFT JOIN environment ON id = environment GROUP BY told"""


class Store(Database):
    """One cache file. Threads may share it, and forked children may go on using it.

    Every method may raise StoreError. It names the file and says what to do.
    """

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
        return cls(Path(path), mode)

    @classmethod
    def memory(cls) -> Self:
        """A store in the memory of this process. A forked child begins with an empty one."""
        return cls(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, timings: Sequence[Timing]) -> None:
        """Write all of these timings, or none. Each replaces the timing of the same problem, config and environment."""
        wanted = each_typed("timings", timings, Timing)
        with self.writing() as connection:
            stored.write(connection, wanted)

    def merge(self, other: "Store") -> int:
        """Take from `other` the timings that this file lacks, and those that are later. Returns their number.

        Timings of today's code replace those of other code and are never replaced by them, whichever are later.
        """
        timings = typed("other", other, Store).timings()
        with self.writing() as connection:
            return stored.write(connection, timings, newer_only=True)

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
        condition, values = stored.where(filters, stored.FILTERS)
        with self.reading() as connection:
            where_too = f"{condition} AND {stored.current()}" if today else condition
            rows = stored.read(connection, _TIMINGS.format(where=where_too, readable=stored.READABLE), values)
        return rows.values(Timing)

    def stale(self, environment: Environment) -> list[tuple[str, str]]:
        """(problem key, config name) of each timing in this environment whose code is not that of today."""
        with self.reading() as connection:
            rows = stored.fetch(connection, _STALE.format(current=stored.current()), [environment.id])[1]
        return [(str(key), str(name)) for key, name in rows]

    def winners(self, **filters: Any) -> list[Winner]:
        """One winner for each problem and environment, by the rule of `schemas.rule`. Filters are those of `timings`,
        without config and status, as these would change which config wins."""
        return self.winner_rows(readable=True, **filters).values(Winner)

    def winner_rows(self, readable: bool = False, **filters: Any) -> stored.Rows:
        """The winners, not yet validated. With `readable` they are in an order for people."""
        condition, values = stored.where(filters, stored.GROUP_FILTERS)
        with self.reading() as connection:
            return stored.winner_rows(connection, condition, values, readable)

    def predict(self, predictions: Sequence[Prediction]) -> None:
        """Write all of these predictions, or none. Each replaces the prediction of the same problem and device."""
        wanted = each_typed("predictions", predictions, Prediction)
        with self.writing() as connection:
            stored.predict(connection, wanted)

    def predictions(self, problem: Problem | None = None, **filters: Any) -> list[Prediction]:
        """Every prediction, or those of one problem. Filters are those of `timings`, with `device` in place of
        environment and status."""
        if problem is not None:
            filters["key"] = typed("problem", problem, Problem).key
        condition, values = stored.where(filters, stored.OF_PREDICTIONS)
        query = _PREDICTIONS.format(where=condition, readable=stored.READABLE)
        with self.reading() as connection:
            return stored.read(connection, query, values).values(Prediction)

    def learn(self, op: str, device: Device, layer: str, version: int, model: str) -> None:
        """Keep what a version of the cost model learnt of an op's layer on a kind of device. Replaces an older row."""
        with self.writing() as connection:
            connection.execute(NOTES["learned"])
            connection.execute(_LEARN, [op, device.vendor, device.arch, device.units, layer, version, now(), model])

    def learned(self, op: str, device: Device) -> list[tuple[str, str]]:
        """(layer, what was learnt) of an op on such a device; the latest comes first."""
        rows = self._noted("learned", _LEARNED, op, device.vendor, device.arch, device.units)
        return [(str(layer), str(model)) for layer, model in rows]

    def keep_receipt(self, request: str, covered: str) -> None:
        """Note what a finished warm-up covered. The latest RECEIPTS stay."""
        with self.writing() as connection:
            connection.execute(NOTES["receipt"])
            connection.execute(_KEEP, [request, covered])
            connection.execute(_LATEST, [RECEIPTS])

    def receipt(self, request: str) -> str:
        """What an earlier warm-up of that request covered; '' if there was none."""
        rows = self._noted("receipt", "SELECT covered FROM receipt WHERE request = ?", request)
        return str(rows[0][0]) if rows else ""

    def _noted(self, table: str, query: str, *values: object) -> list[tuple[Any, ...]]:
        """The rows of a query about one of NOTES; none where the file has no such table yet."""
        with self.reading() as connection:
            there = stored.fetch(connection, "SELECT 1 FROM sqlite_schema WHERE name = ?", [table])[1]
            return stored.fetch(connection, query, values)[1] if there else []

    def want(self, problems: Iterable[Problem]) -> None:
        """Note that calls met these problems and nobody has measured them."""
        met, at = each_typed("problems", problems, Problem), now()
        with self.writing() as connection:
            connection.executemany(stored.ADD_PROBLEM, map(stored.problem_row, met))
            connection.executemany(_WANT, [{"key": problem.key, "now": at} for problem in met])

    def wanted(self) -> list[tuple[Problem, int]]:
        """The wanted problems with how often they were met; the most frequent comes first."""
        with self.reading() as connection:
            rows = stored.dicts(connection, _WANTED)
        found = ((stored.as_problem(row), row["count"]) for row in rows)
        return [(problem, count) for problem, count in found if problem is not None]

    def unwant(self, problems: Iterable[Problem]) -> None:
        """Forget that these were wanted."""
        keys = [[problem.key] for problem in each_typed("problems", problems, Problem)]
        with self.writing() as connection:
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
        predictions = self.predictions(**filters) if filters.keys() <= set(stored.OF_PREDICTIONS) else []
        if self.path is not None and resolved(path) == resolved(self.path):
            raise StoreError(f"{path} is the cache file itself; export to another name")
        if path.exists():
            Store.open(path, shipped=True).close()
        with Store.memory() as copy, translated(path, EXPORTED):
            copy.put(timings)
            copy.predict(predictions)
            with copy.writing() as connection:
                connection.execute(_UNDATED)
            path.parent.mkdir(parents=True, exist_ok=True)
            # a copy's journal mode is DELETE, so that it opens in a folder that nobody may write
            with replacing(path) as draft, copy.using() as connection, translated(path, EXPORTED):
                connection.execute("VACUUM INTO ?", [str(draft)])
        return len(timings)

    def prune(self, *, failed: bool = False) -> int:
        """Delete the timings whose code is not that of today; or the failures, so that their configs are tried again.
        Returns their number."""
        doomed = "status <> 'ok'" if failed else f"NOT {stored.current()}"
        with self.writing() as connection:
            gone = connection.execute(f"DELETE FROM timing WHERE {doomed}").rowcount
            for orphans in _ORPHANS:
                connection.execute(orphans)
        if gone:
            with self.using() as connection, suppress(sqlite3.OperationalError):  # somebody may be reading
                connection.execute("VACUUM")
        return gone

    def check(self) -> list[str]:
        """What is wrong with the file, in words; empty if nothing is."""
        with self.reading() as connection:
            wrong = [row[0] for row in stored.fetch(connection, "PRAGMA integrity_check")[1] if row[0] != "ok"]
            wrong += [f"{row[0]} refers to a missing {row[2]}" for row in stored.fetch(connection, _DANGLING)[1]]
            for row in stored.dicts(connection, "SELECT * FROM problem"):
                if stored.as_problem(row) is None:
                    wrong.append(f"problem {row['id']}: its key is not the key of its columns: {row['key']}")
            for row in stored.dicts(connection, "SELECT * FROM config"):
                if stored.as_config(row) is None:
                    wrong.append(f"config {row['name']}: its name is not the name of its columns")
            for row in stored.dicts(connection, "SELECT * FROM environment"):
                known, later = stored.valid(Environment, row), row.keys() - {"id", *stored.ENVIRONMENT}
                if known is None or (known.id != row["id"] and not later):
                    wrong.append(f"environment {row['id']}: its id is not the id of its columns")
            for model, table in ((Timing, "timing"), (Prediction, "prediction")):
                found = stored.read(connection, f"SELECT p.*, t.* FROM {table} t JOIN problem p ON p.id = t.problem")
                wrong += [told for row in found.rows if (told := _unsound(found, model, row))]
        return wrong

    def held(self, name: str) -> set[Any]:
        """All values that problems with timings or predictions have in this column; for `environment` its ids."""
        of = "SELECT problem FROM timing UNION SELECT problem FROM prediction"
        query = f"SELECT DISTINCT {name} FROM problem WHERE id IN ({of})"
        query = query if name in stored.PROBLEM else "SELECT id FROM environment"
        with self.reading() as connection:
            return {row[0] for row in stored.fetch(connection, query)[1]}

    def stats(self) -> dict[str, Any]:
        """Figures for people and programs: about the file, numbers of things, what they are about, when they were
        measured."""
        with self.reading() as connection:
            figures = stored.dicts(connection, _FIGURES.format(usable=USABLE, current=stored.current()))[0]
            figures["status"] = dict(stored.fetch(connection, _STATUS)[1])
            of_wanted = "SELECT p.op, count(*) FROM wanted JOIN problem p ON p.id = wanted.problem GROUP BY p.op"
            figures["wanted_ops"] = dict(stored.fetch(connection, of_wanted)[1])
            named = (
                "SELECT DISTINCT device_name FROM environment"
                f" WHERE id IN (SELECT environment FROM timing) AND flags NOT LIKE '{FROM}%' ORDER BY 1"
            )
            figures["devices"] = [str(row[0]) for row in stored.fetch(connection, named)[1] if row[0]]
            for name in ("op", "arch"):
                query = f"SELECT DISTINCT {name} FROM problem ORDER BY {name}"
                figures[f"{name}s"] = [row[0] for row in stored.fetch(connection, query)[1]]
            return self.facts() | figures


def _unsound(rows: stored.Rows, model: type[Timing | Prediction], row: tuple[Any, ...]) -> str:
    """What is wrong with a row, '' for nothing."""
    found, at = rows.value(model, row), dict(zip(rows.names, row, strict=True))
    place = f" for {at['device']}" if "device" in at else f", {at['config']}, environment {at['environment']}"
    where = f"{model.__name__.lower()} of problem {at['problem']}{place}"
    if found is None:
        return f"{where}: not valid, so not used"
    timed = not isinstance(found, Timing) or found.status != "ok" or found.told or found.median_us is not None
    return "" if timed else f"{where}: has status ok and no time"
