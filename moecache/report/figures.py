"""What a page says, as plain figures: rows of a cache file grouped into panels, counts and environments."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moecache.report.limit import is_close, limit_us
from moecache.report.names import layers, product, shape, title
from moecache.schemas.prediction import Prediction
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing, Winner

REASONS = 20  # kinds of failures to list
HIGHEST = 1e12  # what is drawn is smaller, and a time in µs larger than its inverse
VARIED = {"moe_sort": ("block_m",)}  # dims that follow from the tokens, so that no layer of its own has them
STATES = ("measured", "tie", "failures", "predicted", "wanted")
Asked = tuple[str, str, str]  # key, environment id, file
Place = tuple[Environment | None, str, str]  # where it was measured, or the device of a prediction; file
Share = Literal["gain", "regret", "over", "close"]


@dataclass(frozen=True)
class Cell:
    """One problem in one place. `us` is None where no candidate was usable; shares are 0.1 for 10 %."""

    problem: Problem
    variant: str
    config: str
    state: str
    us: float | None = None
    gain: float | None = None  # over the static default
    regret: float | None = None  # against the best timing
    over: float | None = None  # multiples of the limit
    close: float | None = None  # the same where the limit is close to what the call needs
    noise: float | None = None  # median absolute deviation of the winner's time
    default: bool = False  # the static default won

    @property
    def tokens(self) -> int:
        return self.problem.tokens

    @property
    def routing(self) -> str:
        return self.problem.routing


@dataclass(frozen=True)
class Panel:
    """The problems of one layer in one place, which differ in tokens and routing alone."""

    op: str
    title: str
    about: str
    origin: str
    device: str  # that it was predicted for; '' where it was measured
    cells: tuple[Cell, ...]
    environment: Environment | None = None  # where it was measured
    layers: int = 0  # that the model has of it; 0 where the model is not known

    @property
    def predicted(self) -> bool:
        return bool(self.device)

    def shares(self, name: Share) -> list[float]:
        """Those of its problems that have one."""
        return [share for cell in self.cells if (share := getattr(cell, name)) is not None]


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

    @property
    def measured(self) -> int:
        """How many problems somebody has measured."""
        return sum(len(panel.cells) for panel in self.panels if not panel.predicted)

    @property
    def wanted(self) -> int:
        """How many problems were met and not measured."""
        return dict(self.states).get("wanted", 0)

    def shares(self, name: Share) -> list[float]:
        """Those of all measured problems that have one."""
        return [share for panel in self.panels if not panel.predicted for share in panel.shares(name)]


def figures(
    files: Sequence[str],
    timings: Sequence[tuple[Timing, str]],
    winners: Sequence[tuple[Winner, str]],
    predictions: Sequence[tuple[Prediction, str]] = (),
    wanted: int = 0,
) -> Report:
    """Panels in the order of their first rows, predicted ones last; a problem with failures alone has its place too.

    A prediction of what its file has measured is left out.
    """
    tried: dict[Asked, list[Timing]] = {}
    for timing, file in timings:
        tried.setdefault((timing.problem.key, timing.environment.id, file), []).append(timing)
    won = {(each.problem.key, each.environment.id, file): each for each, file in winners}
    placed: list[tuple[Place, Cell]] = [
        ((rows[0].environment, "", key[2]), _cell(rows, won.get(key))) for key, rows in tried.items()
    ]
    measured = {(key, file) for key, _, file in tried}
    guessed = [(row, file) for row, file in predictions if (row.problem.key, file) not in measured]
    placed += [((None, row.device, file), _guess(row)) for row, file in guessed]
    panels, rows = _panels(placed), [timing for timing, _ in timings]
    states = Counter(cell.state for panel in panels for cell in panel.cells) + Counter(wanted=wanted)
    counted = tuple((name, states[name]) for name in STATES if states[name])
    statuses = tuple(Counter(row.status for row in rows).most_common())
    return Report(tuple(files), panels, counted, statuses, _failures(rows), _sources(rows))


def _panels(placed: Iterable[tuple[Place, Cell]]) -> tuple[Panel, ...]:
    found: dict[tuple[Problem, Place], list[Cell]] = {}
    for place, cell in placed:
        found.setdefault((_layer(cell.problem), place), []).append(cell)
    parts = [(place, part) for (_, place), cells in found.items() for part in _apart(cells)]
    panels = [_panel(place, cells) for place, cells in parts]
    titles = Counter((panel.title, panel.predicted) for panel in panels)
    telling = [_telling(place, cells[0].problem) for place, cells in parts]
    apart = list[Panel]()
    for panel, own in zip(panels, telling, strict=True):
        more = _differing(own, panel, panels, telling) if titles[panel.title, panel.predicted] > 1 else ""
        apart.append(replace(panel, title=f"{panel.title}, {more}".rstrip(", ")))
    return tuple(apart)


def _layer(problem: Problem) -> Problem:
    dims = tuple(pair for pair in problem.dims if pair[0] not in VARIED.get(problem.op, ()))
    return problem.model_copy(update={"tokens": 0, "routing": "", "dims": dims})


def _apart(cells: Sequence[Cell]) -> list[Sequence[Cell]]:
    """The cells as they are, or by their dims, if two would stand in one square."""
    if len({(cell.tokens, cell.routing) for cell in cells}) == len(cells):
        return [cells]
    parts: dict[object, list[Cell]] = {}
    for cell in cells:
        parts.setdefault(cell.problem.dims, []).append(cell)
    return list(parts.values())


def _panel(place: Place, cells: Sequence[Cell]) -> Panel:
    problem, (environment, device, file) = cells[0].problem, place
    one = len({cell.problem.dims for cell in cells}) == 1
    where = f"environment {environment.id}" if environment else f"predicted for {device}"
    origin = f"{_version(problem)}, {where}, {file}"
    layer = problem if one else _layer(problem)
    drawn = origin, device, tuple(cells), environment
    return Panel(problem.op, title(layer), shape(layer), *drawn, layers(layer))


def _version(problem: Problem) -> str:
    """Of the user's code where it has one, and of the measuring."""
    return f"code {problem.source}, policy {problem.policy}" if problem.source else f"policy {problem.policy}"


