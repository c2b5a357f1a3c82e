"""The first pictures: which variants win at which token counts, and every problem of every layer on one scale."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean

from moecache.report.drawing import colour, digits, faster, label, line, short, svg, text
from moecache.report.figures import Cell

WIDE, LEFT, RIGHT = 350, 42, 56  # of a picture, and beside its plot
HIGH, BAR = 130, 19  # of columns; of the row with a count
ROW, DOT = 34, 2.6  # of a layer among the strips
RATIOS = (0.25, 0.5, 1, 1.1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 1024, 4096, 1 << 20, 1 << 40)
Strip = tuple[str, str, Sequence[float]]  # title, address of the layer, values


def columns(cells: Sequence[Cell], colours: Sequence[str]) -> str:
    """The share of problems that each variant wins, a column for each number of tokens, with a legend."""
    usable = [cell for cell in cells if cell.us is not None]
    tokens = sorted({cell.tokens for cell in usable})
    if not tokens:
        return ""
    each, parts = (WIDE - LEFT - 10) / len(tokens), []
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


def _column(x: float, width: float, won: Counter[str], colours: Sequence[str], said: str) -> list[str]:
    y, parts = 8.0 + HIGH, []
    for name in sorted(won, key=colours.index):
        high = HIGH * won[name] / won.total()
        y -= high
        kind, size = f"{colour(name, colours)} part", f'width="{max(1, width - 2):.1f}" height="{high:.1f}"'
        tip = text(f"{said}: {name} wins {won[name]} of {won.total()}")
        parts.append(f'<rect class="{kind}" x="{x + 1:.1f}" y="{y:.1f}" {size}><title>{tip}</title></rect>')
    return parts


def _legend(names: Sequence[str], top: float) -> tuple[list[str], float]:
    x, y, parts = float(LEFT), top, []
    for name in names:
        shown = text(name, 24)
        long = 24 + 6.6 * min(24, len(name))
        x, y = (float(LEFT), y + 18) if x + long > WIDE and x > LEFT else (x, y)
        parts.append(f'<rect class="{colour(name, names)}" x="{x:.1f}" y="{y:.1f}" width="11" height="11" rx="2"/>')
        parts.append(label(x + 15, y + 10, shown))
        x += long
    return parts, y + 18


def ratios(strips: Sequence[Strip], title: str, named: Callable[[float], str]) -> str:
    """Multiples on a logarithmic axis, a row for each layer, with their geometric mean; '' for none."""
    values = [value for _, _, row in strips for value in row if value > 0]
    if not values:
        return ""
    low, high = min(1.0, *values) / 1.03, max(1.5, *values) * 1.03
    ticks = [(math.log(tick), f"{tick:g}×") for tick in RATIOS if low <= tick <= high]
    logs = [(name, to, [math.log(value) for value in row if value > 0]) for name, to, row in strips]
    return _strips(logs, (math.log(low), math.log(high)), ticks, title, lambda mean: named(math.exp(mean)))


def percents(strips: Sequence[Strip], title: str) -> str:
    """Shares on an even axis in per cent, a row for each layer, with their mean; '' for none."""
    values = [value for _, _, row in strips for value in row]
    if not values:
        return ""
    low, high = min(0.0, *values), max(0.02, *values)
    step = 10 ** math.floor(math.log10(high - low))
    step = next(step * part for part in (0.2, 0.5, 1, 2) if (high - low) / (step * part) <= 5)
    marks = [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    ticks = [(mark, f"{100 * mark:.3g} %") for mark in marks]
    room = (high - low) / 40
    return _strips(strips, (low - room, high + room), ticks, title, lambda mean: f"{100 * mean:.2g} %")


def _strips(
    strips: Sequence[Strip], ends: tuple[float, float], ticks: Sequence[tuple[float, str]], title: str,
    named: Callable[[float], str],
) -> str:  # fmt: skip
    """Dots along rows. Ticks whose names would touch stay without name."""
    rows = [strip for strip in strips if strip[2]]
    bottom, width = ROW * len(rows), WIDE - RIGHT

    def x(value: float) -> float:
        return 6 + (width - 12) * (value - ends[0]) / (ends[1] - ends[0])

    parts, free = [], -math.inf
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


def _strip(name: str, to: str, places: Sequence[float], y: float) -> list[str]:
    shown = f'<a href="#{to}">{label(0, y + 12, text(name, 58), "small halo", text(name))}</a>'
    dots = [f'<circle class="spot" cx="{x:.1f}" cy="{y + 22 + 2 * (k % 3)}" r="{DOT}"/>' for k, x in enumerate(places)]
    return [shown, *dots]


def counts(pairs: Sequence[tuple[str, int]], title: str) -> str:
    """A bar for each name."""
    most, left, parts = max([count for _, count in pairs] + [1]), 150, []
    for row, (name, count) in enumerate(pairs):
        y, long = BAR * row, (WIDE - left - RIGHT) * count / most
        parts.append(label(left - 6, y + 13, text(name, 26), "end"))
        parts.append(f'<rect class="bar" x="{left}" y="{y + 2}" width="{long:.1f}" height="{BAR - 4}" rx="2"/>')
        parts.append(label(left + long + 6, y + 13, str(count)))
    return svg(WIDE, BAR * max(len(pairs), 1), title, parts)


def mean_ratio(values: Sequence[float]) -> float:
    """The geometric mean of what is above nothing."""
    return math.exp(fmean([math.log(value) for value in values if value > 0] or [0.0]))


def times(value: float) -> str:
    """A multiple in three digits."""
    return f"{digits(value)}×"


def gained(ratio: float) -> str:
    """A multiple of speed as a gain."""
    return faster(ratio - 1)
