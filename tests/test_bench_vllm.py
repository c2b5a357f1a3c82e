"""The benchmarks inside vLLM, without vLLM: how they stop, what they sum up, what counts for the MoE layers."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

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


def process(variant: str, rate: float) -> dict[str, Any]:
    return {"variant": variant, "phases": {"decode 1": vllm_e2e.spread([rate, rate + 1, rate + 5])}}


def test_variants_stand_beside_stock_by_medians() -> None:
    assert vllm_e2e.spread([1.0, 2.0, 9.0]) == {"tokens_per_s": 2.0, "mad": 1.0, "samples": [1.0, 2.0, 9.0]}
    rows = [process("stock", 99.0), process("kernels", 149.0), process("stock", 109.0)]
    assert vllm_e2e.summarise(rows) == {"kernels": {"decode 1": round(150 / 105, 4)}}
    assert vllm_e2e.summarise(rows[1:2]) == {"kernels": {}}


def test_a_profile_counts_kernels_of_moe_layers() -> None:
    kernels = {"fused_moe_kernel": 3.0, "up": 4.0, "void moe::topkGating<8>": 1.0, "warm_up": 2.0, "nvjet": 10.0}
    found = vllm_e2e.shares(kernels, set(vllm_e2e.our_kernels()))
    assert (found["device_us"], found["moe_us"], found["moe_share"]) == (20.0, 8.0, 0.4)
    assert list(found["kernels_us"].values()) == [10.0, 4.0, 3.0, 2.0, 1.0]
    assert {name for name in found["kernels_us"] if not name.startswith("moe: ")} == {"nvjet", "warm_up"}
    assert vllm_e2e.shares({}, set())["moe_share"] is None


def test_every_kernel_of_a_layer_has_a_known_name() -> None:
    op: Any = ops.get("fused_moe")
    device = KNOWN["h200"]
    layer = Layer(model="qwen3", experts=128, global_experts=128, topk=8, hidden=2048, intermediate=768, dtype="bf16")
    (problem,) = op.problems(layer, [64], device)
    variants = {config.variant: config for config in op.space(problem, device)}
    found = {source.fn.__name__ for config in variants.values() for source in op.sources(problem, config, device)}
    assert len(variants) > 1 and found and found <= set(vllm_e2e.our_kernels())
