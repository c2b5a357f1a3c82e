"""Rows and values: how timings and what they name are written, validated when they are read, and which of them win."""

import json
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

from pydantic import BaseModel

from moecache.kernels.code import RUNS, present
from moecache.schemas.config import Config
from moecache.schemas.errors import InvalidInput, each_typed
from moecache.schemas.problem import Problem
from moecache.schemas.rule import Entry, decide
from moecache.schemas.timing import Environment, Prediction, Timing, Winner
from moecache.store.schema import USABLE

Model = TypeVar("Model", bound=BaseModel)

PROBLEM, ENVIRONMENT, TIMING = (tuple(model.model_fields) for model in (Problem, Environment, Timing))
_OF_PROBLEM = ("key", *(name for name in PROBLEM if name != "dims"))
GROUP_FILTERS = (*_OF_PROBLEM, "environment")
FILTERS = (*GROUP_FILTERS, "config", "status")
OF_PREDICTIONS = (*_OF_PROBLEM, "config", "device")
READABLE = "op, vendor, arch, units, experts, topk, dtype, dims, routing, tokens, key"  # an order for people
MOST_ROWS, MOST_TEXT, PART = 300_000, 256 << 20, 64  # of one query; rows that are taken at a time
AGE = "age({}measured_at)"


def _upsert(table: str, names: Sequence[str]) -> str:
    """Inserts a row, or puts right the columns of one that is there: an edited one would be a miss for ever."""
    rest = ", ".join(f"{name} = excluded.{name}" for name in names[1:])
    return f"""INSERT INTO {table} ({", ".join(names)}) VALUES ({", ".join("?" * len(names))})
  ON CONFLICT ({names[0]}) DO UPDATE SET {rest}"""


ADD_PROBLEM = _upsert("problem", ("key", *PROBLEM))
_ADD_ENVIRONMENT = _upsert("environment", ("id", *ENVIRONMENT))
_ADD_CONFIG = _upsert("config", ("name", "variant", "params", "extra"))
_PUT = f"""INSERT INTO timing ({", ".join(TIMING)})
  VALUES ((SELECT id FROM problem WHERE key = ?), {", ".join("?" for _ in TIMING[1:])})
  ON CONFLICT (problem, config, environment, code) DO UPDATE
  SET {", ".join(f"{name} = excluded.{name}" for name in TIMING[3:])}"""
# What ran the code of today goes before what did not, whichever is newer: it alone answers.
_IF_NEWER = f" WHERE {AGE.format('excluded.')} > {AGE.format('timing.')}"
_PREDICT = """INSERT OR REPLACE INTO prediction (problem, device, config, predicted_us, model)
  VALUES ((SELECT id FROM problem WHERE key = ?), ?, ?, ?, ?)"""
# A problem has one static default. Where a later version chose another, the row measured last says so.
_SAME = "problem = (SELECT id FROM problem WHERE key = :key) AND environment = :environment AND is_default"
_ONE_DEFAULT = f"""UPDATE timing SET is_default = 0 WHERE {_SAME} AND config <> (
  SELECT config FROM timing WHERE {_SAME} ORDER BY {AGE.format("")} DESC, config = :config DESC LIMIT 1)"""
_DECISIVE = f"""SELECT median_us, config, mad_us, n, is_default IS TRUE, problem, environment, measured_at
  FROM timing WHERE {USABLE} AND {{current}} AND {{where}} ORDER BY problem, environment"""
# By their names: a file may have further columns, which may be called like what a winner has.
_ASKED = f"""SELECT id, key, {", ".join(PROBLEM)} FROM problem
  WHERE id IN (SELECT problem FROM timing WHERE {{where}}) {{order}}"""
_WON = tuple(Winner.model_fields)[1:]  # beside the problem


def problem_row(problem: Problem) -> list[Any]:
    """The values of ADD_PROBLEM; `dims` as JSON."""
    values = [getattr(problem, name) for name in PROBLEM]
    values[PROBLEM.index("dims")] = json.dumps(dict(problem.dims))
    return [problem.key, *values]


def _add(connection: sqlite3.Connection, told: Collection[Timing | Prediction]) -> None:
    """Insert the problems and configs of these."""
    # dicts, not sets: equal timings in equal order make equal files
    connection.executemany(ADD_PROBLEM, map(problem_row, dict.fromkeys(each.problem for each in told)))
    configs = dict.fromkeys(each.config for each in told)
    values = ([c.name, c.variant, json.dumps(dict(c.params)), json.dumps(dict(c.extra))] for c in configs)
    connection.executemany(_ADD_CONFIG, values)


