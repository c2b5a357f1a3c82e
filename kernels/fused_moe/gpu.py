"""The Triton variants of fused MoE: their limits, how they are launched and compiled.

`decode` is two launches without a sort. The others sort, multiply, multiply, and add up: `tiles` on any GPU, `heights`
with a lower tile for blocks of few rows, `ring` and `tiles_ring` with Hopper's warp-specialised kernel for both
products or the second one. `combine=atomic` adds to the output in the second product, in no fixed order; `sum` writes
each pair and adds them up afterwards. fp8 weights have kernels of their own, in fused_moe/fp8_tiles.py.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

from moecache.kernels.activations import panels, word_of
from moecache.kernels.formats.fp8 import FMAX, blocks_apart
from moecache.kernels.fused_moe.sort_and_sum import add_up, sort_rows
from moecache.kernels.gemm import vector
from moecache.kernels.gemm.product import BY_PAIR, BY_ROW, KERNELS, Product, multiply, product, unfit
from moecache.kernels.gemm.vector import DECODE_PAIRS
from moecache.kernels.launch import Launch, Operand, Plan, Workspace, launch, planned
from moecache.kernels.matrix import DTYPES, until_summed_name
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem, pow2

MOST = 192  # weights that a thread of decode holds at a time


def fits(problem: Problem, config: Config, device: Device) -> str:
    """Why not, or ''."""
    kind = problem.dim("quant", "")
    if problem.dtype not in DTYPES or (kind and (config.variant != "decode" or kind != "fp8_block")):
        return f"dtype={problem.dtype}, quant={kind or 'none'}: {config.variant} takes bf16, fp16 and fp32"
    if config.variant == "decode":
        return _unfit_decode(problem, config, device)
    if config.variant not in KERNELS:
        return f"variant {config.variant!r} does not exist; allowed are decode, {', '.join(KERNELS)}"
    if config["combine"] not in ("sum", "atomic"):
        return f"combine={config['combine']}; allowed are sum and atomic"
    if config["combine"] == "atomic" and (problem.dim("deterministic") or problem.dtype == "fp32"):
        return "combine=atomic adds in no fixed order"
    if config["combine"] == "atomic" and problem.dtype == "fp16":
        return "combine=atomic adds up in fp16, where a part may be inf of a sum that is not"
    first, second = products(config)
    aligned = not problem.dim("unaligned")
    hidden, middle = problem.dim("hidden"), problem.dim("intermediate")
    most = max(problem.tokens, ceil(problem.tokens * problem.topk / problem.experts))  # a token may name one twice
    if first.block > max(16, 2 * pow2(most)):
        return f"block={first.block}: no expert has more than {most} rows"
    height = panels(word_of(problem))
    return unfit(first, device, problem.dtype, hidden, height, aligned) or unfit(
        second, device, problem.dtype, middle, 1, aligned
    )


def _unfit_decode(problem: Problem, c: Config, device: Device) -> str:
    if problem.tokens * problem.topk > DECODE_PAIRS:
        return f"{problem.tokens} tokens of {problem.topk} experts; decode takes {DECODE_PAIRS} pairs"
    if problem.dim("quant", "") and problem.dim("unaligned"):
        return "unaligned fp8 weights: decode takes rows whose elements lie side by side"
    slots = pow2(problem.topk)
    least = 128 if problem.dim("quant", "") else 64
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


def products(config: Config) -> tuple[Product, Product]:
    """(first product, second product) of a sorted variant."""
    first, second = KERNELS[config.variant]
    return product(config, first, "up_"), product(config, second, "down_")


def check_rows(call: Any) -> None:
    """Raise InvalidInput where elements of a row of weights are not side by side: they are never copied."""
    w1, w2 = call.w1, call.w2
    if w1.stride(2) != 1 or w2.stride(2) != 1:
        raise InvalidInput(f"weights have last strides {w1.stride(2)} and {w2.stride(2)}; allowed is 1")


def plan(config: Config, call: Any, out: Operand, device: Device) -> Plan:
    """All launches of a config for a LayerCall of operands."""
    check_rows(call)
    if not out.numel():
        return Plan()
    if config.variant == "decode":
        return planned(lambda work, free: _decode(config, call, out, work))
    both = products(config)

    def build(work: Workspace, free: bool) -> list[Launch]:
        rows, sorting = sort_rows(call, both[0].block, bool(both[0].pdl), device, work, free)
        return sorting + multiplied([both], [rows], config, call, out, work)

    return planned(build, zeroed=config["combine"] == "atomic")


def multiplied(
    both: Sequence[tuple[Product, Product]],
    rows: Sequence[Any],
    config: Config,
    call: Any,
    out: Operand,
    work: Workspace,
) -> list[Launch]:
    """Multiply, multiply, add up into `out` as `config` combines.

    With the products of one config or of several, for each of which `rows` holds a SortResult.
    """
    x, w1, w2, scales = call.hidden_states, call.w1, call.w2, call.topk_weights
    pairs, topk, atomic = call.topk_ids.numel(), call.topk_ids.shape[1], config["combine"] == "atomic"
    y = out if atomic else work.take(until_summed_name(x.dtype), pairs, w2.shape[1])
    h = work.take(x.dtype, max(r.sorted_token_ids.numel() for r in rows), w2.shape[2])
    found = []
    for (first, second), mine in zip(both, rows, strict=True):
        up = multiply(
            first,
            x,
            w1,
            mine,
            h,
            pairs=pairs,
            topk=topk,
            source=BY_PAIR,
            act=call.activation,
            alpha=call.alpha,
            limit=call.limit,
            weights=scales if call.on_input else None,
            bias=call.w1_bias,
        )
        down = multiply(
            second,
            h,
            w2,
            mine,
            y,
            pairs=pairs,
            topk=topk,
            source=BY_ROW,
            weights=None if call.on_input else scales,
            bias=call.w2_bias,
            atomic=atomic,
        )
        found += [up, down]
    return found if atomic else [*found, add_up(call, y, out, bool(both[-1][0].pdl))]


def _decode(c: Config, call: Any, out: Operand, work: Workspace) -> list[Launch]:
    """Matrix-vector products of every pair, then of every token's slots together."""
    x, w1, w2, ids, quant = call.hidden_states, call.w1, call.w2, call.topk_ids, call.quant
    (tokens, topk), n, k = ids.shape, w2.shape[2], w1.shape[2]
    h = work.take(x.dtype, tokens * topk, n)
    extra = dict(c.extra)
    pdl = bool(extra.get("launch_pdl"))
    same = {"TOPK": topk, "G": call.num_experts, "E": len(w1), "MAPPED": call.expert_map is not None, "PDL": pdl,
            "FMAX": FMAX[w1.dtype] if quant else 0.0}  # fmt: skip
    first = same | {
        "BN": c["up_n"], "BK": c["up_k"], "ACT": call.activation, "WEIGHTED": call.on_input,
        "BIASED": call.w1_bias is not None, "APART": blocks_apart(quant, w1, w2), "EVEN": k % c["up_k"] == 0,
    }  # fmt: skip
    second = same | {
        "SLOTS": pow2(topk), "BN": c["down_n"], "BK": c["down_k"], "WEIGHTED": not call.on_input,
        "BIASED": call.w2_bias is not None,
    }  # fmt: skip
    options = {"launch_pdl": True} if pdl else {}
    scales1, scales2 = (ids, ids) if quant is None else (quant.w1_scale, quant.w2_scale)
    bias1, bias2, mapping = (ids if t is None else t for t in (call.w1_bias, call.w2_bias, call.expert_map))
    up = (x, w1, scales1, bias1, h, ids, mapping, call.topk_weights, x.strides[0], *w1.strides[:2], *ids.strides, n, k,
          float(call.alpha), float(call.limit))  # fmt: skip
    down = (h, w2, scales2, bias2, out, ids, mapping, call.topk_weights, *w2.strides[:2], *ids.strides, out.strides[0],
            k, n)  # fmt: skip
    return [
        launch(vector.up, tokens * topk * ceil(n / c["up_n"]), up, first, {"num_warps": c["up_warps"], **options}),
        launch(vector.down, tokens * ceil(k / c["down_n"]), down, second, {"num_warps": c["down_warps"], **options}),
    ]
