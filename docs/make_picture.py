"""Draws docs/fused_moe.svg from the result file, if there is one: `python docs/make_picture.py`; `--check` compares."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "h100" / "fused_moe.json"
PICTURE = ROOT / "docs" / "fused_moe.svg"

PEERS = {  # names in result files, in full
    "ours": "moecache",
    "torch": "torch grouped_mm",
    "vllm": "vLLM",
    "vllm_best": "vLLM, best config",
    "sglang": "SGLang",
    "tk": "triton_kernels",
    "dg": "DeepGEMM",
    "dg_mask": "DeepGEMM masked",
}
WIDE, HIGH, ACROSS = 300, 230, 2  # the plot of a panel, and panels in a row
HIGHEST = 4.0  # lines leave the top of a plot here: the space below is where the differences are
LEFT, RIGHT, ABOVE, BELOW, TITLE = 34, 128, 30, 30, 44  # around a plot; above all
TICKS = (0.8, 1, 1.25, 1.5, 2, 2.5, 3, 4)
APART = 12  # pixels between two labels
STYLE = """
text { font: 11px system-ui, sans-serif; fill: #424a53 }
.head { font-size: 14px; font-weight: 600; fill: #1f2328 }
.panel { font-size: 12px; font-weight: 600; fill: #1f2328 }
.inside { stroke: #ffffff; stroke-width: 3px }
.end { text-anchor: end } .mid { text-anchor: middle }
.grid { stroke: #8b949e; stroke-opacity: .25 } .limit { stroke: #8b949e; stroke-width: 1.5 }
polyline { fill: none; stroke: #8b949e; stroke-width: 1.2; stroke-linejoin: round }
circle { fill: #8b949e } .lead { stroke: #8b949e; stroke-opacity: .5 }
.vllm { stroke: #0969da; stroke-width: 1.8 } circle.vllm { fill: #0969da; stroke: none }
.ours { stroke: #d9480f; stroke-width: 2.8 } circle.ours { fill: #d9480f; stroke: none }
text.vllm { fill: #0969da; stroke: none } text.ours { fill: #d9480f; stroke: none; font-weight: 700 }
@media (prefers-color-scheme: dark) {
  text { fill: #b1bac4 } .head, .panel { fill: #f0f6fc } .inside { stroke: #0d1117 }
  .vllm { stroke: #58a6ff } circle.vllm, text.vllm { fill: #58a6ff; stroke: none }
  .ours { stroke: #ff922b } circle.ours, text.ours { fill: #ff922b; stroke: none }
}
"""
Row = dict[str, Any]
Line = dict[int, float]  # tokens -> multiple of the limit


def full(name: str) -> str:
    """The full name of what a result file names."""
    return PEERS.get(name, name)


def lines(rows: Sequence[Row]) -> dict[str, Line]:
    """Name -> its time over the limit for each number of tokens, geometric mean over the routings; ours last."""
    logs: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        for name, us in row["us"].items():
            if us:
                logs.setdefault(name, {}).setdefault(row["T"], []).append(math.log(us / row["limit_us"]))
    found = {
        name: {tokens: math.exp(sum(each) / len(each)) for tokens, each in sorted(cells.items())}
        for name, cells in logs.items()
    }
    return dict(sorted(found.items(), key=lambda item: (item[0] == "ours", item[0] == "vllm")))


def spread(wanted: Sequence[float], apart: float = APART, last: float = HIGH) -> list[float]:
    """Positions in [0, last], in the order of `wanted`, `apart` from each other and near where they are wanted."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[float]] = []  # neighbours that touch move together, around the mean of what they want

    def top(group: list[float]) -> float:
        height = apart * (len(group) - 1)
        return max(0.0, min(last - height, sum(group) / len(group) - height / 2))

    for i in order:
        groups.append([wanted[i]])
        while len(groups) > 1 and top(groups[-2]) + apart * len(groups[-2]) > top(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = [top(group) + apart * k for group in groups for k in range(len(group))]
    return [placed[order.index(i)] for i in range(len(wanted))]


class Scale:
    """Tokens and multiples of the limit to pixels of a plot, both logarithmic, the same for every panel."""

    def __init__(self, panels: Sequence[dict[str, Line]]) -> None:
        every = [line for panel in panels for line in panel.values()]
        self.tokens = sorted({tokens for line in every for tokens in line})
        ratios = [ratio for line in every for ratio in line.values()]
        self.low, self.high = min(1.0, *ratios) / 1.03, min(HIGHEST, max(1.5, *ratios) * 1.03)

    def x(self, tokens: float) -> float:
        first, last = self.tokens[0], self.tokens[-1]
        return WIDE * math.log(tokens / first) / math.log(last / first) if last > first else WIDE / 2

    def y(self, ratio: float) -> float:
        return HIGH * (1 - math.log(ratio / self.low) / math.log(self.high / self.low))


def draw(result: dict[str, Any]) -> str:
    """The picture: one panel for each shape."""
    shapes = {row["shape"]: row for row in result["rows"]}
    panels = {shape: lines([r for r in result["rows"] if r["shape"] == shape]) for shape in shapes}
    scale, across = Scale(list(panels.values())), min(ACROSS, len(panels))
    width = across * (LEFT + WIDE + RIGHT)
    height = TITLE + math.ceil(len(panels) / across) * (ABOVE + HIGH + BELOW)
    routings = " and ".join(dict.fromkeys(row["routing"] for row in result["rows"]))
    about = f"multiples of the limit, against tokens; {routings} routing, lower is better" + (
        f"; lines that leave the top are above {HIGHEST:g}" if scale.high == HIGHEST else ""
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
        f"<title>Fused MoE: {escape(about)}</title><style>{STYLE}</style>",
        f'<clipPath id="plot"><rect x="-3" y="-3" width="{WIDE + 6}" height="{HIGH + 6}"/></clipPath>',
        f'<text class="head" x="{LEFT}" y="18">Fused MoE on {escape(result["device"])}, bf16</text>',
        f'<text x="{LEFT}" y="34">{escape(about)}</text>',
    ]
    for number, (shape, found) in enumerate(panels.items()):
        x = number % across * (LEFT + WIDE + RIGHT) + LEFT
        y = TITLE + number // across * (ABOVE + HIGH + BELOW) + ABOVE
        row = shapes[shape]
        name = f"{shape}: {row['E']} experts, top-{row['topk']}, {row['hidden']} × {row['intermediate']}"
        parts.append(f'<g transform="translate({x} {y})" data-shape="{escape(shape)}">')
        parts += [f'<text class="panel" y="-10">{escape(name)}</text>', *_axes(scale), *_plot(found, scale), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _axes(scale: Scale) -> list[str]:
    parts = []
    for ratio in (tick for tick in TICKS if scale.low <= tick <= scale.high):
        y = scale.y(ratio)
        kind = "limit" if ratio == 1 else "grid"
        parts.append(f'<line class="{kind}" x1="0" x2="{WIDE}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="-6" y="{y + 4:.1f}">{ratio:g}</text>')
    for tokens in scale.tokens:
        parts.append(f'<text class="mid" x="{scale.x(tokens):.1f}" y="{HIGH + 16}">{_short(tokens)}</text>')
    return parts


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def _plot(found: dict[str, Line], scale: Scale) -> list[str]:
    """Lines and their points, and a label where each ends: at the right edge beside each other, else on the spot."""
    parts, ends = ['<g clip-path="url(#plot)">'], {}
    for name, line in found.items():
        points = [(scale.x(tokens), scale.y(ratio)) for tokens, ratio in line.items()]
        kind = name if name in ("ours", "vllm") else "peer"
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="{kind}" data-name="{escape(name)}" points="{text}"/>')
        parts += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in points]
        ends[name] = (*points[-1], kind)
    parts.append("</g>")
    edge = {name: end for name, end in ends.items() if end[0] == scale.x(scale.tokens[-1])}
    for name, (x, y, _) in ends.items():
        if name not in edge:
            named = escape(full(name))
            where = f'x="{x:.1f}" y="{max(y, 0) - 6:.1f}"'
            parts.append(f'<text class="inside mid" {where} aria-hidden="true">{named}</text>')  # its halo
            parts.append(f'<text class="mid" {where}>{named}</text>')
    heights = spread([max(y, 0) for _, y, _ in edge.values()])
    for (name, (x, y, kind)), at in zip(edge.items(), heights, strict=True):
        parts.append(f'<line class="lead" x1="{x + 3:.1f}" y1="{max(y, 0):.1f}" x2="{WIDE + 12}" y2="{at:.1f}"/>')
        parts.append(f'<text class="{kind}" x="{WIDE + 15}" y="{at + 4:.1f}">{escape(full(name))}</text>')
    return parts


def main(arguments: Sequence[str]) -> int:
    """Write the picture, or say that it is stale."""
    if not RESULT.exists():
        return 0
    picture = draw(json.loads(RESULT.read_text()))
    if "--check" not in arguments:
        PICTURE.write_text(picture, encoding="utf-8")
    elif not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != picture:
        print("stale: docs/fused_moe.svg; run python docs/make_picture.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
