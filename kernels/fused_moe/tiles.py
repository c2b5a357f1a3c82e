"""The variants of fused MoE that sort, multiply, multiply, and add up, with plain weights.

`tiles` runs on any GPU, `heights` with a lower tile for blocks of few rows, `ring` and `tiles_ring` with Hopper's
warp-specialised kernel for both products or the second one. `combine=atomic` adds to the output in the second product,
in no fixed order; `sum` writes each pair and adds them up afterwards.
"""

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Any

from moecache.kernels.activations import panels, word_of
from moecache.kernels.fused_moe.call import check_rows
from moecache.kernels.fused_moe.sort_and_sum import add_up, sort_rows
from moecache.kernels.gemm.product import BY_PAIR, BY_ROW, KERNELS, Product, multiply, product, unfit
from moecache.kernels.gemm.work import layer
from moecache.kernels.launch import Launch, Operand, Plan, Workspace, planned
from moecache.kernels.matrix import DTYPES, until_summed_name
from moecache.predict.work import Work
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem, Value, pow2

VARIANTS = tuple(KERNELS)


def fits(problem: Problem, c: Config, device: Device) -> str:
    """Why not, or ''."""
    kind = problem.dim("quant", "")
    if problem.dtype not in DTYPES or kind:
        return f"dtype={problem.dtype}, quant={kind or 'none'}: {c.variant} takes bf16, fp16 and fp32"
    if c["combine"] not in ("sum", "atomic"):
        return f"combine={c['combine']}; allowed are sum and atomic"
    if c["combine"] == "atomic" and (problem.dim("deterministic") or problem.dtype == "fp32"):
        return "combine=atomic adds in no fixed order"
    if c["combine"] == "atomic" and problem.dtype == "fp16":
        return "combine=atomic adds up in fp16, where a part may be inf of a sum that is not"
    first, second = products(c)
    aligned = not problem.dim("unaligned")
    hidden, middle = problem.dim("hidden"), problem.dim("intermediate")
    most = max(problem.tokens, ceil(problem.tokens * problem.topk / problem.experts))  # a token may name one twice
    if first.block > max(16, 2 * pow2(most)):
        return f"block={first.block}: no expert has more than {most} rows"
    height = panels(word_of(problem))
    return unfit(first, device, problem.dtype, hidden, height, aligned) or unfit(
        second, device, problem.dtype, middle, 1, aligned
    )


def products(c: Config) -> tuple[Product, Product]:
    """(first product, second product) of a sorted variant."""
    first, second = KERNELS[c.variant]
    return product(c, first, "up_"), product(c, second, "down_")


def plan(c: Config, call: Any, out: Operand, device: Device) -> Plan:
    """All launches of a config for a LayerCall of operands."""
    check_rows(call)
    if not out.numel():
        return Plan()
    both = products(c)

    def build(work: Workspace, free: bool) -> list[Launch]:
        rows, sorting = sort_rows(call, both[0].block, bool(both[0].pdl), device, work, free)
        return sorting + multiplied([both], [rows], c, call, out, work)

    return planned(build, zeroed=c["combine"] == "atomic")


def multiplied(
    both: Sequence[tuple[Product, Product]], rows: Sequence[Any], c: Config, call: Any, out: Operand, work: Workspace
) -> list[Launch]:
    """Multiply, multiply, add up into `out` as the config combines.

    With the products of one config or of several, for each of which `rows` holds a SortResult.
    """
    x, w1, w2, pairs = call.hidden_states, call.w1, call.w2, call.topk_ids.numel()
    atomic, times = c["combine"] == "atomic", partial(multiply, pairs=pairs, topk=call.topk_ids.shape[1])
    y = out if atomic else work.take(until_summed_name(x.dtype), pairs, w2.shape[1])
    h = work.take(x.dtype, max(r.sorted_token_ids.numel() for r in rows), w2.shape[2])
    before, after = (call.topk_weights, None) if call.on_input else (None, call.topk_weights)
    act = {"act": call.activation, "alpha": call.alpha, "limit": call.limit}
    found = []
    for (first, second), mine in zip(both, rows, strict=True):
        found += [
            times(first, x, w1, mine, h, source=BY_PAIR, weights=before, bias=call.w1_bias, **act),
            times(second, h, w2, mine, y, source=BY_ROW, weights=after, bias=call.w2_bias, atomic=atomic),
        ]
    return found if atomic else [*found, add_up(call, y, out, bool(both[-1][0].pdl))]


