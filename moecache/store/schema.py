"""The schema of a cache file: its tables, its views for people, how they are made, and what else a file may hold."""

import re
import sqlite3
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from moecache.schemas.rule import BAND, ENOUGH, ERRORS

if TYPE_CHECKING:
    from sqlite_utils import Migrations

APPLICATION_ID = 0x6D6F6563  # "moec", at byte 68 of the file
FORMAT = 1006  # user_version. A reader must know the thousands; the rest counts additions, which it ignores
OLDEST = 1006  # what is older is put aside: no release wrote it

AHEAD_S = 2 * 86400  # how far ahead a date is still believed: clocks differ, and some write local time

# A file from elsewhere may hold text, an infinity or anything else in any column: such a row decides nothing.
USABLE = """status = 'ok' AND typeof(median_us) = 'real' AND median_us > 0 AND median_us < 9e999
  AND (mad_us IS NULL OR typeof(mad_us) = 'real' AND mad_us >= 0) AND typeof(n) = 'integer' AND n >= 0
  AND typeof(config) = 'text'"""

# No STRICT tables: they need SQLite 3.37, and a shipped file should open wherever Python 3.11 does.
_PROBLEM = """CREATE TABLE problem (
  id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE,
  op TEXT NOT NULL, vendor TEXT NOT NULL, arch TEXT NOT NULL, units INTEGER NOT NULL,
  tokens INTEGER NOT NULL, experts INTEGER NOT NULL, topk INTEGER NOT NULL,
  routing TEXT NOT NULL DEFAULT '', dtype TEXT NOT NULL DEFAULT '', dims TEXT NOT NULL DEFAULT '{}',
  source TEXT NOT NULL DEFAULT '', policy INTEGER NOT NULL DEFAULT 1)"""
_CONFIG = """CREATE TABLE config (
  name TEXT PRIMARY KEY, variant TEXT NOT NULL,
  params TEXT NOT NULL DEFAULT '{}', extra TEXT NOT NULL DEFAULT '{}')"""
_ENVIRONMENT = """CREATE TABLE environment (
  id TEXT PRIMARY KEY, device_name TEXT NOT NULL DEFAULT '', driver TEXT NOT NULL DEFAULT '',
  torch TEXT NOT NULL DEFAULT '', triton TEXT NOT NULL DEFAULT '', flags TEXT NOT NULL DEFAULT '')"""
# WITHOUT ROWID: the timings of one problem lie side by side, in the order in which the rule groups them.
_TIMING = """CREATE TABLE timing (
  problem INTEGER NOT NULL REFERENCES problem(id), environment TEXT NOT NULL REFERENCES environment(id),
  config TEXT NOT NULL REFERENCES config(name), status TEXT NOT NULL DEFAULT 'ok',
  median_us REAL, mad_us REAL, n INTEGER NOT NULL DEFAULT 0, error REAL,
  is_default INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '',
  measured_at TEXT NOT NULL DEFAULT '',
  code TEXT NOT NULL DEFAULT '', PRIMARY KEY (problem, environment, config, code)) WITHOUT ROWID"""
_WANTED = """CREATE TABLE wanted (
  problem INTEGER PRIMARY KEY REFERENCES problem(id), count INTEGER NOT NULL DEFAULT 1,
  first_at TEXT NOT NULL DEFAULT '', last_at TEXT NOT NULL DEFAULT '')"""
# Apart from timings, so that nothing which asks for timings can take a prediction for one.
_PREDICTION = """CREATE TABLE prediction (
  problem INTEGER NOT NULL REFERENCES problem(id), device TEXT NOT NULL,
  config TEXT NOT NULL REFERENCES config(name), predicted_us REAL NOT NULL, model TEXT NOT NULL DEFAULT '',
  PRIMARY KEY (problem, device)) WITHOUT ROWID"""
