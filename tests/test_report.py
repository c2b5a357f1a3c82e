"""The page of a cache file: well-formed whatever is stored, figures right, points where they belong."""

import math
import re
import sqlite3
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moecache.cli import app
from moecache.models import read_model
from moecache.report import layer, names, overview, page, risks
from moecache.report.drawing import digits, duration, faster, text
from moecache.report.figures import Report, figures
from moecache.report.limit import active_experts, limit_us
from moecache.schemas.config import Config, config
from moecache.schemas.device import KNOWN
from moecache.schemas.prediction import Prediction
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing
from moecache.store import Store

HTML, SVG = "{http://www.w3.org/1999/xhtml}", "{http://www.w3.org/2000/svg}"
H200 = Environment(device_name="NVIDIA H200", driver="580.1", torch="2.12.0", triton="3.9.0")
RING, TILES = config("ring", block=16), config("tiles", block=32)
SHIPPED = Path(__file__).parent.parent / "moecache" / "prebuilt" / "h100.sqlite"
EVIL = "<script>alert('x')</script>&\"\x00\x1b\u202e]]>"


def problem(tokens: int, **changes: Any) -> Problem:
    fields: dict[str, Any] = {
        "op": "fused_moe", "vendor": "nvidia", "arch": "sm_90", "units": 132, "tokens": tokens, "experts": 8,
        "topk": 2, "routing": "a0e0", "dtype": "bf16", "source": "abc", "dims": {"hidden": 4096, "intermediate": 14336},
    }  # fmt: skip
    return Problem(**fields | changes)


def timing(asked: Problem, tried: Config, us: float | None, where: Environment = H200, **more: Any) -> Timing:
    sample = {} if us is None else {"median_us": us, "mad_us": us / 1000, "n": 40, "error": 0.0}
    when = "2026-01-02T03:04:05+00:00"
    return Timing(problem=asked, config=tried, environment=where, measured_at=when, **sample | more)


def rows() -> list[Timing]:
    """Two routings; at 64 tokens a tie that the default wins 1 % slower; at 256 nothing is usable."""
    return [
        timing(problem(1), RING, 200.0),
        timing(problem(1), TILES, 300.0, is_default=True),
        timing(problem(16), RING, 400.0, is_default=True),
        timing(problem(16, routing="a1e2"), RING, 350.0, is_default=True),
        timing(problem(64), RING, 800.0),
        timing(problem(64), TILES, 808.0, is_default=True),
        timing(problem(256), RING, None, status="oom", reason="no memory left"),
        timing(problem(256), TILES, None, status="oom", reason="no memory left"),
    ]


def stored(path: Path, timings: Sequence[Timing]) -> Path:
    with Store.open(path) as store:
        store.put(timings)
    return path


def read(timings: Sequence[Timing]) -> tuple[Report, str]:
    with Store.memory() as store:
        store.put(timings)
        found = [(each, "x.sqlite") for each in store.timings()], [(each, "x.sqlite") for each in store.winners()]
        return figures(["x.sqlite"], *found), page(["x.sqlite"], *found)


def guess(asked: Problem, us: float, device: str = "NVIDIA H200") -> Prediction:
    return Prediction(problem=asked, device=device, config=RING, predicted_us=us)


def draw(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["report", *map(str, arguments)], prog_name="moecache")
    assert done.exit_code == code, done.output
    return done.output


# --- figures ---


def test_figures_of_a_filled_file() -> None:
    found, _ = read(rows())
    (panel,) = found.panels
    cells = {(cell.tokens, cell.routing): cell for cell in panel.cells}
    assert dict(found.states) == {"measured": 3, "tie": 1, "failures": 1}
    assert dict(found.statuses) == {"ok": 6, "oom": 2}
    assert cells[1, "a0e0"].variant == "ring" and cells[1, "a0e0"].gain == pytest.approx(0.5)
    assert cells[64, "a0e0"].default and not cells[1, "a0e0"].default
    assert cells[64, "a0e0"].variant == "tiles" and cells[64, "a0e0"].regret == pytest.approx(0.01)
    assert cells[256, "a0e0"].us is None and cells[256, "a0e0"].state == "failures"
    assert [(each.reason, each.count) for each in found.failures] == [("no memory left", 2)]
    assert [(each.environment, each.count, each.first) for each in found.sources] == [(H200, 8, "2026-01-02")]


