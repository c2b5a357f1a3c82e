"""Whole MoE layers: `moecache.fused_moe` beside its peers and the limit that bytes and FLOPs set.

    python benchmarks/fused_moe.py [--fp8] [--shapes qwen3_30b_a3b] [--tokens 1 16] [--routing uniform zipf]
                                   [--peers module:function] [--merge]

Everything is in one process on the same tensors: captured graphs, caches emptied before every replay, medians of
rounds in alternating order. Every output is compared with a float32 reference first; what is wrong is not timed. The
limit is the larger of two times: the bytes that must move at the read bandwidth, and dense products of the same FLOPs
by the vendor's library in the same run. `--merge` adds to the result file of the same code and device, so that a grid
can be made in several runs.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # also when this is imported as benchmarks.fused_moe

import moe_grid
import moe_peers
import record
from moe_case import TOKENS, Case, Weights
from moe_clock import dense
from moe_sheet import summarise

import moecache

KEYS = ("shape", "T", "routing", "dtype")


def ours(case: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """{"moe": callable -> [T, K]} for any object with x, w1, w2, ids, wts; the output is allocated beforehand.

    The first call tunes, as a user's would. Fits other harnesses: `--ours benchmarks.fused_moe:ours`.
    """
    held = getattr(case, "weights", None)
    quant = None
    if isinstance(held, Weights) and held.w1_scale is not None and held.w2_scale is not None:
        from moecache.ops import Quant

        quant = Quant(held.dtype, held.w1_scale, held.w2_scale)
    out, layer = torch.empty_like(case.x), ("benchmark", next(moe_grid.LAYERS))

    def moe() -> torch.Tensor:
        return moecache.fused_moe(case.x, case.w1, case.w2, case.wts, case.ids, quant=quant, out=out, layer=layer)

    return {"moe": moe}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.prewarm:
        moe_peers.prewarm(__file__, options, sys.argv[1:] if arguments is None else arguments)
    hooks = record.named(options.peers, "function")
    name, dtype = ("fused_moe_fp8", "fp8_block") if options.fp8 else ("fused_moe", "bf16")
    grid, where = moe_grid.Grid(options, options.name or name, "fused_moe", KEYS, dtype), None
    grid.sheet.facts["peers"] = grid.sheet.facts.get("peers", {}) | moe_peers.versions(options.peers)
    with grid.tuning():
        for case in grid.cases():
            where = cell(grid, case, hooks)
            del case  # the next shape's weights come when these are gone
    if where:
        print(json.dumps(summarise(grid.sheet.rows), indent=1), where, sep="\n")


def cell(grid: moe_grid.Grid, case: Case, hooks: Sequence[moe_peers.Hook]) -> Path | None:
    """Measure one cell and write it; or only run every peer."""
    options = grid.options
    peers = moe_peers.collect(case, hooks, options.skip)
    if options.once:
        for name, call in peers.items():
            moe_peers.attempt(name, call)
        return None
    mine = {} if "ours" in options.skip else {"ours": ours(case)["moe"]}
    label = f"{case.weights.shape} T={case.T} {case.generator}"
    return grid.keep(facts(case) | grid.compare(label, mine | peers, case.error, both_dense(case), case.bytes))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = moe_grid.parser(__doc__, TOKENS)
    add = parser.add_argument
    add("--fp8", action="store_true", help="weights in fp8 e4m3 with scales of 128x128 blocks")
    add("--name", metavar="FILE", help="result file without .json; default: fused_moe or fused_moe_fp8")
    add("--peers", nargs="+", default=[], metavar="MODULE:FUNCTION", help="more peers, see moe_peers.py")
    add("--prewarm", action="store_true", help="compile the peers in parallel processes first")
    add("--once", action="store_true", help="run every peer once, time nothing")
    return moe_grid.parse(parser, arguments)


def facts(case: Case) -> dict[str, Any]:
    """What a row says of its cell."""
    return {
        "shape": case.weights.shape, "E": case.E, "topk": case.topk, "hidden": case.K, "intermediate": case.N,
        "T": case.T, "routing": case.generator, "dtype": case.weights.dtype,
    }  # fmt: skip


def both_dense(case: Case) -> Callable[[], object]:
    """Both products of the layer over all pairs, as if there were one expert."""
    device, kind = case.x.device, case.w1.dtype
    products = [
        dense(torch.randn(case.P, w.shape[1], device=device).to(kind), w, case.x.dtype)
        for w in (case.w1[0], case.w2[0])
    ]
    return lambda: [product() for product in products]


if __name__ == "__main__":
    main()
