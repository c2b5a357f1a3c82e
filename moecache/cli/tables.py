"""Winners, warm-ups and candidates as tables."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from moecache.cli.show import Column, Table
from moecache.schemas.config import Config
from moecache.schemas.prediction import Prediction
from moecache.schemas.problem import Problem, Vendor
from moecache.schemas.timing import Environment, Tier, Timing, Winner

if TYPE_CHECKING:
    from moecache.dispatch.explain import Explanation
    from moecache.schemas.warm import WarmRow

UNITS: dict[Vendor, str] = {"nvidia": "SMs", "amd": "CUs", "cpu": "cores"}
Row = dict[str, str]  # column title -> cell
Section = tuple[str, Table]  # with its heading
Chosen = Collection[tuple[Config, Environment, str]]  # the string is the file

_PROBLEMS = (
    Column("id"),
    Column("op"),
    Column("vendor"),
    Column("arch"),
    Column("units", right=True),
    Column("experts", right=True),
    Column("topk", right=True),
    Column("dtype"),
    Column("source", drop=7),
    Column("tokens", right=True),
    Column("routing"),
    Column("dims", drop=3),
    Column("winner", wrap=True),
    Column("µs", right=True),
    Column("predicted µs", right=True),
    Column("MAD %", right=True, drop=5),
    Column("default µs", right=True, drop=4),
    Column("gain %", right=True),
    Column("tier", drop=2),
    Column("rates of", drop=2),
    Column("environment", drop=6),
    Column("measured", drop=8),
    Column("file", drop=1),
)
_HEADING = ("op", "vendor", "arch", "units", "experts", "topk", "dtype")  # said once, above the rows
_IF_THEY_DIFFER = ("source", "environment", "file")


def micros(us: float | None) -> str:
    """A time in µs, `-` for none."""
    return "-" if us is None else f"{us:.2f}"


def percent(share: float | None, sign: str = "") -> str:
    """A share in per cent, `-` for none."""
    return "-" if share is None else f"{100 * share:{sign}.1f}"


def device(problem: Problem) -> str:
    """The device of a problem, in words."""
    return f"{problem.vendor} {problem.arch}, {problem.units} {UNITS[problem.vendor]}"


def layer(problem: Problem) -> str:
    """What a heading says of problems that differ in tokens, routing and dims."""
    shape = [f"{problem.experts} experts", f"top-{problem.topk}", problem.dtype]
    return f"{problem.op} on {device(problem)}: {', '.join(filter(None, shape))}"


def dims(problem: Problem) -> str:
    """The dimensions that only the op knows."""
    return ",".join(f"{name}={value}" for name, value in problem.dims) or "-"


def winners(
    found: Sequence[tuple[Winner, str, Tier | None]], predicted: Sequence[tuple[Prediction, str]], fitted: bool
) -> list[Section]:
    """Winners with their files and, if known, tiers; then predictions with their files.

    Fitted to a terminal there is a table for each layer, without columns that tell nothing apart; else one.
    """
    rows = [(winner.problem, _winner_row(winner, file, tier)) for winner, file, tier in found]
    rows += [(row.problem, _prediction_row(row, file)) for row, file in predicted]
    return _sections(rows, fitted, _PROBLEMS)


def warmed(rows: Sequence["WarmRow"], fitted: bool) -> list[Section]:
    """What each problem is served with after a warm-up. Times and tier stay, however narrow it gets."""
    drops = {"id": 2, "dims": 1}
    columns = [replace(column, drop=drops.get(column.title, 0)) for column in _PROBLEMS]
    return _sections([(row.problem, _warm_row(row)) for row in rows], fitted, columns)


def _sections(rows: Sequence[tuple[Problem, Row]], fitted: bool, columns: Sequence[Column]) -> list[Section]:
    if not rows:
        return []
    columns = [column for column in columns if any(column.title in row for _, row in rows)]
    if not fitted:
        return [("", _table([row for _, row in rows], columns))]
    parts = [(title, [row for _, row in part]) for title, part in groupby(rows, lambda pair: layer(pair[0]))]
    same = {name for name in _IF_THEY_DIFFER if all(len({row.get(name) for row in part}) < 2 for _, part in parts)}
    columns = [column for column in columns if column.title not in {*_HEADING, *same}]
    return [(title, _table(part, columns)) for title, part in parts]


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


# --- the candidates of one problem ---

_CANDIDATES = (
    Column("config", wrap=True),
    Column("role"),
    Column("µs", right=True),
    Column("slower %", right=True),
    Column("MAD %", right=True, drop=3),
    Column("n", right=True, drop=4),
    Column("error", right=True, drop=5),
    Column("status"),
    Column("reason", wrap=True),
)


def timings(found: Sequence[tuple[Timing, str]], chosen: Chosen, role: str, fitted: bool) -> list[Section]:
    """All candidates of one problem with their files, for each environment and file. `role` says what the chosen are.

    Fitted to a terminal, what failed stands in a table of its own, where its reason has room.
    """
    parts: dict[tuple[Environment, str], list[Timing]] = {}
    for timing, file in found:
        parts.setdefault((timing.environment, file), []).append(timing)
    sections = []
    for place, rows in parts.items():
        table = _candidates(rows, [role if (row.config, *place) in chosen else "" for row in rows])
        sections += _split(_origin(*place), table) if fitted else [(_origin(*place), table)]
    return sections


def answered(found: "Explanation", fitted: bool) -> list[Section]:
    """The timings behind an explanation."""
    config = found.choice.config if found.choice is not None else None
    chosen = {(row.config, row.environment, file) for row, file in found.timings if row.config == config}
    return timings(found.timings, chosen, "answer", fitted)


def _split(heading: str, table: Table) -> list[Section]:
    names = [column.title for column in table.columns]
    status = names.index("status")
    good = [row for row in table.rows if row[status] == "ok"]
    bad = [row for row in table.rows if row[status] != "ok"]
    usable = Table(table.columns[:status], [row[:status] for row in good], table.strong)
    failed = [names.index(name) for name in ("config", "status", "reason")]
    unusable = Table([table.columns[at] for at in failed], [[row[at] for at in failed] for row in bad])
    if not good:
        return [(f"unusable: {heading}", unusable)]
    return [(heading, usable), *([("unusable there", unusable)] if bad else [])]


def _origin(environment: Environment, file: str) -> str:
    fields = environment.model_dump(exclude={"device_name"}).items()
    versions = ", ".join(f"{name} {value}" for name, value in fields if value)
    name = environment.device_name or "an unnamed device"
    return f"timed on {name} ({versions or 'versions unknown'}), environment {environment.id}, in {file}"


def _candidates(rows: Sequence[Timing], roles: Sequence[str]) -> Table:
    best = min((row.median_us for row in rows if row.median_us is not None), default=None)
    cells = [_cells(row, role, best) for row, role in zip(rows, roles, strict=True)]
    return Table(_CANDIDATES, cells, frozenset(at for at, role in enumerate(roles) if role))


def _cells(row: Timing, role: str, best: float | None) -> list[str]:
    us, mad = row.median_us, row.mad_us
    return [
        row.config.name,
        ",".join(filter(None, (role, "default" if row.is_default else ""))) or "-",
        micros(us),
        percent(us / best - 1 if us and best else None),
        percent(mad / us if us and mad is not None else None),
        str(row.n),
        "-" if row.error is None else f"{row.error:.2g}",
        row.status,
        row.reason or "-",
    ]
