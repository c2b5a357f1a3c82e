"""Figures as HTML: pictures first, tables folded in below. Every text of a file goes through `text`."""

from collections.abc import Sequence
from pathlib import PurePath

from moecache import __version__
from moecache.report import opening, risks
from moecache.report.drawing import digits, duration, short, text
from moecache.report.figures import Cell, Panel, Report
from moecache.report.grid import columns, grid, multiples
from moecache.report.opening import Colours
from moecache.report.style import POLICY, STYLE
from moecache.schemas.timing import Environment
from moecache.text import counted

OPEN = 12  # layers are unfolded if there are no more
READING = """A square has the winner's variant, its time, and how much faster it is than the static default, or that it
is the default; “=” marks a tie: the measurement cannot tell the winner from another, and then the default is preferred.
Pointing at a square or a dot shows the whole config. A dashed square has no usable candidate, or is only predicted.
Routing: a0 means that more than two thirds of the experts that could be active are, each further level halves that
share; e says the same of how many are effective, which is fewer the more uneven their load."""
LIMIT = """The limit is the larger of two times: the bytes that must move (weights of active experts once, rows in
and out) at the device's bandwidth, and the FLOPs at its dense rate. How many experts are active is estimated from the
routing bucket: as balanced routing has them, or the fewest that an uneven bucket may have. So a call with fewer may
come out below 1×, and one in a1 or a2 may need several times as much: those do not count in the figures above, and
stand at the top with an arrow if they are far off. Ops, devices and dimensions without such a limit have no curve. Dots
have the winner's colour; a line is the lighter the more uneven the routing, and dashed where experts are idle."""
Row = Sequence[object]


def html(report: Report, here: Environment | None = None) -> str:
    """The page."""
    named = ", ".join(PurePath(file).name for file in report.files) or "no cache file"
    parts = [
        '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en"><head><meta charset="utf-8"/>',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>',
        '<meta name="viewport" content="width=device-width"/>',
        f"<title>moecache: {text(named)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{text(named)}</h1>{opening.origin(report)}",
        *(_filled(report, here) if report.panels else _nothing(report)),
        *_tables(report),
        f'<p class="note">Made by moecache {text(__version__)} from {text(", ".join(report.files) or "no file")}.</p>',
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _filled(report: Report, here: Environment | None) -> list[str]:
    colours = {op: sorted(_variants(report, op)) for op in dict.fromkeys(panel.op for panel in report.panels)}
    front = opening.tiles(report) + opening.pictures(report, colours) + risks.section(report, here)
    return front + _layers(report, colours)


def _variants(report: Report, op: str) -> set[str]:
    return {cell.variant for panel in report.panels if panel.op == op for cell in panel.cells if cell.us is not None}


def _nothing(report: Report) -> list[str]:
    wanted = dict(report.states).get("wanted", 0)
    met = (
        f" Calls have met {wanted} problems that are not measured yet; <code>moecache warm --wanted</code> does it."
        if wanted
        else ""
    )
    more = "<code>moecache warm config.json</code> measures a model, <code>moecache ls</code> lists what is there."
    return [f"<p>Nothing is stored, or nothing matches the filters.{met}</p><p>{more}</p>"]


def _layers(report: Report, colours: Colours) -> list[str]:
    parts = ["<h2>Layer by layer</h2>", f'<p class="note">{READING}</p>']
    if any(panel.shares("over") for panel in report.panels):
        parts.append(f'<p class="note">{LIMIT}</p>')
    few = len(report.panels) <= OPEN
    return parts + [_layer(k, panel, colours[panel.op], few) for k, panel in enumerate(report.panels)]


def _layer(number: int, panel: Panel, colours: Sequence[str], unfolded: bool) -> str:
    title = text(panel.title) + (", predicted" if panel.predicted else "")
    unfolding = ' open="open"' if unfolded else ""
    head = f'<details class="layer"{unfolding}><summary><h3 id="l{number}">{title}</h3></summary>'
    curve = multiples(panel, colours)
    said = "Predicted time over the limit" if panel.predicted else "Time over the limit"
    body = [
        f'<p class="note">{text(panel.about)}</p>{_whole(panel)}<div class="wide">{grid(panel, colours)}',
        f"<p><b>{said}, by tokens and routing</b></p>{curve}" if curve else "",
        "</div>",
        _folded(panel),
    ]
    return "\n".join([head, *body, "</details>"])


def _whole(panel: Panel) -> str:
    """The time of all layers of the model, in one pass, by tokens: as evenly routed as there are timings of."""
    if not panel.layers:
        return ""
    least = {tokens: min(c.routing for c in panel.cells if c.tokens == tokens) for tokens in columns(panel)}
    times = [
        (c.tokens, c.us) for c in sorted(panel.cells, key=lambda c: c.tokens) if c.us and least[c.tokens] == c.routing
    ]
    told = ", ".join(f"{duration(us * panel.layers)} at {short(tokens)}" for tokens, us in times)
    alone = "the model’s" if panel.op == "fused_moe" else f"{text(panel.op)} in the model’s"
    return f"<p>A pass through {alone} {panel.layers} MoE layers, by tokens: {told}.</p>" if told else ""


def _folded(panel: Panel) -> str:
    figures = ("tokens", "µs", "gain %", "regret %", "× limit", "MAD %", "µs a model")
    varied = len({cell.problem.dims for cell in panel.cells}) > 1
    words = ("routing", "state", *(("dims",) if varied else ()), "id", "config")
    rows = [_line(cell, varied, panel.layers) for cell in panel.cells]
    named = f"{counted(len(panel.cells), 'problem')} as a table"
    head = f'<details><summary>{named}</summary><p class="note">{text(panel.origin)}</p>'
    return "\n".join([head, *_table(figures, words, rows), "</details>"])


def _line(cell: Cell, varied: bool, layers: int) -> Row:
    dims = (" ".join(f"{name}={value}" for name, value in cell.problem.dims),) if varied else ()
    limit = "-" if cell.over is None else digits(cell.over)
    shares = (_per_cent(cell.gain), _per_cent(cell.regret), limit, _per_cent(cell.noise))
    us, whole = (
        "-" if cell.us is None else digits(cell.us, 4),
        digits(cell.us * layers, 4) if cell.us and layers else "-",
    )
    return (
        cell.tokens, us, *shares, whole, cell.routing, cell.state, *dims, cell.problem.id, cell.config or "-"
    )  # fmt: skip


def _per_cent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _tables(report: Report) -> list[str]:
    failures = [(each.count, each.status, each.example, each.reason or "-") for each in report.failures]
    sources = [(s.count, s.environment.id, *dict(s.environment).values(), s.first, s.last) for s in report.sources]
    fields = ("id", *(name.replace("_", " ") for name in Environment.model_fields), "first", "last")
    return [
        *_titled("Most frequent failures", _table(("count",), ("status", "for example", "reason"), failures)),
        *_titled("Environments", _table(("timings",), fields, sources)),
    ]


def _titled(title: str, table: Sequence[str]) -> list[str]:
    return [f"<h2>{title}</h2>", *table] if table else []


def _table(numbers: Sequence[str], words: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Columns of numbers first, the longest text last; nothing for no rows."""

    def line(cells: Row, tag: str) -> str:
        kinds = [' class="n"'] * len(numbers) + [""] * (len(words) - 1) + [' class="long"']
        filled = (f"<{tag}{kind}>{text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(filled)}</tr>"

    head = f'<div class="wide"><table><thead>{line((*numbers, *words), "th")}</thead><tbody>'
    return [head, *(line(row, "td") for row in rows), "</tbody></table></div>"] if rows else []
