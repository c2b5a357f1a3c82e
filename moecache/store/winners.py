"""Winners of a cache file: its usable timings of today's code read in bulk, the decision rule asked of each problem in
each place."""

import sqlite3
from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter
from typing import Any

from moecache.schemas.rule import Entry, decide
from moecache.store.rows import READABLE, Rows, current, dressed, fetch, pack

# A file from elsewhere may hold text, an infinity or anything else in any column: such a row decides nothing.
USABLE = """status = 'ok' AND typeof(median_us) = 'real' AND median_us > 0 AND median_us < 9e999
  AND (mad_us IS NULL OR typeof(mad_us) = 'real' AND mad_us >= 0) AND typeof(n) = 'integer' AND n >= 0
  AND typeof(config) = 'text'"""
_TIMINGS = f"""SELECT median_us, config, mad_us, n, is_default IS TRUE, problem, environment, measured_at
  FROM timing WHERE {USABLE} AND {{current}} AND {{where}} ORDER BY problem, environment"""
_ASKED = "SELECT p.id, {problem} FROM problem p WHERE id IN (SELECT problem FROM timing WHERE {where}) {order}"
_PLACE = itemgetter(5, 6)
_NAMES = (
    "key", "packed", "environment", "config", "median_us", "mad_us", "n", "measured_at", "candidates", "default_us",
    "tied", "runner_up_us",
)  # fmt: skip


def winner_rows(connection: sqlite3.Connection, where: str, values: Iterable[Any], readable: bool) -> Rows:
    """One row a problem and environment, not yet validated; in an order for people where `readable`. `where` tests
    problem and environment of `timing` alone: anything else would change who wins."""
    given = list(values)
    problem, packed = pack(connection)
    order = f"ORDER BY {READABLE}" if readable else ""
    _, asked = fetch(connection, _ASKED.format(problem=problem, where=where, order=order), given)
    _, timings = fetch(connection, _TIMINGS.format(where=where, current=current(connection)), given)
    won: dict[Any, list[tuple[Any, ...]]] = {}
    for (number, _), group in groupby(timings, _PLACE):
        won.setdefault(number, []).append(_winner(list(group)))
    rows = [(*told, *row) for number, *told in asked for row in won.get(number, ())]
    return dressed(connection, _NAMES, rows, packed)


def _winner(group: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """From `environment` on what _NAMES says, of the timings of a problem in an environment."""
    if len(group) == 1:  # most are, in a file to ship
        us, name, mad, n, default, _, environment, measured_at = group[0]
        return environment, name, us, mad or 0.0, n, measured_at, 1, us if default else None, 1, None
    (us, name, mad, n, _), default_us, tied, runner_up_us = decide(Entry._make(row[:5]) for row in group)
    environment, measured_at = next(row[6:] for row in group if row[1] == name)
    return environment, name, us, mad or 0.0, n, measured_at, len(group), default_us, tied, runner_up_us