def test_layers_environments_and_files_are_kept_apart() -> None:
    other = H200.model_copy(update={"driver": "1"})
    asked = problem(1)
    wide, new = problem(1, dims={"hidden": 64, "intermediate": 64}), problem(1, source="new")
    found, _ = read([timing(asked, RING, 1.0), timing(wide, RING, 2.0), timing(new, RING, 3.0),
                     timing(asked, RING, 4.0, other)])  # fmt: skip
    assert sorted(cell.us or 0 for panel in found.panels for cell in panel.cells) == [1.0, 2.0, 3.0, 4.0]
    assert len(found.panels) == 4
    known = "fused_moe, Mixtral-8x7B, bf16"  # what tells panels of one name apart is added, and nothing else
    assert {panel.title for panel in found.panels} == {
        f"{known}, driver 580.1, code abc, policy 1",
        f"{known}, driver 580.1, code new, policy 1",
        f"{known}, driver 1, code abc, policy 1",
        "fused_moe, 8 experts, top-2, 64 × 64, bf16",
    }
    twice = [(timing(asked, RING, 1.0), "a"), (timing(asked, RING, 1.0), "b")]
    assert len(figures(["a", "b"], twice, []).panels) == 2


def test_what_is_risky_is_listed_with_its_figure() -> None:
    noisy = {"median_us": 500.0, "mad_us": 60.0, "n": 5, "error": 0.0}
    found, _ = read(
        [*rows(), timing(problem(512), RING, None, **noisy), timing(problem(2048, experts=4), RING, 9000.0)]
    )
    listed = {(each.why, each.cell.tokens): each for each in risks.risks(found)}
    assert listed["nothing usable", 256].said == "every candidate failed"
    assert listed["noisy winner", 512].said == "MAD 12 %"
    assert listed["far from the limit", 2048].said.endswith("×")
    assert ("noisy winner", 1) not in listed and not any(why == "slower than the default" for why, _ in listed)
    slow = replace(found.panels[0].cells[0], gain=-0.25)
    worse = replace(found, panels=(replace(found.panels[0], cells=(slow,)),))
    assert next((each.why, each.said) for each in risks.risks(worse)) == ("slower than the default", "-25.0 %")
    many = [timing(problem(2**k), RING, None, **noisy) for k in range(12)]
    assert len([each for each in risks.risks(read(many)[0]) if each.why == "noisy winner"]) == risks.LISTED


def test_the_page_lists_risks_with_links_and_says_what_was_measured_elsewhere() -> None:
    with Store.memory() as store:
        store.put(rows())
        found = [(each, "x") for each in store.timings()], [(each, "x") for each in store.winners()]
    made = page(["x"], *found, here=H200.model_copy(update={"driver": "1"}))
    root = ET.fromstring(made)
    assert "5 of 5 measured problems answer as unverified here (NVIDIA H200, 1, 2.12.0, 3.9.0)" in made
    links = [str(link.get("href")) for link in root.iter(f"{HTML}a")]
    assert links and set(links) <= {f"#{each.get('id')}" for each in root.iter(f"{HTML}h3")}
    assert "unverified here" not in page(["x"], *found, here=H200) and "unverified here" not in page(["x"], *found)
    calm = read([timing(problem(1), RING, 200.0, is_default=True)])[1]
    assert "No winner is slower than its default" in calm


def test_a_models_time_is_that_of_all_its_layers() -> None:
    found, made = read(rows())
    assert found.panels[0].layers == 32
    assert "A pass through the model’s 32 MoE layers, by tokens: 6.40 ms at 1, 12.8 ms at 16, 25.9 ms at 64" in made
    assert read([timing(problem(1, experts=5), RING, 1.0)])[0].panels[0].layers == 0
    sort = {"op": "moe_sort", "dtype": "int32", "dims": {"block_m": 16}}
    assert names.layers(problem(1, **sort, experts=256, topk=8)) == 58
    assert names.layers(problem(1, **sort, experts=128, topk=8)) == 0  # two models have it
    assert set(names.LAYERS) == set(names.MODELS.values())


