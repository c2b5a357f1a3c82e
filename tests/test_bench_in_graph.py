"""The benchmark of captured graphs on a tiny layer on the CPU: its rows, what it measures, how it goes on and stops."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import in_graph
import record

from moecache.devices import Places
from moecache.kernels.fused_moe.op import FUSED_MOE
from moecache.schemas.config import Alternatives
from moecache.schemas.device import KNOWN
from moecache.schemas.layer import Layer
from moecache.schemas.timing import Choice
from moecache.store import Store

TINY = {"tiny": [8, 2, 64, 48], "other": [4, 2, 32, 32]}  # experts, top-k, hidden, intermediate


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the benchmark on tiny layers and returns what is in its result file."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setenv("COMMIT", "abc1234")
    (tmp_path / "shapes.json").write_text(json.dumps(TINY))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fixed = ["--device", "cpu", "--shapes-file", str(tmp_path / "shapes.json"), "--seconds", "0.2"]

    def call(*more: str) -> Any:
        shapes = [] if "--shapes" in more else ["--shapes", "tiny"]
        monkeypatch.setattr(sys, "argv", ["in_graph.py", *more])
        in_graph.main([*fixed, *shapes, *more])
        file = tmp_path / "cpu" / "in_graph.json"
        return json.loads(file.read_text()) if file.exists() else None

    yield call
    torch.set_num_threads(threads)


def test_rows_set_ours_beside_the_best_and_the_uniform_winner(run: Any, tmp_path: Path, capsys: Any) -> None:
    result = run("--tokens", "40", "--db", str(tmp_path / "c.sqlite"))
    rows = result["rows"]
    assert [row["routing"] for row in rows] == list(in_graph.ROUTINGS) and result["commit"] == "abc1234"
    for row in rows:
        assert (row["shape"], row["E"], row["topk"], row["hidden"], row["intermediate"], row["T"]) == (
            "tiny", 8, 2, 64, 48, 40)  # fmt: skip
        assert set(row["us"]) == set(row["mad_us"]) == {"best_single", "ours", "static", "single"}
        assert row["us"]["static"] >= row["us"]["best_single"] > 0 and row["us"]["ours"] > 0
        assert 0 < row["rel_err"] < 1e-2 and row["tier"] == "measured" and "any routing" in row["reason"]
        assert set(row["sort_us"]) == {"posted", "alone"} and min(row["sort_us"].values()) > 0
        assert not row["graph"] and row["extra_us"] is None, "a CPU has none, and nothing to take turns"
        assert row["config"]["ours"] == row["config"]["single"] and row["us"]["single"] >= row["us"]["best_single"]
    device = Places().here("cpu", 0).device
    with Store.open(tmp_path / "c.sqlite") as store:
        timings = store.timings(op="fused_moe")
    assert {t.problem.routing for t in timings} == {row["bucket"] for row in rows}, "every routing was measured"
    names = {config.name for config in FUSED_MOE.space(timings[0].problem, device)}
    assert rows[0]["candidates"] == len(names) and {name for row in rows for name in row["config"].values()} <= names
    assert len({row["config"]["ours"] for row in rows}) == len({row["config"]["static"] for row in rows}) == 1
    assert result["host_us"]["post"] > 0 and result["summary"] == in_graph.summary(rows)
    assert f"rows: {len(rows)}" in capsys.readouterr().out


def test_a_second_run_measures_what_is_missing(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db = ("--db", str(tmp_path / "c.sqlite"))
    first = run("--tokens", "40", "--routing", "uniform", "zipf", *db)
    kept = run("--tokens", "40", "50", "--routing", "uniform", "hot1", "--missing", *db)
    cells = [(row["T"], row["routing"]) for row in kept["rows"]]
    assert cells == [(40, "uniform"), (40, "zipf"), (40, "hot1"), (50, "uniform"), (50, "hot1")]
    assert kept["rows"][:2] == first["rows"]
    monkeypatch.setattr(in_graph, "rows", lambda *a: pytest.fail("nothing is missing"))
    assert run("--tokens", "50", "--routing", "hot1", "--missing", *db) == kept


def test_weights_are_made_once_a_shape(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], in_graph.weights

    def weights(name: str, *rest: Any, **more: Any) -> Any:
        made.append(name)
        return make(name, *rest, **more)

    monkeypatch.setattr(in_graph, "weights", weights)
    result = run("--shapes", "other", "tiny", "--tokens", "40", "50", "--routing", "uniform")
    assert made == ["other", "tiny"] and len(result["rows"]) == 4


def test_a_wrong_result_ends_the_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = in_graph.moecache.fused_moe
    monkeypatch.setattr(in_graph.moecache, "fused_moe", lambda *a, **k: real(*a, **k) * 1.1)
    with pytest.raises(SystemExit, match=r"WRONG tiny T=40 zipf: error (9|1)"):
        run("--tokens", "40", "--routing", "zipf")


def test_a_spent_budget_stops_the_run(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--tokens", "40", "--budget-s", "0") is None
    assert "stopped before tiny T=40" in capsys.readouterr().out


def test_the_summary_counts_what_is_near_the_best() -> None:
    times = [(100.0, 104.0, 103.9), (100.0, 104.1, 150.0), (10.0, 11.2, 9.9), (10.0, 20.0, None)]
    rows = [{"us": {"best_single": best, "ours": ours, "static": static}} for best, ours, static in times]
    assert "single" not in in_graph.summary(rows), "rows of an earlier version"
    for row, extra in zip(rows, (9.0, 7.5, None, 8.0), strict=True):
        row |= {"extra_us": extra}
        row["us"] |= {"single": row["us"]["best_single"] + 3}
    found = in_graph.summary(rows)
    assert found["single"]["within"] == 2 and found["extra_us"] == {"median": 8.0, "max": 9.0, "rows": 3}
    assert (found["rows"], found["ours"]["within"], found["static"]["within"]) == (4, 2, 2)
    assert found["ours"]["over_best_max"] == 2.0 and found["static"]["over_best_max"] == 1.5
    assert found["ours"]["over_best_geomean"] == pytest.approx((1.04 * 1.041 * 1.12 * 2) ** 0.25, abs=1e-4)
    assert in_graph.summary([])["rows"] == 0


def test_a_partner_adds_up_alike_and_has_another_height() -> None:
    pytest.importorskip("triton")
    device = KNOWN["h200"]
    layer = Layer(model="", experts=8, global_experts=8, topk=2, hidden=4096, intermediate=1792)
    (asked,) = FUSED_MOE.problems(layer, [256], device)
    space = FUSED_MOE.space(asked, device)
    for config in space:
        choice = Choice(config=config, tier="measured", reason="")
        found = in_graph.partner(asked, choice, space)
        assert found is not None and found["block"] != config["block"] and found["combine"] == config["combine"]
        taken = Alternatives(first=found, second=config, served=())
        assert in_graph.partner(asked, choice.model_copy(update={"alternatives": taken}), space[::-1]) == found
    few = FUSED_MOE.problems(layer, [1], device)[0]
    decode = next(each for each in FUSED_MOE.space(few, device) if each.variant == "decode")
    assert in_graph.partner(few, Choice(config=decode, tier="measured", reason=""), space) is None
