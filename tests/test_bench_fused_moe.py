"""The MoE benchmarks on a tiny layer on the CPU: what a row holds, what is checked, how runs merge, the summary."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import fused_moe
import grouped_gemm
import moe_case
import moe_peers
import moe_sheet
import record

import moecache
from moecache.kernels import code
from moecache.kernels import registry as ops

ROOT = Path(__file__).parent.parent
TINY = {"tiny": [8, 2, 64, 48], "other": [4, 1, 32, 160]}  # experts, top-k, hidden, intermediate
HOOK = """
import torch
VERSIONS, CALLS = {"theirs": "1.2"}, []
def peers(case):
    def theirs():
        CALLS.append(case.T)
        out = torch.zeros(case.T, case.K, dtype=case.x.dtype)
        for t in range(case.T):
            for s in range(case.topk):
                e = int(case.ids[t, s])
                g, u = (case.x[t].float() @ case.w1[e].float().T).split(case.N)
                out[t] += (case.wts[t, s] * ((torch.nn.functional.silu(g) * u) @ case.w2[e].float().T)).to(out.dtype)
        return out
    def failing():
        raise ValueError("no such shape")
    wrong, empty = lambda: theirs() * 1.1, lambda: theirs() * float("nan")
    return {"theirs": theirs, "failing": failing, "wrong": wrong, "empty": empty, "torch": theirs}
def broken(case):
    raise RuntimeError("cannot build")
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a benchmark on the tiny layer and returns what is in its result file."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setenv("COMMIT", "abc1234")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tiny_hook.py").write_text(HOOK)
    (tmp_path / "shapes.json").write_text(json.dumps(TINY))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fixed = ["--device", "cpu", "--shapes-file", str(tmp_path / "shapes.json"), "--seconds", "0.2", "--rounds", "1"]

    def call(*more: str, module: ModuleType = fused_moe, name: str = "fused_moe") -> Any:
        shapes = [] if "--shapes" in more else ["--shapes", "tiny"]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *more])
        module.main([*fixed, "--bandwidth", "50", *shapes, *more])
        file = tmp_path / "cpu" / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    yield call
    torch.set_num_threads(threads)
    sys.modules.pop("tiny_hook", None)


def cells(result: Any) -> list[tuple[Any, ...]]:
    return [(row["shape"], row["T"], row["routing"]) for row in result["rows"]]


# --- what a run writes ---


def test_a_row_holds_cell_limit_times_and_errors(run: Any) -> None:
    result = run("--tokens", "5", "1", "--routing", "zipf", "--peers", "tiny_hook:peers", "tiny_hook:broken")
    assert cells(result) == [("tiny", 1, "zipf"), ("tiny", 5, "zipf")] and result["commit"] == "abc1234"
    assert result["peers"] == {"theirs": "1.2"} and result["bandwidth_gbs"] == 50
    for row in result["rows"]:
        assert (row["E"], row["topk"], row["hidden"], row["intermediate"], row["dtype"]) == (8, 2, 64, 48, "bf16")
        assert row["limit_us"] == max(row["bytes_us"], row["dense_us"]) > 0
        assert all(row["us"][name] > 0 and row["mad_us"][name] >= 0 for name in ("ours", "theirs", "torch"))
        assert all(0 < row["rel_err"][name] < 1e-2 for name in ("ours", "theirs", "torch"))
        assert row["tier"] == "measured" and row["bucket"] == "any", "so few pairs are one question"
        variant = row["config"].split("(")[0]
        assert variant in {t.variant for t in known_configs(row)}
        assert row["us"]["failing"] is row["us"]["wrong"] is row["us"]["empty"] is None, "wrong results are not timed"
        assert row["rel_err"]["wrong"] == pytest.approx(0.1, rel=0.1) and row["rel_err"]["empty"] is None
        assert "failing" not in row["rel_err"] and row["rel_err"]["torch"] == row["rel_err"]["theirs"]


def known_configs(row: Any) -> list[Any]:
    op = ops.get("fused_moe")
    device = fused_moe.moe_grid.Places().here("cpu", 0).device
    held = moe_case.weights("tiny", "cpu", shape=(row["E"], row["topk"], row["hidden"], row["intermediate"]))
    case = moe_case.case(held, row["routing"], row["T"], row["topk"])
    from moecache.kernels.fused_moe.op import call_args

    args = call_args(case.x, case.w1, case.w2, case.wts, case.ids)
    return op.space(op.problem(args, device, ""), device)  # type: ignore[attr-defined]


