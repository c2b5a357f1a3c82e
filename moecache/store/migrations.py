"""The schema of a cache file: tables, the decision rule, and the steps that bring older files to it."""

import sqlite3
from typing import TYPE_CHECKING, Any

from moecache.schemas.timing import TIE_BAND

if TYPE_CHECKING:
    from sqlite_utils import Migrations

APPLICATION_ID = 0x6D6F6563  # "moec", at byte 68 of the file
FORMAT = 1003  # user_version. A reader must know the thousands; the rest counts additions, which it ignores

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
  torch TEXT NOT NULL DEFAULT '', triton TEXT NOT NULL DEFAULT '')"""
# WITHOUT ROWID: the timings of one problem lie side by side, in the order in which the rule groups them.
_TIMING = """CREATE TABLE timing (
  problem INTEGER NOT NULL REFERENCES problem(id), environment TEXT NOT NULL REFERENCES environment(id),
  config TEXT NOT NULL REFERENCES config(name), status TEXT NOT NULL DEFAULT 'ok',
  median_us REAL, mad_us REAL, n INTEGER NOT NULL DEFAULT 0, error REAL,
  is_default INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '',
  measured_at TEXT NOT NULL DEFAULT '',
  PRIMARY KEY (problem, environment, config)) WITHOUT ROWID"""
_WANTED = """CREATE TABLE wanted (
  problem INTEGER PRIMARY KEY REFERENCES problem(id), count INTEGER NOT NULL DEFAULT 1,
  first_at TEXT NOT NULL DEFAULT '', last_at TEXT NOT NULL DEFAULT '')"""
# Apart from timings, so that nothing which asks for timings can take a prediction for one.
_PREDICTION = """CREATE TABLE prediction (
  problem INTEGER NOT NULL REFERENCES problem(id), device TEXT NOT NULL,
  config TEXT NOT NULL REFERENCES config(name), predicted_us REAL NOT NULL, model TEXT NOT NULL DEFAULT '',
  PRIMARY KEY (problem, device)) WITHOUT ROWID"""
# What the cost model learnt of a layer on a kind of device, as JSON: only the model knows what it says.
_LEARNED = """CREATE TABLE learned (
  op TEXT NOT NULL, vendor TEXT NOT NULL, arch TEXT NOT NULL, units INTEGER NOT NULL, layer TEXT NOT NULL,
  version INTEGER NOT NULL, learned_at TEXT NOT NULL DEFAULT '', model TEXT NOT NULL,
  PRIMARY KEY (op, vendor, arch, units, layer)) WITHOUT ROWID"""
TABLES = {
    "problem": _PROBLEM,
    "config": _CONFIG,
    "environment": _ENVIRONMENT,
    "timing": _TIMING,
    "wanted": _WANTED,
}
ADDED = {
    "prediction": _PREDICTION,
    "learned": _LEARNED,
}  # since format 1000: older files, opened read-only, do not have them

# The decision rule, once. Among the usable timings of a problem in an environment, those within TIE_BAND of
# the best, or within two standard errors of it, are tied (1.4826 · MAD estimates sigma, and 4 · 1.4826² is
# 8.7924). Of the tied ones the static default wins, else the first name in text order.
# GROUP BY and subqueries, because window functions took 58 ms over 10 000 timings for what takes 7 here; a
# candidate that is alone skips them. SQLite takes the bare columns beside a lone min() from its row.
_USABLE = "status = 'ok' AND median_us > 0"
_GROUP = f"t.problem = b.problem AND t.environment = b.environment AND {_USABLE}"
_TIED = f"""coalesce(median_us <= b.best_us * {1 + TIE_BAND}
    OR (median_us - b.best_us) * (median_us - b.best_us)
    <= 8.7924 * (mad_us * mad_us / n + b.best_mad * b.best_mad / b.best_n), 0)"""


def winner_sql(where: str = "1", problem: str = "p.*") -> str:
    """SELECT of one row per problem and environment; `where` may test nothing but these two columns, and
    `problem` says what to select of the problem `p`."""
    return f"""
WITH best AS (
  SELECT problem, environment, min(median_us) AS best_us, mad_us AS best_mad, n AS best_n,
    config AS best_config, count(*) AS candidates,
    avg(CASE WHEN is_default THEN median_us END) AS default_us
  FROM timing WHERE {_USABLE} AND {where}
  GROUP BY problem, environment)
SELECT {problem}, w.environment, w.config, w.median_us, coalesce(w.mad_us, 0.0) AS mad_us, w.n, w.measured_at,
  b.candidates, b.default_us,
  CASE b.candidates WHEN 1 THEN 1 ELSE (
    SELECT count(*) FROM timing t WHERE {_GROUP} AND {_TIED}) END AS tied,
  CASE b.candidates WHEN 1 THEN NULL ELSE (
    SELECT min(median_us) FROM timing t WHERE {_GROUP} AND NOT {_TIED}) END AS runner_up_us
FROM best b
CROSS JOIN timing w ON w.problem = b.problem AND w.environment = b.environment
  AND w.config = CASE b.candidates WHEN 1 THEN b.best_config ELSE (
    SELECT config FROM timing t WHERE {_GROUP} AND {_TIED} ORDER BY is_default DESC, config LIMIT 1) END
CROSS JOIN problem p ON p.id = b.problem"""


# Both views are for people. The library has the rule in its own text and runs no SQL that came in a file.
VIEWS = {
    "winner": f"""CREATE VIEW winner AS SELECT
  op, arch, units, tokens, experts, topk, routing, dtype, dims, config, median_us, default_us,
  default_us / median_us - 1 AS margin, tied, candidates, runner_up_us, mad_us, n, environment, measured_at,
  vendor, source, policy, key FROM ({winner_sql()})""",
    "candidate": """CREATE VIEW candidate AS SELECT
  op, arch, units, tokens, experts, topk, routing, dtype, dims, config, status, median_us,
  median_us / (SELECT min(t.median_us) FROM timing t WHERE t.problem = timing.problem
    AND t.environment = timing.environment AND t.status = 'ok') AS times_best,
  is_default, mad_us, n, error, reason, environment, measured_at,
  vendor, source, policy, key FROM timing JOIN problem ON problem.id = timing.problem""",
}


def _steps() -> "Migrations":
    """Every change of the schema, in order. A shipped step is never edited: add one, and count FORMAT up."""
    # imported here, because it imports pandas and numpy where they exist: 70-170 ms
    from sqlite_utils import Migrations

    steps = Migrations("moecache")

    @steps()  # type: ignore[untyped-decorator]
    def m001_tables_and_views(db: Any) -> None:
        for statement in (*TABLES.values(), *VIEWS.values()):
            db.execute(statement)

    @steps()  # type: ignore[untyped-decorator]
    def m002_predictions(db: Any) -> None:
        db.execute(ADDED["prediction"])

    @steps()  # type: ignore[untyped-decorator]
    def m003_learned(db: Any) -> None:
        db.execute(ADDED["learned"])

    @steps()  # type: ignore[untyped-decorator]
    def m004_tie_band(db: Any) -> None:
        for name, statement in VIEWS.items():
            db.execute(f"DROP VIEW IF EXISTS {name}")
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
