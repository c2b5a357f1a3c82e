"""The pictures of all layers at once: which variants win at which token counts, every problem on one scale."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from markupsafe import Markup

from moecache.report.drawing import colour, element, faster, label, line, short, svg, text, times
from moecache.report.figures import Cell, Panel, Report, Share

WIDE, LEFT, RIGHT = 350, 42, 56  # of a picture, and beside its plot
HIGH, BAR = 130, 19  # of columns; of the row with a count
ROW, DOT = 34, 2.6  # of a layer among the strips
RATIOS = (0.25, 0.5, 1, 1.1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 1024, 4096, 1 << 20, 1 << 40)
LISTED = 40  # layers of a picture
SAID = {"measured": "measured, one is best", "tie": "measured, a tie", "failures": "nothing usable"}
SAID |= {"predicted": "predicted only", "wanted": "met, not measured yet"}
Strip = tuple[str, str, Sequence[float]]  # title, address of the layer, values
Picture = tuple[str, str, Markup]  # title, what it shows, the picture


def winners(report: Report, colours: Mapping[str, Sequence[str]]) -> list[Picture]:
    """Who wins, of each op with its variants in `colours`, and how much of what the files hold is an answer."""
    drawn: list[Picture] = []
    for op, variants in colours.items():
        cells = [cell for panel in report.panels if panel.op == op for cell in panel.cells]
        drawn.append((f"What wins: {op}", "share of problems", columns(cells, variants)))
    states = [(SAID[name], count) for name, count in report.states]
    elsewhere = "in another environment, measured means unverified" if report.sources else ""
    drawn.append(("Problems by tier", elsewhere, counts(states, "problems by tier")))
    if set(dict(report.statuses)) - {"ok"}:
        drawn.append(("Timings by status", "", counts(report.statuses, "timings by status")))
    return _shown(drawn)


def distances(report: Report) -> list[Picture]:
    """How far from the limit, how much before the default, and what choosing cost, layer by layer."""
    placed = [(f"l{k}", panel) for k, panel in enumerate(report.panels)]
    measured = [(to, panel) for to, panel in placed if not panel.predicted]
    gains = [(name, to, [1 + gain for gain in row]) for name, to, row in _rows(measured, "gain")]
    over, gained = "most experts active; bar: geometric mean", "its time ÷ the winner’s; bar and figure: geometric mean"
    lost = "time lost to the best one; bar and figure: mean"
    drawn = [
        ("Time over the limit", over, ratios(_rows(measured, "close"), "time over the limit", times)),
        ("Gain over the default", gained, ratios(gains, "gain", lambda ratio: faster(ratio - 1))),
        ("Regret of the choices", lost, percents(_rows(measured, "regret"), "regret")),
    ]
    for op in dict.fromkeys(panel.op for panel in report.panels if panel.predicted):
        rows = _rows([(to, panel) for to, panel in placed if panel.predicted and panel.op == op], "close")
        drawn.append((f"Predicted: {op}", f"÷ limit; {over}", ratios(rows, "time over the limit", times)))
    return _shown(drawn)


def _shown(drawn: Sequence[Picture]) -> list[Picture]:
    return [picture for picture in drawn if picture[2]]


def _rows(panels: Sequence[tuple[str, Panel]], name: Share) -> list[Strip]:
    """As many as are still read; the layers themselves are all there below."""
    found: list[Strip] = [(panel.title, to, shares) for to, panel in panels if (shares := panel.shares(name))]
    return found[:LISTED]


def columns(cells: Sequence[Cell], colours: Sequence[str]) -> Markup:
    """The share of problems that each variant wins, a column for each number of tokens, with a legend."""
    usable = [cell for cell in cells if cell.us is not None]
    tokens = sorted({cell.tokens for cell in usable})
    if not tokens:
        return Markup()
    each, parts = (WIDE - LEFT - 10) / len(tokens), list[Markup]()
    for share in (0, 50, 100):
        y = 8 + HIGH * (1 - share / 100)
        parts += [line(LEFT, y, WIDE - 10, y, "level"), label(LEFT - 5, y + 4, f"{share} %", "end small")]
    for k, at in enumerate(tokens):
        won = Counter(cell.variant for cell in usable if cell.tokens == at)
        parts += _column(LEFT + each * k, each, won, colours, f"{at} tokens")
        if k % math.ceil(24 / each) == 0:
            parts.append(label(LEFT + each * (k + 0.5), HIGH + 22, short(at), "mid small"))
    parts.append(label(LEFT + (WIDE - LEFT) / 2, HIGH + 36, "tokens", "mid soft"))
    legend, height = _legend(list(dict.fromkeys(colours)), HIGH + 46)
    return svg(WIDE, height, "share of problems that each variant wins, against tokens", parts + legend)


def _column(x: float, width: float, won: Counter[str], colours: Sequence[str], said: str) -> list[Markup]:
    y, parts = 8.0 + HIGH, []
    for name in sorted(won, key=colours.index):
        high = HIGH * won[name] / won.total()
        y -= high
        tip = element("title", f"{said}: {name} wins {won[name]} of {won.total()}")
        kind, size = f"{colour(name, colours)} part", {"width": max(1.0, width - 2), "height": high}
        parts.append(element("rect", tip, kind=kind, x=x + 1, y=y, **size))
    return parts


def _legend(names: Sequence[str], top: float) -> tuple[list[Markup], float]:
    x, y, parts = float(LEFT), top, []
    for name in names:
        long = 24 + 6.6 * min(24, len(name))
        x, y = (float(LEFT), y + 18) if x + long > WIDE and x > LEFT else (x, y)
        parts.append(element("rect", kind=colour(name, names), x=x, y=y, width=11, height=11, rx=2))
        parts.append(label(x + 15, y + 10, text(name, 24)))
        x += long
    return parts, y + 18


def ratios(strips: Sequence[Strip], title: str, named: Callable[[float], str]) -> Markup:
    """Multiples on a logarithmic axis, a row for each layer, with their geometric mean; empty for none."""
    values = [value for _, _, row in strips for value in row if value > 0]
    if not values:
        return Markup()
    low, high = min(1.0, *values) / 1.03, max(1.5, *values) * 1.03
    ticks = [(math.log(tick), f"{tick:g}×") for tick in RATIOS if low <= tick <= high]
    logs = [(name, to, [math.log(value) for value in row if value > 0]) for name, to, row in strips]
    return _strips(logs, (math.log(low), math.log(high)), ticks, title, lambda mean: named(math.exp(mean)))


def percents(strips: Sequence[Strip], title: str) -> Markup:
    """Shares on an even axis in per cent, a row for each layer, with their mean; empty for none."""
    values = [value for _, _, row in strips for value in row]
    if not values:
        return Markup()
    low, high = min(0.0, *values), max(0.02, *values)
    step = 10 ** math.floor(math.log10(high - low))
    step = next(step * part for part in (0.2, 0.5, 1, 2) if (high - low) / (step * part) <= 5)
    marks = [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    ticks = [(mark, f"{100 * mark:.3g} %") for mark in marks]
    room = (high - low) / 40
    return _strips(strips, (low - room, high + room), ticks, title, lambda mean: f"{100 * mean:.2g} %")


def _strips(
    strips: Sequence[Strip],
    ends: tuple[float, float],
    ticks: Sequence[tuple[float, str]],
    title: str,
    named: Callable[[float], str],
) -> Markup:
    """Dots along rows. Ticks whose names would touch stay without name."""
    rows = [strip for strip in strips if strip[2]]
    bottom, width = ROW * len(rows), WIDE - RIGHT

    def x(value: float) -> float:
        return 6 + (width - 12) * (value - ends[0]) / (ends[1] - ends[0])

    parts, free = list[Markup](), -math.inf
    for at, name in ticks:
        kind = "limit" if name in ("1×", "0 %") else "level"  # not across the names of layers
        parts += [line(x(at), ROW * row + 16, x(at), ROW * (row + 1), kind) for row in range(len(rows))]
        if x(at) - 3.2 * len(name) > free:
            parts.append(label(x(at), bottom + 14, name, "mid small"))
            free = x(at) + 3.2 * len(name) + 6
    for k, (name, to, values) in enumerate(rows):
        parts += _strip(name, to, [x(value) for value in values], ROW * k)
        mean = fmean(values)
        parts.append(line(x(mean), ROW * k + 17, x(mean), ROW * k + 31, "mean"))
        parts.append(label(width + 6, ROW * k + 28, named(mean), "name"))
    return svg(WIDE, bottom + BAR, title, parts)


def _strip(name: str, to: str, places: Sequence[float], y: float) -> list[Markup]:
    shown = element("a", label(0, y + 12, text(name, 58), "small halo", name), href=f"#{to}")
    dots = (element("circle", kind="spot", cx=x, cy=y + 22 + 2 * (k % 3), r=DOT) for k, x in enumerate(places))
    return [shown, *dots]


def counts(pairs: Sequence[tuple[str, int]], title: str) -> Markup:
    """A bar for each name."""
    most, left, parts = max([count for _, count in pairs] + [1]), 150, list[Markup]()
    for row, (name, count) in enumerate(pairs):
        y, long = BAR * row, (WIDE - left - RIGHT) * count / most
        parts.append(label(left - 6, y + 13, text(name, 26), "end"))
        parts.append(element("rect", kind="bar", x=left, y=y + 2, width=long, height=BAR - 4, rx=2))
        parts.append(label(left + long + 6, y + 13, count))
    return svg(WIDE, BAR * max(len(pairs), 1), title, parts)