def test_what_is_below_the_limit_is_explained_where_it_stands() -> None:
    made = read([timing(problem(64), RING, 150.0), timing(problem(1), RING, 200.0)])[1]
    tile = made.split('class="tile"')[1]
    assert "× the limit" in tile and "below 1× fewer experts were active" in tile
    assert "(fewer experts active than it counts, or weights kept in caches)" in made
    assert "below 1×" not in read([timing(problem(64), RING, 700.0)])[1].split('class="tile"')[1]


def test_one_of_a_kind_is_singular() -> None:
    made = read([timing(problem(1, experts=1, topk=1), RING, 2000.0)])[1]
    assert "1 expert, top-1" in made and "1 problem as a table" in made
    assert not re.search(r"\b1 (experts|problems|timings|environments|SMs|candidates)\b", made)


# --- the limit ---


def test_the_limit_of_one_token_is_its_weights() -> None:
    moved = 2 * 3 * 4096 * 14336 * 2 + 2 * 4096 * 2  # two experts, three matrices, bf16; a row in, a row out
    assert limit_us(problem(1)) == pytest.approx(moved / (KNOWN["h200"].bandwidth_gbs * 1e3))
    assert limit_us(problem(1), "NVIDIA H100 80GB HBM3") == pytest.approx(moved / (KNOWN["h100"].bandwidth_gbs * 1e3))
    dims = {"hidden": 4096, "intermediate": 14336, "quant": "fp8_block"}
    assert limit_us(problem(1, dims=dims)) == pytest.approx((moved + 16384) / 2 / 4440e3)


def test_many_tokens_are_limited_by_flops() -> None:
    flops = 2 * 16384 * 2 * 3 * 4096 * 14336
    assert limit_us(problem(16384)) == pytest.approx(flops / (dict(KNOWN["h200"].peak_tflops)["bf16"] * 1e6))


def test_active_experts_stay_within_the_bucket() -> None:
    many = {"experts": 128, "topk": 8}
    assert active_experts(problem(1, **many)) == pytest.approx(8)
    assert active_experts(problem(4096, **many)) == pytest.approx(128)
    assert active_experts(problem(4096, routing="a1e2", **many)) == 43  # more than a third
    assert active_experts(problem(4096, routing="a2e3", **many)) == 8
    assert active_experts(problem(4096, routing="", **many)) == 8


def test_a_grouped_product_counts_gathered_rows_once_at_most() -> None:
    shape = {"op": "grouped_gemm", "topk": 1, "experts": 1}
    plain, weights = limit_us(problem(4, **shape)), 4096 * 14336 * 2
    assert plain == pytest.approx((weights + 4 * (4096 + 14336) * 2) / 4440e3)
    gathered = {"hidden": 4096, "intermediate": 14336, "gathered": 1}
    assert limit_us(problem(4, dims=gathered, **shape)) == pytest.approx((weights + 4 * 14336 * 2) / 4440e3)


@pytest.mark.parametrize(
    "changes",
    [
        {"op": "moe_sort"}, {"arch": "sm_100"}, {"units": 66}, {"dtype": "int8"}, {"dims": {}}, {"tokens": 0},
        {"dims": {"hidden": "x", "intermediate": 5}}, {"dims": {"hidden": -4, "intermediate": 5}},
        {"dims": {"hidden": 10**400, "intermediate": 5}}, {"dims": {"hidden": 4, "intermediate": 5, "quant": "int4"}},
        {"dims": {"hidden": 4, "intermediate": 5, "mapped": 1}}, {"vendor": "cpu"},
    ],
)  # fmt: skip
def test_no_limit_where_it_is_not_known(changes: dict[str, Any]) -> None:
    assert limit_us(problem(changes.pop("tokens", 16), **changes)) is None


