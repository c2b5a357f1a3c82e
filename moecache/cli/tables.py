"""Winners and warm-ups as tables."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moecache.schemas.prediction import Prediction
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Tier, Winner
from moecache.text import Column, Section, Table, dims, layer, micros, percent

if TYPE_CHECKING:
    from moecache.schemas.warm import WarmRow

Row = dict[str, str]  # column title -> cell

# What tells problems apart, and what wins, stay; before the times of others go the parameters of the winner.
_PROBLEMS = (
    Column("id"),
    Column("op"),
    Column("vendor"),
    Column("arch"),
    Column("units", right=True),
    Column("experts", right=True),
    Column("topk", right=True),
    Column("dtype"),
    Column("source", drop=8),
    Column("tokens", right=True),
    Column("routing"),
    Column("dims", wrap=True, least=20),
    Column("winner", wrap=True, shorten=5),
    Column("µs", right=True),
    Column("predicted µs", right=True),
    Column("MAD %", right=True, drop=6),
    Column("default µs", right=True, drop=4),
    Column("gain %", right=True, drop=1),
    Column("tier", drop=3),
    Column("rates of", drop=3),
    Column("measured on", drop=3),
    Column("environment", drop=7),
    Column("measured", drop=9),
    Column("file", drop=2),
)
_HEADING = ("op", "vendor", "arch", "units", "experts", "topk", "dtype")  # said once, above the rows
_IF_THEY_DIFFER = ("source", "environment", "file")


def winners(
    found: Sequence[tuple[Winner, str, Tier | None]], predicted: Sequence[tuple[Prediction, str]], fitted: bool
) -> list[Section]:
    """Winners with their files and, if known, tiers; then predictions with their files.

    Fitted to a terminal there is a table for each layer, without columns that tell nothing apart; else one.
    """
    rows = [(winner.problem, _winner_row(winner, file, tier)) for winner, file, tier in found]
    rows += [(row.problem, _prediction_row(row, file)) for row, file in predicted]
    return sections(rows, fitted, _PROBLEMS)


def warmed(rows: Sequence["WarmRow"], fitted: bool) -> list[Section]:
    """What each problem is served with after a warm-up. Times and tier stay, however narrow it gets."""
    columns = [replace(column, drop=2 if column.title == "id" else 0) for column in _PROBLEMS]
    return sections([(row.problem, _warm_row(row)) for row in rows], fitted, columns)


def sections(rows: Sequence[tuple[Problem, Row]], fitted: bool, columns: Sequence[Column]) -> list[Section]:
    """A table for each layer, whose heading says all that its rows share; in a pipe one with every column.

    `columns` may have any of the titles that rows have; an `id`, `tokens`, `routing` and `dims` each row has.
    """
    if not rows:
        return []
    columns = [column for column in columns if any(column.title in row for _, row in rows)]
    if not fitted:
        return [("", _table([row for _, row in rows], columns))]
    parts: dict[str, list[tuple[Problem, Row]]] = {}
    for problem, row in rows:
        parts.setdefault(layer(problem), []).append((problem, row))
    columns = [column for column in columns if column.title not in {*_HEADING, *_same(list(parts.values()))}]
    return [_part(title, part, columns) for title, part in parts.items()]


def _same(parts: Sequence[Sequence[tuple[Problem, Row]]]) -> set[str]:
    """Columns that tell no row of any part from another."""
    return {name for name in _IF_THEY_DIFFER if all(len({row.get(name) for _, row in part}) < 2 for part in parts)}


def _part(title: str, rows: Sequence[tuple[Problem, Row]], columns: Sequence[Column]) -> Section:
    """One layer: dims that all its problems share stand in the heading, the others in their rows."""
    shared = set.intersection(*(set(problem.dims) for problem, _ in rows))
    own = [row | {"dims": dims(problem, shared)} for problem, row in rows]
    if all(row["dims"] == "-" for row in own):
        columns = [column for column in columns if column.title != "dims"]
    common = [f"{name}={value}" for name, value in rows[0][0].dims if (name, value) in shared]
    products = {row.get("measured on", "") for _, row in rows}
    if len(products) == 1:
        columns = [column for column in columns if column.title != "measured on"]
        common += [f"measured on {name.replace('_', ' ')}" for name in products if name]
    return ", ".join([title, *common]), _table(own, columns)


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    return Table(columns, [[row.get(column.title, "-") for column in columns] for row in rows])


def _problem_row(problem: Problem) -> Row:
    fields = {name: str(getattr(problem, name)) or "-" for name in (*_HEADING, "source", "tokens", "routing")}
    return {"id": problem.id, **fields, "dims": dims(problem)}


def _winner_row(winner: Winner, file: str, tier: Tier | None) -> Row:
    return {
        **_problem_row(winner.problem),
        "winner": winner.config.name,
        "µs": micros(winner.median_us),
        "MAD %": percent(winner.mad_us / winner.median_us),
        "default µs": micros(winner.default_us),
        "gain %": percent(winner.margin, "+"),
        **({"tier": tier} if tier else {}),
        "measured on": winner.environment.device_name.replace(" ", "_") or "-",
        "environment": winner.environment.id,
        "measured": winner.measured_at[:10] or "-",
        "file": file,
    }


def _prediction_row(row: Prediction, file: str) -> Row:
    return {
        **_problem_row(row.problem),
        "winner": row.config.name,
        "predicted µs": micros(row.predicted_us),
        "tier": "predicted",
        "rates of": row.device.replace(" ", "_"),
        "file": file,
    }


def _warm_row(row: "WarmRow") -> Row:
    return {
        **_problem_row(row.problem),
        "winner": row.config.name,
        "µs": micros(row.us),
        "default µs": micros(row.default_us),
        "gain %": percent(row.margin, "+"),
        "tier": row.tier,
    }
