"""Figures as HTML: pictures first, tables after. Every text of a file goes through `text`."""

from collections.abc import Sequence
from statistics import median

from moecache import __version__
from moecache.report.figures import Report
from moecache.report.pictures import counts, grid, multiples, ranked, text
from moecache.schemas.timing import Environment

HUES = ("#0969da", "#d9480f", "#2b8a3e", "#8250df", "#b08800", "#c2255c", "#0c8599", "#6e7781")
STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --paper: #ffffff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f0f6fc; --soft: #9198a1; --line: #3d444d; --paper: #0d1117 }
}
body { font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2em auto;
  max-width: 1100px; padding: 0 1em }
h1 { font-size: 22px } h2 { font-size: 17px; margin-top: 2em } h3 { font-size: 14px; margin: 1.6em 0 0 }
p, .note { color: var(--soft); margin: .2em 0 .6em } .note { font-size: 12px; overflow-wrap: anywhere }
.row { display: flex; flex-wrap: wrap; gap: 1em 2em } .wide { overflow-x: auto } figure { margin: 0 }
figcaption { font-weight: 600 } svg { max-width: none; display: block; overflow: visible }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); stroke: none !important } svg .name { font-weight: 600 }
.end { text-anchor: end } .mid { text-anchor: middle }
.level, .lead { stroke: var(--line) } .lead { stroke-dasharray: 2 3 } .limit { stroke: var(--soft); stroke-width: 1.5 }
rect, polygon { fill-opacity: .3 } polyline { fill: none !important; stroke-width: 2; stroke-linejoin: round }
.failed { fill: none; stroke: var(--line); stroke-dasharray: 4 3 }
table { border-collapse: collapse; font-size: 12px } th { text-align: left; color: var(--soft) }
td, th { padding: 2px 10px 2px 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
""" + "\n".join(f".c{k} {{ fill: {hue}; stroke: {hue} }}" for k, hue in enumerate(HUES))
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a reader's browser loads nothing, whatever stands here
TIE = "A tie is a winner that the measurement cannot tell from another; the static default is preferred then."
LIMIT = """The limit is the larger of two times: the bytes that must move (weights of active experts once, rows in
and out) at the device's bandwidth, and the FLOPs at its dense rate. How many experts are active follows from the
routing bucket: as balanced routing has them, or the fewest that an uneven bucket may have. Ops, devices and
dimensions without such a limit have no curve."""
Row = Sequence[object]


def html(report: Report) -> str:
    """The page."""
    title = f"moecache: {', '.join(report.files) or 'no cache file'}"
    parts = [
        '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en"><head><meta charset="utf-8"/>',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>',
        '<meta name="viewport" content="width=device-width"/>',
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{text(title)}</h1><p>{text(_summary(report))}</p>",
        *(_overview(report) + _layers(report) + _tables(report) if report.panels else []),
        f'<p class="note">Made by moecache {text(__version__)}.</p></body></html>\n',
    ]
    return "\n".join(parts)


def _summary(report: Report) -> str:
    if not report.panels:
        return "Nothing is stored, or nothing matches the filters."
    tried, gains, regrets = sum(n for _, n in report.statuses), report.shares("gain"), report.shares("regret")
    said = f"{len(report.cells)} problems in {len(report.panels)} layers, {tried} timings."
    if gains:
        said += f" Gain over the default: median {100 * median(gains):.1f} %, most {100 * max(gains):.1f} %."
    if regrets:
        said += f" Regret against the best: median {100 * median(regrets):.2f} %, most {100 * max(regrets):.2f} %."
    return said


def _overview(report: Report) -> list[str]:
    pictures = {
        "Problems by state": counts(report.states, "problems by state"),
        "Timings by status": counts(report.statuses, "timings by status"),
        "Gain over the default": ranked(report.shares("gain"), "gain over the default"),
        "Regret against the best timing": ranked(report.shares("regret"), "regret against the best timing"),
    }
    figures = [_figure(name, picture) for name, picture in pictures.items() if picture]
    return ['<div class="row">', *figures, "</div>", f'<p class="note">{TIE}</p>']


def _figure(name: str, picture: str) -> str:
    return f'<figure class="wide"><figcaption>{name}</figcaption>{picture}</figure>'


def _layers(report: Report) -> list[str]:
    colours = sorted({cell.variant for cell in report.cells})
    parts = ["<h2>Winners, tokens across and routing down</h2>"]
    parts.append('<p class="note">“=” marks a tie, a dashed square has no usable candidate.</p>')
    drawn = [(panel, multiples(panel)) for panel in report.panels]
    if any(curve for _, curve in drawn):
        parts.append(f'<p class="note">{LIMIT}</p>')
    for panel, curve in drawn:
        parts.append(f'<h3>{text(panel.op)}: {text(panel.about)}</h3><p class="note">{text(panel.origin)}</p>')
        parts.append(f'<div class="wide">{grid(panel, colours)}</div>')
        parts += [_figure("Multiples of the limit", curve)] if curve else []
    return parts


def _tables(report: Report) -> list[str]:
    failures = [(each.count, each.status, each.reason or "-", each.example) for each in report.failures]
    sources = [(s.count, s.environment.id, *dict(s.environment).values(), s.first, s.last) for s in report.sources]
    winners = [
        (c.tokens, _number(c.us), _number(c.gain, 100), _number(c.regret, 100), _number(c.over),
         panel.op, panel.about, c.routing, c.state, c.config or "-", c.id)
        for panel in report.panels for c in panel.cells
    ]  # fmt: skip
    figures = ("tokens", "µs", "gain %", "regret %", "× limit")
    return [
        *_table("Most frequent failures", ("count",), ("status", "reason", "for example"), failures),
        *_table("Environments", ("timings",), ("id", *Environment.model_fields, "first", "last"), sources),
        *_table("All winners", figures, ("op", "layer", "routing", "state", "winner", "id"), winners),
    ]


def _number(value: float | None, times: float = 1) -> str:
    return "-" if value is None else f"{times * value:.2f}"


def _table(title: str, numbers: Sequence[str], words: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Columns of numbers first; nothing for no rows."""

    def line(cells: Row, tag: str) -> str:
        kinds = [' class="n"'] * len(numbers) + [""] * len(words)
        filled = (f"<{tag}{kind}>{text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(filled)}</tr>"

    head = f'<h2>{title}</h2><div class="wide"><table><thead>{line((*numbers, *words), "th")}</thead><tbody>'
    return [head, *(line(row, "td") for row in rows), "</tbody></table></div>"] if rows else []
