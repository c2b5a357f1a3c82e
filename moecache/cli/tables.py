"""Winners and warm-ups as tables; what the doctor saw as names and values."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moecache.schemas.problem import Problem
from moecache.schemas.timing import Prediction, Winner
from moecache.schemas.warm import WarmRow
from moecache.text import UNITS, Facts, Row, changed, counted, dims, layer, micros, percent, table

if TYPE_CHECKING:
    from moecache.verify.doctor import Diagnosis

_OF_LAYER = ("op", "vendor", "arch", "units", "experts", "topk", "dtype")  # said once, above the rows
_FOR_PROGRAMS = ("source", "environment", "measured", "file")


def lines(rows: Sequence[tuple[Problem, Row]]) -> list[str]:
    """In a pipe one table with every column. On a terminal one for each layer, whose heading says what its rows share;
    the config stands last, so that it may be cut or wrapped."""
    if not sys.stdout.isatty():
        return table([{"id": p.id, **_fields(p), "dims": dims(p), **row} for p, row in rows])
    parts: dict[str, list[tuple[Problem, Row]]] = {}
    for problem, row in rows:
        parts.setdefault(layer(problem), []).append((problem, row))
    found = list[str]()
    for title, part in parts.items():
        shared = set.intersection(*(set(p.dims) for p, _ in part))
        common = [f"{name}={value}" for name, value in part[0][0].dims if (name, value) in shared]
        found += [", ".join([title, *common]), *table([_short(p, row, shared) for p, row in part]), ""]
    return found[:-1]


def _fields(problem: Problem) -> Row:
    return {name: str(getattr(problem, name)) or "-" for name in (*_OF_LAYER, "source", "tokens", "routing")}


def _short(problem: Problem, row: Row, shared: set[Any]) -> Row:
    left = dims(problem, shared)
    said = {"id": problem.id, "tokens": str(problem.tokens), "routing": problem.routing or "-"}
    said |= {"dims": left} if left != "-" else {}
    rest = {name: cell for name, cell in row.items() if name not in (*_FOR_PROGRAMS, "winner")}
    return said | rest | {"winner": row["winner"]}


def of_winner(winner: Winner, file: str) -> Row:
    """What `ls` says of a winner beside its problem."""
    return {
        "winner": winner.config.name,
        "µs": micros(winner.median_us),
        "MAD %": percent(winner.mad_us / winner.median_us),
        "default µs": micros(winner.default_us),
        "gain %": percent(winner.margin, "+"),
        "measured on": winner.environment.device_name.replace(" ", "_") or "-",
        "environment": winner.environment.id,
        "measured": winner.measured_at[:10] or "-",
        "file": file,
    }


def of_prediction(row: Prediction, file: str) -> Row:
    """What `ls` says of a prediction beside its problem."""
    device = row.device.replace(" ", "_")
    return {"winner": row.config.name, "predicted µs": micros(row.predicted_us), "rates of": device, "file": file}


def of_warm_row(row: WarmRow) -> Row:
    """What a problem is served with after a warm-up."""
    return {
        "winner": row.config.name,
        "µs": micros(row.us),
        "default µs": micros(row.default_us),
        "gain %": percent(row.margin, "+"),
        "tier": row.tier,
    }


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
        ("backends", [(each["name"], _devices(each["devices"]) or each["reason"]) for each in seen.backends]),
        (title, [(name, value or "-") for name, value in environment.items()]),
        ("ops", [(name, f"code {code}") for name, code in seen.ops.items()]),
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
    told = [f"{stats[name]} {name}" for name in ("winners", "timings", "predictions", "wanted")]
    where = [f"measured on {', '.join(stats['devices'])}"] if stats["devices"] else []
    return ", ".join([*told, f"{stats['bytes'] / 1024:.0f} KiB", *where])
