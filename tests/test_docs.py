"""The documentation says what is: tables come from the result files, links, commands, settings and code hold."""

import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import programs

from moecache.settings import Settings, duration

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(p for room in ("docs", "benchmarks", "examples") for p in (ROOT / room).rglob("*.md"))]
)
README = (ROOT / "README.md").read_text()


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "docs" / "make_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load()


def body(page: str, name: str) -> str:
    return next(str(found[0]) for found in tables.BLOCK.finditer(page) if found["name"] == name)


def row(experts: int, tokens: int, oneshot: float | None, multiphase: float | None, **more: Any) -> dict[str, Any]:
    times = {"oneshot": oneshot, "multiphase": multiphase, "auto": 2.5, "vllm": 12.25}
    return {
        "E": experts, "topk": 8, "T": tokens, "routing": "uniform", "block_m": 16, "us": times,
        "mad_us": {name: 0.125 for name, us in times.items() if us is not None}, "bucket": "a0e0",
        "auto_config": "oneshot(num_warps=4)", "tier": "measured",
    } | more  # fmt: skip


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    summary = {
        "cells": len(rows), "auto_over_better_path_max": 0.031, "auto_over_better_path_mean": 0.004,
        "cells_over_3_percent": 1, "auto_over_vllm_geomean": 0.55, "auto_over_vllm_max": 1.25,
        "cells_slower_than_vllm": 3,
    }  # fmt: skip
    return {
        "device": "Some GPU", "environment": {"driver": "1.2", "torch": "3.4", "triton": "5.6"}, "commit": "abc1234",
        "date": "2026-01-02T03:04:05+00:00", "command": "python x.py", "summary": summary,
        "peers": {"vllm": "7.8"}, "rows": rows,
    }  # fmt: skip


# --- tables ---


def test_the_tables_are_fresh_and_every_one_has_a_place() -> None:
    placed = []
    for name in tables.PAGES:
        page = (ROOT / name).read_text()
        assert tables.fill(page) == page, f"{name} is stale: run python docs/make_tables.py"
        placed += [found["name"] for found in tables.BLOCK.finditer(page)]
        assert page.count("<!-- table") == page.count("<!-- end of table -->") == len(tables.BLOCK.findall(page))
    assert sorted(placed) == sorted(tables.TABLES)
    assert not [p for p in PAGES if "<!-- table" in p.read_text() and str(p.relative_to(ROOT)) not in tables.PAGES]


def test_a_stale_page_is_told_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGES", ("page.md",))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table hit: x -->\nstale words\n<!-- end of table -->\nafter\n")
    assert tables.main(["--check"]) == 1 and "page.md" in capsys.readouterr().err
    assert "stale words" in page.read_text()
    assert tables.main([]) == 0 and tables.main(["--check"]) == 0
    mended = page.read_text()
    assert mended.startswith("before\n") and mended.endswith("after\n") and "stale words" not in mended


def test_without_a_result_file_it_says_so(tmp_path: Path) -> None:
    page = tables.fill((ROOT / "docs" / "sorting.md").read_text(), tmp_path)
    for name in ("goals", "crossover", "paths"):
        text = body(page, name)
        assert "Not measured yet" in text and "benchmarks/results/h200/moe_sort.json" in text and "|" not in text


def test_the_readme_table_shows_the_uniform_rows() -> None:
    rows = [row(8, 1, 1, 2), row(8, 64, 1, 2), row(8, 2, 1, 2), row(512, 64, 1, 2, us={"auto": 0.987, "vllm": None})]
    rows.append(row(8, 1, 1, 2, routing="zipf", us={"auto": 77, "vllm": 88}))
    lines = tables.vllm(result(rows)).splitlines()
    assert lines[0] == "| experts | T=1 | T=64 |"
    assert lines[2:4] == ["| 8, top-8 | 2.50 / 12.2 | 2.50 / 12.2 |", "| 512, top-8 | – | 0.99 / – |"]
    assert "0.55× vLLM's time" in lines[-1] and "1.25×; 3 of 5 are slower" in lines[-1]
    assert (
        "Some GPU, driver 1.2, torch 3.4, Triton 5.6, vLLM (7.8); commit abc1234, 2026-01-02, `python x.py`"
        in lines[-1]
    )