def write(connection: sqlite3.Connection, timings: Collection[Timing], *, newer_only: bool = False) -> int:
    """Insert timings or replace those of the same problem, config, environment and code; the number written.

    In SQL of our own rather than sqlite-utils, which has no upsert with a condition, takes 6 times as long
    and would bring numpy and pandas into a serving process.
    """
    _add(connection, timings)
    environments = dict.fromkeys(t.environment for t in timings)
    values = ([each.id, *(getattr(each, name) for name in ENVIRONMENT)] for each in environments)
    connection.executemany(_ADD_ENVIRONMENT, values)
    put = _PUT + _IF_NEWER if newer_only else _PUT
    return sum(_put(connection, put, timing) for timing in timings)


def predict(connection: sqlite3.Connection, predictions: Collection[Prediction]) -> None:
    """Insert predictions or replace those of the same problem and device."""
    _add(connection, predictions)
    rows = ([p.problem.key, p.device, p.config.name, p.predicted_us, p.model] for p in predictions)
    connection.executemany(_PREDICT, rows)


def _put(connection: sqlite3.Connection, put: str, timing: Timing) -> int:
    names = {"key": timing.problem.key, "config": timing.config.name, "environment": timing.environment.id}
    rest = [getattr(timing, name) for name in TIMING[3:]]
    written = connection.execute(put, [*names.values(), *rest]).rowcount
    if written and timing.is_default:
        connection.execute(_ONE_DEFAULT, names)
    return written


def where(filters: Mapping[str, Any], allowed: Collection[str]) -> tuple[str, list[Any]]:
    """An SQL condition over `timing`, and its values. A filter is one value or several; None is no filter.

    Raises:
        InvalidInput: a name that is not in `allowed`, or a value that is neither text nor a whole number.
    """
    of_problem: list[str] = []
    tests: list[str] = []
    values: list[Any] = []
    for name, wanted in sorted(filters.items(), key=lambda item: item[0] not in _OF_PROBLEM):
        if name not in allowed:
            raise InvalidInput(f"{name!r} is no filter; allowed are {', '.join(allowed)}")
        if wanted is not None:
            several = each_typed(name, wanted, str, int)
            test = f"{name} IN ({', '.join('?' * len(several))})"
            (of_problem if name in _OF_PROBLEM else tests).append(test)
            values += several
    if of_problem:
        tests.insert(0, f"problem IN (SELECT id FROM problem WHERE {' AND '.join(of_problem)})")
    return " AND ".join(tests) or "1", values


@dataclass(frozen=True)
class Rows:
    """Rows as SQLite returned them, each validated when it is asked for: to validate 10 000 winners takes pydantic five
    times as long as to read them, and a process uses a few hundred.

    What does not hold is None, hence a miss and never an error: a field out of range, a config whose name is
    not that of its own columns, a problem whose key is not. The file may come from a later version, from an
    editor or from a stranger.
    """

    names: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    environments: dict[str, Environment]
    configs: dict[str, Config | None]
    problems: dict[str, Problem | None] = field(default_factory=dict)

    def value(self, model: type[Model], row: tuple[Any, ...]) -> Model | None:
        """A row as Timing, Winner, Prediction or whatever has problem, config and, where the row has, environment."""
        fields = dict(zip(self.names, row, strict=True))
        parts: dict[str, Any] = {
            "problem": self._problem(fields),
            "config": self.configs.get(fields["config"]),
        }
        if "environment" in fields:
            parts["environment"] = self.environments.get(fields["environment"])
        return None if None in parts.values() else valid(model, fields | parts)

    def values(self, model: type[Model]) -> list[Model]:
        """All rows that hold."""
        return [value for row in self.rows if (value := self.value(model, row)) is not None]

    def _problem(self, fields: dict[str, Any]) -> Problem | None:
        if fields["key"] not in self.problems:
            self.problems[fields["key"]] = as_problem(fields)
        return self.problems[fields["key"]]


def read(connection: sqlite3.Connection, query: str, values: Iterable[Any] = ()) -> Rows:
    """The rows of a query over timings."""
    return _dressed(connection, *fetch(connection, query, values))


