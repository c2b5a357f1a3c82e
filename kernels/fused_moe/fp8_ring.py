"""The `fp8_ring` variant of fused MoE: Hopper's warp-specialised kernel for both products, fp8 weights in blocks.

Sort, quantise the tokens, multiply and quantise, multiply, add a token's pairs up.
"""

from dataclasses import replace
from functools import lru_cache
from math import ceil
from typing import Any

from moecache.kernels.activations import panels, word_of
from moecache.kernels.agreed import BLOCK
from moecache.kernels.formats.fp8 import FMAX
from moecache.kernels.fused_moe import fp8_tiles as tiled
from moecache.kernels.fused_moe.fp8_tiles import Case
from moecache.kernels.fused_moe.sort_and_sum import add_up, sort_rows
from moecache.kernels.gemm.product import ring_layout
from moecache.kernels.gemm.work import is_early
from moecache.kernels.launch import Box, Launch, Operand, Plan, Workspace, launch, planned
from moecache.kernels.matrix import until_summed_name
from moecache.predict.work import Tile, Work
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem

VARIANTS = ("fp8_ring",)
ROWS, PANEL = 64, BLOCK  # rows of a multiplying group, of which a tile has two; columns of a panel, of which it has two
ORDERS = ((8, 4), (8, 3), (1, 4), (16, 3), (32, 3), (1, 3))  # blocks that share a panel; slots: fewer leave more of L2


def fits(problem: Problem, c: Config, device: Device) -> str:
    """Why not, or ''."""
    hidden, middle = problem.dim("hidden"), problem.dim("intermediate")
    if device.arch != "sm_90" or problem.dim("quant", "") != "fp8_block" or problem.dim("unaligned"):
        return "fp8_ring wants sm_90, fp8_block and rows that start on 16 bytes"
    if hidden % BLOCK or middle % BLOCK or problem.dtype not in ("bf16", "fp16"):
        sizes = f"hidden={hidden}, intermediate={middle}, dtype={problem.dtype}"
        return f"{sizes}; allowed are multiples of {BLOCK}, and two-byte dtypes"
    if c["block"] != 2 * ROWS or not 2 <= c["stages"] <= 4 or c["group"] < 1 or c["programs"] < 1:
        return f"{c.name}: a ring has blocks of {2 * ROWS} rows and 2 to 4 stages"
    return ""


def space(problem: Problem, device: Device) -> list[Config]:
    """A few orders of the tiles, where experts have rows enough."""
    return every(problem, device) if problem.tokens * problem.topk > 8 * problem.experts else []


def every(problem: Problem, device: Device) -> list[Config]:
    """The configs of all problems that differ from this one in tokens and routing alone."""
    orders = ORDERS if problem.dim("quant", "") == "fp8_block" else ()
    return [config("fp8_ring", block=BLOCK, stages=stages, group=g, programs=device.units) for g, stages in orders]


def work(problem: Problem, c: Config, device: Device) -> Work:
    """Sort, quantise the tokens, multiply, multiply, and add up."""
    down = Tile("ring_fp8", c["block"], 2 * PANEL, BLOCK, c["group"], 8, c["stages"], c["programs"])
    up = replace(down, gated=int(panels(word_of(problem)) == 2))
    return Work(up, down, early=is_early(c), launches=3, row_hidden=1.5, token_hidden=2.5)


def plan(c: Config, call: Any, out: Operand, device: Device) -> Plan:
    """All launches of a config for a LayerCall of operands.

    Workspace: tokens and sorted rows in fp8 with their scales, and [T · k, K].
    """
    if not out.numel():
        return Plan()
    x, w1, w2, quant = call.hidden_states, call.w1, call.w2, call.quant
    hidden, middle, case = x.shape[1], w2.shape[2], Case.of(call)
    before, up, down = _kernels(c, case)

    def build(work: Workspace, free: bool) -> list[Launch]:
        rows, sorting = sort_rows(call, c["block"], False, device, work, free)
        most = rows.sorted_token_ids.numel()
        xq, xs = tiled.narrow(work, w1.dtype, len(x), hidden), tiled.scales(work, case, len(x), hidden)
        h, hs = work.take(w1.dtype, most, middle), work.take("fp32", middle // BLOCK, most)
        partial = work.take(until_summed_name(x.dtype), call.topk_ids.numel(), hidden)
        found = [*sorting, tiled.quantise(before, x, xq, xs, rows, hidden)]
        found.append(_multiply(up, xq, xs, w1, quant.w1_scale, h, hs, call.w1_bias, rows, call))
        found.append(_multiply(down, h, hs, w2, quant.w2_scale, partial, hs, call.w2_bias, rows, call))
        return [*found, add_up(call, partial, out, False)]

    return planned(build)


def _multiply(
    step: Any, a: Any, scales: Any, w: Any, w_scales: Any, out: Any, out_scales: Any, bias: Any, rows: Any, call: Any
) -> Launch:
    """One product. The scales of the tokens stand by row; those between the products by block of columns."""
    fn, c, programs, options = step
    experts, height, depth = w.shape
    n = height // panels(c["ACT"])
    each = w.strides[0] // w.strides[1] if experts > 1 else height
    described = Box(w, ((experts - 1) * each + height, depth), (w.strides[1], 1), (PANEL, BLOCK), ring_layout(8))
    a_row, (s_row, s_step) = a.strides[0], scales.strides if c["GATHER"] else scales.strides[::-1]
    if not c["GATHER"]:
        a = Box(a, (len(a), depth), (a_row, 1), (ROWS, BLOCK), ring_layout(8))
    tiles = ceil(rows.sorted_token_ids.numel() / (2 * ROWS)) * ceil(n / c["STEP"])
    tensors = a, scales, described, w_scales, out, out_scales, scales if bias is None else bias, call.topk_weights
    sorted_ = rows.sorted_token_ids, rows.expert_ids, rows.num_tokens_post_padded, call.topk_ids.numel()
    strides = a_row, s_row, s_step, out.strides[0], out_scales.strides[0], each
    sizes = n if panels(c["ACT"]) == 2 else PANEL, n, depth, float(call.alpha), float(call.limit)
    return launch(fn, min(programs, tiles), (*tensors, *sorted_, *strides, *sizes), c, options)


@lru_cache(maxsize=1024)
def _kernels(c: Config, case: Case) -> tuple[Any, Any, Any]:
    """Quantise, first product, second product: each with its constexprs and options."""
    from moecache.kernels.gemm import fp8_ring as ring

    fmax = FMAX[case.weights]
    options = {"num_warps": 4}
    same = {"TOPK": case.topk, "BM": ROWS, "BN": PANEL, "BK": BLOCK, "GROUP": c["group"], "STAGES": c["stages"]}
    same |= {"FMAX": fmax, **options}
    up = same | {"STEP": PANEL * (3 - panels(case.act)), "GATHER": True, "ACT": case.act}
    up |= {"WEIGHTED": case.on_input, "BIASED": case.biased[0]}
    down = same | {"STEP": 2 * PANEL, "GATHER": False, "ACT": ""}
    down |= {"WEIGHTED": not case.on_input, "BIASED": case.biased[1]}
    both = ((ring.product, each, c["programs"], options) for each in (up, down))
    return tiled.quantising(case, fmax, case.columns, False, False, {}), *both
