"""MoE sorting on a GPU: oneshot, multiphase, the library's own choice, and vLLM's compiled op where it can be loaded.

    python benchmarks/moe_sort.py [--vllm PATH/_moe_C.abi3.so] [--experts 8 128] [--tokens 1 16] [--budget 2]

Each figure is the median time of one sort among 20 back to back in a captured graph, over 20 different inputs; the
four are sampled in turn. `oneshot` and `multiphase` are the fastest measured config of each path, `auto` is
`moecache.moe_sort`.
"""

import argparse
import math
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from record import folder_of, save

import moecache
from moecache import routing
from moecache.devices import Place, Places
from moecache.kernels.compile import compile_source
from moecache.kernels.sort.op import SORT, SortCall, capacity, usual_block_m
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Timing
from moecache.tuning.timing import DeviceClock, race

TOPK = {8: 2, 64: 8, 128: 8, 256: 8, 512: 10}
TOKENS = [1 << i for i in range(15)]
SORTS = 20
PEERS = {"vllm": "0.20.2, compiled moe_align_block_size"}
COLUMNS = ("oneshot", "multiphase", "auto", "vllm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, help="vLLM's compiled extension _moe_C.abi3.so")
    parser.add_argument("--experts", type=int, nargs="+", default=list(TOPK))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of tuning for a problem")
    options = parser.parse_args()
    place = Places().of_tensor(torch.empty(1, device="cuda"))
    if options.vllm:
        torch.ops.load_library(str(options.vllm))
    cells = [(e, t, g) for e in options.experts for t in options.tokens for g in ("uniform", "zipf")]
    precompile(place, [(e, t) for e in options.experts for t in options.tokens])
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        moecache.using(db=Path(folder) / "sort.sqlite", path=(), mode="tune", isolate=False) as serving,
    ):
        for experts, tokens, generator in cells:
            rows.append(cell(place, serving, experts, tokens, generator, options))
            print(rows[-1], flush=True)
            save("moe_sort", folder_of(place), place, rows, peers=PEERS if options.vllm else {})
    summary = summarise(rows)
    print(summary)
    print(save("moe_sort", folder_of(place), place, rows, summary=summary, peers=PEERS if options.vllm else {}))


def precompile(place: Place, shapes: list[tuple[int, int]]) -> None:
    """Fill Triton's disk cache with every candidate, one process a core."""
    work = []
    for experts, tokens in shapes:
        ids = torch.empty(tokens, TOPK[experts], dtype=torch.int32)
        problem = SORT.problem(SortCall(ids, experts, usual_block_m(tokens, TOPK[experts], experts)), place.device, "")
        work += [(problem, config, place.device) for config in SORT.space(problem, place.device)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, work, chunksize=8))


def compile_one(job: Any) -> None:
    problem, config, device = job
    for source in SORT.sources(problem, config, device):
        compile_source(source, device)


def cell(place: Place, serving: Any, experts: int, tokens: int, generator: str, options: Any) -> dict[str, Any]:
    topk, block = TOPK[experts], usual_block_m(tokens, TOPK[experts], experts)
    ids = inputs(generator, tokens, experts, topk)
    layer = (experts, tokens, generator)
    want = SORT.reference(SortCall(ids[0], experts, block))
    problem = SORT.problem(SortCall(ids[0], experts, block), place.device, routing.bucket_name(int(want.posted)))
    if serving.peek(SORT, problem).tier != "measured":
        serving.measure(SORT, problem, ids[0], seconds=options.budget)
    best = {v: fastest(serving, problem, v) for v in ("oneshot", "multiphase")}
    calls: dict[str, list[Any]] = {v: launches(t, ids, experts, block) for v, t in best.items() if t}
    for each in ids:
        got = moecache.moe_sort(each, experts, block, layer=layer)
    torch.cuda.synchronize()
    calls["auto"] = [lambda i=i: moecache.moe_sort(i, experts, block, layer=layer) for i in ids]
    if options.vllm:
        calls["vllm"] = [vllm(i, experts, block, want if i is ids[0] else None) for i in ids]
    clock = DeviceClock(serving.places.of_tensor(ids[0]).backend, place.device)
    result = race({name: clock.prepare(part) for name, part in calls.items()}, keep=set(calls))
    choice = serving.peek(SORT, problem.any_routing)  # `auto` is captured
    assert SORT.error(got, SORT.reference(SortCall(ids[-1], experts, block))) == 0.0
    return {
        "E": experts, "topk": topk, "T": tokens, "routing": generator, "block_m": block,
        "us": {n: round(result[n].median, 3) if n in result else None for n in COLUMNS},
        "mad_us": {n: round(s.mad, 3) for n, s in result.items()},
        "bucket": problem.routing, "auto_config": choice.config.name, "tier": choice.tier,
    }  # fmt: skip


def inputs(generator: str, tokens: int, experts: int, topk: int) -> list[torch.Tensor]:
    """20 different calls of one routing: a draw in 20 orders of its tokens."""
    draw = routing.draw(generator, tokens, experts, topk)
    return [draw[torch.randperm(tokens)].cuda() for _ in range(SORTS)]


def fastest(serving: Any, problem: Problem, variant: str) -> Timing | None:
    """The fastest usable timing of one path; None where none fits."""
    found = [t for t, _ in serving.lookup.timings(problem) if t.status == "ok" and t.config.variant == variant]
    return min(found, key=lambda t: t.median_us or math.inf, default=None)


def launches(timing: Timing, ids: list[torch.Tensor], experts: int, block: int) -> list[Any]:
    """One call for each input, outputs allocated inside as users do, the routing posted to the host as `auto` does."""
    posted = torch.zeros(1, dtype=torch.int32).pin_memory()
    every = [SortCall(i, experts, block, posted=posted) for i in ids]
    run = SORT.bind(timing.config, every[0], SORT.outputs(every[0]))
    return [lambda args=args: run(args, SORT.outputs(args)) for args in every]


def vllm(ids: torch.Tensor, experts: int, block: int, want: Any) -> Any:
    """vLLM's op on buffers of vLLM's sizes; its result is compared once."""
    rows = capacity(ids.numel(), experts, block)
    buffers = [torch.empty(n, dtype=torch.int32, device="cuda") for n in (rows, math.ceil(rows / block), 1)]

    def call() -> None:
        torch.ops._moe_C.moe_align_block_size(ids, experts, block, *buffers, None)

    if want is not None:
        call()
        torch.cuda.synchronize()
        assert int(buffers[2]) == int(want.num_tokens_post_padded[0])
    return call


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that the docs quote."""
    gain = [r["us"]["auto"] / r["us"]["vllm"] for r in rows if r["us"]["vllm"]]
    better = [min(x for x in (r["us"]["oneshot"], r["us"]["multiphase"]) if x) for r in rows]
    behind = [r["us"]["auto"] / b - 1 for r, b in zip(rows, better, strict=True)]
    out: dict[str, Any] = {
        "cells": len(rows),
        "auto_over_better_path_max": round(max(behind), 4),
        "auto_over_better_path_mean": round(sum(behind) / len(behind), 4),
        "cells_over_3_percent": sum(b > 0.03 for b in behind),
    }
    if gain:
        out |= {
            "auto_over_vllm_geomean": round(math.exp(sum(map(math.log, gain)) / len(gain)), 4),
            "auto_over_vllm_max": round(max(gain), 4),
            "cells_slower_than_vllm": sum(g > 1 for g in gain),
        }
    return out


if __name__ == "__main__":
    main()
