"""What keeps a cache file small and sound: prune, check, figures. Functions of an open connection."""

import sqlite3
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from moecache.schemas.errors import InvalidInput, typed
from moecache.schemas.prediction import Prediction
from moecache.schemas.timing import Environment, Timing
from moecache.store.rows import (
    AGE,
    ENVIRONMENT,
    PROBLEM,
    as_config,
    as_problem,
    current,
    dicts,
    fetch,
    read,
    valid,
)
from moecache.store.schema import USABLE

_ORPHANS = (
    """DELETE FROM problem WHERE id NOT IN (
  SELECT problem FROM timing UNION SELECT problem FROM wanted UNION SELECT problem FROM prediction)""",
    "DELETE FROM environment WHERE id NOT IN (SELECT environment FROM timing)",
    "DELETE FROM config WHERE name NOT IN (SELECT config FROM timing UNION SELECT config FROM prediction)",
)
# Timings go by whole groups (a problem in an environment): half a group could have another winner.
_OLDER = f"""DELETE FROM timing WHERE (problem, environment) IN (
  SELECT problem, environment FROM timing GROUP BY problem, environment
  HAVING max({AGE.format("")}) < ?)"""
_BEYOND = f"""DELETE FROM timing WHERE (problem, environment) IN (
  SELECT problem, environment FROM (
    SELECT problem, environment, sum(count(*)) OVER (
      ORDER BY max({AGE.format("")}) DESC, problem, environment ROWS UNBOUNDED PRECEDING) AS upto
    FROM timing GROUP BY problem, environment) WHERE upto > ?)"""
_OTHER_SOURCE = """DELETE FROM timing WHERE problem IN (
  SELECT id FROM problem WHERE op = ? AND source <> ?)"""
_DANGLING = "SELECT * FROM pragma_foreign_key_check"
_FIGURES = """SELECT (SELECT count(*) FROM problem) AS problems, (SELECT count(*) FROM config) AS configs,
  (SELECT count(*) FROM environment) AS environments, (SELECT count(*) FROM wanted) AS wanted,
  (SELECT count(*) FROM prediction) AS predictions,
  (SELECT count(*) FROM (SELECT DISTINCT problem, environment FROM timing WHERE {usable} AND {current})) AS winners,
  (SELECT count(*) FROM timing WHERE NOT {current}) AS other_code,
  count(*) AS timings, min(CASE WHEN age(measured_at) THEN measured_at END) AS oldest,
  max(CASE WHEN age(measured_at) THEN measured_at END) AS newest,
  count(CASE WHEN NOT age(measured_at) THEN 1 END) AS undated FROM timing"""


def prune(
    connection: sqlite3.Connection,
    *,
    keep_environment: Environment | str | None,
    older_than: datetime | timedelta | str | None,
    max_rows: int | None,
    sources: Mapping[str, str] | None,
    failed: bool = False,
) -> int:
    """Delete timings that any condition names, and what nothing refers to then; the timings deleted."""
    gone = 0
    if keep_environment is not None:
        typed("keep_environment", keep_environment, Environment, str)
        keep = keep_environment if isinstance(keep_environment, str) else keep_environment.id
        gone += connection.execute("DELETE FROM timing WHERE environment <> ?", [keep]).rowcount
    if failed:
        gone += connection.execute("DELETE FROM timing WHERE status <> 'ok'").rowcount
    for op, source in typed("sources", sources or {}, Mapping).items():
        gone += connection.execute(_OTHER_SOURCE, [op, source]).rowcount
    if sources is not None:
        gone += connection.execute(f"DELETE FROM timing WHERE NOT {current()}").rowcount
    if older_than is not None:
        gone += connection.execute(
            _OLDER, [_moment(typed("older_than", older_than, datetime, timedelta, str))]
        ).rowcount
    if max_rows is not None:
        gone += connection.execute(_BEYOND, [typed("max_rows", max_rows, int)]).rowcount
    for orphans in _ORPHANS:
        connection.execute(orphans)
    return gone


