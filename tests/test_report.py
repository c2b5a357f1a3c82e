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
from moecache.report import Panel, duration, page, panels, text
from moecache.report.limit import active_experts, limit_us
from moecache.schemas.config import Config, config
from moecache.schemas.device import KNOWN
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Prediction, Timing
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


def read(timings: Sequence[Timing]) -> tuple[list[Panel], str]:
    with Store.memory() as store:
        store.put(timings)
        found = [(each, "x.sqlite") for each in store.timings()], [(each, "x.sqlite") for each in store.winners()]
        return panels(*found), page(["x.sqlite"], *found)


def guess(asked: Problem, us: float, device: str = "NVIDIA H200") -> Prediction:
    return Prediction(problem=asked, device=device, config=RING, predicted_us=us)


def draw(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["report", *map(str, arguments)], prog_name="moecache")
    assert done.exit_code == code, done.output
    return done.output


# --- what is on a page ---


def test_squares_of_a_filled_file() -> None:
    (panel,), _ = read(rows())
    assert panel.tokens == [1, 16, 64, 256] and panel.routings == ["a0e0", "a1e2"]
    (best,), (tie,), (failed,) = (panel.at(tokens, "a0e0") for tokens in (1, 64, 256))
    assert (best.variant, best.us, best.told) == ("ring", 200.0, "+50.0 %") and best.gain == pytest.approx(0.5)
    assert tie.default and tie.state == "tie" and (tie.variant, tie.told) == ("tiles", "default =")
    assert failed.us is None and failed.state == "oom" and panel.at(1, "a1e2") == []
    assert best.over == pytest.approx(200.0 / limit_us(problem(1)))  # type: ignore[operator]
    assert best.tip == f"{RING.name}; measured; {best.over:.3g} × the limit; " + best.tip.rpartition("limit; ")[2]


def test_layers_environments_and_files_are_kept_apart() -> None:
    other = H200.model_copy(update={"driver": "1"})
    asked = problem(1)
    wide, new = problem(1, dims={"hidden": 64, "intermediate": 64}), problem(1, source="new")
    found, _ = read([timing(asked, RING, 1.0), timing(wide, RING, 2.0), timing(new, RING, 3.0),
                     timing(asked, RING, 4.0, other)])  # fmt: skip
    assert sorted(cell.us or 0 for panel in found for cell in panel.cells) == [1.0, 2.0, 3.0, 4.0]
    assert len({(panel.title, panel.origin) for panel in found}) == len(found) == 4
    assert any("hidden 64, intermediate 64" in panel.title for panel in found)
    twice = [(timing(asked, RING, 1.0), "a"), (timing(asked, RING, 1.0), "b")]
    assert len(panels(twice, [])) == 2


def test_sorting_is_one_layer_though_its_blocks_follow_the_tokens() -> None:
    asked = [problem(1, op="moe_sort", dims={"block_m": block}) for block in (16, 128)]
    (panel,), _ = read([timing(each, RING, 1.0) for each in asked])
    assert len(panel.at(1, "a0e0")) == 2


def test_a_page_says_what_was_measured_elsewhere() -> None:
    with Store.memory() as store:
        store.put(rows())
        found = [(each, "x") for each in store.timings()], [(each, "x") for each in store.winners()]
    made = page(["x"], *found, here=H200.model_copy(update={"driver": "1"}))
    assert "5 of the measured problems answer as unverified here" in made
    assert "unverified here" not in page(["x"], *found, here=H200) and "unverified here" not in page(["x"], *found)


@pytest.mark.parametrize(("us", "said"), [(0.123, "0.12 µs"), (9.996, "10.0 µs"), (123.4, "123 µs"), (1234, "1.23 ms")])
def test_durations(us: float, said: str) -> None:
    assert duration(us) == said


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


# --- pages ---


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "x.html"
    told = draw(out, "--db", stored(tmp_path / "x.sqlite", rows()))
    made = out.read_text(encoding="utf-8")
    assert "8 timings of 1 cache file drawn in" in told and made.startswith("<!DOCTYPE html>")
    assert "no memory left" in made and "2.12.0" in made
    assert set(re.findall(r"https?://[^\"'<> ]+", made)) <= {"http://www.w3.org/1999/xhtml"}
    assert not re.search(r"<script|<link|<img|src=|url\(|@import", made)
    heads = [table.find(f".//{HTML}th").text for table in ET.fromstring(made).iter(f"{HTML}table")]  # type: ignore[union-attr]
    assert heads == ["tokens", "count", "timings"]