def test_runs_merge_by_cell_and_only_within_one_code(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("--tokens", "1", "3", "--routing", "uniform", "--skip", "torch")
    assert {tuple(row["us"]) for row in first["rows"]} == {("ours",)}
    second = run("--tokens", "3", "--routing", "uniform", "hot1", "--merge", "--skip", "x")
    order = [(1, "uniform"), (3, "uniform"), (3, "hot1")]
    assert cells(second) == [("tiny", *cell) for cell in order]
    anew = {cell: list(row["us"]) for cell, row in zip(order, second["rows"], strict=True)}
    assert anew[1, "uniform"] == ["ours"] and anew[3, "uniform"] == ["ours", "torch"]
    assert second["command"].count("benchmark.py") == 2 and " && " in second["command"]

    third = run("--tokens", "1", "--routing", "uniform", "--missing", "--shapes", "other", "tiny")
    kept = [row for row in third["rows"] if row["shape"] == "tiny"]
    assert kept == second["rows"] and [cell for cell in cells(third) if cell[0] == "other"] == [("other", 1, "uniform")]

    monkeypatch.setenv("COMMIT", "fffffff")
    with pytest.raises(SystemExit, match="commit: abc1234 there, fffffff here"):
        run("--tokens", "1", "--merge")
    monkeypatch.setenv("COMMIT", "abc1234")
    monkeypatch.setattr(code, "whole", lambda op: "changed")
    with pytest.raises(SystemExit, match="sources"):
        run("--tokens", "1", "--merge")
    assert cells(run("--tokens", "1", "--routing", "zipf")) == [("tiny", 1, "zipf")], (
        "without --merge a file begins anew"
    )


def test_fp8_weights_go_into_a_file_of_their_own(run: Any) -> None:
    result = run("--tokens", "3", "--routing", "uniform", "--fp8", name="fused_moe_fp8")
    (row,) = result["rows"]
    assert row["dtype"] == "fp8_block" and 0 < row["rel_err"]["ours"] < 5e-2 and list(row["us"]) == ["ours"]


def test_both_products_alone(run: Any) -> None:
    result = run("--tokens", "40", "--routing", "dir2", module=grouped_gemm, name="grouped_gemm")
    up, down = result["rows"]
    assert (up["gemm"], up["M"], up["N"], up["K"]) == ("up", 80, 96, 64)
    assert (down["gemm"], down["M"], down["N"], down["K"]) == ("down", 80, 64, 48)
    for row in (up, down):
        assert set(row["us"]) == {"ours", "torch"} and all(0 < error < 1e-2 for error in row["rel_err"].values())
        flops = 2 * row["M"] * row["N"] * row["K"]
        assert row["tflops"]["ours"] == pytest.approx(flops / row["us"]["ours"] / 1e6, abs=0.05)


def test_a_spent_budget_stops_the_run(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--tokens", "1", "--budget-s", "0") is None
    assert "stopped before tiny T=1 uniform" in capsys.readouterr().out


def test_once_calls_every_peer_and_writes_nothing(run: Any) -> None:
    assert run("--tokens", "7", "--routing", "zipf", "--once", "--peers", "tiny_hook:peers") is None
    assert sys.modules["tiny_hook"].CALLS == [7] * 4


# --- the case ---


def naive(case: Any) -> torch.Tensor:
    out = torch.zeros(case.T, case.K, dtype=torch.float64)
    for t in range(case.T):
        for s in range(case.topk):
            w1, w2 = (w.double() for w in case.weights.dense(int(case.ids[t, s])))
            gate, up = (w1 @ case.x[t].double()).split(case.N)
            out[t] += float(case.wts[t, s]) * (w2 @ (gate * torch.sigmoid(gate) * up))
    return out


@pytest.mark.parametrize("fp8", [False, True])
def test_the_reference_is_the_plain_sum(fp8: bool) -> None:
    held = moe_case.weights("tiny", "cpu", fp8=fp8, shape=(5, 3, 136, 40))
    case = moe_case.case(held, "uniform", 7, 3)
    want = naive(case)
    got = case.reference.double()
    assert len(case.checked) == 7
    assert float((got - want).norm() / want.norm()) < (5e-2 if fp8 else 1e-5), (
        "fp8 differs by the activations' rounding"
    )
    assert case.error(want) < (5e-2 if fp8 else 1e-5) and case.error(want * 1.5) > 0.4


def test_fp8_blocks_hold_the_weights() -> None:
    whole = torch.randn(200, 136)
    whole[:128, :128] *= 100
    q, scale = moe_case._quantised(whole)
    assert scale.shape == (2, 2) and float(scale[0, 0]) == pytest.approx(float(whole[:128, :128].abs().max()) / 448)
    back = q.float() * moe_case._spread(scale, q)
    assert float(((back - whole) / whole).abs().median()) < 0.03


def test_bytes_count_what_must_move() -> None:
    held = moe_case.weights("tiny", "cpu", shape=(4, 2, 64, 32))
    case = moe_case.case(held, "uniform", 3, 2)
    object.__setattr__(case, "ids", torch.tensor([[0, 1], [0, 1], [1, 0]], dtype=torch.int32))
    weights, hidden, inner = 2 * 3 * 64 * 32 * 2, 2 * 3 * 64 * 2, 2 * 6 * 32 * 2
    assert case.bytes == weights + hidden + inner and case.flops == 2 * 6 * 3 * 64 * 32


def test_ours_serves_the_cases_of_another_harness() -> None:
    held = moe_case.weights("tiny", "cpu", shape=(8, 2, 64, 48))
    case = moe_case.case(held, "zipf", 6, 2)
    foreign = SimpleNamespace(**{name: getattr(case, name) for name in ("x", "w1", "w2", "ids", "wts", "E", "topk")})
    with moecache.using(mode="off"):
        calls = fused_moe.ours(foreign)
        assert set(calls) == {"moe"} and case.error(calls["moe"]()) < 1e-2
        assert calls["moe"]().data_ptr() == calls["moe"]().data_ptr(), "the output is allocated beforehand"


def test_a_lost_device_ends_the_run() -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(SystemExit, match="--skip tk"):
        moe_peers.attempt("tk", lost)


# --- summary and tables ---


def row(shape: str, tokens: int, limit: float, **us: float | None) -> dict[str, Any]:
    return {"shape": shape, "T": tokens, "routing": "uniform", "limit_us": limit, "us": us, "config": "v(a=1)"}


ROWS = [
    row("a", 1, 10, ours=20, vllm=40, tk=30),
    row("a", 16, 10, ours=30, vllm=20, tk=None),
    row("b", 1, 100, ours=125, vllm=250),
    row("b", 16, 100, ours=None, vllm=1),
]


def test_the_summary_compares_cells_that_both_have() -> None:
    found = moe_sheet.summarise(ROWS)
    assert (found["cells"], found["cells_without_ours"]) == (3, 1)
    assert found["ours_over_limit_geomean"] == pytest.approx((2 * 3 * 1.25) ** (1 / 3), abs=1e-4)
    vllm, tk, best = found["peers"]["vllm"], found["peers"]["tk"], found["fastest_peer"]
    assert (vllm["cells"], tk["cells"], best["cells"]) == (3, 1, 3)
    assert vllm["over_limit_geomean"] == pytest.approx((4 * 2 * 2.5) ** (1 / 3), abs=1e-4)
    assert vllm["ours_over_it_geomean"] == pytest.approx((0.5 * 1.5 * 0.5) ** (1 / 3), abs=1e-4)
    assert (vllm["cells_ours_slower"], vllm["ours_over_it_max"]) == (1, 1.5)
    assert tk["ours_over_limit_geomean"] == 2 and tk["over_limit_geomean"] == 3
    assert best["over_limit_geomean"] == pytest.approx((3 * 2 * 2.5) ** (1 / 3), abs=1e-4)
    assert moe_sheet.summarise([]) == {"cells": 0, "cells_without_ours": 0}


def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "docs" / "make_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_show_summary_and_cells(tmp_path: Path) -> None:
    make, page = tables(), "<!-- table fused: x -->\n<!-- end of table -->\n"
    empty = make.fill(page, tmp_path)
    assert empty.split() == page.split(), "nothing is shown of what is not measured"
    head = {"device": "Some GPU", "environment": {"driver": "1", "torch": "2", "triton": "3"}, "commit": "abc1234",
            "date": "2026-01-02T03:04:05", "command": "python x.py", "peers": {"vllm": "7.8"}}  # fmt: skip
    (tmp_path / "h100").mkdir()
    result = head | {"summary": moe_sheet.summarise(ROWS), "rows": ROWS}
    (tmp_path / "h100" / "fused_moe.json").write_text(json.dumps(result))
    text = make.fill(page, tmp_path)
    assert "| the fastest peer of each cell | 3 | 2.47 | 1.96 | 0.79 | 1 |" in text
    assert "| vLLM | 3 | 2.71 | 1.96 | 0.72 | 1 |" in text and "](docs/fused_moe.svg)" in text and "vLLM (7.8)" in text
    cells = make.layers(result)
    assert "| 1 | uniform | 10.0 | **20.0** | 40.0 | 30.0 | `v(a=1)` |" in cells
    assert "| 16 | uniform | 100.0 | – | **1.00** | – | `v(a=1)` |" in cells


@pytest.mark.parametrize("gpu", ["h100", "h200"])
@pytest.mark.parametrize("name", ["fused_moe", "fused_moe_skewed", "fused_moe_fp8", "grouped_gemm"])
def test_a_measured_summary_is_that_of_its_rows(name: str, gpu: str) -> None:
    file = ROOT / "benchmarks" / "results" / gpu / f"{name}.json"
    if not file.exists():
        pytest.skip("not measured yet")
    data = json.loads(file.read_text())
    assert data["summary"] == moe_sheet.summarise(data["rows"])
    for each in data["rows"]:
        assert each["limit_us"] == max(each["bytes_us"], each["dense_us"] or 0)
        assert all(us is None or math.isfinite(us) for us in each["us"].values())