def _dressed(connection: sqlite3.Connection, names: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Rows:
    """Rows of timings with the configs and environments that they name."""
    if not rows:
        return Rows(names, rows, {}, {})
    environments = {row["id"]: valid(Environment, row) for row in _named(connection, "environment", "id", names, rows)}
    configs = {row["name"]: as_config(row) for row in _named(connection, "config", "name", names, rows)}
    return Rows(names, rows, {id: each for id, each in environments.items() if each is not None}, configs)


def _named(
    connection: sqlite3.Connection, table: str, key: str, names: tuple[str, ...], rows: list[tuple[Any, ...]]
) -> list[dict[str, Any]]:
    """The rows of a table that the column of its name refers to: a file may hold thousands that nobody asks for."""
    if table not in names:
        return []
    at = names.index(table)
    wanted = json.dumps(list({row[at] for row in rows if isinstance(row[at], str)}))
    return dicts(connection, f"SELECT * FROM {table} WHERE {key} IN (SELECT value FROM json_each(?))", [wanted])


def current() -> str:
    """An SQL condition, true or false: what a timing ran is the code of today, as `kernels.code.present` has it. The
    problem is looked up by its number: a list of all that are an op's would cost each question the more, the larger the
    file is."""
    ours = " ".join(f"WHEN {op!r} THEN code IN ({str(sorted(present(op, '')))[1:-1]})" for op in RUNS)
    return f"CASE (SELECT op FROM problem WHERE id = timing.problem AND source = '') {ours} ELSE code = '' END IS TRUE"


def winner_rows(connection: sqlite3.Connection, condition: str, values: Iterable[Any], readable: bool) -> Rows:
    """One row a problem and environment, not yet validated; in an order for people where `readable`. `condition` tests
    problem and environment of `timing` alone: anything else would change who wins."""
    given, order = list(values), f"ORDER BY {READABLE}" if readable else ""
    names, asked = fetch(connection, _ASKED.format(where=condition, order=order), given)
    _, timings = fetch(connection, _DECISIVE.format(where=condition, current=current()), given)
    won: dict[Any, list[tuple[Any, ...]]] = {}
    for (number, _), group in groupby(timings, itemgetter(5, 6)):
        won.setdefault(number, []).append(_winner(list(group)))
    rows = [(*problem, *row) for problem in asked for row in won.get(problem[0], ())]
    return _dressed(connection, (*names, *_WON), rows)


def _winner(group: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The fields of a Winner from config on, of the timings of a problem in an environment."""
    if len(group) == 1:  # most are, in a file to ship
        us, name, mad, n, default, _, environment, measured_at = group[0]
        return name, environment, us, mad or 0.0, n, us if default else None, 1, 1, None, measured_at
    (us, name, mad, n, _), default_us, tied, runner_up_us = decide(Entry._make(row[:5]) for row in group)
    environment, measured_at = next(row[6:] for row in group if row[1] == name)
    return name, environment, us, mad or 0.0, n, default_us, tied, len(group), runner_up_us, measured_at


def fetch(
    connection: sqlite3.Connection, query: str, values: Iterable[Any] = ()
) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Column names and rows. Text that is not UTF-8 does not spoil the rows beside it."""
    try:
        cursor = connection.execute(query, list(values))
        return tuple(column[0] for column in cursor.description), _bounded(cursor)
    except sqlite3.OperationalError as error:
        if "UTF-8" not in str(error) or connection.text_factory is not str:
            raise
    connection.text_factory = lambda data: data.decode(errors="replace")
    try:
        return fetch(connection, query, values)
    finally:
        connection.text_factory = str


def _bounded(cursor: sqlite3.Cursor) -> list[tuple[Any, ...]]:
    """All rows, taken in small parts so that a file that holds too much is found before memory is full.

    Raises:
        sqlite3.DataError: there are more rows, or more text in them, than in any cache file.
    """
    rows: list[tuple[Any, ...]] = []
    size = 0
    while part := cursor.fetchmany(PART):
        rows += part
        size += sum(len(value) for row in part for value in row if value.__class__ is str or value.__class__ is bytes)
        if len(rows) > MOST_ROWS or size > MOST_TEXT:
            what = f"{MOST_ROWS} rows" if len(rows) > MOST_ROWS else f"{MOST_TEXT >> 20} MiB of text"
            raise sqlite3.DataError(f"it holds more than {what} of one kind")
    return rows


def dicts(connection: sqlite3.Connection, query: str, values: Iterable[Any] = ()) -> list[dict[str, Any]]:
    names, rows = fetch(connection, query, values)
    return [dict(zip(names, row, strict=True)) for row in rows]


def as_problem(fields: Mapping[str, Any]) -> Problem | None:
    """A row of `problem`; None unless its key is the key of its own columns."""
    problem = valid(Problem, {**fields, "dims": _decoded(fields.get("dims"))})
    return problem if problem is not None and problem.key == fields.get("key") else None


def as_config(fields: Mapping[str, Any]) -> Config | None:
    """A row of `config`; None unless its name is the name of its own columns."""
    config = valid(Config, {**fields, **{name: _decoded(fields.get(name)) for name in ("params", "extra")}})
    return config if config is not None and config.name == fields.get("name") else None


def valid(model: type[Model], fields: Mapping[str, Any]) -> Model | None:
    try:
        return model.model_validate(fields)
    except ValueError:
        return None


def _decoded(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None  # which no field accepts
