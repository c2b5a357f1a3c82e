"""What a page says, as plain figures: rows of a cache file grouped into panels, counts and environments."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moecache.report.limit import limit_us
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing, Winner

REASONS = 20  # kinds of failures to list
HIGHEST = 1e12  # what is drawn is smaller, and a time in µs larger than its inverse
Asked = tuple[str, str, str]  # key, environment id, file


@dataclass(frozen=True)
class Cell:
    """One problem in one environment. `us` is None where no candidate was usable; shares are 0.1 for 10 %."""

    id: str
    tokens: int
    routing: str
    variant: str
    config: str
    us: float | None
    gain: float | None  # over the static default
    regret: float | None  # against the best timing
    over: float | None  # multiples of the limit
    state: str


@dataclass(frozen=True)
class Panel:
    """The problems of one layer in one environment and file, which differ in tokens and routing alone."""

    op: str
    about: str
    origin: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Failure:
    """How often a reason was given for a status, and one config that it was given for."""

    status: str
    reason: str
    count: int
    example: str


@dataclass(frozen=True)
class Source:
    """An environment, its number of timings, and the first and last date of them."""

    environment: Environment
    count: int
    first: str
    last: str


@dataclass(frozen=True)
class Report:
    """Everything that a page shows."""

    files: tuple[str, ...]
    panels: tuple[Panel, ...]
    states: tuple[tuple[str, int], ...]
    statuses: tuple[tuple[str, int], ...]
    failures: tuple[Failure, ...]
    sources: tuple[Source, ...]

    @property
    def cells(self) -> list[Cell]:
        return [cell for panel in self.panels for cell in panel.cells]

    def shares(self, name: Literal["gain", "regret"]) -> list[float]:
        """Those of all problems that have one."""
        return [share for cell in self.cells if (share := getattr(cell, name)) is not None]


def figures(
    files: Sequence[str], timings: Sequence[tuple[Timing, str]], winners: Sequence[tuple[Winner, str]]
) -> Report:
    """Panels in the order of their first timings; a problem with failures alone has its place in them too."""
    tried: dict[Asked, list[Timing]] = {}
    for timing, file in timings:
        tried.setdefault((timing.problem.key, timing.environment.id, file), []).append(timing)
    won = {(each.problem.key, each.environment.id, file): each for each, file in winners}
    panels = _panels(tried, won)
    states = Counter(cell.state for panel in panels for cell in panel.cells)
    rows = [timing for timing, _ in timings]
    counted = tuple((name, states[name]) for name in ("measured", "tie", "failures"))
    statuses = tuple(Counter(row.status for row in rows).most_common())
    return Report(tuple(files), panels, counted, statuses, _failures(rows), _sources(rows))


def _panels(tried: Mapping[Asked, Sequence[Timing]], won: Mapping[Asked, Winner]) -> tuple[Panel, ...]:
    found: dict[tuple[Problem, str, str], list[Cell]] = {}
    for asked, rows in tried.items():
        layer = rows[0].problem.model_copy(update={"tokens": 0, "routing": ""})
        found.setdefault((layer, asked[1], asked[2]), []).append(_cell(rows, won.get(asked)))
    return tuple(
        Panel(layer.op, _about(layer), _origin(layer, environment, file), tuple(cells))
        for (layer, environment, file), cells in found.items()
    )


def _cell(rows: Sequence[Timing], winner: Winner | None) -> Cell:
    problem = rows[0].problem
    if winner is None:
        failed = Counter(row.status for row in rows).most_common(1)[0][0]
        return Cell(problem.id, problem.tokens, problem.routing, failed, "", None, None, None, None, "failures")
    us = winner.median_us if 1 / HIGHEST < winner.median_us < HIGHEST else None
    usable = [row.median_us for row in rows if row.status == "ok" and row.median_us is not None]
    least, limit = min(usable, default=None), limit_us(problem, winner.environment.device_name)
    state = "tie" if winner.tied > 1 else "measured"
    return Cell(
        problem.id, problem.tokens, problem.routing, winner.config.variant, winner.config.name, us,
        gain=finite(winner.margin), regret=finite(us / least - 1) if us and least else None,
        over=finite(us / limit) if us and limit else None, state=state,
    )  # fmt: skip


def finite(value: float | None) -> float | None:
    """None for what cannot be drawn: a file may hold infinities."""
    return value if value is not None and abs(value) < HIGHEST else None


def _about(layer: Problem) -> str:
    dims = ", ".join(f"{name}={value}" for name, value in layer.dims)
    shape = f"{layer.experts} experts, top-{layer.topk}"
    return ", ".join(filter(None, (layer.arch, f"{layer.units} units", shape, layer.dtype, dims)))


def _origin(layer: Problem, environment: str, file: str) -> str:
    return f"kernels {layer.source or '?'}, policy {layer.policy}, environment {environment}, {file}"


def _failures(rows: Sequence[Timing]) -> tuple[Failure, ...]:
    bad = [row for row in rows if row.status != "ok"]
    examples = {(row.status, row.reason): row.config.name for row in bad}
    counts = Counter((row.status, row.reason) for row in bad).most_common(REASONS)
    return tuple(Failure(*kind, count, examples[kind]) for kind, count in counts)


def _sources(rows: Sequence[Timing]) -> tuple[Source, ...]:
    dates: dict[Environment, list[str]] = {}
    for row in rows:
        dates.setdefault(row.environment, []).append(row.measured_at[:10])
    found = ((environment, each, sorted(filter(None, each))) for environment, each in dates.items())
    return tuple(Source(e, len(every), *((days[0], days[-1]) if days else ("", ""))) for e, every, days in found)