# --- pictures ---


def named(root: ET.Element, label: str) -> ET.Element:
    return next(svg for svg in root.iter(f"{SVG}svg") if svg.get("aria-label", "").startswith(label))


def test_points_stand_where_their_figures_say() -> None:
    found, made = read(rows())
    picture = named(ET.fromstring(made), "multiples")
    lines = {str(line.get("data-name")): str(line.get("points")) for line in picture.iter(f"{SVG}polyline")}
    points = [tuple(map(float, pair.split(","))) for pair in lines["a0e0"].split()]
    middles = [layer.LEFT + layer.WIDEST * (column + 0.5) for column in (0, 1, 2)]  # 1, 16 and 64 tokens
    assert [x for x, _ in points] == pytest.approx(middles, abs=0.1)
    ratios = [cell.over for cell in found.panels[0].cells if cell.routing == "a0e0" and cell.over]
    line = next(line for line in picture.iter(f"{SVG}line") if line.get("class") == "limit")
    limit, high = float(str(line.get("y1"))) - layer.ABOVE, 1.05 * max(2.0, *ratios)
    heights = [limit * (1 - math.log(ratio) / math.log(high)) for ratio in ratios]  # the top is `high`, the line 1
    assert [y - layer.ABOVE for _, y in points] == pytest.approx(heights, abs=0.2)
    assert all(0 <= y - layer.ABOVE <= layer.HIGH for _, y in points)
    assert min(ratios) < 1 < max(ratios)  # so both sides of the line are seen


def test_the_grid_has_a_square_for_every_problem() -> None:
    picture = named(ET.fromstring(read(rows())[1]), "winner")
    squares = {str(g.get("transform")): [e.text or "" for e in g.iter(f"{SVG}text")] for g in picture.iter(f"{SVG}g")}
    x = [layer.LEFT + layer.WIDEST * column for column in range(4)]
    assert squares[f"translate({x[0]} 0)"] == ["ring", "200 µs", "+50 %"]  # the first column, the first routing
    assert squares[f"translate({x[1]} {layer.CELL_HIGH})"] == ["ring", "350 µs", "default"]
    assert squares[f"translate({x[2]} 0)"] == ["tiles", "808 µs", "default ="]
    assert squares[f"translate({x[3]} 0)"] == ["oom", "", ""] and len(squares) == 5
    kinds = [str(rect.get("class")) for rect in picture.iter(f"{SVG}rect")]
    assert kinds.count("failed") == 1 and len(set(kinds)) == 3
    dots = [str(dot.get("class")) for dot in named(ET.fromstring(read(rows())[1]), "multiples").iter(f"{SVG}circle")]
    assert sorted(f"{kind} dot" for kind in kinds if kind != "failed") == sorted(dots)  # one colour, one variant


def test_far_points_stand_at_the_top_with_their_figure() -> None:
    picture = named(ET.fromstring(read([*rows(), timing(problem(4, routing="a2e3"), RING, 9000.0)])[1]), "multiples")
    tops = {float(str(dot.get("cy"))) for dot in picture.iter(f"{SVG}circle")}
    over = 9000.0 / (limit_us(problem(4, routing="a2e3")) or 0)
    assert min(tops) == layer.ABOVE and f"↑ {digits(over, 2)}×" in "".join(picture.itertext())


def test_names_at_the_edge_neither_overlap_nor_leave_the_plot() -> None:
    assert layer._spread([20.0, 21.0, 60.0]) == [20.0, 33.0, 60.0]
    bottom = layer.ABOVE + layer.HIGH
    assert layer._spread([bottom - 2.0, bottom - 1.0]) == [bottom - layer.APART, bottom]


