"""How problems, timings and explanations read: names and values, tables, aligned lines."""

import re
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from moecache.kernels.code import present
from moecache.schemas.config import Config
from moecache.schemas.errors import printable
from moecache.schemas.frozen import Value, Vendor
from moecache.schemas.problem import Problem
from moecache.schemas.timing import FROM, Environment, Timing
from moecache.schemas.warm import OPS

UNITS: dict[Vendor, str] = {"nvidia": "SMs", "amd": "CUs", "cpu": "cores"}
GAP = 2  # blanks between columns
NARROWEST = 26  # a column that may wrap is not squeezed below this


Facts = Sequence[tuple[str, str]]  # names and values


@dataclass(frozen=True)
class Column:
    """One column. On a narrow terminal the one with the highest `drop` goes first, 0 always stays; one with the highest
    `shorten` loses what stands in brackets instead. A column that may wrap is not squeezed below `least`."""

    title: str
    right: bool = False
    wrap: bool = False
    drop: int = 0
    shorten: int = 0
    least: int = NARROWEST


@dataclass(frozen=True)
class Table:
    """Rows of printable text; `strong` are the numbers of the rows to stress on a terminal."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", [list(map(printable, row)) for row in self.rows])

    def width(self, at: int) -> int:
        """Characters that column `at` takes."""
        return max([len(self.columns[at].title), *(len(row[at]) for row in self.rows)])

    def least(self) -> int:
        """Characters that all columns take at least."""
        narrow = [min(self.width(at), c.least) if c.wrap else self.width(at) for at, c in enumerate(self.columns)]
        return sum(narrow) + GAP * (len(narrow) - 1)

    def only(self, columns: Sequence[int]) -> "Table":
        """Those columns of it."""
        rows = [[row[at] for at in columns] for row in self.rows]
        return Table([self.columns[at] for at in columns], rows, self.strong)


Section = tuple[str, Table]  # with its heading, which may be empty
Chosen = Collection[tuple[Config, Environment, str]]  # the string is the file


def counted(number: int, what: str) -> str:
    """`no files`, `1 file`, `2 files`."""
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def changed(count: int) -> str:
    """What to do about timings that answer nothing any more."""
    return f"{counted(count, 'timing')} ran code that has changed since: `moecache warm CONFIG` measures anew"


def wanted(ops: Mapping[str, int]) -> list[str]:
    """How what calls have met without a measured choice gets one, by op."""
    built_in = sum(count for op, count in ops.items() if op in OPS)
    told = [f"{built_in} built in: `moecache warm --wanted` measures them"] if built_in else []
    return told + [
        f"{count} of {op}: its program measures them when it calls it in mode tune, outside a graph's capture"
        for op, count in ops.items()
        if op not in OPS
    ]


def micros(us: float | None) -> str:
    """A time in µs, `-` for none."""
    return "-" if us is None else f"{us:.2f}"


def percent(share: float | None, sign: str = "") -> str:
    """A share in per cent, `-` for none."""
    return "-" if share is None else f"{100 * share:{sign}.1f}"


def units(problem: Problem) -> str:
    """`132 SMs`, `1 core`."""
    return counted(problem.units, UNITS[problem.vendor].removesuffix("s"))


def device(problem: Problem) -> str:
    """The device of a problem, in words."""
    return f"{problem.vendor} {problem.arch}, {units(problem)}"


def layer(problem: Problem) -> str:
    """What a heading says of problems that differ in tokens, routing and dims."""
    shape = [counted(problem.experts, "expert"), f"top-{problem.topk}", problem.dtype]
    return f"{problem.op} on {device(problem)}: {', '.join(filter(None, shape))}"


def dims(problem: Problem, but: Collection[tuple[str, Value]] = ()) -> str:
    """The dimensions that only the op knows, without those of `but`."""
    return ",".join(f"{name}={value}" for name, value in problem.dims if (name, value) not in but) or "-"


# --- as lines ---


def facts(found: Facts, indent: int = 0, width: int = sys.maxsize) -> list[str]:
    """Names and values in two columns; what is wider than `width` wraps within its own."""
    names = max((len(name) for name, _ in found), default=0) + GAP
    room, lines = width - indent - names, []
    for name, value in ((printable(name), printable(value)) for name, value in found):
        fitted = value if len(value) <= room else wrapping(value)
        first, *rest = textwrap.wrap(fitted, max(room, NARROWEST), break_on_hyphens=False) or [""]
        lines += [f"{name:{names}}{first}".rstrip(), *(" " * names + line for line in rest)]
    return [" " * indent + line for line in lines]


def sections(found: Sequence[Section]) -> list[str]:
    """Tables under their headings, whole, with a blank line between them."""
    parts = [[*([printable(heading)] if heading else []), *plain(table)] for heading, table in found]
    return [line for number, part in enumerate(parts) for line in (["", *part] if number else part)]


def plain(table: Table) -> list[str]:
    """Aligned lines, however wide, header first."""
    widths = [table.width(at) for at in range(len(table.columns))]
    lines = [[column.title for column in table.columns], *table.rows]
    return [
        (" " * GAP)
        .join(
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(line, widths, table.columns, strict=True)
        )
        .rstrip()
        for line in lines
    ]


def fitting(table: Table, width: int) -> Table:
    """What is shown of it in `width` characters; it may take more where no column may go."""
    while table.columns and table.least() > width:
        ranks = [max(column.drop, column.shorten) for column in table.columns]
        at = ranks.index(max(ranks))
        if not ranks[at]:
            break
        gone = table.columns[at].drop >= table.columns[at].shorten
        table = table.only([k for k in range(len(ranks)) if k != at]) if gone else _shortened(table, at)
    return table


def _shortened(table: Table, at: int) -> Table:
    columns = [replace(column, shorten=0) if k == at else column for k, column in enumerate(table.columns)]
    rows = [[re.sub(r"\(.+", "(…)", cell) if k == at else cell for k, cell in enumerate(row)] for row in table.rows]
    return Table(columns, rows, table.strong)


def wrapping(cell: str) -> str:
    """A long config wraps where one of its parameters ends."""
    return re.sub(r",(?=\S)", ", ", cell)


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
        table = _candidates(rows, [role if ran_today(row) and (row.config, *place) in chosen else "" for row in rows])
        sections += _split(_origin(*place), table) if fitted else [(_origin(*place), table)]
    return sections


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
    if environment.flags.startswith(FROM):
        table = environment.flags.removeprefix(FROM)
        return f"named for {name} by tables of {table}, environment {environment.id}, in {file}"
    return f"timed on {name} ({versions or 'versions unknown'}), environment {environment.id}, in {file}"


def _candidates(rows: Sequence[Timing], roles: Sequence[str]) -> Table:
    best = min((row.median_us for row in rows if row.median_us is not None), default=None)
    cells = [_cells(row, role, best) for row, role in zip(rows, roles, strict=True)]
    return Table(_CANDIDATES, cells, frozenset(at for at, role in enumerate(roles) if role))


def ran_today(row: Timing) -> bool:
    """Whether it ran the code of today."""
    return row.code in present(row.problem.op, row.problem.source)


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
        row.status if ran_today(row) else "other code",
        row.reason or "-",
    ]
