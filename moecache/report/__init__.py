"""Cache files as one HTML page: what wins for each layer, over tokens and routing; failures; environments."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from statistics import fmean

import jinja2
from markupsafe import Markup, escape

from moecache.report.limit import is_close, limit_us
from moecache.schemas.errors import printable
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Prediction, Timing, Winner
from moecache.text import counted, dims, layer, percent
from moecache.version import __version__

REASONS = 20  # kinds of failures to list
HIGHEST = 1e12  # what is shown is smaller, and a time in µs larger than its inverse: a file may hold infinities
UNFOLDED = 12  # layers, if there are no more
COLOURS = 8  # classes c0 … c7 of the page
VARIED = {"moe_sort": ("block_m",)}  # dims that follow from the tokens, so that no layer of its own has them
LONGEST = 300  # characters of a text


@dataclass(frozen=True)
class Cell:
    """One problem in one place. `us` is None where no candidate was usable; shares are 0.1 for 10 %."""

    problem: Problem
    config: str
    state: str  # measured, tie, predicted, or why its candidates failed
    us: float | None = None
    gain: float | None = None  # over the static default
    over: float | None = None  # multiples of the limit
    default: bool = False  # the static default won

    @property
    def variant(self) -> str:
        return self.config.partition("(")[0]

    @property
    def told(self) -> str:
        """The gain as it stands in a square."""
        shown = "default" if self.default else f"{percent(self.gain, '+')} %" if self.gain is not None else ""
        return f"{shown} =".strip() if self.state == "tie" else shown

    @property
    def tip(self) -> str:
        """What a square says when it is pointed at."""
        over = "" if self.over is None else f"{self.over:.3g} × the limit"
        return "; ".join(filter(None, (self.config, self.state, over, dims(self.problem), self.problem.id)))


@dataclass(frozen=True)
class Panel:
    """The problems of one layer in one place, which differ in tokens and routing alone."""

    title: str
    origin: str
    cells: list[Cell]

    @property
    def tokens(self) -> list[int]:
        return sorted({cell.problem.tokens for cell in self.cells})

    @property
    def routings(self) -> list[str]:
        return sorted({cell.problem.routing for cell in self.cells})

    def at(self, tokens: int, routing: str) -> list[Cell]:
        """The problems of one square."""
        return [c for c in self.cells if (c.problem.tokens, c.problem.routing) == (tokens, routing)]


def page(
    files: Sequence[str],
    timings: Sequence[tuple[Timing, str]],
    winners: Sequence[tuple[Winner, str]],
    predictions: Sequence[tuple[Prediction, str]] = (),
    wanted: int = 0,
    here: Environment | None = None,
) -> str:
    """A whole page that needs nothing else, no script either; well-formed as XML too.

    Args:
        files: names of the cache files that were read, one without rows included.
        timings: all of them, each with the name of its file.
        winners: what wins among them, each with the name of its file.
        predictions: what nobody measured, each with the name of its file.
        wanted: how many problems were met and not measured.
        here: the environment of this machine, to say how much was measured elsewhere; None says nothing of it.
    """
    found = panels(timings, winners, predictions)
    cells = [cell for panel in found for cell in panel.cells]
    variants = sorted({cell.variant for cell in cells})
    bad = Counter((row.status, row.reason) for row, _ in timings if row.status != "ok").most_common(REASONS)
    sources = Counter(row.environment for row, _ in timings)
    asked = {(row.problem.key, row.environment, file) for row, file in timings}
    return (
        _templates()
        .get_template("page.html")
        .render(
            name=", ".join(PurePath(file).name for file in files) or "no cache file",
            files=files,
            version=__version__,
            panels=found,
            unfolded=UNFOLDED,
            summary=_summary(cells, len(timings), wanted),
            away=sum(environment != here for _, environment, _ in asked) if here else 0,
            colours={name: f"c{k % COLOURS}" for k, name in enumerate(variants)},
            failures=[(count, status, reason or "-") for (status, reason), count in bad],
            fields=list(Environment.model_fields),
            sources=[(count, *dict(environment).values()) for environment, count in sources.items()],
        )
    )


def panels(
    timings: Sequence[tuple[Timing, str]],
    winners: Sequence[tuple[Winner, str]],
    predictions: Sequence[tuple[Prediction, str]] = (),
) -> list[Panel]:
    """In the order of their first rows, predicted ones last; a problem with failures alone has its place too. A
    prediction of what its file has measured is left out."""
    won = {(each.problem.key, each.environment, file): each for each, file in winners}
    placed: dict[tuple[Problem, str], dict[str, Cell]] = {}
    for row, file in timings:
        winner = won.get((row.problem.key, row.environment, file))
        where = _layer(row.problem), f"environment {row.environment.id}, {file}"
        if winner is None or winner.config == row.config:
            placed.setdefault(where, {})[row.problem.key] = _cell(row, winner)
    measured = {(row.problem.key, file) for row, file in timings}
    for guess, file in predictions:
        if (guess.problem.key, file) not in measured:
            where = _layer(guess.problem), f"predicted for {guess.device}, {file}"
            over = _over(guess.problem, guess.predicted_us, guess.device)
            cell = Cell(guess.problem, guess.config.name, "predicted", _finite(guess.predicted_us), over=over)
            placed.setdefault(where, {})[guess.problem.key] = cell
    return [Panel(_title(asked), origin, [*cells.values()]) for (asked, origin), cells in placed.items()]


def _layer(problem: Problem) -> Problem:
    told = tuple(pair for pair in problem.dims if pair[0] not in VARIED.get(problem.op, ()))
    return problem.model_copy(update={"tokens": 0, "routing": "", "dims": told})


def _title(problem: Problem) -> str:
    told = [layer(problem), *(f"{name} {value}" for name, value in problem.dims)]
    return ", ".join(told + ([f"code {problem.source}"] if problem.source else []))


def _cell(row: Timing, winner: Winner | None) -> Cell:
    if winner is None:
        return Cell(row.problem, "", row.status)
    over, gain = _over(row.problem, winner.median_us, row.environment.device_name), _finite(winner.margin, low=None)
    state = "tie" if winner.tied > 1 else "measured"
    return Cell(row.problem, row.config.name, state, _finite(winner.median_us), gain, over, row.is_default)


def _over(problem: Problem, us: float, device: str) -> float | None:
    """Multiples of the limit."""
    limit = limit_us(problem, device)
    return _finite(us / limit) if limit and _finite(us) else None


def _finite(value: float | None, low: float | None = 1 / HIGHEST) -> float | None:
    """None for what cannot be shown."""
    return value if value is not None and abs(value) < HIGHEST and (low is None or value > low) else None


def _summary(cells: Sequence[Cell], timings: int, wanted: int) -> list[str]:
    """The page in a few lines."""
    gains = [math.log1p(cell.gain) for cell in cells if cell.gain is not None and cell.gain > -1]
    timed = [cell for cell in cells if cell.state != "predicted"]
    close = [math.log(cell.over) for cell in timed if cell.over and is_close(cell.problem)]
    guessed = len(cells) - len(timed)
    told = [f"{counted(len(timed), 'problem')} measured, by {counted(timings, 'timing')}"]
    if gains:
        mean, most = percent(math.expm1(fmean(gains)), "+"), percent(math.expm1(max(gains)), "+")
        told.append(f"{mean} % over the static default, geometric mean; most {most} %")
    if close:
        what = f"geometric mean of {counted(len(close), 'problem')} with most experts active (a0)"
        told.append(f"{math.exp(fmean(close)):.2f} × the limit, {what}")
    told += [f"{counted(guessed, 'problem')} only predicted: nobody has measured them"] if guessed else []
    return told + ([f"{counted(wanted, 'problem')} met, not measured yet"] if wanted else [])


@cache
def _templates() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["duration"] = duration
    return made


def text(value: object) -> Markup:
    """Of a stranger's file, safe between tags and in quotes, cut to LONGEST characters; markup as it is."""
    if isinstance(value, Markup):
        return value
    shown = printable(value)
    return escape(shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…")


def duration(us: float) -> str:
    """Three digits or more, in a unit that is read at a glance."""
    unit, size = ("µs", 1.0) if us < 999.5 else ("ms", 1e3) if us < 999.5e3 else ("s", 1e6)
    return f"{us / size:.{2 if us / size < 9.995 else 1 if us / size < 99.95 else 0}f} {unit}"