def test_bars_and_columns_are_to_scale() -> None:
    bars = ET.fromstring(overview.counts([("ok", 30), ("oom", 10)], "x"))
    long = [float(str(bar.get("width"))) for bar in bars.iter(f"{SVG}rect")]
    assert long[0] > 0 and long[0] == pytest.approx(3 * long[1], abs=0.2)
    asked = [timing(problem(16, routing=name), RING, 1.0) for name in ("a0e0", "a0e1", "a0e2")]
    found, _ = read([*asked, timing(problem(16), TILES, 0.5), timing(problem(2), TILES, 0.5)])
    picture = ET.fromstring(overview.columns(found.cells, ["ring", "tiles"]))
    parts = [(r.get("class"), float(str(r.get("height")))) for r in picture.iter(f"{SVG}rect") if r.get("rx") is None]
    high = overview.HIGH
    assert parts == [("c1 part", high), ("c0 part", pytest.approx(2 / 3 * high, abs=0.1)),
                     ("c1 part", pytest.approx(high / 3, abs=0.1))]  # fmt: skip
    tips = ["".join(title.itertext()) for title in picture.iter(f"{SVG}title")]
    assert tips == ["2 tokens: tiles wins 1 of 1", "16 tokens: ring wins 2 of 3", "16 tokens: tiles wins 1 of 3"]
    assert overview.columns([], []) == "" and overview.ratios([], "x", overview.times) == ""


def test_strips_have_their_dots_and_means_to_scale() -> None:
    picture = ET.fromstring(overview.ratios([("layer", "l0", [1.0, 4.0])], "x", overview.times))
    first, second = (float(str(dot.get("cx"))) for dot in picture.iter(f"{SVG}circle"))
    lines = {str(line.get("class")): float(str(line.get("x1"))) for line in picture.iter(f"{SVG}line")}
    assert lines["mean"] == pytest.approx((first + second) / 2, abs=0.1) and lines["limit"] == pytest.approx(first)
    said = ["".join(each.itertext()) for each in picture.iter(f"{SVG}text")]
    assert said[-1] == "2.00×" and {"1×", "2×", "4×"} < set(said)  # the geometric mean of 1 and 4
    shares = ET.fromstring(overview.percents([("layer", "l0", [0.0, 0.01, 0.05])], "x"))
    dots = [float(str(dot.get("cx"))) for dot in shares.iter(f"{SVG}circle")]
    assert (dots[1] - dots[0]) * 5 == pytest.approx(dots[2] - dots[0], abs=0.5)
    assert ["".join(each.itertext()) for each in shares.iter(f"{SVG}text")][-1] == "2 %"


def test_figures_have_sensible_digits() -> None:
    assert [duration(us) for us in (2.345678, 354.2, 999.7, 1098, 19036, 5e7)] == [
        "2.35 µs", "354 µs", "1.00 ms", "1.10 ms", "19.0 ms", "50.0 s",
    ]  # fmt: skip
    assert [digits(value, 4) for value in (0, 16039.42, 113.14, 0.01234)] == ["0", "16039", "113.1", "0.01234"]
    assert [faster(gain) for gain in (0.0, 0.004, 0.0649, 0.239, 1.266, -0.02)] == [
        "0 %", "+0.4 %", "+6.5 %", "+24 %", "2.27×", "-2.0 %",
    ]  # fmt: skip


# --- names ---


@pytest.mark.parametrize("file", sorted((Path(__file__).parent.parent / "examples/models").glob("*.json")), ids=str)
def test_published_models_are_recognised(file: Path) -> None:
    plain = "".join(filter(str.isalnum, file.stem)).lower()
    for tp, ep, more in ((1, 1, ""), (2, 1, "tp2"), (1, 2, "ep2")):
        (layer,) = read_model(file, tp=tp, ep=ep).layers
        dims = {"hidden": layer.hidden, "intermediate": layer.intermediate}
        said = names.model(problem(1, experts=layer.experts, topk=layer.topk, dims=dims))
        assert "".join(filter(str.isalnum, said)).lower() == plain + more
    up = {"hidden": layer.hidden, "intermediate": 2 * layer.intermediate, "gathered": 1}
    down = {"hidden": layer.intermediate, "intermediate": layer.hidden}
    parts = [problem(1, op="grouped_gemm", experts=layer.experts, topk=1, dims=dims) for dims in (up, down)]
    assert [names.model(part) for part in parts] == [f"{said}, gate and up", f"{said}, down"]


