"""The benchmarks of host time and of two trees, on a tiny layer on the CPU: what they write, what they leave out."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import against
import host
import record

ROOT = Path(__file__).parent.parent
HOOK = """
import time
import moecache
VERSIONS = {"vllm": "1.2"}
def peers(case):
    def right():
        time.sleep(0.002)
        return moecache.fused_moe(case.x, case.w1, case.w2, case.wts, case.ids)
    return {"vllm": right, "sglang": lambda: right() * 1.1, "other": right}
"""


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where result files go."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setenv("COMMIT", "abc1234")
    return tmp_path / "cpu"


def test_host_time_and_chains_beside_a_peer(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "host_hook.py").write_text(HOOK)
    monkeypatch.syspath_prepend(str(tmp_path))
    host.main(["--smoke", "--peers", "host_hook:peers", "--layers", "3", "--rounds", "5", "--seconds", "5"])
    assert capsys.readouterr().out.count("WRONG sglang tiny") == 2
    result = json.loads((results / "host.json").read_text())
    assert result["peers"] == {"vllm": "1.2"} and result["tiers"] == {"measured": 2} and result["commit"] == "abc1234"
    assert [(row["shape"], row["T"]) for row in result["rows"]] == [("tiny", 1), ("tiny", 5)]
    for row in result["rows"]:
        assert row["us"].keys() == row["spread_us"].keys() == {"ours", "vllm", "torch_add"}, "wrong ones are not timed"
        assert row["us"]["vllm"] > 2000 + row["us"]["torch_add"] and row["us"]["torch_add"] < row["us"]["ours"]
        assert row["chain_ms"]["vllm"] > 3 * 2 and row["chain_ms"].keys() == {"ours", "vllm"}
        assert row["weight_sets"] == 3 and row["launches"] is None, "no device, no launches"
    assert result["summary"]["ours_over_vllm_max"] < 1 and result["summary"]["chains_slower"] == 0


def test_waiting_is_outside_of_host_time_and_inside_of_a_chain() -> None:
    waited: list[float] = []

    def wait() -> None:
        waited.append(0.01)
        host.time.sleep(0.01)

    run = host.Run(host.parse(["--smoke"]), (), torch.device("cpu"), wait)
    assert host.enqueued(run, lambda: None) < 1000 and len(waited) == 1
    assert host.finished(run, [lambda: None] * 3) > 10 and len(waited) == 3


def test_rounds_go_forth_and_back() -> None:
    seen: list[int] = []
    found = host.alternate({"a": 1, "b": 2}, 3, lambda call: seen.append(call) or 0.5)  # type: ignore[func-returns-value]
    assert seen == [1, 2, 2, 1, 1, 2] and found == {"a": [0.5] * 3, "b": [0.5] * 3}


def test_the_summary_counts_what_misses_the_goals() -> None:
    def row(ours: float, vllm: float, launches: int | None, chain: float) -> dict[str, Any]:
        us = {"ours": ours, "vllm": vllm, "torch_add": 10.0}
        return {"us": us, "launches": launches, "chain_ms": {"ours": chain, "vllm": 1.0}}

    told = host.summary([row(40, 100, 4, 0.9), row(50, 100, 4, 1.5), row(90, 300, None, 1.0)])
    assert (told["ours_over_vllm_max"], told["cells_over_share"]) == (0.5, 1)
    assert (told["us_above_launches_max"], told["cells_above_overhead"]) == (10.0, 1)
    assert (told["chain_ours_over_vllm_max"], told["chains_slower"]) == (1.5, 1)


def test_launches_are_what_the_device_does(tmp_path: Path) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        torch.zeros(3).add_(1)
    seen.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert len(trace["traceEvents"]) > 2 and host.work(trace) == 0
    trace["traceEvents"] += [{"cat": name} for name in ("kernel", "kernel", "cuda_runtime", "gpu_memset", "overhead")]
    assert host.work(trace) == 3


# --- two trees ---


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another checkout of the package."""
    for room in ("moecache", "kernels", "backends", "schemas"):
        shutil.copytree(ROOT / room, tmp_path / "tree" / room, symlinks=True, ignore=shutil.ignore_patterns("*.sqlite"))
    return tmp_path / "tree"


def test_each_tree_runs_its_own_code(other: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fewer = ["--smoke", "--tokens", "1", "--routing", "uniform", "--rounds", "2", "--seconds", "5"]
    assert against.main([str(other), *fewer]) == 0
    (row,) = (result := json.loads((results / "against.json").read_text()))["rows"]
    assert result["before"] == "tree" and result["summary"]["ratio_geomean"] == row["ratio"]
    assert row["ratio"] == pytest.approx(row["us"]["after"] / row["us"]["before"], rel=1e-3)
    assert row["same_result"] and "configs" not in row
    with (other / "moecache" / "ops.py").open("a") as file:
        file.write("\n\nfused_moe = lambda x, *more, **options: 2 * _fused_moe(x, *more, **options)\n")
    text = (other / "moecache" / "ops.py").read_text()
    (other / "moecache" / "ops.py").write_text(text.replace("def fused_moe(", "def _fused_moe(", 1))
    assert against.main([str(other), *fewer]) == 1, "another result"
    assert "OTHER RESULT" in capsys.readouterr().out


def test_a_folder_without_the_package_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        against.main([str(tmp_path), "--smoke"])
    assert f"{tmp_path} is no checkout" in capsys.readouterr().err


def test_a_tree_that_fails_ends_the_run(other: Path) -> None:
    (other / "moecache" / "__init__.py").write_text("raise RuntimeError('broken')\n")
    with pytest.raises(SystemExit, match="ended with 1"):
        against.main([str(other), "--smoke"])


def test_the_scripts_run_from_a_shell(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "host.py", "--shapes", "none", "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown shapes none; there are tiny" in done.stderr
