"""The `decode` variant of fused MoE, for few tokens: two launches without a sort, whose programs take whole rows.

Weights are plain, or fp8 in blocks.
"""

from itertools import product
from math import ceil
from typing import Any

from moecache.kernels.activations import panels, word_of
from moecache.kernels.formats.fp8 import FMAX
from moecache.kernels.fused_moe.call import blocks_apart, check_rows
from moecache.kernels.gemm import vector
from moecache.kernels.gemm.vector import DECODE_PAIRS
from moecache.kernels.gemm.work import vectors
from moecache.kernels.launch import Launch, Operand, Plan, Workspace, launch, planned
from moecache.kernels.matrix import DTYPES
from moecache.predict.work import Work
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem, pow2

VARIANTS = ("decode",)
MOST = 192  # weights that a thread holds at a time


def fits(problem: Problem, c: Config, device: Device) -> str:
    """Why not, or ''."""
    kind = problem.dim("quant", "")
    if problem.dtype not in DTYPES or kind not in ("", "fp8_block"):
        return f"dtype={problem.dtype}, quant={kind or 'none'}: decode takes {', '.join(DTYPES)}, plain or fp8_block"
    if problem.tokens * problem.topk > DECODE_PAIRS:
        return f"{problem.tokens} tokens of {problem.topk} experts; decode takes {DECODE_PAIRS} pairs"
    if kind and problem.dim("unaligned"):
        return "unaligned fp8 weights: decode takes rows whose elements lie side by side"
    slots = pow2(problem.topk)
    least = 128 if kind else 64
    up, down = (c["up_n"], c["up_k"], c["up_warps"]), (c["down_n"] * slots, c["down_k"], c["down_warps"])
    for n, k, warps in (up, down):
        lanes = warps * device.wave
        if any(v < 1 or v & (v - 1) for v in (n, k, warps)) or k < least or lanes > device.max_threads:
            return f"n={n}, k={k}, warps={warps}; allowed are powers of two, k from {least}"
        if not 4 <= n * k // lanes <= MOST:
            return f"{n} x {k} weights for {lanes} threads; allowed are 4 to {MOST} each"
    if dict(c.extra).get("launch_pdl") and device.vendor != "nvidia":
        return "launch_pdl=1: only NVIDIA has programmatic dependent launch"
    return ""


def space(problem: Problem, device: Device) -> list[Config]:
    """Every config worth trying; those that do not fit are left out by the op."""
    return every(problem, device) if problem.tokens * problem.topk <= DECODE_PAIRS else []


def every(problem: Problem, device: Device) -> list[Config]:
    """A few whole rows a program; as many bytes on their way as its registers hold. Without a gate, as many rows as
    gate and up have together."""
    hidden, middle, slots = problem.dim("hidden"), problem.dim("intermediate"), pow2(problem.topk)
    whole = 4096 if 2048 < hidden < 4096 else 1024  # one step where a row is no multiple of shorter ones
    depth = 256 if middle % 1024 and middle % 256 == 0 else 512 if middle % 1024 and middle > 1024 else 1024
    ups = ((2, whole, 4), (1, 1024, 4), (16, 512, 8), (8, 1024, 8), (4, 1024, 8))
    downs = ((max(1, 32 // slots), depth, 8), (max(1, 16 // slots), depth, 8), (max(1, 8 // slots), 1024, 8))
    knobs, wide = {"launch_pdl": 1} if device.vendor == "nvidia" else None, device.wave // 32
    rows = 3 - panels(word_of(problem))
    found = []
    for (n, k, w), (m, d, v) in product(ups, downs):
        up = {"up_n": rows * n, "up_k": max(128, min(k, pow2(hidden))), "up_warps": max(1, w // wide)}
        down = {"down_n": m, "down_k": max(128, min(d, pow2(middle))), "down_warps": max(1, v // wide)}
        found.append(config("decode", knobs, **up, **down))
    return found


def work(problem: Problem, c: Config, device: Device) -> Work:
    """Two products row by row."""
    kernel = "vector_fp8" if problem.dim("quant", "") else "vector"
    return vectors(c, kernel, panels(word_of(problem)) == 2)


def plan(c: Config, call: Any, out: Operand, device: Device) -> Plan:
    """Both launches for a LayerCall of operands."""
    check_rows(call)
    return planned(lambda work, free: _launches(c, call, out, work)) if out.numel() else Plan()


def _launches(c: Config, call: Any, out: Operand, work: Workspace) -> list[Launch]:
    """Matrix-vector products of every pair, then of every token's slots together."""
    x, w1, w2, ids, quant = call.hidden_states, call.w1, call.w2, call.topk_ids, call.quant
    (tokens, topk), n, k = ids.shape, w2.shape[2], w1.shape[2]
    h = work.take(x.dtype, tokens * topk, n)
    extra = dict(c.extra)
    pdl = bool(extra.get("launch_pdl"))
    same = {"TOPK": topk, "G": call.num_experts, "E": len(w1), "MAPPED": call.expert_map is not None, "PDL": pdl}
    same |= {"FMAX": FMAX[w1.dtype] if quant else 0.0}
    first = same | {"BN": c["up_n"], "BK": c["up_k"], "ACT": call.activation, "WEIGHTED": call.on_input}
    first |= {"BIASED": call.w1_bias is not None, "APART": blocks_apart(call), "EVEN": k % c["up_k"] == 0}
    second = same | {"SLOTS": pow2(topk), "BN": c["down_n"], "BK": c["down_k"], "WEIGHTED": not call.on_input}
    second |= {"BIASED": call.w2_bias is not None}
    options = {"launch_pdl": True} if pdl else {}
    scales1, scales2 = (ids, ids) if quant is None else (quant.w1_scale, quant.w2_scale)
    bias1, bias2, mapping = (ids if t is None else t for t in (call.w1_bias, call.w2_bias, call.expert_map))
    router, numbers = (ids, mapping, call.topk_weights), (float(call.alpha), float(call.limit))
    up = (x, w1, scales1, bias1, h, *router, x.strides[0], *w1.strides[:2], *ids.strides, n, k, *numbers)
    down = (h, w2, scales2, bias2, out, *router, *w2.strides[:2], *ids.strides, out.strides[0], k, n)
    return [
        launch(vector.up, tokens * topk * ceil(n / c["up_n"]), up, first, {"num_warps": c["up_warps"], **options}),
        launch(vector.down, tokens * ceil(k / c["down_n"]), down, second, {"num_warps": c["down_warps"], **options}),
    ]