def test_layers_and_routings_in_words() -> None:
    sort = problem(16, op="moe_sort", experts=128, topk=8, dtype="int32", dims={"block_m": 16})
    assert names.title(sort) == "moe_sort, 128 experts, top-8 (Qwen3-30B-A3B, GLM-4.5-Air)"
    odd = problem(16, dims={"hidden": 100, "intermediate": 60, "quant": "fp8_block"})
    assert names.title(odd) == "fused_moe, 8 experts, top-2, 100 × 60, fp8_block"
    assert names.shape(odd).endswith("hidden 100, intermediate 60, quant fp8_block, bf16, sm_90, 132 SMs")
    assert names.shape(problem(1, vendor="cpu", units=1)).endswith("1 core")
    assert [names.routing(name) for name in ("a0e0", "a1e1", "a0e3", "a2e3", "any")] == [
        ("most active", "even"), ("half active", "even"), ("most active", "hot"), ("few active", "uneven"), (),
    ]  # fmt: skip


def test_sorting_is_one_layer_though_its_blocks_follow_the_tokens() -> None:
    small, large = (problem(t, op="moe_sort", dims={"block_m": b}) for t, b in ((1, 16), (4096, 128)))
    assert len(read([timing(small, RING, 1.0), timing(large, RING, 2.0)])[0].panels) == 1
    both = problem(1, op="moe_sort", dims={"block_m": 128})  # would stand in one square
    assert len(read([timing(small, RING, 1.0), timing(both, RING, 2.0)])[0].panels) == 2


# --- pages ---


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "x.html"
    told = draw(out, "--db", stored(tmp_path / "x.sqlite", rows()))
    made = out.read_text(encoding="utf-8")
    assert "8 timings of 1 cache file drawn in" in told and made.startswith("<!DOCTYPE html>")
    assert "prefers-color-scheme: dark" in made and "no memory left" in made and "2.12.0" in made
    addresses = set(re.findall(r"https?://[^\"'<> ]+", made))
    assert addresses <= {"http://www.w3.org/1999/xhtml", "http://www.w3.org/2000/svg"}
    assert not re.search(r"<script|<link|<img|src=|url\(|@import", made)
    root = ET.fromstring(made)
    heads = [["".join(cell.itertext()) for cell in table.iter(f"{HTML}th")] for table in root.iter(f"{HTML}table")]
    assert [head[0] for head in heads] == ["why", "tokens", "count", "timings"]
    assert made.index("<svg") < made.index("<table")
    inside = {cell for folded in root.iter(f"{HTML}details") for cell in folded.iter(f"{HTML}td")}
    assert len({cell for cell in root.iter(f"{HTML}td")} - inside) <= 20  # long tables are folded in


def shown(made: str) -> list[list[str]]:
    """The rows of a page's tables of winners."""
    tables = [
        table for table in ET.fromstring(made).iter(f"{HTML}table") if table.find(f".//{HTML}th").text == "tokens"
    ]
    lines = (line for table in tables for line in table.iter(f"{HTML}tr"))
    return [cells for line in lines if (cells := [str(cell.text) for cell in line.iter(f"{HTML}td")])]