def shown(made: str) -> dict[str, list[str]]:
    """The squares of a page by the id of their problem."""
    squares = [div for div in ET.fromstring(made).iter(f"{HTML}div") if div.get("title")]
    return {str(div.get("title")).rpartition("; ")[2]: [str(div.get("class")), *div.itertext()] for div in squares}


def test_a_page_shows_what_the_shipped_file_holds(tmp_path: Path) -> None:
    draw(tmp_path / "x.html", "--db", SHIPPED)
    made = (tmp_path / "x.html").read_text()
    with Store.open(SHIPPED, readonly=True) as store:
        winners, tried = store.winners(), store.timings()
    squares = shown(made)
    assert squares.keys() == {each.problem.id for each in winners} and len(winners) > 150
    for winner in winners:
        kind, variant, us, *_ = squares[winner.problem.id]
        assert variant == winner.config.variant and us == duration(winner.median_us)
        assert kind.endswith("tie" if winner.tied > 1 else "measured")
    gains = [math.log(1 + each.margin) for each in winners if each.margin is not None]
    assert f"<p>{100 * (math.exp(sum(gains) / len(gains)) - 1):+.1f} % over the static default" in made
    assert f"<p>{len(winners)} problems measured, by {len(tried)} timings</p>" in made and "NVIDIA H100" in made


def test_predictions_are_drawn_as_predictions(tmp_path: Path) -> None:
    with Store.open(tmp_path / "x.sqlite") as store:
        store.put(rows())
        store.predict([guess(problem(1), 1.0), guess(problem(512), 1234.0), guess(problem(512), 999.0, "NVIDIA H100")])
        store.want([problem(9)])
        timings, winners = [(each, "x") for each in store.timings()], [(each, "x") for each in store.winners()]
        found = panels(timings, winners, [(each, "x") for each in store.predictions()])
    guessed = {panel.origin: cell for panel in found for cell in panel.cells if cell.state == "predicted"}
    assert {origin: cell.us for origin, cell in guessed.items()} == {
        "predicted for NVIDIA H200, x": 1234.0, "predicted for NVIDIA H100, x": 999.0,
    }  # fmt: skip
    (over,) = (cell.over for cell in guessed.values() if cell.us == 1234.0)
    assert over == pytest.approx(1234.0 / limit_us(problem(512), "NVIDIA H200"))  # type: ignore[operator]
    told = draw(tmp_path / "x.html", "--db", tmp_path / "x.sqlite")
    made = (tmp_path / "x.html").read_text()
    assert "8 timings and 3 predictions of 1 cache file" in told
    assert "2 problems only predicted: nobody has measured them" in made and "1 problem met, not measured yet" in made
    assert made.count('predicted" title=') == 2 and "999 µs" in made and "1.23 ms" in made


def test_the_limit_in_front_counts_only_where_it_is_close() -> None:
    idle = [timing(problem(64, routing=name), RING, 900.0) for name in ("a1e1", "a2e3", "")]
    assert "geometric mean of 3 problems with most experts active" in read([*rows(), *idle])[1]


def test_many_layers_are_folded_and_variants_have_colours() -> None:
    asked = [timing(problem(1, dims={"hidden": 64 * k, "intermediate": 64}), RING, 1.0) for k in range(1, 21)]
    layers = list(ET.fromstring(read(asked)[1]).iter(f"{HTML}details"))
    assert len(layers) == 20 and not any(layer.get("open") for layer in layers)
    squares = shown(read([timing(problem(2**k), config(f"v{k:02}"), 1.0) for k in range(8)])[1])
    assert len({kind for kind, *_ in squares.values()}) == 8


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
    assert "my_op" in made and "fused_moe" not in made
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
    assert "'many' is no whole number" in draw(tmp_path / "x.html", "tokens=many", "--db", db, code=2)
    assert "No such file" in draw(tmp_path / "no" / "x.html", "--db", db, code=1)
    assert "none.sqlite" in draw(tmp_path / "x.html", "--db", tmp_path / "none.sqlite", code=1)
    assert not (tmp_path / "x.html").exists()
