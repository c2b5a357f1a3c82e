"""The benchmarks inside vLLM, without vLLM: how they stop, what they sum up, what counts for the MoE layers."""

import random
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import vllm_clock
import vllm_e2e
import vllm_wrap

from moecache.kernels import registry as ops
from moecache.schemas.device import KNOWN
from moecache.schemas.layer import Layer


@pytest.mark.parametrize("script", [vllm_wrap, vllm_e2e])
def test_without_vllm_they_say_so(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SystemExit, match=r"^vLLM cannot be imported.*: install it, or put its folder in PYTHONPATH$"):
        script.main([])


def row(routing: str, table: bool, **us: float | None) -> dict[str, Any]:
    return {"shape": "x", "T": 1, "routing": routing, "table": table, "us": us}


def test_gains_are_those_of_pairs_that_both_have() -> None:
    rows = [
        row("uniform", True, vllm=100.0, vllm_wrapped=100.9, vllm_layer=90.0, vllm_with_our_kernels=45.0),
        row("zipf", False, vllm=100.0, vllm_wrapped=102.0, vllm_layer=90.0, vllm_with_our_kernels=None),
        row("zipf", False, vllm=100.0, vllm_wrapped=50.0, vllm_layer=None, vllm_with_our_kernels=45.0),
    ]
    found = vllm_wrap.summarise(rows)
    wrapped = found["vllm_wrapped"]
    assert wrapped["all"]["cells"] == 3 and wrapped["all"]["slower_by_more_than_1_percent"] == 1
    assert wrapped["with table"] == {
        "cells": 1, "gain_geomean": 0.9911, "gain_min": 0.9911, "gain_max": 0.9911, "slower_by_more_than_1_percent": 0,
    }  # fmt: skip
    assert wrapped["zipf"]["gain_max"] == 2.0 and wrapped["without table"] == wrapped["zipf"]
    kernels = found["vllm_with_our_kernels"]
    assert kernels["all"]["cells"] == 1 and kernels["uniform"]["gain_geomean"] == 2.0 and kernels["zipf"] is None


def process(variant: str, *, long: list[float], step: float) -> dict[str, Any]:
    found = vllm_clock.rate(100, long, [1.0]) | {"step_us": step}
    return {"variant": variant, "phases": {"decode 1": found, "prefill": {"tokens_per_s": None}}}


def test_a_rate_is_of_the_difference_of_medians() -> None:
    found = vllm_clock.rate(1000, [3.0, 2.9, 9.0, 3.1, 3.0], [1.0, 0.9, 1.0, 7.0, 1.1])
    assert found["tokens_per_s"] == 500.0, "two calls that were held up count for nothing"
    assert found["samples"] == [500.0, 526.3, 125.0, 476.2, 500.0] and found["mad"] == 23.8
    one = 1.2533 * 1.4826 * 0.1 / 5**0.5  # of medians whose median absolute deviation is 0.1
    assert found["within"] == pytest.approx(2 * 2**0.5 * one / 2, abs=1e-4)
    steady = vllm_clock.rate(1000, [3.0] * 5, [1.0] * 5)
    assert steady["within"] == 0 and steady["long_s"] == [3.0] * 5 and steady["short_s"] == [1.0] * 5
    assert vllm_clock.rate(1000, [1.0, 1.1], [2.0, 2.1])["tokens_per_s"] is None


def test_the_error_of_a_median_is_what_many_medians_show() -> None:
    rng = random.Random(5)
    drawn = [[rng.gauss(10, 1) for _ in range(15)] for _ in range(2000)]
    shown = statistics.pstdev(statistics.median(each) for each in drawn)
    assert statistics.median(vllm_clock.error(each) for each in drawn) == pytest.approx(shown, rel=0.1)


def test_steps_count_that_follow_on_one_another() -> None:
    steps = [[16, 1 + n / 1000, 3e-4, 1e-4, 2e-4] for n in range(5)]
    calls = [[[64, 0.0, 0.5, 0.0, 0.0], *steps, [8, 2.0, 9.0, 9.0, 9.0]], steps[:3]]
    assert vllm_clock.clock(calls, 16) == {
        "steps": 6, "step_us": 1000.0, "step_mad_us": 0.0, "execute_us": 300.0, "sample_us": 100.0, "replay_us": 200.0,
    }  # fmt: skip
    assert vllm_clock.clock(calls, 32) == {"steps": 0}


def test_variants_stand_beside_stock_by_medians() -> None:
    stock = [process("stock", long=[long], step=step) for long, step in ((1.5, 100.0), (2.0, 300.0))]
    rows = [stock[0], process("kernels", long=[1.5], step=100.0), stock[1]]
    assert vllm_e2e.summarise(rows) == {"kernels": {"decode 1": round(200 / 150, 4)}}
    assert vllm_e2e.summarise(rows, "step_us") == {"kernels": {"decode 1": round(3 / 2, 4)}}
    assert vllm_e2e.summarise(rows[1:2]) == {"kernels": {}}