def test_a_page_shows_what_the_shipped_file_holds(tmp_path: Path) -> None:
    draw(tmp_path / "x.html", "--db", SHIPPED)
    made = (tmp_path / "x.html").read_text()
    with Store.open(SHIPPED, readonly=True) as store:
        winners, tried = store.winners(), store.timings()
    held = {each.problem.id: each for each in winners}
    lines = {line[-2]: line for line in shown(made)}
    assert lines.keys() == held.keys() and len(lines) == len(winners) > 150
    for id, winner in held.items():
        tokens, us, gain, _, _, mad, _, routing, state, *_, config = lines[id]
        assert (int(tokens), routing, config) == (winner.problem.tokens, winner.problem.routing, winner.config.name)
        assert float(us) == pytest.approx(winner.median_us, rel=6e-4)
        assert float(mad) == pytest.approx(100 * winner.mad_us / winner.median_us, abs=0.051)
        if winner.margin is None:  # its default was not timed
            assert gain == "-"
        else:
            assert float(gain) == pytest.approx(100 * winner.margin, abs=0.051)
        assert state == ("tie" if winner.tied > 1 else "measured")
    tiles = [["".join(each.itertext()) for each in tile] for tile in ET.fromstring(made).iter(f"{HTML}div")
             if tile.get("class") == "tile"]  # fmt: skip
    gains = [math.log(1 + each.margin) for each in winners if each.margin is not None]
    best: dict[str, float] = {}
    for timing in tried:
        best[timing.problem.id] = min(timing.median_us or math.inf, best.get(timing.problem.id, math.inf))
    regrets = [each.median_us / best[each.problem.id] - 1 for each in winners]
    assert tiles[1][0] == f"{100 * (math.exp(sum(gains) / len(gains)) - 1):+.1f} %"
    assert tiles[2][0] == f"{100 * sum(regrets) / len(regrets):.2g} % regret"
    each = f"{len(tried) / len(winners):.1f}"
    assert tiles[3] == [f"{len(winners)} problems", f"measured, by {len(tried)} timings of {each} candidates each"]
    assert "NVIDIA H100" in made and "Qwen3-30B-A3B" in made and "DeepSeek-V3 TP 8" in made


def test_predictions_are_drawn_as_predictions(tmp_path: Path) -> None:
    with Store.open(tmp_path / "x.sqlite") as store:
        store.put(rows())
        store.predict([guess(problem(1), 1.0), guess(problem(512), 1234.0), guess(problem(512), 999.0, "NVIDIA H100")])
        store.want(problem(9))
        timings = [(each, "x") for each in store.timings()]
        winners = [(each, "x") for each in store.winners()]
        report = figures(["x"], timings, winners, [(each, "x") for each in store.predictions()], wanted=1)
    assert dict(report.states) == {"measured": 3, "tie": 1, "failures": 1, "predicted": 2, "wanted": 1}
    guessed = [panel for panel in report.panels if panel.predicted]
    assert {panel.device: [cell.us for cell in panel.cells] for panel in guessed} == {
        "NVIDIA H200": [1234.0], "NVIDIA H100": [999.0],
    }  # fmt: skip
    over = {panel.device: panel.shares("over")[0] for panel in guessed}
    assert over["NVIDIA H200"] == pytest.approx(1234.0 / limit_us(problem(512), "NVIDIA H200"))  # type: ignore[operator]
    assert len(report.shares("gain")) == 4 and 2 not in {len(panel.shares("gain")) for panel in guessed}
    told = draw(tmp_path / "x.html", "--db", tmp_path / "x.sqlite")
    made = (tmp_path / "x.html").read_text()
    assert "8 timings and 3 predictions of 1 cache file" in told and ET.fromstring(made) is not None
    assert "nobody has measured these problems" in made and "met, not measured yet" in made
    assert {line[1] for line in shown(made) if line[8] == "predicted"} == {"1234", "999.0"}


def test_the_limit_in_front_counts_only_where_it_is_close() -> None:
    idle = [timing(problem(64, routing=name), RING, 900.0) for name in ("a1e1", "a2e3", "")]
    found, made = read([*rows(), *idle])
    assert len(found.shares("over")) == 7 and len(found.shares("close")) == 3
    assert "geometric mean of 3 problems with most experts active" in made


def test_many_layers_are_folded_and_many_variants_keep_their_colour() -> None:
    asked = [timing(problem(1, dims={"hidden": 64 * k, "intermediate": 64}), RING, 1.0) for k in range(1, 21)]
    root = ET.fromstring(read(asked)[1])
    layers = [each for each in root.iter(f"{HTML}details") if each.get("class") == "layer"]
    assert len(layers) == 20 and not any(layer.get("open") for layer in layers)
    anchors = {str(link.get("href")) for link in root.iter(f"{SVG}a")}
    assert anchors == {f"#{each.get('id')}" for each in root.iter(f"{HTML}h3")}
    variants = [timing(problem(2**k), config(f"v{k:02}"), 1.0) for k in range(10)]
    squares = named(ET.fromstring(read(variants)[1]), "winner").iter(f"{SVG}rect")
    assert len({square.get("class") for square in squares}) == 10
    several = ET.fromstring(read(rows())[1])
    assert [each.get("open") for each in several.iter(f"{HTML}details") if each.get("class") == "layer"] == ["open"]


