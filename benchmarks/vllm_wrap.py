"""vLLM's layer of experts with and without moecache, in vLLM's own code.

    python benchmarks/vllm_wrap.py [--prewarm] [--db FILE] [--shapes qwen3_30b_a3b] [--tokens 1 16] [--merge]

`vllm` is its function `fused_experts`, as installed. `vllm_wrapped` is the same function through
`moecache.integrations.vllm.wrap()`: the same kernel, with the config that was proved faster, or with vLLM's own.
`vllm_layer` is the modular kernel over `TritonExperts` that vLLM's layers run. `vllm_with_our_kernels` is the same
object with the plugin and MOECACHE_KERNELS=1.

Everything is in one process on the same tensors. What is timed is the replay of captured CUDA graphs, caches emptied
before every replay, medians of rounds in alternating order: no host time is in it. Every output is compared with a
float32 reference first; what is wrong is not timed. The wrapped function is tuned on the routing of its cell, so each
routing has a cache file of its own: `--db FILE` keeps FILE-ROUTING. Ours answers with what ships in the package, and
tunes where nothing does. `table` says whether vLLM ships a table of configs for the shape and this GPU.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import moe_grid
import moe_peers
import torch
from fused_moe import KEYS, both_dense, facts
from moe_case import Case
from moe_sheet import Row, geomean

import moecache
from moecache.dispatch import dispatcher
from moecache.integrations import vllm as plugin

SHAPES = {  # experts, top-k, hidden, intermediate, as one GPU sees them
    "qwen3_30b_a3b": (128, 8, 2048, 768),
    "mixtral_tp8": (8, 2, 4096, 1792),
    "dsv3_tp8": (256, 8, 7168, 256),
    "olmoe": (64, 8, 2048, 1024),
}
TOKENS = (1, 16, 64, 256, 1024, 4096)
PAIRS = {"vllm_wrapped": "vllm", "vllm_with_our_kernels": "vllm_layer"}  # what stands beside what
CANDIDATES = 16  # that tuning within a call tries; what --prewarm compiles
NOISE = 1.01  # no cell may be slower by more
PACKAGE = "vllm.model_executor.layers.fused_moe"

Call = Callable[[], torch.Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    need_vllm()
    if options.prewarm:
        moe_peers.prewarm(__file__, options, sys.argv[1:] if arguments is None else arguments, apart=True)
    grid = moe_grid.Grid(options, "vllm_wrap", "fused_moe", KEYS, "bf16")
    import_module("vllm.v1.worker.workspace").init_workspace_manager(grid.place.torch_device)
    timed = "replays of captured CUDA graphs, caches emptied before each"
    grid.sheet.facts |= {"peers": {"vllm": version("vllm")}, "timed": timed}
    db, where = None if options.once else options.db, None
    for routing in list(options.routing):
        options.routing, options.db = [routing], db and db.with_stem(f"{db.stem}-{routing}")
        with moecache.using(kernels=True), grid.tuning():
            wrapped = plugin.wrap()
            for case in grid.cases():
                where = once(grid, case, wrapped) if options.once else cell(grid, case, wrapped)
                del case  # the next shape's weights come when these are gone
    if where:
        print(json.dumps(summarise(grid.sheet.rows), indent=1), where, sep="\n")


def need_vllm() -> None:
    """Stop where there is no vLLM.

    Raises:
        SystemExit: it cannot be imported.
    """
    try:
        import_module(f"{PACKAGE}.fused_moe")
    except ImportError as error:
        raise SystemExit(f"vLLM cannot be imported ({error}): install it, or put its folder in PYTHONPATH") from error


def cell(grid: moe_grid.Grid, case: Case, wrapped: Callable[..., torch.Tensor]) -> Path:
    """Measure one cell and write it."""
    label = f"{case.weights.shape} T={case.T} {case.generator}"
    row = facts(case) | {"table": has_table(case)}
    row |= grid.compare(label, calls(case, wrapped), case.error, both_dense(case), case.bytes)
    for name in ("config", "tier", "bucket"):
        row.pop(name, None)
    row["choice"] = chosen(grid.answers)
    if "vllm_with_our_kernels" not in row["choice"]:  # the plugin left the layer to vLLM
        row["us"]["vllm_with_our_kernels"] = None
    grid.sheet.add(row)
    order = {"shape": list(SHAPES), "routing": moe_grid.ROUTINGS}
    return grid.sheet.save(order, summarise(grid.sheet.rows))


def calls(case: Case, wrapped: Callable[..., torch.Tensor]) -> dict[str, Call]:
    """What is timed, by column."""
    stock, experts = import_module(PACKAGE).fused_experts, layer(case)
    tensors = case.x, case.w1, case.w2, case.wts, case.ids

    def with_our_kernels() -> torch.Tensor:
        with ExitStack() as stack:
            stack.callback(plugin.unregister)
            active = dispatcher()
            settings = active.settings
            plugin.register()
            active.settings = settings  # in an engine calls measure nothing; here they do
            if not hasattr(import_module(f"{PACKAGE}.experts.triton_moe").TritonExperts.apply, "moecache"):
                raise RuntimeError("the plugin is not in effect; vLLM's log says why")
            return experts()

    return {
        "vllm": lambda: stock(*tensors),
        "vllm_wrapped": lambda: wrapped(*tensors),
        "vllm_layer": experts,
        "vllm_with_our_kernels": with_our_kernels,
    }


def layer(case: Case) -> Call:
    """What a layer of vLLM's runs on one GPU without quantisation: prepare, TritonExperts, finalize."""
    config, modular = import_module(f"{PACKAGE}.config"), import_module(f"{PACKAGE}.modular_kernel")
    experts = import_module(f"{PACKAGE}.experts.triton_moe").TritonExperts
    prepare = import_module(f"{PACKAGE}.prepare_finalize").MoEPrepareAndFinalizeNoDPEPModular
    silu = import_module(f"{PACKAGE}.activation").MoEActivation.SILU
    described = config.FusedMoEConfig(
        num_experts=case.E, num_local_experts=case.E, num_logical_experts=case.E, experts_per_token=case.topk,
        hidden_dim=case.K, intermediate_size_per_partition=case.N, activation=silu, device=case.x.device,
        routing_method=config.RoutingMethodType.Renormalize, in_dtype=case.x.dtype,
        moe_parallel_config=config.FusedMoEParallelConfig.make_no_parallel(),
    )  # fmt: skip
    kernel = modular.FusedMoEKernel(prepare(), experts(described, config.FUSED_MOE_UNQUANTIZED_CONFIG))

    def run() -> torch.Tensor:
        out: torch.Tensor = kernel.apply(
            hidden_states=case.x, w1=case.w1, w2=case.w2, topk_weights=case.wts, topk_ids=case.ids, activation=silu,
            global_num_experts=case.E, expert_map=None, apply_router_weight_on_input=False,
        )  # fmt: skip
        return out

    return run