def work(problem: Problem, c: Config, device: Device) -> Work:
    """Two grouped products, and what stands around them."""
    return layer(c, panels(word_of(problem)) == 2)


# --- what is tried ---


def space(problem: Problem, device: Device) -> list[Config]:
    """Every config worth trying; those that do not fit are left out by the op."""
    return _configs(problem, device, max(1.0, problem.tokens * problem.topk / problem.experts))


def every(problem: Problem, device: Device) -> list[Config]:
    """The configs of all problems that differ from this one in tokens and routing alone."""
    return _configs(problem, device, None)


def _configs(problem: Problem, device: Device, rows: float | None) -> list[Config]:
    """Those for so many rows of an expert; None: for any number."""
    extra: dict[str, Value] = {"launch_pdl": 1} if device.vendor == "nvidia" else {}
    if device.xcds > 1:
        extra["xcds"] = device.xcds
    if problem.dim("quant", ""):
        return []
    if problem.dtype == "fp32":
        found = [_tiles(extra, 16, 16, (32, 32, 2, 4), (32, 32, 2, 4), tma=0, swap=0)]
    elif device.vendor == "amd":
        found = _cdna(rows, device.arch, extra)
    else:
        found = _hopper(rows, problem, device, extra)
    return found if panels(word_of(problem)) == 2 else [_widened(c) for c in found]


def _widened(c: Config) -> Config:
    """Without a gate, a panel as wide as gate and up together brings as many bytes a step. A ring has two anyway."""
    if KERNELS.get(c.variant, ("",))[0] == "ring":
        return c
    return config(c.variant, dict(c.extra), **dict(c.params) | {"up_n": 2 * c["up_n"]})


def _tiles(
    extra: dict[str, Value], block: int, low: int, up: tuple[int, int, int, int], down: tuple[int, int, int, int], *,
    group: int = 1, combine: str = "sum", variant: str = "tiles", **more: Value,
) -> Config:  # fmt: skip
    """`up` and `down` are (n, k, stages, warps)."""
    params: dict[str, Value] = {"block": block, "group": group, "combine": combine, **more}
    for prefix, values in (("up", up), ("down", down)):
        params |= {f"{prefix}_{name}": v for name, v in zip(("n", "k", "stages", "warps"), values, strict=True)}
    if low != block:
        variant, params = "heights", params | {"low": low}
    return config(variant, extra, **params)