@pytest.mark.parametrize(
    "cells, tokens",
    [
        ([(1, 2.0, 3.0), (2, 3.0, 2.0), (4, 9.0, 2.0)], 2),
        ([(1, 3.0, 2.0), (2, 2.0, 3.0), (4, None, 2.0)], 4),  # one lucky cell is no crossover
        ([(1, 2.0, 3.0), (2, None, 3.0), (4, 2.0, 3.0)], None),  # nor is a gap
        ([(1, 2.0, 3.0), (2, 2.0, 2.0)], None),  # a tie stays with one launch
        ([(2, None, 2.0), (1, 2.0, None)], 2),
    ],
)
def test_the_crossover_is_where_multiphase_begins_to_stay_ahead(cells: list[Any], tokens: int | None) -> None:
    rows = [row(64, *cell) for cell in cells]
    found = tables.first_multiphase(rows)
    assert (found and found["T"]) == tokens
    line = tables.crossover(result(rows)).splitlines()[-1]
    told = f"above {max(t for t, _, _ in cells)}" if tokens is None else str(tokens)
    assert line.startswith(f"| 64 | 8 | uniform | {told} |")


def test_goals_are_judged() -> None:
    data = result([row(8, 1, 1, 2)])
    verdicts = [line.split("|")[3].strip() for line in tables.goals(data).splitlines()[2:5]]
    assert verdicts == ["missed", "missed", "met"]
    data["summary"] |= {"auto_over_better_path_max": 0.03, "cells_slower_than_vllm": 0, "auto_over_vllm_geomean": 0.551}
    verdicts = [line.split("|")[3].strip() for line in tables.goals(data).splitlines()[2:5]]
    assert verdicts == ["met", "met", "missed"]


def test_every_cell_has_its_spread() -> None:
    text = tables.paths(result([row(8, 1, 1.5, None), row(64, 2, 1.5, 4.0)]))
    assert text.count("**") == 4 and text.count("| 1.500 ± 0.125 |") == 2
    assert "| 1 | uniform | 16 | 1.500 ± 0.125 | – | 2.500 ± 0.125 | 12.250 ± 0.125 | oneshot |" in text


def measured() -> dict[str, Any]:
    file = ROOT / "benchmarks" / "results" / "h200" / "moe_sort.json"
    if not file.exists():
        pytest.skip("not measured yet")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_the_measured_summary_is_that_of_its_rows() -> None:
    data = measured()
    times = [cell["us"] for cell in data["rows"]]
    better = [us["auto"] / min(us[path] for path in ("oneshot", "multiphase") if us[path]) - 1 for us in times]
    gains = [us["auto"] / us["vllm"] for us in times]
    assert data["summary"] == {
        "cells": len(times),
        "auto_over_better_path_max": pytest.approx(max(better), abs=1e-4),
        "auto_over_better_path_mean": pytest.approx(sum(better) / len(better), abs=1e-4),
        "cells_over_3_percent": sum(over > 0.03 for over in better),
        "auto_over_vllm_geomean": pytest.approx(math.exp(sum(map(math.log, gains)) / len(gains)), abs=1e-4),
        "auto_over_vllm_max": pytest.approx(max(gains), abs=1e-4),
        "cells_slower_than_vllm": sum(gain > 1 for gain in gains),
    }


def test_the_readme_shows_what_was_measured() -> None:
    lines = [line.strip("| ").split(" | ") for line in body(README, "vllm").splitlines() if line.startswith("| ")]
    shown = {}
    for experts, *cells in lines[2:]:
        for title, cell in zip(lines[0][1:], cells, strict=True):
            shown[int(experts.split(",")[0]), int(title.removeprefix("T="))] = [float(us) for us in cell.split(" / ")]
    times = {(r["E"], r["T"]): r["us"] for r in measured()["rows"] if r["routing"] == "uniform"}
    assert len(shown) == len({e for e, _ in times}) * len(tables.README_TOKENS)
    for asked, (ours, theirs) in shown.items():
        assert ours == pytest.approx(times[asked]["auto"], abs=0.051)
        assert theirs == pytest.approx(times[asked]["vllm"], abs=0.051)


