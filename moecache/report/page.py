"""Figures as HTML, by the templates beside this file: pictures first, tables folded in below.

What a template prints goes through `text`, so that what a file says is text and nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from statistics import fmean

import jinja2
from markupsafe import Markup

from moecache.report import drawing, overview, risks
from moecache.report.drawing import digits, duration, faster, short
from moecache.report.figures import Cell, Panel, Report
from moecache.report.layer import columns, grid, multiples
from moecache.schemas.timing import Environment
from moecache.text import counted
from moecache.version import __version__

UNFOLDED = 12  # layers, if there are no more
NUMBERS = ["tokens", "µs", "gain %", "regret %", "× limit", "MAD %", "µs a model"]
Row = Sequence[object]


@dataclass(frozen=True)
class Layer:
    """A panel with all that its section shows; `passes` are the times of all layers of the model, by tokens."""

    panel: Panel
    passes: str
    grid: Markup
    curve: Markup
    words: list[str]
    rows: list[Row]
    numbers = NUMBERS


@cache
def _templates() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=drawing.text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"text": drawing.text, "digits": digits, "faster": faster, "times": drawing.times, "mean": fmean}
    made.filters |= {"counted": counted, "mean_ratio": _mean_ratio, "mean_gain": _mean_gain}
    return made


def html(report: Report, here: Environment | None = None) -> str:
    """The page."""
    colours = {op: sorted(_variants(report, op)) for op in dict.fromkeys(panel.op for panel in report.panels)}
    return (
        _templates()
        .get_template("page.html")
        .render(
            report=report,
            version=__version__,
            origin=_origin(report),
            unfolded=UNFOLDED,
            listed=risks.LISTED,
            name=", ".join(PurePath(file).name for file in report.files) or "no cache file",
            winners=overview.winners(report, colours),
            distances=overview.distances(report),
            unsure=risks.elsewhere(report.panels, here),
            risks=risks.risks(report),
            layers=[_layer(panel, colours[panel.op]) for panel in report.panels],
            failures=[(each.count, each.status, each.example, each.reason or "-") for each in report.failures],
            fields=["id", *(name.replace("_", " ") for name in Environment.model_fields), "first", "last"],
            sources=[
                (s.count, s.environment.id, *dict(s.environment).values(), s.first, s.last) for s in report.sources
            ],
        )
    )


def _variants(report: Report, op: str) -> set[str]:
    return {cell.variant for panel in report.panels if panel.op == op for cell in panel.cells if cell.us is not None}


def _origin(report: Report) -> str:
    """Where the timings come from, in a line."""
    said = [f"Timings of {len(report.sources)} environments, listed at the end"] if len(report.sources) > 1 else []
    if len(report.sources) == 1:
        source, where = report.sources[0], report.sources[0].environment
        versions = {"driver": where.driver, "torch": where.torch, "Triton": where.triton}
        days = " to ".join(dict.fromkeys(filter(None, (source.first, source.last))))
        said += [where.device_name or "unknown device", *(f"{name} {each}" for name, each in versions.items() if each)]
        said += [f"measured {days}"] if days else []
    devices = dict.fromkeys(panel.device for panel in report.panels if panel.predicted)
    return " · ".join([*said, *([f"predicted for {', '.join(devices)}"] if devices else [])])


def _layer(panel: Panel, colours: Sequence[str]) -> Layer:
    varied = len({cell.problem.dims for cell in panel.cells}) > 1
    words = ["routing", "state", *(["dims"] if varied else []), "id", "config"]
    rows = [_line(cell, varied, panel.layers) for cell in panel.cells]
    return Layer(panel, _passes(panel), grid(panel, colours), multiples(panel, colours), words, rows)


def _passes(panel: Panel) -> str:
    """As evenly routed as there are timings of; '' where the model is not known."""
    least = {tokens: min(c.routing for c in panel.cells if c.tokens == tokens) for tokens in columns(panel)}
    times = [
        (c.tokens, c.us) for c in sorted(panel.cells, key=lambda c: c.tokens) if c.us and least[c.tokens] == c.routing
    ]
    return ", ".join(f"{duration(us * panel.layers)} at {short(tokens)}" for tokens, us in times if panel.layers)


def _line(cell: Cell, varied: bool, layers: int) -> Row:
    dims = (" ".join(f"{name}={value}" for name, value in cell.problem.dims),) if varied else ()
    limit = "-" if cell.over is None else digits(cell.over)
    shares = (_per_cent(cell.gain), _per_cent(cell.regret), limit, _per_cent(cell.noise))
    us, whole = (digits(each, 4) if each else "-" for each in (cell.us, (cell.us or 0) * layers))
    return cell.tokens, us, *shares, whole, cell.routing, cell.state, *dims, cell.problem.id, cell.config or "-"


def _per_cent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _mean_ratio(values: Sequence[float]) -> float:
    """The geometric mean of what is above nothing."""
    return math.exp(fmean([math.log(value) for value in values if value > 0] or [0.0]))


def _mean_gain(gains: Sequence[float]) -> float:
    return _mean_ratio([1 + gain for gain in gains]) - 1