def _hopper(rows: float | None, problem: Problem, device: Device, extra: dict[str, Value]) -> list[Config]:
    """What won somewhere on an H200 or an H100 (benchmarks/notes/), and its neighbours. Dependent launch serves small
    tiles; a large ring that starts early starves the kernel before it."""
    found: list[Config] = []
    if (
        problem.dim("unaligned") or problem.dim("hidden") % 16 or problem.dim("intermediate") % 16
    ):  # one value at a time
        shapes = ((b, (64, 64, 3, warps)) for b, warps in ((16, 4), (64, 8)))
        found = [_tiles({}, b, b, shape, shape, tma=0, swap=int(b < 64)) for b, shape in shapes]
    if problem.dim("unaligned"):
        return found
    ring: dict[str, Value] = {"tma": 1, "programs": device.units}
    short, deep, flat = (64, 64, 5, 4), (64, 256, 3, 4), (128, 64, 5, 4)
    rung, long, thick = (64, 64, 9, 4), (128, 64, 5, 4), (128, 128, 3, 4)
    if rows is None or rows <= 48:
        for block, ups in ((16, (deep, short)), (32, (short,))):
            found += [_tiles(extra, block, block, up, down, tma=1, swap=1) for up in ups for down in (short, flat)]
        for knobs in (extra, {}):
            for block, up in ((16, deep), (32, (64, 128, 4, 4))):
                found.append(_tiles(knobs, block, block, up, thick, variant="tiles_ring", swap=1, **ring))
            for block, up, down in ((16, thick, rung), (32, thick, rung), (32, rung, long), (32, long, thick)):
                found.append(_tiles(knobs, block, block, up, down, variant="ring", swap=1, **ring))
    if rows is None or 8 < rows <= 128:
        for knobs in (extra, {}):
            found.append(_tiles(knobs, 64, 64, rung, rung, variant="ring", swap=1, **ring))
    if rows is None or rows >= 12:
        turns, whole = ring | {"swap": 0, "parts": 2}, ring | {"swap": 0, "parts": 1}
        narrow, half, tall, less = (64, 64, 6, 4), (64, 64, 4, 4), (128, 64, 4, 8), (128, 64, 3, 4)
        for combine in ("sum", "atomic"):
            ends: dict[str, Value] = {"combine": combine, "variant": "ring", **_sweep(problem, combine)}
            found += [_tiles({}, 64, 64, long, long, group=g, **ends, **turns) for g in (1, 8, 16)]
            found += [_tiles({}, 64, 64, narrow, narrow, group=g, **ends, **turns) for g in (1, 8)]
            found += [_tiles({}, 128, 128, tall, tall, group=g, **ends, **whole) for g in (1, 8, 16)]
            found += [_tiles({}, 256, 256, half, half, group=g, **ends, **turns) for g in (1, 8)]
        if sweep := _sweep(problem, "atomic"):  # short products: fewer slots leave more of L2 to what they add to
            adding: dict[str, Value] = {"combine": "atomic", "variant": "ring", **sweep, **whole}
            found += [_tiles({}, 128, 128, tall, (128, 64, 3, 8), group=g, **adding) for g in (1, 8)]
        found += [_tiles({}, 128, low, tall, less, group=8, tma=1, swap=0) for low in (32, 128)]
        found.append(_tiles({}, 64, 64, (128, 64, 4, 4), (128, 64, 4, 4), group=8, tma=1, swap=0))
    return found


def _sweep(problem: Problem, combine: str) -> dict[str, Value]:
    """Where the second product is short and adds to the output: all blocks take one panel after the other, so that the
    columns added to stay in L2."""
    short = problem.dim("hidden") >= 8 * problem.dim("intermediate")
    return {"down_group": 1024} if short and combine == "atomic" else {}


def _knobs(arch: str) -> list[dict[str, Value]]:
    """Options of AMD's compiler that others tune: size of the matrix instruction, waves, packing (not on gfx950)."""
    packed: list[dict[str, Value]] = [{"matrix_instr_nonkdim": 16, "kpack": 2}] if arch == "gfx942" else []
    return [{"matrix_instr_nonkdim": 16}, {"waves_per_eu": 2}, *packed]


def _cdna(rows: float | None, arch: str, extra: dict[str, Value]) -> list[Config]:
    """Compiled, checked and interpreted, never run on hardware: plain tiles, few of them."""
    found: list[Config] = []
    few = [(16, (32, 128, 2, 4), (64, 128, 2, 4))]
    few += [(block, (64, 64, 2, 4), (128, 64, 2, 4)) for block in (16, 32, 64)]
    few += [(128, (64, depth, 2, 8), (128, depth, 2, 8)) for depth in (64, 32)]
    for block, up, down in few:
        near = rows is None or (block <= max(16, 4 * pow2(ceil(rows))) and (block >= 16 * rows / 64 or block == 128))
        for group in (1,) if block < 64 else (1, 8):
            found += [_tiles(extra, block, block, up, down, group=group, tma=0, swap=0)] if near else []
        if near and block >= 64 and up[1] == 64:
            found += [_tiles(extra | knobs, block, block, up, down, group=8, tma=0, swap=0) for knobs in _knobs(arch)]
    if rows is None or rows >= 24:
        found.append(_tiles(extra, 64, 16, (64, 64, 2, 4), (64, 64, 2, 4), group=8, tma=0, swap=0))
    return found
