"""Winners and warm-ups as tables; problems, figures and findings as names and values."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moecache.schemas.prediction import Prediction
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Tier, Winner
from moecache.schemas.warm import WarmRow
from moecache.text import (
    UNITS,
    Column,
    Facts,
    Section,
    Table,
    changed,
    counted,
    device,
    dims,
    layer,
    micros,
    percent,
    wanted,
)

if TYPE_CHECKING:
    from moecache.verify.doctor import Diagnosis

Row = dict[str, str]  # column title -> cell

# What tells problems apart, and what wins, stay; before the times of others go the parameters of the winner.
COLUMNS = (
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
    Column("stored µs", right=True, drop=1),
    Column("µs now", right=True),
    Column("now/stored", right=True),
    Column("runner-up µs", right=True, drop=3),
    Column("predicted µs", right=True),
    Column("MAD %", right=True, drop=6),
    Column("default µs", right=True, drop=4),
    Column("gain %", right=True, drop=1),
    Column("state"),
    Column("loss %", right=True),
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
    return sections(rows, fitted)


def warmed(rows: Sequence[WarmRow], fitted: bool) -> list[Section]:
    """What each problem is served with after a warm-up. Times and tier stay, however narrow it gets."""
    columns = [replace(column, drop=2 if column.title == "id" else 0) for column in COLUMNS]
    return sections([(row.problem, _warm_row(row)) for row in rows], fitted, columns)


def sections(rows: Sequence[tuple[Problem, Row]], fitted: bool, columns: Sequence[Column] = COLUMNS) -> list[Section]:
    """A table for each layer, whose heading says all that its rows share; in a pipe one with every column.

    Of the columns those are shown that a row has; an `id`, `tokens`, `routing` and `dims` each row has.
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


def problem_row(problem: Problem) -> Row:
    fields = {name: str(getattr(problem, name)) or "-" for name in (*_HEADING, "source", "tokens", "routing")}
    return {"id": problem.id, **fields, "dims": dims(problem)}


def _winner_row(winner: Winner, file: str, tier: Tier | None) -> Row:
    return {
        **problem_row(winner.problem),
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
        **problem_row(row.problem),
        "winner": row.config.name,
        "predicted µs": micros(row.predicted_us),
        "tier": "predicted",
        "rates of": row.device.replace(" ", "_"),
        "file": file,
    }


def _warm_row(row: WarmRow) -> Row:
    return {
        **problem_row(row.problem),
        "winner": row.config.name,
        "µs": micros(row.us),
        "default µs": micros(row.default_us),
        "gain %": percent(row.margin, "+"),
        "tier": row.tier,
    }


# --- names and values ---


def of_problem(problem: Problem) -> list[tuple[str, str]]:
    """A problem, field by field."""
    return [
        ("problem", problem.id),
        ("op", problem.op),
        ("device", device(problem)),
        ("layer", f"{counted(problem.experts, 'expert')}, top-{problem.topk}"),
        ("dtype", problem.dtype or "-"),
        ("tokens", f"up to {problem.tokens}"),
        ("routing", problem.routing or "-"),
        ("dims", dims(problem)),
        ("source", problem.source or "-"),
        ("key", problem.key),
    ]


def of_predictions(rows: Sequence[tuple[Prediction, str]]) -> list[tuple[str, str]]:
    """Stored predictions of one problem, with their files."""
    found = []
    for row, file in rows:
        how = f"{row.predicted_us:.2f} µs by {row.model or '?'} with the rates of {row.device}"
        found.append(("predicted", f"{row.config.name}: {how}, in {file}"))
    return found


def of_stats(figures: Mapping[str, Any]) -> Facts:
    """What a file holds."""
    f = figures
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(f["status"].items()))
    return [
        ("file", f["path"]),
        ("size", f"{f['bytes'] / 1024:.0f} KiB, format {f['format']}, journal {f['journal']}"),
        ("problems", str(f["problems"])),
        ("winners", f"{f['winners']} in {counted(f['environments'], 'environment')}"),
        ("timings", f"{f['timings']} ({statuses or 'none'}) of {counted(f['configs'], 'config')}"),
        *([("", changed(f["other_code"]))] if f["other_code"] else []),
        ("predictions", str(f["predictions"])),
        ("wanted", str(f["wanted"])),
        *(("", told) for told in wanted(f["wanted_ops"])),
        ("ops", ", ".join(f["ops"]) or "-"),
        ("archs", ", ".join(f["archs"]) or "-"),
        ("measured", f"{f['oldest']} to {f['newest']}" if f["newest"] else "-"),
        ("measured on", ", ".join(f["devices"]) or "-"),
    ]


def scope(figures: Mapping[str, Any]) -> str:
    """What a file is about, in a few words."""
    held = counted(figures["winners"], "winner")
    held += f" and {counted(figures['predictions'], 'prediction')}" if figures["predictions"] else ""
    held += f" of {', '.join(figures['ops'])} on {', '.join(figures['archs'])}" if figures["ops"] else ""
    return held + (f" ({changed(figures['other_code'])})" if figures["other_code"] else "")


def of_diagnosis(seen: "Diagnosis") -> list[tuple[str, Facts]]:
    """What the doctor saw, under headings."""
    environment = dict(seen.environment)
    title = f"environment {environment.pop('id', '')}".strip()
    return [
        ("versions", [(name, version or "not installed") for name, version in seen.versions.items()]),
        (
            "backends",
            [(each["name"], _devices(each["devices"]) or each["reason"]) for each in seen.backends],
        ),
        (title, [(name, value or "-") for name, value in environment.items()]),
        ("ops", [(name, f"source {source}") for name, source in seen.ops.items()]),
        ("settings", [(each["name"], f"{each['value']} ({each['from']})") for each in seen.settings]),
        ("cache files", [(each["role"], f"{each['path']}: {_file(each)}") for each in seen.files]),
        ("findings", [(str(at), text) for at, text in enumerate(seen.findings, 1)] or [("none", "")]),
        *([("next", [(str(at), text) for at, text in enumerate(seen.next, 1)])] if seen.next else []),
    ]


def _devices(devices: Sequence[Mapping[str, Any]]) -> str:
    names = [f"{each['name']} ({each['arch']}, {each['units']} {UNITS[each['vendor']]})" for each in devices]
    counted = {name: names.count(name) for name in names}
    return "; ".join(f"{count} x {name}" if count > 1 else name for name, count in counted.items())


def _file(seen: Mapping[str, Any]) -> str:
    stats = seen["stats"]
    if stats is None:
        return "not there yet" if seen["state"] == "absent" else str(seen["state"])
    size = f"{stats['bytes'] / 1024:.0f} KiB"
    told = [f"{stats[name]} {name}" for name in ("winners", "timings", "wanted")]
    told += [f"{stats['predictions']} predictions"] if stats["predictions"] else []
    where = [f"measured on {', '.join(stats['devices'])}"] if stats["devices"] else []
    return ", ".join([*told, size, *where])