def test_an_empty_file_has_a_page_and_empty_filters_say_so(tmp_path: Path) -> None:
    db = stored(tmp_path / "x.sqlite", [])
    draw(tmp_path / "x.html", "--db", db)
    made = (tmp_path / "x.html").read_text()
    assert "Nothing is stored" in made and ET.fromstring(made) is not None
    assert "no op moe_sort, stored are none" in draw(tmp_path / "y.html", "--db", db, "op=moe_sort", code=1)
    assert not (tmp_path / "y.html").exists()
    ET.fromstring(page([], [], []))


def test_filters_choose_what_is_drawn(tmp_path: Path) -> None:
    db = stored(tmp_path / "x.sqlite", [*rows(), timing(problem(16, op="my_op", dtype="", dims={}), RING, 5.0)])
    assert "1 timing of" in draw(tmp_path / "x.html", "op=my_op", "--db", db)
    made = (tmp_path / "x.html").read_text()
    assert "my_op" in made and "fused_moe" not in made and "Time over the limit" not in made
    assert "3 timings of" in draw(tmp_path / "x.html", "tokens=16", "--db", db)


def test_a_strangers_texts_are_only_text() -> None:
    where = Environment(device_name=EVIL, driver=EVIL)
    odd = problem(0, dims={"hidden": 10**300, "intermediate": 1}, routing="any:thing-" * 40)
    _, made = read([
        timing(odd, RING, 5.0, where),
        timing(odd, TILES, 1e300, where, is_default=True),
        timing(problem(1), RING, None, where, status="raised", reason=EVIL * 500),
        timing(problem(1 << 62), RING, 1e-300, where, is_default=True),
    ])  # fmt: skip
    root = ET.fromstring(made)
    assert "<script" not in made and not list(root.iter(f"{HTML}script")) and len(made) < 60_000
    assert not re.search("[\x00\x1b\u202e]", made)
    assert any("<script>alert('x')</script>&\"" in str(cell.text) for cell in root.iter(f"{HTML}td"))
    ET.fromstring(f"<p a='{text(EVIL)}' b=\"{text(EVIL)}\">{text(EVIL)}\ud83d</p>".replace("\ud83d", text("\ud83d")))


@pytest.mark.parametrize("us", [9e999, 1e308, 5e-324])
def test_times_that_cannot_be_are_left_out(tmp_path: Path, us: float) -> None:
    db = stored(tmp_path / "x.sqlite", rows())
    with sqlite3.connect(db) as connection:
        connection.execute("UPDATE timing SET median_us = ? WHERE status = 'ok' AND is_default", [us])
        connection.execute("UPDATE problem SET dtype = '<b>' WHERE tokens = 1")
        connection.execute("UPDATE environment SET device_name = '</style><script>'")
    draw(tmp_path / "x.html", "--db", db)
    made = (tmp_path / "x.html").read_text()
    assert ET.fromstring(made) is not None and "<script" not in made and not re.search(r"\b(inf|nan)\b", made)


def test_wrong_calls_are_one_line(tmp_path: Path) -> None:
    db = stored(tmp_path / "x.sqlite", rows())
    before = db.read_bytes()
    told = draw(db, "--db", db, code=2)
    assert "'.sqlite'; allowed are .html, .htm" in told and len(told.splitlines()) == 1 and db.read_bytes() == before
    assert "no tokens many, stored" in draw(tmp_path / "x.html", "tokens=many", "--db", db, code=1)
    assert "No such file" in draw(tmp_path / "no" / "x.html", "--db", db, code=1)
    assert "none.sqlite" in draw(tmp_path / "x.html", "--db", tmp_path / "none.sqlite", code=1)
    assert not (tmp_path / "x.html").exists()