def once(grid: moe_grid.Grid, case: Case, wrapped: Any) -> None:
    """Run what a cell will, so that it is compiled: vLLM's candidates, and our kernels as they answer untuned."""
    tensors = case.x, case.w1, case.w2, case.wts, case.ids
    for config in wrapped.op.space(wrapped.problem(*tensors), grid.place.device)[:CANDIDATES]:
        moe_peers.attempt(config.name, lambda config=config: wrapped.op.bound(config)(*tensors))
    with moecache.using(mode="replay", isolate=False):
        moe_peers.attempt("vllm_with_our_kernels", calls(case, wrapped)["vllm_with_our_kernels"])


def has_table(case: Case) -> bool:
    """Whether vLLM ships configs for this shape and GPU."""
    return import_module(f"{PACKAGE}.fused_moe").get_moe_configs(case.E, case.N, None) is not None


def chosen(answers: Mapping[str, Any]) -> dict[str, Any]:
    """By column, the config that was served and why."""
    found = {}
    for name, op in (("vllm_wrapped", plugin.OP), ("vllm_with_our_kernels", "fused_moe")):
        if op in answers:
            problem, choice = answers[op]
            found[name] = {
                "config": str(choice.alternatives or choice.config),
                "tier": choice.tier,
                "bucket": problem.routing or "any",
                "reason": choice.reason,
            }
    return found


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """By column its gain over what stands beside it, over all cells and over parts of them."""
    parts: dict[str, list[Row]] = {"all": list(rows)}
    for row in rows:
        parts.setdefault("with table" if row["table"] else "without table", []).append(row)
        parts.setdefault(row["routing"], []).append(row)
    return {name: {part: gains(some, name, base) for part, some in parts.items()} for name, base in PAIRS.items()}


def gains(rows: Sequence[Row], name: str, base: str) -> dict[str, Any] | None:
    """base / name over the cells that have both; None where none has."""
    found = [row["us"][base] / row["us"][name] for row in rows if row["us"].get(base) and row["us"].get(name)]
    if not found:
        return None
    return {
        "cells": len(found),
        "gain_geomean": geomean(found),
        "gain_min": round(min(found), 4),
        "gain_max": round(max(found), 4),
        "slower_by_more_than_1_percent": sum(each * NOISE < 1 for each in found),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = moe_grid.parser(__doc__, TOKENS)
    parser.set_defaults(seconds=6.0)
    parser.add_argument("--prewarm", action="store_true", help="compile what will run in parallel processes first")
    parser.add_argument("--once", action="store_true", help="compile what will run, time nothing")
    return moe_grid.parse(parser, arguments, SHAPES)


if __name__ == "__main__":
    main()
