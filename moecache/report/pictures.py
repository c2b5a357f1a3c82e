"""Figures as inline SVG: grids of winners, multiples of the limit, ranked shares, counts. Colours are the page's."""

import math
import re
from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

from moecache.report.figures import Cell, Panel

COLOURS = 8
WIDE, HIGH, LEFT, RIGHT, BELOW = 420, 190, 64, 70, 22  # of a plot and around it
CELL_WIDE, CELL_HIGH, APART = 84, 34, 13
TICKS = (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 1024, 4096)
LONGEST = 300  # characters of a text

# What XML forbids, and marks that turn the order of text: a file may hold anything.
_UNSHOWN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]")


def text(value: object, longest: int = LONGEST) -> str:
    """Of a stranger's file, safe between tags and in double quotes, cut to so many characters."""
    shown = _UNSHOWN.sub("\ufffd", str(value))
    shown = shown if len(shown) <= longest else shown[: longest - 1] + "…"
    return escape(shown, {'"': "&quot;", "'": "&#39;"})


def short(tokens: int) -> str:
    """2048 as 2k."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def duration(us: float) -> str:
    """Four digits, in the unit that has them before or just behind the point."""
    unit, size = ("µs", 1.0) if us < 1e4 else ("ms", 1e3) if us < 1e7 else ("s", 1e6)
    return f"{us / size:.4g} {unit}"


def octave(tokens: int) -> float:
    """Where a number of tokens stands on the axis: 1 for 1, 2 for 2, 3 for 4; 0 for none."""
    return math.log2(tokens) + 1 if tokens else 0.0


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img"'
    return "\n".join([f"{head} aria-label={quoteattr(title)}>", *parts, "</svg>"])


def grid(panel: Panel, colours: Sequence[str]) -> str:
    """Winners over tokens x routing. `colours` lists the variants; the same one looks the same everywhere."""
    columns = sorted({cell.tokens for cell in panel.cells})
    rows = sorted({cell.routing for cell in panel.cells})
    parts = [
        f'<text class="end" x="{LEFT - 6}" y="{CELL_HIGH * (row + 0.5) + 4:g}">{text(routing or "any", 9)}</text>'
        for row, routing in enumerate(rows)
    ]
    for column, tokens in enumerate(columns):
        x, y = LEFT + CELL_WIDE * (column + 0.5), CELL_HIGH * len(rows) + 15
        parts.append(f'<text class="mid" x="{x:g}" y="{y}">{short(tokens)}</text>')
    for cell in panel.cells:
        x, y = LEFT + CELL_WIDE * columns.index(cell.tokens), CELL_HIGH * rows.index(cell.routing)
        parts.append(_square(cell, x, y, colours))
    width, height = LEFT + CELL_WIDE * len(columns), CELL_HIGH * len(rows) + BELOW
    return _svg(width, height, "winner and time in µs, tokens across, routing down", parts)


def _square(cell: Cell, x: float, y: float, colours: Sequence[str]) -> str:
    kind = "failed" if cell.us is None else f"c{colours.index(cell.variant) % COLOURS}"
    size = f'width="{CELL_WIDE - 2}" height="{CELL_HIGH - 2}" rx="3"'
    time = "" if cell.us is None else duration(cell.us) + (" =" if cell.state == "tie" else "")
    middle = (CELL_WIDE - 2) / 2
    return (
        f'<g transform="translate({x} {y})"><title>{text(cell.config or cell.variant)}</title>'
        f'<rect class="{kind}" {size}/><text class="mid name" x="{middle:g}" y="14">{text(cell.variant, 13)}</text>'
        f'<text class="mid" x="{middle:g}" y="27">{time}</text></g>'
    )


def multiples(panel: Panel) -> str:
    """Time over the limit against tokens, both logarithmic, a line a routing; '' without a limit."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for cell in sorted(panel.cells, key=lambda each: (each.routing, each.tokens)):
        if cell.over is not None:
            lines.setdefault(cell.routing, []).append((cell.tokens, cell.over))
    if not lines:
        return ""
    tokens = sorted({at for line in lines.values() for at, _ in line})
    ratios = [ratio for line in lines.values() for _, ratio in line]
    low, high = min(1.0, *ratios) / 1.05, max(2.0, *ratios) * 1.05

    def x(at: int) -> float:
        first, last = octave(tokens[0]), octave(tokens[-1])
        return LEFT + WIDE * ((octave(at) - first) / (last - first) if last > first else 0.5)

    def y(ratio: float) -> float:
        return HIGH * (1 - math.log(ratio / low) / math.log(high / low))

    parts = [_level(y(tick), f"{tick:g}×", tick == 1) for tick in TICKS if low <= tick <= high]
    parts += [f'<text class="mid" x="{x(at):.1f}" y="{HIGH + 16}">{short(at)}</text>' for at in tokens]
    parts += _lines({name: [(x(at), y(ratio)) for at, ratio in line] for name, line in lines.items()})
    return _svg(LEFT + WIDE + RIGHT, HIGH + BELOW, "multiples of the limit against tokens", parts)


