"""The picture of fused MoE: well-formed, every peer named, every point where its figure belongs."""

import importlib.util
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_picture", ROOT / "docs" / "make_picture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


picture = load()


def row(shape: str, tokens: int, routing: str, limit: float, **us: float | None) -> dict[str, Any]:
    return {
        "shape": shape, "E": 8, "topk": 2, "hidden": 64, "intermediate": 32, "T": tokens, "routing": routing,
        "limit_us": limit, "us": us,
    }  # fmt: skip


RESULT = {
    "device": "Some <GPU> & more",
    "rows": [
        row("a", 1, "uniform", 10, ours=20, vllm=40, early=30),
        row("a", 1, "zipf", 10, ours=20, vllm=10, early=30),
        row("a", 16, "uniform", 10, ours=10, vllm=15, early=None),
        row("a", 16, "zipf", 10, ours=10, vllm=15),
        row("a", 256, "uniform", 10, ours=40, vllm=20),
        row("b", 1, "uniform", 50, ours=51, **{"odd <name>": 100}),
        row("b", 256, "uniform", 50, ours=52, **{"odd <name>": 5000}),
    ],
}


def panels(text: str) -> dict[str, ET.Element]:
    return {
        group.attrib["data-shape"]: group
        for group in ET.fromstring(text).iter(f"{SVG}g")
        if "data-shape" in group.attrib
    }


def points(panel: ET.Element, name: str) -> list[tuple[float, float]]:
    line = next(line for line in panel.iter(f"{SVG}polyline") if line.attrib["data-name"] == name)
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]


def texts(panel: ET.Element) -> list[str]:
    return [text.text or "" for text in panel.iter(f"{SVG}text")]


def test_it_is_well_formed_and_names_every_peer_in_its_panel() -> None:
    found = panels(picture.draw(RESULT))
    assert set(found) == {"a", "b"}
    assert {"moecache", "vLLM", "early"} <= set(texts(found["a"])) and "odd <name>" not in texts(found["a"])
    assert {"moecache", "odd <name>"} <= set(texts(found["b"]))
    assert any("8 experts, top-2, 64 × 32" in text for text in texts(found["a"]))
    whole = " ".join(ET.fromstring(picture.draw(RESULT)).itertext())
    assert "Some <GPU> & more" in whole and "uniform and zipf" in whole and "leave the top are above 4" in whole
    assert "prefers-color-scheme: dark" in whole


def test_points_stand_at_the_geometric_mean_on_a_logarithmic_axis() -> None:
    panel = panels(picture.draw(RESULT))["a"]
    ticks = {t.text: float(t.attrib["y"]) - 4 for t in panel.iter(f"{SVG}text") if t.attrib.get("class") == "end"}
    one, two, four = ticks["1"], ticks["2"], ticks["4"]
    assert one > two > four == pytest.approx(0, abs=0.1) and one - two == pytest.approx(two - four, abs=0.11)
    limit = next(line for line in panel.iter(f"{SVG}line") if line.attrib["class"] == "limit")
    assert float(limit.attrib["y1"]) == float(limit.attrib["y2"]) == one
    assert [y for _, y in points(panel, "ours")] == pytest.approx([two, one, four], abs=0.11)
    between = one - (one - two) * math.log2(1.5)
    assert [y for _, y in points(panel, "vllm")] == pytest.approx([two, between, two], abs=0.11), "mean of 4 and 1 is 2"
    assert [x for x, _ in points(panel, "ours")] == [0, picture.WIDE / 2, picture.WIDE], "log2 of 1, 16, 256"
    assert points(panel, "early") == [(0, pytest.approx(one - (one - two) * math.log2(3), abs=0.11))]


def test_a_label_stands_at_the_end_of_its_line() -> None:
    panel = panels(picture.draw(RESULT))["a"]
    labels = {t.text: (float(t.get("x", 0)), float(t.attrib["y"])) for t in panel.iter(f"{SVG}text")}
    for name, full in (("ours", "moecache"), ("vllm", "vLLM")):
        assert labels[full][0] > picture.WIDE and labels[full][1] - 4 == pytest.approx(
            points(panel, name)[-1][1], abs=0.1
        )
    (x, y) = points(panel, "early")[-1]
    assert labels["early"] == (x, pytest.approx(y - 6, abs=0.1)), "a line that ends early is named where it ends"


@pytest.mark.parametrize(
    "wanted, placed",
    [
        ([50, 10, 90], [50, 10, 90]),
        ([50, 50, 50], [38, 50, 62]),
        ([0, 0], [0, 12]),
        ([100, 99, 100], [88, 76, 100]),
        ([20, 30, 10], [20, 32, 8]),
        ([], []),
    ],
)
def test_labels_keep_apart_and_inside(wanted: list[float], placed: list[float]) -> None:
    assert picture.spread(wanted, 12, 100) == pytest.approx(placed)


def test_it_is_written_checked_and_left_alone_without_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(picture, "RESULT", tmp_path / "fused_moe.json")
    monkeypatch.setattr(picture, "PICTURE", tmp_path / "fused_moe.svg")
    assert picture.main([]) == picture.main(["--check"]) == 0 and not picture.PICTURE.exists()
    picture.RESULT.write_text(json.dumps(RESULT))
    assert picture.main(["--check"]) == 1 and "stale" in capsys.readouterr().err
    assert picture.main([]) == picture.main(["--check"]) == 0 and picture.PICTURE.read_text() == picture.draw(RESULT)
    picture.RESULT.write_text(json.dumps(RESULT | {"device": "another"}))
    assert picture.main(["--check"]) == 1