class Engine:
    """As much of vLLM's LLM as is measured: each step takes a millisecond, three of four on the host."""

    def __init__(self) -> None:
        self.worker = SimpleNamespace(execute_model=self.execute, sample_tokens=lambda grammar: None)
        self.wrapper, self.calls = SimpleNamespace(worker=self.worker), list[tuple[int, int, int]]()

    def execute(self, output: Any) -> None:
        time.sleep(0.0005)
        torch.cuda.CUDAGraph.replay(None)  # type: ignore[arg-type]

    def collective_rpc(self, call: Any) -> list[Any]:
        return [call(self.wrapper)]

    def generate(self, prompts: list[Any], sampling: Any, use_tqdm: bool) -> list[Any]:
        new, length = sampling.max_tokens, len(prompts[0]["prompt_token_ids"])
        self.calls.append((len(prompts), length, new))
        for tokens in [len(prompts) * length, *[len(prompts)] * (new - 1)]:
            for part in [vllm_clock.STEP] * (tokens // vllm_clock.STEP) or [tokens]:
                self.worker.execute_model(SimpleNamespace(total_num_scheduled_tokens=part))
                self.worker.sample_tokens(None)
                time.sleep(0.00025)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=range(new))]) for _ in prompts]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: time.sleep(0.00025))
    return Engine()


def test_phases_are_warmed_up_and_take_turns(engine: Engine) -> None:
    found = vllm_clock.measured(engine, [1, 16], 20, 5, budget=0.0)
    shapes, rounds = len(vllm_clock.SHAPES), engine.calls[len(vllm_clock.SHAPES) + 12 :]
    assert [call[1] for call in engine.calls[:shapes]] == list(vllm_clock.SHAPES)
    one = [(1, 16, 21), (1, 16, 1), (16, 16, 21), (16, 16, 1), (48, 1024, 1), (16, 1024, 1)]
    assert engine.calls[shapes:][:12] == one * 2 and found["rounds"] == vllm_clock.ROUNDS == 3, "no more: too late"
    assert rounds == [*one, *one[4:], *one[2:4], *one[:2], *one]
    assert list(found["phases"]) == ["decode 1", "decode 16", "prefill"]
    decode, prefill = found["phases"]["decode 16"], found["phases"]["prefill"]
    assert decode["steps"] == 3 * 19 and prefill["steps"] == 3 * 11
    for phase in found["phases"].values():
        assert phase["step_us"] > phase["execute_us"] > 750 > 250 <= phase["replay_us"] < phase["execute_us"]
        assert phase["sample_us"] < phase["replay_us"] and "(whole machine)" in phase["cores"]
        assert phase["tokens_per_s"] > 0 and len(phase["long_s"]) == len(phase["short_s"]) == 3
    assert all(before >= 1 or after >= 1 for before, after in found["threads"].values())


def test_a_call_that_gives_too_few_tokens_ends_the_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "generate", lambda *given, **more: Engine.generate(engine, *given, **more)[:-1])
    with pytest.raises(SystemExit, match="3 prompts of 2 new tokens gave 2"):
        vllm_clock.taken(engine, random.Random(0), (3, 4, 2))


def test_threads_are_known_by_their_number(tmp_path: Path) -> None:
    def write(**threads: tuple[str, int]) -> None:
        for thread, (name, ticks) in threads.items():
            line = f"7 ({name}) S 1 7 7 0 -1 0 0 0 0 0 {ticks} 0 0 0 20 0 2 0 0"
            for file in (tmp_path / "7" / "stat", tmp_path / "7" / "task" / thread[1:] / "stat"):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(line if file.parent.name != "7" or thread == "t7" else line.replace(name, "main"))
        (tmp_path / "stat").write_text("cpu 100 0 50 900 0 0 0 30 0 0\n")

    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "stat").write_text("2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 0 0 0 0 20 0 1 0 0")
    write(t8=("worker (a)", 100), t7=("main", 500))
    before = vllm_clock.cpu_seconds(tmp_path)
    assert before["8"] == ("main: worker (a)", 1.0) and before["7"] == ("main", 5.0)
    assert before["all"][1] == 1.5 and before["stolen"][1] == 0.3 and vllm_clock.alive(tmp_path) == {"main": 2}
    write(t8=("worker b", 150), t9=("new", 25), t7=("main", 500))
    found = vllm_clock.spent(before, vllm_clock.cpu_seconds(tmp_path))
    assert found["main: worker b"] == 0.5 and found["main: new"] == 0.25 and not found["main"]
    assert vllm_clock.busy(found, 2.0) == {"main: worker b": 0.25, "main: new": 0.12}


def test_a_profile_counts_kernels_of_moe_layers() -> None:
    kernels = {"fused_moe_kernel": 3.0, "up": 4.0, "void moe::topkGating<8>": 1.0, "warm_up": 2.0, "nvjet": 10.0}
    found = vllm_clock.shares(kernels, set(vllm_clock.our_kernels()))
    assert (found["device_us"], found["moe_us"], found["moe_share"]) == (20.0, 8.0, 0.4)
    assert list(found["kernels_us"].values()) == [10.0, 4.0, 3.0, 2.0, 1.0]
    assert {name for name in found["kernels_us"] if not name.startswith("moe: ")} == {"nvjet", "warm_up"}
    assert vllm_clock.shares({}, set())["moe_share"] is None


def test_every_kernel_of_a_layer_has_a_known_name() -> None:
    op: Any = ops.get("fused_moe")
    device = KNOWN["h200"]
    layer = Layer(model="qwen3", experts=128, global_experts=128, topk=8, hidden=2048, intermediate=768, dtype="bf16")
    (problem,) = op.problems(layer, [64], device)
    variants = {config.variant: config for config in op.space(problem, device)}
    found = {source.fn.__name__ for config in variants.values() for source in op.sources(problem, config, device)}
    assert len(variants) > 1 and found and found <= set(vllm_clock.our_kernels())