def _telling(place: Place, problem: Problem) -> tuple[str, ...]:
    """What may tell two panels of one title apart."""
    environment, device, file = place
    dims = ", ".join(f"{name} {value}" for name, value in problem.dims)
    kernels = _version(problem)
    where = tuple(f"{name.removesuffix('_name')} {value}" for name, value in environment or ())
    where = where or ("",) * (len(Environment.model_fields) - 1) + (product(device),)
    return dims, problem.arch, f"{problem.units} units", *where, kernels, file


def _differing(own: Sequence[str], panel: Panel, panels: Sequence[Panel], telling: Sequence[Sequence[str]]) -> str:
    alike = (panel.title, panel.predicted)
    same = [each for other, each in zip(panels, telling, strict=True) if (other.title, other.predicted) == alike]
    return ", ".join(value for k, value in enumerate(own) if value and len({each[k] for each in same}) > 1)


def _guess(row: Prediction) -> Cell:
    limit = limit_us(row.problem, row.device)
    us = row.predicted_us if 1 / HIGHEST < row.predicted_us < HIGHEST else None
    over = finite(us / limit) if us and limit else None
    return Cell(
        row.problem,
        row.config.variant,
        row.config.name,
        "predicted",
        us,
        over=over,
        close=over if is_close(row.problem) else None,
    )


def _cell(rows: Sequence[Timing], winner: Winner | None) -> Cell:
    problem = rows[0].problem
    if winner is None:
        failed = Counter(row.status for row in rows).most_common(1)[0][0]
        return Cell(problem, failed, "", "failures")
    us = winner.median_us if 1 / HIGHEST < winner.median_us < HIGHEST else None
    usable = [row.median_us for row in rows if row.status == "ok" and row.median_us is not None]
    least, limit = min(usable, default=None), limit_us(problem, winner.environment.device_name)
    over = finite(us / limit) if us and limit else None
    return Cell(
        problem,
        winner.config.variant,
        winner.config.name,
        "tie" if winner.tied > 1 else "measured",
        us,
        gain=finite(winner.margin),
        regret=finite(us / least - 1) if us and least else None,
        over=over,
        close=over if is_close(problem) else None,
        noise=finite(winner.mad_us / us) if us else None,
        default=any(row.is_default and row.config == winner.config for row in rows),
    )


def finite(value: float | None) -> float | None:
    """None for what cannot be drawn: a file may hold infinities."""
    return value if value is not None and abs(value) < HIGHEST else None


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
