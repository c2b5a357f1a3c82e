"""The pictures of one layer: winners over tokens x routing, and below, in the same columns, times over the limit."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from moecache.report.drawing import colour, digits, duration, element, faster, label, line, short, svg, text
from moecache.report.figures import Cell, Panel
from moecache.report.names import routing

LEFT, RIGHT, BELOW = 84, 56, 22  # around squares and plot
CELL_HIGH, ACROSS, NARROWEST, WIDEST = 46, 930, 62, 120
HIGH, ABOVE, APART = 190, 8, 13  # of the plot, over it, between the names at its right
Point = tuple[float, float, Cell, str]  # x, y, what it is, its figure if it lies above the plot
TICKS = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 1024, 4096)


def columns(panel: Panel) -> list[int]:
    """The numbers of tokens, one column each."""
    return sorted({cell.tokens for cell in panel.cells})


def wide(panel: Panel) -> float:
    """Of a column: as many as there usually are fit the page."""
    return min(WIDEST, max(NARROWEST, ACROSS // len(columns(panel))))


def grid(panel: Panel, colours: Sequence[str]) -> Markup:
    """Winners over tokens x routing. `colours` lists the variants; the same one looks the same everywhere."""
    rows = sorted({cell.routing for cell in panel.cells})
    parts = [each for row, name in enumerate(rows) for each in _row_name(name, CELL_HIGH * row)]
    parts += _tokens(panel, CELL_HIGH * len(rows) + 14)
    for cell in panel.cells:
        x, y = LEFT + wide(panel) * columns(panel).index(cell.tokens), CELL_HIGH * rows.index(cell.routing)
        parts.append(_square(cell, x, y, wide(panel), colours))
    width, height = LEFT + wide(panel) * len(columns(panel)) + RIGHT, CELL_HIGH * len(rows) + BELOW
    return svg(width, height, "winner, time and gain over the default; tokens across, routing down", parts)


def _row_name(bucket: str, y: float) -> list[Markup]:
    names = [text(bucket or "any", 11), *routing(bucket)]
    top = y + CELL_HIGH / 2 + 10 - 7 * len(names)
    kinds = ["end name", "end soft", "end soft"]
    return [label(LEFT - 8, top + 13 * k, name, kinds[k]) for k, name in enumerate(names)]


def _tokens(panel: Panel, y: float) -> list[Markup]:
    names = [(LEFT + wide(panel) * (k + 0.5), short(at)) for k, at in enumerate(columns(panel))]
    return [label(LEFT - 8, y, "tokens", "end soft"), *(label(x, y, name, "mid") for x, name in names)]


def _square(cell: Cell, x: float, y: float, width: float, colours: Sequence[str]) -> Markup:
    kind = "failed" if cell.us is None else colour(cell.variant, colours)
    kind += " guessed" if cell.state == "predicted" else ""
    middle, most = (width - 3) / 2, round(width / 4.8)
    room = width - 9 if 7.5 * min(most, len(cell.variant)) > width - 9 else 0
    named = [label(middle, 13, text(cell.variant, most), "mid name", room=room)]
    named.append(label(middle, 26, "" if cell.us is None else duration(cell.us), "mid"))
    named.append(label(middle, 39, _gain(cell), "mid"))
    square = element("rect", kind=kind, width=width - 3, height=CELL_HIGH - 3, rx=3)
    return element("g", element("title", _tip(cell)), square, *named, transform=f"translate({x:g} {y:g})")


def _gain(cell: Cell) -> str:
    shown = "default" if cell.default else "" if cell.gain is None else faster(cell.gain)
    return f"{shown} =".strip() if cell.state == "tie" else shown


def _tip(cell: Cell) -> Markup:
    """What a square or point says when it is pointed at."""
    below = " (fewer experts active than it counts, or weights kept in caches)" if (cell.over or 1) < 0.995 else ""
    over = "" if cell.over is None else f"{digits(cell.over)}× the limit{below}"
    said = (f"{cell.tokens} tokens {cell.routing}".strip(), cell.config or cell.variant, over, cell.problem.id)
    return text("; ".join(filter(None, said)))


def multiples(panel: Panel, colours: Sequence[str]) -> Markup:
    """Time over the limit, logarithmic, in the columns of the grid, a line a routing; empty without a limit."""
    lines: dict[str, list[Cell]] = {}
    for cell in sorted(panel.cells, key=lambda each: (each.routing, each.tokens)):
        if cell.over is not None:
            lines.setdefault(cell.routing, []).append(cell)
    if not lines:
        return Markup()
    at, right = columns(panel), LEFT + wide(panel) * len(columns(panel))
    low, high = _ends(panel)

    def y(ratio: float) -> float:
        return ABOVE + HIGH * (1 - math.log(min(ratio, high) / low) / math.log(high / low))

    def point(cell: Cell) -> Point:
        ratio = cell.over or 1.0
        far = f"↑ {digits(ratio, 2)}×" if ratio > high else ""
        return LEFT + wide(panel) * (at.index(cell.tokens) + 0.5), y(ratio), cell, far

    parts = _levels({tick: y(tick) for tick in TICKS if low <= tick <= high}, right)
    parts += _tokens(panel, ABOVE + HIGH + 16)
    parts += _lines({name: [point(cell) for cell in cells] for name, cells in lines.items()}, right, colours)
    return svg(right + RIGHT, ABOVE + HIGH + BELOW, "multiples of the limit against tokens", parts)


def _levels(heights: dict[float, float], right: float) -> list[Markup]:
    """The limit and multiples of it; those whose names would touch stay without name."""
    parts, named = [], [heights[1]]
    for tick, y in heights.items():
        parts.append(line(LEFT, y, right, y, "limit" if tick == 1 else "level"))
        if tick == 1 or all(abs(y - other) >= APART for other in named):
            parts.append(label(LEFT - 8, y + 4, "limit" if tick == 1 else f"{tick:g}×", "end"))
            named.append(y)
    return parts


def _ends(panel: Panel) -> tuple[float, float]:
    """Of the axis. Where the limit is not close a point may be far off: such points do not press the others down."""
    ratios = panel.shares("over")
    reach = 2 * max(2.0, *(panel.shares("close") or ratios))
    return min(1.0, *ratios) / 1.05, max(2.0, *(ratio for ratio in ratios if ratio <= reach)) * 1.05


def _lines(placed: dict[str, list[Point]], right: float, colours: Sequence[str]) -> list[Markup]:
    """Lines with their names, and over all of them points in the colour of the winner."""
    parts, dots = [], []
    for name, points in placed.items():
        path = Markup(" ").join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)  # may be longer than a text
        parts.append(element("polyline", kind=_stroke(name), points=path, data_name=name))
        for x, y, cell, far in points:
            kind = f"{colour(cell.variant, colours)} dot"
            dots.append(element("circle", element("title", _tip(cell)), kind=kind, cx=x, cy=y, r=4))
            dots += [label(x - 8, y + 4, far, "end halo")] if far else []
    return parts + _names(placed, right) + dots


def _names(placed: dict[str, list[Point]], right: float) -> list[Markup]:
    """The names of lines right of their last points; of those that reach the last column at the edge of the plot."""
    parts: list[Markup] = []
    last = max(points[-1][0] for points in placed.values())
    for end in sorted({points[-1][0] for points in placed.values()}):
        names = sorted((n for n in placed if placed[n][-1][0] == end), key=lambda name: placed[name][-1][1])
        for name, y in zip(names, _spread([placed[name][-1][1] for name in names]), strict=True):
            to = right + 4 if end == last else end + 9
            parts.append(line(end + 5, placed[name][-1][1], to, y, "lead"))
            parts.append(label(to + 3, y + 4, text(name or "any", 8), "halo"))
    return parts


def _stroke(bucket: str) -> str:
    """Dashes say how many experts are active, shades how evenly they are loaded."""
    words = routing(bucket)
    return f"{words[0].split()[0]} {words[1]}" if words else "even"


def _spread(heights: Sequence[float]) -> list[float]:
    """Heights from the top down, moved so that names there do not overlap and stay within the plot."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + APART) if placed else height)
    bottom = float(ABOVE + HIGH)
    for k in reversed(range(len(placed))):
        placed[k] = min(placed[k], bottom)
        bottom = placed[k] - APART
    return placed