TABLES = {"problem": _PROBLEM, "config": _CONFIG, "environment": _ENVIRONMENT, "timing": _TIMING, "wanted": _WANTED}
TABLES |= {"prediction": _PREDICTION}
# What can be made anew. A file gets each when something is first kept in it, and no export takes it along.
NOTES = {
    # What the cost model learnt of a layer on a kind of device, as JSON: only the model knows what it says.
    "learned": """CREATE TABLE IF NOT EXISTS learned (
  op TEXT NOT NULL, vendor TEXT NOT NULL, arch TEXT NOT NULL, units INTEGER NOT NULL, layer TEXT NOT NULL,
  version INTEGER NOT NULL, learned_at TEXT NOT NULL DEFAULT '', model TEXT NOT NULL,
  PRIMARY KEY (op, vendor, arch, units, layer)) WITHOUT ROWID""",
    # What a finished warm-up was asked, as a hash, and what it covered, as JSON; the highest rowid is the latest.
    "receipt": "CREATE TABLE IF NOT EXISTS receipt (request TEXT PRIMARY KEY, covered TEXT NOT NULL)",
}

# The rule of schemas.rule once more, in SQL, for whoever opens a file without moecache: the library asks Python. A test
# holds the two equal. `{a}` and `{b}` are rows of `usable`.
_USABLE = f"""SELECT problem, environment, config, median_us AS us, mad_us AS mad, n,
    is_default IS TRUE AS is_default, measured_at FROM timing WHERE {USABLE}"""
_BETTER = f"""coalesce({{a}}.us * {BAND!r} < {{b}}.us AND {{a}}.n >= {ENOUGH} AND {{b}}.n >= {ENOUGH}
    AND ({{b}}.us - {{a}}.us) * ({{b}}.us - {{a}}.us)
    > {ERRORS!r} * ({{a}}.mad * {{a}}.mad / {{a}}.n + {{b}}.mad * {{b}}.mad / {{b}}.n), 0)"""
_SAME = "{a}.problem = {b}.problem AND {a}.environment = {b}.environment"
_better, _same = _BETTER.format, _SAME.format
_WINNER = f"""WITH usable AS ({_USABLE}),
  rival AS (SELECT *, row_number() OVER (PARTITION BY problem, environment ORDER BY us, config) AS place
    FROM usable WHERE is_default),
  ranked AS (SELECT u.*, d.us AS default_us, count(*) OVER (PARTITION BY u.problem, u.environment) AS candidates,
    row_number() OVER (PARTITION BY u.problem, u.environment ORDER BY
      CASE WHEN d.us IS NULL THEN u.n < {ENOUGH} WHEN {_better(a="u", b="d")} THEN 0 ELSE 2 - (u.config = d.config) END,
      u.us, u.config) AS place
    FROM usable u LEFT JOIN rival d ON {_same(a="d", b="u")} AND d.place = 1)
SELECT p.*, w.environment, w.config, w.us AS median_us, coalesce(w.mad, 0.0) AS mad_us, w.n, w.measured_at,
  w.candidates, w.default_us,
  (SELECT count(*) FROM usable t WHERE {_same(a="t", b="w")} AND NOT {_better(a="w", b="t")}) AS tied,
  (SELECT min(t.us) FROM usable t WHERE {_same(a="t", b="w")} AND {_better(a="w", b="t")}) AS runner_up_us
FROM ranked w JOIN problem p ON p.id = w.problem WHERE w.place = 1"""


# Both views are for people. The library runs no SQL that came in a file.
VIEWS = {
    "winner": f"""CREATE VIEW winner AS SELECT
  op, arch, units, tokens, experts, topk, routing, dtype, dims, config, median_us, default_us,
  default_us / median_us - 1 AS margin, tied, candidates, runner_up_us, mad_us, n, environment, measured_at,
  vendor, source, policy, key FROM ({_WINNER})""",
    "candidate": """CREATE VIEW candidate AS SELECT
  op, arch, units, tokens, experts, topk, routing, dtype, dims, config, status, median_us,
  median_us / (SELECT min(t.median_us) FROM timing t WHERE t.problem = timing.problem
    AND t.environment = timing.environment AND t.status = 'ok') AS times_best,
  is_default, mad_us, n, error, reason, environment, measured_at, code,
  vendor, source, policy, key FROM timing JOIN problem ON problem.id = timing.problem""",
}