def _lines(placed: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Lines with their points, and their names at the right edge, none over another."""
    parts, free = [], 0.0
    for number, (name, points) in enumerate(placed.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        kind = f"c{number % COLOURS}"
        parts.append(f'<polyline class="{kind}" points="{path}" data-name="{text(name)}"/>')
        parts += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points]
    for number, name in sorted(enumerate(placed), key=lambda item: placed[item[1]][-1][1]):
        x, y = placed[name][-1]
        free = max(free, y) + APART
        ends = f'x1="{x + 4:.1f}" y1="{y:.1f}" x2="{LEFT + WIDE + 6}" y2="{free - APART:.1f}"'
        parts.append(f'<line class="lead" {ends}/>')
        where = f'x="{LEFT + WIDE + 8}" y="{free - APART + 4:.1f}"'
        parts.append(f'<text class="c{number % COLOURS}" {where}>{text(name or "any", 9)}</text>')
    return parts


def _level(y: float, name: str, strong: bool) -> str:
    line = f'<line class="{"limit" if strong else "level"}" x1="{LEFT}" x2="{LEFT + WIDE}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{name}</text>'


def ranked(shares: Sequence[float], title: str) -> str:
    """Shares from the largest to the smallest as an area over 0, in per cent; '' for none."""
    if not shares:
        return ""
    values = sorted((100 * share for share in shares), reverse=True)
    low, high = min(0.0, values[-1]), max(1.0, values[0])
    across = WIDE / len(values)

    def y(value: float) -> float:
        return 6 + (HIGH - 6) * (high - value) / (high - low)

    ends = [(LEFT + across * (k + side), y(value)) for k, value in enumerate(values) for side in (0, 1)]
    path = " ".join(f"{at:.1f},{up:.1f}" for at, up in [(LEFT, y(0)), *ends, (LEFT + WIDE, y(0))])
    marks = dict.fromkeys((low, 0.0, (low + high) / 2, high))
    parts = [f'<polygon class="c0" points="{path}"/>', *(_level(y(at), f"{at:.3g} %", at == 0) for at in marks)]
    parts.append(f'<text class="mid" x="{LEFT + WIDE / 2:g}" y="{HIGH + 16}">{len(values)} problems, ranked</text>')
    return _svg(LEFT + WIDE + 8, HIGH + BELOW, title, parts)


def counts(pairs: Sequence[tuple[str, int]], title: str) -> str:
    """A bar for each name."""
    most, parts = max([count for _, count in pairs] + [1]), []
    for row, (name, count) in enumerate(pairs):
        y, long = 22 * row, (WIDE - LEFT) * count / most
        good = "c2" if name in ("ok", "measured") else "c0" if name == "tie" else "c1"
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 14}">{text(name, 12)}</text>')
        parts.append(f'<rect class="{good}" x="{LEFT}" y="{y + 1}" width="{long:.1f}" height="18" rx="2"/>')
        parts.append(f'<text x="{LEFT + long + 6:.1f}" y="{y + 14}">{count}</text>')
    return _svg(LEFT + WIDE, 22 * max(len(pairs), 1), title, parts)
