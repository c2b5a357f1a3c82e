"""The page of a cache file: well-formed whatever is stored, figures right, points where they belong."""

import math
import re
import sqlite3
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moecache.cli import app
from moecache.report import page
from moecache.report.figures import Report, figures
from moecache.report.limit import active_experts, limit_us
from moecache.report.pictures import HIGH, LEFT, WIDE, counts, duration, octave, ranked, text
from moecache.schemas.config import Config, config
from moecache.schemas.device import KNOWN
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing
from moecache.store import Store

HTML, SVG = "{http://www.w3.org/1999/xhtml}", "{http://www.w3.org/2000/svg}"
H200 = Environment(device_name="NVIDIA H200", driver="580.1", torch="2.12.0", triton="3.9.0")
RING, TILES = config("ring", block=16), config("tiles", block=32)
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
    twice = [(timing(asked, RING, 1.0), "a"), (timing(asked, RING, 1.0), "b")]
    assert len(figures(["a", "b"], twice, []).panels) == 2


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
    assert [x for x, _ in points] == pytest.approx([LEFT, LEFT + WIDE * 4 / 6, LEFT + WIDE], abs=0.1)  # 1, 16, 64
    ratios = [cell.over for cell in found.panels[0].cells if cell.routing == "a0e0" and cell.over]
    line = next(line for line in picture.iter(f"{SVG}line") if line.get("class") == "limit")
    limit, high = float(str(line.get("y1"))), 1.05 * max(2.0, *ratios)
    heights = [limit * (1 - math.log(ratio) / math.log(high)) for ratio in ratios]  # the top is `high`, the line 1
    assert [y for _, y in points] == pytest.approx(heights, abs=0.2) and all(0 <= y <= HIGH for _, y in points)
    assert min(ratios) < 1 < max(ratios)  # so both sides of the line are seen


def test_the_grid_has_a_square_for_every_problem() -> None:
    picture = named(ET.fromstring(read(rows())[1]), "winner")
    squares = {str(g.get("transform")): [str(e.text) for e in g.iter(f"{SVG}text")] for g in picture.iter(f"{SVG}g")}
    assert squares["translate(64 0)"] == ["ring", "200 µs"]  # the first column, the first routing
    assert squares["translate(148 34)"] == ["ring", "350 µs"]
    assert squares["translate(232 0)"] == ["tiles", "808 µs ="]
    assert squares["translate(316 0)"][0] == "oom" and len(squares) == 5
    kinds = [str(rect.get("class")) for rect in picture.iter(f"{SVG}rect")]
    assert kinds.count("failed") == 1 and len(set(kinds)) == 3


def test_bars_and_areas_are_to_scale() -> None:
    bars = ET.fromstring(counts([("ok", 30), ("oom", 10)], "x"))
    long = [float(str(bar.get("width"))) for bar in bars.iter(f"{SVG}rect")]
    assert long == pytest.approx([WIDE - LEFT, (WIDE - LEFT) / 3], abs=0.1)
    area = ET.fromstring(ranked([0.0, 0.5, 1.0], "x")).find(f"{SVG}polygon")
    assert area is not None
    heights = [float(pair.split(",")[1]) for pair in str(area.get("points")).split()]
    assert heights == pytest.approx([HIGH, 6, 6, *[(HIGH + 6) / 2] * 2, HIGH, HIGH, HIGH], abs=0.1)
    assert ranked([], "x") == "" and [octave(t) for t in (0, 1, 2, 1024)] == [0, 1, 2, 11]
    assert [duration(us) for us in (2.345678, 9876, 19036, 5e7)] == ["2.346 µs", "9876 µs", "19.04 ms", "50 s"]


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
    assert [head[0] for head in heads] == ["count", "timings", "tokens"]
    assert made.index("<svg") < made.index("<table")


def test_an_empty_file_and_empty_filters_have_a_page(tmp_path: Path) -> None:
    db = stored(tmp_path / "x.sqlite", [])
    for filters in ([], ["--op", "moe_sort"]):
        draw(tmp_path / "x.html", "--db", db, *filters)
        made = (tmp_path / "x.html").read_text()
        assert "Nothing is stored" in made and ET.fromstring(made) is not None
    ET.fromstring(page([], [], []))


def test_filters_choose_what_is_drawn(tmp_path: Path) -> None:
    db = stored(tmp_path / "x.sqlite", [*rows(), timing(problem(16, op="my_op", dtype="", dims={}), RING, 5.0)])
    assert "1 timing of" in draw(tmp_path / "x.html", "--op", "my_op", "--db", db)
    made = (tmp_path / "x.html").read_text()
    assert "my_op" in made and "fused_moe" not in made and "Multiples" not in made
    assert "3 timings of" in draw(tmp_path / "x.html", "--tokens", "16", "--db", db)


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
    assert "'many' is no list of whole numbers" in draw(tmp_path / "x.html", "--tokens", "many", "--db", db, code=2)
    assert "No such file" in draw(tmp_path / "no" / "x.html", "--db", db, code=1)
    assert "none.sqlite" in draw(tmp_path / "x.html", "--db", tmp_path / "none.sqlite", code=1)
    assert not (tmp_path / "x.html").exists()