_NAME = r'["\[]?\w+["\]]?'
_NAMES = rf"\( ?{_NAME}(?: ?, ?{_NAME})* ?\)"
_COLUMN = (
    rf"{_NAME} (?:TEXT|INTEGER|REAL)(?: PRIMARY KEY| NOT NULL| UNIQUE| REFERENCES {_NAME} ?\({_NAME}\)"
    r"| DEFAULT (?:'[^']*'|-?\d+(?:\.\d+)?))*"
)
_PART = rf"(?:{_COLUMN}|PRIMARY KEY {_NAMES})"
_PLAIN = re.compile(
    rf"CREATE TABLE ({_NAME}) ?\( ?{_PART}(?: ?, ?{_PART})* ?\)(?: WITHOUT ROWID)?"
    rf"|CREATE (?:UNIQUE )?INDEX ({_NAME}) ON {_NAME} ?{_NAMES}"
)
MOST = 100  # tables, views and indices of a file; ours has 20
LONGEST = 10_000  # characters of a table's text; our longest has 700


def age(measured_at: object) -> float:
    """A date as seconds since 1970; 0, so the oldest, for what is no date or lies ahead: it would be the latest for
    ever. SQL that names `age` calls this."""
    try:
        when = datetime.fromisoformat(measured_at)  # type: ignore[arg-type]
        seconds = when.replace(tzinfo=when.tzinfo or UTC).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return seconds if 0 < seconds < time.time() + AHEAD_S else 0.0


def _steps() -> "Migrations":
    """Every change of the schema, in order. A shipped step is never edited: add m002, and count FORMAT up."""
    # imported here, because it imports pandas and numpy where they exist: 70-170 ms
    from sqlite_utils import Migrations

    steps = Migrations("moecache")

    @steps()  # type: ignore[untyped-decorator]
    def m001_tables_and_views(db: Any) -> None:
        for statement in (*TABLES.values(), *VIEWS.values()):
            db.execute(statement)

    return steps


def migrate(connection: sqlite3.Connection) -> None:
    """Bring a file to FORMAT and stamp it, in one transaction: whoever dies here leaves the file as it was.
    Without the write lock around the steps, 7 of 160 racing processes failed."""
    from sqlite_utils import Database

    connection.execute("BEGIN IMMEDIATE")
    try:
        # no plugins: they would run whatever else is installed, inside a serving process
        _steps().apply(Database(connection, execute_plugins=False))
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def strange(entries: Iterable[tuple[object, object]]) -> str:
    """The name of the first (name, sql) of `sqlite_schema` that no moecache makes; '' when there is none.

    Allowed are plain tables and indices, and our views. All else would run SQL of its writer: triggers, generated
    columns, checks, collations, expressions as defaults, virtual tables. By the text alone, as a file may lie about an
    entry's type. A later moecache adds columns and tables of this form.
    """
    for number, (name, sql) in enumerate(entries):
        if number >= MOST:
            return f"more than {MOST} tables"
        if sql is None and str(name).startswith("sqlite_autoindex_"):
            continue
        text = " ".join(str(sql).split()) if len(str(sql)) <= LONGEST else ""
        if text == "CREATE TABLE sqlite_stat1(tbl,idx,stat)":  # of ANALYZE
            continue
        if not _PLAIN.fullmatch(text) and not any(text.startswith(f"CREATE VIEW {view} AS ") for view in VIEWS):
            return str(name)
    return ""
