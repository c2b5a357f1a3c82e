"""How problems, timings and explanations read: names and values, and aligned tables."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from moecache.kernels.code import present
from moecache.schemas.config import Config
from moecache.schemas.errors import printable
from moecache.schemas.frozen import Value, Vendor
from moecache.schemas.problem import Problem
from moecache.schemas.timing import FROM, Environment, Timing
from moecache.schemas.warm import OPS

UNITS: dict[Vendor, str] = {"nvidia": "SMs", "amd": "CUs", "cpu": "cores"}
NUMBER = re.compile(r"[+-]?[\d.]*|inf")

Facts = Sequence[tuple[str, str]]  # names and values
Row = Mapping[str, str]  # column title -> cell


def counted(number: int, what: str) -> str:
    """`no files`, `1 file`, `2 files`."""
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def changed(count: int) -> str:
    """What to do about timings that answer nothing any more."""
    return f"{counted(count, 'timing')} ran code that has changed since: `moecache warm CONFIG` measures anew"


def wanted(ops: Mapping[str, int]) -> list[str]:
    """How what calls have met without a measured choice gets one, by op."""
    how = dict.fromkeys(OPS, "built-in ops: `moecache warm --wanted` measures")
    told = Counter[str]()
    for op, count in ops.items():
        told[how.get(op, f"{op}: its program measures in mode tune, outside a graph's capture")] += count
    return [f"{counted(count, 'wanted problem')} of {what}" for what, count in told.items()]


def micros(us: float | None) -> str:
    """A time in µs, `-` for none."""
    return "-" if us is None else f"{us:.2f}"


def percent(share: float | None, sign: str = "") -> str:
    """A share in per cent, `-` for none."""
    return "-" if share is None else f"{100 * share:{sign}.1f}"


def layer(problem: Problem) -> str:
    """What problems have in common that differ in tokens, routing and dims."""
    shape = [counted(problem.experts, "expert"), f"top-{problem.topk}", problem.dtype]
    units = counted(problem.units, UNITS[problem.vendor].removesuffix("s"))
    device = f"{problem.vendor} {problem.arch}, {units}"
    return f"{problem.op} on {device}: {', '.join(filter(None, shape))}"


def dims(problem: Problem, but: Collection[tuple[str, Value]] = ()) -> str:
    """The dimensions that only the op knows, without those of `but`."""
    return ",".join(f"{name}={value}" for name, value in problem.dims if (name, value) not in but) or "-"


def facts(found: Facts, indent: int = 0) -> list[str]:
    """Names and values in two columns."""
    width = max((len(name) for name, _ in found), default=0) + 2
    return [" " * indent + f"{printable(name):{width}}{printable(value)}".rstrip() for name, value in found]


def table(rows: Sequence[Row]) -> list[str]:
    """Aligned lines, the titles first; numbers to the right. A cell holds no blanks but in the last column."""
    titles = list(dict.fromkeys(title for row in rows for title in row))
    lines = [titles, *([printable(row.get(title, "-")) for title in titles] for row in rows)]
    columns = []
    for cells in zip(*lines, strict=True):
        width, right = max(map(len, cells)), all(NUMBER.fullmatch(cell) or cell == "-" for cell in cells[1:])
        columns.append([cell.rjust(width) if right else cell.ljust(width) for cell in cells])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def timings(found: Sequence[tuple[Timing, str]], chosen: Config | None) -> list[str]:
    """All candidates of one problem with their files, a table for each environment and file; which is `chosen`."""
    parts: dict[str, list[Timing]] = {}
    for timing, file in found:
        parts.setdefault(_origin(timing.environment, file), []).append(timing)
    lines = list[str]()
    for origin, rows in parts.items():
        best = min((row.median_us for row in rows if row.median_us is not None), default=None)
        lines += ["", printable(origin), *table([_cells(row, row.config == chosen, best) for row in rows])]
    return lines


def _origin(environment: Environment, file: str) -> str:
    fields = environment.model_dump(exclude={"device_name"}).items()
    versions = ", ".join(f"{name} {value}" for name, value in fields if value)
    name = environment.device_name or "an unnamed device"
    if environment.flags.startswith(FROM):
        table = environment.flags.removeprefix(FROM)
        return f"named for {name} by tables of {table}, environment {environment.id}, in {file}"
    return f"timed on {name} ({versions or 'versions unknown'}), environment {environment.id}, in {file}"


def ran_today(row: Timing) -> bool:
    """Whether it ran the code of today."""
    return row.code in present(row.problem.op, row.problem.source)


def _cells(row: Timing, chosen: bool, best: float | None) -> Row:
    us, mad, today = row.median_us, row.mad_us, ran_today(row)
    roles = ["answer"] * (chosen and today) + ["default"] * row.is_default
    return {
        "config": row.config.name,
        "role": ",".join(roles) or "-",
        "µs": micros(us),
        "slower %": percent(us / best - 1 if us and best else None),
        "MAD %": percent(mad / us if us and mad is not None else None),
        "n": str(row.n),
        "error": "-" if row.error is None else f"{row.error:.2g}",
        "status": row.status if today else "other code",
        "reason": row.reason or "-",
    }