# --- links, commands, settings, rooms ---


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_every_relative_link_leads_somewhere() -> None:
    links = [(p, link) for p in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", p.read_text()) if ":" not in link]
    assert len(links) > 20
    for page, link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def code(page: Path) -> str:
    """What stands in code: fenced blocks, then spans."""
    parts = re.split(r"^```.*\n", page.read_text(), flags=re.MULTILINE)
    return "\n".join([*parts[1::2], *re.findall(r"`([^`\n]+)`", "\n".join(parts[::2]))])


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for page in PAGES for target in re.findall(r"\bmake ([a-z][a-z-]*)", code(page))}
    assert {"demo", "test"} <= named <= targets, named - targets


def test_what_is_sanitized_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    words = re.findall(r"^SANITIZED := (.*)$", makefile, re.MULTILINE)[0].split(" or ")
    files = re.findall(r"tests/\w+\.py", makefile[makefile.index("\nsanitize:") :])
    tests = {file: re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE) for file in files}
    assert len(files) == 4 and all(any(word in test for test in tests[file] for word in words) for file in files)
    assert all(any(word in test for names in tests.values() for test in names) for word in words)


def test_every_command_has_the_options_that_the_pages_give_it() -> None:
    reference = (ROOT / "docs" / "cli.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", reference, re.DOTALL | re.MULTILINE))
    text = "\n".join(code(page) for page in PAGES if page.name != "cli.md")
    calls = re.findall(r"\bmoecache ([a-z]+)\b([^\n#|;]*)", text)
    assert len(calls) > 10
    for name, rest in calls:
        assert name in sections, f"moecache {name}"
        for option in re.findall(r"--[a-z-]+", rest):
            assert f"`{option}" in sections[name], f"moecache {name} {option}"


def test_every_setting_is_in_the_readme_with_its_default() -> None:
    told = dict(re.findall(r"^\| `MOECACHE_(\w+)` \|.*\| (.*?) ?\|$", README, re.MULTILINE))
    default = Settings()
    assert {name.lower() for name in told} == set(Settings.__dataclass_fields__)
    assert told["MODE"] == f"`{default.mode}`" and duration(told["BUDGET"].strip("`")) == default.budget
    assert told["STRICT"] == f"`{int(default.strict)}`" and told["ISOLATE"] == f"`{int(default.isolate)}`"
    assert default.db is None and default.path == () and told["PATH"] == ""


def test_every_room_is_in_the_drawing() -> None:
    drawing = README.split("## The rooms")[1].split("```")[1]
    package = ROOT / "moecache"
    rooms = {f"{p.name}/" for p in package.iterdir() if p.is_dir() and next(p.glob("*.py"), None)}
    rooms |= {p.name for p in package.glob("*.py") if not p.name.startswith("__")}
    assert set(re.findall(r"\b(\w+(?:/|\.py)) ", drawing)) == rooms


# --- code ---


def blocks() -> Iterator[Any]:
    for page in PAGES:
        for number, text in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)):
            yield pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}")


@pytest.mark.parametrize("text", list(blocks()))
def test_python_blocks_run(text: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"  # a file: `wrap` reads the source of what it wraps
    script.write_text(text)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MOECACHE_")}
    env = kept | {"PYTHONPATH": str(ROOT), "MOECACHE_DB": str(tmp_path / "c.sqlite"), "MOECACHE_BUDGET": "2s"}
    done = programs.run(str(script), cwd=tmp_path, env=env)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_glossary_is_short_and_in_order() -> None:
    words = re.findall(r"^\| \*\*(.+?)\*\* \|", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert words == sorted(words) and 10 < len(words) <= 30
