"""What the schema of a cache file may hold: plain tables and indices, and our views. All else would run SQL of its
writer: triggers, generated columns, checks, collations, expressions as defaults, virtual tables."""

import re
from collections.abc import Iterable

from moecache.store.migrations import VIEWS

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


def strange(entries: Iterable[tuple[object, object]]) -> str:
    """The name of the first (name, sql) of `sqlite_schema` that no moecache makes; '' when there is none.

    By the text alone, as a file may lie about an entry's type. A later moecache adds columns and tables of this form.
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