def _moment(when: datetime | timedelta | str) -> float:
    """A date, or an age counted back from now, in seconds since 1970."""
    if isinstance(when, timedelta):
        when = datetime.now(UTC) - when
    elif isinstance(when, str):
        try:
            when = datetime.fromisoformat(when)
        except ValueError:
            raise InvalidInput(f"{when!r} is no date; write 2026-11-20 or 2026-11-20T12:00:00Z") from None
    return when.replace(tzinfo=when.tzinfo or UTC).timestamp()


def check(connection: sqlite3.Connection) -> list[str]:
    """What is wrong with the content, in words; empty when nothing is."""
    wrong = [row[0] for row in fetch(connection, "PRAGMA integrity_check")[1] if row[0] != "ok"]
    wrong += [f"{row[0]} refers to a missing {row[2]}" for row in fetch(connection, _DANGLING)[1]]
    for row in dicts(connection, "SELECT * FROM problem"):
        if as_problem(row) is None:
            wrong.append(f"problem {row['id']}: its key is not the key of its columns: {row['key']}")
    for row in dicts(connection, "SELECT * FROM config"):
        if as_config(row) is None:
            wrong.append(f"config {row['name']}: its name is not the name of its columns")
    for row in dicts(connection, "SELECT * FROM environment"):
        found, later = valid(Environment, row), row.keys() - {"id", *ENVIRONMENT}
        if found is None or (found.id != row["id"] and not later):
            wrong.append(f"environment {row['id']}: its id is not the id of its columns")
    return wrong + _check_timings(connection) + _check_predictions(connection)


def _check_timings(connection: sqlite3.Connection) -> list[str]:
    wrong = []
    timings = read(connection, "SELECT p.*, t.* FROM timing t JOIN problem p ON p.id = t.problem")
    for row in timings.rows:
        timing, at = timings.value(Timing, row), dict(zip(timings.names, row, strict=True))
        where = f"timing of problem {at['problem']}, {at['config']}, environment {at['environment']}"
        if timing is None:
            wrong.append(f"{where}: not valid, so not used")
        elif timing.status == "ok" and timing.median_us is None:
            wrong.append(f"{where}: has status ok and no time")
    return wrong


def _check_predictions(connection: sqlite3.Connection) -> list[str]:
    found = read(connection, "SELECT p.*, t.* FROM prediction t JOIN problem p ON p.id = t.problem")
    told = (dict(zip(found.names, row, strict=True)) for row in found.rows if found.value(Prediction, row) is None)
    return [f"prediction of problem {at['problem']} for {at['device']}: not valid, so not used" for at in told]


def held(connection: sqlite3.Connection, fields: Sequence[str]) -> set[tuple[Any, ...]]:
    """Distinct values of columns of all problems, or the ids of all environments."""
    table = "environment" if list(fields) == ["environment"] else "problem"
    names = "id" if table == "environment" else ", ".join(name for name in fields if name in PROBLEM)
    return set(fetch(connection, f"SELECT DISTINCT {names} FROM {table}")[1])


def stats(connection: sqlite3.Connection) -> dict[str, Any]:
    """Figures about the content: numbers of things, what they are about, when they were measured."""
    figures = dicts(connection, _FIGURES.format(usable=USABLE, current=current()))[0]
    figures["status"] = dict(fetch(connection, "SELECT status, count(*) FROM timing GROUP BY status")[1])
    of_wanted = "SELECT p.op, count(*) FROM wanted JOIN problem p ON p.id = wanted.problem GROUP BY p.op"
    figures["wanted_ops"] = dict(fetch(connection, of_wanted)[1])
    named = "SELECT DISTINCT device_name FROM environment WHERE id IN (SELECT environment FROM timing) ORDER BY 1"
    figures["devices"] = [str(row[0]) for row in fetch(connection, named)[1] if row[0]]
    for name in ("op", "arch"):
        query = f"SELECT DISTINCT {name} FROM problem ORDER BY {name}"
        figures[f"{name}s"] = [row[0] for row in fetch(connection, query)[1]]
    return figures
